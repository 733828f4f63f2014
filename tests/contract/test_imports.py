"""What the gateway process carries, and how soon it is ready."""

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.bad_adapters import write_base
from tests.ports import free_port

HEAVY = ("torch", "peft", "vllm", "transformers", "numpy", "safetensors", "typer", "httpx")
MEMORY_LIMIT_MIB = 81  # 79 measured, compiled; load brings 9 more, of the 90 allowed


def test_the_gateway_imports_nothing_heavy() -> None:
    """torch alone would cost seconds and hundreds of MiB in a process that only relays."""
    program = "import sys, gateway.worker; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert set(HEAVY) & set(loaded) == set()


def test_the_gateway_runs_without_the_orm() -> None:
    """Nothing here uses it, and it is 6 MiB; other code of the process has all of SQLAlchemy all the same."""
    program = """
import sys
import gateway.worker
assert not [name for name in sys.modules if name.startswith("sqlalchemy.orm")]
import sqlalchemy.ext.asyncio as package
from sqlalchemy.ext.asyncio import base, engine
assert "sqlalchemy.orm" not in sys.modules
assert not hasattr(package, "__missing__")
assert "sqlalchemy.orm" not in sys.modules
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
assert "sqlalchemy.orm" in sys.modules
assert AsyncEngine is engine.AsyncEngine is gateway.database.AsyncEngine
assert AsyncSession is package.session.AsyncSession
assert "async_sessionmaker" in dir(package)
assert not hasattr(package, "missing")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_gateway_runs_without_what_its_dependencies_import_for_others() -> None:
    """uvicorn's command and Starlette's page for debugging are 1.5 MiB; who asks for them has them all the same."""
    program = """
import sys
import gateway.server
gateway.server._leave_out_what_is_not_used()
import gateway.worker
loaded = {name for name, module in sys.modules.items() if module is not None}
assert {"click", "multiprocessing", "html.entities", "orjson"} & loaded == set()
import html, uvicorn, uvicorn.server
assert uvicorn.Server is uvicorn.server.Server
assert html.unescape("&eacute;") == "é"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_routes_are_made_with_their_first_request() -> None:
    """All of them would be 2 MiB; the one that is asked for is made once."""
    program = """
import gateway.app
made = lambda: [route.path for part in gateway.app.ROUTERS for route in part.router.routes if "app" in vars(route)]
assert made() == []
gateway.app.health.router.routes[0].app
assert made() == ["/health"]
app = gateway.app.health.router.routes[0].app
assert app is gateway.app.health.router.routes[0].app
assert not hasattr(gateway.app.health.router.routes[0], "missing")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("first", ["adapter_store.engine", "sqlalchemy.ext.asyncio"])
def test_the_engine_is_the_same_whichever_way_it_came(first: str) -> None:
    """Also where other code imported SQLAlchemy's package before, or runs its init from two threads at once."""
    program = f"""
import {first}
import adapter_store.engine, sqlalchemy.ext
from concurrent.futures import ThreadPoolExecutor
def session(_: int) -> type:
    from sqlalchemy.ext.asyncio import async_sessionmaker
    return async_sessionmaker
with ThreadPoolExecutor(8) as threads:
    assert len(set(threads.map(session, range(8)))) == 1
from sqlalchemy.ext.asyncio import AsyncEngine
assert AsyncEngine is adapter_store.engine.AsyncEngine is sqlalchemy.ext.asyncio.AsyncEngine
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_command_shows_its_help_without_the_heavy_parts() -> None:
    """Each part is imported only when its verb runs."""
    program = "import sys, gateway.cli; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "peft", "vllm", "transformers", "sqlalchemy", "fastapi"} & set(loaded) == set()


@pytest.mark.parametrize("start", ["first", "later"])
def test_a_gateway_alone_is_small(start: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Resident memory at readiness stays within its bound, on an empty home and on one that exists."""
    folder = tmp_path_factory.getbasetemp() / "gateway-alone"
    base = folder / "base"
    if not base.exists():
        write_base(base)
    with _gateway(folder / "home", base) as (process, took_s):
        resident_mib = psutil.Process(process.pid).memory_info().rss / (1 << 20)
    print(f"{start} start: {took_s:.2f} s, {resident_mib:.1f} MiB")  # noqa: T201  figures of the run; time is no gate
    assert resident_mib <= MEMORY_LIMIT_MIB


class _gateway:  # noqa: N801  reads as a verb in `with`
    """A gateway process, until the block ends."""

    def __init__(self, home: Path, base: Path) -> None:
        port = free_port()
        self._url = f"http://127.0.0.1:{port}/health"
        settings = {"TAILOR_HOME": str(home), "TAILOR_BASE_MODEL": str(base), "TAILOR_PORT": str(port)}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TAILOR_")}
        self._begin = time.monotonic()
        command = [sys.executable, "-m", "gateway.server"]
        self._process = subprocess.Popen(command, env={**kept, **settings}, stderr=subprocess.DEVNULL)

    def __enter__(self) -> tuple[subprocess.Popen[bytes], float]:
        while self._process.poll() is None:
            try:
                httpx.get(self._url, timeout=1)
            except httpx.TransportError:
                time.sleep(0.02)
            else:
                return self._process, time.monotonic() - self._begin
        raise AssertionError("the gateway ended")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)
