"""The commands of `safelight` (`safelight --help`). An error is one line on stderr and an exit code.

Exit codes: 1 error of the server, 2 wrong argument or configuration, 130 interrupted.

The client's commands are here and start quickly: whatever imports the server, Redis or the exporter is imported by the
command that needs it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import grpc
import structlog
import typer
import uvloop
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.table import Table
from safelight import (
    GenerationError,
    TenantQuota,
)
from typer.core import TyperGroup

from safelight_server import __version__
from safelight_server import settings as settings_module
from safelight_server.cli import demo as demos
from safelight_server.cli.cache import caches
from safelight_server.cli.command import (
    DEFAULT_TARGET,
    ApiKey,
    CaFile,
    ClientCert,
    CommandError,
    ServerName,
    Target,
    connect_with,
    run,
)
from safelight_server.cli.described import described
from safelight_server.cli.generate import generate, option_of, parse_adapters
from safelight_server.cli.quotas import quota_table
from safelight_server.settings import Settings, is_loopback
from safelight_server.storage.keyring import write_key_file

if TYPE_CHECKING:
    from typer._click.core import Command, Context

    from safelight_server.app.server import Running

IMPORTED_WHEN_NAMED: Mapping[str, str] = {
    "activator": "activator",
    "bills": "bills",
    "export": "export",
    "export-judge": "export_judge",
    "fetch": "fetch",
    "plan": "plan",
    "repository": "repository",
    "scaler": "scaler",
}
"""Commands by name, each with its module in this package.

The command's function, or its `Typer` if it has commands of its own, has the name of the module.
"""
ORDER = ("serve", "generate", "demo", "models", "health", "settings", "keys", "cache", "quotas", "bills")
"""The commands that `safelight --help` lists first; the others follow by name."""


class _Commands(TyperGroup):
    """The commands, some of which are imported when they are named or listed."""

    def list_commands(self, ctx: Context) -> list[str]:
        names = {*super().list_commands(ctx), *IMPORTED_WHEN_NAMED}
        return [*ORDER, *sorted(names.difference(ORDER))]

    def get_command(self, ctx: Context, cmd_name: str) -> Command | None:
        if (module := IMPORTED_WHEN_NAMED.get(cmd_name)) is None:
            return super().get_command(ctx, cmd_name)
        found = getattr(importlib.import_module(f"safelight_server.cli.{module}"), module)
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        if isinstance(found, typer.Typer):
            alone.add_typer(found, name=cmd_name)
            return typer.main.get_group(alone).get_command(ctx, cmd_name)
        alone.command(cmd_name)(found)
        return typer.main.get_command(alone)


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, help="Watch pictures develop.", rich_markup_mode=None
)
keys = typer.Typer(no_args_is_help=True, help="Make API keys for callers, and keys that encrypt cached data.")
app.add_typer(keys, name="keys")
app.add_typer(caches, name="cache")
console = Console()
log = structlog.get_logger(__name__)


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
    from safelight_server.app.process import serve  # a client's command does not wait for the whole server
    from safelight_server.telemetry import configure_logging

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


app.command()(generate)


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
    from safelight_server.telemetry import configure_logging

    settings = settings_module.load(port=0, models_dir=models_dir, log_level="warning")
    configure_logging("console", "warning")
    try:
        out.mkdir(parents=True, exist_ok=True)  # fails before anything is developed
        run(demos.demo(settings, out, console, parse_adapters(adapter or ())))
    except OSError as error:
        raise CommandError(f"{error.filename or out}: {error.strerror}") from None


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
    connect = connect_with(target, api_key, ca_file, client_cert, server_name)

    async def ask() -> None:
        async with connect() as client:
            listed = await client.models()
            if as_json:
                found = {"models": [json_format.MessageToDict(model) for model in listed]}
                typer.echo(json.dumps(found, indent=1))
                return
            left_out = [
                f"{other.name}  {other.revision}  NOT SERVED: {other.reason}"
                for other in await client.unavailable_models()
            ]
            for line in [*(line for model in listed for line in described(model)), *left_out]:
                console.print(line, highlight=False, soft_wrap=True, markup=False)

    run(ask())


@app.command()
def health(
    target: Target = DEFAULT_TARGET,
    ca_file: CaFile = None,
    client_cert: ClientCert = None,
    server_name: ServerName = "",
) -> None:
    """Exit with 0 if a server is serving; for container health checks."""
    connect = connect_with(target, None, ca_file, client_cert, server_name)

    async def ask() -> int:
        async with connect() as client:
            stub = health_pb2_grpc.HealthStub(client.channel)
            try:
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=3)
            except grpc.aio.AioRpcError as error:
                raise CommandError(f"{target}: {error.details()}", exit_code=1) from None
            return int(answer.status)

    if run(ask()) != health_pb2.HealthCheckResponse.SERVING:
        raise CommandError(f"{target}: not serving", exit_code=1)
    console.print("serving")


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
    from safelight_server.api.identity import new_key  # imports what verifies tokens, which takes long

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
    connect = connect_with(target, api_key, ca_file, client_cert, server_name)

    async def ask() -> list[TenantQuota]:
        async with connect() as client:
            return await client.quotas()

    console.print(quota_table(run(ask())))


def main() -> None:
    """Runs the command line; prints every expected error as one line on stderr."""
    _open_standard_files()
    try:
        app()
    except SystemExit:  # how every command ends; without this clause Python would call _expected_errors
        raise
    except GenerationError as error:
        of = option_of if sys.argv[1:2] == ["generate"] else str
        faults = "; ".join(f"{of(field)}: {what}" for field, what in error.violations.items())
        unheard = error.code is grpc.StatusCode.UNAVAILABLE and not error.reason  # it is no server's refusal
        hint = "; check --target, and whether `safelight serve` runs there" if unheard else ""
        _die(faults or f"{error}{hint}", 2 if faults or error.code is grpc.StatusCode.INVALID_ARGUMENT else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except CommandError as error:
        _die(str(error), error.exit_code)
    except _expected_errors() as error:
        _die(str(error), 2)


def _expected_errors() -> tuple[type[Exception], ...]:
    """The errors whose message is for the user. Imported only when a command has failed, as that takes long."""
    from safelight_server.app.errors import StartError
    from safelight_server.catalog.catalog import ManifestError
    from safelight_server.catalog.export import RepositoryError
    from safelight_server.cli.bills import BillsError
    from safelight_server.cli.fetch import FetchError
    from safelight_server.cli.plan import PlanError
    from safelight_server.export.source import ExportError
    from safelight_server.files import ConfigFileError
    from safelight_server.settings import SettingsError

    return (
        StartError,
        ManifestError,
        RepositoryError,
        demos.DemoError,
        BillsError,
        FetchError,
        PlanError,
        ExportError,
        ConfigFileError,
        SettingsError,
    )


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
