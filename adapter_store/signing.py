"""Signed statements: what the store says of a version or an erasure, checkable without the store.

A statement is JSON in one canonical form (keys sorted, no spaces, whole numbers only: RFC 8785 for what we say),
signed with Ed25519 as a compact JWS (RFC 7515, 8037). The JWS holds the statement, so it alone is the proof. `kid` is
the key's thumbprint (RFC 7638). Every public key that ever signed stays in the database, so that keys can be changed.

libsodium signs, not `cryptography`: the same bytes, and 1 MiB of a gateway's memory where OpenSSL's Rust is 8.
"""

import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from sqlalchemy import BigInteger, Column, ForeignKey, Table, Text, insert, select

from adapter_store.catalog import Version, metadata
from adapter_store.changes import take_turn
from adapter_store.engine import AsyncConnection, AsyncEngine
from adapter_store.errors import SignatureInvalid
from adapter_store.ids import VersionId
from adapter_store.seeds import decode, encode
from adapter_store.threads import in_thread
from adapter_store.transactions import reading, writing

if TYPE_CHECKING:
    from nacl.signing import SigningKey

Statement = Mapping[str, Any]
Jwk = dict[str, str]

signing_keys = Table(  # public halves alone
    "signing_keys",
    metadata,
    Column("kid", Text, primary_key=True),
    Column("x", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)
version_signatures = Table(  # a version from before there were signatures has none
    "version_signatures",
    metadata,
    Column("version_id", Text, ForeignKey("versions.id", name="fk_version_signatures_version_id"), primary_key=True),
    Column("signature", Text, nullable=False),
)


class Kind(StrEnum):
    """What a statement is about; in the JWS's `typ`, so that one cannot pass for the other."""

    VERSION = "tailor-version+jws"
    ERASURE = "tailor-erasure+jws"


@dataclass(frozen=True, slots=True)
class VersionSignature:
    """The JWS that says who published a version."""

    signature: str


class Signer:
    """One Ed25519 key, and the list of all that ever signed."""

    def __init__(self, engine: AsyncEngine, seed: bytes, *, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._seed = seed
        self._clock = clock
        self._key: SigningKey | None = None
        self._kid = ""

    async def ready(self) -> None:
        """To be called before `sign`, outside any transaction: nothing is signed before its public key is published.

        Raises StorageFull, StorageUnavailable.
        """
        if self._key is not None:
            return
        key, x = await in_thread(_open, self._seed)
        kid = thumbprint(x)
        async with writing(self._engine) as connection:
            await take_turn(connection)
            found = await connection.execute(select(signing_keys.c.kid).where(signing_keys.c.kid == kid))
            if found.first() is None:
                row = {"kid": kid, "x": x, "created_at": int(self._clock())}
                await connection.execute(insert(signing_keys).values(row))
        self._kid, self._key = kid, key

    def sign(self, kind: Kind, statement: Statement) -> str:
        """The statement as a compact JWS."""
        assert self._key is not None, "ready() comes first"
        header = canonical({"alg": "EdDSA", "kid": self._kid, "typ": kind.value})
        signed = f"{encode(header)}.{encode(canonical(statement))}"
        return f"{signed}.{encode(self._key.sign(signed.encode()).signature)}"

    async def public_keys(self) -> list[Jwk]:
        """Every public key that may have signed, as JWKs, the oldest first. Raises StorageUnavailable."""
        await self.ready()
        async with reading(self._engine) as connection:
            rows = await connection.execute(
                select(signing_keys).order_by(signing_keys.c.created_at, signing_keys.c.kid)
            )
            return [_jwk(row.x) for row in rows]


def verify(jws: str, keys: Collection[Mapping[str, Any]], kind: Kind) -> Statement:
    """What the JWS states, where one of the JWKs has signed it. Raises SignatureInvalid."""
    from nacl.exceptions import CryptoError
    from nacl.signing import VerifyKey

    signed, _, signature = jws.rpartition(".")
    encoded_header, _, encoded_statement = signed.partition(".")
    header = _json_of(encoded_header)
    if header.get("alg") != "EdDSA" or header.get("typ") != kind.value:
        raise SignatureInvalid(f"this is not a signature of the kind {kind.value}")
    x = {thumbprint(key["x"]): str(key["x"]) for key in keys if _is_ed25519(key)}.get(str(header.get("kid")))
    if x is None:
        raise SignatureInvalid("none of the keys has signed this: get the newest from GET /v1/signing-keys")
    try:
        VerifyKey(decode(x)).verify(signed.encode(), decode(signature))
    except (CryptoError, ValueError) as error:
        raise SignatureInvalid("the signature does not match: this is not what was signed") from error
    return _json_of(encoded_statement)


def verify_shown(shown: object, jws: str, keys: Collection[Mapping[str, Any]], kind: Kind) -> Statement:
    """The same, where the statement is shown beside its JWS too, and must be what was signed."""
    statement = verify(jws, keys, kind)
    if statement != shown:
        raise SignatureInvalid("what is shown is not what was signed")
    return statement


def check_shown(shown: Statement, jws: str, keys: Collection[Mapping[str, Any]], kind: Kind) -> Statement:
    """The same, where only some of what was signed is shown beside it."""
    statement = verify(jws, keys, kind)
    for name, value in shown.items():
        if name not in statement or statement[name] != value:
            raise SignatureInvalid(f"what is shown as {name} is not what was signed")
    return statement


def version_statement(version: Version) -> Statement:
    """What is signed of a version when it is published."""
    return {
        "type": "tailor.version/1",
        "tenant_id": version.tenant_id,
        "adapter": version.adapter_name,
        "adapter_id": version.adapter_id,
        "number": version.number,
        "digest": version.digest,
        "published_by": version.published_by,
        "provenance": version.provenance.value,
        "created_at": version.created_at,
    }


async def sign_version(connection: AsyncConnection, signer: Signer, version: Version) -> None:
    """Signs a new version inside the transaction that makes it."""
    signature = signer.sign(Kind.VERSION, version_statement(version))
    await connection.execute(insert(version_signatures), {"version_id": version.id, "signature": signature})


async def signatures_of(
    connection: AsyncConnection, version_ids: Collection[VersionId]
) -> dict[VersionId, VersionSignature]:
    """Those of the versions that are signed; the caller has found the versions by their tenant."""
    statement = select(version_signatures).where(version_signatures.c.version_id.in_(version_ids))
    rows = await connection.execute(statement)
    return {VersionId(row.version_id): VersionSignature(row.signature) for row in rows}


def canonical(value: object) -> bytes:
    """The one form in which a statement is signed. Raises TypeError for a float: its text differs between programs."""
    _refuse_floats(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def thumbprint(x: str) -> str:
    """RFC 7638 of an Ed25519 key."""
    return encode(hashlib.sha256(canonical({"crv": "Ed25519", "kty": "OKP", "x": x})).digest())


def _json_of(encoded: str) -> dict[str, Any]:
    try:
        found = json.loads(decode(encoded))
    except ValueError as error:
        raise SignatureInvalid("this is not a compact JWS") from error
    if not isinstance(found, dict):
        raise SignatureInvalid("this is not a JWS of a statement")
    return found


def _is_ed25519(key: Mapping[str, Any]) -> bool:
    return key.get("kty") == "OKP" and key.get("crv") == "Ed25519" and isinstance(key.get("x"), str)


def _open(seed: bytes) -> "tuple[SigningKey, str]":
    from nacl.signing import SigningKey

    key = SigningKey(seed)
    return key, encode(bytes(key.verify_key))


def _jwk(x: str) -> Jwk:
    return {"kty": "OKP", "crv": "Ed25519", "x": x, "kid": thumbprint(x), "alg": "EdDSA", "use": "sig"}


def _refuse_floats(value: object) -> None:
    if isinstance(value, float):
        raise TypeError("a statement has no floats")
    if isinstance(value, Mapping):
        for part in value.values():
            _refuse_floats(part)
    elif isinstance(value, list | tuple):
        for part in value:
            _refuse_floats(part)
