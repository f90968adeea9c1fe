"""Generates the API reference from the comments of proto/: one Markdown page for each of our proto files.

A small generator of our own: protoc-gen-doc has had no release since 2022 and would need Go, and sabledocs writes a
site of its own whose links `mkdocs build --strict` cannot check. `tools/site/hooks.py` calls it while `make docs` runs.
"""

from __future__ import annotations

import importlib.resources
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

PROTO = Path(__file__).parent.parent / "proto"
PACKAGE = "safelight.v1"
SYNTAX, SERVICES, MESSAGES, ENUMS = 12, 6, 4, 5
"""Field numbers in FileDescriptorProto, with which the paths in its source info begin."""

Path_ = tuple[int, ...]
Comments = Mapping[Path_, str]


def load(folder: Path = PROTO) -> list[FileDescriptorProto]:
    """Compiles our proto files, with their comments.

    Raises:
        ValueError: they do not compile; protoc has printed the errors.
    """
    ours = sorted(str(path.relative_to(folder)) for path in (folder / "safelight").rglob("*.proto"))
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "set"
        roots = [f"-I{root}" for root in (folder, folder / "third_party", well_known)]
        if protoc.main(["protoc", *roots, "--include_source_info", f"--descriptor_set_out={out}", *ours]):
            raise ValueError(f"{folder}: protoc has failed")
        return list(FileDescriptorSet.FromString(out.read_bytes()).file)


def pages(files: Iterable[FileDescriptorProto]) -> dict[str, str]:
    """Renders Markdown pages, by the stem of the proto file's name, such as "generation"."""
    files = list(files)
    where = {name: Path(file.name).stem for file in files for name, _, _ in _types(file)}
    return {Path(file.name).stem: _page(file, where) for file in files}


def _page(file: FileDescriptorProto, where: Mapping[str, str]) -> str:
    comments = {tuple(at.path): _clean(at.leading_comments) for at in file.source_code_info.location}
    about = comments[(SYNTAX,)]
    stem = Path(file.name).stem
    lines = [f"# {stem}.proto", "", f"Generated from the comments of `proto/{file.name}`.", "", about, ""]
    for index, service in enumerate(file.service):
        lines += _service(service, (SERVICES, index), comments, stem, where)
    for name, kind, path in _types(file):
        if isinstance(kind, EnumDescriptorProto):
            lines += _enum(name, kind, path, comments)
        elif not kind.options.map_entry:
            lines += _message(name, kind, path, comments, stem, where)
    return "\n".join(lines)


def _types(file: FileDescriptorProto) -> Iterator[tuple[str, DescriptorProto | EnumDescriptorProto, Path_]]:
    """All messages and enums with their names in the package; nested ones follow the message that contains them."""
    for index, message in enumerate(file.message_type):
        yield from _nested(message.name, message, (MESSAGES, index))
    for index, enum in enumerate(file.enum_type):
        yield enum.name, enum, (ENUMS, index)


def _nested(
    name: str, message: DescriptorProto, path: Path_
) -> Iterator[tuple[str, DescriptorProto | EnumDescriptorProto, Path_]]:
    yield name, message, path
    for index, inner in enumerate(message.nested_type):
        yield from _nested(f"{name}.{inner.name}", inner, (*path, 3, index))
    for index, enum in enumerate(message.enum_type):
        yield f"{name}.{enum.name}", enum, (*path, 4, index)


def _service(
    service: ServiceDescriptorProto, path: Path_, comments: Comments, stem: str, where: Mapping[str, str]
) -> list[str]:
    lines = [_heading(2, service.name), "", comments[path], ""]
    for index, method in enumerate(service.method):
        takes, gives = (_link(kind, stem, where) for kind in (method.input_type, method.output_type))
        stream = "a stream of " if method.server_streaming else ""
        lines += [_heading(3, f"{service.name}.{method.name}"), "", f"Takes {takes}, returns {stream}{gives}.", ""]
        lines += [comments[(*path, 2, index)], ""]
    return lines


def _message(
    name: str, message: DescriptorProto, path: Path_, comments: Comments, stem: str, where: Mapping[str, str]
) -> list[str]:
    lines = [_heading(2, name), "", comments[path], ""]
    if message.field:
        lines += ["| number | field | type | meaning |", "|---|---|---|---|"]
    entries = {inner.name: inner for inner in message.nested_type if inner.options.map_entry}
    for index, field in enumerate(message.field):
        kind = _kind(field, entries, stem, where)
        if field.HasField("oneof_index") and not field.proto3_optional:
            kind += f", one of `{message.oneof_decl[field.oneof_index].name}`"
        meaning = _cell(comments[(*path, 2, index)])
        lines.append(f"| {field.number} | `{field.name}` | {kind} | {meaning} |")
    return [*lines, ""]


def _enum(name: str, enum: EnumDescriptorProto, path: Path_, comments: Comments) -> list[str]:
    lines = [_heading(2, name), "", comments[path], "", "| number | value | meaning |", "|---|---|---|"]
    for index, value in enumerate(enum.value):
        lines.append(f"| {value.number} | `{value.name}` | {_cell(comments[(*path, 2, index)])} |")
    return [*lines, ""]


def _kind(
    field: FieldDescriptorProto, entries: Mapping[str, DescriptorProto], stem: str, where: Mapping[str, str]
) -> str:
    entry = entries.get(field.type_name.rpartition(".")[2])
    if entry is not None:
        key, value = (_kind(part, {}, stem, where) for part in entry.field)
        return f"map from {key} to {value}"
    kind = _link(field.type_name, stem, where) if field.type_name else f"`{_scalar(field)}`"
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {kind}"
    return f"optional {kind}" if field.proto3_optional else kind


def _scalar(field: FieldDescriptorProto) -> str:
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def _link(kind: str, stem: str, where: Mapping[str, str]) -> str:
    name = kind.removeprefix(f".{PACKAGE}.")
    if name not in where:
        return f"`{kind.removeprefix('.')}`"
    page = "" if where[name] == stem else f"{where[name]}.md"
    return f"[{name}]({page}#{_anchor(name)})"


def _heading(level: int, name: str) -> str:
    return f"{'#' * level} {name} {{#{_anchor(name)}}}"


def _anchor(name: str) -> str:
    return name.lower().replace(".", "-")


def _clean(comment: str) -> str:
    return "\n".join(line.strip() for line in comment.strip().splitlines())


def _cell(comment: str) -> str:
    return re.sub(r"\s+", " ", comment).replace("|", "\\|")
