# The state contains Redis's token: it is stored encrypted in a bucket that few may read. `terraform init` names the bucket:
#   terraform init -backend-config=bucket=BUCKET -backend-config=key=safelight.tfstate -backend-config=region=REGION
terraform {
  backend "s3" {
    encrypt      = true
    use_lockfile = true
  }
}
