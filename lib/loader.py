"""The order of the data, as a pure function of seed and step, and the loaders that follow it."""
import math
import os
import signal
import time
import warnings

import numpy as np
import torch


def divide_batch(batch_size, rank, world):
    """batch_size, or with one warning the nearest multiple of the number of processes."""
    whole = max(1, round(batch_size / world)) * world
    if whole != batch_size and rank == 0:
        warnings.warn(f"batch_size={batch_size} does not divide among {world} processes: taken as {whole}",
                      stacklevel=2)
    return whole


class StepSampler:
    """Batches of dataset indices for steps start..total-1, a pure function of (seed, step): resuming needs no state.

    All ranks walk one endless shuffled stream; step s takes `batch_size` items of it and every rank its equal share, so
    the clips of a step do not depend on the number of ranks. Each share is cut into micro-batches of at most `micro`
    (0: one), as equal as possible. Index i + epoch · n is item i in that epoch, as data.Clips takes it.
    """

    def __init__(self, n, batch_size, rank, world, micro, seed, start, total):
        if batch_size % world:
            raise ValueError(f"batch_size={batch_size} is not a multiple of the {world} processes")
        if start > total:
            raise ValueError(f"the checkpoint is of step {start}, this run ends at {total}: raise steps or epochs")
        self.n = n
        self.batch_size = batch_size
        self.rank = rank
        self.seed = seed
        self.start = start
        self.total = total
        self.epoch, self.order = -1, None

        # micro-batches of this rank's share
        self.local = batch_size // world
        n_micro = math.ceil(self.local / (micro or self.local))
        self.micro = math.ceil(self.local / n_micro)
        self.n_micro = math.ceil(self.local / self.micro)

        # the same in words
        last = self.local - (self.n_micro - 1) * self.micro
        clips = f"{self.micro} clips x {self.n_micro} micro-batches"
        if last != self.micro:
            sizes = [self.micro] * (self.n_micro - 1) + [last]
            clips = f"({' + '.join(map(str, sizes))}) clips in {self.n_micro} micro-batches"
        self.arithmetic = f"batch {batch_size} = {clips} x {world} processes"

    def item(self, position):
        """Dataset index at a position of the endless stream."""
        epoch, place = divmod(position, self.n)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
        return int(self.order[place]) + self.n * epoch

    def __iter__(self):
        for step in range(self.start, self.total):
            first = step * self.batch_size + self.rank * self.local
            share = [self.item(first + i) for i in range(self.local)]
            for i in range(0, self.local, self.micro):
                yield share[i:i + self.micro]

    def __len__(self):
        return (self.total - self.start) * self.n_micro


def ignore_signals(worker):
    """Data workers leave it to their parent what a signal to the whole group means."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def send(tensor, device):
    """tensor.to(device) without waiting for a GPU, which takes what it was sent when its turn comes."""
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


def cores_per_process():
    """Cores that each of this machine's training processes may use for reading, at most 16."""
    n_cores = os.cpu_count() or 1
    n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(16, max(1, n_cores // n_processes))


def make_loader(dataset, sampler, n_workers, collate):
    """A DataLoader over StepSampler's batches, or any list of index lists. n_workers None: one per core."""
    workers = {}
    if n_workers is None:
        n_workers = cores_per_process()
    if n_workers:
        workers = dict(num_workers=n_workers, worker_init_fn=ignore_signals, multiprocessing_context="spawn")
    # A private generator: without one, DataLoader draws its base seed from torch's global generator and a resumed run
    # would differ.
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate, pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(), **workers)


class Feed:
    """Endless next() over a loader that also counts how long the caller had to wait."""

    def __init__(self, loader):
        self.batches = iter(loader)
        self.seconds = 0.0

    def __next__(self):
        t0 = time.perf_counter()
        batch = next(self.batches)
        self.seconds += time.perf_counter() - t0
        return batch

    def waited_ms(self, steps):
        """Milliseconds per step since the last call."""
        ms = self.seconds * 1000 / steps
        self.seconds = 0.0
        return ms


def shard(n, rank, world, batch_size):
    """Index lists of this rank's share of an evaluation set: every item exactly once over all ranks."""
    mine = list(range(rank, n, world))
    return [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]
