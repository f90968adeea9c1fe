# A fleet: all AWS resources that the chart's profile gpu.yaml needs. deploy/README.md says how to get from here to a picture.

provider "aws" {
  region = var.region
  default_tags { tags = { Fleet = var.name, ManagedBy = "terraform" } }
}

locals {
  gpu_labels = {
    # The labels that NVIDIA's feature discovery would set: pods find their nodes without it, and an autoscaler knows them at zero.
    "nvidia.com/gpu.product" = "NVIDIA-A100-SXM4-40GB"
  }
  gpu_taints = { "nvidia.com/gpu" = "present" }
  gpu = {
    instance_types = ["p4d.24xlarge"]
    ami_type       = "AL2023_x86_64_NVIDIA"
    disk_gib       = 200
    zones          = length(var.gpu_zones) > 0 ? var.gpu_zones : var.zones
    labels         = local.gpu_labels
  }
  all_pools = {
    cpu = {
      instance_types = var.cpu_pool.instance_types
      ami_type       = "AL2023_x86_64_STANDARD"
      spot           = false
      min            = var.cpu_pool.min
      max            = var.cpu_pool.max
      disk_gib       = 50
      zones          = var.zones
      labels         = { "safelight/pool" = "cpu" }
      taints         = {}
    }
    gpu = merge(local.gpu, {
      spot   = false
      min    = var.gpu_pool.min
      max    = var.gpu_pool.max
      labels = merge(local.gpu_labels, { "safelight/pool" = "gpu" })
      taints = local.gpu_taints
    })
    gpu-spot = merge(local.gpu, {
      spot   = true
      min    = var.gpu_spot_pool.min
      max    = var.gpu_spot_pool.max
      labels = merge(local.gpu_labels, { "safelight/pool" = "gpu-spot" })
      taints = merge(local.gpu_taints, { "safelight/spot" = "true" })
    })
  }
  pools = { for name, pool in local.all_pools : name => pool if pool.max > 0 }
}

module "key" {
  source = "../modules/key"
  name   = var.name
}

module "network" {
  source      = "../modules/network"
  name        = var.name
  cidr        = var.cidr
  zones       = var.zones
  kms_key_arn = module.key.arn
  log_days    = var.log_days
  dynamodb    = var.ledger
  # Nodes use ec2, ecr and eks. Roles of pods: sts. The autoscaler: autoscaling. Engines: elasticfilesystem. Logs: logs, monitoring.
  # Load balancers: elasticloadbalancing. The user pool's keys: cognito-idp.
  endpoints = concat([
    "autoscaling", "ec2", "ecr.api", "ecr.dkr", "eks", "elasticfilesystem", "elasticloadbalancing", "logs", "monitoring", "sts",
  ], length(var.applications) > 0 ? ["cognito-idp"] : [])
}

module "storage" {
  source      = "../modules/storage"
  name        = var.name
  vpc_id      = module.network.vpc_id
  cidr        = module.network.cidr
  subnet_ids  = module.network.subnet_ids
  kms_key_arn = module.key.arn
  cache_days  = var.cache_days
  images      = concat(["gateway", "triton"], var.ledger ? ["archiver"] : [])
}

module "cluster" {
  source              = "../modules/cluster"
  name                = var.name
  kubernetes_version  = var.kubernetes_version
  subnet_ids          = module.network.subnet_ids
  public_access_cidrs = var.public_access_cidrs
  admins              = var.admins
  addons              = var.addons
  pools               = local.pools
  kms_key_arn         = module.key.arn
  log_days            = var.log_days
}

module "data" {
  count       = var.redis_node_type == "" ? 0 : 1
  source      = "../modules/data"
  name        = var.name
  vpc_id      = module.network.vpc_id
  cidr        = module.network.cidr
  subnet_ids  = module.network.subnet_ids
  kms_key_arn = module.key.arn
  node_type   = var.redis_node_type
  auth_token  = var.redis_auth_token
}

module "identity" {
  source               = "../modules/identity"
  name                 = var.name
  cluster_name         = module.cluster.name
  oidc_provider        = module.cluster.oidc_provider
  namespace            = var.namespace
  service_account      = var.service_account
  models_bucket_arn    = module.storage.buckets["models"].arn
  artifacts_bucket_arn = module.storage.buckets["artifacts"].arn
  kms_key_arn          = module.key.arn
}

module "ledger" {
  count               = var.ledger ? 1 : 0
  source              = "../modules/ledger"
  name                = var.name
  kms_key_arn         = module.key.arn
  deletion_protection = var.ledger_deletion_protection
  oidc_provider       = module.cluster.oidc_provider
  namespace           = var.namespace
  service_account     = "${var.service_account}-archiver"
}

module "users" {
  count        = length(var.applications) > 0 ? 1 : 0
  source       = "../modules/users"
  name         = var.name
  applications = var.applications
}

module "watch" {
  source             = "../modules/watch"
  name               = var.name
  cluster_name       = module.cluster.name
  oidc_provider      = module.cluster.oidc_provider
  kms_key_arn        = module.key.arn
  log_days           = var.log_days
  collect_logs       = var.collect_logs
  monthly_budget_usd = var.monthly_budget_usd
  budget_emails      = var.budget_emails
}
