variable "name" {
  description = "Name of the role."
  type        = string
}

variable "oidc_provider" {
  description = "The cluster's OIDC provider: its ARN, and its issuer without https://."
  type        = object({ arn = string, issuer = string })
}

variable "namespace" {
  description = "Namespace of the service account."
  type        = string
}

variable "service_account" {
  description = "Name of the service account."
  type        = string
}

variable "policies" {
  description = "What the role may do: policies as JSON by their names."
  type        = map(string)
  default     = {}
}

variable "managed_policy_arns" {
  description = "Policies of AWS that the role has."
  type        = list(string)
  default     = []
}
