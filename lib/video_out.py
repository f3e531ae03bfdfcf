"""Pictures and films: contact sheets, mp4 files, and what is drawn on a frame. Knows nothing of gazes.

A picture is a (H, W, 3) uint8 RGB array. A point is (x, y), a box is (left, top, right, bottom), both in pixels of the
picture, and a colour is a name or "#rrggbb". What draws returns a new picture and leaves the given one as it is.
"""
import functools
import os
from fractions import Fraction
from pathlib import Path

import av
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lib.text import written_whole

BACKGROUND = "#181818"
FONT = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@functools.lru_cache
def load_font(size):
    return ImageFont.truetype(FONT, size)


def resize(picture, height, width):
    """Enlarged pixels become blocks, so that one sees what a model sees; reduced ones are averaged."""
    image = Image.fromarray(picture)
    enlarged = height >= image.height and width >= image.width
    return np.array(image.resize((width, height), Image.NEAREST if enlarged else Image.LANCZOS))


# ----------------------------------------------------------------------------------------------------------------------
# drawing on a picture


def draw_text(picture, text, at, color="white", size=14, anchor="lt", max_width=None):
    """Write one line of text. anchor: which point of it lies at `at`, in Pillow's two letters ("lt": left and top,
    "mm": the middle). A text wider than max_width is written smaller."""
    width = load_font(size).getlength(text)
    if max_width is not None and width > max_width:
        size = max(1, int(size * max_width / width))

    image = Image.fromarray(picture)
    ImageDraw.Draw(image).text(at, text, color, load_font(size), anchor)
    return np.array(image)


def draw_boxes(picture, boxes, color="white", width=2):
    """Outline boxes (n, 4); the outline lies inside of the box."""
    image = Image.fromarray(picture)
    canvas = ImageDraw.Draw(image)
    for box in np.asarray(boxes):
        left, top, right, bottom = [round(float(n)) for n in box]
        # Pillow counts the last pixel in
        right = max(right - 1, left)
        bottom = max(bottom - 1, top)
        canvas.rectangle((left, top, right, bottom), outline=color, width=width)
    return np.array(image)


def draw_cross(picture, at, color="white", size=12, width=2):
    """A + of `size` pixels in each direction from the point `at`."""
    x, y = at
    image = Image.fromarray(picture)
    canvas = ImageDraw.Draw(image)
    canvas.line((x - size, y, x + size, y), color, width)
    canvas.line((x, y - size, x, y + size), color, width)
    return np.array(image)


def draw_arrow(picture, start, end, color="white", width=3):
    """An arrow from `start` to `end`; a dot if both are the same pixel."""
    start = np.asarray(start, dtype=float)
    end = np.asarray(end, dtype=float)
    length = np.linalg.norm(end - start)
    image = Image.fromarray(picture)
    canvas = ImageDraw.Draw(image)

    if length < 1:
        canvas.ellipse((*(start - width), *(start + width)), color)
        return np.array(image)

    # the head is a triangle at the end, the shaft stops where it begins
    along = (end - start) / length
    across = np.array([-along[1], along[0]])
    head = min(4.0 * width, length)
    neck = end - head * along
    left = neck + head / 2 * across
    right = neck - head / 2 * across
    canvas.line((*start, *neck), color, width)
    canvas.polygon([tuple(end), tuple(left), tuple(right)], color)
    return np.array(image)


def draw_heat(picture, heat, opacity=0.7):
    """Lay a heat map (h, w) of any size over the picture: its largest value red, where it is 0 the picture shows."""
    height, width = picture.shape[:2]
    heat = np.asarray(heat, dtype=np.float32).clip(min=0)
    highest = max(float(heat.max()), 1e-12)
    heat = Image.fromarray(heat / highest)
    heat = np.array(heat.resize((width, height), Image.BILINEAR))

    colormap = matplotlib.colormaps["turbo"]
    colors = 255 * colormap(0.9 * heat)[..., :3]
    weight = opacity * np.sqrt(heat)[..., None]
    mixed = (1 - weight) * picture + weight * colors
    return np.rint(mixed).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# several pictures in one


def blank(height, width):
    return np.array(Image.new("RGB", (width, height), BACKGROUND))


@functools.lru_cache
def label(text, height, width, color="white", size=14):
    """A picture that holds only a text, in its middle."""
    middle = width / 2, height / 2
    return draw_text(blank(height, width), text, middle, color, size, anchor="mm", max_width=0.97 * width)


def paste(sheet, picture, left, top):
    """In place; the only function here that changes what it is given."""
    height, width = picture.shape[:2]
    sheet[top:top + height, left:left + width] = picture


def side_by_side(pictures, labels, colors, gap=4, strip=26, narrowest=150):
    """One frame of a film: pictures of the same height in a row, above each its label in its colour."""
    columns = []
    for picture, text, color in zip(pictures, labels, colors, strict=True):
        height, width = picture.shape[:2]
        width = max(width, narrowest)  # room for the label

        column = blank(strip + height, width + gap)
        paste(column, label(text, strip, width, color), 0, 0)
        paste(column, picture, 0, strip)
        columns.append(column)
    return np.concatenate(columns, axis=1)[:, :-gap]


def contact_sheet(path, rows, titles=(), captions=(), legend=None, title="", cell=160):
    """Save a grid of pictures as a PNG file.

    rows: {name: list of pictures}, the names stand at the left; titles and captions: a text per column, above and below
    the grid; legend: {text: colour}, at the bottom; cell: height of a picture in the sheet, in pixels.
    """
    gap = 4
    line = 22  # height of a line of text, also the width of the names
    n_columns = max(len(pictures) for pictures in rows.values())
    first = next(iter(rows.values()))[0]
    width = round(cell * first.shape[1] / first.shape[0])
    width = max(1, width)

    # corners of the cells; from top to bottom: title, column titles, the grid, captions, legend
    lefts = [line + i * (width + gap) for i in range(n_columns)]
    tops = [2 * line + i * (cell + gap) for i in range(len(rows))]
    bottom = tops[-1] + cell + gap
    sheet_width = max(lefts[-1] + width + gap, 420)
    sheet = blank(bottom + 2 * line, sheet_width)

    for top, (name, pictures) in zip(tops, rows.items(), strict=True):
        name_upwards = np.rot90(label(name, line, cell))
        paste(sheet, name_upwards, 0, top)
        for left, picture in zip(lefts, pictures, strict=False):
            paste(sheet, resize(picture, cell, width), left, top)

    # texts above and below the columns, title and legend
    for left, text in zip(lefts, titles, strict=False):
        paste(sheet, label(text, line, width, size=12), left, line)
    for left, text in zip(lefts, captions, strict=False):
        paste(sheet, label(text, line, width, size=12), left, bottom)
    paste(sheet, label(title, line, sheet_width), 0, 0)
    if legend:
        part = sheet_width // len(legend)
        for i, (text, color) in enumerate(legend.items()):
            paste(sheet, label(text, line, part, color), i * part, bottom + line)
    save_picture(path, sheet)


def save_picture(path, picture):
    """Write a PNG file, whole or not at all."""
    with written_whole(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")


# ----------------------------------------------------------------------------------------------------------------------
# films


class VideoWriter:
    """Write pictures of one size as H.264 in an mp4 file:

        with VideoWriter("a.mp4", fps=25) as film:
            film.write(picture)

    An odd height or width is made even by repeating the last row or column. The file gets its name when it is complete;
    if the block ends by an exception, Ctrl-C too, or without a picture, nothing is left. With threads=1 the same
    pictures give the same bytes on every machine. OSError: names the file that cannot be written.
    """

    def __init__(self, path, fps, crf=18, preset="veryfast", threads=0):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = self.path.with_name(f".{self.path.name}")

        # file: keeps FFmpeg from reading "12:30.mp4" as a protocol called 12
        self.container = av.open(f"file:{self.temporary}", "w", format="mp4")
        rate = Fraction(fps).limit_denominator(10_000)
        options = {"preset": preset, "crf": str(crf)}
        self.stream = self.container.add_stream("libx264", rate=rate, options=options)
        self.stream.pix_fmt = "yuv420p"
        self.stream.codec_context.thread_count = threads
        self.size = None

    def write(self, picture):
        if self.size is None:
            self.size = picture.shape
            height, width = picture.shape[:2]
            self.stream.height = height + height % 2
            self.stream.width = width + width % 2
        assert picture.shape == self.size and picture.dtype == np.uint8, (picture.shape, self.size, picture.dtype)

        below = self.stream.height - picture.shape[0]
        right = self.stream.width - picture.shape[1]
        picture = np.pad(picture, ((0, below), (0, right), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        self.container.mux(self.stream.encode(frame))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        complete = error is None and self.size is not None
        try:
            if complete:
                self.container.mux(self.stream.encode(None))  # what the encoder still holds
            self.container.close()
            if complete:
                os.replace(self.temporary, self.path)
        except av.FFmpegError as later:
            error = error or later
        finally:
            self.temporary.unlink(missing_ok=True)

        # a full disk shows at a picture or at the end, and FFmpeg does not say of which file
        if isinstance(error, av.FFmpegError):
            raise OSError(f"{self.path}: cannot be written ({error})") from error
