"""Binds the address that the server listens on: all addresses of a name or none, and never another server's socket.

gRPC itself would bind only some of a name's addresses if others are in use, would take over the unix socket of a
running server, and would remove that socket at its end.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import grpc

UNIX = "unix:"
NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""Errors for an address that this machine does not have, such as ::1 of `localhost` without IPv6."""
CONNECT_S = 1.0


class BindError(Exception):
    """The address cannot be bound; the message names it and says why."""


def bind(server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> str:
    """Binds all addresses of `host`, on one port.

    Args:
        host: an address, a name, or unix:PATH.
        port: the port; 0 chooses a free one.

    Returns:
        HOST:PORT or unix:PATH, for users.

    Raises:
        BindError: an address is in use, not this machine's, or not allowed.
    """
    if host.startswith(UNIX):
        _add(server, host, credentials)
        return host
    for address in _addresses(host, port):
        port = _add(server, f"{_bracketed(address)}:{port}", credentials)
    return f"{_bracketed(host)}:{port}"


@contextlib.contextmanager
def sole_listener(host: str) -> Iterator[None]:
    """If `host` is unix:PATH, holds PATH.lock while the block runs, so that no other server takes the socket.

    The socket that a killed server left behind is no obstacle. Does nothing for network addresses.

    Raises:
        BindError: another server listens on the socket, PATH is no socket, or its folder cannot be written.
    """
    if not host.startswith(UNIX):
        yield
        return
    path = Path(host.removeprefix(UNIX).removeprefix("//"))
    lock_file = path.with_name(f"{path.name}.lock")
    try:
        lock = _lock(lock_file)
    except BlockingIOError:
        raise BindError(f"cannot bind {host}: another server listens there") from None
    except OSError as error:
        raise BindError(f"cannot bind {host}: {lock_file}: {error.strerror}") from None
    try:
        _check_socket(path)
        yield
    finally:
        with contextlib.suppress(OSError):  # a file that is left does no harm: the next server locks it again
            lock_file.unlink()
        os.close(lock)


def _lock(file: Path) -> int:
    """Makes and locks a file, and returns its descriptor. The kernel drops the lock when the process ends."""
    while True:
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), file.stat()):
                    return lock
        except OSError:
            os.close(lock)
            raise
        os.close(lock)  # the server that held it has removed it in the meantime


def _check_socket(path: Path) -> None:
    """Refuses a path that is no socket, or on which a server without a lock listens."""
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise BindError(f"cannot bind {UNIX}{path}: a file that is no socket exists there; choose another path")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(CONNECT_S)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:  # nobody listens any more; gRPC binds the path anew
            return
        except OSError:  # a server that is too busy to answer, or that other users run
            pass
    raise BindError(f"cannot bind {UNIX}{path}: another server listens there")


def _addresses(host: str, port: int) -> list[str]:
    """The addresses of `host` that this machine has. Each is tried, and was free at that moment."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise BindError(f"cannot bind {host}: {error}") from None
    usable: dict[str, None] = {}
    absent: list[str] = []
    for family, kind, _, _, sockaddr in found:
        address = str(sockaddr[0])
        try:
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
                probe.bind(sockaddr)
        except OSError as error:
            fault = f"cannot bind {_bracketed(address)}:{port}: {error.strerror}"
            if error.errno not in NOT_HERE:
                raise BindError(fault) from None
            absent.append(fault)
        else:
            usable[address] = None
    if not usable:
        raise BindError("; ".join(absent))
    return list(usable)


def _add(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError:
        raise BindError(f"cannot bind {address}: is another server there, or the path of a socket too long?") from None


def _bracketed(host: str) -> str:
    """A host as it is written before a port: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host
