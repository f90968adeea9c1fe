output "repository_urls" {
  description = "Repositories by their images."
  value       = { for name, repository in aws_ecr_repository.this : name => repository.repository_url }
}

output "buckets" {
  description = "Names and ARNs of the buckets: models, artifacts."
  value       = { for name, bucket in aws_s3_bucket.this : name => { name = bucket.id, arn = bucket.arn } }
}

output "engines" {
  description = "The file system of TensorRT's engines and its access point."
  value       = { file_system_id = aws_efs_file_system.engines.id, access_point_id = aws_efs_access_point.engines.id }
}
