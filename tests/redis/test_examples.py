"""The example with two replicas: it starts them and a Redis itself, and ends them."""

from __future__ import annotations

import os
import re

import pytest

from tests.integration.test_examples import example
from tests.integration.test_readme import run


@pytest.mark.timeout(120)
async def test_a_killed_replica_s_generation_goes_on_at_the_other_and_nothing_is_left_running(tmp_path):
    said = await run(tmp_path, example("two_replicas.py"))
    [killed] = re.findall(r"^killed \d+ after step (\d+)$", said, re.MULTILINE)
    later = [int(step) for step in re.findall(r"^step (\d+) of 40, by the other replica$", said, re.MULTILINE)]
    assert later[-1] == 40 > int(killed)
    assert re.search(r"^picture: [1-9]\d* bytes$", said, re.MULTILINE)
    for pid in re.findall(r"(?:redis-server|safelight) (\d+)", said):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
