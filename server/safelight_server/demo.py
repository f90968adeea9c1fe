"""Pictures that develop in a terminal: one from a running server, or several from a server of the demo's own."""

from __future__ import annotations

import asyncio
import io
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text
from safelight import Client, Finished, GenerationError, Picture, PixelEncoding, Preview, PreviewPolicy, Progress
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
CELL_PX = 20
"""Edge of a preview in the terminal: half as many lines."""


class DemoError(Exception):
    """The demo cannot go on."""


@dataclass(frozen=True, slots=True)
class Order:
    """What the command line asks for."""

    prompt: str
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str = ""
    negative_prompt: str = ""
    model: str = ""
    media_type: str = "image/png"
    timeout_s: float | None = None


@dataclass(slots=True)
class Developing:
    """One picture on its way, as it is shown."""

    order: Order
    began: float = field(default_factory=time.monotonic)
    progress: Progress | None = None
    previews: list[Preview] = field(default_factory=list)
    picture: Picture | None = None
    first_preview_s: float | None = None
    total_s: float | None = None

    def take(self, event: Progress | Preview | Picture | Finished) -> None:
        """Takes in an event."""
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
                self.total_s = now

    def line(self) -> str:
        """A bar and the figures."""
        if self.progress is None:
            return "waiting"
        at = self.progress
        filled = round(20 * at.step / at.num_steps)
        first = "" if self.first_preview_s is None else f"  first preview {1e3 * self.first_preview_s:.0f} ms"
        total = "" if self.total_s is None else f"  done {self.total_s:.2f} s"
        return f"{'█' * filled}{'░' * (20 - filled)} {at.step}/{at.num_steps}  batch {at.batch_size}{first}{total}"

    def figures(self) -> str:
        """What is printed at the end."""
        steps = self.progress.num_steps if self.progress else 0
        total = self.total_s or 0.0
        first = f"{1e3 * (self.first_preview_s or 0):.0f} ms"
        return f"first preview {first}, {steps / total if total else 0:.1f} steps/s, total {total:.2f} s"

    def render(self, console: Console, pictures: bool) -> RenderableType:
        """How it looks in the terminal."""
        title = Text(self.order.prompt, style="bold")
        newest = self.picture.data if self.picture else self.previews[-1].data if self.previews else None
        if not pictures:
            return Group(title, Text(self.line()))
        return Group(title, half_blocks(newest), Text(self.line()))


async def generate_one(target: str, api_key: str | None, order: Order, console: Console) -> tuple[Picture, str]:
    """Develops one picture, shown where the terminal has colour."""
    developing = Developing(order)
    async with Client(target, api_key=api_key) as client:
        await _develop_shown(client, [developing], console)
    if developing.picture is None:
        raise DemoError("the server sent no picture")
    return developing.picture, developing.figures()


async def demo(settings: Settings, out: Path, console: Console) -> None:
    """Starts a server, develops several pictures at once, writes them, stops the server."""
    orders = [Order(prompt, seed=SEED + place) for place, prompt in enumerate(PROMPTS)]
    async with _server(settings) as target, Client(target) as client:
        console.print(f"a server of the demo's own listens on {target}", highlight=False)
        developing = [Developing(order) for order in orders]
        began = time.monotonic()
        await _develop_shown(client, developing, console)
        total = time.monotonic() - began
    for place, item in enumerate(developing):
        sheet = write(item, out / f"{place + 1}-{_slug(item.order.prompt)}")
        console.print(f"{sheet}  {item.figures()}", highlight=False, soft_wrap=True)
    steps = sum(item.progress.num_steps for item in developing if item.progress)
    console.print(f"{len(orders)} pictures in {total:.2f} s, {steps / total:.0f} steps/s together", highlight=False)


async def _develop_shown(client: Client, developing: Sequence[Developing], console: Console) -> None:
    pictures = console.is_terminal and console.color_system in ("truecolor", "256")

    def view() -> RenderableType:
        return Columns([item.render(console, pictures) for item in developing], padding=(1, 3))

    async def develop(item: Developing) -> None:
        order = item.order
        item.began = time.monotonic()
        events = client.generate(
            order.prompt,
            negative_prompt=order.negative_prompt,
            model=order.model,
            seed=order.seed,
            steps=order.steps,
            guidance_scale=order.guidance_scale,
            sampler=order.sampler,
            media_type=order.media_type,
            timeout_s=order.timeout_s,
            preview=PreviewPolicy(accept=[PixelEncoding(media_type="image/png")]),
        )
        async for event in events:
            item.take(event)
            if live is not None:
                live.update(view())

    live = Live(view(), console=console, refresh_per_second=12) if console.is_terminal else None
    if live is not None:
        live.start()
    try:
        async with asyncio.TaskGroup() as group:
            for item in developing:
                group.create_task(develop(item))
    except* (GenerationError, OSError, ValueError) as failures:
        raise failures.exceptions[0] from None
    finally:
        if live is not None:
            live.stop()


@asynccontextmanager
async def _server(settings: Settings) -> AsyncIterator[str]:
    """A server in a process of its own; its address."""
    command = [sys.executable, "-m", "safelight_server.cli", "serve", "--port", "0", "--log-format", "console"]
    command += ["--models-dir", str(settings.models_dir)]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while line := (await process.stdout.readline()).decode():
                if "listens on" in line:
                    yield line.split("listens on", 1)[1].strip()
                    break
            else:
                raise DemoError("the server did not start; try `safelight serve`")
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def write(item: Developing, folder: Path) -> Path:
    """Writes previews, picture and a contact sheet; the sheet's path."""
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
    """Rows of previews, all at one size, the finished picture last."""
    rows = -(-len(cells) // columns)
    step = size_px + gap_px
    sheet = Image.new("RGB", (min(columns, len(cells)) * step - gap_px, rows * step - gap_px), (20, 20, 20))
    for place, cell in enumerate(cells):
        scaled = cell.resize((size_px, size_px), Image.Resampling.BICUBIC) if cell.width != size_px else cell
        sheet.paste(scaled, ((place % columns) * step, (place // columns) * step))
    return sheet


def half_blocks(data: bytes | None) -> Text:
    """A picture as half blocks: two pixels a character."""
    text = Text()
    if data is None:
        return Text("\n" * (CELL_PX // 2 - 1))
    pixels = _image(data).resize((CELL_PX * 2, CELL_PX), Image.Resampling.BOX).load()
    assert pixels is not None
    for y in range(0, CELL_PX, 2):
        for x in range(CELL_PX * 2):
            upper, lower = pixels[x, y], pixels[x, y + 1]
            text.append("▀", style=f"rgb({_csv(upper)}) on rgb({_csv(lower)})")
        text.append("\n")
    text.right_crop(1)
    return text


def _csv(pixel: object) -> str:
    return ",".join(map(str, pixel)) if isinstance(pixel, tuple) else "0,0,0"


def _image(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _slug(prompt: str) -> str:
    return "-".join(word for word in prompt.split() if word not in ("a", "on", "with", "background"))
