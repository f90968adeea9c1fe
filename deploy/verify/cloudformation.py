"""Compares a CloudFormation template with its stack, and with the resources as the services of AWS report them.

The stack's status does not help: it tells what CloudFormation did, not what somebody changed since. CloudFormation's
drift detection would, but moto does not have it, so this module reads the properties from the services.
"""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from botocore.exceptions import ClientError

from deploy.verify.drift import ABSENT, PRESENT, UNRESOLVED, Drift, differences

REFERENCE = re.compile(r"\$\{([^}]+)\}")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """YAML with CloudFormation's short forms: `!Ref X` is {"Ref": "X"}, `!Sub X` is {"Fn::Sub": "X"}."""


def _short_form(loader: _Loader, suffix: str, node: yaml.Node) -> Any:
    name = suffix if suffix in ("Ref", "Condition") else f"Fn::{suffix}"
    if isinstance(node, yaml.ScalarNode):
        value: Any = loader.construct_scalar(node)
        return {name: value.split(".", 1) if suffix == "GetAtt" else value}
    if isinstance(node, yaml.SequenceNode):
        return {name: loader.construct_sequence(node, deep=True)}
    return {name: loader.construct_mapping(node, deep=True)}


_Loader.add_multi_constructor("!", _short_form)


def parsed(text: str) -> dict[str, Any]:
    """Parses a template to nested maps and lists; functions are in their long form, such as Fn::Sub."""
    template: dict[str, Any] = yaml.load(text, Loader=_Loader)  # _Loader is a SafeLoader
    return template


def parameters(template: Mapping[str, Any], given: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Values of the template's parameters: those given, else their defaults."""
    defaults = {name: each["Default"] for name, each in template.get("Parameters", {}).items() if "Default" in each}
    return defaults | dict(given or {})


def resolved(value: Any, known: Mapping[str, Any]) -> Any:
    """Evaluates the functions in a value; a function of something unknown becomes `UNRESOLVED`.

    Args:
        known: the values of `Ref X` by "X", and those of `GetAtt X.Arn` by "X.Arn".
    """
    if isinstance(value, list):
        return [resolved(each, known) for each in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        [(name, argument)] = value.items()
        if name == "Ref":
            return known.get(argument, UNRESOLVED)
        if name == "Fn::GetAtt":
            return known.get(".".join(argument), UNRESOLVED)
        if name == "Fn::Sub" and isinstance(argument, str):
            names = REFERENCE.findall(argument)
            if any(each not in known for each in names):
                return UNRESOLVED
            return REFERENCE.sub(lambda match: str(known[match[1]]), argument)
        if name.startswith("Fn::"):
            return UNRESOLVED
    return {name: resolved(each, known) for name, each in value.items()}


def stack_drifts(stack: str, template_file: Path, session: Any) -> Iterator[Drift]:
    """Yields where a stack differs from its template.

    Raises:
        ClientError: there is no such stack.
    """
    between = f"cloudformation {stack}"
    template = parsed(template_file.read_text())
    client = session.client("cloudformation")
    try:
        [description] = client.describe_stacks(StackName=stack)["Stacks"]
        given = {each["ParameterKey"]: each["ParameterValue"] for each in description.get("Parameters", ())}
        body = client.get_template(StackName=stack)["TemplateBody"]
        made = client.describe_stack_resources(StackName=stack)["StackResources"]
    finally:
        client.close()
    rolled_out = parsed(body) if isinstance(body, str) else body
    for path, should, is_ in differences(template["Resources"], rolled_out["Resources"]):
        yield Drift(between, "template", path, should, is_)
    physical = {
        each["LogicalResourceId"]: each["PhysicalResourceId"] for each in made if each.get("PhysicalResourceId")
    }
    known = (
        parameters(template, given) | physical | _pseudo(description["StackId"]) | _arns(template, physical, session)
    )
    for name, resource in template["Resources"].items():
        read = READERS.get(resource["Type"])
        if read is None:
            continue
        if not _is_wanted(template, resource, known):
            continue
        if name not in physical:
            yield Drift(between, name, "", PRESENT, ABSENT)
            continue
        try:
            deployed = read(session, physical[name])
        except ClientError as error:
            if not _is_missing(error):
                raise
            yield Drift(between, name, "", PRESENT, ABSENT)
            continue
        properties = resolved(resource["Properties"], known)
        for attribute, is_ in deployed.items():
            for path, should, now in differences(properties.get(attribute, ABSENT), is_, attribute):
                yield Drift(between, name, path, should, now)


def not_compared(template_file: Path) -> list[str]:
    """The resource types of a template that are not compared, since `READERS` has no function for them."""
    kinds = {each["Type"] for each in parsed(template_file.read_text())["Resources"].values()}
    return sorted(kinds - READERS.keys())


def _is_wanted(template: Mapping[str, Any], resource: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Whether the resource has no condition, or one that holds. Each condition compares a parameter with a text."""
    if "Condition" not in resource:
        return True
    left, right = (resolved(side, known) for side in template["Conditions"][resource["Condition"]]["Fn::Equals"])
    return bool(left == right)


def _is_missing(error: ClientError) -> bool:
    code = error.response["Error"]["Code"]
    return "NotFound" in code or code in ("NoSuchBucket", "NoSuchEntity", "NotFoundException", "404")


def _pseudo(stack_id: str) -> dict[str, str]:
    _, partition, _, region, account, _ = stack_id.split(":", 5)
    return {"AWS::Partition": partition, "AWS::Region": region, "AWS::AccountId": account}


def _arns(template: Mapping[str, Any], physical: Mapping[str, str], session: Any) -> dict[str, str]:
    """The ARNs of buckets and keys, which templates refer to by GetAtt."""
    found = {}
    for name, resource in template["Resources"].items():
        if name not in physical:
            continue
        if resource["Type"] == "AWS::S3::Bucket":
            found[f"{name}.Arn"] = f"arn:aws:s3:::{physical[name]}"
        elif resource["Type"] == "AWS::KMS::Key":
            try:
                found[f"{name}.Arn"] = _call(session, "kms", "describe_key", KeyId=physical[name])["KeyMetadata"]["Arn"]
            except ClientError as error:
                if not _is_missing(error):
                    raise
    return found


def _call(session: Any, service: str, operation: str, **arguments: Any) -> Any:
    client = session.client(service)
    try:
        return getattr(client, operation)(**arguments)
    finally:
        client.close()


def _if_set(session: Any, operation: str, key: str, bucket: str) -> Any:
    """Reads a setting of a bucket; `ABSENT` if the bucket does not have it."""
    try:
        return _call(session, "s3", operation, Bucket=bucket)[key]
    except ClientError as error:
        if error.response["Error"]["Code"] == "NoSuchBucket":
            raise
        return ABSENT
    except KeyError:
        return ABSENT


def _bucket(session: Any, bucket: str) -> dict[str, Any]:
    encryption = _if_set(session, "get_bucket_encryption", "ServerSideEncryptionConfiguration", bucket)
    versioning = _if_set(session, "get_bucket_versioning", "Status", bucket)
    ownership = _if_set(session, "get_bucket_ownership_controls", "OwnershipControls", bucket)
    rules = _if_set(session, "get_bucket_lifecycle_configuration", "Rules", bucket)
    if encryption is not ABSENT:
        encryption = [
            {
                "BucketKeyEnabled": rule.get("BucketKeyEnabled", False),
                "ServerSideEncryptionByDefault": rule["ApplyServerSideEncryptionByDefault"],
            }
            for rule in encryption["Rules"]
        ]
        encryption = {"ServerSideEncryptionConfiguration": encryption}
    return {
        "VersioningConfiguration": ABSENT if versioning is ABSENT else {"Status": versioning},
        "BucketEncryption": encryption,
        "PublicAccessBlockConfiguration": _if_set(
            session, "get_public_access_block", "PublicAccessBlockConfiguration", bucket
        ),
        "OwnershipControls": ownership,
        "LifecycleConfiguration": ABSENT if rules is ABSENT else {"Rules": [_lifecycle_rule(rule) for rule in rules]},
    }


def _lifecycle_rule(rule: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a lifecycle rule of S3's API to CloudFormation's form."""
    made: dict[str, Any] = {"Id": rule["ID"], "Status": rule["Status"]}
    if moves := rule.get("Transitions"):
        made["Transitions"] = [
            {"TransitionInDays": each["Days"], "StorageClass": each["StorageClass"]} for each in moves
        ]
    if moves := rule.get("NoncurrentVersionTransitions"):
        made["NoncurrentVersionTransitions"] = [
            {"TransitionInDays": each["NoncurrentDays"], "StorageClass": each["StorageClass"]} for each in moves
        ]
    if days := rule.get("Expiration", {}).get("Days"):
        made["ExpirationInDays"] = days
    if expiry := rule.get("NoncurrentVersionExpiration"):
        made["NoncurrentVersionExpiration"] = {"NoncurrentDays": expiry["NoncurrentDays"]}
    if abort := rule.get("AbortIncompleteMultipartUpload"):
        made["AbortIncompleteMultipartUpload"] = {"DaysAfterInitiation": abort["DaysAfterInitiation"]}
    return made


def _bucket_policy(session: Any, bucket: str) -> dict[str, Any]:
    return {"PolicyDocument": _if_set(session, "get_bucket_policy", "Policy", bucket)}


def _key(session: Any, key: str) -> dict[str, Any]:
    policy = _call(session, "kms", "get_key_policy", KeyId=key, PolicyName="default")["Policy"]
    rotates = _call(session, "kms", "get_key_rotation_status", KeyId=key)["KeyRotationEnabled"]
    return {"EnableKeyRotation": rotates, "KeyPolicy": policy}


def _vpc(session: Any, vpc: str) -> dict[str, Any]:
    [found] = _call(session, "ec2", "describe_vpcs", VpcIds=[vpc])["Vpcs"]
    return {"CidrBlock": found["CidrBlock"]}


def _subnet(session: Any, subnet: str) -> dict[str, Any]:
    [found] = _call(session, "ec2", "describe_subnets", SubnetIds=[subnet])["Subnets"]
    return {name: found[name] for name in ("CidrBlock", "AvailabilityZone", "MapPublicIpOnLaunch", "VpcId")}


def _security_group(session: Any, group: str) -> dict[str, Any]:
    [found] = _call(session, "ec2", "describe_security_groups", GroupIds=[group])["SecurityGroups"]
    ingress = [
        {"Description": source.get("Description", ""), "CidrIp": source["CidrIp"]}
        | {"IpProtocol": rule["IpProtocol"], "FromPort": rule.get("FromPort"), "ToPort": rule.get("ToPort")}
        for rule in found["IpPermissions"]
        for source in rule["IpRanges"]
    ]
    return {"SecurityGroupIngress": ingress}


def _role(session: Any, role: str) -> dict[str, Any]:
    document = _call(session, "iam", "get_role", RoleName=role)["Role"]["AssumeRolePolicyDocument"]
    names = _call(session, "iam", "list_role_policies", RoleName=role)["PolicyNames"]
    policies = [
        {
            "PolicyName": name,
            "PolicyDocument": _call(session, "iam", "get_role_policy", RoleName=role, PolicyName=name)[
                "PolicyDocument"
            ],
        }
        for name in names
    ]
    attached = _call(session, "iam", "list_attached_role_policies", RoleName=role)["AttachedPolicies"]
    return {
        "AssumeRolePolicyDocument": _document(document),
        "Policies": policies or ABSENT,
        "ManagedPolicyArns": [each["PolicyArn"] for each in attached] or ABSENT,
    }


def _document(document: Any) -> Any:
    return json.loads(urllib.parse.unquote(document)) if isinstance(document, str) else document


def _repository(session: Any, repository: str) -> dict[str, Any]:
    [found] = _call(session, "ecr", "describe_repositories", repositoryNames=[repository])["repositories"]
    encryption = found.get("encryptionConfiguration", {})
    return {
        "ImageTagMutability": found["imageTagMutability"],
        "ImageScanningConfiguration": {"ScanOnPush": found["imageScanningConfiguration"].get("scanOnPush", False)},
        "EncryptionConfiguration": {
            "EncryptionType": encryption.get("encryptionType"),
            "KmsKey": encryption.get("kmsKey"),
        },
    }


def _file_system(session: Any, file_system: str) -> dict[str, Any]:
    [found] = _call(session, "efs", "describe_file_systems", FileSystemId=file_system)["FileSystems"]
    return {"Encrypted": found["Encrypted"], "KmsKeyId": found.get("KmsKeyId", ABSENT)}


def _table(session: Any, table: str) -> dict[str, Any]:
    found = _call(session, "dynamodb", "describe_table", TableName=table)["Table"]
    backups = _call(session, "dynamodb", "describe_continuous_backups", TableName=table)["ContinuousBackupsDescription"]
    recovery = backups["PointInTimeRecoveryDescription"]["PointInTimeRecoveryStatus"]
    encryption = found.get("SSEDescription", {})
    return {
        "BillingMode": found.get("BillingModeSummary", {}).get("BillingMode", "PROVISIONED"),
        "AttributeDefinitions": found["AttributeDefinitions"],
        "KeySchema": found["KeySchema"],
        "GlobalSecondaryIndexes": found.get("GlobalSecondaryIndexes") or ABSENT,
        "DeletionProtectionEnabled": bool(found.get("DeletionProtectionEnabled")),
        "PointInTimeRecoverySpecification": {"PointInTimeRecoveryEnabled": recovery == "ENABLED"},
        "SSESpecification": {
            "SSEEnabled": encryption.get("Status") == "ENABLED",
            "SSEType": encryption.get("SSEType", ABSENT),
            "KMSMasterKeyId": encryption.get("KMSMasterKeyArn", ABSENT),
        },
    }


def _log_group(session: Any, name: str) -> dict[str, Any]:
    groups = _call(session, "logs", "describe_log_groups", logGroupNamePrefix=name)["logGroups"]
    found = next((group for group in groups if group["logGroupName"] == name), None)
    if found is None:
        raise ClientError({"Error": {"Code": "ResourceNotFoundException", "Message": name}}, "DescribeLogGroups")
    return {"RetentionInDays": found.get("retentionInDays", ABSENT), "KmsKeyId": found.get("kmsKeyId", ABSENT)}


READERS: Mapping[str, Callable[[Any, str], dict[str, Any]]] = {
    "AWS::KMS::Key": _key,
    "AWS::EC2::VPC": _vpc,
    "AWS::EC2::Subnet": _subnet,
    "AWS::EC2::SecurityGroup": _security_group,
    "AWS::Logs::LogGroup": _log_group,
    "AWS::ECR::Repository": _repository,
    "AWS::S3::Bucket": _bucket,
    "AWS::S3::BucketPolicy": _bucket_policy,
    "AWS::DynamoDB::Table": _table,
    "AWS::EFS::FileSystem": _file_system,
    "AWS::IAM::Role": _role,
}
"""Functions that read a resource of each type from its service. Each returns properties in CloudFormation's form; only
these properties are compared."""
