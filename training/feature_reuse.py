"""`python -m training.feature_reuse`: what reusing deep features between steps would save on `icons`, and its cost.

A measurement, not a feature of the server (decision record 0046). The denoiser's graph is cut where its innermost
levels end, as in DeepCache (Ma et al. 2023). A full step computes everything and also returns the features at the cut.
A shallow step takes these from the last full step and computes only the outermost level. The first step is full, then
every `interval`-th. For comparison, the same captions and seeds are developed with only as many steps as there are
full ones.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from safelight_server.catalog import catalog
from safelight_server.catalog.pixels import to_pixels
from safelight_server.domain.component import Component
from safelight_server.quantization.offline import Inputs, OfflinePipeline
from safelight_server.quantization.quality import psnr_db
from safelight_server.runtime import onnx as runtime

from training import classifier
from training.evaluate import held_out_specs, shares, trained_judge
from training.icons import caption
from training.judge import JUDGE, NAMED

FEATURE = "conv2d_17"
"""The features at the cut: the output of up_blocks.0 of `icons`, (B, C, h, w)."""
INTERVALS = (2, 3, 5)
CALLS = 5
ROWS = (2, 16)

Call = Callable[[Inputs], Mapping[str, npt.NDArray[np.float32]]]


def cut(source: Path, folder: Path) -> tuple[Call, Call]:
    """Makes the full and the shallow step from a denoiser's ONNX file."""
    folded = folder / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    model = onnx.load(folded)
    [inputs, outputs] = ([value.name for value in side] for side in (model.graph.input, model.graph.output))
    full, shallow = folder / "full.onnx", folder / "shallow.onnx"
    onnx.utils.extract_model(folded, full, inputs, [*outputs, FEATURE], check_model=False)
    taken = [name for name in inputs if name != "encoder_hidden_states"]
    onnx.utils.extract_model(folded, shallow, [*taken, FEATURE], outputs, check_model=False)
    return runtime.loaded(full), runtime.loaded(shallow)


class Reusing:
    """A denoiser that computes its deep features only in every `interval`-th call."""

    def __init__(self, full: Call, shallow: Call, interval: int) -> None:
        self._full, self._shallow, self._interval = full, shallow, interval
        self.restart()

    def restart(self) -> None:
        """Makes the next call a full step, for other pictures."""
        self._calls, self._feature = 0, np.zeros(0, np.float32)

    def __call__(self, inputs: Inputs) -> Mapping[str, npt.NDArray[np.float32]]:
        is_full = self._calls % self._interval == 0
        self._calls += 1
        if is_full:
            made = self._full(inputs)
            self._feature = made[FEATURE]
            return made
        taken = {name: rows for name, rows in inputs.items() if name != "encoder_hidden_states"}
        return self._shallow(taken | {FEATURE: self._feature})


def cpu_ms(call: Call, inputs: Inputs) -> float:
    """Median CPU time of a call, in ms."""
    times = []
    for _ in range(CALLS):
        began = time.process_time()
        call(inputs)
        times.append(1e3 * (time.process_time() - began))
    return statistics.median(times)


def bit_equal(call: Call, inputs: Inputs) -> bool:
    """Whether the rows of a batch are bit-equal to single rows."""
    [batch] = [call(inputs)["prediction"]]
    rows = [call({name: array[row : row + 1] for name, array in inputs.items()}) for row in range(len(batch))]
    return all(np.array_equal(batch[row], one["prediction"][0]) for row, one in enumerate(rows))


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--captions", type=int, default=100)
    parser.add_argument("--no-judge", action="store_true", help="do not train a judge, which takes minutes")
    options = parser.parse_args()
    pipeline = catalog.load(options.models).get("icons")
    offline = OfflinePipeline(pipeline)
    with tempfile.TemporaryDirectory() as folder:
        full, shallow = cut(pipeline.files[Component.DENOISER], Path(folder))
    inputs: list[Inputs] = []
    offline.images(["a red potion"] * 8, range(8), num_steps=1, watch=inputs.append)
    feature = full(inputs[0])[FEATURE]
    print(f"feature of a row: {feature[0].nbytes} bytes; latent: {inputs[0]['sample'][0].nbytes}")
    for rows in ROWS:
        whole = {name: array[:rows] for name, array in inputs[0].items()}
        taken = {name: array for name, array in whole.items() if name != "encoder_hidden_states"}
        taken[FEATURE] = feature[:rows]
        costs = cpu_ms(offline.denoiser, whole), cpu_ms(full, whole), cpu_ms(shallow, taken)
        print(f"{rows} rows: CPU {costs[0]:.1f} ms, full {costs[1]:.1f}, shallow {costs[2]:.1f}")
        print(f"{rows} rows: bit-equal alone: full {bit_equal(full, whole)}, shallow {bit_equal(shallow, taken)}")

    rng = random.Random("captions")
    specs = held_out_specs(options.captions, "evaluation")
    prompts = [caption(spec, rng, full=True) for spec in specs]
    judge = None if options.no_judge else trained_judge(JUDGE)[0]
    wanted = np.array([classifier.labels(spec) for spec in specs])
    steps = pipeline.manifest.defaults.num_inference_steps

    def drawn(denoiser: Call | None, num_steps: int) -> npt.NDArray[np.uint8]:
        pictures = []
        for first in range(0, len(prompts), 4):
            if isinstance(denoiser, Reusing):
                denoiser.restart()
            several = prompts[first : first + 4]
            images = offline.images(several, range(first, first + len(several)), num_steps=num_steps, denoiser=denoiser)
            pictures += [to_pixels(image) for image in images]
        return np.stack(pictures)

    plain = drawn(None, steps)
    ways: dict[str, tuple[Call | None, int, float]] = {f"{steps} steps": (None, steps, steps)}
    for interval in INTERVALS:
        count = -(-steps // interval)
        share = costs[2] / costs[0]
        ways[f"reuse every {interval}"] = Reusing(full, shallow, interval), steps, count + (steps - count) * share
        ways[f"{count} steps"] = None, count, count
    for name, (denoiser, num_steps, cost) in ways.items():
        pictures = plain if name == f"{steps} steps" else drawn(denoiser, num_steps)
        near = statistics.median(psnr_db(plain, pictures))
        said = f"{name}: {cost / steps:.2f} of the denoiser's CPU, PSNR {near:.1f} dB"
        if judge is not None:
            found = shares(wanted, classifier.predict(judge, classifier.shrink(pictures)))
            said += ", right " + ", ".join(f"{head} {found[head]:.3f}" for head in NAMED)
        print(said, flush=True)


if __name__ == "__main__":
    main()
