"""What a run tells: a line on screen and a line in metrics.jsonl per interval, on rank 0."""
import contextlib
import json
import math
import platform
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from lib import run
from lib.checkpoint import take_folder
from lib.text import naming, write_whole


class Log:
    """metrics.jsonl in out_dir and one line on screen per entry, on rank 0 only."""

    def __init__(self, cfg, rank, world, device, lines, start=0):
        self.rank = rank
        self.out_dir = Path(cfg.out_dir)
        self.device = device
        self.t0 = time.time()
        self.wandb = None
        if rank == 0:
            self.open(cfg, world, lines, start)
        run.LOOP.append(cfg.out_dir)

    def open(self, cfg, world, lines, start):
        """Take out_dir for this run and print once what it is: settings, versions, device, the caller's own lines."""
        resumed = cfg.init_from == "resume"
        take_folder(self.out_dir, keep=resumed)

        # run.json, and the same on screen
        about = {"command": sys.argv, "commit": git_commit(), "python": platform.python_version(),
                 "torch": torch.__version__, "device": str(self.device), "world": world,
                 "threads": torch.get_num_threads()}
        write_whole(self.out_dir / "run.json", json.dumps({"config": asdict(cfg), **about}, indent=2) + "\n")
        print("  ".join(f"{key}={value}" for key, value in asdict(cfg).items()))
        print(f"commit {about['commit']}, python {about['python']}, torch {about['torch']}, {self.device}, "
              f"{world} process(es) of {about['threads']} threads")
        for line in lines:
            print(line)
        if resumed:
            print(f"resumed at step {start}")

        # metrics.jsonl goes on where the checkpoint was written
        path = self.out_dir / "metrics.jsonl"
        write_whole(path, "".join(kept_rows(path, start)) if resumed else "")
        self.file = open(path, "a")
        if cfg.wandb:
            import wandb
            self.wandb = wandb.init(project=cfg.wandb, name=self.out_dir.name, config=asdict(cfg))

    def write(self, step, total=None, done=0, **metrics):
        """done: steps finished in this process's life, for the ETA."""
        if self.rank > 0:
            return
        metrics["memory_gb"] = peak_memory(self.device)
        seconds = time.time() - self.t0

        # six digits in the file
        row = {"step": step, "time": round(seconds, 2)}
        for name, value in metrics.items():
            row[name] = rounded(value, 6)
        with naming(self.file.name):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        if self.wandb:
            self.wandb.log(flat(row), step=step)

        # four on screen
        text = " ".join(f"{name} {rounded(value, 4)}" for name, value in metrics.items())
        of = f"/{total}" if total else ""
        eta = f" | eta {seconds / done * (total - step):.0f}s" if total and done else ""
        print(f"step {step}{of} | {text}{eta}", flush=True)


def rounded(value, digits):
    """A float, or a list of them, to so many significant digits; anything else as it is."""
    if isinstance(value, list):
        return [rounded(x, digits) for x in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def flat(row):
    """Lists in a row become name/0, name/1, …"""
    out = {}
    for name, value in row.items():
        if isinstance(value, list):
            out |= {f"{name}/{i}": x for i, x in enumerate(value)}
        else:
            out[name] = value
    return out


def kept_rows(path, start):
    """Lines of metrics.jsonl that a run resumed at step `start` will not write again; training rows have an lr."""
    if not path.is_file():
        return
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        with contextlib.suppress(ValueError, TypeError, KeyError):  # the line a killed process was writing
            row = json.loads(line)
            if row["step"] < start or row["step"] == start and "lr" in row:
                yield line


# ----------------------------------------------------------------------------------------------------------------------
# numbers


class Means:
    """Means over the micro-batches of a step and over all processes.

    add(share, name=value): share is this micro-batch's part of the process's clips, so that shares sum to 1. Values are
    numbers or tensors of any shape; they stay on their device until read() or total() is called.
    """

    def __init__(self):
        self.sums = {}

    def add(self, share, **values):
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float32).detach() * share
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def total(self):
        """Sum of everything, a tensor: not finite if anything is not."""
        return sum(value.sum() for value in self.sums.values())

    def read(self):
        """{name: mean over all processes}, a float or a list of floats. All processes have to call it."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        flat = [value.flatten() / world for value in self.sums.values()]
        device = max(flat, key=lambda value: value.is_cuda).device  # numbers that Python added lie on the CPU
        numbers = torch.cat([value.to(device, non_blocking=True) for value in flat]).tolist()
        numbers = run.all_sum(*numbers)

        means = {}
        for name, value in self.sums.items():
            own, numbers = numbers[:value.numel()], numbers[value.numel():]
            means[name] = own if value.dim() else own[0]
        return means


class LossCheck:
    """Finds losses that are not finite without waiting for a GPU in every step: they stay on their device until check()
    reads them. Call it before anything is logged, validated or saved, so that no checkpoint holds broken weights."""

    def __init__(self):
        self.unread = []

    def add(self, loss, step, keys):
        """loss: a tensor of one number; keys: the clips of this step."""
        self.unread.append((loss.detach(), step, keys))

    def check(self, module=None):
        """FloatingPointError names the first step whose loss is not finite, with its clips; or says that the weights
        of `module` are not, which a gradient can do whose loss is finite."""
        if not self.unread:
            return
        losses = torch.stack([loss for loss, _, _ in self.unread]).tolist()
        for loss, (_, step, keys) in zip(losses, self.unread, strict=True):
            check_finite(loss, step, keys)
        self.unread.clear()

        if module is not None:
            finite = [weight.isfinite().all() for weight in module.parameters() if weight.requires_grad]
            if not torch.stack(finite).all():
                raise FloatingPointError(f"weights are not finite after step {step}, though all losses are: a gradient "
                                         "overflowed. Give a lower lr, or another dtype")


class Stopwatch:
    """Seconds between the parts of a step. Only of steps that are logged: what a GPU is busy with is known when it has
    been waited for."""

    def __init__(self, device, is_on):
        self.device = device
        self.is_on = is_on
        self.time = run.now(device) if is_on else 0.0

    def lap(self):
        """Seconds since the last lap; 0 if switched off."""
        if not self.is_on:
            return 0.0
        before = self.time
        self.time = run.now(self.device)
        return self.time - before


def check_finite(loss, step, keys):
    """FloatingPointError, naming step and clips, unless the loss is a finite number."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"loss is {loss} at step {step}; clips of this step: {', '.join(keys[:8])}")


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())


def peak_memory(device):
    """GiB this process had at most: on the GPU, or resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def git_commit():
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                             text=True)
        return git.stdout.strip() or "unknown"
    except OSError:
        return "unknown"
