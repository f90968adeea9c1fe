variable "name" {
  description = "Name of the fleet."
  type        = string
}

variable "vpc_id" {
  description = "VPC in which the file system is mounted."
  type        = string
}

variable "cidr" {
  description = "Addresses of that VPC."
  type        = string
}

variable "subnet_ids" {
  description = "Subnets with a mount target, by their zones."
  type        = map(string)
}

variable "kms_key_arn" {
  description = "Key of all that is stored."
  type        = string
}

variable "images" {
  description = "Images that have a repository."
  type        = set(string)
  default     = ["gateway", "triton"]
}

variable "cache_days" {
  description = "How long a cached entry may be served; a day later it is deleted."
  type        = number
}
