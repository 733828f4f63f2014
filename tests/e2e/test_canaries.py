"""A rollout on a real engine: garbage goes back by itself, and what was trained well goes all the way."""

import asyncio
import random
import string
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.local_training import train_adapter
from tests.e2e.conftest import RealStack
from training.tasks import JARGON_HYPERPARAMETERS, Example, jargon, write_jsonl

pytestmark = [pytest.mark.full, pytest.mark.timeout(1_200)]
ROLLOUT = {"steps": [30, 100], "step_s": 2, "min_requests": 6, "max_latency_ratio": 10}


def trained(folder: Path, base: Path, examples: list[Example], seed: int) -> Path:
    folder.mkdir()
    write_jsonl(examples, folder / "train.jsonl")
    chosen = {**JARGON_HYPERPARAMETERS.model_dump(), "seed": seed}
    train_adapter(folder / "train.jsonl", base, folder / "adapter", chosen, lambda _: None, threads=1)
    return folder / "adapter"


async def keep_asking(client: httpx.AsyncClient, statuses: set[int]) -> None:
    number = 0
    while True:
        number += 1
        body = {"model": "jargon", "messages": [{"role": "user", "content": f"{number}?"}], "max_tokens": 8}
        statuses.add((await client.post("/v1/chat/completions", json=body)).status_code)


async def rolled_out(client: httpx.AsyncClient, version: int) -> dict[str, Any]:
    """How it ended."""
    begun = await client.post("/v1/adapters/jargon/rollouts", json={"version": version, **ROLLOUT})
    assert begun.status_code == 201, begun.text
    async with asyncio.timeout(300):
        while True:
            found: dict[str, Any] = (await client.get(f"/v1/adapters/jargon/rollouts/{begun.json()['id']}")).json()
            if found["status"] != "running":
                return found
            await asyncio.sleep(0.5)


async def test_garbage_goes_back_and_good_work_stays(stack: RealStack, tiny_base: Path, tmp_path: Path) -> None:
    """Both answer with 200, and as fast; the tenant's own examples tell them apart."""
    task = jargon(0, terms=8)
    chance = random.Random(7)
    garbage = [replace(one, answer="".join(chance.choices(string.ascii_lowercase, k=12))) for one in task.train]
    key = stack.new_tenant("canaries")
    for number, (examples, seed) in enumerate(((task.train, 1), (garbage, 1), (task.train, 2)), 1):
        adapter = trained(tmp_path / str(number), tiny_base, examples, seed)
        alias = "default" if number == 1 else ""
        stack.tailor("adapter", "push", str(adapter), "--name", "jargon", "--alias", alias, key=key)
    good = [{"prompt": one.messages[-1]["content"], "answer": one.answer} for one in task.heldout[:6]]
    async with stack.async_client(key) as client:
        told = await client.put("/v1/adapters/jargon/prompts", json={"prompts": [], "examples": good})
        assert told.status_code == 200, told.text
        statuses: set[int] = set()
        asking = asyncio.create_task(keep_asking(client, statuses))
        bad = await rolled_out(client, 2)
        fine = await rolled_out(client, 3)
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
        moves = (await client.get("/v1/adapters/jargon/history")).json()["data"]
    print(f"garbage: {bad['status']}, {bad['reason']}; good: {fine['status']}; statuses {statuses}")  # noqa: T201
    assert bad["status"] == "rolled_back"
    assert "by the version before" in bad["reason"]
    assert fine["status"] == "completed", fine
    assert statuses == {200}
    assert moves[0]["after"] == [{"version": 3, "weight": 1}]
