"""Packed labels: gigabytes of JSON become arrays that are mapped into memory, so opening takes no time, and all workers
and ranks of a machine share one copy.

    python data.py pack labels.json [labels.packed]      # a folder; train_ntp.py takes it as --labels=labels.packed
"""

import json
import math
import os
import re
import shutil
import time
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import check_fields, check_label

PACKED_VERSION = 1
LARGEST_LABEL = 1 << 26  # characters of JSON; one clip's label has thousands


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
            if not (good and {int, float} >= set(map(type, values)) and len(set(ids)) == len(ids)
                    and math.isfinite(sum(values)) and min(ids, default=0) >= 0 and max(ids, default=0) < 1 << 31):
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
