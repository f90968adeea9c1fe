"""deploy/gpu/check without a GPU: its options, the commands that it would run, its comparison and its table."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

FILE = Path(__file__).parents[2] / "deploy" / "gpu" / "check.py"


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("gpu_check", FILE)
    module = sys.modules["gpu_check"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_check"]


def test_its_options_have_defaults_for_a_gpu(check):
    given = check.arguments().parse_args(["served"])
    assert (given.models, given.device, given.dtype, given.plan) == (Path("served"), "cuda:0", "float16", False)
    assert given.at_once == (1, 8, 16)
    assert check.arguments().parse_args(["served", "--at-once", "1,2"]).at_once == (1, 2)


@pytest.mark.parametrize("options", [[], ["served", "--at-once", "0"], ["served", "--dtype", "int8"]])
def test_wrong_options_are_refused(check, options):
    with pytest.raises(SystemExit) as ended:
        check.arguments().parse_args(options)
    assert ended.value.code == 2


def test_a_machine_without_a_gpu_is_told(check, monkeypatch, capsys):
    monkeypatch.setattr(check.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["check", "served"])
    with pytest.raises(SystemExit, match="nvidia-smi is not there"):
        check.main()
    assert check.device_line("cpu") == "device cpu: no GPU is tried"


def test_the_commands_for_plans_name_files_that_are_there(check):
    write, build = check.plan_commands(Path("served"), Path("out/repository"))
    assert write[1:] == ["-m", "safelight_server", "repository", "--accelerator", "plan", "--models-dir", "served",
                         "--out", "out/repository"]  # fmt: skip
    assert Path(build[1]).is_file()
    assert "--grpc-address=127.0.0.1" in check.triton_options(Path("r"), 1, 2, 3)


def test_a_picture_that_is_off_is_seen_in_the_table(check):
    black, grey = np.zeros((4, 4, 3), np.int64), np.full((4, 4, 3), 8, np.int64)
    assert check.deviation([black, black], [black, grey]) == (8.0, 8)
    parts = [
        check.Part("onnx", "o", 0.0, 0, {1: 2.0, 8: 9.5}, {1: 3.0}),
        check.Part("torch", "t", 8.0, 8, {1: 1.0}, {1: 6.0}),
    ]
    lines = check.table(parts).splitlines()
    assert lines[0] == "| runtime | mean off | worst byte | ms, 1 rows | ms, 8 rows | pictures/s, 1 at once |"
    assert lines[3] == "| torch | 8.000 | 8 | 1.00 |  | 6.00 |"
    assert lines[-1] == "- torch: `t`"
