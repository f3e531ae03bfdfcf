"""What all stages must agree on: processes, order of the data, gaze budgets, checkpoints and logs. Nothing clever."""
import json
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import normalize

# ----------------------------------------------------------------------------------------------------------------------
# processes


def init_processes(device="auto"):
    """Join the process group that torchrun announces, if any. Returns (rank, world, device)."""
    world, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return rank, world, torch.device(device)


def seed_step(seed, step, rank, world):
    """Random numbers of a step depend on step and rank only, so a resumed run draws what it would have drawn."""
    torch.manual_seed((seed * 1_000_003 + step) * world + rank)


def shared_generator(seed, step):
    """A generator that is the same on all ranks and after a resume, for draws that must agree."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def all_sum(*values):
    """Sums over ranks of Python numbers, as floats."""
    t = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        t = t.cuda() if dist.get_backend() == "nccl" else t
        dist.all_reduce(t)
    return t.tolist()


def barrier():
    if dist.is_initialized():
        dist.barrier()


def finish():
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# data order


class StepSampler:
    """Batches of dataset indices for steps start..total-1, a pure function of (seed, step): resuming needs no state.

    All ranks walk one endless shuffled stream; step s takes `batch_size` items of it and every rank its equal share, so
    the clips of a step do not depend on the number of ranks. Each share is cut into micro-batches of at most `micro`.
    """

    def __init__(self, n, batch_size, rank, world, micro, seed, start, total):
        if batch_size % world:
            raise ValueError(f"batch_size={batch_size} is not a multiple of the {world} processes")
        self.n, self.batch_size, self.rank, self.seed, self.start, self.total = n, batch_size, rank, seed, start, total
        self.local = batch_size // world
        self.micro = min(micro or self.local, self.local)
        self.n_micro = math.ceil(self.local / self.micro)
        self.epoch, self.order = -1, None

    def item(self, i):
        epoch, at = divmod(i, self.n)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.n)
        return int(self.order[at])

    def __iter__(self):
        for step in range(self.start, self.total):
            first = step * self.batch_size + self.rank * self.local
            share = [self.item(first + i) for i in range(self.local)]
            for i in range(0, self.local, self.micro):
                yield share[i:i + self.micro]

    def __len__(self):
        return (self.total - self.start) * self.n_micro


def make_loader(dataset, sampler, n_workers, collate, seed=0):
    """A DataLoader over StepSampler's batches (or any list of index lists)."""
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=sampler, num_workers=n_workers, collate_fn=collate, pin_memory=torch.cuda.is_available(),
        persistent_workers=False, generator=torch.Generator().manual_seed(seed),
        multiprocessing_context="spawn" if n_workers else None)


def shard(n, rank, world, batch_size):
    """Index lists of this rank's share of an evaluation set: every item exactly once over all ranks."""
    mine = list(range(rank, n, world))
    return [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]


# ----------------------------------------------------------------------------------------------------------------------
# gaze budgets


def draw_ratio(kind, fixed, low, high, rate, generator):
    """Average gazing ratio of a clip. kind: fixed | uniform(low, high) | exponential(rate) cut off to (low, high)."""
    if kind == "fixed":
        return fixed
    u = torch.rand((), generator=generator, dtype=torch.float64).item()
    if kind == "uniform":
        return low + u * (high - low)
    assert kind == "exponential", kind
    a, b = math.exp(-rate * low), math.exp(-rate * high)  # inverse of the truncated distribution function
    return -math.log(a - u * (a - b)) / rate


def parse_alpha(alpha, n_frames):
    """'10,3' -> [10, 3, 3, …]: the last value is repeated over the remaining frames."""
    values = [float(a) for a in str(alpha).split(",")]
    if len(values) > n_frames or min(values) <= 0:
        raise ValueError(f"alpha={alpha!r} needs at most {n_frames} values (frames), all above 0")
    return values + values[-1:] * (n_frames - len(values))


def split_ratio(kind, ratio, n_frames, alpha, generator):
    """Per-frame ratios (T,) that average `ratio`. uniform: all equal. dirichlet: random shares. mean: their mean."""
    if kind == "uniform":
        return torch.full((n_frames,), float(ratio), dtype=torch.float64)
    alpha = torch.tensor(parse_alpha(alpha, n_frames), dtype=torch.float64)
    # a Dirichlet draw is normalised Gamma draws; numpy's take a seed, torch's take no generator
    seed = 0 if kind == "mean" else int(torch.randint(2 ** 31, (), generator=generator))
    share = alpha if kind == "mean" else torch.from_numpy(np.random.default_rng(seed).gamma(alpha.numpy()))
    return (share / share.sum() * ratio * n_frames).clamp(0, 1)


def random_gazing(budgets, n_clips, n_ids, generator=None):
    """A gaze dict of distinct random patches: budgets (T,) patches in each frame, the same number for every clip."""
    pos = []
    for t, n_t in enumerate(budgets):
        scores = torch.rand(n_clips, n_ids, generator=generator)
        pos.append(scores.argsort(dim=1)[:, :n_t] + n_ids * t)
    pos = torch.cat(pos, dim=1)
    return {"gazing_pos": pos, "if_padded_gazing": torch.zeros_like(pos, dtype=torch.bool),
            "num_gazing_each_frame": torch.tensor(list(budgets))}


def to_budgets(ratios, n_ids):
    """Per-frame ratios -> patches per frame, at least one; the rule of Gaze.generate."""
    return [max(1, int(r * n_ids + 1e-4)) for r in ratios]


# ----------------------------------------------------------------------------------------------------------------------
# validation


@torch.no_grad()
def validate(gaze, mae, loader, ratios, requirement, device):
    """Greedy gazes of validation clips and what the reconstructor makes of them, over all ranks.

    ratios (T,) share of the patches that each frame may take. Returns ({val_loss: mean over clips and frames,
    val_ratio, val_predicted: the model's own estimate of the loss}, tensors for one picture); without a reconstructor
    no losses.
    """
    sums, picture = [0.0] * 4, None
    for batch in loader:
        video = normalize(batch["video"].to(device))
        gazing = gaze.generate(video, gazing_ratio=ratios, task_loss_requirement=requirement)
        real = ~gazing["if_padded_gazing"]
        recon = None
        if mae is not None:
            recon, loss = mae(video, gazing, range(video.shape[1]))
            predicted = gaze(video, gazing)[1].gather(1, last_slots(gazing))
            sums[0] += loss.mean(1).sum().item()
            sums[1] += predicted.mean(1).sum().item()
        sums[2] += real.sum().item() / (video.shape[1] * gaze.config.num_ids)
        sums[3] += len(video)
        if picture is None:
            first = {k: v[:1] if v.dim() == 2 else v for k, v in gazing.items() if k != "gazing_mask"}
            picture = video[0], first, recon
    loss, predicted, ratio, count = all_sum(*sums)
    metrics = {"val_ratio": ratio / count}
    if mae is not None:
        metrics = {"val_loss": loss / count, "val_predicted": predicted / count} | metrics
    return metrics, picture


def last_slots(gazing):
    """(B, T) index of each frame's last real slot (its first slot where a frame has none)."""
    out, at = [], 0
    for n_t in gazing["num_gazing_each_frame"].tolist():
        n_real = (~gazing["if_padded_gazing"][:, at:at + n_t]).sum(1)  # padding lies behind the real slots
        out.append(at + (n_real - 1).clamp(min=0))
        at += n_t
    return torch.stack(out, dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# schedules and optimizers


def learning_rate(kind, step, total, lr, lr_end, warmup):
    """linear: lr -> lr_end. linear_w_warmup: 0 -> lr over `warmup` of the steps, then -> lr_end. constant."""
    if kind == "constant":
        return lr
    warm = int(warmup * total) if kind == "linear_w_warmup" else 0
    if step < warm:
        return lr * (step + 1) / warm
    return lr + (lr_end - lr) * (step - warm) / max(1, total - warm)


def exponential(step, total, start, end):
    """start · (end / start)^(step / total)"""
    return start * (end / start) ** (step / max(1, total))


def make_optimizer(kind, params, lr):
    if kind == "sgd":
        return torch.optim.SGD(params, lr=lr)
    return torch.optim.Adam(params, lr=lr)


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints and logs


def save_state(path, state):
    """torch.save under a temporary name, then rename: a killed run leaves the old file, never half a new one."""
    tmp = Path(f"{path}.tmp")
    torch.save(state, tmp)
    os.replace(tmp, path)


def load_state(path):
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path}: no such checkpoint; init_from=resume needs a run that was started in this out_dir")
    return torch.load(path, map_location="cpu", weights_only=True)


class Log:
    """metrics.jsonl in out_dir and one line on screen per entry, on rank 0 only."""

    def __init__(self, cfg, rank, world, device, lines):
        """Print once what this run is: configuration, versions, device, and the caller's own lines."""
        self.rank, self.out_dir, self.t0 = rank, Path(cfg.out_dir), time.time()
        if rank:
            return
        self.out_dir.mkdir(parents=True, exist_ok=True)
        about = {"command": sys.argv, "commit": git_commit(), "python": platform.python_version(),
                 "torch": torch.__version__, "device": str(device), "world": world, "threads": torch.get_num_threads()}
        (self.out_dir / "run.json").write_text(json.dumps({"config": asdict(cfg), **about}, indent=2) + "\n")
        print("  ".join(f"{k}={v}" for k, v in asdict(cfg).items()))
        print(f"commit {about['commit']}, python {about['python']}, torch {about['torch']}, {device}, "
              f"{world} process(es) of {about['threads']} threads")
        for line in lines:
            print(line)
        self.file = open(self.out_dir / "metrics.jsonl", "a")

    def write(self, step, total=None, done=0, **metrics):
        """done: steps finished in this process's life, for the ETA."""
        if self.rank:
            return
        entry = {"step": step, "time": round(time.time() - self.t0, 2)}
        entry |= {k: (float(f"{v:.6g}") if isinstance(v, float) else v) for k, v in metrics.items()}
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        text = " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
        eta = ""
        if total and done:
            eta = f" | eta {(time.time() - self.t0) / done * (total - step):.0f}s"
        print(f"step {step}{f'/{total}' if total else ''} | {text}{eta}", flush=True)


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
