"""What the gateway tells of itself: numbers that add up, names that are documented, contexts that are well-formed."""

import asyncio
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import error_attributes, http_attributes
from opentelemetry.trace import get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from gateway.home import ConfigurationError
from gateway.logs import JsonFormatter, ids
from gateway.settings import Settings
from gateway.telemetry import names
from gateway.telemetry.metrics import READABLE, Metrics
from gateway.telemetry.observation import Observation
from gateway.telemetry.series import OTHER, RETIRED, Capped, Histogram
from gateway.telemetry.tracing import Sampler, Tracing, open_tracing, parse

PROJECT = Path(__file__).parents[3]
DASHBOARD = PROJECT / "deploy/grafana/tailor.json"
ALERTS = PROJECT / "deploy/prometheus/alerts.yaml"
TELEMETRY_DOC = (PROJECT / "docs/telemetry.md").read_text()
CHAT = "/v1/chat/completions"
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01".encode()

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(page: str) -> Samples:
    """Every sample of a page, as Prometheus' own parser reads it."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def of(found: Samples, name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def total(found: Samples, name: str, **labels: str) -> float:
    return sum(value for (its, those), value in found.items() if its == name and labels.items() <= dict(those).items())


def page_of(metrics: Metrics) -> Samples:
    return samples("".join(metrics.pieces()))


def observation(**more: Any) -> Observation:
    """A stream of 11 tokens: first one after 0.5 s, the last a second later."""
    seen = Observation(CHAT, 100.0)
    seen.first_at, seen.ended, seen.status, seen.streamed = 100.5, 101.5, 200, True
    seen.tenant_id, seen.adapter_id, seen.tier, seen.replica = "tnt_a", "adp_a", "gpu", "http://10.0.0.5:9000"
    seen.prompt_tokens, seen.cached_tokens, seen.completion_tokens = 20, 5, 11
    for name, value in more.items():
        setattr(seen, name, value)
    return seen


def test_a_request_is_counted_once_everywhere() -> None:
    """By route, tenant, adapter, replica and tier, with its times and tokens."""
    metrics = Metrics(tenants=10, adapters=10)
    metrics.generation.count(observation())
    found = page_of(metrics)
    assert of(found, "tailor_requests_total", method="POST", route=CHAT, status="200") == 1
    assert of(found, "tailor_request_duration_seconds_sum", method="POST", route=CHAT) == 1.5
    assert of(found, "tailor_time_to_first_token_seconds_sum", route=CHAT, tier="gpu") == 0.5
    assert of(found, "tailor_inter_token_seconds_sum", route=CHAT) == pytest.approx(0.1)
    assert of(found, "tailor_slot_requests_total", tier="gpu") == 1
    assert of(found, "tailor_queue_seconds_count") == 1
    assert of(found, "tailor_replica_requests_total", replica="http://10.0.0.5:9000", outcome="ok") == 1
    for kind, tokens in {"prompt": 20, "cached": 5, "completion": 11}.items():
        assert of(found, "tailor_tokens_total", route=CHAT, kind=kind) == tokens
        assert of(found, "tailor_tenant_tokens_total", tenant="tnt_a", kind=kind) == tokens
        assert of(found, "tailor_adapter_tokens_total", tenant="tnt_a", adapter="adp_a", kind=kind) == tokens
    assert of(found, "tailor_tenant_requests_total", tenant="tnt_a", outcome="ok") == 1
    assert of(found, "tailor_adapter_requests_total", tenant="tnt_a", adapter="adp_a", outcome="ok") == 1
    assert of(found, "tailor_tenant_time_to_first_token_seconds_sum", tenant="tnt_a") == 0.5


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, "ok"),
        (400, "refused"),
        (404, "refused"),
        (429, "limited"),
        (499, "gone"),
        (500, "failed"),
        (503, "failed"),
    ],
)
def test_an_outcome_follows_from_the_status(status: int, outcome: str) -> None:
    """Limits, clients that leave and failures are told apart."""
    metrics = Metrics(tenants=10, adapters=10)
    metrics.generation.count(observation(status=status))
    assert total(page_of(metrics), "tailor_tenant_requests_total", outcome=outcome) == 1


def test_what_never_happened_is_not_observed() -> None:
    """A whole answer has no first token, a stranger no tenant, a refused request no tier, a base request no adapter."""
    metrics = Metrics(tenants=10, adapters=10)
    metrics.generation.count(observation(streamed=False, adapter_id="", tier="base"))
    metrics.generation.count(
        observation(status=401, tenant_id="", adapter_id="", tier="", first_at=0.0, completion_tokens=0)
    )
    found = page_of(metrics)
    assert total(found, "tailor_requests_total") == 2
    assert total(found, "tailor_slot_requests_total") == 1
    assert total(found, "tailor_tenant_requests_total") == 1
    assert total(found, "tailor_adapter_requests_total") == 0
    assert total(found, "tailor_time_to_first_token_seconds_count") == 0
    assert total(found, "tailor_inter_token_seconds_count") == 0


@given(st.lists(st.floats(0, 1_000)))
def test_a_histogram_counts_like_prometheus(values: list[float]) -> None:
    """A bucket holds all values up to its bound, the bound included; the last holds them all."""
    bounds = (0.1, 1.0, 60.0)
    histogram = Histogram(bounds)
    for value in (*values, *bounds):
        histogram.observe(value)
    found = samples(histogram.lines("x", ""))
    for bound in bounds:
        assert of(found, "x_bucket", le=str(bound)) == sum(value <= bound for value in (*values, *bounds))
    assert of(found, "x_count") == of(found, "x_bucket", le="+Inf") == len(values) + len(bounds)
    assert of(found, "x_sum") == pytest.approx(sum((*values, *bounds)))


@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from([200, 429, 503]), st.floats(0, 2_000)), max_size=200),
    st.integers(0, 6),
)
def test_the_cap_keeps_sums_exact(requests: list[tuple[int, int, float]], limit: int) -> None:
    """Whoever has a label, is other or retired: the sum over all labels is what was asked, at any time."""
    metrics = Metrics(tenants=limit, adapters=limit)
    now, asked, tokens = 1_000.0, Counter[int](), 0
    for tenant, status, later_s in requests:
        now += later_s
        metrics.generation.count(
            observation(tenant_id=f"tnt_{tenant}", adapter_id=f"adp_{tenant}", status=status, began=now, ended=now + 1)
        )
        asked[status] += 1
        tokens += 11
    found = page_of(metrics)
    for status, outcome in {200: "ok", 429: "limited", 503: "failed"}.items():
        assert total(found, "tailor_tenant_requests_total", outcome=outcome) == asked[status]
        assert total(found, "tailor_adapter_requests_total", outcome=outcome) == asked[status]
    assert total(found, "tailor_tenant_tokens_total", kind="completion") == tokens
    labels = {dict(those)["tenant"] for name, those in found if name == "tailor_tenant_requests_total"}
    assert len(labels - {OTHER, RETIRED}) <= limit


def test_a_label_is_given_up_when_idle_and_never_while_in_use() -> None:
    """The busy tenant keeps its label, the idle one's goes to the next that comes; none is taken while all are busy."""
    capped = Capped(2, idle_s=3_600, look_every_s=60)

    def ask(tenant: str, now: float) -> None:
        capped.of(tenant, "", now).count(observation(ended=now), 0, None)

    for tenant in ("busy", "idle", "late"):
        ask(tenant, 0.0)
    assert [key for key, _ in capped.items()] == ["busy", "idle", OTHER, RETIRED]
    ask("busy", 4_000.0)
    ask("late", 4_100.0)
    usages = dict(capped.items())
    assert set(usages) == {"busy", "late", OTHER, RETIRED}
    assert [usages[key].outcomes[0] for key in ("busy", "late", OTHER, RETIRED)] == [2, 1, 1, 1]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")))
def test_any_label_survives_the_page(replica: str) -> None:
    """Quotes, backslashes and line ends are escaped as Prometheus reads them."""
    metrics = Metrics(tenants=1, adapters=1)
    metrics.watch(names.EVICTIONS, lambda: {replica: 3})
    assert of(page_of(metrics), "tailor_adapter_evictions_total", replica=replica) == 3


class Color(Enum):
    RED = "red"
    BLUE = "blue"


def test_what_the_parts_know_is_read_when_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    """A part that fails costs its own metric, and the fault is counted; the others are told."""
    metrics = Metrics(tenants=1, adapters=1)
    backlog = [7]
    metrics.watch(names.LEDGER_BACKLOG, lambda: backlog[0])
    metrics.watch(names.RESIDENT_ADAPTERS, lambda: {("r0", "gpu"): 4, ("r0", "host"): 9})
    metrics.watch(names.CHANGE_FEED_AGE, lambda: 1 / 0)
    metrics.watch_states(lambda: {"r0": Color.BLUE})
    found = page_of(metrics)
    assert of(found, "tailor_ledger_backlog_rows") == 7
    assert of(found, "tailor_replica_resident_adapters", replica="r0", tier="host") == 9
    assert of(found, "tailor_replica_state", replica="r0", state="blue") == 1
    assert of(found, "tailor_replica_state", replica="r0", state="red") == 0
    assert of(found, "tailor_scrape_faults_total") == 1
    assert "tailor_change_feed_age_seconds cannot be read" in caplog.text
    assert metrics.unwatched() == {metric.name for metric in READABLE} - {
        "tailor_ledger_backlog_rows",
        "tailor_replica_resident_adapters",
        "tailor_change_feed_age_seconds",
        "tailor_replica_state",
    }


def test_this_process_is_told_of() -> None:
    """Under the names that dashboards for any process know."""
    found = page_of(Metrics(tenants=1, adapters=1))
    assert 1 << 20 < of(found, "process_resident_memory_bytes") < 1 << 34
    assert of(found, "process_open_fds") >= 3
    assert of(found, "process_start_time_seconds") > 1.7e9


def test_a_page_may_be_written_while_everything_changes() -> None:
    """New routes, statuses, tiers, replicas and tenants between any two pieces of it break nothing."""
    metrics = Metrics(tenants=5, adapters=5)
    pieces: list[str] = []

    def change() -> None:
        n = len(pieces)
        new = {
            "status": 400 + n,
            "tier": f"t{n}",
            "tenant_id": f"tnt_{n}",
            "adapter_id": f"adp_{n}",
            "replica": f"r{n}",
        }
        metrics.generation.count(observation(load_s=1.0, **new))
        metrics.generation.count(observation(route=f"/v1/{n}"))
        metrics.control("/v1/models", "GET", 200 + n, 0.1)
        metrics.control(f"/v1/models/{n}", "GET", 200, 0.1)

    change()
    for piece in metrics.pieces():
        pieces.append(piece)
        change()
    assert total(samples("".join(pieces)), "tailor_requests_total") >= 4


async def test_requests_go_on_while_a_large_page_is_written() -> None:
    """The event loop turns many times before it is out."""
    metrics = Metrics(tenants=2_000, adapters=2_000)
    for n in range(2_000):
        metrics.generation.count(observation(tenant_id=f"tnt_{n}", adapter_id=f"adp_{n}"))
    page = asyncio.create_task(metrics.page())
    turns = 0
    while not page.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns > 5
    assert total(samples((await page).decode()), "tailor_tenant_requests_total") == 2_000


def full_page() -> str:
    """A page on which every family has a sample."""
    metrics = Metrics(tenants=1, adapters=1)
    metrics.generation.count(observation(load_s=1.0))
    for metric in READABLE:
        values = tuple("x" for _ in metric.labels)
        metrics.watch(metric, lambda values=values: {values: 1.0} if values else 1.0)  # type: ignore[misc]
    return "".join(metrics.pieces())


def exported() -> set[str]:
    """The names of all samples that a gateway can export."""
    return {name for name, _ in samples(full_page())}


def test_every_named_metric_is_exported() -> None:
    """The table of names is the page's: each family once, with the kind, labels and help that it says."""
    families = {
        family.name + ("_total" if family.type == "counter" else ""): family
        for family in text_string_to_metric_families(full_page())
    }
    assert set(families) == {metric.name for metric in names.METRICS}
    for metric in names.METRICS:
        family = families[metric.name]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels), metric.name


def test_every_metric_is_documented() -> None:
    """Name, kind and labels in the tables of docs/telemetry.md, and none that is gone."""
    rows = re.findall(r"^\| `(tailor_\w+|process_\w+)` \| (\w+) \|([^|]*)\|", TELEMETRY_DOC, re.MULTILINE)
    documented = {(name, kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert documented == {(metric.name, metric.kind, metric.labels) for metric in names.METRICS}


def test_every_attribute_is_documented_and_those_of_conventions_exist() -> None:
    """Attributes of spans are in docs/telemetry.md; those that are not Tailor's are OpenTelemetry's."""
    attributes = {
        value
        for name, value in vars(names).items()
        if isinstance(value, str) and re.fullmatch(r"(tailor|gen_ai|http|error)\.[a-z_.]+", value) and name != "SCOPE"
    }
    assert attributes == set(re.findall(r"^\| `([a-z_]+\.[a-z_.]+)` \|", TELEMETRY_DOC, re.MULTILINE))
    conventions = {
        value
        for module in (gen_ai_attributes, http_attributes, error_attributes)
        for value in vars(module).values()
        if isinstance(value, str)
    }
    assert {name for name in attributes if not name.startswith("tailor.")} <= conventions


def names_in(expressions: Iterable[str]) -> set[str]:
    return {name for text in expressions for name in re.findall(r"\b(?:tailor|process)_[a-z_]+\b(?!\")", text)}


def dashboard_expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def alert_rules() -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    return rules


def test_dashboard_and_alerts_ask_for_metrics_that_exist() -> None:
    """And the dashboard shows each one that there is."""
    shown = names_in(dashboard_expressions())
    assert shown <= exported()
    assert names_in(rule["expr"] for rule in alert_rules()) <= exported()
    for metric in names.METRICS:
        assert any(name.startswith(metric.name) for name in shown), f"{metric.name} is on no panel"


def test_every_alert_is_documented() -> None:
    """What it means and what to do is in docs/telemetry.md."""
    documented = set(re.findall(r"^\| `(Tailor\w+)` \|", TELEMETRY_DOC, re.MULTILINE))
    assert documented == {rule["alert"] for rule in alert_rules()}


def promtool(*arguments: str, folder: Path) -> None:
    """Prometheus' own checker; a machine without it fails, for a rule that is not checked may be none."""
    found = shutil.which("promtool", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found, "promtool is missing: `make promtool` fetches it on Debian and Ubuntu, elsewhere install Prometheus"
    done = subprocess.run([found, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_scrape_example_and_alerts() -> None:
    """Each alert fires where it must and is silent where it must be."""
    promtool("check", "config", "prometheus.yaml", folder=ALERTS.parent)
    promtool("test", "rules", "alerts_test.yaml", folder=ALERTS.parent)
    cases = yaml.safe_load((ALERTS.parent / "alerts_test.yaml").read_text())["tests"]
    fired = {check["alertname"] for case in cases for check in case["alert_rule_test"] if check["exp_alerts"]}
    assert fired == {rule["alert"] for rule in alert_rules()}


def test_promtool_accepts_the_dashboards_expressions(tmp_path: Path) -> None:
    """With Grafana's variables filled in, each is PromQL."""
    rules = [
        {"record": f"panel:{n}", "expr": re.sub(r"\$(job|instance)", "x", text).replace("$__rate_interval", "1m")}
        for n, text in enumerate(dashboard_expressions())
    ]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", "panels.yaml", folder=tmp_path)


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "00",
        f"00-{TRACE_ID}-{SPAN_ID}",
        f"00-{TRACE_ID}-{SPAN_ID}-1",
        f"00-{TRACE_ID}-{SPAN_ID}-01-",
        f"00-{TRACE_ID}-{SPAN_ID}-01-more",
        f"00-{TRACE_ID}-{SPAN_ID}-01 ",
        f" 00-{TRACE_ID}-{SPAN_ID}-01",
        f"ff-{TRACE_ID}-{SPAN_ID}-01",
        f"0g-{TRACE_ID}-{SPAN_ID}-01",
        f"00-{TRACE_ID.upper()}-{SPAN_ID}-01",
        f"00-{'0' * 32}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        f"00-{TRACE_ID[:-1]}-{SPAN_ID}-01",
        f"00_{TRACE_ID}_{SPAN_ID}_01",
        f"00-{TRACE_ID}-{SPAN_ID}-01,00-{TRACE_ID}-{SPAN_ID}-01",
        f"01-{TRACE_ID}-{SPAN_ID}-01more",
        f"01-{TRACE_ID}-{SPAN_ID}-01-" + "x" * 300,
        "00-" + "١" * 32 + f"-{SPAN_ID}-01",
    ],
)
def test_a_broken_traceparent_is_none(broken: str) -> None:
    """Nothing is mended: a trace begins anew."""
    assert parse(broken.encode()) is None


@given(
    st.one_of(
        st.text(st.characters(codec="latin-1", exclude_characters=" \t\r\n"), max_size=80),
        st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[a-z]{0,9})?", fullmatch=True),
        st.tuples(st.integers(0, 54), st.sampled_from("0af-gF\x00")).map(
            lambda change: (TRACEPARENT[: change[0]] + change[1].encode() + TRACEPARENT[change[0] + 1 :]).decode()
        ),
    )
)
def test_a_traceparent_is_read_as_opentelemetry_reads_it(header: str) -> None:
    """Whatever is sent: the same ids and flag, or none."""
    expected = get_current_span(TraceContextTextMapPropagator().extract({"traceparent": header})).get_span_context()
    found = parse(header.encode("latin-1"))
    assert (found is not None) == expected.is_valid
    if found is not None:
        assert (found.trace_id, found.span_id) == (expected.trace_id, expected.span_id)
        assert found.sampled == expected.trace_flags.sampled


class NoSpans:
    """Stands where spans are made; none is asked for in these tests."""


def tracing(ratio: float, *, trust: bool = False, parent_based: bool = True) -> Tracing:
    return Tracing(NoSpans(), Sampler(ratio, parent_based), trust_parent=trust)  # type: ignore[arg-type]


def test_a_stranger_forces_no_trace() -> None:
    """Neither its flag nor a trace id chosen for it: its ids go on, with the gateway's decision."""
    chosen = f"00-{'f' * 16}{'0' * 15}1-{SPAN_ID}-01".encode()
    for header in (TRACEPARENT, chosen):
        trace, line = tracing(0.0).begin(header)
        assert trace is None
        assert line == b"traceparent: " + header[:-1] + b"0\r\n"
    traced = sum(tracing(0.01).begin(chosen)[0] is not None for _ in range(5_000))
    assert traced < 150


def test_a_trusted_parent_decides() -> None:
    """Its sampled request is traced, its unsampled one is not, whatever the ratio."""
    trace, line = tracing(0.0, trust=True).begin(TRACEPARENT)
    assert trace is not None
    assert (trace.id, trace.parent_id) == (TRACE_ID, int(SPAN_ID, 16))
    assert line == f"traceparent: 00-{TRACE_ID}-{trace.upstream_id:016x}-01\r\n".encode()
    assert tracing(1.0, trust=True).begin(TRACEPARENT[:-1] + b"0")[0] is None


@pytest.mark.parametrize("sampler", ["parentbased_traceidratio", "parentbased_always_off", " ParentBased_always_on"])
def test_who_sets_a_sampler_that_goes_by_its_parent_trusts_it(sampler: str) -> None:
    """As the name says everywhere else; the same sampler by default, and any other one, trust nobody."""

    def passed_on(environ: dict[str, str], sampled: bool) -> bytes:
        opened = open_tracing(environ, base_model="b", trust_parent=False)
        return opened.begin(TRACEPARENT if sampled else TRACEPARENT[:-1] + b"0", b"a=1")[1]

    line = b"traceparent: " + TRACEPARENT[:-1]
    for sampled, flag in ((True, b"1"), (False, b"0")):
        assert passed_on({"OTEL_TRACES_SAMPLER": sampler}, sampled) == line + flag + b"\r\ntracestate: a=1\r\n"
        for own, decided in (("always_on", b"1"), ("always_off", b"0")):
            assert passed_on({"OTEL_TRACES_SAMPLER": own}, sampled) == line + decided + b"\r\n"
        none = {"OTEL_TRACES_SAMPLER_ARG": "0"}
        assert passed_on(none, sampled) == line + b"0\r\n"


def test_a_ratio_is_a_share() -> None:
    """Of requests without a parent; each has ids of its own, and the engine is told of the decision."""
    begun = [tracing(0.1).begin() for _ in range(5_000)]
    assert 350 < sum(trace is not None for trace, _ in begun) < 650
    assert len({line for _, line in begun}) == len(begun)
    for trace, line in begun:
        told = parse(line.removeprefix(b"traceparent: ").removesuffix(b"\r\n"))
        assert told is not None
        assert told.sampled == (trace is not None)
        if trace is not None:
            assert (told.trace_id, told.span_id) == (trace.trace_id, trace.upstream_id)


@pytest.mark.parametrize("state", [b"vendor=1", b"a=1, b@c=x:y", b"rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"])
def test_a_sane_tracestate_of_a_trusted_parent_goes_on(state: bytes) -> None:
    """A stranger's does not: it would be its text in the traces of others."""
    assert tracing(1.0, trust=True).begin(TRACEPARENT, state)[1].endswith(b"tracestate: " + state + b"\r\n")
    assert b"tracestate" not in tracing(1.0).begin(TRACEPARENT, state)[1]
    assert b"tracestate" not in tracing(1.0, trust=True).begin(b"broken", state)[1]


@given(st.one_of(st.sampled_from([b"", b"a", b"=1", b"a=1,", b"A=1", b"a=\r\nx: y", b"a=" + b"x" * 600]), st.binary()))
def test_no_tracestate_writes_a_header_line(state: bytes) -> None:
    """Whatever it holds, what goes on are whole lines of the two known names."""
    lines = tracing(1.0, trust=True).begin(TRACEPARENT, state)[1]
    assert re.fullmatch(rb"traceparent: [0-9a-f-]{55}\r\n(tracestate: [\x20-\x7e\t]+\r\n)?", lines)


def test_without_an_exporter_nothing_is_traced_or_imported() -> None:
    """The SDK's memory is paid for by those who use it; a caller's context still reaches the engine.

    A trusted one's as it is, a stranger's with the gateway's decision.
    """
    program = f"""
import sys
from gateway.telemetry.tracing import open_tracing
trusting = open_tracing({{}}, base_model="b", trust_parent=True)
assert trusting.begin() == (None, b"")
assert trusting.begin({TRACEPARENT!r}) == (None, b"traceparent: " + {TRACEPARENT!r} + b"\\r\\n")
strange = open_tracing({{"OTEL_TRACES_SAMPLER": "always_off"}}, base_model="b", trust_parent=False)
assert strange.begin() == strange.begin(b"broken") == (None, b"")
assert strange.begin({TRACEPARENT!r}) == (None, b"traceparent: " + {TRACEPARENT[:-1]!r} + b"0\\r\\n")
import gateway.operator_port, gateway.telemetry.asgi
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
"""
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert {"opentelemetry", "prometheus_client", "requests", "google"} & set(loaded) == set()


def test_traces_are_exported_without_requests_and_protobuf() -> None:
    """The exporter of OpenTelemetry imports them, and they are 7 MiB."""
    program = "import sys, gateway.telemetry.spans; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert {"requests", "urllib3", "charset_normalizer", "httpx", "google.protobuf"} & set(loaded) == set()


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"OTEL_TRACES_SAMPLER": "jaeger_remote"}, "parentbased_traceidratio"),
        ({"OTEL_TRACES_SAMPLER_ARG": "1.5"}, "0 to 1"),
        ({"OTEL_TRACES_SAMPLER_ARG": "nan"}, "0 to 1"),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "otlp"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "localhost:4317"}, "http://"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "http/protobuf"),
    ],
)
def test_a_variable_that_cannot_be_followed_ends_the_start(environ: dict[str, str], said: str) -> None:
    """By name, with what would do."""
    with pytest.raises(ConfigurationError, match=said):
        open_tracing(environ, base_model="b", trust_parent=False)


@pytest.mark.parametrize(
    "environ",
    [
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318", "OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_TRACES_SAMPLER": "always_on"},
    ],
)
def test_tracing_can_be_left_off(environ: dict[str, str]) -> None:
    """By the standard switches, and by naming no collector."""
    assert open_tracing(environ, base_model="b", trust_parent=False).begin() == (None, b"")


def logged(**more: Any) -> dict[str, Any]:
    record = logging.LogRecord("tailor.x", logging.WARNING, __file__, 1, "request failed", (), None)
    vars(record).update(more)
    line: dict[str, Any] = json.loads(JsonFormatter().format(record))
    return line


def test_log_lines_carry_ids() -> None:
    """Those that are known, and nothing else of a record's."""
    line = logged(**ids(request_id="5f" * 16, trace_id=TRACE_ID, tenant_id="tnt_1"), prompt="secret")
    assert line == {
        "at": line["at"],
        "level": "warning",
        "logger": "tailor.x",
        "message": "request failed",
        "request_id": "5f" * 16,
        "trace_id": TRACE_ID,
        "tenant_id": "tnt_1",
    }


@pytest.mark.parametrize("value", ["Bearer sk-x", 'x"y', "a\nb", "x" * 300, "", "{'prompt': 1}"])
def test_what_is_no_id_is_not_logged_as_one(value: str) -> None:
    """Free text and anything oversized is left out."""
    assert value not in logged(request_id=value).values() or value == ""
    assert logged(**ids(request_id=value)).get("request_id") in (None, "unsafe")


def test_a_log_line_is_bounded() -> None:
    """Whatever a message quotes."""
    record = logging.LogRecord("tailor.x", logging.WARNING, __file__, 1, "y" * 100_000, (), None)
    assert len(JsonFormatter().format(record)) < 5_000


def test_a_public_operator_port_must_be_meant() -> None:
    """As the public door's address must."""
    with pytest.raises(ValidationError, match="operator_host"):
        Settings(_env_file=None, operator_host="0.0.0.0")
    assert Settings(_env_file=None, operator_host="0.0.0.0", operator_port=0).operator_port == 0
    assert Settings(_env_file=None, operator_host="0.0.0.0", allow_public=True).operator_port == 9464
