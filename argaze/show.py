"""Where does the wearer look in my video? Heat map and cross on every frame, as the frames come.

    python -m argaze.show --video=my.mp4 --ckpt=out/argaze                      # writes out/gaze/my.mp4
    python -m argaze.show --video=my.mp4 --ckpt=egtea.pyth --stride=8           # a published checkpoint
    python -m argaze.show --video=/dev/video0 --seconds=30                      # a camera (Linux)
    ffmpeg -i rtsp://… -f matroska - | python -m argaze.show --video=-          # a pipe

The model sees the centre square of every stride-th frame; in between, the last gaze stays. Training frames lie 8 apart
(EGTEA Gaze+: 24 per second, Ego4D: 30), so a stride of 8 matches it and costs an eighth. It works from the first frame
on: its memory is a few heat maps, however long the video. The published demo waits for eight frames and then runs all
eight anew for each new one; python -m argaze.eval measures what streaming saves. Ctrl-C ends a camera's film properly.

Beside the film lies a csv file: frame, seconds, x and y of the gaze in pixels of the video, and spread, the standard
deviation of the predicted map in pixels.

Dimension key: H x W source size, R side of what the model sees, h x w heat map.
"""
if not __package__:
    raise SystemExit("run it from the root of the repository as a module: python -m argaze.show …")

import signal
import sys
import time
import warnings
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import av
import torch

from argaze.data import crop_square
from argaze.eval import load_model
from data import VideoError, open_stream, upright, video_stream
from lib import configurator, run
from lib.checkpoint import lock
from lib.text import write_whole
from lib.video_out import VideoWriter, draw_boxes, draw_cross, draw_heat, draw_text, resize


@dataclass
class Config:
    video: str = ""               # a file, a camera (/dev/video0), a URL, or - for a pipe
    ckpt: str = "out/argaze"      # folder written by argaze.train, or a published checkpoint
    out: str | None = None        # the film; none: out/gaze/<name of the video>.mp4
    stride: int = 1               # frames from one that the model sees to the next
    seconds: float | None = None  # of the video to look at; none: all of it
    height: int = 480             # of the film in pixels; a smaller video keeps its size
    device: str = "auto"          # auto | cpu | cuda

    def check(self):
        configurator.check_at_least(self, stride=1, height=32)
        configurator.check_above_zero(self, "seconds")
        if not self.video:
            raise ValueError("--video= is missing: a file, a camera, a URL, or - for a pipe")


def read_video(path):
    """Yield (frames per second, upright (H, W, 3) uint8 picture) as they come, all of the first one's size.

    VideoError names what cannot be read. A video that breaks later ends there, with a warning.
    """
    size = {}
    try:
        with open_stream(path) as container:
            stream = video_stream(container, path)
            rate = stream.average_rate or stream.guessed_rate or 25
            for frame in container.decode(stream):
                size = size or {"width": frame.width, "height": frame.height}
                picture = frame.to_ndarray(format="rgb24", **size)
                yield rate, upright(picture, frame)
    except (av.FFmpegError, OSError, ValueError) as error:
        if not size:
            raise VideoError(f"{path}: cannot be read as a video ({error})") from error
        warnings.warn(f"{path}: breaks here ({error})", stacklevel=2)
    if not size:
        raise VideoError(f"{path}: not one frame in its video stream")


class Square:
    """The centre square of a picture, which is what the model sees, as in evaluation."""

    def __init__(self, picture):
        height, width = picture.shape[:2]
        self.side = min(height, width)
        self.left = (width - self.side) // 2
        self.top = (height - self.side) // 2

    def cut(self, picture):
        return picture[self.top:self.top + self.side, self.left:self.left + self.side]

    def to_pixels(self, point):
        """(x, y) in [0, 1] of the square -> pixels of the picture."""
        x, y = point
        return self.left + x * self.side, self.top + y * self.side


def draw(picture, probability, point, text):
    """The film's picture: heat map and cross in the centre square, a text in the corner."""
    picture = picture.copy()
    square = Square(picture)
    part = square.cut(picture)
    part[:] = draw_heat(part, probability - probability.min())
    if picture.shape[0] != picture.shape[1]:
        box = (square.left, square.top, square.left + square.side, square.top + square.side)
        picture = draw_boxes(picture, [box], "white", 1)
    picture = draw_cross(picture, square.to_pixels(point), "white", size=max(6, square.side // 30))
    return draw_text(picture, text, (8, 6), size=max(10, picture.shape[0] // 24))


@torch.inference_mode()
def look(model, picture, state, device):
    """One frame (H, W, 3) uint8 -> (probability (h, w), point, spread, next state)."""
    nothing = torch.zeros(1, 2)
    frame, _ = crop_square([picture], nothing, torch.tensor([False]), model.config.image_size)
    logits, state = model.step(frame.to(device), state)
    probability, point, spread = model.predict(logits)
    return probability[0].cpu().numpy(), point[0].tolist(), spread.item(), state


def show(cfg, model, device, frames, film, rows):
    """Look at frames, (frames per second, picture) one by one, and write them to the film. rows gets (frame, seconds,
    x, y, spread) of each look."""
    state = model.start(1)
    milliseconds = None
    for number, (rate, picture) in enumerate(frames):
        if cfg.seconds and number >= cfg.seconds * rate:
            return

        # look at every stride-th frame
        if number % cfg.stride == 0:
            start = run.now(device)
            probability, point, spread, state = look(model, picture, state, device)
            spent = (run.now(device) - start) * 1000
            milliseconds = spent if milliseconds is None else 0.9 * milliseconds + 0.1 * spent  # running mean
            square = Square(picture)
            x, y = square.to_pixels(point)
            row = (number, float(number / rate), x, y, spread * square.side)

        # draw every frame
        if picture.shape[0] > cfg.height:
            picture = resize(picture, cfg.height, round(picture.shape[1] * cfg.height / picture.shape[0]))
        text = f"{float(number / rate):.1f} s   {1000 / milliseconds:.1f} looks per second"
        film.write(draw(picture, probability, point, text))
        if number % cfg.stride == 0:
            rows.append(row)


def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    _, _, device = run.init_processes(cfg.device)
    model = load_model(cfg.ckpt, device)
    name = "pipe" if cfg.video == "-" else Path(cfg.video).stem
    out = Path(cfg.out or f"out/gaze/{name}.mp4")

    # the first frame tells the frame rate of the film
    frames = read_video(cfg.video)
    first = next(frames)
    lock(out.with_name(f".{out.name}.lock"), f"out={out}")
    rows = []
    start = time.perf_counter()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the film ends, and is whole
    with VideoWriter(out, first[0]) as film:
        try:
            show(cfg, model, device, chain([first], frames), film, rows)
        except KeyboardInterrupt:
            print("stopped: the film ends here")
    seconds = time.perf_counter() - start

    lines = ["frame,seconds,x,y,spread"]
    for number, moment, x, y, spread in rows:
        lines.append(f"{number},{moment:.3f},{x:.1f},{y:.1f},{spread:.1f}")
    write_whole(out.with_suffix(".csv"), "\n".join(lines) + "\n")
    print(f"{out}: {len(rows)} looks in {seconds:.1f} s, with reading and drawing")


if __name__ == "__main__":
    run.launch(main, VideoError)
