"""The rules are valid, each alert has a test and a runbook, and they use metrics that the server exports."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from safelight_server.telemetry import Metrics

from tools.dashboard_panels import DASHBOARDS

ROOT = Path(__file__).parent.parent.parent
RULES = sorted((ROOT / "deploy/prometheus").glob("*.yml"))
TESTS = sorted((ROOT / "deploy/prometheus/tests").glob("*.yml"))
RUNBOOKS = ROOT / "docs/operations/runbooks"
TRITON = {
    *("nv_inference_request_success", "nv_inference_request_failure", "nv_inference_count", "nv_inference_exec_count"),
    *("nv_inference_queue_duration_us", "nv_inference_compute_infer_duration_us", "nv_inference_pending_request_count"),
}
"""Triton's metrics in queries; test_dashboards checks those that exist on CPUs with a real Triton."""
DCGM = set(re.findall(r"^# TYPE (\w+)", (ROOT / "tests/watching/dcgm_exporter.txt").read_text(), re.MULTILINE))
"""Metrics of dcgm-exporter: those of its default-counters.csv, and one of dcp-metrics-included.csv."""
METRIC = re.compile(r"(?<![\w:])(?:safelight|nv|process|DCGM_FI)_\w+")


def rules(kind: str) -> list[dict[str, Any]]:
    found = [
        rule
        for file in RULES
        if file.name != "prometheus.yml"
        for group in yaml.safe_load(file.read_text())["groups"]
        for rule in group["rules"]
    ]
    return [rule for rule in found if kind in rule]


def exported(registry: CollectorRegistry) -> set[str]:
    names = set()
    for family in registry.collect():
        names.add(family.name)
        if family.type == "counter":
            names.add(f"{family.name}_total")
        elif family.type == "histogram":
            names |= {f"{family.name}_{end}" for end in ("bucket", "sum", "count")}
    return names


def promtool(*arguments: str) -> str:
    done = subprocess.run(["promtool", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_the_rules_and_the_configuration() -> None:
    promtool("check", "rules", *(str(file) for file in RULES if file.name != "prometheus.yml"))
    promtool("check", "config", "deploy/prometheus/prometheus.yml")


def test_the_compose_file_gives_prometheus_the_rules() -> None:
    configuration = yaml.safe_load((ROOT / "deploy/compose/prometheus.yml").read_text())
    example = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert configuration["rule_files"] == [f"/etc/prometheus/rules/{name}" for name in example["rule_files"]]
    service = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]["prometheus"]
    assert "./prometheus:/etc/prometheus/rules:ro" in service["volumes"]
    assert "--storage.tsdb.retention.time=35d" in service["command"], "seasons.yml looks four weeks back"


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.stem)
def test_the_rules_do_what_their_tests_say(file: Path) -> None:
    promtool("test", "rules", str(file))


def test_each_alert_is_seen_firing_in_a_test() -> None:
    seen = set(re.findall(r'ALERTS\{alertname="(\w+)",alertstate="firing"', "".join(f.read_text() for f in TESTS)))
    elsewhere: set[str] = set()
    assert {rule["alert"] for rule in rules("alert")} - elsewhere == seen


def test_each_alert_has_a_runbook_and_each_runbook_an_alert() -> None:
    alerts = rules("alert")
    assert {rule["alert"] for rule in alerts} == {page.stem for page in RUNBOOKS.glob("*.md")}
    for rule in alerts:
        assert rule["annotations"]["runbook"] == f"docs/operations/runbooks/{rule['alert']}.md"
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert (RUNBOOKS / f"{rule['alert']}.md").read_text().startswith(f"# {rule['alert']}\n")


def test_rules_dashboards_and_runbooks_name_metrics_that_are_exported() -> None:
    asked = {str(rule["expr"]) for rule in rules("expr")}
    asked |= {
        q for _, rows in DASHBOARDS.values() for panels in rows.values() for p in panels for q in p.queries.values()
    }
    asked |= {code for page in RUNBOOKS.glob("*.md") for code in re.findall(r"`([^`]+)`", page.read_text())}
    named = {name for text in asked for name in METRIC.findall(text)}
    assert len(named) > 50
    assert named <= exported(Metrics().registry) | TRITON | DCGM


def test_recorded_series_that_are_asked_for_are_recorded() -> None:
    recorded = {rule["record"] for rule in rules("record")}
    asked = {str(rule["expr"]) for rule in rules("expr")}
    asked |= {
        q for _, rows in DASHBOARDS.values() for panels in rows.values() for p in panels for q in p.queries.values()
    }
    assert {name for text in asked for name in re.findall(r"\b(?:job|model):\w+:\w+", text)} <= recorded
