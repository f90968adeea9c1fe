# What the chart's pods may do in AWS. One service account has permissions: the init container fetches models with it, the server keeps
# cached entries with it. The scaler, Redis, TLS and keys need no permission in AWS.

data "aws_partition" "current" {}
data "aws_region" "current" {}

module "server" {
  source          = "../role"
  name            = "${var.name}-server"
  oidc_provider   = var.oidc_provider
  namespace       = var.namespace
  service_account = var.service_account
  policies = { use = jsonencode({
    Version = "2012-10-17"
    Statement = [
      {
        Sid      = "ReadModels" # `safelight fetch` reads the files of its list by their names
        Effect   = "Allow"
        Action   = "s3:GetObject"
        Resource = "${var.models_bucket_arn}/*"
      },
      {
        Sid      = "KeepEntries"
        Effect   = "Allow"
        Action   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject"]
        Resource = "${var.artifacts_bucket_arn}/*"
      },
      {
        Sid      = "ListEntries" # for purges; and without it S3 answers 403 for an object that does not exist, which counts as an outage
        Effect   = "Allow"
        Action   = "s3:ListBucket"
        Resource = var.artifacts_bucket_arn
      },
      {
        Sid       = "UseTheKeyThroughS3"
        Effect    = "Allow"
        Action    = ["kms:Decrypt", "kms:GenerateDataKey"]
        Resource  = var.kms_key_arn
        Condition = { StringEquals = { "kms:ViaService" = "s3.${data.aws_region.current.name}.amazonaws.com" } }
      },
    ]
  }) }
}

# The cluster autoscaler, which is not part of the chart, starts GPU nodes when pods wait for them, and ends these nodes.
module "autoscaler" {
  source          = "../role"
  name            = "${var.name}-autoscaler"
  oidc_provider   = var.oidc_provider
  namespace       = "kube-system"
  service_account = "cluster-autoscaler"
  policies = { use = jsonencode({
    Version = "2012-10-17"
    Statement = [
      {
        Sid    = "Look" # these actions cannot be limited to single resources
        Effect = "Allow"
        Action = [
          "autoscaling:DescribeAutoScalingGroups",
          "autoscaling:DescribeAutoScalingInstances",
          "autoscaling:DescribeLaunchConfigurations",
          "autoscaling:DescribeScalingActivities",
          "autoscaling:DescribeTags",
          "ec2:DescribeImages",
          "ec2:DescribeInstanceTypes",
          "ec2:DescribeLaunchTemplateVersions",
          "ec2:GetInstanceTypesFromInstanceRequirements",
        ]
        Resource = "*"
      },
      {
        Sid      = "LookAtNodeGroups"
        Effect   = "Allow"
        Action   = "eks:DescribeNodegroup"
        Resource = "arn:${data.aws_partition.current.partition}:eks:${data.aws_region.current.name}:*:nodegroup/${var.cluster_name}/*"
      },
      {
        Sid       = "ScaleThisCluster"
        Effect    = "Allow"
        Action    = ["autoscaling:SetDesiredCapacity", "autoscaling:TerminateInstanceInAutoScalingGroup"]
        Resource  = "*"
        Condition = { StringEquals = { "aws:ResourceTag/k8s.io/cluster-autoscaler/${var.cluster_name}" = "owned" } }
      },
    ]
  }) }
}
