"""The profile: every setting of a run, and the evidence for it, in one YAML file.

Knows the schema, the folders and the file format. Knows no engine; of proposers, only what the registry tells.
A profile comes from strangers: it is read with limits, and can name registered proposers only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import resources
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from platformdirs import user_config_dir

from specplug import registry
from specplug.errors import SpecplugError, UsageError
from specplug.files import write_atomically
from specplug.registry import ProposerSpec, nearest

SCHEMA = 1
SIZE_LIMIT = 1 << 20
"""Bytes of a profile file; one with a cost curve and evidence has about 10 thousand."""

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
ENGINES = ("llama-cpp", "vllm")
KV_TYPES = ("f16", "bf16", "f32", "q8_0")
ENV_FOLDER = "SPECPLUG_PROFILES"


@dataclass(frozen=True, slots=True)
class PlannerSettings:
    """`mode` measured: verify what the cost curve says pays. static: always the best `max_nodes` nodes."""

    mode: str = "measured"
    max_nodes: int = 24
    trees: bool = True


@dataclass(frozen=True, slots=True)
class Runtime:
    """How the engine opens the model; `threads` None is the engine's choice."""

    threads: int | None = None
    context: int = 4096
    batch: int = 512
    gpu_layers: int = 0
    flash_attention: bool | None = None
    kv_type: str = "f16"


@dataclass(frozen=True, slots=True)
class CostPoints:
    """Milliseconds of one target pass: ms[i][j] with contexts[i] tokens in the cache and rows[j] rows."""

    contexts: tuple[int, ...]
    rows: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """What was seen on one machine: its fingerprint, the cost curve, and (hits, misses) per bucket."""

    hardware: Mapping[str, Any] = field(default_factory=dict)
    cost_curve: CostPoints | None = None
    acceptance: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Profile:
    """The only configuration object. Command-line flags are edits of one."""

    name: str
    description: str = ""
    engine: str = "llama-cpp"
    model: str | None = None
    proposers: tuple[ProposerSpec, ...] = (ProposerSpec("suffix"), ProposerSpec("token_recycling"))
    planner: PlannerSettings = PlannerSettings()
    exact: bool = False
    runtime: Runtime = Runtime()
    measured: Measured | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Listed:
    """A profile that can be named; `problem` says why it cannot be used, if so."""

    name: str
    source: str
    description: str
    problem: str | None = None


def load(name_or_path: str | Path) -> Profile:
    """The profile in a file, or of a name: the user's own first, then the shipped. UsageError says what is wrong."""
    asked = os.fspath(name_or_path)
    if isinstance(name_or_path, Path) or _is_path(asked):
        return loads(_read(Path(asked).expanduser()), asked)
    if not NAME.fullmatch(asked):
        raise UsageError(f"{asked!r} is no profile name; use a-z, 0-9, '.', '_' and '-', or a path that ends in .yaml")
    own = user_folder() / f"{asked}.yaml"
    if own.is_file():
        return loads(_read(own), str(own))
    shipped = _shipped()
    if asked in shipped:
        return loads(shipped[asked], f"{asked}.yaml (shipped)")
    raise UsageError(f"no profile is named {asked}; {nearest(asked, [*_own(), *shipped])}")


def loads(text: str, source: str) -> Profile:
    """The profile in YAML text. UsageError: `source: key: what is wrong; what to do`, in one line."""
    try:
        data = _parse(text)
        return _profile(data)
    except _Invalid as wrong:
        raise UsageError(f"{source}: {' '.join(str(wrong).split())}") from None


def dumps(profile: Profile) -> str:
    """YAML text that `loads` turns into an equal profile. Defaults are written out: they may change, a profile not."""
    return yaml.dump(_as_yaml(as_mapping(profile)), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def as_mapping(profile: Profile) -> dict[str, Any]:
    """The profile as plain data, in the order and with the keys of its YAML."""
    methods = [{"method": spec.method, **spec.options} if spec.options else spec.method for spec in profile.proposers]
    return {"schema": SCHEMA} | asdict(profile) | {"proposers": methods}


def save(profile: Profile, path: str | Path) -> None:
    """Write the profile whole or not at all. SpecplugError when the disk refuses, with the old file untouched."""
    text = dumps(profile)
    loads(text, str(path))  # nothing is written that could not be read again
    write_atomically(Path(path), text.encode())


def list_profiles() -> list[Listed]:
    """The user's own profiles, then the shipped ones that they do not hide, each in order of name."""
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
    """Where the user's own profiles are: SPECPLUG_PROFILES, or the platform's configuration folder."""
    chosen = os.environ.get(ENV_FOLDER)
    return Path(chosen) if chosen else Path(user_config_dir("specplug")) / "profiles"


# -- reading ---------------------------------------------------------------------------------------------------------


class _Invalid(Exception):
    """What is wrong with a profile's text: `key: what; what to do`."""


def _is_path(asked: str) -> bool:
    separators = {os.sep, os.altsep or os.sep}
    return asked.endswith((".yaml", ".yml")) or any(separator in asked for separator in separators)


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
        return content.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: byte {error.start} is not UTF-8; save the profile as UTF-8") from None


def _shipped() -> dict[str, str]:
    found = {}
    for file in resources.files("specplug_profiles").iterdir():
        if file.name.endswith(".yaml"):
            found[file.name.removesuffix(".yaml")] = file.read_text(encoding="utf-8")
    return dict(sorted(found.items()))


def _own() -> dict[str, Path]:
    try:
        paths = sorted(user_folder().glob("*.yaml"))
    except OSError:
        return {}
    return {path.stem: path for path in paths if NAME.fullmatch(path.stem)}


class _Loader(yaml.SafeLoader):
    """YAML without aliases, tags, repeated keys and dates: a profile is a plain tree of settings."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (yaml declares it so)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        alias, tag = isinstance(event, yaml.AliasEvent), getattr(event, "tag", None)
        if alias or tag is not None:
            what = "an alias (*) is not allowed; write the value out" if alias else "a tag (!) is not allowed; drop it"
            raise _Invalid(f"line {_line(event.start_mark)}: {what}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key.value, str) else None
            if name is None or name in seen:
                what = "a key must be plain text" if name is None else f"{name}: written twice; keep one"
                raise _Invalid(f"line {_line(key.start_mark)}: {what}")
            seen.add(name)
        return super().construct_mapping(node, deep)


def _parse(text: str) -> object:
    if len(text) > SIZE_LIMIT:
        raise _Invalid(f"larger than {SIZE_LIMIT >> 20} MiB; a profile holds settings, move other data out")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        problem = " ".join(str(error.problem or error.context).split())
        line = _line(error.problem_mark or error.context_mark)
        raise _Invalid(f"line {line}: not valid YAML ({problem}); correct it") from None
    except yaml.YAMLError as error:
        raise _Invalid(f"not valid YAML ({' '.join(str(error).split())}); correct it") from None
    except RecursionError:
        raise _Invalid("nested too deep; a profile has a few levels") from None
    except ValueError as error:  # PyYAML lets int() and float() speak for themselves
        raise _Invalid(f"a value cannot be read ({error}); correct it") from None


def _line(mark: Any) -> int:
    return 1 if mark is None else mark.line + 1


# -- checking --------------------------------------------------------------------------------------------------------

T = TypeVar("T")
Check = Callable[[object, str], Any]


def _profile(data: object) -> Profile:
    if not isinstance(data, dict):
        raise _Invalid("not a mapping of settings; start it with `schema: 1`")
    if "schema" not in data:
        raise _Invalid(f"schema: missing; add `schema: {SCHEMA}`")
    if data["schema"] != SCHEMA or isinstance(data["schema"], bool):
        raise _Invalid(f"schema: {data['schema']!r} is not supported; use {SCHEMA}, or update specplug")
    settings = {key: value for key, value in data.items() if key != "schema"}
    if "name" not in settings:
        raise _Invalid("name: missing; add one")
    return _section(Profile, _PROFILE, settings, "")


def _section(cls: type[T], checks: Mapping[str, Check], value: object, where: str) -> T:
    if not isinstance(value, dict):
        raise _wrong(where, value, "a mapping")
    checked = {}
    for key, item in value.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in checks:
            raise _Invalid(f"{name}: unknown key; {nearest(str(key), checks)}")
        checked[key] = checks[key](item, name)
    return cls(**checked)


def _wrong(where: str, value: object, wanted: str) -> _Invalid:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return _Invalid(f"{where}: {shown} is not {wanted}; change it, or leave it out")


def _whole(low: int, high: int) -> Check:
    def check(value: object, where: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise _wrong(where, value, "a whole number")
        if not low <= value <= high:
            raise _Invalid(f"{where}: {value} is out of range; use {low} to {high}")
        return value

    return check


def _number(value: object, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not isfinite(value):
        raise _wrong(where, value, "a number")
    return float(value)


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(where, value, "true or false")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(where, value, "text")
    return value


def _choice(valid: tuple[str, ...]) -> Check:
    def check(value: object, where: str) -> str:
        if value not in valid:
            shown = f"{value!r} is not one of {', '.join(valid)}"
            raise _Invalid(f"{where}: {shown}; {nearest(str(value), valid)}")
        return str(value)

    return check


def _name(value: object, where: str) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise _wrong(where, value, "a name of a-z, 0-9, '.', '_' and '-'")
    return value


def _optional(inner: Check) -> Check:
    return lambda value, where: None if value is None else inner(value, where)


def _items(inner: Check) -> Check:
    def check(value: object, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise _wrong(where, value, "a list")
        return tuple(inner(item, f"{where}[{i}]") for i, item in enumerate(value))

    return check


def _plain_mapping(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(where, value, "a mapping")
    for key, item in value.items():
        if not isinstance(key, str):
            raise _Invalid(f"{where}: key {key!r} is not text; put it in quotes")
        _plain(item, f"{where}.{key}")
    return value


def _plain(value: object, where: str) -> object:
    """Nothing but what YAML and JSON both hold."""
    if isinstance(value, dict):
        return _plain_mapping(value, where)
    if isinstance(value, list):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not isfinite(value):
        raise _wrong(where, value, "a finite number")
    if value is not None and not isinstance(value, bool | int | float | str):
        raise _wrong(where, value, "plain data")
    return value


def _proposers(value: object, where: str) -> tuple[ProposerSpec, ...]:
    if not isinstance(value, list):
        raise _wrong(where, value, "a list of methods")
    specs = tuple(spec for i, item in enumerate(value) for spec in _proposer(item, f"{where}[{i}]"))
    try:
        registry.check_list(specs)
    except UsageError as error:
        raise _Invalid(f"{where}: {error}") from None
    return specs


def _proposer(value: object, where: str) -> tuple[ProposerSpec, ...]:
    entry = {"method": value} if isinstance(value, str) else value
    if not isinstance(entry, dict) or not isinstance(entry.get("method"), str):
        raise _wrong(where, value, "a method's name, or a mapping with `method`")
    options = {key: item for key, item in _plain_mapping(entry, where).items() if key != "method"}
    if entry["method"] == "fusion":
        if options.keys() != {"proposers"}:
            raise _Invalid(f"{where}: fusion takes proposers, nothing else; list the methods there")
        return _proposers(options["proposers"], f"{where}.proposers")
    spec = ProposerSpec(entry["method"], options)
    try:
        if spec.method not in registry.names():
            _unknown_method(spec.method, where)
        registry.check(spec)
    except UsageError as error:
        raise _Invalid(f"{where}.{error}") from None
    return (spec,)


def _unknown_method(method: str, where: str) -> NoReturn:
    raise _Invalid(f"{where}.method: {method!r} is not registered; {nearest(method, [*registry.names(), 'fusion'])}")


def _cost_points(value: object, where: str) -> CostPoints:
    if not isinstance(value, dict) or value.keys() != _COST_POINTS.keys():
        raise _Invalid(f"{where}: not a mapping of contexts, rows and ms; measure again")
    curve = _section(CostPoints, _COST_POINTS, value, where)
    for key, points in (("contexts", curve.contexts), ("rows", curve.rows)):
        if not points or list(points) != sorted(set(points)):
            raise _Invalid(f"{where}.{key}: does not ascend; measure again")
    if curve.rows[0] != 1:
        raise _Invalid(f"{where}.rows: starts at {curve.rows[0]}, not at 1; measure again")
    if [len(line) for line in curve.ms] != [len(curve.rows)] * len(curve.contexts):
        raise _Invalid(f"{where}.ms: needs one list per context with one value per row count; measure again")
    if any(ms <= 0 for line in curve.ms for ms in line):
        raise _Invalid(f"{where}.ms: holds a value that is not above 0; measure again")
    return curve


def _acceptance(value: object, where: str) -> dict[str, tuple[float, float]]:
    counts = {}
    for bucket, pair in _plain_mapping(value, where).items():
        if not isinstance(pair, list) or len(pair) != 2:
            raise _wrong(f"{where}.{bucket}", pair, "a pair [hits, misses]")
        hits, misses = (_number(item, f"{where}.{bucket}") for item in pair)
        if hits < 0 or misses < 0:
            raise _Invalid(f"{where}.{bucket}: a count is below 0; measure again")
        counts[bucket] = (hits, misses)
    return counts


_COST_POINTS: dict[str, Check] = {
    "contexts": _items(_whole(0, 1 << 24)),
    "rows": _items(_whole(1, 1 << 16)),
    "ms": _items(_items(_number)),
}
_MEASURED: dict[str, Check] = {
    "hardware": _plain_mapping,
    "cost_curve": _optional(_cost_points),
    "acceptance": _acceptance,
}
_PLANNER: dict[str, Check] = {
    "mode": _choice(("measured", "static")),
    "max_nodes": _whole(1, 1024),
    "trees": _flag,
}
_RUNTIME: dict[str, Check] = {
    "threads": _optional(_whole(1, 1024)),
    "context": _whole(16, 1 << 24),
    "batch": _whole(1, 1 << 20),
    "gpu_layers": _whole(-1, 10_000),
    "flash_attention": _optional(_flag),
    "kv_type": _choice(KV_TYPES),
}
_PROFILE: dict[str, Check] = {
    "name": _name,
    "description": _text,
    "engine": _choice(ENGINES),
    "model": _optional(_text),
    "proposers": _proposers,
    "planner": lambda value, where: _section(PlannerSettings, _PLANNER, value, where),
    "exact": _flag,
    "runtime": lambda value, where: _section(Runtime, _RUNTIME, value, where),
    "measured": _optional(lambda value, where: _section(Measured, _MEASURED, value, where)),
    "evidence": _plain_mapping,
}


# -- writing ---------------------------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Row(list[Any]):
    """A list that is written on one line."""


def _represent_row(dumper: yaml.SafeDumper, row: _Row) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", row, flow_style=True)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # Only this style escapes all that a YAML reader would take for a line's end (U+0085, for one).
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(_Row, _represent_row)
_Dumper.add_representer(str, _represent_text)


def _as_yaml(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_yaml(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        scalars = all(item is None or isinstance(item, bool | int | float | str) for item in value)
        return (_Row if scalars else list)(_as_yaml(item) for item in value)
    return value
