"""A difference between what is declared and what is deployed, and how nested values are compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

ABSENT = "absent"
PRESENT = "present"
IDENTITIES = ("Sid", "Id", "id", "rulePriority", "PolicyName", "name", "key", "Key")
"""By which entries of a list are known, whatever their order."""


class UnresolvedValue:
    """A declared value that only the cloud knows; it is compared with nothing."""


UNRESOLVED = UnresolvedValue()


@dataclass(frozen=True, slots=True)
class Drift:
    """One difference.

    Attributes:
        between: what was compared, such as `terraform`.
        resource: the declaration's own name for it.
        attribute: path within it. Empty: the resource itself is there or is not.
        declared: what should be.
        deployed: what is; where two declarations are compared, what the other one says.
    """

    between: str
    resource: str
    attribute: str
    declared: Any
    deployed: Any

    def as_map(self) -> dict[str, Any]:
        """Its attributes, for JSON."""
        return {name: getattr(self, name) for name in ("between", "resource", "attribute", "declared", "deployed")}

    def __str__(self) -> str:
        attribute = f" {self.attribute}" if self.attribute else ""
        said = f"declared {_text(self.declared)}, deployed {_text(self.deployed)}"
        return f"{self.between}: {self.resource}{attribute}: {said}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def differences(declared: Any, deployed: Any, path: str = "", *, whole: bool = True) -> Iterator[tuple[str, Any, Any]]:
    """The leaves in which two values differ: path, declared, deployed.

    Lists are compared whatever their order; a text that is a JSON object is compared as one; a list of one text is that
    text, as policies have it.

    Args:
        whole: also what only `deployed` has.
    """
    declared, deployed = _parsed(declared), _parsed(deployed)
    if declared is UNRESOLVED or declared == deployed:
        return
    if isinstance(declared, dict) and isinstance(deployed, dict):
        names = declared.keys() | (deployed.keys() if whole else set())
        for name in sorted(names, key=str):
            below = f"{path}.{name}" if path else str(name)
            yield from differences(declared.get(name, ABSENT), deployed.get(name, ABSENT), below, whole=whole)
        return
    if isinstance(declared, list) or isinstance(deployed, list):
        ours, theirs = _listed(declared), _listed(deployed)
        if ours is not None and theirs is not None:
            if (named := _by_identity(ours, theirs)) is not None:
                yield from differences(*named, path, whole=whole)
                return
            if not _unlike(ours, theirs, whole):
                return
            if len(ours) == len(theirs) == 1:
                yield from differences(ours[0], theirs[0], path, whole=whole)
                return
    if _number(declared) is not None and _number(declared) == _number(deployed):
        return  # "90" of a parameter, 90 of a service
    yield path, declared, deployed


def _parsed(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _listed(value: Any) -> list[Any] | None:
    if isinstance(value, list):
        return value
    return None if value is ABSENT or value is None or isinstance(value, dict) else [value]


def _unlike(ours: list[Any], theirs: list[Any], whole: bool) -> bool:
    left = list(theirs)
    for mine in ours:
        same = next(
            (index for index, other in enumerate(left) if not list(differences(mine, other, whole=whole))), None
        )
        if same is None:
            return True
        del left[same]
    return bool(left)


def _by_identity(ours: list[Any], theirs: list[Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    for name in IDENTITIES:
        entries = [*ours, *theirs]
        if entries and all(isinstance(entry, dict) and isinstance(entry.get(name), str | int) for entry in entries):
            mine, others = ({f"[{entry[name]}]": entry for entry in side} for side in (ours, theirs))
            if len(mine) == len(ours) and len(others) == len(theirs):
                return mine, others
    return None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        return float(value)
    except ValueError:
        return None
