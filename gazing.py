"""The gaze of a batch of clips, as three tensors: what follows from it, budgets, tiles.

Dimension key: B clips, T frames, S scales, V patch ids per frame (all scales), N gaze slots of a clip.
"""
import math
import operator
import re

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from lib.configurator import numbers


class Grids:
    """What follows from `scales` and `patch_size` of a model's config."""

    @property
    def scale_list(self):
        return [int(s) for s in self.scales.split("+")]

    @property
    def ids_per_scale(self):
        return [(s // self.patch_size) ** 2 for s in self.scale_list]

    @property
    def num_ids(self):  # V; also the id of the padding token
        return sum(self.ids_per_scale)

    def check_sizes(self):
        """ValueError naming what no model can have: a size below 1, scales that are not cut into whole patches."""
        for key, value in vars(self).items():
            if type(value) is int and value < 1:
                raise ValueError(f"{key}={value} must be at least 1")
        if not re.fullmatch(r"[0-9]+(\+[0-9]+)*", self.scales) or any(s % self.patch_size for s in self.scale_list):
            raise ValueError(f"scales={self.scales!r} must be multiples of patch_size={self.patch_size}, joined by +")



def pack_front(keep):
    """Indices (B, L) that move each row's kept tokens to the front in order, and where each token went (B, L)."""
    order = torch.argsort(~keep, dim=1, stable=True)
    return order, torch.argsort(order, dim=1)



def split_frames(gazing):
    """Gaze dict -> per frame (gazing_pos (B, n_t), if_padded (B, n_t))."""
    n = gazing["num_gazing_each_frame"].tolist()
    return list(zip(gazing["gazing_pos"].split(n, dim=1), gazing["if_padded_gazing"].split(n, dim=1), strict=True))



def join_frames(frames):
    return {"gazing_pos": torch.cat([ids for ids, _ in frames], dim=1),
            "if_padded_gazing": torch.cat([p for _, p in frames], dim=1),
            "num_gazing_each_frame": torch.tensor([ids.shape[1] for ids, _ in frames])}



def one_clip(gazing, row):
    """The gaze dict of one clip of a batch, on the CPU."""
    out = {k: gazing[k][row:row + 1].cpu() for k in ("gazing_pos", "if_padded_gazing")}
    return out | {"num_gazing_each_frame": gazing["num_gazing_each_frame"].cpu()}



def from_lists(frames, V, device):
    """Ids within the frame, per frame a (B, n_t) tensor -> gaze dict."""
    gazing = join_frames([(ids + V * t, torch.zeros_like(ids, dtype=torch.bool)) for t, ids in enumerate(frames)])
    return {k: v.to(device) for k, v in gazing.items()}



# ----------------------------------------------------------------------------------------------------------------------
# budgets


def draw_ratio(kind, fixed, low, high, rate, generator):
    """Average gazing ratio of a clip. kind: fixed | uniform(low, high) | exponential(rate) cut off to (low, high)."""
    if kind == "fixed":
        return fixed
    u = torch.rand((), generator=generator, dtype=torch.float64).item()
    if kind == "uniform":
        return low + u * (high - low)
    assert kind == "exponential", kind
    a, b = math.exp(-rate * low), math.exp(-rate * high)  # inverse of the truncated distribution function
    return -math.log(a - u * (a - b)) / rate



def parse_alpha(alpha, n_frames):
    """'10,3' -> [10, 3, 3, …]: the last value is repeated over the remaining frames."""
    values = numbers(alpha)
    if len(values) > n_frames or not all(0 < v < math.inf for v in values):
        raise ValueError(f"alpha={alpha!r} needs at most {n_frames} numbers (frames), all above 0, joined by commas")
    return values + values[-1:] * (n_frames - len(values))



def split_ratio(kind, ratio, n_frames, alpha, generator):
    """Per-frame ratios (T,) that average `ratio`. uniform: all equal. dirichlet: random shares. mean: their mean."""
    if kind == "uniform":
        return torch.full((n_frames,), float(ratio), dtype=torch.float64)
    alpha = torch.tensor(parse_alpha(alpha, n_frames), dtype=torch.float64)
    # a Dirichlet draw is normalised Gamma draws; numpy's take a seed, torch's take no generator
    seed = 0 if kind == "mean" else int(torch.randint(2 ** 31, (), generator=generator))
    share = alpha if kind == "mean" else torch.from_numpy(np.random.default_rng(seed).gamma(alpha.numpy()))
    return (share / share.sum() * ratio * n_frames).clamp(0, 1)



def random_gazing(budgets, n_clips, n_ids, generator=None):
    """A gaze dict of distinct random patches: budgets (T,) patches in each frame, the same number for every clip."""
    pos = []
    for t, n_t in enumerate(budgets):
        scores = torch.rand(n_clips, n_ids, generator=generator)
        pos.append(scores.argsort(dim=1)[:, :n_t] + n_ids * t)
    pos = torch.cat(pos, dim=1)
    return {"gazing_pos": pos, "if_padded_gazing": torch.zeros_like(pos, dtype=torch.bool),
            "num_gazing_each_frame": torch.tensor(list(budgets))}



def to_budgets(ratios, n_ids):
    """Per-frame ratios -> patches per frame, at least one; the rule of Gaze.generate."""
    return [max(1, int(r * n_ids + 1e-4)) for r in ratios]



def last_slots(gazing):
    """(B, T) index of each frame's last real slot (its first slot where a frame has none)."""
    out, at = [], 0
    for n_t in gazing["num_gazing_each_frame"].tolist():
        real = ~gazing["if_padded_gazing"][:, at:at + n_t]
        slots = torch.arange(n_t, device=real.device)  # published decoding may leave padding before a real slot
        out.append(at + (real * slots).amax(1) if n_t else torch.full((len(real),), at, device=real.device))
        at += n_t
    return torch.stack(out, dim=1)



# ----------------------------------------------------------------------------------------------------------------------
# tiles


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

