"""Lists within a request, decoded no further than a bound: msgspec looks at a list's own length when all is built."""

from functools import cache
from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType
from msgspec.structs import astuple

SMALL_BYTES: Final = 16_384
"""What fits in here costs little, however many items it has."""
LONGEST_ROW: Final = 4_096
"""Lists that may be longer are counted when they are built."""


class ListDecoder:
    """For a list of `least` to `most` items of one type. `small`: for lists of at most `SMALL_BYTES`."""

    def __init__(self, item: Any, *, most: int, least: int = 0) -> None:
        self.small = msgspec.json.Decoder(Annotated[list[item], Meta(min_length=least, max_length=most)])
        self._item = item
        self._most = most
        self._least = least
        self._row: msgspec.json.Decoder[Any] | None = None  # made when it is needed: a type of 1,000 members is 0.3 MiB

    def large(self, raw: Raw) -> Any:
        """The items of a list of more than `SMALL_BYTES`. Raises msgspec.DecodeError."""
        if self._most > LONGEST_ROW:
            return self.small.decode(raw)
        if self._row is None:
            self._row = msgspec.json.Decoder(row_of(self._item, self._most))
        found = items_of(self._row.decode(raw))
        if len(found) < self._least:
            raise msgspec.ValidationError(f"Expected `array` of length >= {self._least}")
        return found


@cache
def row_of(item: Any, most: int) -> type[msgspec.Struct]:
    """A type whose JSON is a list of at most so many items: one more ends the decoding."""
    fields = [(f"n{number}", item | UnsetType, UNSET) for number in range(most)]
    return msgspec.defstruct("Row", fields, array_like=True, forbid_unknown_fields=True, gc=False)


def items_of(row: msgspec.Struct) -> list[Any]:
    """What the list held."""
    found = astuple(row)
    return list(found[: found.index(UNSET)] if found[-1] is UNSET else found)
