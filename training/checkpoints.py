"""Checkpoints of a run: one file each, whole or not there, named by what is in it.

A file `step-00000012-<digest>.safetensors` holds tensors and, as JSON in its header, facts. It is written under another
name, synced and renamed; whoever reads it hashes it, so one that a crash or a disk tore is passed over.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from adapter_store.disk import sync

KEPT = 2
DIGEST_LENGTH = 32
NAME = re.compile(rf"step-(\d{{8,}})-([0-9a-f]{{{DIGEST_LENGTH}}})\.safetensors")
PARTIAL = ".partial"
FACTS = "tailor"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a run was after `step` steps."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Put it into `folder`, then drop all but the last two; the same content has the same name.

    Raises:
        OSError: nothing that was there is lost.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = save(checkpoint.tensors, {FACTS: json.dumps(checkpoint.facts, sort_keys=True)})
    path = folder / f"step-{checkpoint.step:08d}-{_digest(content)}.safetensors"
    partial = path.with_suffix(PARTIAL)
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)  # over a torn one of this name too
    sync(folder)
    for old in [*_newest_first(folder)[KEPT:], *folder.glob(f"step-*{PARTIAL}")]:
        old.unlink(missing_ok=True)
    return path


def newest(folder: Path) -> Checkpoint | None:
    """The last one that is whole; None where there is none."""
    for path in _newest_first(folder):
        name = NAME.fullmatch(path.name)
        content = path.read_bytes()
        if name is not None and name[2] == _digest(content):
            return Checkpoint(int(name[1]), load(content), json.loads(_metadata(content)[FACTS]))
    return None


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*.safetensors") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (int(path.name.split("-")[1]), path.name), reverse=True)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGEST_LENGTH]


def _metadata(content: bytes) -> Mapping[str, str]:
    """safetensors' header: its length in 8 bytes, then JSON."""
    length = int.from_bytes(content[:8], "little")
    metadata: Mapping[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return metadata
