"""`safelight generate` and `safelight demo`: show pictures in the terminal while they develop.

`generate` requests one picture of a running server; `demo` starts a server of its own and requests several.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image
from rich.console import Console, RenderableType
from rich.live import Live
from safelight import (
    Branch,
    CacheMode,
    Client,
    Control,
    Event,
    Finished,
    GenerationError,
    Picture,
    PixelEncoding,
    Preview,
    PreviewPolicy,
    Progress,
    QualityFloor,
)

from safelight_server.cli.terminal import PictureTile, bar, lines, show
from safelight_server.settings import Settings

PROMPTS = (
    "a glowing red potion on a dark background",
    "a golden key on a blue background",
    "a purple crystal gem with sparkles on a dark background",
    "a wooden treasure chest on a sandy background",
    "a silver sword tilted right on a red background",
    "a green shield on a white background",
)
SEED = 7
START_TIMEOUT_S = 60.0


class DemoError(Exception):
    """The server did not start, refused a value, or sent no picture; the message is for the user."""


@dataclass(frozen=True, slots=True)
class DemoRequest:
    """The picture that the command line requests. None and empty leave the choice to the server."""

    prompt: str
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str = ""
    negative_prompt: str = ""
    model: str = ""
    media_type: str = "image/png"
    timeout_s: float | None = None
    cache: CacheMode = "default"
    branch: Branch | None = None
    init_image: Path | str | None = None
    strength: float | None = None
    mask: Path | str | None = None
    guidance_rescale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    quality_floor: QualityFloor | None = None
    adapters: Mapping[str, float] | None = None
    controls: Sequence[Control] = ()
    image_prompt: Path | str | None = None
    image_prompt_scale: float | None = None
    size: tuple[int, int] | None = None


@dataclass(slots=True)
class LivePicture:
    """A picture that is being generated: its request, and the events that came so far. Times are in seconds."""

    order: DemoRequest
    began: float = field(default_factory=time.monotonic)
    progress: Progress | None = None
    previews: list[Preview] = field(default_factory=list)
    picture: Picture | None = None
    first_preview_s: float | None = None
    finished: Finished | None = None
    total_s: float | None = None

    def take(self, event: Event) -> None:
        """Adds an event from the stream."""
        now = time.monotonic() - self.began
        match event:
            case Progress():
                self.progress = event
            case Preview():
                self.previews.append(event)
                self.first_preview_s = self.first_preview_s or now
            case Picture():
                self.picture = event
            case Finished():
                self.finished = event
                self.total_s = now

    def shown(self) -> PictureTile:
        """The newest image and a short progress text, for the terminal."""
        newest = self.picture.data if self.picture else self.previews[-1].data if self.previews else None
        return PictureTile(self.order.prompt, self._words(), newest)

    def _words(self) -> str:
        first = "" if self.first_preview_s is None else f"{1e3 * self.first_preview_s:.0f} ms"
        if self.total_s is not None:
            return f"{self.total_s:.2f} s, first {first}" if first else f"{self.total_s:.2f} s"
        if (at := self.progress) is None:
            return "waiting"
        return f"{bar(at.step, at.num_steps)} {at.step}/{at.num_steps} ×{at.batch_size} {first}"

    def figures(self) -> str:
        """The times for the last line: first preview, steps a second, total."""
        total = self.total_s or 0.0
        figures = [] if self.first_preview_s is None else [f"first preview {1e3 * self.first_preview_s:.0f} ms"]
        if self.progress and total and self.finished:
            figures.append(f"{self.finished.usage.num_steps / total:.1f} steps/s")
        if self.finished and (skipped := self.finished.usage.num_rows_skipped):
            figures.append(f"{skipped} of {self.finished.usage.num_rows + skipped} rows skipped")
        return ", ".join([*figures, f"total {total:.2f} s"])

    def origin(self) -> str:
        """The generation's name and, if it used earlier work, which and how much that saved."""
        if self.finished is None:
            return ""
        [origin] = self.finished.origins
        facts = {
            "similarity": f"{origin.similarity:.2f}" if origin.similarity else "",
            "from": origin.source,
            "steps skipped": origin.num_steps_skipped or "",
            "numerics": origin.numerics_id,
        }
        known = ", ".join(f"{name} {fact}" for name, fact in facts.items() if fact)
        how = (
            ""
            if origin.disposition == "miss" and not known
            else f"  {origin.disposition}" + (f" ({known})" if known else "")
        )
        given_up = self.finished.degradations
        under_load = ", ".join(f"{d.kind.replace('_', ' ')} ({d.requested} to {d.applied})" for d in given_up)
        return f"{self.finished.generation}{how}" + (f"  under load: {under_load}" if under_load else "")


async def generate_one(
    connect: Callable[[], Client], order: DemoRequest, console: Console
) -> tuple[Picture, LivePicture]:
    """Generates one picture, and shows its previews if the terminal has colours.

    Raises:
        DemoError: the request has a bad value, or no picture came.
        GenerationError: the server refused the request, or the generation failed.
    """
    developing = LivePicture(order)
    async with connect() as client:
        await _develop_shown(client, [developing], console)
    if developing.picture is None:
        raise DemoError("the server sent no picture")
    return developing.picture, developing


async def demo(settings: Settings, out: Path, console: Console, adapters: Mapping[str, float] | None = None) -> None:
    """Starts a server, generates the pictures of `PROMPTS` at once, writes them to folders in `out`, stops the server.

    Args:
        adapters: each picture is generated with them too, beside the one without, from the same seed.

    Raises:
        DemoError: the server did not start, or a picture is missing.
        OSError: a file cannot be written.
    """
    orders = [DemoRequest(prompt, seed=SEED + place) for place, prompt in enumerate(PROMPTS)]
    if adapters:
        orders += [replace(order, adapters=adapters) for order in orders]
    async with _server(settings) as target, Client(target) as client:
        console.print(f"a server of the demo's own listens on {target}", highlight=False)
        if console.is_terminal:
            console.print("steps, ×pictures that share a call, time to the first preview:", highlight=False)
        developing = [LivePicture(order) for order in orders]
        began = time.monotonic()
        await _develop_shown(client, developing, console)
        total = time.monotonic() - began
    for place, item in enumerate(developing):
        styled = "".join(f"-{name}" for name in item.order.adapters or ())
        sheet = write(item, out / f"{place % len(PROMPTS) + 1}-{_slug(item.order.prompt)}{styled}")
        console.print(f"{sheet}  {item.figures()}", highlight=False, soft_wrap=True)
    if adapters:
        pictures = [item.picture for item in developing if item.picture]
        beside = out / "without-and-with.png"
        contact_sheet([_image(one.data) for one in pictures], pictures[0].width_px, len(PROMPTS)).save(beside)
        console.print(f"{beside}  above without adapters, below with them", highlight=False, soft_wrap=True)
    steps = sum(item.progress.num_steps for item in developing if item.progress)
    console.print(f"{len(orders)} pictures in {total:.2f} s, {steps / total:.0f} steps/s together", highlight=False)


async def _develop_shown(client: Client, developing: Sequence[LivePicture], console: Console) -> None:
    pictures = console.is_terminal and console.color_system in ("truecolor", "256")

    def view() -> RenderableType:
        shown = [item.shown() for item in developing]
        return show(shown, console.width, console.height) if pictures else lines(shown)

    async def develop(item: LivePicture) -> None:
        order = item.order
        item.began = time.monotonic()
        width, height = order.size or (None, None)
        events = client.generate(
            order.prompt,
            negative_prompt=order.negative_prompt,
            model=order.model,
            seed=order.seed,
            steps=order.steps,
            guidance_scale=order.guidance_scale,
            guidance_rescale=order.guidance_rescale,
            guidance_interval=order.guidance_interval,
            adapters=order.adapters,
            controls=order.controls,
            sampler=order.sampler,
            media_type=order.media_type,
            timeout_s=order.timeout_s,
            cache=order.cache,
            branch=order.branch,
            init_image=order.init_image,
            strength=order.strength,
            mask=order.mask,
            image_prompt=order.image_prompt,
            image_prompt_scale=order.image_prompt_scale,
            width=width,
            height=height,
            quality_floor=order.quality_floor,
            preview=PreviewPolicy(accept=[PixelEncoding(media_type="image/png")]),
        )
        async for event in events:
            item.take(event)

    live = Live(console=console, get_renderable=view, refresh_per_second=10) if console.is_terminal else None
    if live is not None:
        live.start()
    try:
        async with asyncio.TaskGroup() as group:
            for item in developing:
                group.create_task(develop(item))
    except* GenerationError as failures:
        raise failures.exceptions[0] from None
    except* ValueError as failures:
        raise DemoError(f"{failures.exceptions[0]}") from None
    finally:
        if live is not None:
            live.stop()


@contextlib.asynccontextmanager
async def _server(settings: Settings) -> AsyncIterator[str]:
    """Runs `safelight serve` in a process of its own while the block runs; yields its address."""
    command = [sys.executable, "-m", "safelight_server.cli.main", "serve", "--port", "0", "--log-format", "console"]
    command += ["--models-dir", str(settings.models_dir)]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield await _address(process)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _address(process: asyncio.subprocess.Process) -> str:
    """Reads the address from the output of a server that is starting."""
    assert process.stdout is not None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(START_TIMEOUT_S):
            while line := (await process.stdout.readline()).decode():
                if "listens on" in line:
                    return line.split("listens on", 1)[1].strip()
    raise DemoError("the server did not start; try `safelight serve`")


def write(item: LivePicture, folder: Path) -> Path:
    """Writes the previews, the picture and a contact sheet to `folder`; returns the sheet's path."""
    folder.mkdir(parents=True, exist_ok=True)
    if item.picture is None:
        raise DemoError(f"no picture of {item.order.prompt!r}")
    for preview in item.previews:
        (folder / f"step-{preview.step:02}.png").write_bytes(preview.data)
    (folder / "picture.png").write_bytes(item.picture.data)
    cells = [_image(preview.data) for preview in item.previews] + [_image(item.picture.data)]
    sheet = contact_sheet(cells, item.picture.width_px)
    path = folder / "contact-sheet.png"
    sheet.save(path)
    return path


def contact_sheet(cells: Sequence[Image.Image], size_px: int, columns: int = 7, gap_px: int = 4) -> Image.Image:
    """Lays images out in rows of `columns`, all scaled to `size_px` square."""
    rows = -(-len(cells) // columns)
    step = size_px + gap_px
    sheet = Image.new("RGB", (min(columns, len(cells)) * step - gap_px, rows * step - gap_px), (20, 20, 20))
    for place, cell in enumerate(cells):
        scaled = cell.resize((size_px, size_px), Image.Resampling.BICUBIC) if cell.width != size_px else cell
        sheet.paste(scaled, ((place % columns) * step, (place // columns) * step))
    return sheet


def _image(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _slug(prompt: str) -> str:
    return "-".join(word for word in prompt.split() if word not in ("a", "on", "with", "background"))
