"""Finds where Terraform and CloudFormation declare the core of a fleet differently."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from deploy.verify.cloudformation import parameters, resolved
from deploy.verify.drift import ABSENT, Drift, differences
from deploy.verify.terraform import Resource

BETWEEN = "terraform and cloudformation"

_FLAGS = {
    "block_public_acls": "BlockPublicAcls",
    "block_public_policy": "BlockPublicPolicy",
    "ignore_public_acls": "IgnorePublicAcls",
    "restrict_public_buckets": "RestrictPublicBuckets",
}
_ENCRYPTION = "BucketEncryption.ServerSideEncryptionConfiguration.0"
_STORAGE = "module.storage.aws_"
_USERS = "module.users[0].aws_cognito_"
_LEDGER = "module.ledger[0]."
_OPTIONAL = (_USERS, _LEDGER)
"""What a fleet may be without, by the beginning of its addresses in Terraform."""
_ROLES = {
    "server": ("ServerRole", "module.identity.module.server.aws_iam_role_policy.this"),
    "archiver": ("ArchiverRole", f"{_LEDGER}module.archiver.aws_iam_role_policy.this"),
}
"""Roles whose policies are compared, with their logical ids and the addresses of their policies."""

SAME: tuple[tuple[str, str, str, str], ...] = (
    ("module.key.aws_kms_key.this", "enable_key_rotation", "Key", "EnableKeyRotation"),
    ("module.key.aws_kms_key.this", "deletion_window_in_days", "Key", "PendingWindowInDays"),
    ("module.network.aws_vpc.this", "cidr_block", "Vpc", "CidrBlock"),
    ("module.network.aws_vpc.this", "enable_dns_hostnames", "Vpc", "EnableDnsHostnames"),
    ("module.network.aws_flow_log.this", "traffic_type", "FlowLog", "TrafficType"),
    ("module.network.aws_cloudwatch_log_group.flow", "name", "FlowLogs", "LogGroupName"),
    ("module.network.aws_cloudwatch_log_group.flow", "retention_in_days", "FlowLogs", "RetentionInDays"),
    *(
        (f"{_STORAGE}ecr_repository.this[{name!r}]".replace("'", '"'), ours, logical, theirs)
        for name, logical in (("gateway", "GatewayRepository"), ("triton", "TritonRepository"))
        for ours, theirs in (
            ("name", "RepositoryName"),
            ("image_tag_mutability", "ImageTagMutability"),
            ("image_scanning_configuration.0.scan_on_push", "ImageScanningConfiguration.ScanOnPush"),
            ("encryption_configuration.0.encryption_type", "EncryptionConfiguration.EncryptionType"),
        )
    ),
    *(
        (f'{_STORAGE}s3_bucket_{kind}.this["{name}"]', ours, logical, theirs)
        for name, logical in (("models", "Models"), ("artifacts", "Artifacts"))
        for kind, ours, theirs in (
            *(
                ("public_access_block", flag, f"PublicAccessBlockConfiguration.{named}")
                for flag, named in _FLAGS.items()
            ),
            ("ownership_controls", "rule.0.object_ownership", "OwnershipControls.Rules.0.ObjectOwnership"),
            (
                "server_side_encryption_configuration",
                "rule.*.apply_server_side_encryption_by_default.0.sse_algorithm",
                f"{_ENCRYPTION}.ServerSideEncryptionByDefault.SSEAlgorithm",
            ),
            ("server_side_encryption_configuration", "rule.*.bucket_key_enabled", f"{_ENCRYPTION}.BucketKeyEnabled"),
        )
    ),
    (
        f"{_STORAGE}s3_bucket_versioning.models",
        "versioning_configuration.0.status",
        "Models",
        "VersioningConfiguration.Status",
    ),
    *(
        (
            f"{_STORAGE}s3_bucket_lifecycle_configuration.{name}",
            f"rule.0.{ours}",
            logical,
            f"LifecycleConfiguration.Rules.0.{theirs}",
        )
        for name, logical, ours, theirs in (
            ("models", "Models", "transition.*.days", "Transitions.0.TransitionInDays"),
            ("models", "Models", "transition.*.storage_class", "Transitions.0.StorageClass"),
            (
                "models",
                "Models",
                "noncurrent_version_transition.*.storage_class",
                "NoncurrentVersionTransitions.0.StorageClass",
            ),
            (
                "models",
                "Models",
                "noncurrent_version_expiration.0.noncurrent_days",
                "NoncurrentVersionExpiration.NoncurrentDays",
            ),
            ("artifacts", "Artifacts", "transition.*.days", "Transitions.0.TransitionInDays"),
            ("artifacts", "Artifacts", "transition.*.storage_class", "Transitions.0.StorageClass"),
            ("artifacts", "Artifacts", "expiration.0.days", "ExpirationInDays"),
        )
    ),
    (f"{_STORAGE}efs_file_system.engines", "encrypted", "Engines", "Encrypted"),
    (f"{_STORAGE}efs_access_point.engines", "root_directory.0.path", "EnginesAccess", "RootDirectory.Path"),
    (f"{_STORAGE}efs_access_point.engines", "posix_user.0.uid", "EnginesAccess", "PosixUser.Uid"),
    ("module.identity.module.server.aws_iam_role.this", "name", "ServerRole", "RoleName"),
    *(
        (f"{_USERS}{address}", ours, logical, theirs)
        for address, logical, ours, theirs in (
            ("user_pool.this", "UserPool", "deletion_protection", "DeletionProtection"),
            ("user_pool.this", "UserPool", "mfa_configuration", "MfaConfiguration"),
            (
                "user_pool.this",
                "UserPool",
                "admin_create_user_config.0.allow_admin_create_user_only",
                "AdminCreateUserConfig.AllowAdminCreateUserOnly",
            ),
            (
                "user_pool.this",
                "UserPool",
                "password_policy.0.minimum_length",
                "Policies.PasswordPolicy.MinimumLength",
            ),
            ("resource_server.this", "ResourceServer", "identifier", "Identifier"),
        )
    ),
    *(
        (f"{_LEDGER}aws_dynamodb_table.bills", ours, "Bills", theirs)
        for ours, theirs in (
            ("name", "TableName"),
            ("billing_mode", "BillingMode"),
            ("hash_key", "KeySchema.0.AttributeName"),
            ("range_key", "KeySchema.1.AttributeName"),
            ("deletion_protection_enabled", "DeletionProtectionEnabled"),
            ("point_in_time_recovery.0.enabled", "PointInTimeRecoverySpecification.PointInTimeRecoveryEnabled"),
            ("server_side_encryption.0.enabled", "SSESpecification.SSEEnabled"),
        )
    ),
    (f"{_LEDGER}module.archiver.aws_iam_role.this", "name", "ArchiverRole", "RoleName"),
)
"""Values that both declare: Terraform's address and attribute, CloudFormation's logical id and property.

`*` in a path is the first entry of a list.
"""


def disagreements(
    planned: Sequence[Resource], template: Mapping[str, Any], given: Mapping[str, str]
) -> Iterator[Drift]:
    """Yields the differences. `declared` is Terraform's value and `deployed` is CloudFormation's.

    Args:
        planned: the resources that Terraform's configuration would make.
        given: values for the template's parameters.
    """
    by_address = {each.address: each.values for each in planned}
    known = parameters(template, given)
    for address, ours, logical, theirs in SAME:
        if _is_left_out(address, by_address):
            continue  # the fleet is without it, and the stack needs none
        values, resource = by_address.get(address), template["Resources"].get(logical)
        declared = ABSENT if values is None else _at(values, ours)
        other = ABSENT if resource is None else _at(resolved(resource["Properties"], known), theirs)
        for _, should, is_ in differences(declared, other):
            yield Drift(BETWEEN, f"{address} and {logical}", f"{ours} and {theirs}", should, is_)
    for role, (logical, address) in _ROLES.items():
        if _is_left_out(address, by_address):
            continue
        declared = _actions(_at(by_address.get(f'{address}["use"]', {}), "policy"))
        other = _actions(_at(template["Resources"].get(logical, {}), "Properties.Policies.0.PolicyDocument"))
        for path, should, is_ in differences(declared, other):
            yield Drift(BETWEEN, f"role {role} and {logical}", path, should, is_)


def _is_left_out(address: str, present: Iterable[str]) -> bool:
    part = next((part for part in _OPTIONAL if address.startswith(part)), None)
    return part is not None and not any(each.startswith(part) for each in present)


def _at(value: Any, path: str) -> Any:
    for name in path.split("."):
        if isinstance(value, list):
            index = 0 if name == "*" else int(name)
            if index >= len(value):
                return ABSENT
            value = value[index]
        elif isinstance(value, Mapping):
            value = value.get(name, ABSENT)
        else:
            return value  # absent, or not known before the resource is made
    return value


def _actions(policy: Any) -> Any:
    """The effect and actions of each statement of a policy, by Sid. Resources are left out: their names differ."""
    document = json.loads(policy) if isinstance(policy, str) and policy != ABSENT else policy
    if not isinstance(document, Mapping):
        return ABSENT
    return {each["Sid"]: {"Effect": each["Effect"], "Action": each["Action"]} for each in document["Statement"]}
