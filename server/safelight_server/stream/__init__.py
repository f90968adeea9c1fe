"""Client streams of generations: each has a reliable lane for events and newest-wins slots for progress and previews.

`log.py` has a generation's events, `watcher.py` one stream of them,
`previews.py` the previews of that stream, `serialization.py` the bytes, `turns.py`
the order in which streams of all generations send. Invariants:
reliable events reach every stream complete and in order, and Finished is the
last; a slow stream costs one slot per output and slows nobody; a preview is made
only for a stream that has nothing else to send, and is never sent after its output's
picture has begun or the output has ended.
"""

from safelight_server.stream.log import EventLog
from safelight_server.stream.turns import SendTurns
from safelight_server.stream.watcher import Watcher

__all__ = ["EventLog", "SendTurns", "Watcher"]
