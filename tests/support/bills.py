"""Bills with chosen times in a Redis, and the commands that read them."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from safelight_server.cli.main import main
from safelight_server.coordination.redis import BILLS
from safelight_server.storage.keyring import Keyring
from safelight_server.storage.sealed import Entry, Sealer

from tests.support.redis_server import RedisServer


@dataclass
class Ran:
    """The outcome of a command."""

    code: int
    out: str
    errors: str

    def rows(self) -> list[dict[str, object]]:
        assert (self.code, self.errors) == (0, "")
        return [json.loads(line) for line in self.out.splitlines()]


def run_command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str) -> Ran:
    """Runs a command of `safelight` in this process."""
    monkeypatch.setattr(sys, "argv", ["safelight", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return Ran(ended.value.code, *capfd.readouterr())


class Stream:
    """Writes bills with chosen times."""

    def __init__(self, server: RedisServer, keys: Path) -> None:
        self.client = redis.Redis.from_url(server.url)
        self.keys = keys

    def add(self, at_ms: int, tenant: str, until_s: float = 4e9, keys: Path | None = None, **facts: object) -> None:
        bill = {"tenant": tenant, "generation": "generations/a", "rows": 2, "steps": 1, "compute_s": 0.5} | facts
        sealed = Sealer(Keyring.load(keys or self.keys)).seal("bill", Entry(json.dumps(bill).encode()), until_s)
        self.client.xadd(BILLS, {"d": sealed}, id=f"{at_ms}-*")
