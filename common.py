"""What all stages must agree on: processes, order of the data, gaze budgets, checkpoints and logs. Nothing clever."""
import contextlib
import importlib.util
import itertools
import json
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data import normalize
from model import one_clip

# ----------------------------------------------------------------------------------------------------------------------
# processes


def init_processes(device="auto"):
    """Join the process group that torchrun announces, if any. Returns (rank, world, device)."""
    world, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device=cuda: torch sees no GPU here (nvidia-smi, and a CUDA build of torch?): "
                             "give --device=cpu")
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    if world > 1:
        # days: who has labelled its clips waits for the others, and a run that hangs is for the scheduler to end
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(days=7))
    return rank, world, torch.device(device)


def start(cfg):
    """What every training run begins with. Returns (rank, world, device); may adjust cfg.batch_size."""
    rank, world, device = init_processes(cfg.device)
    check_same(**asdict(cfg))
    stop_on_sigterm()
    cfg.batch_size = divide_batch(cfg.batch_size, rank, world)
    return rank, world, device


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


def from_all(value):
    """List of what each rank gives, on every rank."""
    if not dist.is_initialized():
        return [value]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def count_distinct(names):
    """Number of names in the sets of all ranks together: a file that several of them met counts once."""
    return len(set().union(*from_all(names)))


def now(device):
    """Seconds, when the device has done all it was given: only then do differences mean something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def barrier():
    if dist.is_initialized():
        dist.barrier()


def check_same(**values):
    """ValueError on every rank, naming what differs, unless all processes come with the same values."""
    everyone = from_all(values)
    for rank, theirs in enumerate(everyone):
        for key in values.keys() | theirs.keys():
            if theirs.get(key) != everyone[0].get(key):
                raise ValueError(f"process {rank} has {key}={theirs.get(key)!r}, process 0 {everyone[0].get(key)!r}: "
                                 "start all processes with the same command and the same data")


STOP = []  # signals that asked for an end


def stop_on_sigterm():
    """From now on SIGTERM (a preempted job) only makes stopping() true, so that the loop can save and leave."""
    STOP.clear()
    signal.signal(signal.SIGTERM, lambda number, frame: STOP.append(number))


def stopping():
    """Whether any process was asked to end. All ranks call it at the same place, so they leave at the same step."""
    return all_sum(len(STOP))[0] > 0


def prepare(module, optimizer, cfg, world, device, resumed):
    """(module for training passes, context of its gradient sync, autocast, gradient scaler, a line that says so).

    resumed: a checkpoint whose optimizer and scaler go on, or None.
    sync(last): gradients travel between processes in the last micro-batch of a step only; it has to enclose the forward
    pass too. compile works in place, so parameter names in checkpoints stay.
    """
    name = cfg.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if cfg.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = cfg.tf32
    autocast = torch.autocast(device.type, torch.float16 if name == "float16" else torch.bfloat16, name != "float32")
    scaler = torch.amp.GradScaler(device.type, enabled=name == "float16")
    if resumed:
        optimizer.load_state_dict(resumed["optimizer"])
        scaler.load_state_dict(resumed["scaler"])
    compiled = cfg.compile and device.type != "cpu"
    if compiled:
        module.compile()
    ddp = DistributedDataParallel(module) if world > 1 else module

    def sync(last):
        return contextlib.nullcontext() if last or world == 1 else ddp.no_sync()
    line = f"precision {name}, TF32 {'on' if cfg.tf32 and device.type == 'cuda' else 'off'}, compiled: {compiled}"
    return ddp, sync, autocast, scaler, line + (" (never on a CPU)" if cfg.compile and not compiled else "")


def update(optimizer, scaler):
    """One step with the gradients that have gathered; in float16 a step whose gradients overflow is left out."""
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def finish():
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# data order


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


def numbers(text):
    """'10,3' -> [10.0, 3.0]; [nan], which passes no comparison, of anything else."""
    try:
        return [float(v) for v in str(text).split(",")]
    except ValueError:
        return [math.nan]


def parse_alpha(alpha, n_frames):
    """'10,3' -> [10, 3, 3, …]: the last value is repeated over the remaining frames."""
    values = numbers(alpha)
    if len(values) > n_frames or not all(0 < v < math.inf for v in values):
        raise ValueError(f"alpha={alpha!r} needs at most {n_frames} numbers (frames), all above 0, joined by commas")
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
            picture = video[0], one_clip(gazing, 0), recon
    loss, predicted, ratio, count = all_sum(*sums)
    metrics = {"val_ratio": ratio / count}
    if mae is not None:
        metrics = {"val_loss": loss / count, "val_predicted": predicted / count} | metrics
    return metrics, picture


def last_slots(gazing):
    """(B, T) index of each frame's last real slot (its first slot where a frame has none)."""
    out, at = [], 0
    for n_t in gazing["num_gazing_each_frame"].tolist():
        real = ~gazing["if_padded_gazing"][:, at:at + n_t]
        slots = torch.arange(n_t, device=real.device)  # published decoding may leave padding before a real slot
        out.append(at + (real * slots).amax(1) if n_t else torch.full((len(real),), at, device=real.device))
        at += n_t
    return torch.stack(out, dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# settings, schedules and optimizers


def check_settings(cfg):
    """ValueError naming the first key that no run can work with; for the keys that the scripts share."""
    least = dict(n_frames=1, stride=1, n_workers=0, batch_size=1, micro_batch=0, steps=1, val_every=1, save_every=1,
                 log_every=1, val_clips=1, reward_batch=0, max_clips=0, max_candidates=1, greedy_clips=0, study_clips=1,
                 seed=0, lr_end=0, task_loss_weight=0, weight_decay=0, n_train=1, n_val=1, label_clips=1, n_processes=1)
    for key, value in asdict(cfg).items():
        if key in least and value is not None and value < least[key]:
            raise ValueError(f"{key}={value} must be at least {least[key]}")
        share = key in ("ratio", "ratios", "ratio_min", "ratio_max", "val_ratio") or key == "other_ratios" and value
        if share and not all(0 < v <= 1 for v in numbers(value)):
            raise ValueError(f"{key}={value} must lie in (0, 1], it is a share of the patches")
        if key in ("epochs", "lr", "ratio_rate", "clip_grad") and value <= 0:
            raise ValueError(f"{key}={value} must be above 0")
        if key == "wandb" and value and importlib.util.find_spec("wandb") is None:
            raise ValueError(f"wandb={value} needs the package: pip install wandb, or --wandb=none")
        if key in ("warmup", "beta2") and not 0 <= value < 1 or key == "gamma" and not 0 <= value <= 1:
            raise ValueError(f"{key}={value} must lie between 0 and 1")
        for name in ("ratio", "requirement"):
            if key == f"{name}_min" and value > getattr(cfg, f"{name}_max"):
                raise ValueError(f"{key}={value} is above {name}_max={getattr(cfg, f'{name}_max')}")
    parse_alpha(cfg.alpha, cfg.n_frames)


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


class Muon:
    """Muon for the weight matrices of the layers, Adam for all else (embeddings, convolutions, biases, norms).

    A step's update has all singular values equal, so directions of small gradient are learnt as fast as the others:
    on the toy set this reaches the loss of Adam in a quarter of the steps. Steps are as large as Adam's, so is lr.
    """

    def __init__(self, module, lr, **adam):
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"optimizer=muon needs torch 2.9 or newer, this is {torch.__version__}")
        linear = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Linear)}
        params = [p for p in module.parameters() if p.requires_grad]
        matrices, rest = [p for p in params if id(p) in linear], [p for p in params if id(p) not in linear]
        self.parts = [torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
                      torch.optim.Adam(rest, lr=lr, **adam)]

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state):
        for part, s in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(s)


def make_optimizer(kind, module, lr):
    if kind == "muon":
        return Muon(module, lr)
    params = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.SGD(params, lr=lr) if kind == "sgd" else torch.optim.Adam(params, lr=lr)


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints and logs


def write_whole(path, text):
    """Write a text file under a temporary name, then rename it: the file is there whole or as it was before."""
    tmp = Path(f"{path}.tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


def save_state(path, state):
    """torch.save under a temporary name, then rename: a killed run or a full disk leaves the old file."""
    tmp = Path(f"{path}.tmp")
    try:
        with open(tmp, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as error:  # torch's writer gives a full disk as a RuntimeError
        tmp.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written, the one before it is kept: is the disk full? ({error})") from error
    os.replace(tmp, path)


def load_state(out, cfg, world, fixed):
    """The checkpoint of a run that goes on. ValueError if a setting in `fixed` has changed since, a note for others."""
    path = Path(out) / "last.pt"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such checkpoint; init_from=resume needs a run that was started in this out_dir")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        was = state["config"]
    except Exception as error:  # of many kinds: pickle, zip file, missing names
        raise ValueError(f"{path} is no checkpoint of this script ({type(error).__name__}: {error})") from error
    free = {"init_from", "out_dir", "device", "n_workers", "cache", "log_every", "wandb"}
    now = asdict(cfg) | {"processes": world}
    changed = [f"{k}={now[k]!r} (was {was[k]!r})" for k in now if k in was and k not in free and now[k] != was[k]]
    if any(now[k] != was.get(k, now[k]) for k in fixed & now.keys()):
        raise ValueError(f"{path} was made with other settings: {', '.join(changed)}. Use those, or start anew from "
                         "its weights with init_from=FOLDER")
    if changed and os.environ.get("RANK", "0") == "0":
        print(f"note: resumed with other settings than before, so not the same run: {', '.join(changed)}")
    return state


def keep_best(module, out, loss, best, rank):
    """Write out/best if this validation loss is the lowest so far. Returns the lowest."""
    if rank == 0 and loss < best:
        module.save_pretrained(Path(out) / "best")
    return min(loss, best)


def state_of(step, module, optimizer, scaler, best, cfg, world):
    """All that a run needs to go on: random numbers and data order follow from seed and step."""
    return {"step": step, "model": module.state_dict(), "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(), "best": best, "config": asdict(cfg) | {"processes": world}}


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
