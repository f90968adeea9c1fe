# Logs of the pods, and an alarm before the month's money is spent. Metrics, alerts and dashboards are Prometheus's and
# Grafana's: docs/operations/watching.md.

data "aws_partition" "current" {}

resource "aws_cloudwatch_log_group" "pods" {
  #checkov:skip=CKV_AWS_338: the operator decides how long the server's logs are kept (log_days)
  name              = "/aws/containerinsights/${var.cluster_name}/application" # the log group that the add-on writes to
  retention_in_days = var.log_days
  kms_key_id        = var.kms_key_arn
}

module "agent_role" {
  source              = "../role"
  name                = "${var.name}-logs"
  oidc_provider       = var.oidc_provider
  namespace           = "amazon-cloudwatch"
  service_account     = "cloudwatch-agent"
  managed_policy_arns = ["arn:${data.aws_partition.current.partition}:iam::aws:policy/CloudWatchAgentServerPolicy"]
}

# The add-on that collects logs. It reports metrics of containers too, which CloudWatch charges for.
resource "aws_eks_addon" "agent" {
  count                    = var.collect_logs ? 1 : 0
  cluster_name             = var.cluster_name
  addon_name               = "amazon-cloudwatch-observability"
  service_account_role_arn = module.agent_role.arn
  depends_on               = [aws_cloudwatch_log_group.pods]
}

# The budget of the whole account: only cost tags that the payer has activated tell fleets apart.
resource "aws_budgets_budget" "month" {
  count        = var.monthly_budget_usd > 0 ? 1 : 0
  name         = var.name
  budget_type  = "COST"
  time_unit    = "MONTHLY"
  limit_amount = tostring(var.monthly_budget_usd)
  limit_unit   = "USD"

  dynamic "notification" {
    for_each = { ACTUAL = 80, FORECASTED = 100 }
    content {
      notification_type          = notification.key
      threshold                  = notification.value
      threshold_type             = "PERCENTAGE"
      comparison_operator        = "GREATER_THAN"
      subscriber_email_addresses = var.budget_emails
    }
  }
}
