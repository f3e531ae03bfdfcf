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

