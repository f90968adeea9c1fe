"""Adapters (LoRA, Hu et al. 2021): follows a folder of them while the server runs.

`<folder>/<name>/` has one `*.safetensors` as peft, diffusers or kohya's scripts
write it, and beside a file of peft's `adapter_config.json`; `<folder>/<name>.safetensors`
is an adapter too. What is in `<folder>/@<tenant>/` is for callers of that tenant alone, and
goes before a file of the same name that is for all. An adapter is offered for each model whose room
(`manifest.AdapterRoom`) it fits: every layer that it changes is one of the model's
targets.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from safelight_server.catalog.adapter_files import AdapterFileError, is_of_text, packed, parse
from safelight_server.catalog.adapter_names import (
    plain_name,
)
from safelight_server.catalog.manifest import AdapterRoom, AdapterTarget
from safelight_server.domain.component import Component
from safelight_server.domain.tensors import FloatArray
from safelight_server.files import LOOK_EVERY_S, read_regular_file
from safelight_server.threads import OneAtATime

log = structlog.get_logger(__name__)

MAX_ADAPTERS = 256
"""Adapters that are offered of those for all, and of those of each tenant: those first by name."""
MAX_CONFIG_BYTES = 1 << 20
MAX_REASON_CHARS = 300
LASTING = (errno.EFBIG, errno.EINVAL)
"""Errors of `read_regular_file` that say what a file is. After others it is read again, though it has not changed."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
OF_TENANT = re.compile(r"@(?P<tenant>[A-Za-z0-9._-]{1,64})")
FOR_ALL = ""
"""Stands for the tenant of adapters that are for all."""
SUFFIX = ".safetensors"
PICKLES = (".pt", ".pth", ".ckpt", ".bin")
LAYERS_HINT = "safelight export --adapter-layers"


class AdapterRoomError(Exception):
    """The adapters that are in use leave no memory for another one."""


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter as it lies in the folder.

    Attributes:
        sha256: of its weights' file and, behind it, of the configuration beside it, where there is one.
        shapes: rank, inputs, outputs and the kernel's edge (`LowRankLayer.shape`) by `plain_name` of a layer.
    """

    name: str
    path: Path
    sha256: str
    shapes: Mapping[str, tuple[int, int, int, int]] = field(repr=False)

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(rank for rank, *_ in self.shapes.values())

    @property
    def changes_text(self) -> bool:
        """Whether it changes a text encoder."""
        return any(map(is_of_text, self.shapes))

    @property
    def components(self) -> tuple[Component, ...]:
        """The components that it changes."""
        of_text = (Component.TEXT_ENCODER,) if self.changes_text else ()
        return of_text if all(map(is_of_text, self.shapes)) else (Component.DENOISER, *of_text)

    def misfit(self, room: AdapterRoom, text_room: AdapterRoom | None = None) -> str:
        """Why it does not fit into a denoiser's room, and that of the text encoders; empty where it does."""
        if text_room is None and (of_text := next(filter(is_of_text, self.shapes), None)) is not None:
            return f"changes the text encoder ({of_text}); the model was exported without room for that"
        targets = {plain_name(target.name): target for target in joined_room(room, text_room).targets}
        if self.rank > room.max_rank:
            return f"has rank {self.rank}; the model has room for {room.max_rank}"
        for layer, (_, *form) in self.shapes.items():
            target = targets.get(layer)
            if target is None:
                hint = "of text encoders the layers of CLIP have room" if is_of_text(layer) else LAYERS_HINT
                return f"changes {layer}, which is no target of the model ({hint})"
            own = [target.inputs, target.outputs, target.edge]
            if form != own:
                inputs, outputs, edge = form
                changed = AdapterTarget(name=layer, inputs=inputs, outputs=outputs, kernel=edge if edge > 1 else None)
                return f"changes {target.name} as {changed.form}; the model's is {target.form}"
        return ""


def joined_room(room: AdapterRoom, text_room: AdapterRoom | None) -> AdapterRoom:
    """The room of a denoiser and behind it that of the text encoders, for adapters that change both."""
    targets = room.targets if text_room is None else (*room.targets, *text_room.targets)
    return room.model_copy(update={"targets": targets})


class AdapterLibrary:
    """The adapters of a folder, by the models that they fit; new and changed files are found while the server runs.

    Invariant: the weights that a request was given stay in memory until its outputs have ended, whatever happens to
    the file; weights that nobody uses are given up for others, those that were used longest ago first.

    Args:
        folder: None: there are no adapters.
        rooms: of the models that take adapters, by their names.
        text_rooms: of those whose text encoders take them too.
        max_bytes: of weights in memory, and of a file.
    """

    def __init__(
        self,
        folder: Path | None = None,
        rooms: Mapping[str, AdapterRoom] | None = None,
        max_bytes: int = 1 << 30,
        text_rooms: Mapping[str, AdapterRoom] | None = None,
    ) -> None:
        self._folder = folder
        self._rooms = dict(rooms or {})
        self._text_rooms = dict(text_rooms or {})
        self._max_bytes = max_bytes
        self._files: dict[Path, tuple[object, AdapterFile | str]] = {}
        self._num_there: dict[Path, int] = {}
        self._offered: dict[str, dict[str, dict[str, AdapterFile]]] = {}  # by model, tenant and name
        self._misfits: dict[str, dict[str, dict[str, str]]] = {}
        self._one_at_a_time = OneAtATime()
        self._loading = threading.Lock()
        self._counting = threading.Lock()  # held for moments alone, unlike `_loading`
        self._unreadable: dict[Path, str] = {}
        self._kept: OrderedDict[tuple[str, str], FloatArray] = OrderedDict()
        self._alive: weakref.WeakValueDictionary[tuple[str, str], FloatArray] = weakref.WeakValueDictionary()
        self.look()

    def of(self, model: str, tenant: str = FOR_ALL) -> Mapping[str, AdapterFile]:
        """The adapters that fit a model, by name, in the order of their names: those for all, and a tenant's own."""
        offered = self._offered.get(model, {})
        shared, own = offered.get(FOR_ALL, {}), offered.get(tenant, {})
        broken = self._misfits.get(model, {}).get(tenant, {}) if tenant else {}
        if not (own or broken):
            return shared
        # A tenant's own file that cannot be used does not give way to another one of its name without a word.
        both = {**{name: file for name, file in shared.items() if name not in broken}, **own}
        return dict(sorted(both.items()))

    def misfit(self, model: str, name: str, tenant: str = FOR_ALL) -> str:
        """Why an adapter that is there is not offered for a model; empty where a tenant may know nothing of it."""
        misfits = self._misfits.get(model, {})
        return misfits.get(tenant, {}).get(name) or misfits.get(FOR_ALL, {}).get(name, "")

    async def follow(self) -> None:
        """Looks once a second, until cancelled, what is in the folder; in a thread, so that the loop goes on."""
        while self._folder is not None and self._rooms:
            await asyncio.sleep(LOOK_EVERY_S)
            await asyncio.to_thread(self.look)

    def look(self) -> None:
        """Reads what is new in the folder. May block."""
        if self._folder is None or not self._rooms:
            return
        if (files := self._look()) is None or files == self._files:
            return
        offered: dict[str, dict[str, dict[str, AdapterFile]]] = {model: {} for model in self._rooms}
        misfits: dict[str, dict[str, dict[str, str]]] = {model: {} for model in self._rooms}
        for path, (_, found) in files.items():
            tenant, reasons = self._tenant(path), dict[str, str]()
            for model in self._rooms:
                why = found if isinstance(found, str) else self._misfit(found, model)
                if isinstance(found, str) or why:
                    reasons[model] = _shown(why)
                    misfits[model].setdefault(tenant, {}).setdefault(_name(path), reasons[model])
                else:
                    offered[model].setdefault(tenant, {})[found.name] = found
            if files[path] != self._files.get(path):
                self._tell(path, found, reasons)
        for path in self._files.keys() - files.keys():
            log.info("adapter_removed", **self._told(path))
        self._files, self._offered, self._misfits = files, offered, misfits

    def _misfit(self, file: AdapterFile, model: str) -> str:
        if why := file.misfit(self._rooms[model], self._text_rooms.get(model)):
            return why
        num_bytes = 4 * file.rank * self._room(file, model).width
        if num_bytes > self._max_bytes:
            return f"takes {num_bytes} bytes; all adapters together may take {self._max_bytes} (max_adapter_bytes)"
        return ""

    def _room(self, file: AdapterFile, model: str) -> AdapterRoom:
        return joined_room(self._rooms[model], self._text_rooms.get(model) if file.changes_text else None)

    def _tenant(self, path: Path) -> str:
        """The tenant whose callers alone an adapter is for, or `FOR_ALL`."""
        found = None if path.parent == self._folder else OF_TENANT.fullmatch(path.parent.name)
        return FOR_ALL if found is None else found["tenant"]

    def _told(self, path: Path) -> dict[str, str]:
        """What logs call an adapter."""
        return {"adapter": _name(path)} | ({"tenant": tenant} if (tenant := self._tenant(path)) else {})

    def _tell(self, path: Path, found: AdapterFile | str, reasons: Mapping[str, str]) -> None:
        """Logs what was found. `reasons` why not, by the models that an adapter does not fit."""
        models = [model for model in self._rooms if model not in reasons]
        if isinstance(found, str):
            log.warning("adapter_not_offered", **self._told(path), file=str(path), reason=_shown(found))
        elif models:
            facts = {"rank": found.rank, "components": found.components, "sha256": found.sha256}
            log.info("adapter_offered", **self._told(path), models=models, **facts)
        else:
            log.warning("adapter_not_offered", **self._told(path), reasons=dict(reasons))

    def _look(self) -> dict[Path, tuple[object, AdapterFile | str]] | None:
        """What is in the folder; None: it cannot be read now, and what was there before stays."""
        assert self._folder is not None
        if (there := self._listed(self._folder)) is None:
            return None
        tenants = sorted(path for path in there if OF_TENANT.fullmatch(path.name) and _is_folder(path))
        found = self._found_in(self._folder, [path for path in there if path not in tenants])
        for folder in tenants:
            if (there := self._listed(folder)) is None:
                found |= {path: known for path, known in self._files.items() if path.parent == folder}
            else:
                found |= self._found_in(folder, there)
        return found

    def _listed(self, folder: Path) -> list[Path] | None:
        """What is in a folder of adapters; None: it cannot be read now."""
        try:
            there = list(folder.iterdir())
        except FileNotFoundError:
            there = []
        except OSError as error:
            if self._unreadable.get(folder) != (why := str(error.strerror)):
                log.error("adapters_unreadable", folder=str(folder), error=why)
            self._unreadable[folder] = why
            return None
        self._unreadable.pop(folder, None)
        return there

    def _found_in(self, folder: Path, there: Iterable[Path]) -> dict[Path, tuple[object, AdapterFile | str]]:
        # What cannot be an adapter takes no place of one that can; of one name the folder comes first.
        paths = sorted(filter(_is_adapter, there), key=lambda path: (not _may_fit(path), _name(path), _is_file(path)))
        if len(paths) > MAX_ADAPTERS and len(paths) != self._num_there.get(folder):
            log.warning("too_many_adapters", folder=str(folder), offered=MAX_ADAPTERS, there=len(paths))
        self._num_there[folder] = len(paths)
        found, last = {}, ""
        for path in paths[:MAX_ADAPTERS]:
            is_second, last = _name(path) == last, _name(path)
            found[path] = self._found(path, is_second)
        return found

    def _found(self, path: Path, is_second: bool) -> tuple[object, AdapterFile | str]:
        """The stamp of an adapter's folder or file, and what is in it or why it cannot be used."""
        seen, known = _stamp(path), self._files.get(path)
        stamp = None if seen is None else (seen, is_second)
        if known is not None and stamp is not None and known[0] == stamp:
            return known
        try:
            return stamp, self._read_facts(path, is_second)
        except AdapterFileError as error:
            return stamp, str(error)
        except OSError as error:
            why = f"cannot be read: {error.strerror}"
            if error.errno in LASTING:
                return stamp, why
            # It is read again, and what was known of it stays till then.
            return None, why if known is None else known[1]

    def _read_facts(self, path: Path, is_second: bool) -> AdapterFile:
        """Reads an adapter. `is_second`: another one has its name."""
        name = _name(path)
        if NAME.fullmatch(name) is None:
            form = "letters, digits, '.', '_' and '-', at most 64, a letter or a digit first"
            raise AdapterFileError(f"has a name that requests cannot say; rename it: {form}")
        if is_second:
            raise AdapterFileError(f"has the name of the folder {name} beside it; rename one of them")
        data, config = self._read(path)
        layers = parse(data, config)
        return AdapterFile(name, path, _sha256(data, config), {at: layer.shape for at, layer in layers.items()})

    def _read(self, path: Path) -> tuple[bytes, bytes]:
        is_folder = _is_folder(path)
        files = sorted(file for file in path.iterdir() if file.name[0] != ".") if is_folder else [path]
        weights = [file for file in files if file.suffix == SUFFIX]
        if not weights and any(file.suffix in PICKLES for file in files):
            raise AdapterFileError(f"is a pickle, which can run code when it is read; convert it to *{SUFFIX}")
        if len(weights) != 1:
            named = ", ".join(file.name for file in weights[:4]) or "none"
            raise AdapterFileError(f"must have one file *{SUFFIX}; there are {len(weights)}: {named}")
        config = path / "adapter_config.json"
        settings = read_regular_file(config, MAX_CONFIG_BYTES) if is_folder and config.exists() else b""
        return read_regular_file(weights[0], self._max_bytes), settings

    async def fetch(self, tenant: str, model: str, name: str, sha256: str) -> FloatArray:
        """Like `weights`, in a thread where a file has to be read. What is in memory waits for no file of others.

        Args:
            tenant: whose turn it is to read a file; tenants take turns.
        """
        if (known := self._held(model, sha256)) is None:
            known = await self._one_at_a_time.run(tenant, self.weights, model, name, sha256)
        return known

    def weights(self, model: str, name: str, sha256: str) -> FloatArray:
        """The weights of an adapter for a model, (r, Q) float32. May block: it reads a file.

        Behind those of the denoiser are those of the text encoders, if it changes them: (r, Q + Qt). Whoever holds the
        array or a part of it keeps it in memory.

        Raises:
            AdapterFileError: it is not there any more, or its file is another now.
            AdapterRoomError: there is no memory for it beside those in use.
        """
        with self._loading:
            if (known := self._held(model, sha256)) is None:
                known = self._load(model, name, sha256)
                with self._counting:
                    self._alive[model, sha256] = self._kept[model, sha256] = known
            return known

    def _held(self, model: str, sha256: str) -> FloatArray | None:
        key = model, sha256
        with self._counting:
            if (known := self._alive.get(key)) is not None:
                self._kept[key] = known
                self._kept.move_to_end(key)
            return known

    def _load(self, model: str, name: str, sha256: str) -> FloatArray:
        named = [files[name] for files in self._offered.get(model, {}).values() if name in files]
        why = "is not there any more, or its file is another now"
        for file in named:  # several tenants may have it
            if file.sha256 != sha256:
                continue
            room = self._room(file, model)
            with self._counting:
                self._make_room(4 * file.rank * room.width)
            try:
                data, config = self._read(file.path)
            except OSError as error:
                why = f"cannot be read: {error.strerror}"
                continue
            if _sha256(data, config) == sha256:
                return packed(parse(data, config), room)
            why = "is another file now"
        raise AdapterFileError(why)

    def _make_room(self, num_bytes: int) -> None:
        while sum(array.nbytes for array in self._alive.values()) + num_bytes > self._max_bytes:
            if not self._kept:
                raise AdapterRoomError(f"the adapters in use take the {self._max_bytes} bytes there are for them")
            self._kept.popitem(last=False)


def _is_adapter(path: Path) -> bool:
    """Whether something in the folder of adapters should be one. Hidden files are other programs' own."""
    return not path.name.startswith(".") and (path.suffix in (SUFFIX, *PICKLES) or _is_folder(path))


def _is_folder(path: Path) -> bool:
    """`Path.is_dir` raises for links whose target's name is too long, and for disks that have gone."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _is_file(path: Path) -> bool:
    return path.suffix == SUFFIX


def _may_fit(path: Path) -> bool:
    """Whether something may be an adapter by its name."""
    return path.suffix not in PICKLES and NAME.fullmatch(_name(path)) is not None


def _name(path: Path) -> str:
    """The name of an adapter: that of its folder, or of its file."""
    return path.name.removesuffix(SUFFIX)


def _stamp(path: Path) -> object:
    """What changes when a file, or one in a folder, is written, replaced or removed; None: it cannot be seen now."""
    found: list[object] = []
    try:
        files = sorted(path.iterdir()) if _is_folder(path) else [path]
    except OSError:
        return None
    for file in files:
        with contextlib.suppress(OSError):  # removed since, or a link that leads nowhere
            status = file.stat()
            found.append((file.name, status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino))
    return found


def _shown(why: str) -> str:
    """A reason with names that come from a file, for logs and clients: printable, and of bounded length."""
    plain = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in why[:MAX_REASON_CHARS])
    return plain if len(why) <= MAX_REASON_CHARS else f"{plain}…"


def _sha256(data: bytes, config: bytes) -> str:
    return hashlib.sha256(data + config).hexdigest()
