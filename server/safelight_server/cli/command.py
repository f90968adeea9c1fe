"""What the commands that call a server have in common: their options, their client, and the error that ends them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import grpc
import typer
import uvloop
from safelight import Client

T = TypeVar("T")

DEFAULT_TARGET = "127.0.0.1:8421"
Target = Annotated[str, typer.Option("--target", envvar="SAFELIGHT_TARGET", help="Address of the server.")]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="SAFELIGHT_API_KEY", help="Key of the caller.")]
CaFile = Annotated[
    Path | None,
    typer.Option(
        "--ca-file", envvar="SAFELIGHT_CA_FILE", help="PEM of the server's certificate authority; turns TLS on."
    ),
]
ClientCert = Annotated[
    Path | None,
    typer.Option(
        "--client-cert-file",
        envvar="SAFELIGHT_CLIENT_CERT_FILE",
        help="PEM of the caller's own certificate and its key, for a server that requires one.",
    ),
]
ServerName = Annotated[
    str,
    typer.Option("--server-name", envvar="SAFELIGHT_SERVER_NAME", help="Name in the certificate, if not the target's."),
]


OPTIONS = {"target": "--target / SAFELIGHT_TARGET", "api_key": "--api-key / SAFELIGHT_API_KEY"}
"""Arguments of `safelight.Client`, by the names of their options here."""


class CommandError(Exception):
    """A command failed; the message is the one line that the user sees.

    Args:
        exit_code: 1 for an error of the server, 2 for a wrong argument.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def connect_with(
    target: str, api_key: str | None, ca_file: Path | None, client_cert: Path | None, server_name: str
) -> Callable[[], Client]:
    """Checks the connection options. Returns a function that makes the client, to be called in the event loop."""
    if client_cert is not None and ca_file is None:
        raise CommandError("--client-cert-file / SAFELIGHT_CLIENT_CERT_FILE: needs --ca-file / SAFELIGHT_CA_FILE")
    credentials = None
    try:
        if ca_file is not None:
            own = None if client_cert is None else client_cert.read_bytes()  # has both the key and the chain
            credentials = grpc.ssl_channel_credentials(ca_file.read_bytes(), own, own)
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from None

    def connect() -> Client:
        try:
            return Client(target, api_key=api_key, credentials=credentials, server_name=server_name)
        except ValueError as error:
            argument, _, what = str(error).partition(": ")
            raise CommandError(f"{OPTIONS[argument]}: {what}") from None

    check_text({OPTIONS["target"]: target, "--server-name": server_name})
    return connect


def check_text(given: Mapping[str, str]) -> None:
    """Refuses arguments that are not UTF-8: Python decodes bad bytes to surrogates, which protobuf refuses."""
    for option, text in given.items():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise CommandError(f"{option}: is not UTF-8") from None


def run(work: Coroutine[object, object, T]) -> T:
    """Runs a command's work in an event loop."""
    return uvloop.run(work)
