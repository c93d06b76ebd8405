"""Profiles as YAML text, which is untrusted input and read with limits. Settings are checked elsewhere."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import yaml

from specplug.profile.settings import Invalid

SIZE_LIMIT = 1 << 20
"""Bytes of a profile file, at most; one with a cost curve and evidence has about 10 thousand."""


def parse(text: str) -> object:
    """Plain data from YAML text. Invalid names the line, where there is one."""
    if len(text) > SIZE_LIMIT:
        raise Invalid(f"larger than {SIZE_LIMIT >> 20} MiB; a profile holds settings, move other data out")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        problem = " ".join(str(error.problem or error.context).split())
        line = _line(error.problem_mark or error.context_mark)
        raise Invalid(f"line {line}: not valid YAML ({problem}); correct it") from None
    except yaml.YAMLError as error:
        raise Invalid(f"not valid YAML ({' '.join(str(error).split())}); correct it") from None
    except RecursionError:
        raise Invalid("nested too deep; a profile has a few levels") from None
    except ValueError as error:  # PyYAML passes on the errors of int() and float()
        raise Invalid(f"a value cannot be read ({error}); correct it") from None


def dump(data: Mapping[str, Any]) -> str:
    return yaml.dump(_as_yaml(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Loader(yaml.SafeLoader):
    """YAML without aliases, tags, repeated keys and dates, so that a profile is a plain tree of settings."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (yaml declares it so)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        alias, tag = isinstance(event, yaml.AliasEvent), getattr(event, "tag", None)
        if alias or tag is not None:
            what = "an alias (*) is not allowed; write the value out" if alias else "a tag (!) is not allowed; drop it"
            raise Invalid(f"line {_line(event.start_mark)}: {what}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = set()
        for key, _ in node.value:
            name = key.value if isinstance(key.value, str) else None
            if name is None or name in names:
                what = "a key must be plain text" if name is None else f"{name}: written twice; keep one"
                raise Invalid(f"line {_line(key.start_mark)}: {what}")
            names.add(name)
        return super().construct_mapping(node, deep)


def _line(mark: Any) -> int:
    return 1 if mark is None else mark.line + 1


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Row(list[Any]):
    """A list that is written on one line."""


def _represent_row(dumper: yaml.SafeDumper, row: _Row) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", row, flow_style=True)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # Only this style escapes every character that YAML treats as a line break (U+0085, for example).
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
