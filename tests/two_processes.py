"""Run a training script in two processes, as torchrun does, but forked from one that has imported everything."""
import importlib
import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path

import torch

# the last is what DistributedDataParallel imports, which takes seconds
PRELOADED = ["train_ntp", "train_grpo", "argaze.train", "unigaze.train", "unigaze.train_mae",
             "transformers.models.dinov3_vit", "torch._dynamo"]


def two_processes(module, *args):
    """What main() of a module prints with these arguments. AssertionError if a process fails."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        screen = Path(folder, "screen.txt")
        processes = [context.Process(target=run, args=(rank, port, module, args, screen)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        for process in processes:
            process.kill()  # one that hangs would keep the tests from ending
        text = screen.read_text()
    assert [process.exitcode for process in processes] == [0, 0], text
    return text


def run(rank, port, module, args, screen):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost",
                      MASTER_PORT=str(port))
    file = open(screen, "a")
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.argv = [module, *map(str, args)]
    torch.set_num_threads(1)
    importlib.import_module(module).main()
