"""Gazes for an encoder with other resolutions or patches: the frame in tiles of the gaze model's size."""
import math
import operator

import torch
import torch.nn.functional as F
from einops import rearrange

from model import join_frames, pack_front


def as_sides(scales, key="scales"):
    """"56+112", or a list of ints or (height, width) pairs -> list of (height, width)."""
    try:
        sides = [int(s) for s in scales.split("+")] if isinstance(scales, str) else scales
        sides[0]
        return [(int(s[0]), int(s[1])) if isinstance(s, (tuple, list)) else (operator.index(s),) * 2 for s in sides]
    except (TypeError, ValueError, IndexError):
        raise ValueError(f"{key}={scales!r} must be sides joined by '+', such as '32+64+112+224', or a list of "
                         "ints or (height, width) pairs") from None


class Tiling:
    """Gazes for an encoder with other resolutions or patches.

    target_scales: as many sides as the model has scales, "64+128", ints or (height, width) pairs; None: the model's
    times target_patch_size / patch_size. A tile holds as many target patches as the model's finest grid has and is
    gazed at on its own, at the ratio asked for; the tiles' masks are put together and cropped, so gazes in the padding
    vanish. The order of gazing is lost: ids of a frame ascend.
    """

    def __init__(self, config, target_scales, target_patch_size):
        self.patch = p = config.patch_size if target_patch_size is None else target_patch_size
        if p < 1:
            raise ValueError(f"target_patch_size={p} must be at least 1")
        if target_scales is None:
            target_scales = [s * p // config.patch_size for s in config.scale_list]
        sides = as_sides(target_scales, "target_scales")
        self.sides = [s // config.patch_size for s in config.scale_list]  # of a tile's grids, in patches
        self.grids = [(h // p, w // p) for h, w in sides]  # of the whole frame
        self.size = sides[-1]
        # a fraction of a patch at the border counts: a tile must cover it
        self.rows, self.columns = (math.ceil(n / p / self.sides[-1]) for n in self.size)
        if len(sides) != len(self.sides) or any(
                h < 1 or w < 1 or h > self.rows * g or w > self.columns * g
                for (h, w), g in zip(self.grids, self.sides, strict=False)):
            raise ValueError(f"target_scales={target_scales}, target_patch_size={p} do not fit scales={config.scales}: "
                             f"as many, in about the same proportions, at least {p} pixels each")

    def cut(self, video):
        """video (B, T, 3, H, W), resized to the finest target scale, padded with 0 -> tiles (B·rows·columns, T, 3, …),
        b, then row, then column."""
        x = video.flatten(0, 1)
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode="bicubic", align_corners=False)
        tile = self.sides[-1] * self.patch
        x = F.pad(x, (0, self.columns * tile - self.size[1], 0, self.rows * tile - self.size[0]))
        return rearrange(x, "(b t) c (i h) (j w) -> (b i j) t c h w", b=len(video), i=self.rows, j=self.columns)

    def repeat(self, value):
        """Values per clip and frame -> per tile and frame; others as they are."""
        if value is None or torch.as_tensor(value).dim() < 2 or len(value) == 1:
            return value
        return torch.as_tensor(value).repeat_interleave(self.rows * self.columns, dim=0)

    def join(self, masks):
        """gazing_mask of the tiles -> gaze dict of whole frames, with gazing_mask; ids count the target's patches."""
        whole = [rearrange(m, "(b i j) t (h w) -> b t (i h) (j w)", i=self.rows, j=self.columns, h=g)[:, :, :h, :w]
                 .flatten(2) for m, g, (h, w) in zip(masks, self.sides, self.grids, strict=True)]
        seen, frames = torch.cat(whole, dim=2).bool(), []
        for t, frame in enumerate(seen.unbind(1)):
            n = frame.sum(1, keepdim=True)
            padded = torch.arange(int(n.max()), device=n.device) >= n
            frames.append((pack_front(frame)[0][:, :padded.shape[1]] + seen.shape[2] * t, padded))
        return join_frames(frames) | {"gazing_mask": whole}
