"""Writes the generated parts of the Helm chart; `make generate` runs it.

The names of the server's settings go into values.schema.json, so that helm refuses one that is misspelt. README.md is
made from the schema's descriptions and the defaults of values.yaml.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from safelight_server.settings import Settings

CHART = Path(__file__).parent.parent / "deploy" / "helm" / "safelight"
CHARTS_OWN = {
    *(
        "host",
        "port",
        "http_port",
        "probe_port",
        "metrics_port",
        "metrics_host",
        "insecure",
        "drain_grace_s",
        "runtime",
    ),
    *(
        "tls_cert_file",
        "tls_key_file",
        "tls_client_ca_file",
        "api_key_file",
        "quota_file",
        "models_dir",
        "redis_url",
        "num_instances",
    ),
    *("triton_url", "triton_shared_memory", "triton_instances", "otlp_endpoint", "otlp_headers"),
    *("cache_key_file", "cache_disk_dir", "cache_disk_bytes", "cache_s3_url"),
}
"""Settings that other values of the chart set, so that `settings` may not."""
HEAD = """# The chart safelight

How to get from nothing to a picture on a cluster: [deploy/README.md](../../README.md). Profiles are in `profiles/`.

This page is made by `make generate` from `values.schema.json`, which is strict: helm refuses a name or a type that is
not here. Names and defaults:

| value | default | meaning |
|---|---|---|
"""


def schema() -> str:
    """values.schema.json with the names of the server's present settings."""
    found = json.loads((CHART / "values.schema.json").read_text())
    found["properties"]["settings"]["propertyNames"]["enum"] = sorted(Settings.model_fields.keys() - CHARTS_OWN)
    return json.dumps(found, indent=2) + "\n"


def readme(found: str) -> str:
    """README.md of the chart, from its schema `found`."""
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    rows = [
        f"| `{name}` | {default} | {meaning} |"
        for name, default, meaning in _values("", json.loads(found)["properties"], defaults)
        if name != "global"
    ]
    return HEAD + "\n".join(rows) + "\n"


def _values(prefix: str, properties: Mapping[str, Any], defaults: Any) -> Iterator[tuple[str, str, str]]:
    for name, about in properties.items():
        default = defaults.get(name) if isinstance(defaults, Mapping) else None
        meaning = about.get("description", "")
        if choices := about.get("enum"):
            meaning += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
        described = any("description" in each for each in about.get("properties", {}).values())
        shown = "" if described or default in ("", None) else f"`{json.dumps(default).strip(chr(34))}`"
        yield prefix + name, shown, meaning
        if described:
            yield from _values(f"{prefix}{name}.", about["properties"], default)


def main() -> None:
    """Writes both files into the chart, or into the folder that the command line names."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else CHART
    found = schema()
    (folder / "values.schema.json").write_text(found)
    (folder / "README.md").write_text(readme(found))


if __name__ == "__main__":
    main()
