"""Takes the control networks of a denoiser out of its graph, as networks of their own, and puts changed ones back.

`export.fusion` made each a branch of an `If`. A branch uses tensors of the graph around it: the nodes that compute
these go with it, and are left out when it comes back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import onnx

CONTROL = re.compile(r"control_([0-9]+)/")
"""How the names of all that belongs to a network begin, with its place."""


@dataclass(frozen=True)
class TakenOut:
    """A control network.

    Attributes:
        place: among the networks of the denoiser.
        network: it alone. Its inputs are some of the denoiser's.
    """

    place: int
    network: onnx.ModelProto
    _branch: onnx.GraphProto
    _around: frozenset[str]

    @property
    def inputs(self) -> list[str]:
        """Names of its inputs."""
        return [given.name for given in self.network.graph.input]

    def put_back(self, changed: onnx.ModelProto) -> None:
        """Puts another network with the same inputs and outputs in its place."""
        nodes = [node for node in changed.graph.node if self._around.isdisjoint(node.output)]
        weights = [weight for weight in changed.graph.initializer if weight.name not in self._around]
        del self._branch.node[:], self._branch.initializer[:], self._branch.value_info[:]
        self._branch.node.extend(nodes)
        self._branch.initializer.extend(weights)


def control_networks(denoiser: onnx.ModelProto) -> Iterator[TakenOut]:
    """The control networks of a denoiser; `TakenOut.put_back` changes it."""
    for node in denoiser.graph.node:
        found = CONTROL.match(node.output[0]) if node.op_type == "If" else None
        if found is not None:
            [branch] = [attribute.g for attribute in node.attribute if attribute.name == "then_branch"]
            yield _taken_out(denoiser, branch, int(found[1]))


def _taken_out(denoiser: onnx.ModelProto, branch: onnx.GraphProto, place: int) -> TakenOut:
    whole = denoiser.graph
    own = {name for node in branch.node for name in node.output} | {weight.name for weight in branch.initializer}
    needed = {name for node in branch.node for name in node.input if name} - own
    around = []
    for node in reversed(whole.node):  # in the order of computing, so that what a node needs stands before it
        if not needed.isdisjoint(node.output):
            around.append(node)
            needed.update(node.input)
    weights = [weight for weight in whole.initializer if weight.name in needed]
    graph = onnx.GraphProto(name=branch.name)
    graph.input.extend(given for given in whole.input if given.name in needed)
    graph.output.extend(branch.output)
    graph.initializer.extend([*weights, *branch.initializer])
    graph.node.extend([*reversed(around), *branch.node])
    network = onnx.ModelProto(ir_version=denoiser.ir_version, graph=graph)
    network.opset_import.extend(denoiser.opset_import)
    network.functions.extend(denoiser.functions)
    names = {name for node in around for name in node.output} | {weight.name for weight in weights}
    return TakenOut(place, network, branch, frozenset(names))
