"""deploy/verify finds no difference in a new fleet, and finds each manual change.

These tests change the fleet that the other modules use; pytest runs them after those.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.verify import __main__ as verify
from deploy.verify import agreement, chart, cloudformation, cluster, terraform
from deploy.verify.drift import ABSENT, PRESENT, UNRESOLVED, differences

ROOT = Path(__file__).parent.parent.parent
TEMPLATE = ROOT / "deploy" / "cloudformation" / "core.yaml"
MODELS, ARTIFACTS = "safelight-models-123456789012", "safelight-artifacts-123456789012"
MOTO = {
    ("aws_eks_cluster", "access_config"),
    ("aws_eks_node_group", "remote_access"),
    ("aws_eks_node_group", "update_config"),
    ("aws_launch_template", "tag_specifications"),
}
"""Differences that exist before any change, since moto drops or invents these values."""


def found(capsys, *arguments: object) -> tuple[int, list[dict[str, Any]]]:
    """Runs the command; returns its exit status and the differences."""
    status = verify.main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert status != 2, err
    return status, [json.loads(line) for line in out.splitlines()]


def kind(drift: dict[str, Any]) -> tuple[str, str]:
    """The type of the resource, and the attribute."""
    return drift["resource"].partition("[")[0].split(".")[-2], drift["attribute"]


def test_changes_by_hand_are_each_named(fleet, cloud, client, capsys, tmp_path):
    whole = ["--terraform", fleet.folder, "--var-file", fleet.variables, "--template", TEMPLATE]
    _, before = found(capsys, *whole)
    assert {kind(each) for each in before} == MOTO

    s3, iam, ec2, kms, ecr, eks, logs = map(client, ("s3", "iam", "ec2", "kms", "ecr", "eks", "logs"))
    s3.put_public_access_block(
        Bucket=MODELS,
        PublicAccessBlockConfiguration={
            "BlockPublicAcls": True, "IgnorePublicAcls": True, "BlockPublicPolicy": False, "RestrictPublicBuckets": True,
        },
    )  # fmt: skip
    s3.put_bucket_versioning(Bucket=MODELS, VersioningConfiguration={"Status": "Suspended"})
    s3.delete_bucket_policy(Bucket=ARTIFACTS)
    [alias] = [each for each in kms.list_aliases()["Aliases"] if each["AliasName"] == "alias/safelight"]
    kms.disable_key_rotation(KeyId=alias["TargetKeyId"])
    [group] = ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["safelight-endpoints"]}])[
        "SecurityGroups"
    ]
    ec2.authorize_security_group_ingress(
        GroupId=group["GroupId"], IpProtocol="tcp", FromPort=22, ToPort=22, CidrIp="0.0.0.0/0"
    )
    [subnet] = ec2.describe_subnets(Filters=[{"Name": "tag:Name", "Values": ["safelight-us-east-1a"]}])["Subnets"]
    ec2.modify_subnet_attribute(SubnetId=subnet["SubnetId"], MapPublicIpOnLaunch={"Value": True})
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
    iam.put_role_policy(RoleName="safelight-server", PolicyName="just-for-now", PolicyDocument=json.dumps(policy))
    iam.attach_role_policy(RoleName="safelight-node", PolicyArn="arn:aws:iam::aws:policy/AdministratorAccess")
    ecr.put_image_tag_mutability(repositoryName="safelight/gateway", imageTagMutability="MUTABLE")
    eks.delete_nodegroup(clusterName="safelight", nodegroupName="gpu-spot")
    logs.put_retention_policy(logGroupName="/safelight/safelight/flow", retentionInDays=1)
    users = fleet.succeed("output", "-raw", "user_pool_id").strip()
    cognito, applications = client("cognito-idp"), json.loads(fleet.succeed("output", "-json", "applications"))
    scopes = ["safelight/admin", "safelight/generate"]
    cognito.update_user_pool_client(
        UserPoolId=users,
        ClientId=applications["studio"],
        AllowedOAuthScopes=scopes,
        AllowedOAuthFlows=["client_credentials"],
        AllowedOAuthFlowsUserPoolClient=True,
    )
    cognito.create_user_pool_client(UserPoolId=users, ClientName="just-for-now")

    dynamodb = client("dynamodb")
    table = dynamodb.update_table(TableName="safelight-bills", DeletionProtectionEnabled=False)["TableDescription"]
    dynamodb.update_continuous_backups(
        TableName="safelight-bills", PointInTimeRecoverySpecification={"PointInTimeRecoveryEnabled": False}
    )
    statement = {"Effect": "Allow", "Principal": "*", "Action": "dynamodb:Scan", "Resource": table["TableArn"]}
    anybody = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    dynamodb.put_resource_policy(ResourceArn=table["TableArn"], Policy=anybody)
    delete = {"Effect": "Allow", "Action": "dynamodb:DeleteItem", "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [delete]})
    iam.put_role_policy(RoleName="safelight-archiver", PolicyName="tidy", PolicyDocument=policy)

    status, after = found(capsys, *whole)
    named = {
        (each["resource"], each["attribute"]): (each["declared"], each["deployed"])
        for each in after
        if kind(each) not in MOTO
    }
    assert status == 1
    rule = [attribute for resource, attribute in named if attribute.startswith("rule ")]
    assert len(rule) == 1 and named["module.network.aws_security_group.endpoints", rule[0]] == (
        ABSENT,
        "ingress from 0.0.0.0/0, tcp 22-22",
    )
    del named["module.network.aws_security_group.endpoints", rule[0]]
    storage = "module.storage.aws_"
    assert named.pop((f'{storage}s3_bucket_policy.this["artifacts"]', "policy"), None) or named.pop(
        (f'{storage}s3_bucket_policy.this["artifacts"]', "")
    )
    assert named == {
        (f'{storage}s3_bucket_public_access_block.this["models"]', "block_public_policy"): (True, False),
        (f"{storage}s3_bucket_versioning.models", "versioning_configuration.status"): ("Enabled", "Suspended"),
        ("module.key.aws_kms_key.this", "enable_key_rotation"): (True, False),
        ('module.network.aws_subnet.private["us-east-1a"]', "map_public_ip_on_launch"): (False, True),
        ("module.identity.module.server.aws_iam_role.this", "policy just-for-now"): (ABSENT, PRESENT),
        ("module.cluster.aws_iam_role.node", "policy arn:aws:iam::aws:policy/AdministratorAccess"): (ABSENT, PRESENT),
        (f'{storage}ecr_repository.this["gateway"]', "image_tag_mutability"): ("IMMUTABLE", "MUTABLE"),
        ('module.cluster.aws_eks_node_group.this["gpu-spot"]', ""): (PRESENT, ABSENT),
        ("module.network.aws_cloudwatch_log_group.flow", "retention_in_days"): (90, 1),
        ('module.users[0].aws_cognito_user_pool_client.application["studio"]', "allowed_oauth_scopes"): (
            ["safelight/generate"],
            scopes,
        ),
        ("module.users[0].aws_cognito_user_pool.this", "client just-for-now"): (ABSENT, PRESENT),
        ("module.ledger[0].aws_dynamodb_table.bills", "deletion_protection_enabled"): (True, False),
        ("module.ledger[0].aws_dynamodb_table.bills", "point_in_time_recovery.enabled"): (True, False),
        ("module.ledger[0].aws_dynamodb_table.bills", "policy"): (ABSENT, PRESENT),
        ("module.ledger[0].module.archiver.aws_iam_role.this", "policy tidy"): (ABSENT, PRESENT),
    }


def test_values_that_are_not_terraforms_are_named(fleet, cloud, capsys, tmp_path):
    values = yaml.safe_load(fleet.succeed("output", "-raw", "helm_values"))
    declared = dict(values)
    values["image"]["digest"] = "sha256:" + "3" * 64
    values["cache"]["s3"]["url"] = "s3://somewhere-else/entries"
    del values["serviceAccount"]
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    differing = {
        drift.attribute for drift in chart.value_drifts(declared, chart.merged([file])) if drift.declared != declared
    }
    status, after = found(capsys, "--values", file)
    assert status == 1
    assert {(each["attribute"], each["deployed"]) for each in after} == {
        (image, ABSENT) for image in ("image", "triton.image", "bills.archive.image")
    }
    assert "serviceAccount" in differing


def test_what_terraform_and_cloudformation_say_differently_is_named(fleet, cloud):
    shown = terraform.plan(fleet.folder, [f"-var-file={fleet.variables}"])
    planned = terraform.resources(shown, "planned_values")
    template = cloudformation.parsed(TEMPLATE.read_text())
    assert list(agreement.disagreements(planned, template, {})) == []
    template["Resources"]["Artifacts"]["Properties"]["LifecycleConfiguration"]["Rules"][0]["Transitions"][0][
        "StorageClass"
    ] = "GLACIER"
    template["Resources"]["ServerRole"]["Properties"]["Policies"][0]["PolicyDocument"]["Statement"][0]["Action"] = (
        "s3:*"
    )
    del template["Resources"]["TritonRepository"]
    template["Resources"]["Bills"]["Properties"]["PointInTimeRecoverySpecification"]["PointInTimeRecoveryEnabled"] = (
        False
    )
    template["Resources"]["ArchiverRole"]["Properties"]["Policies"][0]["PolicyDocument"]["Statement"][0]["Action"] = (
        "dynamodb:*"
    )
    said = {
        (each.resource.rpartition(" ")[2], each.attribute.rpartition(" ")[2], each.deployed)
        for each in agreement.disagreements(planned, template, {})
    }
    assert ("Artifacts", "LifecycleConfiguration.Rules.0.Transitions.0.StorageClass", "GLACIER") in said
    assert ("ServerRole", "ReadModels.Action", "s3:*") in said
    assert {each[2] for each in said if each[0] == "TritonRepository"} == {ABSENT}
    assert ("Bills", "PointInTimeRecoverySpecification.PointInTimeRecoveryEnabled", False) in said
    assert ("ArchiverRole", "CopyBills.Action", "dynamodb:*") in said
    less = [each for each in planned if not each.address.startswith("module.ledger")]
    found_now = {each.resource.rpartition(" ")[2] for each in agreement.disagreements(less, template, {})}
    assert found_now == {"Artifacts", "ServerRole", "TritonRepository"}, (
        "a fleet without a ledger needs none in the template"
    )


def test_without_a_plan_it_says_why(cloud, tmp_path, capsys):
    assert verify.main(["--terraform", str(tmp_path / "nowhere")]) == 2
    assert "cannot compare" in capsys.readouterr().err


@pytest.mark.parametrize("given", [[], ["--stack", "x"], ["--template", "x"], ["--values", "x", "--parameter", "y"]])
def test_a_command_that_compares_nothing_is_refused(given):
    with pytest.raises(SystemExit) as ended:
        verify.main(given)
    assert ended.value.code == 2


def test_how_values_are_compared():
    assert list(differences({"a": [1, 2]}, {"a": [2, 1]})) == []
    assert list(differences({"a": "x"}, {"a": ["x"]})) == []
    assert list(differences('{"a": 1}', '{ "a":1 }')) == []
    assert list(differences({"a": UNRESOLVED}, {"a": "id-1"})) == []
    assert list(differences(90, "90")) == []
    assert list(differences(True, "true")) == []
    assert list(differences(False, "true")) == [("", False, "true")]
    assert list(differences(True, 1.0)) == []  # equal in Python
    assert list(differences({"a": 1}, {"a": 1, "b": 2}, whole=False)) == []
    assert list(differences({"a": 1}, {"a": 1, "b": 2})) == [("b", ABSENT, 2)]
    rules = [{"Id": "tiers", "Days": 1}, {"Id": "other", "Days": 2}]
    assert list(differences(rules, [rules[1], {"Id": "tiers", "Days": 3}])) == [("[tiers].Days", 1, 3)]
    assert list(differences([{"Id": "x"}], [])) == [("[x]", {"Id": "x"}, ABSENT)]


def as_kept(made: dict[str, Any]) -> dict[str, Any]:
    """An object as an API server returns it: with a status and defaults, and without empty values."""
    kept = json.loads(json.dumps(made))
    kept["metadata"] |= {"uid": "1", "resourceVersion": "1"}
    kept["status"] = {}
    if kept["kind"] == "Deployment":
        kept["spec"]["replicas"] = 7
        pod = kept["spec"]["template"]["spec"]
        pod |= {"dnsPolicy": "ClusterFirst", "schedulerName": "default-scheduler"}
        for container in pod["containers"]:
            container["terminationMessagePath"] = "/dev/termination-log"
            for variable in container["env"]:
                if variable.get("value") == "":
                    del variable["value"]
    return kept


def test_objects_of_a_cluster_that_are_not_the_charts_are_named(tmp_path):
    """Uses objects in the form in which an API server returns them; it has not been run on a cluster."""
    images = tmp_path / "images.yaml"
    images.write_text(
        yaml.safe_dump({"image": {"repository": "registry.example/gateway", "digest": "sha256:" + "1" * 64}})
    )
    profile = ROOT / "deploy" / "helm" / "safelight" / "profiles" / "cpu.yaml"
    made = cluster.rendered("safelight", "pictures", [profile, images])
    kept = {(each["kind"], each["metadata"]["name"]): as_kept(each) for each in made}

    def get(kind: str, name: str) -> dict[str, Any] | None:
        return kept.get((kind, name))

    assert list(cluster.object_drifts(made, get)) == []
    kept["ServiceAccount", "safelight"]["automountServiceAccountToken"] = True
    pod = kept["Deployment", "safelight"]["spec"]["template"]["spec"]
    pod["containers"][0]["image"] = "registry.example/gateway:latest"
    pod["securityContext"]["runAsNonRoot"] = False
    del kept["NetworkPolicy", "safelight"]
    named = {(each.resource, each.attribute): each.deployed for each in cluster.object_drifts(made, get)}
    assert named == {
        ("ServiceAccount safelight", "automountServiceAccountToken"): True,
        ("Deployment safelight", "spec.template.spec.containers.[gateway].image"): "registry.example/gateway:latest",
        ("Deployment safelight", "spec.template.spec.securityContext.runAsNonRoot"): False,
        ("NetworkPolicy safelight", ""): ABSENT,
    }
