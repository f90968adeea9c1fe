"""Reading config.pbtxt, and refusing invalid ones."""

from __future__ import annotations

import pytest
from safelight_server.catalog import config_pbtxt

TEXT = """
name: "a"  # a comment
max_batch_size: 8
input { name: "sample" data_type: TYPE_FP32 dims: [4, -1, 8] reshape { shape: [] } }
output [ { name: "image" data_type: TYPE_FP32 dims: 3 dims: 64 } ]
parameters { key: "k" value { string_value: "max_batch_size: 99 }" } }
"""


def test_bound_and_shapes_are_read_in_either_notation(tmp_path):
    (tmp_path / "config.pbtxt").write_text(TEXT)
    config = config_pbtxt.read(tmp_path / "config.pbtxt")
    assert config.max_rows == 8
    assert config.inputs == {"sample": (4, -1, 8)}
    assert config.outputs == {"image": (3, 64)}


@pytest.mark.parametrize("data", [b"input {", b"max_batch_size: many", b"\xff\xfe"])
def test_what_is_no_text_format_names_the_file(tmp_path, data):
    (tmp_path / "config.pbtxt").write_bytes(data)
    with pytest.raises(config_pbtxt.ConfigError, match=r"config\.pbtxt"):
        config_pbtxt.read(tmp_path / "config.pbtxt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(config_pbtxt.ConfigError, match=r"gone\.pbtxt"):
        config_pbtxt.read(tmp_path / "gone.pbtxt")


def test_shapes_are_compared_where_both_are_known():
    found = {"sample": (4, -1, 8), "timestep": (1,)}
    assert config_pbtxt.mismatches(found, {"sample": (4, 32, 8), "timestep": (-1,)}) == []
    assert config_pbtxt.mismatches(found, {"sample": (4, 32, 9)}) == [
        "sample is [4, -1, 8], the manifest needs [4, 32, 9]"
    ]
    assert config_pbtxt.mismatches(found, {"sample": (4, 32)}) != []
    assert config_pbtxt.mismatches(found, {"context": (4,)}) == ["context is missing"]


def test_fields_of_a_newer_triton_are_skipped(tmp_path):
    (tmp_path / "config.pbtxt").write_text(TEXT + "field_of_tomorrow { value: 1 }")
    assert config_pbtxt.read(tmp_path / "config.pbtxt").max_rows == 8
