"""References to models on the Hugging Face hub, such as `hf:ORG/REPO:Q4_K_M`, and the files of a repository they mean.

Works on names alone: nothing is read or downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Literal

from specplug.errors import UsageError
from specplug.models.gguf_header import PART, parts_of

Kind = Literal["gguf", "checkpoint"]
"""What an engine opens: llama.cpp the first, vLLM the second."""

PREFIX = "hf:"
CHECKPOINT = "safetensors"
"""The tag that names a repository's checkpoint, where it has GGUF files, too."""

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
"""The files at the top of a repository that its checkpoint needs besides the weights."""

PREFERRED = ("Q4_K_M", "Q4_0", "Q8_0")
"""The weight formats of which a repository's first is taken where the reference names none."""

SIDECARS = ("mtp-", "eagle3-", "dflash-", "dspark-")
"""What the names of files begin with that hold a drafting head for the model beside them."""


_REFERENCE = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<tag>[\w.-][\w./ -]*))?", re.ASCII
)
_BESIDE = re.compile(rf"^({'|'.join(SIDECARS)})|(^|[-._])(mmproj|imatrix)", re.IGNORECASE)
_FORMAT = re.compile(r"(?:^|[-._/])((?:UD-)?(?:I?Q\d\w*|TQ\d_\d|MXFP4\w*|NVFP4\w*|BF16|F16|F32|FP16|FP32))$", re.I)


@dataclass(frozen=True, slots=True)
class HubReference:
    """A model on the hub.

    repo      organisation and name
    revision  a branch, tag or commit; None for the main branch
    tag       a weight format such as Q4_K_M, the path of a GGUF file in the repository, or CHECKPOINT; None where the
              reference leaves it open
    """

    repo: str
    revision: str | None = None
    tag: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{self.repo}{revision}" + (f":{self.tag}" if self.tag else "")


def parse(ref: str) -> HubReference:
    """The parts of `hf:ORG/REPO[@REVISION][:TAG]`. UsageError for text that is no such reference."""
    found = _REFERENCE.fullmatch(ref.removeprefix(PREFIX).rstrip("/"))
    outside = found is not None and any(
        ".." in PurePosixPath(found[part] or "").parts for part in ("repo", "revision", "tag")
    )
    if found is None or outside:
        raise UsageError(f"model {ref}: not a reference to the hub; write {PREFIX}ORG/REPO or {PREFIX}ORG/REPO:Q4_K_M")
    return HubReference(found["repo"], found["revision"], found["tag"])


def is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def is_beside_a_model(file_name: str) -> bool:
    """Whether a GGUF file holds no language model: a drafting head, a projector, or what a quantiser weighs by."""
    return _BESIDE.search(file_name) is not None


def choose(names: Sequence[str], reference: HubReference, kind: Kind | None = None) -> list[str]:
    """The files of a repository that a reference means: the parts of a GGUF model in order, or those of a checkpoint.

    names  the paths of all files in the repository
    kind   what is needed; where None, a GGUF file if there is one
    UsageError where there is no such model, or where several fit.
    """
    models, files = gguf_models(names), checkpoint_files(names)
    open_kind = kind or ("gguf" if models else "checkpoint")
    if reference.tag == CHECKPOINT or (reference.tag is None and open_kind == "checkpoint"):
        if kind == "gguf":
            raise UsageError(f"{reference}: a checkpoint, which llama.cpp cannot open{_instead(models)}")
        if not files:
            raise UsageError(f"{reference}: this repository has no checkpoint in safetensors{_instead(models)}")
        return files
    if not models:
        has = ", only a checkpoint for vLLM (--engine vllm)" if files else ""
        raise UsageError(f"{reference}: this repository has no GGUF files{has}; name another one")
    if reference.tag is None:
        if len(models) == 1:
            return next(iter(models.values()))
        for wanted in PREFERRED:
            fitting = _fitting(models, wanted)
            if fitting:
                return models[fitting[0]]
        raise UsageError(f"{reference}: several files fit{_instead(models)}")
    named = next((parts for parts in models.values() if reference.tag in parts), None)
    if named is not None:
        return named
    fitting = _fitting(models, reference.tag)
    if not fitting:
        raise UsageError(f"{reference}: no file in this repository is in that format{_instead(models)}")
    return models[fitting[0]]


def tag_of(file: str, all_files: Sequence[str]) -> str:
    """The shortest tag with which `choose` takes this file: its weight format, or its path."""
    stem = next(name for name, parts in gguf_models(all_files).items() if file in parts)
    found = _FORMAT.search(stem)
    fitting = _fitting(gguf_models(all_files), found[1]) if found else []
    return found[1] if found and fitting and fitting[0] == stem else file


def sidecars(names: Iterable[str]) -> list[str]:
    """Those of a repository's files that hold a drafting head."""
    return [name for name in names if PurePosixPath(name).name.lower().startswith(SIDECARS) and is_gguf(name)]


def gguf_models(names: Iterable[str]) -> dict[str, list[str]]:
    """The language models among GGUF files: the path without part and ending, and all parts in order.

    Parts that are missing are listed, too.
    """
    models = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        if not is_gguf(name) or is_beside_a_model(path.name):
            continue
        part = PART.match(path.name)
        stem = path.with_name(part["name"]).as_posix() if part else name.removesuffix(path.suffix)
        models[stem] = [one.as_posix() for one in parts_of(Path(name))]
    return models


def checkpoint_files(names: Iterable[str]) -> list[str]:
    """The files of the checkpoint at the top of a repository or folder, small ones first; none where there is none."""
    top = [name for name in sorted(names) if "/" not in name]
    weights = weight_files(top)
    if "config.json" not in top or not weights:
        return []
    return [*(name for name in top if any(fnmatch(name, pattern) for pattern in SMALL_FILES)), *weights]


def weight_files(names: Iterable[str]) -> list[str]:
    """The files of a checkpoint's weights; others than `model*` hold the same weights in another layout."""
    weights = [name for name in sorted(names) if name.endswith(".safetensors")]
    return [name for name in weights if name.startswith("model")] or weights


def _fitting(models: Iterable[str], tag: str) -> list[str]:
    """The models in a weight format, by the end of their names or the folder that is named after it, the shortest
    name first."""
    fitting = []
    for name in models:
        found = _FORMAT.search(name)
        ends = found[1] if found else PurePosixPath(name).parent.name
        if ends.lower() == tag.lower():
            fitting.append(name)
    return sorted(fitting, key=lambda name: (len(name), name))


def _instead(models: Iterable[str]) -> str:
    """Advice that lists the formats of a repository's models."""
    formats = sorted({found[1] if (found := _FORMAT.search(name)) else f"{name}.gguf" for name in models})
    if not formats:
        return "; name another repository"
    shown = ", ".join(formats[:12]) + (", ..." if len(formats) > 12 else "")
    return f"; add one of these after a colon: {shown}"
