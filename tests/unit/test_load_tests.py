"""Which parts `make bench` measures, and the Triton models that `merging` writes."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from load_tests.bench import merging
from load_tests.bench.__main__ import LONG, PARTS, chosen, module_of, parts

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("name", PARTS)
def test_a_part_has_a_plan_a_tiny_one_and_measures_by_it(name: str) -> None:
    part = importlib.import_module(module_of(name))
    assert type(part.SMOKE) is part.Plan
    assert part.Plan() != part.SMOKE
    assert list(inspect.signature(part.measure).parameters) == ["plan"]


def test_the_long_parts_are_measured_by_name_and_on_tiny_plans() -> None:
    assert chosen((), smoke=False) == [name for name in PARTS if name not in LONG]
    assert chosen((), smoke=True) == list(PARTS)
    assert [chosen((name,), smoke=False) for name in PARTS] == [[name] for name in PARTS]
    assert parts("hits,throughput,") == ("hits", "throughput")
    with pytest.raises(argparse.ArgumentTypeError, match="nothing: choose from throughput"):
        parts("hits,nothing")


def test_the_page_of_benchmarks_names_all_parts() -> None:
    [usage] = re.findall(r"ONLY=throughput(.*?)make bench-smoke", (ROOT / "docs/benchmarks.md").read_text(), re.DOTALL)
    assert set(re.findall(r"\w+", usage)) >= set(PARTS)


def test_models_of_merging_differ_in_how_triton_waits(tmp_path: Path) -> None:
    merging.write_repository(tmp_path, (16, 64, 256))
    found = {}
    for file in tmp_path.glob("*/config.pbtxt"):
        config = text_format.Parse(file.read_text(), model_config_pb2.ModelConfig())
        assert config.name == file.parent.name
        assert config.max_batch_size == 64
        batching = config.dynamic_batching
        found[config.name] = (batching.max_queue_delay_microseconds, *batching.preferred_batch_size)
    assert found == {
        "owner": (0,),
        "at_once": (0,),
        "delay": (5_000,),
        "preferred": (5_000, 16, 32, 64),
        "all_16": (200_000, 16),
        "all_64": (200_000, 64),
    }
