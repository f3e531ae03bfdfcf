"""What a run tells: a line on screen and a line in metrics.jsonl per interval, on rank 0."""
import contextlib
import itertools
import json
import math
import os
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
from lib.checkpoint import write_whole


class Log:
    """metrics.jsonl in out_dir and one line on screen per entry, on rank 0 only."""

    def __init__(self, cfg, rank, world, device, lines, start=0):
        """Print once what this run is: configuration, versions, device, and the caller's own lines."""
        self.rank, self.out_dir, self.t0, self.device, self.wandb = rank, Path(cfg.out_dir), time.time(), device, None
        if rank:
            return
        if cfg.init_from != "resume" and (self.out_dir / "last.pt").is_file():  # a job that was put in the queue again
            names = (self.out_dir.with_name(f"{self.out_dir.name}.{i}") for i in itertools.count(1))
            aside = next(path for path in names if not path.exists())
            os.replace(self.out_dir, aside)
            print(f"{self.out_dir} held a run, now in {aside}; --init_from=resume would have gone on with it")
        self.out_dir.mkdir(parents=True, exist_ok=True)
        about = {"command": sys.argv, "commit": git_commit(), "python": platform.python_version(),
                 "torch": torch.__version__, "device": str(device), "world": world, "threads": torch.get_num_threads()}
        (self.out_dir / "run.json").write_text(json.dumps({"config": asdict(cfg), **about}, indent=2) + "\n")
        print("  ".join(f"{k}={v}" for k, v in asdict(cfg).items()))
        print(f"commit {about['commit']}, python {about['python']}, torch {about['torch']}, {device}, "
              f"{world} process(es) of {about['threads']} threads")
        for line in lines:
            print(line)
        path = self.out_dir / "metrics.jsonl"
        write_whole(path, "".join(kept_rows(path, start)) if cfg.init_from == "resume" else "")
        self.file = open(path, "a")
        if cfg.wandb:
            import wandb
            self.wandb = wandb.init(project=cfg.wandb, name=self.out_dir.name, config=asdict(cfg))

    def write(self, step, total=None, done=0, **metrics):
        """done: steps finished in this process's life, for the ETA."""
        if self.rank:
            return
        metrics["memory_gb"] = peak_memory(self.device)
        entry = {"step": step, "time": round(time.time() - self.t0, 2)}
        entry |= {k: (float(f"{v:.6g}") if isinstance(v, float) else v) for k, v in metrics.items()}
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        if self.wandb:
            self.wandb.log({f"{k}/{i}" if isinstance(v, list) else k: x for k, v in entry.items()
                            for i, x in enumerate(v if isinstance(v, list) else [v])}, step=step)
        text = " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
        eta = ""
        if total and done:
            eta = f" | eta {(time.time() - self.t0) / done * (total - step):.0f}s"
        print(f"step {step}{f'/{total}' if total else ''} | {text}{eta}", flush=True)



class Means:
    """Means over the micro-batches of a step and over all processes.

    add(share, name=value): share is this micro-batch's part of the process's clips, so that shares sum to 1. Values are
    numbers or tensors of any shape; they stay on their device until read() is called.
    """

    def __init__(self):
        self.sums = {}

    def add(self, share, **values):
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float32).detach() * share
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def read(self):
        """{name: mean over all processes}, a float or a list of floats. All processes have to call it."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        means = {}
        for name, value in self.sums.items():
            numbers = run.all_sum(*(value.flatten() / world).tolist())
            means[name] = numbers if value.dim() else numbers[0]
        return means


def kept_rows(path, start):
    """Lines of metrics.jsonl that a run resumed at step `start` will not write again; training rows have an lr."""
    for line in path.read_text().splitlines(keepends=True) if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):  # the line a killed process was writing
            row = json.loads(line)
            if row["step"] < start or row["step"] == start and "lr" in row:
                yield line



def peak_memory(device):
    """GiB this process had at most: on the GPU, or resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2 ** 30



def git_commit():
    try:
        run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                             text=True)
        return run.stdout.strip() or "unknown"
    except OSError:
        return "unknown"



def check_finite(loss, step, keys):
    if not math.isfinite(loss):
        raise FloatingPointError(f"loss is {loss} at step {step}; clips of this step: {', '.join(keys[:8])}")



def count_parameters(module):
    return sum(p.numel() for p in module.parameters())

