"""Pictures for show.py: what is in a file, frames as they come from cameras, pipes and URLs, and what of a picture is
looked at."""
import os
import queue
import select
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from data import VideoError, count_frames, resize, resize_crop, to_model_pixels, upright, video_stream
from gazing import Tiling


def probe(path):
    """Number of frames, frames per second (a Fraction), anticlockwise quarter turns that set the picture upright, and
    its upright (height, width). Raises FileNotFoundError, VideoError."""
    if not Path(path).is_file():
        what = "a folder, not a file" if Path(path).is_dir() else f"no such file (looked from {os.getcwd()})"
        raise FileNotFoundError(f"video={path}: {what}")
    n_frames = count_frames(path)
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = video_stream(container, path)
            frame = next(container.decode(stream), None)
            rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"{path}: cannot be decoded as a video ({error})") from error
    if frame is None:
        raise VideoError(f"{path}: not one frame in its video stream")
    size = upright(np.zeros((frame.height, frame.width)), frame).shape
    return max(n_frames, 1), rate, size != (frame.height, frame.width), size


def read_live(path, picks):
    """Yield (rate, index in the source, upright (H, W, 3) uint8) when they come, of the frames that picks(rate), an
    iterator of indices, names; all of the size of the first. VideoError, also when the stream breaks later."""
    try:
        camera = "v4l2" if path.startswith("/dev/video") else None
        with av.open(path, format=camera, metadata_errors="ignore") as container:
            stream = video_stream(container, path)
            stream.codec_context.thread_count = 1  # with more, the decoder holds back as many frames
            rate, size = stream.average_rate or stream.guessed_rate or Fraction(25), {}
            indices = picks(rate)
            wanted = next(indices)
            for i, frame in enumerate(container.decode(stream)):
                if i == wanted:
                    size = size or {"width": frame.width, "height": frame.height}
                    yield rate, i, upright(frame.to_ndarray(format="rgb24", **size), frame)
                    wanted = next(indices, None)
                if wanted is None:
                    return
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: cannot be read as a video stream ({error}); an MP4 can be piped only if its index "
                         "comes first: ffmpeg -movflags faststart") from error


def in_background(items, stop):
    """Yield (*item, time when it came). A thread reads them, so that a silent camera or pipe can still be left."""
    found = queue.Queue(2)

    def put(item):
        came = time.perf_counter()
        while not stop.is_set():
            try:
                return found.put((item, came), timeout=0.2)
            except queue.Full:
                pass

    def read():
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(None)
        except Exception as error:  # whatever it is, it belongs to the main thread
            put(error)

    threading.Thread(target=read, daemon=True).start()
    while not stop.is_set() and not typed_q():
        try:
            item, came = found.get(timeout=0.1)
        except queue.Empty:
            continue
        if item is None:
            return
        if isinstance(item, Exception):
            raise item
        yield *item, came


def typed_q():
    """Whether q and Enter were typed. Reads from a terminal only, and not from the background: that stops a job."""
    if not os.isatty(0) or not select.select([0], [], [], 0)[0]:
        return False
    try:
        return os.tcgetpgrp(0) == os.getpgrp() and b"q" in os.read(0, 4096)
    except OSError:  # a terminal, but not ours
        return False


class View:
    """What of the picture is looked at: the centre square as one tile, or the whole, resized by `scale`, as rows x
    columns tiles of the model's input size R, padded right and bottom. c: GazeConfig; size: (height, width)."""

    def __init__(self, c, size, scale):
        self.source_size, (height, width), self.R, side = size, size, c.image_size, min(size)
        per_tile = [s // c.patch_size for s in c.scale_list]
        if scale is None:
            self.crop = (height - side) // 2, (width - side) // 2, side
            self.size = self.tiling = self.inside = None
            self.rows = self.columns = 1
            self.grids, content = [(g, g) for g in per_tile], (self.R, self.R)
            self.q = self.R * max(1, round(288 / self.R))  # of a tile in the overlay: patches end on pixels
        else:
            self.size = content = tuple(max(1, round(n * scale)) for n in size)
            self.crop = 0, 0, self.R / scale
            self.grids = [tuple(-(-n * g // self.R) for n in content) for g in per_tile]  # patches with a pixel in them
            self.tiling = Tiling(c, [(h * c.patch_size, w * c.patch_size) for h, w in self.grids], c.patch_size)
            self.rows, self.columns = self.tiling.rows, self.tiling.columns
            self.q = per_tile[-1] * max(1, round(480 / (max(self.rows, self.columns) * per_tile[-1])))
            self.inside = self.split(torch.ones(1, *content, dtype=torch.bool))  # (n, 1, R, R)
        self.per_tile, self.n_tiles = per_tile, self.rows * self.columns
        self.panel = tuple(max(1, round(n * self.q / self.R)) for n in content)
        self.n_ids = [h * w for h, w in self.grids]
        if (len(per_tile) + 1) * self.panel[1] > 15_000:
            raise ValueError(f"scale={scale} makes {self.rows}x{self.columns} tiles, too many to draw: lower it")

    def __str__(self):
        if self.tiling:
            return f"{self.size[1]}x{self.size[0]} pixels in {self.rows} rows x {self.columns} columns of tiles"
        return "{2}x{2} pixels at x={1}, y={0}".format(*self.crop)

    def split(self, x):  # (C, h, w) -> tiles (n, C, R, R)
        x = F.pad(x, (0, self.columns * self.R - x.shape[2], 0, self.rows * self.R - x.shape[1]))
        return rearrange(x, "c (i h) (j w) -> (i j) c h w", i=self.rows, j=self.columns)

    def cut(self, image):
        """(H, W, 3) uint8 -> tiles (n, 3, R, R) for the model and picture (3, h, w) for the viewer, both uint8."""
        if self.size is None:
            top, left, side = self.crop
            square = torch.from_numpy(image[top:top + side, left:left + side].copy()).permute(2, 0, 1)[None]
            return resize_crop(square, self.R), resize_crop(square, self.q)[0]
        whole = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
        return self.split(resize(whole, self.size)[0]), resize(whole, self.panel)[0]

    def to_model_pixels(self, tiles, which=slice(None)):
        """Tiles (n, ..., 3, R, R) uint8, those numbered `which` -> what the model wants; padding is 0."""
        x = to_model_pixels(tiles)
        if self.inside is None:
            return x
        inside = self.inside[which].to(x.device)
        return x.mul_(inside if x.dim() == 4 else inside[:, None])
