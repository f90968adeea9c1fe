"""`make build-clients`: builds what `make test-clients` runs, for the languages whose toolchains are installed.

CI runs it in parallel with test groups that mostly wait, so that the clients' tests need not build.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from tools.clients import cpp, rust
from tools.clients.commands import CLIENTS, run
from tools.clients.runners import LANGUAGES, is_here, runner

RUST_CHECKS = ("clippy --quiet --all-targets -- -D warnings", "test --quiet --no-run", "doc --quiet --no-deps")
"""Cargo commands of tests/clients/test_rust.py, run once so that their dependencies are compiled."""


def main() -> None:
    """Runs the builds one after the other, and prints how long each took.

    Raises:
        BuildError: a build has failed.
    """
    for name, build in builds().items():
        began = time.monotonic()
        build()
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


def builds() -> dict[str, Callable[[], object]]:
    """The builds that this machine can do, by name."""
    found: dict[str, Callable[[], object]] = {
        f"runner of {language}": partial(runner, language) for language in LANGUAGES if is_here(language)
    }
    if is_here("cpp"):
        found |= {f"C client with {one}": partial(cpp.build, one) for one in cpp.SANITIZERS}
    if is_here("rust"):
        command = partial(run, rust.CARGO, cwd=rust.SOURCE, environment=rust.ENVIRONMENT)
        found |= {f"cargo {check.split()[0]}": partial(command, *check.split()) for check in RUST_CHECKS}
    if is_here("go"):
        found["go vet"] = partial(run, "go", "vet", "./...", cwd=CLIENTS / "go")
    return found


if __name__ == "__main__":
    main()
