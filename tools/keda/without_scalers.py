"""Copies KEDA's source without the scalers of other systems: without_scalers.py SOURCE FOLDER.

KEDA has some 80 kinds of scalers, and with them the libraries of every cloud, database and queue: most of its build.
The cluster of the tests needs the external scalers alone. Nothing else of KEDA is changed.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

KINDS = ("cpu", "external", "external-push", "external-mock")
FILES = ("cpu_memory_scaler.go", "external_scaler.go", "external_mock_scaler.go")
SHARED = 'package scalers\n\nconst externalMetricType = "External"\n'
"""What the kept files use of one that is left out (azure_queue_scaler.go)."""
CASE = re.compile(r'\tcase "([a-z0-9-]+)"(?:, "[a-z0-9-]+")*:\n(?:\t\t.*\n)+')


def main(source: Path, folder: Path) -> None:
    """Makes the folder anew."""
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
