"""A model of vLLM's scheduler: steps that take longer the more they run, priorities, bounded adapters.

As vLLM 0.32 with `--scheduling-policy priority`: at most `max_num_seqs` sequences run at once; a waiting one whose
adapter would be one more than `max_loras` is passed over, however long it has waited; a load stalls everybody.

With `slots` it also remembers which `max_loras` adapters lie on the device, the least recently run leaves for another,
and the one that comes from the host's memory stalls everybody for `activate_s`.
"""

import asyncio
import heapq
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field


@dataclass(eq=False)
class Sequence:
    """One request in the engine; `on_token` is called for every token, `done` is set at its end or when it is aborted.

    Times are the engine's own (`EngineModel.now_s`): unlike a wall clock they know no noise of a busy machine.
    """

    adapter: str | None
    priority: int
    prompt_tokens: int
    max_tokens: int
    on_token: Callable[[int], None]
    done: asyncio.Future[None]
    arrived_s: float = 0.0
    emitted: int = 0
    aborted: bool = False
    number: int = 0

    def __lt__(self, other: "Sequence") -> bool:
        return (self.priority, self.number) < (other.priority, other.number)


@dataclass
class EngineModel:
    """Times in seconds."""

    max_num_seqs: int = 64
    max_loras: int = 4
    base_step_s: float = 0.01
    per_sequence_s: float = 0.0001
    per_prompt_token_s: float = 0.0
    load_s: float = 0.0
    slots: bool = False
    activate_s: float = 0.0
    factor: float = 1.0
    """How many times as long everything takes."""
    activations: int = 0
    on_device: dict[str, None] = field(default_factory=dict)
    """The least recently run first."""
    now_s: float = 0.0
    tokens: int = 0
    steps: int = 0
    tokens_of: Counter[str | None] = field(default_factory=Counter)
    most_running: int = 0
    most_adapters: int = 0
    """Distinct adapters with requests in the engine, waiting ones too."""
    _waiting: list[Sequence] = field(default_factory=list)
    _running: list[Sequence] = field(default_factory=list)
    _stall_s: float = 0.0
    _numbers: int = 0
    _work: asyncio.Event = field(default_factory=asyncio.Event)
    _thawed: asyncio.Event = field(default_factory=asyncio.Event)
    _task: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self._thawed.set()

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for sequence in (*self._waiting, *self._running):
            if not sequence.done.done():
                sequence.done.cancel()
        self._waiting.clear()
        self._running.clear()

    @property
    def frozen(self) -> bool:
        return not self._thawed.is_set()

    def freeze(self) -> None:
        """No step ends until `thaw`, whatever comes."""
        self._thawed.clear()

    def thaw(self) -> None:
        self._thawed.set()

    def add(self, sequence: Sequence) -> None:
        self._numbers += 1
        sequence.number = self._numbers
        sequence.arrived_s = self.now_s
        heapq.heappush(self._waiting, sequence)
        adapters = {waiting.adapter for waiting in self._waiting} | self._adapters()
        self.most_adapters = max(self.most_adapters, len(adapters - {None}))
        self._work.set()

    def abort(self, sequence: Sequence) -> None:
        """Nobody reads it any more: it leaves with the next step."""
        sequence.aborted = True
        self._work.set()

    def stall(self, seconds: float) -> None:
        """The next step takes that much longer: a load runs on the engine's loop."""
        self._stall_s += seconds
        self._work.set()

    def place(self, adapter: str) -> bool:
        """Put an adapter on the device, in the stead of the one that ran least recently; False: it was there."""
        was_there = adapter in self.on_device
        self.on_device.pop(adapter, None)
        if not was_there and len(self.on_device) >= self.max_loras:
            busy = self._adapters()
            leaves = next((one for one in self.on_device if one not in busy), None)
            if leaves is not None:
                del self.on_device[leaves]
        self.on_device[adapter] = None
        return not was_there

    def forget(self, adapters: Iterable[str]) -> None:
        """They are not loaded any more."""
        for adapter in adapters:
            self.on_device.pop(adapter, None)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def _adapters(self) -> set[str | None]:
        return {sequence.adapter for sequence in self._running if sequence.adapter is not None}

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        next_at = loop.time()
        while True:
            if not (self._waiting or self._running or self._stall_s):
                self._work.clear()
                await self._work.wait()
                next_at = loop.time()
            prompts = self._admit()
            duration_s = self.factor * (
                self.base_step_s
                + self.per_sequence_s * len(self._running)
                + self.per_prompt_token_s * prompts
                + self._stall_s
            )
            self._stall_s = 0.0
            next_at = max(next_at + duration_s, loop.time())
            await asyncio.sleep(next_at - loop.time())
            await self._thawed.wait()
            self.now_s += duration_s
            self._step()

    def _admit(self) -> int:
        """Take waiting sequences in, as far as there is room; returns their prompts' tokens."""
        prompts = 0
        passed: list[Sequence] = []
        self._running = [sequence for sequence in self._running if not self._drop_aborted(sequence)]
        adapters = self._adapters()
        while self._waiting and len(self._running) < self.max_num_seqs:
            sequence = heapq.heappop(self._waiting)
            if self._drop_aborted(sequence):
                continue
            if sequence.adapter is not None and sequence.adapter not in adapters:
                if len(adapters) >= self.max_loras:
                    passed.append(sequence)
                    continue
                adapters.add(sequence.adapter)
            if self.slots and sequence.adapter is not None and self.place(sequence.adapter):
                self.activations += 1
                self._stall_s += self.activate_s
            self._running.append(sequence)
            prompts += sequence.prompt_tokens
        for sequence in passed:
            heapq.heappush(self._waiting, sequence)
        self.most_running = max(self.most_running, len(self._running))
        return prompts

    def _drop_aborted(self, sequence: Sequence) -> bool:
        if sequence.aborted and not sequence.done.done():
            sequence.done.set_result(None)
        return sequence.aborted

    def _step(self) -> None:
        self.steps += 1
        for sequence in self._running:
            if sequence.aborted:
                continue
            sequence.emitted += 1
            self.tokens += 1
            self.tokens_of[sequence.adapter] += 1
            sequence.on_token(sequence.emitted)
            if sequence.emitted >= sequence.max_tokens and not sequence.done.done():
                sequence.done.set_result(None)
        self._running = [sequence for sequence in self._running if not sequence.done.done()]
