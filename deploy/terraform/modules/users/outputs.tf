output "issuer" {
  description = "The server's oidc_issuer."
  value       = "https://${aws_cognito_user_pool.this.endpoint}"
}

output "scopes" {
  description = "What the server's oidc_required and oidc_admin name."
  value = {
    for name in ["generate", "admin"] : name => "scope=${aws_cognito_resource_server.this.identifier}/${name}"
  }
}

output "domain" {
  description = "Beginning of the pool's domain."
  value       = aws_cognito_user_pool_domain.this.domain
}

output "client_ids" {
  description = "Client ids of the applications, which are also their tenants."
  value       = { for name, client in aws_cognito_user_pool_client.application : name => client.id }
}

output "user_pool_id" {
  description = "The user pool."
  value       = aws_cognito_user_pool.this.id
}
