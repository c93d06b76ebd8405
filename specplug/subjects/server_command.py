"""The command line of a server: what the user wrote, read but never changed, and flags added after it.

It knows which program the command starts, where that will answer, and which flags contradict each other. It runs the
program for nothing but its help.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from specplug.errors import UsageError
from specplug.profile.server_programs import assigns, launch_words
from specplug.subjects.drafting_flags import drafting_words, flag_name, is_drafting, is_switch
from specplug.subjects.help_text import Help, parse_help

HELP_S = 60.0
"""Seconds for `--help`. llama-server takes below one; a Python script that imports an engine takes several."""

MODEL, PORT, HOST, KEY = ("-m", "--model"), ("--port",), ("--host",), ("--api-key",)
CERTIFICATE = ("--ssl-cert-file", "--ssl-certfile")
PREFIX = ("--api-prefix",)
SLOTS = ("-np", "--parallel", "--max-num-seqs")
THREADS = ("-t", "--threads")
CONTEXT = ("-c", "--ctx-size", "--max-model-len")

LLAMA_VARIABLES = {"--port": "LLAMA_ARG_PORT", "--host": "LLAMA_ARG_HOST", "--api-key": "LLAMA_API_KEY"}
"""Environment variables that llama-server reads where the flag is missing."""

HUB = ("-hf", "-hfr", "--hf-repo", "-mu", "--model-url", "--models-dir", "--models-preset", "-dr", "--docker-repo")
"""Other flags that name llama-server's model."""

DRAFTING_VARIABLES = ("LLAMA_ARG_SPEC_TYPE", "LLAMA_ARG_SPEC_DRAFT_MODEL", "LLAMA_ARG_MODEL_DRAFT")


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """How to start a server.

    argv     the user's words, untouched
    kind     `llama-server`, which includes its forks, `vllm`, `specplug`, or `unknown`
    help     of a llama-server's build; None for other kinds
    version  of that build, as it says it; empty where it says none, and for other kinds
    """

    argv: tuple[str, ...]
    kind: str
    help: Help | None = None
    version: str = ""

    def with_flags(self, flags: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[str]:
        """The user's words with `flags` after them. UsageError for flags that contradict the user's own."""
        self._check(flags, environment)
        return [*self.argv, *flags]

    def without_drafting(self) -> ServerCommand:
        """The same command without its flags that have an effect on drafting only."""
        dropped = set(drafting_words(self.kind, self.argv))
        return replace(self, argv=tuple(word for at, word in enumerate(self.argv) if at not in dropped))

    @property
    def drafting(self) -> list[str]:
        """The user's own flags that have an effect on drafting, with their values."""
        return [self.argv[at] for at in drafting_words(self.kind, self.argv)]

    @property
    def program(self) -> str:
        """What messages call it: the file's name of the program."""
        return Path(self.argv[_program_at(self.argv)]).name

    @property
    def model(self) -> str | None:
        """The model that the command names; None where it names none."""
        if (named := self.value(MODEL)) is not None or self.kind not in ("vllm", "specplug"):
            return named
        at = _program_at(self.argv) + 1
        words = self.argv[at : at + 2]  # `vllm serve MODEL`
        return words[1] if len(words) == 2 and words[0] == "serve" and not words[1].startswith("-") else None

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
        """The value of a flag, that of the last one where it is given several times; None where it is not given."""
        found = None
        words = self.argv[_program_at(self.argv) + 1 :]  # those before it belong to `taskset -c 1`, or `python -m`
        for at, word in enumerate(words):
            name, assigned, value = word.partition("=")
            if not word.startswith("-") or flag_name(self.kind, name) not in names:
                continue
            if assigned:
                found = value
            elif at + 1 < len(words):
                found = words[at + 1]
        if found is None and self.kind == "llama-server":
            found = os.environ.get(LLAMA_VARIABLES.get(names[0], ""))
        return found

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
        if self.kind == "llama-server" and any(is_switch(self.kind, added) for added in mine):
            for name in DRAFTING_VARIABLES:
                if environment.get(name):
                    raise UsageError(
                        f"the environment variable {name} makes llama-server draft, and {mine[0]} would be added; "
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
        raise UsageError(
            f"--server {text!r}: there is no program {words[0] if words else text}; give its path, "
            "a command such as `llama-server -m MODEL.gguf`, or an address such as http://127.0.0.1:8080"
        )
    kind = _kind_by_name(argv)
    command = ServerCommand(argv, kind or "unknown")
    if kind in (None, "llama-server"):
        command = _asked(command)
    return command if model is None else _with_model(command, model)


def _with_model(command: ServerCommand, model: str) -> ServerCommand:
    named = command.model or command.value(HUB)
    if named is not None:
        raise UsageError(f"--model {model}: the command of --server names {named} already; leave out one")
    at = _program_at(command.argv)
    if command.kind in ("vllm", "specplug"):
        rest = command.argv[at + 2 :] if command.argv[at + 1 : at + 2] == ("serve",) else None
        if rest is None and "serve" not in command.argv:
            words = (
                (*command.argv, "--model", model) if _is_python(command.argv[0]) else (*command.argv, "serve", model)
            )
        else:
            words = (*command.argv[: at + 2], model, *(rest or ()))
        return replace(command, argv=words)
    if command.kind != "llama-server":
        raise UsageError(
            f"--model {model}: specplug does not know how {command.program} takes it; write it into --server"
        )
    return replace(command, argv=(*command.argv, "-m", model))


def _asked(command: ServerCommand) -> ServerCommand:
    """The command with what its `--help` and `--version` say; unchanged where that is not a llama-server's."""
    code, text = _printed(command, "--help")
    found = parse_help(text)
    if found.accepts("--port") and (found.accepts("-md") or found.accepts("--spec-type")):
        _, said = _printed(command, "--version")
        version = next(
            (line.partition(":")[2].strip() for line in said.splitlines() if line.startswith("version:")), ""
        )
        return replace(command, kind="llama-server", help=found, version=version)
    if command.kind == "llama-server":
        lines = text.strip().splitlines()
        raise UsageError(
            f"{command.program} --help names neither --port nor -md, as a llama-server does "
            f"(exit code {code}: {lines[-1] if lines else 'no output'})"
        )
    return command


def _printed(command: ServerCommand, flag: str) -> tuple[int, str]:
    """The exit code of the program with one flag alone, and what it prints."""
    words = [*launch_words(command.argv[: _program_at(command.argv) + 1]), flag]
    try:
        done = subprocess.run(words, capture_output=True, timeout=HELP_S, stdin=subprocess.DEVNULL, check=False)
    except subprocess.TimeoutExpired:
        raise UsageError(
            f"{command.program} {flag} did not end within {HELP_S:g} s; is it a server's program?"
        ) from None
    except OSError as error:
        raise UsageError(
            f"{command.program} cannot be started ({error.strerror}); give the path of a program"
        ) from None
    return done.returncode, (done.stdout + done.stderr).decode(errors="replace")


def _kind_by_name(argv: Sequence[str]) -> str | None:
    """None where the names do not tell it."""
    at = _program_at(argv)
    name = Path(argv[at]).name.lower().removesuffix(".exe")
    if "llama-server" in name:
        return "llama-server"
    if name == "vllm" or argv[at].startswith("vllm.entrypoints."):
        return "vllm"
    return "specplug" if name == "specplug" or argv[at].startswith("specplug_cli") else None


def _program_at(argv: Sequence[str]) -> int:
    """The place of the program among words that start it, such as `taskset -c 1 llama-server` or `python server.py`."""
    for at, word in enumerate(argv):
        name = Path(word).name.lower().removesuffix(".exe")
        if (
            name in ("vllm", "specplug")
            or "llama-server" in name
            or word.startswith(("vllm.entrypoints.", "specplug_cli"))
        ):
            return at
    first = next((at for at, word in enumerate(argv) if not assigns(word)), 0)
    if not _is_python(argv[first]):
        return first
    return next((at for at, word in enumerate(argv) if word.endswith(".py")), first)


def _is_python(word: str) -> bool:
    return re.fullmatch(r"python[0-9.]*(\.exe)?", Path(word).name) is not None


def _is_short(word: str) -> bool:
    return re.match(r"-[A-Za-z]", word) is not None


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
