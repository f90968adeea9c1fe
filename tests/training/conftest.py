"""Pipelines that several modules compare with the server, exported once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[StableDiffusionPipeline, Path]]:
    """A random pipeline by its kind (`test_pipeline_parity.build`), and the folder of models that it was exported to.

    The weights are everyone's. The scheduler is whatever the test before has set.
    """
    from safelight_server.export.exporter import export
    from safelight_server.export.plan import ExportOptions

    from tests.training.test_pipeline_parity import build

    @functools.cache
    def of(kind: str) -> tuple[StableDiffusionPipeline, Path]:
        folder = tmp_path_factory.mktemp(kind)
        pipeline = build(kind)
        pipeline.save_pretrained(folder / "pipeline")
        export(folder / "pipeline", folder / "models", ExportOptions("tiny", licence="CC0-1.0"))
        return pipeline, folder / "models"

    return of
