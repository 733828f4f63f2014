"""Generation requests: the hot path, in front of FastAPI, whatever dialect they come in.

`STEPS` reads top to bottom: who, what, may they, which version, where, relay, settle. A request goes from step to step
without a task; a step that must wait for something (a body, a turn, a load, a second try) gives what it waits for. The
last step, `_settle`, gives back what the request holds and counts it, once, however it ends. No database, no framework
and no span stands on that path, and no chunk wakes a task: `_Pipe` moves them from the replica's connection to the
client's.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from adapter_store.aliases import Split
from adapter_store.catalog import Version
from adapter_store.errors import StorageError
from adapter_store.ids import TenantId
from gateway.api_key import ApiKey
from gateway.auth import Auth
from gateway.batches import PARKED, Batches, Parked, Wait
from gateway.body_room import BodyRoom
from gateway.dialects import Checked, Dialect, Stream
from gateway.dialects.dialect import BYTES_PER_TOKEN
from gateway.errors import (
    AdapterNotLoadable,
    BodyTooLarge,
    GatewayError,
    KeyInvalid,
    ReplicaFailed,
    ReplicaUnavailable,
    RequestInvalid,
    ScopeMissing,
)
from gateway.journal import Journal, Meter
from gateway.limits import Admission, Limits
from gateway.logs import ids
from gateway.models import Models
from gateway.plans import Plan
from gateway.protocol import ClientGone, Exchange
from gateway.relay import BROKE_OFF, BrokenOff, ErrorEvent
from gateway.replicas.holdings import Resident
from gateway.replicas.pool import Place, ReplicaPool
from gateway.replicas.replica import Replica
from gateway.replicas.upstream import Connection, OutOfDescriptorsError, UpstreamError
from gateway.request_ids import SAFE_ID, new_id
from gateway.rollouts import RolloutWatch
from gateway.telemetry.counting import GenerationCounts
from gateway.telemetry.observation import Observation
from gateway.telemetry.tracing import Trace, Tracing
from gateway.tenants import Scope as KeyScope
from gateway.tokens import Usage

log = logging.getLogger("tailor.generation")
LOOK_S: Final = 0.25
KEY_LOOK_S: Final = 1.0
KEY_LOOKS: Final = 2
"""After a change: a key that was being read from the database meanwhile may be taken in after the first."""
HEAR_OUT_S: Final = 2.0
SLOW_READER_S: Final = 60.0
"""How long a client may keep an answer waiting, all its pauses together: it holds a place in an engine meanwhile."""
CLIENT_GONE: Final = 499
FULL: Final = 503
JSON: Final = b"content-type: application/json\r\n"
EVENTS: Final = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
WHOLE_LIMIT_BYTES: Final = 64 << 20


class Patience:
    """Ends requests whose engine has not answered in time; one look at all of them costs less than a timer each."""

    def __init__(self) -> None:
        self.running: set[_Request] = set()

    async def watch(self) -> None:
        """For ever; meant to run as one task."""
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            for request in [request for request in self.running if 0.0 < request.deadline < now]:
                request.expire()


class KeyWatch:
    """Ends requests whose key is over: revoked or expired since they began, or its tenant suspended.

    A look at all of them once a second, and only where some key or tenant has changed, or the request's own key
    expires: on its way no request is asked about.
    """

    def __init__(self, auth: Auth, running: "set[_Request]") -> None:
        self._auth = auth
        self._running = running
        self._changes = auth.changes
        self._looks = 0

    async def watch(self) -> None:
        """For ever; meant to run as one task."""
        while True:
            await asyncio.sleep(KEY_LOOK_S)
            try:
                await self._look()
            except Exception:  # the watch must outlive any one look
                log.exception("running requests could not be held to their keys")

    async def _look(self) -> None:
        if self._auth.changes != self._changes:
            self._changes = self._auth.changes
            self._looks = KEY_LOOKS
        now = time.time()
        doubtful: dict[ApiKey, list[_Request]] = {}
        for request in self._running:
            if request.tenant_id and (self._looks or request.key.has_expired(now)):
                doubtful.setdefault(request.key, []).append(request)
        answers = await asyncio.gather(*[self._ask(requests) for requests in doubtful.values()])
        if self._looks and all(answers):
            self._looks -= 1

    async def _ask(self, requests: "list[_Request]") -> bool:
        """About the key that all of them have; False: nobody knows just now."""
        try:
            key = await self._auth.caller(_authorization(requests[0]), KeyScope.INFERENCE)
        except (KeyInvalid, ScopeMissing) as error:
            for request in requests:
                request.dismiss(error)
        except StorageError as error:
            log.warning("running requests are not held to their key just now: %s", type(error).__name__)
            return False
        else:
            for request in requests:
                request.key = key
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What every generation endpoint works with."""

    auth: Auth
    models: Models
    limits: Limits
    pool: ReplicaPool
    journal: Journal
    counts: GenerationCounts
    body_room: BodyRoom
    tracing: Tracing
    rollouts: RolloutWatch
    patience: Patience
    batches: "Batches[_Request]"
    salt_of: Callable[[str], str]
    base_fingerprint: str


class _Request:
    """What one request has found out and holds so far."""

    __slots__ = (
        "_task", "admission", "asked", "at_work", "body", "connection", "cost", "deadline", "due", "ended", "engine_id",
        "exchange", "expired", "fallback", "forgotten", "generation", "id", "key", "meter", "pipe", "place", "plan",
        "position", "seen", "tenant_id", "trace", "trace_lines", "tried", "usage", "version", "wire",
    )  # fmt: skip

    def __init__(self, generation: "Generation", exchange: Exchange, route: str) -> None:
        self.generation = generation
        self.exchange = exchange
        given = exchange.header(b"x-request-id")
        self.id = given if given is not None and SAFE_ID.fullmatch(given) else new_id()
        self.seen = Observation(route, exchange.began_at)
        self.position = 0
        self.due = False
        self.ended = False
        self.expired: GatewayError | None = None
        self.deadline = 0.0
        self.trace: Trace | None = None
        self.trace_lines = b""
        self.tenant_id = TenantId("")
        self.plan: Plan
        self.key: ApiKey
        self.body = b""
        self.asked: Checked
        self.cost = 0
        self.version: Version | None = None
        self.fallback = b""
        self.admission: Admission | None = None
        self.tried: list[Replica] = []
        self.forgotten = False
        self.place: Place | None = None
        self.wire = b""
        self.engine_id = b""
        self.meter: Meter | None = None
        self.connection: Connection | None = None
        self.at_work = False
        self.pipe: _Pipe | None = None
        self.usage: Usage | None = None
        self._task: asyncio.Task[None] | None = None

    # as a journey through the steps

    def wait_for(self, wait: Wait) -> None:
        """As in `Journey`."""
        task = self._task = asyncio.get_running_loop().create_task(self._wait(wait))
        task.add_done_callback(lambda done: self._note_unbegun(done, wait))

    def _note_unbegun(self, task: "asyncio.Task[None]", wait: Wait) -> None:
        """A task that is cancelled before its first step runs none of `_wait`."""
        if self._task is task:
            self._task = None
            wait.close()
            self.fail(self._why_cancelled())

    async def _wait(self, wait: Wait) -> None:
        # no local may hold an error: its traceback refers to this frame
        try:
            await wait
        except asyncio.CancelledError:
            self._task = None
            self.fail(self._why_cancelled())
        except Exception as error:  # noqa: BLE001  the edge: whatever it is, the client gets one envelope
            self._task = None
            self.fail(error)
        else:
            self._task = None
            if not self.ended:
                self.generation.batches.go_on([self], self.position)

    def _why_cancelled(self) -> Exception:
        return self.expired if self.expired is not None else ClientGone()

    def fail(self, error: Exception) -> None:
        """Tell the client, and settle."""
        if not self.ended:
            self.generation.fail(self, error)

    def heard(self) -> None:
        """The replica's connection has something new."""
        self.generation.batches.add(self)

    # as who is served

    def leave(self) -> None:
        """The client has gone: nothing more is done for it, but an engine that works for it is heard out."""
        if self.ended:
            return
        if self.pipe is not None:
            self.pipe.leave()
        elif self.at_work and self.generation.hear_out_s:  # only the whole answer says what it took
            self.deadline = time.monotonic() + self.generation.hear_out_s
        else:
            self._end(ClientGone())

    def stop(self, reason: GatewayError) -> None:
        """It has taken too long, or may go on no longer."""
        self.expired = reason
        self._end(reason)

    def dismiss(self, reason: GatewayError) -> None:
        """Its key is over. A whole answer that is on its way arrives, and who has left needs not be told."""
        if not self.ended and not self.exchange.disconnected and (self.exchange.streams or not self.exchange.begun):
            self.stop(reason)

    def cancel(self, msg: object = None) -> None:
        """The process ends now; called as a task's would be: what it leads to happens later."""
        asyncio.get_running_loop().call_soon(self._end, ClientGone())

    def _end(self, error: Exception) -> None:
        """Fail, now or as soon as the task that is at work for it has given back what it holds."""
        if self._task is not None:
            self._task.cancel()
        else:
            self.fail(error)

    def expire(self) -> None:
        """Its time is over: for the first byte of an answer, or for hearing an engine out whose client has left."""
        self.deadline = 0.0
        if self.pipe is not None:
            self.pipe.expire()
        elif self.exchange.disconnected:
            self._end(ClientGone())
        else:
            self.stop(_late())


class Generation:
    """One endpoint; the hot path of its dialect."""

    def __init__(
        self,
        dialect: Dialect,
        services: Services,
        *,
        max_body_bytes: int,
        first_byte_timeout_s: float,
        hear_out_s: float,
    ) -> None:
        self.max_body_bytes = max_body_bytes
        self.hear_out_s = hear_out_s
        self._dialect = dialect
        self._asks = b"POST " + dialect.upstream_path.encode()
        self._first_byte_timeout_s = first_byte_timeout_s
        self._services = services
        self._auth = services.auth
        self._models = services.models
        self._limits = services.limits
        self._journal = services.journal
        self._counts = services.counts
        self._body_room = services.body_room
        self._base_receipt = _receipt_of("-", b"base", services.base_fingerprint)
        self._pool = services.pool
        self._running = services.patience.running
        self.batches = services.batches

    def begin(self, exchange: Exchange) -> _Request:
        """Take a request up; whatever happens, the client gets one envelope and what was held is given back."""
        request = _Request(self, exchange, self._dialect.path)
        self._running.add(request)
        self.batches.add(request)
        return request

    # who, what, may they

    def _know_sender(self, request: _Request) -> Wait | None:
        header = request.exchange.header
        request.trace, request.trace_lines = self._services.tracing.begin(
            header(b"traceparent"), header(b"tracestate"), counts=not self._dialect.generates
        )
        key = self._auth.known(_authorization(request))
        if key is None:
            return self._ask_for_sender(request)
        self._take_in(request, key)
        return None

    async def _ask_for_sender(self, request: _Request) -> None:
        self._take_in(request, await self._auth.live_key(_authorization(request)))

    @staticmethod
    def _take_in(request: _Request, key: ApiKey) -> None:
        if KeyScope.INFERENCE not in key.scopes:
            raise ScopeMissing(f"This key may not be used here: it lacks the scope '{KeyScope.INFERENCE}'.")
        standing = key.tenant
        tenant_id = standing.id
        if tenant_id is None:
            raise ScopeMissing("An operator's key stands for no tenant: use a key of the tenant.")
        request.tenant_id = tenant_id
        request.plan = standing.plan
        request.key = key

    def _read_body(self, request: _Request) -> Wait | None:
        if request.exchange.more_body:
            return self._receive(request)
        request.body = request.exchange.whole_body(self._most_bytes(request))
        return None

    async def _receive(self, request: _Request) -> None:
        """A body that came slowly: the sender is asked for again, for the key may be over by now."""
        exchange, tenant_id, most = request.exchange, request.tenant_id, self._most_bytes(request)
        size = min(exchange.declared_bytes, most)
        await self._body_room.enter(tenant_id, size)
        try:
            request.body = await exchange.receive(most)
        finally:
            self._body_room.leave(tenant_id, size)
        await self._ask_for_sender(request)

    def _most_bytes(self, request: _Request) -> int:
        most = request.plan.max_prompt_bytes
        return self.max_body_bytes if most is None else min(most, self.max_body_bytes)

    def _check(self, request: _Request) -> None:
        tokens = len(request.body) // BYTES_PER_TOKEN + 1 if self._dialect.generates else 0
        self._limits.hold_off(request.tenant_id, request.plan, tokens)
        asked = request.asked = self._dialect.check(request.body)
        request.body = b""
        self._hold_to_plan(request, asked, request.plan)

    def _admit(self, request: _Request) -> Wait | None:
        request.admission = self._limits.admit_now(request.tenant_id, request.plan, request.cost)
        return self._ask_for_admission(request) if request.admission is None else None

    async def _ask_for_admission(self, request: _Request) -> None:
        request.admission = await self._limits.admit(request.tenant_id, request.plan, request.cost)

    def _hold_to_plan(self, request: _Request, asked: Checked, plan: Plan) -> None:
        """What one request may be on the plan, and what it is counted as until the engine says what it used."""
        if plan.max_prompt_bytes is not None and asked.prompt_bytes > plan.max_prompt_bytes:
            raise BodyTooLarge(f"The request is larger than the {plan.max_prompt_bytes} bytes that your plan allows.")
        if not self._dialect.generates:
            return
        asked.limit_output(plan.max_output_tokens)
        prompt_tokens = asked.prompt_tokens
        if plan.tokens_per_minute is not None and not asked.own_length:  # an unset length never asks for the impossible
            asked.limit_output(max(1, (plan.tokens_per_minute - prompt_tokens) // asked.choices))
        request.cost = prompt_tokens + asked.max_tokens

    def _find_version(self, request: _Request) -> Wait | None:
        """The version that is meant; None for the base model."""
        models, model = self._models, request.asked.model
        if model == models.base_name:
            return None
        found = models.known(request.tenant_id, model)
        if found is None:
            return self._ask_for_version(request, model)
        request.version = found.pick(request.asked.common()) if isinstance(found, Split) else found
        return None

    async def _ask_for_version(self, request: _Request, model: str) -> None:
        found = await self._models.resolve(request.tenant_id, model)
        request.version = found.pick(request.asked.common()) if isinstance(found, Split) else found

    # where

    def _place(self, request: _Request) -> Wait | None:
        """A place in a replica that has the version, or in one that has who stands in for it."""
        request.deadline = time.monotonic() + self._first_byte_timeout_s
        if not self._dialect.generates:
            return self._ask_tokenizer(request)
        request.seen.placing_at = time.monotonic()
        request.place = self._pool.place_now(
            request.version, request.tenant_id, request.plan, cost=request.cost, choices=request.asked.choices
        )
        return self._wait_for_place_or_stand_in(request) if request.place is None else None

    async def _wait_for_place(self, request: _Request) -> None:
        request.place = await self._pool.place(
            request.version,
            request.tenant_id,
            request.plan,
            cost=request.cost,
            choices=request.asked.choices,
            tried=request.tried,
            seen=request.seen,
        )
        await self._ask_for_sender(request)  # the key may be over by now

    async def _wait_for_place_or_stand_in(self, request: _Request) -> None:
        version = request.version
        try:
            await self._wait_for_place(request)
        except AdapterNotLoadable:
            if version is None or not self._has_stand_in(request, version):
                raise
            await self._stand_in(request, version)
            await self._wait_for_place(request)

    @staticmethod
    def _has_stand_in(request: _Request, version: Version) -> bool:
        """Whether another may answer in the version's place: one is declared, and has not been asked yet."""
        return version.fallback != "fail" and not request.fallback

    async def _stand_in(self, request: _Request, version: Version) -> None:
        """The alias's declared fallback takes the version's place, and the answer says so."""
        previous = await self._models.previous(version) if version.fallback == "previous" else None
        if previous is None and version.fallback == "previous":
            raise ReplicaUnavailable(
                "The adapter cannot be loaded, and there is no version before it.", retry_after_s=5
            )
        if version.rollout is not None:
            self._services.rollouts.note(version, failed=True)
        request.version = previous
        request.meter = None
        request.forgotten = False
        request.fallback = b"x-tailor-fallback: %b\r\n" % version.fallback.encode()

    def _send(self, request: _Request) -> Wait | Parked | None:
        place = request.place
        if request.connection is not None or place is None:
            return None  # the tokenizer has answered
        self._write_out(request, place)
        connection = place.replica.client.upstream.take()
        if connection is None:
            return self._connect_and_send(request, place)
        request.connection = connection
        connection.begin(request)
        self.batches.write(connection.transport, request.wire)
        return PARKED

    def _write_out(self, request: _Request, place: Place) -> None:
        """What the engine is to read."""
        standing = request.key.tenant
        salt = standing.salt
        if not salt:
            salt = standing.salt = self._services.salt_of(request.tenant_id)
        asked = request.asked
        if asked.scores_prompt and place.replica.null_adapter is not None:
            raise asked.prompt_scores_refused()
        if asked.highest_ids is not None:
            asked.hold_ids(place.replica.vocabulary)
        body = asked.upstream_body(
            model=place.name,
            cache_salt=salt,
            context_length=place.replica.context_length,
        )
        request.engine_id = new_id()  # never the client's: it may come twice
        lines = b"x-request-id: %b\r\nx-vllm-priority: %d\r\n%b" % (
            request.engine_id, place.priority, request.trace_lines,
        )  # fmt: skip
        request.wire = place.replica.client.upstream.written(self._asks, lines, body, place.adapter)
        request.at_work = True
        request.meter = self._meter_of(request, place.resident)
        seen = request.seen
        seen.tier, seen.replica, seen.sent_at = place.tier, place.replica.id, time.monotonic()

    def _meter_of(self, request: _Request, resident: Resident | None) -> Meter:
        """Where the request is counted; a resident keeps that of the version and tenant it was last used by."""
        version = request.version
        name, number = ("", 0) if version is None else (version.adapter_name, version.number)
        if resident is None or resident.version is not version:
            return self._journal.meter_of(request.tenant_id, name, number)
        meter = resident.meter
        if meter is None or meter.tenant != request.tenant_id:  # who asks need not be whose it is
            meter = resident.meter = self._journal.meter_of(request.tenant_id, name, number)
        return meter

    async def _connect_and_send(self, request: _Request, place: Place) -> None:
        try:
            request.connection = await place.replica.client.upstream.send(request.wire)
        except UpstreamError as error:
            await self._send_elsewhere(request, place, error)

    def _hear(self, request: _Request) -> Wait | Parked | None:
        """The answer's head."""
        connection = request.connection
        assert connection is not None
        if connection.status == 200 or not request.at_work:  # the tokenizer's has been waited for, whatever it says
            return None
        if not connection.status and not connection.closed:
            request.position -= 1  # half a head
            return PARKED
        connection.stop_listening()
        return self._judge(request, connection) if connection.status else self._send_again(request, connection)

    async def _send_again(self, request: _Request, connection: Connection) -> None:
        """The connection broke before the head."""
        place = request.place
        assert place is not None
        request.connection = None
        upstream = place.replica.client.upstream
        try:
            if request.exchange.disconnected:
                upstream.release(connection)
                self._give_back(request, 0)
                raise ClientGone
            if connection.answered:
                upstream.release(connection)
                raise UpstreamError("the replica closed the connection", answered=True)
            request.connection = await upstream.send_again(connection, request.wire)
        except UpstreamError as error:
            await self._send_elsewhere(request, place, error)
        else:
            await self._judge(request, request.connection)

    async def _judge(self, request: _Request, connection: Connection) -> None:
        """A status other than 200 may be another replica's chance."""
        if not self._is_final(request, connection):
            await self._place_and_send(request)

    async def _send_elsewhere(self, request: _Request, place: Place, error: UpstreamError) -> None:
        """A second replica is asked, once, if the first is gone before its first byte."""
        self._lost(request, place, error, request.seen.sent_at)
        await self._place_and_send(request)

    async def _place_and_send(self, request: _Request) -> None:
        """Until an answer's head has come that is to be passed on."""
        request.forgotten = request.forgotten and request.pipe is None
        while True:
            if request.exchange.disconnected:
                raise ClientGone
            await self._wait_for_place_or_stand_in(request)
            place = request.place
            assert place is not None
            self._write_out(request, place)
            try:
                request.connection = await place.replica.client.upstream.send(request.wire)
            except UpstreamError as error:
                self._lost(request, place, error, request.seen.sent_at)
                continue
            version = request.version
            try:
                if self._is_final(request, request.connection):
                    request.position = RELAY
                    return
            except AdapterNotLoadable:
                if version is None or not self._has_stand_in(request, version):
                    raise
                await self._stand_in(request, version)

    def _is_final(self, request: _Request, connection: Connection) -> bool:
        """Whether this is the answer; False: connection and place are given back, and another is to be asked.

        Raises:
            AdapterNotLoadable: engines have said twice that they do not hold the adapter.
            ReplicaUnavailable: the same, of the base model.
        """
        place = request.place
        assert place is not None
        if connection.status == 404:
            place.forget_adapter()
            self._give_back(request, 0)
            if request.forgotten:
                if request.version is None:
                    raise ReplicaUnavailable("The engine cannot answer just now; try again shortly.", retry_after_s=1)
                raise AdapterNotLoadable("The adapter waits for a free place; try again shortly.", retry_after_s=1)
            request.forgotten = True
            return False
        return not self._asks_another(request, place, connection.status)

    def _asks_another(self, request: _Request, place: Place, status: int) -> bool:
        """Whether a second replica is to be asked, as the first has failed; its connection and place are given back."""
        if status < 500 or request.tried or not self._pool.has_other(place.replica) or not self._pool.retry_allowed():
            return False
        if status != FULL:
            place.replica.failed(request.tenant_id)
        request.tried.append(place.replica)
        self._give_back(request, 0)
        return True

    async def _ask_tokenizer(self, request: _Request) -> None:
        """Counting waits its turn like the base model's requests do; any replica's tokenizer does, under its name."""
        while True:
            place = request.place = await self._pool.place(
                None, request.tenant_id, request.plan, cost=request.asked.prompt_tokens, tried=request.tried
            )
            if place.queue_s:
                await self._ask_for_sender(request)
            client, asked_at = place.replica.client, time.monotonic()
            body = request.asked.upstream_body(model=place.replica.base_name, cache_salt="", context_length=1)
            try:
                connection = request.connection = await client.upstream.send(
                    client.generation_request(self._dialect.upstream_path, None, request.trace_lines, body)
                )
            except UpstreamError as error:
                self._lost(request, place, error, asked_at)
                continue
            if not self._asks_another(request, place, connection.status):
                return

    def _lost(self, request: _Request, place: Place, error: UpstreamError, sent_at: float) -> None:
        """The replica is gone, or this process is at its end; another is to be asked.

        Raises:
            ReplicaUnavailable: no other may be asked.
        """
        if not isinstance(error, OutOfDescriptorsError):
            place.replica.suspect()
        self._give_back(request, 0)
        if error.answered or request.tried or not self._pool.retry_allowed(place.replica, sent_at):
            raise ReplicaUnavailable(
                "The engine went away before it answered; try again shortly.", retry_after_s=5
            ) from error
        request.tried.append(place.replica)

    # relay

    def _relay(self, request: _Request) -> Wait | Parked | None:
        connection = request.connection
        assert connection is not None
        request.wire = b""  # nobody is asked again from here on
        if connection.status != 200:
            connection.stop_listening()
            return self._tell_refusal(request, connection)
        if request.asked.stream:
            self._pipe(request, connection)
            return PARKED
        body = connection.take_whole(WHOLE_LIMIT_BYTES)
        if body is None:
            if connection.closed or connection.holds_back:
                connection.stop_listening()
                return self._read_rest(request, connection)
            connection.listen(request)
            request.position = RELAY  # the rest comes soon
            return PARKED
        request.body = body
        return None

    async def _read_rest(self, request: _Request, connection: Connection) -> None:
        """A whole answer that came in several pieces."""
        place = request.place
        assert place is not None
        try:
            request.body = await connection.read_all(WHOLE_LIMIT_BYTES)
        except UpstreamError as error:
            place.replica.failed(request.tenant_id)
            raise ReplicaFailed(BROKE_OFF) from error

    def _pipe(self, request: _Request, connection: Connection) -> None:
        place = request.place
        assert place is not None
        stream = self._dialect.stream(place.name, request.asked)
        pipe = request.pipe = _Pipe(request, connection, stream, self._head(request, EVENTS))
        pipe.begin()
        if request.exchange.disconnected:
            pipe.leave()

    def _answer(self, request: _Request) -> Wait | None:
        """Tell the client what the engine has answered, or the stream's end."""
        if request.pipe is not None:
            return self._end_stream(request, request.pipe)
        place = request.place
        assert place is not None
        told, usage = self._dialect.whole(place.name, request.asked, request.body)
        self._succeeded(request, place)
        request.usage = usage
        head = self._head(request, JSON)
        self._give_back(request, usage.tokens)  # the engine is done
        if request.exchange.disconnected:
            raise ClientGone
        request.seen.status = 200
        wait = request.exchange.answer(200, head, told)
        if wait is not None:
            request.deadline = time.monotonic() + SLOW_READER_S
        return wait

    def _succeeded(self, request: _Request, place: Place) -> None:
        place.replica.succeeded()
        for replica in request.tried:
            replica.answered_elsewhere()

    def _end_stream(self, request: _Request, pipe: "_Pipe") -> Wait | None:
        """A stream that breaks off before its client has heard anything is asked for once more, elsewhere."""
        place = request.place
        assert place is not None
        request.usage = pipe.usage
        error = pipe.error
        if error is None:
            self._succeeded(request, place)
            request.seen.status = 200
            request.exchange.end()
            return None
        if isinstance(error, ErrorEvent) and not request.exchange.begun:
            error = self._dialect.refusal_in_stream(error.body, request.asked) or error
        if isinstance(error, RequestInvalid):
            request.at_work = False
        elif isinstance(error, ReplicaFailed | ReplicaUnavailable):
            place.replica.failed(request.tenant_id)
        if request.exchange.disconnected:
            raise ClientGone
        if (
            not isinstance(error, ReplicaFailed)
            or request.exchange.begun
            or request.tried
            or not self._pool.has_other(place.replica)
        ):
            raise error
        return self._stream_elsewhere(request, place, error)

    async def _stream_elsewhere(self, request: _Request, place: Place, error: ReplicaFailed) -> None:
        """An engine's server that still listens has failed on this stream; one that does not has gone."""
        replica, sent_at = place.replica, request.seen.sent_at
        if replica.died_at < sent_at and await replica.client.upstream.refuses():
            replica.suspect()
        if not self._pool.retry_allowed(replica, sent_at):
            raise error
        request.tried.append(replica)
        request.pipe = None
        self._give_back(request, 0)
        request.position = RELAY
        await self._place_and_send(request)

    async def _tell_refusal(self, request: _Request, connection: Connection) -> None:
        raise await self._refused(request, connection)

    async def _refused(self, request: _Request, connection: Connection) -> GatewayError:
        status = connection.status
        request.at_work = False
        replica = request.place.replica if request.place else None
        if status in (429, FULL):
            return ReplicaUnavailable("The engine is full just now; try again shortly.", retry_after_s=1)
        if status >= 500:  # this request's fault or the engine's end: the next look at the replica tells
            if replica is not None:
                replica.failed(request.tenant_id)
            return ReplicaUnavailable("The engine failed on this request; try again shortly.", retry_after_s=5)
        try:
            body = await connection.read_all()
        except UpstreamError:
            return ReplicaFailed(BROKE_OFF)
        # the engine's text may quote the prompt: it is neither logged nor passed on
        log.warning("the engine answered %d to request %s", status, request.id.decode(), extra=_ids(request))
        return self._dialect.refusal(status, body, request.asked)

    def _head(self, request: _Request, kind: bytes) -> bytes:
        """The answer's header lines, receipts among them."""
        place = request.place
        limits = request.admission.headers if request.admission is not None else b""
        seen = request.seen
        if place is None or not seen.tier:  # no engine was asked, or its tokenizer alone
            return b"%bx-request-id: %b\r\n%b" % (kind, request.id, limits)
        return (
            b"%bx-request-id: %b\r\n%bx-tailor-replica: %b\r\n"
            b'server-timing: queue;dur=%.3f, load;dur=%.3f, adapter;desc="%b"\r\n%b%b'
        ) % (
            kind, request.id, self._receipt(place.resident, request.version), seen.replica.encode(),
            seen.queue_s * 1_000, seen.load_s * 1_000, seen.tier.encode(), request.fallback, limits,
        )  # fmt: skip

    def _receipt(self, resident: Resident | None, version: Version | None) -> bytes:
        """Which version answers, as header lines; a resident keeps those of the version it was last used by."""
        if version is None:
            return self._base_receipt
        if resident is None or resident.version is not version:
            return _receipt_of(version.adapter_name, b"%d" % version.number, version.digest)
        if not resident.receipt:
            resident.receipt = _receipt_of(version.adapter_name, b"%d" % version.number, version.digest)
        return resident.receipt

    # the end

    def fail(self, request: _Request, error: Exception) -> None:
        """Tell the client what went wrong, and settle."""
        if request.pipe is not None:
            request.usage = request.pipe.abandon()
        request.seen.status = CLIENT_GONE
        try:
            if not isinstance(error, ClientGone):
                self._tell(request, error)
        except Exception:  # the edge: what was held is given back whatever happens
            log.exception("request %s: its client could not be told of %r", request.id.decode(), error)
        finally:
            self._settle(request)

    def _tell(self, request: _Request, error: Exception) -> None:
        exchange = request.exchange
        told = self._dialect.error(error, request.id.decode())
        request.seen.status = told.status
        if told.status == 500:
            log.error("request %s failed", request.id.decode(), exc_info=error, extra=_ids(request))
        if exchange.streams:
            exchange.write(self._dialect.error_event(error, request.id.decode()))
            exchange.end()
        if exchange.begun:  # half of a whole answer is cut off with its connection
            return
        lines = b"".join([b"%b: %b\r\n" % line for line in told.headers if line[0] != b"content-length"])
        exchange.answer_shortly(told.status, self._head(request, lines), told.body)

    def _give_back(self, request: _Request, tokens: int | None) -> None:
        """Connection and place; whoever goes on may take others."""
        request.at_work = False
        if request.connection is not None:
            request.connection.upstream.release(request.connection)
            request.connection = None
        if request.place is not None:
            request.place.release(tokens)
            request.place = None

    def _settle(self, request: _Request) -> None:
        """The last step of every request, whatever it came to."""
        if request.ended:
            return
        request.ended = True
        self._running.discard(request)
        try:
            self._account(request)
        except Exception:  # the edge: neither the client's connection nor the other requests may suffer from it
            log.exception("request %s could not be accounted for", request.id.decode())
        finally:
            request.pipe = None
            request.exchange.over()

    def _account(self, request: _Request) -> None:
        """Give back what the request holds, and count it; later, where its engine has yet to say what it used."""
        seen, usage, version, place = request.seen, request.usage, request.version, request.place
        seen.ended = time.monotonic()
        if request.pipe is not None:
            seen.streamed, seen.first_at = True, request.pipe.first_at
        is_known = is_counted = True
        if usage is not None:
            seen.take_usage(usage)
            is_counted = request.pipe is None or request.pipe.is_counted
        elif request.at_work:
            is_known = request.exchange.disconnected and seen.status == CLIENT_GONE
            is_counted = seen.status >= 500  # nothing, where the engine failed; else it was stopped
            if is_known:
                self._count_unheard(request)
        used = seen.prompt_tokens + seen.completion_tokens
        self._give_back(request, used if is_known else None)  # an engine that failed has worked for the tenant
        if version is not None and version.rollout is not None and seen.placing_at:
            self._note_for_rollout(request, version)
        if is_counted or place is None:
            self._count(request)
        else:
            if request.admission is not None:
                request.admission.release()
            place.replica.unheard.ask(request.engine_id.decode(), lambda told: self._count_told(request, told))

    def _count_told(self, request: _Request, usage: Usage | None) -> None:
        """Count it as its engine does; None: as it is estimated."""
        try:
            if usage is not None:
                request.seen.take_usage(usage)
            self._count(request)
        except Exception:  # the edge: other requests may not suffer from it
            log.exception("request %s could not be accounted for", request.id.decode())

    def _count(self, request: _Request) -> None:
        """In limits, ledger, metrics and trace."""
        seen, version = request.seen, request.version
        if request.admission is not None:
            request.admission.settle(seen.prompt_tokens + seen.completion_tokens)
            if self._dialect.generates and seen.placing_at:  # what no engine was asked for is no use of it
                self._journal.record(
                    request.meter if request.meter is not None else self._meter_of(request, None),
                    failed=seen.status >= 400 and seen.status != CLIENT_GONE,
                    prompt_tokens=seen.prompt_tokens,
                    cached_tokens=seen.cached_tokens,
                    completion_tokens=seen.completion_tokens,
                )
        seen.tenant_id = request.tenant_id
        if version is not None:
            seen.adapter_id, seen.version = version.adapter_id, version.number
        self._counts.later(seen)
        if request.trace is not None:
            seen.request_id = request.id.decode()
            request.trace.finish(seen)

    @staticmethod
    def _count_unheard(request: _Request) -> None:
        """What counts, in limits and ledger alike, where a client has left and its engine was stopped unheard.

        Of a stream no token had come, so it is the prompt; of a whole answer nobody knows, so it is all that the engine
        could have given: no more than it was asked for, nor than its context holds.
        """
        seen, asked, place = request.seen, request.asked, request.place
        assert place is not None
        context = place.replica.context_length
        seen.prompt_tokens = min(asked.prompt_tokens, context - 1)
        if not asked.stream:
            seen.completion_tokens = min(asked.length, context - seen.prompt_tokens) * asked.choices

    def _note_for_rollout(self, request: _Request, version: Version) -> None:
        """A version that is being tried out: whether it answered, and how fast its engine was.

        Latency is a stream's first token, else the time per token: queue and load, which others cause, are not in it.
        """
        seen = request.seen
        if seen.status == CLIENT_GONE:
            return
        latency_s: float | None = None
        if seen.streamed:
            latency_s = seen.first_at - seen.sent_at if seen.first_at else None
        elif seen.completion_tokens:
            latency_s = (seen.ended - seen.sent_at) / seen.completion_tokens
        self._services.rollouts.note(version, failed=seen.status >= 500, latency_s=latency_s)


STEPS: Final[tuple[Callable[[Generation, _Request], Wait | Parked | None], ...]] = (
    Generation._know_sender,
    Generation._read_body,
    Generation._check,
    Generation._admit,
    Generation._find_version,
    Generation._place,
    Generation._send,
    Generation._hear,
    Generation._relay,
    Generation._answer,
    Generation._settle,
)
RELAY: Final = STEPS.index(Generation._relay)


def new_batches() -> Batches[_Request]:
    """For all generation endpoints of one event loop."""
    return Batches([_taken(step) for step in STEPS])


def _taken(step: Callable[[Generation, _Request], Wait | Parked | None]) -> Callable[[_Request], Wait | Parked | None]:
    return lambda request: step(request.generation, request)


def _authorization(request: _Request) -> bytes | None:
    header = request.exchange.header
    authorization = header(b"authorization")
    if authorization is not None:
        return authorization
    key_alone = header(b"x-api-key")  # as Anthropic's clients send it
    return None if key_alone is None else b"Bearer " + key_alone


def _receipt_of(name: str, number: bytes, digest: str) -> bytes:
    return b"x-tailor-adapter: %b\r\nx-tailor-version: %b; sha256=%b\r\n" % (name.encode(), number, digest.encode())


def _late() -> ReplicaUnavailable:
    return ReplicaUnavailable("The engine did not answer in time; try again.", retry_after_s=5)


def _ids(request: _Request) -> dict[str, str]:
    version, place = request.version, request.place
    return ids(
        request_id=request.id.decode(),
        trace_id=request.trace.id if request.trace is not None else "",
        tenant_id=request.tenant_id,
        adapter_id=version.adapter_id if version is not None else "",
        replica=place.replica.id if place is not None else "",
    )


class _Pipe:
    """An engine's stream on its way to a client: no task wakes per chunk.

    A client that reads slower than the engine writes holds the engine's connection, not a pile of bytes here. When it
    is over, `error` says how: ReplicaFailed: it broke off; ReplicaUnavailable: its first event did not come in time;
    ClientGone: nobody read to its end.
    """

    __slots__ = (
        "_connection", "_exchange", "_head", "_is_over", "_left", "_patience_s", "_paused_at", "_request",
        "_stream", "error", "first_at",
    )  # fmt: skip

    def __init__(self, request: _Request, connection: Connection, stream: Stream, head: bytes) -> None:
        self._request = request
        self._exchange = request.exchange
        self._connection = connection
        self._stream = stream
        self._head = head
        self._is_over = False
        self._left = False
        self._paused_at = 0.0
        self._patience_s = SLOW_READER_S
        self.first_at = 0.0
        self.error: Exception | None = None

    @property
    def usage(self) -> Usage | None:
        """Tokens so far."""
        return self._stream.usage

    @property
    def is_counted(self) -> bool:
        """Whether they are the engine's own count."""
        return self._stream.is_counted

    def begin(self) -> None:
        """Pass on what has come and what comes; the request goes on when it is over."""
        self._exchange.flow = self
        self._connection.pipe_to(self)

    def abandon(self) -> Usage | None:
        """Pass on nothing more; what it has used so far."""
        self._is_over = True
        self._exchange.flow = None
        return self.usage

    def _end(self, error: Exception | None) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._exchange.flow = None
        if self._left:
            error = ClientGone()
        elif error is None and not self._stream.finished:
            error = ReplicaFailed(BROKE_OFF)
        self.error = error
        self._request.heard()

    # what comes from the replica

    def feed(self, data: bytes) -> None:
        failure: Exception | None = None
        try:
            events = self._stream.feed(data)
        except Exception as error:  # noqa: BLE001  raised again in `_end_stream`, where every failure is told
            self._connection.unpipe()
            events = error.passed if isinstance(error, BrokenOff) else b""
            failure = error
        if events and not self._left:
            if self.first_at:
                self._exchange.write(events)
            else:
                self.first_at = time.monotonic()
                self._request.deadline = 0.0
                self._connection.note_output()
                self._exchange.begin(self._head, self._stream.opening + events)
                self._stream.opening = b""
        if failure is not None:
            self._end(failure)

    def end(self, error: UpstreamError | None) -> None:
        self._end(None)

    # what comes from the client

    def pause(self) -> None:
        if not self._left:
            self._paused_at = time.monotonic()
            self._request.deadline = self._paused_at + self._patience_s
            self._connection.pause()

    def resume(self) -> None:
        if self._paused_at:
            self._patience_s -= time.monotonic() - self._paused_at
            self._paused_at = 0.0
            self._request.deadline = 0.0
        self._connection.resume()

    def leave(self) -> None:
        """The client has gone: the engine stops, and is heard out for what it had counted."""
        if self._is_over:
            return
        self._left = True
        self._paused_at = 0.0
        self._request.deadline = time.monotonic() + HEAR_OUT_S
        self._connection.hang_up()

    def expire(self) -> None:
        """Nothing has come in time; who reads no further is as good as gone."""
        self._end(ClientGone() if self._paused_at else _late())
