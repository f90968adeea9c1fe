"""The tier on disk."""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import obstore
import pytest
from obstore.exceptions import GenericError
from safelight_server.storage.base import StoreFullError, StoreUnavailableError, TooLargeError
from safelight_server.storage.disk import BLOCK_BYTES, DiskStore, DiskStoreError

from tests.support.stores import TTL_S, StoreRules, key, keys_of
from tests.support.streams import settle


def files_of(folder: Path, pattern: str = "*") -> list[Path]:
    return [path for path in folder.rglob(pattern) if path.is_file() and path.name != ".lock"]


class TestDisk(StoreRules):
    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[DiskStore]:
        store = await DiskStore.open(tmp_path / "cache", 1 << 20)
        yield store
        await store.close()


async def test_entries_and_their_order_outlive_the_process(tmp_path: Path) -> None:
    store = await DiskStore.open(tmp_path, 1 << 20)
    for number in range(4):
        await store.put(key(number), bytes([number]) * 5000, TTL_S)
        os.utime(tmp_path / key(number), (1000 + number, 1000 + number))
    before = await store.usage()
    await store.close()
    (tmp_path / "ab01/exact/half#1").write_bytes(b"unfinished")
    again = await DiskStore.open(tmp_path, 3 * 2 * BLOCK_BYTES)
    assert before.num_bytes == 4 * 2 * BLOCK_BYTES
    assert await keys_of(again) == [key(1), key(2), key(3)], "the oldest gives way to the smaller bound"
    assert await again.get(key(3)) == bytes([3]) * 5000
    assert not files_of(tmp_path, "*#*")
    await again.close()


async def test_the_least_recently_used_goes_first_and_is_told(tmp_path: Path) -> None:
    evicted = []
    store = await DiskStore.open(tmp_path, 3 * BLOCK_BYTES, lambda key, value: evicted.append((key, value)))
    for number in range(3):
        await store.put(key(number), bytes([number]), TTL_S)
    await store.get(key(0))
    await store.put(key(3), b"3", TTL_S)
    assert evicted == [(key(1), b"\1")]
    assert sorted(path.name for path in (tmp_path / "ab01/exact").iterdir()) == [f"{n:064x}" for n in (0, 2, 3)]
    await store.close()


async def test_what_can_never_fit_is_refused(tmp_path: Path) -> None:
    store = await DiskStore.open(tmp_path, BLOCK_BYTES)
    with pytest.raises(TooLargeError):
        await store.put(key(1), bytes(BLOCK_BYTES + 1), TTL_S)
    await store.close()


async def test_a_folder_belongs_to_one_process(tmp_path: Path) -> None:
    store = await DiskStore.open(tmp_path, 1 << 20)
    with pytest.raises(DiskStoreError, match="another process"):
        await DiskStore.open(tmp_path, 1 << 20)
    await store.close()
    await (await DiskStore.open(tmp_path, 1 << 20)).close()


async def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskStoreError):
        await DiskStore.open(tmp_path / "file" / "cache", 1 << 20)


async def test_others_cannot_read_the_folder(tmp_path: Path) -> None:
    store = await DiskStore.open(tmp_path / "cache", 1 << 20)
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0
    await store.close()


async def test_a_file_that_somebody_removed_is_a_miss(tmp_path: Path) -> None:
    store = await DiskStore.open(tmp_path, 1 << 20)
    await store.put(key(1), b"x", TTL_S)
    (tmp_path / key(1)).unlink()
    assert await store.get(key(1)) is None
    assert (await store.usage()).entries == 0
    await store.close()


@pytest.mark.parametrize(("code", "error"), [(28, StoreFullError), (122, StoreFullError), (5, StoreUnavailableError)])
async def test_a_full_or_broken_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception]
) -> None:
    async def broken(*_arguments: object, **_options: object) -> None:
        raise GenericError(f"Generic LocalFileSystem error: Unable to copy data to file (os error {code})")

    store = await DiskStore.open(tmp_path, 1 << 20)
    await store.put(key(1), b"before", TTL_S)
    monkeypatch.setattr(obstore, "put_async", broken)
    with pytest.raises(error):
        await store.put(key(2), b"x", TTL_S)
    assert (await store.usage()).entries == 1, "what was not written is not counted"
    assert await store.get(key(1)) == b"before"
    await store.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> AsyncIterator[Path]:
    """A real file system of 256 KiB, where this process may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


async def test_a_really_full_disk(small_disk: Path) -> None:
    store = await DiskStore.open(small_disk, 1 << 20)
    await store.put(key(1), bytes(100_000), TTL_S)
    with pytest.raises(StoreFullError):
        await store.put(key(2), bytes(500_000), TTL_S)
    assert await store.get(key(1)) == bytes(100_000)
    assert await store.get(key(2)) is None
    await store.put(key(3), bytes(50_000), TTL_S)
    await store.close()


async def failing(*_arguments: object, **_options: object) -> None:
    raise GenericError("Generic LocalFileSystem error: Unable to copy data to file (os error 28)")


async def test_a_value_that_could_not_be_replaced_leaves_no_file_that_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await DiskStore.open(tmp_path, 1 << 20)
    await store.put(key(1), b"old", TTL_S)
    with monkeypatch.context() as patch:
        patch.setattr(obstore, "put_async", failing)
        with pytest.raises(StoreFullError):
            await store.put(key(1), b"new", TTL_S)
    assert (files_of(tmp_path), (await store.usage()).entries) == ([], 0)
    await store.put(key(1), b"old", TTL_S)
    with monkeypatch.context() as patch:
        patch.setattr(obstore, "put_async", failing)
        patch.setattr(obstore, "delete_async", failing)
        with pytest.raises(StoreFullError):
            await store.put(key(1), b"new", TTL_S)
    assert len(files_of(tmp_path)) == (await store.usage()).entries == 1, "what is there is counted and can be deleted"
    await store.delete(key(1))
    assert not files_of(tmp_path)
    await store.close()


class SlowDisk:
    """A disk whose writes wait for the test, like a thread that cannot be cancelled."""

    def __init__(self) -> None:
        self.began, self.may = asyncio.Event(), asyncio.Event()
        self._put = obstore.put_async

    async def put(self, *arguments: object, **options: object) -> object:
        return await asyncio.shield(self._later(*arguments, **options))

    def _later(self, *arguments: object, **options: object) -> asyncio.Task[object]:
        async def writes() -> object:
            self.began.set()
            await self.may.wait()
            return await self._put(*arguments, **options)  # type: ignore[arg-type]

        return asyncio.create_task(writes())


async def test_a_write_that_was_given_up_does_not_come_after_a_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def delete(_files: object, name: str) -> None:
        (tmp_path / name).unlink()

    slow = SlowDisk()
    store = await DiskStore.open(tmp_path, 1 << 20)
    monkeypatch.setattr(obstore, "put_async", slow.put)
    monkeypatch.setattr(obstore, "delete_async", delete)
    writing = asyncio.create_task(store.put(key(1), b"purged", TTL_S))
    await slow.began.wait()
    writing.cancel()
    deleting = asyncio.create_task(store.delete(key(1)))
    await settle()
    slow.may.set()
    others = asyncio.all_tasks() - {asyncio.current_task(), writing}
    await asyncio.gather(deleting, *others)
    assert (files_of(tmp_path), (await store.usage()).num_bytes) == ([], 0)
    await store.close()


async def test_who_looks_while_it_is_written_does_not_make_it_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowDisk()
    store = await DiskStore.open(tmp_path, 1 << 20)
    monkeypatch.setattr(obstore, "put_async", slow.put)
    writing = asyncio.create_task(store.put(key(1), b"x", TTL_S))
    await slow.began.wait()
    assert await store.get(key(1)) is None
    slow.may.set()
    await writing
    assert await store.get(key(1)) == b"x"
    await store.close()


async def test_only_files_of_its_own_are_removed_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "#notes#").write_text("somebody's")
    await (await DiskStore.open(tmp_path, 1 << 20)).close()
    assert (tmp_path / "#notes#").exists()


async def test_puts_gets_and_deletes_at_once_add_up(tmp_path: Path) -> None:
    store = await DiskStore.open(tmp_path, 8 * BLOCK_BYTES)

    async def work(seed: int) -> None:
        for turn in range(10):
            number = (seed * 7 + turn * 3) % 12
            await store.put(key(number), bytes([number]) * 100, TTL_S)
            assert await store.get(key((number + 1) % 12)) in (None, bytes([(number + 1) % 12]) * 100)
            if turn % 4 == 0:
                await store.delete(key(number))

    await asyncio.gather(*(work(seed) for seed in range(8)))
    files = files_of(tmp_path)
    usage = await store.usage()
    assert usage.entries == len(files) <= 8
    assert usage.num_bytes == len(files) * BLOCK_BYTES
    await store.close()
