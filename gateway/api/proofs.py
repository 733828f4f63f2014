"""`/v1/adapters/{name}/…/proof` and `…/prompts`: whether a version does anything, and what that is asked with."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import Path
from pydantic import BaseModel, Field

from adapter_store.catalog import Version
from adapter_store.examples import MOST_EXAMPLES, MOST_TEXT_BYTES, Example
from adapter_store.proofs import MOST_PROMPT_BYTES, MOST_PROMPTS, PROMPTS, Proof, Status
from gateway.api.lazy import LazyRouter
from gateway.dependencies import AdapterTenant, AppParts

router = LazyRouter(prefix="/v1/adapters", tags=["adapters"])
Number = Annotated[int, Path(ge=1, le=999_999_999)]


class ProofObject(BaseModel):
    """A version's badge; `checked_at` in Unix seconds, null before its first verdict."""

    status: Status
    checked_at: int | None
    max_logprob_difference: float | None
    prompts: int
    reason: str | None


class ProofOfVersion(ProofObject):
    """`refused_examples`: places, from 0, of the examples that the engine refuses; the version is judged without."""

    object: str = "proof"
    adapter: str
    version: int
    refused_examples: list[int]


class ExampleObject(BaseModel, extra="forbid"):
    """What a user says, and a good answer: a version that finds it less likely than the one before goes back."""

    prompt: str = Field(max_length=MOST_TEXT_BYTES)
    answer: str = Field(max_length=MOST_TEXT_BYTES)


class GoldenPrompts(BaseModel, extra="forbid"):
    """What proofs ask, as plain text; none: the generated ones. `examples` that are left out stay as they are."""

    prompts: list[Annotated[str, Field(max_length=MOST_PROMPT_BYTES)]] = Field(max_length=MOST_PROMPTS)
    examples: list[ExampleObject] | None = Field(default=None, max_length=MOST_EXAMPLES)


class GoldenPromptsObject(BaseModel):
    """What proofs ask; `generated` where the tenant has set none."""

    object: str = "golden_prompts"
    adapter: str
    prompts: list[str]
    generated: bool
    examples: list[ExampleObject]


@router.get("/{name}/versions/{number}/proof")
async def show(name: str, number: Number, tenant_id: AdapterTenant, parts: AppParts) -> ProofOfVersion:
    """A version's badge."""
    version, proof = await parts.proofs.find(tenant_id, name, number)
    return _of_version(version, proof, await parts.proofs.refused_examples(version))


@router.post("/{name}/versions/{number}/proof", status_code=202)
async def prove_again(name: str, number: Number, tenant_id: AdapterTenant, parts: AppParts) -> ProofOfVersion:
    """Prove a version again, from nothing; the verdict comes later."""
    version, proof = await parts.proofs.ask_again(tenant_id, name, number)
    return _of_version(version, proof, await parts.proofs.refused_examples(version))


@router.get("/{name}/prompts")
async def show_prompts(name: str, tenant_id: AdapterTenant, parts: AppParts) -> GoldenPromptsObject:
    """An adapter's golden prompts."""
    own = await parts.proofs.prompts(tenant_id, name)
    return _prompts(name, own, await parts.proofs.examples(tenant_id, name))


@router.put("/{name}/prompts")
async def set_prompts(name: str, body: GoldenPrompts, tenant_id: AdapterTenant, parts: AppParts) -> GoldenPromptsObject:
    """Set an adapter's golden prompts, for the proofs that begin from now on."""
    await parts.proofs.set_prompts(tenant_id, name, body.prompts)
    if body.examples is not None:
        given = [Example(example.prompt, example.answer) for example in body.examples]
        await parts.proofs.set_examples(tenant_id, name, given)
    return _prompts(name, body.prompts, await parts.proofs.examples(tenant_id, name))


def proof_object(proof: Proof) -> ProofObject:
    """A badge as the API shows it."""
    return ProofObject(
        status=proof.status,
        checked_at=proof.checked_at,
        max_logprob_difference=proof.max_logprob_difference,
        prompts=proof.prompts,
        reason=proof.reason,
    )


def _of_version(version: Version, proof: Proof, refused: Sequence[int]) -> ProofOfVersion:
    badge = proof_object(proof).model_dump()
    return ProofOfVersion(adapter=version.adapter_name, version=version.number, refused_examples=list(refused), **badge)


def _prompts(name: str, own: Sequence[str], examples: Sequence[Example]) -> GoldenPromptsObject:
    shown = [ExampleObject(prompt=example.prompt, answer=example.answer) for example in examples]
    return GoldenPromptsObject(adapter=name, prompts=list(own or PROMPTS), generated=not own, examples=shown)
