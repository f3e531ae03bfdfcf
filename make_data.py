"""
Make training videos: a toy set to learn with in minutes, short clips from long videos, slides over large images.

    python make_data.py toy  --out=data/toy                              # 2,000 + 200 generated clips, ten seconds
    python make_data.py cut  --src=/videos,/more/videos --out=data/mine  # windows of your own long videos
    python make_data.py scan --src=/photos --out=data/scan               # windows sliding over large still images
    python make_data.py cut -h                                           # every key with its default

Each writes <out>/train/*.mp4 and <out>/val/*.mp4, which is what the training scripts take as data folder. Files that
exist are kept, so an interrupted run goes on where it stopped; the same seed gives the same files.
"""

import math
import multiprocessing
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import VIDEO_SUFFIXES, VideoError, count_frames, decode
from lib import configurator
from lib.checkpoint import take_data_folder
from lib.run import launch
from lib.video_out import VideoWriter

# How the background of a toy clip changes. Where it stands still, a new patch is worth a gaze only where something
# moved, which is what the model has to find out.
KINDS = {"fixed": 0.4, "drifting": 0.45, "cut": 0.15}
P_APPEAR = 0.2  # share of objects that appear or vanish in the middle of the clip
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass
class ToyConfig:
    out: str = "data/toy"  # folder to write to
    n_train: int = 2000    # training clips
    n_val: int = 200       # validation clips
    n_frames: int = 4      # frames per clip
    height: int = 96       # pixels, even
    width: int = 128       # pixels, even
    seed: int = 0          # same seed, same clips; raising n_train adds clips and leaves the others as they are
    n_workers: int = 2     # processes

    def check(self):  # configurator.parse calls it
        configurator.check_at_least(self, n_train=0, n_val=0, n_frames=1, height=2, width=2, seed=0, n_workers=0)
        check_even(self, "height", "width")


@dataclass
class CutConfig:
    src: str = ""              # folder of videos, searched with its subfolders; several joined by commas
    out: str = "data/mine"     # folder to write to
    n_frames: int = 4          # frames per window
    stride: int = 2            # take every so many-th frame of the source
    size: int = 128            # shortest side in pixels, even; the long side follows, rounded down to even
    hop: int = 0               # source frames from one window's start to the next; 0 = windows side by side
    max_windows: int = 200     # per video, spread evenly over it
    zoom: float = 1.0          # below 1: a window shows a random square, its side from this share of the picture's to 1
    val_videos: int = 2        # source videos held out for validation; no video is in both
    val_fraction: float = 0.0  # if above 0: hold out this share of the videos in place of val_videos
    val_names: str = ""        # if given: hold out these, file names without suffix, joined by commas
    seed: int = 0              # which videos are held out, and the squares
    n_workers: int = 2         # processes

    def check(self):
        configurator.check_at_least(self, n_frames=1, stride=1, size=2, hop=0, max_windows=1, val_videos=0, seed=0,
                                    n_workers=0)
        configurator.check_fraction(self, "val_fraction")
        configurator.check_share(self, "zoom")
        check_even(self, "size")


@dataclass
class ScanConfig:
    src: str = ""               # folder of png, jpg or webp images, with its subfolders; several joined by commas
    out: str = "data/scan"      # folder to write to
    n_frames: int = 4           # frames per clip
    window: int = 224           # clip height and width in pixels, even; smaller images are enlarged to it
    step: float = 16.0          # pixels from frame to frame, in a random direction; bounces off the image's edges
    n_per_image: int = 4        # clips per image
    val_fraction: float = 0.05  # share of the images held out for validation, at least one
    seed: int = 0               # held-out images, starts and directions
    n_workers: int = 2          # processes

    def check(self):
        configurator.check_at_least(self, n_frames=1, window=2, step=0, n_per_image=1, seed=0, n_workers=0)
        check_even(self, "window")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--val_fraction={self.val_fraction}: must lie between 0 and 1")


def check_even(cfg, *keys):
    for key in keys:
        value = getattr(cfg, key)
        if value % 2:
            raise ValueError(f"--{key}={value}: must be even, the video format halves its colour planes")


# ----------------------------------------------------------------------------------------------------------------------
# toy clips

def smooth(rng, h, w, cells):
    """(h, w, 3) float: random colours of spread 1 around 0 on a grid of cells x cells, and smooth between them."""
    grid = rng.standard_normal((1, 3, cells, cells), dtype=np.float32)
    colour = F.interpolate(torch.from_numpy(grid), size=(h, w), mode="bicubic")
    return colour[0].permute(1, 2, 0).numpy()


def pattern(rng, h, w, period):
    """(h, w, 3) float: stripes, a checkerboard or gravel of a dark and a light colour, `period` pixels wide each."""
    y, x = np.mgrid[:h, :w]
    stripe = max(2, round(period * rng.uniform(0.75, 1.25)))
    kind = rng.choice(["stripes", "checker", "gravel"])
    if kind == "stripes":
        angle = rng.uniform(0, math.pi)
        shade = (y * math.sin(angle) + x * math.cos(angle)) // stripe % 2
    elif kind == "checker":
        shade = (y // stripe + x // stripe) % 2
    else:  # cells of random shades between the two colours
        cells = rng.random((h // stripe + 1, w // stripe + 1))
        shade = cells[y // stripe, x // stripe]
    dark = rng.uniform(0, 100, 3)
    light = rng.uniform(150, 255, 3)
    return dark + shade[..., None] * (light - dark)


def bounce(start, speed, n, room):
    """(n,) int positions in 0..room of something that moves at constant speed and turns back at both ends."""
    if room <= 0:
        return np.zeros(n, dtype=int)
    position = np.mod(start + speed * np.arange(n), 2 * room)
    position = np.where(position > room, 2 * room - position, position)
    return np.rint(position).astype(int)


def shape_mask(rng, h, w):
    """(h, w) bool: an ellipse, a rectangle or a rotated rectangle that fills the box."""
    y, x = np.mgrid[-1:1:h * 1j, -1:1:w * 1j]
    shape = rng.choice(["ellipse", "rectangle", "rotated"])
    if shape == "ellipse":
        return y ** 2 + x ** 2 <= 1
    if shape == "rectangle":
        return np.ones((h, w), bool)

    turn = rng.uniform(0.3, 1.3)
    tall = rng.uniform(0.3, 0.6)
    wide = rng.uniform(0.6, 0.8)
    u = y * math.sin(turn) + x * math.cos(turn)
    v = y * math.cos(turn) - x * math.sin(turn)
    return (abs(u) < wide) & (abs(v) < tall)


def sprite(rng, cfg, n_frames, large):
    """An object: picture (h, w, 3), mask (h, w) bool, corner positions ys, xs (n_frames,), visible (n_frames,) bool.
    Large ones have soft blotches, which patches of a middle scale show; small ones a pattern, which takes fine ones."""
    share = rng.uniform(0.4, 0.7) if large else rng.uniform(0.16, 0.26)
    h = max(2, round(cfg.height * share))
    w = min(max(2, round(h * rng.uniform(0.7, 1.4))), cfg.width)
    if large:
        picture = rng.uniform(40, 215, 3) + 35 * smooth(rng, h, w, cells=3)
    else:
        picture = pattern(rng, h, w, period=cfg.height / 12)

    angle = rng.uniform(0, 2 * math.pi)
    moves = rng.random() < 0.7
    speed = cfg.height * rng.uniform(0.04, 0.15) * moves
    room_y = cfg.height - h
    room_x = cfg.width - w
    ys = bounce(rng.uniform(0, room_y), speed * math.sin(angle), n_frames, room_y)
    xs = bounce(rng.uniform(0, room_x), speed * math.cos(angle), n_frames, room_x)

    visible = np.ones(n_frames, bool)
    if n_frames > 1 and rng.random() < P_APPEAR:
        visible[:rng.integers(1, n_frames)] = False  # appears ...
        if rng.random() < 0.5:
            visible = ~visible  # ... or vanishes
    return picture.clip(0, 255), shape_mask(rng, h, w), ys, xs, visible


def render_shot(rng, cfg, n_frames, kind):
    """(n_frames, height, width, 3) uint8 without a cut."""
    # The background is so smooth that a patch of the coarsest scale shows all of it, yet has so many colours that a
    # fine patch tells little beyond itself.
    mean = rng.uniform(70, 185, 3)
    colours = 50 * smooth(rng, cfg.height, cfg.width, cells=3)
    frames = np.empty((n_frames, cfg.height, cfg.width, 3), np.uint8)
    for t in range(n_frames):
        frames[t] = (mean + colours).clip(0, 255)
        if kind == "drifting":
            colours = 0.3 * colours + 45 * smooth(rng, cfg.height, cfg.width, cells=3)

    # large objects, then small ones in front of them
    n_large = rng.integers(1, 3)
    n_small = rng.integers(0, 3)
    for i in range(n_large + n_small):
        picture, mask, ys, xs, visible = sprite(rng, cfg, n_frames, large=i < n_large)
        h, w = mask.shape
        for t in np.flatnonzero(visible):
            frames[t, ys[t]:ys[t] + h, xs[t]:xs[t] + w][mask] = picture[mask]
    return frames


def render_clip(rng, cfg):
    """(T, H, W, 3) uint8: one of KINDS at random."""
    kind = rng.choice(list(KINDS), p=list(KINDS.values()))
    if kind != "cut" or cfg.n_frames < 2:
        return render_shot(rng, cfg, cfg.n_frames, kind)
    t = rng.integers(1, cfg.n_frames)
    before = render_shot(rng, cfg, t, "fixed")
    after = render_shot(rng, cfg, cfg.n_frames - t, "fixed")
    return np.concatenate([before, after])


def write_toy(job):
    cfg, split, i, path = job
    rng = np.random.default_rng([cfg.seed, split, i])  # the clip depends on nothing else
    write_video(path, render_clip(rng, cfg))


def toy(cfg):
    claim_folder(cfg, free=("n_train", "n_val"))
    jobs = []
    for split, (name, n) in enumerate([("train", cfg.n_train), ("val", cfg.n_val)]):
        for i in range(n):
            path = Path(cfg.out, name, f"{i:06d}.mp4")
            if not path.exists():
                jobs.append((cfg, split, i, path))
    run(write_toy, jobs, cfg.n_workers, chunksize=16)
    print(f"{cfg.out}: {cfg.n_train} training and {cfg.n_val} validation clips, {len(jobs)} of them new")


# ----------------------------------------------------------------------------------------------------------------------
# windows of long videos, slides over images

def cut_video(job):
    """Cut one source: (windows written or already there, error or None)."""
    cfg, path, folder, name = job
    try:
        # where windows start; a short video is one short window
        span = (cfg.n_frames - 1) * cfg.stride + 1
        hop = cfg.hop or cfg.n_frames * cfg.stride
        last_start = max(count_frames(path) - span, 0)
        starts = np.arange(0, last_start + 1, hop)
        if len(starts) > cfg.max_windows:
            spread = np.linspace(0, len(starts) - 1, cfg.max_windows)
            starts = starts[spread.astype(int)]

        # those that are not there yet, and the frames they need
        files = {}
        missing = set()
        wanted = set()
        for start in starts.tolist():
            files[start] = Path(folder, f"{name}_{start:06d}.mp4")
            if not files[start].exists():
                missing.add(start)
                wanted.update(range(start, start + span, cfg.stride))

        # The source is read once. Only the windows that overlap the current frame are in memory, at their final size.
        open_windows = {}  # start -> frames so far
        frames = decode(path, wanted) if wanted else []
        for i, image in frames:
            if i in missing:
                open_windows[i] = []
            for start in list(open_windows):
                if (i - start) % cfg.stride == 0:
                    picture = image
                    if cfg.zoom < 1:
                        rng = np.random.default_rng([cfg.seed, start, *name.encode()])  # one square per window
                        picture = random_square(image, cfg.zoom, rng)
                    open_windows[start].append(resize(picture, cfg.size))
                if len(open_windows[start]) == cfg.n_frames:
                    write_video(files[start], open_windows.pop(start))

        # shorter than one window: keep what there is, reading repeats the last frame
        if 0 in open_windows:
            write_video(files[0], open_windows[0])
        return sum(file.exists() for file in files.values()), None
    except VideoError as error:
        return 0, str(error)


def random_square(image, zoom, rng):
    """A random square of (H, W, 3), its side uniformly from `zoom` to 1 of the shortest side."""
    h, w = image.shape[:2]
    side = int(rng.uniform(zoom, 1) * min(h, w))
    y = rng.integers(h - side + 1)
    x = rng.integers(w - side + 1)
    return image[y:y + side, x:x + side]


def resize(image, size):
    """(H, W, 3) uint8 with its shortest side resized to `size`; both sides even."""
    h, w = image.shape[:2]
    new_h = size * h // min(h, w) // 2 * 2
    new_w = size * w // min(h, w) // 2 * 2
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).unsqueeze(0)
    pixels = F.interpolate(pixels, size=(new_h, new_w), mode="bilinear", antialias=True)
    return pixels[0].permute(1, 2, 0).numpy()


def scan_image(job):
    """Slides over one image: (clips written or already there, error or None)."""
    cfg, path, folder, name = job
    try:
        _, image = next(decode(path, {0}))  # (H, W, 3)
    except VideoError as error:
        return 0, str(error)

    if min(image.shape[:2]) < cfg.window:
        image = resize(image, cfg.window)
    room_y = image.shape[0] - cfg.window
    room_x = image.shape[1] - cfg.window
    for k in range(cfg.n_per_image):
        rng = np.random.default_rng([cfg.seed, k, *name.encode()])
        angle = rng.uniform(0, 2 * math.pi)
        step_y = cfg.step * math.sin(angle)
        step_x = cfg.step * math.cos(angle)
        ys = bounce(rng.uniform(0, room_y), step_y, cfg.n_frames, room_y)
        xs = bounce(rng.uniform(0, room_x), step_x, cfg.n_frames, room_x)

        file = Path(folder, f"{name}_{k:03d}.mp4")
        if not file.exists():
            frames = []
            for y, x in zip(ys, xs, strict=True):
                frames.append(image[y:y + cfg.window, x:x + cfg.window])
            write_video(file, frames)
    return cfg.n_per_image, None


# ----------------------------------------------------------------------------------------------------------------------
# files and processes

def write_video(path, frames, fps=8):
    """Write frames (H, W, 3) uint8 as H.264; a file under its final name is always complete."""
    # threads=1: else the bytes depend on the number of cores
    with VideoWriter(path, fps, crf=12, preset="ultrafast", threads=1) as film:
        for frame in frames:
            film.write(frame)


def claim_folder(cfg, free=(), **more):
    """Note the settings in <out>/make_data.json. Files that exist are kept, so a second run with other settings would
    mix two sets: refuse it. `free` keys may change."""
    note = asdict(cfg) | more
    for key in (*free, "out", "n_workers"):
        del note[key]
    take_data_folder(cfg.out, note)


def run(function, jobs, n_workers, chunksize=1):
    """[function(job) for job in jobs], in processes if n_workers > 1."""
    if n_workers <= 1:
        return [function(job) for job in tqdm(jobs)]
    context = multiprocessing.get_context("spawn")  # the same on every system; a forked torch can hang
    with ProcessPoolExecutor(n_workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(tqdm(pool.map(function, jobs, chunksize=chunksize), total=len(jobs)))


def find_sources(cfg, suffixes):
    """Sorted files below the source folders."""
    files = []
    for folder in cfg.src.split(","):
        if not cfg.src or not Path(folder).is_dir():
            raise FileNotFoundError(f"--src: {folder!r} is not a folder")
        for path in sorted(Path(folder).rglob("*")):
            is_hidden = path.name.startswith(".")
            is_result = Path(cfg.out) in path.parents
            if path.suffix.lower() in suffixes and not is_hidden and not is_result:
                files.append(path)
    return files


def held_out_by_name(files, names):
    """Indices of the files whose names without suffix are in `names`, joined by commas."""
    stems = [path.stem for path in files]
    for name in names.split(","):
        if name not in stems:
            raise ValueError(f"--val_names: no source is called {name!r}")
    return [i for i, stem in enumerate(stems) if stem in names.split(",")]


def convert(cfg, function, suffixes):
    """Run function((cfg, path, folder to write to, name)) -> (number of clips, error or None) on every source file,
    with whole sources held out for val. Unreadable ones cost one warning; a split without clips is an error."""
    files = find_sources(cfg, suffixes)
    val_names = getattr(cfg, "val_names", "")
    if val_names:
        held_out = held_out_by_name(files, val_names)
        n_val = len(held_out)
    elif cfg.val_fraction > 0:
        n_val = max(1, round(cfg.val_fraction * len(files)))
    else:
        n_val = cfg.val_videos
    if not 0 < n_val < len(files):
        raise ValueError(f"--src={cfg.src} has {len(files)} files ({' '.join(suffixes)}), {n_val} of them to be held "
                         "out for val, and both splits need one: add files or hold out another number")
    claim_folder(cfg, n_sources=len(files))  # another number would hold out other files: training ones leak into val
    if not val_names:
        held_out = np.random.default_rng(cfg.seed).permutation(len(files))[-n_val:].tolist()

    jobs = []
    names = set()
    for i, path in enumerate(files):
        # the same name in two folders
        name = path.stem
        n = 1
        while name in names:
            name = f"{path.stem}-{n}"
            n += 1
        names.add(name)
        split = "val" if i in held_out else "train"
        jobs.append((cfg, path, Path(cfg.out, split), name))
    results = run(function, jobs, cfg.n_workers)

    # what came of every source
    n_clips = {"train": 0, "val": 0}
    errors = []
    for (_, path, folder, _), (n, error) in zip(jobs, results, strict=True):
        n_clips[folder.name] += n
        print(f"{folder.name:5}  {n:5} clips  {path}")
        if error is not None:
            errors.append(error)
    summary = f"{cfg.out}: {n_clips['train']} training and {n_clips['val']} validation clips"
    unreadable = f"{len(errors)} of {len(files)} source files are unreadable: {'; '.join(errors[:3])}"
    if not all(n_clips.values()):
        raise VideoError(f"{summary}, {unreadable}")
    print(summary)
    if errors:
        warnings.warn(f"skipped, {unreadable}", stacklevel=3)


COMMANDS = {"toy": (ToyConfig, toy),
            "cut": (CutConfig, lambda cfg: convert(cfg, cut_video, VIDEO_SUFFIXES)),
            "scan": (ScanConfig, lambda cfg: convert(cfg, scan_image, IMAGE_SUFFIXES))}


def main():
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__.strip())
        for name, (config, _) in COMMANDS.items():
            keys = configurator.help_text(config).removeprefix(__doc__.strip())
            print(f"\n{name}:{keys}")
        return
    config, command = COMMANDS[configurator.command(COMMANDS, __doc__)]
    command(configurator.parse(config, sys.argv[2:]))


if __name__ == "__main__":
    launch(main, VideoError)
