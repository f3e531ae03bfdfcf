"""
Videos in, training batches out: decoding, resizing, pixel normalisation, the clip dataset and the gaze labels.

    python data.py pack labels.json                  # for large sets: writes labels.packed, a folder for --labels=

On disk: <root>/train/*.mp4 and <root>/val/*.mp4, several roots joined by commas. A clip is the first `n_frames` frames
(every `stride`-th), shortest side resized to R, cropped to R x R. Clips stay uint8 up to the training step, which calls
`to_model_pixels` on its own device: a quarter of the bytes to ship, and nothing to undo for pictures.

Dimension key: B clips, T frames, H/W source size, R clip size, V patch ids per frame, N gaze slots of a clip.
Against the published code: a corrupt video is replaced by the next one with a warning (there: a random other one,
silently), non-square videos are cropped, collating leaves the labels as they are, and empty label frames are allowed.
"""

import math
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import dropwhile
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from tqdm import tqdm

IMAGE_MEAN = (0.485, 0.456, 0.406)  # ImageNet's, though applied to pixels in -1..1: the published models expect that
IMAGE_STD = (0.229, 0.224, 0.225)
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi")
MAX_FAILURES = 100  # so many unreadable files in a row mean a broken disk or mount, not a few bad downloads


class VideoError(Exception):
    """A file that cannot be used as a video. The message names the file and what is wrong with it."""


# ----------------------------------------------------------------------------------------------------------------------
# decoding

def video_stream(container, path):
    for stream in container.streams.video:
        if stream.codec_context is not None:  # None: a codec that nobody knows, often a damaged header
            return stream
    raise VideoError(f"{path}: has no video stream that can be decoded")


def quarter_turns(frame):
    """Anticlockwise quarter turns that set a frame upright, from its display matrix; PyAV 12 does not tell."""
    return round(getattr(frame, "rotation", 0) / 90) % 4


def keyframe_before(path, first):
    """(i, pts of frames i to `first`), i being the last keyframe up to frame number `first`: packets are read up to
    there, not decoded. (0, []) if they do not tell."""
    pts, keys = [], []
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = video_stream(container, path)
            if stream.codec_context.name == "vp8":  # has packets that are no frame of the film
                return 0, []
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    pts.append(packet.pts)
                    keys += [packet.pts] if packet.is_keyframe else []
                if len(pts) > first + 64:  # packets come in decoding order, which differs by fewer frames
                    break
    except (av.FFmpegError, OSError, ValueError):
        return 0, []  # decoding names the reason
    if len(pts) <= first or None in pts or len(set(pts)) < len(pts) or keys[:1] != pts[:1] or min(pts) < pts[0]:
        return 0, []  # too short, no time stamps, or the first frames cannot be decoded
    pts.sort()
    i = pts.index(max(key for key in keys if key <= pts[first]))
    return i, pts[i:first + 1]


def decode(path, wanted, skip=True):
    """Yield (i, (H, W, 3) uint8 array) for the frame indices i in `wanted` (range or set), in decoding order.

    Frames come upright: a display matrix (phone videos) is applied to quarter turns, mirrored ones stay as stored.
    Decodes from the last keyframe before the first wanted frame, where the file does not tell it (or skip=False) from
    the start, to the last wanted frame. A file that ends or breaks earlier just ends the iteration; if it ends before
    the first wanted frame, its last frame is yielded. No frame: VideoError. Every frame has the size of the first one
    yielded, also when the stream changes size in between.
    """
    reformatter = VideoReformatter()  # one for all frames: each would set up its own colour conversion otherwise

    def to_rgb(frame, **size):
        try:
            image = reformatter.reformat(frame, format="rgb24", **size).to_ndarray()
            return np.rot90(image, quarter_turns(frame))
        except (av.FFmpegError, ValueError) as error:
            raise VideoError(f"{path}: its {frame.format.name} frames cannot be turned into RGB ({error})") from error

    frame, size, last, reason = None, {}, max(wanted), "not one frame in its video stream"
    start, pts = keyframe_before(path, min(wanted)) if skip and min(wanted) else (0, [])
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = video_stream(container, path)
            stream.codec_context.thread_count = 1  # threads cost more than they save here, and workers are many
            packets = dropwhile(lambda packet: pts and packet.pts != pts[0], container.demux(stream))
            for i, frame in enumerate((frame for packet in packets for frame in packet.decode()), start):
                if i < start + len(pts) and frame.pts != pts[i - start]:
                    break
                if i in wanted:
                    size = size or {"width": frame.width, "height": frame.height}
                    yield i, to_rgb(frame, **size)
                if i >= last:
                    return
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = error
    if pts and not size:  # the packets promised another frame than decoding gave, e.g. two hold one
        yield from decode(path, wanted, skip=False)
        return
    if frame is None:
        raise VideoError(f"{path}: cannot be decoded as a video ({reason})")
    if not size:
        yield i, to_rgb(frame)


def read_frames(path, n_frames, start=0, stride=1):
    """Frames start, start + stride, ... as (n_frames, 3, H, W) uint8; a shorter video repeats its last frame."""
    assert n_frames > 0 and start >= 0 and stride > 0, (n_frames, start, stride)
    wanted = range(start, start + n_frames * stride, stride)
    frames = [torch.from_numpy(np.ascontiguousarray(image)) for _, image in decode(path, wanted)]
    frames += frames[-1:] * (n_frames - len(frames))
    return torch.stack(frames).permute(0, 3, 1, 2)  # (T,H,W,3) -> (T,3,H,W), a view


def count_frames(path):
    """Number of frames: what the container says, else packets counted without decoding them. A file that was cut off
    can claim more than it holds."""
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = video_stream(container, path)
            return stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"{path}: cannot be read as a video: it is none, or was cut off ({error})") from error


# ----------------------------------------------------------------------------------------------------------------------
# pixels

def random_box(h, w, generator=None):
    """(top, left, height, width) covering 0.3 to 1 of the area at aspect 3/4 to 4/3, torchvision's recipe."""
    def uniform(a, b):
        return a + (b - a) * torch.rand((), generator=generator).item()

    for _ in range(10):
        area, aspect = h * w * uniform(0.3, 1), math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
        bw, bh = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < bw <= w and 0 < bh <= h:
            return int(uniform(0, h - bh + 1)), int(uniform(0, w - bw + 1)), bh, bw
    bh, bw = min(h, round(w * 4 / 3)), min(w, round(h * 4 / 3))  # very long pictures: the largest allowed centre box
    return (h - bh) // 2, (w - bw) // 2, bh, bw


def resize(x, size):  # (T, C, H, W) -> (T, C, *size)
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)


def resize_center(x, size):
    """(T, C, H, W) -> (T, C, size, size): shortest side to `size`, then the centre square."""
    h, w = x.shape[-2:]
    h, w = size * h // min(h, w), size * w // min(h, w)
    top, left = (h - size) // 2, (w - size) // 2
    return resize(x, (h, w))[..., top:top + size, left:left + size].contiguous()


def resize_crop(frames, size, crop="center", generator=None):
    """(T, 3, H, W) uint8 -> (T, 3, size, size) uint8. "center": shortest side to `size`, then the centre square;
    "random": one random box for all frames, resized to the square. Antialiased bilinear on 8-bit values, like PIL."""
    assert frames.dtype == torch.uint8 and frames.ndim == 4 and frames.shape[1] == 3, (frames.dtype, frames.shape)
    assert crop in ("center", "random"), crop
    if crop == "random":
        top, left, h, w = random_box(*frames.shape[-2:], generator)
        return resize(frames[..., top:top + h, left:left + w], (size, size)).contiguous()
    return resize_center(frames, size)


def to_model_pixels(x):
    """Pixels 0..255 (uint8 or float, (..., 3, H, W)) -> float32 as the models expect them, on x's device."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return (x.float() / 127.5).sub_(1).sub_(mean).div_(std)  # in place: frames in tiles are large


def from_model_pixels(x):
    """What `to_model_pixels` made -> pixels in [0, 1], clamped, for pictures."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return ((x.float() * std + mean + 1) / 2).clamp(0, 1)


normalize = to_model_pixels  # the old names, until nobody uses them
denormalize = from_model_pixels


# ----------------------------------------------------------------------------------------------------------------------
# clips

def list_videos(root, split):
    """Paths (str: a million of them are in memory) of the videos of <root>/<split>/ sorted by name; `root` may be
    several folders joined by commas, kept in that order."""
    videos = []
    for folder in str(root).split(","):
        folder = Path(folder.strip())
        layout = f"expected videos ({' '.join(VIDEO_SUFFIXES)}) in {folder / split}/"
        if not folder.is_dir():
            raise FileNotFoundError(f"data folder {folder} does not exist: {layout}")
        if not (folder / split).is_dir():
            raise FileNotFoundError(f"data folder {folder} has no folder '{split}': {layout}")
        # hidden files are left-overs: half-written videos, "._x.mp4" from a Mac
        names = sorted(n for n in os.listdir(folder / split) if n.lower().endswith(VIDEO_SUFFIXES) and n[0] != ".")
        if not names:
            raise FileNotFoundError(f"no videos in {folder / split}: {layout}")
        videos += [f"{folder}/{split}/{name}" for name in names]
    return videos


def video_key(path):
    """"dataset/split/file.mp4", the name of a video in a label file."""
    path = str(path)
    if path.count("/") < 3 or "/." in path or "//" in path:  # short or not plain; abspath takes seconds for a million
        path = os.path.abspath(path)
    return "/".join(path.split("/")[-3:])


def check_names(keys, where):
    """ValueError if two videos have one key: a label file could not tell them apart."""
    if len(set(keys)) < len(keys):
        raise ValueError(f"{where}: two folders have the same last name and video names, so one label would serve "
                         "two videos: rename one of the folders")


class Clips(torch.utils.data.Dataset):
    """Clips of <root>/<split>/. An item: {"video": (T, 3, size, size) uint8, "key", "path", "unreadable": files passed
    over to get it}; with `labels` (of labels.py) also "gazing_pos" and "task_losses", lists of lists per frame,
    and only labelled videos are kept. Random start and crop depend on (seed, epoch, index) only, whatever process
    reads the clip and wherever a run was resumed: item index + epoch · len(self) is that of another epoch.

    An unreadable file is replaced by the next readable one of the list, with a warning: never silently, never fatally.
    cache=True decodes everything once, here, into one uint8 tensor, and drops unreadable files from the list.
    """

    def __init__(self, root, split, n_frames, size, stride=1, random_start=False, crop="center", labels=None,
                 cache=False, seed=0):
        randomized = random_start or crop == "random"
        if cache and randomized:
            raise ValueError("cache=True keeps one version of each clip: switch off random start and random crop")
        if labels is not None and randomized:
            raise ValueError("labels hold gazes of the first frames' centre crop: switch off random start and crop")
        self.n_frames, self.size, self.stride, self.random_start, self.crop = n_frames, size, stride, random_start, crop
        self.seed = seed
        self.paths, self.labels, self.videos, self.warned = list_videos(root, split), labels, None, set()
        if labels is not None:
            self.keep_labelled(root, split)
        if cache:
            self.decode_all()

    def keep_labelled(self, root, split):
        videos, where = self.paths, f"{root} ({split})"
        keys = [video_key(path) for path in videos]
        known = [k in self.labels for k in keys] if isinstance(self.labels, dict) else self.labels.known(keys)
        self.paths = [path for path, k in zip(videos, known, strict=True) if k]
        if not self.paths:
            raise ValueError(f"no label fits a video of {where}: the videos are called like {keys[0]!r}, "
                             f"the labels like {next(iter(self.labels), 'nothing, the file is empty')!r}")
        check_names([key for key, k in zip(keys, known, strict=True) if k], where)
        if os.environ.get("RANK", "0") == "0":
            print(f"labels: {len(self.paths)} videos of {where} have one, {len(videos) - len(self.paths)} videos and "
                  f"{len(self.labels) - len(self.paths)} labels are not used")

    def decode_all(self):
        self.videos = torch.empty(len(self.paths), self.n_frames, 3, self.size, self.size, dtype=torch.uint8)

        def load(i):
            try:
                self.videos[i] = self.read(self.paths[i])
            except VideoError as error:
                return str(error)

        with ThreadPoolExecutor(2) as pool:
            errors = list(tqdm(pool.map(load, range(len(self.paths))), total=len(self.paths), desc="decoding clips"))
        good = [i for i, error in enumerate(errors) if error is None]
        bad = [error for error in errors if error is not None]
        if not good:
            raise VideoError(f"all {len(bad)} videos are unreadable, first: {bad[0]}")
        if bad:
            warnings.warn(f"dropped {len(bad)} of {len(errors)} videos, unreadable: {'; '.join(bad[:3])}"
                          + (" ..." if len(bad) > 3 else ""), stacklevel=3)
            self.paths, self.videos = [self.paths[i] for i in good], self.videos[good]

    def read(self, path, draw=0):
        """Clip of one file; draw: number of the random start and crop."""
        start, generator = 0, torch.Generator().manual_seed(self.seed * 1_000_003 + draw)
        if self.random_start:
            n_starts = count_frames(path) - (self.n_frames - 1) * self.stride
            start = int(torch.randint(max(n_starts, 1), (), generator=generator))
        return resize_crop(read_frames(path, self.n_frames, start, self.stride), self.size, self.crop, generator)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        unreadable, video, draw, index = [], None, index, index % len(self)
        for i in range(min(MAX_FAILURES, len(self))):
            path = self.paths[(index + i) % len(self)]
            try:
                video = self.read(path, draw) if self.videos is None else self.videos[index]
                break
            except VideoError as error:
                unreadable.append(str(path))
                if path not in self.warned:
                    self.warned.add(path)
                    warnings.warn(f"skipped, the next video is used instead: {error}", stacklevel=2)
        if video is None:
            raise VideoError(f"all {len(unreadable)} videos from {unreadable[0]} on are unreadable")
        item = {"video": video, "key": video_key(path), "path": str(path), "unreadable": unreadable}
        if self.labels is not None:
            label = self.labels[item["key"]]
            item.update(gazing_pos=label["gazing_pos"], task_losses=label["task_losses"])
        return item


def collate(items):
    """Items of `Clips` -> one batch: video (B, T, 3, R, R) uint8, lists of key, path and (labelled clips) gazing_pos
    and task_losses as they are; unreadable files of all items in one list."""
    batch = {name: [item[name] for item in items] for name in items[0]}
    batch["video"] = torch.stack(batch["video"])
    batch["unreadable"] = [path for paths in batch["unreadable"] for path in paths]
    return batch


def collate_gaze(gazing_pos, task_losses, n_ids):
    """Gazes as lists (B) of lists (T) of ids + V*t -> gazing_pos (B, N) int64, if_padded_gazing (B, N) bool (True =
    dummy slot), num_gazing_each_frame (T,) int64, and with task_losses (same nesting, or None) task_losses (B, N)
    float32. A frame has as many slots as the longest of the batch; padded slots hold id V and the frame's last loss
    (0 if it has none). The lists are left as they are."""
    n_frames = len(gazing_pos[0])
    assert all(len(clip) == n_frames for clip in gazing_pos), [len(clip) for clip in gazing_pos]
    n_slots = [max(len(clip[t]) for clip in gazing_pos) for t in range(n_frames)]
    pos, padded, losses = [], [], []
    for b, clip in enumerate(gazing_pos):
        for t, ids in enumerate(clip):
            n_pad = n_slots[t] - len(ids)
            pos += [*ids, *[n_ids * t + n_ids] * n_pad]
            padded += [False] * len(ids) + [True] * n_pad
            if task_losses is not None:
                values = task_losses[b][t]
                assert len(values) == len(ids), (b, t, len(values), len(ids))
                losses += [*values, *[values[-1] if len(values) else 0.0] * n_pad]
    shape = (len(gazing_pos), sum(n_slots))
    gaze = {"gazing_pos": torch.tensor(pos, dtype=torch.int64).view(shape),
            "if_padded_gazing": torch.tensor(padded, dtype=torch.bool).view(shape),
            "num_gazing_each_frame": torch.tensor(n_slots, dtype=torch.int64)}
    if task_losses is not None:
        gaze["task_losses"] = torch.tensor(losses, dtype=torch.float32).view(shape)
    return gaze


if __name__ == "__main__":
    if sys.argv[1:2] != ["pack"] or len(sys.argv) not in (3, 4):
        raise SystemExit("usage: python data.py pack labels.json [labels.packed]")
    try:
        from lib.labels import pack_labels
        pack_labels(*sys.argv[2:])
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
