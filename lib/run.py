"""What the processes of a run must agree on: their number, the device, seeds, precision, and when to stop.

    cfg = configurator.parse(Config, sys.argv[1:])
    rank, world, device = run.start(cfg)
    ddp, sync, autocast, scaler, line = run.prepare(module, optimizer, cfg, world, device, resumed)

The shared parts read these keys of a script's config; all else in it is the script's own business:

    device             auto | cpu | cuda | cuda:N | mps    start
    batch_size         divided over the processes          start
    seed               range of values                     configurator.load
    dtype tf32 compile precision                           prepare
    out_dir            metrics.jsonl, run.json, last.pt    log.Log, checkpoint
    init_from          "resume" goes on with last.pt       log.Log
    wandb              project or none                     log.Log, configurator.check_wandb
    all of them        kept and compared on resuming       checkpoint.state_of, checkpoint.load_state

log_every, save_every, val_every, n_workers, cache are read by the scripts alone; they have the same meaning in all.
"""
import contextlib
import io
import math
import os
import signal
import sys
import time
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lib.loader import divide_batch

# ----------------------------------------------------------------------------------------------------------------------
# beginning and end


def launch(main, *errors):
    """Run a script's main(). What the user has to put right (a missing folder, settings that do not fit, a full disk,
    and whatever else raises one of `errors`) ends in one line and exit code 2; bugs in a traceback, and a ValueError
    once training has begun counts as one. With the environment variable GAZE_DEBUG set, all errors do."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files may not be UTF-8
    try:
        main()
    except (OSError, ValueError, FloatingPointError, *errors) as error:
        is_bug = LOOP and isinstance(error, ValueError)
        if is_bug or os.environ.get("GAZE_DEBUG"):
            raise
        text = str(error)
        if "Original Traceback" in text:  # of a data worker, with the error in its last line
            text = text.strip().splitlines()[-1]
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        raise SystemExit(2) from None


LOOP = []  # not empty once log.Log has announced a run: training begins


GROUPS = []  # of processes, see below


def init_processes(device="auto"):
    """Join the process group that torchrun announces, if any. Returns (rank, world, device)."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    local = int(os.environ.get("LOCAL_RANK", 0))

    if device == "auto":
        device = "cpu"
        if torch.backends.mps.is_available():  # Apple's
            device = "mps"
        if torch.cuda.is_available():
            device = "cuda"
    if device == "cuda":
        device = f"cuda:{local}"
    if device.startswith("cuda"):
        n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if n_gpus == 0:
            raise ValueError(f"device={device}: torch sees no GPU here (nvidia-smi, and a CUDA build of torch?): "
                             "give --device=cpu")
        if torch.device(device).index >= n_gpus:
            raise ValueError(f"device={device}: torch sees {n_gpus} GPU(s) here, counted from 0")
        torch.cuda.set_device(torch.device(device).index)

    if device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device=mps: torch sees no Apple GPU here: give --device=cpu")

    if world > 1:
        # numbers of Python's travel over gloo: through nccl each would wait for the GPU
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        # 7 days: in label.py fast ranks wait for slow ones. Killing a hung job is the scheduler's business.
        dist.init_process_group(backend, timeout=timedelta(days=7))
        # Whoever frees a gloo group waits for its thread, with Python's lock in hand, for which the thread may be
        # waiting to free a tensor. Freed with main()'s variables, one run in 50 never ended; so it stays to the end.
        GROUPS.append(dist.group.WORLD)
    return rank, world, torch.device(device)


def start(cfg):
    """What every training run begins with. Returns (rank, world, device); may adjust cfg.batch_size."""
    rank, world, device = init_processes(cfg.device)
    check_same(**asdict(cfg))
    stop_on_sigterm()
    cfg.batch_size = divide_batch(cfg.batch_size, rank, world)
    return rank, world, device


STOP = []  # signals that asked for an end


def stop_on_sigterm():
    """From now on SIGTERM (a preempted job) only makes stopping() true, so that the loop can save and leave."""
    STOP.clear()
    signal.signal(signal.SIGTERM, lambda number, frame: STOP.append(number))


def stopping():
    """Whether any process was asked to end. All ranks call it at the same place, so they leave at the same step."""
    return all_sum(len(STOP))[0] > 0


def finish():
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# random numbers


def seed_step(seed, step, rank, world):
    """Random numbers of a step depend on step and rank only, so a resumed run draws what it would have drawn."""
    torch.manual_seed((seed * 1_000_003 + step) * world + rank)


def shared_generator(seed, step):
    """A generator that is the same on all ranks and after a resume, for draws that must agree."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


# ----------------------------------------------------------------------------------------------------------------------
# between processes


def all_sum(*values):
    """Sums over ranks of Python numbers, as floats."""
    sums = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


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


def barrier():
    if dist.is_initialized():
        dist.barrier()


def check_same(**values):
    """ValueError on every rank, naming what differs, unless all processes come with the same values."""
    everyone = from_all(values)
    first = everyone[0]
    for rank, theirs in enumerate(everyone):
        for key in values.keys() | theirs.keys():
            if theirs.get(key) != first.get(key):
                raise ValueError(f"process {rank} has {key}={theirs.get(key)!r}, process 0 {first.get(key)!r}: "
                                 "start all processes with the same command and the same data")


# ----------------------------------------------------------------------------------------------------------------------
# precision and gradients


def now(device):
    """perf_counter after a device synchronisation, so that differences measure GPU work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def precision(cfg, device):
    """(autocast of cfg.dtype, the dtype's name). Switches TF32 on or off, as cfg.tf32 says."""
    dtype = cfg.dtype
    if dtype == "auto" and device.type != "cuda":
        dtype = "float32"
    elif dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    half = torch.float16 if dtype == "float16" else torch.bfloat16
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if cfg.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = cfg.tf32
    return torch.autocast(device.type, half, enabled=dtype != "float32"), dtype


def compile_layers(module):
    """torch.compile for each layer by itself and for any length. The module as a whole would be compiled anew for every
    list of gaze counts."""
    for part in module.modules():
        if isinstance(part, torch.nn.ModuleList):
            for layer in part:
                layer.compile(dynamic=True)


def prepare(module, optimizer, cfg, world, device, resumed):
    """(module for training passes, context of its gradient sync, autocast, gradient scaler, a line that says so).

    resumed: a checkpoint whose optimizer and scaler go on, or None.
    sync(last): gradients travel between processes in the last micro-batch of a step only; it has to enclose the forward
    pass too. Compiling works in place, so parameter names in checkpoints stay.
    """
    autocast, dtype = precision(cfg, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")

    # Weights from a file lie where it is mapped, at any address, and products on a CPU round by address. In memory of
    # their own they lie as those of a resumed run do, which has to equal an uninterrupted one.
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = tensor.data.clone()
    if resumed:
        restore(optimizer, scaler, resumed, cfg)

    compiled = cfg.compile and device.type != "cpu"
    if compiled:
        compile_layers(module)
    ddp = DistributedDataParallel(module) if world > 1 else module

    def sync(last):
        return contextlib.nullcontext() if last or world == 1 else ddp.no_sync()

    tf32 = "on" if cfg.tf32 and device.type == "cuda" else "off"
    line = f"precision {dtype}, TF32 {tf32}, compiled: {compiled}"
    if cfg.compile and not compiled:
        line += " (never on a CPU)"
    return ddp, sync, autocast, scaler, line


def restore(optimizer, scaler, resumed, cfg):
    """Take optimizer and scaler up where the checkpoint left them. ValueError if theirs are not in it."""
    path = f"{cfg.out_dir}/last.pt"
    load_optimizer(optimizer, resumed["optimizer"], path)
    try:
        for name, value in resumed["scaler"].items():
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(f"{name} is {value}")
        scaler.load_state_dict(resumed["scaler"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no scaler of this dtype ({type(error).__name__}: {error})") from error


def load_optimizer(optimizer, state, path):
    """Take an optimizer up where its state_dict() was written; settings that no schedule changes stay those of this
    run. ValueError names the file if the state does not fit, which torch notices at the first step, or never."""
    settings = [dict(group) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
        for part in getattr(optimizer, "parts", [optimizer]):
            check_states(part)
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            scheduled = {key: group[key] for key in ("lr", "betas") if key in own}
            if not torch.tensor([scheduled["lr"], *scheduled.get("betas", ())]).isfinite().all():
                raise ValueError(f"it has {scheduled}")
            group.update(own | scheduled)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint of this script, or of one with another optimizer or dtype "
                         f"({type(error).__name__}: {error})") from error


def check_states(optimizer):
    """ValueError unless all weights have the same entries, or none has any, in the shape of the weight and finite."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    states = [optimizer.state.get(weight, {}) for weight in weights]
    for weight, state in zip(weights, states, strict=True):
        if state.keys() != states[0].keys():
            raise ValueError(f"entries {sorted(state.keys() ^ states[0].keys())} are missing for some weights")
        for name, value in state.items():
            value = torch.as_tensor(value)
            fits = value.numel() == 1 if name == "step" else value.shape == weight.shape
            if not fits:
                raise ValueError(f"{name} is {tuple(value.shape)}, its weight {tuple(weight.shape)}")
            if not value.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity")
            if name in ("step", "exp_avg_sq") and (value < 0).any():
                raise ValueError(f"{name} is below 0")


def update(optimizer, scaler):
    """One step with the gradients that have gathered; in float16 a step whose gradients overflow is left out."""
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
