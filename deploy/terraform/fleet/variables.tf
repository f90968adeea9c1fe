variable "region" {
  description = "Region of AWS, one that has p4d.24xlarge."
  type        = string
  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "region must be the name of a region, such as us-east-1."
  }
}

variable "name" {
  description = "Name of the fleet, and of most of what it consists of."
  type        = string
  default     = "safelight"
  validation {
    condition     = can(regex("^[a-z][a-z0-9]*(-[a-z0-9]+)*$", var.name)) && length(var.name) <= 24
    error_message = "name must be at most 24 lower-case letters, digits and single hyphens between them, and begin with a letter: names of buckets and of Redis are made from it."
  }
}

variable "zones" {
  description = "Availability zones, in an order that stays: add new ones at the end."
  type        = list(string)
  validation {
    condition     = length(var.zones) >= 2 && length(var.zones) <= 6
    error_message = "zones must be two to six: EKS and a Redis that survives a zone need two."
  }
  validation {
    condition     = length(distinct(var.zones)) == length(var.zones) && alltrue([for zone in var.zones : startswith(zone, var.region)])
    error_message = "zones must be different ones of the region, such as us-east-1a."
  }
}

variable "gpu_zones" {
  description = "Those of the zones that have p4d.24xlarge. Empty: all."
  type        = list(string)
  default     = []
  validation {
    condition     = length(setsubtract(var.gpu_zones, var.zones)) == 0
    error_message = "gpu_zones must be among zones: there are no subnets elsewhere."
  }
}

variable "cidr" {
  description = "Addresses of the VPC. Each zone gets an eighth, and each pod an address."
  type        = string
  default     = "10.64.0.0/16"
  validation {
    condition     = can(cidrhost(var.cidr, 0)) && can(regex("/(1[6-9]|2[0-2])$", var.cidr))
    error_message = "cidr must be a block of IPv4 addresses from /16 to /22, such as 10.64.0.0/16."
  }
}

variable "kubernetes_version" {
  description = "Version of Kubernetes. The chart needs 1.30."
  type        = string
  default     = "1.33"
  validation {
    condition     = can(regex("^1\\.[3-9][0-9]$", var.kubernetes_version))
    error_message = "kubernetes_version must be 1.30 or later, without a patch version."
  }
}

variable "public_access_cidrs" {
  description = "From where the cluster's API is reached beside the VPC. Empty: only from the VPC, through a VPN or a bastion of yours."
  type        = list(string)
  default     = []
  validation {
    condition     = alltrue([for block in var.public_access_cidrs : can(cidrhost(block, 0)) && !can(regex("/[0-7]$", block))])
    error_message = "public_access_cidrs must be blocks of addresses of yours, none wider than /8: 0.0.0.0/0 is everybody."
  }
}

variable "admins" {
  description = "ARNs of IAM roles and users that administer the cluster, beside whoever applies this."
  type        = list(string)
  default     = []
  validation {
    condition     = alltrue([for arn in var.admins : can(regex("^arn:[a-z-]+:iam::[0-9]{12}:(role|user)/", arn))])
    error_message = "admins must be ARNs of IAM roles or users."
  }
}

variable "addons" {
  description = "Add-ons of EKS. The first four are what the chart needs."
  type        = list(string)
  default     = ["vpc-cni", "kube-proxy", "coredns", "aws-efs-csi-driver"]
}

variable "cpu_pool" {
  description = "Nodes for everything but the GPU pods: CoreDNS, KEDA, Prometheus, gateways of profile cpu.yaml."
  type        = object({ instance_types = optional(list(string), ["m7i.xlarge"]), min = optional(number, 2), max = optional(number, 6) })
  default     = {}
  validation {
    condition     = var.cpu_pool.min >= 1 && var.cpu_pool.max >= var.cpu_pool.min && length(var.cpu_pool.instance_types) > 0
    error_message = "cpu_pool needs an instance type, min of at least 1 and max of at least min: CoreDNS and the autoscaler run there."
  }
}

variable "gpu_pool" {
  description = "p4d.24xlarge on demand. One such node has eight A100, and costs whether it computes or not."
  type        = object({ min = optional(number, 0), max = optional(number, 2) })
  default     = {}
  validation {
    condition     = var.gpu_pool.min >= 0 && var.gpu_pool.max >= var.gpu_pool.min
    error_message = "gpu_pool needs min of at least 0 and max of at least min; with max = 0 there is no such pool."
  }
}

variable "gpu_spot_pool" {
  description = "p4d.24xlarge as spot. They can be taken away with two minutes' notice; only pods that tolerate safelight/spot go there."
  type        = object({ min = optional(number, 0), max = optional(number, 2) })
  default     = {}
  validation {
    condition     = var.gpu_spot_pool.min >= 0 && var.gpu_spot_pool.max >= var.gpu_spot_pool.min
    error_message = "gpu_spot_pool needs min of at least 0 and max of at least min; with max = 0 there is no such pool."
  }
}

variable "cache_days" {
  description = "How long a cached entry may be served (cache_ttl_s of the server); a day later S3 deletes it."
  type        = number
  default     = 90
  validation {
    condition     = var.cache_days >= 1 && var.cache_days <= 3650 && floor(var.cache_days) == var.cache_days
    error_message = "cache_days must be a whole number from 1 to 3650."
  }
}

variable "models_release" {
  description = "Folder in the bucket of models that the release reads. Empty: the models in the image."
  type        = string
  default     = ""
  validation {
    condition     = can(regex("^([A-Za-z0-9][A-Za-z0-9._/-]*[A-Za-z0-9])?$", var.models_release))
    error_message = "models_release must be a path without a slash at either end, such as icons-1.0."
  }
}

variable "redis_node_type" {
  description = "Machine of each of the two Redis nodes. Empty: none is made, and you bring a Redis of your own."
  type        = string
  default     = "cache.r7g.large"
  validation {
    condition     = can(regex("^(cache\\.[a-z0-9]+\\.[a-z0-9]+)?$", var.redis_node_type))
    error_message = "redis_node_type must be a machine of ElastiCache, such as cache.r7g.large, or empty."
  }
}

variable "redis_auth_token" {
  description = "What clients say to Redis to be let in: TF_VAR_redis_auth_token, not a file. It is in the state."
  type        = string
  default     = ""
  sensitive   = true
  validation {
    condition     = var.redis_node_type == "" || can(regex("^[A-Za-z0-9]{32,128}$", var.redis_auth_token))
    error_message = "redis_auth_token must be 32 to 128 letters and digits (it becomes part of a URL), such as from: openssl rand -hex 32."
  }
}

variable "namespace" {
  description = "Namespace of the chart's release. Only its service account there may take the server's role."
  type        = string
  default     = "pictures"
  validation {
    condition     = can(regex("^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", var.namespace)) && length(var.namespace) <= 63
    error_message = "namespace must be a name of a namespace of Kubernetes."
  }
}

variable "service_account" {
  description = "Service account of the release: `safelight` for a release of that name."
  type        = string
  default     = "safelight"
  validation {
    condition     = can(regex("^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", var.service_account))
    error_message = "service_account must be a name of a service account of Kubernetes."
  }
}

variable "ledger" {
  description = "Whether there is a table of DynamoDB in which bills are kept, and a role for the chart's job that copies them from Redis."
  type        = bool
  default     = false
}

variable "ledger_deletion_protection" {
  description = "Whether AWS refuses to delete that table."
  type        = bool
  default     = true
}

variable "applications" {
  description = "Applications that call with tokens of a user pool of Cognito, each with its scopes, of generate and admin. Empty: no pool; callers have API keys. Their secrets are in the state."
  type        = map(set(string))
  default     = {}
  validation {
    condition = alltrue([
      for name, scopes in var.applications :
      can(regex("^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$", name)) && length(scopes) > 0 && length(setsubtract(scopes, ["generate", "admin"])) == 0
    ])
    error_message = "applications must be names of letters, digits, underscores and hyphens, each with generate, admin or both: { studio = [\"generate\"] }."
  }
}

variable "log_days" {
  description = "How long logs of nodes' network, control plane and pods are kept."
  type        = number
  default     = 90
  validation {
    condition     = contains([1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288, 3653], var.log_days)
    error_message = "log_days must be one of the times that CloudWatch has: 1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731 and so on."
  }
}

variable "collect_logs" {
  description = "Whether the pods' logs go to CloudWatch."
  type        = bool
  default     = true
}

variable "monthly_budget_usd" {
  description = "What the account may cost in a month before somebody is told. 0: no budget."
  type        = number
  validation {
    condition     = var.monthly_budget_usd >= 0
    error_message = "monthly_budget_usd must be 0 or more."
  }
}

variable "budget_emails" {
  description = "Who is told at 80 % of the budget, and when the forecast is above it."
  type        = list(string)
  default     = []
  validation {
    condition     = var.monthly_budget_usd == 0 || length(var.budget_emails) > 0
    error_message = "budget_emails must name somebody, or monthly_budget_usd must be 0."
  }
  validation {
    condition     = alltrue([for address in var.budget_emails : can(regex("^[^@ ]+@[^@ ]+\\.[^@ ]+$", address))])
    error_message = "budget_emails must be e-mail addresses."
  }
}
