"""The house rules that no linter knows: names, and which package may import which."""

from __future__ import annotations

import ast
import io
import os
import re
import tempfile
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent.parent / "server" / "safelight_server"
PARTICIPLES = {
    *("Adopted", "Asked", "Begun", "Billed", "Bound", "Chosen", "Closed", "Dropped", "Encoded", "Ended", "Expected"),
    *("Forgotten", "Found", "Given", "Gone", "Heard", "Held", "Kept", "Known", "Led", "Left", "Lost", "Made", "Moved"),
    *("Opened", "Owed", "Planned", "Prepared", "Purged", "Read", "Rendered", "Reported", "Saved", "Seen", "Sent"),
    *("Served", "Shown", "Started", "Stored", "Suspended", "Taken", "Told", "Waited", "Wanted", "Watched", "Written"),
}
"""Names that say what was done and not what a thing is. Those in domain/events.py, such as `Finished`, are the API's."""

DIALECT = re.compile(
    r"\b(?:none any more|(?:is|are|stands?) in line|is told of|what is told|goes on with it"
    r"|DESIGN|tells nothing of)\b"
)
"""Phrases of an earlier private dialect. Say who does what, in words of the field: queued, requested, reported."""

ELSEWHERE = re.compile(
    DIALECT.pattern + r"|\b(?:looks? away|asks? by TLS|at the pace of the|whoever asks|for want of room)\b"
)
"""The same outside of the server: also phrases that were repeated in proto comments, clients, tools and tests."""
COMMENTED = {
    "proto/safelight": {".proto"},
    "clients": {".c", ".cc", ".cs", ".go", ".h", ".java", ".lua", ".py", ".rs", ".ts"},
    "deploy": {".json", ".md", ".py", ".tf", ".tpl", ".yaml", ".yml"},
    "docs/operations/runbooks": {".md"},
    **{folder: {".py"} for folder in ("examples", "load_tests", "tests", "tools", "training")},
}
"""Folders and the files in them whose comments people read."""
NOT_OURS = {"node_modules", "stubs", "safelightv1", "target", "build", "bin", "obj", "dist", "__pycache__"}
"""Folders of generated files, builds and packages."""


def sources() -> dict[str, ast.Module]:
    """The server's modules by their names within it."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = ast.parse(path.read_text())
    return found


def classes() -> Iterator[tuple[str, str]]:
    """Every class with the module that defines it."""
    for module, tree in sources().items():
        yield from ((node.name, module) for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


def repeated(named: Iterator[tuple[str, str]]) -> dict[str, list[str]]:
    modules = defaultdict(list)
    for name, module in named:
        modules[name].append(module)
    return {name: where for name, where in modules.items() if len(where) > 1}


def imports(module: str, tree: ast.Module, modules: set[str]) -> Iterator[str]:
    """The server's modules that a module imports when it is loaded or called; imports for type checkers do not count."""
    typing_only = {
        node
        for guard in ast.walk(tree)
        if isinstance(guard, ast.If) and "TYPE_CHECKING" in ast.unparse(guard.test)
        for node in ast.walk(guard)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        named = []
        if isinstance(node, ast.ImportFrom) and node.module:
            named = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        for name in named:
            inside = name.removeprefix("safelight_server.")
            if inside != name and inside in modules and inside != module:
                yield inside


def cycle(arrows: dict[str, set[str]]) -> list[str]:
    """A cycle of the arrows; empty if there is none."""
    done: set[str] = set()

    def search(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in sorted(arrows.get(node, ())):
            if found := search(target, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(arrows) if (found := search(node, []))), [])


def package_arrows(depth: int) -> dict[str, set[str]]:
    """Which package imports which, `depth` levels below the server; a module beside packages counts as one."""
    trees = sources()
    arrows = defaultdict(set)
    for module, tree in trees.items():
        for target in imports(module, tree, set(trees)):
            here, there = (name.split(".")[:depth] for name in (module, target))
            if here != there and here[:-1] == there[:-1]:
                arrows[".".join(here)].add(".".join(there))
    return arrows


def test_no_class_name_is_defined_twice():
    assert repeated(classes()) == {}


def test_no_type_is_named_by_a_participle():
    assert [where for where in classes() if where[0].lstrip("_") in PARTICIPLES] == []


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_no_package_is_in_a_cycle(depth):
    assert cycle(package_arrows(depth)) == []


def prose(text: str) -> Iterator[str]:
    """The docstrings of a module, also those of its constants, and its comments, with one space between words."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield " ".join(node.value.value.split())
    yield from (
        token.string for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.COMMENT
    )


def test_prose_is_in_the_words_of_the_field():
    found = {
        f"{path.relative_to(PACKAGE)}: {match[0]}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for text in prose(path.read_text())
        if (match := DIALECT.search(text))
    }
    assert found == set()


def commented() -> Iterator[tuple[str, str]]:
    """Files outside of the server by their paths, with one space between words and without marks of comments."""
    root = PACKAGE.parent.parent
    for folder, suffixes in COMMENTED.items():
        for where, folders, names in os.walk(root / folder):
            folders[:] = [name for name in folders if name not in NOT_OURS]
            for file in (Path(where, name) for name in names if Path(name).suffix in suffixes):
                if file != Path(__file__):
                    yield str(file.relative_to(root)), re.sub(r"[\s/*#]+", " ", file.read_text())


def test_prose_outside_of_the_server_is_in_the_words_of_the_field():
    files = dict(commented())
    assert {name.split("/")[0] for name in files} == {folder.split("/")[0] for folder in COMMENTED}
    found = {f"{name}: {match[0]}" for name, text in files.items() if (match := ELSEWHERE.search(text))}
    assert found == set()


def wall_clocks(tree: ast.Module) -> list[str]:
    """The calls that read this machine's clock."""
    calls = (ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [call for call in calls if call in ("time.time", "datetime.now", "datetime.utcnow", "datetime.today")]


def test_what_replicas_write_is_in_the_time_of_their_redis():
    """Code that needs Unix time gets it from the shared clock (`Sealer.now`)."""
    assert {name: found for name, tree in sources().items() if (found := wall_clocks(tree))} == {}


def test_temporary_files_of_the_tests_go_with_them():
    assert Path(tempfile.gettempdir()).name.startswith("safelight-tests-")
    assert os.environ["TMPDIR"] == tempfile.gettempdir(), "processes that a test starts have the same"


def test_the_rules_can_be_broken():
    assert repeated(iter([("Kind", "a"), ("Kind", "b"), ("Row", "a")])) == {"Kind": ["a", "b"]}
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "a"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}}) == []
    said = prose('"""It is\nin line."""\nX = 1  # none any more\n"""Queued."""\n')
    assert [bool(DIALECT.search(text)) for text in said] == [True, False, True]
    assert [bool(ELSEWHERE.search(text)) for text in ("It looks away.", "is in line", "Queued")] == [True, True, False]
    tree = ast.parse(
        "from safelight_server.cache import cache\nimport grpc\n"
        "if TYPE_CHECKING:\n    from safelight_server.cli import main"
    )
    assert wall_clocks(ast.parse("now = time.time\nuntil = time.time() + 1")) == ["time.time"]
    assert set(imports("engine", tree, {"cache", "cache.cache", "cli", "cli.main"})) == {"cache", "cache.cache"}
