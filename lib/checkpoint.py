"""Checkpoints: written whole or not at all, resumed exactly, the best one kept."""
import errno
import fcntl
import itertools
import json
import math
import os
import platform
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from lib import run
from lib.text import read_json, write_whole, written_whole
from lib.weights import is_plain


def save_state(path, state):
    with written_whole(path) as temporary:
        torch.save(state, temporary)


# ----------------------------------------------------------------------------------------------------------------------
# one run in a folder


LOCKS = {}  # {path: open lock file}, held until this process ends


def lock(path, output):
    """Hold the lock file `path` until this process ends. ValueError: another one does; it names `output`."""
    path = Path(path).resolve()
    if path in LOCKS:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            warnings.warn(f"{path} cannot be locked here: do not start a second run with {output} ({error})",
                          stacklevel=2)
            return
        file.seek(0)
        raise ValueError(f"{output} is in use by {file.read().strip() or 'another run'}: wait for it, or give another "
                         "one") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()} since {time.ctime()}\n")
    file.flush()
    LOCKS[path] = file


def take_output(out):
    """Make the folder `out` this process's own until it ends, for results that replace those of an earlier run."""
    lock(Path(out) / "lock", f"out={out}")


def take_data_folder(out, settings):
    """Make `out` this process's own, for files that are kept once they are made, and note in <out>/make_data.json which
    settings they are made with. ValueError: it holds files of other settings, or another process is writing to it."""
    take_output(out)
    path = Path(out) / "make_data.json"
    if path.exists() and read_json(path) != settings:
        raise ValueError(f"{out} holds files made with other settings ({path}): delete it or choose another --out")
    write_whole(path, json.dumps(settings, indent=1))


def take_folder(folder, keep):
    """Make `folder` this process's own until it ends. keep=False: a run that is in there is moved aside. ValueError:
    another process is still writing to it."""
    folder = Path(folder)
    lock(folder / "lock", f"out_dir={folder}")
    if keep or not (folder / "last.pt").is_file():
        return

    # a job that was put in the queue again, or the same command once more
    for i in itertools.count(1):
        aside = folder.with_name(f"{folder.name}.{i}")
        if not aside.exists():
            break
    old_lock = (folder / "lock").resolve()
    os.replace(folder, aside)
    LOCKS[(aside / "lock").resolve()] = LOCKS.pop(old_lock, None)  # still held: nobody gets the folder half moved
    print(f"{folder} held a run, now in {aside}; --init_from=resume would have gone on with it")
    lock(folder / "lock", f"out_dir={folder}")


# ----------------------------------------------------------------------------------------------------------------------
# the state of a run


# What state_of() puts into a checkpoint, and load_state() expects there.
ENTRIES = {"step": int, "best": float, "model": dict, "optimizer": dict, "scaler": dict, "config": dict}
# Settings that do not change what is computed.
MAY_CHANGE = {"init_from", "out_dir", "device", "n_workers", "cache", "log_every", "wandb"}


def state_of(step, module, optimizer, scaler, best, cfg, world):
    """All that a run needs to go on: random numbers and data order follow from seed and step."""
    return {"step": step, "best": float(best), "model": module.state_dict(), "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(), "config": asdict(cfg) | {"processes": world}}


def load_state(out, cfg, world, fixed):
    """The checkpoint of a run that goes on. ValueError if a setting in `fixed` has changed since, a note for others."""
    path = Path(out) / "last.pt"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such checkpoint; init_from=resume needs a run that was started in this out_dir")
    if os.environ.get("RANK", "0") == "0":
        take_folder(out, keep=True)  # before it is read: the run that wrote it may still go on
    run.barrier()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: pickle, zip file, missing names
        raise ValueError(f"{path} is not a checkpoint of this script ({type(error).__name__}: {error})") from error
    check_entries(state, path)

    # settings then and now
    was = state["config"]
    now = asdict(cfg) | {"processes": world}
    changed = {key for key in now if now[key] != was.get(key)} - MAY_CHANGE
    listed = ", ".join(f"{key}={now[key]!r} (was {was.get(key)!r})" for key in sorted(changed))
    if changed & set(fixed):
        raise ValueError(f"{path} was made with other settings: {listed}. Use those, or start anew from its weights "
                         "with init_from=FOLDER")
    if changed and os.environ.get("RANK", "0") == "0":
        print(f"note: resumed with other settings than before, so not the same run: {listed}")
    return state


def check_entries(state, path):
    """ValueError unless a checkpoint has what state_of() writes: before anything starts, not at the first step."""
    wrong = []
    if not isinstance(state, dict):
        wrong.append("it holds no dict")
        state = {}
    for name, kind in ENTRIES.items():
        if name not in state:
            wrong.append(f"{name} is missing")
        elif not isinstance(state[name], kind) or isinstance(state[name], bool):
            wrong.append(f"{name} is no {kind.__name__}")
    if not wrong and state["step"] < 0:
        wrong.append(f"step is {state['step']}")
    if not wrong and math.isnan(state["best"]):
        wrong.append("best is NaN")
    if not wrong and any(isinstance(value, torch.Tensor | list | dict) for value in state["config"].values()):
        wrong.append("config holds something else than settings")
    if not wrong and not all(map(is_plain, state["model"].values())):
        wrong.append("model holds something else than tensors")
    if not wrong and not all(is_plain(t) and t.is_floating_point() for t in tensors_in(state["optimizer"])):
        wrong.append("optimizer holds tensors of another kind")
    if wrong:
        raise ValueError(f"{path} is not a checkpoint of this script: {', '.join(wrong)}")


def tensors_in(content):
    """All tensors in dicts and lists, however deep."""
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from tensors_in(value)


def keep_best(module, out, loss, best, rank):
    """Write out/best if this validation loss is the lowest so far. Returns the lowest."""
    if rank == 0 and loss < best:
        module.save_pretrained(Path(out) / "best")
    return min(loss, best)
