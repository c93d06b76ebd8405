"""The entry point: it finds the command, and turns every failure into one line and an exit code.

The module of a command is imported when the command is called, so that `specplug --help` imports neither an engine nor
NumPy.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

from specplug import __version__
from specplug.errors import SpecplugError

from . import standard_streams

COMMANDS = {
    "demo": "Show the gain on a packaged model, beside plain decoding.",
    "serve": "Start an OpenAI-compatible server.",
    "run": "Generate text from a prompt, stdin or a file.",
    "bench": "Compare profiles with plain decoding over a workload.",
    "tune": "Measure your model, machine and prompts, and write the fastest profile.",
    "build": "Build a drafter with a trimmed output head, or a corpus to draft from.",
    "corpus": "List, show, check and remove corpora.",
    "verify": "Check that a profile's output equals plain decoding's.",
    "profiles": "List, show, check, plot and export profiles.",
    "models": "List the models on this disk, and how to name them.",
    "download": "Download models from the Hugging Face hub.",
    "doctor": "Report what this machine has, what works and what to install.",
    "completion": "Print the completion script of a shell.",
}
"""Name and help line; the click command NAME is in the module NAME beside this one."""

DEBUG = "SPECPLUG_DEBUG"

CLOSED_PIPE = 141
"""The exit code of a program that SIGPIPE ends, as shells report it: 128 + 13. Python ignores that signal."""

_CLICK_WORDS = {
    "is not a valid float range": "is not a number",
    "is not a valid float": "is not a number",
    "is not a valid integer range": "is not a whole number",
    "is not a valid integer": "is not a whole number",
}
"""Names of types in Click's messages, longest first, and plain words for them."""


class ReaderExited(Exception):
    """A BrokenPipeError of a command. Click would end the process at one, with exit code 1."""


class LazyGroup(click.Group):
    """A group that imports a command when it is needed."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise ReaderExited from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f".{cmd_name}", __package__), cmd_name)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names of commands, whose modules are not imported for that; options after a dash."""
        named = [CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)]
        return named or click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Options shared by several commands can also be set by a variable, such as SPECPLUG_PROFILE. A flag "
    "overrides the variable, and the variable overrides the profile."
    "\n\nExit codes: 0 done, 1 failed, 2 bad input, 3 nothing is faster than plain decoding (tune), 4 outputs differ "
    "(verify), 5 engine missing, 130 interrupted, 141 stdout closed by its reader."
    '\n\n\b\nExample: specplug run --model some.gguf "Why is the sky blue?"',
)
@click.version_option(__version__, prog_name="specplug")
def app() -> None:
    """Speculative decoding for llama.cpp and vLLM.

    The output is the same as without it; draft tokens are verified only when measured costs say it is faster.
    """


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    standard_streams.prepare()
    try:
        code = _run(args)
        sys.stdout.flush()
    except (BrokenPipeError, ReaderExited):  # the reader of stdout has exited, as `head` does
        code = CLOSED_PIPE
    except KeyboardInterrupt:
        code = _notify("interrupted", 130)
    except OSError as error:
        _trace()
        code = _notify(f"error: {error}", 1)
    else:
        return code
    # Buffered output can no longer be written: without this, the interpreter would print an error at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code


def _run(args: Sequence[str] | None) -> int:
    try:
        code = app.main(args, prog_name="specplug", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "specplug"
        return _notify(f"error: {_in_plain_words(error.format_message())} (see {command} --help)", error.exit_code)
    except click.ClickException as error:
        return _notify(f"error: {_one_line(error.format_message())}", error.exit_code)
    except click.Abort:
        raise KeyboardInterrupt from None
    except SpecplugError as error:
        _trace()
        return _notify(f"error: {_one_line(str(error))}", error.exit_code)
    except (OSError, ReaderExited):
        raise
    except Exception as error:
        _trace()
        hint = "" if os.environ.get(DEBUG) else f" (set {DEBUG}=1 for the traceback)"
        return _notify(f"error: {type(error).__name__}: {_one_line(str(error))}{hint}", 1)
    return code if isinstance(code, int) else 0


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _in_plain_words(message: str) -> str:
    """A message of Click in one line, without its closing full stop."""
    text = _one_line(message).removesuffix(".")
    for theirs, ours in _CLICK_WORDS.items():
        text = text.replace(theirs, ours)
    return text


def _notify(text: str, code: int) -> int:
    with suppress(OSError):  # stderr is a pipe whose reader has exited, or a file on a full disk
        click.echo(f"specplug: {text}", err=True)
    return code


def _trace() -> None:
    if os.environ.get(DEBUG):
        traceback.print_exc()


if __name__ == "__main__":
    sys.exit(main())
