"""What the fake replica answers to golden prompts: greedy tokens with logprobs, in the words of vLLM 0.32.

Another seed gives other tokens and logprobs; the same one always the same.
"""

import hashlib
import random
from typing import Any

VOCABULARY = 1_000


def golden(seed: str, body: dict[str, Any], *, nan: bool = False) -> dict[str, Any]:
    """One choice for each prompt."""
    choices = [
        {"index": index, "text": "", "finish_reason": "length", "logprobs": _answer(f"{seed} {prompt}", body, nan)}
        for index, prompt in enumerate(body["prompt"])
    ]
    choices.reverse()  # each is told by its index
    return {"id": "x", "object": "text_completion", "created": 1, "model": body["model"], "choices": choices}


def _answer(seed: str, body: dict[str, Any], nan: bool) -> dict[str, Any]:
    places = [_place(f"{seed} {number}", body["logprobs"]) for number in range(body["max_tokens"])]
    tokens = [max(place, key=lambda token: place[token]) for place in places]
    logprobs: list[float | None] = [place[token] for place, token in zip(places, tokens, strict=True)]
    return {"tokens": tokens, "token_logprobs": [None, *logprobs[1:]] if nan else logprobs, "top_logprobs": places}


def _place(seed: str, top: int) -> dict[str, float]:
    dice = random.Random(hashlib.sha256(seed.encode()).digest())
    tokens = dice.sample(range(VOCABULARY), top)
    return {f"token_id:{token}": -0.1 - number - dice.random() / 2 for number, token in enumerate(tokens)}


def tokenized(body: dict[str, Any]) -> dict[str, Any]:
    """A token for each character, and one where each speaker begins."""
    tokens: list[int] = []
    for message in body["messages"]:
        tokens += [1 if message["role"] == "user" else 2, *map(ord, message["content"])]
    if body["add_generation_prompt"]:
        tokens.append(2)
    return {"count": len(tokens), "max_model_len": 4_096, "tokens": tokens, "token_strs": None}


def prompted(body: dict[str, Any], logprob: float) -> dict[str, Any]:
    """The one token that is allowed, and its log probability."""
    token = f"token_id:{body['allowed_token_ids'][0]}"
    logprobs = {"tokens": [token], "token_logprobs": [logprob], "top_logprobs": [{token: logprob}]}
    choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": logprobs}
    return {"id": "x", "object": "text_completion", "created": 1, "model": body["model"], "choices": [choice]}
