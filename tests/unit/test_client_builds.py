"""The common part of the clients' builds: a build runs again only if something has changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.clients import commands
from tools.clients.runners import LANGUAGES, told


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one source."""
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    monkeypatch.setattr(commands, "OUT", tmp_path / "out")
    (tmp_path / "src").mkdir()
    (tmp_path / "src/main.c").write_text("int main;")
    return tmp_path


def test_it_builds_again_what_has_changed_or_is_missing(folder: Path) -> None:
    product, said = folder / "program", iter(["first", "second", "third"])

    def build() -> str:
        product.touch()
        return next(said)

    def once() -> str:
        return commands.once("program", product, [folder / "src"], build)

    assert [once(), once()] == ["first", "first"]
    (folder / "src/target").mkdir()
    (folder / "src/target/built.o").touch()
    assert once() == "first", "what was built is no source"
    (folder / "src/main.c").write_text("int main();")
    assert [once(), once()] == ["second", "second"]
    product.unlink()
    assert [once(), once()] == ["third", "third"]


def test_a_build_that_failed_is_made_again(folder: Path) -> None:
    product = folder / "program"
    product.touch()
    with pytest.raises(commands.BuildError, match=r"exit status 3\nno such header"):
        commands.once(
            "program", product, [folder / "src"], lambda: commands.run("sh", "-c", "echo no such header; exit 3")
        )
    assert commands.once("program", product, [folder / "src"], lambda: "built") == "built"


def test_a_runner_is_told_the_defaults() -> None:
    line = told("a case", ["127.0.0.1:1"], [], retries=7)
    assert (line["name"], line["retries"], line["patience_s"], line["measure"]) == ("a case", 7, 60, False)
    assert len(LANGUAGES) == len(set(LANGUAGES))
