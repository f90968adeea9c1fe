"""The Bevy plugin of clients/bevy, in an app that renders without a window, on Mesa's software Vulkan."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest
import safelight
from safelight.v1 import generation_pb2 as pb

from tests.clients.case import ROOT
from tests.clients.toolchains import require
from tools.clients import rust

CRATE = ROOT / "clients/bevy"
LAVAPIPE = Path("/usr/share/vulkan/icd.d/lvp_icd.x86_64.json")
ENVIRONMENT = rust.ENVIRONMENT | {"CARGO_TARGET_DIR": str(ROOT / "out/bevy"), "RUSTDOCFLAGS": "-D warnings"}
"""Cargo's target folder for this crate: Bevy enables other features of crates that the Rust client also uses."""


def require_vulkan() -> None:
    """Skips the test if software Vulkan is missing."""
    if not LAVAPIPE.exists():
        pytest.skip("no software Vulkan on this machine (tools/install-system-packages bevy)")


async def run(*command: str | Path, **environment: str) -> str:
    """Runs a command in the crate and returns its output."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=CRATE,
        env=os.environ | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, complaints = await process.communicate()
    assert process.returncode == 0, complaints.decode()
    return said.decode()


@pytest.mark.timeout(3600)  # all of Bevy is compiled, once to run and once to be linted
@pytest.mark.parametrize(
    "command",
    ["build --quiet --examples", "fmt --check", "clippy --quiet --all-targets -- -D warnings", "doc --quiet --no-deps"],
    ids=lambda command: command.split()[0],
)
async def test_it_builds_and_passes_its_own_checks(command: str) -> None:
    require("rust")
    await run(rust.CARGO, *command.split(), **ENVIRONMENT)


@pytest.mark.timeout(3600)
async def test_it_passes_its_own_tests_and_the_readme_compiles() -> None:
    require("rust")
    await run(rust.CARGO, "test", "--quiet", **ENVIRONMENT)


@pytest.mark.timeout(3600)
async def test_images_develop_on_the_screen(start, tmp_path: Path) -> None:
    require("rust")
    require_vulkan()
    await run(rust.CARGO, "build", "--quiet", "--example", "headless", **ENVIRONMENT)
    app = ROOT / "out/bevy/debug/examples/headless"
    # One instance, so that the picture that is cancelled is not finished before a slow machine has drawn its preview.
    async with start(num_instances=1) as server, safelight.Client(server.address) as client:
        said = await run(app, server.address, tmp_path, VK_ICD_FILENAMES=str(LAVAPIPE), RUST_LOG="warn")
        lines = [line.split() for line in said.splitlines()]
        screen = pixels(tmp_path / "screen-end.rgba", 256)
        for sprite in range(2):
            picture = (await png(client, seed=7 + sprite)).array()
            shown = pixels(tmp_path / f"image-{sprite}.rgba", 128)
            assert np.array_equal(shown, picture), "the image has the pixels of the PNG"
            rendered = screen[:, 128 * sprite : 128 * (sprite + 1)]
            assert np.abs(rendered.astype(int) - picture).max() <= 1, "so has the screen, but for rounding"
            steps = [int(line[2]) for line in lines if line[:2] == ["preview", str(sprite)]]
            assert steps == sorted(set(steps)), "each preview that is shown is newer than the one before"
            assert steps, "previews were shown before the picture"
        [name] = [line[1] for line in lines if line[0] == "leaves"]
        cancelled = await client.get(name)
        assert cancelled.state == pb.Generation.STATE_CANCELLED, "the entity was despawned"


def pixels(file: Path, width: int) -> np.ndarray:
    return np.fromfile(file, np.uint8).reshape(128, width, 4)


async def png(client: safelight.Client, seed: int) -> safelight.Picture:
    """The picture that the Python client gets for a sprite's request."""
    spec = pb.GenerationSpec(prompt="a red potion", num_inference_steps=40, outputs=[pb.OutputSpec(seed=seed)])
    return await safelight.GenerationStream(client.develop(pb.GenerateRequest(spec=spec))).picture()
