"""The gateway's entry: `tailor gateway` becomes `python -m gateway.server`.

One worker serves in this process. Several are children of it, and then it stays small: whatever a worker needs is
imported where a worker begins.
"""

import argparse
import asyncio
import ctypes
import gc
import socket
import sys
from importlib import import_module
from types import ModuleType
from typing import Final

from pydantic import ValidationError

from adapter_store.errors import AdapterStoreError
from adapter_store.late import import_when_used
from adapter_store.process import die_with_parent
from gateway.home import ConfigurationError
from gateway.listening import Ports, bind_ports
from gateway.settings import Settings, explain

UNUSED: Final = ("watchfiles", "psutil", "pydantic.v1", "pydantic_extra_types", "email_validator", "orjson")
"""3 MiB, imported where they are installed: by uvicorn's reloader, a detector of OpenTelemetry's, FastAPI's past, its
forms of a colour and of an address, and an answer of its that nobody gives here."""
LATE: Final = ("html",)
"""0.5 MiB, imported by Starlette's page for debugging."""

M_ARENA_MAX: Final = -8  # malloc.h of glibc


def main() -> None:
    """The process's entry; what an operator can mend is told without a traceback."""
    _share_one_heap()
    _leave_out_what_is_not_used()
    arguments = _arguments()
    if arguments.with_parent:
        die_with_parent()
    try:
        settings = Settings()
        if arguments.worker is None and settings.workers > 1:
            _run_workers(settings)
        else:
            _run_worker(settings, arguments)
    except ValidationError as error:
        sys.exit(f"tailor: {explain(error)}")
    except (ConfigurationError, AdapterStoreError) as error:
        sys.exit(f"tailor: {error}")


def _share_one_heap() -> None:
    """glibc gives threads heaps of their own, each with its slack: 1.2 MiB after load here, where one thread works."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)


def _leave_out_what_is_not_used() -> None:
    for name in UNUSED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # the import system's word for "not to be found"
    for name in LATE:
        import_when_used(name)
    sys.modules.setdefault("uvicorn.main", _UvicornsCommand("uvicorn.main"))


class _UvicornsCommand(ModuleType):
    """Stands for the module of uvicorn's command, with click and its supervisors 1 MiB, of which its package needs the
    server alone."""

    main = run = None

    def __getattr__(self, name: str) -> object:
        return getattr(import_module("uvicorn.server"), name)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("gateway.server")
    parser.add_argument("--with-parent", action="store_true", help="end when the parent does")
    parser.add_argument("--worker", type=int, help="which of several workers this is")
    parser.add_argument("--listener", type=int, help="the inherited descriptor of its public socket")
    parser.add_argument("--operators", type=int, help="the same of its operator port")
    return parser.parse_args()


def _run_workers(settings: Settings) -> None:
    from gateway.workers import run_workers

    asyncio.run(run_workers(settings))


def _run_worker(settings: Settings, arguments: argparse.Namespace) -> None:
    gc.disable()  # until the application serves: nothing of it is garbage, and looking costs a tenth of the start
    from gateway.worker import serve

    if arguments.worker is None:
        serve(settings, ports_of(settings)[0])
    else:
        public = socket.socket(fileno=arguments.listener)
        operators = socket.socket(fileno=arguments.operators) if arguments.operators is not None else None
        serve(settings, Ports(public, operators), has_parent=True)


def ports_of(settings: Settings) -> list[Ports]:
    """The sockets of this gateway's workers.

    Raises:
        ConfigurationError: a port is taken, or not ours to take.
    """
    return bind_ports(
        host=settings.host,
        port=settings.port,
        operator_host=settings.operator_host,
        operator_port=settings.operator_port,
        workers=settings.workers,
        shared=settings.reuse_port,
    )


if __name__ == "__main__":
    main()
