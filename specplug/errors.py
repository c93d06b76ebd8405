"""The exceptions that a user can cause, with the exit codes they end in.

SpecplugError            1  something went wrong that the message explains
├── UsageError           2  bad input: flag, profile, prompt, workload, model file
└── EngineError          5  an engine is missing, or cannot do what was asked
"""

from __future__ import annotations


class SpecplugError(Exception):
    """What was asked, what was found, what to do: one line."""

    exit_code = 1


class UsageError(SpecplugError):
    exit_code = 2


class EngineError(SpecplugError):
    exit_code = 5
