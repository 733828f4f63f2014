"""How the processes of the vLLM that is installed wait for each other on a CPU, as the agent sets it."""

import subprocess
import sys

# in a process of its own: what is set is vLLM's, for good
PROGRAM = """
import pickle, threading, time
from adapter_store.agent.quiet import wait_quietly
wait_quietly()
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
writer = MessageQueue(1, 1)
reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
ready = threading.Thread(target=writer.wait_until_ready)
ready.start()
reader.wait_until_ready()
ready.join()

def write_without_notice():
    body = pickle.dumps("found")
    with writer.acquire_write() as block:
        block[:3] = b"\\0\\0\\1"
        block[3 : 7 + len(body)] = len(body).to_bytes(4, "big") + body

writes = threading.Timer(0.2, write_without_notice)
begun = time.monotonic()
writes.start()
said = reader.dequeue(indefinite=True)
print(said, time.monotonic() - begun)
"""


def test_a_message_whose_notice_was_lost_is_found_soon() -> None:
    """vLLM looks again after five seconds: so long all streams of a replica stood still."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    said, took = done.stdout.split()[-2:]
    assert said == "found"
    assert 0.2 <= float(took) < 4.5
