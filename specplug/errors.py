"""The exceptions that a user's input or machine can cause, with their exit codes.

SpecplugError            1  a failure that the message explains
├── UsageError           2  bad input: a flag, profile, prompt, workload or model file
└── EngineError          5  an engine is missing or unsupported
"""

from __future__ import annotations


class SpecplugError(Exception):
    """The message says in one line what was asked, what was found and what to do."""

    exit_code = 1


class UsageError(SpecplugError):
    exit_code = 2


class EngineError(SpecplugError):
    exit_code = 5
