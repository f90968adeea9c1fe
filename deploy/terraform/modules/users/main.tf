# Who may call, for fleets whose callers have no API keys: a user pool whose access tokens the server checks
# (docs/operations/keys.md). Each application gets tokens by its client id and its secret (OAuth 2.0 client credentials), and is a
# tenant. The server needs no permission for it: the pool's keys are public.

data "aws_caller_identity" "current" {}

resource "aws_cognito_user_pool" "this" {
  name                = var.name
  deletion_protection = "ACTIVE" # callers' secrets would be lost with it
  mfa_configuration   = "ON"

  # Nobody signs up by himself. People are not needed: applications call.
  admin_create_user_config { allow_admin_create_user_only = true }
  software_token_mfa_configuration { enabled = true }
  username_configuration { case_sensitive = false }
  password_policy {
    minimum_length                   = 16
    require_lowercase                = true
    require_numbers                  = true
    require_symbols                  = true
    require_uppercase                = true
    temporary_password_validity_days = 1
  }
}

# Where applications get their tokens. It is on the internet: clients are outside of the VPC.
resource "aws_cognito_user_pool_domain" "this" {
  domain       = "${var.name}-${data.aws_caller_identity.current.account_id}"
  user_pool_id = aws_cognito_user_pool.this.id
}

resource "aws_cognito_resource_server" "this" {
  identifier   = "safelight"
  name         = var.name
  user_pool_id = aws_cognito_user_pool.this.id

  scope {
    scope_name        = "generate"
    scope_description = "Generate pictures"
  }
  scope {
    scope_name        = "admin"
    scope_description = "Look into the caches and purge them, of all tenants"
  }
}

resource "aws_cognito_user_pool_client" "application" {
  for_each     = var.applications
  name         = each.key
  user_pool_id = aws_cognito_user_pool.this.id

  generate_secret                      = true
  allowed_oauth_flows_user_pool_client = true
  allowed_oauth_flows                  = ["client_credentials"]
  allowed_oauth_scopes                 = [for scope in each.value : "${aws_cognito_resource_server.this.identifier}/${scope}"]
  supported_identity_providers         = ["COGNITO"]
  explicit_auth_flows                  = [] # no user signs in through it
  prevent_user_existence_errors        = "ENABLED"
  enable_token_revocation              = true
  access_token_validity                = 1
  token_validity_units { access_token = "hours" }
}
