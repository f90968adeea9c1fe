"""The arguments of `safelight generate`: what they mean, and the option that an error names."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from safelight_server.cli.command import CommandError
from safelight_server.cli.generate import OPTIONS, generate, option_of, parse_controls
from typer.testing import CliRunner

NOBODY = "unix:/nowhere/socket"


def refusal(*arguments: str) -> str:
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command()(generate)
    ended = CliRunner().invoke(alone, ["a sword", "--target", NOBODY, *arguments])
    assert isinstance(ended.exception, CommandError), ended.output
    return str(ended.exception)


@pytest.mark.parametrize("size", ["768", "768x", "x512", "768x512x3", "-1x512", "768X512", "1e3x5", "7680000000x512"])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    assert refusal("--size", size) == f"--size {size}: must be WIDTHxHEIGHT, such as 768x512"


def test_a_file_with_a_colon_is_a_control_and_a_misspelt_number_is_not(tmp_path: Path) -> None:
    file = tmp_path / "12:30.png"
    file.write_bytes(b"")
    [plain, scaled] = parse_controls([f"edges={file}", f"depth={file}:0.5:0:1"])
    assert (plain.image, plain.scale) == (file, None)
    assert (scaled.image, scaled.scale, scaled.start, scaled.end) == (file, 0.5, 0.0, 1.0)
    with pytest.raises(CommandError, match="must be NAME=FILE"):
        parse_controls([f"edges={tmp_path}/none.png:high"])
    with pytest.raises(CommandError, match="edges is there twice"):
        parse_controls([f"edges={file}", f"edges={file}:0.5"])


def test_a_file_that_is_missing_is_named_by_its_option(tmp_path: Path) -> None:
    missing = tmp_path / "none.png"
    assert refusal("--init", str(missing)) == f"--init: {missing}: No such file or directory"
    assert refusal("--control", f"edges={missing}") == f"--control: {missing}: No such file or directory"
    assert refusal("--image-prompt-scale", "1").startswith("--image-prompt-scale: ")


@pytest.mark.parametrize(
    ("field", "option"),
    [
        ("spec.prompt", "PROMPT"),
        ("spec.prompts[0].text", "--negative"),
        ("spec.sampler.name", "--sampler"),
        ("spec.controls[1].start", "--control"),
        ("spec.image_prompt.image", "--image-prompt"),
        ("spec.image_prompt.scale", "--image-prompt-scale"),
        ("spec.guidance_interval.end", "--guidance-interval"),
        ("controls[0].image", "--control"),
        ("quality_floor.min_num_steps", "--floor-steps"),
        ("branch.step", "--branch"),
        ("quality_floor", "quality_floor"),
        ("labels[x]", "labels[x]"),
    ],
)
def test_an_error_names_the_option_that_sets_the_field(field: str, option: str) -> None:
    assert option_of(field) == option


def test_every_option_that_is_named_exists() -> None:
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command()(generate)
    said = CliRunner().invoke(alone, ["--help"]).output
    assert {option for option in OPTIONS.values() if option.removeprefix("PROMPT") not in said} == set()
