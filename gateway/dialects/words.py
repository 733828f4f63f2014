"""Text within a request, kept as the JSON it came in: a megabyte of it is neither decoded nor encoded again.

msgspec has held its syntax, and `Dialect.check` its UTF-8. Lists of parts are decoded, and made anew of what was
checked. What is counted here is counted in bytes, before or instead of a walk through objects.
"""

from collections.abc import Callable
from typing import Any, Final, NoReturn

import msgspec
from msgspec import Raw

from gateway.dialects.lists import SMALL_BYTES, ListDecoder
from gateway.errors import RequestInvalid

_QUOTE: Final = ord('"')
_BRACKET: Final = ord("[")
_NULL: Final = ord("n")
DEEPEST: Final = 32
MOST_PARTS: Final = 4_096
MOST_CALLS: Final = 1_024
MOST_BRACKETS: Final = 16_384
"""In all arguments of a request: what is nested costs a parser, what is long does not."""
MOST_WALKED_BYTES: Final = 262_144
"""All arguments of a request whose depth must be looked at, for they have more than `DEEPEST` brackets."""
MOST_ESCAPES: Final = 131_072
"""In all lists of parts and calls of a request: they are read three times, and a backslash costs as 7 letters do."""
MOST_VALUES: Final = 65_536
"""Of a body, outside of its texts: each is read once by every pass."""
MOST_MARKS: Final = 262_144
"""Quotes and backslashes, those within texts included; with more, nobody looks which are which: that costs 2 ms."""
MOST_QUOTES: Final = 16_384
"""Around texts. With no more, commas outside of them are told from those within."""


def is_text(raw: Raw) -> bool:
    return memoryview(raw)[0] == _QUOTE


def is_null(raw: Raw) -> bool:
    return memoryview(raw)[0] == _NULL


def hold_text(raw: Raw, place: str) -> None:
    """Raises RequestInvalid where it is no string."""
    if memoryview(raw)[0] != _QUOTE:
        not_text(place)


def hold_null(raw: Raw, place: str) -> None:
    """Raises RequestInvalid where something stands in a text's place."""
    if memoryview(raw)[0] != _NULL:
        raise RequestInvalid(f"{place} is a string.", param=place)


def not_text(place: str) -> NoReturn:
    raise RequestInvalid(f"{place} is a string or a list of parts that this call knows.", param=place)


Invalid = Callable[[str, str], RequestInvalid]
"""What is wrong with the JSON at a place, in the dialect's words."""


def decoded(decoder: ListDecoder, raw: Raw, place: str, invalid: Invalid) -> Any:
    """What is not plain text.

    Raises:
        RequestInvalid: it is none of this decoder's.
    """
    try:
        return decoder.small.decode(raw) if len(raw) <= SMALL_BYTES else decoder.large(raw)
    except msgspec.ValidationError as error:
        raise invalid(str(error), place) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        not_text(place)


_SPACE: Final = b" \t\r\n"
_DIGITS: Final = b"0123456789" + _SPACE
_ZEROS: Final = bytes.maketrans(b"123456789", b"000000000")
_TOO_LARGE: Final = b"0" * 11
MOST_TOKENS: Final = 1 << 18


def hold_tokens(raw: Raw, place: str) -> int:
    """How many token ids a list has; which there are, the engine knows.

    Raises:
        RequestInvalid: it is no list of token ids, or too long a one.
    """
    data = bytes(raw)
    frame = data.translate(None, _DIGITS)
    tokens = len(frame) - 1  # between two brackets and their commas, if it is a list of numbers
    is_list = frame[:1] == b"[" and frame[-1:] == b"]" and frame.count(b",") == tokens - 1
    if is_list and tokens > MOST_TOKENS:
        raise RequestInvalid(f"{place} may have at most {MOST_TOKENS} tokens.", param=place)
    is_empty = tokens == 1 and data.translate(None, _SPACE) == b"[]"
    if not is_list or is_empty or _TOO_LARGE in data.translate(_ZEROS):
        raise RequestInvalid(f"{place} is a string or a list of token ids.", param=place)
    return tokens


RARE: Final = 32_768
"""So often a leap costs less than the count that it may spare."""


def _is_rare(data: bytes, byte: bytes, most: int = RARE) -> bool:
    """Whether it comes at most so often: a replacement leaps from one to the next, a count looks at all bytes."""
    return byte not in data.replace(byte, b"\0", most)


def hold_values(body: bytes, most: int) -> None:
    """Hold how many values a body may have: a million of them cost a pass of 2 ms, and a request takes several.

    Raises:
        RequestInvalid: there are more, or so many commas that are not told from those within texts.
    """
    if most <= MOST_VALUES and _is_rare(body, b",", min(most, RARE)):  # a list of token ids is full of them
        return
    values = body.count(b",")
    if values <= most:
        return
    if body.count(b'"') + body.count(b"\\") <= MOST_MARKS:
        if b"\\" in body and (b'\\"' in body or b"\\\\" in body):  # one byte is found ten times as fast as two
            body = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # the quotes that are left stand around texts
        pieces = body.split(b'"', MOST_QUOTES + 1)
        if len(pieces) <= MOST_QUOTES + 1:
            values = sum([piece.count(b",") for piece in pieces[::2]])
            if values > most:
                raise RequestInvalid(f"The body may have at most {most} values.")
            return
    raise RequestInvalid(
        f"The body has {values} commas, and may have at most {most} values. Commas within texts are not told from "
        f"others where there are more than {MOST_QUOTES // 2} texts, or more than {MOST_MARKS} quotes and backslashes."
    )


def _escapes(data: bytes, most: int) -> int:
    """Escaped characters, or no more than them where they are more than `most`: of two backslashes one is escaped."""
    backslashes = data.count(b"\\")
    if backslashes // 2 > most or not backslashes:
        return backslashes // 2
    return backslashes - data.count(b"\\\\")


_NO_PAIRS: Final = bytes(byte for byte in range(256) if byte not in b'"[]{}\\/bfnrtu')
"""What stands neither for a bracket, nor for a text's end, nor behind a backslash."""
_NO_OPENINGS: Final = bytes(byte for byte in range(256) if byte not in b"\0[{")
_NO_BRACKETS: Final = bytes(byte for byte in range(256) if byte not in b'"[]{}')
_ONE_KIND: Final = bytes.maketrans(b"{}", b"[]")


def is_deeper(data: bytes, most: int) -> bool:
    """Whether JSON is nested deeper than that; no object is made of it."""
    if b"\\" in data:
        data = data.translate(None, _NO_PAIRS)  # two bytes are searched for three times as long as one is looked up
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    # a pair of quotes with no bracket in between says nothing of where the others are: within texts, or without
    bare = data.translate(_ONE_KIND, _NO_BRACKETS).replace(b'""', b"")
    bare = b"".join(bare.split(b'"')[::2])
    for _ in range(most):
        if not bare:
            return False
        bare = bare.replace(b"[]", b"")
    return bool(bare)


class Pieces:
    """What the messages of one request are made of, counted together."""

    def __init__(self, invalid: Invalid, body: bytes) -> None:
        self._invalid = invalid
        self._body = body
        self._counts_escapes = len(body) > MOST_ESCAPES
        self._parts = 0
        self._calls = 0
        self._escapes = 0
        self._arguments: list[Raw] = []
        self._places: list[str] = []
        self._strings: list[bytes] = []
        self._values: list[bytes] = []

    def items(self, decoder: ListDecoder, raw: Raw, place: str) -> Any:
        """A list of items; what they hold counts once more where it is a list itself.

        Raises:
            RequestInvalid: it is none, has an item that this call does not know, or a bound is passed.
        """
        if self._counts_escapes and _escapes(bytes(raw), 2 * MOST_ESCAPES) > 2 * MOST_ESCAPES:
            raise RequestInvalid(f"{place} may have at most {2 * MOST_ESCAPES} escaped characters.", param=place)
        return decoded(decoder, raw, place, self._invalid)

    def parts(self, decoder: ListDecoder, raw: Raw, place: str, *, within: bool = False) -> Any:
        """A list of parts; `within` another one, which has been counted with all that it holds.

        Raises:
            RequestInvalid: it is none, has a part that this call does not know, or a bound is passed.
        """
        if self._counts_escapes and not within:
            self._hold_escapes(raw, place)
        try:
            found = decoded(decoder, raw, place, self._invalid)
        except RequestInvalid:
            if memoryview(raw)[0] != _BRACKET:
                not_text(place)
            raise
        self._parts += len(found)
        if self._parts > MOST_PARTS:
            raise RequestInvalid(f"The messages of a request may have at most {MOST_PARTS} parts.", param=place)
        return found

    def calls(self, decoder: ListDecoder, raw: Raw, place: str) -> Any:
        """A list of called functions.

        Raises:
            RequestInvalid: as `parts`.
        """
        if memoryview(raw)[0] != _BRACKET:
            raise RequestInvalid(f"{place} is a list of calls.", param=place)
        if self._counts_escapes:
            self._hold_escapes(raw, place)
        found = decoded(decoder, raw, place, self._invalid)
        self.count_calls(len(found), place)
        return found

    def count_calls(self, number: int, place: str) -> None:
        """Raises RequestInvalid where the request has too many."""
        self._calls += number
        if self._calls > MOST_CALLS:
            raise RequestInvalid(f"The messages of a request may have at most {MOST_CALLS} calls.", param=place)

    def _hold_escapes(self, raw: Raw, place: str) -> None:
        if self._body:
            self._counts_escapes = not _is_rare(self._body, b"\\")
            self._body = b""
            if not self._counts_escapes:
                return
        self._escapes += _escapes(bytes(raw), MOST_ESCAPES)
        if self._escapes > MOST_ESCAPES:
            raise RequestInvalid(
                f"The parts and calls of a request may have at most {MOST_ESCAPES} escaped characters: "
                "send longer text as a string, not as a part.",
                param=place,
            )

    def hold(self, arguments: Raw, place: str) -> None:
        """Take in a call's arguments: JSON, or a string that holds JSON. `hold_depth` looks at all of them at once."""
        if len(arguments) > DEEPEST:
            self._arguments.append(arguments)
            self._places.append(place)

    def _sort(self) -> None:
        """Find those whose depth must be looked at.

        Raises:
            RequestInvalid: a bound is passed.
        """
        together = b"\0".join(self._arguments)  # a byte that no JSON has
        openings = together.translate(None, _NO_OPENINGS).split(b"\0")
        escapes = b"\\" in together and b"\\u00" in together
        walked_bytes = all_brackets = 0
        for number, opened in enumerate(openings):
            brackets = len(opened)
            if brackets <= DEEPEST and not escapes:
                continue
            data = bytes(self._arguments[number])
            if escapes:
                brackets += data.count(b"\\u005") + data.count(b"\\u007")
                if brackets <= DEEPEST:
                    continue
            place = self._places[number]
            all_brackets += brackets
            if all_brackets > MOST_BRACKETS:
                raise RequestInvalid(
                    f"The arguments of a request may have at most {MOST_BRACKETS} brackets.", param=place
                )
            walked_bytes += len(data)
            if walked_bytes > MOST_WALKED_BYTES:
                raise RequestInvalid(
                    f"The arguments of a request that have more than {DEEPEST} brackets may have at most "
                    f"{MOST_WALKED_BYTES} bytes.",
                    param=place,
                )
            if data[0] == _QUOTE:
                self._strings.append(data)
            else:
                self._values.append(data)

    def hold_depth(self, place: str) -> None:
        """Hold the depth of all arguments: the engine's server parses them with a recursive parser.

        Raises:
            RequestInvalid: some are nested too deeply, or are no JSON, or a bound is passed.
        """
        if not self._arguments:
            return
        self._sort()
        if not self._strings and not self._values:
            return
        values = self._values
        try:
            if self._strings:
                texts = msgspec.json.decode(b"[%b]" % b",".join(self._strings), type=list[str])
                values = [*values, "\n,".join(texts).encode()]
            data = b"[%b]" % b"\n,".join(values)  # no text goes on behind a line's end: each is read as if alone
            msgspec.json.decode(data, type=Raw)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            raise RequestInvalid(f"Arguments in {place} are no JSON, or too many levels deep.", param=place) from None
        if is_deeper(data, DEEPEST + 1):
            raise RequestInvalid(f"Arguments in {place} may be at most {DEEPEST} levels deep.", param=place)
