"""Compares Terraform's configuration and state with what is deployed.

Terraform itself reads what is deployed: whatever a plan would change is a difference. A plan does not see resources
that nothing declares, so this module also looks for rules, policies, routes and nodes that were added by hand.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.verify.drift import ABSENT, PRESENT, UNRESOLVED, Drift, differences

BETWEEN = "terraform"
COPIES = {"tags_all"}
"""Attributes that repeat others."""
NOTHING: tuple[Any, ...] = (None, "", [], {})


class PlanError(Exception):
    """Terraform made no plan; the message has what it printed."""


@dataclass(frozen=True, slots=True)
class Resource:
    """A resource of the state: its address, its type, and what the provider read."""

    address: str
    type: str
    values: Mapping[str, Any]


def plan(folder: Path, arguments: Sequence[str] = (), program: str = "terraform") -> dict[str, Any]:
    """Makes a new plan and returns it as `terraform show -json` prints it.

    Args:
        folder: an initialized root module.
        arguments: further arguments of `terraform plan`, such as -var-file.

    Raises:
        PlanError: Terraform failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file = str(Path(scratch) / "plan")
        _run(program, folder, "plan", "-input=false", "-lock=false", "-no-color", f"-out={file}", *arguments)
        shown: dict[str, Any] = json.loads(_run(program, folder, "show", "-json", file))
        return shown


def _run(program: str, folder: Path, *arguments: str) -> str:
    ran = subprocess.run([program, f"-chdir={folder}", *arguments], capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise PlanError(f"terraform {arguments[0]}: {ran.stderr.strip() or ran.stdout.strip()}")
    return ran.stdout


def resources(shown: Mapping[str, Any], part: str = "prior_state") -> list[Resource]:
    """The resources in a plan's state (part `prior_state`), or those that it would make (`planned_values`)."""

    def walk(module: Mapping[str, Any]) -> Iterator[Resource]:
        for each in module.get("resources", ()):
            if each["mode"] == "managed":
                yield Resource(each["address"], each["type"], each["values"])
        for child in module.get("child_modules", ()):
            yield from walk(child)

    values = shown.get(part, {})
    values = values.get("values", values)
    return list(walk(values.get("root_module", {})))


def planned_drifts(shown: Mapping[str, Any]) -> Iterator[Drift]:
    """Yields what a plan would change."""
    for each in shown.get("resource_changes", ()):
        change = each["change"]
        actions = change["actions"]
        if each["mode"] != "managed" or actions in (["no-op"], ["read"]):
            continue
        if actions == ["create"]:
            yield Drift(BETWEEN, each["address"], "", PRESENT, ABSENT)
        elif actions == ["delete"]:
            yield Drift(BETWEEN, each["address"], "", ABSENT, PRESENT)
        else:
            yield from _changed(each["address"], change)


def _changed(address: str, change: Mapping[str, Any]) -> Iterator[Drift]:
    declared, deployed, unknown = change["after"], change["before"], change.get("after_unknown") or {}
    marks = [change.get("before_sensitive") or {}, change.get("after_sensitive") or {}]
    for name in sorted(declared.keys() | deployed.keys()):
        if name in COPIES or unknown.get(name) is True:
            continue
        should, is_ = _plain(_known(declared.get(name), unknown.get(name))), _plain(deployed.get(name))
        if should in NOTHING and is_ in NOTHING:
            continue
        secret = any(_marked(side.get(name)) for side in marks if isinstance(side, dict))
        for path, ours, theirs in differences(should, is_, name):
            if secret:
                ours, theirs = "(secret)", "(another secret)"
            yield Drift(BETWEEN, address, path, ours, theirs)


def _known(value: Any, unknown: Any) -> Any:
    """A planned value, with `UNRESOLVED` for parts that are known only after the plan is applied."""
    if unknown is True:
        return UNRESOLVED
    if isinstance(unknown, dict):
        value = value or {}
        return {name: _known(value.get(name), unknown.get(name)) for name in value.keys() | unknown.keys()}
    if isinstance(unknown, list) and unknown:
        value = value or []
        return [_known(each, mark) for each, mark in itertools.zip_longest(value, unknown)]
    return value


def _marked(mark: Any) -> bool:
    """Whether a value, or any part of it, is marked as secret."""
    if isinstance(mark, dict):
        return any(map(_marked, mark.values()))
    return any(map(_marked, mark)) if isinstance(mark, list) else mark is True


def _plain(value: Any) -> Any:
    """Normalizes a value: a block is written as a list of one entry, and an absent one as null or an empty list."""
    if isinstance(value, dict):
        return {name: plain for name, each in value.items() if (plain := _plain(each)) not in NOTHING}
    if isinstance(value, list):
        if len(value) == 1 and isinstance(value[0], dict):
            return _plain(value[0])
        return [_plain(each) for each in value]
    return value


def undeclared_drifts(state: Sequence[Resource], session: Any) -> Iterator[Drift]:
    """Yields deployed resources that are not in the state but are attached to one that is.

    Args:
        session: a boto3 session.
    """
    by_type: dict[str, list[Resource]] = {}
    for each in state:
        by_type.setdefault(each.type, []).append(each)

    def of(*types: str) -> list[Resource]:
        return [each for kind in types for each in by_type.get(kind, ())]

    services = ("ec2", "iam", "eks", "cognito-idp", "dynamodb")
    ec2, iam, eks, cognito, dynamodb = called = [session.client(name) for name in services]
    try:
        rules = {
            each.values["id"]
            for each in of("aws_vpc_security_group_ingress_rule", "aws_vpc_security_group_egress_rule")
        }
        for group in of("aws_security_group", "aws_default_security_group"):
            named = [{"Name": "group-id", "Values": [group.values["id"]]}]
            for rule in ec2.describe_security_group_rules(Filters=named)["SecurityGroupRules"]:
                if rule["SecurityGroupRuleId"] not in rules:
                    yield Drift(BETWEEN, group.address, f"rule {rule['SecurityGroupRuleId']}", ABSENT, _rule(rule))
        for role in of("aws_iam_role"):
            name = role.values["name"]
            inline = {each.values["name"] for each in of("aws_iam_role_policy") if each.values["role"] == name}
            for policy in iam.list_role_policies(RoleName=name)["PolicyNames"]:
                if policy not in inline:
                    yield Drift(BETWEEN, role.address, f"policy {policy}", ABSENT, PRESENT)
            attached = {
                each.values["policy_arn"]
                for each in of("aws_iam_role_policy_attachment")
                if each.values["role"] == name
            }
            for policy in iam.list_attached_role_policies(RoleName=name)["AttachedPolicies"]:
                if policy["PolicyArn"] not in attached:
                    yield Drift(BETWEEN, role.address, f"policy {policy['PolicyArn']}", ABSENT, PRESENT)
        clients = {each.values["id"] for each in of("aws_cognito_user_pool_client")}
        for users in of("aws_cognito_user_pool"):
            for page in cognito.get_paginator("list_user_pool_clients").paginate(UserPoolId=users.values["id"]):
                for found in page["UserPoolClients"]:
                    if found["ClientId"] not in clients:
                        yield Drift(BETWEEN, users.address, f"client {found['ClientName']}", ABSENT, PRESENT)
        for table in of("aws_dynamodb_table"):
            with contextlib.suppress(dynamodb.exceptions.PolicyNotFoundException):
                dynamodb.get_resource_policy(ResourceArn=table.values["arn"])
                yield Drift(BETWEEN, table.address, "policy", ABSENT, PRESENT)
        for cluster in of("aws_eks_cluster"):
            name = cluster.values["name"]
            pools = {
                each.values["node_group_name"]
                for each in of("aws_eks_node_group")
                if each.values["cluster_name"] == name
            }
            for pool in eks.list_nodegroups(clusterName=name)["nodegroups"]:
                if pool not in pools:
                    yield Drift(BETWEEN, cluster.address, f"node group {pool}", ABSENT, PRESENT)
        for vpc in of("aws_vpc"):
            here = [{"Name": "attachment.vpc-id", "Values": [vpc.values["id"]]}]
            for gateway in ec2.describe_internet_gateways(Filters=here)["InternetGateways"]:
                yield Drift(BETWEEN, vpc.address, f"internet gateway {gateway['InternetGatewayId']}", ABSENT, PRESENT)
            subnets = {each.values["id"] for each in of("aws_subnet")}
            here = [{"Name": "vpc-id", "Values": [vpc.values["id"]]}]
            for subnet in ec2.describe_subnets(Filters=here)["Subnets"]:
                if subnet["SubnetId"] not in subnets:
                    yield Drift(BETWEEN, vpc.address, f"subnet {subnet['SubnetId']}", ABSENT, subnet["CidrBlock"])
        for routes in of("aws_route_table"):
            [described] = ec2.describe_route_tables(RouteTableIds=[routes.values["id"]])["RouteTables"]
            for route in described["Routes"]:
                gateway = route.get("GatewayId", "")
                if gateway != "local" and not gateway.startswith("vpce-"):  # not those of the VPC and its endpoints
                    to = route.get("DestinationCidrBlock") or route.get("DestinationIpv6CidrBlock") or "?"
                    yield Drift(
                        BETWEEN, routes.address, f"route {to}", ABSENT, gateway or route.get("NatGatewayId") or PRESENT
                    )
    finally:
        for client in called:
            client.close()


def _rule(rule: Mapping[str, Any]) -> str:
    source = rule.get("CidrIpv4") or rule.get("CidrIpv6") or rule.get("PrefixListId") or "a security group"
    ports = f"{rule.get('FromPort', 'all')}-{rule.get('ToPort', 'all')}"
    return f"{'egress to' if rule['IsEgress'] else 'ingress from'} {source}, {rule['IpProtocol']} {ports}"
