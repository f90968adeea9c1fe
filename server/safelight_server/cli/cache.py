"""`safelight cache`: what the caches of a running server hold, and deleting from them."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from safelight import GetCacheStatsResponse, PurgeCacheResponse

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

caches = typer.Typer(no_args_is_help=True, help="The caches of a running server; needs an administrator's key.")
console = Console()


@caches.command("stats")
def cache_stats(
    target: Target = DEFAULT_TARGET,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
    client_cert: ClientCert = None,
    server_name: ServerName = "",
) -> None:
    """Show what the caches of a replica hold and have saved."""
    connect = connect_with(target, api_key, ca_file, client_cert, server_name)

    async def ask() -> GetCacheStatsResponse:
        async with connect() as client:
            return await client.cache_stats()

    stats = run(ask())
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
    connect = connect_with(target, api_key, ca_file, client_cert, server_name)

    async def ask() -> PurgeCacheResponse:
        async with connect() as client:
            return await client.purge_cache(tenant=tenant, model_revision=model_revision, generation=generation)

    purged = run(ask())
    counts = ", ".join(f"{tier.num_entries} from {tier.name}" for tier in purged.tiers) or "nothing"
    console.print(f"deleted {counts}", highlight=False)
    if purged.failed_tiers:
        raise CommandError(f"could not clear {', '.join(purged.failed_tiers)}: purge again when they work", exit_code=1)
