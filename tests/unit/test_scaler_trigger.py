"""The metadata of a trigger."""

from __future__ import annotations

import pytest
from safelight_server.scaler.demand import WAIT_S, Policy
from safelight_server.scaler.trigger import Trigger, TriggerError, trigger


def test_all_has_defaults():
    assert trigger({"scalerAddress": "scaler:8431"}) == Trigger("", Policy(wait_s=dict(WAIT_S)), use_forecast=True)


def test_all_can_be_said():
    metadata = {
        "selector": 'namespace="pictures"', "instances": "8", "utilization": "0.9", "minReplicas": "2",
        "maxReplicas": "9", "waitInteractive": "2", "waitStandard": "30", "waitBatch": "90", "forecast": "false",
    }  # fmt: skip
    wait_s = {"interactive": 2.0, "standard": 30.0, "batch": 90.0}
    assert trigger(metadata) == Trigger('namespace="pictures"', Policy(8, 0.9, wait_s, 2, 9), use_forecast=False)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"utilisation": "0.9"}, "utilisation: "),
        ({"utilization": "1.5"}, "utilization: "),
        ({"instances": "many"}, "instances: "),
        ({"waitBatch": "0"}, "waitBatch: "),
        ({"minReplicas": "5", "maxReplicas": "4"}, "minReplicas must be at most maxReplicas"),
    ],
)
def test_faults_are_named(metadata, words):
    with pytest.raises(TriggerError, match=words):
        trigger(metadata)
