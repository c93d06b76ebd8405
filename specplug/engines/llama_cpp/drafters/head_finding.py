"""Finds the files of the heads that a profile names, and checks that they fit the target, before anything is opened.

Reads headers; opens no model. llama.cpp ends the process for some heads that do not fit, so each of these is refused
here by name.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from specplug.core import IntArray
from specplug.engines.llama_cpp import layer_taps
from specplug.engines.llama_cpp.drafters.finding import is_same_model
from specplug.engines.llama_cpp.drafters.head_context import why_no_layers, why_no_states
from specplug.errors import UsageError
from specplug.machine.folders import expanded
from specplug.models import drafter_folders, references
from specplug.models.drafter_folders import MTP_HEAD
from specplug.models.gguf_header import Header, parts_of, read_header
from specplug.models.model_facts import MTP_ARCHITECTURES, SEVERAL_MTP_LAYERS, has_mtp_layer
from specplug.profile import Profile
from specplug.profile.with_drafter import DRAFTERS
from specplug.proposers.eagle3 import Eagle3
from specplug.proposers.mtp import Mtp
from specplug.registry import ProposerSpec
from specplug.transforms.gguf_states_head import NORM_AND_HEAD

MTP_TENSOR = "nextn.eh_proj.weight"
"""How the name of a matrix ends that every MTP layer has."""

TAPS = 3
"""Layers whose inputs an EAGLE-3 head reads, by llama.cpp's code."""

Head = Mtp | Eagle3
"""A proposer that names a head."""


def find_head(source: Head, target: Path) -> Path:
    """The file of a head. UsageError where it is missing, damaged, or does not fit the target or this llama.cpp."""
    problem = why_no_states()
    if problem is not None:
        raise UsageError(f"{'mtp' if isinstance(source, Mtp) else 'eagle3'}: {problem}; update llama-cpp-python")
    return _find_mtp(source, target) if isinstance(source, Mtp) else _find_eagle3(source, target)


def loads_mtp(source: object, target: Path) -> bool:
    """Whether the MTP layer that a proposer names is in the target's own file."""
    return isinstance(source, Mtp) and (
        source.model is None or references.resolve(source.model, "gguf", head=True) == target
    )


def with_own_heads(profile: Profile, target: Path) -> Profile:
    """The profile with the layers that the target's file brings to draft for it, where the profile asks for them."""
    if not (profile.own_heads and profile.speculates and brings_head(target)):
        return profile
    if any(spec.method in DRAFTERS for spec in profile.proposers):
        return profile
    return replace(profile, proposers=(*profile.proposers, ProposerSpec("mtp")))


def brings_head(target: Path) -> bool:
    """Whether a model's own file has MTP layers that draft with this build of llama.cpp."""
    if not has_mtp_layer(read_header(target)):
        return False
    try:
        find_head(Mtp(), target)
    except UsageError:  # some files name layers that they lack
        return False
    return True


def trimmed_output(source: Head, target: Path) -> tuple[Path, IntArray] | None:
    """The file with the rows of an MTP layer's output matrix that are kept, and the tokens of these rows (int32[n],
    ascending); None where the proposer names none. UsageError where it is missing, damaged, or of another model."""
    if not isinstance(source, Mtp) or source.head is None:
        return None
    folder = drafter_folders.resolve(source.head)
    manifest, ids = drafter_folders.read(folder)
    if manifest.kind != MTP_HEAD:
        raise UsageError(f"{folder}: no head of an MTP layer; build one: specplug build vocab-trim {target.name}")
    drafter_folders.check_target(manifest, folder, references.tokenizer_hash(target), target.name)
    path = _mtp_file(source, target)
    if not is_same_model(manifest.source, path):
        raise UsageError(
            f"{folder}: made from {manifest.source.get('file')}, not from {path.name}; build it again: specplug build "
            f"vocab-trim {path.name}"
        )
    return folder / NORM_AND_HEAD, ids


def target_layers(head: Path) -> tuple[int, ...]:
    """The target's layers whose inputs an EAGLE-3 head reads, in this order."""
    layers = read_header(head).numbers.get("target_layers", ())
    return layers if isinstance(layers, tuple) else (layers,)


def num_mtp_layers(path: Path) -> int:
    """The MTP layers of a file, by its metadata."""
    return _number(read_header(path), "nextn_predict_layers")


def _find_mtp(source: Mtp, target: Path) -> Path:
    path = _mtp_file(source, target)
    own = path == target
    header, wanted = read_header(path), read_header(target)
    count = num_mtp_layers(path)
    if not count or (len(parts_of(path)) == 1 and not any(name.endswith(MTP_TENSOR) for name in header.tensors)):
        what = "names an MTP layer and does not have it" if count else "has no MTP layer"
        advice = "name a file that has it: {method: mtp, model: FILE}" if own else "name a file that has one"
        raise UsageError(f"mtp: {path}: {what}; {advice}")
    if header.architecture not in MTP_ARCHITECTURES:
        raise UsageError(
            f"mtp: {path}: MTP layers of the architecture {header.architecture} were not tried; those of "
            f"{', '.join(MTP_ARCHITECTURES)} are supported"
        )
    if count > 1:
        _check_several(path, count, header.architecture)
    if not own:
        _check_tokenizer("mtp", path, target)
        if header.architecture != wanted.architecture or _width(header) != _width(wanted):
            raise UsageError(f"mtp: {path}: {_made_for(header.architecture, _width(header), target, wanted)}")
    trimmed_output(source, target)
    return path


def _mtp_file(source: Mtp, target: Path) -> Path:
    return target if source.model is None else _file("mtp", source.model)


def _check_several(path: Path, count: int, architecture: str | None) -> None:
    """Raise UsageError where only one of several MTP layers could be run, or a layer is missing."""
    if architecture not in SEVERAL_MTP_LAYERS:
        raise UsageError(
            f"mtp: {path}: it has {count} MTP layers; of the architecture {architecture} llama.cpp can run one only, "
            f"several of {', '.join(SEVERAL_MTP_LAYERS)}"
        )
    problem = why_no_layers()
    if problem is not None:
        raise UsageError(f"mtp: {path}: it has {count} MTP layers, and {problem}; update llama-cpp-python")
    header = read_header(path)
    found = sum(name.endswith(MTP_TENSOR) for name in header.tensors)
    if len(parts_of(path)) == 1 and found != count:
        raise UsageError(f"mtp: {path}: names {count} MTP layers and has {found}; convert the model again")


def _find_eagle3(source: Eagle3, target: Path) -> Path:
    path = _file("eagle3", source.model)
    header, wanted = read_header(path), read_header(target)
    if header.architecture != "eagle3":
        raise UsageError(f"eagle3: {path}: its architecture is {header.architecture}; name an EAGLE-3 head as GGUF")
    problem = layer_taps.why_not_of(wanted.architecture)
    if problem is not None:
        raise UsageError(f"eagle3: {target}: {problem}")
    _check_tokenizer("eagle3", path, target)
    read = _number(header, "target_hidden_size") or _width(header)
    if read != _width(wanted):
        raise UsageError(f"eagle3: {path}: {_made_for(None, read, target, wanted)}")
    if "token_embd.weight" not in header.tensors and _width(header) != _width(wanted):
        raise UsageError(
            f"eagle3: {path}: it has no embeddings, and its width of {_width(header)} is not the target's, "
            f"{_width(wanted)}; convert the head together with its embeddings"
        )
    layers = target_layers(path)
    last = wanted.num_layers - _number(wanted, "nextn_predict_layers")
    if len(layers) != TAPS or not all(0 <= layer < last for layer in layers):
        shown = ", ".join(map(str, layers)) or "none"
        raise UsageError(
            f"eagle3: {path}: it reads the inputs of the layers {shown} of a model; {target.name} has the layers 0 to "
            f"{last - 1}, of which {TAPS} can be read"
        )
    return path


def _file(method: str, model: str) -> Path:
    if model.endswith(".gguf") and ":" not in model and not expanded(model).is_file():
        raise UsageError(f"{method}: {model}: no such file; name a head: {{method: {method}, model: FILE}}")
    path = references.resolve(model, "gguf", head=True)
    if path.is_dir():
        raise UsageError(f"{path}: a folder; a head for llama.cpp is a .gguf file")
    return path


def _check_tokenizer(method: str, path: Path, target: Path) -> None:
    own, required = references.tokenizer_hash(path), references.tokenizer_hash(target)
    if own != required:
        raise UsageError(
            f"{method}: {path}: its tokenizer is {own[:12]}, that of {target.name} is {required[:12]}; choose a head "
            "that was made for this model"
        )


def _made_for(architecture: str | None, width: int, target: Path, wanted: Header) -> str:
    own = f"{architecture} with hidden states" if architecture else "a model with hidden states"
    return (
        f"made for {own} of {width} numbers; {target.name} is {wanted.architecture} with {_width(wanted)}; "
        "choose a head that was made for this model"
    )


def _width(header: Header) -> int:
    return _number(header, "embedding_length")


def _number(header: Header, key: str) -> int:
    value = header.numbers.get(key, 0)
    return value if isinstance(value, int) else max(value, default=0)
