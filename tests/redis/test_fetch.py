"""`safelight fetch` from a real S3 server, with the AWS variables that a Secret gives the init container."""

from __future__ import annotations

import hashlib

import boto3
import pytest
from safelight_server.cli.fetch import FetchError, fetch

from tests.redis.conftest import BUCKET, CREDENTIALS


def test_models_come_from_a_bucket(s3_server, tmp_path, monkeypatch):
    weights = b"weights" * 3_000_000
    client = boto3.client(
        "s3", endpoint_url=s3_server, region_name="us-east-1", aws_access_key_id="id", aws_secret_access_key="secret"
    )
    client.put_object(Bucket=BUCKET, Key="icons-1.0/repository/model.onnx", Body=weights)
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(f"{hashlib.sha256(weights).hexdigest()}  ./repository/model.onnx\n")
    for name, value in (("AWS_ACCESS_KEY_ID", CREDENTIALS[0]), ("AWS_SECRET_ACCESS_KEY", CREDENTIALS[1])):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    fetch(f"s3://{BUCKET}/icons-1.0", sums, tmp_path / "models")
    assert (tmp_path / "models" / "repository" / "model.onnx").read_bytes() == weights
    with pytest.raises(FetchError, match=r"repository/model.onnx: "):
        fetch(f"s3://{BUCKET}/nowhere", sums, tmp_path / "other")
