variable "name" {
  description = "Name of the fleet."
  type        = string
}

variable "cluster_name" {
  description = "Name of the cluster."
  type        = string
}

variable "oidc_provider" {
  description = "The cluster's OIDC provider: its ARN, and its issuer without https://."
  type        = object({ arn = string, issuer = string })
}

variable "namespace" {
  description = "Namespace of the chart's release."
  type        = string
}

variable "service_account" {
  description = "The chart's service account."
  type        = string
}

variable "models_bucket_arn" {
  description = "Bucket from which models are read."
  type        = string
}

variable "artifacts_bucket_arn" {
  description = "Bucket of cached entries."
  type        = string
}

variable "kms_key_arn" {
  description = "Key of both buckets."
  type        = string
}
