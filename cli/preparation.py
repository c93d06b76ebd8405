"""Gets what the profiles of a command lack: models that are to be downloaded, drafters that are to be built."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specplug.build.calibration import is_text, material
from specplug.build.expected import build_seconds, model_bytes
from specplug.engines.vllm.located_model import hub_name
from specplug.machine.files import locked
from specplug.models import drafter_folders, packaged_models, references
from specplug.models.hub_reference import Kind
from specplug.profile import Profile
from specplug.profile.with_drafter import BUILT

from .build import built, check_parameters, trim_parameters, trim_request
from .missing_models import Download, duration, get, missing
from .options import kind_of, note


@dataclass(frozen=True, slots=True)
class DrafterBuild:
    """A drafter that is to be built.

    arguments   those of `specplug build vocab-trim`, without --out
    parameters  the same, as that command reads them
    kind        of the models
    """

    drafter: str
    arguments: tuple[str, ...]
    parameters: Mapping[str, Any]
    kind: Kind

    @property
    def models(self) -> list[str]:
        return [ref for ref in (self.parameters["model"], self.parameters["target"]) if ref is not None]

    def command(self) -> str:
        out = self.drafter.removeprefix(drafter_folders.PREFIX)
        return shlex.join(["specplug", "build", "vocab-trim", *self.arguments, "--out", out])

    def in_words(self, sizes: Mapping[str, int]) -> str:
        calibrate = self.parameters["calibrate"]
        own, target = (self._size(ref, sizes) for ref in (self.models[0], self.models[-1]))
        seconds = build_seconds(
            material(calibrate),
            self.parameters["tokens"],
            model_bytes=own,
            target_bytes=target,
            checkpoint=self.kind == "checkpoint",
            raw=self.parameters["counted"] == "raw" or is_text(calibrate),
        )
        time = "some minutes on this GPU (not estimated)" if seconds is None else f"{duration(seconds)} on this machine"
        return f"{self.drafter}: built from {' and '.join(self.models)}, {time}"

    def run(self) -> None:
        folder = drafter_folders.place(self.drafter)
        folder.parent.mkdir(parents=True, exist_ok=True)
        waiting = f"{self.drafter} is being built by another process; waiting for it"
        with locked(folder.with_name(f".{folder.name}.lock"), lambda: note(waiting)):
            if drafter_folders.is_built(folder):
                return
            note(f"building {self.drafter}: {self.command()}")
            document = built(trim_request(self.parameters, self.kind, command=self.command()))
        note(f"{self.drafter}: {document['rows']} of {document['num_tokens']} rows, {document['seconds']:.0f} s")

    def _size(self, ref: str, sizes: Mapping[str, int]) -> int:
        """Bytes of a model's weights, without assembling a packaged one."""
        if ref in sizes:
            return sizes[ref]
        return packaged_models.num_bytes(ref) or model_bytes(references.resolve(ref, self.kind))


@dataclass(frozen=True, slots=True)
class Needs:
    """What profiles lack, in the order in which it is got."""

    downloads: tuple[Download, ...] = ()
    builds: tuple[DrafterBuild, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.downloads or self.builds)

    def commands(self) -> list[str]:
        """The lines that a user can type instead."""
        return [*(one.command() for one in self.downloads), *(one.command() for one in self.builds)]


def needs_of(profiles: Iterable[Profile]) -> Needs:
    """What the profiles lack. Looks at names and files only. UsageError for arguments of a build that are invalid."""
    downloads: list[Download] = []
    builds: dict[object, DrafterBuild] = {}
    for profile in profiles:
        kind = kind_of(profile)
        models = [profile.model]
        for spec in profile.proposers:
            ref = spec.options.get("model")
            if not isinstance(ref, str):
                continue
            if spec.method not in BUILT:
                models.append(ref)
                continue
            folder = drafter_folders.place(ref)
            if spec.options.get("build") and not drafter_folders.is_built(folder) and folder not in builds:
                builds[folder] = _build(ref, tuple(map(str, spec.options["build"])), kind)
                models += builds[folder].models
        named = [ref if ref is None or kind == "gguf" else hub_name(ref) for ref in models]
        downloads += [one for one in missing(named, kind) if one not in downloads]
    return Needs(tuple(downloads), tuple(builds.values()))


def prepare(profiles: Sequence[Profile], *, yes: bool) -> None:
    """Download and build what the profiles lack, after asking. An interrupted run is continued by the same command.

    UsageError where the user has not agreed, with the command that does; EngineError where an engine is missing.
    """
    needs = needs_of(profiles)
    if needs:
        for engine in sorted({profile.engine for profile in profiles}):
            _require(engine)  # before anything is downloaded for it
        get(needs.downloads, needs.builds, yes=yes, notify=note)


def _build(ref: str, arguments: tuple[str, ...], kind: Kind) -> DrafterBuild:
    parameters = trim_parameters([*arguments, "--out", ref])
    if kind == "checkpoint":  # names as vLLM writes them
        for key in ("model", "target"):
            name = parameters[key]
            if name is not None and hub_name(name) != name:
                parameters[key] = hub_name(name)
                arguments = tuple(hub_name(one) if one == name else one for one in arguments)
    check_parameters(parameters)
    return DrafterBuild(ref, arguments, parameters, kind)


def _require(engine: str) -> None:
    """EngineError where the engine is missing."""
    if engine == "vllm":
        from specplug.engines.vllm.versions import require as require_vllm

        require_vllm()
    else:
        from specplug.engines.llama_cpp import require as require_llama_cpp

        require_llama_cpp()
