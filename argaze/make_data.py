"""Generate egocentric toy clips whose gaze can be known only by remembering.

    python -m argaze.make_data                                     # 2,000 + 200 clips in data/argaze_toy, half a minute
    python -m argaze.make_data --out=data/tiny --n_train=50 --n_val=10 --n_objects=3

A camera moves over a table with several equal objects. A hand touches one of them and leaves again; the gaze stays on
that object, wherever the camera goes. In some clips the hand comes back and touches another one. After the hand has
left, a single frame tells nothing of where the wearer looks: the evidence lies in the past.

Writes the layout of Ego4D, so that the toy is read by the code that reads the real data:
<out>/clips.gaze/<split>/<split>_t<a>_t<a + 1>.mp4, <out>/gaze_frame_label/<split>_frame_label.csv and the windows
<out>/<split>_ego4d_gaze_stride8.csv. The same settings give the same files; raising n_train keeps the clips that exist.

Dimension key: T frames, K objects, S side of a frame, N side of the table in pixels.
"""
import csv
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from argaze.formats import EGO4D_FPS
from lib import configurator
from lib.video_out import VideoWriter

VERSION = 2  # of the drawings; clips of another one are not mixed with these
OBJECT = np.array([205.0, 45.0, 40.0])
SKIN = np.array([245.0, 205.0, 165.0])
SLEEVE = np.array([35.0, 50.0, 120.0])


@dataclass
class Config:
    out: str = "data/argaze_toy"  # folder to write to
    n_train: int = 2000           # training clips
    n_val: int = 200              # clips of the split "test"
    n_frames: int = 8             # frames per clip
    size: int = 64                # side of a frame in pixels, even
    n_objects: int = 4            # equal objects; a guess without memory is right once in so many
    speed: float = 1.5            # most pixels that the camera moves per frame and axis
    second_touch: float = 0.4     # share of clips in which the hand comes back to another object
    untracked: float = 0.03       # share of frames in which the eye tracker fails
    seed: int = 0                 # same seed, same clips
    n_workers: int = 2            # processes

    def check(self):
        for key, least in dict(n_train=1, n_val=1, n_frames=2, size=32, n_objects=2, speed=0, n_workers=0).items():
            if getattr(self, key) < least:
                raise ValueError(f"{key}={getattr(self, key)} must be at least {least}")

        if self.size % 2:
            raise ValueError(f"size={self.size} must be even: the video format halves its colour planes")
        if self.n_frames > EGO4D_FPS:
            raise ValueError(f"n_frames={self.n_frames}: a clip lasts a second at most, {EGO4D_FPS} frames")
        for key in ("second_touch", "untracked"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}={getattr(self, key)} must lie between 0 and 1")


# ----------------------------------------------------------------------------------------------------------------------
# one clip

def camera_path(rng, cfg):
    """(T, 2) x, y of the frame's corner on the table: a smooth walk with at most `speed` pixels per frame and axis."""
    turn = np.cumsum(rng.normal(0, 0.5, cfg.n_frames)) + rng.uniform(0, 2 * np.pi)
    steps = cfg.speed * rng.uniform(0.3, 1) * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    path = np.cumsum(steps, axis=0)
    return path - path.min(axis=0)


def place_objects(rng, cfg, path, radius):
    """(K, 2) x, y on the table: apart from each other and inside the picture in every frame."""
    low = path.max(axis=0) + radius + 1
    high = path.min(axis=0) + cfg.size - radius - 1

    # where a place is too near to another, draw again; the least distance shrinks until there is room for all
    distance = 3.5 * radius
    places = []
    while len(places) < cfg.n_objects:
        place = rng.uniform(low, high)
        if all(np.hypot(*(place - other)) > distance for other in places):
            places.append(place)
        distance *= 0.99
    return np.array(places)


def touches(rng, cfg):
    """(T,) object gazed at in each frame, and (T,) bool: the hand is in the picture and touches it."""
    first, second = rng.permutation(cfg.n_objects)[:2]
    target = np.full(cfg.n_frames, first)
    touched = np.zeros(cfg.n_frames, bool)
    touched[:rng.integers(1, 3)] = True

    # the hand comes back for another object, after two frames without it
    if rng.random() < cfg.second_touch and cfg.n_frames > 4:
        back = rng.integers(4, cfg.n_frames)
        target[back:] = second
        touched[back:back + rng.integers(1, 3)] = True
    return target, touched


def table_top(rng, side):
    """(N, N, 3) float: a table of smooth, low contrast blotches that tell nothing of the objects."""
    noise = torch.from_numpy(rng.standard_normal((1, 3, 6, 6)).astype(np.float32))
    blotches = F.interpolate(noise, size=(side, side), mode="bicubic", align_corners=False)[0]
    return rng.uniform(70, 110) + rng.normal(0, 8, 3) + 8 * blotches.permute(1, 2, 0).numpy()


def disc(image, center, radius, color):
    """Paint a disc with a soft edge into image (S, S, 3), in place; center (x, y) in pixels."""
    left, top = np.floor(center - radius).astype(int).clip(0)
    right, bottom = np.ceil(center + radius + 1).astype(int).clip(0)
    part = image[top:bottom, left:right]

    y, x = np.mgrid[top:top + part.shape[0], left:left + part.shape[1]]
    distance = np.hypot(x + 0.5 - center[0], y + 0.5 - center[1])
    cover = np.clip(radius + 0.5 - distance, 0, 1)[..., None]
    part += cover * (color - part)


def hand(image, place, shoulder, radius):
    """A sleeve from below the picture to a hand around the object at `place`."""
    for share in np.linspace(0, 1, 24):
        disc(image, place + share * (shoulder - place), 0.8 * radius, SLEEVE)
    disc(image, place, 2 * radius, SKIN)


def render(rng, cfg):
    """One clip: video (T, S, S, 3) uint8, points (T, 2) float gaze in [0, 1] as x, y, gaze type (T,) as in Ego4D."""
    radius = cfg.size * rng.uniform(0.06, 0.08)
    path = camera_path(rng, cfg)
    places = place_objects(rng, cfg, path, radius)
    target, touched = touches(rng, cfg)
    table = table_top(rng, cfg.size + int(np.ceil(path.max())) + 1)
    color = OBJECT + rng.normal(0, 12, 3)
    shoulder = np.array([cfg.size * rng.uniform(0.2, 0.8), cfg.size * 1.2])

    frames = []
    for t, corner in enumerate(path):
        x, y = np.rint(corner).astype(int)
        image = table[y:y + cfg.size, x:x + cfg.size].copy()
        if touched[t]:
            hand(image, places[target[t]] - corner, shoulder, radius)

        # the hand lies behind the objects: they are all in sight and equal, whatever it does
        for place in places:
            disc(image, place - corner, radius, color)
        image += rng.normal(0, 2, image.shape)
        frames.append(image.clip(0, 255).astype(np.uint8))

    # the eye trembles a little; where it jumps to another object it makes a saccade; sometimes the tracker fails
    points = (places[target] - path + rng.normal(0, 0.1 * radius, path.shape)) / cfg.size
    kind = np.zeros(cfg.n_frames, int)
    kind[1:][target[1:] != target[:-1]] = 1
    kind[rng.random(cfg.n_frames) < cfg.untracked] = 3
    points[kind == 3] = 0
    return np.stack(frames), points.clip(0, 1), kind


# ----------------------------------------------------------------------------------------------------------------------
# files

def make_clip(job):
    """Write one clip; returns its rows of the label file (frame of the whole video, x, y, type)."""
    cfg, split, number, path = job
    rng = np.random.default_rng([cfg.seed, split == "train", number])
    video, points, kind = render(rng, cfg)
    if not path.exists():
        with VideoWriter(path, EGO4D_FPS, crf=12, threads=1) as film:
            for picture in video:
                film.write(picture)

    first = number * EGO4D_FPS
    return [(first + i, round(x, 6), round(y, 6), k)
            for i, ((x, y), k) in enumerate(zip(points.tolist(), kind.tolist(), strict=True))]


def claim_folder(cfg):
    """Note the settings in <out>/make_data.json. Another run's files are kept, so refuse to mix two sets."""
    note = {"version": VERSION} | asdict(cfg)
    for key in ("out", "n_train", "n_val", "n_workers"):
        del note[key]
    path = Path(cfg.out, "make_data.json")
    if path.exists() and json.loads(path.read_text()) != note:
        raise ValueError(f"{cfg.out} holds clips made with other settings ({path}): delete it or choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(note, indent=1))


def write_rows(path, rows):
    """Write a csv file under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    with open(unfinished, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    os.replace(unfinished, path)


def make(cfg):
    claim_folder(cfg)
    root = Path(cfg.out)
    context = multiprocessing.get_context("spawn")
    for split, n_clips in (("train", cfg.n_train), ("test", cfg.n_val)):
        names = [f"{split}/{split}_t{number}_t{number + 1}.mp4" for number in range(n_clips)]
        jobs = [(cfg, split, number, root / "clips.gaze" / name) for number, name in enumerate(names)]

        if cfg.n_workers > 1:
            with ProcessPoolExecutor(cfg.n_workers, context, torch.set_num_threads, (1,)) as pool:
                rows = list(tqdm(pool.map(make_clip, jobs, chunksize=16), total=n_clips, desc=split))
        else:
            rows = [make_clip(job) for job in tqdm(jobs, desc=split)]

        header = [("frame", "x", "y", "gaze_type")]
        write_rows(root / "gaze_frame_label" / f"{split}_frame_label.csv", header + sum(rows, []))
        windows = [(name, i * EGO4D_FPS, i * EGO4D_FPS + cfg.n_frames) for i, name in enumerate(names)]
        write_rows(root / f"{split}_ego4d_gaze_stride8.csv", [("clip_path", "start_frame", "end_frame"), *windows])
    print(f"{root}: {cfg.n_train} training and {cfg.n_val} test clips, {cfg.n_frames} frames each")


if __name__ == "__main__":
    make(configurator.parse(Config, sys.argv[1:]))
