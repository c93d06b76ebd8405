"""The file of the profile that `tune` writes, and the unfinished tune of it."""

from __future__ import annotations

from pathlib import Path

from specplug import profile as profiles
from specplug.errors import UsageError
from specplug.machine.folders import expanded
from specplug.profile.settings import as_name
from specplug.tune.tune_request import journal_path


def tuned_target(out: str | None, label: str) -> Path:
    """The file that --out names; without it, one for a model of this name. UsageError where the name is invalid."""
    if out is None:
        return profiles.user_folder() / f"{as_name(label, 'model')}-tuned.yaml"
    path = expanded(out)
    if path.suffix not in (".yaml", ".yml"):
        if path.name != out:
            raise UsageError(f"--out {out}: a path has to end in .yaml; change it, or give a name without a folder")
        path = profiles.user_folder() / f"{out}.yaml"
    if not profiles.NAME.fullmatch(path.stem):
        raise UsageError(f"--out {out}: {path.stem!r} is no profile name; use a-z, 0-9, '.', '_' and '-'")
    return path


def check_resumable(target: Path, resume: bool) -> None:
    """Raise UsageError where --resume has nothing to continue, for a dry run, which opens no journal."""
    path = journal_path(target)
    if resume and not path.exists():
        raise UsageError(f"{path}: nothing to resume; run without --resume")
