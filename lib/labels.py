"""Label files: read, checked, and packed. Packed, gigabytes of JSON are arrays that are mapped into memory, so opening
takes no time, and all workers and ranks of a machine share one copy.

    python data.py pack labels.json [labels.packed]      # a folder; train_ntp.py takes it as --labels=labels.packed

A label file is an object of {"gazing_pos": ids + V·t per frame, "task_losses": per frame} by video. A packed one is a
folder of

    keys.npy     (n,) bytes      names of the videos in UTF-8, sorted
    ids.npy      (gazes,) int32  gazing_pos of all clips and frames, one after the other
    losses.npy   (gazes,) float32
    offsets.npy  (n·T + 1,) int64  frame t of clip i is ids[offsets[i·T + t]:offsets[i·T + t + 1]]
    meta.json    T, the smallest and largest id of each frame, and which file was packed
"""
import json
import os
import shutil
import warnings
from array import array
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib.checkpoint import lock
from lib.text import naming, read_json

LARGEST_LOSS = 3e38  # float32 ends there
LARGEST_ID = 2 ** 31 - 1  # int32 ends there


def load_labels(path):
    """{key: {"gazing_pos": ids + V·t per frame, "task_losses": per frame}}; task_losses[t][j] is the reconstruction
    loss of frame t after its gaze j. path: a JSON file, read into memory, or the folder that pack_labels made of it."""
    if not Path(path).is_dir():
        return read_labels(path)
    labels = PackedLabels(path)
    source = labels.source
    if source.exists() and source.stat().st_size != labels.meta["bytes"] and os.environ.get("RANK", "0") == "0":
        warnings.warn(f"labels={path}: {source} has changed since it was packed", stacklevel=2)
    return labels


def read_labels(path):
    """The same of a JSON file. ValueError: it is damaged, or a label lacks what every label has."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"label file {path} does not exist: label.py writes one")
    labels = read_json(path, f"label file {path}")
    if not isinstance(labels, dict):
        raise ValueError(f"label file {path}: expected an object of labels by video, found a {type(labels).__name__}")
    for key, label in labels.items():
        check_fields(key, label, path)
    return labels


# ----------------------------------------------------------------------------------------------------------------------
# checked


def check_labels(labels, n_frames, n_ids, path):
    """check_label for all of them. Packed ones were checked while packing, so their bounds per frame are enough."""
    if isinstance(labels, PackedLabels) and labels.fits(n_frames, n_ids):
        return
    for key, label in labels.items():
        check_label(key, label, n_frames, n_ids, path)


def check_fields(key, label, path):
    """ValueError unless the label is two lists of lists and its name can be written."""
    try:
        as_bytes(key)
    except UnicodeEncodeError:
        raise ValueError(f"label file {path}: {key!r} is no name of a file, it has half a character") from None
    if not isinstance(label, dict) or not {"gazing_pos", "task_losses"} <= label.keys():
        raise ValueError(f"label file {path}: {key!r} needs 'gazing_pos' and 'task_losses'")
    for name in ("gazing_pos", "task_losses"):
        frames = label[name]
        if not isinstance(frames, list) or any(not isinstance(frame, list) for frame in frames):
            raise ValueError(f"label file {path}: {key!r} needs a list per frame in {name!r}")


def as_bytes(key):
    """A video's name as the file system has it, UTF-8 or not."""
    return key.encode(errors="surrogateescape")


def check_label(key, label, n_frames, n_ids, path):
    """Raise ValueError unless the label fits clips of n_frames frames and n_ids patch ids per frame (None: not known).
    Frames may be empty. A frame's ids must be its own (V·t .. V·t + V - 1), no id twice, each with a finite loss."""
    where = f"label file {path}: {key!r}"
    pos, losses = label["gazing_pos"], label["task_losses"]
    if len(pos) != n_frames or len(losses) != n_frames:
        raise ValueError(f"{where} has {len(pos)} frames of gazes and {len(losses)} of losses, expected {n_frames}")

    taken = set()
    for t, (ids, values) in enumerate(zip(pos, losses, strict=True)):
        if len(ids) != len(values):
            raise ValueError(f"{where} frame {t} has {len(ids)} gazes but {len(values)} losses")

        first, last = 0, LARGEST_ID
        if n_ids:
            first = n_ids * t
            last = first + n_ids - 1
        for i in ids:
            if type(i) is not int or not first <= i <= last:
                raise ValueError(f"{where} frame {t}: id {i} is not in {first}..{last} (other scales or patch size?)")
            if i in taken:
                raise ValueError(f"{where} frame {t} takes a patch twice: {i}")
            taken.add(i)

        for value in values:
            if type(value) not in (int, float) or not abs(value) <= LARGEST_LOSS:
                raise ValueError(f"{where} frame {t} has a loss that is not a finite number")


# ----------------------------------------------------------------------------------------------------------------------
# packed


def pack_labels(source, out=None):
    """Label file -> folder `out` (default: its name with .packed) for PackedLabels. Every label is checked as when it
    is read from the JSON file, except for the range of ids, which depends on the model. Takes the memory of json.load.
    """
    source = Path(source)
    out = Path(out or source.with_suffix(".packed"))
    if out.exists() and not (out / "meta.json").is_file():
        raise FileExistsError(f"{out} exists and is no packed label file: give another name")

    # sorted as bytes, so that a name is found by bisection
    labels = read_labels(source)
    keys = sorted(labels, key=as_bytes)
    n_frames = len(labels[keys[0]]["gazing_pos"]) if keys else 0

    ids = array("i")
    losses = array("f")
    offsets = [0]
    bounds = [(LARGEST_ID, -1)] * n_frames  # of a frame without ids
    for key in tqdm(keys, desc="packing", unit=" clips"):
        label = labels.pop(key)
        check_label(key, label, n_frames, None, source)
        for t, frame in enumerate(label["gazing_pos"]):
            ids.extend(frame)
            losses.extend(label["task_losses"][t])
            offsets.append(len(ids))
            if frame:
                lowest, highest = bounds[t]
                bounds[t] = min(lowest, *frame), max(highest, *frame)

    # the folder appears whole or not at all
    lock(f"{out}.lock", f"labels={out}")
    tmp = Path(f"{out}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    meta = {
        "frames": n_frames,
        "bounds": bounds,
        "source": os.path.abspath(source),
        "bytes": source.stat().st_size}
    try:
        with naming(out):
            tmp.mkdir(parents=True)
            np.save(tmp / "keys.npy", np.array([as_bytes(key) for key in keys], dtype=bytes))
            np.save(tmp / "ids.npy", np.array(ids, np.int32))
            np.save(tmp / "losses.npy", np.array(losses, np.float32))
            np.save(tmp / "offsets.npy", np.array(offsets, np.int64))
            (tmp / "meta.json").write_text(json.dumps(meta) + "\n")
            shutil.rmtree(out, ignore_errors=True)
            os.rename(tmp, out)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    print(f"{out}: {len(keys)} clips of {n_frames} frames, {len(ids)} gazes")
    return out


class PackedLabels:
    """Read-only mapping like load_labels' dict, from a folder that `pack_labels` wrote. Raises ValueError if it is
    damaged. Pickled (to data workers) it is only a path."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            self.meta = read_json(self.path / "meta.json")
            self.n_frames = self.meta["frames"]
            self.bounds = np.array(self.meta["bounds"], np.int64).reshape(self.n_frames, 2)
            self.source = Path(self.meta["source"])
            self.keys = self.open("keys", "S")
            self.ids = self.open("ids", "i")
            self.losses = self.open("losses", "f")
            self.offsets = self.open("offsets", "i")
            n_edges = len(self.keys) * self.n_frames + 1
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"labels={path}: not a folder written by `python data.py pack`, or copied in part: "
                             f"pack again ({error})") from error
        if len(self.offsets) != n_edges or not self.offsets[-1] == len(self.ids) == len(self.losses):
            raise ValueError(f"labels={path}: its files are of different label files: pack again")
        if not (self.keys[:-1] < self.keys[1:]).all():  # bisection would pass over some
            raise ValueError(f"labels={path}: its keys are not sorted: pack again")

    def open(self, name, kind):
        """The array (n,) of one file, mapped: only what is used gets read. kind: letter of its type."""
        file = self.path / f"{name}.npy"
        small = file.stat().st_size < 4096  # an empty array cannot be mapped
        try:
            array = np.asarray(np.load(file, mmap_mode=None if small else "r"))
        except Exception as error:  # of many kinds: the header is a line of Python
            raise ValueError(f"{file}: {error}") from error
        if array.ndim != 1 or array.dtype.kind != kind:
            raise ValueError(f"{file}: it holds {array.dtype} of shape {array.shape}")
        return array

    def __reduce__(self):
        return PackedLabels, (self.path,)

    def __len__(self):
        return len(self.keys)

    def __iter__(self):
        return (key.decode(errors="surrogateescape") for key in self.keys)

    def items(self):
        return ((key, self[key]) for key in self)

    def known(self, keys):
        """Bools: which of these keys have a label."""
        if len(self) == 0:
            return [False] * len(keys)
        keys = np.array([as_bytes(key) for key in keys])
        rows = np.searchsorted(self.keys, keys).clip(max=len(self) - 1)
        return (self.keys[rows] == keys).tolist()

    def __getitem__(self, key):
        key_bytes = as_bytes(key)
        name = np.array(key_bytes, self.keys.dtype)  # with another dtype numpy would copy all keys
        row = int(np.searchsorted(self.keys, name))
        if row == len(self) or self.keys[row] != key_bytes:
            raise KeyError(key)

        label = {"gazing_pos": [], "task_losses": []}
        for t, (lowest, highest) in enumerate(self.bounds):
            start, end = self.offsets[row * self.n_frames + t:][:2]
            ids = self.ids[start:end]
            losses = self.losses[start:end]
            in_bounds = (lowest <= ids) & (ids <= highest) & np.isfinite(losses)
            if start < 0 or len(ids) != end - start or not in_bounds.all():
                raise ValueError(f"labels={self.path}: the label of {key!r} is damaged: pack again")
            label["gazing_pos"].append(ids.tolist())
            label["task_losses"].append(losses.tolist())
        return label

    def fits(self, n_frames, n_ids):
        """Whether every label is one of clips of n_frames frames and n_ids ids per frame."""
        if self.n_frames != n_frames:
            return False
        for t, (lowest, highest) in enumerate(self.bounds.tolist()):
            first = n_ids * t
            last = first + n_ids - 1
            if lowest <= highest and not first <= lowest <= highest <= last:
                return False
        return True
