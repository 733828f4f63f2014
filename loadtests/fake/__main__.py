"""The fake replica as a process of its own, with an engine that takes time.

    python -m loadtests.fake --port 9000 --fingerprint HEX

`POST /fake/slow` `{"factor", "duration_s"}` makes it slow for a while; whoever wants it dead or frozen signals it.
"""

import argparse
import asyncio
import json
import os
import signal
from typing import Any

from adapter_store.process import die_with_parent
from loadtests.fake.engine import EngineModel
from loadtests.fake.replica import FakeReplica

BLOCK_TOKENS = 16
BLOCKS = 65_536


class PrefixCache:
    """Blocks of prompts that were computed before, as vLLM keeps them: each known by all that stands before it."""

    def __init__(self) -> None:
        self._blocks: dict[int, None] = {}

    def hits(self, owner: str | None, text: str) -> int:
        """How many blocks at the begin of a text are there; afterwards all of it is."""
        size, key, hits, whole = 4 * BLOCK_TOKENS, hash(owner), 0, True
        for begin in range(0, len(text) - size, size):
            key = hash((key, text[begin : begin + size]))
            whole = whole and key in self._blocks
            hits += whole
            self._blocks.pop(key, None)
            self._blocks[key] = None
        while len(self._blocks) > BLOCKS:
            del self._blocks[next(iter(self._blocks))]
        return hits


class StandaloneReplica(FakeReplica):
    """A fake that is told what to do over HTTP and keeps nothing of the requests that it has served."""

    mix_up_every = 0
    break_every = 0
    break_with = 400
    _spoken = 0
    _asked = 0
    _cache = PrefixCache()

    def cached_tokens(self, name: str | None, body: dict[str, Any]) -> int:
        """Of this adapter's prompts, for another one's have other keys and values."""
        return BLOCK_TOKENS * self._cache.hits(name, json.dumps(body.get("messages", body.get("prompt", ""))))

    def text_of(self, name: str | None) -> str:
        """The adapter's, or where it is to mix them up now and then another one's."""
        self._spoken += 1
        others = [other for other in self.adapters if other != name]
        if self.mix_up_every and self._spoken % self.mix_up_every == 0 and others:
            return super().text_of(others[0])
        return super().text_of(name)

    def whole_text(self, text: str, tokens: int) -> str:
        """The same as a stream's tokens say."""
        return text + "." * (tokens - 1)

    def status_for(self, body: dict[str, Any]) -> int | None:
        """Now and then another than the faults say; not of a canary, else no answer would be known."""
        self._asked += body.get("temperature") != 0
        if self.break_every and self._asked >= self.break_every:
            self._asked = 0
            return self.break_with
        return super().status_for(body)

    async def _answer(
        self,
        method: str,
        path: str,
        headers: dict[str, str],
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        if path != "/fake/slow":
            await super()._answer(method, path, headers, body, reader, writer)
            self.served.clear()
            return
        told = json.loads(body)
        assert self.engine is not None
        self.engine.factor = float(told["factor"])
        asyncio.get_running_loop().call_later(float(told["duration_s"]), setattr, self.engine, "factor", 1.0)
        self._json(writer, 204, {})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("loadtests.fake")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--fingerprint", required=True)
    parser.add_argument("--base-name", default="base")
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--host-adapters", type=int, default=16)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=2_048)
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--per-sequence-us", type=float, default=100.0)
    parser.add_argument("--per-prompt-token-us", type=float, default=20.0)
    parser.add_argument("--load-ms", type=float, default=50.0)
    parser.add_argument("--activate-ms", type=float, default=5.0)
    parser.add_argument("--mix-up-every", type=int, default=0, help="each so-manieth answer is another adapter's")
    parser.add_argument("--break-every", type=int, default=0, help="each so-manieth request is refused")
    parser.add_argument("--break-with", type=int, default=400, help="the status that it is refused with")
    parser.add_argument("--serve-the-gone", action="store_true", help="answers are made though their clients left")
    return parser.parse_args()


async def main(told: argparse.Namespace) -> None:
    """Serve until SIGTERM; what runs then is finished."""
    engine = EngineModel(
        max_num_seqs=told.max_num_seqs,
        max_loras=told.slots,
        base_step_s=told.step_ms / 1e3,
        per_sequence_s=told.per_sequence_us / 1e6,
        per_prompt_token_s=told.per_prompt_token_us / 1e6,
        load_s=told.load_ms / 1e3,
        activate_s=told.activate_ms / 1e3,
        slots=True,
    )
    fake = StandaloneReplica(
        told.fingerprint,
        base_name=told.base_name,
        port=told.port,
        capacity=told.host_adapters,
        max_model_len=told.max_model_len,
        engine=engine,
        keep_requests=False,
    )
    fake.mix_up_every = told.mix_up_every
    fake.break_every, fake.break_with = told.break_every, told.break_with
    fake.faults.serves_the_gone = told.serve_the_gone
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await fake.start()
    await stop.wait()
    while fake.in_flight:  # noqa: ASYNC110  it ends in many places
        await asyncio.sleep(0.01)
    os._exit(0)


if __name__ == "__main__":
    die_with_parent()
    asyncio.run(main(_arguments()))
