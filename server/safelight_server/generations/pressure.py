"""Which priority classes are under pressure: more is queued than is done in the time that they may wait. Pure.

Work is counted as the scaler counts it (`scaler.demand`): in seconds of one
instance in full batches, and for each class with all classes before it. A class
becomes late when its work takes longer than the class may wait. It stays late
until the work takes less than half of that time, so that the decision does not
change with every request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from safelight_server.scheduler import Priority

BEGINS, ENDS = 1.0, 0.5
"""A class is late when its queued work exceeds `BEGINS` times what is done in the time that it may wait, and no longer
late when that falls below `ENDS`."""


class Pressure:
    """Which classes are late.

    Args:
        wait_s: how long work of a class may wait; a class without an entry is never late.
        changed: called when a class becomes late or no longer is: with the class, whether it is late, and the ratio
            of its queued work to what is done in its time.
    """

    def __init__(
        self,
        wait_s: Mapping[Priority, float],
        changed: Callable[[Priority, bool, float], None] = lambda _priority, _late, _load: None,
    ) -> None:
        self._wait_s = dict(wait_s)
        self._late = dict.fromkeys(self._wait_s, False)
        self._changed = changed

    def update(self, left_s: Mapping[Priority, float], num_instances: int) -> None:
        """Decides from the present queue. While no instance is live the speed is unknown, and nothing changes.

        Args:
            left_s: queued work in seconds of one instance, by class.
            num_instances: the number of live instances.
        """
        if not num_instances:
            return
        for priority, wait_s in self._wait_s.items():
            work_s = sum(seconds for other, seconds in left_s.items() if other <= priority)
            load = work_s / (num_instances * wait_s)
            late = load >= ENDS if self._late[priority] else load > BEGINS
            if late is not self._late[priority]:
                self._late[priority] = late
                self._changed(priority, late, load)

    def on(self, priority: Priority) -> bool:
        """Whether a class is under pressure: it is late, or one that comes before it is."""
        return any(late for other, late in self._late.items() if other <= priority)
