"""The sockets that a gateway listens on: bound before anything else starts, given up without losing a connection.

Gateways that share a port have a socket each (`SO_REUSEPORT`): the kernel spreads new connections over them, and
whoever is about to close one first lets no more in.
"""

import ctypes
import errno
import socket
import struct
import sys
from dataclasses import dataclass
from typing import Final

from gateway.home import ConfigurationError

STALLED_CLIENT_S: Final = 30.0
SO_ATTACH_FILTER: Final = 26
# classic BPF on the TCP header, as (code, jump if true, jump if false, operand)
DROP_SYN: Final = (
    (0x30, 0, 0, 13),  # load the flags
    (0x54, 0, 0, 0x12),  # of which SYN and ACK
    (0x15, 0, 1, 0x02),  # SYN alone?
    (0x06, 0, 0, 0),  # drop it
    (0x06, 0, 0, 0xFFFFFFFF),  # keep all else
)


@dataclass(frozen=True, slots=True)
class Ports:
    """What one worker listens on; `operators` is None where there is no operator port."""

    public: socket.socket
    operators: socket.socket | None

    def close(self) -> None:
        self.public.close()
        if self.operators is not None:
            self.operators.close()


def bind_ports(
    *, host: str, port: int, operator_host: str, operator_port: int, workers: int = 1, shared: bool = False
) -> list[Ports]:
    """The sockets of each worker, bound; worker `i` has the operator port `operator_port + i`, 0 means none.

    Nobody else may listen on the port, unless it is `shared`: then other gateways of the same user may.

    Raises:
        ConfigurationError: one is taken, or not ours to take; none is left bound.
    """
    if workers > 1 and not shared:
        bind(host, port).close()  # fails where anybody is; among sockets that all share, a stranger would go unnoticed
    found: list[Ports] = []
    try:
        for worker in range(workers):
            public = bind(host, port, shared=shared or workers > 1)
            found.append(Ports(public, None))
            if operator_port:
                operators = bind(operator_host, operator_port + worker, shared=shared, setting="TAILOR_OPERATOR_PORT")
                found[-1] = Ports(public, operators)
    except ConfigurationError:
        for ports in found:
            ports.close()
        raise
    return found


def bind(host: str, port: int, *, shared: bool = False, setting: str = "TAILOR_PORT") -> socket.socket:
    """A socket bound to the address; its connections are cut when a peer takes nothing for `STALLED_CLIENT_S`.

    Raises:
        ConfigurationError: it is taken, or not ours to take.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if sys.platform == "linux":  # an answer that nobody reads would hold its bytes, and its adapter, for ever
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STALLED_CLIENT_S * 1_000))
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigurationError(
                f"Port {port} on {host} is in use: stop what listens there or set {setting} to a free one."
            ) from error
        raise ConfigurationError(f"Cannot listen on {host} port {port}: {error.strerror}.") from error
    return listener


def let_no_more_in(listener: socket.socket) -> None:
    """From now on the kernel drops what opens a connection; what is under way still arrives and is to be accepted.

    A socket that is closed takes its queue with it: those clients would see a reset. A dropped SYN is sent again after
    a second, and then finds another gateway's socket, or a port that is closed. Linux only; elsewhere nothing happens.
    """
    if sys.platform != "linux":
        return
    program = b"".join(struct.pack("=HBBI", *step) for step in DROP_SYN)
    buffer = ctypes.create_string_buffer(program, len(program))
    filter_ = struct.pack("@HP", len(DROP_SYN), ctypes.addressof(buffer))
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, filter_)
