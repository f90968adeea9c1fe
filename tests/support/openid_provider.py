"""An OpenID provider on loopback: its discovery document and keys over real HTTP, and tokens with real signatures."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from http import HTTPStatus

from joserfc import jws
from joserfc.errors import SecurityWarning
from joserfc.jwk import ECKey, Key

from tests.support.loopback import answering

DISCOVERY_PATH, KEYS_PATH = "/.well-known/openid-configuration", "/keys"


class OpenIdService:
    """The provider. A new one signs with ES256, with one key.

    Attributes:
        issuer: its URL.
        published: what its key set has.
        discovered: what its discovery document has; bytes: the document as it is.
        broken: whether it answers with a server error.
        num_readings: how often its keys were asked for.
        answers: while it is not set, the keys are not sent, which it has looked up by then.
    """

    def __init__(self, port: int) -> None:
        self.issuer = f"http://127.0.0.1:{port}"
        self.key: Key = ECKey.generate_key("P-256", {"kid": "first"})
        self.published: list[dict[str, object]] = [self.key.as_dict(private=False)]
        self.discovered: dict[str, object] | bytes = {"issuer": self.issuer, "jwks_uri": self.issuer + KEYS_PATH}
        self.broken = False
        self.num_readings = 0
        self.answers = threading.Event()
        self.answers.set()

    def use(self, key: Key) -> None:
        """Publishes another key alone, and signs with it from here on."""
        self.key, self.published = key, [key.as_dict(private=False)]

    def token(self, *, alg: str = "ES256", key: Key | None = None, header: dict[str, object] | None = None, **claims):
        """A token of application `studio` for subject `ann` that is valid for a minute. What is None is left out."""
        now, signer = int(time.time()), key or self.key
        given = {"iss": self.issuer, "sub": "ann", "aud": "safelight", "client_id": "studio", "exp": now + 60} | claims
        protected = {"alg": alg, "kid": signer.kid} | (header or {})
        kept = [{name: value for name, value in part.items() if value is not None} for part in (protected, given)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SecurityWarning)  # of EdDSA, whose name in RFC 9864 is Ed25519
            return jws.serialize_compact(kept[0], json.dumps(kept[1]), signer, algorithms=[alg])

    def answer(self, path: str) -> tuple[HTTPStatus, object]:
        """Answers a GET."""
        self.num_readings += path == KEYS_PATH
        if self.broken:
            return HTTPStatus.SERVICE_UNAVAILABLE, {}
        found = {DISCOVERY_PATH: self.discovered, KEYS_PATH: {"keys": self.published}}
        return (HTTPStatus.OK, found[path]) if path in found else (HTTPStatus.NOT_FOUND, {})


@contextlib.contextmanager
def openid_service() -> Iterator[OpenIdService]:
    """Runs the provider on a free loopback port during the block."""

    def answer(_method: str, path: str, _headers: Mapping[str, str]) -> tuple[HTTPStatus, bytes]:
        status, content = service.answer(path)
        if path == KEYS_PATH:
            service.answers.wait()
        return status, content if isinstance(content, bytes) else json.dumps(content).encode()

    with answering(answer) as port:
        service = OpenIdService(port)
        yield service
