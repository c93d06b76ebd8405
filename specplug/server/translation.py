"""Requests of other interfaces as requests for a chat or a text completion.

This module depends on no interface and no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from specplug.server.error_responses import InvalidField
from specplug.server.request_fields import ignored
from specplug.server.request_schema import CommonRequest, RequestPart

ONE_ANSWER = {"n": 1}
"""What other interfaces ask of every request: their responses have room for one answer."""

Request = TypeVar("Request", bound=CommonRequest)


def translate(
    body: RequestPart, kind: type[Request], fields: Mapping[str, Any], names: Mapping[str, str]
) -> tuple[Request, list[str]]:
    """The request that a request of another interface means, and its fields without a meaning.

    Fields that the other interface does not have, and `kind` has, mean there what they mean here.

    fields  fields of the result that stand for those of `body`; null is unset
    names   names of fields in `body`, by those in `fields` that errors name
    Raises InvalidField.
    """
    more = body.model_extra or {}
    fields = {**fields, **ONE_ANSWER}
    hidden = [name for name in more if name in fields]
    nested = [path for path in ignored(body) if path not in more]
    try:
        return kind.model_validate({**more, **fields}), [*hidden, *nested]
    except ValidationError as error:
        raise InvalidField(error.errors(), names) from error
