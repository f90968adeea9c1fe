# Where bills are kept after Redis has dropped them: `safelight bills archive` copies them there, and `safelight bills --table`
# reads them (docs/operations/billing.md). One table has the bills of several deployments.

data "aws_region" "current" {}

resource "aws_dynamodb_table" "bills" {
  name                        = "${var.name}-bills"
  billing_mode                = "PAY_PER_REQUEST" # written in bursts, by a job
  hash_key                    = "pk"
  range_key                   = "sk"
  deletion_protection_enabled = var.deletion_protection

  # Other attributes are in no key, and there is no index: every read is of one partition.
  attribute {
    name = "pk"
    type = "S"
  }
  attribute {
    name = "sk"
    type = "S"
  }

  point_in_time_recovery { enabled = true }

  server_side_encryption {
    enabled     = true
    kms_key_arn = var.kms_key_arn
  }

  lifecycle {
    prevent_destroy = true
  }
}

# The job that copies bills. It may neither read bills nor delete them: what is in the table is for others to read.
module "archiver" {
  source          = "../role"
  name            = "${var.name}-archiver"
  oidc_provider   = var.oidc_provider
  namespace       = var.namespace
  service_account = var.service_account
  policies = { use = jsonencode({
    Version = "2012-10-17"
    Statement = [
      {
        Sid      = "CopyBills"
        Effect   = "Allow"
        Action   = ["dynamodb:BatchWriteItem", "dynamodb:GetItem", "dynamodb:PutItem"]
        Resource = aws_dynamodb_table.bills.arn
      },
      {
        Sid       = "UseTheKeyThroughDynamoDB"
        Effect    = "Allow"
        Action    = ["kms:Decrypt", "kms:DescribeKey"]
        Resource  = var.kms_key_arn
        Condition = { StringEquals = { "kms:ViaService" = "dynamodb.${data.aws_region.current.name}.amazonaws.com" } }
      },
    ]
  }) }
}
