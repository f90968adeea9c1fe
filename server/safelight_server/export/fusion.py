"""Joins the ONNX graphs of a denoiser and of its control networks, so that a network runs for the rows that use it.

The denoiser's inputs residual_0, residual_1, … become sums of what the networks
return. Each network is a branch of an `If`: where no row's scale differs from 0,
the other branch returns a single 0; else the branch picks the rows whose scale
does, runs the network on them, and puts what it returns at their places, with
zeros in all other rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx
from onnx import TensorProto, helper

from safelight_server.export.source import ExportError

RESIDUAL = "residual_"
PICTURE, SCALE = "control_image", "control_scale"
"""The inputs of a network that are not the denoiser's."""
BATCH = "batch"


def fused(
    denoiser: onnx.ModelProto,
    networks: Sequence[onnx.ModelProto],
    images: str,
    scales: str,
    picture: Sequence[int | str],
) -> onnx.ModelProto:
    """The denoiser with its networks.

    Args:
        denoiser: is changed. Its inputs that begin with `RESIDUAL` are what is added to it, in this order.
        networks: with inputs of the denoiser, `PICTURE` and `SCALE`, and an output for each residual.
        images: name of the new input (B, K, 3, H, W); of each row a picture for each network.
        scales: name of the new input (B, K).
        picture: (3, H, W); a string is the name of an open axis.

    Raises:
        ExportError: a network has branches of its own.
    """
    graph = denoiser.graph
    names = [given.name for given in graph.input if given.name.startswith(RESIDUAL)]
    kept = [given for given in graph.input if not given.name.startswith(RESIDUAL)]
    del graph.input[:]
    graph.input.extend(kept)
    batch = kept[0].type.tensor_type.shape.dim[0].dim_param or BATCH
    graph.input.append(helper.make_tensor_value_info(images, TensorProto.FLOAT, [batch, len(networks), *picture]))
    graph.input.append(helper.make_tensor_value_info(scales, TensorProto.FLOAT, [batch, len(networks)]))
    added = [_added(graph, network, place, images, scales) for place, network in enumerate(networks)]
    nodes = [node for nodes, _ in added for node in nodes]
    for residual, tensors in zip(names, zip(*(outputs for _, outputs in added), strict=True), strict=True):
        total = tensors[0]
        for place, tensor in enumerate(tensors[1:], 1):
            sum_ = residual if place == len(tensors) - 1 else f"{residual}/sum_{place}"
            nodes.append(_node("Add", [total, tensor], [sum_]))
            total = sum_
        if len(tensors) == 1:
            nodes.append(_node("Identity", [total], [residual]))
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)
    known = {(function.domain, function.name) for function in denoiser.functions}
    for network in networks:
        denoiser.functions.extend(at for at in network.functions if (at.domain, at.name) not in known)
        known |= {(function.domain, function.name) for function in network.functions}
        domains = {used.domain for used in denoiser.opset_import}
        denoiser.opset_import.extend(used for used in network.opset_import if used.domain not in domains)
    return denoiser


def _added(
    graph: onnx.GraphProto, network: onnx.ModelProto, place: int, images: str, scales: str
) -> tuple[list[onnx.NodeProto], list[str]]:
    """The nodes that run a network for the rows that use it, and the names of what they add."""
    at = f"control_{place}/"
    inner = [given.name for given in network.graph.input]
    results = [result.name for result in network.graph.output]
    _rename(network.graph, at)
    outputs = [f"{at}added_{number}" for number in range(len(results))]
    index, first = f"{at}place", f"{at}axis"
    graph.initializer.append(helper.make_tensor(index, TensorProto.INT64, [], [place]))
    graph.initializer.append(helper.make_tensor(first, TensorProto.INT64, [1], [0]))
    second, zero = f"{at}second_axis", f"{at}zero"
    graph.initializer.append(helper.make_tensor(second, TensorProto.INT64, [1], [1]))
    graph.initializer.append(helper.make_tensor(zero, TensorProto.FLOAT, [], [0.0]))
    scale, uses = f"{at}scale_of_all", f"{at}uses"
    before = [
        _node("Gather", [scales, index], [scale], axis=1),
        _node("Equal", [scale, zero], [f"{uses}/not"]),  # a cast would be joined with the next one: 0.5 would be 0
        _node("Not", [f"{uses}/not"], [uses]),
        _node("Cast", [uses], [f"{uses}/number"], to=TensorProto.INT32),
        _node("ReduceMax", [f"{uses}/number"], [f"{uses}/most"], keepdims=0),
        _node("Cast", [f"{uses}/most"], [f"{uses}/any"], to=TensorProto.BOOL),
    ]
    rows = f"{at}rows"
    branch = [
        _node("NonZero", [uses], [f"{rows}/found"]),
        _node("Squeeze", [f"{rows}/found", first], [rows]),
        _node("Unsqueeze", [rows, second], [f"{rows}/indices"]),
        _node("Shape", [scale], [f"{rows}/batch"]),
    ]
    for name in inner:
        if name == PICTURE:
            branch.append(_node("Gather", [images, rows], [f"{at}{name}/all"], axis=0))
            branch.append(_node("Gather", [f"{at}{name}/all", index], [at + name], axis=1))
        else:
            branch.append(_node("Gather", [scale if name == SCALE else name, rows], [at + name], axis=0))
    branch += network.graph.node
    for result, output in zip(results, outputs, strict=True):
        branch += [
            _node("Shape", [at + result], [f"{output}/row"], start=1),
            _node("Concat", [f"{rows}/batch", f"{output}/row"], [f"{output}/shape"], axis=0),
            _node("ConstantOfShape", [f"{output}/shape"], [f"{output}/zeros"]),
            _node("ScatterND", [f"{output}/zeros", f"{rows}/indices", at + result], [f"{output}/then"]),
        ]
    value = helper.make_tensor("value", TensorProto.FLOAT, [1, 1, 1, 1], [0.0])
    nothing = [_node("Constant", [], [f"{output}/else"], value=value) for output in outputs]
    acting = helper.make_graph(
        branch, f"{at}then", [], [_float(f"{output}/then") for output in outputs], network.graph.initializer
    )
    resting = helper.make_graph(nothing, f"{at}else", [], [_float(f"{output}/else") for output in outputs])
    chosen = _node("If", [f"{uses}/any"], outputs, then_branch=acting, else_branch=resting)
    return [*before, chosen], outputs


def _node(operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: object) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, outputs, name=f"{outputs[0]}.node", **attributes)


def _float(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def _rename(graph: onnx.GraphProto, prefix: str) -> None:
    """Puts a prefix before all names of a graph, whose optional inputs ("") stay without one.

    Raises:
        ExportError: it has graphs within it.
    """
    for node in graph.node:
        if any(
            attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for attribute in node.attribute
        ):
            raise ExportError(f"{node.name}: a control network with branches of its own cannot be exported")
        node.name = prefix + node.name if node.name else ""
        for names in (node.input, node.output):
            names[:] = [prefix + name if name else "" for name in names]
    for value in _values(graph):
        value.name = prefix + value.name


def _values(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto | onnx.ValueInfoProto]:
    yield from graph.initializer
    yield from graph.input
    yield from graph.output
