"""Generate egocentric toy clips whose gaze can be known only by remembering.

    python -m argaze.make_data                                     # 1,000 + 200 clips in data/argaze_toy, half a minute
    python -m argaze.make_data --out=data/tiny --n_train=50 --n_val=10 --n_objects=3

A camera moves over a table with several equal objects. A hand touches one of them and leaves again; the gaze stays on
that object, wherever the camera goes. In some clips the hand comes back and touches another one. After the hand has
left, a single frame tells nothing of where the wearer looks: the evidence lies in the past.

Writes the layout of Ego4D, so that the toy is read by the code that reads the real data:
<out>/clips.gaze/<split>/<split>_t<a>_t<a + 1>.mp4, <out>/gaze_frame_label/<split>_frame_label.csv and the windows
<out>/<split>_ego4d_gaze_stride8.csv. The same settings give the same files; raising n_train keeps the clips that exist.

Dimension key: T frames, K objects, S side of a frame, N side of the table in pixels.
"""
if not __package__:
    raise SystemExit("run it from the root of the repository as a module: python -m argaze.make_data")

import multiprocessing
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
from lib.checkpoint import take_data_folder
from lib.run import launch
from lib.text import write_whole
from lib.video_out import VideoWriter

VERSION = 2  # of the drawings; clips of another one are not mixed with these
OBJECT = np.array([205.0, 45.0, 40.0])
SKIN = np.array([245.0, 205.0, 165.0])
SLEEVE = np.array([35.0, 50.0, 120.0])


@dataclass
class Config:
    out: str = "data/argaze_toy"  # folder to write to
    n_train: int = 1000           # training clips
    n_val: int = 200              # clips of the split "test"
    n_frames: int = 6             # frames per clip
    size: int = 48                # side of a frame in pixels, even
    n_objects: int = 4            # equal objects; a guess without memory is right once in so many
    speed: float = 1.5            # most pixels that the camera moves per frame
    second_touch: float = 0.4     # share of clips in which the hand comes back to another object
    untracked: float = 0.03       # share of frames in which the eye tracker fails
    seed: int = 0                 # same seed, same clips
    n_workers: int = 2            # processes

    def check(self):
        configurator.check_at_least(self, n_train=1, n_val=1, n_frames=2, size=32, n_objects=2, speed=0, n_workers=1)
        configurator.check_fraction(self, "second_touch", "untracked")
        if self.size % 2:
            raise ValueError(f"size={self.size} must be even: the video format halves its colour planes")
        if self.n_frames > EGO4D_FPS:
            raise ValueError(f"n_frames={self.n_frames}: a clip lasts a second at most, {EGO4D_FPS} frames")
        if self.speed * self.n_frames > self.size / 2:
            raise ValueError(f"speed={self.speed}: in {self.n_frames} frames the camera would leave the objects behind")


# ----------------------------------------------------------------------------------------------------------------------
# what happens in a clip


def camera_path(rng, cfg):
    """(T, 2) x, y of the frame's corner on the table: a smooth walk."""
    turns = rng.normal(0, 0.5, cfg.n_frames)
    start = rng.uniform(0, 2 * np.pi)
    speed = cfg.speed * rng.uniform(0.3, 1)
    heading = start + turns.cumsum()
    steps = np.stack([np.cos(heading), np.sin(heading)], axis=1)
    path = speed * steps.cumsum(axis=0)
    return path - path.min(axis=0)


def place_objects(rng, cfg, path, radius):
    """(K, 2) x, y on the table: apart from each other and inside the picture in every frame."""
    low = path.max(axis=0) + radius + 1
    high = cfg.size - radius - 1
    places = np.empty((0, 2))
    distance = 3.5 * radius

    # a place too near to another is drawn again; the least distance shrinks until there is room for all
    while len(places) < cfg.n_objects:
        place = rng.uniform(low, high)
        gaps = np.linalg.norm(places - place, axis=1)
        if (gaps > distance).all():
            places = np.vstack([places, place])
        distance *= 0.99
    return places


def touches(rng, cfg):
    """(T,) object gazed at in each frame, and (T,) bool: the hand is in the picture and touches it."""
    first, second = rng.permutation(cfg.n_objects)[:2]
    target = np.full(cfg.n_frames, first)
    touched = np.zeros(cfg.n_frames, bool)
    touched[:rng.integers(1, 3)] = True

    # the hand comes back for another object, after two frames without it
    if cfg.n_frames > 4 and rng.random() < cfg.second_touch:
        back = rng.integers(4, cfg.n_frames)
        target[back:] = second
        touched[back:back + rng.integers(1, 3)] = True
    return target, touched


# ----------------------------------------------------------------------------------------------------------------------
# drawing


def table_top(rng, side):
    """(N, N, 3) float: smooth blotches of low contrast, which tell nothing of the objects."""
    noise = torch.from_numpy(rng.standard_normal((1, 3, 6, 6))).float()
    blotches = F.interpolate(noise, size=(side, side), mode="bicubic", align_corners=False)
    blotches = blotches[0].permute(1, 2, 0).numpy()
    brightness = rng.uniform(70, 110)
    color = brightness + rng.normal(0, 8, 3)
    return color + 8 * blotches


def disc(image, center, radius, color):
    """Paint a disc with a soft edge into image (S, S, 3), in place; center (x, y) in pixels."""
    size = len(image)
    low = np.floor(center - radius).astype(int).clip(0)
    high = np.ceil(center + radius + 1).astype(int).clip(0, size)
    rows = slice(low[1], high[1])
    columns = slice(low[0], high[0])
    part = image[rows, columns]

    middles = np.arange(size) + 0.5
    x = middles[columns] - center[0]
    y = middles[rows] - center[1]
    distance = np.hypot(x, y[:, None])
    cover = (radius + 0.5 - distance).clip(0, 1)
    part += cover[..., None] * (color - part)


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
    table = table_top(rng, cfg.size + int(path.max()) + 2)
    color = OBJECT + rng.normal(0, 12, 3)
    shoulder = np.array([rng.uniform(0.2, 0.8), 1.2]) * cfg.size

    video = np.empty((cfg.n_frames, cfg.size, cfg.size, 3), np.uint8)
    for t, corner in enumerate(path):
        x, y = np.rint(corner).astype(int)
        view = table[y:y + cfg.size, x:x + cfg.size]
        image = view.copy()
        if touched[t]:
            hand(image, places[target[t]] - corner, shoulder, radius)

        # the hand lies behind the objects: they are all in sight and equal, whatever it does
        for place in places:
            disc(image, place - corner, radius, color)
        image += rng.normal(0, 2, image.shape)
        video[t] = image.clip(0, 255)

    # the eye trembles a little, and jumps where it turns to another object
    points = places[target] - path
    points += rng.normal(0, 0.1 * radius, points.shape)
    points = (points / cfg.size).clip(0, 1)
    kind = np.zeros(cfg.n_frames, int)
    kind[1:] = target[1:] != target[:-1]

    # sometimes the tracker fails
    lost = rng.random(cfg.n_frames) < cfg.untracked
    kind[lost] = 3
    points[lost] = 0
    return video, points, kind


# ----------------------------------------------------------------------------------------------------------------------
# files


def make_clip(job):
    """Write one clip; returns its lines of the label file: frame of the whole video, x, y, type."""
    cfg, split, number, path = job
    rng = np.random.default_rng([cfg.seed, split == "train", number])
    video, points, kind = render(rng, cfg)
    if not path.exists():
        with VideoWriter(path, EGO4D_FPS, crf=12, threads=1) as film:
            for picture in video:
                film.write(picture)

    lines = []
    for t, (x, y) in enumerate(points):
        frame = number * EGO4D_FPS + t
        lines.append(f"{frame},{x:.6f},{y:.6f},{kind[t]}")
    return lines


def make_split(cfg, split, n_clips):
    root = Path(cfg.out)
    windows = ["clip_path,start_frame,end_frame"]
    jobs = []
    for number in range(n_clips):
        name = f"{split}/{split}_t{number}_t{number + 1}.mp4"
        first = number * EGO4D_FPS
        windows.append(f"{name},{first},{first + cfg.n_frames}")
        jobs.append((cfg, split, number, root / "clips.gaze" / name))
    write_whole(root / f"{split}_ego4d_gaze_stride8.csv", "\n".join(windows) + "\n")

    if cfg.n_workers > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(cfg.n_workers, context, torch.set_num_threads, (1,)) as pool:
            clips = list(tqdm(pool.map(make_clip, jobs, chunksize=16), total=n_clips, desc=split))
    else:
        clips = [make_clip(job) for job in tqdm(jobs, desc=split)]

    # gaze of all clips is that of one long video
    labels = ["frame,x,y,gaze_type"]
    for lines in clips:
        labels += lines
    write_whole(root / "gaze_frame_label" / f"{split}_frame_label.csv", "\n".join(labels) + "\n")


def make(cfg):
    settings = {"version": VERSION} | asdict(cfg)
    for key in ("out", "n_train", "n_val", "n_workers"):
        del settings[key]
    take_data_folder(cfg.out, settings)
    make_split(cfg, "train", cfg.n_train)
    make_split(cfg, "test", cfg.n_val)
    print(f"{cfg.out}: {cfg.n_train} training and {cfg.n_val} test clips, {cfg.n_frames} frames each")


def main():
    make(configurator.parse(Config, sys.argv[1:]))


if __name__ == "__main__":
    launch(main)
