"""A difference between what is declared and what is deployed, and how nested values are compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

ABSENT = "absent"
PRESENT = "present"
IDENTITIES = ("Sid", "Id", "id", "rulePriority", "PolicyName", "name", "key", "Key")
"""Keys that identify the entries of a list, so that their order does not matter."""


class UnresolvedValue:
    """Stands for a declared value that is known only after deployment; it equals any value."""


UNRESOLVED = UnresolvedValue()


@dataclass(frozen=True, slots=True)
class Drift:
    """One difference.

    Attributes:
        between: which comparison found it, such as `terraform`.
        resource: name of the resource in the declaration.
        attribute: path of the value within the resource. Empty: the resource itself is missing, or not declared.
        declared: the declared value.
        deployed: the deployed value, or the value of the second declaration if two declarations are compared.
    """

    between: str
    resource: str
    attribute: str
    declared: Any
    deployed: Any

    def as_map(self) -> dict[str, Any]:
        """The attributes as a dictionary, for JSON."""
        return {name: getattr(self, name) for name in ("between", "resource", "attribute", "declared", "deployed")}

    def __str__(self) -> str:
        attribute = f" {self.attribute}" if self.attribute else ""
        said = f"declared {_text(self.declared)}, deployed {_text(self.deployed)}"
        return f"{self.between}: {self.resource}{attribute}: {said}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def differences(declared: Any, deployed: Any, path: str = "", *, whole: bool = True) -> Iterator[tuple[str, Any, Any]]:
    """Yields the leaves in which two nested values differ: path, declared, deployed.

    The order of lists does not matter. A string that holds a JSON object is compared as an object. A list of one string
    equals that string, as in IAM policies.

    Args:
        whole: whether what only `deployed` has is a difference too.
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
        return  # a parameter is the string "90" where a service returns the number 90
    if isinstance(declared, bool) != isinstance(deployed, bool) and str(declared).lower() == str(deployed).lower():
        return  # likewise "true"
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
