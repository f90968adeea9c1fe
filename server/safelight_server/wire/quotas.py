"""Quotas of tenants as protobuf messages."""

from __future__ import annotations

from collections.abc import Sequence

from safelight.v1 import quotas_pb2 as pb

from safelight_server.domain.quota import BucketView, QuotaView
from safelight_server.wire.times import duration


def quotas_message(quotas: Sequence[QuotaView], next_page_token: str) -> pb.ListQuotasResponse:
    """A page of quotas as the answer to ListQuotas."""
    return pb.ListQuotasResponse(
        quotas=[
            pb.TenantQuota(tenant=view.tenant, requests=_bucket(view.requests), compute_seconds=_bucket(view.compute_s))
            for view in quotas
        ],
        next_page_token=next_page_token,
    )


def _bucket(view: BucketView | None) -> pb.TokenBucket | None:
    if view is None:
        return None
    return pb.TokenBucket(
        per_second=view.per_s,
        burst=view.burst,
        used=view.burst - view.tokens,
        left=view.tokens,
        available_after=duration(view.available_after_s),
        full_after=duration(view.full_after_s),
    )
