"""The command line of a server: what the user wrote, read but never changed, and flags added after it.

It knows which program the command starts, where that will answer, and which flags contradict each other. It runs the
program for nothing but its help.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from specplug.errors import UsageError
from specplug.profile.server_programs import (
    LLAMA_SERVER,
    SPECPLUG,
    VLLM,
    VLLM_MODULE,
    assigns,
    launch_words,
    program_at,
    program_of,
    serve_at,
)
from specplug.subjects.drafting_flags import drafting_words, flag_name, is_drafting, is_switch
from specplug.subjects.help_text import Help, parse_help
from specplug.subjects.program_output import printed
from specplug.subjects.server_text import one_line
from specplug.subjects.vllm_flags import positional

HELP_S = 60.0
"""Seconds for `--help`. llama-server takes below one; a Python script that imports an engine takes several."""

MODEL, PORT, HOST, KEY = ("-m", "--model"), ("--port",), ("--host",), ("--api-key",)
CERTIFICATE = ("--ssl-cert-file", "--ssl-certfile")
PREFIX = ("--api-prefix",)
SLOTS = ("-np", "--parallel", "--max-num-seqs")
THREADS = ("-t", "--threads")
CONTEXT = ("-c", "--ctx-size", "--max-model-len")

DEVICE = re.compile(r"^ +\w+: ", re.MULTILINE)
"""A line of llama-server's `--list-devices`, such as `  CUDA0: NVIDIA H200 (143167 MiB, ...)`."""

HUB = ("-hf", "-hfr", "--hf-repo", "-mu", "--model-url", "--models-dir", "--models-preset", "-dr", "--docker-repo")
"""Other flags that name llama-server's model."""


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """How to start a server.

    argv     the user's words, untouched
    kind     `llama-server`, which includes its forks, `vllm`, `specplug`, or `unknown`
    help     of a llama-server's build; None for other kinds
    version  of that build, as it says it; empty where it says none, and for other kinds
    has_gpu  whether that build finds a device beside the processor; None where it does not say
    """

    argv: tuple[str, ...]
    kind: str
    help: Help | None = None
    version: str = ""
    has_gpu: bool | None = None

    def with_flags(self, flags: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[str]:
        """The user's words with `flags` after them. UsageError for flags that contradict the user's own."""
        self._check(flags, environment)
        return [*self.argv, *flags]

    def without_drafting(self) -> ServerCommand:
        """The same command without its flags that have an effect on drafting only."""
        dropped = set(drafting_words(self.kind, self.argv, self.help))
        return replace(self, argv=tuple(word for at, word in enumerate(self.argv) if at not in dropped))

    @property
    def drafting(self) -> list[str]:
        """The user's own flags that have an effect on drafting, with their values."""
        return [self.argv[at] for at in drafting_words(self.kind, self.argv, self.help)]

    @property
    def program(self) -> str:
        """What messages call it: the file's name of the program."""
        return Path(self.argv[program_at(self.argv)]).name

    @property
    def model(self) -> str | None:
        """The model that the command names; None where it names none."""
        if (named := self.value(MODEL)) is not None or self.kind not in (VLLM, SPECPLUG):
            return named
        at = serve_at(self.argv)
        return None if at is None else positional(self.argv[at + 1 :])

    @property
    def port(self) -> int | None:
        """UsageError for one that is no number."""
        given = self.value(PORT)
        if given is not None and not (given.isdecimal() and 0 < int(given) < 65536):
            raise UsageError(f"--server: --port {given} is no port; use a number from 1 to 65535, or leave it out")
        return None if given is None else int(given)

    @property
    def host(self) -> str | None:
        """The address that it listens on, the first one of several; None where the command names none."""
        given = self.value(HOST)
        return None if given is None else given.split(",")[0].strip()

    @property
    def prefix(self) -> str:
        """The path before all others, without a slash at the end."""
        return (self.value(PREFIX) or "").rstrip("/")

    @property
    def key(self) -> str | None:
        """The API key that the server will demand, the first one of several."""
        given = self.value(KEY)
        return given.split(",")[0] if given else None

    @property
    def certificate(self) -> str | None:
        """The file with its TLS certificate; None where it has none."""
        return self.value(CERTIFICATE)

    @property
    def slots(self) -> int | None:
        return _number(self.value(SLOTS))

    @property
    def context(self) -> int | None:
        return _number(self.value(CONTEXT))

    @property
    def threads(self) -> int | None:
        return _number(self.value(THREADS))

    def value(self, names: Sequence[str]) -> str | None:
        """The value of a flag, that of the last one where it is given several times; of its environment variable where
        a llama-server's help names one and no flag is given; else None."""
        found = None
        words = self.argv[program_at(self.argv) + 1 :]  # those before it belong to `taskset -c 1`, or `python -m`
        for at, word in enumerate(words):
            name, assigned, value = word.partition("=")
            if not word.startswith("-") or flag_name(self.kind, name) not in names:
                continue
            if assigned:
                found = value
            elif at + 1 < len(words):
                found = words[at + 1]
        if found is not None or self.help is None:
            return found
        variables = [self.help.flags[name].variable for name in names if name in self.help.flags]
        return next((os.environ[name] for name in variables if os.environ.get(name)), None)

    def _check(self, flags: Sequence[str], environment: Mapping[str, str]) -> None:
        mine = [
            flag_name(self.kind, word.partition("=")[0]) for word in flags if word.startswith("--") or _is_short(word)
        ]
        theirs = [
            flag_name(self.kind, word.partition("=")[0]) for word in self.argv if _is_short(word) or word[:2] == "--"
        ]
        for given in theirs:
            for added in mine:
                same = self.help.same(given, added) if self.help is not None else given == added
                if same or (is_switch(self.kind, given) and is_switch(self.kind, added)):
                    advice = (
                        "leave out the flags that draft, which are tried anyway"
                        if is_drafting(self.kind, given)
                        else f"leave out {given}"
                    )
                    raise UsageError(f"--server: the command has {given}, and {added} would be added; {advice}")
        if self.help is None or not any(is_switch(self.kind, added) for added in mine):
            return
        for name, flag in self.help.flags.items():
            if is_switch(self.kind, name) and environment.get(flag.variable):
                raise UsageError(
                    f"the environment variable {flag.variable} makes llama-server draft, and {mine[0]} would be added; "
                    "unset it"
                )


def read_command(text: str, model: str | None = None) -> ServerCommand:
    """Read a command line as a shell splits it, find its program, and ask a llama-server for its help.

    model  a model for a command that names none
    Raises UsageError for a program that does not exist, and for a model that is named twice.
    """
    try:
        argv = tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"--server {text!r}: this command line cannot be read ({error})") from None
    if not argv:
        raise UsageError("--server is empty; give a command such as `llama-server -m MODEL.gguf`, or an address")
    words = [word for word in argv if not assigns(word)][:1]
    if not words or shutil.which(words[0]) is None:
        missing = f"there is no program {words[0]}" if words else "it names no program"
        raise UsageError(
            f"--server: {missing}; give its path, "
            "a command such as `llama-server -m MODEL.gguf`, or an address such as http://127.0.0.1:8080"
        )
    kind = program_of(argv)
    command = ServerCommand(argv, kind or "unknown")
    if kind in (None, "llama-server"):
        command = _asked(command)
    return command if model is None else with_model(command, model)


def with_model(command: ServerCommand, model: str) -> ServerCommand:
    """The command with a model for one that names none. UsageError where it names one, and for an unknown program."""
    named = command.model or command.value(HUB)
    if named is not None:
        raise UsageError(f"--model {model}: the command of --server names {named} already; leave out one")
    words = _naming(command, model)
    if words is None:
        raise UsageError(
            f"--model {model}: specplug does not know how {command.program} takes it; write it into --server"
        )
    return replace(command, argv=tuple(words))


def _naming(command: ServerCommand, model: str) -> Sequence[str] | None:
    """The words that start the server with a model; None where they are not known."""
    argv = command.argv
    if command.kind == LLAMA_SERVER:
        return [*argv, "-m", model]
    if command.kind not in (VLLM, SPECPLUG):
        return None
    if argv[program_at(argv)] == VLLM_MODULE:
        return [*argv, "--model", model]
    at = serve_at(argv)
    return [*argv, "serve", model] if at is None else [*argv[: at + 1], model, *argv[at + 1 :]]


def _asked(command: ServerCommand) -> ServerCommand:
    """The command with what its `--help` and the like say; of an unknown kind where it is none that prints a help, such
    as a script that starts a server whatever its arguments are. UsageError for a llama-server that cannot run."""
    code, text = _printed(command, "--help")
    found = parse_help(text)
    if found.accepts("--port") and (found.accepts("-md") or found.accepts("--spec-type")):
        _, said = _printed(command, "--version")
        version = next(
            (one_line(line.partition(":")[2]) for line in said.splitlines() if line.startswith("version:")), ""
        )
        has_gpu = None
        if found.accepts("--list-devices"):
            _, listed = _printed(command, "--list-devices")
            has_gpu = DEVICE.search(listed) is not None
        return replace(command, kind=LLAMA_SERVER, help=found, version=version, has_gpu=has_gpu)
    if command.kind == LLAMA_SERVER and code is None:
        return replace(command, kind="unknown")
    if command.kind == LLAMA_SERVER:
        lines = [one_line(line) for line in text.strip().splitlines()]
        raise UsageError(
            f"{command.program} --help names neither --port nor -md, as a llama-server does "
            f"(exit code {code}: {lines[-1] if lines else 'no output'})"
        )
    return command


def _printed(command: ServerCommand, flag: str) -> tuple[int | None, str]:
    """The exit code of the program with one flag alone, and what it prints; None where it has not ended in HELP_S."""
    words = [*launch_words(command.argv[: program_at(command.argv) + 1]), flag]
    try:
        return printed(words, HELP_S)
    except OSError as error:
        raise UsageError(
            f"{command.program} cannot be started ({error.strerror}); give the path of a program"
        ) from None


def _is_short(word: str) -> bool:
    return re.match(r"-[A-Za-z]", word) is not None


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
