output "role_arns" {
  description = "Roles by who takes them: server, autoscaler."
  value       = { server = module.server.arn, autoscaler = module.autoscaler.arn }
}
