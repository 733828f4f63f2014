"""What a request is called: in its answer's `x-request-id`, and in the log."""

import re
from binascii import hexlify
from random import getrandbits
from typing import Final

from starlette.types import Scope

HEADER: Final = b"x-request-id"
SAFE_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
"""What is taken from a client: nothing that could break a line of a log or of a header."""
_PLACE: Final = "tailor.request_id"


def new_id() -> bytes:
    """128 random bits, as 32 digits."""
    return hexlify(getrandbits(128).to_bytes(16, "big"))


def name_request(scope: Scope) -> bytes:
    """The client's own id where it is a safe one, else a new one; noted in the scope."""
    given: bytes = next((value for name, value in scope["headers"] if name == HEADER), b"")
    found = given if SAFE_ID.fullmatch(given) else new_id()
    scope[_PLACE] = found.decode()
    return found


def request_id_of(scope: Scope) -> str:
    """What `name_request` has noted; empty where it was not asked."""
    found: str = scope.get(_PLACE, "")
    return found
