"""`python -m load_tests.seasons` counts alarms of the seasonal alerts and of static thresholds on synthetic traffic.

Prometheus itself evaluates the rules of deploy/prometheus: promtool writes the traffic, and what the rules record from
it, as blocks. A Prometheus on these blocks evaluates the alerts' expressions every five minutes of the last two weeks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from load_tests.seasons.traffic import DAY_S, EVENTS, MINUTE_S, TRAINED_WEEKS, WEEKEND, WEEKS, counts, usual
from tests.support.prometheus_server import PrometheusServer, prometheus

ROOT = Path(__file__).parent.parent.parent
RULES = ROOT / "deploy/prometheus"
STEP_S = 300
LONG_BLOCKS = "--max-block-duration=400h"
FOR_STEPS = 3
"""Evaluations that `for: 15m` of the alerts takes."""
SLACK_S = 1800
"""An alarm that begins within this time after an event is neither right nor false, since rates are means over time."""
WEEKDAY_PEAK = max(usual(second) for second in range(0, DAY_S, STEP_S))
WEEKDAY_LOW = min(usual(second) for second in range(0, DAY_S, STEP_S))
NOW = "job:safelight_requests:rate15m"
STATIC = {
    "static: above 1.5 x the weekdays' peak, below half their lowest": (1.5 * WEEKDAY_PEAK, 0.5 * WEEKDAY_LOW),
    "static: above 1.5 x the weekend's peak, below half the lowest": (1.5 * WEEKEND * WEEKDAY_PEAK, 0.5 * WEEKDAY_LOW),
    "static: above 1.5 x the weekend's peak, below the weekdays' lowest": (1.5 * WEEKEND * WEEKDAY_PEAK, WEEKDAY_LOW),
}


def detectors() -> dict[str, str]:
    """Expressions that are true during an incident, by name."""
    groups = yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]
    alerts = {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}
    found = {"seasonal": f"({alerts['SafelightTrafficHigh']}) or ({alerts['SafelightTrafficLow']})"}
    return found | {name: f"{NOW} > {high} or {NOW} < {low}" for name, (high, low) in STATIC.items()}


def fill(folder: Path, seeds: Sequence[int], begin: int) -> None:
    """Writes the traffic of each seed (a job each), and what the rules record from it, as blocks of Prometheus."""
    metrics, data = folder / "traffic.txt", str(folder / "data")
    with metrics.open("w") as file:
        file.write("# TYPE safelight_generations counter\n")
        for seed in seeds:
            for second, total in counts(seed):
                file.write(f'safelight_generations_total{{job="{seed}",status="OK"}} {total} {begin + second}\n')
        file.write("# TYPE safelight_refused counter\n")
        for seed in seeds:
            for second in range(0, WEEKS * 7 * DAY_S, MINUTE_S):
                file.write(f'safelight_refused_total{{job="{seed}",reason="QUEUE_FULL"}} 0 {begin + second}\n')
        file.write("# EOF\n")
    promtool("openmetrics", LONG_BLOCKS, str(metrics), data)
    metrics.unlink()
    for name, groups in (("recording.yml", ["safelight-requests"]), ("seasons.yml", ["safelight-seasons"])):
        rules = yaml.safe_load((RULES / name).read_text())
        kept = [group for group in rules["groups"] if group["name"] in groups]
        for group in kept:
            for rule in group["rules"]:  # a file each, since a rule may use what the previous one records
                (folder / "rule.yml").write_text(yaml.safe_dump({"groups": [group | {"rules": [rule]}]}))
                with prometheus(folder, "{}\n") as server:
                    times = (f"--start={begin}", f"--end={begin + WEEKS * 7 * DAY_S}", f"--eval-interval={STEP_S}s")
                    to = (f"--url={server.url}", f"--output-dir={data}", LONG_BLOCKS)
                    promtool("rules", *times, *to, str(folder / "rule.yml"))


def promtool(kind: str, *arguments: str) -> None:
    """Runs `promtool tsdb create-blocks-from`; fails with what it printed."""
    command = ["promtool", "tsdb", "create-blocks-from", kind, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")


def alarms(server: PrometheusServer, expression: str, begin: int) -> dict[str, list[tuple[int, int]]]:
    """Intervals in which an alert fires, in seconds after `begin`, by job: from its third true value in a row."""
    first, last = begin + TRAINED_WEEKS * 7 * DAY_S, begin + WEEKS * 7 * DAY_S
    found: dict[str, list[tuple[int, int]]] = {}
    for series in server.over(f"({expression}) * 0 + 1", first, last, STEP_S):
        times = [int(moment) - begin for moment, _ in series["values"]]
        runs: list[list[int]] = []
        for moment in times:
            if runs and moment - runs[-1][-1] == STEP_S:
                runs[-1].append(moment)
            else:
                runs.append([moment])
        episodes = [(run[FOR_STEPS], run[-1]) for run in runs if len(run) > FOR_STEPS]
        found[series["metric"]["job"]] = found.get(series["metric"]["job"], []) + episodes
    return found


def scored(found: Mapping[str, Sequence[tuple[int, int]]], seeds: Sequence[int]) -> dict[str, Any]:
    """False alarms a week, their hours a week, and the number of traces in which an alarm began at each event."""
    events = [event for event in EVENTS if event.begin_s >= TRAINED_WEEKS * 7 * DAY_S]
    num_false, false_s, seen = 0, 0, {event.name: 0 for event in events}
    for seed in seeds:
        hit = set()
        for begin, end in found.get(str(seed), ()):
            met = [event for event in events if event.begin_s <= begin <= event.end_s + SLACK_S]
            hit |= {event.name for event in met if begin <= event.end_s}
            num_false += not met
            false_s += 0 if met else end - begin + STEP_S
        for name in hit:
            seen[name] += 1
    weeks = (WEEKS - TRAINED_WEEKS) * len(seeds)
    return {"false_per_week": num_false / weeks, "false_hours_per_week": false_s / 3600 / weeks, "seen": seen}


def evaluate(seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Computes the scores of each detector."""
    midnight = int(time.time()) // DAY_S * DAY_S
    monday = midnight - (midnight // DAY_S + 3) % 7 * DAY_S  # 1 January 1970 was a Thursday
    begin = monday - WEEKS * 7 * DAY_S
    with tempfile.TemporaryDirectory(prefix="safelight-seasons-") as name:
        folder = Path(name)
        fill(folder, seeds, begin)
        with prometheus(folder, "{}\n") as server:
            return {name: scored(alarms(server, asked, begin), seeds) for name, asked in detectors().items()}


def main() -> None:
    """Prints a table, and writes the figures to a file if the command line names one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=int, default=10, help="traces, from the seeds 1, 2, ...")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    seeds = list(range(1, given.traces + 1))
    scores = evaluate(seeds)
    for name, score in scores.items():
        print(
            f"{name}: {score['false_per_week']:.2f} false alarms a week, {score['false_hours_per_week']:.2f} h a week"
        )
        for event, count in score["seen"].items():
            print(f"    {event}: {count} of {len(seeds)}")
    if given.out:
        given.out.write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
