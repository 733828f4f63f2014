"""Makes a piece of torch work repeat bit for bit on one machine, without leaving its settings behind."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# cuBLAS picks its algorithm by free workspace unless this is set; torch refuses deterministic mode without it
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic(*, threads: int | None = None) -> Iterator[None]:
    """Allow only deterministic kernels inside the block; outside, everything is as before.

    The number of CPU threads decides the order in which partial sums are added, so give `threads` where
    the result must not depend on how many cores the process happened to see.
    """
    threads_before = torch.get_num_threads()
    deterministic_before = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads or threads_before)
    fill_before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that writes every tensor twice
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill_before
        torch.use_deterministic_algorithms(deterministic_before)
        torch.set_num_threads(threads_before)


@contextmanager
def reproducible(seed: int, *, threads: int | None = None) -> Iterator[None]:
    """Deterministic, and torch seeded, inside the block; what was drawn in it is forgotten after."""
    with deterministic(threads=threads), torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
