"""How the machine is shared out among its replicas."""

import os

import pytest

from gateway.home import ConfigurationError
from gateway.replicas.launch import share_of_machine


def shares(count: int, device: str, *vllm_args: str, **environment: str) -> list[dict[str, str]]:
    return [share_of_machine(number, count, device, vllm_args, environment) for number in range(count)]


def test_each_replica_gets_gpus_of_its_own() -> None:
    """As many as tensor parallelism asks for, out of those that this process was given."""
    assert shares(2, "cuda") == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    assert shares(2, "cuda", "--tensor-parallel-size", "2", CUDA_VISIBLE_DEVICES="4,5,6,7") == [
        {"CUDA_VISIBLE_DEVICES": "4,5"},
        {"CUDA_VISIBLE_DEVICES": "6,7"},
    ]


def test_too_few_gpus_are_told() -> None:
    """Before an engine is started that would find none."""
    with pytest.raises(ConfigurationError, match="CUDA_VISIBLE_DEVICES=0 is too few for 2 replicas"):
        shares(2, "cuda", CUDA_VISIBLE_DEVICES="0")


def test_replicas_share_no_core() -> None:
    """Each is bound to CPUs of its own, all of them CPUs that this process may use."""
    allowed = {str(cpu) for cpu in os.sched_getaffinity(0)}
    count = min(2, len(allowed))
    bound = [set(share["VLLM_CPU_OMP_THREADS_BIND"].split(",")) for share in shares(count, "cpu")]
    assert sum(map(len, bound)) == len(set().union(*bound))
    assert set().union(*bound) <= allowed


def test_more_replicas_than_cpus_are_not_bound() -> None:
    """They share what there is, a thread each."""
    count = len(os.sched_getaffinity(0)) + 1
    assert shares(count, "cpu")[0] == {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def test_a_binding_that_is_set_stays() -> None:
    """Whoever sets vLLM's own variable knows the machine."""
    assert shares(2, "cpu", VLLM_CPU_OMP_THREADS_BIND="0-3") == [{}, {}]
