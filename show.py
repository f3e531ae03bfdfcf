"""Where does the model look in my video?

    python show.py --video=my.mp4                                                   # by the model in weights/small
    python show.py --video=my.mp4 --ckpt=out/toy/grpo --videomae=out/toy/videomae   # by your own
    python show.py --video=my.mp4 --gazing_ratio=0.05 --start=12 --duration=10      # ten seconds from 12 s on
    python show.py --video=my.mp4 --scale=1 --fps=2                                 # whole frames at native size
    python show.py --video=/dev/video0                                              # live; also a pipe (-: stdin), URL

Looks at the centre square of the picture, or with --scale at the whole picture, resized by it and laid out in tiles of
the model's input size. A file is gazed at in chunks as long as the model's training clips, live frames one by one in
windows as long; each starts afresh, so live and file give the same gazes. Writes into the folder --out:

    overlay.mp4   side by side: video, gazed patches of every scale at its resolution, reconstruction (with --videomae)
    sheet.png     the first chunk, frame by frame; with --scale the overlay's frames, one below another
    gaze.json     in numbers: settings, ratio, gazes per frame, share per scale, milliseconds per frame
    gaze.npz      the whole video as one gazing of B = 1 (see gazing.py), 8 bytes a gaze: gazing_pos (1, N), without
                  padded slots; if_padded_gazing (1, N); num_gazing_each_frame (T,); with --videomae also loss (T,).
                  And what leads back to the source: scales, patch_size, source_frame (T,), source_size, crop (top,
                  left, side) and grids (S, 2), the rows and columns of patches at each scale, so that
                  gazing.locate(gazing, config, crop=crop, grids=grids) gives boxes in pixels of the source.

To train another model on a model's gazes, label.py --teacher=<ckpt> writes labels: they need a loss after every gaze.
Ctrl-C and SIGTERM end the run early with complete files; the second time nothing half-written is left. Live frames are
never dropped: when the model is slower than a pipe, its writer waits; a camera's driver drops frames itself.
"""
import json
import math
import os
import queue
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import chain, count, islice
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import gazing
import model
from data import (
    VideoError,
    count_frames,
    decode,
    open_stream,
    open_video,
    resize,
    to_model_pixels,
    upright,
    video_stream,
)
from lib import configurator, run, video_out
from lib.checkpoint import take_output
from lib.text import write_whole
from lib.weights import is_hub_id
from model import Gaze
from videomae import VideoMAE, check_fit

SMALL = Path(__file__).parent / "weights" / "small"  # trained on real videos, see the README there


@dataclass
class Config:
    video: str = ""                    # the file to look at; live: a camera (/dev/video0), a pipe (-: stdin), a URL
    live: bool | None = None           # gaze at frames one by one as they come; none: if video is no regular file
    ckpt: str = "small"                # gaze model: small (that in weights/small), a folder or a hub id
    videomae: str | None = None        # reconstructor of the same scales, a folder or file; none: that of ckpt=small
                                       # for a file's centre square, else no reconstruction
    out: str | None = None             # folder for the results; none: out/gaze/<name of the video>
    # how much to look; both none: the model's own settings
    gazing_ratio: float | None = None  # share of the patch ids that each frame may take
    task_loss_requirement: float | None = None  # a frame is finished when its predicted loss falls to this
    scale: float | None = None         # whole frames in tiles, at this share of their size; none: the centre square
    # which frames
    start: float = 0.0                 # seconds, by the average frame rate
    duration: float | None = None      # seconds from start; none: to the end
    max_frames: int = 0                # stop after so many; 0: at the end
    fps: float | None = None           # frames per second to look at; none: all
    # run
    batch_size: int = 16               # with scale: tiles at once in the model
    device: str = "auto"               # auto | cpu | cuda
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # autocast; auto: float32 on a CPU, else bfloat16
    tf32: bool = True                  # on a GPU: what stays in float32 is multiplied in TF32 (10 bits of mantissa)

    def check(self):
        if not self.video:
            raise ValueError("no video given: write --video=my.mp4")
        configurator.check_at_least(self, batch_size=1, start=0, max_frames=0)
        if self.gazing_ratio is not None:
            configurator.check_share(self, "gazing_ratio")
        if self.duration is not None and self.duration <= 0:
            raise ValueError(f"duration={self.duration} must be above 0 seconds")
        if self.scale is not None and not 0 < self.scale <= 4:
            raise ValueError(f"scale={self.scale} must lie in (0, 4]; 1 is the video's own size")
        if self.fps is not None and not 0.001 <= self.fps <= 1000:
            raise ValueError(f"fps={self.fps} must lie in 0.001 to 1000")

        # the repository's own model comes with a reconstructor
        if self.ckpt == "small":
            self.ckpt = str(SMALL / "gaze")
            if self.videomae is None and self.scale is None and not self.is_live():
                self.videomae = str(SMALL / "videomae")

    def is_live(self):
        if self.live is not None:
            return self.live
        if self.video == "-" or self.video.startswith("pipe:") or "://" in self.video:
            return True
        path = Path(self.video)
        return path.exists() and not path.is_file() and not path.is_dir()


# ----------------------------------------------------------------------------------------------------------------------
# frames from files, pipes and cameras


def probe(path):
    """Number of frames, frames per second (a Fraction) and upright (height, width) of a file."""
    if not Path(path).is_file():
        reason = "a folder, not a file" if Path(path).is_dir() else f"no such file (looked from {os.getcwd()})"
        raise FileNotFoundError(f"video={path}: {reason}")
    n_frames = max(1, count_frames(path))
    with open_video(path) as container:
        stream = video_stream(container, path)
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    _, image = next(decode(path, {0}))
    return n_frames, rate, image.shape[:2]


def choose_frames(cfg, rate, end=math.inf):
    """Indices below `end` of the source frames to look at, one by one, ascending: with fps those that show then."""
    step = 1
    if cfg.fps:
        if cfg.fps > 1.01 * rate:  # 30 of 29.97 is meant to be all
            raise ValueError(f"fps={cfg.fps:g} is above the video's {float(rate):.4g}: lower it")
        step = max(1, rate / Fraction(cfg.fps).limit_denominator(10_000))

    first = round(cfg.start * rate)
    if cfg.duration:
        n = max(1, round(cfg.duration * rate))
        end = min(end, first + n)
    for k in range(cfg.max_frames or sys.maxsize):
        i = first + math.floor(k * step)
        if i >= end:
            return
        yield i


def read_file(path, indices):
    """Yield (index in the source, upright (H, W, 3) uint8) of a file's frames."""
    for i, image in decode(path, set(indices)):
        if i < indices[0]:  # decode gives the last frame if there are fewer than the container said
            raise VideoError(f"{path}: ends after frame {i}, before the start, frame {indices[0]}: start earlier")
        yield i, image


def read_live(cfg):
    """Yield (frames per second, index in the source, upright (H, W, 3) uint8) of frames as they come; all have the size
    of the first one."""
    try:
        with open_stream(cfg.video) as container:
            stream = video_stream(container, cfg.video)
            stream.codec_context.thread_count = 1  # with more, the decoder holds back as many frames
            rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            indices = choose_frames(cfg, rate)
            wanted = next(indices)
            size = {}
            for i, frame in enumerate(container.decode(stream)):
                if i < wanted:
                    continue
                size = size or {"width": frame.width, "height": frame.height}
                yield rate, i, upright(frame.to_ndarray(format="rgb24", **size), frame)
                wanted = next(indices, None)
                if wanted is None:
                    return
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"{cfg.video}: cannot be read as a video stream ({error}); an MP4 can be piped only if its "
                         "index comes first: ffmpeg -movflags faststart") from error


def in_background(items, stop):
    """Yield (*item, time when it came). A thread reads them, so that Ctrl-C works while a camera or pipe is silent."""
    found = queue.Queue(2)

    def put(item):
        came = time.perf_counter()
        while not stop.is_set():
            try:
                found.put((item, came), timeout=0.2)
                return
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
    while not stop.is_set():
        try:
            item, came = found.get(timeout=0.1)
        except queue.Empty:
            continue
        if item is None:
            return
        if isinstance(item, Exception):
            raise item
        yield *item, came


@contextmanager
def stop_on_signals():
    """An event that Ctrl-C or SIGTERM sets; the second time they interrupt at once."""
    stop = threading.Event()

    def interrupted(*_):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, interrupted) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------------------------------
# what of the picture is looked at, and how it is drawn


class View:
    """The centre square of a picture as one tile, or the whole picture, resized by `scale`, as rows x columns tiles of
    the model's input size R. config: GazeConfig; source_size: (height, width)."""

    def __init__(self, config, source_size, scale):
        R = config.image_size
        self.config = config
        self.source_size = source_size
        self.is_tiled = scale is not None
        if self.is_tiled:
            self.size = tuple(max(1, round(n * scale)) for n in source_size)
            self.crop = (0, 0, R / scale)
        else:
            self.size = (R, R)
            self.crop = gazing.centre_square(source_size)

        # patches with a pixel in them; tiles are padded with zeros to whole patches
        height, width = self.size
        p = config.patch_size
        self.grids = []
        for side in config.scale_list:
            per_tile = side // p
            self.grids.append((math.ceil(height * per_tile / R), math.ceil(width * per_tile / R)))
        self.target_scales = [(n_rows * p, n_columns * p) for n_rows, n_columns in self.grids]
        self.tiling = gazing.Tiling(config, self.target_scales, p)
        self.num_ids = sum(n_rows * n_columns for n_rows, n_columns in self.grids)

        # in the overlay: side of a tile, and size of a panel
        longest = max(self.tiling.rows, self.tiling.columns)
        self.drawn_tile = R * max(1, round(288 / R)) if longest == 1 else max(1, 480 // longest)
        self.panel = tuple(max(1, round(n * self.drawn_tile / R)) for n in self.size)

    def __str__(self):
        if self.is_tiled:
            height, width = self.size
            return f"{width}x{height} pixels in {self.tiling.rows} rows x {self.tiling.columns} columns of tiles"
        top, left, side = self.crop
        return f"{side}x{side} pixels at x={left}, y={top}"

    def cut(self, image):
        """(H, W, 3) uint8 -> the frame for the model (3, h, w), model pixels, and a picture of panel size."""
        if not self.is_tiled:
            top, left, side = self.crop
            image = image[top:top + side, left:left + side]
        pixels = torch.from_numpy(np.ascontiguousarray(image))
        pixels = pixels.permute(2, 0, 1).unsqueeze(0)
        picture = resize(pixels, self.panel)[0]
        frame = to_model_pixels(resize(pixels, self.size))[0]

        below = self.tiling.size[0] - self.size[0]
        right = self.tiling.size[1] - self.size[1]
        frame = F.pad(frame, (0, right, 0, below))
        return frame, picture.permute(1, 2, 0).contiguous().numpy()

    def draw(self, picture, frame, where, labels, reconstruction=None):
        """One frame of the overlay. where: of its gazes, see gazing.locate; labels: a text per panel."""
        rows = self.tiling.rows
        columns = self.tiling.columns
        height, width = self.panel
        tile = self.drawn_tile
        below = rows * self.config.image_size - frame.shape[1]
        right = columns * self.config.image_size - frame.shape[2]
        whole = F.pad(frame, (0, right, 0, below))

        panels = [picture]
        colors = ["white"]
        for s, side in enumerate(self.config.scale_list):
            boxes = where["box"][0, where["scale"][0] == s]
            color = gazing.SCALE_COLORS[s % len(gazing.SCALE_COLORS)]

            # gazed patches as this scale resolves them, on the darkened picture
            resolved = gazing.to_picture(whole, (rows * side, columns * side))
            resolved = video_out.resize(resolved, rows * tile, columns * tile)
            panel = (0.45 * picture).astype(np.uint8)
            gazing.paste_patches(panel, resolved[:height, :width], boxes)

            # no outline where it would hide the patch
            patch = tile * self.config.patch_size / side
            line_width = min(2, int(patch / 8))
            if line_width:
                panel = video_out.draw_boxes(panel, boxes[:, [1, 0, 3, 2]], color, line_width)
            panels.append(panel)
            colors.append(color)

        if reconstruction is not None:
            panels.append(video_out.resize(gazing.to_picture(reconstruction), height, width))
            colors.append("white")
        return video_out.side_by_side(panels, labels, colors)


# ----------------------------------------------------------------------------------------------------------------------
# looking. Both yield, per frame, a dict: source_frame, frame, picture, ids (n,) of its gazes, ms, reconstruction, loss


def load_models(cfg, device):
    if not Path(cfg.ckpt).exists() and not is_hub_id(cfg.ckpt):
        raise FileNotFoundError(f"ckpt={cfg.ckpt}: no such folder; `make toy` and train_grpo.py write one")
    gaze = Gaze.from_pretrained(cfg.ckpt).to(device).eval()
    if cfg.videomae is None:
        return gaze, None

    try:
        mae = VideoMAE.from_pretrained(cfg.videomae).to(device).freeze()
    except ValueError as error:
        raise ValueError(f"videomae={cfg.videomae} is no reconstructor: {error}") from error
    check_fit(mae, gaze, cfg.ckpt)
    if mae.config.max_num_frames < gaze.config.max_num_frames:
        raise ValueError(f"videomae={cfg.videomae} is for {mae.config.max_num_frames} frames, {cfg.ckpt} for "
                         f"{gaze.config.max_num_frames}: give one that fits")
    return gaze, mae


def choose_patches(cfg, gaze, view, video):
    """The gazing of one chunk (1, T, 3, h, w)."""
    if not view.is_tiled:
        return gaze.generate(video, cfg.gazing_ratio, cfg.task_loss_requirement)

    tiles = view.tiling.cut(video)
    gazing = gaze.generate(tiles, cfg.gazing_ratio, cfg.task_loss_requirement, batch_size=cfg.batch_size)
    return view.tiling.join(gazing["gazing_mask"])


def look_at_file(cfg, gaze, mae, view, indices, device, stop):
    """Chunk by chunk; at least one."""
    frames = read_file(cfg.video, indices)
    while True:
        chunk = list(islice(frames, gaze.config.max_num_frames))
        if not chunk:
            return
        cuts = [view.cut(image) for _, image in chunk]
        video = torch.stack([frame for frame, _ in cuts]).unsqueeze(0).to(device)

        t0 = time.perf_counter()
        chosen = gazing.one_clip(choose_patches(cfg, gaze, view, video), 0)  # on the CPU: waits for the device
        ms = 1000 * (time.perf_counter() - t0) / len(chunk)
        if mae is not None:
            reconstruction, loss = mae(video, gazing.to_device(chosen, device), range(len(chunk)))

        for t, (positions, padded) in enumerate(gazing.split_frames(chosen)):
            frame, picture = cuts[t]
            looked = {"source_frame": chunk[t][0], "frame": frame, "picture": picture, "ms": ms}
            looked["ids"] = positions[~padded] - view.num_ids * t
            if mae is not None:
                looked["reconstruction"] = reconstruction[0, t].cpu()
                looked["loss"] = loss[0, t].item()
            yield looked
        if stop.is_set():
            return


def look_live(cfg, gaze, view, frames, device):
    """Frame by frame, as they come; ms is the time from coming to gaze, with the wait for the frame before."""
    for n in count():
        try:
            _, i, image, came = next(frames)
        except StopIteration:
            return
        except VideoError as error:
            print(f"note: {error}")  # a stream that breaks is a stream that ends
            return

        if n % gaze.config.max_num_frames == 0:
            stream = gaze.stream(1, cfg.gazing_ratio, cfg.task_loss_requirement)
        frame, picture = view.cut(image)
        chosen = stream.step(frame.unsqueeze(0).to(device))
        ids = chosen["gazing_pos"][~chosen["if_padded_gazing"]].cpu()
        ms = 1000 * (time.perf_counter() - came)
        yield {"source_frame": i, "frame": frame, "picture": picture, "ids": ids, "ms": ms}


# ----------------------------------------------------------------------------------------------------------------------
# the files


def label_panels(view, rate, frame, where):
    """What stands above the panels of a frame of the overlay, and the number of gazes of each scale."""
    n_gazes = len(frame["ids"])
    per_scale = where["scale"][0].bincount(minlength=len(view.grids)).tolist()
    seconds = float(frame["source_frame"] / rate)
    ratio = 100 * n_gazes / view.num_ids

    labels = [f"frame {frame['source_frame']}  {seconds:.2f} s  {ratio:.1f} % gazed"]
    for s, side in enumerate(view.config.scale_list):
        n_patches = math.prod(view.grids[s])
        labels.append(f"scale {side} px: {per_scale[s]} of {n_patches}")
    if "loss" in frame:
        labels.append(f"reconstruction, loss {frame['loss']:.3f}")
    return labels, per_scale


def write_frames(cfg, view, rate, looked, total, out):
    """Write overlay.mp4 and sheet.png while frames come. Returns what gaze.npz and gaze.json are made of, per frame."""
    rows = []   # without pictures: a long video stays small in memory
    shown = []  # the first chunk, with the overlay's frames
    with video_out.VideoWriter(out / "overlay.mp4", cfg.fps or rate) as film:
        for frame in tqdm(looked, total=total, unit="frame"):
            one = gazing.from_lists([frame["ids"].unsqueeze(0)], view.num_ids, "cpu")
            where = gazing.locate(one, view.config, crop=(0, 0, view.drawn_tile), grids=view.grids)
            labels, per_scale = label_panels(view, rate, frame, where)
            drawn = view.draw(frame["picture"], frame["frame"], where, labels, frame.get("reconstruction"))
            film.write(drawn)

            if len(shown) < view.config.max_num_frames:
                shown.append(frame | {"drawn": drawn})
            row = {"per_scale": per_scale}
            for key in ("source_frame", "ids", "ms", "loss"):
                if key in frame:
                    row[key] = frame[key]
            rows.append(row)
    write_sheet(cfg, view, shown, out / "sheet.png")
    return rows


def write_sheet(cfg, view, shown, path):
    if view.is_tiled:
        video_out.save_picture(path, np.concatenate([frame["drawn"] for frame in shown]))
        return
    one = gazing.from_lists([frame["ids"].unsqueeze(0) for frame in shown], view.num_ids, "cpu")
    reconstruction = None
    losses = None
    if "loss" in shown[0]:
        reconstruction = [frame["reconstruction"] for frame in shown]
        losses = [frame["loss"] for frame in shown]
    title = f"{Path(cfg.video).name}, source frames {shown[0]['source_frame']} to {shown[-1]['source_frame']}"
    gazing.sheet(path, [frame["frame"] for frame in shown], one, view.config, reconstruction, title, losses)


def write_numbers(cfg, view, rate, rows, out):
    """Write gaze.npz and gaze.json, and print what they say."""
    config = view.config
    whole = gazing.from_lists([row["ids"].unsqueeze(0) for row in rows], view.num_ids, "cpu")
    arrays = {key: tensor.numpy() for key, tensor in whole.items()}
    arrays["source_frame"] = np.array([row["source_frame"] for row in rows])
    arrays["source_size"] = view.source_size
    arrays["crop"] = view.crop
    arrays["grids"] = view.grids
    arrays["scales"] = config.scales
    arrays["patch_size"] = config.patch_size
    if "loss" in rows[0]:
        arrays["loss"] = np.array([row["loss"] for row in rows])
    with video_out.written_whole(out / "gaze.npz") as temporary:
        np.savez(temporary, **arrays)

    # the same in numbers
    n = len(rows)
    counts = np.array([len(row["ids"]) for row in rows])
    per_scale = np.array([row["per_scale"] for row in rows]).sum(0)
    ms = np.array([row["ms"] for row in rows])
    numbers = {"model": model.describe(config), "source_size": view.source_size, "source_fps": float(rate)}
    numbers["frames"] = n
    numbers["ratio"] = counts.sum() / (n * view.num_ids)
    numbers["gazes_per_frame"] = {"mean": counts.mean(), "min": int(counts.min()), "max": int(counts.max())}
    numbers["share_per_scale"] = {}
    for s, side in enumerate(config.scale_list):
        numbers["share_per_scale"][str(side)] = per_scale[s] / max(counts.sum(), 1)
    numbers["ms_per_frame"] = {}
    for q in (50, 90, 99, 100):
        numbers["ms_per_frame"][f"{q} %"] = round(np.percentile(ms, q), 2)
    if "loss" in arrays:
        numbers["reconstruction_loss"] = arrays["loss"].mean()
    text = json.dumps({"settings": asdict(cfg)} | numbers, indent=1, default=float)
    write_whole(out / "gaze.json", text + "\n")
    for key, value in json.loads(text).items():
        if key != "settings":
            print(f"{key}: {value}")


# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    live = cfg.is_live()
    if live and (cfg.videomae or cfg.scale):
        raise ValueError("live frames are gazed at in their centre square: leave out --scale, --videomae")
    if cfg.scale and cfg.videomae:
        raise ValueError("a reconstruction is shown of centre squares: leave out --scale or --videomae")
    if not live:
        n_source, rate, size = probe(cfg.video)
        if round(cfg.start * rate) >= n_source:
            raise ValueError(f"start={cfg.start:g} lies beyond the end of {cfg.video}, {float(n_source / rate):.2f} s")
        indices = list(choose_frames(cfg, rate, n_source))

    _, _, device = run.init_processes(cfg.device)
    gaze, mae = load_models(cfg, device)
    out = Path(cfg.out or f"out/gaze/{Path(cfg.video).stem}")
    take_output(out)
    print(f"{cfg.ckpt}: {model.describe(gaze.config)}; {device}")

    autocast, _ = run.precision(cfg, device)
    with stop_on_signals() as stop, autocast:
        if live:
            frames = in_background(read_live(cfg), stop)
            first = next(frames, None)
            if first is None:
                raise VideoError(f"{cfg.video}: ended before the first frame to look at")
            rate, _, image, _ = first
            view = View(gaze.config, image.shape[:2], cfg.scale)
            looked = look_live(cfg, gaze, view, chain([first], frames), device)
            total = None
        else:
            view = View(gaze.config, size, cfg.scale)
            looked = look_at_file(cfg, gaze, mae, view, indices, device, stop)
            total = len(indices)

        height, width = view.source_size
        amount = f"{total} of {n_source} frames" if total else "live"
        print(f"{cfg.video}: {width}x{height}, {float(rate):.4g} fps; {view}; {amount}; Ctrl-C ends")
        rows = write_frames(cfg, view, rate, looked, total, out)
        write_numbers(cfg, view, rate, rows, out)

    if total and len(rows) < total:
        reason = "stopped" if stop.is_set() else f"{cfg.video} ends or breaks"
        print(f"note: {reason} after frame {rows[-1]['source_frame']}: {len(rows)} frames, not {total}")
    print(f"overlay.mp4, sheet.png, gaze.json and gaze.npz are in {out}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    run.launch(main, VideoError)
