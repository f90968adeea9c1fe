variable "name" {
  description = "Name of the fleet."
  type        = string
}
