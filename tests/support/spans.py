"""Queries over recorded spans, from OpenTelemetry's in-memory exporter or from Jaeger's query API."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from safelight.v1 import generation_pb2_grpc as stubs

SAMPLED, UNSAMPLED = "01", "00"
GENERATE = "safelight.v1.GenerationService/Generate"
WATCH = "safelight.v1.GenerationService/WatchGeneration"


@dataclass(frozen=True)
class Seen:
    """One recorded span; times in nanoseconds, `links` are ids of spans."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start: int
    end: int
    attributes: dict[str, Any]
    links: frozenset[str]
    error: str
    service: str = ""


@dataclass
class Spans:
    """A set of spans, with questions about their names, parents and times."""

    all: list[Seen] = field(default_factory=list)

    def named(self, name: str) -> list[Seen]:
        """The spans of that name, by start time."""
        return sorted((span for span in self.all if span.name == name), key=lambda span: span.start)

    def one(self, name: str) -> Seen:
        """The span of that name, of which there must be exactly one."""
        [span] = self.named(name)
        return span

    def of(self, trace_id: str) -> Spans:
        """The spans of one trace."""
        return Spans([span for span in self.all if span.trace_id == trace_id])

    def parent(self, span: Seen) -> Seen | None:
        """The parent of a span; None where it is not in this set."""
        return next((other for other in self.all if other.span_id == span.parent_id), None)

    def path(self, span: Seen) -> str:
        """The names from the root down to a span, as `a > b > c`."""
        above = self.parent(span)
        return span.name if above is None else f"{self.path(above)} > {span.name}"

    def leaves(self) -> list[Seen]:
        """The spans without children."""
        parents = {span.parent_id for span in self.all}
        return [span for span in self.all if span.span_id not in parents]

    def coverage(self, whole: Seen) -> float:
        """The share (0 to 1) of a span's time that spans without children cover, apart from itself."""
        covered, reached = 0, whole.start
        for leaf in sorted(self.leaves(), key=lambda span: span.start):
            if leaf.span_id != whole.span_id:
                begin, end = max(leaf.start, reached), min(leaf.end, whole.end)
                covered += max(0, end - begin)
                reached = max(reached, end)
        return covered / (whole.end - whole.start)


def from_sdk(spans: Iterable[ReadableSpan]) -> Spans:
    """Spans of an InMemorySpanExporter."""
    return Spans([_from_sdk(span) for span in spans])


def from_jaeger(found: dict[str, Any] | None) -> Spans:
    """Spans of one trace as Jaeger's query API returns it; empty for None."""
    if found is None:
        return Spans()
    services = {name: process["serviceName"] for name, process in found["processes"].items()}
    return Spans([_from_jaeger(span, services[span["processID"]]) for span in found["spans"]])


def _from_sdk(span: ReadableSpan) -> Seen:
    assert span.start_time is not None
    assert span.end_time is not None
    return Seen(
        name=span.name,
        trace_id=trace.format_trace_id(span.context.trace_id),
        span_id=trace.format_span_id(span.context.span_id),
        parent_id=trace.format_span_id(span.parent.span_id) if span.parent else "",
        start=span.start_time,
        end=span.end_time,
        attributes=dict(span.attributes or {}),
        links=frozenset(trace.format_span_id(link.context.span_id) for link in span.links),
        error=(span.status.description or "error") if span.status.status_code is trace.StatusCode.ERROR else "",
    )


def _from_jaeger(span: dict[str, Any], service: str) -> Seen:
    tags = {tag["key"]: tag["value"] for tag in span["tags"]}
    parents = [ref["spanID"] for ref in span["references"] if ref["refType"] == "CHILD_OF"]
    return Seen(
        name=span["operationName"],
        trace_id=span["traceID"],
        span_id=span["spanID"],
        parent_id=parents[0] if parents else "",
        start=span["startTime"] * 1000,
        end=(span["startTime"] + span["duration"]) * 1000,
        attributes=tags,
        links=frozenset(ref["spanID"] for ref in span["references"] if ref["refType"] == "FOLLOWS_FROM"),
        error=str(tags.get("otel.status_description", "error")) if tags.get("error") else "",
        service=service,
    )


def traceparent(trace_id: str, flags: str = SAMPLED) -> tuple[tuple[str, str], ...]:
    """Call metadata of a client that traces; `flags` say whether the trace is recorded."""
    return (("traceparent", f"00-{trace_id}-00f067aa0ba902b7-{flags}"),)


async def follow(
    stub: stubs.GenerationServiceStub, requests: Sequence[Any], trace_ids: Sequence[str], flags: str = SAMPLED
):
    """Runs generations at the same time, each in its own trace; returns the events of each."""

    async def one(request: Any, trace_id: str) -> list[Any]:
        call = stub.Generate(request, metadata=traceparent(trace_id, flags))
        return [response.event async for response in call]

    return await asyncio.gather(*(one(*pair) for pair in zip(requests, trace_ids, strict=True)))
