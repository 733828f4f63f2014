"""What all requests of one conversation have in common: how it began."""

from typing import Any, Final

import msgspec
from msgspec import Raw

MOST: Final = 4_096  # bytes; what differs later only is not told apart
_ITEMS: Final = msgspec.json.Decoder(list[Raw])
_ENCODER: Final = msgspec.json.Encoder()


class _Spoken(msgspec.Struct):
    role: str = ""


_SPOKEN: Final = msgspec.json.Decoder(_Spoken)


def beginning(request: Any) -> bytes:
    """The first messages up to the first user's; of a plain prompt, the prompt.

    `request`: a checked request of any dialect. Whoever sends a conversation anew with every turn sends this each time.
    """
    messages = getattr(request, "messages", None)
    if messages is not None:
        told = bytearray()
        for message in messages[:MOST_BEFORE]:
            told += _ENCODER.encode(message)[:MOST]
            if _role_of(message) == "user":
                break
        return bytes(told)
    given = getattr(request, "input", None)
    if given is None:
        given = getattr(request, "prompt", b"")
    raw = bytes(given) if isinstance(given, Raw) else _ENCODER.encode(given)
    return _up_to_user([bytes(item) for item in _ITEMS.decode(raw)[:MOST_BEFORE]]) if raw[:2] == b"[{" else raw[:MOST]


MOST_BEFORE: Final = 8


def _role_of(message: msgspec.Struct) -> object:
    """Messages of a chat have a type each, which bears their role; turns of a count have it as a member."""
    tag = message.__struct_config__.tag
    return tag if tag is not None else getattr(message, "role", None)


def _up_to_user(items: list[bytes]) -> bytes:
    told = bytearray()
    for item in items:
        told += item[:MOST]
        if _SPOKEN.decode(item).role == "user":
            break
    return bytes(told)
