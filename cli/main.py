"""The entry point: finds the command, and turns every failure into one line and an exit code.

A command's module is imported when it is called, so that `specplug --help` takes no engine and no NumPy.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

import click

from specplug import __version__
from specplug.errors import SpecplugError

COMMANDS = {
    "serve": "Start an OpenAI-compatible server with a profile.",
    "run": "Generate text with a profile, from a prompt, stdin or a file.",
    "bench": "Compare profiles with plain decoding over a workload.",
    "tune": "Measure this machine and this work, and write the profile that is fastest here.",
    "build": "Make drafters: trim a model's head to the words that are used.",
    "verify": "Prove that a profile's output equals plain decoding's.",
    "profiles": "List, show, check, draw and translate profiles.",
    "doctor": "Say what this machine has, what works and what to install.",
}
"""Name and help line; the click command NAME is in the module NAME beside this one."""

DEBUG = "SPECPLUG_DEBUG"


class LazyGroup(click.Group):
    """A group whose commands are imported one at a time."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f".{cmd_name}", __package__), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Flags that commands share also have a variable, as SPECPLUG_PROFILE; a flag wins over it, and it over the "
    "profile. "
    "Exit codes: 0 done, 1 failed, 2 bad input, 3 nothing beats plain decoding (tune), 4 outputs differ (verify), "
    "5 engine missing, 130 interrupted.",
)
@click.version_option(__version__, prog_name="specplug")
def app() -> None:
    """Generate faster with speculative decoding: the same output, drafts only where measured costs say they pay."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        code = _run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has left, as `head` does
        code = 1
    except KeyboardInterrupt:
        code = _notify("interrupted", 130)
    except OSError as error:
        _trace()
        code = _notify(f"error: {error}", 1)
    else:
        return code
    # What is still buffered cannot go anywhere: without this the interpreter would complain at exit.
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
        return _notify(f"error: {_one_line(error.format_message())} See {command} --help", error.exit_code)
    except click.ClickException as error:
        return _notify(f"error: {_one_line(error.format_message())}", error.exit_code)
    except click.Abort:
        raise KeyboardInterrupt from None
    except SpecplugError as error:
        _trace()
        return _notify(f"error: {_one_line(str(error))}", error.exit_code)
    except OSError:
        raise
    except Exception as error:
        _trace()
        hint = "" if os.environ.get(DEBUG) else f" (set {DEBUG}=1 for the traceback)"
        return _notify(f"error: {type(error).__name__}: {_one_line(str(error))}{hint}", 1)
    return code if isinstance(code, int) else 0


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _notify(what: str, code: int) -> int:
    click.echo(f"specplug: {what}", err=True)
    return code


def _trace() -> None:
    if os.environ.get(DEBUG):
        traceback.print_exc()


if __name__ == "__main__":
    sys.exit(main())
