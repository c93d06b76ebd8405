"""Ollama's store: the models in it by name, and the file that holds the weights of each.

Ollama itself is not needed, and nothing is written. Source: github.com/ollama/ollama, the packages manifest, envconfig
and types/model, and server/images.go.
"""

from __future__ import annotations

import glob
import json
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specplug.errors import UsageError
from specplug.machine.folders import expanded
from specplug.registry import nearest

PREFIX = "ollama:"
"""Marks a name of Ollama's, as `ollama list` shows it."""

HOST, NAMESPACE, TAG = "registry.ollama.ai", "library", "latest"
"""What a name stands for where it leaves these parts out."""

OTHER_HOST = "ollama.com"
"""Another address of HOST, which the folder `manifests-v2` uses."""

MANIFESTS = ("manifests-v2", "manifests")
"""The folders of manifests; a name in the first replaces the same name in the second."""

SERVICE_FOLDERS = (
    "/usr/share/ollama/.ollama/models",  # Ollama's installer
    "/var/lib/ollama/.ollama/models",  # Fedora, Gentoo
    "/var/lib/ollama/models",  # NixOS
    "/var/lib/ollama",  # Arch
)
"""Where Ollama keeps its models on Linux when it runs as a service."""

SIZE_LIMIT = 1 << 22
"""Bytes of a manifest at most. Manifests with one layer per tensor have some hundred KB."""

LIST = "application/vnd.ollama.manifest.list.v2+json"
RUNNERS = ("ollama", "llamacpp", "")
"""The runners whose manifests in such a list name GGUF files, the preferred one first."""

MODEL, ADAPTER, TENSOR = (f"application/vnd.ollama.image.{kind}" for kind in ("model", "adapter", "tensor"))
"""Types of layers. Others are projectors, drafting heads, templates, parameters and licences."""

_PART = re.compile(r"\w[\w.-]*", re.ASCII)
_HOST = re.compile(r"\w[\w.:-]*", re.ASCII)
_DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")


@dataclass(frozen=True, slots=True)
class Stored:
    """A model in the store.

    path     the file of its weights; None where its manifest names none
    problem  why it cannot be used, with advice; None where it can
    """

    reference: str
    path: Path | None
    problem: str | None = None


def resolve(ref: str) -> Path:
    """The weights of `ollama:NAME[:TAG]`, `ollama:USER/NAME[:TAG]` or `ollama:HOST/USER/NAME[:TAG]`.

    UsageError where the store does not have the model, or not all of it.
    """
    name = _parsed(ref.removeprefix(PREFIX))
    if name is None:
        raise UsageError(f"model {ref}: not a name of Ollama's; write {PREFIX}NAME or {PREFIX}NAME:TAG")
    known = _manifests()
    found = name if name in known else next((other for other in known if other.folded() == name.folded()), None)
    if found is None:
        raise UsageError(f"model {ref}: {_absence(name, known)}")
    model = _stored(found, *known[found])
    if model.path is None or model.problem:
        raise UsageError(f"model {ref}: {model.problem}")
    return model.path


def stored() -> list[Stored]:
    """All models in the store by name, also those that cannot be used. Folders that cannot be read have none."""
    known = _manifests()
    return [_stored(name, *known[name]) for name in sorted(known, key=str)]


def folders() -> list[Path]:
    """The folders that may hold Ollama's models: OLLAMA_MODELS, or the user's and those of a service."""
    named = os.environ.get("OLLAMA_MODELS", "").strip("\"' ")
    places = [named] if named else ["~/.ollama/models", *(SERVICE_FOLDERS if sys.platform == "linux" else ())]
    found = []
    for place in places:
        with suppress(UsageError):  # there is no home folder
            found.append(expanded(place))
    return found


@dataclass(frozen=True, slots=True)
class _Name:
    """A complete name. `str` gives the shortest text that stands for it."""

    host: str
    namespace: str
    model: str
    tag: str

    def __str__(self) -> str:
        text = self.model if self.tag == TAG else f"{self.model}:{self.tag}"
        if self.host != HOST:
            return f"{self.host}/{self.namespace}/{text}"
        return text if self.namespace == NAMESPACE else f"{self.namespace}/{text}"

    def folded(self) -> tuple[str, ...]:
        """The same for names that Ollama takes for the same: those that differ in case only."""
        return tuple(part.lower() for part in (self.host, self.namespace, self.model, self.tag))


_Place = tuple[Path, Path]
"""A store's folder, and the file of a manifest in it."""


def _parsed(text: str) -> _Name | None:
    """A name as a user writes it; None where a part is missing or has characters that Ollama does not allow."""
    rest, colon, tag = text.rpartition("://")[2].rpartition(":")
    if not colon or "/" in tag:  # the colon is that of a host's port
        rest, tag = rest + colon + tag, TAG
    *above, model = rest.rsplit("/", 2)
    host, namespace = [HOST, NAMESPACE][: 2 - len(above)] + above
    return _checked(host, namespace, model, tag)


def _checked(host: str, namespace: str, model: str, tag: str) -> _Name | None:
    if not _HOST.fullmatch(host) or not all(_PART.fullmatch(part) for part in (namespace, model, tag)):
        return None
    return _Name(HOST if host.lower() in (HOST, OTHER_HOST) else host, namespace, model, tag)


def _manifests() -> dict[_Name, _Place]:
    """All manifests: HOST/NAMESPACE/MODEL/TAG below each of MANIFESTS. The first of several with a name is taken."""
    found: dict[_Name, _Place] = {}
    for folder in folders():
        for root in (folder / kind for kind in MANIFESTS):
            for path in sorted(glob.glob("*/*/*/*", root_dir=root)):
                name = _checked(*path.split(os.sep))
                if name is not None and not os.path.isdir(root / path):
                    found.setdefault(name, (folder, root / path))
    return found


def _absence(name: _Name, known: Mapping[_Name, object]) -> str:
    """What was found instead of a model that the store does not have, and what to do."""
    places = folders()
    looked = ", ".join(str(place) for place in places if os.path.isdir(place))
    if not looked:
        tried = ", ".join(map(str, places)) or "no home folder"
        return f"no store of Ollama was found ({tried}); set OLLAMA_MODELS to its folder"
    if not known:
        return f"{looked} holds no model that you can read; run: ollama pull {name}"
    return f"Ollama has no such model; {nearest(str(name), map(str, known))}, or run: ollama pull {name}"


def _stored(name: _Name, folder: Path, path: Path) -> Stored:
    weights, problem = _weights(name, folder, path)
    return Stored(f"{PREFIX}{name}", weights, problem)


def _weights(name: _Name, folder: Path, path: Path) -> tuple[Path | None, str | None]:
    """The file of a model's weights, and what is wrong with it."""
    again = f"run: ollama pull {name}"
    layers = _layers(folder, path)
    if layers is None:
        return None, f"its manifest {path} is damaged or half written; {again}"
    types = [layer.get("mediaType") for layer in layers]
    models = [layer for layer in layers if layer.get("mediaType") == MODEL]
    if not models and TENSOR in types:
        return None, "its weights are in Ollama's layout for MLX, which no engine here opens; get it as a GGUF file"
    if not models:
        return None, "it has no weights on this disk, as models in the cloud; name another model"
    digest = _DIGEST.fullmatch(str(models[0].get("digest")))
    if digest is None:
        return None, f"its manifest {path} is damaged; {again}"
    blob = folder / "blobs" / f"sha256-{digest[1]}"
    if len(models) > 1:
        return blob, f"its weights are in {len(models)} blobs, which llama.cpp cannot join; get it as a GGUF file"
    if ADAPTER in types:
        return blob, "it has an adapter, which specplug does not apply; merge it into the weights"
    return blob, _blob_problem(blob, models[0].get("size"), again)


def _blob_problem(blob: Path, size: object, again: str) -> str | None:
    try:
        actual = blob.stat().st_size
    except FileNotFoundError:
        if os.path.exists(f"{blob}-partial"):
            return f"its download has not finished; {again}"
        return f"its weights {blob} are missing; {again}"
    except OSError as error:
        return f"its weights {blob} cannot be read ({error.strerror}); ask for the right to read them"
    if isinstance(size, int) and actual != size:
        return f"its weights have {actual} bytes, and its manifest says {size}: not completely downloaded; {again}"
    return None


def _layers(folder: Path, path: Path) -> list[dict[str, Any]] | None:
    """The layers of a manifest, of the one for llama.cpp where it is a list of several; None where it is damaged."""
    manifest = _json(path)
    if manifest is not None and manifest.get("mediaType") == LIST:
        manifest = _chosen(folder, manifest.get("manifests"))
    if manifest is None:
        return None
    layers = manifest.get("layers") or []
    return layers if isinstance(layers, list) and all(isinstance(layer, dict) for layer in layers) else None


def _chosen(folder: Path, manifests: object) -> dict[str, Any] | None:
    """The manifest of a list whose weights llama.cpp can open. One without layers is a reference to a blob."""
    if not isinstance(manifests, list) or not all(isinstance(one, dict) for one in manifests):
        return None
    for runner in RUNNERS:
        for one in manifests:
            if str(one.get("runner") or "").lower() == runner:
                digest = _DIGEST.fullmatch(str(one.get("digest")))
                return _json(folder / "blobs" / f"sha256-{digest[1]}") if digest and "layers" not in one else one
    return {}


def _json(path: Path) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            content = file.read(SIZE_LIMIT + 1)
        data = json.loads(content) if len(content) <= SIZE_LIMIT else None
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None
