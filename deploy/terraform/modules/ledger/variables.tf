variable "name" {
  description = "Name of the fleet."
  type        = string
}

variable "kms_key_arn" {
  description = "Key of the table."
  type        = string
}

variable "deletion_protection" {
  description = "Whether AWS refuses to delete the table."
  type        = bool
  default     = true
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
  description = "Service account of the job that copies bills."
  type        = string
}
