"""Signed statements: what verifies, and what does not."""

import json

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from adapter_store.errors import SignatureInvalid
from adapter_store.seeds import decode, encode, seed_of
from adapter_store.signing import Jwk, Kind, Signer, canonical, thumbprint, verify, verify_shown

STATEMENT = {"type": "tailor.version/1", "number": 3, "adapter": "bot-ü", "published_by": None, "files": [{"n": 1}]}
SEED = bytes(range(32))


@pytest.fixture
async def signer(engine: AsyncEngine) -> Signer:
    signer = Signer(engine, SEED)
    await signer.ready()
    return signer


async def test_what_was_signed_verifies(signer: Signer) -> None:
    """The statement comes back, by the published key alone."""
    keys = await signer.public_keys()
    jws = signer.sign(Kind.VERSION, STATEMENT)
    assert verify(jws, keys, Kind.VERSION) == STATEMENT
    assert verify_shown(json.loads(json.dumps(STATEMENT)), jws, keys, Kind.VERSION) == STATEMENT
    assert signer.sign(Kind.VERSION, dict(reversed(STATEMENT.items()))) == jws


async def test_the_key_and_the_signature_are_those_of_the_standard() -> None:
    """RFC 8037, appendix A: the thumbprint of its key, and its public key from its private one."""
    x = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"
    assert thumbprint(x) == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"
    assert len(seed_of("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A")) == 32


async def test_any_changed_byte_fails(signer: Signer) -> None:
    """Every character of the JWS, changed in its lowest bit of base64 and otherwise."""
    keys = await signer.public_keys()
    jws = signer.sign(Kind.ERASURE, STATEMENT)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for place, character in enumerate(jws):
        for other in {alphabet[alphabet.find(character) ^ 1], alphabet[alphabet.find(character) ^ 32], ".", "é"}:
            if other != character:
                with pytest.raises(SignatureInvalid):
                    verify(jws[:place] + other + jws[place + 1 :], keys, Kind.ERASURE)
    with pytest.raises(SignatureInvalid, match="shown"):
        verify_shown({**STATEMENT, "number": 4}, jws, keys, Kind.ERASURE)


async def test_one_kind_does_not_pass_for_the_other(signer: Signer) -> None:
    """A version's signature is no receipt."""
    with pytest.raises(SignatureInvalid, match="kind"):
        verify(signer.sign(Kind.VERSION, STATEMENT), await signer.public_keys(), Kind.ERASURE)


async def test_another_key_does_not_verify(signer: Signer) -> None:
    """Nor one that claims the signer's id."""
    jws = signer.sign(Kind.ERASURE, STATEMENT)
    other: Jwk = {"kty": "OKP", "crv": "Ed25519", "x": encode(bytes(32)), "kid": (await signer.public_keys())[0]["kid"]}
    for keys in ([], [other]):
        with pytest.raises(SignatureInvalid, match="none of the keys"):
            verify(jws, keys, Kind.ERASURE)


@pytest.mark.parametrize("header", [{"alg": "none"}, {"alg": "HS256"}, {}, {"alg": "EdDSA", "typ": "JWT"}])
async def test_no_other_algorithm_is_taken(signer: Signer, header: dict[str, str]) -> None:
    """`none` and a secret of the verifier's own public key get nowhere."""
    signed = f"{encode(canonical(header))}.{encode(canonical(STATEMENT))}"
    for signature in ("", encode(bytes(64))):
        with pytest.raises(SignatureInvalid):
            verify(f"{signed}.{signature}", await signer.public_keys(), Kind.ERASURE)


async def test_a_new_key_leaves_the_old_ones_published(signer: Signer, engine: AsyncEngine) -> None:
    """What the first key signed verifies after the second has begun; two gateways may each have their own."""
    old = signer.sign(Kind.VERSION, STATEMENT)
    second = Signer(engine, bytes(32))
    keys = await second.public_keys()
    assert len(keys) == 2
    for jws in (old, second.sign(Kind.VERSION, STATEMENT)):
        assert verify(jws, keys, Kind.VERSION) == STATEMENT
    assert await Signer(engine, SEED).public_keys() == keys


def test_floats_have_no_canonical_form() -> None:
    """Nor what JSON lacks."""
    for value in (1.0, {"a": [float("nan")]}):
        with pytest.raises(TypeError):
            canonical(value)


@pytest.mark.parametrize("text", ["", "A", "AB", "A=", "AA==", "A A", "+/8", "ÄÄ", "AAAAA"])
def test_base64url_has_one_spelling(text: str) -> None:
    """No padding, no other alphabet, no unused bits."""
    if text in ("",):
        assert decode(text) == b""
        return
    with pytest.raises(ValueError, match="base64url"):
        decode(text)
