"""Gaze data in: EGTEA Gaze+, Ego4D and EgoExo4D as their owners distribute them, training clips out.

All three sets become the same thing. A video has a table (n, 3) with a row per frame: x, y in [0, 1] and a type. A clip
is a stretch of a video; T of its frames are an item, together with their rows. Frame numbers count from the start of
the whole video everywhere, also for clips that were cut out of it. The README says where each file comes from.

Videos stay uint8 up to the model, which normalises them once. Against the published loaders: pictures are never
normalised twice, a missing picture is an error and not a black one, an unreadable clip is replaced by the next one with
a warning and not by a random one, gaze of untracked frames does not steer the crop.

Dimension key: T frames, R side of the picture that the model gets, n frames of a video, h x w heat map.
"""
import csv
import functools
import json
import os
import re
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import VideoError, count_frames, decode

NAMES = {"egtea": "EGTEA Gaze+", "ego4d": "Ego4D", "egoexo4d": "EgoExo4D"}
UNTRACKED = {"egtea": 0, "ego4d": 3, "egoexo4d": 0}  # the type of frames without a gaze point
FIXATION = {"egtea": 1, "ego4d": 0, "egoexo4d": 1}   # the type that metrics count (EgoExo4D: visible)

# Ground-truth maps of the published evaluations: keywords of heatmaps(). EgoExo4D has no window.
LABEL_MAPS = {"egtea": dict(size=56, sigma=3.0, window=19), "ego4d": dict(size=56, sigma=3.2, window=19),
              "egoexo4d": dict(size=64, sigma=3.0, window=None)}

EGTEA_FPS, EGTEA_WIDTH, EGTEA_HEIGHT = 24, 1280, 960
EGO4D_FPS, EGO4D_WIDTH, EGO4D_HEIGHT = 30, 1088, 1080
EGO4D_CLIP = 5         # seconds
SACCADE = 40           # pixels from one frame to the next, in pictures of 1088 x 1080
EGOEXO4D_FPS = 8       # frames per second that are used
EGOEXO4D_SIDE = 1404   # pixels; the published code divides by it, the videos have 1408
ODD_CLIP = "OP03-R01-PastaSalad-879780-892210-F021084-F021444.mp4"  # the published evaluation leaves it out
ODD_VIDEOS = ("4e07da0c", "5819e52c", "83081c5a", "a77682da")       # Ego4D: left out by the published preprocessing
MAX_MISSING = 4        # frames by which a file may be shorter than its name says: the last frame is repeated
MAX_FAILURES = 100     # so many unreadable clips in a row mean a broken disk, not a few bad downloads
MAX_DRAWS = 10         # starts to try for a training clip of Ego4D that is tracked throughout


# ----------------------------------------------------------------------------------------------------------------------
# small files

def read_rows(path, hint):
    """Yield (line number, fields) of a csv file; empty lines are skipped. `hint`: what to do where there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {hint}")
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        for number, fields in enumerate(csv.reader(file), 1):
            if any(field.strip() for field in fields):
                yield number, [field.strip() for field in fields]


def read_table(path, columns, hint):
    """Like read_rows for a file with a header: yields (line number, {column: field}). ValueError: a column lacks."""
    rows = read_rows(path, hint)
    _, header = next(rows, (1, []))
    missing = [name for name in columns if name not in header]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; its first line is {','.join(header)!r}, "
                         f"expected {','.join(columns)}")
    for number, fields in rows:
        if len(fields) != len(header):
            raise ValueError(f"{path}, line {number}: {len(fields)} fields, the header has {len(header)}")
        yield number, dict(zip(header, fields, strict=True))


def number_of(text, path, line):
    """Float of a field. ValueError: it is none, or NaN."""
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise ValueError(f"{path}, line {line}: {text!r} is not a number")
    return value


def is_text(path):
    """Whether a file that should be a video is readable text, as a csv file saved as .mp4 is."""
    with open(path, "rb") as file:
        head = file.read(200)
    return bool(head) and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head)


# ----------------------------------------------------------------------------------------------------------------------
# EGTEA Gaze+

def egtea_clips(root, split):
    """[(video, file name of the clip, [(first frame, frame after the last)])] of one split."""
    path = root / f"{split}_gaze_official.csv"
    clips = []
    for line, fields in read_rows(path, "one clip a line, video/clip.mp4, as in data/ of github.com/BolinLai/GLC"):
        video, _, name = fields[0].partition("/")
        found = re.search(r"-F(\d+)-F(\d+)\.mp4$", name)
        if not found:
            raise ValueError(f"{path}, line {line}: {fields[0]!r} is no clip like video/name-F000001-F000021.mp4")
        if name != ODD_CLIP:
            clips.append((video, name, [(int(found[1]) - 1, int(found[2]))]))
    return clips


def egtea_gaze(root, video):
    """Table (n, 3) of a BeGaze export, either version. Types: 0 no sample, 1 fixation, 2 saccade, 3 other.

    Several samples in a frame: each moves the point half way, the last event counts. A point outside of the picture is
    moved to its border and keeps its type, as in the published evaluation.
    """
    path = root / "gaze_data" / f"{video}.txt"
    if not path.is_file():
        path = path.with_name(f"{video}-GazeData.txt")
    if not path.is_file():
        raise FileNotFoundError(f"{path.with_name(f'{video}.txt')} is missing (or {path.name}): gaze_data.zip of EGTEA")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    titles = [number for number, text in enumerate(lines[:34]) if "## Number of Samples:" in text]
    if titles not in ([9], [10]):
        raise ValueError(f"{path} is not a BeGaze export: '## Number of Samples:' must be its line 10 or 11")
    n_fields, x_field, frame_field = (7, 3, 5) if titles == [9] else (26, 5, 24)

    gaze = {}
    for line, text in enumerate(lines[34:], 35):
        fields = text.split("\t")
        if not text.strip() or "MSG" in fields[1:2]:
            continue
        if len(fields) != n_fields:
            raise ValueError(f"{path}, line {line}: {len(fields)} fields separated by tabs, expected {n_fields}")
        frame = fields[frame_field].strip()
        if n_fields == 26:  # hours:minutes:seconds:frame
            h, m, s, part = (int(number_of(field, path, line)) for field in frame.split(":"))
            frame = ((h * 60 + m) * 60 + s) * EGTEA_FPS + part
        frame = int(number_of(frame, path, line))

        x = number_of(fields[x_field], path, line)
        y = number_of(fields[x_field + 1], path, line)
        if frame in gaze:
            x = (x + gaze[frame][0]) / 2
            y = (y + gaze[frame][1]) / 2
        gaze[frame] = x, y, {"Fixation": 1, "Saccade": 2}.get(fields[-1].strip(), 3)

    if not gaze:
        raise ValueError(f"{path} holds no gaze sample after its 34 lines of header")
    table = np.zeros((max(gaze) + 1, 3))
    table[list(gaze)] = list(gaze.values())
    table[:, 0] = table[:, 0].clip(0, EGTEA_WIDTH - 1) / EGTEA_WIDTH
    table[:, 1] = table[:, 1].clip(0, EGTEA_HEIGHT - 1) / EGTEA_HEIGHT
    return table.astype(np.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Ego4D

def ego4d_clips(root, split):
    """[(video, file name of the clip, windows)]. A window (first frame, frame after the last) is a place to sample
    from: those of <split>_ego4d_gaze_stride8.csv where that file exists, else the whole clip."""
    path = root / f"{split}_ego4d_gaze_stride8.csv"
    if not path.is_file():
        path = root / f"{split}_ego4d_gaze.csv"
    windows = defaultdict(list)
    for line, fields in read_rows(path, "one clip a line, uid/uid_t0_t5.mp4, as in data/ of github.com/BolinLai/GLC"):
        found = re.fullmatch(r"[^/]+/[^/]+_t(\d+)_t(\d+)\.mp4", fields[0])
        if fields[0] == "clip_path":
            continue
        if not found or len(fields) not in (1, 3):
            raise ValueError(f"{path}, line {line}: {','.join(fields)!r} is no clip like uid/uid_t0_t5.mp4, alone or "
                             "with the first frame of a window and the frame after its last")

        first, last = int(found[1]) * EGO4D_FPS, int(found[2]) * EGO4D_FPS
        window = (first, last)
        if len(fields) == 3:
            window = (int(number_of(fields[1], path, line)), int(number_of(fields[2], path, line)))
        if not first <= window[0] < window[1] <= last:
            raise ValueError(f"{path}, line {line}: the window {window[0]}..{window[1]} is not part of the clip, which "
                             f"has the frames {first}..{last} of its video")
        windows[fields[0]].append(window)
    return [(*name.split("/"), places) for name, places in windows.items()]


def ego4d_gaze(root, video):
    """Table (n, 3) of a frame label file. Types: 0 fixation, 1 saccade, 2 outside (clipped), 3 untracked; a frame
    without a row is untracked."""
    path = root / "gaze_frame_label" / f"{video}_frame_label.csv"
    rows = []
    for line, row in read_table(path, ("frame", "x", "y", "gaze_type"), "python -m argaze.data labels makes it"):
        values = [number_of(row[name], path, line) for name in ("frame", "x", "y", "gaze_type")]
        if not (0 <= values[1] <= 1 and 0 <= values[2] <= 1):
            raise ValueError(f"{path}, line {line}: gaze ({row['x']}, {row['y']}) lies outside of the picture, 0 to 1")
        rows.append(values)
    if not rows:
        raise ValueError(f"{path} has no row below its header")

    rows = np.array(rows)
    table = np.tile(np.float32([0, 0, UNTRACKED["ego4d"]]), (int(rows[:, 0].max()) + 1, 1))
    table[rows[:, 0].astype(int)] = rows[:, 1:]
    return table


def label_ego4d(path, n_frames, fps=EGO4D_FPS):
    """Rows [frame, x, y, type] of all n_frames from a raw gaze file, whose columns have no fixed names: the second is
    the time in seconds, the sixth and seventh are x and y from the bottom left corner. A frame has the nearest sample.
    """
    samples = []
    for line, fields in read_rows(path, "gaze/<uid>.csv of `ego4d --datasets gaze`"):
        if line > 1 and len(fields) < 7:
            raise ValueError(f"{path}, line {line}: {len(fields)} columns, expected at least 7: the second is the time "
                             "in seconds, the sixth and seventh are x and y")
        if line > 1:
            samples.append([number_of(fields[1], path, line), *(float(field or "nan") for field in fields[5:7])])
    if len(samples) < 3:
        raise ValueError(f"{path} holds {len(samples)} gaze samples")
    times, x, y = np.array(samples).T

    rows = []
    for frame in range(n_frames):
        after = min(np.searchsorted(times, frame / fps), len(times) - 1)
        nearest = after
        if after > 0 and abs(times[after - 1] - frame / fps) < abs(times[after] - frame / fps):
            nearest = after - 1

        # as published, tracking ends once the frame before has reached the last sample but one
        over = frame > 0 and np.searchsorted(times, (frame - 1) / fps) >= len(times) - 2
        point = np.array([x[nearest], 1 - y[nearest]])
        if over or not np.isfinite(point).all():
            rows.append([frame, 0, 0, 3])
            continue
        inside = point.clip(0, 1)
        kind = 0
        if rows and rows[-1][3] != 3:
            way = (point - rows[-1][1:3]) * (EGO4D_WIDTH, EGO4D_HEIGHT)
            kind = int(np.hypot(*way) > SACCADE)
        if (inside != point).any():
            kind = 2
        rows.append([frame, *inside.tolist(), kind])
    return rows


def untracked_intervals(path):
    """{video: [(first second, last second)]} of ego4d_gaze_untracked.csv."""
    intervals = defaultdict(list)
    for line, fields in read_rows(path, "uid,h:m:s,h:m:s,code a line; it is in data/ of github.com/BolinLai/GLC"):
        times = [re.fullmatch(r"(\d+):(\d+):(\d+)", field) for field in fields[1:3]]
        if len(times) < 2 or None in times:
            raise ValueError(f"{path}, line {line}: {','.join(fields)!r} is not uid,h:m:s,h:m:s,code")
        intervals[fields[0]].append([int(t[1]) * 3600 + int(t[2]) * 60 + int(t[3]) for t in times])
    return intervals


def cut_ego4d(video, seconds, intervals):
    """Names of the five-second clips of a video that touch none of its untracked intervals [(start, end)]."""
    names = []
    for start in range(0, int(seconds) - EGO4D_CLIP + 1, EGO4D_CLIP):
        end = start + EGO4D_CLIP
        if all(end < first or start > last for first, last in intervals):
            names.append(f"{video}_t{start}_t{end}.mp4")
    return names


# ----------------------------------------------------------------------------------------------------------------------
# EgoExo4D

@functools.lru_cache
def takes(root):
    """{take: (first row, row after the last)} of the frames in the capture's timesync.csv."""
    path = root / "takes.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: `egoexo --parts metadata` downloads it")
    return {take["take_name"]: (take["timesync_start_idx"] + 1, take["timesync_end_idx"])
            for take in json.loads(path.read_text())}


@functools.lru_cache(512)
def frame_times(root, take, camera):
    """(n,) nanoseconds of the take's frames; camera: "aria01_214-1"."""
    if take not in takes(root):
        raise ValueError(f"{root / 'takes.json'} has no take {take!r}")
    path = root / "captures" / re.sub(r"_\d+$", "", take) / "timesync.csv"
    column = f"{camera}_capture_timestamp_ns"
    rows = list(read_table(path, [column], "`egoexo --parts captures` downloads it"))
    first, last = takes(root)[take]
    times = [int(float(row[column])) for _, row in rows[first:last] if row[column]]
    if len(times) < 2:
        raise ValueError(f"{path}: the column {column} has {len(times)} times in the rows {first}..{last} of {take}")
    return np.array(times)


def egoexo4d_clips(root, split, n_frames):
    """[(take, path of its video below root, [window], stride)] of one split, windows of n_frames side by side."""
    path = root / "split_assignments.csv"
    columns = ("take_name", "video_path", "clip_start_time", "clip_end_time", "split")
    label = {"test": "TEST_IID"}.get(split, split.upper())
    clips, splits = [], Counter()
    for line, row in read_table(path, columns, f"a csv file with the columns {','.join(columns)}"):
        splits[row["split"]] += 1
        if row["split"] != label:
            continue
        video = "takes/" + row["video_path"].rpartition("takes/")[2]  # users' lists hold their own absolute paths
        times = frame_times(root, row["take_name"], Path(video).stem)
        fps = 1e9 / np.median(np.diff(times))
        stride = max(1, round(fps / EGOEXO4D_FPS))
        start = min(max(0, round(number_of(row["clip_start_time"], path, line) * fps)), len(times) - 1)
        end = min(max(0, round(number_of(row["clip_end_time"], path, line) * fps)), len(times))

        # a window takes n_frames of every stride-th frame
        n_windows = len(range(start, end, stride)) // n_frames
        for first in range(start, start + n_windows * n_frames * stride, n_frames * stride):
            clips.append((row["take_name"], video, [(first, first + n_frames * stride)], stride))
    if label not in splits:
        raise ValueError(f"{path} has no row of the split {label}; it has {', '.join(sorted(splits))}")
    return clips


def egoexo4d_gaze(root, take, camera="aria01_214-1"):
    """Table (n, 3) of a take: the nearest gaze sample within 1/16 s, type 1; 0 where there is none."""
    folder = root / "gaze_data" / "takes" / take / "eye_gaze"
    path = folder / "personalized_eye_gaze_2d.csv"
    if not path.is_file():
        path = folder / "general_eye_gaze_2d.csv"
    rows = list(read_table(path, ("x", "y"), "`egoexo --parts take_eye_gaze` downloads it, or the personalized one"))
    name = next((name for name in (rows[0][1] if rows else ()) if "timestamp" in name), None)
    if name is None:
        raise ValueError(f"{path} has no row with a timestamp")

    unit = {"ns": 1, "us": 1e3, "ms": 1e6}.get(name.rpartition("_")[2], 1e9)
    samples = np.array([[number_of(row[name], path, line) * unit, float(row["x"] or "nan"), float(row["y"] or "nan")]
                        for line, row in rows])
    samples = samples[samples[:, 0].argsort(kind="stable")]
    times = samples[:, 0].astype(np.int64)

    frames = frame_times(root, take, camera)
    after = np.searchsorted(times, frames).clip(max=len(times) - 1)
    before = (after - 1).clip(min=0)
    nearest = np.where(abs(times[before] - frames) <= abs(times[after] - frames), before, after)
    near = abs(times[nearest] - frames) <= 0.5e9 / EGOEXO4D_FPS

    points = samples[nearest, 1:].astype(np.float32) / EGOEXO4D_SIDE
    seen = near & np.isfinite(points).all(axis=1)
    return np.column_stack([np.where(seen[:, None], points.clip(0, 1), 0), seen]).astype(np.float32)


def fill_gaps(rows):
    """Rows (T, 3) of a window: an unseen frame takes the row of the nearest seen one, the earlier of two."""
    seen = np.flatnonzero(rows[:, 2] >= 0.5)
    if len(seen) == 0:
        return rows
    nearest = [seen[np.abs(seen - t).argmin()] for t in range(len(rows))]
    return rows[nearest]


# ----------------------------------------------------------------------------------------------------------------------
# the three sets alike

@dataclass
class Clip:
    """A stretch of a video to sample from."""
    key: str          # name in reports: video/clip
    video: str        # whose table it reads
    path: Path        # mp4 file, or folder of pictures
    offset: int       # frame of the video that the file begins with
    windows: list     # [(first frame, frame after the last)]
    stride: int       # frames from one to the next


def detect(root):
    """Which set lies in the folder, by what is in it."""
    marks = {"egtea": ("cropped_clips", "gaze_data"), "ego4d": ("clips.gaze", "full_scale.gaze", "gaze_frame_label"),
             "egoexo4d": ("takes.json", "captures", "split_assignments.csv")}
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"root={root} is no folder")
    for name in ("ego4d", "egoexo4d", "egtea"):
        if any((root / mark).exists() for mark in marks[name]):
            return name
    raise FileNotFoundError(f"{root} looks like none of the three sets, which hold " + "; ".join(
        f"{NAMES[name]}: {', '.join(files)}" for name, files in marks.items()) + ". Or give --dataset")


def list_clips(dataset, root, split, frames="", n_frames=8, stride=8):
    """[Clip] of a split ("train", "test", EgoExo4D also "val", "test_ood_site", "test_ood_task",
    "test_ood_participant"). frames: folder of pictures, <video>/%06d.jpg, to be read in place of the videos."""
    root = Path(root)
    clips = []
    if dataset == "egoexo4d":
        pictures = Path(frames) if frames else root / "takes_frames"
        for take, video, windows, step in egoexo4d_clips(root, split, n_frames):
            path = root / video
            if pictures.is_dir():
                path = pictures / Path(video).relative_to("takes").with_suffix("")
            clips.append(Clip(f"{take}/{windows[0][0]}", take, path, 0, windows, step))
    else:
        names, folder = (egtea_clips, "cropped_clips") if dataset == "egtea" else (ego4d_clips, "clips.gaze")
        for video, name, windows in names(root, split):
            first = int(re.search(r"_t(\d+)_t\d+\.mp4$", name)[1]) * EGO4D_FPS if dataset == "ego4d" else windows[0][0]
            path = Path(frames, video) if frames else root / folder / video / name
            clips.append(Clip(f"{video}/{name}", video, path, 0 if frames else first, windows, stride))
    if not clips:
        raise ValueError(f"{root}: the split {split!r} has no clip of {n_frames} frames")
    return clips


def read_gaze(dataset, root, clip):
    """Table (n, 3) of the clip's video."""
    if dataset == "egoexo4d":
        camera = re.search(r"aria\d+_214-1", str(clip.path))
        return egoexo4d_gaze(Path(root), clip.video, camera[0])
    return {"egtea": egtea_gaze, "ego4d": ego4d_gaze}[dataset](Path(root), clip.video)


def sample_frames(dataset, window, n_frames, stride, share=0.0):
    """(T,) frame numbers in a window. share in [0, 1): of the room that is left, where to start; 0 to evaluate.

    EGTEA: spread evenly over T * stride frames, the last frame of a shorter clip is repeated; the others: every
    stride-th frame.
    """
    first, end = window
    start = share * max(0, end - first - n_frames * stride)
    if dataset == "egtea":
        index = np.linspace(np.float32(start), np.float32(start + n_frames * stride - 1), n_frames, dtype=np.float32)
        return first + index.clip(0, end - first - 1).astype(int)
    return (first + int(start) + stride * np.arange(n_frames)).clip(max=end - 1)


def heatmaps(points, size, tracked=None, sigma=3.0, window=19):
    """Ground-truth maps (..., h, w) of gaze points (..., 2) in [0, 1].

    A Gaussian of `sigma` cells in a square of `window` cells around the cell of the point, with sum 1; window=None:
    around the point itself, everywhere, with maximum 1 (EgoExo4D). size: h = w, or (h, w). tracked (...,) bool: an
    untracked frame gets a uniform map with sum 1. Published values: LABEL_MAPS.
    """
    h, w = (size, size) if isinstance(size, int) else size
    points = points.double()
    x = points[..., 0, None] * w
    y = points[..., 1, None] * h
    if window:
        x = x.round()
        y = y.round()
    x_away = torch.arange(w, device=points.device) - x             # (..., w)
    y_away = torch.arange(h, device=points.device) - y

    gauss_x = torch.exp(-x_away ** 2 / (2 * sigma ** 2))
    gauss_y = torch.exp(-y_away ** 2 / (2 * sigma ** 2))
    if window:
        gauss_x = gauss_x * (x_away.abs() <= window // 2)
        gauss_y = gauss_y * (y_away.abs() <= window // 2)
    maps = gauss_y.unsqueeze(-1) * gauss_x.unsqueeze(-2)           # (..., h, w)

    # a window may lie beside the picture altogether
    total = maps.sum((-2, -1), keepdim=True) if window else maps.amax((-2, -1), keepdim=True)
    known = total > 0
    if tracked is not None:
        known = known & tracked.bool()[..., None, None]
    return torch.where(known, maps / total.clamp(min=1e-300), 1 / (h * w)).float()


# ----------------------------------------------------------------------------------------------------------------------
# pictures

@functools.lru_cache(256)
def picture_index(folder):
    """{frame number: file name} of a folder of pictures called by numbers, such as 000012.jpg or frame_00012.jpg."""
    names = {}
    for name in os.listdir(folder) if Path(folder).is_dir() else ():
        found = re.search(r"(\d+)\.(jpg|jpeg|png)$", name)
        if found and name[0] != ".":
            names[int(found[1])] = name
    return names


def read_pictures(folder, frames):
    """[(H, W, 3) uint8] of the frame numbers; a missing one is replaced by the next, else by the nearest of four."""
    index = picture_index(str(folder))
    if not index:
        raise VideoError(f"{folder} holds no pictures called by frame numbers: python -m argaze.data frames makes them")
    images = []
    for frame in frames.tolist():
        near = sorted(range(frame - MAX_MISSING, frame + MAX_MISSING + 1), key=lambda n, f=frame: (abs(n - f), -n))
        number = next((n for n in near if n in index), None)
        if number is None:
            raise VideoError(f"{folder} lacks the picture of frame {frame}: run python -m argaze.data frames again")
        try:
            with Image.open(Path(folder, index[number])) as image:
                images.append(np.asarray(image.convert("RGB")))
        except OSError as error:
            raise VideoError(f"{Path(folder, index[number])} cannot be read ({error})") from error
    return images


def read_frames(clip, frames):
    """[(H, W, 3) uint8] of a clip's frame numbers (T,). VideoError names the file and what is wrong with it."""
    if clip.path.suffix != ".mp4":
        return read_pictures(clip.path, frames)
    if not clip.path.is_file():
        raise VideoError(f"{clip.path} is missing")
    if is_text(clip.path):
        raise VideoError(f"{clip.path} is a text file and no video: is it a csv file saved as .mp4? Download it again")

    wanted = (frames - clip.offset).tolist()
    images = dict(decode(clip.path, set(wanted)))
    last = max(images)
    if max(wanted) not in images and count_frames(clip.path) <= max(wanted) - MAX_MISSING:
        raise VideoError(f"{clip.path} has {count_frames(clip.path)} frames, frame {max(wanted)} is needed: it was cut "
                         "short, or the list names another clip")
    return [images.get(i, images[last]) for i in wanted]


def resize(images, height, width, mode="bilinear"):
    """[(H, W, 3) uint8] -> (T, 3, height, width) uint8, without antialiasing, as the published models were trained."""
    out = torch.empty(len(images), 3, height, width, dtype=torch.uint8)
    for t, image in enumerate(images):
        x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
        if x.shape[2:] != (height, width):
            options = dict(align_corners=False) if mode == "bilinear" else {}
            x = F.interpolate(x, (height, width), mode=mode, **options)
        out[t] = x[0].round()
    return out


def crop_range(gaze, size, crop):
    """(lowest, highest) offset of a crop of `crop` pixels that keeps gaze, a list of pixels, inside. Where not all of
    it fits, the smallest or largest is given up in turn until the rest does."""
    gaze = sorted(gaze)
    while gaze:
        low = max(0, gaze[-1] - crop)
        high = min(size - crop, gaze[0])
        if low <= high:
            return low, high
        gaze = gaze[1:] if len(gaze) % 2 == 0 else gaze[:-1]
    return 0, size - crop


def crop_square(images, points, tracked, size, generator=None):
    """[(H, W, 3) uint8] and points (T, 2) of the whole picture -> video (T, 3, R, R) and points of the square.

    Without a generator the square in the middle. With one, the augmentation of the published training: shorter side
    8/7 to 10/7 of R, a random square that keeps the tracked gaze inside, mirrored half the time.
    """
    height, width = images[0].shape[:2]
    short = size
    if generator is not None:
        low, high = round(size * 256 / 224), round(size * 320 / 224)
        short = int(torch.randint(low, high + 1, (), generator=generator))
    new = [short * height // min(height, width), short * width // min(height, width)]
    video = resize(images, *new)

    # offset of the square, first down and then right
    offset = []
    for side, length in enumerate(new):
        place = int(np.ceil((length - size) / 2))
        if generator is not None:
            gaze = [float(p) * length for p in points[tracked, 1 - side]]
            low, high = crop_range(gaze, length, size)
            place = int(low + (high - low) * torch.rand((), generator=generator).item())
        offset.append(place)
    top, left = offset
    video = video[:, :, top:top + size, left:left + size]
    corner = torch.tensor([left, top], dtype=torch.float64)
    points = (points.double() * torch.tensor(new[::-1]) - corner) / size

    if generator is not None and torch.rand((), generator=generator) < 0.5:
        video = video.flip(-1)
        points[:, 0] = 1 - points[:, 0]
    return video.contiguous(), points.clamp(0, 1).float()


# ----------------------------------------------------------------------------------------------------------------------
# the dataset

class GazeClips(torch.utils.data.Dataset):
    """Clips with gaze. An item: "video" (T, 3, R, R) uint8; "points" (T, 2) float32, gaze x, y in [0, 1] of the square,
    (.5, .5) where untracked; "tracked" (T,) bool, the frame has a point; "counted" (T,) bool, its point is a fixation
    (EgoExo4D: visible), which is what metrics and the coordinate loss use; "frames" (T,) numbers in the video; "key",
    "path", "unreadable": files passed over to get it.

    augment=True: random window, crop and flip, a pure function of (seed, index); item index + epoch * len(self) is the
    clip's draw of that epoch. cache=True keeps decoded frames in memory; meant for small sets and n_workers=0.
    """

    def __init__(self, dataset, root, split, n_frames=8, size=224, stride=8, frames="", augment=False, cache=False,
                 seed=0):
        dataset = detect(root) if dataset == "auto" else dataset
        assert dataset in NAMES, dataset
        self.dataset, self.n_frames, self.size, self.augment, self.seed = dataset, n_frames, size, augment, seed
        self.images = {} if cache else None
        self.warned = set()

        self.clips = list_clips(dataset, root, split, frames, n_frames, stride)
        self.drop_missing(f"{root} ({split})")
        self.tables = {}
        for clip in self.clips:
            if clip.video not in self.tables:
                self.tables[clip.video] = read_gaze(dataset, root, clip)
        self.check_gaze(f"{root} ({split})")

    def drop_missing(self, place):
        exists = {clip.path: clip.path.exists() for clip in self.clips}
        missing = [path for path, there in exists.items() if not there]
        if len(missing) == len(exists):
            raise FileNotFoundError(f"{place}: none of its {len(missing)} videos is there, the first is {missing[0]}: "
                                    "see python -m argaze.data check")
        if missing:
            warnings.warn(f"{place}: {len(missing)} of {len(exists)} videos are missing and left out, first "
                          f"{missing[0]}: see python -m argaze.data check", stacklevel=3)
            self.clips = [clip for clip in self.clips if exists[clip.path]]

    def check_gaze(self, place):
        """ValueError unless something is tracked; a warning where clips are shorter than what is sampled from them."""
        span = [min(end - first for first, end in clip.windows) - self.n_frames * clip.stride for clip in self.clips]
        short = [clip.key for clip, room in zip(self.clips, span, strict=True) if room < 0]
        if short:
            warnings.warn(f"{place}: {len(short)} of {len(self.clips)} clips are shorter than {self.n_frames} frames "
                          f"with stride {self.clips[0].stride}, their last frame is repeated; first {short[0]}",
                          stacklevel=3)
        for clip in self.clips:
            first, end = clip.windows[0][0], clip.windows[-1][1]
            if (self.tables[clip.video][first:end, 2] != UNTRACKED[self.dataset]).any():
                return
        raise ValueError(f"{place}: gaze is tracked in no frame of its {len(self.clips)} clips, the first one is "
                         f"{self.clips[0].key}: do the gaze files belong to these videos?")

    def __len__(self):
        return len(self.clips)

    def sample(self, clip, generator):
        """(frame numbers (T,), rows (T, 3)) of one draw."""
        for _ in range(MAX_DRAWS):
            window, share = clip.windows[0], 0.0
            if generator is not None:
                window = clip.windows[int(torch.randint(len(clip.windows), (), generator=generator))]
                share = torch.rand((), generator=generator).item()
            frames = sample_frames(self.dataset, window, self.n_frames, clip.stride, share)

            # rows past the end of the table are untracked
            table = self.tables[clip.video]
            rows = table[frames.clip(max=len(table) - 1)].copy()
            rows[frames >= len(table), 2] = UNTRACKED[self.dataset]
            if self.dataset == "egoexo4d":
                return frames, fill_gaps(rows)

            # training on Ego4D draws again as long as gaze is lost somewhere, as published
            if generator is None or self.dataset != "ego4d" or (rows[:, 2] != UNTRACKED["ego4d"]).all():
                break
        return frames, rows

    def read(self, clip, draw):
        generator = None
        if self.augment:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + draw)
        frames, rows = self.sample(clip, generator)
        place = (clip.key, *frames.tolist())
        images = (self.images or {}).get(place) or read_frames(clip, frames)
        if self.images is not None:
            self.images[place] = images

        kind = torch.from_numpy(rows[:, 2])
        tracked = kind != UNTRACKED[self.dataset]
        points = torch.from_numpy(rows[:, :2])
        if self.dataset == "egoexo4d":  # the whole picture, made square
            video = resize(images, self.size, self.size, mode="area")
        else:
            video, points = crop_square(images, points, tracked, self.size, generator)
        points = torch.where(tracked.unsqueeze(1), points, 0.5)
        return {"video": video, "points": points, "tracked": tracked, "counted": kind == FIXATION[self.dataset],
                "frames": torch.from_numpy(frames), "key": clip.key, "path": str(clip.path)}

    def __getitem__(self, index):
        unreadable = []
        for i in range(min(MAX_FAILURES, len(self))):
            clip = self.clips[(index + i) % len(self)]
            try:
                return self.read(clip, index) | {"unreadable": unreadable}
            except VideoError as error:
                unreadable.append(str(clip.path))
                if clip.path not in self.warned:
                    self.warned.add(clip.path)
                    warnings.warn(f"skipped, the next clip is used instead: {error}", stacklevel=2)
        raise VideoError(f"all {len(unreadable)} clips from {unreadable[0]} on are unreadable")


def collate(items):
    """Items of GazeClips -> one batch: tensors (B, T, ...), lists of key and path, one list of unreadable files."""
    batch = {name: [item[name] for item in items] for name in items[0]}
    for name in ("video", "points", "tracked", "counted", "frames"):
        batch[name] = torch.stack(batch[name])
    batch["unreadable"] = [path for paths in batch["unreadable"] for path in paths]
    return batch
