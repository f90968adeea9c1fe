"""deploy/cloudformation passes cfn-lint and is deployed to moto.

moto reports a stack as complete although it ignores types and properties that it does not know. So these tests read the
resources from its services, with boto3 and with deploy/verify.
"""

from __future__ import annotations

import ast
import json
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest

from deploy.verify.cloudformation import READERS, not_compared, parsed, resolved, stack_drifts
from deploy.verify.drift import ABSENT, PRESENT, UNRESOLVED

ROOT = Path(__file__).parent.parent.parent
TEMPLATE = ROOT / "deploy" / "cloudformation" / "core.yaml"
CFN_LINT = ROOT / ".venv" / "bin" / "cfn-lint"
ISSUER = "oidc.eks.us-east-1.amazonaws.com/id/0123456789"
PARAMETERS = {
    "OidcProviderArn": f"arn:aws:iam::123456789012:oidc-provider/{ISSUER}",
    "OidcIssuer": ISSUER,
    "Ledger": "true",
}
PSEUDO = {"AWS::Partition": "aws", "AWS::Region": "us-east-1", "AWS::AccountId": "123456789012"}

BUCKET_KEY = "BucketEncryption.ServerSideEncryptionConfiguration.BucketKeyEnabled"
COMPLETED = {
    ("Models", "VersioningConfiguration"),
    *((bucket, BUCKET_KEY) for bucket in ("Models", "Artifacts")),
    *((bucket, "PublicAccessBlockConfiguration") for bucket in ("Models", "Artifacts")),
    *((bucket, "OwnershipControls") for bucket in ("Models", "Artifacts")),
    *((bucket, "LifecycleConfiguration") for bucket in ("Models", "Artifacts")),
    *((f"{image}Repository", "ImageScanningConfiguration.ScanOnPush") for image in ("Gateway", "Triton", "Archiver")),
    *((role, "Policies.[use].PolicyDocument") for role in ("ServerRole", "ArchiverRole")),
    ("Bills", "PointInTimeRecoverySpecification.PointInTimeRecoveryEnabled"),
    ("FlowLogsRole", "Policies.[write].PolicyDocument"),
}
"""Properties that moto's CloudFormation leaves out or keeps in another form, and that `complete` sets."""
LEFT_OUT = {
    ("ModelsPolicy", ""),
    ("ArtifactsPolicy", ""),
    ("FlowLogs", "KmsKeyId"),
    *(("Bills", f"SSESpecification.{name}") for name in ("SSEEnabled", "SSEType", "KMSMasterKeyId")),
    *(
        (f"{image}Repository", f"EncryptionConfiguration.{name}")
        for image in ("Gateway", "Triton", "Archiver")
        for name in ("KmsKey", "EncryptionType")
    ),
    *((group, "SecurityGroupIngress.Description") for group in ("EndpointsGroup", "EnginesGroup")),
}
"""Properties that it leaves out and that no later call can set."""


@dataclass(frozen=True)
class Stack:
    """A stack in moto: its name, which is also the fleet's, and its physical ids by logical ids."""

    name: str
    ids: dict[str, str]

    @property
    def models(self) -> str:
        return f"{self.name}-models-123456789012"

    @property
    def artifacts(self) -> str:
        return f"{self.name}-artifacts-123456789012"

    def named(self, template: Path = TEMPLATE) -> dict[tuple[str, str], tuple[object, object]]:
        """The differences that deploy/verify finds."""
        drifts = stack_drifts(self.name, template, boto3.Session())
        return {(each.resource, each.attribute): (each.declared, each.deployed) for each in drifts}


def created(client, name: str, **changes: str) -> Stack:
    """A new stack, with changed parameters. It is not deleted: moto cannot delete a VPC that is not empty."""
    formation = client("cloudformation")
    given = PARAMETERS | {"Name": name} | changes
    formation.create_stack(
        StackName=name,
        TemplateBody=TEMPLATE.read_text(),
        Parameters=[{"ParameterKey": each, "ParameterValue": value} for each, value in given.items()],
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )
    made = formation.describe_stack_resources(StackName=name)["StackResources"]
    ids = {each["LogicalResourceId"]: each["PhysicalResourceId"] for each in made if "PhysicalResourceId" in each}
    # moto keeps the policy in a form that its own DescribeKey cannot read.
    policy = resolved(parsed(TEMPLATE.read_text())["Resources"]["Key"]["Properties"]["KeyPolicy"], PSEUDO)
    client("kms").put_key_policy(KeyId=ids["Key"], PolicyName="default", Policy=json.dumps(policy))
    return Stack(name, ids)


@pytest.fixture
def stack(cloud, client, request) -> Stack:
    """A stack for each test."""
    return created(client, f"formed-{zlib.crc32(request.node.name.encode()):08x}")


def policy_of(iam, role: str) -> dict[str, Any]:
    """The only policy of a role. moto's CloudFormation keeps it as the repr of a Python dictionary."""
    [name] = iam.list_role_policies(RoleName=role)["PolicyNames"]
    document = iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"]
    return ast.literal_eval(document) if isinstance(document, str) else document


def complete(client, stack: Stack) -> None:
    """Sets the properties in COMPLETED, as CloudFormation would."""
    s3, ecr, iam = map(client, ("s3", "ecr", "iam"))
    declared = parsed(TEMPLATE.read_text())["Resources"]
    for bucket, name in ((stack.models, "Models"), (stack.artifacts, "Artifacts")):
        properties = resolved(declared[name]["Properties"], {"ArtifactDays": 91})
        closed = properties["PublicAccessBlockConfiguration"]
        s3.put_public_access_block(Bucket=bucket, PublicAccessBlockConfiguration=closed)
        s3.put_bucket_ownership_controls(Bucket=bucket, OwnershipControls=properties["OwnershipControls"])
        encryption = s3.get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]
        encryption["Rules"][0]["BucketKeyEnabled"] = True
        s3.put_bucket_encryption(Bucket=bucket, ServerSideEncryptionConfiguration=encryption)
        [rule] = properties["LifecycleConfiguration"]["Rules"]
        [move] = rule["Transitions"]
        made = {"ID": "tiers", "Status": "Enabled", "Filter": {"Prefix": ""}}
        made["Transitions"] = [{"Days": move["TransitionInDays"], "StorageClass": move["StorageClass"]}]
        made["AbortIncompleteMultipartUpload"] = rule["AbortIncompleteMultipartUpload"]
        if name == "Artifacts":
            made["Expiration"] = {"Days": rule["ExpirationInDays"]}
        else:
            made["NoncurrentVersionTransitions"] = [{"NoncurrentDays": 30, "StorageClass": "GLACIER_IR"}]
            made["NoncurrentVersionExpiration"] = rule["NoncurrentVersionExpiration"]
        s3.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": [made]})
    s3.put_bucket_versioning(Bucket=stack.models, VersioningConfiguration={"Status": "Enabled"})
    for repository in ("gateway", "triton", "archiver"):
        ecr.put_image_scanning_configuration(
            repositoryName=f"{stack.name}/{repository}", imageScanningConfiguration={"scanOnPush": True}
        )
    client("dynamodb").update_continuous_backups(
        TableName=stack.ids["Bills"], PointInTimeRecoverySpecification={"PointInTimeRecoveryEnabled": True}
    )
    for role, policy in (("ServerRole", "use"), ("ArchiverRole", "use"), ("FlowLogsRole", "write")):
        name = stack.ids[role]
        iam.put_role_policy(RoleName=name, PolicyName=policy, PolicyDocument=json.dumps(policy_of(iam, name)))


def test_cfn_lint_finds_nothing():
    linted = subprocess.run(
        [CFN_LINT, "--regions", "us-east-1", "--", TEMPLATE], capture_output=True, text=True, check=False
    )
    assert (linted.returncode, linted.stdout) == (0, ""), linted.stdout + linted.stderr


def test_the_services_have_what_the_template_says(stack, client):
    s3, kms, ec2, iam = map(client, ("s3", "kms", "ec2", "iam"))
    for bucket in (stack.models, stack.artifacts):
        [rule] = s3.get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]["Rules"]
        assert rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "aws:kms"
    assert kms.get_key_rotation_status(KeyId=stack.ids["Key"])["KeyRotationEnabled"]
    subnets = ec2.describe_subnets(SubnetIds=[stack.ids["SubnetA"], stack.ids["SubnetB"]])["Subnets"]
    assert len({each["AvailabilityZone"] for each in subnets}) == 2
    assert not any(each["MapPublicIpOnLaunch"] for each in subnets)
    [engines] = client("efs").describe_file_systems(FileSystemId=stack.ids["Engines"])["FileSystems"]
    assert engines["Encrypted"] and engines["NumberOfMountTargets"] == 2
    allowed = {each["Sid"]: each["Action"] for each in policy_of(iam, f"{stack.name}-server")["Statement"]}
    assert allowed == {
        "ReadModels": "s3:GetObject",
        "KeepEntries": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject"],
        "ListEntries": "s3:ListBucket",
        "UseTheKeyThroughS3": ["kms:Decrypt", "kms:GenerateDataKey"],
    }
    [copy, _] = policy_of(iam, f"{stack.name}-archiver")["Statement"]
    assert copy["Action"] == ["dynamodb:BatchWriteItem", "dynamodb:GetItem", "dynamodb:PutItem"]
    [statement] = iam.get_role(RoleName=f"{stack.name}-server")["Role"]["AssumeRolePolicyDocument"]["Statement"]
    assert statement["Condition"]["StringEquals"][f"{ISSUER}:sub"] == "system:serviceaccount:pictures:safelight"


def test_what_moto_left_out_and_what_is_changed_by_hand_is_each_named(stack, client):
    assert stack.named().keys() == COMPLETED | LEFT_OUT, "moto says CREATE_COMPLETE of a stack without these"
    complete(client, stack)
    assert stack.named().keys() == LEFT_OUT

    s3, kms, ec2, iam, ecr = map(client, ("s3", "kms", "ec2", "iam", "ecr"))
    kms.disable_key_rotation(KeyId=stack.ids["Key"])
    s3.delete_public_access_block(Bucket=stack.models)
    s3.delete_bucket_lifecycle(Bucket=stack.artifacts)
    statement = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    iam.put_role_policy(RoleName=f"{stack.name}-server", PolicyName="more", PolicyDocument=policy)
    ec2.authorize_security_group_ingress(
        GroupId=stack.ids["EnginesGroup"], IpProtocol="tcp", FromPort=22, ToPort=22, CidrIp="0.0.0.0/0"
    )
    ecr.delete_repository(repositoryName=f"{stack.name}/triton", force=True)
    dynamodb = client("dynamodb")
    dynamodb.update_table(TableName=stack.ids["Bills"], DeletionProtectionEnabled=False)
    dynamodb.update_continuous_backups(
        TableName=stack.ids["Bills"], PointInTimeRecoverySpecification={"PointInTimeRecoveryEnabled": False}
    )
    after = stack.named()
    assert after.keys() - LEFT_OUT == {
        ("Key", "EnableKeyRotation"),
        ("Models", "PublicAccessBlockConfiguration"),
        ("Artifacts", "LifecycleConfiguration"),
        ("ServerRole", "Policies.[more]"),
        ("EnginesGroup", "SecurityGroupIngress"),
        ("TritonRepository", ""),
        ("Bills", "DeletionProtectionEnabled"),
        ("Bills", "PointInTimeRecoverySpecification.PointInTimeRecoveryEnabled"),
    }
    assert after["Key", "EnableKeyRotation"] == (True, False)
    assert after["TritonRepository", ""] == (PRESENT, ABSENT)


def test_a_template_that_was_not_rolled_out_is_named(stack, tmp_path):
    changed = tmp_path / "core.yaml"
    changed.write_text(TEMPLATE.read_text().replace("IMMUTABLE", "MUTABLE"))
    said = stack.named(changed).keys()
    assert ("template", "GatewayRepository.Properties.ImageTagMutability") in said
    assert ("GatewayRepository", "ImageTagMutability") in said


def test_what_no_reader_knows_is_said():
    kinds = {each["Type"] for each in parsed(TEMPLATE.read_text())["Resources"].values()}
    assert set(not_compared(TEMPLATE)) == kinds - READERS.keys()
    assert {"AWS::S3::Bucket", "AWS::IAM::Role", "AWS::KMS::Key"} <= kinds & READERS.keys()


def test_a_stack_without_a_ledger_has_no_table_and_misses_none(cloud, client):
    stack = created(client, "formed-without", Ledger="false")
    assert not {"Bills", "ArchiverRole", "ArchiverRepository", "DynamoDbEndpoint"} & stack.ids.keys()
    assert not {name for name, _ in stack.named() if name.startswith(("Bills", "Archiver"))}


def test_functions_of_templates():
    template = parsed(
        "a: !Ref X\nb: !GetAtt X.Arn\nc: !Sub '${X}-${X.Arn}'\nd: !Sub '${Y}'\ne: !Select [0, [x]]\nf: [{g: !Ref Y}]"
    )
    known = {"X": "x", "X.Arn": "arn"}
    assert resolved(template, known) == {
        "a": "x",
        "b": "arn",
        "c": "x-arn",
        "d": UNRESOLVED,
        "e": UNRESOLVED,
        "f": [{"g": UNRESOLVED}],
    }
