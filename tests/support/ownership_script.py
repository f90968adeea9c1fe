"""Runs golden scripts of the rules of ownership (`tests/golden/ownership/`): commands, `----`, and their results.

recorded, unanswered, refused, ended, let_go, replaced    events of a generation that this replica has accepted
claim [FIELD=VALUE ...]     the state of a request id (`ClaimSeen`)
unowned FIELD=VALUE ...     a mirror whose owner's lease has ended (`decide_unowned`, leases of 2 s)
leased FIELD=VALUE ...      the same, once this replica has the lease
listed [FIELD=VALUE ...]    a registered generation that nobody owns (`ListedSeen`, leases of 2 s)

VALUE: yes, no, or seconds.
"""

from __future__ import annotations

from safelight_server.generations.ownership import rules

LEASE_S = 2.0


class Script:
    """One generation on one replica under the commands of a script."""

    def __init__(self) -> None:
        self._state = rules.OwnerState.CLAIMED

    def run(self, command: str) -> str:
        """Runs a command and returns its result."""
        name, *words = command.split()
        facts = {field: _value(value) for field, _, value in (word.partition("=") for word in words)}
        match name:
            case "claim":
                done = rules.decide_claim(rules.ClaimSeen(**facts)).name
            case "unowned":
                done = rules.decide_unowned(**facts, lease_s=LEASE_S).name
            case "leased":
                done = rules.decide_leased(**facts, lease_s=LEASE_S).name
            case "listed":
                done = rules.decide_listed(rules.ListedSeen(**facts), LEASE_S).name
            case _:
                self._state, action = rules.OWNER_TRANSITIONS[self._state, rules.OwnerInput[name.upper()]]
                done = f"{self._state.name}, {action.name}"
        return f"{command}: {done}"


def _value(word: str) -> bool | float:
    return word == "yes" if word in ("yes", "no") else float(word)


def rewritten(text: str) -> str:
    """The script with its present results."""
    lines = text.partition("----\n")[0].splitlines()
    script = Script()
    left = [script.run(line) for line in lines if line and not line.startswith("#")]
    return "\n".join([*lines, "----", *left]) + "\n"
