"""The engine as the agent sees it: the one module that touches vLLM's objects (checked against vLLM 0.32)."""

import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any
from uuid import uuid4


class EngineRefusedError(Exception):
    """The engine would not load an adapter; the text is the engine's own and never goes to a tenant."""


class Generating:
    """One answer in the making, as vLLM's own record of it has it (vllm/v1/engine/output_processor.py, version 0.32).

    vLLM drops the record when the answer has ended or was aborted; from then on it does not change.
    """

    __slots__ = ("_state", "_states")

    def __init__(self, states: dict[str, Any], state: Any) -> None:
        self._states = states
        self._state = state

    @property
    def is_over(self) -> bool:
        return self._states.get(self._state.request_id) is not self._state

    @property
    def prompt_tokens(self) -> int:
        return int(self._state.prompt_len)

    @property
    def cached_tokens(self) -> int:
        return int(self._state.num_cached_tokens)

    @property
    def completion_tokens(self) -> int:
        return int(self._state.detokenizer.num_output_tokens())


class Engine:
    """Loads, unloads and probes through vLLM's engine client.

    Source: vllm/v1/engine/async_llm.py and vllm/entrypoints/openai/models/serving.py, version 0.32.
    """

    def __init__(self, client: Any, models: Any) -> None:
        self._client = client
        self._models = models

    async def load(self, name: str, path: Path) -> int:
        """Load an adapter on the device and let requests name it; returns vLLM's integer id for it.

        Raises:
            EngineRefusedError: nothing of the adapter is left in the engine.
        """
        from vllm.lora.request import LoRARequest

        request = LoRARequest(lora_name=name, lora_int_id=self._models.lora_id_counter.inc(1), lora_path=str(path))
        try:
            await self._client.add_lora(request)
        except Exception as error:
            await self._client.remove_lora(request.lora_int_id)
            raise EngineRefusedError(str(error)) from error
        self._models.lora_requests[name] = request
        return int(request.lora_int_id)

    def hide(self, name: str) -> None:
        """Let no further request name the adapter; running ones go on."""
        self._models.lora_requests.pop(name, None)

    async def unload(self, number: int) -> None:
        """Free the adapter's slot and host memory (vLLM's own unload route only forgets the name)."""
        await self._client.remove_lora(number)

    async def residency(self) -> tuple[set[int], set[int]]:
        """Adapter ids on the device, and in host memory."""
        ((device, host),) = (await self._client.collective_rpc("tailor_residency"))[:1]
        return set(device), set(host)

    async def generate_one_token(self, adapter: str | None, **parameters: Any) -> float:
        """Seconds to one real token through the whole engine; `parameters` are vLLM's sampling parameters."""
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import SamplingParams

        begin = time.monotonic()
        stream = self._client.generate(
            TokensPrompt(prompt_token_ids=[1]),
            SamplingParams(max_tokens=1, **{"temperature": 0.0, "detokenize": False, **parameters}),
            f"probe-{uuid4().hex}",
            lora_request=self._models.lora_requests.get(adapter) if adapter else None,
            priority=-(2**31),
        )
        async for _ in stream:
            pass
        return time.monotonic() - begin

    async def warm_up(self, adapter: str | None) -> None:
        """Pay now what the first request of a kind would make everybody wait for.

        vLLM 0.32 compiles its log-probability ranking and imports its grammar engine at their first use, inside an
        engine step: 5 s and more on two cores.
        """
        from vllm.sampling_params import StructuredOutputsParams

        await self.generate_one_token(adapter, logprobs=1)
        await self.generate_one_token(adapter, temperature=1.0, top_p=0.9, top_k=4, min_p=0.01, seed=1)
        grammar = StructuredOutputsParams(json={"type": "object"})
        await self.generate_one_token(adapter, detokenize=True, structured_outputs=grammar)

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together (`max_model_len`)."""
        return int(self._models.model_config.max_model_len)

    @property
    def vocabulary(self) -> int:
        """How many ids of tokens a request may name (`get_vocab_size`)."""
        return int(self._models.model_config.get_vocab_size())

    @property
    def concurrency(self) -> int:
        """Sequences that one step runs (`max_num_seqs`)."""
        return int(self._client.vllm_config.scheduler_config.max_num_seqs)

    def watch_for_nan(self, tell: Callable[[Collection[str | None]], None]) -> None:
        """Have `tell` called with the adapters' names whenever answers of a step had NaN logits.

        vLLM 0.32 counts such a request when it has ended, without saying whose it was; here each step's outputs pass
        (vllm/v1/engine/output_processor.py). Needs VLLM_COMPUTE_NANS_IN_LOGITS=1.
        """
        processor = self._client.output_processor
        process = processor.process_outputs

        def watched(outputs: Any, *arguments: Any, **named: Any) -> Any:
            bad = [output.request_id for output in outputs if output.num_nans_in_logits]
            if bad:
                states = [processor.request_states.get(request_id) for request_id in bad]
                tell([state.lora_name for state in states if state is not None])
            return process(outputs, *arguments, **named)

        processor.process_outputs = watched

    def watch_requests(self, tell: Callable[["Generating"], None]) -> None:
        """Have `tell` called with whatever is given to the engine to generate, by the task that gives it."""
        processor = self._client.output_processor
        add = processor.add_request

        def watched(request: Any, *arguments: Any, **named: Any) -> Any:
            added = add(request, *arguments, **named)
            state = processor.request_states.get(request.request_id)
            if state is not None:
                tell(Generating(processor.request_states, state))
            return added

        processor.add_request = watched

    def is_dead(self) -> bool:
        return bool(self._client.errored)

    def was_killed(self) -> bool:
        """Whether somebody outside has ended the engine's process: an operator, or the kernel for want of memory."""
        manager = self._client.engine_core.resources.engine_manager
        processes = getattr(manager, "processes", ())
        return any(process.exitcode in (-signal.SIGKILL, -signal.SIGTERM) for process in processes)

    def corrupted_requests(self) -> int:
        """Requests that produced NaN logits so far (`vllm:corrupted_requests_total`)."""
        from prometheus_client import REGISTRY

        return int(
            sum(
                sample.value
                for metric in REGISTRY.collect()
                if metric.name == "vllm:corrupted_requests"
                for sample in metric.samples
                if sample.name == "vllm:corrupted_requests_total"
            )
        )
