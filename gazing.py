"""The gazing of a batch of clips: three tensors, and everything that follows from them without a network.

A gazing of B clips is a dict of three tensors, frame after frame along N (paper, section 3):
    gazing_pos             (B, N) int64   patch id within its frame + V * frame
    if_padded_gazing       (B, N) bool    True = a padded slot; its gazing_pos means nothing
    num_gazing_each_frame  (T,)   int64   slots of each frame, the same for all clips; sums to N. Lies on the CPU

Gaze.generate adds gazing_mask, a list of S tensors (B, T, V_s), 1 where a patch is gazed.

    where = locate(gazing, gaze.config, source_size=(1080, 1920))     # frame, scale, row, column, box of every slot
    seen = grid(gazing["gazing_mask"], (14, 14))                      # (B, T, 14, 14), the union of all scales

Dimension key: B clips, T frames, S scales, V patch ids per frame (all scales), V_s of scale s, N slots of a clip.
"""
import math
import operator
import re

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from lib.configurator import check_patches, check_sizes, numbers
from lib.loader import send

TENSORS = ("gazing_pos", "if_padded_gazing", "num_gazing_each_frame")

# ----------------------------------------------------------------------------------------------------------------------
# patch ids


class Grids:
    """What follows from `scales` and `patch_size` of a model's config. Ids of a frame: scale by scale, row by row."""

    @property
    def scale_list(self):
        return [int(side) for side in self.scales.split("+")]

    @property
    def ids_per_scale(self):
        return [(side // self.patch_size) ** 2 for side in self.scale_list]

    @property
    def grids(self):  # rows and columns of patches, scale by scale
        return [(side // self.patch_size, side // self.patch_size) for side in self.scale_list]

    @property
    def num_ids(self):  # V; also the id of the padding token
        return sum(self.ids_per_scale)

    def check_sizes(self):
        """ValueError names the first setting that no model can have."""
        check_sizes(self)
        if not re.fullmatch(r"[0-9]{1,6}(\+[0-9]{1,6})*", self.scales):
            raise ValueError(f"scales={self.scales!r} must be sides in pixels, joined by +")
        for side in self.scale_list:
            check_patches(f"scales={self.scales!r}: side", side, self.patch_size)


def check_gazing(gazing, n_clips, n_frames):
    """ValueError says how the three tensors fit neither each other nor a video of n_clips (or copies of these)."""
    positions, padded, counts = (gazing[name] for name in TENSORS)
    n_slots = int(counts.sum())
    if positions.dim() != 2 or positions.shape != padded.shape or positions.shape[1] != n_slots:
        raise ValueError(f"gazing: gazing_pos {tuple(positions.shape)} and if_padded_gazing {tuple(padded.shape)} must "
                         f"be (B, {n_slots}), the sum of num_gazing_each_frame")
    if len(counts) != n_frames:
        raise ValueError(f"gazing is of {len(counts)} frames, the video has {n_frames}")
    if len(positions) == 0 or len(positions) % n_clips:
        raise ValueError(f"gazing is of {len(positions)} clips, the video of {n_clips}")


def frame_of_slot(gazing):
    """(N,) index of the frame that each slot belongs to, on the device of the slots."""
    counts = gazing["num_gazing_each_frame"].cpu()
    frame = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return send(frame, gazing["gazing_pos"].device)


def locate(gazing, config, source_size=None, crop=None, grids=None):
    """Where every slot of a gazing lies.

    Returns a dict of tensors: frame, scale, row, column (B, N) int64; box (B, N, 4) float32, its y0, x0, y1, x1;
    padded (B, N) bool. Padded slots have -1 and boxes of NaN.

    config: of the gaze model, or anything with its scale_list and patch_size. Boxes are counted in pixels
        of the model's input (R, R)      unless something else is given;
        of the source picture            with source_size=(height, width), whose centre square the model was given;
        of any other picture             with crop=(top, left, side): the square that the model was given, in the
                                         picture's pixels; or crop=(top, left, height, width).
    grids: for whole frames in tiles, (rows, columns) of patches at each scale, as in Tiling.grids and gaze.npz; crop is
        then the first tile (Tiling.crop). Boxes may reach into a tile's padding; source_size cuts them off.
    """
    position = gazing["gazing_pos"]
    padded = gazing["if_padded_gazing"]
    device = position.device

    # the part of the picture that the model (or its first tile) was given
    if crop is None and source_size is not None:
        if grids is not None:
            raise ValueError("locate: with grids, say how large a tile is: crop=tiling.crop(source_size)")
        crop = centre_square(source_size)
    if crop is None:
        crop = (0, 0, config.scale_list[-1])
    top = float(crop[0])
    left = float(crop[1])
    height = float(crop[2])
    width = float(crop[-1])

    # tables with a row per scale: the grid of a whole frame, and how many patches lie along a side of `crop`
    per_side = torch.tensor(config.scale_list, device=device) // config.patch_size
    if grids is None:
        grids = torch.stack([per_side, per_side], dim=1)
    grids = torch.as_tensor(grids, device=device)
    n_rows = grids[:, 0]
    n_columns = grids[:, 1]
    n_ids = n_rows * n_columns
    end_id = n_ids.cumsum(0)
    first_id = end_id - n_ids

    # a slot's id within its frame names scale, row and column
    frame = frame_of_slot(gazing).expand_as(position)
    patch_id = position - end_id[-1] * frame
    patch_id = patch_id.masked_fill(padded, 0)
    scale = torch.bucketize(patch_id, end_id, right=True)
    id_in_scale = patch_id - first_id[scale]
    row = id_in_scale // n_columns[scale]
    column = id_in_scale % n_columns[scale]

    # corners in pixels
    patch_height = height / per_side[scale]
    patch_width = width / per_side[scale]
    y0 = top + row * patch_height
    x0 = left + column * patch_width
    y1 = y0 + patch_height
    x1 = x0 + patch_width
    box = torch.stack([y0, x0, y1, x1], dim=-1)
    if source_size is not None:
        limit = torch.tensor([*source_size, *source_size], dtype=box.dtype, device=device)
        box = torch.minimum(box, limit)

    return {"frame": frame.masked_fill(padded, -1),
            "scale": scale.masked_fill(padded, -1),
            "row": row.masked_fill(padded, -1),
            "column": column.masked_fill(padded, -1),
            "box": box.masked_fill(padded.unsqueeze(-1), math.nan),
            "padded": padded}


def centre_square(source_size):
    """(height, width) of a picture -> (top, left, side) of its centre square, which clips are cut to."""
    height, width = source_size
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side


def grid(gazing_mask, size, grids=None):
    """The union of all scales on one grid: gazing_mask, S tensors (B, T, V_s) -> (B, T, h, w) bool, size = (h, w).

    A cell counts as gazed when a gazed patch of any scale covers its centre: exact where h and w are multiples of every
    scale's grid. grids: (rows, columns) of each scale; without, they are squares.
    """
    height, width = size
    union = None
    for s, mask in enumerate(gazing_mask):
        if grids is None:
            n_rows = n_columns = math.isqrt(mask.shape[-1])
        else:
            n_rows, n_columns = grids[s]
        patches = mask.bool().unflatten(-1, (n_rows, n_columns))

        # row and column of the patch that covers the centre of each cell
        twice_centre = 2 * torch.arange(height, device=mask.device) + 1
        row = twice_centre * n_rows // (2 * height)
        twice_centre = 2 * torch.arange(width, device=mask.device) + 1
        column = twice_centre * n_columns // (2 * width)

        cells = patches[:, :, row]
        cells = cells[:, :, :, column]
        union = cells if union is None else union | cells
    return union


def merged_groups(gazing_mask, size, merge=2, n_frames=1, grids=None):
    """Which tokens to keep of an encoder that merges merge x merge patches of one grid, and n_frames frames, into one.

    gazing_mask: S tensors (B, T, V_s); size (h, w): of the encoder's grid, in patches; grids: as in grid().
    Returns (B, T / n_frames, h / merge, w / merge) bool: tokens of which a gazed patch of any scale covers a part.
    ValueError: the grid holds no whole groups."""
    if size[0] % merge or size[1] % merge:
        raise ValueError(f"a grid of {size[0]} x {size[1]} patches does not split into groups of {merge} x {merge}")
    cells = grid(gazing_mask, size, grids)
    groups = rearrange(cells, "b (t f) (i y) (j x) -> b t i j (f y x)", f=n_frames, y=merge, x=merge)
    return groups.any(dim=-1)


def to_masks(gazing, ids_per_scale):
    """gazing_mask of a gazing: a list of S tensors (B, T, V_s), 1 where a patch is gazed."""
    V = sum(ids_per_scale)
    T = len(gazing["num_gazing_each_frame"])
    position = gazing["gazing_pos"]

    # padded slots fall into one column behind the last id, which is cut off
    column = torch.where(gazing["if_padded_gazing"], T * V, position)
    flat = torch.zeros(len(position), T * V + 1, device=position.device)
    flat.scatter_(1, column, 1.0)
    by_frame = flat[:, :-1].unflatten(1, (T, V))
    return list(by_frame.split(ids_per_scale, dim=2))


def last_slots(gazing):
    """(B, T) index of each frame's last real slot (its first slot where a frame has none)."""
    padded = gazing["if_padded_gazing"]
    counts = send(gazing["num_gazing_each_frame"], padded.device)
    first = counts.cumsum(0) - counts
    first = first.expand(len(padded), -1)

    # published decoding may leave padding before a real slot, so look for the highest index of all real ones
    frame = frame_of_slot(gazing).expand_as(padded)
    slot = torch.arange(padded.shape[1], device=padded.device)
    real_slot = torch.where(padded, 0, slot)
    return first.scatter_reduce(1, frame, real_slot, "amax")


def where_slots_are_predicted(counts, n_vision, K):
    """Which token predicts which slot, in a sequence of n_vision vision tokens and counts[t] slots for each frame t.

    The last vision token of a frame predicts slots 0 to K-1, slot K-1 the next K, and so on. Returns query_index (Q,),
    the index of these tokens, and head_of_slot (N,): query number · K + head that a slot's logits come from.
    """
    counts = torch.tensor(counts)
    frames = torch.arange(len(counts))

    # a frame has a query per K slots, and one more behind a full last block: for the loss after its last slot
    n_queries = counts // K + 1
    first_query = n_queries.cumsum(0) - n_queries
    frame = frames.repeat_interleave(n_queries)
    block = torch.arange(len(frame)) - first_query[frame]
    first_token = n_vision * frames + counts.cumsum(0) - counts
    query_index = first_token[frame] + n_vision - 1 + K * block

    # slot j of a frame: head j % K of its query j // K
    frame = frames.repeat_interleave(counts)
    first_slot = counts.cumsum(0) - counts
    j = torch.arange(len(frame)) - first_slot[frame]
    return query_index, first_query[frame] * K + j


def already_gazed(ids, counts, V):
    """(B, N, V + 1) True where an id was taken earlier in the same frame, and for the padding id V everywhere."""
    taken = []
    for frame_ids in ids.split(counts, dim=1):
        one_hot = F.one_hot(frame_ids, V + 1)
        n_before = one_hot.cumsum(1) - one_hot
        taken.append(n_before > 0)
    taken = torch.cat(taken, dim=1)
    taken[..., V] = True

    # a padded slot "takes" V, whose logit must stay finite to be gathered: its log-probability is set to 0 afterwards
    is_padded = (ids == V).unsqueeze(-1)
    return taken & ~is_padded


# ----------------------------------------------------------------------------------------------------------------------
# cut and join


def split_frames(gazing):
    """Gazing -> list over frames of (gazing_pos (B, n_t), if_padded_gazing (B, n_t))."""
    counts = gazing["num_gazing_each_frame"].tolist()
    positions = gazing["gazing_pos"].split(counts, dim=1)
    padded = gazing["if_padded_gazing"].split(counts, dim=1)
    return list(zip(positions, padded, strict=True))


def join_frames(frames):
    """The inverse of split_frames."""
    positions, padded = zip(*frames, strict=True)
    return {"gazing_pos": torch.cat(positions, dim=1),
            "if_padded_gazing": torch.cat(padded, dim=1),
            "num_gazing_each_frame": torch.tensor([ids.shape[1] for ids in positions])}


def from_lists(frames, V, device):
    """Ids within the frame, per frame a (B, n_t) tensor -> gazing."""
    joined = []
    for t, ids in enumerate(frames):
        joined.append((ids + V * t, torch.zeros_like(ids, dtype=torch.bool)))
    return to_device(join_frames(joined), device)


def to_device(gazing, device):
    """The same gazing on another device. num_gazing_each_frame goes to the CPU, where it is read."""
    moved = {}
    for key, value in gazing.items():
        if key == "num_gazing_each_frame":
            moved[key] = value.cpu()
        elif isinstance(value, list):
            moved[key] = [send(mask, device) for mask in value]
        else:
            moved[key] = send(value, device)
    return moved


def rows(gazing, index):
    """The gazing of some clips of a batch. index: a slice, a list or a tensor of clips; one number keeps the axis."""
    if isinstance(index, int):
        index = [index]
    chosen = {}
    for key, value in gazing.items():
        if key == "num_gazing_each_frame":
            chosen[key] = value
        elif isinstance(value, list):
            chosen[key] = [mask[index] for mask in value]
        else:
            chosen[key] = value[index]
    return chosen


def one_clip(gazing, row):
    """The three tensors of one clip of a batch, on the CPU."""
    tensors = {key: gazing[key] for key in ("gazing_pos", "if_padded_gazing", "num_gazing_each_frame")}
    return to_device(rows(tensors, row), "cpu")


def join_clips(gazings, num_ids):
    """Gazings of several batches of clips with as many frames -> one gazing of all their clips. A frame gets as many
    slots as its longest clip takes."""
    if len(gazings) == 1:
        return gazings[0]
    split = [split_frames(gazing) for gazing in gazings]
    joined = []
    for t, parts in enumerate(zip(*split, strict=True)):
        n_slots = max(ids.shape[1] for ids, _ in parts)
        positions = []
        padded = []
        for ids, is_padded in parts:
            missing = n_slots - ids.shape[1]
            positions.append(F.pad(ids, (0, missing), value=num_ids * (t + 1)))
            padded.append(F.pad(is_padded, (0, missing), value=True))
        joined.append((torch.cat(positions), torch.cat(padded)))
    return join_frames(joined)


def cut_chunks(clips, n_frames):
    """Clips (T, …) of a tensor or list -> list of all their chunks (n_frames, …), which follow one another. The last
    chunk of a clip is filled up with its last frame."""
    chunks = []
    for clip in clips:
        for chunk in clip.split(n_frames):
            missing = n_frames - len(chunk)
            if missing:
                fill = chunk[-1:].expand(missing, *chunk.shape[1:])
                chunk = torch.cat([chunk, fill])
            chunks.append(chunk)
    return chunks


def join_chunks(chunks, num_ids):
    """Gazings of consecutive chunks of the same clips -> one gazing of the whole video."""
    joined = []
    for chunk in chunks:
        offset = num_ids * len(joined)
        joined += [(ids + offset, padded) for ids, padded in split_frames(chunk)]
    return join_frames(joined)


def drop_empty_slots(gazing):
    """The gazing without slots that are padded in all clips, but one per frame at least."""
    kept = []
    for ids, padded in split_frames(gazing):
        used = ~padded.all(dim=0)
        if len(used):
            used[0] |= ~used.any()
        kept.append((ids[:, used], padded[:, used]))
    return join_frames(kept)


def may_be_padded(padded):
    """Whether a network has to mind padded slots, (B, N) True. On a GPU always: looking would wait for it."""
    return padded.is_cuda or bool(padded.any())


def pack_front(keep):
    """keep (B, L) bool -> the permutation (B, L) that moves each row's kept tokens to the front, in order, and its
    inverse (B, L): where each token went."""
    permutation = torch.argsort(~keep, dim=1, stable=True)
    return permutation, torch.argsort(permutation, dim=1)


def marked_ids(marked):
    """marked (B, V) bool -> the ids marked in each row, ascending, and which are padding: two (B, n), n of the fullest
    row."""
    count = marked.sum(1, keepdim=True)
    n = int(count.max())
    ids, _ = pack_front(marked)
    padded = torch.arange(n, device=marked.device) >= count
    return ids[:, :n], padded


def batches(clips, size):
    """Yield clips, a tensor (B, …) or a list of B tensors, `size` at a time."""
    for start in range(0, len(clips), size):
        part = clips[start:start + size]
        yield part if isinstance(part, torch.Tensor) else torch.stack(part)


# ----------------------------------------------------------------------------------------------------------------------
# budgets


def draw_ratio(kind, fixed, low, high, rate, generator):
    """Average gazing ratio of a clip. kind: fixed | uniform(low, high) | exponential(rate) cut off to (low, high)."""
    if kind == "fixed":
        return fixed
    u = torch.rand((), generator=generator, dtype=torch.float64).item()
    if kind == "uniform":
        return low + u * (high - low)

    # the inverse of the truncated exponential's distribution function
    assert kind == "exponential", kind
    at_low = math.exp(-rate * low)
    at_high = math.exp(-rate * high)
    return -math.log(at_low - u * (at_low - at_high)) / rate


def parse_alpha(alpha, n_frames):
    """'10,3' -> [10, 3, 3, …]: the last value is repeated over the remaining frames."""
    values = numbers(alpha)
    if len(values) > n_frames or not all(0 < value < math.inf for value in values):
        raise ValueError(f"alpha={alpha!r} needs at most {n_frames} numbers (frames), all above 0, joined by commas")
    return values + values[-1:] * (n_frames - len(values))


def split_ratio(kind, ratio, n_frames, alpha, generator):
    """Per-frame ratios (T,) that average `ratio`. kind: uniform (all equal) | dirichlet (random shares) | mean (of the
    Dirichlet's shares)."""
    if kind == "uniform":
        return torch.full((n_frames,), float(ratio), dtype=torch.float64)
    share = torch.tensor(parse_alpha(alpha, n_frames), dtype=torch.float64)

    # A Dirichlet draw is normalised Gamma draws. They are numpy's, with a seed: torch's take no generator.
    if kind == "dirichlet":
        seed = int(torch.randint(2 ** 31, (), generator=generator))
        draws = np.random.default_rng(seed).gamma(share.numpy())
        share = torch.from_numpy(draws)
    share = share / share.sum()
    return (share * ratio * n_frames).clamp(0, 1)


def allowed_ids(allowed, config):
    """Scales, "112+224", or a list or tensor of ids -> (V,) bool. ValueError names what the config does not have."""
    V = config.num_ids
    mask = torch.zeros(V, dtype=torch.bool)
    if isinstance(allowed, str):
        first_id = 0
        sides = allowed.split("+")
        for side, n_ids in zip(config.scale_list, config.ids_per_scale, strict=True):
            mask[first_id:first_id + n_ids] = str(side) in sides
            first_id += n_ids
        unknown = set(sides) - {str(side) for side in config.scale_list}
        if unknown:
            raise ValueError(f"allowed={allowed!r}: the model's scales are {config.scales}, joined by +")
        return mask

    ids = torch.as_tensor(allowed)
    if ids.dim() != 1 or ids.numel() == 0 or ids.dtype != torch.int64 or ids.min() < 0 or ids.max() >= V:
        raise ValueError(f"allowed must be scales of the model, such as {str(config.scale_list[-1])!r}, or a list of "
                         f"ids from 0 to {V - 1}")
    mask[ids] = True
    return mask


def to_budgets(ratios, n_ids):
    """Per-frame ratios -> patches per frame, at least one; the rule of Gaze.generate."""
    return [max(1, int(ratio * n_ids + 1e-4)) for ratio in ratios]


def random_gazing(budgets, n_clips, n_ids, generator=None):
    """A gazing of distinct random patches: budgets (T,) patches in each frame, the same number for every clip."""
    frames = []
    for n_t in budgets:
        scores = torch.rand(n_clips, n_ids, generator=generator)
        frames.append(scores.argsort(dim=1)[:, :n_t])
    return from_lists(frames, n_ids, "cpu")


def all_patches(config, n_clips, n_frames, scale=None):
    """The gazing of every patch of every frame. config: a GazeConfig, or the GazeSigLIP that will read it. scale: of
    one scale only, -1 the finest."""
    ids_per_scale = config.ids_per_scale
    ids = torch.arange(config.num_ids)
    if scale is not None:
        ids = ids.split(ids_per_scale)[scale]
    frames = [ids.expand(n_clips, -1)] * n_frames
    gazing = from_lists(frames, config.num_ids, "cpu")
    return gazing | {"gazing_mask": to_masks(gazing, ids_per_scale)}


def from_heatmap(heat, budget, config):
    """Gazes by a heat map in place of the model: where people looked, what a detector found.

    heat (B, T, h, w), tensor or array of any resolution, at least 0; budget: patches per frame, one number or a list of
    T; config: a GazeConfig, or the GazeSigLIP that will read the gazes. Returns a gazing with gazing_mask, each frame's
    patches coarse to fine. ValueError: a map with negative numbers or NaN, a budget that no frame has.

    The patch taken next is the one that adds most: the heat under it times what it sharpens. So coarse patches come
    where heat is spread out, fine ones where it peaks."""
    V = config.num_ids
    finest = config.grids[-1]
    heat = torch.as_tensor(heat)
    if heat.dim() != 4 or heat.numel() == 0 or not heat.isfinite().all() or (heat < 0).any():
        raise ValueError(f"heat has shape {tuple(heat.shape)}, expected (B, T, h, w), finite numbers from 0 up")
    B, T = heat.shape[:2]
    budgets = [budget] * T if isinstance(budget, (int, float)) else list(budget)
    if len(budgets) != T or not all(n_t in range(1, V + 1) for n_t in budgets):
        raise ValueError(f"budget={budget}: give 1 to {V} patches, one number or one for each of the {T} frames")

    # the finest grid's cells: their heat, and which of them each patch covers
    heat = F.interpolate(heat.float(), finest, mode="area").flatten(2)  # (B, T, cells)
    single_patches = torch.eye(V, device=heat.device).unsqueeze(0).split(config.ids_per_scale, dim=2)
    covers = grid(single_patches, finest, config.grids)[0]
    covers = covers.flatten(1).float()                                  # (V, cells)

    # how sharply each patch shows them, the finest scale's being 1
    sharpness = []
    for n_ids in config.ids_per_scale:
        sharpness += [(n_ids / config.ids_per_scale[-1]) ** 0.5] * n_ids
    sharpness = torch.tensor(sharpness, device=heat.device)             # (V,)

    frames = []
    for t, n_t in enumerate(map(int, budgets)):
        seen = torch.zeros_like(heat[:, t])                             # how sharply each cell is seen by now
        chosen = torch.zeros(B, V, dtype=torch.bool, device=heat.device)
        for _ in range(n_t):
            sharper = sharpness[:, None] * covers - seen.unsqueeze(1)   # (B, V, cells)
            gain = (heat[:, t].unsqueeze(1) * sharper.clamp(min=0)).sum(dim=2)
            best = gain.masked_fill(chosen, -1).argmax(dim=1)
            chosen.scatter_(1, best.unsqueeze(1), True)
            seen = torch.maximum(seen, sharpness[best, None] * covers[best])
        ids, _ = pack_front(chosen)                                     # ascending: coarse to fine
        frames.append(ids[:, :n_t])
    gazing = from_lists(frames, V, heat.device)
    return gazing | {"gazing_mask": to_masks(gazing, config.ids_per_scale)}


def per_row(value, n_rows, name):
    """float | list of T | (rows, T) -> (rows,), the same for all frames, or (rows, T). ValueError names what is odd."""
    value = torch.as_tensor(value, dtype=torch.float64).cpu()
    if value.numel() == 0 or value.isnan().any():
        raise ValueError(f"{name}={value.tolist()} is not a number for every frame")
    if value.dim() == 0:
        return value.expand(n_rows)
    if value.dim() > 2:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected one number, (T,) or (clips, T)")
    if value.dim() == 2 and len(value) not in (1, n_rows):
        raise ValueError(f"{name} has {len(value)} rows for {n_rows} clips")
    return value.expand(n_rows, -1)


def every_frame(value, T, name):
    """What per_row returns -> (rows, T)."""
    if value.dim() == 1:
        return value.unsqueeze(1).expand(-1, T)
    if value.shape[1] != T:
        raise ValueError(f"{name} has values for {value.shape[1]} frames, the video has {T}")
    return value


def at_frame(value, t, name):
    """(B,) of frame t: what per_row returns is the same for all frames, or has a column for each."""
    if value.dim() == 1:
        return value
    if t >= value.shape[1]:
        raise ValueError(f"{name} has values for {value.shape[1]} frames, frame {t} was asked")
    return value[:, t]


# ----------------------------------------------------------------------------------------------------------------------
# tiles


def as_sides(scales, key="scales"):
    """"56+112", or a list of ints or (height, width) pairs -> list of (height, width)."""
    message = (f"{key}={scales!r} must be sides joined by '+', such as '32+64+112+224', or a list of ints or "
               "(height, width) pairs")
    try:
        if isinstance(scales, str):
            scales = [int(side) for side in scales.split("+")]
        sides = []
        for side in scales:
            height, width = side if isinstance(side, (tuple, list)) else (side, side)
            sides.append((operator.index(height), operator.index(width)))
    except (TypeError, ValueError):
        raise ValueError(message) from None
    if not sides:
        raise ValueError(message)
    return sides


class Tiling:
    """Gazings for an encoder with other resolutions or patches.

    target_scales: as many sides as the model has scales, "64+128", ints or (height, width) pairs; None: the model's
    times target_patch_size / patch_size. A tile holds as many target patches as the model's finest grid has and is
    gazed at on its own, at the ratio asked for; the tiles' masks are put together and cropped, so gazes in the padding
    vanish. The order of gazing is lost: ids of a frame ascend.
    """

    def __init__(self, config, target_scales, target_patch_size):
        patch = config.patch_size if target_patch_size is None else target_patch_size
        if patch < 1:
            raise ValueError(f"target_patch_size={patch} must be at least 1")
        if target_scales is None:
            target_scales = [side * patch // config.patch_size for side in config.scale_list]
        sides = as_sides(target_scales, "target_scales")
        height, width = sides[-1]

        self.patch = patch
        self.size = (height, width)                                        # of the whole frame, in pixels
        self.grids = [(h // patch, w // patch) for h, w in sides]          # of the whole frame, in patches
        self.sides = [side // config.patch_size for side in config.scale_list]  # of a tile's grids, in patches
        self.tile = self.sides[-1] * patch                                 # of a tile, in pixels
        # a fraction of a patch at the border counts: a tile must cover it
        self.rows = math.ceil(height / self.tile)
        self.columns = math.ceil(width / self.tile)

        fits = len(sides) == len(self.sides)
        for (n_rows, n_columns), side in zip(self.grids, self.sides, strict=False):
            fits = fits and 1 <= n_rows <= self.rows * side
            fits = fits and 1 <= n_columns <= self.columns * side
        if not fits:
            raise ValueError(f"target_scales={target_scales}, target_patch_size={patch} do not fit "
                             f"scales={config.scales}: as many, in about the same proportions, at least {patch} "
                             "pixels each")

    def crop(self, source_size):
        """The first tile in pixels of a source picture (height, width): (top, left, height, width) for locate()."""
        tile_height = self.tile * source_size[0] / self.size[0]
        tile_width = self.tile * source_size[1] / self.size[1]
        return 0, 0, tile_height, tile_width

    def clips(self, video):
        """video (B, T, C, H, W), resized to the finest target scale and padded with 0 where needed -> list of its tiles
        (T, C, tile, tile), clip by clip, then row by row; they share its memory."""
        frames = video.flatten(0, 1)
        if frames.shape[-2:] != self.size:
            frames = F.interpolate(frames, self.size, mode="bicubic", align_corners=False)
        below = self.rows * self.tile - self.size[0]
        right = self.columns * self.tile - self.size[1]
        if below or right:
            frames = F.pad(frames, (0, right, 0, below))

        tiles = []
        for clip in frames.unflatten(0, video.shape[:2]):
            for row in clip.split(self.tile, dim=2):
                tiles += row.split(self.tile, dim=3)
        return tiles

    def cut(self, video):
        """The same as one tensor (B·rows·columns, T, C, tile, tile)."""
        return torch.stack(self.clips(video))

    def join(self, masks):
        """gazing_mask of the tiles -> gazing of whole frames, with gazing_mask; ids count the target's patches."""
        whole = []
        for mask, side, (n_rows, n_columns) in zip(masks, self.sides, self.grids, strict=True):
            joined = rearrange(mask, "(b i j) t (h w) -> b t (i h) (j w)", i=self.rows, j=self.columns, h=side)
            cropped = joined[:, :, :n_rows, :n_columns]
            whole.append(cropped.flatten(2))
        gazed = torch.cat(whole, dim=2).bool()  # (B, T, V)

        frames = []
        for t, frame in enumerate(gazed.unbind(1)):
            ids, padded = marked_ids(frame)
            frames.append((ids + gazed.shape[2] * t, padded))
        return join_frames(frames) | {"gazing_mask": whole}


# ----------------------------------------------------------------------------------------------------------------------
# pictures. What draws them is imported where it is used: models need neither video files nor Pillow

SCALE_COLORS = ("#ff5a5f", "#ffb400", "#3ddc84", "#4aa8ff", "#c77dff")  # coarse to fine


def to_picture(frame, size=None):
    """A frame of model pixels (3, H, W), resized as the model resizes to its scales -> (h, w, 3) uint8."""
    from data import from_model_pixels
    frame = frame.detach().float().cpu()
    if size is not None and frame.shape[-2:] != tuple(size):
        frame = F.interpolate(frame.unsqueeze(0), tuple(size), mode="bicubic", align_corners=False)[0]
    pixels = from_model_pixels(frame).mul(255).round()
    return pixels.byte().permute(1, 2, 0).contiguous().numpy()


def paste_patches(canvas, picture, boxes):
    """Copy what lies in the boxes (n, 4) from a picture onto a canvas (H, W, 3) of the same size, in place."""
    for y0, x0, y1, x1 in boxes.round().int().tolist():
        canvas[y0:y1, x0:x1] = picture[y0:y1, x0:x1]


def sheet(path, video, gazing, config, reconstruction=None, title="", losses=None):
    """Save a contact sheet of one clip as PNG: rows video, gazes, gazed pixels and reconstruction, a column per frame.

    video (T, 3, R, R) and reconstruction (T, 3, R, R): model pixels; gazing: of one clip; losses: T numbers.
    """
    from lib import video_out
    cell = config.scale_list[-1] * max(1, round(160 / config.scale_list[-1]))
    where = locate(gazing, config, crop=(0, 0, cell))
    colors = [SCALE_COLORS[s % len(SCALE_COLORS)] for s in range(len(config.scale_list))]
    pictures = {"video": [], "gazes": [], "gazed pixels": []}
    titles = []

    for t, frame in enumerate(video):
        picture = video_out.resize(to_picture(frame), cell, cell)
        outlined = picture // 2
        gazed = np.full_like(picture, 64)

        # this frame's patches, coarse to fine: fine ones cover coarse ones
        real = where["frame"][0] == t  # padded slots have -1
        for s, side in enumerate(config.scale_list):
            boxes = where["box"][0, real & (where["scale"][0] == s)].cpu()
            resolved = video_out.resize(to_picture(frame, (side, side)), cell, cell)
            paste_patches(gazed, resolved, boxes)

            # finer outlines lie further inside, so that all are seen where they meet
            inside = torch.tensor([s, s, -s, -s])
            outlined = video_out.draw_boxes(outlined, (boxes + inside)[:, [1, 0, 3, 2]], colors[s], width=2)

        pictures["video"].append(picture)
        pictures["gazes"].append(outlined)
        pictures["gazed pixels"].append(gazed)
        titles.append(f"t={t}  {int(real.sum())} gazes")

    if reconstruction is not None:
        pictures["reconstruction"] = [to_picture(frame) for frame in reconstruction]
    captions = [] if losses is None else [f"loss {loss:.3f}" for loss in losses]
    legend = {f"scale {side} px": color for side, color in zip(config.scale_list, colors, strict=True)}
    video_out.contact_sheet(path, pictures, titles, captions, legend, title, cell)
