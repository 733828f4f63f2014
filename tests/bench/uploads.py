"""What taking in a large upload costs, beside `cp` and `sha256sum` of the same file.

    python -m tests.bench.uploads BYTES [WAY …]       ways: form, tar, parts; all by default

Prints a JSON object for each way: {"way", "bytes", "rounds", "upload_s", "baseline_s", "throughput_ratio", "cpu_s",
"baseline_cpu_s", "cpu_ratio", "extra_rss_mib"}. The file is no safetensors file: it is received, hashed and staged
(in parts: stored and acknowledged durably, then put together and hashed), then refused by its first bytes: no values
are inspected. `upload_s`: from the first byte sent to the answer, in parts to that of completing; `complete_s`: what of
it completing took. Parts are sent as `tailor adapter push` sends them, two at a time. Ratios are medians over rounds
that alternate with the baseline, which copies to the same disk. Memory is the gateway's own process, its peak over what
it had before.
"""

import asyncio
import hashlib
import http.client
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from gateway.push import PARTS_AT_ONCE
from tests.bad_adapters import write_base
from tests.gateways import GatewayProcess, gateway_settings, new_key
from tests.ports import free_port

ROUNDS: Final = 3
BLOCK: Final = 16 << 20
BOUNDARY: Final = "frontier"
CONFIG: Final = b'{"peft_type": "LORA"}'
WAYS: Final = ("form", "tar", "parts")


@dataclass
class Measured:
    """One way's rounds, in seconds and bytes."""

    upload_s: list[float] = field(default_factory=list)
    complete_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    baseline_s: list[float] = field(default_factory=list)
    baseline_cpu_s: list[float] = field(default_factory=list)
    extra_rss_bytes: int = 0

    def told(self, way: str, size_bytes: int) -> dict[str, Any]:
        ratio = [base / own for base, own in zip(self.baseline_s, self.upload_s, strict=True)]
        cpu = [base / own for base, own in zip(self.baseline_cpu_s, self.cpu_s, strict=True)]
        more = {"complete_s": round(statistics.median(self.complete_s), 3)} if self.complete_s else {}
        return {
            "way": way,
            "bytes": size_bytes,
            "rounds": len(self.upload_s),
            "upload_s": round(statistics.median(self.upload_s), 3),
            **more,
            "baseline_s": round(statistics.median(self.baseline_s), 3),
            "throughput_ratio": round(statistics.median(ratio), 3),
            "cpu_s": round(statistics.median(self.cpu_s), 3),
            "baseline_cpu_s": round(statistics.median(self.baseline_cpu_s), 3),
            "cpu_ratio": round(statistics.median(cpu), 3),
            "extra_rss_mib": round(self.extra_rss_bytes / (1 << 20), 1),
        }


class PeakMemory:
    """A process's highest resident size while the block runs, above what it had at its begin; sampled."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self.before_bytes = self._rss()
        self.peak_bytes = self.before_bytes

    def _rss(self) -> int:
        return int(self._process.memory_info().rss)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self.peak_bytes = max(self.peak_bytes, self._rss())

    @property
    def extra_bytes(self) -> int:
        return self.peak_bytes - self.before_bytes


@dataclass
class Server:
    """The gateway under measure, and how a body is sent to it: from the file to the socket by the kernel."""

    port: int
    pid: int
    key: str

    def send(self, path: str, kind: str, head: bytes, file: Path | None, tail: bytes) -> tuple[int, bytes]:
        size = len(head) + (file.stat().st_size if file else 0) + len(tail)
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            request = (
                f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {self.key}\r\n"
                f"content-type: {kind}\r\ncontent-length: {size}\r\n\r\n"
            )
            connection.sendall(request.encode() + head)
            if file is not None:
                with file.open("rb") as opened:
                    connection.sendfile(opened)
            connection.sendall(tail)
            with http.client.HTTPResponse(connection) as answer:
                answer.begin()
                return answer.status, answer.read()

    def call(self, method: str, path: str, body: bytes, **headers: str) -> Any:
        told = {"authorization": f"Bearer {self.key}", "content-type": "application/json", **headers}
        with closing(http.client.HTTPConnection("127.0.0.1", self.port)) as connection:
            connection.request(method, path, body, told)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def cpu_s(self) -> float:
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)


def by_form(server: Server, weights: Path) -> None:
    def part(name: str) -> bytes:
        return f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n'.encode()

    head = part("adapter_config.json") + CONFIG + b"\r\n" + part("adapter_model.safetensors")
    kind = f"multipart/form-data; boundary={BOUNDARY}"
    status, told = server.send("/v1/adapters/bot/versions", kind, head, weights, f"\r\n--{BOUNDARY}--\r\n".encode())
    assert status == 422, told


def by_tar(server: Server, weights: Path) -> None:
    def header(name: str, size: int) -> bytes:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf()

    size = weights.stat().st_size
    head = header("adapter_config.json", len(CONFIG)) + CONFIG + bytes(-len(CONFIG) % 512)
    head += header("adapter_model.safetensors", size)
    tail = bytes(-size % 512 + 1024)
    status, told = server.send("/v1/adapters/bot/versions", "application/x-tar", head, weights, tail)
    assert status == 422, told


def by_parts(server: Server, weights: Path, sha256: str) -> float:
    """What completing took, in seconds."""
    size = weights.stat().st_size
    config_sha256 = hashlib.sha256(CONFIG).hexdigest()
    files = [
        {"name": "adapter_config.json", "bytes": len(CONFIG), "sha256": config_sha256},
        {"name": "adapter_model.safetensors", "bytes": size, "sha256": sha256},
    ]
    status, upload = server.call("POST", "/v1/adapters/bot/uploads", json.dumps({"files": files}).encode())
    assert status == 201, upload
    place = f"/v1/adapters/bot/uploads/{upload['id']}"
    sent = {"x-content-sha256": config_sha256}
    assert server.call("PUT", f"{place}/adapter_config.json/1", CONFIG, **sent)[0] == 200

    def send(number: int) -> None:
        with weights.open("rb") as opened:
            opened.seek((number - 1) * upload["part_bytes"])
            data = opened.read(upload["part_bytes"])
        sent = {"x-content-sha256": hashlib.sha256(data).hexdigest()}
        status, told = server.call("PUT", f"{place}/adapter_model.safetensors/{number}", data, **sent)
        assert status == 200, told

    with ThreadPoolExecutor(PARTS_AT_ONCE) as senders:
        list(senders.map(send, range(1, -(-size // upload["part_bytes"]) + 1)))
    begin = time.perf_counter()
    status, told = server.call("POST", f"{place}/complete", b"")
    assert status == 422, told
    return time.perf_counter() - begin


def baseline(weights: Path, folder: Path) -> tuple[float, float]:
    """`cp`, then `sha256sum` of the copy: seconds, and seconds of CPU."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    copy = folder / "copy"
    subprocess.run(["cp", weights, copy], check=True)
    subprocess.run(["sha256sum", copy], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    copy.unlink()
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(way: str, server: Server, weights: Path, sha256: str, folder: Path, rounds: int) -> Measured:
    """Rounds that alternate with the baseline."""
    found = Measured()
    send: Callable[[Server, Path], None] = by_form if way == "form" else by_tar
    for _ in range(rounds):
        base_s, base_cpu_s = baseline(weights, folder)
        found.baseline_s.append(base_s)
        found.baseline_cpu_s.append(base_cpu_s)
        cpu_s, begin = server.cpu_s(), time.perf_counter()
        with PeakMemory(server.pid) as memory:
            if way == "parts":
                found.complete_s.append(by_parts(server, weights, sha256))
            else:
                send(server, weights)
        found.upload_s.append(time.perf_counter() - begin)
        found.cpu_s.append(server.cpu_s() - cpu_s)
        found.extra_rss_bytes = max(found.extra_rss_bytes, memory.extra_bytes)
    return found


def write_weights(path: Path, size_bytes: int) -> str:
    """Bytes that do not shrink, and no safetensors header; their SHA-256."""
    block = os.urandom(BLOCK)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for at in range(0, size_bytes, BLOCK):
            piece = b"\xff" * 8 + block[8 : min(BLOCK, size_bytes - at)]
            file.write(piece)
            digest.update(piece)
    return digest.hexdigest()


async def run(size_bytes: int, ways: tuple[str, ...], folder: Path, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """One gateway, each way in turn, in `folder`, which is on the disk that is measured."""
    settings = gateway_settings(write_base(folder / "base"), TAILOR_MAX_ADAPTER_BYTES=str(size_bytes + 1))
    gateway = GatewayProcess(free_port(), folder / "home", settings, folder / "gateway.log")
    await gateway.start()
    try:
        await gateway.serves()
        server = Server(gateway.port, gateway.pid, await new_key(gateway.url, gateway.operator_key()))
        weights = folder / "weights"
        sha256 = write_weights(weights, size_bytes)
        small = folder / "small"
        small_sha256 = write_weights(small, 1 << 20)
        for send in (by_form, by_tar):  # the inspection's process is there, and what is imported with a first upload
            await asyncio.to_thread(send, server, small)
        await asyncio.to_thread(by_parts, server, small, small_sha256)
        return [
            (await asyncio.to_thread(measure, way, server, weights, sha256, folder, rounds)).told(way, size_bytes)
            for way in ways
        ]
    finally:
        await gateway.stop()


def main() -> None:
    size_bytes, ways = int(sys.argv[1]), tuple(sys.argv[2:]) or WAYS
    with tempfile.TemporaryDirectory(dir=os.environ.get("TAILOR_BENCH_FOLDER")) as folder:
        for told in asyncio.run(run(size_bytes, ways, Path(folder))):
            print(json.dumps(told), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
