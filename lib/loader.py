"""The order of the data, as a pure function of seed and step, and the loaders that follow it."""
import math
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
    the clips of a step do not depend on the number of ranks. Each share is cut into micro-batches of at most `micro`,
    as equal as possible. An item is index + n · epoch, as data.Clips takes it.
    """

    def __init__(self, n, batch_size, rank, world, micro, seed, start, total):
        if batch_size % world:
            raise ValueError(f"batch_size={batch_size} is not a multiple of the {world} processes")
        self.n, self.batch_size, self.rank, self.seed, self.start, self.total = n, batch_size, rank, seed, start, total
        self.local = batch_size // world
        n_micro = math.ceil(self.local / (micro or self.local))
        self.micro = math.ceil(self.local / n_micro)
        sizes = [len(range(i, min(i + self.micro, self.local))) for i in range(0, self.local, self.micro)]
        self.n_micro = len(sizes)
        clips = f"{self.micro} clips x {self.n_micro} micro-batches" if len(set(sizes)) == 1 else (
            f"({' + '.join(map(str, sizes))}) clips in {self.n_micro} micro-batches")
        self.arithmetic = f"batch {batch_size} = {clips} x {world} processes"
        self.epoch, self.order = -1, None

    def item(self, i):
        epoch, at = divmod(i, self.n)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.n)
        return int(self.order[at]) + self.n * epoch

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



def make_loader(dataset, sampler, n_workers, collate):
    """A DataLoader over StepSampler's batches (or any list of index lists). Its generator is not used for data, but
    without one it would take a number from torch's."""
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=sampler, num_workers=n_workers, collate_fn=collate, pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(), worker_init_fn=ignore_signals if n_workers else None,
        multiprocessing_context="spawn" if n_workers else None)



class Feed:
    """Endless next() over a loader that also counts how long the caller had to wait."""

    def __init__(self, loader):
        self.batches, self.seconds = iter(loader), 0.0

    def __next__(self):
        t0 = time.perf_counter()
        batch = next(self.batches)
        self.seconds += time.perf_counter() - t0
        return batch

    def waited_ms(self, steps):
        """Milliseconds per step since the last call."""
        ms, self.seconds = self.seconds * 1000 / steps, 0.0
        return ms



def shard(n, rank, world, batch_size):
    """Index lists of this rank's share of an evaluation set: every item exactly once over all ranks."""
    mine = list(range(rank, n, world))
    return [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]

