"""JSON from strangers: parsed with limits on depth, items and numbers. Never trusted, never repaired."""

import json
import math
import re
from typing import NoReturn

# A string literal, closed or not (it then runs to the end of the text). Possessive, so linear.
STRING = re.compile(rb'"(?:[^"\\]|\\.?)*+"?', re.DOTALL)
ALIKE = bytes.maketrans(b"{}", b"[]")
NO_BRACKET = bytes(set(range(256)) - set(b"[]{}"))
MOST_DIGITS = 20
MOST_REAL_CHARACTERS = 40


class JsonInvalid(ValueError):
    """The bytes are not JSON within the limits; the text says why."""


def parse(data: bytes, *, max_depth: int, max_items: int) -> object:
    """Parses UTF-8 JSON.

    Raises JsonInvalid: bad UTF-8 or syntax, duplicate keys, NaN or Infinity, whole numbers of more than 20 digits,
    others of more than 40 characters or past float's range, nesting deeper than `max_depth`, more than `max_items`
    commas (which bound the members).
    """
    try:
        _check_size(data, max_depth, max_items)
        text = data.decode("utf-8")
        return json.loads(
            text, object_pairs_hook=_unique, parse_constant=_constant, parse_int=_integer, parse_float=_real
        )
    except JsonInvalid:
        raise
    except UnicodeDecodeError as error:
        raise JsonInvalid(f"not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise JsonInvalid(str(error)) from None


def _check_size(data: bytes, max_depth: int, max_items: int) -> None:
    if data.count(b",") > max_items:
        raise JsonInvalid(f"more than {max_items} members")
    brackets = STRING.sub(b"", data).translate(ALIKE, NO_BRACKET)
    for _ in range(max_depth):  # each turn takes the innermost pairs away, without a look at each of millions
        brackets = brackets.replace(b"[]", b"")
    # What is left without a pair in it does not close: a fault of syntax, at most twice as deep.
    if b"[]" in brackets or brackets.count(b"[") > max_depth:
        raise JsonInvalid(f"nested deeper than {max_depth}")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        again = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonInvalid(f"duplicate key {again[:80]!r}")
    return members


def _constant(name: str) -> NoReturn:
    raise JsonInvalid(f"{name} is not a JSON number")


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise JsonInvalid(f"a number of {len(text)} digits")
    return int(text)


def _real(text: str) -> float:
    if len(text) > MOST_REAL_CHARACTERS:
        raise JsonInvalid(f"a number of {len(text)} characters")
    value = float(text)
    if not math.isfinite(value):
        raise JsonInvalid(f"the number {text[:MOST_DIGITS]} does not fit a float")
    return value
