"""A server's command as text for a shell, a program, llama-server's router, systemd or Docker Compose.

It knows the files' formats, and which flags of llama-server name files or belong to its router. It starts nothing, and
looks at the disk only for a program's full path and for the folder of a model.
Source: llama.cpp's common/preset.cpp and tools/server/README.md; systemd.syntax(7) and systemd.service(5); the Compose
specification; the Dockerfiles of llama.cpp and vLLM.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from specplug.errors import UsageError
from specplug.profile.server_programs import (
    LLAMA_SERVER,
    VLLM,
    assigns,
    launch_words,
    program_at,
    program_of,
    serve_at,
)
from specplug.profile.yaml_text import dump

_MODEL = ("-m", "--model")
_FILES = (
    *_MODEL,
    *("-md", "--model-draft", "--spec-draft-model", "-mm", "--mmproj", "-mv", "--model-vocoder"),
    *("--chat-template-file", "--grammar-file", "-jf", "--json-schema-file", "-lcs", "--lookup-cache-static"),
    *("--api-key-file", "--ssl-key-file", "--ssl-cert-file"),
)
"""Flags of llama-server whose value is the name of a file that it reads."""

_FILE_LISTS = ("--lora", "--lora-scaled", "--control-vector", "--control-vector-scaled")
"""Flags of llama-server whose value is `FILE,FILE` or `FILE:SCALE,FILE:SCALE`."""

_NAMES = ("-a", "--alias")
_REPOSITORY = ("-hf", "-hfr", "--hf-repo")
_ROUTER = (
    *("--host", "--port", "--api-key", "--api-key-file", "--ssl-key-file", "--ssl-cert-file"),
    *("--models-dir", "--models-max", "--models-preset", "--models-autoload", "--no-models-autoload"),
)
"""Flags that llama-server's router takes itself, and removes from the presets of its models."""

_KEY = re.compile(r"[a-zA-Z_][a-zA-Z0-9_.-]*")
_NUMBER = re.compile(r"-\.?\d.*")
_SCALED = re.compile(r"(?P<file>.*?)(?P<scale>:-?[0-9.]+)?", re.DOTALL)
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")

_IMAGES = {LLAMA_SERVER: "ghcr.io/ggml-org/llama.cpp:server", VLLM: "vllm/vllm-openai:latest"}
_PORTS = {LLAMA_SERVER: 8080, VLLM: 8000}
_GPUS = {"resources": {"reservations": {"devices": [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]}}}
_IN_CONTAINER = "/models"


def as_format(argv: Sequence[str], format: str) -> str:
    """The command in one of FORMATS, without a line break at the end. UsageError where the format cannot hold it.

    args     one line for a POSIX shell
    json     a list of strings
    ini      a preset for llama-server's router: `llama-server --models-preset FILE`
    systemd  a service unit; relative names of files are those of the current folder
    compose  a file for Docker Compose, with the files that the server reads mounted read-only
    """
    if format not in FORMATS:
        raise UsageError(f"format {format!r}: unknown; use one of {', '.join(FORMATS)}")
    if any("\0" in word for word in argv):
        raise UsageError(f"{shlex.join(argv)!a}: holds a zero byte, which no argument can have; leave it out")
    return FORMATS[format](argv)


# -- llama-server's presets ------------------------------------------------------------------------------------------


def _ini(argv: Sequence[str]) -> str:
    if program_of(argv) != LLAMA_SERVER:
        raise UsageError(
            f"format ini: a preset is for llama-server, and this command starts {argv[0]}; use another format"
        )
    at = program_at(argv) + 1
    router = [*launch_words(argv[:at]), "--models-preset", "FILE"]
    given: dict[str, str] = {}
    for flag, values in _flags(argv[at:]):
        if flag in _ROUTER:
            router += [flag, *values]
            continue
        key, value = _preset_entry(flag, values)
        if key in given:
            raise UsageError(f"format ini: {flag} is given twice, and a preset holds one value of it; give it once")
        given[key] = value
    alias = _value_of(given, _NAMES)  # the router calls a model by the name of its section, and refuses another one
    name = alias or _value_of(given, _REPOSITORY) or Path(_value_of(given, _MODEL)).name.removesuffix(".gguf")
    if not name or set("[]\r\n") & set(name):
        raise UsageError(f"format ini: {name!r} cannot be the name of a model in a preset; name one with --alias")
    named = [f"{key} = {value}".rstrip() for key, value in given.items() if {f"-{key}", f"--{key}"}.isdisjoint(_NAMES)]
    return "\n".join([f"; {shlex.join(router)}", f"[{name}]", *named])


def _with_files(flag: str, value: str, changed: Callable[[str], str]) -> str:
    """The value of a flag of llama-server, with the names of files in it changed."""
    if flag in _FILES:
        return changed(value)
    if flag not in _FILE_LISTS:
        return value
    parts = [_SCALED.fullmatch(part) for part in value.split(",")]
    return ",".join(changed(part["file"]) + (part["scale"] or "") for part in parts if part is not None)


def _value_of(given: Mapping[str, str], flags: Sequence[str]) -> str:
    """The value of the first of these flags that is given; empty where none is."""
    return next((given[key] for flag in flags if (key := flag.lstrip("-")) in given), "")


def _flags(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag with what follows it. A word that begins with `-` is a flag, unless it is a number."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("-") and not _NUMBER.fullmatch(word):
            found.append((word, []))
        elif found:
            found[-1][1].append(word)
        else:
            raise UsageError(f"format ini: {word!r} belongs to no flag, and a preset holds flags only; leave it out")
    return found


def _preset_entry(flag: str, values: Sequence[str]) -> tuple[str, str]:
    """Key and value of a flag. UsageError for what the file's format cannot hold."""
    key = flag.lstrip("-")
    if not _KEY.fullmatch(key):
        raise UsageError(f"format ini: {flag!r} cannot be a key of a preset; use another format")
    if len(values) > 1:
        raise UsageError(f"format ini: {flag} has {len(values)} values, and a preset holds one; use another format")
    value = values[0] if values else "true"
    value = _with_files(flag, value, lambda file: str(Path.cwd() / file))  # the router may start in another folder
    if set(";#\r\n") & set(value) or value != value.strip(" \t"):
        raise UsageError(
            f"format ini: the value of {flag}, {value!r}, has a character that ends or changes a value in a preset "
            "(; # or a line break, or a space around it); use another format"
        )
    return key, value


# -- systemd ---------------------------------------------------------------------------------------------------------


def _systemd(argv: Sequence[str]) -> str:
    argv = launch_words(argv)
    program = shutil.which(argv[0]) or argv[0]  # systemd looks for names in a fixed list of folders
    program = str(Path.cwd() / program) if "/" in program else program
    if program[0] in '@-:+!|"':
        raise UsageError(f"format systemd: a program cannot be named {program!r} there; give its full path")
    command = [_systemd_word(program, variables=False), *map(_systemd_word, argv[1:])]
    lines = [
        "[Unit]",
        f"Description={Path(program).name.replace('%', '%%')}",
        "Wants=network-online.target",
        "After=network-online.target",
        "",
        "[Service]",
        f"WorkingDirectory={str(Path.cwd()).replace('%', '%%')}",
        f"ExecStart={' '.join(command)}",
        "Restart=on-failure",
        "",
        "[Install]",
        "WantedBy=default.target",
    ]
    return "\n".join(lines)


def _systemd_word(word: str, *, variables: bool = True) -> str:
    """A word of ExecStart, in quotes where it needs them.

    variables  whether `$` begins a variable, as in all words but the first
    """
    escaped = word.replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')
    escaped = escaped.replace("$", "$$") if variables else escaped
    escaped = "".join(f"\\x{ord(c):02x}" if ord(c) < 32 or ord(c) == 127 else c for c in escaped)
    return escaped if re.fullmatch(r"[\w@%+=:,./$-]+", escaped, re.ASCII) else f'"{escaped}"'


# -- Docker Compose --------------------------------------------------------------------------------------------------


def _compose(argv: Sequence[str]) -> str:
    program = program_of(argv)
    if program is None or program not in _IMAGES:
        raise UsageError(f"format compose: no image with {argv[0]} is known; it is for llama-server and vllm")
    variables, words = _in_image(argv, program)
    mounts: dict[str, str] = {}
    for index, word in enumerate(words):
        before = words[index - 1] if index else ""
        if program == LLAMA_SERVER:
            words[index] = _with_files(before, word, lambda file: _mounted(Path(file), mounts, folder=False))
        elif before in ("", "--model") and not word.startswith("-") and Path(word).is_dir():
            words[index] = _mounted(Path(word), mounts, folder=True)
        if words[index] == word and len(Path(word).parts) > 1 and Path(word).is_absolute() and Path(word).exists():
            raise UsageError(
                f"format compose: {' '.join([before, word]).strip()} is a file or folder of this machine, and whether "
                "the server reads it or writes it is not known; leave it out, and mount it yourself"
            )
    host = _last(words, "--host") or "127.0.0.1"
    port = _last(words, "--port") or str(_PORTS[program])
    service: dict[str, Any] = {"image": _IMAGES[program]}
    if program == VLLM:
        service |= {"entrypoint": ["vllm", "serve"], "ipc": "host", "deploy": _GPUS}
    if variables:
        service["environment"] = _interpolated(variables)
    service["command"] = _interpolated([*words, "--host", "0.0.0.0"])  # of the container alone
    service["ports"] = _interpolated([f"[{host}]:{port}:{port}" if ":" in host else f"{host}:{port}:{port}"])
    if mounts:
        service["volumes"] = [
            {
                "type": "bind",
                "source": source.replace("$", "$$"),
                "target": target.replace("$", "$$"),
                "read_only": True,
            }
            for source, target in mounts.items()
        ]
    return dump({"services": {program: service}}).rstrip("\n")


def _in_image(argv: Sequence[str], program: str) -> tuple[list[str], list[str]]:
    """Values of variables, and the words after the program, or after `serve`. UsageError for other words before it."""
    at = program_at(argv)
    before = list(argv[:at])
    if before[-1:] == ["-m"]:  # `python -m vllm...`
        before = before[:-2]
    variables = [word for word in before if assigns(word)]
    others = [word for word in before if not assigns(word) and word != "env"]
    if others:
        raise UsageError(
            f"format compose: {shlex.join(others)} before {argv[at]} would not run in the container; leave it out"
        )
    serve = serve_at(argv) if program == VLLM else None
    return variables, list(argv[(at if serve is None else serve) + 1 :])


def _mounted(path: Path, mounts: dict[str, str], *, folder: bool) -> str:
    """The path inside the container, after adding what has to be mounted there to `mounts`.

    A model in several files is named by its first one, and needs its folder.
    """
    full = Path.cwd() / path
    source = full.parent if not folder and _SPLIT.search(full.name) else full
    taken = {target for other, target in mounts.items() if other != str(source)}
    names = [source.name, *(f"{number}/{source.name}" for number in range(2, len(mounts) + 2))]
    target = next(f"{_IN_CONTAINER}/{name}" for name in names if f"{_IN_CONTAINER}/{name}" not in taken)
    mounts[str(source)] = target
    return target if source == full else f"{target}/{full.name}"


def _last(words: Sequence[str], flag: str) -> str | None:
    """The value of a flag, of which the last one counts; None where it is not given."""
    found = [after for word, after in pairwise(words) if word == flag]
    found += [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]
    return found[-1] if found else None


def _interpolated(words: Sequence[str]) -> list[str]:
    """Compose replaces variables in every text; `$$` is a dollar sign."""
    return [word.replace("$", "$$") for word in words]


FORMATS: Mapping[str, Callable[[Sequence[str]], str]] = {
    "args": lambda argv: shlex.join(launch_words(argv)),
    "json": lambda argv: json.dumps(launch_words(argv), ensure_ascii=False),
    "ini": _ini,
    "systemd": _systemd,
    "compose": _compose,
}
"""The names of the formats, with what writes each."""
