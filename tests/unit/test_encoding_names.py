"""Encodings are named by what they depend on: two models share one only if their encoders are equal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safelight_server.catalog.manifest import ComponentFile
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.domain.component import Component
from safelight_server.engine.jobs import ImagePrompt, InitImage, prompt_name

from tests.support.pipelines import small_pipeline

ENCODERS = (Component.TEXT_ENCODER, Component.ENCODER, Component.IMAGE_ENCODER)


def with_files(pipeline: Pipeline, digest: str, **facts: str) -> Pipeline:
    """The pipeline with another digest and with encoders of which these facts are said."""
    file = ComponentFile.model_validate({"model": "encoder", "version": 1, **facts})
    components = {**pipeline.manifest.components, **dict.fromkeys(ENCODERS, file)}
    return replace(pipeline, manifest=pipeline.manifest.model_copy(update={"components": components}), digest=digest)


def names(pipeline: Pipeline) -> tuple[str, ...]:
    """Of the encodings of a prompt, of a picture to start from, and of an image prompt."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    others = InitImage("photo", pixels), ImagePrompt("photo", pixels, 1.0)
    return prompt_name(pipeline, (4, 5)), *(one.name(pipeline) for one in others)


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    return small_pipeline(tmp_path)


def test_models_with_equal_encoders_share_encodings(pipeline):
    one, other = (with_files(pipeline, digest, sha256="ab" * 32) for digest in ("one", "other"))
    assert names(one) == names(other)


def test_models_that_were_exported_for_torch_alone_do_not_share_encodings(pipeline):
    """Their manifests have no digest of a component."""
    one, other = (with_files(pipeline, digest, sha256="") for digest in ("one", "other"))
    assert not set(names(one)) & set(names(other))


def test_encoders_whose_weights_lie_beside_the_graph_are_told_apart_by_them(pipeline):
    one, other = (with_files(pipeline, "same", sha256="ab" * 32, data_sha256=data * 32) for data in ("cd", "ef"))
    assert not set(names(one)) & set(names(other))
