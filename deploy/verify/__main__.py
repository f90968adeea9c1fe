"""The command line. Prints a line for each difference. Exit status: 0 no differences, 1 some, 2 comparing failed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import boto3
import yaml
from botocore.exceptions import BotoCoreError, ClientError

from deploy.verify import agreement, chart, cloudformation, cluster, terraform
from deploy.verify.drift import Drift


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.verify",
        description="Compares what is declared with what is deployed, and declarations with each other. "
        "Changes nothing. Credentials, region and endpoint come from the environment, as for the AWS command line.",
    )
    parser.add_argument(
        "--terraform", type=Path, metavar="DIR", help="initialized root module, such as deploy/terraform/fleet"
    )
    parser.add_argument("--var-file", type=Path, action="append", default=[], help="variables for `terraform plan`")
    parser.add_argument("--stack", help="name of a CloudFormation stack; needs --template")
    parser.add_argument(
        "--template", type=Path, help="CloudFormation template, such as deploy/cloudformation/core.yaml"
    )
    parser.add_argument(
        "--parameter", action="append", default=[], metavar="NAME=VALUE", help="for --template without --stack"
    )
    parser.add_argument("--values", type=Path, action="append", default=[], help="values of the chart, in helm's order")
    parser.add_argument("--release", help="release of the chart in kubectl's current cluster; needs --values")
    parser.add_argument("--namespace", default="default", help="namespace of --release")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parsed = parser.parse_args(given)
    if parsed.stack and not parsed.template:
        parser.error("--stack needs --template")
    if parsed.release and not parsed.values:
        parser.error("--release needs --values")
    if not (parsed.terraform or parsed.stack or parsed.values):
        parser.error("nothing to compare: give --terraform, --stack or --values")
    if parsed.template and not parsed.stack and not parsed.terraform:
        parser.error("--template needs --stack or --terraform to be compared with")
    if wrong := [each for each in parsed.parameter if "=" not in each]:
        parser.error(f"--parameter {wrong[0]}: want NAME=VALUE")
    return parsed


def _drifts(arguments: argparse.Namespace) -> Iterator[Drift]:
    session = boto3.Session()
    shown = None
    if arguments.terraform:
        files = [f"-var-file={file.absolute()}" for file in arguments.var_file]
        shown = terraform.plan(arguments.terraform, files)
        yield from terraform.planned_drifts(shown)
        yield from terraform.undeclared_drifts(terraform.resources(shown), session)
    if arguments.stack:
        yield from cloudformation.stack_drifts(arguments.stack, arguments.template, session)
        if left := cloudformation.not_compared(arguments.template):
            print(f"only their declaration is compared: {', '.join(left)}", file=sys.stderr)
    if shown is not None and arguments.template:
        template = cloudformation.parsed(arguments.template.read_text())
        given = dict(each.split("=", 1) for each in arguments.parameter)
        yield from agreement.disagreements(terraform.resources(shown, "planned_values"), template, given)
    if arguments.values:
        values = chart.merged(arguments.values)
        if shown is not None:
            declared = shown["planned_values"]["outputs"].get("helm_values", {}).get("value")
            if declared is None:
                print("helm_values is not known before the fleet is applied", file=sys.stderr)
            else:
                yield from chart.value_drifts(yaml.safe_load(declared), values)
        yield from chart.image_drifts(values, session)
    if arguments.release:
        objects = cluster.rendered(arguments.release, arguments.namespace, arguments.values)
        yield from cluster.object_drifts(objects, cluster.kubectl(arguments.namespace))


def main(given: Sequence[str] | None = None) -> int:
    """Runs the command."""
    arguments = _arguments(given)
    found = 0
    try:
        for drift in _drifts(arguments):
            found += 1
            print(json.dumps(drift.as_map(), default=str) if arguments.json else drift)
    except (terraform.PlanError, cluster.ClusterError, BotoCoreError, ClientError, OSError, yaml.YAMLError) as error:
        print(f"cannot compare: {error}", file=sys.stderr)
        return 2
    print(f"{found} differences" if found != 1 else "1 difference", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
