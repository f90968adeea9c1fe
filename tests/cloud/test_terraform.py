"""deploy/terraform is formatted and valid, passes its own tests, and makes the expected resources in moto."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path

import pytest
import yaml
from safelight_server.cluster.bills import Bill
from safelight_server.cluster.ledger import Ledger, bill_item, entry_of
from safelight_server.coordination.base import StreamEvent
from safelight_server.storage.dynamodb import PARTITION, SORT, DynamoTable

ROOT = Path(__file__).parent.parent.parent
HELM = ROOT / ".tools" / "helm"
CHART = ROOT / "deploy" / "helm" / "safelight"
MODELS, ARTIFACTS = "safelight-models-123456789012", "safelight-artifacts-123456789012"
DIGEST = "sha256:" + "1" * 64


@pytest.fixture(scope="session")
def offline(initialised):
    """The root module, initialized with its provider but without a cloud."""
    return initialised("")


def test_it_is_formatted_and_valid(offline):
    offline.succeed("fmt", "-check", "-recursive", "-diff", "..")
    offline.succeed("validate", "-no-color")


def test_its_own_tests_pass(offline):
    assert "0 failed" in offline.succeed("test", "-no-color")


def test_the_example_is_one(offline):
    """terraform fails on an unknown variable or an invalid value in a -var-file, so a plan checks the example."""
    example = (offline.folder / "fleet.tfvars.example").read_text()
    names = {line.split("=")[0].strip() for line in example.splitlines() if "=" in line and not line.startswith("#")}
    declared = {
        line.split('"')[1]
        for line in (offline.folder / "variables.tf").read_text().splitlines()
        if line.startswith("variable")
    }
    assert names <= declared
    (offline.folder / "tests" / "example.tftest.hcl").write_text(
        (offline.folder / "tests" / "fleet.tftest.hcl").read_text().partition("variables {")[0]
        + 'variables { redis_auth_token = "0123456789abcdef0123456789abcdef" }\n'
        'run "example" { command = plan }\n'
    )
    offline.succeed("test", "-no-color", "-filter=tests/example.tftest.hcl", "-var-file=fleet.tfvars.example")


def test_buckets_are_private_encrypted_and_have_their_lifecycle(fleet, client):
    s3 = client("s3")
    for bucket in (MODELS, ARTIFACTS):
        assert all(s3.get_public_access_block(Bucket=bucket)["PublicAccessBlockConfiguration"].values())
        [rule] = s3.get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]["Rules"]
        assert rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "aws:kms"
        assert ":key/" in rule["ApplyServerSideEncryptionByDefault"]["KMSMasterKeyID"]
        [statement] = json.loads(s3.get_bucket_policy(Bucket=bucket)["Policy"])["Statement"]
        assert (statement["Effect"], statement["Condition"]) == ("Deny", {"Bool": {"aws:SecureTransport": "false"}})
    assert s3.get_bucket_versioning(Bucket=MODELS)["Status"] == "Enabled"
    assert "Status" not in s3.get_bucket_versioning(Bucket=ARTIFACTS), "a purge deletes an entry and leaves no version"
    [rule] = s3.get_bucket_lifecycle_configuration(Bucket=ARTIFACTS)["Rules"]
    assert rule["Expiration"]["Days"] == 91, "a day after the last replica may serve it"
    assert [each["StorageClass"] for each in rule["Transitions"]] == ["STANDARD_IA"]
    [rule] = s3.get_bucket_lifecycle_configuration(Bucket=MODELS)["Rules"]
    assert [each["StorageClass"] for each in rule["Transitions"]] == ["INTELLIGENT_TIERING"]
    assert "Expiration" not in rule, "a model is never deleted"


def test_the_key_is_renewed_and_everything_uses_it(fleet, client):
    kms = client("kms")
    [alias] = [each for each in kms.list_aliases()["Aliases"] if each["AliasName"] == "alias/safelight"]
    key = kms.describe_key(KeyId=alias["TargetKeyId"])["KeyMetadata"]["Arn"]
    assert kms.get_key_rotation_status(KeyId=key)["KeyRotationEnabled"]
    names = ["safelight/gateway", "safelight/triton"]
    for repository in client("ecr").describe_repositories(repositoryNames=names)["repositories"]:
        assert repository["encryptionConfiguration"] == {"encryptionType": "KMS", "kmsKey": key}
        assert repository["imageTagMutability"] == "IMMUTABLE"
        assert repository["imageScanningConfiguration"]["scanOnPush"]
    [engines] = client("efs").describe_file_systems(CreationToken="safelight-engines")["FileSystems"]
    assert (engines["Encrypted"], engines["KmsKeyId"]) == (True, key)
    cluster = client("eks").describe_cluster(name="safelight")["cluster"]
    assert cluster["encryptionConfig"] == [{"resources": ["secrets"], "provider": {"keyArn": key}}]
    groups = {each["logGroupName"]: each for each in client("logs").describe_log_groups()["logGroups"]}
    for name in (
        "/safelight/safelight/flow",
        "/aws/eks/safelight/cluster",
        "/aws/containerinsights/safelight/application",
    ):
        assert (groups[name]["kmsKeyId"], groups[name]["retentionInDays"]) == (key, 90)


def test_nothing_is_reached_from_outside(fleet, client):
    ec2 = client("ec2")
    [vpc] = ec2.describe_vpcs(Filters=[{"Name": "tag:Name", "Values": ["safelight"]}])["Vpcs"]
    here = [{"Name": "vpc-id", "Values": [vpc["VpcId"]]}]
    subnets = ec2.describe_subnets(Filters=here)["Subnets"]
    assert {each["AvailabilityZone"] for each in subnets} == {"us-east-1a", "us-east-1b"}
    assert not any(each["MapPublicIpOnLaunch"] for each in subnets)
    routes = [route for table in ec2.describe_route_tables(Filters=here)["RouteTables"] for route in table["Routes"]]
    assert all(each.get("GatewayId", "").startswith(("local", "vpce-")) for each in routes), "no way to the internet"
    assert not [
        each for each in ec2.describe_internet_gateways()["InternetGateways"]
        if any(attached["VpcId"] == vpc["VpcId"] for attached in each["Attachments"])
    ]  # fmt: skip
    groups = ec2.describe_security_groups(Filters=here)["SecurityGroups"]
    sources = {
        each["GroupName"]: {source["CidrIp"] for rule in each["IpPermissions"] for source in rule["IpRanges"]}
        for each in groups
    }
    assert sources == {"default": set(), "safelight-endpoints": {"10.64.0.0/16"}, "safelight-engines": {"10.64.0.0/16"}}
    endpoints = {
        each["ServiceName"].rpartition("us-east-1.")[2]
        for each in ec2.describe_vpc_endpoints(Filters=here)["VpcEndpoints"]
    }
    assert {"s3", "sts", "ecr.api", "ecr.dkr", "eks", "ec2", "elasticfilesystem", "logs"} <= endpoints
    [log] = ec2.describe_flow_logs(Filters=[{"Name": "resource-id", "Values": [vpc["VpcId"]]}])["FlowLogs"]
    assert log["TrafficType"] == "ALL"


def test_node_groups_are_of_their_machines(fleet, client):
    eks = client("eks")
    found = {}
    for name in eks.list_nodegroups(clusterName="safelight")["nodegroups"]:
        found[name] = eks.describe_nodegroup(clusterName="safelight", nodegroupName=name)["nodegroup"]
    assert {name: each["instanceTypes"] for name, each in found.items()} == {
        "cpu": ["m7i.xlarge"],
        "gpu": ["p4d.24xlarge"],
        "gpu-spot": ["p4d.24xlarge"],
    }
    assert {name: each["capacityType"] for name, each in found.items()} == {
        "cpu": "ON_DEMAND",
        "gpu": "ON_DEMAND",
        "gpu-spot": "SPOT",
    }
    for name, taints in (
        ("cpu", set()),
        ("gpu", {"nvidia.com/gpu"}),
        ("gpu-spot", {"nvidia.com/gpu", "safelight/spot"}),
    ):
        assert {each["key"] for each in found[name].get("taints", [])} == taints
    ec2 = client("ec2")
    assert ec2.describe_subnets(SubnetIds=found["gpu"]["subnets"])["Subnets"][0]["AvailabilityZone"] == "us-east-1b"
    for each in found.values():
        [version] = ec2.describe_launch_template_versions(
            LaunchTemplateId=each["launchTemplate"]["id"], Versions=["$Latest"]
        )["LaunchTemplateVersions"]
        assert version["LaunchTemplateData"]["MetadataOptions"]["HttpTokens"] == "required"
        assert version["LaunchTemplateData"]["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
        assert version["LaunchTemplateData"]["BlockDeviceMappings"][0]["Ebs"]["Encrypted"]


def test_the_servers_role_is_the_service_accounts_and_may_only_what_the_server_does(fleet, client):
    iam = client("iam")
    role = iam.get_role(RoleName="safelight-server")["Role"]
    [trust] = role["AssumeRolePolicyDocument"]["Statement"]
    assert trust["Action"] == "sts:AssumeRoleWithWebIdentity"
    [subject] = [value for name, value in trust["Condition"]["StringEquals"].items() if name.endswith(":sub")]
    assert subject == "system:serviceaccount:pictures:safelight"
    assert iam.list_attached_role_policies(RoleName="safelight-server")["AttachedPolicies"] == []
    [name] = iam.list_role_policies(RoleName="safelight-server")["PolicyNames"]
    statements = iam.get_role_policy(RoleName="safelight-server", PolicyName=name)["PolicyDocument"]["Statement"]
    allowed = {each["Sid"]: (each["Action"], each["Resource"]) for each in statements}
    key = allowed.pop("UseTheKeyThroughS3")
    assert key[0] == ["kms:Decrypt", "kms:GenerateDataKey"]
    assert allowed == {
        "ReadModels": ("s3:GetObject", f"arn:aws:s3:::{MODELS}/*"),
        "KeepEntries": (["s3:GetObject", "s3:PutObject", "s3:DeleteObject"], f"arn:aws:s3:::{ARTIFACTS}/*"),
        "ListEntries": ("s3:ListBucket", f"arn:aws:s3:::{ARTIFACTS}"),
    }
    nodes = {
        each["PolicyName"] for each in iam.list_attached_role_policies(RoleName="safelight-node")["AttachedPolicies"]
    }
    assert nodes == {"AmazonEKSWorkerNodePolicy", "AmazonEC2ContainerRegistryPullOnly"}


def test_bills_have_a_table_that_only_the_archivers_role_writes(fleet, client):
    dynamodb, iam = client("dynamodb"), client("iam")
    table = dynamodb.describe_table(TableName="safelight-bills")["Table"]
    assert [(key["AttributeName"], key["KeyType"]) for key in table["KeySchema"]] == [
        (PARTITION, "HASH"),
        (SORT, "RANGE"),
    ]
    assert table["BillingModeSummary"]["BillingMode"] == "PAY_PER_REQUEST"
    assert table["DeletionProtectionEnabled"]
    assert table["SSEDescription"]["SSEType"] == "KMS" and ":key/" in table["SSEDescription"]["KMSMasterKeyArn"]
    backups = dynamodb.describe_continuous_backups(TableName="safelight-bills")["ContinuousBackupsDescription"]
    assert backups["PointInTimeRecoveryDescription"]["PointInTimeRecoveryStatus"] == "ENABLED"
    [trust] = iam.get_role(RoleName="safelight-archiver")["Role"]["AssumeRolePolicyDocument"]["Statement"]
    [subject] = [value for name, value in trust["Condition"]["StringEquals"].items() if name.endswith(":sub")]
    assert subject == "system:serviceaccount:pictures:safelight-archiver"
    [name] = iam.list_role_policies(RoleName="safelight-archiver")["PolicyNames"]
    statements = iam.get_role_policy(RoleName="safelight-archiver", PolicyName=name)["PolicyDocument"]["Statement"]
    allowed = {each["Sid"]: (each["Action"], each["Resource"]) for each in statements}
    assert allowed["CopyBills"] == (
        ["dynamodb:BatchWriteItem", "dynamodb:GetItem", "dynamodb:PutItem"],
        table["TableArn"],
    )
    assert allowed.keys() == {"CopyBills", "UseTheKeyThroughDynamoDB"}
    ec2 = client("ec2")
    [vpc] = ec2.describe_vpcs(Filters=[{"Name": "tag:Name", "Values": ["safelight"]}])["Vpcs"]
    here = [{"Name": "vpc-id", "Values": [vpc["VpcId"]]}]
    endpoints = {
        each["ServiceName"].rpartition(".")[2]: each
        for each in ec2.describe_vpc_endpoints(Filters=here)["VpcEndpoints"]
    }
    endpoint = endpoints["dynamodb"]
    assert (endpoint["VpcEndpointType"], len(endpoint["RouteTableIds"])) == ("Gateway", 1)


def test_bills_are_copied_to_the_table_and_read_from_it(fleet, endpoint, monkeypatch):
    """What the module makes is what the command needs."""
    for name, value in fleet.environment.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    bill = Bill("studio", "generations/a", 2, 1, 0.5, "icons/1", "miss")
    event = StreamEvent("1767225600000-0", b"sealed")
    entry = entry_of("east", event, bill)
    with contextlib.closing(DynamoTable(fleet.succeed("output", "-raw", "bills_table").strip())) as table:
        table.write([entry.item()])
        table.write([bill_item(entry, event, bill)])
        assert list(Ledger(table).bills()) == [bill]


def test_the_chart_takes_its_values(fleet, tmp_path):
    values = tmp_path / "values.auto.yaml"
    values.write_text(fleet.succeed("output", "-raw", "helm_values"))
    sums = tmp_path / "SHA256SUMS"
    sums.write_text("0" * 64 + "  pipelines/icons/1.0/pipeline.json\n")
    command = [
        HELM,
        "template",
        "safelight",
        CHART,
        "--namespace",
        "pictures",
        "--values",
        CHART / "profiles" / "gpu.yaml",
    ]
    more = [
        "--values",
        values,
        "--set",
        f"image.digest={DIGEST},triton.image.digest={DIGEST},bills.archive.image.digest={DIGEST}",
        "--set-file",
        f"models.sha256sums={sums}",
    ]
    made = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    all_objects = [each for each in yaml.safe_load_all(made.stdout) if each]
    objects = {(each["kind"], each["metadata"]["name"]): each for each in all_objects}
    for account, name in (("safelight", "server"), ("safelight-archiver", "archiver")):
        role = f"arn:aws:iam::123456789012:role/safelight-{name}"
        found = objects["ServiceAccount", account]["metadata"]["annotations"]
        assert found == {"eks.amazonaws.com/role-arn": role}
    job = objects["CronJob", "safelight-archiver"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    environment = {each["name"]: each.get("value") for each in job["containers"][0]["env"]}
    assert environment["SAFELIGHT_BILLS_TABLE"] == "safelight-bills"
    assert (environment["SAFELIGHT_DEPLOYMENT"], environment["AWS_DEFAULT_REGION"]) == ("safelight", "us-east-1")
    pod = objects["Deployment", "safelight"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-40GB"}, "what a p4d.24xlarge has"
    assert {each["key"] for each in pod["tolerations"]} == {"nvidia.com/gpu", "safelight/spot"}
    [gateway] = pod["containers"]
    environment = {each["name"]: each.get("value") for each in gateway["env"]}
    assert environment["SAFELIGHT_CACHE_S3_URL"] == f"s3://{ARTIFACTS}/entries?region=us-east-1"
    assert float(environment["SAFELIGHT_CACHE_TTL_S"]) == 90 * 86400
    assert pod["initContainers"][0]["args"][1] == f"s3://{MODELS}/icons-1.0"
    assert gateway["image"] == f"123456789012.dkr.ecr.us-east-1.amazonaws.com/safelight/gateway@{DIGEST}"


def test_the_claim_of_engines_is_the_charts(fleet):
    volume, claim = yaml.safe_load_all(fleet.succeed("output", "-raw", "engines_manifest"))
    values = yaml.safe_load(fleet.succeed("output", "-raw", "helm_values"))
    assert claim["metadata"]["name"] == values["triton"]["enginesClaim"]
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    system, _, access = volume["spec"]["csi"]["volumeHandle"].partition("::")
    assert system.startswith("fs-") and access.startswith("fsap-")
