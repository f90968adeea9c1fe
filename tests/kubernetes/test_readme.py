"""The commands of deploy/README.md, as a new operator runs them: from nothing to a picture."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest
from PIL import Image

from tests.kubernetes.cluster import PROGRAMS
from tests.kubernetes.conftest import ROOT

BOXES = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.timeout(700)
def test_the_commands_lead_to_a_picture(cluster, gateway, redis, tmp_path):
    boxes = BOXES.findall((ROOT / "deploy" / "README.md").read_text())
    assert boxes.pop(0) == "make image\n", "`make test-kubernetes` has run it"
    for name in (".venv", "deploy"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "models", tmp_path / "models")
    environment = os.environ | {
        "KUBECONFIG": str(cluster.kubeconfig),
        "PATH": f"{PROGRAMS}:{PROGRAMS.parent}:{os.environ['PATH']}",
        "REDIS_URL": redis,
        "REPOSITORY": gateway["repository"],
        "DIGEST": gateway["digest"],
    }
    script = "set -euo pipefail\n" + "\n".join(boxes)
    ended = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=650, check=False
    )
    try:
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert "/tmp/picture.png" in ended.stdout, "helm test"
        with Image.open(tmp_path / "potion.png") as picture:
            assert picture.size == (128, 128)
        assert (tmp_path / "fetched-models" / "pipelines" / "icons" / "1.0" / "pipeline.json").exists()
    finally:
        cluster.helm("uninstall", "safelight", "--namespace", "pictures", "--ignore-not-found")
