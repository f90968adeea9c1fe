locals {
  # The values that the chart's profile gpu.yaml leaves open, or has placeholders for. `helm` merges it over the profile.
  helm_values = merge({
    image          = { repository = module.storage.repository_urls["gateway"] }
    serviceAccount = { annotations = { "eks.amazonaws.com/role-arn" = module.identity.role_arns["server"] } }
    nodeSelector   = local.gpu_labels
    tolerations = concat(
      [{ key = "nvidia.com/gpu", operator = "Exists", effect = "NoSchedule" }],
      var.gpu_spot_pool.max > 0 ? [{ key = "safelight/spot", operator = "Exists", effect = "NoSchedule" }] : [],
    )
    triton = {
      image        = { repository = module.storage.repository_urls["triton"] } # nodes can reach no other registry
      enginesClaim = local.engines_claim
    }
    cache    = { s3 = { url = "s3://${module.storage.buckets["artifacts"].name}/entries", region = var.region } }
    settings = merge({ cache_ttl_s = var.cache_days * 86400 }, local.oidc_settings)
    # With models of one's own, the list of digests is given to helm. Without them, the profile's placeholder is emptied.
    models = {
      for key, value in {
        url        = var.models_release == "" ? "" : "s3://${module.storage.buckets["models"].name}/${var.models_release}"
        sha256sums = ""
      } : key => value if key == "url" || var.models_release == ""
    }
  }, local.bills)

  bills = {
    for ledger in module.ledger : "bills" => {
      archive = {
        enabled        = true
        table          = ledger.table
        region         = var.region
        deployment     = var.name
        image          = { repository = module.storage.repository_urls["archiver"] }
        serviceAccount = { annotations = { "eks.amazonaws.com/role-arn" = ledger.role_arn } }
      }
    }
  }

  oidc_settings = length(module.users) == 0 ? {} : {
    oidc_issuer   = module.users[0].issuer
    oidc_required = module.users[0].scopes["generate"]
    oidc_admin    = module.users[0].scopes["admin"]
  }

  engines_claim = "safelight-engines-a100"
  engines = [
    {
      apiVersion = "v1"
      kind       = "PersistentVolume"
      metadata   = { name = "${var.name}-engines" }
      spec = {
        capacity                      = { storage = "100Gi" } # EFS has no size; Kubernetes requires one
        volumeMode                    = "Filesystem"
        accessModes                   = ["ReadWriteMany"]
        persistentVolumeReclaimPolicy = "Retain"
        storageClassName              = ""
        mountOptions                  = ["tls"]
        claimRef                      = { namespace = var.namespace, name = local.engines_claim }
        csi = {
          driver       = "efs.csi.aws.com"
          volumeHandle = "${module.storage.engines.file_system_id}::${module.storage.engines.access_point_id}"
        }
      }
    },
    {
      apiVersion = "v1"
      kind       = "PersistentVolumeClaim"
      metadata   = { name = local.engines_claim, namespace = var.namespace }
      spec = {
        accessModes      = ["ReadWriteMany"]
        storageClassName = ""
        volumeName       = "${var.name}-engines"
        resources        = { requests = { storage = "100Gi" } }
      }
    },
  ]
}

output "helm_values" {
  description = "Values for the chart, after its profile gpu.yaml: terraform output -raw helm_values > values.auto.yaml"
  value       = yamlencode(local.helm_values)
}

output "engines_manifest" {
  description = "The claim of TensorRT's engines: terraform output -raw engines_manifest | kubectl apply --filename -"
  value       = join("---\n", [for each in local.engines : yamlencode(each)])
}

output "cluster_name" {
  description = "For: aws eks update-kubeconfig --name"
  value       = module.cluster.name
}

output "repository_urls" {
  description = "Where to push the images gateway and triton, and archiver with a ledger."
  value       = module.storage.repository_urls
}

output "models_bucket" {
  description = "Where to put models."
  value       = module.storage.buckets["models"].name
}

output "bills_table" {
  description = "For: safelight bills --table. Empty: there is none."
  value       = length(module.ledger) == 0 ? "" : module.ledger[0].table
}

output "redis_address" {
  description = "HOST:PORT of Redis; the Secret safelight-redis gets rediss://:TOKEN@HOST:PORT/0. Empty: it is your own."
  value       = var.redis_node_type == "" ? "" : module.data[0].address
}

output "role_arns" {
  description = "Roles of service accounts: server (in helm_values), autoscaler (kube-system/cluster-autoscaler)."
  value       = module.identity.role_arns
}

output "token_url" {
  description = "Where applications get their tokens. Empty: there are none, and callers have API keys."
  value       = length(module.users) == 0 ? "" : "https://${module.users[0].domain}.auth.${var.region}.amazoncognito.com/oauth2/token"
}

output "applications" {
  description = "The client id of each application. It is the application's tenant, such as in quotas."
  value       = length(module.users) == 0 ? {} : module.users[0].client_ids
}

output "user_pool_id" {
  description = "The user pool, for: aws cognito-idp describe-user-pool-client, which shows the secret of an application."
  value       = length(module.users) == 0 ? "" : module.users[0].user_pool_id
}
