"""Writes a network as one that computes with 8-bit integers: ONNX Runtime's static quantization.

Convolutions and matrix products take int8 weights (one scale a channel) and uint8 activations whose ranges are fixed
beforehand. Integer sums are exact, and no range depends on the other rows of a call: so a row keeps its bits in any
batch. What adapters add stays float (record 0046).
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from safelight_server.catalog.catalog import DATA_FILE
from safelight_server.catalog.manifest import ADAPTER_INPUTS, CONTROL_SCALES_SOURCE
from safelight_server.quantization import branches, graph
from safelight_server.quantization.offline import Inputs

OPERATORS = ["Conv", "MatMul", "Gemm"]
SMALL = 64
"""Weights of fewer values stay float32: a cast would cost more than it saves."""


class _Reader(CalibrationDataReader):
    def __init__(self, inputs: Sequence[Inputs]) -> None:
        self._rest: Iterator[Inputs] = iter(inputs)

    def get_next(self) -> Inputs | None:
        return next(self._rest, None)


def write_int8(source: Path, target: Path, calibration: Sequence[Inputs]) -> None:
    """Writes the network of `source` with integers; its weights in a file of their own where those of `source` are.

    Args:
        calibration: inputs of calls, whose values fix the ranges of activations. Each control network acts in some.
    """
    is_large = source.with_name(DATA_FILE).is_file()
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        unfolded = Path(scratch) / "unfolded.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # casts weights to float
        options.optimized_model_filepath = str(unfolded)
        options.log_severity_level = 3
        if is_large:
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", DATA_FILE)
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        model = _quantized(unfolded, calibration, is_large)
        for control in branches.control_networks(model):
            file = Path(scratch) / f"control_{control.place}.onnx"
            onnx.save_model(control.network, file, save_as_external_data=is_large, location=f"{file.name}.weights")
            acting = [
                {name: inputs[name] for name in control.inputs}
                for inputs in calibration
                if inputs[CONTROL_SCALES_SOURCE][:, control.place].any()
            ]
            control.put_back(_quantized(file, acting, is_large))
    del model.metadata_props[:]
    _store_half(model.graph)
    if is_large:
        onnx.save_model(model, target, save_as_external_data=True, location=DATA_FILE)
    else:
        target.write_bytes(model.SerializeToString(deterministic=True))


def _quantized(file: Path, calibration: Sequence[Inputs], is_large: bool) -> onnx.ModelProto:
    """The network of a file with integers, apart from branches and from what adapters add."""
    made = file.with_suffix(".int8.onnx")
    nodes = onnx.load(file, load_external_data=False).graph.node
    logging.disable(logging.WARNING)  # the library advises a preparation that was just made
    try:
        quantize_static(
            file,
            made,
            _Reader(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=OPERATORS,
            nodes_to_exclude=graph.of_adapters(nodes, ADAPTER_INPUTS),
            per_channel=True,
            reduce_range=True,  # 7 bits: CPUs without VNNI add products in 16 bits, which saturate
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            use_external_data_format=is_large,
        )
    finally:
        logging.disable(logging.NOTSET)
    return onnx.load(made)


def _store_half(of: onnx.GraphProto) -> None:
    """Stores weights that stay float as float16, as they were, and casts them where they are used; also in branches."""
    casts = []
    for initializer in of.initializer:
        if initializer.data_type != onnx.TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(initializer)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if values.size < SMALL or not np.array_equal(half.astype(np.float32), values):
            continue
        name = initializer.name
        initializer.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
        casts.append(helper.make_node("Cast", [f"{name}.half"], [name], name=f"{name}.cast", to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *of.node]
    del of.node[:]
    of.node.extend(nodes)
    for node in of.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _store_half(attribute.g)
