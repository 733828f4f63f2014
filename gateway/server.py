"""Runs the gateway's HTTP server: `tailor gateway` becomes `python -m gateway.server`."""

import errno
import os
import resource
import socket
import sys
from typing import Final

import uvicorn
from pydantic import ValidationError

from adapter_store.errors import AdapterStoreError
from adapter_store.process import die_with_parent
from gateway.app import create_app
from gateway.home import ConfigurationError
from gateway.logs import set_up_logging
from gateway.protocol import FrontProtocol
from gateway.settings import Settings, explain

STALLED_CLIENT_S: Final = 30.0


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Raises:
        ConfigurationError: a setting cannot be used, or the port is taken.
    """
    os.umask(0o077)  # the home may lie in a folder that others can enter
    raise_descriptor_limit()
    set_up_logging(settings.log_level)
    listener = bind(settings.host, settings.port)
    config = uvicorn.Config(
        create_app(settings),
        loop="uvloop",
        http=FrontProtocol,
        lifespan="on",
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=int(settings.drain_s),
        timeout_keep_alive=75,
        proxy_headers=False,  # nothing here trusts a forwarded address, and each request would pay for it
    )
    uvicorn.Server(config).run(sockets=[listener])


def raise_descriptor_limit() -> None:
    """As many connections as the machine allows: each client is one, and so is each request upstream."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address; its connections are cut when a peer takes nothing for `STALLED_CLIENT_S`.

    Raises:
        ConfigurationError: it is taken, or not ours to take.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sys.platform == "linux":  # an answer that nobody reads would hold its bytes, and its adapter, for ever
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STALLED_CLIENT_S * 1_000))
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigurationError(
                f"Port {port} on {host} is in use: stop what listens there or set TAILOR_PORT to a free one."
            ) from error
        raise ConfigurationError(f"Cannot listen on {host} port {port}: {error.strerror}.") from error
    return listener


def main() -> None:
    """The process's entry; what an operator can mend is told without a traceback."""
    if "--with-parent" in sys.argv:
        die_with_parent()
    try:
        serve(Settings())
    except ValidationError as error:
        sys.exit(f"tailor: {explain(error)}")
    except (ConfigurationError, AdapterStoreError) as error:
        sys.exit(f"tailor: {error}")


if __name__ == "__main__":
    main()
