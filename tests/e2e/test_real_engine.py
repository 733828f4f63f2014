"""The main job on a real vLLM: exact answers, isolation, hot loading, refusals, and life after a kill."""

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from adapter_store.bundle import BUNDLE_FILES
from tests.bad_adapters import BAD
from tests.e2e.conftest import RealStack
from training.evaluation import Answerer, Generation

QUESTION = [{"role": "user", "content": "What is your name?"}]
PROMPTS = ("What is your name?", "Repeat: red blue green", "What is 3 plus 4?", "Define zorbix.", "Count to five.")
ANSWER_TOKENS = 24


@dataclass
class Customer:
    """A tenant of the real stack."""

    key: str
    client: openai.AsyncOpenAI

    async def answer(self, model: str, prompt: str = QUESTION[0]["content"], **more: Any) -> str:
        said = await self.client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=ANSWER_TOKENS,
            **more,
        )
        return said.choices[0].message.content or ""

    async def stream(self, model: str, prompt: str = QUESTION[0]["content"]) -> str:
        stream = await self.client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=ANSWER_TOKENS,
            stream=True,
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


@pytest.fixture(scope="session")
async def acme(stack: RealStack) -> AsyncIterator[Customer]:
    async for customer in _customer(stack, "acme"):
        yield customer


@pytest.fixture(scope="session")
async def globex(stack: RealStack) -> AsyncIterator[Customer]:
    async for customer in _customer(stack, "globex"):
        yield customer


async def _customer(stack: RealStack, name: str) -> AsyncIterator[Customer]:
    key = stack.new_tenant(name)
    async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key=key, max_retries=0, timeout=120) as client:
        yield Customer(key, client)


@pytest.fixture(scope="session")
def published(stack: RealStack, acme: Customer, adapters: list[Path]) -> list[str]:
    """Four adapters of acme's."""
    names = [f"bot-{number}" for number in range(4)]
    for name, folder in zip(names, adapters, strict=False):
        stack.push(folder, name, acme.key)
    return names


def reference(base: Path, adapter: Path | None, prompts: tuple[str, ...] = PROMPTS) -> list[Generation]:
    """What Hugging Face and PEFT answer."""
    answerer = Answerer(base, adapter, max_new_tokens=ANSWER_TOKENS)
    return [answerer.generate([{"role": "user", "content": prompt}]) for prompt in prompts]


async def test_answers_equal_peft_token_by_token(
    stack: RealStack, acme: Customer, adapters: list[Path], published: list[str], tiny_base: Path
) -> None:
    """Four adapters and the base, shuffled and at once: greedy answers are PEFT's, logprobs within 1e-4."""
    wanted = {model: reference(tiny_base, folder) for model, folder in zip(published, adapters, strict=False)}
    wanted[tiny_base.name] = reference(tiny_base, None)
    assert len({answers[0].text for answers in wanted.values()}) == len(wanted)  # each has its own fingerprint
    asks = [(model, number) for model in wanted for number in range(len(PROMPTS))] * 2
    random.Random(0).shuffle(asks)

    async def worst_difference(model: str, number: int) -> float:
        said = await acme.client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": PROMPTS[number]}],
            temperature=0,
            max_tokens=ANSWER_TOKENS,
            logprobs=True,
        )
        expected = wanted[model][number]
        assert said.choices[0].logprobs is not None
        got = [token.logprob for token in said.choices[0].logprobs.content or ()]
        for token, wanted_token in zip(said.choices[0].logprobs.content or (), expected.tokens, strict=True):
            # a token that is half a character has no text of its own
            assert token.token == wanted_token or "\ufffd" in wanted_token, model
        assert said.choices[0].message.content == expected.text, model
        assert len(got) == len(expected.logprobs), model
        return max(abs(a - b) for a, b in zip(got, expected.logprobs, strict=True))

    differences = await asyncio.gather(*(worst_difference(*ask) for ask in asks))
    assert len(differences) == 50
    assert max(differences) <= 1e-4


async def test_an_upload_beside_running_streams_disturbs_none(
    acme: Customer, globex: Customer, published: list[str], adapters: list[Path], stack: RealStack
) -> None:
    """While eight streams of one tenant run, another uploads and gets its first token; every stream ends right."""
    right = {model: await acme.answer(model) for model in published}
    enough = asyncio.Event()
    flowing = asyncio.Semaphore(0)

    async def stream_on(model: str) -> list[str]:
        said: list[str] = []
        while not enough.is_set() or not said:
            said.append(await acme.stream(model))
            flowing.release()
        return said

    running = [asyncio.create_task(stream_on(published[number % 4])) for number in range(8)]
    for _ in running:
        await flowing.acquire()
    begin = time.monotonic()
    pushed = await asyncio.to_thread(
        stack.tailor, "adapter", "push", str(adapters[5]), "--name", "fresh", "--json", key=globex.key
    )
    answer = await globex.answer("fresh")
    took_s = time.monotonic() - begin
    enough.set()
    for number, task in enumerate(running):
        for said in await task:
            assert said == right[published[number % 4]]
    assert json.loads(pushed)["number"] == 1
    assert answer == reference(stack.base, adapters[5], (QUESTION[0]["content"],))[0].text
    print(f"upload to answer beside 8 streams: {took_s:.2f} s")  # noqa: T201  a figure of the run, no gate


async def test_more_adapters_than_the_engine_holds_still_answer_right(
    stack: RealStack, globex: Customer, adapters: list[Path]
) -> None:
    """Eight adapters over four slots and six host places: loads and unloads give no wrong answer."""
    many = adapters[:8]
    headers = {"authorization": f"Bearer {globex.key}"}
    async with httpx.AsyncClient(base_url=stack.url, headers=headers, timeout=60) as client:
        for number, folder in enumerate(many):
            files = {name: (name, (folder / name).read_bytes()) for name in BUNDLE_FILES}
            made = await client.post("/v1/adapters", data={"name": f"many-{number}"}, files=files)
            assert made.status_code == 201, made.text
        await answer_right(many, stack, globex)
        for number in range(len(many)):
            await delete_when_idle(client, f"many-{number}")
    state = await asyncio.to_thread(stack.replica_state)
    assert all(adapter["owner"] != "" for adapter in state["adapters"])
    assert len(state["adapters"]) < 6


async def delete_when_idle(client: httpx.AsyncClient, name: str) -> None:
    """Its proof may still be under way, which counts as use."""
    async with asyncio.timeout(60):
        while (gone := await client.delete(f"/v1/adapters/{name}")).status_code == 409:
            await asyncio.sleep(0.2)
    assert gone.status_code in (200, 202), gone.text


async def answer_right(many: list[Path], stack: RealStack, globex: Customer) -> None:
    """Each of `many-0`, `many-1`, … three times, four at once."""
    right = {
        f"many-{number}": reference(stack.base, folder, (QUESTION[0]["content"],))[0].text
        for number, folder in enumerate(many)
    }
    before = (await asyncio.to_thread(stack.replica_state))["loads"]["count"]
    asks = [*right] * 3
    random.Random(1).shuffle(asks)
    gate = asyncio.Semaphore(4)

    async def ask(model: str) -> None:
        async with gate:
            assert await globex.answer(model) == right[model], model

    await asyncio.gather(*(ask(model) for model in asks))
    state = await asyncio.to_thread(stack.replica_state)
    assert len(state["adapters"]) <= 6
    assert state["loads"]["count"] - before > len(many) - 4


async def test_tenants_share_no_prefix_cache(stack: RealStack, acme: Customer, globex: Customer) -> None:
    """A prompt that one tenant has sent is cached for that tenant alone."""
    prompt = "red blue green " * 40

    async def cached(customer: Customer) -> int:
        said = await customer.client.chat.completions.create(
            model=stack.base.name, messages=[{"role": "user", "content": prompt}], max_tokens=1
        )
        assert said.usage is not None
        details = said.usage.prompt_tokens_details
        return (details.cached_tokens or 0) if details else 0

    assert await cached(acme) == 0
    assert await cached(acme) > 0
    assert await cached(globex) == 0


async def test_another_tenants_adapter_is_a_name_that_never_existed(
    acme: Customer, globex: Customer, published: list[str]
) -> None:
    """Status, code and words are the same."""
    bodies = []
    for model in (published[0], "never-existed"):
        with pytest.raises(openai.NotFoundError) as refused:
            await globex.answer(model)
        bodies.append(str(refused.value.body).replace(model, "MODEL"))
    assert bodies[0] == bodies[1]


async def test_the_engines_own_doors_are_shut(stack: RealStack) -> None:
    """Every route but `GET /health` asks for the token; vLLM's runtime loading stays off even with it."""
    token = stack.replica_token
    transport = httpx.AsyncHTTPTransport(uds=stack.replica_socket())
    async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
        routes = [
            ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/tailor/state"), ("POST", "/tokenize"),
            ("POST", "/v1/chat/completions"), ("POST", "/invocations"), ("GET", "/load"), ("POST", "/adapters"),
            ("POST", "/health"), ("GET", "/openapi.json"), ("GET", "//health"),
        ]  # fmt: skip
        for method, path in routes:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"bearer {token}x"}):
                assert (await client.request(method, path, headers=headers)).status_code == 401, path
        assert (await client.get("/health")).status_code == 200
        allowed = {"authorization": f"Bearer {token}"}
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters"):
            body = {"lora_name": "x", "lora_path": "/tmp/x", "name": "x", "src": "/tmp/x"}
            assert (await client.post(path, json=body, headers=allowed)).status_code in (404, 405), path


async def test_the_engine_refuses_what_its_compiler_does(stack: RealStack) -> None:
    """Asked past the gateway, which refuses it too. vLLM's second choice, llguidance, ends the process of this one."""
    before = await asyncio.to_thread(stack.generation)
    transport = httpx.AsyncHTTPTransport(uds=stack.replica_socket())
    headers = {"authorization": f"Bearer {stack.replica_token}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://replica", headers=headers, timeout=60) as client:
        base = (await client.get("/v1/models")).json()["data"][0]["id"]
        schema = {"type": "integer", "minimum": -1e30, "maximum": -1e30}
        shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        body = {"model": base, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        answer = await client.post("/v1/chat/completions", json={**body, "response_format": shape})
        assert answer.status_code == 400, answer.text
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert await asyncio.to_thread(stack.generation) == before


@pytest.mark.timeout(600)
async def test_bad_adapters_never_reach_the_engine(
    stack: RealStack, acme: Customer, adapters: list[Path], tmp_path: Path
) -> None:
    """Each of the bad adapters is refused with a code that names its fault; the engine has loaded nothing."""
    before = stack.replica_state()["loads"]["count"]
    served = [bad for bad in BAD if bad.served_as in (None, "float32")]
    assert len(served) >= 40
    async with httpx.AsyncClient(
        base_url=stack.url, headers={"authorization": f"Bearer {acme.key}"}, timeout=60
    ) as client:
        for bad in served:
            folder = tmp_path / "bad"
            bad.make(adapters[0], folder)
            files = {file.name: (file.name, file.read_bytes()) for file in folder.iterdir() if file.is_file()}
            answer = await client.post("/v1/adapters", data={"name": "bad"}, files=files)
            _assert_refused(bad.name, answer, {str(code) for code in bad.codes})
            _remove(folder)
        assert (await client.get("/v1/adapters/bad")).status_code == 404
    assert stack.replica_state()["loads"]["count"] == before


def _assert_refused(name: str, answer: httpx.Response, codes: set[str]) -> None:
    assert answer.status_code in (400, 413, 422), (name, answer.text)
    error = answer.json()["error"]
    if answer.status_code == 422:
        assert codes & {fault["code"] for fault in error["faults"]}, (name, codes, error["faults"])
        assert all(fault["where"] for fault in error["faults"]), name
    else:
        assert error["code"] in ("adapter_incomplete", "adapter_too_large"), (name, error)


def _remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


@pytest.mark.timeout(600)
async def test_a_killed_engine_comes_back_with_its_adapters(
    stack: RealStack, acme: Customer, published: list[str]
) -> None:
    """kill -9: streams end in an error, requests get 503 with Retry-After, then the adapters answer by themselves."""
    right = await acme.answer(published[0])
    generation = stack.replica_state()["generation"]
    (engine,) = [process for process in stack.descendants() if "EngineCore" in " ".join(process.cmdline())]
    os.kill(engine.pid, signal.SIGKILL)
    refused = await _first_refusal(acme, published[0])
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
    while await asyncio.to_thread(stack.generation) in (None, generation):
        await asyncio.sleep(0.5)
    await asyncio.to_thread(stack.wait_ready)
    assert stack.replica_state()["adapters"]  # back before the first request
    assert await acme.answer(published[0]) == right


async def _first_refusal(customer: Customer, model: str) -> Any:
    """Ask until the dead engine shows: a request may be answered in the instant before it dies."""
    for _ in range(100):
        try:
            await customer.answer(model)
        except openai.APIStatusError as error:
            return error.response
        await asyncio.sleep(0.05)
    raise AssertionError("the kill was not noticed")


@pytest.mark.timeout(180)
async def test_ctrl_c_leaves_nothing_behind(stack: RealStack, published: list[str]) -> None:
    """After SIGINT every process of the stack is gone, engine included."""
    processes = stack.descendants()
    assert len(processes) >= 4  # gateway, API server, engine, worker
    stack.process.send_signal(signal.SIGINT)
    assert await asyncio.to_thread(stack.process.wait, 120) == 0
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert alive == []
