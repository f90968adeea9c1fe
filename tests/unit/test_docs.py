"""The documentation agrees with the code: links work, named files exist, the API reference is complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor
from safelight.v1 import cache_pb2, generation_pb2, models_pb2
from safelight_server.domain.events import GenerationState
from safelight_server.scheduler.types import TRANSITIONS
from safelight_server.settings import Settings

from tools import api_reference

ROOT = Path(__file__).parent.parent.parent
PAGES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("examples/*.md"),
    *ROOT.glob("clients/**/*.md"),
    *ROOT.glob("deploy/**/*.md"),
]
FILE = re.compile(r"`((?:server|clients|tests|tools|proto|training|models|load_tests|deploy|examples|docs)/[\w./-]+)`")
"""Paths in backticks, from the root."""
PLACEHOLDER = re.compile(r"NAME|PART|REVISION")
"""Paths with one of these are patterns, not files."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for path in FILE.findall(text):
        if not PLACEHOLDER.search(path):
            assert (ROOT / path.rstrip("/")).exists(), f"{page.name} names {path}"


def test_the_glossary_says_each_word_once():
    [glossary] = re.findall(r"\[start:glossary\] -->(.*?)<!--", (ROOT / "ARCHITECTURE.md").read_text(), re.DOTALL)
    words = re.findall(r"^\| \*\*(.+?)\*\* \|", glossary, re.MULTILINE)
    assert len(words) > 20
    assert words == sorted(set(words), key=str.lower)


def test_the_diagrams_of_states_are_those_of_the_code():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    generation, output = re.findall(r"```mermaid\nstateDiagram-v2\n(.*?)```", text, re.DOTALL)
    arrows = re.findall(r"^    (\S+) --> (\S+?):?(?: .*)?$", generation, re.MULTILINE)
    ended = {GenerationState.SUCCEEDED, GenerationState.CANCELLED, GenerationState.FAILED}
    assert {name for arrow in arrows for name in arrow} == {"[*]", *(state.name for state in GenerationState)}
    assert {first for first, then in arrows if then == "[*]"} == {state.name for state in ended}
    drawn = set(re.findall(r"^    (\w+) --> (\w+)$", output, re.MULTILINE))
    assert drawn == {(state.name, then.name) for state, following in TRANSITIONS.items() for then in following}


def test_each_package_is_in_the_table_and_no_other():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)/` \|", text.split("## The states")[0], re.MULTILINE))
    server = ROOT / "server/safelight_server"
    assert listed == {path.parent.name for path in server.glob("*/__init__.py")}


def test_the_api_reference_has_every_call_message_field_and_value_with_its_meaning():
    pages = api_reference.pages(api_reference.load())
    for module in (generation_pb2, models_pb2, cache_pb2):
        page = pages[Path(module.DESCRIPTOR.name).stem]
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                assert f"### {service.name}.{method.name} " in page
        for kind in [*module.DESCRIPTOR.message_types_by_name.values(), *module.DESCRIPTOR.enum_types_by_name.values()]:
            check(kind, page)


def check(kind: Descriptor | EnumDescriptor, page: str) -> None:
    """Checks the section of a message or an enum, and of those nested in it."""
    name = kind.full_name.removeprefix("safelight.v1.")
    section = page.split(f"\n## {name} ", 1)[1].split("\n## ", 1)[0]
    if isinstance(kind, EnumDescriptor):
        for value in kind.values:
            assert re.search(rf"^\| {value.number} \| `{value.name}` \| .+ \|$", section, re.MULTILINE)
        return
    for field in kind.fields:
        assert re.search(rf"^\| {field.number} \| `{field.name}` \| .+ \| .+ \|$", section, re.MULTILINE)
    for nested in [*kind.nested_types, *kind.enum_types]:
        if not nested.name.endswith("Entry"):
            check(nested, page)


def test_the_api_reference_links_to_sections_that_exist():
    pages = api_reference.pages(api_reference.load())
    anchors = {stem: set(re.findall(r"\{#([\w-]+)\}", text)) for stem, text in pages.items()}
    for stem, text in pages.items():
        for page, anchor in re.findall(r"\]\((?:(\w+)\.md)?#([\w-]+)\)", text):
            assert anchor in anchors[page or stem], f"{stem} links to {page}#{anchor}"


def test_every_bound_is_on_the_page_of_limits() -> None:
    page = (ROOT / "docs" / "operations" / "limits.md").read_text()
    named = set(re.findall(r"`(\w+)`", page))
    bounds = {name for name in Settings.model_fields if name.startswith("max_")}
    assert not bounds - named, "a row for each"
