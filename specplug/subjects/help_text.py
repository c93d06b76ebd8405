"""What llama-server's `--help` says of a build: its flags with all spellings, their defaults, its types of drafting.

Builds differ: flags were renamed and removed, and forks such as ik_llama.cpp have their own. It runs nothing.
Source of the two layouts: `common_arg::to_string` in common/arg.cpp of github.com/ggml-org/llama.cpp, and
`gpt_params_print_usage` in common/common.cpp before October 2024, which ik_llama.cpp has kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

DESCRIPTION_COLUMN = 20
"""Lines that are indented by as many spaces, or by more, are descriptions; both layouts indent them by 34 or 40."""

NAME = re.compile(r"(-{1,2}[A-Za-z][A-Za-z0-9_.-]*)(,\s*)?")
DEFAULT = re.compile(r"\(default: ([^()]*(?:\([^()]*\))?[^()]*)\)")
VARIABLE = re.compile(r"\(env: (\w+)\)")
REMOVED = "argument has been removed"


@dataclass(frozen=True, slots=True)
class HelpFlag:
    """One flag.

    names     all spellings, those that turn it off included, in the order of the help
    value     what the help calls its value; empty for a flag without one
    default   in the help's words; None where it says none
    variable  the environment variable that sets it; empty for none
    removed   whether the build refuses it and names another
    """

    names: tuple[str, ...]
    value: str = ""
    default: str | None = None
    variable: str = ""
    removed: bool = False


@dataclass(frozen=True, slots=True)
class Help:
    """The flags of a build, by each of their spellings.

    spec_types  the values of `--spec-type`; empty where there is no such flag
    spec_keys   settings that are written into a value of `--spec-type`, as `TYPE:KEY=N,KEY=N`, and have no flags
                (ik_llama.cpp since 2026)
    """

    flags: Mapping[str, HelpFlag] = field(default_factory=dict)
    spec_types: tuple[str, ...] = ()
    spec_keys: tuple[str, ...] = ()

    def spelling(self, *names: str) -> str | None:
        """The first of these names that the build accepts; None where it accepts none of them."""
        return next((name for name in names if self.accepts(name)), None)

    def accepts(self, name: str) -> bool:
        return name in self.flags and not self.flags[name].removed

    def same(self, one: str, other: str) -> bool:
        """Whether two names mean the same flag."""
        return one == other or (one in self.flags and other in self.flags[one].names)

    def default(self, name: str) -> str | None:
        """The default of a flag in the help's words; None where the build has no such flag, or says none."""
        return self.flags[name].default if self.accepts(name) else None


def parse_help(text: str) -> Help:
    """Read a help text of any build; what is no flag is left out."""
    flags: dict[str, HelpFlag] = {}
    descriptions: dict[str, list[str]] = {}
    for head, description in _entries(text):
        names, value, rest = _head(head)
        described = " ".join([rest, *description])
        default = DEFAULT.search(described)
        variable = VARIABLE.search(described)
        flag = HelpFlag(
            names,
            value,
            default[1].strip("'\" ") if default else None,
            variable[1] if variable else "",
            REMOVED in described,
        )
        for name in names:
            flags.setdefault(name, flag)
            descriptions.setdefault(name, [rest, *description])
    if "--spec-type" not in flags:
        return Help(flags)
    said = descriptions["--spec-type"]
    types = _listed(said, "types:") or _split(flags["--spec-type"].value)
    return Help(flags, types, _listed(said, "keys:"))


def _listed(description: Sequence[str], word: str) -> tuple[str, ...]:
    """What follows a word that begins a line, or ends its first words: `types: a, b`, `canonical keys: a,b`."""
    for line in description:
        before, found, listed = line.partition(word)
        if found and len(before.split()) <= 1:
            return _split(listed)
    return ()


def _split(listed: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in re.split(r"[,|]", listed.strip("[]{}<> ")) if part.strip())


def _entries(text: str) -> list[tuple[str, list[str]]]:
    """Each flag's own line, without indentation, and the lines that describe it."""
    entries: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        content = line.strip()
        indent = len(line) - len(line.lstrip())
        if indent < DESCRIPTION_COLUMN:
            if NAME.match(content):
                entries.append((content, []))
        elif entries and content:
            entries[-1][1].append(content)
    return entries


def _head(line: str) -> tuple[tuple[str, ...], str, str]:
    """Names, value, and the beginning of the description, which at least two spaces separate from the rest."""
    names = []
    at = 0
    while found := NAME.match(line, at):
        names.append(found[1])
        at = found.end()
        if found[2] is None:
            break
    rest = line[at:]
    value, _, description = rest.removeprefix(" ").partition("  ") if not rest.startswith("  ") else ("", "", rest)
    return tuple(names), value.strip(), description.strip()
