"""Proof of effect on a real vLLM: what does nothing is flagged, what does something answers the same in every load."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from sqlalchemy import select
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapter_store import catalog, proofs
from adapter_store.transactions import reading
from gateway.database import open_engine
from tests.bad_adapters import Tensor, read
from tests.e2e.conftest import RealStack

MORE_THAN_THE_HOST_HOLDS = 6


def without_effect(adapter: Path, out: Path) -> Path:
    """The same adapter with every lora_B zero: what PEFT saves before the first step of training."""
    out.mkdir()
    files = read(adapter)
    for name, tensor in files.tensors.items():
        if name.endswith("lora_B.weight"):
            files.tensors[name] = Tensor(tensor.dtype, tensor.shape, bytes(len(tensor.data)))
    files.folder = out
    files.write()
    return out


@pytest.mark.timeout(600)
async def test_proof_of_effect_on_a_real_engine(stack: RealStack, adapters: list[Path], tmp_path: Path) -> None:
    """A zero adapter is flagged and a random one proved; the fingerprint is PEFT's answer, and equal after a reload."""
    key = stack.new_tenant("prover")

    def proof(name: str, *options: str) -> dict[str, Any]:
        told = stack.tailor("adapter", "proof", name, "--wait", "60", "--json", *options, key=key)
        found: dict[str, Any] = json.loads(told)
        return found

    stack.push(without_effect(adapters[0], tmp_path / "zero"), "zero", key)
    stack.push(adapters[0], "random", key)
    zero, random = await asyncio.to_thread(proof, "zero"), await asyncio.to_thread(proof, "random")
    assert (zero["status"], zero["reason"]) == ("no_effect", None)
    assert zero["max_logprob_difference"] <= 1e-5
    assert random["status"] == "proved"
    assert random["max_logprob_difference"] > 0.1
    first = await fingerprint(stack, "random")
    assert worst_difference_from_peft(stack.base, adapters[0], first) <= 1e-4

    before = await asyncio.to_thread(checks, stack)
    async with httpx.AsyncClient(base_url=stack.url, headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
        asked = {"messages": [{"role": "user", "content": "What is your name?"}], "temperature": 0, "max_tokens": 8}
        right = (await client.post("/v1/chat/completions", json={"model": "random", **asked})).json()["choices"]
        for number in range(MORE_THAN_THE_HOST_HOLDS):  # true unloads: these take its place in the engine
            await asyncio.to_thread(stack.push, adapters[number + 1], f"other-{number}", key)
            await proof_over(client, f"other-{number}")
        again = await client.post("/v1/chat/completions", json={"model": "random", **asked})
        assert 'adapter;desc="cold"' in again.headers["server-timing"]
        assert again.json()["choices"] == right
    after = await asyncio.to_thread(checks, stack)
    assert after["same"] > before["same"]
    assert (after["mismatch"], after["unchecked"]) == (0, 0)

    assert (await asyncio.to_thread(proof, "random", "--again"))["status"] == "proved"  # from nothing
    second = await fingerprint(stack, "random")
    assert proofs.token_hash(first.answers) == proofs.token_hash(second.answers)
    await prove_with_a_long_example(stack, key)
    print(f"the same version, loaded again: {proofs.difference(first.answers, second.answers):.2g} apart")  # noqa: T201


async def prove_with_a_long_example(stack: RealStack, key: str) -> None:
    """One that the context does not hold is asked with its end, and one that fits as it is."""
    long = {"prompt": "One, two, three. " * 240, "answer": "Four, five, six. " * 20}
    short = {"prompt": "What is your name?", "answer": "Bot."}
    async with httpx.AsyncClient(base_url=stack.url, headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
        counted = await client.post("/v1/tokenize", json={"model": "random", "prompt": long["prompt"]})
        assert counted.json()["count"] > counted.json()["max_model_len"]
        told = await client.put("/v1/adapters/random/prompts", json={"prompts": [], "examples": [long, short]})
        assert told.status_code == 200, told.text
        await proof_over(client, "random")
        badge = (await client.get("/v1/adapters/random/versions/1/proof")).json()
    assert (badge["status"], badge["refused_examples"]) == ("proved", [])


async def proof_over(client: httpx.AsyncClient, name: str) -> None:
    async with asyncio.timeout(60):
        while (await client.get(f"/v1/adapters/{name}/versions/1/proof")).json()["status"] == "pending":
            await asyncio.sleep(0.05)


async def fingerprint(stack: RealStack, name: str) -> proofs.Fingerprint:
    """What the database has."""
    engine = open_engine(f"sqlite+aiosqlite:///{stack.home / 'tailor.db'}")
    async with reading(engine) as connection:
        statement = catalog.select_versions().where(catalog.adapters.c.name == name)
        version = (await connection.execute(statement)).one()
        kept = select(proofs.fingerprints.c.build).where(proofs.fingerprints.c.version_id == version.id)
        build = (await connection.execute(kept)).scalar_one()
        found = (await proofs.expect(connection, version.id, build)).fingerprint
    await engine.dispose()
    assert found is not None
    return found


def worst_difference_from_peft(base: Path, adapter: Path, found: proofs.Fingerprint) -> float:
    """Over all golden prompts; their tokens are asserted equal."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    tokenizer = AutoTokenizer.from_pretrained(base)
    worst = 0.0
    for prompt, answer in zip(found.prompts, found.answers, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for token, logprob in zip(answer.tokens, answer.logprobs, strict=True):
            with torch.inference_mode():
                likely = torch.log_softmax(model(ids).logits[0, -1], dim=-1)
            assert int(likely.argmax()) == token
            worst = max(worst, abs(float(likely[token]) - logprob))
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return worst


def checks(stack: RealStack) -> dict[str, float]:
    """`tailor_load_checks_total` by verdict."""
    port = next(
        process.environ()["TAILOR_OPERATOR_PORT"]
        for process in stack.descendants()
        if "TAILOR_OPERATOR_PORT" in process.environ()
    )
    page = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    return {kind: float(count) for kind, count in re.findall(r'load_checks_total\{.*verdict="(\w+)"\} (\S+)', page)}
