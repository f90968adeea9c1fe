variable "name" {
  description = "Name of the cluster."
  type        = string
}

variable "kubernetes_version" {
  description = "Version of Kubernetes."
  type        = string
}

variable "subnet_ids" {
  description = "Ids of the private subnets by their zones."
  type        = map(string)
}

variable "public_access_cidrs" {
  description = "From where the cluster's API is reached beside the VPC. Empty: from nowhere."
  type        = list(string)
}

variable "admins" {
  description = "ARNs of roles and users that administer the cluster, beside the one that makes it."
  type        = list(string)
}

variable "addons" {
  description = "Add-ons of EKS."
  type        = list(string)
}

variable "pools" {
  description = "Node groups by their names. Taints are key to value, with the effect NoSchedule."
  type = map(object({
    instance_types = list(string)
    ami_type       = string
    spot           = bool
    min            = number
    max            = number
    disk_gib       = number
    zones          = list(string)
    labels         = map(string)
    taints         = map(string)
  }))
}

variable "kms_key_arn" {
  description = "Key of the cluster's Secrets and logs."
  type        = string
}

variable "log_days" {
  description = "How long the control plane's logs are kept."
  type        = number
}
