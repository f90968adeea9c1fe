"""Describes a model for people: what it makes of what, and what a request for it can have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from safelight import Model, Task

TASKS = {
    Task.TASK_TEXT_TO_IMAGE: "from text",
    Task.TASK_IMAGE_TO_IMAGE: "from a picture (--init)",
    Task.TASK_INPAINTING: "in a part of a picture (--init, --mask)",
}
"""What is drawn, by task."""


def described(model: Model) -> Iterator[str]:
    """The lines that describe a model; each begins with what it is about."""
    defaults, limits = model.defaults, model.limits
    yield f"{model.name}  {model.revision}  on {model.runtime}{'  (default)' if model.is_default else ''}"
    about = [model.description, f"licence {model.license}"]
    yield f"    {'; '.join(filter(None, about))}"
    if tasks := [TASKS[task] for task in model.tasks if task in TASKS]:
        only = "only " if list(model.tasks) == [Task.TASK_INPAINTING] else ""
        yield f"    draws {only}{', '.join(tasks)}"
    yield f"    sizes {', '.join(f'{size.width_px}x{size.height_px}' for size in model.sizes)}"
    yield (
        f"    {defaults.num_inference_steps} steps with guidance {defaults.guidance_scale:g} if a request does not say;"
        f" at most {limits.max_num_inference_steps} steps, guidance {limits.max_guidance_scale:g}"
    )
    yield f"    samplers {', '.join(sampler.name for sampler in model.samplers)}"
    if limits.max_adapter_rank or model.adapters:
        yield f"    adapters {_adapters(model)}"
    if model.controls:
        yield f"    controls {', '.join(control.name for control in model.controls)} (--control)"
    if model.image_prompt:
        yield "    takes a picture as a prompt (--image-prompt)"
    for note in model.notes:
        yield f"    note: {note}"


def _adapters(model: Model) -> str:
    """The adapters that fit a model, and how many ranks it has room for."""
    room = f"ranks of {model.limits.max_adapter_rank} together in a request"
    if not model.adapters:
        return f"(--adapter): none is there that fits; there is room for {room}"
    named = (f"{adapter.name} (rank {adapter.rank}{_where(adapter.components)})" for adapter in model.adapters)
    return f"{', '.join(named)}; {room} (--adapter)"


def _where(components: Sequence[str]) -> str:
    """What is said of an adapter that changes more than the denoiser."""
    if "text_encoder" not in components:
        return ""
    return ", text too" if "denoiser" in components else ", text alone"
