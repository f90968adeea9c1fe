"""A fleet of deploy/terraform, applied to moto's server with the real Terraform and the real provider."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SOURCE = ROOT / "deploy" / "terraform"
PLUGINS = "SAFELIGHT_TERRAFORM_PLUGINS"
"""Environment variable that names a folder of providers, as `terraform providers mirror` writes it."""
NO_PROVIDER = ("could not connect to", "Failed to query available provider packages", "Failed to install provider")

# moto has one address for all services and no metadata service. The variables below leave out what it lacks.
OVERRIDE = """
terraform {
  backend "local" {}
}
provider "aws" {
  skip_credentials_validation = true
  skip_metadata_api_check     = true
  s3_use_path_style           = true
  max_retries                 = 1
}
"""
VARIABLES = """
region             = "us-east-1"
zones              = ["us-east-1a", "us-east-1b"]
gpu_zones          = ["us-east-1b"]
models_release     = "icons-1.0"
monthly_budget_usd = 0
addons             = []
collect_logs       = false
redis_node_type    = ""
ledger             = true
applications       = { studio = ["generate"], operators = ["generate", "admin"] }
"""


class NoProviderError(Exception):
    """Terraform cannot get its provider for AWS."""


class Fleet:
    """A copy of the root module in a folder of its own.

    Attributes:
        environment: environment variables with which terraform and boto3 use moto.
        folder: the root module.
    """

    def __init__(self, scratch: Path, endpoint: str) -> None:
        self.environment = moto_environment(endpoint)
        self.folder = scratch / "terraform" / "fleet"
        shutil.copytree(SOURCE, scratch / "terraform", ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*"))
        if endpoint:
            (self.folder / "moto_override.tf").write_text(OVERRIDE)
        self.variables = self.folder / "moto.tfvars"
        self.variables.write_text(VARIABLES)

    def terraform(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs terraform in the root module."""
        return subprocess.run(
            ["terraform", *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def succeed(self, *arguments: str) -> str:
        """Runs terraform, which must succeed, and returns its output."""
        ran = self.terraform(*arguments)
        assert ran.returncode == 0, f"terraform {' '.join(arguments)}\n{ran.stdout[-8000:]}\n{ran.stderr[-8000:]}"
        return ran.stdout

    def init(self, *arguments: str) -> None:
        """Initializes the module; raises NoProviderError if the provider for AWS is not available."""
        folder = os.environ.get(PLUGINS)
        ran = self.terraform(
            "init", "-input=false", "-no-color", *([f"-plugin-dir={folder}"] if folder else []), *arguments
        )
        said = (ran.stderr + ran.stdout).splitlines()
        if ran.returncode and (lines := [line for line in said if any(text in line for text in NO_PROVIDER)]):
            raise NoProviderError(lines[0].strip("│╷ "))
        assert ran.returncode == 0, ran.stdout + ran.stderr

    def apply(self) -> None:
        """Applies the configuration."""
        self.succeed(
            "apply", "-input=false", "-auto-approve", "-no-color", "-compact-warnings", f"-var-file={self.variables}"
        )


def moto_environment(endpoint: str) -> dict[str, str]:
    """This process's environment, for AWS at `endpoint` and nowhere else."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TF_"))}
    config = os.environ.get("TF_CLI_CONFIG_FILE")
    if config and Path(config).is_file():  # it may name a mirror of providers
        environment["TF_CLI_CONFIG_FILE"] = config
    return environment | {
        "AWS_ENDPOINT_URL": endpoint or "http://127.0.0.1:9",  # calls that would reach the real AWS fail
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "CHECKPOINT_DISABLE": "1",
        "TF_IN_AUTOMATION": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
