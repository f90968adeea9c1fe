"""Addresses on which the server listens: all of a name's or none, and one server for each Unix socket."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from safelight import Client
from safelight_server.app.address import BindError, bind, sole_listener
from safelight_server.app.errors import StartError

SIMULATED = {"runtime": "simulated", "simulated_base_ms": 1.0}
OTHERS = "192.0.2.1"
"""An address that no machine has (RFC 5737)."""


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """`two.test` and `shared.test` are names of two addresses each; of the second one's, one is another machine's."""
    known = {"two.test": ["127.0.0.1", "127.0.0.2"], "shared.test": [OTHERS, "127.0.0.1"], "others.test": [OTHERS]}
    look_up = socket.getaddrinfo

    def getaddrinfo(host, port, *args, **kwargs):
        return [one for name in known.get(host, [host]) for one in look_up(name, port, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@contextlib.asynccontextmanager
async def listening(host: str, port: int = 0) -> AsyncIterator[str]:
    """A gRPC server without services."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    address = bind(server, host, port, None)
    await server.start()
    try:
        yield address
    finally:
        await server.stop(0)


def connects(host: str, port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((host, port)) == 0


@pytest.mark.usefixtures("names")
async def test_all_addresses_of_a_name_are_bound_on_one_port() -> None:
    async with listening("two.test") as address:
        name, port = address.split(":")
        assert name == "two.test"
        assert connects("127.0.0.1", int(port)) and connects("127.0.0.2", int(port))


@pytest.mark.parametrize("taken", ["127.0.0.1", "127.0.0.2"])
@pytest.mark.usefixtures("names")
async def test_where_one_of_them_is_taken_none_is_bound(taken) -> None:
    with socket.create_server((taken, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(BindError, match=rf"cannot bind {taken}:{port}: Address already in use"):
            async with listening("two.test", port):
                pass
        [free] = {"127.0.0.1", "127.0.0.2"} - {taken}
        assert not connects(free, port)


@pytest.mark.usefixtures("names")
async def test_addresses_of_other_machines_are_passed_over() -> None:
    """For example `::1` of `localhost` on a machine without IPv6."""
    async with listening("shared.test") as address:
        assert connects("127.0.0.1", int(address.split(":")[1]))
    with pytest.raises(BindError, match=os.strerror(errno.EADDRNOTAVAIL)):
        async with listening("others.test"):
            pass
    with pytest.raises(BindError, match=r"cannot bind nowhere\.invalid"):
        async with listening("nowhere.invalid"):
            pass


@pytest.fixture
def path(short_path: Path) -> Path:
    return short_path / "socket"


async def test_a_second_server_on_a_unix_socket_is_refused(start, path) -> None:
    async with start(host=f"unix:{path}", **SIMULATED) as running:
        for host in (f"unix:{path}", f"unix://{path}", f"unix:{path.parent}/../{path.parent.name}/{path.name}"):
            with pytest.raises(StartError, match="another server listens there"):
                async with start(host=host, **SIMULATED):
                    pass
        async with Client(running.address) as client:
            assert await client.models()
    assert not list(path.parent.iterdir())


def test_of_two_that_start_at_once_one_listens(path) -> None:
    """When each checks the socket, the other does not listen yet."""
    host = f"unix:{path}"
    with sole_listener(host), pytest.raises(BindError, match="another server listens there"), sole_listener(host):
        pass
    with sole_listener(f"unix:{path}"):
        pass


async def test_the_socket_of_a_server_that_was_killed_is_no_obstacle(start, path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    path.with_name("socket.lock").touch()
    async with start(host=f"unix:{path}", **SIMULATED) as running, Client(running.address) as client:
        assert await client.models()


def test_what_others_have_at_the_path_is_left_alone(path) -> None:
    """The path may have a server of an older version, which takes no lock, or a file."""
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(BindError, match="another server listens there"), sole_listener(f"unix:{path}"):
            pass
        assert path.is_socket()
    path.unlink()
    path.write_text("precious")
    with pytest.raises(BindError, match="no socket"), sole_listener(f"unix:{path}"):
        pass
    assert path.read_text() == "precious"
    with pytest.raises(BindError, match="No such file"), sole_listener(f"unix:{path.parent}/none/socket"):
        pass
