"""A temporary folder for drafters that are tried before one is written."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from specplug.errors import SpecplugError


def workplace_beside(stack: ExitStack, out: Path) -> Path:
    """A folder beside the drafter's, where there must be disk space anyway; `stack` removes it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return Path(stack.enter_context(TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.tried.")))
    except OSError as error:
        raise SpecplugError(f"{out}: cannot be written ({error.strerror or error}); name another folder") from error
