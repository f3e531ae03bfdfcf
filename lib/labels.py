"""Label files: read, checked, and packed. Packed, gigabytes of JSON are arrays that are mapped into memory, so opening
takes no time, and all workers and ranks of a machine share one copy.

    python data.py pack labels.json [labels.packed]      # a folder; train_ntp.py takes it as --labels=labels.packed
"""
import json
import math
import os
import re
import shutil
import time
import warnings
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

PACKED_VERSION = 1
LARGEST_LABEL = 1 << 26  # characters of JSON; one clip's label has thousands
LARGEST_LOSS = 3e38  # float32 ends there


def load_labels(path):
    """{key: {"gazing_pos": ids + V*t per frame, "task_losses": per frame}}; task_losses[t][j] is the reconstruction
    loss of frame t after its gaze j. path: a JSON file, read into memory, or the folder that pack_labels made of it."""
    if Path(path).is_dir():
        labels = PackedLabels(path)
        source, size = labels.source["path"], labels.source["bytes"]
        if os.path.exists(source) and os.path.getsize(source) != size and os.environ.get("RANK", "0") == "0":
            warnings.warn(f"labels={path}: {source} has changed since it was packed", stacklevel=2)
        return labels
    if not os.path.exists(path):
        raise FileNotFoundError(f"label file {path} does not exist: label.py writes one")
    with open(path, encoding="utf-8") as f:
        try:
            labels = json.load(f)
        except ValueError as error:
            raise ValueError(f"label file {path} is not valid JSON, was it cut off? ({error})") from error
    if not isinstance(labels, dict):
        raise ValueError(f"label file {path}: expected an object of labels by video, found a {type(labels).__name__}")
    for key, label in labels.items():
        check_fields(key, label, path)
    return labels


def check_fields(key, label, path):
    if not isinstance(label, dict) or not {"gazing_pos", "task_losses"} <= label.keys():
        raise ValueError(f"label file {path}: {key!r} needs 'gazing_pos' and 'task_losses'")
    for name in ("gazing_pos", "task_losses"):
        if not isinstance(label[name], list) or not all(isinstance(frame, list) for frame in label[name]):
            raise ValueError(f"label file {path}: {key!r} needs a list per frame in {name!r}")


def check_labels(labels, n_frames, n_ids, path):
    """check_label for all of them. Packed ones were checked while packing, so their bounds per frame are enough."""
    if not isinstance(labels, dict) and labels.fits(n_frames, n_ids):
        return
    for key, label in labels.items():
        check_label(key, label, n_frames, n_ids, path)


def check_label(key, label, n_frames, n_ids, path):
    """Raise ValueError unless the label fits clips of n_frames frames and n_ids patch ids per frame (None: not known).
    Frames may be empty. A frame's ids must be its own (V*t .. V*t + V - 1), no id twice, each with a finite loss."""
    pos, losses = label["gazing_pos"], label["task_losses"]
    where = f"label file {path}: {key!r}"
    if len(pos) != n_frames or len(losses) != n_frames:
        raise ValueError(f"{where} has {len(pos)} frames of gazes and {len(losses)} of losses, expected {n_frames}")
    for t, (ids, values) in enumerate(zip(pos, losses, strict=True)):
        lo, hi = (n_ids * t, n_ids * (t + 1)) if n_ids else (0, math.inf)
        if len(ids) != len(values):
            raise ValueError(f"{where} frame {t} has {len(ids)} gazes but {len(values)} losses")
        for i in ids:
            if type(i) is not int or not lo <= i < hi:
                raise ValueError(f"{where} frame {t}: id {i} is not in {lo}..{hi - 1} (other scales or patch size?)")
        if len(set(ids)) < len(ids):
            raise ValueError(f"{where} frame {t} takes a patch twice: {sorted(i for i in ids if ids.count(i) > 1)[0]}")
        if not all(type(v) in (int, float) and abs(v) <= LARGEST_LOSS for v in values):
            raise ValueError(f"{where} frame {t} has a loss that is not a finite number")


# ----------------------------------------------------------------------------------------------------------------------
# packed


class PackedLabels:
    """Read-only mapping like load_labels' dict, from a folder that `pack_labels` wrote. Raises ValueError if it is
    damaged. Pickled (to data workers) it is only a path."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            self.meta = json.loads((self.path / "meta.json").read_text())
            n, self.n_frames, n_gazes, width = (self.meta[k] for k in ("clips", "frames", "gazes", "key_bytes"))
            version, self.source = self.meta["version"], self.meta["source"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"labels={path}: not a folder written by `python data.py pack` ({error})") from error
        if version != PACKED_VERSION:
            raise ValueError(f"labels={path} has format {version}, this code reads {PACKED_VERSION}: pack again")
        for name, dtype, size in (("gazing_pos", "<i4", n_gazes), ("task_losses", "<f4", n_gazes), ("row", "<i8", n),
                                  ("ends", "<i8", n * self.n_frames), ("keys", f"S{width}", n)):
            file, want = self.path / f"{name}.bin", size * np.dtype(dtype).itemsize
            have = file.stat().st_size if file.is_file() else 0
            if have != want:
                raise ValueError(f"{file} has {have} bytes, {want} expected: copied in part? Pack again")
            setattr(self, name, np.memmap(file, dtype, "r").view(np.ndarray) if size else np.zeros(0, dtype))

    def __reduce__(self):
        return PackedLabels, (self.path,)

    def __len__(self):
        return len(self.keys)

    def __iter__(self):
        return (key.decode() for key in self.keys)

    def known(self, keys):
        """Bools: which of these keys have a label."""
        keys = np.array([key.encode() for key in keys])
        at = np.searchsorted(self.keys, keys).clip(max=len(self) - 1) if len(self) else np.zeros(0, int)
        return (self.keys[at] == keys).tolist() if len(self) else [False] * len(keys)

    def __getitem__(self, key):
        at = int(np.searchsorted(self.keys, np.array(key.encode(), self.keys.dtype)))  # its own dtype: no copy of all
        if at == len(self) or self.keys[at] != key.encode():
            raise KeyError(key)
        last = (int(self.row[at]) + 1) * self.n_frames
        cuts = self.ends[max(last - self.n_frames - 1, 0):last].tolist()
        cuts = cuts if last > self.n_frames else [0, *cuts]
        return {name: [array[a:b].tolist() for a, b in pairwise(cuts)]
                for name, array in (("gazing_pos", self.gazing_pos), ("task_losses", self.task_losses))}

    def items(self):
        return ((key, self[key]) for key in self)

    def fits(self, n_frames, n_ids):
        """Whether every label is one of clips of n_frames frames and n_ids ids per frame."""
        return self.n_frames == n_frames and all(
            n_ids * t <= lo and hi < n_ids * (t + 1) for t, (lo, hi) in enumerate(self.meta["bounds"]) if lo <= hi)


def json_items(path, chunk=1 << 20):
    """Yield (key, value) of a file that holds one JSON object, in memory no more than a chunk and the largest value."""
    decode_value, space, text, at, n = json.JSONDecoder().raw_decode, re.compile(r"\s*"), "", 0, 0

    def broken(why):
        return ValueError(f"label file {path} is not valid JSON after {n} labels, was it cut off? ({why})")

    def more():
        nonlocal text, at
        try:
            new = file.read(max(chunk, len(text) - at))  # twice as much each time, while one value does not fit
        except UnicodeDecodeError as error:
            raise broken(error) from error
        if not new or len(text) - at > LARGEST_LABEL:
            raise broken(f"at {text[at:at + 40]!r}")
        text, at = text[at:] + new, 0

    def character():
        nonlocal at
        while (at := space.match(text, at).end()) == len(text):
            more()
        at += 1
        return text[at - 1]

    def value():
        nonlocal at
        while True:
            at = space.match(text, at).end()
            try:
                found, at = decode_value(text, at)
                return found
            except json.JSONDecodeError:
                more()

    with open(path, encoding="utf-8") as file:
        if character() != "{":
            raise ValueError(f"label file {path}: expected an object of labels by video, found {text[:40]!r}")
        if character() == "}":
            return
        at -= 1
        while True:
            key = value()
            if not isinstance(key, str) or character() != ":":
                raise broken(f"at {key!r}")
            yield key, value()
            n += 1
            if (mark := character()) != ",":
                if mark == "}":
                    return
                raise broken(f"{mark!r} after {key!r}")


def pack_labels(source, out=None):
    """Label file -> folder `out` (default: its name with .packed) for PackedLabels. Reads clip by clip; only the keys
    stay in memory. Every label is checked but for the number of ids per frame, which a label does not tell."""
    source, keys, n_frames, bounds = Path(source), [], None, []
    out, n_gazes, t0 = Path(out or source.with_suffix(".packed")), 0, time.time()
    if out.exists() and not (out / "meta.json").is_file():
        raise FileExistsError(f"{out} exists and is no packed label file: give another name")
    tmp = Path(f"{out}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    with (open(tmp / "gazing_pos.bin", "wb") as f_pos, open(tmp / "task_losses.bin", "wb") as f_losses,
          open(tmp / "ends.bin", "wb") as f_ends):
        for key, label in tqdm(json_items(source), desc="packing", unit=" clips"):
            check_fields(key, label, source)
            pos, losses = label["gazing_pos"], label["task_losses"]
            if n_frames is None:
                n_frames, bounds = len(pos), [[1 << 31, -1] for _ in pos]
            lengths, ids, values = [len(f) for f in pos], [*chain(*pos)], [*chain(*losses)]
            good = len(pos) == n_frames and lengths == [len(f) for f in losses] and {int} >= set(map(type, ids))
            good = good and 0 <= min(ids, default=0) and max(ids, default=0) < 1 << 31 and len(set(ids)) == len(ids)
            if not (good and {int, float} >= set(map(type, values)) and -LARGEST_LOSS <= min(values, default=0)
                    and max(values, default=0) <= LARGEST_LOSS and not math.isnan(sum(values))):
                check_label(key, label, n_frames, None, source)
                raise ValueError(f"label file {source}: {key!r} has an id in two frames, below 0 or too large")
            bounds = [[min(lo, *f), max(hi, *f)] if f else [lo, hi] for (lo, hi), f in zip(bounds, pos, strict=True)]
            f_pos.write(np.array(ids, "<i4").tobytes())
            f_losses.write(np.array(values, "<f4").tobytes())
            f_ends.write((np.cumsum(lengths) + n_gazes).astype("<i8").tobytes())
            n_gazes += len(ids)
            keys.append(key.encode())
    keys = np.array(keys, f"S{max(map(len, keys), default=1)}")
    row = keys.argsort(kind="stable")
    keys = keys[row]
    if (twice := np.flatnonzero(keys[1:] == keys[:-1])).size:
        raise ValueError(f"label file {source} has two labels for {keys[twice[0]].decode()!r}")
    row.astype("<i8").tofile(tmp / "row.bin")
    keys.tofile(tmp / "keys.bin")
    meta = {"version": PACKED_VERSION, "clips": len(keys), "frames": n_frames or 0, "gazes": n_gazes,
            "key_bytes": keys.itemsize, "bounds": bounds,
            "source": {"path": os.path.abspath(source), "bytes": source.stat().st_size}}
    (tmp / "meta.json").write_text(json.dumps(meta) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    os.rename(tmp, out)
    print(f"{out}: {len(keys)} clips of {n_frames or 0} frames, {n_gazes} gazes, {time.time() - t0:.0f} s")
    return out
