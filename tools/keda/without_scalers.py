"""Copies KEDA's source without its built-in scalers. Usage: without_scalers.py SOURCE FOLDER.

KEDA has about 80 kinds of scalers, and with them the libraries of every cloud, database and queue, which take most of
its build. The test cluster needs only external scalers. Nothing else of KEDA is changed.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

KINDS = ("cpu", "external", "external-push", "external-mock")
FILES = ("cpu_memory_scaler.go", "external_scaler.go", "external_mock_scaler.go")
SHARED = 'package scalers\n\nconst externalMetricType = "External"\n'
"""Declarations of azure_queue_scaler.go, which is left out, that the kept files use."""
CASE = re.compile(r'\tcase "([a-z0-9-]+)"(?:, "[a-z0-9-]+")*:\n(?:\t\t.*\n)+')


def main(source: Path, folder: Path) -> None:
    """Replaces the folder by a new copy."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns("*_test.go", "tests"))
    for file in (folder / "pkg" / "scalers").glob("*_scaler.go"):
        if file.name not in FILES:
            file.unlink()
    (folder / "pkg" / "scalers" / "shared.go").write_text(SHARED)
    builder = folder / "pkg" / "scaling" / "scalers_builder.go"
    builder.write_text(CASE.sub(lambda found: found[0] if found[1] in KINDS else "", builder.read_text()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
