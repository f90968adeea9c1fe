variable "name" {
  description = "Name of the fleet."
  type        = string
}

variable "cidr" {
  description = "Addresses of the VPC. Each zone gets an eighth."
  type        = string
}

variable "zones" {
  description = "Availability zones, in an order that stays: a subnet's addresses follow from its place."
  type        = list(string)
}

variable "endpoints" {
  description = "Services of AWS that are reached without an internet, beside S3 and DynamoDB."
  type        = list(string)
}

variable "dynamodb" {
  description = "Whether DynamoDB is reached too."
  type        = bool
  default     = false
}

variable "kms_key_arn" {
  description = "Key of the flow logs."
  type        = string
}

variable "log_days" {
  description = "How long flow logs are kept."
  type        = number
}
