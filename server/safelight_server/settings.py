"""Every setting, declared once: type, default, unit in the name, bounds and meaning.

Environment variables are `SAFELIGHT_<NAME>`; an empty variable counts as unset.
Command-line options and `docs/operations/settings.md` are derived from this module.
Nothing else reads the environment. All bad values are reported at once.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings import SettingsError as UnreadableSettingError

PREFIX = "SAFELIGHT_"
Seconds = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(gt=0)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SettingsError(Exception):
    """The settings are invalid; the message lists every fault."""


class Settings(BaseSettings):
    """The settings that an operator can choose."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="Address to bind. Beyond loopback TLS and keys are needed, or insecure.")
    port: int = Field(8421, ge=0, le=65535, description="Port to bind; 0: a free one.")
    http_port: int = Field(
        0, ge=0, le=65535, description="Port of HTTP on `host`: the OpenAI-compatible API (docs/http.md). 0: off."
    )
    http_max_connections: int = Field(
        1024, gt=0, le=65_536, description="HTTP connections that may be open; one more is closed at once."
    )
    http_cors_origins: str = Field(
        "", description="Origins whose pages may call HTTP, separated by commas: https://HOST, or * for all."
    )
    probe_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="Port with only the gRPC health service, without TLS, on `host`: for probes. 0: off.",
    )
    insecure: bool = Field(False, description="Allow a bind beyond loopback without TLS or without keys.")
    tls_cert_file: Path | None = Field(
        None, description="PEM chain of the server, read again when it changes; with tls_key_file."
    )
    tls_key_file: Path | None = Field(None, description="PEM key of the server.")
    tls_client_ca_file: Path | None = Field(
        None,
        description="PEM of the authorities that sign the certificates of clients (mTLS). None: clients need none.",
    )
    api_key_file: Path | None = Field(None, description="Keys of the callers (docs/operations/keys.md). None: no keys.")
    oidc_issuer: str = Field(
        "",
        description="OpenID provider whose tokens (JWT) callers may send instead of keys (docs/operations/keys.md):"
        " its URL as in their claim `iss`. Empty: no tokens.",
    )
    oidc_audience: str = Field(
        "",
        description="Audiences of tokens, separated by commas: one must be in `aud`, or in `client_id` where there is"
        " no `aud` (Cognito). Empty: any, which needs oidc_required.",
    )
    oidc_required: str = Field(
        "", description="What each token needs, as CLAIM=VALUE: scope=safelight/generate. Empty: nothing."
    )
    oidc_admin: str = Field(
        "",
        description="What administrators' tokens have, as CLAIM=VALUE: cognito:groups=admins. Empty: no token is one.",
    )
    oidc_tenant_claim: str = Field(
        "", description="Claim that names the tenant. Empty: the application, by `client_id`, `azp`, `appid` or `cid`."
    )
    quota_file: Path | None = Field(
        None, description="Rates of requests and of compute, by tenant (docs/operations/quotas.md). None: no limits."
    )
    price_file: Path | None = Field(
        None,
        description="Prices of machines, for `Usage.cost` (docs/operations/cost.md); with instance_type. None: off.",
    )
    instance_type: str = Field("", description="Which machine of price_file this is.")

    models_dir: Path = Field(Path("models"), description="Folder with repository/ and pipelines/.")
    adapters_dir: Path | None = Field(
        None,
        description="Folder of adapters (LoRA), watched for changes (docs/adapters.md). None: models_dir/adapters.",
    )
    max_adapter_bytes: Count = Field(
        1 << 30, description="Bytes of adapters' weights in memory, and of the file of an adapter."
    )
    default_model: str = Field(
        "",
        description="Model of requests that name none. Empty: the first by name that makes pictures from text, or else"
        " the first.",
    )
    require_all_models: bool = Field(
        False, description="Do not start if a model cannot be served. False: leave it out, log why, serve the others."
    )
    runtime: Literal["onnx", "torch", "triton", "simulated"] = Field("onnx", description="What executes the models.")
    num_instances: int = Field(
        0, ge=0, le=256, description="Calls that run at once. 0: one for each core, or (torch) for each GPU."
    )
    torch_device: str = Field(
        "auto", description="Torch: auto (all GPUs, or else the CPU), cpu, or GPUs separated by commas: cuda:0,cuda:1."
    )
    torch_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="Torch: of weights and arithmetic."
    )
    torch_batch_tolerance: float | None = Field(
        None,
        ge=0,
        le=0.1,
        description="Torch: how far a row may be from what it is alone, by its batch, relative to the largest value of "
        "a network's result. 0: bit-equal, which mostly means batches of one. None: 1e-5 with float32, 0.01 with "
        "float16, 0.05 with bfloat16.",
    )
    simulated_base_ms: float = Field(20.0, ge=0, allow_inf_nan=False, description="Simulated: cost of a denoiser call.")
    simulated_row_ms: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="Simulated: added cost of each batch row."
    )

    triton_url: str = Field(
        "127.0.0.1:8001",
        description="Triton: HOST:PORT of its gRPC; several servers, separated by commas, share the work.",
    )
    triton_shared_memory: Literal["auto", "on", "off"] = Field(
        "auto", description="Triton: tensors through shared memory; auto: with servers on this host that support it."
    )
    triton_instances: int = Field(
        1,
        gt=0,
        le=64,
        description="Triton: calls in flight per server; as many as its denoiser has instances.",
    )
    triton_timeout_floor_s: float = Field(
        2.0,
        ge=0.05,
        description="Triton: a call fails after ten times its measured duration, but not before this; also the limit "
        "of every readiness check.",
    )
    triton_start_s: Seconds = Field(60.0, description="Triton: how long the start waits for the first server.")
    runtime_wait_s: Seconds = Field(
        60.0, description="With no live instance: how long a generation without a deadline waits for one."
    )
    runtime_grace_s: Seconds = Field(
        5.0, description="With no live instance: how long new requests are accepted and health says SERVING."
    )

    max_running_outputs: int = Field(
        64, gt=0, le=65_536, description="Outputs that take steps at once; each holds its latents."
    )
    max_request_rows: Count = Field(
        131_072, description="Denoiser rows that one request may cost: outputs x steps, x 2 with guidance."
    )
    max_waiting_outputs: Count = Field(
        256,
        description="Outputs that may wait in class INTERACTIVE, and in STANDARD; four times as many in BATCH. "
        "A tenant alone fills at most two thirds of a class.",
    )
    max_waiting_per_caller: Count = Field(128, description="Outputs of one caller that may wait.")
    max_prompt_chars: int = Field(
        2000, gt=0, le=1_000_000, description="Longest prompt that is accepted, in characters."
    )
    image_ttl_s: float = Field(
        3600.0, gt=0, description="How long an uploaded picture is kept after it was sent or used for the last time."
    )
    max_image_bytes: int = Field(16 << 20, gt=0, le=256 << 20, description="Largest file that may be uploaded.")
    max_image_pixels: int = Field(
        32 << 20,
        gt=0,
        le=1 << 28,
        description="Most pixels of an uploaded picture; decoding takes 8 bytes for each.",
    )
    max_images_bytes_per_tenant: Count = Field(
        64 << 20, description="Bytes of uploaded pictures that a replica keeps of one tenant; the oldest are dropped."
    )
    class_wait_s: Mapping[Literal["interactive", "standard", "batch"], PositiveSeconds] = Field(
        {"interactive": 5.0, "standard": 60.0, "batch": 600.0},
        description="How long the queue of a class may take, in seconds, as JSON. Beyond it requests with a quality "
        "floor are degraded (docs/operations/degradation.md). {}: never.",
    )
    preview_share: float = Field(0.1, ge=0, le=0.5, description="Share of compute that previews may take from steps.")

    watcher_stall_s: Seconds = Field(30.0, description="A stream whose client reads no event for this long is ended.")
    max_streams_per_caller: Count = Field(1024, description="Streams that one caller may have open.")
    max_connections: Count = Field(4096, description="Connections that are open at once; more are not accepted.")
    request_wait_s: float = Field(
        10.0, gt=0, description="How long an opened call may take to send its request, or the next one of a stream."
    )
    max_keyless_streams_per_address: Count = Field(
        64,
        le=1024,
        description="Streams of health and reflection, which need no key, of one client address, or of one IPv6 "
        "network of 64 bits.",
    )
    max_watchers: Count = Field(64, description="Streams that may watch one generation.")
    chunk_bytes: int = Field(
        256 * 1024, ge=1024, le=1 << 20, description="Bytes of a picture in one message of a stream."
    )
    resume_grace_s: Seconds = Field(
        30.0, description="How long a generation without a stream can be resumed, by default."
    )
    max_resume_grace_s: Seconds = Field(600.0, description="Longest resume grace that a request may set.")
    idempotency_ttl_s: Seconds = Field(
        600.0, description="How long a request_id is remembered after its generation has ended."
    )
    result_ttl_s: Seconds = Field(300.0, description="How long a finished generation can be watched again.")
    max_lost: Count = Field(
        1024,
        description="Generations without a stream kept to be resumed; beyond that the tenant with most loses one.",
    )
    max_results: Count = Field(
        10_000,
        description="Finished generations kept to be watched again; beyond that the tenant with most loses one.",
    )
    max_results_bytes: Count = Field(
        256 << 20,
        description="Bytes of finished generations that no stream watches; beyond that the tenant with most loses one.",
    )
    max_unread_bytes: Count = Field(
        256 << 20,
        description="Bytes of running and watched generations and unread messages; beyond that slow streams are ended.",
    )
    drain_grace_s: Seconds = Field(30.0, description="How long generations may finish and be delivered after SIGTERM.")
    spot_notice: Literal["off", "aws"] = Field(
        "off",
        description="aws: drain at the metadata service's notice of an interruption (docs/operations/spot.md).",
    )
    spot_notice_url: str = Field("http://169.254.169.254", description="URL of that metadata service (IMDSv2).")

    redis_url: SecretStr | None = Field(
        None,
        description="Redis that the replicas share, such as redis://127.0.0.1:6379/0. None: there is one replica.",
    )
    redis_timeout_ms: int = Field(
        250, ge=1, le=10_000, description="A call of Redis that takes longer counts as failed."
    )
    lease_ttl_s: float = Field(
        5.0,
        ge=0.3,
        le=300,
        description="Lease time: other replicas take over the work of a replica that is silent for this long.",
    )
    breaker_open_s: float = Field(
        2.0,
        ge=0.1,
        le=600,
        description="How long Redis, disk or S3 is not called after three failures in a row; then comes a trial call.",
    )
    cache_key_file: Path | None = Field(
        None, description="Keys that encrypt cached data (docs/operations/cache-storage.md). None: memory only."
    )
    cache_ttl_s: float = Field(86_400.0, gt=0, description="How long a cached entry may be served.")
    cache_memory_bytes: Count = Field(256 << 20, description="Bytes of cached entries in memory.")
    cache_redis: bool = Field(
        True, description="Cached entries in Redis too, if redis_url is set; false then needs cache_s3_url."
    )
    cache_disk_dir: Path | None = Field(None, description="Folder of cached entries, for this process only. None: off.")
    cache_disk_bytes: Count = Field(8 << 30, description="Bytes of cached entries in that folder.")
    cache_s3_url: str = Field(
        "",
        description="Bucket for entries that memory and disk evict: s3://BUCKET/PREFIX, then ? and, with & between, "
        "endpoint_url, region, credentials_file, timeout_ms (docs/operations/cache-storage.md).",
    )
    cache_pools: Mapping[str, tuple[str, ...]] = Field(
        {}, description='Tenants that share cached data, by pool, as JSON: {"studio": ["ann", "bob"]}.'
    )
    cache_similar_items: Count = Field(100_000, description="Finished pictures that can be found as similar.")
    cache_similar_uses: Count = Field(
        16,
        description="How often one replica serves a picture as similar; then it generates a new one to replace it.",
    )
    cache_latent_bytes: Count = Field(256 << 20, description="Bytes of latents that similar prompts can start from.")
    checkpoint_every_n_steps: Count = Field(
        5, description="With redis_url: steps between checkpoints, and so the most steps that a crash costs an output."
    )

    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="auto: console on a terminal, otherwise JSON."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Lowest level that is logged.")
    metrics_port: int = Field(0, ge=0, le=65535, description="Port of Prometheus metrics. 0: off.")
    metrics_host: str = Field(
        "",
        description="Address of metrics, which have no TLS and no keys. Empty: loopback, or `host` with insecure.",
    )
    quality_sample_ratio: float = Field(
        0.05, ge=0, le=1, description="Share of developed pictures that are measured for the quality metrics."
    )
    quality_judge_dir: Path | None = Field(
        None,
        description="Folder with a judge (`safelight export-judge`), which measures how well sampled pictures agree"
        " with their prompts. None: that is not measured.",
    )
    otlp_endpoint: str = Field(
        "", description="OTLP gRPC endpoint for traces, such as http://127.0.0.1:4317. Empty: off."
    )
    otlp_headers: str = Field(
        "", description="Headers sent with traces, such as a collector's key: NAME=VALUE, separated by commas."
    )
    trace_ratio: float = Field(
        1.0, ge=0, le=1, description="Share of traces recorded of those whose traceparent has no sampled flag."
    )
    trace_requested_per_s: float = Field(
        100.0,
        ge=0,
        allow_inf_nan=False,
        description="Traces per second that known callers may have recorded by the flag of their traceparent.",
    )

    @model_validator(mode="after")
    def _safe(self) -> Self:
        faults = []
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            faults.append("tls_cert_file and tls_key_file go together")
        if (self.price_file is None) != (not self.instance_type):
            faults.append("price_file and instance_type go together")
        if not is_loopback(self.host) and not self.insecure:
            if self.tls_cert_file is None:
                faults.append(f"{self.host} is not loopback: give tls_cert_file and tls_key_file, or insecure")
            if not self.requires_credentials:
                faults.append(f"{self.host} is not loopback: give api_key_file or oidc_issuer, or insecure")
        faults += self._oidc_faults()
        if self.tls_client_ca_file is not None and self.tls_cert_file is None:
            faults.append("tls_client_ca_file needs tls_cert_file and tls_key_file")
        if self.http_port and self.host.startswith("unix:"):
            faults.append("http_port needs a host that is not a unix socket")
        if self.probe_port and self.host.startswith("unix:"):
            faults.append("probe_port needs a host that is not a unix socket")
        if self.probe_port and self.probe_port in (self.port, self.http_port):
            faults.append("probe_port must differ from port and http_port")
        if any(origin != "*" and not _is_origin(origin) for origin in self.cors_origins):
            faults.append("http_cors_origins must be http[s]://HOST[:PORT] or *, separated by commas")
        if self.runtime == "triton" and not self.triton_urls:
            faults.append("triton_url must name at least one server")
        if len(set(self.triton_urls)) < len(self.triton_urls):
            faults.append("triton_url names a server twice")
        if self.otlp_endpoint and not _is_url(self.otlp_endpoint):
            faults.append("otlp_endpoint must be http://HOST:PORT or https://HOST:PORT")
        if any(not name or not there for name, there, _ in self._otlp_headers()):
            faults.append("otlp_headers must be NAME=VALUE, separated by commas")
        if not _is_url(self.spot_notice_url):
            faults.append("spot_notice_url must be http://HOST or https://HOST")
        if self.resume_grace_s > self.max_resume_grace_s:
            faults.append("resume_grace_s is above max_resume_grace_s")
        if self.max_images_bytes_per_tenant < self.max_image_bytes:
            faults.append("max_images_bytes_per_tenant is below max_image_bytes")
        if self.redis_url is not None and not self.cache_redis and not self.cache_s3_url:
            faults.append("redis_url with cache_redis=false needs cache_s3_url: replicas need a shared store")
        if self.cache_key_file is None:
            lasting = {
                "redis_url": self.redis_url,
                "cache_disk_dir": self.cache_disk_dir,
                "cache_s3_url": self.cache_s3_url,
            }
            faults += [
                f"{name} needs cache_key_file: stored data is encrypted" for name, given in lasting.items() if given
            ]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _oidc_faults(self) -> list[str]:
        """What is wrong with the settings of the OpenID provider."""
        named = ("oidc_audience", "oidc_required", "oidc_admin", "oidc_tenant_claim")
        if not self.oidc_issuer:
            return [f"{name} needs oidc_issuer" for name in named if getattr(self, name)]
        faults = []
        url = self.oidc_issuer
        if not _is_url(url) or re.search(r"[?#@\s]", url):
            faults.append("oidc_issuer must be https://HOST[/PATH]")
        elif url.startswith("http://") and not self.insecure and not is_loopback(urlsplit(url).hostname or ""):
            faults.append("oidc_issuer must have https, or be on loopback, or give insecure")
        if not self.oidc_audience and not self.oidc_required:
            faults.append(
                "oidc_issuer needs oidc_audience or oidc_required: without both, tokens of the provider for any other"
                " service would be accepted"
            )
        if not all(self.oidc_audiences) and self.oidc_audience:
            faults.append("oidc_audience must be texts separated by commas")
        for name in ("oidc_required", "oidc_admin"):
            if (text := getattr(self, name)) and not re.fullmatch(r"[^=\s]+=\S.*", text):
                faults.append(f"{name} must be CLAIM=VALUE")
        return faults

    @property
    def requires_credentials(self) -> bool:
        """Whether callers need a key or a token."""
        return self.api_key_file is not None or bool(self.oidc_issuer)

    @property
    def oidc_audiences(self) -> frozenset[str]:
        """The audiences of `oidc_audience`."""
        return frozenset(text.strip() for text in self.oidc_audience.split(",")) if self.oidc_audience else frozenset()

    @property
    def triton_urls(self) -> tuple[str, ...]:
        """The servers of `triton_url`."""
        return tuple(url.strip() for url in self.triton_url.split(",") if url.strip())

    @property
    def cors_origins(self) -> tuple[str, ...]:
        """The origins of `http_cors_origins`."""
        return tuple(origin.strip() for origin in self.http_cors_origins.split(",") if origin.strip())

    @property
    def otlp_header_pairs(self) -> dict[str, str]:
        """The headers of `otlp_headers`, names in lower case as gRPC requires."""
        return {name: value for name, _, value in self._otlp_headers()}

    def _otlp_headers(self) -> list[tuple[str, str, str]]:
        parts = [part.partition("=") for part in self.otlp_headers.split(",") if part.strip()]
        return [(name.strip().lower(), sign, value.strip()) for name, sign, value in parts]


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return text.startswith(("http://", "https://")) and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _is_origin(text: str) -> bool:
    """Whether a text is an origin as browsers send it: a scheme, a host and perhaps a port."""
    return _is_url(text) and text == text.lower() and not re.search(r"[/?#@*]", text.partition("://")[2])


REMOVED = {
    "triton_timeout_factor": "it is always 10",
    "triton_probe_max_s": "it is always 0.25 s",
    "max_parked_outputs": "it is 256, or four times max_running_outputs where that is more",
    "max_waiting_interactive": "use max_waiting_outputs",
    "max_waiting_standard": "use max_waiting_outputs",
    "max_waiting_batch": "it is four times max_waiting_outputs",
    "max_streams_per_connection": "it is always 2048",
    "max_keyless_streams": "it is always 1024",
    "breaker_failures": "it is always 3",
    "cache_disk_timeout_ms": "it is always 1000 ms",
    "cache_s3_endpoint": "use ?endpoint_url=... in cache_s3_url",
    "cache_s3_region": "use ?region=... in cache_s3_url",
    "cache_s3_credentials_file": "use ?credentials_file=... in cache_s3_url",
    "cache_s3_timeout_ms": "use ?timeout_ms=... in cache_s3_url",
    "cache_latent_items": "it is always 10,000",
}
"""Settings of earlier versions and what replaces them. They are refused, since a variable without effect would
surprise its operator."""


def load(**given: object) -> Settings:
    """The settings from the environment, overridden by those that are `given`.

    Raises:
        SettingsError: a setting is invalid; the message lists all faults.
    """
    gone = [f"{name} is gone: {what}" for name, what in REMOVED.items() if os.environ.get(PREFIX + name.upper())]
    if gone:
        raise SettingsError("\n".join(gone))
    try:
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return Settings(**chosen)
    except UnreadableSettingError as error:
        raise SettingsError(str(error)) from None
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc'])) or 'settings'}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        ]
        raise SettingsError("\n".join(faults)) from None


def misspelt(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables whose names almost match a setting, with the variable that may be meant. Other variables with the
    prefix are ignored: Kubernetes sets some for every Service."""
    known = [name.upper() for name in Settings.model_fields]
    given = [name.removeprefix(PREFIX) for name in environment if name.startswith(PREFIX)]
    nearest = {name: difflib.get_close_matches(name, known, n=1, cutoff=0.8) for name in given if name not in known}
    return {PREFIX + name: PREFIX + matches[0] for name, matches in nearest.items() if matches}


def is_loopback(host: str) -> bool:
    """Whether an address can be reached only from this machine."""
    if host == "localhost" or host.startswith("unix:"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
