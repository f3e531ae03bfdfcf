"""Where does the model look in my video?

    python show.py --video=my.mp4 --ckpt=out/toy/grpo --videomae=out/toy/videomae
    python show.py --video=my.mp4 --gazing_ratio=0.05 --start=12 --max_frames=0     # from 12 s to the end
    python show.py --video=my.mp4 --scale=1 --duration=60 --fps=2                   # whole frames at native size
    python show.py --video=/dev/video0                                        # live; also a pipe (-: stdin), a URL

Takes the centre square of the picture, or with --scale the whole picture, resized by it and laid out in tiles of the
model's input size, the last ones padded with zeros. Cuts the video into chunks as long as the model's training clips
(each starts afresh), and writes into the folder --out:
    overlay.mp4   side by side: video, gazed patches of every scale at its resolution, reconstruction (with --videomae);
                  above: number of the source frame, its time by the average frame rate, how much is gazed
    sheet.png     one chunk, frame by frame; with --scale and live the overlay's frames of that chunk, one below another
    gaze.json     in numbers: settings, ratio, gazes per frame, share per scale, seconds per stage or (live) latency
    gaze.npz      the whole video as one gaze of B = 1, see model.py: gazing_pos (1, N) = patch id + V * frame, without
                  padded slots; if_padded_gazing (1, N); num_gazing_each_frame (T,). And what leads back to the source:
                  scales, patch_size, source_frame (T,), source_size (height, width), crop (top, left, side): of a scale
                  with g x g patches, row y, column x starts at pixel (top + y * side / g, left + x * side / g).
                  With --scale `side` is a tile's, ids of a frame ascend, and grids (S, 2) are the rows and columns of
                  patches that a whole frame has at each scale: V is the sum of their products. Patches that lie in the
                  padding are gone, those that reach into it are kept, so that no pixel is out of reach.
                  With --videomae also loss (T,), of each frame's reconstruction.

In memory are the frames of one batch of chunks (with many tiles of one chunk) and what the model needs for
--batch_size tiles; gazes go to disk as they come, so a video may be long. Decoding begins at the keyframe before
--start. Phone videos that are stored turned are set upright; sizes and crop are of the upright picture. The square is
cut before resizing, to have whole source pixels, while training resizes first: unless a video is square, the model's
pixels are shifted by up to one against data.Clips.

Live: every frame is gazed at when it comes, until the stream ends, q and Enter, or Ctrl-C; the files are then complete.
After max_num_frames frames a new stream begins, which remembers nothing, as each chunk of a file does: the model was
trained on clips of that length and knows no later position. So live and file give the same gazes, and neither memory
nor time per frame grows. It costs gazes: a window's first frame has to be seen anew. No frame is dropped: when the
model is slower than a pipe, its writer waits; a camera's driver drops frames itself. Cameras by name work on Linux.
"""
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import zipfile
from collections import deque
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import count, islice
from pathlib import Path

import av
import numpy as np
import torch
from tqdm import tqdm

import model
import source
import viz
from data import VideoError, decode
from gazing import one_clip
from lib import configurator, run
from lib.weights import is_hub_id
from model import Gaze
from source import View
from videomae import VideoMAE, check_fit


@dataclass
class Config:
    video: str = ""                    # the file to look at; live: a camera (/dev/video0), a pipe (-: stdin), a URL
    live: bool | None = None           # gaze at frames one by one as they come; none: if video is no regular file
    ckpt: str = "out/toy/grpo"         # gaze model: a folder or a hub id
    videomae: str | None = None        # reconstructor of the same scales, a folder or file; none: no reconstruction
    out: str | None = None             # folder for the results; none: out/gaze/<name of the video>
    # how much to look; both none: the model's own settings
    gazing_ratio: float | None = None  # share of the patch ids that each frame may take
    task_loss_requirement: float | None = None  # a frame is finished when its predicted loss falls to this
    scale: float | None = None         # whole frames in tiles, at this share of their size; none: the centre square
    # which frames
    start: float = 0.0                 # seconds, by the average frame rate
    duration: float | None = None      # seconds from start; none: max_frames
    fps: float | None = None           # to look at per second, and of overlay.mp4; with a stride: of overlay.mp4 only
    stride: int | None = None          # source frames per model frame; none: 1, or what fps says
    max_frames: int | None = None      # 0: all to the end; none: 128, or all when live or with a duration
    # output
    sheet_chunk: int = 0               # which chunk sheet.png shows
    # run
    batch_size: int = 4                # chunks, with scale tiles, at once in the model: small ones are faster with more
    device: str = "auto"               # auto | cpu | cuda

    def check(self):
        if not self.video:
            raise ValueError("no video given: write --video=my.mp4")
        if self.gazing_ratio is not None and not 0 < self.gazing_ratio <= 1:
            raise ValueError(f"gazing_ratio={self.gazing_ratio} must lie in (0, 1]")
        if min(1 if self.stride is None else self.stride, self.batch_size) < 1 or min(
                self.start, self.max_frames or 0, self.sheet_chunk) < 0:
            raise ValueError("stride and batch_size start at 1; start, max_frames and sheet_chunk at 0")
        if self.duration is not None and self.duration <= 0:
            raise ValueError(f"duration={self.duration} must be above 0 seconds")
        if self.scale is not None and not 0 < self.scale <= 4:
            raise ValueError(f"scale={self.scale} must lie in (0, 4]; 1 is the video's own size")
        if self.fps is not None and not 0.001 <= self.fps <= 1000:
            raise ValueError(f"fps={self.fps} must lie in 0.001 to 1000")


def picks(cfg, rate, end=math.inf):
    """Indices of the source frames to look at, one by one, ascending, below `end`. fps: the frame that shows then."""
    if cfg.fps and cfg.stride is None and cfg.fps > 1.01 * rate:  # 30 of 29.97 is meant to be all
        raise ValueError(f"fps={cfg.fps:g} is above the video's {float(rate):.4g}: lower it, or give --stride=1, which "
                         "only plays overlay.mp4 faster")
    step = cfg.stride or (max(1, rate / Fraction(cfg.fps).limit_denominator(10_000)) if cfg.fps else 1)
    first = round(cfg.start * rate)
    most = cfg.max_frames or (128 if cfg.max_frames is None and not cfg.duration and end < math.inf else None)
    end = min(end, first + max(1, round(cfg.duration * rate))) if cfg.duration else end
    for k in count() if most is None else range(most):
        if (i := first + math.floor(k * step)) >= end:
            return
        yield i


def read_file(path, wanted, view):
    """Yield (index in the source, tiles, picture for the viewer) of the frames in `wanted`; see View.cut."""
    for i, image in decode(path, set(wanted)):
        if i < wanted[0]:  # decode gives the last frame if there are fewer than the container said
            raise VideoError(f"{path}: ends after frame {i}, before the start, frame {wanted[0]}: start earlier")
        yield i, *view.cut(image)


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


class Output:
    """The files of a run. Gazes lie on disk until the end: hours of them do not fit into memory."""

    def __init__(self, cfg, c, view, rate, reconstruction):
        self.out = out = Path(cfg.out or f"out/gaze/{Path(cfg.video).stem}")
        self.c, self.view, self.rate, self.V = c, view, rate, sum(view.n_ids)
        out.mkdir(parents=True, exist_ok=True)
        self.container = av.open(str(out / ".overlay.mp4"), "w", format="mp4")
        fps = Fraction(cfg.fps or rate / (cfg.stride or 1)).limit_denominator(10_000)
        self.stream = self.container.add_stream("libx264", rate=fps, options={"preset": "veryfast", "crf": "18"})
        size = viz.frame_size(1 + len(view.n_ids) + reconstruction, view.panel)
        self.stream.height, self.stream.width, self.stream.pix_fmt = *size, "yuv420p"
        self.spool = {name: tempfile.TemporaryFile(dir=out)
                      for name in ("gazing_pos", "num_gazing_each_frame", "source_frame")}
        self.n, self.last, self.per_scale, self.fewest, self.most = 0, None, np.zeros(len(view.n_ids)), math.inf, 0

    def add(self, i, sharp, tiles, ids, masks, recon=None, loss=None):
        """The next frame: its index i in the source, its gazes (n,) counted within the frame, the loss of its
        reconstruction; the rest as in paint. Returns its picture."""
        for name, values in zip(self.spool, (ids.numpy() + self.V * self.n, len(ids), i), strict=True):
            self.spool[name].write(np.asarray(values, dtype=np.int64).tobytes())
        self.n, self.last = self.n + 1, i
        self.per_scale += [int(mask.sum()) for mask in masks]
        self.fewest, self.most = min(self.fewest, len(ids)), max(self.most, len(ids))
        texts = viz.labels(self.c, masks, i, float(i / self.rate), loss)
        frame = viz.paint(self.view, self.c, texts, sharp, tiles, masks, recon)
        self.container.mux(self.stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        return frame

    def close(self, losses):
        """Complete overlay and npz; what they hold in numbers. losses: of the frames' reconstructions, or none."""
        self.container.mux(self.stream.encode())
        self.container.close()
        os.replace(self.out / ".overlay.mp4", self.out / "overlay.mp4")
        total = int(self.per_scale.sum())
        small = dict(scales=self.c.scales, patch_size=self.c.patch_size, source_size=self.view.source_size,
                     crop=self.view.crop, if_padded_gazing=np.broadcast_to(False, (1, total)))
        small |= ({"grids": self.view.grids} if self.view.tiling else {}) | ({"loss": losses} if losses else {})
        with zipfile.ZipFile(self.out / "gaze.npz", "w") as npz:  # what np.savez does, without arrays in memory
            for name, values in small.items():
                with npz.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(values))
            for name, file in self.spool.items():
                shape = (1, total) if name == "gazing_pos" else (self.n,)
                with npz.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(
                        member, {"descr": "<i8", "fortran_order": False, "shape": shape})
                    file.seek(0)
                    shutil.copyfileobj(file, member, 1 << 20)
        return {"source_size": self.view.source_size, "source_fps": float(self.rate), "frames": self.n,
                "ratio": total / (self.n * self.V),
                "gazes_per_frame": {"mean": total / self.n, "min": self.fewest, "max": self.most},
                "share_per_scale": {str(side): float(n / max(total, 1)) for side, n in
                                    zip(self.c.scale_list, self.per_scale, strict=True)}}


# ----------------------------------------------------------------------------------------------------------------------


def select_chunks(gaze, cfg, view, chunks, device):
    """chunks: lists of up to T frames (i, tiles, picture) -> the model's input (of the last tiles), the gaze dict of
    the B whole clips, filled up to the length of the first."""
    T, masks = len(chunks[0]), []
    full = [chunk + chunk[-1:] * (T - len(chunk)) for chunk in chunks]  # the gazes of the fill are dropped later
    rows = [(b, j) for b in range(len(chunks)) for j in range(view.n_tiles)]
    for at in range(0, len(rows), cfg.batch_size):
        part = rows[at:at + cfg.batch_size]
        video = torch.stack([torch.stack([tiles[j] for _, tiles, _ in full[b]]) for b, j in part])
        video = view.to_model_pixels(video.to(device), [j for _, j in part])
        gazing = gaze.generate(video, cfg.gazing_ratio, cfg.task_loss_requirement)
        masks.append(gazing["gazing_mask"])
    return video, view.tiling.join([torch.cat(m) for m in zip(*masks, strict=True)]) if view.tiling else gazing


def run_file(cfg, view, wanted, gaze, mae, output, device, stop):
    """All frames `wanted`, chunk by chunk. Returns seconds per stage, a loss per frame, and what sheet.png shows."""
    T, V, losses, sheet = gaze.config.max_num_frames, output.V, [], None
    seconds = dict.fromkeys(("decode", "select", "reconstruct", "draw+write"), 0.0)
    frames, at_once = read_file(cfg.video, wanted, view), max(1, cfg.batch_size // view.n_tiles) * T
    with tqdm(total=len(wanted), unit="frame") as bar:
        while not (stop.is_set() and output.n):  # one batch at least: no files without a frame
            clock = [time.perf_counter()]
            batch = list(islice(frames, at_once))
            if not batch:
                break
            chunks = [batch[i:i + T] for i in range(0, len(batch), T)]
            clock.append(time.perf_counter())
            video, gazing = select_chunks(gaze, cfg, view, chunks, device)
            masks = [m.cpu() for m in gazing["gazing_mask"]]  # waits for the device: the clock is right
            clock.append(time.perf_counter())
            recon, loss = (x.cpu() for x in mae(video, gazing, range(video.shape[1]))) if mae else (None, None)
            clock.append(time.perf_counter())
            for b, chunk in enumerate(chunks):
                shown, pictures, one = output.n == cfg.sheet_chunk * T, [], one_clip(gazing, b)
                losses += loss[b, :len(chunk)].tolist() if mae else []
                for t, ((i, tiles, sharp), (pos, padded)) in enumerate(zip(chunk, model.split_frames(one))):  # noqa: B905
                    pictures.append(output.add(i, sharp, view.to_model_pixels(tiles), pos[~padded] - V * t,
                                               [m[b, t] for m in masks],
                                               *((recon[b, t], float(loss[b, t])) if mae else ())))
                    pictures = pictures if shown else []
                if shown and view.tiling:
                    sheet = pictures
                elif shown:
                    sheet = dict(video=video[b, :len(chunk)].cpu(), gazing=one, config=gaze.config,
                                 reconstruction=recon[b][:len(chunk)] if mae else None,
                                 losses=losses[-len(chunk):] or None,
                                 title=f"{Path(cfg.video).name}, source frames {chunk[0][0]} to {chunk[-1][0]}")
            clock.append(time.perf_counter())
            seconds = {k: v + clock[i + 1] - clock[i] for i, (k, v) in enumerate(seconds.items())}
            bar.update(len(batch))
    return seconds, losses, sheet


def run_live(cfg, gaze, device, stop):
    """Frames as they come. Returns the output, ms between a frame's coming and its gaze (of the last 10,000 frames:
    memory is bounded), no losses, and the pictures for sheet.png."""
    c, output, latency, sheet = gaze.config, None, deque(maxlen=10_000), []
    settings = cfg.gazing_ratio, cfg.task_loss_requirement
    frames = source.in_background(source.read_live(cfg.video, lambda rate: picks(cfg, rate)), stop)
    while True:
        try:
            rate, i, image, came = next(frames)
        except StopIteration:
            break
        except VideoError as error:
            if output is None:
                raise
            print(f"note: {error}")  # a stream that breaks is a stream that ends
            break
        if output is None:
            view = View(c, image.shape[:2], cfg.scale)
            output = Output(cfg, c, view, rate, reconstruction=False)
            one = gaze.stream(1, *settings)
            # in published decoding rows that stop at different slots disturb each other: one at a time, see generate()
            at_once = 1 if one.reference and one.requirement is not None else cfg.batch_size
            groups = torch.arange(view.n_tiles).split(at_once)
            print(f"{cfg.video}: {image.shape[1]}x{image.shape[0]}, {float(rate):.4g} fps, live; {view}; "
                  "q and Enter or Ctrl-C ends")
            bar = tqdm(unit="frame")
        if output.n % c.max_num_frames == 0:
            streams = [gaze.stream(len(group), *settings) for group in groups]
        tiles, sharp = view.cut(image)
        tiles = view.to_model_pixels(tiles)
        parts = [stream.step(tiles[group].to(device)) for stream, group in zip(streams, groups, strict=True)]
        gazing = parts[0]
        if view.tiling:
            gazing = view.tiling.join([torch.cat(m) for m in zip(*(p["gazing_mask"] for p in parts), strict=True)])
        masks, one = [m[0, 0].cpu() for m in gazing["gazing_mask"]], one_clip(gazing, 0)
        latency.append(1000 * (time.perf_counter() - came))
        shown = output.n // c.max_num_frames == cfg.sheet_chunk
        picture = output.add(i, sharp, tiles, one["gazing_pos"][~one["if_padded_gazing"]], masks)
        sheet += [picture] if shown else []
        bar.update()
    if output is None:
        raise VideoError(f"{cfg.video}: ended before the first frame to look at")
    bar.close()
    return output, latency, [], sheet


def report(cfg, c, output, times, losses, sheet, wanted=(), stopped=False):
    """Complete the files and print what they hold. times: seconds per stage, or (live) ms per frame."""
    numbers = output.close(losses)
    n, gazes, share = numbers["frames"], numbers["gazes_per_frame"], numbers["share_per_scale"]
    if isinstance(sheet, dict):
        viz.sheet(output.out / "sheet.png", **sheet)
    elif sheet:  # none: the file ended too early
        viz.plt.imsave(output.out / "sheet.png", np.concatenate(sheet))
    if n < len(wanted):
        print(f"note: {'stopped' if stopped else f'{cfg.video} ends or breaks'} after frame {output.last}: {n} frames, "
              f"not {len(wanted)}")
    print(f"ratio {numbers['ratio']:.4f}; gazes per frame: mean {gazes['mean']:.2f}, "
          f"min {gazes['min']}, max {gazes['max']}; "
          + ", ".join(f"scale {side} px {100 * p:.1f} %" for side, p in share.items())
          + (f"; reconstruction loss {np.mean(losses):.4f}" if losses else ""))
    numbers |= {"reconstruction_loss": float(np.mean(losses))} if losses else {}
    if isinstance(times, dict):
        numbers["seconds"] = times
        print(f"{1000 * sum(times.values()) / n:.1f} ms per frame: "
              + ", ".join(f"{stage} {1000 * s / n:.1f}" for stage, s in times.items()))
    else:
        numbers["latency_ms"] = {f"{p} %": float(np.percentile(times, p)) for p in (50, 90, 99, 100)}
        print("ms from frame to gaze, with the wait for the frame before: "
              + ", ".join(f"{k} {v:.1f}" for k, v in numbers["latency_ms"].items()))
    text = json.dumps({"settings": asdict(cfg), "model": model.describe(c), **numbers}, indent=1)
    (output.out / "gaze.json").write_text(text + "\n")
    names = ("overlay.mp4", "sheet.png", "gaze.json", "gaze.npz")
    print("\n".join(str(output.out / name) for name in names if (output.out / name).exists()))


@torch.no_grad()
def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    cfg.video = "pipe:0" if cfg.video == "-" else cfg.video  # as FFmpeg calls the standard input
    path = Path(cfg.video)
    as_it_comes = cfg.live if cfg.live is not None else (
        "://" in cfg.video or cfg.video.startswith("pipe:") or path.exists() and not (path.is_file() or path.is_dir()))
    if cfg.videomae and (as_it_comes or cfg.scale):
        raise ValueError("videomae: a reconstruction is shown of files' centre squares: leave out --scale, --live")
    if not as_it_comes:
        n_source, rate, turns, size = source.probe(cfg.video)
        if round(cfg.start * rate) >= n_source:
            raise ValueError(f"start={cfg.start:g} lies beyond the end of {cfg.video}, {float(n_source / rate):.2f} s")
        wanted = list(picks(cfg, rate, n_source))
    _, _, device = run.init_processes(cfg.device)
    gaze, mae = load_models(cfg, device)
    c, T, stop = gaze.config, gaze.config.max_num_frames, threading.Event()
    if not as_it_comes:
        view, n_chunks = View(c, size, cfg.scale), math.ceil(len(wanted) / T)
        if cfg.sheet_chunk >= n_chunks:
            raise ValueError(f"sheet_chunk={cfg.sheet_chunk}: {len(wanted)} frames make {n_chunks} chunks, "
                             "counted from 0")
        print(f"{cfg.video}: {size[1]}x{size[0]}{', stored turned' if turns else ''}, {float(rate):.4g} fps; "
              f"{len(wanted)} of {n_source} frames = {n_chunks} chunks of up to {T}; {view}")
        if cfg.max_frames is None and len(wanted) == 128 and wanted[-1] + 1 < n_source and not cfg.duration:
            print("note: only 128 frames, the default; --max_frames=0 looks at all, --duration=10 at 10 seconds")
    print(f"{cfg.ckpt}: {model.describe(c)}; {device}")

    def interrupted(*_):
        if stop.is_set():
            raise KeyboardInterrupt  # asked twice
        stop.set()

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        if as_it_comes:
            report(cfg, c, *run_live(cfg, gaze, device, stop))
        else:
            output = Output(cfg, c, view, rate, mae is not None)
            report(cfg, c, output, *run_file(cfg, view, wanted, gaze, mae, output, device, stop), wanted, stop.is_set())
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    try:
        main()
    except (VideoError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
