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

variable "kms_key_arn" {
  description = "Key of the logs."
  type        = string
}

variable "log_days" {
  description = "How long logs are kept."
  type        = number
}

variable "collect_logs" {
  description = "Whether the add-on that collects the pods' logs is installed."
  type        = bool
}

variable "monthly_budget_usd" {
  description = "What the account may cost in a month. 0: no budget."
  type        = number
}

variable "budget_emails" {
  description = "Who is told at 80 % of it, and when the forecast is above it."
  type        = list(string)
}
