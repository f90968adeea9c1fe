"""Callers are identified by key if keys are required, else by name or address; the key file may change."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safelight_server import files
from safelight_server.api.identity import Identity, new_key
from safelight_server.domain.caller import Caller
from safelight_server.domain.errors import AdminOnlyError, InvalidRequestError, UnauthenticatedError
from safelight_server.files import ConfigFileError

from tests.conftest import eventually

PEER = "ipv4:127.0.0.1:40000"


def entry(key: str, caller: str = "game", tenant: str = "studio") -> dict[str, str]:
    return {"sha256": hashlib.sha256(key.encode()).hexdigest(), "caller": caller, "tenant": tenant}


def write(file: Path, *entries: dict[str, str]) -> Path:
    """Replaces the file as an editor or a secret mount does: a new inode under the old name."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps({"keys": entries}))
    return new.replace(file)


def recognize(identity: Identity, metadata: list[tuple[str, str | bytes]], peer: str = PEER) -> Caller:
    """The caller, also where a loop is running: with keys, or with neither keys nor tokens, there is nothing to wait for."""
    try:
        identity.recognize(metadata, peer).send(None)
    except StopIteration as returned:
        return returned.value
    raise AssertionError("it waits")


def bearer(key: str) -> list[tuple[str, str | bytes]]:
    return [("authorization", f"Bearer {key}")]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return write(tmp_path / "keys.json", entry("one"), entry("two", "tool", "lab"))


@pytest.mark.parametrize(
    ("peer", "name"),
    [
        ("ipv4:127.0.0.1:40000", "127.0.0.1"),
        ("ipv6:%5B::1%5D:40000", "::1"),
        ("ipv6:[fe80::1%25eth0]:40000", "fe80::1%eth0"),
        ("unix:/run/safelight.sock", "unix:/run/safelight.sock"),
        ("unix:", "unix:"),
        ("", ""),
    ],
)
def test_without_keys_a_caller_is_its_address(peer: str, name: str) -> None:
    assert recognize(Identity(None), [], peer) == Caller(name, "default")


@pytest.mark.parametrize("name", ["a", "A-b_c.9", "x" * 64])
def test_without_keys_a_caller_may_name_itself(name: str) -> None:
    assert recognize(Identity(None), [("safelight-caller", name)], PEER) == Caller(name, "default")


@pytest.mark.parametrize("name", ["", " ", "a b", "a/b", "x" * 65, "a\n", "é"])
def test_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        recognize(Identity(None), [("safelight-caller", name)], PEER)
    (fault,) = refused.value.violations
    assert fault.field == "metadata safelight-caller"
    assert fault.description == "must be 1 to 64 letters, digits, dots, dashes and underscores"


def test_a_key_names_caller_and_tenant(key_file: Path) -> None:
    identity = Identity(key_file)
    assert recognize(identity, bearer("one"), PEER) == Caller("game", "studio")
    assert recognize(identity, [("authorization", "bearer  two ")], PEER) == Caller("tool", "lab")


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer ")],
        [("authorization", "Bearer three")],
        [("authorization", "Basic one")],
        [("authorization", "one")],
        [("authorization-bin", b"Bearer one")],
        [("safelight-caller", "game")],
    ],
)
def test_without_a_known_key_nobody_is_recognized(key_file: Path, metadata: list[tuple[str, str | bytes]]) -> None:
    with pytest.raises(UnauthenticatedError) as refused:
        recognize(Identity(key_file), metadata, PEER)
    assert refused.value.message == "send metadata 'authorization: Bearer KEY' with a key of this server"


def test_with_keys_nobody_names_itself(key_file: Path) -> None:
    metadata = [*bearer("one"), ("safelight-caller", "someone-else")]
    assert recognize(Identity(key_file), metadata, PEER) == Caller("game", "studio")


def knows(identity: Identity, key: str) -> bool:
    with contextlib.suppress(UnauthenticatedError):
        return bool(recognize(identity, bearer(key), PEER))
    return False


async def test_a_changed_file_counts_while_the_server_runs(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LOOK_EVERY_S", 0.001)
    identity = Identity(key_file)
    [follow] = identity.works
    following = asyncio.create_task(follow())
    write(key_file, entry("three", "new", "lab"))
    await eventually(lambda: knows(identity, "three"))
    assert not knows(identity, "one")
    following.cancel()
    await asyncio.wait([following])


@pytest.mark.parametrize("presented", ["0", "7", "unknown", ""])
def test_a_call_costs_one_comparison_however_many_keys_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, presented: str
) -> None:
    counts = []
    for num_keys in (8, 800):
        identity = Identity(write(tmp_path / "keys.json", *(entry(f"{n}", f"caller-{n}") for n in range(num_keys))))
        compared: list[tuple[bytes, bytes]] = []
        with monkeypatch.context() as patched:
            compare = hmac.compare_digest
            patched.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
            assert knows(identity, presented) is presented.isdecimal()
        counts.append(len(compared))
    assert counts == [1, 1], "also for a key that is not there"


def test_a_file_that_cannot_be_used_stops_the_start_with_all_its_faults(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    with pytest.raises(ConfigFileError, match="No such file"):
        Identity(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigFileError, match=r"keys\.json: file: "):
        Identity(file)
    bad = {"sha256": "12", "caller": "a b", "tenant": "t", "admin": "yes"}
    with pytest.raises(ConfigFileError) as refused:
        Identity(write(file, entry("one"), bad))
    for fault in ("keys.1.sha256", "keys.1.caller", "keys.1.admin"):
        assert fault in str(refused.value)
    assert "keys.0" not in str(refused.value)
    with pytest.raises(ConfigFileError, match=r"keys\.19\.sha256: .*; and 10 more$"):
        Identity(write(file, *(entry("one") | {"sha256": f"{n}"} for n in range(30))))


def test_a_key_twice_or_an_empty_one_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "keys.json", entry("one"), entry("one", "tool", "lab"), entry(""))
    with pytest.raises(ConfigFileError) as refused:
        Identity(file)
    assert "is there 2 times" in str(refused.value)
    assert "keys.2.sha256: is the hash of no key" in str(refused.value)


def test_a_new_key_fits_into_the_file(tmp_path: Path) -> None:
    key, line = new_key("game", "studio")
    assert len(key) >= 43
    assert key not in line
    assert new_key("game", "studio")[0] != key
    file = tmp_path / "keys.json"
    file.write_text(f'{{"keys": [{line}]}}')
    assert recognize(Identity(file), bearer(key), PEER) == Caller("game", "studio")


def test_a_new_key_is_for_a_name() -> None:
    with pytest.raises(ConfigFileError, match=r"^caller and tenant: must be 1 to 64"):
        new_key("a b", "")


@given(value=st.text(max_size=80))
def test_no_metadata_breaks_recognition(value: str) -> None:
    try:
        caller = recognize(Identity(None), [("safelight-caller", value)], PEER)
    except InvalidRequestError:
        return
    assert caller.name == value
    assert 1 <= len(value) <= 64


@pytest.fixture(scope="module")
def guessed_at(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity(write(tmp_path_factory.mktemp("keys") / "keys.json", entry("never guessed")))


@given(value=st.text(st.characters(codec="utf-8"), max_size=80))
def test_no_authorization_breaks_recognition(guessed_at: Identity, value: str) -> None:
    with pytest.raises(UnauthenticatedError):
        recognize(guessed_at, [("authorization", f"Bearer {value}")], PEER)


def test_administrators_are_those_whose_key_says_so(tmp_path: Path) -> None:
    key, made = new_key("root", "ops", admin=True)
    other, plain = new_key("game", "studio")
    assert "admin" not in json.loads(plain)
    known = Identity(write(tmp_path / "keys.json", json.loads(made), json.loads(plain)), all_admins=True)
    recognize(known, bearer(key), PEER).check_admin()
    with pytest.raises(AdminOnlyError):
        recognize(known, bearer(other), PEER).check_admin()


@pytest.mark.parametrize("all_admins", [True, False])
@pytest.mark.parametrize("metadata", [[], [("safelight-caller", "me")]])
def test_without_keys_all_are_administrators_or_none(all_admins: bool, metadata: list[tuple[str, str | bytes]]) -> None:
    assert recognize(Identity(None, all_admins=all_admins), metadata, PEER).is_admin is all_admins


def test_admin_is_true_or_false(tmp_path: Path) -> None:
    with pytest.raises(ConfigFileError, match="admin"):
        Identity(write(tmp_path / "keys.json", entry("one") | {"admin": "yes"}))
