"""F2: an engine that gives no token, behind an API server that says as much as vLLM's does, under traffic."""

import asyncio
import json
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.replicas.replica import ReplicaState
from loadtests.fake.engine import EngineModel
from loadtests.fake.replica import FakeReplica
from loadtests.fake.speech import counted
from tests.chaos.client import DIALECTS, PATHS, Answer, request
from tests.chaos.conftest import Figure, NewClient
from tests.integration.gateway.conftest import BASE, Gateway, RunGateway, RunReplica, until_ready
from tests.waiting import cancel, stalls, until

DEFAULTS = {"probe_interval_s": 1.0, "probe_deadline_s": 3.0}
EVERY_S = 0.25
COUNTS: dict[str, dict[str, Any]] = {
    "/v1/tokenize": {"prompt": "who are you?"},
    "/v1/responses/input_tokens": {"input": "who are you?"},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "who are you?"}]},
}


class SlowlyCounting(FakeReplica):
    """Its counts of tokens come in two pieces, so that one of them is on its way nearly always."""

    async def _count(
        self, path: str, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        told = json.dumps(counted(path, self.prompt_tokens(body), self.max_model_len)).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(told), told[:5]))
        await asyncio.sleep(2 * EVERY_S)
        writer.write(told[5:])


class Traffic:
    """New streams of every dialect, and counts, whatever becomes of the earlier ones."""

    def __init__(self, gateway: Gateway, key: str, new_client: NewClient) -> None:
        self._gateway = gateway
        self._key = key
        self._new_client = new_client
        self._counting = gateway.client(key)
        self._tasks: list[asyncio.Task[None]] = []
        self.answers: list[Answer] = []

    async def flow(self) -> None:
        """Until it is cancelled."""
        try:
            while True:
                for dialect in DIALECTS:
                    self._tasks.append(asyncio.create_task(self._stream(dialect)))
                for path, body in COUNTS.items():
                    self._tasks.append(asyncio.create_task(self._count(path, body)))
                await asyncio.sleep(EVERY_S)
        finally:
            await asyncio.gather(*self._tasks)

    async def _stream(self, dialect: str) -> None:
        client = self._new_client(self._gateway.url)
        self.answers.append(await client.ask(self._key, BASE, dialect=dialect, stream=True, tokens=200))
        client.leave()

    async def _count(self, path: str, body: dict[str, Any]) -> None:
        assert (await self._counting.post(path, json={"model": BASE, **body})).status_code in (200, 502, 503)


async def test_a_frozen_engine_leaves_rotation_beside_traffic_of_every_dialect(
    run_gateway: RunGateway, run_replica: RunReplica, new_client: NewClient, figure: Figure
) -> None:
    """With the settings' defaults; neither what streams open with nor counts of tokens are taken for its life.

    Streams that had begun end in an error event, the others are refused; thawed, it answers again.
    """
    engine = EngineModel(max_num_seqs=1_024)  # a full replica would be asked for nothing more
    replica = await run_replica(engine=engine)
    replica.__class__ = SlowlyCounting
    gateway = await run_gateway(replica, **DEFAULTS)
    key = (await gateway.tenant("acme")).key
    traffic = Traffic(gateway, key, new_client)
    flow = asyncio.create_task(traffic.flow())
    await until(lambda: sum(served.completion_tokens > 0 for served in replica.served) >= 2 * len(DIALECTS))
    try:
        with stalls() as stalled_s:
            engine.freeze()
            took_s = await until(lambda: state_of(gateway) is ReplicaState.UNREACHABLE, 20)
            took_s -= stalled_s()
    finally:
        await cancel(flow)
    figure(f"F2: a frozen engine beside {len(traffic.answers)} streams left rotation after {took_s:.2f} s")
    assert took_s <= 5.0
    assert {answer.ending for answer in traffic.answers} == {"error event", "refused"}
    engine.thaw()
    await until_ready(gateway)
    for dialect in DIALECTS:
        answer = await new_client(gateway.url).ask(key, BASE, dialect=dialect, stream=True, tokens=4)
        assert answer.ending == "whole"


async def test_a_busy_engine_stays_in_rotation(
    run_gateway: RunGateway, run_replica: RunReplica, new_client: NewClient
) -> None:
    """Tokens of others, in any dialect, are a sign of life where the probe's own token is late."""
    replica = await run_replica(events=120)
    replica.faults.event_delay_s = 0.02
    gateway = await run_gateway(replica, probe_deadline_s=0.3)
    key = (await gateway.tenant("acme")).key
    for dialect in DIALECTS:
        client = new_client(gateway.url)
        answer = await client.send(request(key, BASE, dialect=dialect, stream=True), dialect=dialect, stream=True)
        await client.until(answer, events=5)
        replica.faults.probe_hangs = True
        await client.until(answer)
        assert answer.ending == "whole", dialect
        await until(lambda: state_of(gateway) is ReplicaState.UNREACHABLE)
        replica.faults.probe_hangs = False
        await until_ready(gateway)


async def test_the_first_token_counts_as_such(
    run_gateway: RunGateway, run_replica: RunReplica, new_client: NewClient
) -> None:
    """What a stream opens with, before its engine has given anything, is no first token: in no dialect's metric."""
    late_s = 0.5
    engine = EngineModel()
    replica = await run_replica(engine=engine)
    gateway = await run_gateway(replica, probe_deadline_s=30.0)
    key = (await gateway.tenant("acme")).key
    engine.freeze()
    clients = {dialect: new_client(gateway.url) for dialect in DIALECTS}
    answers = [
        await client.send(request(key, BASE, dialect=dialect, stream=True, tokens=4), dialect=dialect, stream=True)
        for dialect, client in clients.items()
    ]
    await until(lambda: engine.waiting + engine.running >= len(DIALECTS))
    await asyncio.sleep(late_s)
    assert [answer.status for answer in answers] == [0] * len(DIALECTS)  # the head comes with the first token
    engine.thaw()
    for client, answer in zip(clients.values(), answers, strict=True):
        assert (await client.until(answer)).ending == "whole"
    page = (await gateway.parts.metrics.page()).decode()
    told_s = {
        sample.labels["route"]: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "tailor_time_to_first_token_seconds_sum"
    }
    assert {path: told_s[path] >= late_s for path in PATHS.values()} == dict.fromkeys(PATHS.values(), True)


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_replica_that_dies_before_its_first_token_is_replaced(
    run_gateway: RunGateway, run_replica: RunReplica, new_client: NewClient, dialect: str
) -> None:
    """Its API server had opened the stream; of that the client knows nothing, so another may give the answer."""
    engines = [EngineModel(), EngineModel()]
    replicas = [await run_replica(engine=engine) for engine in engines]
    gateway = await run_gateway(*replicas, probe_deadline_s=30.0)
    await until(lambda: set(gateway.parts.pool.states().values()) == {ReplicaState.READY})
    key = (await gateway.tenant("acme")).key
    for engine in engines:
        engine.freeze()
    client = new_client(gateway.url)
    asked = request(key, BASE, dialect=dialect, stream=True, tokens=4)
    answer = await client.send(asked, dialect=dialect, stream=True)
    await until(lambda: any(replica.served for replica in replicas))
    await asyncio.sleep(0.1)  # what it has opened with has come
    used, other = sorted(replicas, key=lambda replica: not replica.served)
    assert other.engine is not None
    other.engine.thaw()
    await used.stop()
    assert (await client.until(answer)).ending == "whole"
    assert [len(replica.served) for replica in (used, other)] == [1, 1]


def state_of(gateway: Gateway) -> ReplicaState:
    [state] = gateway.parts.pool.states().values()
    return state
