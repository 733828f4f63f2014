"""Makes at a server what a scenario needs: tenants with keys and plans, adapters, and the answers they are known by."""

import asyncio
import json
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from loadtests.api import Api, ServerRefused
from loadtests.bodies import WORDS, canary
from loadtests.cleaning import CLOSE_EACH_S, CLOSE_S, ERASE_EACH_S, ERASE_S, Cleaning
from loadtests.isolation import is_of_base
from loadtests.occurrences import occurrences, tenants_of
from loadtests.random_adapters import Base, adapter_files
from loadtests.recording import Schedule
from loadtests.scenario import ActionKind, Scenario, ScenarioInvalid
from loadtests.tenants import Adapter, Lives, Tenant, Version

AT_ONCE: Final = 4
TRIES: Final = 8
SCOPES: Final = ["inference", "adapters", "training"]
ROUTES: Final = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
EXAMPLES: Final = 64
_RETRIED: Final = (429, 502, 503)
_WAIT_S: Final = 0.25
Told = TypeVar("Told")


@dataclass(slots=True)
class Prepared:
    """What was made, and what is known of it."""

    api: Api
    operator_key: str
    base: Base
    tenants: list[Tenant]
    lives: Lives
    tokens_per_word: float
    canaries: dict[str, Any] = field(default_factory=dict)
    """The request that canaries are, without its model, and the path it goes to; none where nobody asks one."""
    base_answer: str | None = None
    host: int = 0
    """Of several: adapters of the same name are others on each, so that one for the other would be seen."""

    async def publish(self, tenant: Tenant, adapter: Adapter, *, alias: str | None = None) -> Version:
        """A new version of an adapter, whose name stands for it then; with the alias "" it does not."""
        place = tenant.adapters.index(adapter)
        seed = (tenant.place, place, adapter.seeds, self.host)
        adapter.seeds += 1
        files = await asyncio.to_thread(adapter_files, self.base, seed=seed, rank=tenant.group.rank)
        query = "" if alias is None else f"?alias={alias}"
        path = f"/v1/adapters/{adapter.name}/versions{query}"
        parts = {name: (name, content) for name, content in files.items()}
        told = await self.api.call(tenant.key, "POST", path, files=parts)
        version = Version(int(told["number"]), str(told["digest"]))
        adapter.versions.append(version)
        return version

    async def learn(self, wanted: Iterable[tuple[Tenant, Adapter, Version]]) -> None:
        """Ask each of these versions, by its number, for its answer to the canary prompt."""

        async def learn(tenant: Tenant, adapter: Adapter, version: Version) -> None:
            body = {"model": f"{adapter.name}@{version.number}", **self.canaries["body"]}
            answer, told = await _patiently(lambda: self.api.answer(tenant.key, self.canaries["path"], body))
            if version.digest in told:
                self.lives.answers[version.digest] = answer

        if self.canaries:
            await _each(learn, [one for one in wanted if one[2].digest not in self.lives.answers])

    async def learn_base(self) -> None:
        """Ask the base model, too."""
        if self.canaries and self.base_answer is None:
            body = {"model": self.base.name, **self.canaries["body"]}
            key = self.tenants[0].key
            answer, told = await _patiently(lambda: self.api.answer(key, self.canaries["path"], body))
            if is_of_base(told):
                self.base_answer = answer

    def current(self) -> list[tuple[Tenant, Adapter, Version]]:
        """Every adapter with the version that its name stands for."""
        return [(one, each, each.current) for one in self.tenants for each in one.adapters if each.current is not None]


@asynccontextmanager
async def prepared(
    scenario: Scenario,
    schedule: Schedule,
    api: Api,
    operator_key: str,
    *,
    host: int = 0,
    on_left: Callable[[Sequence[str]], None] = lambda left: None,
) -> AsyncIterator[Prepared]:
    """All that the scenario needs, until the block ends; then all of it is erased, keys revoked, tenants suspended.

    `host`: which of several this is. `on_left` is told what could not be, by name.

    Raises:
        ScenarioInvalid: its canaries go two ways. ServerRefused, ServerUnreachable: the server will not have it.
    """
    run = secrets.token_hex(4)
    canaries = _canaries(scenario)
    cleaning = _cleaning(scenario, schedule, api, operator_key, run)
    try:
        tenants = await _each(
            lambda place: _tenant(api, operator_key, run, scenario, schedule, place), range(len(schedule.tenants))
        )
        base = Base.of(await api.call(tenants[0].key, "GET", "/v1/base-model"))
        per_word = await _tokens_per_word(api, tenants[0].key, base)
        made = Prepared(api, operator_key, base, tenants, Lives(), per_word, canaries, host=host)
        await _publish_all(made)
        await _two_versions_where_flipped(made, scenario)
        await _upload_examples(made, scenario)
        if scenario.answers_learned == "before":
            await made.learn_base()
            await made.learn(made.current())
        await _put_on_plans(made, run)
        yield made
    finally:
        try:
            await cleaning.run()
        finally:
            if left := cleaning.left():
                on_left(left)


def _cleaning(scenario: Scenario, schedule: Schedule, api: Api, operator_key: str, run: str) -> Cleaning:
    adapters, tenants = len(schedule.models), len(schedule.tenants)
    return Cleaning(
        api,
        operator_key,
        [_called(run, name) for name in schedule.tenants],
        [_called(run, group.name) for group in scenario.tenants if group.plan],
        erase_s=ERASE_S + ERASE_EACH_S * adapters,
        close_s=CLOSE_S + CLOSE_EACH_S * tenants,
    )


def _called(run: str, name: str) -> str:
    """A tenant or a plan, at the server."""
    return f"loadtest-{run}-{name}"


def _canaries(scenario: Scenario) -> dict[str, Any]:
    """The canary request of the scenario's workloads."""
    asked = {load.workload for phase in scenario.phases for load in phase.load}
    ways = {
        (one.route, one.stream) for name, one in scenario.workloads.items() if name in asked and one.canary_share > 0
    }
    if not ways:
        return {}
    if len({route for route, _ in ways}) > 1:
        raise ScenarioInvalid("workloads: canaries of one scenario go one route; set canary_share: 0 for the others")
    route, stream = sorted(ways)[-1]
    body = canary(route) | ({"stream": True} if stream else {})
    return {"path": ROUTES[route], "body": body}


async def _tenant(api: Api, key: str, run: str, scenario: Scenario, schedule: Schedule, place: int) -> Tenant:
    name = schedule.tenants[place]
    group = next(one for one in scenario.tenants if one.name == schedule.groups[place])
    made = await api.call(key, "POST", "/admin/v1/tenants", {"name": _called(run, name)})
    path = f"/admin/v1/tenants/{made['id']}/keys"
    first = await api.call(key, "POST", path, {"label": f"loadtest {run}", "scopes": SCOPES})
    tenant = Tenant(place, name, group, str(made["id"]), str(first["id"]), str(first["secret"]))
    tenant.adapters = [Adapter(name, f"adapter-{number}") for number in range(group.adapters)]
    return tenant


async def _publish_all(made: Prepared) -> None:
    async def publish(tenant: Tenant, adapter: Adapter) -> None:
        adapter.current = await _patiently(lambda: made.publish(tenant, adapter))
        made.lives.begin(adapter, adapter.current, 0)

    await _each(publish, [(tenant, adapter) for tenant in made.tenants for adapter in tenant.adapters])


async def _two_versions_where_flipped(made: Prepared, scenario: Scenario) -> None:
    """A name that is to go back needs a version to go back to."""
    for tenant, adapter in {
        (one.place, each.name): (one, each)
        for kind, one, each in _acted_on(made, scenario)
        if kind is ActionKind.FLIP and len(each.versions) < 2
    }.values():
        old = adapter.current
        adapter.current = await made.publish(tenant, adapter)
        assert old is not None
        made.lives.end(adapter, old.digest, 0)
        made.lives.begin(adapter, adapter.current, 0)


def _acted_on(made: Prepared, scenario: Scenario) -> Iterable[tuple[ActionKind, Tenant, Adapter]]:
    for one in occurrences(scenario):
        tenants = tenants_of(one.action, made.tenants)
        if tenants and all(tenant.adapters for tenant in tenants):
            tenant = tenants[one.number % len(tenants)]
            yield one.action.kind, tenant, one.adapter_of(tenant, len(tenants))


async def _upload_examples(made: Prepared, scenario: Scenario) -> None:
    """What fine-tuning jobs are trained on, for those who will begin one."""
    for one in occurrences(scenario):
        if one.action.kind is ActionKind.TRAIN:
            tenants = tenants_of(one.action, made.tenants)
            tenant = tenants[one.number % len(tenants)]
            if not tenant.file:
                parts = {"purpose": (None, "fine-tune"), "file": ("train.jsonl", _examples())}
                tenant.file = str((await made.api.call(tenant.key, "POST", "/v1/files", files=parts))["id"])


def _examples() -> bytes:
    dice = random.Random(1)
    lines = [
        {"messages": [{"role": role, "content": " ".join(dice.choices(WORDS, k=6))} for role in ("user", "assistant")]}
        for _ in range(EXAMPLES)
    ]
    return "".join(f"{json.dumps(line)}\n" for line in lines).encode()


async def _tokens_per_word(api: Api, key: str, base: Base) -> float:
    text = " ".join(random.Random(1).choices(WORDS, k=256))
    told = await _patiently(lambda: api.call(key, "POST", "/v1/tokenize", {"model": base.name, "prompt": text}))
    return max(float(told["count"]) / 256, 0.1)


async def _put_on_plans(made: Prepared, run: str) -> None:
    """Last, so that making all this takes nothing from what a plan allows."""
    groups = {tenant.group.name: tenant.group for tenant in made.tenants if tenant.group.plan}
    for name, group in groups.items():
        await made.api.call(made.operator_key, "POST", "/admin/v1/plans", {"name": _called(run, name), **group.plan})
    for tenant in made.tenants:
        if tenant.group.plan:
            body = {"plan": _called(run, tenant.group.name)}
            await made.api.call(made.operator_key, "PATCH", f"/admin/v1/tenants/{tenant.id}", body)


async def off_plans(made: Prepared) -> None:
    """Everybody back on the plan `default`: what is done after the run must not be refused."""
    for tenant in made.tenants:
        if tenant.group.plan:
            await made.api.call(made.operator_key, "PATCH", f"/admin/v1/tenants/{tenant.id}", {"plan": "default"})


async def _each(work: Callable[..., Awaitable[Any]], wanted: Iterable[Any]) -> list[Any]:
    """A few at a time, results in order."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(each: Any) -> Any:
        async with places:
            return await (work(*each) if isinstance(each, tuple) else work(each))

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(each)) for each in wanted]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _patiently(call: Callable[[], Awaitable[Told]]) -> Told:
    for number in range(TRIES):
        try:
            return await call()
        except ServerRefused as error:
            if error.status not in _RETRIED or number == TRIES - 1:
                raise
        await asyncio.sleep(_WAIT_S * 2**number)
    raise AssertionError
