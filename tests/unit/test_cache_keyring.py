"""The operator's keys."""

import base64
from pathlib import Path

import pytest
from safelight_server.storage.keyring import Keyring, KeyringError, new_key_file, write_key_file

A, B, N = (base64.b64encode(bytes([fill]) * 32).decode() for fill in (1, 2, 3))


def keyring(tmp_path: Path, text: str) -> Keyring:
    path = tmp_path / "keys"
    path.write_text(text)
    return Keyring.load(path)


def test_the_first_seals_and_all_open(tmp_path: Path) -> None:
    keys = keyring(tmp_path, f"# ours\nnames {N}\nnew {B}  # since May\nold {A}\n")
    assert keys.newest == "new"
    assert keys.key("old") == b"\1" * 32
    assert keys.key("gone") is None
    assert keys.key("names") is None, "the key of names seals nothing"


def test_names_stay_when_keys_rotate(tmp_path: Path) -> None:
    before, after = keyring(tmp_path, f"names {N}\nold {A}\n"), keyring(tmp_path, f"names {N}\nnew {B}\nold {A}\n")
    assert before.tenant("acme") == after.tenant("acme")
    assert before.digest("a", "b") == after.digest("a", "b")
    assert before.derive("planes") == after.derive("planes")


def test_names_tell_apart_and_tell_nothing(tmp_path: Path) -> None:
    keys = keyring(tmp_path, new_key_file())
    assert keys.digest("ab", "c") != keys.digest("a", "bc")
    assert keys.tenant("acme") != keys.tenant("acme2")
    assert keys.tag("revision", "x") != keys.tag("generation", "x")
    assert keys.tag("generation", "") == bytes(8)
    assert keys.tenant("acme") != keyring(tmp_path, new_key_file()).tenant("acme")


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"names {N}\n",
        f"a {A}\n",
        f"names {N}\na {A}\na {B}\n",
        f"names {N}\na short\n",
        f"names {N}\nA! {A}\n",
        f"names {N} x\na {A}\n",
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, text: str) -> None:
    with pytest.raises(KeyringError):
        keyring(tmp_path, text)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyringError, match="keys"):
        Keyring.load(tmp_path / "keys")


def test_a_random_one_is_of_this_process() -> None:
    assert not Keyring.random().persistent
    assert Keyring.random().tenant("acme") != Keyring.random().tenant("acme")


def test_a_key_file_is_its_owners_and_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    write_key_file(path)
    before = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert Keyring.load(path).persistent
    with pytest.raises(FileExistsError):
        write_key_file(path)
    assert path.read_text() == before
