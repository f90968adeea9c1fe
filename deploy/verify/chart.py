"""Compares the values for the chart with Terraform's output `helm_values`, and their images with the registry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from botocore.exceptions import ClientError

from deploy.verify.drift import ABSENT, Drift, differences

BETWEEN = "terraform and chart"


def merged(files: Sequence[Path]) -> dict[str, Any]:
    """Merges values files as helm does: maps are merged, any other value is replaced by that of the later file."""
    values: dict[str, Any] = {}
    for file in files:
        values = _over(values, yaml.safe_load(file.read_text()) or {})
    return values


def _over(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {name: _over(below.get(name), value) for name, value in above.items()}


def value_drifts(declared: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[Drift]:
    """Yields where the values differ from Terraform's output `helm_values`. The operator decides all other values."""
    for path, should, is_ in differences(declared, values, whole=False):
        yield Drift(BETWEEN, "values", path, should, is_)


def image_drifts(values: Mapping[str, Any], session: Any) -> Iterator[Drift]:
    """Yields the images that the values name but that ECR does not have."""
    named = {
        "image": values.get("image", {}),
        "triton.image": values.get("triton", {}).get("image", {}),
        "scaling.scaler.image": values.get("scaling", {}).get("scaler", {}).get("image", {}),
        "bills.archive.image": values.get("bills", {}).get("archive", {}).get("image", {}),
    }
    parts = {path: image.get("repository", "").partition("/") for path, image in named.items()}
    in_ecr = {path: repository for path, (registry, _, repository) in parts.items() if ".dkr.ecr." in registry}
    if not in_ecr:
        return  # other registries are not asked, nor is a region of AWS needed
    client = session.client("ecr")
    try:
        for path, repository in in_ecr.items():
            image = named[path]
            try:
                client.describe_images(repositoryName=repository, imageIds=[{"imageDigest": image.get("digest", "")}])
            except ClientError as error:
                if error.response["Error"]["Code"] not in ("ImageNotFoundException", "RepositoryNotFoundException"):
                    raise
                yield Drift(
                    "chart and registry", "values", path, f"{image['repository']}@{image.get('digest', '')}", ABSENT
                )
    finally:
        client.close()
