"""Checkpoints: written whole or not at all, resumed exactly, the best one kept."""
import os
from dataclasses import asdict
from pathlib import Path

import torch


def write_whole(path, text):
    """Write a text file under a temporary name, then rename it: the file is there whole or as it was before."""
    tmp = Path(f"{path}.tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


def save_state(path, state):
    """torch.save under a temporary name, then rename: a killed run or a full disk leaves the old file."""
    tmp = Path(f"{path}.tmp")
    try:
        with open(tmp, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
        tmp.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written, the one before it is kept: is the disk full? ({error})") from error
    os.replace(tmp, path)


# What state_of() puts into a checkpoint, and load_state() expects there.
ENTRIES = {"step": int, "best": float, "model": dict, "optimizer": dict, "scaler": dict, "config": dict}


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
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: pickle, zip file, missing names
        raise ValueError(f"{path} is not a checkpoint of this script ({type(error).__name__}: {error})") from error
    check_entries(state, path)

    # settings then and now
    was = state["config"]
    now = asdict(cfg) | {"processes": world}
    may_change = {"init_from", "out_dir", "device", "n_workers", "cache", "log_every", "wandb"}
    changed = []
    for key in now:
        if key in was and key not in may_change and now[key] != was[key]:
            changed.append(f"{key}={now[key]!r} (was {was[key]!r})")
    if any(now[key] != was.get(key, now[key]) for key in fixed & now.keys()):
        raise ValueError(f"{path} was made with other settings: {', '.join(changed)}. Use those, or start anew from "
                         "its weights with init_from=FOLDER")
    if changed and os.environ.get("RANK", "0") == "0":
        print(f"note: resumed with other settings than before, so not the same run: {', '.join(changed)}")
    return state


def check_entries(state, path):
    """ValueError unless a checkpoint has what state_of() writes: before anything starts, not at the first step."""
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint of this script: it holds a {type(state).__name__}, no dict")
    wrong = [f"{name} is missing" for name in ENTRIES if name not in state]
    for name, kind in ENTRIES.items():
        if name in state and not isinstance(state[name], kind):
            wrong.append(f"{name} is a {type(state[name]).__name__}, not a {kind.__name__}")
    if not wrong and state["step"] < 0:
        wrong.append(f"step is {state['step']}")
    if not wrong and not all(isinstance(tensor, torch.Tensor) for tensor in state["model"].values()):
        wrong.append("model holds something else than tensors")
    if wrong:
        raise ValueError(f"{path} is not a checkpoint of this script: {', '.join(wrong)}")


def keep_best(module, out, loss, best, rank):
    """Write out/best if this validation loss is the lowest so far. Returns the lowest."""
    if rank == 0 and loss < best:
        module.save_pretrained(Path(out) / "best")
    return min(loss, best)
