variable "name" {
  description = "Name of the fleet."
  type        = string
}

variable "vpc_id" {
  description = "VPC of the replicas."
  type        = string
}

variable "cidr" {
  description = "Addresses of that VPC."
  type        = string
}

variable "subnet_ids" {
  description = "Subnets by their zones."
  type        = map(string)
}

variable "kms_key_arn" {
  description = "Key of what lies on disk: snapshots."
  type        = string
}

variable "node_type" {
  description = "Machine of each of the two nodes."
  type        = string
}

variable "auth_token" {
  description = "What clients say to be let in."
  type        = string
  sensitive   = true
}
