"""Pictures: which patches were gazed, frame by frame and scale by scale. Only gazes are drawn; frames stay as is."""
import functools
import math
from pathlib import Path

import matplotlib
import numpy as np
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from data import from_model_pixels
from gazing import sheet  # noqa: F401

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLORS = ["#ff5a5f", "#ffb400", "#3ddc84", "#4aa8ff", "#c77dff"]  # coarse to fine


def save_figure(fig, path):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)


# ----------------------------------------------------------------------------------------------------------------------
# frames of a film: a panel per scale in a row, labels above; `view` says which tiles a picture is made of, see show.py

STRIP, GAP, NARROW = 26, 4, 150  # pixels: height of the labels, distance of the panels, room for a label at least
FONT = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf"))


def labels(config, masks, i, seconds, loss=None):
    """What stands above the panels of source frame i; masks: per scale (V_s,), 1 where gazed; loss: of its
    reconstruction, if there is one."""
    counts = [(int(m.sum()), m.numel()) for m in masks]
    ratio = sum(n for n, _ in counts) / sum(n for _, n in counts)
    return [f"frame {i}  {seconds:.2f} s  {100 * ratio:.1f} % gazed",
            *(f"scale {side} px: {n} of {all_}" for side, (n, all_) in zip(config.scale_list, counts, strict=True)),
            *([] if loss is None else [f"reconstruction, loss {loss:.3f}"])]


@functools.lru_cache
def write_label(text, color, width):
    """(STRIP, width, 3) uint8: the text in the middle, smaller if it does not fit."""
    image = Image.new("RGB", (width, STRIP), "#181818")
    size = min(15, max(1, int(15 * 0.97 * width / ImageFont.truetype(FONT, 15).getlength(text))))
    ImageDraw.Draw(image).text((width / 2, STRIP / 2), text, color, ImageFont.truetype(FONT, size), anchor="mm")
    return np.asarray(image)


def frame_size(n_panels, panel):
    """(height, width) of a frame, even as yuv420p wants them; panel: (h, w)."""
    return tuple(math.ceil(n / 2) * 2 for n in (STRIP + panel[0], n_panels * (max(panel[1], NARROW) + GAP) - GAP))


def enlarge(x, view):
    """Normalised pixels (3, rows * n, columns * n) of all tiles -> panel (h, w, 3) uint8, every pixel a block."""
    y, x_at = (np.arange(length) * n // (tiles * view.q) for length, n, tiles in
               zip(view.panel, x.shape[1:], (view.rows, view.columns), strict=True))
    def bytes_of(x):
        return (from_model_pixels(x) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()

    if x[0].numel() > len(y) * len(x_at):  # whichever is fewer pixels
        return bytes_of(x[:, y][..., x_at])
    return bytes_of(x)[y][:, x_at]


def lattice(view, g, length):
    """Of a panel's rows or columns: the patch each is in, of g per tile, and whether it is that patch's outline."""
    at = np.arange(length)
    edges = np.array([round(i * view.q / g) for i in range(length * g // view.q + 3)])
    patch = np.searchsorted(edges, at, side="right") - 1
    wide = np.diff(edges)[patch]
    line = np.where(wide < (6 if view.tiling else 1), 0, np.where(wide < 24, 1, 2))  # it would hide tiny patches
    return patch, (at - edges[patch] < line) | (edges[patch + 1] - at <= line)


def paint(view, config, texts, sharp, tiles, masks, recon):
    """One frame of the overlay, (H, W, 3) uint8. texts: a label per panel; sharp (3, h, w) uint8: for the viewer;
    tiles (n, 3, R, R) normalised: for the model; masks: per scale (V_s,), 1 where gazed; recon (3, R, R) normalised or
    None."""
    sharp = sharp.permute(1, 2, 0).numpy()
    dark = (0.45 * sharp).astype(np.uint8)
    panels = [sharp] + [dark.copy() for _ in masks]
    whole = rearrange(tiles, "(i j) c h w -> 1 c (i h) (j w)", i=view.rows)
    for s, (n, g, grid, mask) in enumerate(zip(config.scale_list, view.per_tile, view.grids, masks, strict=True)):
        size = view.rows * n, view.columns * n
        small = whole if whole.shape[2:] == size else F.interpolate(whole, size, mode="bicubic", align_corners=False)
        seen = enlarge(small[0], view)
        (y, y_line), (x, x_line) = (lattice(view, g, length) for length in view.panel)
        gazed = mask.view(grid).bool().numpy()[np.ix_(y, x)]
        color = [int(COLORS[s % len(COLORS)][i:i + 2], 16) for i in (1, 3, 5)]
        np.copyto(panels[1 + s], seen, where=gazed[..., None])
        panels[1 + s][gazed & (y_line[:, None] | x_line)] = color
    panels += [] if recon is None else [enlarge(recon, view)]
    frame = np.full((*frame_size(len(panels), view.panel), 3), 0x18, np.uint8)
    width = max(view.panel[1], NARROW)
    for i, (panel, text) in enumerate(zip(panels, texts, strict=True)):
        x, color = i * (width + GAP), COLORS[(i - 1) % len(COLORS)] if 0 < i <= len(masks) else "white"
        frame[:STRIP, x:x + width] = write_label(text, color, width)
        frame[STRIP:STRIP + view.panel[0], x:x + view.panel[1]] = panel
    return frame
