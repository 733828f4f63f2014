"""Ports of the stacks that a load test starts."""

import errno
import socket
from pathlib import Path

import pytest

from loadtests.overhead.stack import free_port
from loadtests.ports import Ports


def test_a_port_is_nobody_elses_when_its_process_starts() -> None:
    """Neither another process's of the same stack nor, by Linux's choice, a connection's."""
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        found = [free_port() for _ in range(20)]
        assert taken.getsockname()[1] not in found
    assert len(set(found)) == 20
    given_to_connections = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    assert max(found) < int(given_to_connections[0])


def test_two_who_ask_are_told_different_ports(tmp_path: Path) -> None:
    """Before either listens: a stack takes seconds to start. Where none is left, it is said so."""
    few = range(30_000, 30_032)
    one, other = Ports(few, tmp_path), Ports(few, tmp_path)
    told = [each.free() for _ in range(10) for each in (one, other)]
    assert len(set(told)) == 20
    with pytest.raises(OSError, match="each of the ports 30000 to 30031 is in use") as none_left:
        told += [one.free() for _ in few]
    assert none_left.value.errno == errno.EADDRINUSE
