"""Hooks of `mkdocs build`: add pages from the repository's root, the API reference, Mermaid, and links to files.

Links in the Markdown files are relative to the repository, so that they work in a checkout. Here they become links of
the site: to a page from the root under its own name, from a proto file to its page of the reference; any other file is
named without a link. Neighbours: `mkdocs.yml`, `tools/api_reference.py`.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from tools import api_reference  # noqa: E402  # after sys.path is set

FROM_ROOT = {
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "deploy/README.md": "deploy.md",
    "deploy/helm/safelight/README.md": "chart.md",
}
MERMAID = ROOT / "tools/site/node_modules/@mermaid-js/tiny/dist/mermaid.tiny.js"
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")


def on_config(config: Any) -> None:
    """Lists all decision records and runbooks in the navigation."""
    for section in config.nav:
        if "Decisions" in section:
            section["Decisions"] = _pages("decisions")
        for entry in section.get("Operate", ()) if isinstance(section, dict) else ():
            if isinstance(entry, dict) and "Runbooks" in entry:
                entry["Runbooks"] = _pages("operations/runbooks")


def _pages(folder: str) -> list[str]:
    return [f"{folder}/{path.name}" for path in sorted((ROOT / "docs" / folder).glob("*.md"))]


def on_files(files: Files, *, config: Any) -> None:
    """Adds pages that are not in docs/."""
    for source, page in FROM_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for stem, text in api_reference.pages(api_reference.load()).items():
        files.append(File.generated(config, f"api/{stem}.md", content=text))
    files.append(File.generated(config, "assets/mermaid.js", abs_src_path=str(MERMAID)))


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Converts the repository's links to links of the site."""
    here = page.file.src_uri
    if here.startswith("api/"):
        return markdown
    of_root = {site: source for source, site in FROM_ROOT.items()}
    folder = posixpath.dirname(of_root.get(here, f"docs/{here}"))

    def site_link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], posixpath.normpath(posixpath.join(folder, match[2])), match[3] or ""
        if target in FROM_ROOT:
            to = FROM_ROOT[target]
        elif target.startswith("proto/safelight/"):
            to = f"api/{Path(target).stem}.md"
        elif target.startswith("docs/") and (ROOT / target).is_file():
            to = target.removeprefix("docs/")
        elif (ROOT / target).exists():
            return text
        else:
            to = target  # a dead link: mkdocs reports it and fails
        return f"[{text}]({posixpath.relpath(to, posixpath.dirname(here))}{anchor})"

    return LINK.sub(site_link, markdown)
