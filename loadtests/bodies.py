"""A planned request as the bytes of its HTTP request, made when it is due: slices of one long text, some µs each.

The words are so common that each is one token to nearly every tokenizer; where it is not, `tokens_per_word` says what a
word is. What an answer's `usage` tells is the truth, not the plan.
"""

import json
import random
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Final, NamedTuple

from loadtests.recording import ABSENT, PLANNED
from loadtests.scenario import Workload

_WORDS: Final = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had "
    "by word but not what all were we when your can said there use an each which she do how their if "
    "will up other about out many then them these so some her would make like him"
)
WORDS: Final = tuple(_WORDS.split(" "))
CANARY_PROMPT: Final = "Name the colours of the rainbow, one after the other."
CANARY_TOKENS: Final = 8
_HEAD_WORDS: Final = 3  # 18 bits of the seed; the rest says where the text is cut
_TEXT_WORDS: Final = 1 << 16
_ROUTES: Final = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


class Planned(NamedTuple):
    """A row of PLANNED."""

    at: int
    caller: int
    tenant: int
    model: int
    phase: int
    workload: int
    prompt_tokens: int
    output_tokens: int
    conversation: int
    turn: int
    abort_after: int
    parameters: int
    canary: bool
    seed: int


assert Planned._fields == PLANNED.names


def canary(route: str) -> dict[str, Any]:
    """The request whose answer is known per adapter, but for `model` and `stream`: greedy, always the same."""
    fields = {"temperature": 0, "max_tokens": CANARY_TOKENS}
    if route == "chat":
        return {**fields, "messages": [{"role": "user", "content": CANARY_PROMPT}]}
    return {**fields, "prompt": CANARY_PROMPT}


class Text:
    """Words without end, cut anywhere: the same place gives the same words, another place others."""

    def __init__(self) -> None:
        words = random.Random(1).choices(WORDS, k=_TEXT_WORDS)
        self._starts = [0, *accumulate(len(word) + 1 for word in words)]
        self._text = (" ".join(words) + " ").encode()

    def words(self, place: int, count: int) -> bytes:
        """`count` words, each with a space behind it."""
        begin = place % _TEXT_WORDS
        end = begin + count
        if end <= _TEXT_WORDS:
            return self._text[self._starts[begin] : self._starts[end]]
        rounds, rest = divmod(end - _TEXT_WORDS, _TEXT_WORDS)
        return self._text[self._starts[begin] :] + self._text * rounds + self._text[: self._starts[rest]]

    def prompt(self, seed: int, count: int) -> bytes:
        """So many words that another seed has other ones from the start, and fewer are the begin of more."""
        head = b"".join(b"%b " % WORDS[seed >> 6 * place & 63].encode() for place in range(min(count, _HEAD_WORDS)))
        return head + self.words(seed >> 6 * _HEAD_WORDS, max(0, count - _HEAD_WORDS))


class Bodies:
    """Makes requests for one server."""

    def __init__(
        self,
        *,
        workloads: Sequence[Workload],
        models: Sequence[str],
        keys: Sequence[str],
        base_model: str,
        host: str,
        tokens_per_word: float = 1.0,
    ) -> None:
        self._workloads = workloads
        self._models = [json.dumps(name).encode() for name in (*models, base_model)]  # ABSENT is the last
        self._keys = list(keys)
        self._host = host
        self._tokens_per_word = tokens_per_word
        self._text = Text()
        self._heads: dict[tuple[int, str], bytes] = {}
        self._fields = [
            [_open(workload, fields) for fields in (*(one.fields for one in workload.parameters), {})]
            for workload in workloads
        ]
        self._canaries = [_closed(workload, canary(workload.route)) for workload in workloads]

    def change_key(self, tenant: int, key: str) -> None:
        """The tenant's next requests have that key."""
        self._keys[tenant] = key
        for route in _ROUTES:
            self._heads.pop((tenant, route), None)

    def request(self, planned: Planned) -> bytes:
        """Head and body."""
        workload = self._workloads[planned.workload]
        model = self._models[planned.model]
        if planned.canary:
            body = self._canaries[planned.workload] % model
        else:
            length = planned.output_tokens
            fields = self._fields[planned.workload][planned.parameters] % (model, length, length)
            body = fields + self.prompt(planned) + (b'"}]}' if workload.route == "chat" else b'"}')
        return self._head(planned.tenant, workload.route) % len(body) + body

    def prompt(self, planned: Planned) -> bytes:
        """Its text, without what a canary has instead."""
        workload = self._workloads[planned.workload]
        words = self._words(planned.prompt_tokens)
        shared = min(self._words(workload.shared_prefix_tokens), words - 1) if workload.shared_prefix_tokens else 0
        begin = self._text.prompt(_spread(planned.tenant), shared) if shared else b""
        return begin + self._text.prompt(planned.seed, words - shared).rstrip()

    def _words(self, tokens: int) -> int:
        return max(1, round(tokens / self._tokens_per_word))

    def _head(self, tenant: int, route: str) -> bytes:
        head = self._heads.get((tenant, route))
        if head is None:
            head = self._heads[tenant, route] = (
                f"POST {_ROUTES[route]} HTTP/1.1\r\nhost: {self._host}\r\n"
                f"authorization: Bearer {self._keys[tenant]}\r\n"
                "content-type: application/json\r\ncontent-length: %d\r\n\r\n"
            ).encode()
        return head


def _open(workload: Workload, fields: dict[str, Any]) -> bytes:
    """A body up to its prompt, with places for model and output length."""
    told: dict[str, Any] = {**_streaming(workload), **fields}
    text = json.dumps(told, separators=(",", ":"))[1:-1].replace("%", "%%")
    # `min_tokens`: an answer that ends early would measure the model's mood
    length = '"max_tokens":%d,"min_tokens":%d'
    prompt = '"messages":[{"role":"user","content":"' if workload.route == "chat" else '"prompt":"'
    return f'{{"model":%b,{f"{text}," if text else ""}{length},{prompt}'.encode()


def _closed(workload: Workload, fields: dict[str, Any]) -> bytes:
    """A whole body, with a place for the model."""
    text = json.dumps({**_streaming(workload), **fields}, separators=(",", ":"))[1:].replace("%", "%%")
    return f'{{"model":%b,{text}'.encode()


def _streaming(workload: Workload) -> dict[str, Any]:
    return {"stream": True, "stream_options": {"include_usage": True}} if workload.stream else {}


def _spread(number: int) -> int:
    """A seed far from the neighbours'."""
    return (number + 1) * 2_654_435_761 & 0xFFFF_FFFF


assert ABSENT == -1, "models[ABSENT] and fields[ABSENT] are the last ones"
