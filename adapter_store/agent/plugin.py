"""Entry points by which vLLM takes the agent in (`vllm.endpoint_plugins`, `vllm.general_plugins`; vLLM 0.32)."""

import asyncio
import multiprocessing
import os
import secrets
from argparse import Namespace
from contextlib import suppress
from typing import Any
from uuid import uuid4

from fastapi import FastAPI

from adapter_store.agent.alarm import Alarms
from adapter_store.agent.counts import Counts
from adapter_store.agent.engine import Engine
from adapter_store.agent.null_adapter import write_null_adapter
from adapter_store.agent.quiet import wait_quietly
from adapter_store.agent.residency import Residency
from adapter_store.agent.routes import Agent, Guard, router
from adapter_store.agent.settings import ENVIRONMENT_VARIABLE, AgentSettings
from adapter_store.base_model import BaseModel
from adapter_store.blobs import Blobs
from adapter_store.cache import DiskCache
from adapter_store.process import die_with_parent

ENGINE_CHECK_S = 0.2
LAST_WORDS_S = 1.0
UNHEARD_S = 2.5
IDLE_LOOK_S = 15.0


def prepare_process() -> None:
    """What every process of a replica does first; vLLM may call it more than once in one process.

    A vLLM that somebody else started in this environment is left alone.
    """
    if ENVIRONMENT_VARIABLE not in os.environ:
        return
    if multiprocessing.parent_process() is not None:  # the server's own parent may be a shell that goes its way
        die_with_parent()
    if AgentSettings.from_environment().needs_null_adapter:  # a CPU replica
        wait_quietly()


class AgentPlugin:
    """Adds the agent's routes and its guard to vLLM's API server."""

    name = "tailor_agent"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._settings = AgentSettings.from_environment()

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)
        app.add_middleware(Guard, token=self._settings.token, owner=app)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        settings = self._settings
        base = BaseModel.read(settings.base_model, name=settings.base_model_name, dtype=settings.dtype)
        engine = Engine(engine_client, state.openai_serving_models)
        cache = DiskCache(settings.cache, Blobs.open(settings.blobs_url), settings.cache_limit_bytes)
        residency = Residency(engine, cache, capacity=settings.host_adapters, loads_waiting=settings.loads_waiting)
        null_adapter = await self._load_null_adapter(engine, base) if settings.needs_null_adapter else None
        await engine.warm_up(null_adapter)
        facts = _facts(settings, base, engine)
        alarms = Alarms(settings.cache, str(facts["generation"]), residency)
        engine.watch_for_nan(alarms.corrupted)
        counts = Counts()
        engine.watch_requests(counts.began)
        state.tailor_agent = Agent(engine, residency, alarms, counts, facts, null_adapter)
        self._tasks = [asyncio.create_task(_end_with_the_engine(engine, alarms))]
        if settings.idle_s:
            self._tasks.append(asyncio.create_task(_unload_idle(residency, settings.idle_s)))

    async def _load_null_adapter(self, engine: Engine, base: BaseModel) -> str:
        name = f"a-{secrets.token_hex(16)}"
        folder = self._settings.cache / "null" / base.fingerprint
        write_null_adapter(folder, base)
        # never pinned: vLLM 0.32 plans as many adapters a step as there are slots, pinned ones not counted, and dies
        await engine.load(name, folder)
        return name


async def _end_with_the_engine(engine: Engine, alarms: Alarms) -> None:
    """End this process soon after its engine has died or computed NaN, for whoever supervises it to start it again.

    vLLM 0.32 shuts its server down when the engine dies, but first waits for ever for calls that it will never answer.
    """
    while alarms.now is None:
        if engine.is_dead():  # vLLM has no event for it
            alarms.died(killed=engine.was_killed())
        else:
            with suppress(TimeoutError):
                await asyncio.wait_for(alarms.raised.wait(), ENGINE_CHECK_S)
    if not engine.is_dead():
        with suppress(TimeoutError):  # where no gateway listens, the engine ends all the same
            await asyncio.wait_for(alarms.heard.wait(), UNHEARD_S)
    await asyncio.sleep(LAST_WORDS_S)  # running streams get their error event
    os._exit(1)


async def _unload_idle(residency: Residency, idle_s: float) -> None:
    while True:
        await asyncio.sleep(min(idle_s / 4, IDLE_LOOK_S))
        await residency.unload_idle(idle_s)


def _facts(settings: AgentSettings, base: BaseModel, engine: Engine) -> dict[str, object]:
    import vllm
    from vllm.platforms import current_platform

    return {
        "generation": uuid4().hex,
        "base_model": {"name": base.name, "fingerprint": base.fingerprint},
        "engine": {
            "version": vllm.__version__,
            "device": "cpu" if current_platform.is_cpu() else "cuda",
            "max_loras": settings.tenant_slots,
            "max_cpu_loras": settings.host_adapters,
            "max_lora_rank": settings.max_lora_rank,
            "max_model_len": engine.context_length,
            "vocab_size": engine.vocabulary,
            "max_num_seqs": engine.concurrency,
        },
    }
