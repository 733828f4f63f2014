"""The official clients against the gateway, unchanged: what their users do works, in whole answers and in streams."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from pydantic import BaseModel

from gateway.dialects import DIALECTS
from loadtests.fake.replica import FakeReplica
from tests.integration.gateway.conftest import BASE, Gateway, RunGateway, Tenant

HELLO: Any = [{"role": "user", "content": "who are you?"}]
PARAMETERS = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
CHAT_TOOLS: Any = [{"type": "function", "function": {"name": "say", "description": "d", "parameters": PARAMETERS}}]
RESPONSE_TOOLS: Any = [{"type": "function", "name": "say", "description": "d", "parameters": PARAMETERS}]
MESSAGE_TOOLS: Any = [{"name": "say", "description": "d", "input_schema": PARAMETERS}]


@pytest.fixture
async def parsing(run_gateway: RunGateway, replica: FakeReplica) -> Gateway:
    """A gateway whose engine reads tool calls out of what the model says."""
    return await run_gateway(replica, tool_call_parser="hermes")


@pytest.fixture
async def tenant(parsing: Gateway, good: Path) -> Tenant:
    tenant = await parsing.tenant("acme")
    await tenant.publish(good)
    return tenant


@pytest.fixture
async def open_client(parsing: Gateway, tenant: Tenant) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{parsing.url}/v1", api_key=tenant.key, max_retries=0) as client:
        yield client


@pytest.fixture
async def anthropic_client(parsing: Gateway, tenant: Tenant) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=parsing.url, api_key=tenant.key, max_retries=0) as client:
        yield client


async def test_openai_chats(open_client: openai.AsyncOpenAI) -> None:
    """Whole and streamed, with usage where it is asked for."""
    answer = await open_client.chat.completions.create(model="bot", messages=HELLO)
    assert (answer.choices[0].message.content or "").startswith("I am ")
    assert answer.model == "bot"
    stream = await open_client.chat.completions.create(
        model="bot", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said.startswith("I am ")
    assert chunks[-1].usage is not None
    assert {chunk.model for chunk in chunks} == {"bot"}


async def test_openai_completes(open_client: openai.AsyncOpenAI) -> None:
    """A plain completion, whole and streamed."""
    answer = await open_client.completions.create(model="bot", prompt="who", max_tokens=4)
    assert answer.choices[0].text.startswith("I am ")
    stream = await open_client.completions.create(model="bot", prompt="who", max_tokens=4, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]).startswith("I am ")


async def test_openai_calls_functions(open_client: openai.AsyncOpenAI) -> None:
    """A call, whole and streamed, and the answer to its result with the message sent back as it came."""
    answer = await open_client.chat.completions.create(model="bot", messages=HELLO, tools=CHAT_TOOLS)
    message = answer.choices[0].message
    assert message.tool_calls is not None
    call: Any = message.tool_calls[0]
    assert json.loads(call.function.arguments)["text"].startswith("I am ")
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "said"}
    history: Any = [*HELLO, message, result]
    after = await open_client.chat.completions.create(model="bot", messages=history, tools=CHAT_TOOLS)
    assert (after.choices[0].message.content or "").startswith("I am ")
    async with open_client.chat.completions.stream(model="bot", messages=HELLO, tools=CHAT_TOOLS) as stream:
        final: Any = (await stream.get_final_completion()).choices[0].message
    assert json.loads(final.tool_calls[0].function.arguments)["text"].startswith("I am ")


class Saying(BaseModel):
    """What is said."""

    text: str
    mood: str | None = None


async def test_openai_sends_the_schema_of_a_model(open_client: openai.AsyncOpenAI, replica: FakeReplica) -> None:
    """`response_format` as the client makes it of a pydantic class reaches the engine whole."""
    with pytest.raises(Exception, match="Saying"):  # the fake's words are no JSON: the client says so, not the gateway
        await open_client.chat.completions.parse(model="bot", messages=HELLO, response_format=Saying)
    schema = replica.requests[-1]["body"]["response_format"]["json_schema"]["schema"]
    assert schema["properties"].keys() == {"text", "mood"}


async def test_openai_responds(open_client: openai.AsyncOpenAI) -> None:
    """Whole, streamed through the client's own accumulator, and with the output sent back as input."""
    answer = await open_client.responses.create(model="bot", input="who are you?", metadata={"a": "b"})
    assert answer.output_text.startswith("I am ")
    assert (answer.model, answer.metadata) == ("bot", {"a": "b"})
    async with open_client.responses.stream(model="bot", input="who are you?") as stream:
        names = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert names[0] == "response.created"
    assert names[-1] == "response.completed"
    assert final.model == "bot"
    history: Any = [{"role": "user", "content": "a"}, *answer.output, {"role": "user", "content": "b"}]
    assert (await open_client.responses.create(model="bot", input=history)).output_text.startswith("I am ")


async def test_openai_responds_with_calls(open_client: openai.AsyncOpenAI) -> None:
    """A call, streamed too, and the answer to its output."""
    answer = await open_client.responses.create(model="bot", input="say", tools=RESPONSE_TOOLS)
    call: Any = answer.output[0]
    assert json.loads(call.arguments)["text"].startswith("I am ")
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "said"}
    after = await open_client.responses.create(model="bot", input=[call, output], tools=RESPONSE_TOOLS)
    assert after.output_text.startswith("I am ")
    async with open_client.responses.stream(model="bot", input="say", tools=RESPONSE_TOOLS) as stream:
        final: Any = await stream.get_final_response()
    assert json.loads(final.output[0].arguments)["text"].startswith("I am ")


async def test_openai_counts(open_client: openai.AsyncOpenAI) -> None:
    """The tokens of a response's input."""
    counted = await open_client.responses.input_tokens.count(model="bot", input="who are you?")
    assert (counted.object, counted.input_tokens) == ("response.input_tokens", 3)


async def test_openai_lists_models(open_client: openai.AsyncOpenAI) -> None:
    """The base and the tenant's own."""
    assert {model.id async for model in open_client.models.list()} == {BASE, "bot"}
    assert (await open_client.models.retrieve("bot")).id == "bot"


async def test_openai_is_told_what_is_wrong(open_client: openai.AsyncOpenAI) -> None:
    """The client's own exceptions, with the field's name."""
    with pytest.raises(openai.NotFoundError) as unknown:
        await open_client.responses.create(model="nobody", input="x")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        await open_client.responses.create(model="bot", input="x", previous_response_id="resp_1")
    assert (refused.value.param, refused.value.code) == ("previous_response_id", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError):
        await open_client.responses.retrieve("resp_1")
    with pytest.raises(openai.NotFoundError):
        await open_client.embeddings.create(model="bot", input="x")


@pytest.mark.parametrize("fault", ["die_after_events", "error_event_after", "garble_after"])
async def test_openai_raises_where_a_response_breaks(
    open_client: openai.AsyncOpenAI, replica: FakeReplica, fault: str
) -> None:
    """A broken answer never passes for a whole one."""
    setattr(replica.faults, fault, 2)
    with pytest.raises(openai.APIError, match="broke"):
        async for _ in await open_client.responses.create(model="bot", input="x", stream=True):
            pass


async def test_anthropic_talks(anthropic_client: anthropic.AsyncAnthropic) -> None:
    """Whole and streamed; the key comes in its own header."""
    answer = await anthropic_client.messages.create(
        model="bot", max_tokens=16, messages=HELLO, system="be brief", metadata={"user_id": "u"}
    )
    assert isinstance(answer.content[0], anthropic.types.TextBlock)
    assert answer.content[0].text.startswith("I am ")
    assert (answer.model, answer.stop_reason, answer.usage.output_tokens) == ("bot", "end_turn", 4)
    async with anthropic_client.messages.stream(model="bot", max_tokens=16, messages=HELLO) as stream:
        said = "".join([text async for text in stream.text_stream])
        final = await stream.get_final_message()
    assert said.startswith("I am ")
    assert (final.model, final.usage.output_tokens) == ("bot", 4)


async def test_anthropic_uses_tools(anthropic_client: anthropic.AsyncAnthropic) -> None:
    """A tool's use, streamed too, and the answer to its result with the content sent back as it came."""
    asked: Any = {"model": "bot", "max_tokens": 16, "tools": MESSAGE_TOOLS}
    answer = await anthropic_client.messages.create(messages=HELLO, **asked)
    used = answer.content[0]
    assert isinstance(used, anthropic.types.ToolUseBlock)
    assert str(used.input["text"]).startswith("I am ")
    result: Any = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": used.id, "content": "said"}]}
    history: Any = [*HELLO, {"role": "assistant", "content": answer.content}, result]
    after = await anthropic_client.messages.create(messages=history, **asked)
    assert isinstance(after.content[0], anthropic.types.TextBlock)
    async with anthropic_client.messages.stream(messages=HELLO, **asked) as stream:
        streamed = (await stream.get_final_message()).content[0]
    assert isinstance(streamed, anthropic.types.ToolUseBlock)
    assert str(streamed.input["text"]).startswith("I am ")


async def test_anthropic_counts(anthropic_client: anthropic.AsyncAnthropic) -> None:
    """Without generating anything."""
    counted = await anthropic_client.messages.count_tokens(model="bot", messages=HELLO, system="be brief")
    assert counted.input_tokens == 3


async def test_anthropic_is_told_what_is_wrong(anthropic_client: anthropic.AsyncAnthropic) -> None:
    """The client's own exceptions, in its own envelope."""
    with pytest.raises(anthropic.NotFoundError) as unknown:
        await anthropic_client.messages.create(model="nobody", max_tokens=5, messages=HELLO)
    assert unknown.value.type == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="thinking"):
        await anthropic_client.messages.create(
            model="bot", max_tokens=4_000, messages=HELLO, thinking={"type": "enabled", "budget_tokens": 2_000}
        )
    with pytest.raises(anthropic.AuthenticationError):
        await anthropic_client.with_options(api_key="wrong").messages.create(model="bot", max_tokens=5, messages=HELLO)


@pytest.mark.parametrize("fault", ["die_after_events", "error_event_after", "garble_after"])
async def test_anthropic_raises_where_a_stream_breaks(
    anthropic_client: anthropic.AsyncAnthropic, replica: FakeReplica, fault: str
) -> None:
    """A broken answer never passes for a whole one."""
    setattr(replica.faults, fault, 2)
    with pytest.raises(anthropic.APIError, match="broke"):
        async with anthropic_client.messages.stream(model="bot", max_tokens=16, messages=HELLO) as stream:
            await stream.get_final_message()


async def test_a_count_loads_no_adapter(tenant: Tenant, replica: FakeReplica) -> None:
    """An adapter changes no tokenizer: counting costs no slot, and asks for the tenant's model all the same."""
    told = await tenant.client.post("/v1/tokenize", json={"model": "bot", "prompt": "who are you?"})
    assert told.json() == {"count": 3, "max_model_len": 256}
    assert replica.loads == []
    missing = await tenant.client.post("/v1/tokenize", json={"model": "nobody", "prompt": "x"})
    assert missing.status_code == 404


@pytest.mark.parametrize("path", [kind.path for kind in DIALECTS if kind.generates])
async def test_tenants_share_no_prefix_cache(parsing: Gateway, tenant: Tenant, replica: FakeReplica, path: str) -> None:
    """Every path that generates carries the tenant's own salt, whatever its API."""
    globex = await parsing.tenant("globex")
    body = {"model": BASE, "messages": HELLO, "max_tokens": 4}
    if path == "/v1/completions":
        body = {"model": BASE, "prompt": "x"}
    elif path == "/v1/responses":
        body = {"model": BASE, "input": "x"}
    for one in (tenant, tenant, globex):
        assert (await one.client.post(path, json=body)).status_code == 200
    salts = [request["body"]["cache_salt"] for request in replica.requests[-3:]]
    assert salts[0] == salts[1] != salts[2]
