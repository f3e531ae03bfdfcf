"""Damages files at random and reads them. An outcome is good if it is a right result, or one of the project's errors
whose text names the file; it is bad if it hangs, crashes, takes more than 2 GB, or is silent where content is wrong.

    python tests/fuzz.py                                    # half a minute, all kinds in turn
    python tests/fuzz.py --minutes=30 --kinds=videos,labels
    python tests/fuzz.py --n=1000 --kinds=faces --seed=7    # so many of each kind

A kind is two functions: one writes good files, a folder per case; the other reads such a folder after one of its files
was damaged, and asserts that what comes out is right or lets the reader's error pass. Files with a bad outcome are kept
in --out; the same seed damages the same files in the same way.
"""
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
import h5py
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script finds what lies beside it only
os.environ["HF_HUB_OFFLINE"] = "1"  # a damaged command may name something on the hub

import fuzz_runs

import data
import lib.labels
import unigaze.data
import unigaze.show
from argaze import formats
from lib import configurator
from unigaze import calibrate, normalise

GOLDEN = Path(__file__).parent / "golden"
ERRORS = (data.VideoError, unigaze.data.FaceError, OSError, ValueError)
BATCH = 20        # damaged files that one process reads
SECONDS = 20      # for one of them
MEMORY = 2 << 30  # bytes, beside what the process has taken before

# ----------------------------------------------------------------------------------------------------------------------
# damage: changes one file, with what a random.Random draws

NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF)
WORDS = ("", "x", "NaN", "nan", "-inf", "Infinity", "null", "true", "-1", "0", "0.5", "1e9", "1e308", "1e999", "[]",
         "{}", "9" * 25, "9" * 5000, '"\\ud83d"', '"', ",", ":", "\t", "\n", "\0", "ÿ", "[" * 100_000,
         '{"a":' * 100_000)
TOKEN = re.compile(r'"[^"\n]*"|[\w.+-]+|[^\w\s]')


def change_bytes(content, draw):
    """One to four places: a byte or number replaced, a stretch zeroed, left out, repeated, or the rest cut off."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(content) or 1)
        if draw.random() < 0.4:  # where headers are
            at = min(at, draw.randrange(800))
        end = at + int(2 ** draw.uniform(0, 12))
        action = draw.choice(("byte", "number", "number", "zero", "leave out", "repeat", "cut"))
        if action == "byte":
            content[at:at + 1] = bytes([draw.randrange(256)])
        elif action == "number":
            size = draw.choice((1, 2, 4, 8))
            number = draw.choice(NUMBERS) % 256 ** size
            content[at:at + size] = number.to_bytes(size, draw.choice(("big", "little")))
        elif action == "zero":
            content[at:end] = bytes(len(content[at:end]))
        elif action == "leave out":
            del content[at:end]
        elif action == "repeat":
            content[at:at] = content[at:end]
        elif draw.random() < 0.3:
            del content[at:]
    return bytes(content)


def change_text(content, draw):
    """One or two places: a number or word replaced, a line left out, repeated or moved."""
    text = content.decode()
    for _ in range(draw.randint(1, 2)):
        if draw.random() < 0.7:
            found = draw.choice(list(TOKEN.finditer(text)) or [re.match("", text)])
            text = text[:found.start()] + draw.choice(WORDS) + text[found.end():]
        else:
            lines = text.split("\n")
            line = lines.pop(draw.randrange(len(lines)))
            for _ in range(draw.randint(0, 2)):
                lines.insert(draw.randint(0, len(lines)), line)
            text = "\n".join(lines)
    return text.encode()


def change_columns(path, draw):
    """One column of an HDF5 file gets another type, shape or values, or becomes something else."""
    with h5py.File(path, "r+") as file:
        name = draw.choice([name for name in unigaze.data.COLUMNS if name in file])
        values = file[name][:]
        n, *row = values.shape
        del file[name]
        action = draw.choice(("missing", "type", "short", "long", "shape", "value", "group", "text", "scalar",
                              "claimed", "partly written", "link"))
        if action == "type":
            file[name] = values.astype(draw.choice(("f2", "f8", "i4", "i8", "u2", "c8", "S4", bool)))
        elif action == "short":
            file[name] = values[:draw.randrange(n)]
        elif action == "long":
            file[name] = np.concatenate([values, values[:1]])
        elif action == "shape":
            file[name] = draw.choice((values[..., :1], values[..., None], values.reshape(-1), values[:, :-1]))
        elif action == "value":
            values = values.astype("f8")
            values[draw.randrange(n)] = draw.choice((np.nan, np.inf, -np.inf, 1e9, 4.0, -1e300))
            file[name] = values
        elif action == "group":
            file.create_group(name)
        elif action == "text":
            file[name] = "text"
        elif action == "scalar":
            file[name] = 1.5
        elif action == "claimed":
            chunks = draw.choice((None, (1, *row)))
            file.create_dataset(name, (10 ** draw.randint(5, 11), *row), values.dtype, chunks=chunks)
        elif action == "partly written":
            file.create_dataset(name, values.shape, values.dtype, chunks=(1, *row))[:n // 2] = values[:n // 2]
        elif action == "link":
            file[name] = h5py.ExternalLink("none.h5", "/a")


def damage(path, draw):
    if path.suffix == ".h5" and draw.random() < 0.5:
        change_columns(path, draw)
    elif path.suffix in (".safetensors", ".pt", ".pth", ".tar") and draw.random() < 0.7:
        fuzz_runs.change_tensors(path, draw)
    elif path.suffix in (".json", ".csv", ".txt", ".py") and draw.random() < 0.85:
        path.write_bytes(change_text(path.read_bytes(), draw))
    else:
        path.write_bytes(change_bytes(path.read_bytes(), draw))


# ----------------------------------------------------------------------------------------------------------------------
# videos and pictures

VIDEOS = {"a.mp4": ("libx264", "keyint=10:bframes=2", {}), "a.mkv": ("libx264", "keyint=10:bframes=2", {}),
          "fragments.mp4": ("libx264", "keyint=10", {"movflags": "frag_keyframe"}),
          "first.mov": ("libx264", "keyint=10:bframes=2", {"movflags": "faststart"}),
          "a.ts": ("libx264", "keyint=10:bframes=2", {}), "a.avi": ("mpeg4", "", {}), "a.webm": ("libvpx", "", {}),
          "a.gif": ("gif", "", {})}


def write_videos(folder):
    noise = np.random.default_rng(0).integers(0, 256, (32, 48), dtype=np.uint8)
    for name, (codec, x264, options) in VIDEOS.items():
        (folder / name).mkdir()
        with av.open(str(folder / name / name), "w", options=options) as container:
            stream = container.add_stream(codec, rate=25, options={"x264-params": x264, "g": "10", "threads": "1"})
            stream.width, stream.height = 48, 32
            stream.pix_fmt = "gray" if codec == "gif" else "yuv420p"
            for t in range(30):
                picture = np.stack([np.roll(noise, 3 * t, axis=1)] * 3, axis=2)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
            container.mux(stream.encode())


def read_video(folder):
    """What is read from a keyframe on must be what counting from the start gives."""
    path = only_file(folder)
    counted = dict(data.decode(path, range(100), skip=False))
    assert data.count_frames(path) >= 1
    for first in (0, 1, 15, 25, 200):
        got = list(islice(data.decode(path, {first, first + 2}), 2))
        assert got, f"no frame {first}"
        # where the picture's size changes, it is that of the first frame that is read
        is_same = all(np.array_equal(image, counted[i]) or image.shape != counted[i].shape for i, image in got)
        assert is_same or not is_steady(path, counted, {first, first + 2}), f"another frame than {first}"
    data.read_motion(path, 4, 16, stride=3)


def is_steady(path, counted, few):
    """Whether a file gives the same frames every time, be all wanted or few. In damaged ones FFmpeg shows memory that
    nobody has written to."""
    again = [data.decode(path, wanted, skip=False) for wanted in (range(100), few) * 3]
    return all(np.array_equal(image, counted[i]) for frames in again for i, image in frames)


def write_pictures(folder):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    for name in ("a.png", "a.jpg", "a.webp", "a.bmp"):
        (folder / name).mkdir()
        picture.save(folder / name / name)


def read_picture(folder):
    for frame in unigaze.show.read_frames(str(only_file(folder))):
        assert frame.image.dtype == np.uint8 and frame.image.shape[2:] == (3,) and frame.image.size > 0


def only_file(folder):
    [path] = folder.iterdir()
    return path


# ----------------------------------------------------------------------------------------------------------------------
# labels


def write_labels(folder):
    (folder / "labels").mkdir()
    label = {"gazing_pos": [[3, 1], [], [45]], "task_losses": [[0.5, 0.25], [], [1e-3]]}
    text = json.dumps({f"toy/train/{i}.mp4": label for i in range(3)}, indent=1)
    (folder / "labels" / "labels.json").write_text(text)


def read_labels(folder):
    """The plain reader and the packed one must say the same."""
    path = folder / "labels.json"
    try:
        plain = lib.labels.load_labels(path)
        lib.labels.check_labels(plain, 3, 20, path)
    except ValueError:
        plain = None
    try:
        packed = lib.labels.load_labels(lib.labels.pack_labels(path))
        lib.labels.check_labels(packed, 3, 20, path)
    except ValueError:
        assert plain is None, "only the packed reader refuses it"
        raise
    assert plain is not None, "only the plain reader refuses it"
    for key, label in plain.items():
        assert packed[key]["gazing_pos"] == label["gazing_pos"], "the readers differ"
        for ours, theirs in zip(packed[key]["task_losses"], label["task_losses"], strict=True):
            assert np.allclose(ours, np.float64(theirs), rtol=1e-6), "the readers differ"


def write_packed(folder):
    write_labels(folder)
    lib.labels.pack_labels(folder / "labels" / "labels.json", folder / "labels" / "labels.packed")
    (folder / "labels" / "labels.json").unlink()


def read_packed(folder):
    packed = lib.labels.load_labels(folder / "labels.packed")
    lib.labels.check_labels(packed, 3, 20, folder)
    for key in packed:
        lib.labels.check_label(key, packed[key], 3, 20, folder)


# ----------------------------------------------------------------------------------------------------------------------
# ARGaze's tables, UniGaze's faces and small files


def write_tables(folder):
    for dataset in ("egtea", "ego4d", "egoexo4d"):
        shutil.copytree(GOLDEN / "argaze_data" / dataset, folder / dataset)


def read_tables(folder):
    dataset = formats.detect(folder)
    split = "test_iid" if dataset == "egoexo4d" else "test"
    tables = []
    for clip in formats.list_clips(dataset, folder, split, n_frames=2):
        assert all(0 <= first < end for first, end in clip.windows), "an empty window"
        tables.append(formats.read_gaze(dataset, folder, clip))
    if dataset == "ego4d":
        for path in (folder / "gaze").glob("a*.csv"):
            tables.append(formats.label_ego4d(path, 20))
        formats.untracked_intervals(folder / "ego4d_gaze_untracked.csv")
    for table in tables:
        points = table[table[:, 2] != formats.UNTRACKED[dataset], :2]
        assert len(table) and np.isfinite(table).all() and (0 <= points).all() and (points <= 1).all(), "a wrong point"


def write_faces(folder):
    for name in ("mpii/p00.h5", "gaze360_train/000022.h5", "gazecapture/00005.h5"):
        path = folder / name.replace("/", "_") / Path(name).name
        path.parent.mkdir()
        shutil.copy(GOLDEN / "unigaze_data" / name, path)


def read_faces(folder):
    found = unigaze.data.Faces(folder, head_limit=120)
    for item in islice(found, 50):
        pitch, yaw = item["gaze"].abs().tolist()
        assert item["image"].shape == (3, 224, 224) and pitch < 1.58 and yaw < 3.15, "a wrong face"


def write_small(folder):
    texts = {"calibration.json": '{"matrix": [[1.0, 0.1], [0.0, 0.9]], "offset": [0.01, -0.02], "frames": 5}',
             "targets.csv": "frame,x,y,z\n0,10,-20.5,0\n5,100,30,0\n",
             "face_model.txt": "-44.5 -26.6 -31.7\n-18.6 -28.5 -37.6\n18.6 -28.5 -37.6\n44.5 -26.6 -31.7\n"
                               "-14.1 17.1 -52.4\n14.1 17.1 -52.4\n"}
    for name, text in texts.items():
        (folder / name).mkdir()
        (folder / name / name).write_text(text)


def read_small(folder):
    path = only_file(folder)
    if path.name == "calibration.json":
        values = calibrate.load(path)
    elif path.name == "targets.csv":
        values = calibrate.read_targets(path).values()
    else:
        values = [normalise.load_face_model(path)]
    assert all(np.isfinite(value).all() for value in values), "a value that is not finite"


# FORK: a kind of your own is a line here
KINDS = {
    "videos": (write_videos, read_video),
    "pictures": (write_pictures, read_picture),
    "labels": (write_labels, read_labels),
    "packed": (write_packed, read_packed),
    "tables": (write_tables, read_tables),
    "faces": (write_faces, read_faces),
    "small": (write_small, read_small),
} | fuzz_runs.KINDS

# ----------------------------------------------------------------------------------------------------------------------
# reading in bounds


def read_damaged(kind, numbers, temporary, cfg):
    """Yield (number, outcome) of the damaged files with these numbers: "result", "refused", or "BAD: …". A child
    process reads them, which may hang or crash; then another one goes on behind that file."""
    numbers = list(numbers)
    while numbers:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            read_in_bounds(kind, numbers, temporary, cfg, writer)
        os.close(writer)
        with open(reader) as lines:
            for line in lines:
                yield numbers.pop(0), json.loads(line)

        _, status = os.waitpid(child, 0)
        if numbers and status in (signal.SIGPROF, signal.SIGALRM):
            yield numbers.pop(0), f"BAD: takes more than {SECONDS} seconds"
        elif numbers:
            yield numbers.pop(0), f"BAD: the process ends with status {status}"


def read_in_bounds(kind, numbers, temporary, cfg, writer):
    """The child: writes an outcome a line, and ends."""
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    taken = int(re.search(r"VmData:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (taken + MEMORY, taken + MEMORY))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    for i in numbers:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor, which others may use too
        signal.alarm(20 * SECONDS)                     # of the clock
        text = damage_and_read(kind, i, temporary, cfg)
        os.write(writer, json.dumps(text[:1000]).encode() + b"\n")
    os._exit(0)


def judge(read, folder, damaged):
    try:
        read(folder)
    except ERRORS as error:
        is_named = str(folder) in str(error) or damaged.name in str(error)
        return "refused" if is_named else f"BAD: does not name the file: {type(error).__name__}: {error}"
    except BaseException as error:
        return f"BAD: {type(error).__name__}: {error}"
    return "result"


@dataclass
class Config:
    minutes: float = 0.5   # to go on for
    n: int | None = None   # so many damaged files of each kind instead
    kinds: str = ""        # separated by commas; none: all
    seed: int = 0
    out: str = "out/fuzz"  # folder for files whose outcome is bad

    def check(self):
        configurator.check_above_zero(self, "minutes")
        configurator.check_at_least(self, n=1)
        for kind in filter(None, self.kinds.split(",")):
            if kind not in KINDS:
                raise ValueError(f"kinds={self.kinds}: there is no {kind}, only {', '.join(KINDS)}")


def fuzz(cfg):
    """Returns the bad outcomes, one text each."""
    kinds = cfg.kinds.split(",") if cfg.kinds else list(KINDS)
    bad = []
    counts = {kind: Counter() for kind in kinds}
    seconds = Counter()
    end = time.monotonic() + 60 * cfg.minutes
    with tempfile.TemporaryDirectory() as temporary:
        for kind in kinds:
            Path(temporary, kind).mkdir()
            KINDS[kind][0](Path(temporary, kind))

        with tqdm(total=cfg.n and cfg.n * len(kinds), unit=" files", disable=None) as bar:
            for first in range(0, cfg.n or sys.maxsize, BATCH):
                for kind in kinds:
                    if cfg.n is None and time.monotonic() > end:
                        break
                    start = time.monotonic()
                    numbers = range(first, min(first + BATCH, cfg.n or sys.maxsize))
                    for i, text in read_damaged(kind, numbers, Path(temporary), cfg):
                        counts[kind][text.partition(":")[0]] += 1
                        bar.update()
                        if text.startswith("BAD"):
                            bad.append(f"{kind} {i}: {text}")
                            tqdm.write(bad[-1])
                            keep(Path(temporary), f"{kind}_{i}_*", cfg.out)
                    seconds[kind] += time.monotonic() - start
                else:
                    continue
                break

    for kind, count in counts.items():
        ms = 1000 * seconds[kind] / max(count.total(), 1)
        print(f"{kind:10} {count['result']:6} read, {count['refused']:6} refused, {count['BAD']:4} bad, "
              f"{ms:.0f} ms each")
    return bad


def damage_and_read(kind, i, temporary, cfg):
    """The outcome of damaged file number i of a kind."""
    draw = random.Random(f"{cfg.seed} {kind} {i}")
    case = draw.choice(sorted((temporary / kind).iterdir()))
    folder = temporary / f"{kind}_{i}_{case.name}"
    shutil.copytree(case, folder)
    damaged = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    damage(damaged, draw)

    text = judge(KINDS[kind][1], folder, damaged)
    if not text.startswith("BAD"):
        shutil.rmtree(folder)
    return text


def keep(temporary, name, out):
    """Move the damaged files of a bad outcome to the folder `out`."""
    for folder in temporary.glob(name):
        shutil.copytree(folder, Path(out, folder.name), dirs_exist_ok=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    raise SystemExit(1 if fuzz(configurator.parse(Config, sys.argv[1:])) else 0)
