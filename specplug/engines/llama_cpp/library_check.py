"""Tries the installed native library in a child process before this process relies on it, and remembers the result.

A library that was built for another processor, or has a faulty kernel, kills the process that runs it. llama_cpp is not
imported here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from specplug.engines.llama_cpp.probe import processor_flags, rebuild_command
from specplug.errors import EngineError, UsageError
from specplug.machine import fingerprint, hardware
from specplug.machine.files import keep
from specplug.machine.folders import cache_folder
from specplug.models.gguf_header import WEIGHT_TYPES, Header, parts_of, read_header
from specplug.profile import Runtime

SCHEMA = 1
"""Version of the format of remembered results."""

FOLDER = "library"

TESTED = frozenset({"llama", "qwen2", "gemma3"})
"""Architectures whose models the tests of this project decode. A file of another one is first opened in a child."""

SECONDS, BYTES_PER_SECOND = 60.0, 20e6
"""A child that takes longer shows nothing: the machine is too busy. A model file may take longer by its size."""

MARK = "specplug-trial:"
"""Prefix of the child's lines, as in `trial.py`."""

CRASHES = frozenset(
    getattr(signal, name) for name in ("SIGILL", "SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE") if hasattr(signal, name)
)
"""Signals by which a library ends its process. Others come from outside, such as SIGKILL where memory runs out."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to use the library, with the words for what it leaves out."""

    words: str
    repack: bool = True
    flash_attention: bool = True

    def apply(self, runtime: Runtime) -> Runtime:
        """The runtime without what the library cannot do."""
        runtime = replace(runtime, repack=runtime.repack and self.repack)
        return runtime if self.flash_attention else replace(runtime, flash_attention=False)


WAYS = (
    Way(""),
    Way("without weights in a layout of the processor's own (repack: false), which costs some percent", repack=False),
    Way("without flash attention, which costs time where layers have windows", flash_attention=False),
    Way("without repacked weights and without flash attention", repack=False, flash_attention=False),
)
"""The ways to use a library, tried in this order where the ones before end the process."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What a child has shown.

    tried       whether a child decoded tokens; if not, nothing is known
    reason      why nothing is known
    way         index in WAYS
    signal      by which the library ended the process under the first way; None where it did not
    equal_rows  most rows of a pass that round as one row does, with flash attention and a bf16 cache; 0 if unknown
    kernels     attention kernel, cache type and milliseconds, on a cache of 4096 tokens
    """

    tried: bool = True
    reason: str = ""
    way: int = 0
    signal: str | None = None
    equal_rows: int = 0
    kernels: tuple[tuple[bool, str, float], ...] = ()


def check_import() -> None:
    """EngineError where importing llama_cpp ends the process. Tried once per library."""
    if "llama_cpp" in sys.modules or find_spec("llama_cpp") is None:
        return
    path = _record("import", library_key())
    if _read(path) is None:
        child = _run({"imports": True})
        if child.signal is not None:
            raise EngineError(f"{_crash(child.signal, 'when it is imported')}; {_how_to_build()}")
        if child.parts:
            _write(path, Findings())


def check_model(
    path: Path, runtime: Runtime, notify: Callable[[str], None] | None = None, *, head: bool = False
) -> Way:
    """The way in which this library can open a GGUF file and decode with it without ending the process.

    Raises EngineError where there is none, and UsageError where the model itself ends it.
    notify  receives what the library cannot do, and what that costs
    head    the file decodes nothing alone, so that only its tensor types are tried
    """
    header = whole_header(path)
    offloads = runtime.gpu_layers != 0
    found = findings(header, offloads=offloads)
    way = WAYS[found.way]
    if found.signal is not None:
        what = f"with weights in {', '.join(map(_type_name, sorted(header.matrix_types)))}"
        _once(notify, f"{_crash(found.signal, what)}; it is used {way.words}. {_how_to_build()}")
    elif not found.tried:
        _once(notify, f"the installed llama.cpp could not be tried before it is used: {found.reason}")
    if header.architecture not in TESTED and not head:
        _check_file(path, header, way.apply(runtime), notify)
    return way


def whole_header(path: Path) -> Header:
    """The header of a GGUF file, with the tensor types of all parts of a model in several files."""
    header = read_header(path)
    parts = [read_header(part) for part in parts_of(path) if part != path and part.is_file()]
    return replace(header, matrix_types=header.matrix_types.union(*(part.matrix_types for part in parts)))


COMMON_TYPES = frozenset({2, 8, 12, 14})
"""The types of most quantised models: q4_0, q8_0, q4_K, q6_K."""


def common_findings() -> Findings:
    """What passes of a tiny model with the commonest tensor types show. EngineError where none survives."""
    return findings(Header("llama", 1, 1, 1, "", matrix_types=COMMON_TYPES))


def findings(header: Header, *, compare: bool = False, offloads: bool = False) -> Findings:
    """What passes of a tiny model with a file's tensor types and attention show. EngineError where none survives.

    compare   what comparing kernels has shown is needed, too; a child always compares them
    offloads  layers are computed on a GPU
    """
    types = sorted(header.matrix_types & WEIGHT_TYPES)
    # Some faults need a second thread to show.
    runtime = Runtime(
        threads=min(2, hardware.usable_cores()), flash_attention=True, kv_type="f16", gpu_layers=-1 if offloads else 0
    )
    shape = _attention(header)
    sound = _record("sound", library_key(), types, offloads)
    kernels = _record("kernels", library_key(), types, shape, offloads)
    known, compared = _read(sound), _read(kernels)
    if known is not None and not known.tried:
        return known
    if compared is not None and known is not None:
        return replace(compared, way=known.way, signal=known.signal)
    if known is not None and not compare:
        return known
    first, signal_name = known.way if known else 0, known.signal if known else None
    for index in range(first, len(WAYS)):
        way = WAYS[index]
        tiny = way.apply(runtime)
        request = {
            "imports": False,
            "runtime": asdict(tiny),
            "file": str(_tiny_file(types, shape)),
            "types": types,
            "shape": shape,
            "compares": way.flash_attention,
        }
        child = _run(request)
        if child.signal is not None and "decodes" not in child.parts:
            signal_name = signal_name or child.signal
            continue
        if "decodes" not in child.parts:  # it could not be tried, as on a full disk
            _KNOWN[sound] = _KNOWN[kernels] = known or Findings(tried=False, reason=child.last)
            return _KNOWN[sound]
        result = Findings(way=index, signal=signal_name)
        _write(sound, result)
        timed = tuple((bool(on), str(kind), float(ms)) for on, kind, ms in child.parts.get("kernels", ()))
        result = replace(result, equal_rows=int(child.parts.get("equal_rows", 0)), kernels=timed)
        _write(kernels, result)
        return result
    assert signal_name is not None
    raise EngineError(f"{_crash(signal_name, 'whatever is left out')}; {_how_to_build()}")


def _check_file(path: Path, header: Header, runtime: Runtime, notify: Callable[[str], None] | None) -> None:
    """Open a file of an architecture that is not tested in a child first. UsageError where that ends the child."""
    conditions = runtime.repack, runtime.flash_attention, runtime.gpu_layers != 0
    record = _record("file", library_key(), fingerprint.model_identity(path.absolute()), conditions)
    if _read(record) is not None:
        return
    tried = Runtime(
        threads=min(2, hardware.usable_cores()),
        flash_attention=runtime.flash_attention is not False,
        kv_type="f16",
        repack=runtime.repack,
        gpu_layers=runtime.gpu_layers,
    )
    _once(notify, f"trying {path.name} in another process first, once: {header.architecture} models are untested here")
    seconds = SECONDS + sum(part.stat().st_size for part in parts_of(path) if part.is_file()) / BYTES_PER_SECOND
    child = _run({"imports": False, "runtime": asdict(tried), "file": str(path.absolute()), "types": None}, seconds)
    if child.signal is not None:
        raise UsageError(
            f"{path}: llama.cpp ends the process ({child.signal}) when it decodes this {header.architecture} model"
            f"{': ' + child.last if child.last else ''}; name another model, or a newer llama-cpp-python"
        )
    if "decodes" in child.parts:
        _write(record, Findings())
    elif not child.failed:
        _once(notify, f"{path.name} could not be tried before it is used: {child.last}")


@dataclass(frozen=True, slots=True)
class _Child:
    """A child that was run.

    signal  its name, where a crash ended the child
    last    its last line on stderr
    parts   what it finished
    failed  whether it ended by itself, with an error that this process will meet, too
    """

    signal: str | None
    last: str
    parts: dict[str, Any]
    failed: bool = False


def _run(request: dict[str, Any], seconds: float = SECONDS) -> _Child:
    command = [sys.executable, "-P", "-m", "specplug.engines.llama_cpp.trial", json.dumps(request)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            env=os.environ | {"PYTHONFAULTHANDLER": ""},
        )
    except subprocess.TimeoutExpired:
        return _Child(None, f"it took more than {seconds:.0f} s", {})
    except (OSError, subprocess.SubprocessError) as error:
        return _Child(None, str(error), {})
    parts: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            with suppress(ValueError):
                parts |= json.loads(line.removeprefix(MARK))
    crashed = -done.returncode in {int(number) for number in CRASHES}
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]
    name = signal.Signals(-done.returncode).name if crashed else None
    return _Child(name, last, parts, failed=done.returncode > 0)


def _attention(header: Header) -> dict[str, int]:
    """The attention of a model, as `tiny_model.Shape` describes it."""

    def number(key: str, default: int) -> int:
        value = header.numbers.get(key, default)
        return max(1, int(value if isinstance(value, int) else max(value, default=default)))

    heads = number("attention.head_count", 1)
    kv_heads = number("attention.head_count_kv", heads)
    head = number("attention.key_length", number("embedding_length", 64) // heads or 64)
    return {"sharing": max(1, heads // kv_heads), "head": head}


def _tiny_file(types: Sequence[int], shape: dict[str, int]) -> Path:
    """Where a tiny model lies: in the cache folder, or where temporary files do if nothing can be kept."""
    name = hashlib.sha256(repr((SCHEMA, list(types), shape)).encode()).hexdigest()[:16] + ".gguf"
    folder = cache_folder() / FOLDER
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder / name
    with suppress(OSError):
        return Path(gettempdir()) / f"specplug-{os.getuid() if hasattr(os, 'getuid') else 0}-{name}"
    return folder / name


def _record(what: str, *conditions: object) -> Path:
    key = hashlib.sha256(repr((SCHEMA, what, _processor(), *conditions)).encode()).hexdigest()[:24]
    return cache_folder() / FOLDER / f"{key}.json"


def _read(path: Path) -> Findings | None:
    if path in _KNOWN:
        return _KNOWN[path]
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        timed = tuple((bool(on), str(kind), float(ms)) for on, kind, ms in data["kernels"])
        found = Findings(way=int(data["way"]), signal=data["signal"], equal_rows=int(data["equal_rows"]), kernels=timed)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not 0 <= found.way < len(WAYS):
        return None
    _KNOWN[path] = found
    return found


def _write(path: Path, found: Findings) -> None:
    _KNOWN[path] = found
    keep(path, json.dumps(asdict(found)).encode())


_KNOWN: dict[Path, Findings] = {}
"""Results that this process has read or found."""

_TOLD: set[str] = set()


def _once(notify: Callable[[str], None] | None, text: str) -> None:
    if notify is not None and text not in _TOLD:
        _TOLD.add(text)
        notify(text)


@lru_cache(maxsize=1)
def library_key() -> str:
    """SHA-256 (hex) over all ggml and llama libraries that would be loaded; another build has another one.

    Contents are read once per name, size and time of change, and of equal copies only one.
    """
    files = sorted(path for path in library_folder().glob("*") if re.search("ggml|llama", path.name))
    stats = [(path.name, status.st_size, status.st_mtime_ns) for path in files if (status := path.stat())]
    remembered = cache_folder() / FOLDER / f"{hashlib.sha256(repr(stats).encode()).hexdigest()[:24]}.sha256"
    with suppress(OSError, ValueError):
        known = remembered.read_text(encoding="ascii")
        if re.fullmatch("[0-9a-f]{64}", known):
            return known
    digest, seen = hashlib.sha256(), set()
    for path, (_, size, _) in zip(files, stats, strict=True):
        if (path.name.partition(".")[0], size) in seen:  # libggml.so, libggml.so.0 and libggml.so.0.25 are copies
            continue
        seen.add((path.name.partition(".")[0], size))
        with open(path, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    keep(remembered, digest.hexdigest().encode())
    return digest.hexdigest()


def library_folder() -> Path:
    """The folder from which llama-cpp-python loads its libraries; without it, a folder that does not exist."""
    chosen = os.environ.get("LLAMA_CPP_LIB_PATH")
    if chosen:
        return Path(chosen)
    spec = find_spec("llama_cpp")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return Path(folders[0] if folders else os.devnull) / "lib"


@lru_cache(maxsize=1)
def _processor() -> str:
    """The processor's name and its instruction sets."""
    return f"{hardware.fingerprint()['cpu']} {' '.join(sorted(processor_flags()))}"


def _crash(name: str, when: str) -> str:
    words = {"SIGILL": "Illegal instruction", "SIGSEGV": "segmentation fault", "SIGABRT": "abort"}.get(name, name)
    return f"the installed llama.cpp ends the process ({words}) on this processor {when}"


def _how_to_build() -> str:
    return f"build a sound one for this machine: {rebuild_command(processor_flags())}"


def _type_name(kind: int) -> str:
    names = {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 10: "q2_K", 11: "q3_K"}
    names |= {12: "q4_K", 13: "q5_K", 14: "q6_K", 20: "iq4_nl", 23: "iq4_xs", 30: "bf16", 39: "mxfp4"}
    return names.get(kind, f"type {kind}")
