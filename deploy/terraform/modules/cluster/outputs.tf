output "name" {
  description = "Name of the cluster."
  value       = aws_eks_cluster.this.name
}

output "oidc_provider" {
  description = "The OIDC provider: its ARN, and its issuer without https://."
  value       = { arn = aws_iam_openid_connect_provider.this.arn, issuer = local.issuer }
}
