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

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLORS = ["#ff5a5f", "#ffb400", "#3ddc84", "#4aa8ff", "#c77dff"]  # coarse to fine


def to_image(x):
    """Normalised pixels (3, R, R) -> (R, R, 3) floats in 0..1."""
    return from_model_pixels(x.float().cpu()).permute(1, 2, 0).numpy()


def gazed_boxes(gazing, config, row=0):
    """Per frame, a list of (scale index, y0, x0, side) in pixels of the finest scale, in the order of gazing."""
    V, out, at = config.num_ids, [], 0
    starts = np.cumsum([0, *config.ids_per_scale])
    for t, n_t in enumerate(gazing["num_gazing_each_frame"].tolist()):
        boxes = []
        slots = (gazing[k][row, at:at + n_t].tolist() for k in ("gazing_pos", "if_padded_gazing"))
        for pos, pad in zip(*slots, strict=True):
            if not pad:
                i = pos - V * t
                s = int(np.searchsorted(starts, i, side="right")) - 1
                grid = config.scale_list[s] // config.patch_size
                side = config.scale_list[-1] / grid
                y, x = divmod(i - int(starts[s]), grid)
                boxes.append((s, y * side, x * side, side))
        out.append(boxes)
        at += n_t
    return out


def gazed_pixels(frame, boxes, config):
    """What the encoder is given of one frame (3, R, R): gazed patches as their scale resolves them, the rest grey."""
    R = config.scale_list[-1]
    out = np.full((R, R, 3), 0.25, dtype=np.float32)
    for s in sorted({b[0] for b in boxes}):  # fine patches cover coarse ones
        side = config.scale_list[s]
        small = F.interpolate(frame[None].float().cpu(), (side, side), mode="bicubic", align_corners=False)
        image = to_image(F.interpolate(small, (R, R), mode="nearest")[0])
        for _, y, x, n in (b for b in boxes if b[0] == s):
            y0, y1, x0, x1 = round(y), round(y + n), round(x), round(x + n)
            out[y0:y1, x0:x1] = image[y0:y1, x0:x1]
    return out


def sheet(path, video, gazing, config, reconstruction=None, title="", losses=None):
    """Contact sheet of one clip: rows frame / gazes drawn on it / gazed pixels / reconstruction, a column per frame.

    video (T, 3, R, R) normalised; gazing: dict of one clip; reconstruction (T, 3, R, R) or None.
    """
    boxes = gazed_boxes(gazing, config)
    T, R = len(video), config.scale_list[-1]
    names = ["video", "gazes", "gazed pixels"] + ([] if reconstruction is None else ["reconstruction"])
    fig, axes = plt.subplots(len(names), T, figsize=(max(1.45 * T + 0.7, 4.5), 1.5 * len(names) + 0.7), squeeze=False)
    for t in range(T):
        image = to_image(video[t])
        rows = [image, 0.55 * image, gazed_pixels(video[t], boxes[t], config)]
        if reconstruction is not None:
            rows.append(to_image(reconstruction[t]))
        for r, picture in enumerate(rows):
            ax = axes[r, t]
            ax.imshow(picture, extent=(0, R, R, 0), interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            if t == 0:
                ax.set_ylabel(names[r], fontsize=8)
        for s, y, x, n in boxes[t]:
            inset = min(0.01 * R * (1 + s), 0.15 * n)
            axes[1, t].add_patch(plt.Rectangle((x + inset, y + inset), n - 2 * inset, n - 2 * inset, fill=False, lw=1.3,
                                               ec=COLORS[s % len(COLORS)]))
        axes[0, t].set_title(f"t={t}  {len(boxes[t])} gazes", fontsize=7)
        if losses is not None:
            axes[-1, t].set_xlabel(f"loss {losses[t]:.3f}", fontsize=7)
    scales = "   ".join(f"{n} px" for n in config.scale_list)
    handles = [plt.Line2D([], [], color=COLORS[s % len(COLORS)], lw=2, label=f"scale {n} px")
               for s, n in enumerate(config.scale_list)]
    fig.legend(handles=handles, loc="lower center", ncol=len(handles), fontsize=7, frameon=False)
    fig.suptitle(title or scales, fontsize=9)
    fig.tight_layout(rect=(0, 0.04, 1, 0.97))
    save_figure(fig, path)


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
