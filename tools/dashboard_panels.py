"""The panels of the Grafana dashboards: for each a title, a unit and its queries by legend.

`tools/dashboards.py` makes the files of them (`make generate`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

J = 'job=~"$job"'
RATE = "[$__rate_interval]"
USUAL = f"job:safelight_requests_season:mean{{{J}}}"
OUR_PODS = f"group by (namespace, pod) (safelight_instances{{{J}}} or nv_inference_request_success)"
"""1 for each pod with a Safelight or a Triton. Outside of Kubernetes nothing has the labels, and all GPUs are ours."""
GPU = "{{Hostname}} {{gpu}} {{pod}}"


@dataclass(frozen=True)
class Panel:
    """One graph: title, Grafana's name of its unit, queries by legend, explanation, whether values can be negative."""

    title: str
    unit: str
    queries: Mapping[str, str]
    about: str = ""
    signed: bool = False


Rows = Mapping[str, Sequence[Panel]]


def rate(metric: str, by: str, labels: str = "") -> str:
    """PromQL: the rate of a counter, summed by labels."""
    return f"sum by ({by}) (rate({metric}{{{J}{labels and ', ' + labels}}}{RATE}))"


def quantile(share: float, metric: str, by: str = "") -> str:
    """PromQL: a quantile of a histogram, by labels."""
    labels = f"{by}, le" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) (rate({metric}_bucket{{{J}}}{RATE})))"


def quantiles(metric: str, by: str = "") -> dict[str, str]:
    """PromQL: median and p99 of a histogram, by a label."""
    legend = f"{{{{{by}}}}} " if by else ""
    return {f"{legend}p50": quantile(0.5, metric, by), f"{legend}p99": quantile(0.99, metric, by)}


def mean(metric: str, by: str) -> str:
    """PromQL: the mean of a histogram, by labels."""
    return f"{rate(metric + '_sum', by)} / {rate(metric + '_count', by)}"


def ours(metric: str) -> str:
    """A metric of dcgm-exporter, of the GPUs that pods of ours have."""
    return f"({metric} * on (namespace, pod) group_left () {OUR_PODS})"


SERVICE: Rows = {
    "Objectives": [
        Panel(
            "Availability: share of failed requests",
            "percentunit",
            {
                "1 hour": f"job:safelight_availability_errors:ratio_rate1h{{{J}}}",
                "3 days": f"job:safelight_availability_errors:ratio_rate3d{{{J}}}",
            },
            "The objective is 0.1 % in 30 days.",
        ),
        Panel(
            "First preview: share beyond 1 s, class INTERACTIVE",
            "percentunit",
            {
                "1 hour": f"job:safelight_first_preview_errors:ratio_rate1h{{{J}}}",
                "3 days": f"job:safelight_first_preview_errors:ratio_rate3d{{{J}}}",
            },
            "The objective is 1 % in 30 days.",
        ),
        Panel(
            "Requests and the same hour of four weeks",
            "reqps",
            {
                "now": f"job:safelight_requests:rate15m{{{J}}}",
                "usual": USUAL,
                "usual + 3 deviations": f"{USUAL} + 3 * job:safelight_requests_season:stddev",
                "usual - 3 deviations": f"{USUAL} - 3 * job:safelight_requests_season:stddev",
            },
        ),
    ],
    "Requests": [
        Panel("Generations that ended", "ops", {"{{status}}": rate("safelight_generations_total", "status")}),
        Panel("Refusals", "ops", {"{{reason}}": rate("safelight_refused_total", "reason") + " > 0"}),
        Panel("HTTP requests", "ops", {"{{route}} {{status}}": rate("safelight_http_requests_total", "route, status")}),
    ],
    "Times": [
        Panel("First preview", "s", quantiles("safelight_first_preview_seconds", "class")),
        Panel("Generation", "s", quantiles("safelight_generation_seconds", "class")),
        Panel(
            "Compute that is accepted and not done",
            "s",
            {"{{instance}}": f"safelight_backlog_seconds{{{J}}}"},
            "A day where no instance of the runtime is live.",
        ),
    ],
    "Queue and streams": [
        Panel("Outputs that wait", "short", {"{{class}}": f"sum by (class) (safelight_waiting_outputs{{{J}}})"}),
        Panel(
            "Outputs with and without a slot",
            "short",
            {
                "running": f"sum(safelight_running_outputs{{{J}}})",
                "parked": f"sum(safelight_parked_outputs{{{J}}})",
            },
        ),
        Panel(
            "Compute asked for",
            "short",
            {"{{class}}": rate("safelight_requested_compute_seconds_total", "class")},
            "Seconds a second: instances that would be busy with it. What the scaler forecasts.",
        ),
        Panel(
            "Given up under load",
            "ops",
            {
                "{{kind}}, {{class}}": f"sum by (kind, class) (rate(safelight_degradations_total{{{J}}}{RATE}))",
            },
            "Requests a second that got less, as their quality floors allow.",
        ),
        Panel("Classes that are late", "short", {"{{class}}": f"max by (class) (safelight_class_late{{{J}}})"}),
        Panel("Open streams", "short", {"{{instance}}": f"safelight_open_streams{{{J}}}"}),
        Panel(
            "Previews",
            "ops",
            {
                "sent": f"sum(rate(safelight_previews_sent_total{{{J}}}{RATE}))",
                "passed over": f"sum(rate(safelight_previews_dropped_total{{{J}}}{RATE}))",
            },
        ),
        Panel("Bytes of previews", "Bps", {"sent": f"sum(rate(safelight_preview_bytes_total{{{J}}}{RATE}))"}),
    ],
    "Processes": [
        Panel("Event loop: lateness", "s", quantiles("safelight_loop_lag_seconds", "instance")),
        Panel("CPU", "short", {"{{instance}}": f"rate(process_cpu_seconds_total{{{J}}}{RATE})"}, "Cores."),
        Panel("Memory", "bytes", {"{{instance}}": f"process_resident_memory_bytes{{{J}}}"}),
        Panel("File descriptors", "percentunit", {"{{instance}}": f"process_open_fds{{{J}}} / process_max_fds{{{J}}}"}),
    ],
}

RUNTIME: Rows = {
    "Runtime, as Safelight sees it": [
        Panel(
            "Instances",
            "short",
            {"live": f"sum(safelight_live_instances{{{J}}})", "in all": f"sum(safelight_instances{{{J}}})"},
        ),
        Panel(
            "Share of instance time that computes",
            "percentunit",
            {
                "{{instance}}": f"sum by (instance) (rate(safelight_compute_seconds_total{{{J}}}{RATE}))"
                f" / sum by (instance) (safelight_instances{{{J}}})"
            },
        ),
        Panel("Rows of a batch, mean", "short", {"{{kind}}": mean("safelight_batch_rows", "kind")}),
        Panel("Calls", "ops", {"{{kind}}": rate("safelight_call_seconds_count", "kind")}),
        Panel("Time of a call", "s", quantiles("safelight_call_seconds", "kind")),
        Panel("Calls that failed", "ops", {"{{kind}} {{fault}}": rate("safelight_failed_calls_total", "kind, fault")}),
        Panel(
            "Time between calls",
            "percentunit",
            {
                "critical path": f"sum(rate(safelight_critical_path_seconds_total{{{J}}}{RATE}))",
                "sampler": f"sum(rate(safelight_sampler_seconds_total{{{J}}}{RATE}))",
            },
            "Seconds a second in which this process holds up the runtime.",
        ),
    ],
    "Triton": [
        Panel("Requests", "ops", {"{{model}}": f"sum by (model) (rate(nv_inference_request_success{RATE}))"}),
        Panel(
            "Requests that failed", "ops", {"{{model}}": f"sum by (model) (rate(nv_inference_request_failure{RATE}))"}
        ),
        Panel(
            "Rows of an execution, mean",
            "short",
            {
                "{{model}}": f"sum by (model) (rate(nv_inference_count{RATE}))"
                f" / sum by (model) (rate(nv_inference_exec_count{RATE}))"
            },
        ),
        Panel(
            "Time in Triton's queue, mean",
            "µs",
            {
                "{{model}}": f"sum by (model) (rate(nv_inference_queue_duration_us{RATE}))"
                f" / sum by (model) (rate(nv_inference_request_success{RATE}))"
            },
        ),
        Panel(
            "Time of computing, mean",
            "µs",
            {
                "{{model}}": f"sum by (model) (rate(nv_inference_compute_infer_duration_us{RATE}))"
                f" / sum by (model) (rate(nv_inference_request_success{RATE}))"
            },
        ),
        Panel("Requests that wait", "short", {"{{model}}": "sum by (model) (nv_inference_pending_request_count)"}),
    ],
}

UTIL, USED, FREE = "DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_DEV_FB_USED", "DCGM_FI_DEV_FB_FREE"
ENERGY, NVLINK = "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", "DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL"
GPUS: Rows = {
    "GPUs of our pods, from dcgm-exporter": [
        Panel(
            "GPU at work",
            "percentunit",
            {GPU: f"{ours(UTIL)} / 100"},
            "Share of the time in which any kernel ran. 1 does not mean that the GPU is used well.",
        ),
        Panel(
            "Tensor cores at work",
            "percentunit",
            {GPU: ours("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE")},
            "Share of the cycles. Only of GPUs of data centres, with the exporter's dcp-metrics-included.csv.",
        ),
        Panel("Memory in use", "percentunit", {GPU: f"{ours(USED)} / ({ours(USED)} + {ours(FREE)})"}),
        Panel("Power", "watt", {GPU: ours("DCGM_FI_DEV_POWER_USAGE")}),
        Panel(
            "Temperature",
            "celsius",
            {
                f"{GPU} chip": ours("DCGM_FI_DEV_GPU_TEMP"),
                f"{GPU} memory": f"{ours('DCGM_FI_DEV_MEMORY_TEMP')} < 1000",
            },
            "A GPU without a sensor in its memory reports a number near 2^63, which is left out.",
        ),
        Panel(
            "NVLink",
            "short",
            {GPU: ours(f"rate({NVLINK}{RATE})")},
            "The exporter documents no unit of this counter: compare GPUs and times. Empty where there is no NVLink.",
        ),
    ],
    "What Safelight makes of them": [
        Panel(
            "Calls run, and GPUs are at work",
            "percentunit",
            {
                "{{pod}} calls": f"sum by (namespace, pod) (rate(safelight_compute_seconds_total{{{J}}}{RATE}))"
                f" / sum by (namespace, pod) (safelight_instances{{{J}}})",
                "{{pod}} GPUs": f"avg by (namespace, pod) ({ours(UTIL)}) / 100",
            },
            "Where calls run all the time and GPUs do not, calls wait for something else: copies, a CPU, the network.",
        ),
        Panel(
            "Energy of a generation that ended OK",
            "joule",
            {
                "all": f"sum(rate({ENERGY}{RATE}) * on (namespace, pod) group_left () {OUR_PODS}) / 1000"
                f' / sum(rate(safelight_generations_total{{{J}, status="OK"}}{RATE}))'
            },
            "Of the GPUs alone, idle or not.",
        ),
    ],
    "Faults": [
        Panel(
            "Last XID",
            "short",
            {GPU: ours("DCGM_FI_DEV_XID_ERRORS")},
            "The number of the last error that the driver reported, 0: none. NVIDIA's list of XIDs has them all.",
        ),
        Panel(
            "Rows of memory replaced",
            "short",
            {
                f"{GPU} uncorrectable": ours("DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS"),
                f"{GPU} correctable": ours("DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS"),
            },
        ),
        Panel(
            "No row left to replace one", "short", {GPU: ours("DCGM_FI_DEV_ROW_REMAP_FAILURE")}, "1: replace the GPU."
        ),
    ],
}

CACHES: Rows = {
    "What they save": [
        Panel("Outputs served by earlier work", "ops", {"{{kind}}": rate("safelight_cache_hits_total", "kind")}),
        Panel("Steps saved", "ops", {"{{kind}}": rate("safelight_cache_steps_saved_total", "kind")}),
        Panel(
            "Compute saved",
            "short",
            {"{{kind}}": rate("safelight_cache_compute_seconds_saved_total", "kind")},
            "Seconds a second: instances that need not be there.",
        ),
        Panel("Lookup of an output", "s", quantiles("safelight_cache_lookup_seconds", "kind")),
        Panel(
            "Not served, not kept",
            "ops",
            {
                "words differ": f"sum(rate(safelight_cache_guard_rejections_total{{{J}}}{RATE}))",
                "not kept": f"sum(rate(safelight_cache_not_kept_total{{{J}}}{RATE}))",
            },
        ),
    ],
    "Tiers": [
        Panel("Lookups", "ops", {"{{tier}} {{outcome}}": rate("safelight_cache_gets_total", "tier, outcome")}),
        Panel(
            "Share found",
            "percentunit",
            {
                "{{tier}}": rate("safelight_cache_gets_total", "tier", 'outcome="hit"')
                + " / "
                + rate("safelight_cache_gets_total", "tier")
            },
        ),
        Panel("Time of a lookup", "s", quantiles("safelight_cache_get_seconds", "tier")),
        Panel("Bytes", "bytes", {"{{tier}} {{instance}}": f"safelight_cache_bytes{{{J}}}"}),
        Panel("Entries", "short", {"{{tier}} {{instance}}": f"safelight_cache_entries{{{J}}}"}),
        Panel("Errors", "ops", {"{{tier}} {{reason}}": rate("safelight_cache_errors_total", "tier, reason")}),
        Panel("Writes dropped", "ops", {"{{tier}}": rate("safelight_cache_moves_dropped_total", "tier")}),
    ],
    "Services": [
        Panel("Calls that failed", "ops", {"{{service}}": rate("safelight_service_failures_total", "service")}),
        Panel("Breakers", "short", {"{{service}} {{instance}}": f"safelight_breaker_state{{{J}}}"}, "2: left alone."),
        Panel("Clock ahead of Redis'", "s", {"{{instance}}": f"safelight_clock_offset_seconds{{{J}}}"}, signed=True),
    ],
}

TENANTS: Rows = {
    "Tenants": [
        Panel("Generations", "ops", {"{{tenant}}": rate("safelight_tenant_generations_total", "tenant")}),
        Panel(
            "Share of generations that end OK",
            "percentunit",
            {
                "{{tenant}}": rate("safelight_tenant_generations_total", "tenant", 'status="OK"')
                + " / "
                + rate("safelight_tenant_generations_total", "tenant")
            },
        ),
        Panel("Refusals", "ops", {"{{tenant}} {{reason}}": rate("safelight_tenant_refused_total", "tenant, reason")}),
        Panel(
            "Compute",
            "short",
            {"{{tenant}}": rate("safelight_tenant_compute_seconds_total", "tenant")},
            "Seconds a second: instances at work for the tenant.",
        ),
        Panel(
            "Share of the compute",
            "percentunit",
            {
                "{{tenant}}": rate("safelight_tenant_compute_seconds_total", "tenant")
                + f" / scalar(sum(rate(safelight_tenant_compute_seconds_total{{{J}}}{RATE})))"
            },
        ),
    ],
}

PRICE = f"max by (currency) (safelight_compute_price{{{J}}})"
COST: Rows = {
    "Cost, where a price is set": [
        Panel(
            "Machines, an hour",
            "short",
            {"{{currency}}": f"sum by (currency) (safelight_machine_price_per_hour{{{J}}})"},
            "What the replicas that run now cost, idle or not.",
        ),
        Panel(
            "Charged, an hour, by tenant",
            "short",
            {
                "{{tenant}}": rate("safelight_tenant_compute_seconds_total", "tenant")
                + f" * 3600 * scalar(max(safelight_compute_price{{{J}}}))"
            },
        ),
        Panel(
            "Charged, an hour, by model",
            "short",
            {
                "{{model}}": rate("safelight_tenant_compute_seconds_total", "model")
                + f" * 3600 * scalar(max(safelight_compute_price{{{J}}}))"
            },
        ),
        Panel(
            "Machines, a thousand pictures",
            "short",
            {
                "all generations": f"1000 * sum(safelight_machine_price_per_hour{{{J}}}) / 3600"
                f' / sum(rate(safelight_generations_total{{{J}, status="OK"}}{RATE}))'
            },
        ),
        Panel(
            "Share of instance time that stands idle",
            "percentunit",
            {
                "idle": f"1 - sum(rate(safelight_compute_seconds_total{{{J}}}{RATE}))"
                f" / sum(safelight_instances{{{J}}})",
            },
        ),
        Panel(
            "Saved by caches, an hour",
            "short",
            {
                "{{kind}}": rate("safelight_cache_compute_seconds_saved_total", "kind")
                + f" * 3600 * scalar(max(safelight_compute_price{{{J}}}))"
            },
        ),
    ],
}

QUALITY: Rows = {
    "Creative quality, of a sample": [
        Panel(
            "Agreement of previews with their picture, by quarter of the steps",
            "percentunit",
            {"{{model}} {{quarter}}": f"model:safelight_preview_agreement:mean1h{{{J}}}"},
        ),
        Panel(
            "Agreement of pictures with their prompts",
            "short",
            {"{{model}}": f"model:safelight_prompt_agreement:mean1h{{{J}}}"},
            "Cosine of a CLIP, where quality_judge_dir names one. Compare a model with itself, not with another judge.",
        ),
        Panel("Sharpness", "short", {"{{model}}": f"model:safelight_picture_sharpness:mean1h{{{J}}}"}),
        Panel("Colourfulness", "short", {"{{model}}": f"model:safelight_picture_colourfulness:mean1h{{{J}}}"}),
        Panel("Lightness", "percentunit", {"{{model}}": f"model:safelight_picture_lightness:mean1h{{{J}}}"}),
        Panel(
            "Near-duplicates",
            "percentunit",
            {"{{model}}": f"model:safelight_picture_near_duplicates:ratio1h{{{J}}}"},
        ),
        Panel(
            "Drift against the week before",
            "short",
            {
                "{{model}} sharpness": f"model:safelight_picture_sharpness:drift{{{J}}}",
                "{{model}} colourfulness": f"model:safelight_picture_colourfulness:drift{{{J}}}",
                "{{model}} lightness": f"model:safelight_picture_lightness:drift{{{J}}}",
            },
            "1: twice as much, -1: half.",
            signed=True,
        ),
        Panel(
            "Pictures measured",
            "short",
            {"{{model}} an hour": f"model:safelight_pictures_sampled:increase1h{{{J}}}"},
        ),
        Panel(
            "Samples not measured",
            "ops",
            {"{{instance}}": rate("safelight_quality_samples_skipped_total", "instance")},
        ),
    ],
}

DASHBOARDS: Mapping[str, tuple[str, Rows]] = {
    "service": ("Safelight: service", SERVICE),
    "runtime": ("Safelight: runtime and Triton", RUNTIME),
    "gpu": ("Safelight: GPUs", GPUS),
    "caches": ("Safelight: caches", CACHES),
    "tenants": ("Safelight: tenants", TENANTS),
    "cost": ("Safelight: cost", COST),
    "quality": ("Safelight: creative quality", QUALITY),
}
