"""What stays float in a quantized network, read from its graph. Takes ONNX's messages and imports nothing of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol


class Node(Protocol):
    """An operator of a graph."""

    name: str
    op_type: str

    @property
    def input(self) -> Sequence[str]:
        """Names of its inputs."""

    @property
    def output(self) -> Sequence[str]:
        """Names of its results."""


def of_adapters(nodes: Iterable[Node], inputs: Collection[str]) -> list[str]:
    """Names of the nodes that compute what adapters add to their layers.

    Calibration has no adapter, so that the ranges of these products would be those of zeros, and adapters would be
    without effect. Each part ends at the sum with what the layer itself makes.

    Args:
        nodes: in the order of computing.
        inputs: names of the inputs that bring adapters.
    """
    reached, found = set(inputs), []
    for node in nodes:
        if node.op_type != "Add" and not reached.isdisjoint(node.input):
            reached.update(node.output)
            found.append(node.name)
    return found
