"""The store's benchmark itself: what its client sends and times, what adapters and rows it makes, how it judges."""

import json
import threading
from collections.abc import Iterator
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from adapter_store import catalog
from adapter_store.base_model import BaseModel
from adapter_store.ids import TenantId
from adapter_store.inspection import Bounds, inspect
from adapter_store.transactions import reading
from gateway.database import open_engine
from loadtests import figures
from loadtests.store import report
from loadtests.store.adapters import SMALL, WIDE, header, write_adapter, write_base
from loadtests.store.client import Connection, connected
from tests.bench.catalog import LARGE, fill, shape

KEY = "sk-tailor-of-nobody"


class Gateway(BaseHTTPRequestHandler):
    """Keeps what it is sent, and answers as it was told to."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.taken.append((self.path, dict(self.headers), body))
        self.send_response(200)
        self.send_header("content-length", str(sum(len(event) for event in self.server.events)))
        self.send_header("server-timing", 'queue;dur=1.5, load;dur=250.0, adapter;desc="cold"')
        self.end_headers()
        for event in self.server.events:
            self.wfile.write(event)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Gateway)
        self.taken: list[tuple[str, dict[str, str], bytes]] = []
        self.events: list[bytes] = []


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def connection(server: Server) -> Iterator[Connection]:
    with connected(server.server_address[1], KEY) as connection:
        yield connection


def test_an_upload_is_the_form_that_the_api_asks_for(server: Server, connection: Connection, tmp_path: Path) -> None:
    """A field and two files, byte for byte, however often the connection is used."""
    files = write_adapter(tmp_path / "adapter", SMALL, "base", seed=1)
    for _ in range(2):
        answer = connection.publish("support", files)
        assert 0 < answer.sent_s <= answer.took_s
    for path, headers, body in server.taken:
        assert (path, headers["authorization"]) == ("/v1/adapters", f"Bearer {KEY}")
        form = BytesParser().parsebytes(f"content-type: {headers['content-type']}\r\n\r\n".encode() + body)
        parts = {str(part.get_param("name", header="content-disposition")): part for part in form.walk()}
        assert parts["name"].get_payload(decode=True) == b"support"
        for name, file in files.items():
            assert body.count(file.read_bytes()) == 1
            assert name in parts


def event(content: str, reason: str | None = None) -> bytes:
    choice = {"delta": {"content": content}, "finish_reason": reason}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


@pytest.mark.parametrize("token", [event("so"), event("", "length")])
def test_the_first_token_is_not_the_role(token: bytes, server: Server, connection: Connection) -> None:
    """Though a token may have no text; what the request waited for its adapter is what the gateway says."""
    server.events = [event(""), token, b"data: [DONE]\n\n"]
    answer = connection.first_token("support")
    assert (answer.status, answer.load_s) == (200, 0.25)
    assert answer.took_s > 0
    path, _, body = server.taken[0]
    assert path == "/v1/chat/completions"
    assert json.loads(body)["model"] == "support"


def test_a_stream_that_breaks_off_has_no_first_token(server: Server, connection: Connection) -> None:
    """An error event within a 200 would be the quickest answer of all."""
    server.events = [event(""), b'data: {"error": {}}\n\n']
    assert connection.first_token("support").status == 0


def test_the_adapters_fit_their_base_and_differ_by_seed(tmp_path: Path) -> None:
    """Every linear layer, in the shape that the inspection asks for."""
    base = BaseModel.read(write_base(tmp_path / "base", SMALL))
    written = [write_adapter(tmp_path / str(seed), SMALL, "base", seed=seed) for seed in range(2)]
    for seed in range(2):
        assert inspect(tmp_path / str(seed), base, Bounds(64, 1 << 20)).faults == ()
    first, second = (files["adapter_model.safetensors"].read_bytes() for files in written)
    assert first != second


def test_the_wide_base_s_adapters_have_100_mb() -> None:
    """As the figure says."""
    assert 100e6 < header(WIDE.tensors())[1] < 105e6


async def test_the_catalogue_has_as_many_versions_and_tenants_as_it_should(tmp_path: Path) -> None:
    """The large tenant's first adapter has a hundredth of them, and one."""
    engine = open_engine(f"sqlite+aiosqlite:///{tmp_path}/many.db")
    size, many = shape(1_000, 50)
    await fill(engine, size, many)
    async with reading(engine) as connection:
        versions = (await connection.execute(select(func.count()).select_from(catalog.versions))).scalar_one()
        tenants = select(func.count(catalog.versions.c.tenant_id.distinct()))
        assert (versions, (await connection.execute(tenants)).scalar_one()) == (1_000, 50)
        large = size.tenant_of(LARGE)
        largest = await catalog.list_versions(connection, TenantId(large), f"adapter-{size.adapters}")
    await engine.dispose()
    assert [version.number for version in largest] == list(range(many + 1, 0, -1))


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([3.0], 0.95, 3.0), ([float(n) for n in range(20, 0, -1)], 0.95, 19.0), ([1.0, 2.0, 9.0], 0.5, 2.0)],
)
def test_a_percentile_is_one_of_the_values(values: list[float], share: float, expected: float) -> None:
    """The least that so many of them do not exceed."""
    assert report.percentile(values, share) == expected


def test_each_figure_is_judged_on_its_own_side() -> None:
    """More publishes are better, more seconds are worse; one missed must fails the run."""
    kept = [report.row("publish_per_s", 20), report.row("first_token_p95_s", 3)]
    assert figures.exit_code(kept) == 0
    assert figures.exit_code([*kept, report.row("publish_per_s", 19.9)]) == 1
    assert figures.exit_code([*kept, report.row("first_token_s3_p95_s", 5.1)]) == 1


def test_a_line_says_what_the_figure_is_made_of() -> None:
    """As `make bench-gateway` writes it."""
    told: dict[str, Any] = json.loads(report.row("list_page_cpu_ms", 8.25, items=100).line())
    assert (told["figure"], told["value"], told["must"], told["ok"], told["items"]) == (
        "list_page_cpu_ms", 8.25, 20, True, 100,
    )  # fmt: skip
    assert "| 8.25 | ≤ 20 |" in figures.markdown([report.row("list_page_cpu_ms", 8.25)])
