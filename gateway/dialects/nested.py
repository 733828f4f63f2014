"""JSON that a client sends for its own sake (a tool's arguments): taken as it is, within depth and number of parts."""

from typing import Any, Final

import msgspec

from gateway.dialects.schemas import deeper_than
from gateway.errors import RequestInvalid

DEEPEST: Final = 32
MOST_PARTS: Final = 16_384
"""Brackets: what is nested costs a parser, what is long does not."""


def check_nested(raw: str | msgspec.Raw, param: str) -> None:
    """Hold an object's depth: the engine's server parses it with a recursive parser.

    Raises:
        RequestInvalid: it is no JSON object, or passes a bound.
    """
    data = raw.encode() if isinstance(raw, str) else bytes(raw)
    brackets = data.count(b"{") + data.count(b"[")
    if brackets > MOST_PARTS:
        raise RequestInvalid(f"{param} may have at most {MOST_PARTS} brackets.", param=param)
    try:
        found = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise RequestInvalid(f"{param} is no JSON object.", param=param) from None
    if brackets > DEEPEST and deeper_than(DEEPEST, found):
        raise RequestInvalid(f"{param} may be at most {DEEPEST} levels deep.", param=param)
