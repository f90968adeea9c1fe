"""A server with a good and a bad pipeline serves the good one and reports what is wrong with the other."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest
from safelight import Client
from safelight_server.catalog.catalog import ManifestError

from tests.support.models_folder import add_pipeline, copy_models

NOTE = "scheduler PNDMScheduler is not served: euler is the default in its place"


async def test_the_good_model_is_served_and_the_bad_one_is_shown(tmp_path: Path, start) -> None:
    models = copy_models(tmp_path)
    add_pipeline(models, "bad", license=7)
    add_pipeline(models, "noted", notes=[NOTE])
    async with start(models_dir=models, num_instances=1) as running:
        async with Client(running.address) as client:
            assert {model.name: list(model.notes) for model in await client.models()} == {
                "models/icons": [],
                "models/noted": [NOTE],
            }
            [bad] = await client.unavailable_models()
            assert (bad.name, bad.revision) == ("models/bad", "1")
            assert bad.reason.startswith("pipelines/bad/1/pipeline.json: license")
        command = (sys.executable, "-m", "safelight_server.cli.main", "models", "--target", running.address)
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        )
        said = (await process.communicate())[0].decode()
        assert f"    note: {NOTE}\n" in said
        assert "models/bad  1  NOT SERVED: pipelines/bad/1/pipeline.json: license" in said


async def test_a_setting_makes_it_fatal(tmp_path: Path, start) -> None:
    models = copy_models(tmp_path)
    add_pipeline(models, "bad", license=7)
    with pytest.raises(ManifestError, match="license"):
        async with start(models_dir=models, require_all_models=True):
            pass
