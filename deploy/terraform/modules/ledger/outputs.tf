output "table" {
  description = "Name of the table."
  value       = aws_dynamodb_table.bills.name
}

output "role_arn" {
  description = "Role of the job that copies bills."
  value       = module.archiver.arn
}
