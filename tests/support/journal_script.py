"""Runs golden scripts of the journal's rules (`tests/golden/journal/`): commands, `----`, and their results.

take A [sleeping]       a line arrives; sleeping: the lease may have been lost
state A                 a change of state arrives, which no stream shows
written [A]             Redis has stored the first line, or one that no longer waits
failed [SECONDS] [sleeping]     a write of this duration has failed
wait SECONDS            time passes
forgotten, replaced, end, close
"""

from __future__ import annotations

from safelight_server.cluster.journal_rules import JournalLines


class Script:
    """One journal under the commands of a script."""

    def __init__(self) -> None:
        self._lines: JournalLines[str] = JournalLines(["record"])
        self._now_s = 0.0
        self._shown: set[str] = set()

    def run(self, command: str) -> str:
        """Runs a command and returns its result."""
        name, *words = command.split()
        held = "sleeping" not in words
        shown: list[str] = []
        match name:
            case "take" | "state":
                shown = self._lines.take(words[0], self._now_s, held=held, replaceable=name == "state")
            case "written":
                line = words[0] if words else self._lines.first
                assert line is not None
                shown = self._lines.written(line)
            case "failed":
                lasted_s = float(words[0]) if words and words[0] != "sleeping" else 0.0
                self._now_s += lasted_s
                shown = self._lines.failed(self._now_s - lasted_s, self._now_s, held=held)
            case "wait":
                self._now_s += float(words[0])
            case "forgotten":
                self._lines.forgotten()
            case "replaced":
                self._lines.replaced()
            case "end":
                self._lines.end(self._now_s)
            case "close":
                self._lines.close()
            case _:
                raise ValueError(command)
        new = [line for line in shown if line not in self._shown]
        self._shown.update(new)
        waiting = " ".join(self._lines.waiting) or "nothing"
        return f"{command}: {self._lines.state.name}, shows {' '.join(new) or 'nothing'}, {waiting} waits"


def rewritten(text: str) -> str:
    """The script with its present results."""
    script, done = Script(), []
    for block in text.strip().split("\n\n"):
        commands = block.split("\n----")[0].split("\n")
        left = [script.run(line) for line in commands if not line.startswith("#")]
        done.append("\n".join([*commands, "----", *left]))
    return "\n\n".join(done) + "\n"
