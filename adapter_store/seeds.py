"""base64url, and private keys as they are kept: light, because settings are checked by every command."""

import base64
import binascii

SEED_BYTES = 32


def seed_of(text: str) -> bytes:
    """An Ed25519 private key from its 32 bytes in base64url. Raises ValueError."""
    seed = decode(text)
    if len(seed) != SEED_BYTES:
        raise ValueError("it is not 32 bytes in base64url (43 characters)")
    return seed


def encode(raw: bytes) -> str:
    """base64url without padding, as RFC 7515 has it."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def decode(text: str) -> bytes:
    """The bytes; strict, so that one value has one spelling and a changed last bit is seen. Raises ValueError."""
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("it is not base64url") from error
    if encode(raw) != text:
        raise ValueError("it is not base64url in its one form")
    return raw
