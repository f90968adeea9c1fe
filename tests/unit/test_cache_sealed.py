"""Values as they are stored."""

import base64
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safelight_server.storage.base import HEADER_BYTES
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.sealed import CorruptError, Entry, Sealer, UnreadableError, parse_header

from tests.support.stores import key

SEALER = Sealer(Keyring.random())
ENTRY = Entry(b"pixels", {"media_type": "image/png"}, b"revision", b"generate")


@given(st.binary(max_size=2000), st.dictionaries(st.text(max_size=20), st.text(max_size=20), max_size=4))
def test_what_was_sealed_comes_back(data: bytes, metadata: dict[str, str]) -> None:
    entry = Entry(data, metadata, b"revision", b"generate")
    assert SEALER.open(key(1), SEALER.seal(key(1), entry, 123.5)) == (entry, 123.5)


@given(st.data())
def test_no_bit_can_change(data: st.DataObject) -> None:
    value = bytearray(SEALER.seal(key(1), ENTRY, 123.5))
    place = data.draw(st.integers(0, len(value) * 8 - 1))
    value[place // 8] ^= 1 << place % 8
    with pytest.raises((CorruptError, UnreadableError)):
        SEALER.open(key(1), bytes(value))


@given(st.data())
def test_nothing_can_be_cut(data: st.DataObject) -> None:
    value = SEALER.seal(key(1), ENTRY, 123.5)
    with pytest.raises(CorruptError):
        SEALER.open(key(1), value[: data.draw(st.integers(0, len(value) - 1))])


def test_a_value_is_of_its_own_key_only() -> None:
    with pytest.raises(CorruptError):
        SEALER.open(key(2), SEALER.seal(key(1), ENTRY, 123.5))


def test_nothing_of_the_entry_is_in_the_clear() -> None:
    value = SEALER.seal(key(1), Entry(b"a red potion" * 10, {"prompt": "a red potion"}), 123.5)
    assert b"potion" not in value
    assert SEALER.seal(key(1), ENTRY, 123.5) != SEALER.seal(key(1), ENTRY, 123.5)


def test_the_header_is_short_and_has_the_tags() -> None:
    header = parse_header(SEALER.seal(key(1), ENTRY, 123.5)[:HEADER_BYTES])
    assert header is not None
    assert (header.revision, header.generation, header.expires_at) == (b"revision", b"generate", 123.5)
    assert parse_header(b"x" * HEADER_BYTES) is None
    assert parse_header(b"") is None


def test_old_keys_open_and_unknown_ones_say_so(tmp_path: Path) -> None:
    a, b, names = (base64.b64encode(bytes([fill]) * 32).decode() for fill in (1, 2, 3))

    def sealer(text: str) -> Sealer:
        (tmp_path / "keys").write_text(text)
        return Sealer(Keyring.load(tmp_path / "keys"))

    value = sealer(f"names {names}\nold {a}\n").seal(key(1), ENTRY, 1.0)
    assert sealer(f"names {names}\nnew {b}\nold {a}\n").open(key(1), value) == (ENTRY, 1.0)
    with pytest.raises(UnreadableError):
        sealer(f"names {names}\nnew {b}\n").open(key(1), value)
