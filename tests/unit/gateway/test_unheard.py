"""Asking a replica for the use of requests that were cut: who asks is told once, whatever the replica does."""

import asyncio
from collections.abc import Callable, Sequence

import msgspec
import pytest

from gateway.replicas.client import AgentRefusedError, ReplicaClient, RequestUse, UsageReport
from gateway.replicas.unheard import Unheard
from gateway.replicas.upstream import UpstreamError
from gateway.tokens import PromptDetails, Usage
from tests.waiting import until


class Replica(ReplicaClient):
    """Says what it is told to, call by call, and nothing any more after that."""

    def __init__(self, *answers: UsageReport | Exception) -> None:
        super().__init__("http://127.0.0.1:1", "")
        self.answers = list(answers)
        self.asked: list[list[str]] = []

    async def used(self, request_ids: Sequence[str], timeout_s: float) -> UsageReport:
        self.asked.append(list(request_ids))
        if not self.answers:
            await asyncio.sleep(3_600)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Told:
    def __init__(self) -> None:
        self.by_name: dict[str, list[Usage | None]] = {}

    def of(self, name: str) -> Callable[[Usage | None], None]:
        return lambda usage: self.by_name.setdefault(name, []).append(usage)


USE = RequestUse(prompt_tokens=3, cached_tokens=1, completion_tokens=17)
USAGE = Usage(3, 17, PromptDetails(1))


async def test_those_who_come_together_are_one_call() -> None:
    """Who still runs is asked for again; what the replica does not know there is no count of."""
    replica = Replica(UsageReport({"a": USE}, {"b"}), UsageReport({"b": USE}, set()))
    unheard, told = Unheard(replica), Told()
    for name in "abc":
        unheard.ask(name, told.of(name))
    await until(lambda: len(told.by_name) == 3)
    assert told.by_name == {"a": [USAGE], "b": [USAGE], "c": [None]}
    assert replica.asked == [["a", "b", "c"], ["b"]]
    unheard.close()


@pytest.mark.parametrize(
    "failure", [AgentRefusedError(404, "unknown"), msgspec.ValidationError("no usage"), RuntimeError("ours")]
)
async def test_a_replica_that_cannot_say_is_not_asked_again(failure: Exception) -> None:
    """An agent of another version; a fault of ours holds nobody up either, and the next one is asked for."""
    replica = Replica(failure, UsageReport({"b": USE}, set()))
    unheard, told = Unheard(replica), Told()
    unheard.ask("a", told.of("a"))
    await until(lambda: bool(told.by_name))
    unheard.ask("b", told.of("b"))
    await until(lambda: len(told.by_name) == 2)
    assert told.by_name == {"a": [None], "b": [USAGE]}
    unheard.close()


async def test_a_replica_that_is_away_is_asked_again_for_a_moment() -> None:
    """Then there is no count."""
    away = UpstreamError("away", answered=False)
    replica = Replica(away, UsageReport({"a": USE}, {"b"}), *[away] * 100)
    unheard, told = Unheard(replica, wait_s=0.3), Told()
    unheard.ask("a", told.of("a"))
    unheard.ask("b", told.of("b"))
    await until(lambda: len(told.by_name) == 2)
    assert told.by_name == {"a": [USAGE], "b": [None]}
    assert len(replica.asked) > 2
    unheard.close()


async def test_the_end_leaves_nobody_waiting() -> None:
    """Who waits is told at once, and who comes after."""
    replica = Replica()
    unheard, told = Unheard(replica), Told()
    unheard.ask("a", told.of("a"))
    await until(lambda: bool(replica.asked))
    unheard.ask("b", told.of("b"))
    unheard.close()
    unheard.ask("c", told.of("c"))
    assert told.by_name == {"a": [None], "b": [None], "c": [None]}
    await asyncio.sleep(0)
    assert told.by_name == {"a": [None], "b": [None], "c": [None]}
