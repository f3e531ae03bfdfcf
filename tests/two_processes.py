"""Run a training script in two processes, as torchrun does, but forked from one that has imported everything."""
import importlib
import multiprocessing
import os
import socket
import sys

import torch

# the last is what DistributedDataParallel imports, which takes seconds
PRELOADED = ["argaze.train", "unigaze.train", "unigaze.train_mae", "transformers.models.dinov3_vit", "torch._dynamo"]


def two_processes(module, *args):
    """main() of a module with these arguments. AssertionError if a process fails."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    processes = [context.Process(target=run, args=(rank, port, module, args)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    for process in processes:
        process.kill()  # one that hangs would keep the tests from ending
    assert [process.exitcode for process in processes] == [0, 0]


def run(rank, port, module, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost",
                      MASTER_PORT=str(port))
    sys.argv = [module, *map(str, args)]
    torch.set_num_threads(1)
    importlib.import_module(module).main()
