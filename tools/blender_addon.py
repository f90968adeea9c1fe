"""Packs the Blender add-on, with the Python client and its dependencies, into a zip that Blender installs.

    python tools/blender_addon.py [--platform linux|windows|macos] [--python-version 3.11]

Blender has a Python of its own, and its users do not run pip, so the add-on contains the packages with their licences.
gRPC is a compiled extension, so a zip is for one platform and one version of Python. Prints the path of the zip.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
ADDON = ROOT / "clients/blender"
PACKAGE = "safelight_blender"
CLIENT = ROOT / "clients/python/safelight"
LOCK = ROOT / "requirements-blender.lock"
LEFT_OUT = {".pyi", ".pyc"}


def pack(platform: str, python_version: str, folder: Path) -> Path:
    """Writes the zip into a folder and returns its path.

    Raises:
        subprocess.CalledProcessError: a package is not available for that platform and version.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"safelight-blender-{platform}-python{python_version}.zip"
    with tempfile.TemporaryDirectory() as modules, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        uv = [str(Path(sys.executable).parent / "uv"), "pip", "install", "--quiet", "--target", modules]
        wanted = ["--python-platform", platform, "--python-version", python_version, "--only-binary", ":all:"]
        subprocess.run([*uv, *wanted, "--no-deps", "--require-hashes", "-r", LOCK], check=True)
        sources = [(ADDON / PACKAGE, ""), (CLIENT, "modules/safelight"), (Path(modules), "modules")]
        for source, where in sources:
            for file in files(source):
                archive.write(file, Path(PACKAGE) / where / file.relative_to(source))
        archive.write(ADDON / "LICENSE", f"{PACKAGE}/LICENSE")
    return path


def files(folder: Path) -> Iterator[Path]:
    """The files of a folder that are packed."""
    for file in sorted(folder.rglob("*")):
        top = file.relative_to(folder).parts[0]
        if file.is_file() and file.suffix not in LEFT_OUT and top not in ("bin", ".lock"):
            yield file


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--platform", choices=["linux", "windows", "macos"], default="linux")
    parser.add_argument("--python-version", default="3.11", help="of Blender: see its Python console")
    parser.add_argument("--folder", type=Path, default=ROOT / "out/blender")
    arguments = parser.parse_args()
    print(pack(arguments.platform, arguments.python_version, arguments.folder))


if __name__ == "__main__":
    main()
