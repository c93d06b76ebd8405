"""Converts plain data to a Profile, and checks every key, type and range.

Nothing here reads a file. The options of proposers are checked against the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any, NoReturn, TypeVar

from specplug import registry
from specplug.errors import UsageError
from specplug.planning.constants import JUDGED_TOP
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
from specplug.registry import ProposerSpec, nearest

T = TypeVar("T")
Check = Callable[[object, str], Any]


def profile_from(data: object) -> Profile:
    if not isinstance(data, dict):
        raise Invalid("not a mapping of settings; start it with `schema: 1`")
    if "schema" not in data:
        raise Invalid(f"schema: missing; add `schema: {SCHEMA}`")
    if data["schema"] != SCHEMA or isinstance(data["schema"], bool):
        raise Invalid(f"schema: {data['schema']!r} is not supported; use {SCHEMA}, or update specplug")
    settings = {key: value for key, value in data.items() if key != "schema"}
    if "name" not in settings:
        raise Invalid("name: missing; add one")
    profile = _section(Profile, _PROFILE, settings, "")
    if profile.engine == SERVER and profile.server is None:
        raise Invalid("server: missing; give the command that engine server starts")
    if profile.engine != SERVER and profile.server is not None:
        raise Invalid(f"server: engine {profile.engine} starts no command; leave it out, or use engine: server")
    return profile


def _section(cls: type[T], checks: Mapping[str, Check], value: object, where: str) -> T:
    if not isinstance(value, dict):
        raise _wrong(where, value, "a mapping")
    checked = {}
    for key, item in value.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in checks:
            raise Invalid(f"{name}: unknown key; {nearest(str(key), checks)}")
        checked[key] = checks[key](item, name)
    return cls(**checked)


def _wrong(where: str, value: object, wanted: str) -> Invalid:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return Invalid(f"{where}: {shown} is not {wanted}; change it, or leave it out")


def _integer(low: int, high: int) -> Check:
    def check(value: object, where: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise _wrong(where, value, "a whole number")
        if not low <= value <= high:
            raise Invalid(f"{where}: {value} is out of range; use {low} to {high}")
        return value

    return check


def _number(value: object, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not isfinite(value):
        raise _wrong(where, value, "a number")
    return float(value)


def _share(value: object, where: str) -> float:
    share = _number(value, where)
    if not 0 < share <= 1:
        raise _wrong(where, value, "a share above 0, up to 1")
    return share


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
            raise Invalid(f"{where}: {shown}; {nearest(str(value), valid)}")
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
            raise Invalid(f"{where}: key {key!r} is not text; put it in quotes")
        _plain(item, f"{where}.{key}")
    return value


def _plain(value: object, where: str) -> object:
    """The value, if both YAML and JSON can hold it."""
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
        raise Invalid(f"{where}: {error}") from None
    return specs


def _proposer(value: object, where: str) -> tuple[ProposerSpec, ...]:
    entry = {"method": value} if isinstance(value, str) else value
    if not isinstance(entry, dict) or not isinstance(entry.get("method"), str):
        raise _wrong(where, value, "a method's name, or a mapping with `method`")
    options = {key: item for key, item in _plain_mapping(entry, where).items() if key != "method"}
    if entry["method"] == "fusion":
        if options.keys() != {"proposers"}:
            raise Invalid(f"{where}: fusion takes proposers and nothing else; list the methods there")
        return _proposers(options["proposers"], f"{where}.proposers")
    spec = ProposerSpec(entry["method"], options)
    try:
        if spec.method not in registry.names():
            _unknown_method(spec.method, where)
        registry.check(spec)
    except UsageError as error:
        raise Invalid(f"{where}.{error}") from None
    return (spec,)


def _unknown_method(method: str, where: str) -> NoReturn:
    raise Invalid(f"{where}.method: {method!r} is not registered; {nearest(method, [*registry.names(), 'fusion'])}")


def _cost_points(value: object, where: str) -> CostPoints:
    if not isinstance(value, dict) or value.keys() | {"sequences", "change_ms"} != _COST_POINTS.keys():
        raise Invalid(f"{where}: not a mapping of contexts, rows and ms; measure again")
    curve = _section(CostPoints, _COST_POINTS, value, where)
    for key, points in (("contexts", curve.contexts), ("rows", curve.rows)):
        if not points or list(points) != sorted(set(points)):
            raise Invalid(f"{where}.{key}: does not ascend; measure again")
    if curve.rows[0] != 1:
        raise Invalid(f"{where}.rows: starts at {curve.rows[0]}, not at 1; measure again")
    if [len(line) for line in curve.ms] != [len(curve.rows)] * len(curve.contexts):
        raise Invalid(f"{where}.ms: needs one list per context with one value per row count; measure again")
    if curve.change_ms < 0:
        raise Invalid(f"{where}.change_ms: {curve.change_ms} is below 0; measure again")
    if any(ms <= 0 for line in curve.ms for ms in line):
        raise Invalid(f"{where}.ms: holds a value that is not above 0; measure again")
    return curve


def _batch_curves(value: object, where: str) -> tuple[CostPoints, ...]:
    curves: tuple[CostPoints, ...] = _items(_cost_points)(value, where)
    sizes = [curve.sequences for curve in curves]
    if sizes != sorted(set(sizes)):
        raise Invalid(f"{where}: the sequences of its curves, {sizes}, do not ascend; measure again")
    return curves


def _acceptance(value: object, where: str) -> dict[str, tuple[float, float]]:
    counts = {}
    for bucket, pair in _plain_mapping(value, where).items():
        if not isinstance(pair, list) or len(pair) != 2:
            raise _wrong(f"{where}.{bucket}", pair, "a pair [hits, misses]")
        hits, misses = (_number(item, f"{where}.{bucket}") for item in pair)
        if hits < 0 or misses < 0:
            raise Invalid(f"{where}.{bucket}: a count is below 0; measure again")
        counts[bucket] = (hits, misses)
    return counts


def _tokens_per_batch_size(value: object, where: str) -> tuple[tuple[int, int, int], ...]:
    ranges = []
    expected = 1
    for i, item in enumerate(_items(_items(_integer(0, 1 << 16)))(value, where)):
        if len(item) != 3:
            raise _wrong(f"{where}[{i}]", list(item), "[first, last, tokens]")
        first, last, tokens = item
        if first != expected or last < first:
            raise Invalid(f"{where}[{i}]: {first} to {last} does not continue the ranges; start at {expected}")
        expected = last + 1
        ranges.append((first, last, tokens))
    return tuple(ranges)


def _remember(value: object, where: str) -> Remember:
    """A mapping, or the name of the corpus alone."""
    named = {"corpus": value} if isinstance(value, str) else value
    if isinstance(named, dict) and "corpus" not in named:
        raise Invalid(f"{where}.corpus: missing; name a corpus")
    return _section(Remember, _REMEMBER, named, where)


def _server(value: object, where: str) -> ServerSettings:
    settings = _section(ServerSettings, _SERVER, {"command": []} | value if isinstance(value, dict) else value, where)
    if not settings.command or not settings.command[0]:
        raise Invalid(f"{where}.command: empty; give a program, followed by its arguments")
    return settings


def _argument(value: object, where: str) -> str:
    """Text that is shown before it is started: it must not hide a part of itself from a terminal's reader."""
    text = _text(value, where)
    if not text.isprintable():
        at = next(i for i, character in enumerate(text) if not character.isprintable())
        raise Invalid(f"{where}: character {at + 1}, {text[at]!a}, cannot be printed; leave it out")
    return text


_COST_POINTS: dict[str, Check] = {
    "contexts": _items(_integer(0, 1 << 24)),
    "rows": _items(_integer(1, 1 << 16)),
    "ms": _items(_items(_number)),
    "sequences": _integer(1, 1 << 10),
    "change_ms": _number,
}
_MEASURED: dict[str, Check] = {
    "hardware": _plain_mapping,
    "cost_curve": _optional(_cost_points),
    "batch_curves": lambda value, where: _batch_curves(value, where),
    "acceptance": _acceptance,
}
_PLANNER: dict[str, Check] = {
    "mode": _choice(("measured", "static")),
    "max_nodes": _integer(1, 1024),
    "trees": _flag,
    "prune_top_k": _optional(_integer(1, JUDGED_TOP)),
}
_RUNTIME: dict[str, Check] = {
    "threads": _optional(_integer(1, 1024)),
    "threads_batch": _optional(_integer(1, 1024)),
    "context": _integer(16, 1 << 24),
    "batch": _integer(1, 1 << 20),
    "ubatch": _optional(_integer(1, 1 << 20)),
    "gpu_layers": _integer(-1, 10_000),
    "flash_attention": _optional(_flag),
    "kv_type": _optional(_choice(KV_TYPES)),
    "repack": _flag,
    "mmap": _flag,
    "coupled": _flag,
    "snapshot_mib": _integer(0, 1 << 20),
}
_VLLM: dict[str, Check] = {
    "num_speculative_tokens": _integer(1, 64),
    "runner": _choice(("auto", "v1", "v2")),
    "uniform": _flag,
    "adaptive_verification": _optional(_flag),
    "tokens_per_batch_size": _tokens_per_batch_size,
    "max_model_len": _optional(_integer(16, 1 << 24)),
    "max_num_seqs": _optional(_integer(1, 1 << 16)),
    "gpu_memory_utilization": _optional(_share),
    "dtype": _choice(DTYPES),
    "enforce_eager": _flag,
}
_SERVER: dict[str, Check] = {
    "command": _items(_argument),
    "flags": _items(_argument),
}
_REMEMBER: dict[str, Check] = {
    "corpus": _name,
    "prompts": _flag,
    "max_tokens": _integer(1 << 10, 1 << 24),
}
_PROFILE: dict[str, Check] = {
    "name": _name,
    "description": _text,
    "engine": _choice((*ENGINES, SERVER)),
    "model": _optional(_text),
    "proposers": _proposers,
    "own_heads": _flag,
    "planner": lambda value, where: _section(PlannerSettings, _PLANNER, value, where),
    "exact": _flag,
    "runtime": lambda value, where: _section(Runtime, _RUNTIME, value, where),
    "vllm": lambda value, where: _section(VllmSettings, _VLLM, value, where),
    "server": _optional(_server),
    "remember": _optional(_remember),
    "measured": _optional(lambda value, where: _section(Measured, _MEASURED, value, where)),
    "evidence": _plain_mapping,
}
