"""
Make training videos: a toy set to learn with in minutes, short clips from long videos, slides over large images.

    python make_data.py toy  --out=data/toy                              # 2,000 + 200 generated clips, ten seconds
    python make_data.py cut  --src=/videos,/more/videos --out=data/mine  # windows of your own long videos
    python make_data.py scan --src=/photos --out=data/scan               # windows sliding over large still images
    python make_data.py cut -h                                           # every key with its default

Each writes <out>/train/*.mp4 and <out>/val/*.mp4, which is what the training scripts take as data folder. Files that
exist are kept, so an interrupted run goes on where it stopped; the same seed gives the same files.
"""

import json
import math
import multiprocessing
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import VIDEO_SUFFIXES, VideoError, count_frames, decode
from lib import configurator

# What happens in a toy clip. Most cameras stand still: then a new patch is worth a gaze only where something changed,
# which is what the model has to find out.
KINDS = {"static_camera": 0.65, "pan": 0.1, "still": 0.15, "cut": 0.1}
P_APPEAR = 0.2  # share of moving sprites that appear or vanish in the middle of the clip
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
        check_numbers(self, positive=("n_frames",), even=("height", "width"))


@dataclass
class CutConfig:
    src: str = ""              # folder of videos, searched with its subfolders; several joined by commas
    out: str = "data/mine"     # folder to write to
    n_frames: int = 4          # frames per window
    stride: int = 2            # take every so many-th frame of the source
    size: int = 128            # shortest side in pixels, even; the long side follows, rounded down to even
    hop: int = 0               # source frames from one window's start to the next; 0 = windows side by side
    max_windows: int = 200     # per video, spread evenly over it
    val_videos: int = 2        # source videos held out for validation; no video is in both
    val_fraction: float = 0.0  # if above 0: hold out this share of the videos in place of val_videos
    seed: int = 0              # which videos are held out
    n_workers: int = 2         # processes

    def check(self):
        check_numbers(self, positive=("n_frames", "stride", "max_windows"), even=("size",))


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
        check_numbers(self, positive=("n_frames", "n_per_image"), even=("window",))
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--val_fraction={self.val_fraction}: must lie between 0 and 1")


def check_numbers(cfg, positive, even):
    for key, value in asdict(cfg).items():
        least = int(key in positive + even)
        if not isinstance(value, str) and value < least:
            raise ValueError(f"--{key}={value}: must be at least {least}")
    for key in even:
        if getattr(cfg, key) % 2:
            raise ValueError(f"--{key}={getattr(cfg, key)}: must be even, the video format halves its colour planes")


# ----------------------------------------------------------------------------------------------------------------------
# toy clips

def texture(rng, h, w, sides, n_patches, rough, period):
    """(h, w, 3) uint8: smooth colour, `rough` adds blotches, under hard-edged patterned patches with sides of `sides`
    pixels and stripes or cells of about `period`. A coarse look tells most of a background, but not its patches."""
    def noise(cells):
        grid = rng.standard_normal((1, 3, cells, cells), dtype=np.float32)
        return F.interpolate(torch.from_numpy(grid), size=(h, w), mode="bicubic").numpy()[0].transpose(1, 2, 0)

    image = rng.uniform(60, 195, 3) + 15 * noise(2) + rough * noise(5)
    for _ in range(n_patches):
        ph, pw = rng.integers(*sides, 2)
        y, x = rng.integers(-ph // 2, h - ph // 2), rng.integers(-pw // 2, w - pw // 2)
        patch = image[max(y, 0):y + ph, max(x, 0):x + pw]  # a view: filled in place
        yy, xx = np.mgrid[:patch.shape[0], :patch.shape[1]]
        stripe = max(2, round(period * rng.uniform(0.75, 1.25)))
        kind = rng.choice(["plain", "stripes", "checker", "gravel"])
        if kind == "stripes":
            angle = rng.uniform(0, math.pi)
            pattern = (yy * math.sin(angle) + xx * math.cos(angle)) // stripe % 2
        elif kind == "checker":
            pattern = (yy // stripe + xx // stripe) % 2
        elif kind == "gravel":  # cells of random shades between the two colours
            pattern = rng.random((ph // stripe + 1, pw // stripe + 1))[yy // stripe, xx // stripe]
        else:
            pattern = np.zeros(patch.shape[:2])
        dark, light = rng.uniform(20, 235, (2, 3))
        patch[:] = dark + pattern[..., None] * (light - dark)
    return image.clip(0, 255).astype(np.uint8)


def bounce(start, speed, n, room):
    """(n,) int positions in 0..room of something that moves at constant speed and turns back at both ends."""
    p = np.mod(start + speed * np.arange(n), 2 * room) if room > 0 else np.zeros(n)
    return np.rint(np.where(p > room, 2 * room - p, p)).astype(int)


def sprite(rng, cfg, n_frames, moving):
    """An object: picture (h, w, 3), mask (h, w) bool, corner positions ys, xs (n_frames,), visible (n_frames,) bool."""
    h = max(2, round(cfg.height * rng.uniform(1 / 4, 1 / 2)))
    w = min(max(2, round(h * rng.uniform(0.6, 1.6))), cfg.width)
    y, x = np.mgrid[-1:1:h * 1j, -1:1:w * 1j]
    shape = rng.choice(["ellipse", "rectangle", "rotated"])
    if shape == "ellipse":
        mask = y ** 2 + x ** 2 <= 1
    elif shape == "rectangle":
        mask = np.ones((h, w), bool)
    else:
        turn, tall, wide = rng.uniform(0.3, 1.3), rng.uniform(0.3, 0.6), rng.uniform(0.6, 0.8)
        u, v = y * math.sin(turn) + x * math.cos(turn), y * math.cos(turn) - x * math.sin(turn)
        mask = (abs(u) < wide) & (abs(v) < tall)
    angle, speed = rng.uniform(0, 2 * math.pi), cfg.height * rng.uniform(0.04, 0.12) * moving
    room_y, room_x = cfg.height - h, cfg.width - w
    ys = bounce(rng.uniform(0, room_y), speed * math.sin(angle), n_frames, room_y)
    xs = bounce(rng.uniform(0, room_x), speed * math.cos(angle), n_frames, room_x)
    visible = np.ones(n_frames, bool)
    if moving and n_frames > 1 and rng.random() < P_APPEAR:
        visible[:rng.integers(1, n_frames)] = False  # appears ...
        if rng.random() < 0.5:
            visible = ~visible  # ... or vanishes
    return texture(rng, h, w, (max(2, h // 3), h + 1), 3, 15, cfg.height / 6), mask, ys, xs, visible


def render_shot(rng, cfg, n_frames, kind):
    """(n_frames, height, width, 3) uint8 without a cut."""
    decor = (max(2, cfg.height // 7), max(3, cfg.height // 3 + 2)), rng.integers(1, 5), 0, cfg.height / 6
    if kind == "pan":
        angle, speed = rng.uniform(0, 2 * math.pi), rng.uniform(1, 4)
        dy, dx = (np.rint(np.arange(n_frames) * speed * f(angle)).astype(int) for f in (math.sin, math.cos))
        dy, dx = dy - dy.min(), dx - dx.min()
        wide = texture(rng, cfg.height + dy.max(), cfg.width + dx.max(), *decor)
        frames = np.stack([wide[y:y + cfg.height, x:x + cfg.width] for y, x in zip(dy, dx, strict=True)])
        n_sprites = rng.integers(0, 2)
    else:
        frames = np.repeat(texture(rng, cfg.height, cfg.width, *decor)[None], n_frames, 0)
        n_sprites = rng.integers(1, 3)
    for _ in range(n_sprites):  # later ones are in front
        picture, mask, ys, xs, visible = sprite(rng, cfg, n_frames, moving=kind != "still")
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
    return np.concatenate([render_shot(rng, cfg, n, "static_camera") for n in (t, cfg.n_frames - t)])


def write_toy(job):
    cfg, split, i, path = job
    write_video(path, render_clip(np.random.default_rng([cfg.seed, split, i]), cfg))  # depends on nothing else


def toy(cfg):
    claim_folder(cfg, free=("n_train", "n_val"))
    jobs = [(cfg, split, i, Path(cfg.out, name, f"{i:06d}.mp4"))
            for split, (name, n) in enumerate([("train", cfg.n_train), ("val", cfg.n_val)]) for i in range(n)]
    jobs = [job for job in jobs if not job[-1].exists()]
    run(write_toy, jobs, cfg.n_workers, chunksize=16)
    print(f"{cfg.out}: {cfg.n_train} training and {cfg.n_val} validation clips, {len(jobs)} of them new")


# ----------------------------------------------------------------------------------------------------------------------
# windows of long videos, slides over images

def cut_video(job):
    """Cut one source: (windows written or already there, error or None). The source is read once; only the windows
    that overlap the current frame are in memory, and those at their final size."""
    cfg, path, folder, name = job
    span, hop = (cfg.n_frames - 1) * cfg.stride + 1, cfg.hop or cfg.n_frames * cfg.stride
    try:
        starts = np.arange(0, max(count_frames(path) - span, 0) + 1, hop)  # a short video is one short window
        if len(starts) > cfg.max_windows:
            starts = starts[np.linspace(0, len(starts) - 1, cfg.max_windows).astype(int)]
        files = {int(s): Path(folder, f"{name}_{s:06d}.mp4") for s in starts}
        todo = {s for s, file in files.items() if not file.exists()}
        wanted = {s + k * cfg.stride for s in todo for k in range(cfg.n_frames)}
        open_windows = {}  # start -> frames so far
        for i, image in decode(path, wanted) if wanted else ():
            frame = resize(image, cfg.size)
            if i in todo:
                open_windows[i] = []
            for s in [s for s in open_windows if (i - s) % cfg.stride == 0]:
                open_windows[s].append(frame)
                if len(open_windows[s]) == cfg.n_frames:
                    write_video(files[s], np.stack(open_windows.pop(s)))
        if 0 in open_windows:  # shorter than one window: keep what there is, reading repeats the last frame
            write_video(files[0], np.stack(open_windows[0]))
        return sum(file.exists() for file in files.values()), None
    except VideoError as error:
        return 0, str(error)


def resize(image, size):
    """(H, W, 3) uint8 with its shortest side resized to `size`; both sides even."""
    h, w = image.shape[:2]
    h, w = size * h // min(h, w) // 2 * 2, size * w // min(h, w) // 2 * 2
    x = torch.from_numpy(image).permute(2, 0, 1)[None]
    return F.interpolate(x, size=(h, w), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def scan_image(job):
    """Slides over one image: (clips written or already there, error or None)."""
    cfg, path, folder, name = job
    files = [Path(folder, f"{name}_{k:03d}.mp4") for k in range(cfg.n_per_image)]
    try:
        _, image = next(decode(path, {0}))  # (H, W, 3)
        image = resize(image, cfg.window) if min(image.shape[:2]) < cfg.window else image
        room_y, room_x = image.shape[0] - cfg.window, image.shape[1] - cfg.window
        for k, file in enumerate(files):
            rng = np.random.default_rng([cfg.seed, k, *name.encode()])
            angle = rng.uniform(0, 2 * math.pi)
            ys = bounce(rng.uniform(0, room_y), cfg.step * math.sin(angle), cfg.n_frames, room_y)
            xs = bounce(rng.uniform(0, room_x), cfg.step * math.cos(angle), cfg.n_frames, room_x)
            if not file.exists():
                write_video(file, np.stack([image[y:y + cfg.window, x:x + cfg.window]
                                            for y, x in zip(ys, xs, strict=True)]))
        return len(files), None
    except VideoError as error:
        return 0, str(error)


# ----------------------------------------------------------------------------------------------------------------------
# files and processes

def write_video(path, frames, fps=8):
    """Write (T, H, W, 3) uint8 as H.264; a file under its final name is always complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half_written = path.with_name(f".{path.name}")  # hidden: listing videos passes over it
    with av.open(str(half_written), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "crf": "12"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1  # the bytes depend on the number of threads
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    os.replace(half_written, path)


def claim_folder(cfg, free=(), **more):
    """Note the settings in <out>/make_data.json. Files that exist are kept, so a second run with other settings would
    mix two sets: refuse it. `free` keys may change."""
    note = {key: value for key, value in asdict(cfg).items() if key not in (*free, "out", "n_workers")} | more
    path = Path(cfg.out, "make_data.json")
    if path.exists() and json.loads(path.read_text()) != note:
        raise ValueError(f"{cfg.out} holds files made with other settings ({path}): delete it or choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(note, indent=1))


def run(function, jobs, n_workers, chunksize=1):
    """[function(job) for job in jobs], in processes if n_workers > 1."""
    if n_workers <= 1:
        return [function(job) for job in tqdm(jobs)]
    context = multiprocessing.get_context("spawn")  # the same on every system; a forked torch can hang
    with ProcessPoolExecutor(n_workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(tqdm(pool.map(function, jobs, chunksize=chunksize), total=len(jobs)))


def convert(cfg, function, suffixes):
    """Run function((cfg, path, folder to write to, name)) -> (number of clips, error or None) on every source file,
    with whole sources held out for val. Unreadable ones cost one warning; a split without clips is an error."""
    files = []
    for folder in cfg.src.split(","):
        if not cfg.src or not Path(folder).is_dir():
            raise FileNotFoundError(f"--src: {folder!r} is not a folder")
        files += sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in suffixes and p.name[0] != "."
                        and Path(cfg.out) not in p.parents)
    n_val = max(1, round(cfg.val_fraction * len(files))) if cfg.val_fraction > 0 else cfg.val_videos
    if not 0 < n_val < len(files):
        raise ValueError(f"--src={cfg.src} has {len(files)} files ({' '.join(suffixes)}), {n_val} of them to be held "
                         "out for val, and both splits need one: add files or hold out another number")
    claim_folder(cfg, n_sources=len(files))  # another number would hold out other files: training ones leak into val
    held_out = set(np.random.default_rng(cfg.seed).permutation(len(files))[-n_val:].tolist())
    jobs, names = [], set()
    for i, path in enumerate(files):
        name, n = path.stem, 1
        while name in names:  # the same name in two folders
            name, n = f"{path.stem}-{n}", n + 1
        names.add(name)
        jobs.append((cfg, path, Path(cfg.out, "val" if i in held_out else "train"), name))
    results, n_clips = run(function, jobs, cfg.n_workers), {"train": 0, "val": 0}
    for (_, path, folder, _), (n, _) in zip(jobs, results, strict=True):
        n_clips[folder.name] += n
        print(f"{folder.name:5}  {n:5} clips  {path}")
    bad = [error for _, error in results if error]
    note = f"{len(bad)} of {len(files)} source files are unreadable: {'; '.join(bad[:3])}"
    if not all(n_clips.values()):
        raise VideoError(f"{cfg.out}: {n_clips['train']} training and {n_clips['val']} validation clips, {note}")
    print(f"{cfg.out}: {n_clips['train']} training and {n_clips['val']} validation clips")
    if bad:
        warnings.warn(f"skipped, {note}", stacklevel=3)


COMMANDS = {"toy": (ToyConfig, toy),
            "cut": (CutConfig, lambda cfg: convert(cfg, cut_video, VIDEO_SUFFIXES)),
            "scan": (ScanConfig, lambda cfg: convert(cfg, scan_image, IMAGE_SUFFIXES))}


def main():
    if sys.argv[1:2] in (["-h"], ["--help"]):
        texts = [configurator.help_text(config).removeprefix(__doc__.strip()) for config, _ in COMMANDS.values()]
        print(__doc__.strip(), *(f"\n{name}:{text}" for name, text in zip(COMMANDS, texts, strict=True)), sep="\n")
        return
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__.strip())
    config, command = COMMANDS[sys.argv[1]]
    command(configurator.parse(config, sys.argv[2:]))


if __name__ == "__main__":
    main()
