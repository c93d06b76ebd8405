"""Types of options for which click has none."""

from __future__ import annotations

import os
from typing import Any

import click


class ProfileRef(click.types.StringParamType):
    """The name or path of a profile; in a variable, several are separated as in PATH."""

    name = "NAME|PATH"
    envvar_list_splitter = os.pathsep


class Layers(click.IntRange):
    """A number of layers; `all` is -1."""

    name = "N|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in ("all", -1):
            return -1
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            problem = f"{value!r} is neither a number from 0 to {self.max} nor all"
            raise click.BadParameter(problem, ctx, param) from None
