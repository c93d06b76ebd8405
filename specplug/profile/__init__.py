"""The profile: every setting of a run, with the evidence for it, in one YAML file.

This module finds, reads and writes profiles; it depends on no engine. A profile is untrusted input: it is read with
limits, and can name registered proposers only. One for engine `server` names a command: nothing here starts it.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from specplug.errors import SpecplugError, UsageError
from specplug.machine.files import write_atomically
from specplug.machine.folders import config_folder, expanded
from specplug.profile.checks import profile_from
from specplug.profile.settings import (
    DTYPES,
    ENGINES,
    KV_TYPES,
    NAME,
    SCHEMA,
    SERVER,
    CostPoints,
    Invalid,
    Measured,
    PlannerSettings,
    Profile,
    Remember,
    Runtime,
    ServerSettings,
    VllmSettings,
)
from specplug.profile.yaml_text import SIZE_LIMIT, dump, parse
from specplug.registry import nearest

__all__ = [
    "DTYPES",
    "ENGINES",
    "KV_TYPES",
    "NAME",
    "SCHEMA",
    "SERVER",
    "SIZE_LIMIT",
    "CostPoints",
    "Listed",
    "Measured",
    "PlannerSettings",
    "Profile",
    "Remember",
    "Runtime",
    "ServerSettings",
    "VllmSettings",
    "as_mapping",
    "dumps",
    "for_own_engine",
    "is_shipped",
    "list_profiles",
    "load",
    "loads",
    "save",
    "user_folder",
]

ENV_FOLDER = "SPECPLUG_PROFILES"


@dataclass(frozen=True, slots=True)
class Listed:
    """A profile that can be named; `problem` explains why it cannot be used, and is None where it can."""

    name: str
    source: str
    description: str
    problem: str | None = None


def load(name_or_path: str | Path) -> Profile:
    """The profile in a file, or with a name: a user's own hides a shipped one. UsageError where it is invalid."""
    ref = os.fspath(name_or_path)
    if _is_path(name_or_path):
        return loads(_read(expanded(ref)), ref)
    if not NAME.fullmatch(ref):
        raise UsageError(f"{ref!r} is no profile name; use a-z, 0-9, '.', '_' and '-', or a path that ends in .yaml")
    own = user_folder() / f"{ref}.yaml"
    if own.is_file():
        return loads(_read(own), str(own))
    shipped = _shipped()
    if ref in shipped:
        return loads(shipped[ref], f"{ref}.yaml (shipped)")
    raise UsageError(f"no profile is named {ref}; {nearest(ref, [*_own(), *shipped])}")


def is_shipped(name_or_path: str | Path) -> bool:
    """Whether `load` reads it from the package: it is neither a path nor the name of a user's own profile."""
    return not _is_path(name_or_path) and not (user_folder() / f"{name_or_path}.yaml").is_file()


def for_own_engine(profile: Profile) -> Profile:
    """The profile, where one of specplug's engines runs it. UsageError for the command of another program's server."""
    if profile.engine == SERVER:
        raise UsageError(
            f"profile {profile.name}: it is the command of a server, which specplug only starts; start it with "
            "specplug serve, or measure it with --server of tune, bench or verify"
        )
    return profile


def loads(text: str, source: str) -> Profile:
    """The profile in YAML text. UsageError: `source: key: what is wrong; what to do`, in one line."""
    try:
        return profile_from(parse(text))
    except Invalid as wrong:
        raise UsageError(f"{source}: {' '.join(str(wrong).split())}") from None


def dumps(profile: Profile) -> str:
    """YAML text from which `loads` makes an equal profile.

    Defaults are written out, so that the profile stays the same when a later version changes them.
    """
    return dump(as_mapping(profile))


def as_mapping(profile: Profile) -> dict[str, Any]:
    """The profile as plain data, with the keys of its YAML in the same order."""
    methods = [{"method": spec.method, **spec.options} if spec.options else spec.method for spec in profile.proposers]
    return {"schema": SCHEMA} | asdict(profile) | {"proposers": methods}


def save(profile: Profile, path: str | Path) -> None:
    """Write the profile atomically. SpecplugError where it cannot be written; an existing file is then unchanged."""
    text = dumps(profile)
    loads(text, str(path))  # raises for values that `load` would refuse later
    write_atomically(Path(path), text.encode())


def list_profiles() -> list[Listed]:
    """The user's own profiles, then the shipped ones that they do not hide; both are sorted by name."""
    own = _own()
    sources = {name: str(path) for name, path in own.items()}
    sources |= {name: "shipped" for name in _shipped() if name not in own}
    listed = []
    for name, source in sources.items():
        try:
            listed.append(Listed(name, source, load(name).description))
        except SpecplugError as error:
            listed.append(Listed(name, source, "", str(error)))
    return listed


def user_folder() -> Path:
    """The folder of the user's own profiles: SPECPLUG_PROFILES, or the platform's configuration folder."""
    chosen = os.environ.get(ENV_FOLDER)
    return Path(chosen) if chosen else config_folder() / "profiles"


def _is_path(name_or_path: str | Path) -> bool:
    ref = os.fspath(name_or_path)
    separators = {os.sep, os.altsep or os.sep}
    has_separator = any(separator in ref for separator in separators)
    return isinstance(name_or_path, Path) or ref.endswith((".yaml", ".yml")) or has_separator


def _read(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(SIZE_LIMIT + 1)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such profile; see specplug profiles list") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UsageError(f"{str(path)!r}: cannot be read ({error}); name a profile file") from None
    if len(content) > SIZE_LIMIT:
        raise UsageError(f"{path}: larger than {SIZE_LIMIT >> 20} MiB; a profile holds settings, move other data out")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: byte {error.start} is not UTF-8; save the profile as UTF-8") from None


def _shipped() -> dict[str, str]:
    by_name = {}
    for file in resources.files("specplug_profiles").iterdir():
        if file.name.endswith(".yaml"):
            by_name[file.name.removesuffix(".yaml")] = file.read_text(encoding="utf-8")
    return dict(sorted(by_name.items()))


def _own() -> dict[str, Path]:
    try:
        paths = sorted(user_folder().glob("*.yaml"))
    except OSError:
        return {}
    return {path.stem: path for path in paths if NAME.fullmatch(path.stem)}
