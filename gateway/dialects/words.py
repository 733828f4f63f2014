"""Text within a request, kept as the JSON it came in: a megabyte of it is neither decoded nor encoded again.

msgspec has held its syntax, and `Dialect.check` its UTF-8. Lists of parts are decoded, and made anew of what was
checked.
"""

from collections.abc import Callable
from typing import Any, Final, NoReturn

import msgspec
from msgspec import Raw

from gateway.dialects.schemas import deeper_than
from gateway.errors import RequestInvalid

_QUOTE: Final = ord('"')
_BRACKET: Final = ord("[")
_NULL: Final = ord("n")
DEEPEST: Final = 32
MOST_PARTS: Final = 4_096
MOST_BRACKETS: Final = 32_768
"""In all arguments of a request: what is nested costs a parser, what is long does not."""


def is_text(raw: Raw) -> bool:
    return memoryview(raw)[0] == _QUOTE


def is_null(raw: Raw) -> bool:
    return memoryview(raw)[0] == _NULL


def hold_text(raw: Raw, place: str) -> None:
    """Raises RequestInvalid where it is no string."""
    if memoryview(raw)[0] != _QUOTE:
        not_text(place)


def not_text(place: str) -> NoReturn:
    raise RequestInvalid(f"{place} is a string or a list of parts that this call knows.", param=place)


Invalid = Callable[[str, str], RequestInvalid]
"""What is wrong with the JSON at a place, in the dialect's words."""


def decoded(decoder: msgspec.json.Decoder[Any], raw: Raw, place: str, invalid: Invalid) -> Any:
    """What is not plain text.

    Raises:
        RequestInvalid: it is none of this decoder's.
    """
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise invalid(str(error), place) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        not_text(place)


_ZEROS: Final = bytes.maketrans(b"123456789", b"000000000")
MOST_TOKENS: Final = 1 << 18


def hold_tokens(raw: Raw, place: str) -> None:
    """Raises RequestInvalid where it is no list of token ids; which there are, the engine knows."""
    shape = bytes(raw).translate(_ZEROS, b" \t\r\n")
    if shape[:1] != b"[" or shape == b"[]" or shape[1:-1].strip(b"0,") or b"0" * 11 in shape:
        raise RequestInvalid(f"{place} is a string or a list of token ids.", param=place)
    if shape.count(b",") >= MOST_TOKENS:
        raise RequestInvalid(f"{place} may have at most {MOST_TOKENS} tokens.", param=place)


class Pieces:
    """What the messages of one request are made of, counted together."""

    def __init__(self, invalid: Invalid) -> None:
        self._invalid = invalid
        self._parts = 0
        self._brackets = 0

    def parts(self, decoder: msgspec.json.Decoder[Any], raw: Raw, place: str) -> Any:
        """A list of parts.

        Raises:
            RequestInvalid: it is none, has a part that this call does not know, or a bound is passed.
        """
        if memoryview(raw)[0] != _BRACKET:
            not_text(place)
        found = decoded(decoder, raw, place, self._invalid)
        self._parts += len(found)
        if self._parts > MOST_PARTS:
            raise RequestInvalid(f"The messages of a request may have at most {MOST_PARTS} parts.", param=place)
        return found

    def hold(self, raw: str | Raw, place: str) -> None:
        """Hold the depth of a function's arguments: the engine's server parses them with a recursive parser.

        Raises:
            RequestInvalid: a bound is passed.
        """
        data = raw.encode() if isinstance(raw, str) else bytes(raw)
        brackets = data.count(b"{") + data.count(b"[")
        if brackets <= DEEPEST:
            return
        self._brackets += brackets
        if self._brackets > MOST_BRACKETS:
            raise RequestInvalid(f"The arguments of a request may have at most {MOST_BRACKETS} brackets.", param=place)
        try:
            found = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise RequestInvalid(f"{place} is no JSON.", param=place) from None
        if isinstance(found, dict | list) and deeper_than(DEEPEST, found):
            raise RequestInvalid(f"{place} may be at most {DEEPEST} levels deep.", param=place)
