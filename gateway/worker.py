"""One gateway process: an event loop, its sockets, the application on them, until a signal and the drain after it."""

import logging
import os
import resource
import signal
from typing import Final

import uvicorn

from gateway import compiled
from gateway.app import create_app
from gateway.draining import DrainingServer
from gateway.listening import Ports
from gateway.logs import set_up_logging
from gateway.protocol import FrontProtocol
from gateway.replicas.supervisor import READY
from gateway.settings import Settings

log = logging.getLogger("tailor.gateway")
STDOUT: Final = 1


def serve(settings: Settings, ports: Ports, *, has_parent: bool = False) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    A worker of several `has_parent`: it says `READY` on standard output once it serves, and the sockets outlive it.

    Raises:
        ConfigurationError: a setting cannot be used.
    """
    os.umask(0o077)  # the home may lie in a folder that others can enter
    raise_descriptor_limit()
    set_up_logging(settings.log_level)
    front = create_app(settings, operators=ports.operators)
    log.info("the hot path is %s", compiled.state())
    config = uvicorn.Config(
        front,
        loop="uvloop",
        http=FrontProtocol,
        lifespan="on",
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=75,
        proxy_headers=False,  # nothing here trusts a forwarded address, and each request would pay for it
    )
    server = DrainingServer(
        config,
        notice_s=settings.drain_notice_s,
        drain_s=settings.drain_s,
        keeps_listening=has_parent,
        on_started=_tell_parent if has_parent else lambda: None,
        on_drain=front.drain,
    )
    signal.signal(signal.SIGHUP, server.handle_exit if has_parent else _refuse_to_restart)
    server.run(sockets=[ports.public])


def raise_descriptor_limit() -> None:
    """As many connections as the machine allows: each client is one, and so is each request upstream."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _tell_parent() -> None:
    os.write(STDOUT, READY)  # in one piece, which `print` does not promise


def _refuse_to_restart(*_: object) -> None:
    log.warning(
        "SIGHUP restarts the workers of a gateway that has several; for one alone start another beside it with "
        "TAILOR_REUSE_PORT=true and stop this one"
    )
