# The Redis that all replicas share: one shard, because scripts use keys of several slots, with a replica in another zone.
#
# ElastiCache writes no append-only file. A failover may lose the last writes, bills among them: docs/operations/replicas.md
# says what then happens.

resource "aws_elasticache_subnet_group" "this" {
  name       = var.name
  subnet_ids = values(var.subnet_ids)
}

resource "aws_elasticache_parameter_group" "this" {
  name        = var.name
  family      = "redis7"
  description = "Leases are evicted last"

  parameter {
    name  = "maxmemory-policy"
    value = "volatile-lru" # docs/operations/cache-storage.md
  }
}

resource "aws_security_group" "this" {
  name        = "${var.name}-redis"
  description = "Redis from this VPC"
  vpc_id      = var.vpc_id
  tags        = { Name = "${var.name}-redis" }
}

resource "aws_vpc_security_group_ingress_rule" "this" {
  security_group_id = aws_security_group.this.id
  description       = "Redis from this VPC"
  cidr_ipv4         = var.cidr
  ip_protocol       = "tcp"
  from_port         = 6379
  to_port           = 6379
}

resource "aws_elasticache_replication_group" "this" {
  replication_group_id       = var.name
  description                = "Leases, journals, bills and cached entries of ${var.name}"
  engine                     = "redis"
  engine_version             = "7.1"
  node_type                  = var.node_type
  port                       = 6379
  num_cache_clusters         = 2
  automatic_failover_enabled = true
  multi_az_enabled           = true
  parameter_group_name       = aws_elasticache_parameter_group.this.name
  subnet_group_name          = aws_elasticache_subnet_group.this.name
  security_group_ids         = [aws_security_group.this.id]

  transit_encryption_enabled = true
  at_rest_encryption_enabled = true
  kms_key_id                 = var.kms_key_arn
  auth_token                 = var.auth_token

  snapshot_retention_limit  = 7
  final_snapshot_identifier = "${var.name}-final" # bills are in it
}
