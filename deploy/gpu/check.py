"""`deploy/gpu/check MODELS` tests the server on the GPU of this machine, in about 15 minutes, and prints a table.

NEVER EXECUTED as a whole: the project had no GPU. Its commands,
arguments, comparison and table are tested; the part for TensorRT is written
against the documentation.

For a folder of models that `safelight export --format both` wrote:

1. pictures with ONNX Runtime, on the CPU, in float32: the reference for the others;
2. the same pictures with `--runtime torch`, on the GPU;
3. with `--plan`: `safelight repository --accelerator plan`, deploy/triton/build_plan.py, tritonserver, then
   `--runtime triton`.

A part fails if the mean difference of a picture's bytes from the reference exceeds
`--tolerance`. It needs the extra `torch` (in a clone: `pip install -e
clients/python -e '.[torch]'`), and for part 3 also `tensorrt` in the version of
Triton's container, in which it must run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safelight import Client, GenerationError

HERE = Path(__file__).resolve().parent
PROMPT = "a glowing red potion on a dark background"
SEEDS = (1, 2)
START_S, BUILD_S = 600.0, 900.0
Pixels = npt.NDArray[np.int64]


class CheckError(Exception):
    """A part cannot be run; the message says why."""


@dataclass(frozen=True)
class Part:
    """Results of one runtime.

    Attributes:
        off: mean absolute difference of its pictures' bytes from those of the first part; 0 for the first part.
        worst: largest difference of a byte.
        step_ms: milliseconds of a denoiser call by its number of rows, as the server measured them at its start.
        per_s: pictures a second, by the number of pictures that were requested at once.
    """

    name: str
    numerics_id: str
    off: float
    worst: int
    step_ms: dict[int, float]
    per_s: dict[int, float]


def arguments() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="folder of models, exported with --format both")
    parser.add_argument("--device", default="cuda:0", help="torch's device (cuda:0); cpu tests this program alone")
    parser.add_argument("--dtype", default="float16", choices=("float32", "float16", "bfloat16"), help="of torch")
    parser.add_argument("--plan", action="store_true", help="also test TensorRT plans on tritonserver")
    parser.add_argument("--tritonserver", default="tritonserver", help="path of tritonserver")
    parser.add_argument("--steps", type=_count, default=20, help="steps of each picture (20)")
    parser.add_argument("--at-once", type=_counts, default=(1, 8, 16), help="numbers of pictures at once: 1,8,16")
    parser.add_argument("--tolerance", type=float, default=4.0, help="largest mean difference of bytes (4)")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def main() -> None:
    """Runs the command."""
    given = arguments().parse_args()
    try:
        parts = run(given)
    except CheckError as error:
        sys.exit(f"check: {error}")
    print(table(parts))
    if far := [part.name for part in parts if not part.off <= given.tolerance]:
        sys.exit(f"check: pictures of {', '.join(far)} are further than {given.tolerance:g} from those of ONNX Runtime")


def run(given: argparse.Namespace) -> list[Part]:
    """Runs the parts one after the other.

    Raises:
        CheckError: a part cannot be run.
    """
    print(device_line(given.device), flush=True)
    on_cpu = ["--runtime", "onnx", "--models-dir", str(given.models)]
    reference, first = try_server("onnx, CPU, float32", on_cpu, {}, given, None)
    torch = {"SAFELIGHT_TORCH_DEVICE": given.device, "SAFELIGHT_TORCH_DTYPE": given.dtype}
    on_torch = ["--runtime", "torch", "--models-dir", str(given.models)]
    parts = [first, try_server(f"torch, {given.device}, {given.dtype}", on_torch, torch, given, reference)[1]]
    if given.plan:
        with tempfile.TemporaryDirectory(prefix="safelight-gpu-") as folder:
            repository = Path(folder) / "repository"
            for command in plan_commands(given.models, repository):
                _run(command)
            grpc, http, metrics = free_ports(3)
            with process([given.tritonserver, *triton_options(repository, grpc, http, metrics)], {}):
                on_triton = ["--runtime", "triton", "--triton-url", f"127.0.0.1:{grpc}"]
                on_triton += ["--models-dir", str(given.models)]
                waits = {"SAFELIGHT_TRITON_START_S": str(START_S)}
                parts.append(try_server("triton, TensorRT plan", on_triton, waits, given, reference)[1])
    return parts


def device_line(device: str) -> str:
    """Describes the GPU, as nvidia-smi reports it.

    Raises:
        CheckError: `device` is a GPU and nvidia-smi is missing.
    """
    if not device.startswith("cuda"):
        return f"device {device}: no GPU is tried"
    if (tool := shutil.which("nvidia-smi")) is None:
        raise CheckError("nvidia-smi is not there: no GPU, or no driver; --device cpu tests this program without a GPU")
    query = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()


def plan_commands(models: Path, repository: Path) -> list[list[str]]:
    """The commands that write the repository for TensorRT and build its plans."""
    write = [sys.executable, "-m", "safelight_server", "repository", "--accelerator", "plan"]
    return [
        [*write, "--models-dir", str(models), "--out", str(repository)],
        [sys.executable, str(HERE.parent / "triton" / "build_plan.py"), str(repository)],
    ]


def triton_options(repository: Path, grpc: int, http: int, metrics: int) -> list[str]:
    """Options of tritonserver. It listens on loopback, because it has no authentication."""
    ports = {"grpc-port": grpc, "http-port": http, "metrics-port": metrics}
    addresses = ["--grpc-address=127.0.0.1", "--http-address=127.0.0.1", "--metrics-address=127.0.0.1"]
    return [f"--model-repository={repository}", *addresses, *(f"--{name}={port}" for name, port in ports.items())]


def try_server(
    name: str,
    options: Sequence[str],
    settings: dict[str, str],
    given: argparse.Namespace,
    reference: list[Pixels] | None,
) -> tuple[list[Pixels], Part]:
    """Starts a server, requests pictures and stops the server; returns the pictures and the results.

    Raises:
        CheckError: the server does not start, or refuses a request.
    """
    [port] = free_ports(1)
    print(f"{name}: starting", flush=True)
    command = [sys.executable, "-m", "safelight_server", "serve", "--port", str(port), *options]
    with process(command, settings) as server:
        try:
            return asyncio.run(ask(name, f"127.0.0.1:{port}", server, given, reference))
        except GenerationError as error:
            raise CheckError(f"{name}: {error}") from None


async def ask(
    name: str,
    address: str,
    server: subprocess.Popen[bytes],
    given: argparse.Namespace,
    reference: list[Pixels] | None,
) -> tuple[list[Pixels], Part]:
    """Waits until the server has started, then requests pictures one by one and several at once."""
    async with Client(address) as client:
        until = time.monotonic() + START_S
        while True:
            try:
                model = (await client.models())[0]
                break
            except GenerationError as error:
                if server.poll() is not None:
                    raise CheckError(f"{name}: the server ended with {server.returncode}; see above") from None
                if time.monotonic() > until:
                    raise CheckError(f"{name}: no server after {START_S:.0f} s: {error}") from None
                await asyncio.sleep(0.5)

        async def picture(seed: int) -> Pixels:
            asked = client.generate(PROMPT, seed=seed, steps=given.steps, cache="bypass", previews=False)
            return np.asarray((await asked.image()).convert("RGB"), np.int64)

        pictures = [await picture(seed) for seed in SEEDS]
        per_s = {}
        for count in given.at_once:
            began = time.perf_counter()
            await asyncio.gather(*(picture(100 + seed) for seed in range(count)))
            per_s[count] = count / (time.perf_counter() - began)
    off, worst = deviation(pictures, pictures if reference is None else reference)
    steps = {at.num_rows: at.duration.ToNanoseconds() / 1e6 for at in model.step_times}
    return pictures, Part(name, model.numerics_id, off, worst, steps, per_s)


def deviation(found: Sequence[Pixels], wanted: Sequence[Pixels]) -> tuple[float, int]:
    """Mean and largest absolute difference of bytes; of all pairs of pictures, the largest value of each."""
    apart = [np.abs(one - other) for one, other in zip(found, wanted, strict=True)]
    return max(float(one.mean()) for one in apart), max(int(one.max()) for one in apart)


def table(parts: Sequence[Part]) -> str:
    """The results as a Markdown table, for docs/benchmarks.md."""
    rows = sorted({size for part in parts for size in part.step_ms})
    counts = sorted({count for part in parts for count in part.per_s})
    head = ["runtime", "mean off", "worst byte", *(f"ms, {size} rows" for size in rows)]
    head += [f"pictures/s, {count} at once" for count in counts]
    lines = [head, ["---"] * len(head)]
    for part in parts:
        steps = [f"{part.step_ms[size]:.2f}" if size in part.step_ms else "" for size in rows]
        pictures = [f"{part.per_s[count]:.2f}" if count in part.per_s else "" for count in counts]
        lines.append([part.name, f"{part.off:.3f}", str(part.worst), *steps, *pictures])
    names = [f"- {part.name}: `{part.numerics_id}`" for part in parts]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *names])


def free_ports(count: int) -> list[int]:
    """Ports on loopback that are free now."""
    with contextlib.ExitStack() as held:
        listening = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(each.getsockname()[1]) for each in listening]


@contextlib.contextmanager
def process(command: Sequence[str], settings: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a program during the `with` block and ends it afterwards.

    Raises:
        CheckError: there is no such program.
    """
    try:
        started = subprocess.Popen(command, env=os.environ | settings)
    except OSError as error:
        raise CheckError(f"{command[0]}: {error.strerror}") from None
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(60)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def _run(command: Sequence[str]) -> None:
    print("$", *command, flush=True)
    try:
        done = subprocess.run(command, timeout=BUILD_S, check=False)
    except subprocess.TimeoutExpired:
        raise CheckError(f"{command[1]} took more than {BUILD_S:.0f} s") from None
    if done.returncode:
        raise CheckError(f"{' '.join(command[1:4])} ended with {done.returncode}; see above")


if __name__ == "__main__":
    main()
