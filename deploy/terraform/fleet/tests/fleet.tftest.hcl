# What needs no cloud: what a fleet would consist of, and which variables are refused. `terraform test` runs it; the provider is
# a mock, because moto has no replication groups with parameters, no add-ons and no budgets with subscribers.

mock_provider "aws" {
  mock_data "aws_caller_identity" { defaults = { account_id = "123456789012" } }
  mock_data "aws_partition" { defaults = { partition = "aws" } }
  mock_data "aws_region" { defaults = { name = "us-east-1" } }
}

variables {
  region             = "us-east-1"
  zones              = ["us-east-1a", "us-east-1b", "us-east-1d"]
  gpu_zones          = ["us-east-1d"]
  redis_auth_token   = "0123456789abcdef0123456789abcdef"
  monthly_budget_usd = 100
  budget_emails      = ["someone@example.com"]
}

run "whole" {
  command = plan
  assert {
    condition     = keys(local.pools) == ["cpu", "gpu", "gpu-spot"]
    error_message = "three pools"
  }
  assert {
    condition     = local.pools["gpu-spot"].spot && !local.pools["gpu"].spot && local.pools["gpu"].zones == tolist(["us-east-1d"])
    error_message = "GPU nodes are where there are some, on demand and as spot"
  }
  assert {
    condition     = alltrue([for pool in ["gpu", "gpu-spot"] : local.pools[pool].taints["nvidia.com/gpu"] == "present" && local.pools[pool].min == 0])
    error_message = "only pods that tolerate it go to a GPU node, and none costs before one does"
  }
}

run "without_spot" {
  command = plan
  variables { gpu_spot_pool = { max = 0 } }
  assert {
    condition     = keys(local.pools) == ["cpu", "gpu"] && length(local.helm_values.tolerations) == 1
    error_message = "no pool, and nobody tolerates it"
  }
}

run "own_redis" {
  command = plan
  variables {
    redis_node_type  = ""
    redis_auth_token = ""
  }
  assert {
    condition     = output.redis_address == "" && length(module.data) == 0
    error_message = "none is made"
  }
}

run "redis" {
  command = plan
  module { source = "../modules/data" }
  variables {
    name        = "safelight"
    vpc_id      = "vpc-1"
    cidr        = "10.64.0.0/16"
    subnet_ids  = { a = "subnet-1", b = "subnet-2" }
    kms_key_arn = "arn:aws:kms:us-east-1:123456789012:key/1"
    node_type   = "cache.r7g.large"
    auth_token  = "0123456789abcdef0123456789abcdef"
  }
  assert {
    condition     = aws_elasticache_replication_group.this.transit_encryption_enabled && tobool(aws_elasticache_replication_group.this.at_rest_encryption_enabled)
    error_message = "encrypted"
  }
  assert {
    condition     = aws_elasticache_replication_group.this.auth_token == "0123456789abcdef0123456789abcdef"
    error_message = "only who has the token is let in"
  }
  assert {
    condition     = aws_elasticache_replication_group.this.multi_az_enabled && aws_elasticache_replication_group.this.num_cache_clusters == 2
    error_message = "a replica in another zone"
  }
  assert {
    condition     = one(aws_elasticache_parameter_group.this.parameter[*]).value == "volatile-lru"
    error_message = "leases are evicted last"
  }
}

run "without_applications" {
  command = plan
  assert {
    condition     = length(module.users) == 0 && !contains(keys(local.helm_values.settings), "oidc_issuer") && output.token_url == ""
    error_message = "no pool, and the server is told of none"
  }
}

run "users" {
  command = plan
  module { source = "../modules/users" }
  variables {
    name         = "safelight"
    applications = { studio = ["generate"], operators = ["generate", "admin"] }
  }
  assert {
    condition     = alltrue([for client in aws_cognito_user_pool_client.application : client.allowed_oauth_flows == toset(["client_credentials"]) && client.generate_secret])
    error_message = "applications have secrets, and nobody signs in"
  }
  assert {
    condition     = aws_cognito_user_pool_client.application["studio"].allowed_oauth_scopes == toset(["safelight/generate"])
    error_message = "no application gets a scope that it was not given"
  }
  assert {
    condition     = aws_cognito_user_pool.this.admin_create_user_config[0].allow_admin_create_user_only && aws_cognito_user_pool.this.deletion_protection == "ACTIVE"
    error_message = "nobody signs up, and the pool is not deleted by accident"
  }
}

run "without_a_ledger" {
  command = plan
  assert {
    condition     = length(module.ledger) == 0 && !contains(keys(local.helm_values), "bills") && output.bills_table == ""
    error_message = "no table, and no job that would need it"
  }
}

run "with_a_ledger" {
  command = plan
  variables { ledger = true }
  assert {
    condition     = output.bills_table == "safelight-bills" && local.helm_values.bills.archive.table == "safelight-bills"
    error_message = "the chart's job copies to this table"
  }
}

run "ledger" {
  command = plan
  module { source = "../modules/ledger" }
  variables {
    name            = "safelight"
    kms_key_arn     = "arn:aws:kms:us-east-1:123456789012:key/1"
    oidc_provider   = { arn = "arn:aws:iam::123456789012:oidc-provider/x", issuer = "x" }
    namespace       = "pictures"
    service_account = "safelight-archiver"
  }
  assert {
    condition     = aws_dynamodb_table.bills.deletion_protection_enabled && aws_dynamodb_table.bills.point_in_time_recovery[0].enabled
    error_message = "bills are not deleted by accident, and any second of the last 35 days can be had again"
  }
  assert {
    condition     = aws_dynamodb_table.bills.server_side_encryption[0].kms_key_arn == "arn:aws:kms:us-east-1:123456789012:key/1"
    error_message = "encrypted with the fleet's key"
  }
}

run "an_unknown_scope_is_refused" {
  command = plan
  variables { applications = { studio = ["everything"] } }
  expect_failures = [var.applications]
}

run "cluster" {
  command = plan
  module { source = "../modules/cluster" }
  variables {
    name                = "safelight"
    kubernetes_version  = "1.33"
    subnet_ids          = { "us-east-1a" = "subnet-1", "us-east-1b" = "subnet-2" }
    public_access_cidrs = []
    admins              = ["arn:aws:iam::123456789012:role/platform"]
    addons              = ["vpc-cni", "coredns"]
    kms_key_arn         = "arn:aws:kms:us-east-1:123456789012:key/1"
    log_days            = 90
    pools = {
      gpu-spot = {
        instance_types = ["p4d.24xlarge"], ami_type = "AL2023_x86_64_NVIDIA", spot = true, min = 0, max = 4, disk_gib = 200,
        zones          = ["us-east-1b"], labels = { pool = "gpu-spot" }, taints = { "nvidia.com/gpu" = "present" }
      }
    }
  }
  assert {
    condition     = !aws_eks_cluster.this.vpc_config[0].endpoint_public_access && aws_eks_cluster.this.vpc_config[0].endpoint_private_access
    error_message = "the API is reached from the VPC alone"
  }
  assert {
    condition     = length(aws_eks_cluster.this.enabled_cluster_log_types) == 5
    error_message = "all logs"
  }
  assert {
    condition     = aws_eks_access_policy_association.admin["arn:aws:iam::123456789012:role/platform"].policy_arn == "arn:aws:eks::aws:cluster-access-policy/AmazonEKSClusterAdminPolicy"
    error_message = "admins administer"
  }
  assert {
    condition     = keys(aws_eks_addon.network) == ["vpc-cni"] && keys(aws_eks_addon.other) == ["coredns"]
    error_message = "the network before the nodes, the rest after them"
  }
  assert {
    condition     = strcontains(aws_eks_addon.network["vpc-cni"].configuration_values, "enableNetworkPolicy")
    error_message = "the chart's NetworkPolicy is enforced"
  }
  assert {
    condition     = aws_eks_node_group.this["gpu-spot"].capacity_type == "SPOT" && aws_eks_node_group.this["gpu-spot"].scaling_config[0].desired_size == 0
    error_message = "spot, and none at first"
  }
  assert {
    condition     = aws_launch_template.node["gpu-spot"].metadata_options[0].http_tokens == "required" && aws_launch_template.node["gpu-spot"].metadata_options[0].http_put_response_hop_limit == 1
    error_message = "pods do not reach the node's credentials"
  }
}

run "budget" {
  command = plan
  module { source = "../modules/watch" }
  variables {
    name               = "safelight"
    cluster_name       = "safelight"
    oidc_provider      = { arn = "arn:aws:iam::123456789012:oidc-provider/x", issuer = "x" }
    kms_key_arn        = "arn:aws:kms:us-east-1:123456789012:key/1"
    log_days           = 90
    collect_logs       = true
    monthly_budget_usd = 100
    budget_emails      = ["someone@example.com"]
  }
  assert {
    condition     = aws_budgets_budget.month[0].limit_amount == "100" && length(aws_budgets_budget.month[0].notification) == 2
    error_message = "told at 80 % and by the forecast"
  }
  assert {
    condition     = aws_cloudwatch_log_group.pods.kms_key_id == "arn:aws:kms:us-east-1:123456789012:key/1"
    error_message = "logs are encrypted"
  }
}

run "short_lived_entries_stay_in_one_tier" {
  command = plan
  module { source = "../modules/storage" }
  variables {
    name        = "safelight"
    vpc_id      = "vpc-1"
    cidr        = "10.64.0.0/16"
    subnet_ids  = { a = "subnet-1" }
    kms_key_arn = "arn:aws:kms:us-east-1:123456789012:key/1"
    cache_days  = 30
  }
  assert {
    condition     = length(aws_s3_bucket_lifecycle_configuration.artifacts.rule[0].transition) == 0 && aws_s3_bucket_lifecycle_configuration.artifacts.rule[0].expiration[0].days == 31
    error_message = "deleted a day after the last replica may serve them"
  }
}

run "one_zone_is_refused" {
  command = plan
  variables {
    zones     = ["us-east-1a"]
    gpu_zones = []
  }
  expect_failures = [var.zones]
}

run "zones_of_another_region_are_refused" {
  command = plan
  variables {
    zones     = ["us-west-2a", "us-west-2b"]
    gpu_zones = []
  }
  expect_failures = [var.zones]
}

run "gpus_without_a_subnet_are_refused" {
  command = plan
  variables { gpu_zones = ["us-east-1f"] }
  expect_failures = [var.gpu_zones]
}

run "the_whole_internet_is_refused" {
  command = plan
  variables { public_access_cidrs = ["0.0.0.0/0"] }
  expect_failures = [var.public_access_cidrs]
}

run "redis_without_a_token_is_refused" {
  command = plan
  variables { redis_auth_token = "short" }
  expect_failures = [var.redis_auth_token]
}

run "a_budget_that_tells_nobody_is_refused" {
  command = plan
  variables { budget_emails = [] }
  expect_failures = [var.budget_emails]
}

run "a_small_network_is_refused" {
  command = plan
  variables { cidr = "10.0.0.0/24" }
  expect_failures = [var.cidr]
}

run "a_long_name_is_refused" {
  command = plan
  variables { name = "a-name-that-no-bucket-has-room-for" }
  expect_failures = [var.name]
}
