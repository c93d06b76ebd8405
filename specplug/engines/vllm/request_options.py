"""Reads what a request asks of specplug from the `extra_args` of its sampling parameters. It imports no vllm.

The options are a mapping with keys of a request to specplug's own server: `mode` (off or auto), `max_draft`, `corpora`
and `private` (anything but false, null and 0 means yes). They may be that mapping as JSON, because vLLM's server passes
no mappings on. "off" and a number are short for the longest draft. The engine's process cannot refuse a request, and
drafts do not change its answer: one whose options cannot be read is answered without drafts from corpora, as a private
one.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from specplug.core import NO_OPTIONS, SequenceOptions

KEY = "specplug"
"""The key in `extra_args`."""

UNLIMITED = 1 << 30

LONGEST_OPTIONS = 4096
"""Characters. Longer options are not read: they come from clients, and are read in the engine's process."""

UNREADABLE = SequenceOptions(corpora=(), private=True)


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """
    max_draft  the longest draft that the request asks for, in tokens
    sequence   what it asks of the proposers
    problem    why it gets no drafts from corpora, without text of the client's; None where it gets what it asks for
    """

    max_draft: int = UNLIMITED
    sequence: SequenceOptions = NO_OPTIONS
    problem: str | None = None


def request_options(extra_args: Any, offered: Collection[str] = ()) -> RequestOptions:
    """`offered` are the names of the corpora that a request may ask for."""
    asked = extra_args.get(KEY) if isinstance(extra_args, dict) else None
    if asked is None:
        return RequestOptions()
    if isinstance(asked, str) and asked.lstrip().startswith("{"):
        asked = _parsed(asked)
    if isinstance(asked, dict):
        max_draft = 0 if asked.get("mode") == "off" else _max_draft(asked.get("max_draft"))
        private = asked.get("private") not in (None, False, 0)
        corpora = asked.get("corpora")
        if corpora is None:
            return RequestOptions(max_draft, SequenceOptions(private=private))
        if not isinstance(corpora, list | tuple) or not all(isinstance(name, str) for name in corpora):
            return RequestOptions(max_draft, SequenceOptions((), private), "its `corpora` are no list of names")
        if not all(name in offered for name in corpora):
            return RequestOptions(max_draft, SequenceOptions((), private), "its `corpora` are not open to requests")
        return RequestOptions(max_draft, SequenceOptions(tuple(corpora), private))
    if asked == "off" or asked is False:
        return RequestOptions(0)
    max_draft = _max_draft(asked)
    if max_draft == UNLIMITED:
        return RequestOptions(UNLIMITED, UNREADABLE, "its options cannot be read")
    return RequestOptions(max_draft)


def _parsed(text: str) -> Any:
    """The JSON in a text; the text itself where it is too long, or no JSON."""
    try:
        return json.loads(text) if len(text) <= LONGEST_OPTIONS else text
    except (ValueError, RecursionError):
        return text


def _max_draft(asked: Any) -> int:
    """The number of tokens that is asked for; UNLIMITED where it is none."""
    if isinstance(asked, str) and asked.isdecimal() and len(asked) <= 20:
        asked = int(asked)
    return max(0, asked) if isinstance(asked, int) and not isinstance(asked, bool) else UNLIMITED
