"""`safelight plan`: replicas, machines and cost of a load, with the arithmetic (docs/operations/cost.md)."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf import json_format
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safelight import Model, StepTime

from safelight_server.cli.planning import MAX_REPLICAS, CallTimes, ModelTimes, PlannedLoad, Replicas, replicas
from safelight_server.files import ConfigFileError, faulty, read_regular_file
from safelight_server.prices import MachinePrice, PriceTable, read_prices
from safelight_server.sampler import guided_steps

Positive = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class PlanError(Exception):
    """There is no plan; the message says why."""


class LoadEntry(BaseModel):
    """One kind of request in the file of the load."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str = ""
    images_per_s: Positive
    num_inference_steps: Annotated[int, Field(gt=0, le=10_000)] | None = None
    guidance: bool | None = None
    guidance_interval: tuple[Share, Share] | None = None
    cached: Annotated[float, Field(ge=0, lt=1)] = 0.0
    step_cost: Positive = 1.0


class LoadFile(BaseModel):
    """The file of the load."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    first_preview_p99_s: Positive = 1.0
    max_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.8
    spare_replicas: Annotated[int, Field(ge=0, le=1000)] = 1
    mix: Annotated[list[LoadEntry], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Option:
    """A kind of machine for the load. `replicas` is None if no number of them meets the target."""

    instance_type: str
    machine: MachinePrice
    times: Mapping[str, ModelTimes]
    loads: Sequence[PlannedLoad]
    replicas: Replicas | None

    @property
    def per_hour(self) -> float:
        """The cost of all replicas in an hour."""
        return 0.0 if self.replicas is None else self.replicas.count * self.machine.per_hour


def plan(
    load: Annotated[Path, typer.Argument(help="The load, TOML.")],
    prices: Annotated[Path, typer.Option(help="Prices of machines, TOML.")],
    curves: Annotated[
        list[str], typer.Option(help="INSTANCE_TYPE=FILE: output of `safelight models --json` there. May be repeated.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compute how many replicas of which machine a load needs, and what they cost."""
    wanted, table = _read_load(load), read_prices(prices)
    options = [_option(wanted, table, *_curve(text)) for text in curves]
    possible = sorted((option for option in options if option.replicas is not None), key=lambda each: each.per_hour)
    if as_json:
        typer.echo(json.dumps(_as_json(options, table.currency)))
    else:
        for option in options:
            typer.echo("\n".join(_arithmetic(option, wanted, table.currency)) + "\n")
    if not possible:
        raise PlanError(f"no number of these machines, up to {MAX_REPLICAS}, meets first_preview_p99_s")
    if not as_json:
        best = possible[0]
        assert best.replicas is not None
        typer.echo(
            f"cheapest: {best.replicas.count} x {best.instance_type}, {table.currency} {best.per_hour:.2f} an hour"
        )


def _read_load(path: Path) -> LoadFile:
    try:
        return LoadFile.model_validate(tomllib.loads(read_regular_file(path).decode()))
    except OSError as error:
        raise ConfigFileError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigFileError(f"{path}: is not valid TOML: {error}") from None
    except ValidationError as error:
        raise faulty(
            path, [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        ) from None


def _curve(text: str) -> tuple[str, Path]:
    instance_type, sign, file = text.partition("=")
    if not sign or not instance_type or not file:
        raise PlanError(f"--curves {text}: must be INSTANCE_TYPE=FILE")
    return instance_type, Path(file)


def _option(wanted: LoadFile, table: PriceTable, instance_type: str, path: Path) -> Option:
    machine = table.machine(instance_type, "--curves")
    models = _read_models(path)
    loads, times = [], {}
    for number, entry in enumerate(wanted.mix):
        named = [
            known for known in models if (known.name == f"models/{entry.model}" if entry.model else known.is_default)
        ]
        if not named:
            names = sorted(known.name.removeprefix("models/") for known in models)
            raise PlanError(f"mix.{number}.model: {entry.model or 'the default'} is none of {names} in {path}")
        [model] = named
        name = model.name.removeprefix("models/")
        times[name] = _times(model, path)
        guidance = model.defaults.guidance_scale != 1.0 if entry.guidance is None else entry.guidance
        num_steps = entry.num_inference_steps or model.defaults.num_inference_steps
        guided = guided_steps(num_steps, *(entry.guidance_interval or (0.0, 1.0)))
        if not guided:
            raise PlanError(f"mix.{number}.guidance_interval: has none of the {num_steps} steps")
        loads.append(
            PlannedLoad(
                name,
                entry.images_per_s * (1 - entry.cached),
                num_steps,
                1 + len(guided) / num_steps if guidance else 1.0,
                entry.step_cost,
            )
        )
    needed = replicas(
        loads, times, machine.instances, wanted.max_utilization, wanted.first_preview_p99_s, wanted.spare_replicas
    )
    return Option(instance_type, machine, times, loads, needed)


def _read_models(path: Path) -> list[Model]:
    try:
        listed: Any = json.loads(read_regular_file(path))
        return [json_format.ParseDict(model, Model(), ignore_unknown_fields=True) for model in listed["models"]]
    except OSError as error:
        raise ConfigFileError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, json_format.ParseError) as error:
        raise ConfigFileError(f"{path}: is not what `safelight models --json` prints: {error}") from None


def _times(model: Model, path: Path) -> ModelTimes:
    def measured(times: Sequence[StepTime]) -> CallTimes:
        pairs = sorted((time.num_rows, time.duration.ToTimedelta().total_seconds()) for time in times)
        if not pairs or pairs[0][0] != 1 or min(seconds for _, seconds in pairs) <= 0:
            raise ConfigFileError(f"{path}: {model.name} has no times of calls of one row")
        return CallTimes(tuple(rows for rows, _ in pairs), tuple(seconds for _, seconds in pairs))

    others = {one.component: measured(one.times).at(1) for one in model.component_times}
    return ModelTimes(measured(model.step_times), others.get("text_encoder", 0.0), others.get("decoder", 0.0))


def _arithmetic(option: Option, wanted: LoadFile, currency: str) -> list[str]:
    """The lines that show the arithmetic behind the numbers."""
    machine, lines = option.machine, [f"{option.instance_type}: {currency} {option.machine.per_hour:g} an hour"]
    for load in option.loads:
        times = option.times[load.model]
        best = times.denoiser.rows_per_s / load.step_cost
        lines += [
            f"  {load.model}: {load.images_per_s:g} pictures/s x {load.num_steps} steps x {load.rows_per_step:g} rows"
            f" = {load.rows_per_s:g} rows/s",
            f"    an instance makes {best:.1f} rows/s at most; {load.rows_per_s:g} / {best:.1f}"
            f" = {load.rows_per_s / best:.2f} instances for steps, {load.images_per_s:g} x {1e3 * times.other_s:.1f} ms"
            f" = {load.images_per_s * times.other_s:.2f} for the rest",
        ]
    found = option.replicas
    if found is None:
        return [*lines, f"  no number of replicas has its first preview in {wanted.first_preview_p99_s:g} s"]
    expected, pictures = found.expected, sum(entry.images_per_s for entry in wanted.mix)
    return [
        *lines,
        f"  throughput: at most {wanted.max_utilization:g} of {machine.instances} instances busy:"
        f" {found.for_throughput} replicas",
        f"  first preview: {found.for_latency} replicas: p50 {expected.first_preview_p50_s:.3f} s,"
        f" p99 {expected.first_preview_p99_s:.3f} s of {wanted.first_preview_p99_s:g} s;"
        f" {expected.outputs:.1f} pictures at once on an instance, {1e3 * expected.step_s:.1f} ms a step",
        f"  with {found.spare} spare: {found.count} replicas x {currency} {machine.per_hour:g}"
        f" = {currency} {option.per_hour:.2f} an hour,"
        f" {currency} {1000 * option.per_hour / 3600 / pictures:.4f} for 1000 pictures, cached ones included",
    ]


def _as_json(options: Sequence[Option], currency: str) -> dict[str, Any]:
    return {
        "currency": currency,
        "options": [
            {
                "instance_type": option.instance_type,
                "replicas": None if option.replicas is None else option.replicas.count,
                "per_hour": option.per_hour,
                "arithmetic": None if option.replicas is None else asdict(option.replicas),
            }
            for option in options
        ],
    }
