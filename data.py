"""
Videos in, training batches out: decoding, motion vectors, pixels, the clip dataset.

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
from bisect import bisect_left, bisect_right, insort
from concurrent.futures import ThreadPoolExecutor
from itertools import dropwhile
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from tqdm import tqdm

from lib.loader import send
from lib.pixels import check_frames

IMAGE_MEAN = (0.485, 0.456, 0.406)  # ImageNet's, though applied to pixels in -1..1: the published models expect that
IMAGE_STD = (0.229, 0.224, 0.225)
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".3gp", ".gif")
MAX_FAILURES = 100  # so many unreadable files in a row mean a broken disk or mount, not a few bad downloads


class VideoError(Exception):
    """A file that cannot be used as a video. The message names the file and what is wrong with it."""


# ----------------------------------------------------------------------------------------------------------------------
# decoding

def open_video(path):
    """av.open for a file of any name."""
    name = str(path)
    try:
        name.encode()
    except UnicodeEncodeError:  # FFmpeg takes names in UTF-8 only; Python opens any
        return av.open(open(path, "rb"), metadata_errors="ignore")

    # without file: in front, "12:30.mp4" would be read through a protocol called 12
    return av.open(f"file:{name}" if os.path.exists(path) else name, metadata_errors="ignore")


def open_stream(path):
    """av.open for what comes as it is read: - (the standard input), a camera (/dev/video0), a URL, or a file."""
    if path == "-":
        return av.open("pipe:0", metadata_errors="ignore")
    if path.startswith("/dev/video"):
        return av.open(path, format="v4l2", metadata_errors="ignore")
    return open_video(path)


def video_stream(container, path):
    """The video track that a player would show: the default one, of several the largest picture."""
    def rank(stream):
        disposition = int(getattr(stream, "disposition", 0))  # PyAV 12 does not tell
        is_default = disposition & 1
        is_thumbnail = disposition & 0x400
        return not is_thumbnail, is_default, stream.width * stream.height

    # no codec context: a codec that nobody knows, often a damaged header
    known = [stream for stream in container.streams.video if stream.codec_context is not None]
    if not known:
        raise VideoError(f"{path}: has no video stream that can be decoded")
    return max(known, key=rank)


def display_matrix(frame):
    """(2, 2) array: where the stored frame's x and y axes point in the upright picture."""
    stored = frame.side_data.get("DISPLAYMATRIX")
    if stored is None:
        return np.eye(2)
    matrix = np.frombuffer(bytes(stored), dtype=np.int32).reshape(3, 3)
    return matrix[:2, :2] / 65536


def upright(image, frame):
    """Turn and mirror an array (H, W, ...) that was made of `frame` as the frame's display matrix says. Other angles
    than quarter turns are taken as the nearest one."""
    x_axis, y_axis = display_matrix(frame)
    shorter, longer = sorted(abs(x_axis))
    if shorter > 0.02 * longer:  # Python says it once
        warnings.warn("a video wants to be turned by no quarter turn: the nearest one is taken", stacklevel=2)
    is_transposed = abs(x_axis[1]) > abs(x_axis[0])
    if is_transposed:
        image = image.swapaxes(0, 1)
        x_axis, y_axis = y_axis, x_axis
    if x_axis[0] < 0:
        image = image[:, ::-1]
    if y_axis[1] < 0:
        image = image[::-1]
    return image


def has_true_stamps(container, stream):
    """Whether a packet's time stamp is that of the one frame it holds. VP8 has packets that are no frame of the film;
    AVI knows only the order in which frames are decoded."""
    reorders = stream.codec_context.has_b_frames
    return stream.codec_context.name != "vp8" and not (container.format.name == "avi" and reorders)


def keyframe_before(path, first):
    """(i, time stamps of frames i to `first`), i being the last keyframe up to frame number `first`: packets are read
    up to there, not decoded. (0, []) if they do not tell."""
    stamps = []
    keys = []
    try:
        with open_video(path) as container:
            stream = video_stream(container, path)
            if not has_true_stamps(container, stream):
                return 0, []
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    stamps.append(packet.pts)
                    if packet.is_keyframe:
                        keys.append(packet.pts)
                if len(stamps) > first + 64:  # packets come in decoding order, which differs by fewer frames
                    break
    except (av.FFmpegError, OSError, ValueError):
        return 0, []  # decoding names the reason

    if len(stamps) <= first or None in stamps or len(set(stamps)) < len(stamps):
        return 0, []  # too short, or no usable time stamps
    if keys[:1] != stamps[:1] or min(stamps) < stamps[0]:
        return 0, []  # the first frames cannot be decoded

    stamps.sort()
    key = max(key for key in keys if key <= stamps[first])
    i = stamps.index(key)
    return i, stamps[i:first + 1]


def numbered_frames(packets, start=0, has_stamps=True, strict=False):
    """Yield (number, frame) of packets. A frame's number is the rank of its time stamp among those of the packets, from
    the first keyframe on, which has number `start`. So one that is damaged and left out does not shift the others.
    Where stamps do not tell, it is the number after that of the frame before. strict: packets that cannot be decoded
    are an error."""
    stamps = []  # of the packets so far, ascending
    number = start - 1
    for packet in packets:
        # a keyframe's leading frames, if they can be decoded at all, belong to the one before it
        is_first = not stamps and packet.is_keyframe
        is_frame = packet.size and not packet.is_discard and packet.pts is not None
        if has_stamps and is_frame and (is_first or stamps and packet.pts >= stamps[0]):
            insort(stamps, packet.pts)

        try:
            frames = packet.decode()
        except av.InvalidDataError:
            if strict:
                raise
            continue
        for frame in frames:
            n_before = 0
            n_until = 0  # its own stamp counted in
            if frame.pts is not None:
                n_before = bisect_left(stamps, frame.pts)
                n_until = bisect_right(stamps, frame.pts)
            if n_until > n_before:
                if start + n_until <= number + 1:
                    continue  # frames come in the order of their stamps: this one is damaged
                number = max(number, start + n_before - 1)
            number += 1
            yield number, frame


def decode(path, wanted, skip=True):
    """Yield (i, (H, W, 3) uint8 array) for the frame indices i in `wanted` (range or set), in decoding order.

    Frames come upright: the display matrix of phone videos is applied. Of several video tracks the default one is
    decoded, else the largest. Decoding starts at the last keyframe before the first wanted frame (where the file does
    not tell it, is damaged, or skip=False, at the start) and ends with the last wanted frame. Frames that cannot be
    decoded are left out, and a file that ends or breaks earlier just ends the iteration; if none of the wanted frames
    comes, the last one before them is yielded, or the first of all. No frame: VideoError. Every frame has the size of
    the first one yielded, also when the stream changes size in between.
    """
    reformatter = VideoReformatter()  # one for all frames: each would set up its own colour conversion otherwise

    def to_rgb(frame, width, height):
        try:
            image = reformatter.reformat(frame, format="rgb24", width=width, height=height).to_ndarray()
        except (av.FFmpegError, ValueError) as error:
            raise VideoError(f"{path}: its {frame.format.name} frames cannot be turned into RGB ({error})") from error
        return upright(image, frame)

    ends = wanted
    if isinstance(wanted, range):
        ends = wanted[0], wanted[-1]  # min and max would go through all of it
    first = min(ends)
    last = max(ends)
    start, stamps = keyframe_before(path, first) if skip and first > 0 else (0, [])
    skips = bool(stamps)
    done = -1      # number of the frame yielded last
    size = None    # of the frames yielded
    before = None  # (number, frame) to yield if none of the wanted ones comes
    reason = None
    try:
        with open_video(path) as container:
            stream = video_stream(container, path)
            stream.codec_context.thread_count = 1  # threads cost more than they save here, and workers are many
            has_stamps = has_true_stamps(container, stream)
            packets = container.demux(stream)
            if skips:
                stream.codec_context.options = {"err_detect": "explode"}  # no damage is painted over
                packets = dropwhile(lambda packet: packet.pts != stamps[0], packets)

            for k, (i, frame) in enumerate(numbered_frames(packets, start, has_stamps, skips)):
                # up to the first wanted frame, what comes must be what the packets promised
                if k < len(stamps) and (frame.pts != stamps[k] or k == 0 and not frame.key_frame):
                    raise ValueError("another frame came than its packets promised")
                if i in wanted:
                    size = size or (frame.width, frame.height)
                    yield i, to_rgb(frame, *size)
                    done = i
                elif before is None or i < first:
                    before = i, frame
                if i >= last:
                    break
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = error

    if skips and reason:  # the file is damaged, or two packets hold one frame: from the start
        for i, image in decode(path, wanted, skip=False):
            if i > done:
                yield i, image
    elif not size and before:
        i, frame = before
        yield i, to_rgb(frame, frame.width, frame.height)
    elif not size:
        raise VideoError(f"{path}: cannot be decoded as a video ({reason or 'not one frame in its video stream'})")


def read_frames(path, n_frames, start=0, stride=1):
    """Frames start, start + stride, ... as (n_frames, 3, H, W) uint8; a shorter video repeats its last frame."""
    assert n_frames > 0 and start >= 0 and stride > 0, (n_frames, start, stride)
    wanted = range(start, start + n_frames * stride, stride)
    images = {}
    for i, image in decode(path, wanted):
        images[i] = torch.from_numpy(np.ascontiguousarray(image))

    frames = torch.stack(without_gaps(images, wanted))
    return frames.permute(0, 3, 1, 2)  # (T,H,W,3) -> (T,3,H,W), a view


def without_gaps(images, wanted):
    """A list of the wanted ones of images {frame number: image}. One that is missing is as the one before it."""
    numbers = sorted(images)
    filled = []
    for i in wanted:
        place = max(0, bisect_right(numbers, i) - 1)
        filled.append(images[numbers[place]])
    return filled


def count_frames(path):
    """Number of frames: what the container says if that can be true, else packets are counted without decoding them. A
    file that was cut off can claim more than it holds."""
    try:
        with open_video(path) as container:
            stream = video_stream(container, path)
            claimed = stream.frames

            # a frame takes a byte at least; headers of fragmented files count the first fragment only, and those with
            # an edit list also what it cuts off
            by_duration = 0
            if stream.duration and stream.average_rate:
                by_duration = float(stream.duration * stream.time_base * stream.average_rate)
            is_close = abs(claimed - by_duration) < 2 + claimed / 1000
            if is_close and 0 < claimed <= os.path.getsize(path):
                return claimed
            return sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"{path}: cannot be read as a video: it is none, or was cut off ({error})") from error


# ----------------------------------------------------------------------------------------------------------------------
# motion vectors: what moved, as the video's encoder saw it

CELL = 4    # pixels: no block that carries a vector is smaller
BLOCK = 16  # pixels: side of a macroblock, in which frames are coded


def vector_lengths(vectors, height, width):
    """Motion vectors of one frame, PyAV's structured array -> (height / 4, width / 4, rounded up) their length in
    pixels in every cell; where several lie (frames predicted from two sides) their mean.

    A block that is coded afresh has no vector and counts as unmoved; to count it as moved by 4 to 16 pixels changed
    losses in eval.py by less than 3 %, in both directions."""
    # whole macroblocks
    n_rows = math.ceil(height / BLOCK) * BLOCK // CELL
    n_columns = math.ceil(width / BLOCK) * BLOCK // CELL
    total = np.zeros((n_rows, n_columns))
    count = np.zeros((n_rows, n_columns))

    # a vector's block; the file gives its centre, in pixels
    block_height = vectors["h"].astype(int)
    block_width = vectors["w"].astype(int)
    top = vectors["dst_y"] - block_height // 2
    left = vectors["dst_x"] - block_width // 2
    length = np.hypot(vectors["motion_x"], vectors["motion_y"])
    length = length / np.maximum(vectors["motion_scale"], 1)

    # one cell of all blocks at a time
    for dy in range(0, block_height.max(), CELL):
        for dx in range(0, block_width.max(), CELL):
            y = top // CELL + dy // CELL
            x = left // CELL + dx // CELL
            used = (dy < block_height) & (dx < block_width)
            used &= (y >= 0) & (y < n_rows)
            used &= (x >= 0) & (x < n_columns)
            cells = y[used], x[used]
            np.add.at(total, cells, length[used])
            np.add.at(count, cells, 1)

    mean = total / np.maximum(count, 1)
    return mean[:math.ceil(height / CELL), :math.ceil(width / CELL)]


def read_motion(path, n_frames, size, stride=1):
    """(n_frames, size, size) float32: how far, in pixels of the file, what lies here has moved since the clip frame
    before (the vectors of all source frames in between added up), 0 in the first frame. Frames and geometry are those
    of read_frames(path, n_frames, 0, stride) and resize_crop. None: no frame after the first has vectors.

    H.264, MPEG-4 and older codecs give vectors; HEVC, VP9, AV1 and codecs that code every frame by itself give none.
    PyAV does not hand out residuals, so a change that no vector describes (a light that goes on) is not seen. Vectors
    lead to the frame that a block was predicted from; with B-frames that may be several frames away, and nothing tells
    how many. VideoError: a file that cannot be decoded."""
    moved = []
    i = 0
    has_vectors = False
    reason = "not one frame in its video stream"
    try:
        with open_video(path) as container:
            stream = video_stream(container, path)
            stream.codec_context.options = {"flags2": "+export_mvs"}
            stream.codec_context.thread_count = 1
            has_stamps = has_true_stamps(container, stream)
            for i, frame in numbered_frames(container.demux(stream), has_stamps=has_stamps):
                if i > (n_frames - 1) * stride:
                    break
                vectors = frame.side_data.get("MOTION_VECTORS")
                if i == 0 or vectors is None or len(vectors) == 0:
                    lengths = np.zeros((frame.height, frame.width))
                else:
                    has_vectors = True
                    cells = vector_lengths(vectors.to_ndarray(), frame.height, frame.width)
                    lengths = cells.repeat(CELL, 0).repeat(CELL, 1)[:frame.height, :frame.width]
                lengths = torch.from_numpy(upright(lengths, frame).astype(np.float32))

                # a stream that changes size: all frames are given that of the first
                if moved and lengths.shape != moved[0].shape:
                    lengths = F.interpolate(lengths[None, None], moved[0].shape)[0, 0]

                # the first source frame after a clip frame begins the next clip frame's sum
                if i == 0 or (i - 1) % stride == 0:
                    moved.append(lengths)
                else:
                    moved[-1] = moved[-1] + lengths
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = error

    if not moved:
        raise VideoError(f"{path}: cannot be decoded as a video ({reason})")
    if i > 0 and not has_vectors:
        return None

    # a short video repeats its last frame, which does not move
    missing = n_frames - len(moved)
    moved += [torch.zeros_like(moved[0])] * missing
    return resize_center(torch.stack(moved).unsqueeze(1), size)[:, 0]


# ----------------------------------------------------------------------------------------------------------------------
# pixels

def random_box(h, w, generator=None):
    """(top, left, height, width) covering 0.3 to 1 of the area at aspect 3/4 to 4/3, torchvision's recipe."""
    def uniform(low, high):
        return low + (high - low) * torch.rand((), generator=generator).item()

    for _ in range(10):
        area = h * w * uniform(0.3, 1)
        aspect = math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
        box_w = round(math.sqrt(area * aspect))
        box_h = round(math.sqrt(area / aspect))
        if 0 < box_w <= w and 0 < box_h <= h:
            top = int(uniform(0, h - box_h + 1))
            left = int(uniform(0, w - box_w + 1))
            return top, left, box_h, box_w

    # very long pictures: the largest allowed centre box
    box_h = min(h, round(w * 4 / 3))
    box_w = min(w, round(h * 4 / 3))
    return (h - box_h) // 2, (w - box_w) // 2, box_h, box_w


def resize(x, size):  # (T, C, H, W) -> (T, C, *size)
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)


def resize_center(x, size):
    """(T, C, H, W) -> (T, C, size, size): shortest side to `size`, then the centre square."""
    h, w = x.shape[-2:]
    new_h = size * h // min(h, w)
    new_w = size * w // min(h, w)
    top = (new_h - size) // 2
    left = (new_w - size) // 2
    return resize(x, (new_h, new_w))[..., top:top + size, left:left + size].contiguous()


def resize_crop(frames, size, crop="center", generator=None):
    """(T, 3, H, W) uint8 -> (T, 3, size, size) uint8. "center": shortest side to `size`, then the centre square;
    "random": one random box for all frames, resized to the square. Antialiased bilinear on 8-bit values, like PIL.
    ValueError: frames of another kind."""
    check_frames(frames)
    assert crop in ("center", "random"), crop
    if crop == "center":
        return resize_center(frames, size)
    top, left, h, w = random_box(*frames.shape[-2:], generator)
    return resize(frames[..., top:top + h, left:left + w], (size, size)).contiguous()


def channel_statistics(device):
    """Mean and standard deviation (3, 1, 1) of the models' pixels."""
    mean = send(torch.tensor(IMAGE_MEAN), device)
    std = send(torch.tensor(IMAGE_STD), device)
    return mean.view(3, 1, 1), std.view(3, 1, 1)


def to_model_pixels(x):
    """Pixels 0..255 (uint8 or float, (..., 3, H, W)) -> float32 as the models expect them, on x's device: first -1..1,
    then ImageNet's mean and standard deviation. This is not ImageNet's own normalisation, which begins with 0..1."""
    mean, std = channel_statistics(x.device)
    return (x.float() / 127.5).sub_(1).sub_(mean).div_(std)  # in place: frames in tiles are large


def from_model_pixels(x):
    """What `to_model_pixels` made -> pixels in [0, 1], clamped, for pictures."""
    mean, std = channel_statistics(x.device)
    return ((x.float() * std + mean + 1) / 2).clamp(0, 1)


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

        names = []
        for name in os.listdir(folder / split):
            is_hidden = name.startswith(".")  # left-overs: half-written videos, "._x.mp4" from a Mac
            if name.lower().endswith(VIDEO_SUFFIXES) and not is_hidden:
                names.append(name)
        if not names:
            raise FileNotFoundError(f"no videos in {folder / split}: {layout}")
        videos += [f"{folder}/{split}/{name}" for name in sorted(names)]
    return videos


def video_key(path):
    """"dataset/split/file.mp4", the name of a video in a label file."""
    path = str(path)
    # only paths that are short or not plain: abspath takes seconds for a million
    if path.count("/") < 3 or "/." in path or "//" in path:
        path = os.path.abspath(path)
    return "/".join(path.split("/")[-3:])


def check_names(keys, where):
    """ValueError if two videos have one key: a label file could not tell them apart."""
    if len(set(keys)) < len(keys):
        raise ValueError(f"{where}: two folders have the same last name and video names, so one label would serve "
                         "two videos: rename one of the folders")


class Clips(torch.utils.data.Dataset):
    """Clips of <root>/<split>/.

    An item: {"video": (T, 3, size, size) uint8, "key", "path", "unreadable": files passed over to get it}; with
    `labels` (of lib/labels.py) also "gazing_pos" and "task_losses", lists of lists per frame, and only labelled videos
    are kept. Random start and crop depend on (seed, epoch, index) only, whatever process reads the clip and wherever a
    run was resumed. Index i + epoch · len(self) returns clip i with that epoch's start and crop.

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
        self.n_frames = n_frames
        self.size = size
        self.stride = stride
        self.random_start = random_start
        self.crop = crop
        self.seed = seed
        self.labels = labels
        self.paths = list_videos(root, split)
        self.videos = None  # with cache: (len(self), T, 3, size, size) uint8
        self.warned = set()

        if labels is not None:
            self.keep_labelled(root, split)
        if cache:
            self.decode_all()

    def keep_labelled(self, root, split):
        """Drop videos that have no label."""
        where = f"{root} ({split})"
        keys = [video_key(path) for path in self.paths]
        if isinstance(self.labels, dict):
            known = [key in self.labels for key in keys]
        else:
            known = self.labels.known(keys)

        n_videos = len(self.paths)
        self.paths = [path for path, is_known in zip(self.paths, known, strict=True) if is_known]
        if not self.paths:
            raise ValueError(f"no label fits a video of {where}: the videos are called like {keys[0]!r}, "
                             f"the labels like {next(iter(self.labels), 'nothing, the file is empty')!r}")
        check_names([video_key(path) for path in self.paths], where)

        if os.environ.get("RANK", "0") == "0":
            n = len(self.paths)
            print(f"labels: {n} videos of {where} have one, {n_videos - n} videos and {len(self.labels) - n} labels "
                  "are not used")

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
            more = " ..." if len(bad) > 3 else ""
            warnings.warn(f"dropped {len(bad)} of {len(errors)} videos, unreadable: {'; '.join(bad[:3])}{more}",
                          stacklevel=3)
            self.paths = [self.paths[i] for i in good]
            self.videos = self.videos[good]

    def read(self, path, draw=0):
        """Clip of one file; draw: number of the random start and crop."""
        start = 0
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + draw)
        if self.random_start:
            n_starts = count_frames(path) - (self.n_frames - 1) * self.stride
            start = int(torch.randint(max(n_starts, 1), (), generator=generator))
        frames = read_frames(path, self.n_frames, start, self.stride)
        return resize_crop(frames, self.size, self.crop, generator)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        draw = index
        index = index % len(self)
        video = None
        unreadable = []

        # the clip asked for, else the next one that can be read
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
            item["gazing_pos"] = label["gazing_pos"]
            item["task_losses"] = label["task_losses"]
        return item


def collate(items):
    """Items of `Clips` -> one batch: video (B, T, 3, R, R) uint8, lists of key, path and (labelled clips) gazing_pos
    and task_losses as they are; unreadable files of all items in one list."""
    batch = {name: [item[name] for item in items] for name in items[0]}
    batch["video"] = torch.stack(batch["video"])
    batch["unreadable"] = sum(batch["unreadable"], [])
    return batch


def collate_gaze(gazing_pos, task_losses, n_ids):
    """Gazes as lists (B) of lists (T) of ids + V*t -> gazing (see gazing.py), with task_losses (same nesting, or None)
    also task_losses (B, N) float32. A frame has as many slots as the longest of the batch; padded slots hold id V and
    the frame's last loss (0 if it has none). The lists are left as they are."""
    n_frames = len(gazing_pos[0])
    assert all(len(clip) == n_frames for clip in gazing_pos), [len(clip) for clip in gazing_pos]
    n_slots = []
    for t in range(n_frames):
        n_slots.append(max(len(clip[t]) for clip in gazing_pos))

    positions = []
    padded = []
    losses = []
    for b, clip in enumerate(gazing_pos):
        for t, ids in enumerate(clip):
            missing = n_slots[t] - len(ids)
            positions += ids
            positions += [n_ids * t + n_ids] * missing
            padded += [False] * len(ids)
            padded += [True] * missing
            if task_losses is not None:
                values = task_losses[b][t]
                assert len(values) == len(ids), (b, t, len(values), len(ids))
                last = values[-1] if len(values) else 0.0
                losses += values
                losses += [last] * missing

    shape = (len(gazing_pos), sum(n_slots))
    gazing = {"gazing_pos": torch.tensor(positions, dtype=torch.int64).view(shape),
              "if_padded_gazing": torch.tensor(padded, dtype=torch.bool).view(shape),
              "num_gazing_each_frame": torch.tensor(n_slots, dtype=torch.int64)}
    if task_losses is not None:
        gazing["task_losses"] = torch.tensor(losses, dtype=torch.float32).view(shape)
    return gazing


def main():
    from lib.labels import pack_labels
    if sys.argv[1:2] != ["pack"] or len(sys.argv) not in (3, 4):
        raise ValueError("usage: python data.py pack labels.json [labels.packed]")
    pack_labels(*sys.argv[2:])


if __name__ == "__main__":
    from lib.run import launch
    launch(main)
