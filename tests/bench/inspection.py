"""What inspecting an adapter of 100 MB costs. `python -m tests.bench.inspection`

CPU time of the gateway's inspection worker, and how far the peak of its resident memory rises, for files of each dtype
served in each. One JSON object a line; exits 1 where one takes more than 1.5 s or 16 MiB.
"""

import asyncio
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil

from adapter_store.base_model import BaseModel
from adapter_store.faults import Bounds
from adapter_store.inspector import Inspector
from tests.bad_adapters import PREFIX, Files, Tensor, Tensors

SIZE_BYTES = 100_000_000
RANK, HIDDEN, INNER = 32, 4_096, 14_336
MUST_S = 1.5
MUST_MIB = 16.0
# Of an 8B Llama; as many layers as the size asks for.
WIDTHS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, 1_024), "self_attn.v_proj": (HIDDEN, 1_024),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (HIDDEN, INNER), "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}  # fmt: skip


async def main() -> int:
    slow = 0
    with tempfile.TemporaryDirectory() as name:
        for stored in ("F32", "F16", "BF16"):
            modules, size = write_adapter(Path(name), stored)
            for served in ("float32", "float16", "bfloat16"):
                base = BaseModel("base", "", "LlamaForCausalLM", served, modules)
                took_s, grown_mib = await cost(Path(name), base)
                slow += took_s > MUST_S or grown_mib > MUST_MIB
                figure = {"stored": stored, "served": served, "MB": round(size / 1e6, 1), "cpu_s": round(took_s, 3)}
                print(json.dumps({**figure, "rss_growth_mib": round(grown_mib, 1)}))  # noqa: T201
    return 1 if slow else 0


def write_adapter(folder: Path, stored: str) -> tuple[dict[str, tuple[int, int]], int]:
    """The base's modules that it is for, and its size."""
    layer_bytes = sum(RANK * sum(widths) for widths in WIDTHS.values()) * (4 if stored == "F32" else 2)
    modules = {
        f"model.layers.{layer}.{name}": widths
        for layer in range(round(SIZE_BYTES / layer_bytes))
        for name, widths in WIDTHS.items()
    }
    values = np.random.default_rng(0)
    tensors: Tensors = {}
    for module, (width_in, width_out) in modules.items():
        for side, shape in (("lora_A", [RANK, width_in]), ("lora_B", [width_out, RANK])):
            numbers = values.normal(0, 0.02, shape).astype("<f4")
            tensors[f"{PREFIX}{module}.{side}.weight"] = Tensor(stored, shape, encoded(numbers, stored))
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 64, "target_modules": "all-linear"}
    Files(folder, config, tensors).write()
    return modules, (folder / "adapter_model.safetensors").stat().st_size


def encoded(numbers: "np.ndarray[tuple[int, ...], np.dtype[np.float32]]", stored: str) -> bytes:
    if stored == "BF16":
        return (numbers.view("<u4") >> 16).astype("<u2").tobytes()
    return numbers.astype({"F32": "<f4", "F16": "<f2"}[stored]).tobytes()


async def cost(folder: Path, base: BaseModel) -> tuple[float, float]:
    """CPU seconds of the worker, and MiB."""
    inspector = Inspector(base, Bounds())
    await inspector.inspect(folder.parent / "none")
    worker = psutil.Process(inspector.pid)
    begin, before = worker.cpu_times(), peak_mib(worker)
    assert (await inspector.inspect(folder)).faults == ()
    end, after = worker.cpu_times(), peak_mib(worker)
    await inspector.close()
    return end.user + end.system - begin.user - begin.system, after - before


def peak_mib(process: psutil.Process) -> float:
    lines = (Path("/proc") / str(process.pid) / "status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
