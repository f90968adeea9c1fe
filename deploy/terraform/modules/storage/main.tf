# Images, models, cached entries, and the engines of TensorRT.

data "aws_caller_identity" "current" {}
data "aws_partition" "current" {}

locals {
  # Names of buckets are global: the account's id makes them unique.
  buckets = {
    models    = "${var.name}-models-${data.aws_caller_identity.current.account_id}"
    artifacts = "${var.name}-artifacts-${data.aws_caller_identity.current.account_id}"
  }
}

resource "aws_ecr_repository" "this" {
  for_each             = var.images
  name                 = "${var.name}/${each.value}"
  image_tag_mutability = "IMMUTABLE"

  image_scanning_configuration { scan_on_push = true }

  encryption_configuration {
    encryption_type = "KMS"
    kms_key         = var.kms_key_arn
  }
}

# The chart names images by digest, so only images without a tag are deleted automatically.
resource "aws_ecr_lifecycle_policy" "this" {
  for_each   = aws_ecr_repository.this
  repository = each.value.name
  policy = jsonencode({
    rules = [{
      rulePriority = 1
      description  = "pushes that were not finished or lost their tag"
      selection    = { tagStatus = "untagged", countType = "sinceImagePushed", countUnit = "days", countNumber = 30 }
      action       = { type = "expire" }
    }]
  })
}

resource "aws_s3_bucket" "this" {
  #checkov:skip=CKV_AWS_18: reads are recorded in CloudTrail where the account has it; entries are sealed and named by HMACs
  #checkov:skip=CKV_AWS_144: models are in the registry that they came from, cached entries can be computed again
  #checkov:skip=CKV_AWS_21: models have versions; no version of an artifact may stay, because a purge has to delete it
  #checkov:skip=CKV2_AWS_62: nothing waits for events of these buckets
  #checkov:skip=CKV2_AWS_6: both buckets have a public access block, below; checkov finds it for one of the two, test-cloud asks S3
  #checkov:skip=CKV_AWS_145: both buckets are encrypted with the KMS key, below; checkov finds it for one of the two
  for_each      = local.buckets
  bucket        = each.value
  force_destroy = false # a bucket that is not empty is not deleted

  lifecycle {
    prevent_destroy = true
  }
}

resource "aws_s3_bucket_ownership_controls" "this" {
  for_each = aws_s3_bucket.this
  bucket   = each.value.id
  rule { object_ownership = "BucketOwnerEnforced" }
}

resource "aws_s3_bucket_public_access_block" "this" {
  for_each                = aws_s3_bucket.this
  bucket                  = each.value.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_server_side_encryption_configuration" "this" {
  for_each = aws_s3_bucket.this
  bucket   = each.value.id
  rule {
    bucket_key_enabled = true
    apply_server_side_encryption_by_default {
      sse_algorithm     = "aws:kms"
      kms_master_key_id = var.kms_key_arn
    }
  }
}

resource "aws_s3_bucket_policy" "this" {
  for_each = aws_s3_bucket.this
  bucket   = each.value.id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Sid       = "OnlyWithTls"
      Effect    = "Deny"
      Principal = "*"
      Action    = "s3:*"
      Resource  = [each.value.arn, "${each.value.arn}/*"]
      Condition = { Bool = { "aws:SecureTransport" = "false" } }
    }]
  })
  depends_on = [aws_s3_bucket_public_access_block.this]
}

resource "aws_s3_bucket_versioning" "models" {
  bucket = aws_s3_bucket.this["models"].id
  versioning_configuration { status = "Enabled" }
}

# Models are read when a pod starts. S3 finds out by itself which models are no longer read.
resource "aws_s3_bucket_lifecycle_configuration" "models" {
  bucket = aws_s3_bucket.this["models"].id

  rule {
    id     = "tiers"
    status = "Enabled"
    filter { prefix = "" }
    transition {
      days          = 30
      storage_class = "INTELLIGENT_TIERING"
    }
    noncurrent_version_transition {
      noncurrent_days = 30
      storage_class   = "GLACIER_IR"
    }
    noncurrent_version_expiration { noncurrent_days = 365 }
    abort_incomplete_multipart_upload { days_after_initiation = 7 }
  }

  depends_on = [aws_s3_bucket_versioning.models]
}

# The server does not delete expired entries: this rule does, a day after the last replica may serve them.
resource "aws_s3_bucket_lifecycle_configuration" "artifacts" {
  bucket = aws_s3_bucket.this["artifacts"].id

  rule {
    id     = "tiers"
    status = "Enabled"
    filter { prefix = "" }
    dynamic "transition" {
      for_each = var.cache_days >= 60 ? [30] : [] # objects that stay there for less than 30 days cost more, not less
      content {
        days          = transition.value
        storage_class = "STANDARD_IA"
      }
    }
    expiration { days = var.cache_days + 1 }
    abort_incomplete_multipart_upload { days_after_initiation = 1 }
  }
}

# TensorRT's engines (the chart's triton.enginesClaim): built by the first pod of a kind, read by all others.
resource "aws_efs_file_system" "engines" {
  #checkov:skip=CKV2_AWS_18: engines are built again in minutes; a backup would cost more
  creation_token = "${var.name}-engines"
  encrypted      = true
  kms_key_id     = var.kms_key_arn
  tags           = { Name = "${var.name}-engines" }
}

resource "aws_efs_access_point" "engines" {
  file_system_id = aws_efs_file_system.engines.id
  posix_user {
    uid = 10001 # the user of both containers
    gid = 10001
  }
  root_directory {
    path = "/engines"
    creation_info {
      owner_uid   = 10001
      owner_gid   = 10001
      permissions = "0750"
    }
  }
  tags = { Name = "${var.name}-engines" }
}

# The file system is mounted over TLS, through a mount target of this VPC, and only the folder of the access point.
resource "aws_efs_file_system_policy" "engines" {
  file_system_id = aws_efs_file_system.engines.id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Sid       = "NodesOfThisVpc"
      Effect    = "Allow"
      Principal = { AWS = "*" }
      Action    = ["elasticfilesystem:ClientMount", "elasticfilesystem:ClientWrite"]
      Resource  = aws_efs_file_system.engines.arn
      Condition = {
        Bool = {
          "aws:SecureTransport"                      = "true"
          "elasticfilesystem:AccessedViaMountTarget" = "true"
        }
        StringEquals = { "elasticfilesystem:AccessPointArn" = aws_efs_access_point.engines.arn }
      }
    }]
  })
}

resource "aws_security_group" "engines" {
  name        = "${var.name}-engines"
  description = "NFS from this VPC"
  vpc_id      = var.vpc_id
  tags        = { Name = "${var.name}-engines" }
}

resource "aws_vpc_security_group_ingress_rule" "engines" {
  security_group_id = aws_security_group.engines.id
  description       = "NFS from this VPC"
  cidr_ipv4         = var.cidr
  ip_protocol       = "tcp"
  from_port         = 2049
  to_port           = 2049
}

resource "aws_efs_mount_target" "engines" {
  for_each        = var.subnet_ids
  file_system_id  = aws_efs_file_system.engines.id
  subnet_id       = each.value
  security_groups = [aws_security_group.engines.id]
}
