"""Gaze data in, training clips out: checks and prepares the three sets, decodes, crops, makes ground-truth maps.

    python -m argaze.data check --root=/data/egtea               # what is there, what is missing, in which form
    python -m argaze.data labels --root=/data/ego4d              # raw gaze files -> one row per frame of every video
    python -m argaze.data frames --root=/data/ego4d --frames=/data/ego4d_frames    # videos -> pictures, faster to read
    python -m argaze.data check -h                               # every key with its default

The sets' own files are read in formats.py. Against the published loaders: clips stay uint8 up to the model, which
normalises them once; a missing picture is an error and not a black one; an unreadable clip is replaced by the next one
with a warning, not by a random one; gaze of untracked frames does not steer the crop.

Dimension key: B clips, T frames, H x W source size, R side of the picture that the model gets, h x w heat map.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it from the root of the repository as a module: python -m argaze.data check …")

import functools
import math
import os
import re
import sys
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from argaze.formats import (
    EGO4D_FPS,
    FIXATION,
    NAMES,
    ODD_VIDEOS,
    SPLITS,
    UNTRACKED,
    cut_ego4d,
    detect,
    fill_gaps,
    label_ego4d,
    list_clips,
    picture_folder,
    read_gaze,
    sample_frames,
    untracked_intervals,
)
from data import VideoError, count_frames, decode, without_gaps
from lib import configurator, run
from lib.checkpoint import take_output
from lib.text import write_whole

# Ground-truth maps of the published evaluations.
LABEL_MAPS = {"egtea": dict(size=56, sigma=3.0, window=19),
              "ego4d": dict(size=56, sigma=3.2, window=19),
              "egoexo4d": dict(size=64, sigma=3.0, window=None)}
MAX_MISSING = 4     # frames by which a file may be shorter than its name says: the last frame is repeated
MAX_FAILURES = 100  # so many unreadable clips in a row mean a broken disk, not a few bad downloads
MAX_DRAWS = 10      # starts to try for a training clip of Ego4D that is tracked throughout

# ----------------------------------------------------------------------------------------------------------------------
# ground-truth maps


def label_map(dataset, size=None, sigma=None):
    """Keywords of heatmaps() as in a set's published evaluation, or with another size or sigma."""
    keywords = dict(LABEL_MAPS[dataset])
    if size:
        keywords["size"] = size
    if sigma:
        keywords["sigma"] = sigma
    return keywords


def heatmaps(points, size, tracked=None, sigma=3.0, window=19):
    """Ground-truth maps (..., h, w) of gaze points (..., 2) in [0, 1].

    A Gaussian of `sigma` cells in a square of `window` cells around the cell of the point, with sum 1; window=None:
    around the point itself, everywhere, with maximum 1 (EgoExo4D). size: h = w, or (h, w). tracked (...,) bool: an
    untracked frame gets a uniform map with sum 1. Published values: label_map().
    """
    h, w = (size, size) if isinstance(size, int) else size
    points = points.double()
    x = points[..., :1] * w
    y = points[..., 1:] * h
    if window:
        x = x.round()
        y = y.round()
    x_distance = torch.arange(w, device=points.device) - x               # (..., w)
    y_distance = torch.arange(h, device=points.device) - y               # (..., h)

    gauss_x = torch.exp(-x_distance ** 2 / (2 * sigma ** 2))
    gauss_y = torch.exp(-y_distance ** 2 / (2 * sigma ** 2))
    if window:
        gauss_x = gauss_x * (x_distance.abs() <= window // 2)
        gauss_y = gauss_y * (y_distance.abs() <= window // 2)
    maps = gauss_y.unsqueeze(-1) * gauss_x.unsqueeze(-2)                 # (..., h, w)

    total = maps.sum((-2, -1), keepdim=True)
    if window is None:
        total = maps.amax((-2, -1), keepdim=True)
    known = total > 0  # a window may lie beside the picture altogether
    if tracked is not None:
        known = known & tracked[..., None, None]
    uniform = torch.full_like(maps, 1 / (h * w))
    return torch.where(known, maps / total, uniform).float()


# ----------------------------------------------------------------------------------------------------------------------
# reading pictures


def is_text(path):
    """Whether a file that should be a video is readable text, as a csv file saved as .mp4 is."""
    with open(path, "rb") as file:
        head = file.read(200)
    return bool(head) and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head)


def read_frames(clip, frames):
    """[(H, W, 3) uint8] of a clip's frame numbers (T,). VideoError names the file and what is wrong with it."""
    if clip.path.suffix != ".mp4":
        return read_pictures(clip.path, frames)
    if not clip.path.is_file():
        raise VideoError(f"{clip.path} is missing")
    if is_text(clip.path):
        raise VideoError(f"{clip.path} is text and no video: was a csv file saved as .mp4? Download it again")

    # one more frame is decoded, to see whether a file that ends too early ends much too early
    wanted = (frames - clip.offset).tolist()
    least = max(0, max(wanted) - MAX_MISSING)
    images = dict(decode(clip.path, {*wanted, least}))
    if max(images) < least:
        raise VideoError(f"{clip.path} ends before its frame {least}, frame {max(wanted)} is needed: it was cut short, "
                         "or the list names another clip")
    return without_gaps(images, wanted)


@functools.lru_cache(256)
def picture_names(folder):
    """{frame number: file name} of a folder of pictures called like 000012.jpg or frame_00012.png."""
    names = {}
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        found = re.search(r"(\d+)\.(jpg|jpeg|png)$", name)
        if found and name[0] != ".":
            names[int(found[1])] = name
    return names


def read_pictures(folder, frames):
    """[(H, W, 3) uint8] of frame numbers (T,). A missing one is replaced by the nearest, of two the later."""
    names = picture_names(str(folder))
    if not names:
        raise VideoError(f"{folder} holds no pictures called by frame numbers: python -m argaze.data frames makes them")

    images = []
    for frame in frames.tolist():
        number = frame
        if number not in names:
            number = min(names, key=lambda other: (abs(other - frame), -other))  # noqa: B023
        if abs(number - frame) > MAX_MISSING:
            raise VideoError(f"{folder} lacks the picture of frame {frame}: run python -m argaze.data frames again")

        path = Path(folder, names[number])
        try:
            with Image.open(path) as image:
                images.append(np.array(image.convert("RGB")))
        except OSError as error:
            raise VideoError(f"{path} cannot be read ({error})") from error
    return images


# ----------------------------------------------------------------------------------------------------------------------
# cropping


def resize(images, height, width, mode="bilinear"):
    """[(H, W, 3) uint8] -> (T, 3, height, width) uint8, without antialiasing, as the published models were trained."""
    video = torch.empty(len(images), 3, height, width, dtype=torch.uint8)
    options = dict(align_corners=False) if mode == "bilinear" else {}
    for t, image in enumerate(images):
        x = torch.from_numpy(np.ascontiguousarray(image))
        x = x.permute(2, 0, 1).unsqueeze(0)                              # (1, 3, H, W)
        if x.shape[2:] != (height, width):
            x = F.interpolate(x.float(), (height, width), mode=mode, **options).round()
        video[t] = x[0]
    return video


def crop_range(gaze, length, crop):
    """(lowest, highest) offset at which a crop of `crop` pixels out of `length` keeps gaze, a list of pixels, inside.

    Where not all of it fits, the smallest or the largest is given up, in turn, until the rest does.
    """
    gaze = sorted(gaze)
    while gaze:
        low = max(0, gaze[-1] - crop)
        high = min(length - crop, gaze[0])
        if low <= high:
            return low, high
        gaze = gaze[1:] if len(gaze) % 2 == 0 else gaze[:-1]
    return 0, length - crop


def crop_square(images, points, tracked, size, generator=None):
    """[(H, W, 3) uint8] and points (T, 2) in the whole picture -> video (T, 3, R, R) and points in the square.

    Without a generator the square in the middle. With one, the augmentation of the published training: shorter side
    8/7 to 10/7 of R, a random square that keeps the tracked gaze inside, mirrored half the time.
    """
    height, width = images[0].shape[:2]
    short = min(height, width)
    side = size
    if generator is not None:
        smallest = round(size * 8 / 7)
        largest = round(size * 10 / 7)
        side = int(torch.randint(smallest, largest + 1, (), generator=generator))
    height = side * height // short
    width = side * width // short
    video = resize(images, height, width)
    x = points[:, 0].double() * width
    y = points[:, 1].double() * height

    left = math.ceil((width - size) / 2)
    top = math.ceil((height - size) / 2)
    if generator is not None:
        share_x, share_y, mirror = torch.rand(3, generator=generator).tolist()
        low, high = crop_range(x[tracked].tolist(), width, size)
        left = int(low + share_x * (high - low))
        low, high = crop_range(y[tracked].tolist(), height, size)
        top = int(low + share_y * (high - low))

    # points move with the square; those it lost go to its border
    video = video[:, :, top:top + size, left:left + size]
    x = (x - left) / size
    y = (y - top) / size
    if generator is not None and mirror < 0.5:
        video = video.flip(-1)
        x = 1 - x
    points = torch.stack([x, y], dim=1).clamp(0, 1)
    return video.contiguous(), points.float()


# ----------------------------------------------------------------------------------------------------------------------
# the dataset


class GazeClips(torch.utils.data.Dataset):
    """Clips with gaze. An item:

        video (T, 3, R, R) uint8
        points (T, 2) float32, gaze as (x, y) in [0, 1] of the square; (.5, .5) where untracked
        tracked (T,) bool: the frame has a gaze point
        counted (T,) bool: the point is a fixation (EgoExo4D: visible); metrics and coordinate loss use only these
        frames (T,) numbers in the whole video; key, path; unreadable: files passed over to get this item

    augment=True: random window, crop and mirror, a pure function of (seed, index); index + epoch * len(self) is the
    clip's draw of that epoch. cache=True keeps decoded frames in memory: for small sets and n_workers=0.
    """

    def __init__(self, dataset, root, split, n_frames=8, size=224, stride=8, frames="", augment=False, cache=False,
                 seed=0):
        self.dataset = detect(root) if dataset == "auto" else dataset
        assert self.dataset in NAMES, dataset
        self.n_frames = n_frames
        self.size = size
        self.augment = augment
        self.seed = seed
        self.cached = {} if cache else None
        self.warned = set()

        place = f"{root} ({split})"
        self.clips = list_clips(self.dataset, root, split, frames, n_frames, stride)
        self.drop_missing(place)
        self.read_tables(root, place)
        self.check_length(place)
        self.check_gaze(place)

    def drop_missing(self, place):
        paths = {clip.path for clip in self.clips}
        missing = {path for path in paths if not path.exists()}
        if not missing:
            return
        text = f"{place}: {len(missing)} of {len(paths)} videos are missing, first {min(missing)}"
        if missing == paths:
            raise FileNotFoundError(f"{text}: see python -m argaze.data check")
        warnings.warn(f"{text}; they are left out: see python -m argaze.data check", stacklevel=3)
        self.clips = [clip for clip in self.clips if clip.path not in missing]

    def read_tables(self, root, place):
        """Gaze of every video; clips of a video without a gaze file are left out."""
        self.tables = {}
        missing = {}
        for clip in self.clips:
            if clip.video in self.tables or clip.video in missing:
                continue
            try:
                self.tables[clip.video] = read_gaze(self.dataset, root, clip)
            except FileNotFoundError as error:
                missing[clip.video] = error
        if not missing:
            return
        first = next(iter(missing.values()))
        if not self.tables:
            raise first
        warnings.warn(f"{place}: {len(missing)} videos have no gaze file, so their clips are left out; {first}",
                      stacklevel=3)
        self.clips = [clip for clip in self.clips if clip.video in self.tables]

    def check_length(self, place):
        short = []
        for clip in self.clips:
            longest = max(end - first for first, end in clip.windows)
            if longest < self.n_frames * clip.stride:
                short.append(clip.key)
        if short:
            warnings.warn(f"{place}: {len(short)} of {len(self.clips)} clips are shorter than {self.n_frames} frames "
                          f"with stride {self.clips[0].stride}; they repeat their last frame. First: {short[0]}",
                          stacklevel=3)

    def check_gaze(self, place):
        untracked = UNTRACKED[self.dataset]
        for clip in self.clips:
            for first, end in clip.windows:
                if (self.tables[clip.video][first:end, 2] != untracked).any():
                    return
        raise ValueError(f"{place}: gaze is tracked in no frame of its {len(self.clips)} clips, first "
                         f"{self.clips[0].key}: do the gaze files belong to these videos?")

    def __len__(self):
        return len(self.clips)

    def rows(self, clip, frames):
        """Rows (T, 3) of frame numbers; those past the end of the table are untracked."""
        table = self.tables[clip.video]
        last = len(table) - 1
        rows = table[frames.clip(max=last)].copy()
        rows[frames > last, 2] = UNTRACKED[self.dataset]
        if self.dataset == "egoexo4d":
            rows = fill_gaps(rows)
        return rows

    def sample(self, clip, generator):
        """Frame numbers (T,) and their rows (T, 3)."""
        if generator is None:
            frames = sample_frames(self.dataset, clip.windows[0], self.n_frames, clip.stride)
            return frames, self.rows(clip, frames)

        # training on Ego4D draws again as long as gaze is lost in a frame, as published
        for _ in range(MAX_DRAWS):
            window = clip.windows[int(torch.randint(len(clip.windows), (), generator=generator))]
            share = torch.rand((), generator=generator).item()
            frames = sample_frames(self.dataset, window, self.n_frames, clip.stride, share)
            rows = self.rows(clip, frames)
            if self.dataset != "ego4d" or (rows[:, 2] != UNTRACKED["ego4d"]).all():
                break
        return frames, rows

    def images(self, clip, frames):
        if self.cached is None:
            return read_frames(clip, frames)
        key = (clip.key, *frames.tolist())
        if key not in self.cached:
            self.cached[key] = read_frames(clip, frames)
        return self.cached[key]

    def read(self, clip, draw):
        """The item of one clip; draw: number of the random window, crop and mirror."""
        generator = None
        if self.augment:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + draw)
        frames, rows = self.sample(clip, generator)
        images = self.images(clip, frames)
        kind = torch.from_numpy(rows[:, 2])
        points = torch.from_numpy(rows[:, :2])
        tracked = kind != UNTRACKED[self.dataset]

        # EgoExo4D: the whole picture, made square, never augmented
        if self.dataset == "egoexo4d":
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
    batch["unreadable"] = sum(batch["unreadable"], [])
    return batch


# ----------------------------------------------------------------------------------------------------------------------
# commands: check, labels, frames


@dataclass
class Config:
    root: str = ""           # folder of one of the three sets
    dataset: Literal["auto", "egtea", "ego4d", "egoexo4d"] = "auto"  # auto: by what lies in root
    splits: str = ""         # separated by commas; none: all that the set has
    frames: str = ""         # frames: folder to write pictures to; check: look for them there in place of the videos
    n_frames: int = 8        # of an item
    stride: int = 8          # frames from one to the next
    side: int | None = None  # frames: shorter side of the pictures in pixels; none: as they are
    n_workers: int = 4       # frames: threads

    def check(self):
        configurator.check_at_least(self, n_frames=1, stride=1, side=16, n_workers=1)


def check(cfg):
    """Print what is there and what is missing; returns whether something is."""
    print(f"{NAMES[cfg.dataset]} in {cfg.root}")
    complete = [check_split(cfg, split) for split in cfg.splits.split(",")]

    # the commonest accident with Ego4D's downloads
    for path in sorted(Path(cfg.root, "gaze").glob("*.mp4")):
        if is_text(path):
            print(f"  {path} is a csv file saved as .mp4: rename it to {path.with_suffix('.csv').name}")
            complete.append(False)
    print("complete" if all(complete) else "incomplete: the README of argaze says where each file comes from")
    return not all(complete)


def check_split(cfg, split):
    def report(name, good, text):
        state = "ok" if good else "PROBLEM"
        print(f"  {split:<20} {name:<8} {state:<8} {text}")
        return good

    # 1. the list
    try:
        clips = list_clips(cfg.dataset, cfg.root, split, cfg.frames, cfg.n_frames, cfg.stride)
    except (OSError, ValueError) as error:
        return report("list", False, error)
    by_video = {clip.video: clip for clip in clips}
    report("list", True, f"{len(clips):,} clips of {len(by_video):,} videos, such as {clips[0].key}")

    # 2. gaze of every video
    kinds = []
    errors = []
    for clip in tqdm(by_video.values(), disable=len(by_video) < 50, leave=False):
        try:
            kinds.append(read_gaze(cfg.dataset, cfg.root, clip)[:, 2])
        except (OSError, ValueError) as error:
            errors.append(str(error))
    text = f"{len(kinds):,} of {len(by_video):,} videos"
    if kinds:
        kind = np.concatenate(kinds)
        text += (f"; {(kind == FIXATION[cfg.dataset]).mean():.1%} of their frames count, "
                 f"{(kind == UNTRACKED[cfg.dataset]).mean():.1%} are untracked")
    good = report("gaze", not errors, "; ".join([text, *errors[:3]]))

    # 3. videos, or the pictures that evaluation needs
    missing = []
    for clip in clips:
        there = clip.path.exists()
        if there and cfg.frames:
            frames = sample_frames(cfg.dataset, clip.windows[0], cfg.n_frames, clip.stride)
            there = picture_names(str(clip.path)).keys() >= set(frames.tolist())
        if not there:
            missing.append(str(clip.path))
    text = f"{len(clips) - len(missing):,} of {len(clips):,} clips"
    if missing:
        text += f", the first that is missing or lacks pictures: {missing[0]}"
    good = report("pictures" if cfg.frames else "videos", not missing, text) and good
    if len(missing) == len(clips) or errors:
        return False

    # 4. one item, from file to tensor
    try:
        item = GazeClips(cfg.dataset, cfg.root, split, cfg.n_frames, 224, cfg.stride, cfg.frames)[0]
    except (OSError, ValueError, VideoError) as error:
        return report("example", False, error)
    x, y = item["points"][0].tolist()
    text = (f"{item['key']}: frames {item['frames'].tolist()}, {int(item['tracked'].sum())} of them tracked, the first "
            f"gaze at ({x:.3f}, {y:.3f})")
    return report("example", not item["unreadable"], text) and good


def write_labels(cfg):
    """Write <video>_frame_label.csv, a row per frame, from the raw gaze files; for Ego4D also the list of clips."""
    root = Path(cfg.root)
    folder = root / "gaze_frame_label"
    names = []
    if cfg.dataset == "ego4d":
        files = [path for path in sorted((root / "gaze").glob("*.csv")) if path.name != "manifest.csv"]
        if not files:
            raise FileNotFoundError(f"{root / 'gaze'} holds no <uid>.csv: `ego4d --datasets gaze` downloads them; if "
                                    "they are called .mp4, rename them")
        intervals = untracked_intervals(root / "ego4d_gaze_untracked.csv")
        for path in tqdm(files):
            n_frames = count_frames(root / "full_scale.gaze" / f"{path.stem}.mp4")
            write_table(folder / f"{path.stem}_frame_label.csv", label_ego4d(path, n_frames))
            if not path.stem.startswith(ODD_VIDEOS):
                clips = cut_ego4d(path.stem, n_frames / EGO4D_FPS, intervals[path.stem])
                names += [f"{path.stem}/{name}" for name in clips]
        write_whole(root / "all_ego4d_gaze.csv", "\n".join(names) + "\n")
        print(f"{root / 'all_ego4d_gaze.csv'}: {len(names)} clips without an untracked interval")
    else:
        clips = []
        for split in cfg.splits.split(","):
            clips += list_clips(cfg.dataset, root, split, "", cfg.n_frames, cfg.stride)
        files = {clip.video: clip for clip in clips}
        for video, clip in tqdm(files.items()):
            write_table(folder / f"{video}_frame_label.csv", read_gaze(cfg.dataset, root, clip))
    print(f"{folder}: frame labels of {len(files)} videos")


def write_table(path, table):
    lines = ["frame,x,y,gaze_type"]
    for frame, (x, y, kind) in enumerate(table):
        lines.append(f"{frame},{x:.6g},{y:.6g},{int(kind)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "\n".join(lines) + "\n")


def frames_to_write(cfg):
    """{(video file, frame it begins with, folder): frame numbers} of all clips of all splits, each frame once."""
    jobs = {}
    claimed = defaultdict(set)
    for split in cfg.splits.split(","):
        for clip in list_clips(cfg.dataset, cfg.root, split, "", cfg.n_frames, cfg.stride):
            path = clip.path
            offset = clip.offset
            if cfg.dataset == "ego4d" and not path.is_file():  # not cut into clips
                path = Path(cfg.root, "full_scale.gaze", f"{clip.video}.mp4")
                offset = 0
            folder = picture_folder(cfg.dataset, cfg.frames, clip, Path(cfg.root))

            # EgoExo4D is always sampled at the same frames, the others in training anywhere
            step = clip.stride if cfg.dataset == "egoexo4d" else 1
            numbers = set()
            for first, end in clip.windows:
                numbers.update(range(first, end, step))
            numbers -= claimed[folder]
            claimed[folder] |= numbers
            jobs.setdefault((path, offset, folder), set()).update(numbers)
    return jobs


def write_frames(cfg):
    """Write the pictures of all clips into cfg.frames. Those that exist are kept, so it can go on where it stopped."""
    if not cfg.frames:
        raise ValueError("--frames= is missing: the folder to write the pictures to")
    take_output(cfg.frames)
    jobs = frames_to_write(cfg)

    def write(job):
        return write_pictures(*job, jobs[job], cfg.side)

    with ThreadPoolExecutor(cfg.n_workers) as pool:  # decoding and encoding release the interpreter's lock
        results = list(tqdm(pool.map(write, jobs), total=len(jobs), unit="video"))
    picture_names.cache_clear()
    errors = [error for error in results if error]
    print(f"{cfg.frames}: pictures of {len(jobs) - len(errors)} of {len(jobs)} videos")
    if errors:
        raise VideoError(f"{len(errors)} videos gave no or not all pictures: {'; '.join(errors[:5])}")


def write_pictures(path, offset, folder, numbers, side):
    """Write the pictures of one video file, <folder>/%06d.jpg; returns what went wrong, or None."""
    missing = numbers - picture_names(str(folder)).keys()
    if not missing:
        return None
    if not path.is_file():
        return f"{path} is missing"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {number - offset for number in missing}
    n_written = 0
    try:
        for i, image in decode(path, wanted):
            image = Image.fromarray(image)
            if side:
                scale = side / min(image.size)
                width = round(image.width * scale)
                height = round(image.height * scale)
                image = image.resize((width, height), Image.BICUBIC)
            name = f"{offset + i:06d}.jpg"
            image.save(folder / f".{name}", quality=95)
            os.replace(folder / f".{name}", folder / name)
            n_written += 1
    except VideoError as error:
        return str(error)
    if n_written < len(wanted) - MAX_MISSING:
        return f"{path} ends before its frame {max(wanted)}: {n_written} of {len(wanted)} pictures"
    return None


COMMANDS = {"check": check, "labels": write_labels, "frames": write_frames}


def main():
    command = configurator.command(COMMANDS, __doc__)
    cfg = configurator.parse(Config, sys.argv[2:])
    if cfg.dataset == "auto":
        cfg.dataset = detect(cfg.root)
    cfg.splits = cfg.splits or SPLITS[cfg.dataset]
    raise SystemExit(COMMANDS[command](cfg))


if __name__ == "__main__":
    run.launch(main, VideoError)
