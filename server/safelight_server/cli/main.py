"""The commands of `safelight` (`safelight --help`). An error is one line on stderr and an exit code.

Exit codes: 1 error of the server, 2 wrong argument or configuration, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import grpc
import structlog
import typer
import uvloop
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.table import Table
from safelight import (
    Branch,
    CacheMode,
    Client,
    Control,
    GenerationError,
    GetCacheStatsResponse,
    PurgeCacheResponse,
    QualityFloor,
    TenantQuota,
)

from safelight_server import __version__
from safelight_server import settings as settings_module
from safelight_server.api.identity import new_key
from safelight_server.app.process import serve
from safelight_server.app.server import Running, StartError
from safelight_server.catalog import export as repositories
from safelight_server.catalog.catalog import ManifestError
from safelight_server.catalog.export import Accelerator, RepositoryError
from safelight_server.catalog.export import Target as RepositoryTarget
from safelight_server.cli import demo as demos
from safelight_server.cli.activator import activator
from safelight_server.cli.bills import BillsError, bills
from safelight_server.cli.export import export
from safelight_server.cli.export_judge import export_judge
from safelight_server.cli.fetch import FetchError, fetch
from safelight_server.cli.plan import PlanError, plan
from safelight_server.cli.quotas import quota_table
from safelight_server.cli.scaler import scaler
from safelight_server.export.source import ExportError
from safelight_server.files import ConfigFileError
from safelight_server.settings import Settings, SettingsError, is_loopback
from safelight_server.storage.keyring import write_key_file
from safelight_server.telemetry import configure_logging

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Watch pictures develop.", rich_markup_mode=None)
keys = typer.Typer(no_args_is_help=True, help="Make API keys for callers, and keys that encrypt cached data.")
app.add_typer(keys, name="keys")
caches = typer.Typer(no_args_is_help=True, help="The caches of a running server; needs an administrator's key.")
app.add_typer(caches, name="cache")
app.command()(activator)
app.command()(bills)
app.command()(fetch)
app.command()(plan)
app.command()(export)
app.command()(export_judge)
app.command()(scaler)
console = Console()
log = structlog.get_logger(__name__)
T = TypeVar("T")

DEFAULT_TARGET = "127.0.0.1:8421"
MAX_STEP = 2**31 - 1
"""Largest value of the protocol's field for steps (int32); the server checks the real limit."""
Steps = Annotated[int | None, typer.Option("--steps", min=-MAX_STEP, max=MAX_STEP, help="Denoising steps.")]
Target = Annotated[str, typer.Option("--target", envvar="SAFELIGHT_TARGET", help="Address of the server.")]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="SAFELIGHT_API_KEY", help="Key of the caller.")]
CaFile = Annotated[
    Path | None,
    typer.Option(
        "--ca-file", envvar="SAFELIGHT_CA_FILE", help="PEM of the server's certificate authority; turns TLS on."
    ),
]
ClientCert = Annotated[
    Path | None,
    typer.Option(
        "--client-cert-file",
        envvar="SAFELIGHT_CLIENT_CERT_FILE",
        help="PEM of the caller's own certificate and its key, for a server that requires one.",
    ),
]
ServerName = Annotated[
    str,
    typer.Option("--server-name", envvar="SAFELIGHT_SERVER_NAME", help="Name in the certificate, if not the target's."),
]


OPTIONS = {"target": "--target / SAFELIGHT_TARGET", "api_key": "--api-key / SAFELIGHT_API_KEY"}
"""Arguments of `safelight.Client`, by the names of their options here."""


class CommandError(Exception):
    """A command failed; the message is the one line that the user sees."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"safelight {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Watch pictures develop."""


@app.command("serve")
def serve_command(
    host: Annotated[str | None, typer.Option(help=Settings.model_fields["host"].description)] = None,
    port: Annotated[int | None, typer.Option(help=Settings.model_fields["port"].description)] = None,
    http_port: Annotated[int | None, typer.Option(help=Settings.model_fields["http_port"].description)] = None,
    insecure: Annotated[bool, typer.Option(help=Settings.model_fields["insecure"].description)] = False,
    models_dir: Annotated[Path | None, typer.Option(help=Settings.model_fields["models_dir"].description)] = None,
    runtime: Annotated[str | None, typer.Option(help=Settings.model_fields["runtime"].description)] = None,
    triton_url: Annotated[str | None, typer.Option(help=Settings.model_fields["triton_url"].description)] = None,
    num_instances: Annotated[int | None, typer.Option(help=Settings.model_fields["num_instances"].description)] = None,
    api_key_file: Annotated[Path | None, typer.Option(help=Settings.model_fields["api_key_file"].description)] = None,
    metrics_port: Annotated[int | None, typer.Option(help=Settings.model_fields["metrics_port"].description)] = None,
    log_format: Annotated[str | None, typer.Option(help=Settings.model_fields["log_format"].description)] = None,
) -> None:
    """Run the server in the foreground. `safelight settings` lists all settings, which are environment variables."""
    settings = settings_module.load(
        host=host,
        port=port,
        http_port=http_port,
        insecure=insecure or None,
        models_dir=models_dir,
        runtime=runtime,
        triton_url=triton_url,
        num_instances=num_instances,
        api_key_file=api_key_file,
        metrics_port=metrics_port,
        log_format=log_format,
    )
    configure_logging(settings.log_format, settings.log_level)
    for variable, meant in settings_module.misspelt().items():
        log.warning("no setting has this name", variable=variable, meant=meant)
    uvloop.run(serve(settings, lambda running: _summary(running, settings)))


def _summary(running: Running, settings: Settings) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_row("Safelight", f"listens on {running.address}")
    if running.http_address:
        table.add_row("HTTP", f"listens on {running.http_address}")
    table.add_row("runtime", f"{running.runtime.name}, {running.runtime.num_instances} instances")
    for pipeline in running.catalog.pipelines.values():
        manifest = pipeline.manifest
        sizes = ", ".join(f"{size.width_px}x{size.height_px}" for size in manifest.sizes)
        table.add_row("model", f"models/{pipeline.name} {manifest.revision} ({sizes}): {manifest.description}")
    for left_out in running.catalog.unavailable.values():
        table.add_row("left out", f"models/{left_out.name} {left_out.revision}: {left_out.reason}")
    limits = f"{settings.max_running_outputs} outputs run, {settings.max_waiting_outputs} may wait in class STANDARD"
    table.add_row("limits", limits)
    trusted = "callers on this machine are" if is_loopback(settings.host) else "all who can connect are"
    table.add_row("keys", f"none: {trusted} trusted" if settings.api_key_file is None else "required")
    try:
        console.print(table)
    except (OSError, ValueError) as error:  # the disk is full, the terminal has gone, or it cannot show a letter
        log.warning("summary_not_printed", error=str(error), address=running.address)
        with Path(os.devnull).open("wb") as nowhere:  # otherwise Python fails at exit, when it flushes stdout
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


MEDIA_TYPES = {"png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "webp": "image/webp"}


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    out: Annotated[Path, typer.Option(help="File to write: .png, .jpg or .webp.")] = Path("picture.png"),
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="Seed; default: random.")] = None,
    steps: Steps = None,
    guidance_scale: Annotated[float | None, typer.Option("--guidance", help="Guidance scale; 1 means none.")] = None,
    sampler: Annotated[str, typer.Option(help="Sampler, such as ddim or euler.")] = "",
    negative_prompt: Annotated[str, typer.Option("--negative", help="What guidance leads away from.")] = "",
    model: Annotated[str, typer.Option(help="Id of the model.")] = "",
    timeout_s: Annotated[float | None, typer.Option("--timeout", min=0.001, help="Deadline in seconds.")] = None,
    cache: Annotated[CacheMode, typer.Option(help="Which cached results may be used.")] = "default",
    branch: Annotated[str, typer.Option(metavar="generations/ID@STEP", help="Where to start from.")] = "",
    init: Annotated[
        str, typer.Option(metavar="FILE", help="Picture to start from: PNG, JPEG or WebP, or generations/ID.")
    ] = "",
    strength: Annotated[
        float | None,
        typer.Option(help="How far the init picture may change, up to 1. Default: 0.8; 1 if the model only inpaints."),
    ] = None,
    mask: Annotated[
        str, typer.Option(metavar="FILE", help="Mask: only its white or transparent part is developed anew.")
    ] = "",
    guidance_rescale: Annotated[
        float | None, typer.Option(help="How far the contrast that guidance adds is reduced, 0 to 1.")
    ] = None,
    guidance_interval: Annotated[
        str, typer.Option(metavar="START:END", help="Guidance only in these steps, as shares: 0.2:0.8.")
    ] = "",
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:SCALE", help="Adapter (LoRA) of the model, with its factor; may be repeated."),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE:SCALE:START:END",
            help="Picture for a control network (ControlNet) of the model, with its factor, and where it acts as shares"
            " of the steps; all but NAME=FILE may be left out. May be repeated.",
        ),
    ] = None,
    image_prompt: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Picture that says what to draw beside the prompt: a file, or generations/ID/outputs/0.",
        ),
    ] = "",
    image_prompt_scale: Annotated[
        float | None, typer.Option(help="How much the image prompt counts, 0 to 2. Default: 1.")
    ] = None,
    floor_steps: Annotated[
        int | None, typer.Option(min=-MAX_STEP, max=MAX_STEP, help="Under load: accept so few steps.")
    ] = None,
    floor_previews: Annotated[
        bool, typer.Option("--floor-previews", help="Under load: accept coarse previews.")
    ] = False,
    floor_similarity: Annotated[
        float | None, typer.Option(help="Under load: accept a picture of a prompt so similar, up to 1.")
    ] = None,
    target: Target = DEFAULT_TARGET,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
    client_cert: ClientCert = None,
    server_name: ServerName = "",
) -> None:
    """Request one picture of a running server and watch it develop."""
    media_type = MEDIA_TYPES.get(out.suffix.lstrip(".").lower())
    if media_type is None:
        raise CommandError(f"--out {out}: the extension must be .png, .jpg or .webp")
    _check_text(
        {"PROMPT": prompt, "--negative": negative_prompt, "--model": model, "--sampler": sampler, "--branch": branch}
        | {"--adapter": " ".join(adapter or ()), "--control": " ".join(control or ())}
    )
    order = demos.DemoRequest(
        prompt,
        seed,
        steps,
        guidance_scale,
        sampler,
        negative_prompt,
        model,
        media_type,
        timeout_s,
        cache,
        _branch(branch) if branch else None,
        _picture(init),
        strength,
        _picture(mask),
        guidance_rescale,
        _interval(guidance_interval) if guidance_interval else None,
        _quality_floor(floor_steps, floor_previews, floor_similarity),
        _adapters(adapter or ()),
        _controls(control or ()),
        _picture(image_prompt),
        image_prompt_scale,
    )
    picture, developed = _run(
        demos.generate_one(_connect(target, api_key, ca_file, client_cert, server_name), order, console)
    )
    try:
        out.write_bytes(picture.data)
    except OSError as error:
        raise CommandError(f"{out}: {error.strerror}") from None
    size = f"{picture.width_px}x{picture.height_px}"
    console.print(f"{out}  {size}  seed {picture.seed}  {developed.figures()}", highlight=False, soft_wrap=True)
    console.print(developed.origin(), highlight=False, soft_wrap=True)


def _picture(source: str) -> Path | str | None:
    """The argument as a file, or as the name of a picture that the server has."""
    return source if source.startswith(("generations/", "images/")) else Path(source) if source else None


def _interval(text: str) -> tuple[float, float]:
    start, _, end = text.partition(":")
    try:
        return float(start), float(end)
    except ValueError:
        raise CommandError(f"--guidance-interval {text}: must be START:END, such as 0.2:0.8") from None


def _adapters(given: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in given:
        name, colon, scale = text.rpartition(":")
        name = name if colon else text
        if name in found:
            raise CommandError(f"--adapter {text}: {name} is there twice")
        try:
            found[name] = float(scale) if colon else 1.0
        except ValueError:
            raise CommandError(f"--adapter {text}: must be NAME:SCALE, such as pixel:0.8, or NAME") from None
    return found


def _controls(given: Sequence[str]) -> list[Control]:
    found = []
    for text in given:
        name, _, rest = text.partition("=")
        file, *numbers = rest.split(":")
        source, values = _picture(file), [_number(number) for number in numbers]
        if not name or source is None or None in values or len(values) > 3:
            what = "must be NAME=FILE, or NAME=FILE:SCALE:START:END such as canny=edges.png:0.8:0:0.5"
            raise CommandError(f"--control {text}: {what}")
        found.append(Control(name, source, *values))
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _quality_floor(steps: int | None, previews: bool, similarity: float | None) -> QualityFloor | None:
    if steps is None and not previews and similarity is None:
        return None
    return QualityFloor(min_num_steps=steps, cheaper_previews=previews, min_similarity=similarity)


def _branch(text: str) -> Branch:
    generation, _, step = text.partition("@")
    if not step.isdecimal():
        raise CommandError(f"--branch {text}: must be generations/ID@STEP")
    return Branch(generation=generation, step=min(int(step), MAX_STEP))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("out/demo"),
    models_dir: Annotated[Path | None, typer.Option(help="Folder of the models.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:SCALE", help="Develop each picture with this adapter too; may be repeated."),
    ] = None,
) -> None:
    """Start a server, develop several pictures at once, show them, write them, stop the server."""
    settings = settings_module.load(port=0, models_dir=models_dir, log_level="warning")
    configure_logging("console", "warning")
    _run(demos.demo(settings, out, console, _adapters(adapter or ())))


@app.command()
def models(
    target: Target = DEFAULT_TARGET,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
    client_cert: ClientCert = None,
    server_name: ServerName = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with the measured times that `safelight plan` reads.")
    ] = False,
) -> None:
    """List the models of a server."""
    connect = _connect(target, api_key, ca_file, client_cert, server_name)

    async def ask() -> None:
        async with connect() as client:
            listed = await client.models()
            if as_json:
                found = {"models": [json_format.MessageToDict(model) for model in listed]}
                typer.echo(json.dumps(found, indent=1))
                return
            for model in listed:
                sizes = ", ".join(f"{size.width_px}x{size.height_px}" for size in model.sizes)
                samplers = ", ".join(sampler.name for sampler in model.samplers)
                mark = "  (default)" if model.is_default else ""
                console.print(f"{model.name}  {model.revision}  on {model.runtime}{mark}", highlight=False)
                console.print(f"    {model.description}; {sizes}; samplers {samplers}", highlight=False, soft_wrap=True)
                if model.adapters:
                    named = ", ".join(f"{adapter.name} (rank {adapter.rank})" for adapter in model.adapters)
                    console.print(f"    adapters {named}", highlight=False, soft_wrap=True, markup=False)
                if model.controls:
                    named = ", ".join(control.name for control in model.controls)
                    console.print(f"    controls {named}", highlight=False, soft_wrap=True, markup=False)
                if model.image_prompt:
                    console.print("    takes a picture as a prompt (--image-prompt)", highlight=False)
                for note in model.notes:
                    console.print(f"    note: {note}", highlight=False, soft_wrap=True, markup=False)
            for left_out in await client.unavailable_models():
                console.print(
                    f"{left_out.name}  {left_out.revision}  NOT SERVED: {left_out.reason}",
                    highlight=False,
                    soft_wrap=True,
                    markup=False,
                )

    _run(ask())


@app.command()
def health(
    target: Target = DEFAULT_TARGET,
    ca_file: CaFile = None,
    client_cert: ClientCert = None,
    server_name: ServerName = "",
) -> None:
    """Exit with 0 if a server is serving; for container health checks."""
    connect = _connect(target, None, ca_file, client_cert, server_name)

    async def ask() -> int:
        async with connect() as client:
            stub = health_pb2_grpc.HealthStub(client.channel)
            try:
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=3)
            except grpc.aio.AioRpcError as error:
                raise CommandError(f"{target}: {error.details()}") from None
            return int(answer.status)

    if _run(ask()) != health_pb2.HealthCheckResponse.SERVING:
        raise CommandError(f"{target}: not serving")
    console.print("serving")


@app.command()
def repository(
    out: Annotated[Path, typer.Option(help="New folder to write.")],
    target: Annotated[RepositoryTarget, typer.Option(help="Where the repository is used.")] = RepositoryTarget.GPU,
    gpus: Annotated[int, typer.Option(min=1, max=64, help="GPUs; each gets an instance of every component.")] = 1,
    accelerator: Annotated[Accelerator, typer.Option(help="What executes models on a GPU.")] = Accelerator.TENSORRT,
    bounded_queue: Annotated[
        bool, typer.Option(help="Priorities and bounds in Triton's queue (docs/operations/triton.md).")
    ] = False,
    models_dir: Annotated[Path | None, typer.Option(help=Settings.model_fields["models_dir"].description)] = None,
) -> None:
    """Write the model repository for Triton on GPUs (docs/operations/triton.md)."""
    source = settings_module.load(models_dir=models_dir).models_dir / "repository"
    repositories.write(source, out, target, gpus, accelerator, bounded_queue=bounded_queue)
    console.print(f"wrote {out}", highlight=False)


@app.command("settings")
def settings_command() -> None:
    """List every setting with its environment variable, default and meaning."""
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else field.default
        typer.echo(f"SAFELIGHT_{name.upper()}={default}\n    {field.description}")


@keys.command("new")
def keys_new(
    caller: str,
    tenant: Annotated[str, typer.Argument()] = "default",
    admin: Annotated[bool, typer.Option("--admin", help="The key may inspect and purge the caches.")] = False,
) -> None:
    """Make an API key: prints it once, and its entry for the key file."""
    key, entry = new_key(caller, tenant, admin=admin)
    typer.echo(f"key, shown only now: {key}\nentry for the key file: {entry}")


@keys.command("cache")
def keys_cache(
    out: Annotated[Path, typer.Argument(help="New file, for the setting cache_key_file.")],
) -> None:
    """Write a file with new keys that encrypt cached data; only its owner can read it."""
    try:
        write_key_file(out)
    except FileExistsError:
        raise CommandError(f"{out}: exists already; data that its keys have encrypted would be lost") from None
    except OSError as error:
        raise CommandError(f"{out}: {error.strerror}") from None
    console.print(f"wrote {out}; all replicas need the same file", highlight=False, soft_wrap=True)


@app.command()
def quotas(
    target: Target = DEFAULT_TARGET,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
    client_cert: ClientCert = None,
    server_name: ServerName = "",
) -> None:
    """Show the quotas of tenants and what is left of them; needs an administrator's key."""
    connect = _connect(target, api_key, ca_file, client_cert, server_name)

    async def ask() -> list[TenantQuota]:
        async with connect() as client:
            return await client.quotas()

    console.print(quota_table(_run(ask())))


@caches.command("stats")
def cache_stats(
    target: Target = DEFAULT_TARGET,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
    client_cert: ClientCert = None,
    server_name: ServerName = "",
) -> None:
    """Show what the caches of a replica hold and have saved."""
    connect = _connect(target, api_key, ca_file, client_cert, server_name)

    async def ask() -> GetCacheStatsResponse:
        async with connect() as client:
            return await client.cache_stats()

    stats = _run(ask())
    shown = [Table("served", "outputs", "steps saved", "compute saved")]
    for hits in stats.hits:
        seconds = hits.compute_saved.ToNanoseconds() / 1e9
        shown[-1].add_row(hits.kind, f"{hits.num_outputs}", f"{hits.num_steps_saved}", f"{seconds:.1f} s")
    shown.append(Table("tier", "entries", "MB"))
    for tier in stats.tiers:
        shown[-1].add_row(tier.name, f"{tier.num_entries}", f"{tier.num_bytes / 1e6:.1f}")
    shown.append(Table("looked for", "times", "p50", "p99"))
    for lookups in stats.lookups:
        p50, p99 = (f"{at.ToNanoseconds() / 1e6:.2f} ms" for at in (lookups.p50, lookups.p99))
        shown[-1].add_row(lookups.kind, f"{lookups.num_lookups}", p50, p99)
    for table in shown:
        console.print(table)
    console.print(f"rejected by the text guard: {stats.num_guard_rejections}; not kept: {stats.num_not_kept}")


@caches.command("purge")
def cache_purge(
    tenant: Annotated[str, typer.Option(help="Name of a tenant; if it is in a pool, the whole pool is purged.")] = "",
    model_revision: Annotated[str, typer.Option(help="MODEL/REVISION, such as icons/3.")] = "",
    generation: Annotated[str, typer.Option(help="generations/ID.")] = "",
    target: Target = DEFAULT_TARGET,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
    client_cert: ClientCert = None,
    server_name: ServerName = "",
) -> None:
    """Delete the entries that match all given options, from all tiers and on all replicas."""
    connect = _connect(target, api_key, ca_file, client_cert, server_name)

    async def ask() -> PurgeCacheResponse:
        async with connect() as client:
            return await client.purge_cache(tenant=tenant, model_revision=model_revision, generation=generation)

    purged = _run(ask())
    counts = ", ".join(f"{tier.num_entries} from {tier.name}" for tier in purged.tiers) or "nothing"
    console.print(f"deleted {counts}", highlight=False)
    if purged.failed_tiers:
        raise CommandError(f"could not clear {', '.join(purged.failed_tiers)}: purge again when they work")


def _connect(
    target: str, api_key: str | None, ca_file: Path | None, client_cert: Path | None, server_name: str
) -> Callable[[], Client]:
    """Checks the connection options. Returns a function that makes the client, to be called in the event loop."""
    if client_cert is not None and ca_file is None:
        raise CommandError("--client-cert-file / SAFELIGHT_CLIENT_CERT_FILE: needs --ca-file / SAFELIGHT_CA_FILE")
    credentials = None
    try:
        if ca_file is not None:
            own = None if client_cert is None else client_cert.read_bytes()  # has both the key and the chain
            credentials = grpc.ssl_channel_credentials(ca_file.read_bytes(), own, own)
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from None

    def connect() -> Client:
        try:
            return Client(target, api_key=api_key, credentials=credentials, server_name=server_name)
        except ValueError as error:
            argument, _, what = str(error).partition(": ")
            raise CommandError(f"{OPTIONS[argument]}: {what}") from None

    _check_text({OPTIONS["target"]: target, "--server-name": server_name})
    return connect


def _check_text(given: Mapping[str, str]) -> None:
    """Refuses arguments that are not UTF-8: Python decodes bad bytes to surrogates, which protobuf refuses."""
    for option, text in given.items():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise CommandError(f"{option}: is not UTF-8") from None


def _run(work: Coroutine[object, object, T]) -> T:
    return uvloop.run(work)


def main() -> None:
    """Runs the command line; prints every expected error as one line on stderr."""
    _open_standard_files()
    try:
        app()
    except GenerationError as error:
        faults = "; ".join(f"{field}: {what}" for field, what in error.violations.items())
        _die(faults or str(error), 2 if error.code is grpc.StatusCode.INVALID_ARGUMENT else 1)
    except (
        CommandError,
        SettingsError,
        ManifestError,
        StartError,
        ConfigFileError,
        RepositoryError,
        demos.DemoError,
        BillsError,
        FetchError,
        PlanError,
        ExportError,
    ) as error:
        _die(str(error), 2)
    except KeyboardInterrupt:
        sys.exit(130)


def _open_standard_files() -> None:
    """Opens /dev/null in place of each standard file that is closed, as some daemonizers leave them.

    Otherwise the next socket would get that number, and receive what a library writes to stderr.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115  # both stay open until the end
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _die(message: str, code: int) -> None:
    lines = message.replace("\n", "; ")
    print(f"safelight: {lines}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
