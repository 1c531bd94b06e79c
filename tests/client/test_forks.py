"""A program with a coordinator may fork, as data loaders do, while calls are under way."""

import os
import subprocess
import sys
from pathlib import Path

from expertd.client.tools.cluster import LocalCluster

FORKS = 100
PROGRAM = f"""
import os, sys, threading
from expertd import CoordinatorConfig, SyncCoordinator
import torch

def call():
    while not done.is_set():
        with SyncCoordinator(sys.argv[1:], CoordinatorConfig(shared_memory_bytes=0)) as moe:
            for _ in range(3):
                moe(1, torch.ones(1, 256), topk_ids=torch.tensor([[3]]), topk_weights=torch.ones(1, 1))
                calls.append(None)

calls = []
done = threading.Event()
callers = [threading.Thread(target=call) for _ in range(3)]
for caller in callers:
    caller.start()
failed = 0
for _ in range({FORKS}):
    if (child := os.fork()) == 0:
        os._exit(0)
    failed += os.waitpid(child, 0)[1] != 0
done.set()
for caller in callers:
    caller.join()
print(failed, len(calls) > 10)
"""


async def test_children_end_well(small_model: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"}
    async with LocalCluster(small_model, ["0-15"], ["--backend", "torch", "--threads", "1"]) as cluster:
        command = (sys.executable, "-c", PROGRAM, *cluster.addresses)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "0 True"), done.stderr[-3000:]
