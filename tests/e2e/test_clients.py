"""The official clients against a real vLLM: each API, whole and streamed, and what each field does there.

Each answer's usage is added up; the last test finds the sum in the ledger.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from inspect import isawaitable
from pathlib import Path
from typing import Any, Literal

import anthropic
import httpx
import openai
import pytest
from pydantic import BaseModel, ConfigDict
from tokenizers import Tokenizer

from tests.e2e.conftest import RealStack

MODEL = "bot"
PROMPT = "What is your name?"
QUESTION: Any = [{"role": "user", "content": PROMPT}]
SYSTEM = "Be brief."
GREEDY = {"temperature": 0}
"""For Anthropic's client, which has no field of its own for it any more."""
TOKENS = 24
ROOM = 120
"""Tokens enough for an answer that a schema ends."""
MISSING_TOKEN = 999_999
SEEDS = (11, 11, 12)
HOLDS: Any = {"type": "object", "properties": {"it": {"$ref": "#/$defs/it"}}, "required": ["it"]}


class Pick(BaseModel):
    """A choice of few values, so that the grammar ends each answer soon."""

    model_config = ConfigDict(extra="forbid", strict=True)

    colour: Literal["red", "blue"]
    sure: bool


SCHEMA: Any = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}
CHAT_TOOLS: Any = [
    {"type": "function", "function": {"name": "wait", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "pick", "description": "Pick one.", "parameters": SCHEMA}},
]
RESPONSE_TOOLS: Any = [{"type": "function", **tool["function"], "strict": True} for tool in CHAT_TOOLS]
MESSAGE_TOOLS: Any = [
    {"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} for tool in CHAT_TOOLS
]


@dataclass
class Spent:
    """What the answers of one tenant said that they took."""

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def add(self, prompt: int, cached: int | None, completion: int) -> None:
        self.requests += 1
        self.prompt_tokens += prompt
        self.cached_tokens += cached or 0
        self.completion_tokens += completion

    def refused(self) -> None:
        self.requests += 1
        self.failed += 1


@dataclass
class Shop:
    """A tenant with an adapter and both clients."""

    key: str
    digest: str
    open: openai.AsyncOpenAI
    claude: anthropic.AsyncAnthropic
    http: httpx.AsyncClient
    spent: Spent = field(default_factory=Spent)

    def add(self, usage: Any) -> Any:
        """Note the usage of a chat or completion; the usage."""
        details = usage.prompt_tokens_details
        self.spent.add(usage.prompt_tokens, details.cached_tokens if details else 0, usage.completion_tokens)
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        return usage

    def add_response(self, usage: Any) -> Any:
        self.spent.add(usage.input_tokens, usage.input_tokens_details.cached_tokens, usage.output_tokens)
        assert usage.total_tokens == usage.input_tokens + usage.output_tokens
        return usage

    def add_message(self, usage: Any) -> int:
        """Note the usage of a message; how many tokens its prompt had."""
        prompt: int = prompt_of(usage)
        self.spent.add(prompt, usage.cache_read_input_tokens, usage.output_tokens)
        return prompt

    def receipts(self, headers: Mapping[str, str]) -> None:
        """Every answer says whose it is."""
        assert headers["x-tailor-adapter"] == MODEL
        assert headers["x-tailor-version"] == f"1; sha256={self.digest}"
        assert headers["x-tailor-replica"]
        assert headers["x-request-id"]
        assert headers["server-timing"].startswith("queue;dur=")

    async def chat(self, **more: Any) -> Any:
        asked = {"messages": QUESTION, "temperature": 0, "max_tokens": TOKENS, **more}
        return await self._answered(self.open.chat.completions, self.add, asked)

    async def text(self, **more: Any) -> str:
        """What a chat says."""
        said: str = (await self.chat(**more)).choices[0].message.content
        return said

    async def completion(self, **more: Any) -> Any:
        asked = {"prompt": PROMPT, "temperature": 0, "max_tokens": TOKENS, **more}
        return await self._answered(self.open.completions, self.add, asked)

    async def response(self, **more: Any) -> Any:
        asked = {"input": PROMPT, "temperature": 0, "max_output_tokens": TOKENS, **more}
        return await self._answered(self.open.responses, self.add_response, asked)

    async def message(self, **more: Any) -> Any:
        asked = {"messages": QUESTION, "max_tokens": TOKENS, "extra_body": GREEDY, **more}
        return await self._answered(self.claude.messages, self.add_message, asked)

    async def _answered(self, api: Any, add: Callable[[Any], object], asked: dict[str, Any]) -> Any:
        """A whole answer, its receipts looked at and its usage noted by `add`."""
        raw = await api.with_raw_response.create(**{"model": MODEL, **asked})
        self.receipts(raw.headers)
        answer: Any = raw.parse()
        if isawaitable(answer):  # anthropic's client has it so
            answer = await answer
        add(answer.usage)
        return answer


def prompt_of(usage: Any) -> int:
    """All tokens of a message's prompt: that API tells three kinds apart."""
    read, created = usage.cache_read_input_tokens, usage.cache_creation_input_tokens
    return int(usage.input_tokens + (read or 0) + (created or 0))


@pytest.fixture(scope="module")
async def shop(stack: RealStack, adapters: list[Path]) -> AsyncIterator[Shop]:
    key = stack.new_tenant("shop")
    stack.push(adapters[0], MODEL, key)
    headers = {"authorization": f"Bearer {key}"}
    async with (
        openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key=key, max_retries=0, timeout=120) as open_client,
        anthropic.AsyncAnthropic(base_url=stack.url, api_key=key, max_retries=0, timeout=120) as claude,
        httpx.AsyncClient(base_url=stack.url, headers=headers, timeout=120) as http,
    ):
        published = (await http.get(f"/v1/adapters/{MODEL}")).json()
        yield Shop(key, published["current"]["digest"], open_client, claude, http)


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_base / "tokenizer.json"))


@pytest.fixture(scope="module")
def words(tokenizer: Tokenizer) -> list[tuple[int, str]]:
    """Three tokens that are a whole word each, with their text."""
    texts = [(token, tokenizer.decode([token])) for token in range(tokenizer.get_vocab_size())]
    return [(token, text) for token, text in texts if text.startswith(" ") and text[1:].isalpha() and len(text) > 3][:3]


# each API


async def test_a_chat_says_the_same_whole_and_streamed(shop: Shop) -> None:
    """Words, usage and receipts; the stream tells its usage at the end, once."""
    whole = await shop.chat()
    assert whole.model == MODEL
    assert whole.usage.completion_tokens <= TOKENS
    raw = await shop.open.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        max_tokens=TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    shop.receipts(raw.headers)
    chunks = [chunk async for chunk in raw.parse()]
    assert {chunk.model for chunk in chunks} == {MODEL}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == (
        whole.choices[0].message.content
    )
    (told,) = [chunk.usage for chunk in chunks if chunk.usage]
    shop.add(told)
    assert (told.prompt_tokens, told.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason


async def test_a_completion_says_the_same_whole_and_streamed(shop: Shop) -> None:
    """Of a text and of its token ids."""
    whole = await shop.completion()
    assert whole.model == MODEL
    raw = await shop.open.completions.with_raw_response.create(
        model=MODEL,
        prompt=PROMPT,
        temperature=0,
        max_tokens=TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    shop.receipts(raw.headers)
    chunks = [chunk async for chunk in raw.parse()]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    (told,) = [chunk.usage for chunk in chunks if chunk.usage]
    shop.add(told)
    assert (told.prompt_tokens, told.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


async def test_a_response_says_the_same_whole_and_streamed(shop: Shop) -> None:
    """Through the client's own accumulator; the output comes back as input."""
    whole = await shop.response(instructions=SYSTEM, metadata={"a": "b"})
    assert (whole.model, whole.metadata) == (MODEL, {"a": "b"})
    assert whole.output_text
    asked: Any = {"model": MODEL, "input": PROMPT, "temperature": 0, "max_output_tokens": TOKENS}
    async with shop.open.responses.stream(instructions=SYSTEM, **asked) as stream:
        names = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert names[0] == "response.created"
    assert names[-1] == ("response.completed" if final.status == "completed" else "response.incomplete")
    assert (final.output_text, final.model) == (whole.output_text, MODEL)
    told = shop.add_response(final.usage)
    assert (told.input_tokens, told.output_tokens) == (whole.usage.input_tokens, whole.usage.output_tokens)
    again = await shop.response(input=[*QUESTION, *final.output, {"role": "user", "content": "And now?"}])
    assert again.usage.input_tokens > whole.usage.input_tokens


async def test_a_message_says_the_same_whole_and_streamed(shop: Shop) -> None:
    """With the key in `x-api-key`, as that client sends it."""
    whole = await shop.message(system=SYSTEM)
    assert (whole.model, whole.type, whole.role) == (MODEL, "message", "assistant")
    asked: Any = {"model": MODEL, "messages": QUESTION, "max_tokens": TOKENS, "extra_body": GREEDY}
    async with shop.claude.messages.stream(system=SYSTEM, **asked) as stream:
        shop.receipts(stream.response.headers)
        said = "".join([text async for text in stream.text_stream])
        final = await stream.get_final_message()
    assert said == whole.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    shop.add_message(final.usage)
    history: Any = [*QUESTION, {"role": "assistant", "content": whole.content}, {"role": "user", "content": "And now?"}]
    assert (await shop.message(messages=history)).content


async def test_counts_are_what_the_prompts_take(shop: Shop) -> None:
    """Three ways to count, with instructions and functions: each is what the answer's usage says."""
    chat: Any = {"messages": [{"role": "system", "content": SYSTEM}, *QUESTION], "tools": CHAT_TOOLS}
    counted = await shop.http.post("/v1/tokenize", json={"model": MODEL, **chat})
    assert counted.json()["count"] == (await shop.chat(**chat, tool_choice="none", max_tokens=1)).usage.prompt_tokens
    response: Any = {"input": PROMPT, "instructions": SYSTEM, "tools": RESPONSE_TOOLS, "tool_choice": "none"}
    told = await shop.open.responses.input_tokens.count(model=MODEL, **response)
    assert told.input_tokens == (await shop.response(**response, max_output_tokens=1)).usage.input_tokens
    message: Any = {"messages": QUESTION, "system": SYSTEM, "tools": MESSAGE_TOOLS, "tool_choice": {"type": "none"}}
    said = await shop.claude.messages.count_tokens(model=MODEL, **message)
    used = (await shop.message(**message, max_tokens=1)).usage
    assert said.input_tokens == prompt_of(used)


# each field


async def test_a_schema_holds_every_apis_answer(shop: Shop) -> None:
    """Streamed too: what comes parses, and is what the schema lets be."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "pick", "schema": SCHEMA, "strict": True}}
    Pick.model_validate_json(await shop.text(response_format=form, max_tokens=ROOM))
    parsed = await shop.open.chat.completions.parse(
        model=MODEL, messages=QUESTION, response_format=Pick, max_tokens=ROOM, temperature=1, seed=3
    )
    assert isinstance(parsed.choices[0].message.parsed, Pick)
    shop.add(parsed.usage)
    plain = await shop.completion(max_tokens=ROOM, extra_body={"response_format": form})
    Pick.model_validate_json(plain.choices[0].text)
    response = await shop.open.responses.parse(
        model=MODEL, input=PROMPT, text_format=Pick, max_output_tokens=ROOM, temperature=0
    )
    assert isinstance(response.output_parsed, Pick)
    shop.add_response(response.usage)
    message = await shop.message(max_tokens=ROOM, output_config={"format": {"type": "json_schema", "schema": SCHEMA}})
    Pick.model_validate_json(message.content[0].text)
    async with shop.open.chat.completions.stream(
        model=MODEL,
        messages=QUESTION,
        response_format=Pick,
        max_tokens=ROOM,
        temperature=0,
        stream_options={"include_usage": True},
    ) as stream:
        final = await stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Pick)
    shop.add(final.usage)


async def test_several_choices_are_counted_together(shop: Shop) -> None:
    """`n: 2` gives two, whole and streamed, and the usage of both."""
    asked: Any = {"n": 2, "temperature": 1, "seed": 5, "extra_body": {"min_tokens": 8}, "max_tokens": 8}
    whole = await shop.chat(**asked)
    said = {choice.index: choice.message.content for choice in whole.choices}
    assert set(said) == {0, 1}
    assert said[0] != said[1]
    assert whole.usage.completion_tokens == 16
    stream = await shop.open.chat.completions.create(
        model=MODEL, messages=QUESTION, stream=True, stream_options={"include_usage": True}, **asked
    )
    streamed = {0: "", 1: ""}
    async for chunk in stream:
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
        if chunk.usage:
            assert shop.add(chunk.usage).completion_tokens == 16
    assert streamed == said


async def test_an_answer_ends_before_a_stop(shop: Shop) -> None:
    """In each API's own field; the stop itself is not said."""
    whole = await shop.text()
    stop = _within(whole)
    before = whole[: whole.index(stop)]
    chat = (await shop.chat(stop=[stop, "never said"])).choices[0]
    assert (chat.message.content, chat.finish_reason) == (before, "stop")
    message = await shop.message(stop_sequences=[stop])
    assert ("".join(block.text for block in message.content), message.stop_reason) == (before, "stop_sequence")
    assert message.stop_sequence == stop
    text = (await shop.completion()).choices[0].text
    stop = _within(text)
    plain = (await shop.completion(stop=stop)).choices[0]
    assert (plain.text, plain.finish_reason) == (text[: text.index(stop)], "stop")
    text = (await shop.response()).output_text
    stop = _within(text)
    response = await shop.response(extra_body={"stop": stop})
    assert (response.output_text, response.status) == (text[: text.index(stop)], "completed")


def _within(text: str) -> str:
    """Two characters in the middle of a text that are there once."""
    places = sorted(range(1, len(text) - 2), key=lambda place: abs(place - len(text) // 2))
    return next(found for at in places if text.count(found := text[at : at + 2]) == 1 and found.isascii())


async def test_a_token_id_may_be_a_stop(shop: Shop, words: list[tuple[int, str]]) -> None:
    """`stop_token_ids`, of the only token that there can be: nothing is said."""
    token, _ = words[0]
    asked: Any = {"logit_bias": {str(token): 100}, "extra_body": {"stop_token_ids": [token]}}
    answer = await shop.chat(**asked)
    assert (answer.choices[0].message.content or "", answer.choices[0].finish_reason) == ("", "stop")
    assert answer.usage.completion_tokens == 1


async def test_a_seed_decides_what_chance_says(shop: Shop) -> None:
    """At temperature 1 the same one says the same, another one something else; in each API that takes one."""
    chats = [await shop.text(temperature=1, seed=seed) for seed in SEEDS]
    completions = [await _completed(shop, temperature=1, seed=seed) for seed in SEEDS]
    responses = [await _responded(shop, temperature=1, extra_body={"seed": seed}) for seed in SEEDS]
    for first, second, other in (chats, completions, responses):
        assert first == second
        assert first != other


async def _completed(shop: Shop, **more: Any) -> str:
    text: str = (await shop.completion(**more)).choices[0].text
    return text


async def _responded(shop: Shop, **more: Any) -> str:
    text: str = (await shop.response(**more)).output_text
    return text


async def test_a_bias_forces_a_token(shop: Shop, words: list[tuple[int, str]]) -> None:
    """At +100 no other is said; at -100 it is not said where +100 is on another one."""
    (token, word), (other, second), _ = words
    bias = {str(token): 100, str(other): -100}
    assert await shop.text(logit_bias=bias, max_tokens=5) == word * 5
    assert await _completed(shop, logit_bias=bias, max_tokens=5) == word * 5
    assert await _responded(shop, extra_body={"logit_bias": bias}, max_output_tokens=5) == word * 5
    assert await shop.text(logit_bias={str(other): 100}, max_tokens=5) == second * 5


async def test_penalties_bring_in_other_tokens(shop: Shop, words: list[tuple[int, str]]) -> None:
    """What is said again and again without them makes room for the second and third choice with them."""
    (token, word), (other, second), (third, _) = words
    asked: Any = {"logit_bias": {str(token): 80, str(other): 66, str(third): 52}, "max_tokens": 16}
    assert await shop.text(**asked) == word * 16
    frequent = await shop.text(**asked, frequency_penalty=2)
    assert frequent.startswith(word)
    assert second in frequent
    assert await shop.text(**asked, extra_body={"repetition_penalty": 10}) != word * 16
    assert (await shop.text(**asked, extra_body={"repetition_penalty": 10})).startswith(word + second)
    assert await shop.text(presence_penalty=2) != await shop.text(presence_penalty=-2)


async def test_functions_are_called_as_they_are_described(shop: Shop) -> None:
    """Named, required, whole and streamed, in each API; the grammar holds the arguments, and results are taken."""
    named: Any = {"type": "function", "function": {"name": "pick"}}
    message = (await shop.chat(tools=CHAT_TOOLS, tool_choice=named, max_tokens=ROOM)).choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "pick"
    Pick.model_validate_json(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "picked"}
    after = await shop.chat(messages=[*QUESTION, message, result], tools=CHAT_TOOLS[1:], tool_choice="none")
    assert not after.choices[0].message.tool_calls
    async with shop.open.chat.completions.stream(
        model=MODEL,
        messages=QUESTION,
        tools=CHAT_TOOLS,
        tool_choice=named,
        max_tokens=ROOM,
        temperature=0,
        stream_options={"include_usage": True},
    ) as stream:
        final: Any = await stream.get_final_completion()
    shop.add(final.usage)
    (streamed,) = final.choices[0].message.tool_calls
    assert (streamed.function.name, streamed.function.arguments) == ("pick", call.function.arguments)


async def test_responses_call_functions(shop: Shop) -> None:
    """Named, whole and streamed; the call and its output come back as input."""
    asked: Any = {
        "tools": RESPONSE_TOOLS,
        "max_output_tokens": ROOM,
        "tool_choice": {"type": "function", "name": "pick"},
    }
    (call,) = (await shop.response(**asked)).output
    assert (call.type, call.name) == ("function_call", "pick")
    Pick.model_validate_json(call.arguments)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "picked"}
    after = await shop.response(input=[*QUESTION, call, output], tools=RESPONSE_TOOLS[1:], tool_choice="none")
    assert after.output_text is not None
    async with shop.open.responses.stream(model=MODEL, input=PROMPT, temperature=0, **asked) as stream:
        final: Any = await stream.get_final_response()
    shop.add_response(final.usage)
    assert [(item.name, item.arguments) for item in final.output] == [("pick", call.arguments)]


async def test_messages_use_tools(shop: Shop) -> None:
    """Named, whole and streamed; the use and its result come back in the history."""
    asked: Any = {"tools": MESSAGE_TOOLS, "max_tokens": ROOM, "tool_choice": {"type": "tool", "name": "pick"}}
    answer = await shop.message(**asked)
    (used,) = answer.content
    assert (used.type, used.name, answer.stop_reason) == ("tool_use", "pick", "tool_use")
    Pick.model_validate(used.input)
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": used.id, "content": "picked"}]}
    history = [*QUESTION, {"role": "assistant", "content": answer.content}, result]
    assert (await shop.message(messages=history, tools=MESSAGE_TOOLS[1:], tool_choice={"type": "none"})).content
    async with shop.claude.messages.stream(model=MODEL, messages=QUESTION, extra_body=GREEDY, **asked) as stream:
        final: Any = await stream.get_final_message()
    shop.add_message(final.usage)
    assert [(block.name, block.input) for block in final.content] == [("pick", used.input)]


async def test_a_required_call_is_made_and_a_free_one_may_be(shop: Shop) -> None:
    """`required` and `any` call one, alone where that is asked; with `auto` this weak model's words are not lost."""
    only: Any = [CHAT_TOOLS[1]]
    required: Any = {"tool_choice": "required", "parallel_tool_calls": False}
    (call,) = (await shop.chat(tools=only, max_tokens=ROOM, **required)).choices[0].message.tool_calls
    Pick.model_validate_json(call.function.arguments)
    (item,) = (await shop.response(tools=RESPONSE_TOOLS[1:], max_output_tokens=ROOM, **required)).output
    Pick.model_validate_json(item.arguments)
    choice = {"type": "any", "disable_parallel_tool_use": True}
    (used,) = (await shop.message(tools=MESSAGE_TOOLS[1:], tool_choice=choice, max_tokens=ROOM)).content
    Pick.model_validate(used.input)
    spoken: Any = {"tools": only, "extra_body": {"min_tokens": 8}}
    words = await shop.text(**spoken, tool_choice="none")
    assert words
    assert await shop.text(**spoken) == words
    response = await shop.response(tools=RESPONSE_TOOLS)
    assert response.output_text == (await shop.response(tools=RESPONSE_TOOLS, tool_choice="none")).output_text
    free, none = [await shop.message(tools=MESSAGE_TOOLS, tool_choice={"type": kind}) for kind in ("auto", "none")]
    assert free.content == none.content


# what the engine refuses


async def test_the_engines_refusal_names_the_field(shop: Shop) -> None:
    """Ids of tokens are held to its vocabulary; what it alone finds is a 400 too, streamed or not."""
    missing = str(MISSING_TOKEN)
    chat: Any = {"model": MODEL, "messages": QUESTION}
    completion: Any = {"model": MODEL, "prompt": PROMPT}
    chats: Any = ("/v1/chat/completions", chat)
    completions: Any = ("/v1/completions", completion)
    responses: Any = ("/v1/responses", {"model": MODEL, "input": PROMPT})
    clashing: Any = [
        {"type": "function", "function": {"name": kind, "parameters": {**HOLDS, "$defs": {"it": {"type": kind}}}}}
        for kind in ("string", "integer")
    ]
    refusals: list[tuple[str, str, tuple[str, Any], Any]] = [
        *(("logit_bias", "vocabulary", at, {"logit_bias": {missing: 1}}) for at in (chats, completions, responses)),
        *(("stop_token_ids", "vocabulary", at, {"stop_token_ids": [1, int(missing)]}) for at in (chats, responses)),
        ("prompt", "vocabulary", completions, {"prompt": [1, int(missing)]}),
        ("n", "temperature", chats, {"n": 2, "temperature": 0}),
        ("tools", "tools", chats, {"tools": clashing, "tool_choice": "required"}),
    ]
    for param, reason, (path, body), more in refusals:
        for stream in (False, True):
            answer = await shop.http.post(path, json={**body, **more, "stream": stream})
            shop.spent.refused()
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["code"]) == (400, param, "invalid_value"), answer.text
            assert reason in error["message"]
            assert missing not in answer.text  # ours, not the engine's
    with pytest.raises(openai.BadRequestError) as refused:
        await shop.open.chat.completions.create(**chat, logit_bias={missing: 1})
    shop.spent.refused()
    assert refused.value.param == "logit_bias"


# what it all took


async def test_the_ledger_has_the_sum_of_all_usage(shop: Shop) -> None:
    """Of every request of this file, whichever API: each once, as its answer said."""
    if not shop.spent.requests:
        await shop.chat()
    names = list(Spent.__dataclass_fields__)
    deadline = time.monotonic() + 30
    while True:
        rows = (await shop.http.get("/v1/usage", params={"by": "month", "adapter": MODEL})).json()["data"]
        found = Spent(**{name: sum(row[name] for row in rows) for name in names})
        if found.requests >= shop.spent.requests or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.1)
    assert found == shop.spent, json.dumps(rows)
