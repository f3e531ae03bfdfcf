"""Where does the model look in my video?

    python gaze.py --video=my.mp4 --ckpt=out/toy/grpo --videomae=out/toy/videomae
    python gaze.py --video=my.mp4 --gazing_ratio=0.05 --start=12 --max_frames=0     # from 12 s to the end

Takes the centre square of the picture, cuts the video into chunks as long as the model's training clips (each starts
afresh), and writes into the folder --out:
    overlay.mp4   side by side: video, gazed patches of every scale at its resolution, reconstruction (with --videomae)
    sheet.png     one chunk, frame by frame
    gaze.npz      the whole video as one gaze of B = 1, see model.py: gazing_pos (1, N) = patch id + V * frame, without
                  padded slots; if_padded_gazing (1, N); num_gazing_each_frame (T,). And what leads back to the source:
                  scales, patch_size, source_frame (T,), source_size (height, width), crop (top, left, side): of a scale
                  with g x g patches, row y, column x starts at pixel (top + y * side / g, left + x * side / g).

One batch of chunks is in memory at a time, so a video may be long. Phone videos that are stored turned are set upright;
sizes and crop are those of the upright picture. The square is cut before resizing, to have whole source pixels, while
training resizes first: unless a video is square, the model's pixels are shifted by up to one against data.Clips.
"""
import math
import os
import sys
import time
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import configurator
import model
import viz
from data import VideoError, count_frames, decode, denormalize, normalize, quarter_turns, resize_crop, video_stream
from model import Gaze
from videomae import VideoMAE


@dataclass
class Config:
    video: str = ""                    # the file to look at
    ckpt: str = "out/toy/grpo"         # gaze model: a folder or a hub id
    videomae: str | None = None        # reconstructor of the same scales, a folder or file; none: no reconstruction
    out: str | None = None             # folder for the results; none: out/gaze/<name of the video>
    # how much to look; both none: the model's own settings
    gazing_ratio: float | None = None  # share of the patch ids that each frame may take
    task_loss_requirement: float | None = None  # a frame is finished when its predicted loss falls to this
    # which frames
    start: float = 0.0                 # seconds, by the average frame rate
    max_frames: int = 128              # 0: all to the end
    stride: int = 1                    # source frames per model frame
    # output
    sheet_chunk: int = 0               # which chunk sheet.png shows
    fps: float | None = None           # of overlay.mp4; none: the source's / stride
    # run
    batch_size: int = 4                # chunks at once
    device: str = "auto"               # auto | cpu | cuda

    def check(self):
        if not self.video:
            raise ValueError("no video given: write --video=my.mp4")
        if self.gazing_ratio is not None and not 0 < self.gazing_ratio <= 1:
            raise ValueError(f"gazing_ratio={self.gazing_ratio} must lie in (0, 1]")
        if min(self.stride, self.batch_size) < 1 or min(self.start, self.max_frames, self.sheet_chunk) < 0:
            raise ValueError("stride and batch_size start at 1; start, max_frames and sheet_chunk at 0")
        if self.fps is not None and not 0.001 <= self.fps <= 1000:
            raise ValueError(f"fps={self.fps} must lie in 0.001 to 1000")


def probe(path):
    """Number of frames, frames per second (a Fraction), anticlockwise quarter turns that set the picture upright, and
    its upright (height, width). Raises FileNotFoundError, VideoError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"video={path}: no such file (looked from {os.getcwd()})")
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
    turns = quarter_turns(frame)
    return max(n_frames, 1), rate, turns, (frame.height, frame.width)[::-1 if turns % 2 else 1]


def read_squares(path, wanted, crop, sizes):
    """Yield (index in the source, [the crop resized to (3, n, n) uint8 for n in sizes]) for the frames in `wanted`."""
    top, left, side = crop
    for i, image in decode(path, wanted):
        if i < wanted[0]:  # decode gives the last frame if there are fewer than the container said
            raise VideoError(f"{path}: ends after frame {i}, before the start, frame {wanted[0]}: start earlier")
        square = image[top:top + side, left:left + side].copy()
        yield i, [resize_crop(torch.from_numpy(square).permute(2, 0, 1)[None], n)[0] for n in sizes]


def load_models(cfg, device):
    path = Path(cfg.ckpt)
    if not path.exists() and (len(path.parts) != 2 or path.parent.exists()):  # else it may be a hub id, owner/name
        raise FileNotFoundError(f"ckpt={cfg.ckpt}: no such folder; train_ntp.py and train_grpo.py write one")
    gaze = Gaze.from_pretrained(path).to(device).eval()
    if cfg.videomae is None:
        return gaze, None
    try:
        mae = VideoMAE.from_pretrained(cfg.videomae).to(device).freeze()
    except ValueError as error:
        raise ValueError(f"videomae={cfg.videomae} is no reconstructor: {error}") from error
    c, m = gaze.config, mae.config
    if (m.scales, m.patch_size) != (c.scales, c.patch_size) or m.max_num_frames < c.max_num_frames:
        raise ValueError(f"videomae={cfg.videomae} is for scales {m.scales}, patch {m.patch_size}, {m.max_num_frames} "
                         f"frames; {cfg.ckpt} for {c.scales}, {c.patch_size}, {c.max_num_frames}: give one that fits")
    return gaze, mae


# ----------------------------------------------------------------------------------------------------------------------
# pictures: panels of q x q pixels in a row, labels above

STRIP, GAP = 26, 4  # pixels: height of the labels, distance of the panels


def make_canvas(config, q, reconstruction):
    """A frame with labels and no panels yet, (H, W, 3) uint8, even sides as yuv420p wants them."""
    names = ["video", *(f"scale {n} px" for n in config.scale_list)] + ["reconstruction"] * reconstruction
    height, width = (math.ceil(n / 2) * 2 for n in (STRIP + q, len(names) * (q + GAP) - GAP))
    fig = viz.plt.figure(figsize=(width / 100, height / 100), dpi=100, facecolor="#181818")
    for i, name in enumerate(names):
        color = viz.COLORS[(i - 1) % len(viz.COLORS)] if name.startswith("scale") else "white"
        fig.text((i * (q + GAP) + q / 2) / width, 1 - STRIP / 2 / height, name, color=color, ha="center", va="center",
                 fontsize=11, weight="bold")
    fig.canvas.draw()
    canvas = np.asarray(fig.canvas.buffer_rgba())[:height, :width, :3].copy()
    viz.plt.close(fig)
    return canvas


def enlarge(x, q):
    """Normalised pixels (T, 3, n, n) -> (T, q, q, 3) uint8, every pixel a block."""
    at = torch.arange(q) * x.shape[-1] // q
    return (denormalize(x) * 255).round().byte()[:, :, at][..., at].permute(0, 2, 3, 1).numpy()


def paint(canvas, sharp, clip, boxes, recon, config):
    """Yield the overlay's frames. sharp (T, 3, q, q) uint8: the video for the viewer; clip (T, 3, R, R) normalised: for
    the model; recon: the same or None; boxes: see viz.gazed_boxes."""
    q, R = sharp.shape[-1], config.image_size
    sharp = sharp.permute(0, 2, 3, 1).numpy()
    seen = [enlarge(F.interpolate(clip, (n, n), mode="bicubic", align_corners=False), q) for n in config.scale_list]
    recon = None if recon is None else enlarge(recon, q)
    for t in range(len(sharp)):
        panels = [sharp[t]] + [(0.45 * sharp[t]).astype(np.uint8) for _ in seen]
        panels += [] if recon is None else [recon[t]]
        for s, y, x, n in boxes[t]:
            y0, y1, x0, x1 = (round(v * q / R) for v in (y, y + n, x, x + n))
            patch, line = panels[1 + s][y0:y1, x0:x1], 1 if y1 - y0 < 24 else 2
            patch[:] = seen[s][t][y0:y1, x0:x1]
            color = [int(viz.COLORS[s % len(viz.COLORS)][i:i + 2], 16) for i in (1, 3, 5)]
            patch[:line] = patch[-line:] = patch[:, :line] = patch[:, -line:] = color
        frame = canvas.copy()
        for i, panel in enumerate(panels):
            frame[STRIP:STRIP + q, i * (q + GAP):i * (q + GAP) + q] = panel
        yield frame


# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    n_source, rate, turns, size = probe(cfg.video)
    first = round(cfg.start * rate)
    if first >= n_source:
        raise ValueError(f"start={cfg.start:g} lies beyond the end of {cfg.video}, {float(n_source / rate):.2f} s")
    _, _, device = common.init_processes(cfg.device)
    gaze, mae = load_models(cfg, device)
    c, V, T = gaze.config, gaze.config.num_ids, gaze.config.max_num_frames
    wanted = range(first, n_source, cfg.stride)[:cfg.max_frames or None]
    n_chunks, (height, width), side = math.ceil(len(wanted) / T), size, min(size)
    crop = (height - side) // 2, (width - side) // 2, side
    if cfg.sheet_chunk >= n_chunks:
        raise ValueError(f"sheet_chunk={cfg.sheet_chunk}: {len(wanted)} frames make {n_chunks} chunks, counted from 0")
    out = Path(cfg.out or f"out/gaze/{Path(cfg.video).stem}")
    out.mkdir(parents=True, exist_ok=True)
    turned = ", stored turned" if turns else ""
    print(f"{cfg.video}: {width}x{height}{turned}, {float(rate):.4g} fps; {len(wanted)} of {n_source} frames = "
          f"{n_chunks} chunks of up to {T}; {side}x{side} pixels at x={crop[1]}, y={crop[0]}")
    print(f"{cfg.ckpt}: {model.describe(c)}; {device}")

    q = c.image_size * max(1, round(288 / c.image_size))  # a whole multiple: patches end on pixels
    canvas = make_canvas(c, q, mae is not None)
    source = read_squares(cfg.video, wanted, crop, (c.image_size, q))
    taken, source_frame, losses, sheet = [], [], [], None
    seconds = dict.fromkeys(("decode", "select", "reconstruct", "draw+write"), 0.0)
    half_written = out / ".overlay.mp4"
    with av.open(str(half_written), "w", format="mp4") as container, tqdm(total=len(wanted), unit="frame") as bar:
        fps = Fraction(cfg.fps or rate / cfg.stride).limit_denominator(10_000)
        stream = container.add_stream("libx264", rate=fps, options={"preset": "veryfast", "crf": "18"})
        stream.height, stream.width, stream.pix_fmt = *canvas.shape[:2], "yuv420p"
        while True:
            clock = [time.perf_counter()]
            batch = list(islice(source, cfg.batch_size * T))
            if not batch:
                break
            chunks = [batch[i:i + T] for i in range(0, len(batch), T)]
            filled = batch + batch[-1:] * (len(chunks) * T - len(batch))  # the gazes of the fill are dropped below
            video = torch.stack([small for _, (small, _) in filled]).unflatten(0, (-1, T))  # (B, T, 3, R, R)
            video = normalize(video.to(device))
            clock.append(time.perf_counter())
            gazing = gaze.generate(video, cfg.gazing_ratio, cfg.task_loss_requirement)
            gazings = [viz.one_clip(gazing, b) for b in range(len(chunks))]  # waits for the device: the clock is right
            clock.append(time.perf_counter())
            recon, loss = (x.cpu() for x in mae(video, gazing, range(T))) if mae else ([None] * len(chunks), None)
            video = video.cpu()
            clock.append(time.perf_counter())
            for b, chunk in enumerate(chunks):
                n, done = len(chunk), len(source_frame)
                taken += [pos[~pad] + V * done for pos, pad in model.split_frames(gazings[b])[:n]]
                source_frame += [i for i, _ in chunk]
                losses += loss[b, :n].tolist() if mae else []
                painted = recon[b][:n] if mae else None
                sharp = torch.stack([sharp for _, (_, sharp) in chunk])
                for frame in paint(canvas, sharp, video[b, :n], viz.gazed_boxes(gazings[b], c)[:n], painted, c):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                if done == cfg.sheet_chunk * T:
                    sheet = video[b, :n], gazings[b], c, painted, f"source frames {chunk[0][0]} to {chunk[-1][0]}"
            clock.append(time.perf_counter())
            seconds = {k: v + clock[i + 1] - clock[i] for i, (k, v) in enumerate(seconds.items())}
            bar.update(len(batch))
        container.mux(stream.encode())
    os.replace(half_written, out / "overlay.mp4")

    pos, counts = torch.cat(taken).numpy()[None], np.array([len(ids) for ids in taken])
    np.savez(out / "gaze.npz", gazing_pos=pos, if_padded_gazing=np.zeros(pos.shape, bool), num_gazing_each_frame=counts,
             scales=c.scales, patch_size=c.patch_size, source_frame=source_frame, source_size=size, crop=crop)
    if sheet is not None:  # None: the file ended too early
        at = cfg.sheet_chunk * T
        viz.sheet(out / "sheet.png", *sheet[:4], f"{Path(cfg.video).name}, {sheet[4]}", losses[at:at + T] or None)
    if (n := len(counts)) < len(wanted):
        print(f"note: {cfg.video} ends or breaks after frame {source_frame[-1]}: {n} frames, not {len(wanted)}")
    share = 100 * np.histogram(pos % V, np.cumsum([0, *c.ids_per_scale]))[0] / pos.size
    print(f"ratio {pos.size / (n * V):.4f}; gazes per frame: mean {counts.mean():.2f}, "
          f"min {counts.min()}, max {counts.max()}; "
          + ", ".join(f"scale {side} px {p:.1f} %" for side, p in zip(c.scale_list, share, strict=True))
          + (f"; reconstruction loss {np.mean(losses):.4f}" if mae else ""))
    print(f"{1000 * sum(seconds.values()) / n:.1f} ms per frame: "
          + ", ".join(f"{stage} {1000 * s / n:.1f}" for stage, s in seconds.items()))
    print("\n".join(str(out / name) for name in ("overlay.mp4", "sheet.png", "gaze.npz") if (out / name).exists()))


if __name__ == "__main__":
    try:
        main()
    except (VideoError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
