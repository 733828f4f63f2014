"""A load generator that is as plain as can be, told what to do and telling what it saw as `vllm bench serve` is.

python -m tests.integration.loadtests.other_tool --base-url … --dataset-path … --result-dir …
"""

import argparse
import asyncio
import json
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

PIECE: Final = b'"choices":[{'


async def main(args: argparse.Namespace) -> None:
    """Ask all, each at its time, at most so many at once; write down when each was sent and answered."""
    prompts = [json.loads(line)["prompt"] for line in args.dataset_path.read_text().splitlines()]
    place = asyncio.Semaphore(args.max_concurrency) if args.max_concurrency else nullcontext()

    async def ask(number: int) -> tuple[float, float, float, str]:
        await asyncio.sleep(number / args.request_rate)
        async with place:
            body = json.dumps({"model": args.model, "prompt": prompts[number], "stream": True})
            return await answer(urlsplit(args.base_url).port or 80, body.encode())

    told = await asyncio.gather(*(ask(number) for number in range(args.num_prompts)))
    names = ("start_times", "ttfts", "latencies", "errors")
    result = dict(zip(names, zip(*told, strict=True), strict=True))
    (args.result_dir / "bench.json").write_text(json.dumps(result))


async def answer(port: int, body: bytes) -> tuple[float, float, float, str]:
    """When it was sent; after how long its first and its last piece came; what went wrong."""
    sent, ttft, latency = time.perf_counter(), 0.0, 0.0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: here\r\nuser-agent: other\r\ncontent-length: %d\r\n\r\n"
    writer.write(head % len(body) + body)
    status = await reader.readline()
    while b"200" in status and (line := await reader.readline()) and b"[DONE]" not in line:
        if PIECE in line:
            latency = time.perf_counter() - sent
            ttft = ttft or latency
    writer.close()
    return sent, ttft, latency, "" if ttft else status.decode()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, kind in (("base-url", str), ("model", str), ("dataset-path", Path), ("result-dir", Path)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--num-prompts", type=int, required=True)
    parser.add_argument("--request-rate", type=float, default=math.inf)
    parser.add_argument("--max-concurrency", type=int, default=0)
    asyncio.run(main(parser.parse_known_args()[0]))
