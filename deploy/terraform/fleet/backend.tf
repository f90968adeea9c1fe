# The state has Redis's token in it: it lies encrypted in a bucket that few may read. Which one, `terraform init` is told:
#   terraform init -backend-config=bucket=BUCKET -backend-config=key=safelight.tfstate -backend-config=region=REGION
terraform {
  backend "s3" {
    encrypt      = true
    use_lockfile = true
  }
}
