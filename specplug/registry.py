"""The registered methods, by name.

Names map to the addresses of classes, as strings, so that listing the methods imports none of them and no engine.
Third parties register a method through the entry-point group `specplug.proposers`; built-in names cannot be replaced.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from specplug.core import Proposer, Requires
from specplug.errors import EngineError, SpecplugError, UsageError

PROPOSERS = {
    "none": "specplug.proposers.none:NoDraft",
    "ngram": "specplug.proposers.ngram:Ngram",
    "suffix": "specplug.proposers.suffix:Suffix",
    "token_recycling": "specplug.proposers.token_recycling:TokenRecycling",
    "grammar": "specplug.proposers.grammar:Grammar",
    "datastore": "specplug.proposers.datastore:Datastore",
    "draft_model": "specplug.proposers.draft_model:DraftModel",
    "vocab_trim": "specplug.proposers.vocab_trim:VocabTrim",
    "short_context": "specplug.proposers.short_context:ShortContext",
    "early_exit": "specplug.proposers.early_exit:EarlyExit",
    "mtp": "specplug.proposers.mtp:Mtp",
    "eagle3": "specplug.proposers.eagle3:Eagle3",
    "builtin": "specplug.proposers.builtin:Builtin",
}
FUSION = "specplug.planning.fusion:Fusion"
"""The class that merges several of the other methods; it has no name of its own in a profile."""

GROUP = "specplug.proposers"
"""The entry-point group of third-party methods."""


@dataclass(frozen=True, slots=True)
class ProposerSpec:
    """A registered method with its options: keyword arguments of its class."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)


def names() -> list[str]:
    """All registered methods: the built-in ones, then those of third parties in alphabetical order."""
    return [*PROPOSERS, *sorted(_third_party().keys() - PROPOSERS.keys())]


def load(name: str) -> type[Proposer]:
    """The class of a method. Raises UsageError for an unknown name, SpecplugError if its module cannot be imported."""
    if name in PROPOSERS:
        return _load(PROPOSERS[name])
    entry_points = _third_party().get(name, [])
    if not entry_points:
        raise UsageError(f"no proposer is named {name!r}; {nearest(name, names())}")
    if len(entry_points) > 1:
        packages = ", ".join(sorted(_package(point) for point in entry_points))
        raise SpecplugError(f"proposer {name}: registered by more than one package ({packages}); uninstall all but one")
    try:
        return cast("type[Proposer]", entry_points[0].load())
    except Exception as error:  # a third-party module may raise anything while it is imported
        raise SpecplugError(
            f"proposer {name}: package {_package(entry_points[0])} does not load ({type(error).__name__}: {error}); "
            "update or uninstall it"
        ) from error


def check(spec: ProposerSpec) -> None:
    """Raise UsageError unless the method exists and its class has these options, with these types."""
    hints = options(spec.method)
    for key, value in spec.options.items():
        if key not in hints:
            raise UsageError(f"{key}: {spec.method} has no such option; {nearest(key, hints)}")
        if not _fits(value, hints[key].hint):
            raise UsageError(f"{key}: {value!r} is not {_in_words(hints[key].hint)}; change it, or leave it out")
    missing = [key for key, option in hints.items() if option.required and key not in spec.options]
    if missing:
        raise UsageError(f"{missing[0]}: {spec.method} requires this option; add it")


@dataclass(frozen=True, slots=True)
class Option:
    """A keyword parameter of a proposer's class that a profile can set."""

    hint: Any
    required: bool
    default: Any


def options(method: str) -> dict[str, Option]:
    """The options of a method: those parameters of its constructor whose types YAML can express."""
    cls = load(method)
    try:
        hints = get_type_hints(cls.__init__)
    except Exception as error:  # evaluating third-party annotations may raise anything
        raise SpecplugError(f"proposer {method}: its constructor's annotations do not resolve ({error})") from error
    by_name = {}
    for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]:
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        hint = hints.get(parameter.name, Any)
        if named and _is_plain(hint):
            required = parameter.default is parameter.empty
            by_name[parameter.name] = Option(hint, required, None if required else parameter.default)
    return by_name


def build(specs: Sequence[ProposerSpec]) -> Proposer:
    """The proposer of one spec, or the fusion of several. Raises UsageError, naming the method and the wrong option."""
    sources = build_sources(specs)
    if len(sources) == 1:
        return sources[0]
    fusion = cast(Any, _load(FUSION))
    return cast(Proposer, fusion(sources))


def build_sources(specs: Sequence[ProposerSpec]) -> list[Proposer]:
    """One proposer per spec, without a fusion."""
    check_list(specs)
    return [_build_one(spec) for spec in specs]


def check_list(specs: Sequence[ProposerSpec]) -> None:
    """Raise UsageError unless `specs` names one method, or several different ones that can be fused."""
    if not specs:
        raise UsageError("no proposer is named; name one, or none for plain decoding")
    methods = [spec.method for spec in specs]
    twice = [name for name in methods if methods.count(name) > 1]
    if twice:
        raise UsageError(f"{twice[0]} is listed twice; keep one")
    alone = [name for name in ("none", "builtin") if name in methods]
    if len(methods) > 1 and alone:
        raise UsageError(f"{alone[0]} cannot be combined with other proposers; list it alone, or remove it")


def check_requirements(proposers: Iterable[Proposer], provides: Requires, engine_name: str) -> None:
    """Raise EngineError, naming both, if the engine does not provide what a proposer requires."""
    for proposer in proposers:
        if _address(proposer) == FUSION:
            check_requirements(cast(Any, proposer).sources, provides, engine_name)
        missing = proposer.requires.missing_from(provides)
        if missing:
            raise EngineError(
                f"proposer {name_of(proposer)} requires {' and '.join(missing)}, "
                f"which engine {engine_name} does not provide; choose another proposer or engine"
            )


def name_of(proposer: Proposer) -> str:
    """The registered name of a built proposer, or the name of its class if it has none."""
    address = _address(proposer)
    known = {value: name for name, value in PROPOSERS.items()}
    known[FUSION] = "fusion"
    for name, points in _third_party().items():
        known.setdefault(points[0].value, name)
    return known.get(address, type(proposer).__name__)


def nearest(wrong: str, valid: Iterable[str]) -> str:
    """Advice for a misspelt name: the nearest valid names, or all of them."""
    valid = list(valid)
    close = get_close_matches(wrong, valid, n=2, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"valid: {', '.join(valid)}" if valid else "it has none"


def _build_one(spec: ProposerSpec) -> Proposer:
    try:
        check(spec)
        proposer = cast(Any, load(spec.method))(**spec.options)
    except (UsageError, ValueError) as error:
        raise UsageError(f"proposer {spec.method}: {error}") from error
    if not isinstance(proposer, Proposer):
        raise SpecplugError(f"proposer {spec.method}: {type(proposer).__name__} is not a Proposer; update its package")
    return proposer


def _load(address: str) -> type[Proposer]:
    module, _, attribute = address.partition(":")
    return cast("type[Proposer]", getattr(import_module(module), attribute))


def _third_party() -> dict[str, list[EntryPoint]]:
    """Entry points by name; more than one where several packages register the same name."""
    by_name: dict[str, dict[str, EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        by_name.setdefault(point.name, {}).setdefault(point.value, point)
    return {name: list(points.values()) for name, points in by_name.items()}


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _address(proposer: Proposer) -> str:
    return f"{type(proposer).__module__}:{type(proposer).__qualname__}"


def _is_plain(hint: Any) -> bool:
    """Whether YAML can express a value of this type."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return all(_is_plain(arg) for arg in get_args(hint))
    if origin in (list, tuple, Sequence):
        return all(_is_plain(arg) for arg in get_args(hint) if arg is not Ellipsis)
    if origin in (dict, Mapping):
        return all(_is_plain(arg) for arg in get_args(hint))
    return origin is Literal or hint in (bool, int, float, str, type(None))


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin is tuple and args[-1] is not Ellipsis:
        same = isinstance(value, list | tuple) and len(value) == len(args)
        return same and all(_fits(item, arg) for item, arg in zip(value, args, strict=True))
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(_fits(item, args[0]) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(key, args[0]) and _fits(item, args[1]) for key, item in value.items()
        )
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint


def _in_words(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_in_words(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(str(arg) for arg in args)
    if origin in (list, tuple, Sequence):
        return "a list"
    if origin in (dict, Mapping):
        return "a mapping"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}[hint]
