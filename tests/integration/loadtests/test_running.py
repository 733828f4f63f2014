"""A run as a whole: what it finds, what it leaves at the server, and what it says where there is nothing to run."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import pytest
import yaml

from loadtests import gates, metrics, results
from loadtests.api import Api
from loadtests.cleaning import Cleaning
from loadtests.fake_stack import FakeStack, fake_stack
from loadtests.folders import PREFIX, own_folder
from loadtests.recording import Outcome
from loadtests.running import Options, run
from loadtests.scenario import ActionKind, Scenario, read
from loadtests.selection import select
from loadtests.stacks import UrlTarget
from tests.integration.loadtests.chances import TRIES
from tests.integration.loadtests.tools import tool

NS: Final = 1_000_000_000


async def test_answers_of_another_adapter_are_found_on_any_server(tmp_path: Path) -> None:
    """A replica that answers one in seven with another adapter's voice turns the gate red, by the address alone;
    afterwards nothing of the load test's can be used any more."""
    scenario = read(Path("smoke"), profile="short")
    async with fake_stack(scenario.stack, tmp_path / "stack", more=("--mix-up-every", "7")) as stack:
        found = await run(scenario, UrlTarget(stack.url, stack.operator_key), Options(tmp_path))
        headers = {"authorization": f"Bearer {stack.operator_key}"}
        async with httpx.AsyncClient(base_url=stack.url, headers=headers) as http:
            kept = (await http.get("/admin/v1/storage/tenants")).json()["data"]
            tenants = (await http.get("/admin/v1/tenants")).json()["data"]
    verdicts = gates.judge(found)
    assert metrics.figure(found, "wrong_adapter").value > 0
    assert gates.exit_code(verdicts, found) == gates.FAILED
    assert all(not one["adapters"] for one in kept)
    assert [one["suspended_at"] is not None for one in tenants] == [True] * 3


async def test_a_server_that_goes_on_for_clients_who_left_is_found(tmp_path: Path) -> None:
    """Its places are taken by answers that nobody reads, and those who stay wait; a stalled run is played again."""
    scenario = read(Path("client-abort"), profile="short")
    for number in range(TRIES):
        (folder := tmp_path / f"try-{number}").mkdir()
        async with fake_stack(scenario.stack, folder / "stack", more=("--serve-the-gone",)) as stack:
            found = await run(scenario, stack, Options(folder))
        verdicts = gates.judge(found)
        if (code := gates.exit_code(verdicts, found)) != gates.INCONCLUSIVE:
            break
    assert code == gates.FAILED, verdicts
    assert {one.metric for one in verdicts if one.judgement == "fail"} <= {"goodput_share", "ttft_ms.p50"}


async def test_versions_may_answer_as_long_as_they_live(tmp_path: Path) -> None:
    """Publications during traffic: every answer's version is one that the name stood for, and both ones answered."""
    scenario = one_name_that_moves()
    async with fake_stack(scenario.stack, tmp_path / "stack") as stack:
        found = await run(scenario, stack, Options(tmp_path))
    assert [event.error for event in found.events if event.kind in ("publish", "flip")] == [""] * 4
    assert len({life.digest for life in found.versions}) >= 3
    assert all(life.answer is not None for life in found.versions)
    told = np.unique(found.samples.rows["version"])
    assert len(told) >= 3
    assert metrics.figure(found, "wrong_adapter").value == 0


def one_name_that_moves() -> Scenario:
    return Scenario.model_validate(
        {
            "name": "moves",
            "question": "Does each answer's version belong to its name?",
            "tenants": [{"name": "one"}],
            "workloads": {"chat": {"output_tokens": {"law": "fixed", "value": 4}, "canary_share": 0.5}},
            "phases": [
                {
                    "name": "moving",
                    "duration_s": 4,
                    "load": [{"tenants": "one", "workload": "chat", "arrivals": {"law": "constant", "rate": 15}}],
                    "actions": [
                        {"kind": "publish", "at_s": 0.5, "every_s": 2},
                        {"kind": "flip", "at_s": 1.5, "every_s": 2},
                    ],
                }
            ],
            "gates": [{"metric": "wrong_adapter", "at_most": 0}],
        }
    )


async def test_replicas_are_frozen_slowed_and_restarted_under_load(tmp_path: Path) -> None:
    """Each for as long as it was to be, a long one seen in the replicas' states; a restart in turn costs no request."""
    scenario = two_replicas_disturbed()
    async with fake_stack(scenario.stack, tmp_path / "stack") as stack:
        before = await generations(stack)
        found = await run(scenario, stack, Options(tmp_path))
        after = await generations(stack)
    assert len(before) == 2
    assert not before & after  # a restart may be over between two looks at the states: the processes are others
    done = {event.kind: event for event in found.events if event.kind != "replica-state"}
    assert {name: event.error for name, event in done.items()} == dict.fromkeys(
        ("slow-replica", "stop-replica", "command", "rolling-restart"), ""
    )
    assert done["stop-replica"].took >= 7 * NS
    assert 0 <= done["slow-replica"].at - 0.2 * NS < NS
    assert {"unreachable", "ready"} <= {event.target.split()[-1] for event in found.events}, found.events
    slow, restarted = (select(found, phase=name) for name in ("slow", "restarted"))
    assert metrics.of(slow, "tpot_ms.max").value > 4 * metrics.of(restarted, "tpot_ms.p50").value
    assert metrics.of(restarted, "error_share").value == 0
    assert metrics.figure(found, "wrong_adapter").value == 0


async def generations(stack: FakeStack) -> set[str]:
    headers = {"authorization": f"Bearer {stack.operator_key}"}
    async with httpx.AsyncClient(base_url=stack.url, headers=headers) as http:
        told = (await http.get("/admin/v1/replicas")).raise_for_status().json()["data"]
    return {replica["generation"] for replica in told}


def two_replicas_disturbed() -> Scenario:
    def phase(name: str, duration_s: float, *actions: dict[str, Any]) -> dict[str, Any]:
        load = {"tenants": "all", "workload": "chat", "arrivals": {"law": "constant", "rate": 10}}
        return {"name": name, "duration_s": duration_s, "load": [load], "actions": actions}

    return Scenario.model_validate(
        {
            "name": "disturbed",
            "question": "Is what the actions say done to the replicas?",
            "stack": {"replicas": 2, "settings": {"TAILOR_PROBE_DEADLINE_S": "3"}},
            "tenants": [{"name": "all", "count": 8}],  # so many that each replica has some
            "workloads": {"chat": {"output_tokens": {"law": "fixed", "value": 6}}},
            "phases": [
                phase("slow", 2, {"kind": "slow-replica", "at_s": 0.2, "replica": 0, "duration_s": 1.5, "factor": 20}),
                phase("frozen", 9, {"kind": "stop-replica", "at_s": 0.2, "replica": 1, "duration_s": 7}),
                phase("restarted", 6, {"kind": "rolling-restart", "at_s": 0.2}, COMMAND),
            ],
            "gates": [{"metric": "wrong_adapter", "at_most": 0}],
        }
    )


COMMAND: Final = {"kind": "command", "at_s": 0.1, "command": ["sh", "-c", 'test -n "$TAILOR_URL"']}


async def test_a_run_is_kept_though_the_server_breaks(tmp_path: Path) -> None:
    """A name that goes back after its adapter was deleted, and a job for which there is no worker, are errors of their
    actions; what was measured is on the disk before the clean-up, which leaves nothing to use or to pay."""
    scenario, folder = one_adapter_that_goes(), tmp_path / "out"
    folder.mkdir()
    async with fake_stack(scenario.stack, tmp_path / "stack") as stack:
        stack.can |= {ActionKind.TRAIN}
        made = await run(scenario, stack, Options(folder, begun_within_s=1))
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert not [path for path in files if stack.operator_key.encode() in path.read_bytes()]
        left = await left_at(stack)
    found = results.load(folder)
    assert found.events == made.events
    told = {event.kind: event.error for event in found.events}
    assert "no version to go to" in told["flip"]
    assert "does a training worker run?" in told["job"]
    assert "still running" in told["command"]
    assert "over before" in told["rotate-key"]
    assert metrics.of(select(found), "actions.failed").value == 4
    assert left == Left(adapters=0, files=0, jobs=0, live_keys=0, free_tenants=0)


@dataclass(frozen=True)
class Left:
    """What a load test has left at a server."""

    adapters: int
    files: int
    jobs: int
    live_keys: int
    free_tenants: int


async def left_at(stack: FakeStack) -> Left:
    """Jobs are told to their tenant alone, who is let in once more."""
    async with Api(stack.url) as api:
        operator = partial(api.call, stack.operator_key)
        tenants = (await operator("GET", "/admin/v1/tenants"))["data"]
        ids = [one["id"] for one in tenants if one["name"].startswith("loadtest-")]
        kept = (await operator("GET", "/admin/v1/storage/tenants"))["data"]
        keys = [key for one in ids for key in (await operator("GET", f"/admin/v1/tenants/{one}/keys"))["data"]]
        jobs = []
        for one in ids:
            await operator("PATCH", f"/admin/v1/tenants/{one}", {"suspended": False})
            key = (await operator("POST", f"/admin/v1/tenants/{one}/keys", {"scopes": ["training"]}))["secret"]
            jobs += (await api.call(key, "GET", "/v1/fine_tuning/jobs"))["data"]
    return Left(
        adapters=sum(one["adapters"] for one in kept),
        files=sum(one["files"] for one in kept),
        jobs=len(jobs),
        live_keys=sum(key["revoked_at"] is None for key in keys),
        free_tenants=sum(one["suspended_at"] is None for one in tenants),
    )


async def test_what_could_not_be_cleaned_is_named() -> None:
    """At a server that answers nobody, in the time that there is for it, and at one that is not there."""

    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await gone.wait()
        writer.close()

    gone = asyncio.Event()
    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with Api(f"http://127.0.0.1:{port}") as api:
            cleaning = Cleaning(api, "key", ["loadtest-1-a", "loadtest-1-b"], ["loadtest-1-p"], 0.1, 0.1)
            await cleaning.run()
        gone.set()
    tenants = [f"loadtest-1-{name}: not erased; not closed" for name in "ab"]
    assert cleaning.left() == [*tenants, "loadtest-1-p: not deleted"]
    async with Api("http://127.0.0.1:9") as api:
        cleaning = Cleaning(api, "key", ["loadtest-1-a"])
        await cleaning.run()
    assert len(cleaning.left()) == 1
    assert cleaning.left()[0].startswith("loadtest-1-a: tenant: http://127.0.0.1:9 does not answer")


def one_adapter_that_goes() -> Scenario:
    return Scenario.model_validate(
        {
            "name": "goes",
            "question": "Is what cannot be done an error of its action?",
            "tenants": [{"name": "one"}],
            "workloads": {"chat": {"output_tokens": {"law": "fixed", "value": 4}, "canary_share": 0}},
            "phases": [
                {
                    "name": "going",
                    "duration_s": 2,
                    "load": [{"tenants": "one", "workload": "chat", "arrivals": {"law": "constant", "rate": 5}}],
                    "actions": [
                        {"kind": "train", "at_s": 0.1},
                        {"kind": "delete", "at_s": 0.2},
                        {"kind": "flip", "at_s": 1},
                        {"kind": "command", "at_s": 1, "command": ["sleep", "600"]},
                    ],
                },
                {"name": "idle", "duration_s": 60, "actions": [{"kind": "rotate-key", "at_s": 50}]},
            ],
            "gates": [{"metric": "actions.failed", "at_most": 0}],
        }
    )


def test_a_run_that_is_ended_before_it_sends_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM, as a CI sends it whose time is up, while the stack starts: exit code 2, and no process is left."""
    words = ["smoke", "--stack", "fake", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "gateway.cli", "loadtest", "run", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("starting the stack" in line for line in process.stderr)
        process.terminate()
        _, said = process.communicate(timeout=90)
    assert process.returncode == gates.UNUSABLE, said
    assert "it was interrupted" in said


def test_a_run_that_is_interrupted_is_never_green(tmp_path: Path) -> None:
    """Ctrl-C at the terminal: what was sent is written down, the stack is taken down, and the exit code is 3."""
    words = ["smoke", "--stack", "fake", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "gateway.cli", "loadtest", "run", *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert any(re.search(r": [1-9][0-9]* sent", line) for line in process.stdout)  # of a minute's requests
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=90)
    assert process.returncode == gates.INCONCLUSIVE, said
    found = results.load(tmp_path / "out")
    assert found.unfinished
    assert 0 < (found.samples.rows["outcome"] == Outcome.WHOLE).sum() < len(found.schedule.planned)


def test_a_run_that_is_killed_takes_its_processes_along(tmp_path: Path) -> None:
    """SIGKILL while requests are sent, and a command of the operator's runs; its folder goes at the next start."""
    told = one_name_that_moves().model_dump(mode="json")
    told["phases"][0] |= {"duration_s": 60, "actions": [{"kind": "command", "at_s": 0.1, "command": ["sleep", "600"]}]}
    (tmp_path / "moves.yaml").write_text(yaml.safe_dump(told))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    words = (tmp_path / "moves.yaml", "--stack", "fake", "--out", tmp_path / "out")
    with tool("run", *words, TMPDIR=str(temporary)) as killed:
        assert killed.says(" sent")
        while not any("sleep 600" in one for one in killed.alive()):
            time.sleep(0.05)
        killed.process.kill()
        killed.process.wait()
        assert killed.left() == []
    assert len(list(temporary.glob(f"{PREFIX}*"))) == 1
    with own_folder(temporary) as own:
        assert list(temporary.glob(f"{PREFIX}*")) == [own]


@pytest.mark.full
@pytest.mark.timeout(600)
def test_real_engines_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    """SIGKILL in the middle: no process of vLLM's or ours and no port is left, and folders go at the next start."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    words = ("smoke", "--profile", "cpu", "--stack", "cpu", "--out", tmp_path / "out")
    with tool("run", *words, TMPDIR=str(temporary)) as killed:
        assert killed.says(" sent")
        assert any("EngineCore" in one or "adapter_store.agent" in one for one in killed.alive())
        ports = killed.ports()
        assert ports
        killed.process.kill()
        killed.process.wait()
        assert killed.left() == []
    for port in ports:
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
    with own_folder(temporary) as own:
        assert list(temporary.glob(f"{PREFIX}*")) == [own]


def test_what_cannot_be_run_ends_with_2(tmp_path: Path) -> None:
    """A scenario that is none, a server that does not answer, a target that nobody named; in words, not a traceback."""
    scenario = tmp_path / "bad.yaml"
    scenario.write_text("name: bad\nquestion: what?\nnonsense: 1\n")
    junit = tmp_path / "out" / "junit.xml"
    junit.parent.mkdir()
    for words, told in (
        ([str(scenario), "--stack", "fake"], "nonsense"),
        (["nothing-such", "--stack", "fake"], "A scenario is a YAML file or one of"),
        (["smoke", "--target", "http://127.0.0.1:9", "--operator-key", "k"], "does not answer"),
        (["smoke"], "say either --target"),
        (["replica-kill", "--target", "http://127.0.0.1:9", "--operator-key", "k"], "kill-replica cannot be done"),
    ):
        junit.write_text("<testsuite/>")
        command = [sys.executable, "-m", "gateway.cli", "loadtest", "run", *words, "--out", str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 2, done.stderr
        assert told in done.stderr
        assert "Traceback" not in done.stderr
        assert '<error message="' in junit.read_text()
