"""Writes formats of dates and times as patterns: those of llguidance allow days and leap seconds that do not exist."""

from __future__ import annotations

from specplug.constraints.schema_walk import Node, reachable

_LEAP_YEAR = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_YEAR = r"(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LONG, _SHORT = r"(?:0[13578]|1[02])", r"(?:0[469]|11)"
_DAY = f"(?:{_LONG}-(?:0[1-9]|[12][0-9]|3[01])|{_SHORT}-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
_DATE = f"(?:{_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
_HOUR = r"(?:[01][0-9]|2[0-3])"
_TIME = rf"{_HOUR}:[0-5][0-9]:[0-5][0-9](?:\.[0-9]{{1,9}})?(?:Z|[+-]{_HOUR}:[0-5][0-9])"

PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
"""Years from 1 to 9999, as in Python; seconds with up to nine decimal places."""


def write_formats(root: Node) -> None:
    """Replace the formats in PATTERNS in place. A schema that has a pattern keeps it."""
    for _, node in reachable(root):
        pattern = PATTERNS.get(node["format"]) if isinstance(node.get("format"), str) else None
        if pattern is None:
            continue
        del node["format"]
        if "pattern" not in node:
            node["pattern"] = pattern
        elif isinstance(node.get("allOf", []), list):
            node["allOf"] = [*node.get("allOf", []), {"pattern": pattern}]
