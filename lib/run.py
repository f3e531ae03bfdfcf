"""What the processes of a run must agree on: their number, the device, seeds, precision, and when to stop."""
import contextlib
import os
import signal
import time
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lib.loader import divide_batch


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

