"""The folder of adapters as people fill it: files without a folder, odd names, unfinished copies, files that are none."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safelight_server.catalog.adapter_files import AdapterFileError, parse
from safelight_server.catalog.adapters import AdapterLibrary
from safelight_server.catalog.manifest import AdapterRoom
from structlog.testing import capture_logs

from tests.support.adapters import ROOM, matrices, safetensors, write_adapter

WHOLE = safetensors(matrices(2))
HEADER_BYTES = int.from_bytes(WHOLE[:8], "little")


def library(folder: Path) -> AdapterLibrary:
    return AdapterLibrary(folder, {"small": AdapterRoom.model_validate(ROOM)}, 1 << 20)


def why_not(folder: Path, name: str) -> str:
    adapters = library(folder)
    assert name not in adapters.of("small")
    return adapters.misfit("small", name)


def test_a_file_without_a_folder_is_an_adapter_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "pixel-art.v2.safetensors").write_bytes(WHOLE)
    adapters = library(tmp_path)
    [file] = adapters.of("small").values()
    assert (file.name, file.rank) == ("pixel-art.v2", 2)
    assert adapters.weights("small", file.name, file.sha256).shape[0] == 2
    (tmp_path / "pixel-art.v2.safetensors").write_bytes(safetensors(matrices(3)))
    adapters.look()
    assert adapters.of("small")["pixel-art.v2"].rank == 3
    (tmp_path / "pixel-art.v2.safetensors").unlink()
    adapters.look()
    assert not adapters.of("small")


def test_a_folder_and_a_file_of_one_name_are_not_mixed_up(tmp_path: Path) -> None:
    write_adapter(tmp_path, "pixel", rank=3)
    (tmp_path / "pixel.safetensors").write_bytes(WHOLE)
    with capture_logs() as said:
        adapters = library(tmp_path)
    assert adapters.of("small")["pixel"].rank == 3
    [warned] = [entry for entry in said if entry["event"] == "adapter_not_offered"]
    assert "has the name of the folder pixel beside it" in warned["reason"]
    (tmp_path / "pixel" / "adapter_model.safetensors").unlink()
    (tmp_path / "pixel").rmdir()
    adapters.look()
    assert adapters.of("small")["pixel"].rank == 2


@pytest.mark.parametrize("name", ["Pixel Art", "pixel!", "-pixel", "ピクセル", "x" * 65])
def test_a_name_that_requests_cannot_say_is_reported(tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path, name)
    assert "has a name that requests cannot say; rename it: letters, digits" in why_not(tmp_path, name)


def test_what_else_lies_in_a_folder_is_named(tmp_path: Path) -> None:
    place = write_adapter(tmp_path, "epochs")
    (place / "epoch-1.safetensors").write_bytes(WHOLE)
    (place / ".epoch-2.safetensors").write_bytes(b"of the operating system")
    assert "there are 2: adapter_model.safetensors, epoch-1.safetensors" in why_not(tmp_path, "epochs")
    (place / "epoch-1.safetensors").unlink()
    assert list(library(tmp_path).of("small")) == ["epochs"], "hidden files do not count"
    (tmp_path / "pickled.pt").write_bytes(b"")
    assert "is a pickle, which can run code" in why_not(tmp_path, "pickled.pt")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".cache").mkdir()
    assert not why_not(tmp_path, "notes.txt") and not why_not(tmp_path, ".cache")


def test_an_unfinished_copy_is_offered_when_it_is_finished(tmp_path: Path) -> None:
    file = tmp_path / "pixel.safetensors"
    for num_bytes in (0, 5, 8, HEADER_BYTES, len(WHOLE) - 1):
        file.write_bytes(WHOLE[:num_bytes])
        assert why_not(tmp_path, "pixel")
    adapters = library(tmp_path)
    assert "is cut off: 1 bytes are missing" in adapters.misfit("small", "pixel")
    file.write_bytes(WHOLE)
    adapters.look()
    assert "pixel" in adapters.of("small")


def test_a_file_that_cannot_be_read_keeps_no_other_from_being_offered(tmp_path: Path) -> None:
    write_adapter(tmp_path, "good")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "device.safetensors").symlink_to("/dev/zero")
    place = write_adapter(tmp_path, "no-configuration")
    (place / "adapter_config.json").mkdir()
    adapters = library(tmp_path)
    assert list(adapters.of("small")) == ["good"]
    for name in ("link", "device", "no-configuration"):
        assert adapters.misfit("small", name).startswith("cannot be read: "), name


def with_header(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(64)


ENTRY = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}
KEY = "base_model.model.down.attn1.to_q.lora_A.weight"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(changes=st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), JSON, min_size=1), metadata=JSON)
def test_a_header_of_any_form_is_an_adapter_or_an_error_of_ours(changes: dict[str, object], metadata: object) -> None:
    for header in ({KEY: ENTRY | changes}, {KEY: ENTRY, "__metadata__": metadata}, changes, metadata):
        with pytest.raises(AdapterFileError):
            parse(with_header(header))


@pytest.mark.parametrize("metadata", [7, [], "x", {"lora_alpha": "x"}])
def test_metadata_of_another_form_is_an_error_of_ours(metadata: object) -> None:
    tensors = matrices(2)
    whole = safetensors(tensors, {"lora_adapter_metadata": metadata})  # type: ignore[dict-item]
    try:
        assert parse(whole).keys() == parse(safetensors(tensors)).keys()
    except AdapterFileError as error:
        wanted = "has a configuration that is no JSON object" if metadata == "x" else "is no safetensors file"
        assert str(error) == wanted


@pytest.mark.parametrize("alpha", [6e38, -6e38, 1e300])
def test_an_alpha_whose_weights_float32_cannot_hold_is_refused(alpha: float) -> None:
    with pytest.raises(AdapterFileError, match=r"has an alpha of .* with which its numbers are not finite"):
        parse(WHOLE, json.dumps({"lora_alpha": alpha}).encode())


@given(config=JSON)
def test_a_configuration_of_any_form_is_read_or_an_error_of_ours(config: object) -> None:
    for given_config in (config, {"lora_alpha": config}, {"alpha_pattern": config}, {"use_rslora": config}):
        try:
            layers = parse(WHOLE, json.dumps(given_config).encode())
        except AdapterFileError:
            continue
        assert all(np.isfinite(layer.up).all() for layer in layers.values())


def test_what_lies_in_the_folder_of_a_tenant_is_for_that_tenant(tmp_path: Path) -> None:
    write_adapter(tmp_path, "pixel", rank=1)
    write_adapter(tmp_path, "ink")
    write_adapter(tmp_path / "@studio", "pixel", rank=3, seed=1)
    write_adapter(tmp_path / "@studio", "glow", seed=2)
    (tmp_path / "@other").mkdir()
    (tmp_path / "@other" / "ink.safetensors").write_bytes(WHOLE[:-1])
    adapters = library(tmp_path)
    found = {tenant: adapters.of("small", tenant) for tenant in ("", "studio", "other", "nobody")}
    assert list(found["studio"]) == ["glow", "ink", "pixel"]
    assert found["studio"]["pixel"].rank == 3
    for tenant in ("", "other", "nobody"):
        assert list(found[tenant]) == (["pixel"] if tenant == "other" else ["ink", "pixel"])
        assert found[tenant]["pixel"].rank == 1
    assert "is cut off" in adapters.misfit("small", "ink", "other")
    assert not adapters.misfit("small", "ink", "studio")
    for tenant, name in (("", "pixel"), ("studio", "pixel"), ("studio", "glow")):
        file = found[tenant][name]
        assert adapters.weights("small", name, file.sha256).shape[0] == file.rank
    (tmp_path / "@studio" / "pixel" / "adapter_model.safetensors").unlink()
    (tmp_path / "@studio" / "pixel" / "adapter_config.json").unlink(missing_ok=True)
    (tmp_path / "@studio" / "pixel").rmdir()
    adapters.look()
    assert adapters.of("small", "studio")["pixel"].rank == 1


def test_a_folder_of_a_tenant_that_cannot_be_listed_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path / "@studio", "pixel")
    adapters, listed = library(tmp_path), Path.iterdir

    def denied(path: Path) -> Iterator[Path]:
        if path.name == "@studio":
            raise PermissionError(errno.EACCES, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", denied)
    write_adapter(tmp_path, "ink")
    adapters.look()
    assert list(adapters.of("small", "studio")) == ["ink", "pixel"]


def test_a_folder_that_names_no_tenant_is_reported(tmp_path: Path) -> None:
    (tmp_path / "@two words" / "pixel").mkdir(parents=True)
    assert "has a name that requests cannot say" in why_not(tmp_path, "@two words")


def test_a_link_that_cannot_be_followed_keeps_no_other_from_being_offered(tmp_path: Path) -> None:
    write_adapter(tmp_path, "ink")
    for folder in (tmp_path, tmp_path / "@studio"):
        folder.mkdir(exist_ok=True)
        (folder / "bad").symlink_to("x" * 300)
        (folder / "@bad").symlink_to("x" * 300)
        (folder / "worse.safetensors").symlink_to("x" * 300)
    assert list(library(tmp_path).of("small", "studio")) == ["ink"]


def test_a_folder_of_adapters_may_itself_be_named_like_one_of_a_tenant(tmp_path: Path) -> None:
    write_adapter(tmp_path / "@shared", "ink")
    assert list(library(tmp_path / "@shared").of("small")) == ["ink"]


def test_what_cannot_be_an_adapter_takes_no_place_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safelight_server.catalog.adapters.MAX_ADAPTERS", 2)
    for name in ("a.pt", "b.bin"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "no name").mkdir()
    write_adapter(tmp_path, "zebra")
    assert list(library(tmp_path).of("small")) == ["zebra"]


def test_a_tenants_own_file_that_cannot_be_used_does_not_give_way_to_another(tmp_path: Path) -> None:
    write_adapter(tmp_path, "ink")
    (tmp_path / "@studio").mkdir()
    (tmp_path / "@studio" / "ink.safetensors").write_bytes(WHOLE[:-1])
    adapters = library(tmp_path)
    assert list(adapters.of("small", "other")) == ["ink"]
    assert not adapters.of("small", "studio")
    assert "is cut off" in adapters.misfit("small", "ink", "studio")


def test_what_two_tenants_have_is_there_for_one_when_the_other_replaces_it(tmp_path: Path) -> None:
    for tenant in ("@a", "@b"):
        write_adapter(tmp_path / tenant, "ink")
    adapters = library(tmp_path)
    file = adapters.of("small", "b")["ink"]
    write_adapter(tmp_path / "@a", "ink", seed=1)
    assert adapters.weights("small", "ink", file.sha256).shape[0] == file.rank


def test_an_alpha_under_two_names_is_refused() -> None:
    given = matrices(2)
    layer = next(iter(given)).removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
    alphas = {f"{layer}.alpha": np.float32(1), f"{layer.removeprefix('base_model.model.')}.alpha": np.float32(2)}
    with pytest.raises(AdapterFileError, match="the same alpha under another name"):
        parse(safetensors(given | alphas))
