"""Bills: the work that each committed picture took and the tenant that is charged, sealed in a stream in Redis.

`commit.py` writes a bill in the same script as the result. `safelight bills` (`cli/bills.py`) reads them, and
`safelight bills archive` copies them to a ledger that survives Redis (`bill_archive.py`).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, fields

from safelight_server.cluster.leased_runners import ExecutionTicket
from safelight_server.coordination.base import BEGINNING, Coordinator, place_order
from safelight_server.storage.sealed import CorruptError, Entry, Sealer, UnreadableError

BILL = "bill"
"""The key that bills are sealed under."""
BILL_S = 400 * 86_400.0
"""How long bills can be opened."""
UNKNOWN = "unknown"
"""Value of a fact that bills of earlier versions do not have."""
LAST_OF_MS = 2**64 - 1
"""Largest number that Redis gives to an entry of a stream within one millisecond."""


@dataclass(slots=True)
class BilledWork:
    """The work of an execution that its bill lists."""

    rows: int = 0
    steps: int = 0
    compute_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Bill:
    """The bill of one committed picture.

    Attributes:
        tenant, generation: the generation that requested the picture first, and its tenant.
        model_revision: "MODEL/REVISION".
        disposition: where the work began: "miss" from noise, "latent" or "branched" from an earlier latent.
        rows: denoiser rows computed: two per step with guidance, one outside the guidance interval.
        steps: denoising steps.
        compute_s: seconds of runtime calls.
    """

    tenant: str
    generation: str
    rows: int
    steps: int
    compute_s: float
    model_revision: str = UNKNOWN
    disposition: str = UNKNOWN


KNOWN = frozenset(field.name for field in fields(Bill))
"""Facts that are read from a bill. A later version may have written more."""


def sealed_bill(sealer: Sealer, ticket: ExecutionTicket, work: BilledWork) -> bytes:
    """Returns the bill of an execution, encrypted."""
    facts = Bill(
        ticket.tenant,
        ticket.generation,
        **asdict(work),
        model_revision=ticket.revision,
        disposition=ticket.disposition,
    )
    return sealer.seal(BILL, Entry(json.dumps(asdict(facts)).encode()), sealer.now() + BILL_S)


def open_bill(sealer: Sealer, data: bytes) -> tuple[Bill, float]:
    """Decrypts a bill. Returns it, and until when it is shown (Unix seconds).

    Raises:
        CorruptError: no server has written this.
        UnreadableError: it was encrypted with a key that the key file does not have.
    """
    opened, expires_at = sealer.open(BILL, data)
    facts = json.loads(opened.data)
    return Bill(**{name: value for name, value in facts.items() if name in KNOWN}), expires_at


async def read_bills(
    coordinator: Coordinator, sealer: Sealer, since_ms: int = 0, until_ms: int | None = None
) -> AsyncIterator[Bill | None]:
    """Yields the bills of a time range, oldest first; None for a bill that cannot be opened.

    Bills older than `BILL_S` are left out.

    Args:
        since_ms: begin of the range in Unix milliseconds, on the clock of Redis.
        until_ms: end of the range, exclusive; None: no end.

    Raises:
        StoreError: Redis does not answer.
    """
    after = f"{since_ms - 1}-{LAST_OF_MS}" if since_ms > 0 else BEGINNING
    while page := await coordinator.bills(after):
        for entry in page:
            if until_ms is not None and place_order(entry.place)[0] >= until_ms:
                return
            try:
                bill, expires_at = open_bill(sealer, entry.data)
            except (CorruptError, UnreadableError):
                yield None
                continue
            if expires_at > sealer.now():
                yield bill
        after = page[-1].place
