variable "name" {
  description = "Name of the fleet."
  type        = string
}

variable "applications" {
  description = "Scopes of each application, by its name."
  type        = map(set(string))
}
