"""Which way of choosing patches reconstructs held-out videos best, at equal budgets?

    python eval.py --root=data/mine --videomae=out/videomae --models=ntp=out/ntp,grpo=out/grpo
    python eval.py … --codec=true --target_loss=0.7 --requirements=0.6,0.7,0.8

Compares, at the same number of patches in every frame: random patches; uniform (coarse to fine, evenly spread); frame
difference (first frame coarse to fine, later frames where pixels changed most); codec (the same with the file's motion
vectors); greedy search with the reconstructor; and trained gaze models. Measures

- reconstruction loss against ratio, PSNR, SSIM, the ratio that each method needs for `target_loss`;
- motion and detail under the gazed patches over their mean in the frame (1: what random patches have): do gazes lie
  where something moves, and finer ones where there is detail?
- how well the models predict their own loss, and what comes of stopping by it (`requirements`).

Results go to the screen and to <out_dir>: eval.json (after each part, "finished" tells the last), plots, one contact
sheet per method. Other frame rates and resolutions: run it once per --stride or --side.
"""
import json
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Clips, VideoError, from_model_pixels, read_motion, to_model_pixels
from gazing import (
    SCALE_COLORS,
    Tiling,
    from_lists,
    last_slots,
    locate,
    one_clip,
    parse_alpha,
    random_gazing,
    sheet,
    split_ratio,
    to_budgets,
    to_device,
)
from label import greedy
from lib import configurator, run
from lib.checkpoint import take_output
from lib.log import git_commit
from lib.text import write_whole, written_whole
from model import Gaze
from videomae import check_fit, load_videomae

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

UNTRAINED = ("random", "uniform", "frame_diff", "codec")  # dashed in plots


@dataclass
class Config:
    root: str = "data/toy"             # folders with val/, separated by commas
    split: str = "val"                 # which part of them
    videomae: str = "out/videomae"     # the reconstructor that measures
    loss_type: str = "l1"              # reconstruction loss: l1, dinov2_reg and siglip2, joined by +
    loss_weights: str = "1"            # of its terms (published: l1+dinov2_reg+siglip2 with 1+0.3+0.3)
    dinov2_reg: str | None = None      # folder or hub id of that network; none: in the videomae file, else published
    siglip2: str | None = None
    models: str = ""                   # gaze models to compare: name=folder, separated by commas
    out_dir: str = "out/eval"          # eval.json, plots, pictures
    report: str | None = None          # also write the headline numbers to this file, with the seconds of seconds.txt
    n_frames: int = 16                 # clip length
    stride: int = 1                    # source frames per clip frame
    side: int | None = None            # of the clips in pixels, a multiple of the models' input; none: the input
    ratios: str = "0.05,0.1,0.2"       # average gazing ratios to measure at; the first is the headline
    alpha: str = "10,3"                # relative budget of the frames, the last value repeated
    max_clips: int = 256               # clips that are used, spread evenly over the split
    greedy: bool = True                # include the greedy search (slow: one reconstruction per candidate)
    greedy_clips: int = 256            # how many clips greedy gets at ratios other than the first; fewer than
                                       # max_clips: its loss is then of other clips
    codec: bool = False                # include the files' motion vectors as a method (decodes every clip once more)
    target_loss: float | None = None   # report the ratio at which each method reaches this loss (published loss: 0.7)
    requirements: str = ""             # let models stop at these predicted losses, such as "0.6,0.7"; empty: don't
    batch_size: int = 16               # clips at once
    seed: int = 666                    # of the random baseline
    device: str = "auto"               # auto | cpu | cuda
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # autocast; auto: float32 on a CPU, else bfloat16
    tf32: bool = True                  # on a GPU: what stays in float32 is multiplied in TF32 (10 bits of mantissa)

    def check(self):
        configurator.check_at_least(self, n_frames=1, stride=1, side=1, max_clips=1, greedy_clips=0, batch_size=1,
                                    seed=0)
        configurator.check_share(self, "ratios")
        parse_alpha(self.alpha, self.n_frames)

        entries = [entry for entry in self.models.split(",") if entry]
        names = [entry.partition("=")[0] for entry in entries]
        are_complete = all(re.fullmatch("[^=]+=.+", entry) for entry in entries)
        are_distinct = len({*names, *UNTRAINED, "greedy"}) == len(names) + len(UNTRAINED) + 1
        if not are_complete or not are_distinct:
            raise ValueError(f"models={self.models}: write name=folder,name=folder; every name once, none of "
                             f"{', '.join(UNTRAINED)}, greedy")
        if self.requirements and not re.fullmatch(r"[0-9.]+(,[0-9.]+)*", self.requirements):
            raise ValueError(f"requirements={self.requirements}: write it like 0.6,0.7")


# ----------------------------------------------------------------------------------------------------------------------
# methods without a gaze model. budgets (T,): patches per frame


def spread(n):
    """0..n-1 in an order of which any beginning is spread out: bit-reversed."""
    n_bits = max(1, (n - 1).bit_length())
    order = []
    for k in range(2 ** n_bits):
        bits = f"{k:0{n_bits}b}"
        i = int(bits[::-1], 2)
        if i < n:
            order.append(i)
    return order


def uniform_order(config):
    """All V ids from coarse to fine, each scale evenly spread."""
    order = []
    for n in config.ids_per_scale:
        start = len(order)
        order += [start + i for i in spread(n)]
    return order


def uniform_gazing(video, budgets, config):
    """First frame coarse to fine; later frames go on through the finest scale where the frame before stopped."""
    order = uniform_order(config)
    n_fine = config.ids_per_scale[-1]
    finest = order[-n_fine:]
    position = max(0, budgets[0] - len(order) + n_fine)  # in finest

    frames = [order[:budgets[0]]]
    for n in budgets[1:]:
        if n <= n_fine:
            frames.append([finest[(position + i) % n_fine] for i in range(n)])
        else:
            frames.append(order[-n:])
        position += n
    return from_lists([torch.tensor([ids] * len(video)) for ids in frames], config.num_ids, video.device)


def per_patch(x, config):
    """A quantity of every pixel (B, T, R, R) -> (B, T, V), its mean under each patch of all scales."""
    means = [F.adaptive_avg_pool2d(x, side // config.patch_size).flatten(2) for side in config.scale_list]
    return torch.cat(means, dim=2)


def ranked_gazing(change, budgets, config):
    """First frame as `uniform`; later the patches, of any scale, under which `change` (B, T, R, R) is largest.

    A patch counts by its mean times its share of what a fine patch resolves, so a coarse patch wins only where the
    change is spread out.
    """
    device = change.device
    sides = torch.tensor(config.scale_list)
    per_scale = torch.tensor(config.ids_per_scale)
    resolution = sides.repeat_interleave(per_scale) / config.scale_list[-1]
    scores = per_patch(change, config) * resolution.to(device)

    order = uniform_order(config)
    first = torch.tensor([order[:budgets[0]]] * len(change))
    frames = [first]
    n_before = 0
    for t in range(1, len(budgets)):
        # where nothing changes, on through the finest scale, evenly spread
        ids = torch.tensor(order[::-1], device=device)
        ids = ids.roll(-n_before)
        n_before += budgets[t]

        ranking = scores[:, t, ids].argsort(dim=1, descending=True, stable=True)
        best = ids[ranking[:, :budgets[t]]]
        frames.append(best.cpu())
    return from_lists(frames, config.num_ids, device)


def changes(video):
    """video (B, T, 3, R, R) -> (B, T, R, R) mean absolute difference to the frame before, 0 in the first frame."""
    difference = (video[:, 1:] - video[:, :-1]).abs().mean(2)
    return F.pad(difference, (0, 0, 0, 0, 1, 0))


def details(video):
    """video (B, T, 3, R, R) -> (B, T, R, R) length of the brightness gradient, to the next pixel right and below."""
    grey = video.mean(2)
    right = F.pad(grey.diff(dim=3), (0, 1))
    below = F.pad(grey.diff(dim=2), (0, 0, 0, 1))
    return (right.square() + below.square()).sqrt()


def greedy_gazing(mae, video, budgets):
    found = [greedy(mae, clip, budgets)[0] for clip in video]
    frames = []
    for t in range(len(budgets)):
        frames.append(torch.tensor([clip[t] for clip in found]))
    return from_lists(frames, mae.config.num_ids, video.device)


def choose(mae, models, video, moved, budgets, ratios, with_greedy, seed):
    """{method: gazing} of clips (B, T, 3, R, R); moved: (B, T, R, R) from the codec, or None.

    FORK: your own method is one more line here, `gazings["mine"] = …`. It takes budgets[t] patches in frame t."""
    config = mae.config
    generator = torch.Generator().manual_seed(seed)
    gazings = {"random": random_gazing(budgets, len(video), config.num_ids, generator)}
    gazings["uniform"] = uniform_gazing(video, budgets, config)
    gazings["frame_diff"] = ranked_gazing(changes(video), budgets, config)
    if moved is not None:
        gazings["codec"] = ranked_gazing(moved, budgets, config)
    for name, gaze in models.items():
        gazings[name] = gaze.generate(video, gazing_ratio=ratios)
    if with_greedy:
        gazings["greedy"] = greedy_gazing(mae, video, budgets)

    for name, gazing in gazings.items():
        assert gazing["num_gazing_each_frame"].tolist() == budgets, f"{name} does not keep the budget"
        gazings[name] = to_device(gazing, video.device)
    return gazings


# ----------------------------------------------------------------------------------------------------------------------
# measures


def psnr(a, b):
    """Pictures (…, 3, H, W) in [0, 1] -> (…) dB; at most 100, for pictures that are the same."""
    error = (a - b).square().mean(dim=(-3, -2, -1))
    return -10 * error.clamp(min=1e-10).log10()


def ssim(a, b):
    """Structural similarity of pictures (…, 3, H, W) in [0, 1] -> (…): per channel, Gaussian window of 11 pixels and
    sigma 1.5, only where it lies inside. In smaller pictures it shrinks to the largest odd side that fits."""
    n = min(11, *a.shape[-2:])
    n -= 1 - n % 2
    offset = torch.arange(n, device=a.device) - n // 2
    window = torch.exp(-offset.square() / (2 * 1.5 ** 2))
    window = window / window.sum()

    # as matrices, a row per place of the window: quicker than a convolution
    def places(side):
        rows = []
        for i in range(side - n + 1):
            rows.append(F.pad(window, (i, side - n - i)))
        return torch.stack(rows)

    vertical = places(a.shape[-2])
    horizontal = places(a.shape[-1]).mT

    def blur(x):
        return vertical @ x @ horizontal

    mean_a = blur(a)
    mean_b = blur(b)
    variance_a = blur(a * a) - mean_a * mean_a
    variance_b = blur(b * b) - mean_b * mean_b
    covariance = blur(a * b) - mean_a * mean_b

    # the two constants keep flat pictures from dividing by 0
    c1 = 0.01 ** 2
    c2 = 0.03 ** 2
    means = (2 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)
    variances = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (means * variances).mean(dim=(-3, -2, -1))


def under_gazes(gazing, patches, config):
    """patches (B, T, V) from per_patch -> (S, 3), of each scale: its number of gazes, the sum of what lies under them,
    and the sum of the means of the frames they are in. The last two divided: 1 if gazes lie anywhere."""
    where = locate(gazing, config)
    under = patches.flatten(1).gather(1, gazing["gazing_pos"])
    finest = patches[:, :, -config.ids_per_scale[-1]:]  # cover the frame once
    mean = finest.mean(2).gather(1, where["frame"])

    sums = []
    for s in range(len(config.scale_list)):
        of_scale = where["scale"] == s
        n = of_scale.sum()
        sums.append(torch.stack([n, under[of_scale].sum(), mean[of_scale].sum()]))
    return torch.stack(sums).double().cpu()


def over_mean(n, under, mean):
    """Of sums from under_gazes; 1 where there is nothing to find, None without a gaze."""
    if n == 0:
        return None
    return 1.0 if mean == 0 else under / mean


def batches(cfg, items, config, device, note):
    """Items of `load` -> (first item, clips (B, T, 3, R, R), codec's motion or None) per batch. Clips larger than the
    models' input are cut into tiles, row by row, and each tile is a clip: generate(target_scales=…) does the same, so
    these are its gazes of the whole frame."""
    tiles_per_side = items[0]["video"].shape[-1] // config.image_size
    tiling = Tiling(config, [side * tiles_per_side for side in config.scale_list], None)
    size = max(1, cfg.batch_size // tiles_per_side ** 2)
    for i in tqdm(range(0, len(items), size), desc=note, unit="batch"):
        part = items[i:i + size]
        video = torch.stack([item["video"] for item in part]).to(device)
        moved = None
        if "motion" in part[0]:
            motion = torch.stack([item["motion"] for item in part]).to(device)
            moved = tiling.cut(motion.unsqueeze(2)).squeeze(2)
        yield i, tiling.cut(to_model_pixels(video)), moved


@torch.no_grad()
def measure(cfg, mae, models, items, ratio, device, autocast, n_greedy=0):
    """{method: {loss, psnr, ssim, per_frame, predicted, …}} over all clips, the first batch's gazes, the budgets."""
    config = mae.config
    ratios = split_ratio("mean", ratio, cfg.n_frames, cfg.alpha, None)
    budgets = to_budgets(ratios, config.num_ids)
    found = {}  # method -> measure -> a tensor per batch
    first = {}
    for b, (i, video, moved) in enumerate(batches(cfg, items, config, device, f"ratio {ratio:g}")):
        pixels = from_model_pixels(video)
        motion = per_patch(changes(pixels), config)
        detail = per_patch(details(pixels), config)

        with autocast:
            gazings = choose(mae, models, video, moved, budgets, ratios, i < n_greedy, cfg.seed + b)
        for name, gazing in gazings.items():
            with autocast:
                reconstruction, loss = mae(video, gazing, range(cfg.n_frames))
            painted = from_model_pixels(reconstruction.float())
            measures = {"loss": loss, "psnr": psnr(painted, pixels), "ssim": ssim(painted, pixels)}  # (B, T) each
            measures["motion"] = under_gazes(gazing, motion, config).unsqueeze(0)
            measures["detail"] = under_gazes(gazing, detail, config).unsqueeze(0)
            if name in models:
                with autocast:
                    predicted = models[name](video, gazing)[1]
                measures["predicted"] = predicted.gather(1, last_slots(gazing))

            for key, value in measures.items():
                found.setdefault(name, {}).setdefault(key, []).append(value.cpu())
            if i == 0:
                first[name] = (video, gazing, reconstruction, loss)

    table = {}
    for name, measures in found.items():
        table[name] = summarize({key: torch.cat(parts) for key, parts in measures.items()})
        table[name]["ratio"] = sum(budgets) / (cfg.n_frames * config.num_ids)
    return table, first, budgets


def summarize(measures):
    """Tensors of all clips -> a row of numbers."""
    loss = measures["loss"]
    motion = measures["motion"].sum((0, 1))  # (3,)
    detail = measures["detail"].sum(0)       # (S, 3)
    share = detail[:, 0] / detail[:, 0].sum()

    row = {"clips": len(loss)}
    for key in ("loss", "psnr", "ssim"):
        row[key] = measures[key].mean().item()
    row["per_frame"] = loss.mean(0).tolist()
    row["motion"] = over_mean(*motion.tolist())
    row["detail_per_scale"] = [over_mean(*scale) for scale in detail.tolist()]
    row["share_per_scale"] = share.tolist()
    if "predicted" not in measures:
        return row

    # how well a model knows its own loss
    predicted = measures["predicted"]
    covariance = ((predicted - predicted.mean()) * (loss - loss.mean())).mean()
    correlation = covariance / (predicted.std() * loss.std() + 1e-12)
    pairs = torch.stack([predicted, loss], -1).flatten(0, 1)
    row["predicted"] = predicted.mean().item()
    row["predicted_mae"] = (predicted - loss).abs().mean().item()
    row["predicted_correlation"] = correlation.item()
    row["scatter"] = pairs[:2000].tolist()
    return row


@torch.no_grad()
def stop_at(cfg, mae, gaze, items, requirement, device):
    """What comes of a model that ends each frame as soon as it predicts `requirement`, with no other limit: the ratio
    it takes, predicted and measured loss where it stops, the share of frames whose measured loss has met it."""
    ratio = []
    predicted = []
    measured = []
    for _, video, _ in batches(cfg, items, mae.config, device, f"stops at {requirement:g}"):
        gazing = gaze.generate(video, task_loss_requirement=requirement)
        n_gazes = (~gazing["if_padded_gazing"]).float().sum(1)
        _, prediction = gaze(video, gazing)
        _, loss = mae(video, gazing, range(cfg.n_frames))
        ratio.append(n_gazes.cpu() / (cfg.n_frames * gaze.config.num_ids))
        predicted.append(prediction.gather(1, last_slots(gazing)).cpu())
        measured.append(loss.cpu())

    measured = torch.cat(measured)
    row = {"requirement": requirement}
    row["ratio"] = torch.cat(ratio).mean().item()
    row["predicted"] = torch.cat(predicted).mean().item()
    row["measured"] = measured.mean().item()
    row["share_met"] = (measured <= requirement).float().mean().item()
    return row


def curve(results, name):
    """{ratio: {method: row}} -> (ratio, loss) points of one method, ascending."""
    return sorted((table[name]["ratio"], table[name]["loss"]) for table in results.values() if name in table)


def needed_ratios(results, target):
    """{ratio: {method: row}} -> {method: the smallest ratio with loss <= target, on straight lines between what was
    measured, or a text if it is not among that}."""
    needed = {}
    for name in next(iter(results.values())):
        points = curve(results, name)
        reached = [i for i, (_, loss) in enumerate(points) if loss <= target]
        if not reached:
            needed[name] = f"not by {points[-1][0]:.3f}"
        elif reached[0] == 0:
            needed[name] = f"at most {points[0][0]:.3f}"
        else:
            r0, loss0 = points[reached[0] - 1]
            r1, loss1 = points[reached[0]]
            needed[name] = r0 + (r1 - r0) * (loss0 - target) / (loss0 - loss1)
    return needed


# ----------------------------------------------------------------------------------------------------------------------
# tables and plots


def gap_closed(table, name):
    """(random - x) / (random - greedy) in per cent."""
    random = table["random"]["loss"]
    best = table["greedy"]["loss"]
    return 100 * (random - table[name]["loss"]) / (random - best)


def print_table(table):
    print(f"\n{'method':<12}{'loss':>8}{'gap closed':>12}{'predicted':>11}{'PSNR dB':>9}{'SSIM':>8}{'motion':>8}"
          "  % of each scale")
    for name, row in table.items():
        gap = "-"
        predicted = ""
        if "gap_closed" in row:
            gap = f"{row['gap_closed']:.0f} %"
        if "predicted" in row:
            predicted = f"{row['predicted']:.4f}"
        line = f"{name:<12}{row['loss']:>8.4f}{gap:>12}{predicted:>11}"
        line += f"{row['psnr']:>9.2f}{row['ssim']:>8.3f}{row['motion']:>8.2f}  "
        line += " + ".join(f"{100 * share:.0f}" for share in row["share_per_scale"])
        print(line)


def print_columns(title, table):
    """table: {column: {row: number or text}}"""
    print(f"\n{title:<30}" + "".join(f"{column:>14}" for column in table))
    for name in next(iter(table.values())):
        line = f"{name:<30}"
        for column in table.values():
            value = column.get(name, "-")
            line += f"{value:>14.4f}" if isinstance(value, float) else f"{value:>14}"
        print(line)


def save_figure(fig, path):
    with written_whole(path) as temporary:
        fig.savefig(temporary, dpi=110, format="png")
    plt.close(fig)


def plot_curves(results, target, path):
    """Loss against ratio, a line per method."""
    fig, ax = plt.subplots(figsize=(5.5, 4), layout="tight")
    for name in next(iter(results.values())):
        ratios, losses = zip(*curve(results, name), strict=True)
        ax.plot(ratios, losses, marker="o", ms=4, label=name, ls="--" if name in UNTRAINED else "-")
    if target:
        ax.axhline(target, color="black", lw=0.8, ls=":", label="target loss")
    ax.set(xlabel="gazing ratio (share of all patches)", ylabel="reconstruction loss", title="held-out clips")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    save_figure(fig, path)


def plot_predictions(table, names, path):
    """Predicted against measured loss, a panel per model."""
    fig, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.6), squeeze=False, layout="tight")
    for ax, name in zip(axes[0], names, strict=True):
        row = table[name]
        predicted, measured = zip(*row["scatter"], strict=True)
        ax.scatter(predicted, measured, s=4, alpha=0.3)
        ax.axline((measured[0], measured[0]), slope=1, color="black", lw=0.8)
        ax.set_xlabel("predicted loss")
        ax.set_ylabel("measured loss")
        ax.set_title(f"{name}: r = {row['predicted_correlation']:.2f}")
    save_figure(fig, path)


def plot_motion_and_detail(table, config, path):
    """What lies under the gazes, over its mean in the frame."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="tight")
    x = torch.arange(len(table))
    motion = [row["motion"] for row in table.values()]
    left.bar(x, motion, color="#888888")
    left.set_title("motion under gazes, from the second frame on")

    # a group of bars per method, a bar per scale
    width = 0.8 / len(config.scale_list)
    for s, side in enumerate(config.scale_list):
        color = SCALE_COLORS[s % len(SCALE_COLORS)]
        heights = [row["detail_per_scale"][s] or 0 for row in table.values()]
        offset = (s + 0.5) * width - 0.4
        right.bar(x + offset, heights, width, label=f"{side} px", color=color)
    right.set_title("detail under gazes (brightness gradient)")
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), title="gazes at")

    for ax in (left, right):
        ax.axhline(1, color="black", lw=0.8)
        ax.set_ylabel("times the mean of the frame")
        ax.set_xticks(x, list(table), rotation=30, ha="right")
    save_figure(fig, path)


# ----------------------------------------------------------------------------------------------------------------------
# the run


def load(cfg, size):
    """(items of clips spread evenly over the split, unreadable files); items get "motion" if all have it and cfg
    asks."""
    clips = Clips(cfg.root, cfg.split, cfg.n_frames, size, stride=cfg.stride)
    items = []
    seen = set()
    unreadable = set()
    n = min(len(clips), cfg.max_clips)
    for i in range(n):
        item = clips[i * len(clips) // n]
        unreadable.update(item["unreadable"])
        # an unreadable file is passed over, not replaced by a twin
        if item["path"] not in seen:
            items.append(item)
        seen.add(item["path"])

    if cfg.codec:
        for item in items:
            item["motion"] = read_motion(item["path"], cfg.n_frames, size, cfg.stride)
        without = [item for item in items if item["motion"] is None]
        if without:
            print(f"codec is left out: {len(without)} of {len(items)} files, such as {without[0]['path']}, have no "
                  "motion vectors")
            for item in items:
                del item["motion"]
    return items, unreadable


def save(out, result, t0):
    """Write eval.json, whole or not at all. Called after every part, so that a crash late in a run loses little."""
    results = {}
    for ratio, table in result["results"].items():
        results[ratio] = {}
        for name, row in table.items():
            row = dict(row)
            row.pop("scatter", None)
            results[ratio][name] = row
    result = result | {"seconds": time.time() - t0, "results": results}
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "eval.json", json.dumps(result, indent=1) + "\n")


def write_report(cfg, table, result, eval_seconds):
    """The headline numbers, and how long the stages before took: lines "stage seconds" of seconds.txt beside it."""
    path = Path(cfg.report)
    path.parent.mkdir(parents=True, exist_ok=True)
    seconds = {}
    if (path.parent / "seconds.txt").is_file():
        for line in (path.parent / "seconds.txt").read_text().splitlines():
            stage, value = line.split()
            seconds[stage] = float(value)
        seconds["eval"] = eval_seconds
        stages = ", ".join(f"{stage} {value:.0f}" for stage, value in seconds.items())
        print(f"\nseconds: {stages}; {sum(seconds.values()):.0f} in all")

    report = {"loss": {}, "ratio": table["random"]["ratio"], "gap_closed": {}}
    for name, row in table.items():
        report["loss"][name] = row["loss"]
        if "gap_closed" in row:
            report["gap_closed"][name] = row["gap_closed"]
    report["seconds"] = seconds
    report["seed"] = cfg.seed
    report["clips"] = result["clips"]
    report["commit"] = result["commit"]
    write_whole(path, json.dumps(report, indent=1) + "\n")
    print(f"report: {path}")


def load_models(cfg, mae, device):
    models = {}
    for entry in filter(None, cfg.models.split(",")):
        name, folder = entry.split("=", 1)
        models[name] = Gaze.from_pretrained(folder).to(device).eval()
        check_fit(mae, models[name], folder)
    return models


def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    _, _, device = run.init_processes(cfg.device)
    t0 = time.time()
    out = Path(cfg.out_dir)
    autocast, _ = run.precision(cfg, device)
    mae = load_videomae(cfg, device)
    models = load_models(cfg, mae, device)
    take_output(out)
    config = mae.config
    side = cfg.side or config.image_size
    if side % config.image_size:
        raise ValueError(f"side={side}: must be a multiple of {config.image_size}, the input of {cfg.videomae}")
    items, unreadable = load(cfg, side)

    # every method at every ratio; the pictures are of the first one
    results = {}
    budgets = {}
    pictures = None
    result = {"config": asdict(cfg), "commit": git_commit(), "clips": len(items), "unreadable": len(unreadable),
              "finished": False, "budgets": budgets, "results": results}
    headline = cfg.ratios.split(",")[0]
    for ratio in cfg.ratios.split(","):
        n_greedy = len(items) if ratio == headline else cfg.greedy_clips
        table, first, budgets[ratio] = measure(cfg, mae, models, items, float(ratio), device, autocast,
                                               cfg.greedy * n_greedy)
        if "greedy" in table:
            for name, row in table.items():
                if row["clips"] == table["greedy"]["clips"]:
                    row["gap_closed"] = gap_closed(table, name)
        results[ratio] = table
        pictures = pictures or first
        save(out, result, t0)

    # tables, curves, a sheet per method
    losses = {}
    for ratio, table in results.items():
        losses[ratio] = {name: row["loss"] for name, row in table.items()}
    print_columns("loss at ratio", losses)
    print(f"\nheld-out clips: {len(items)}, gazes per frame: {budgets[headline]}, seed {cfg.seed}")
    print_table(results[headline])
    plot_curves(results, cfg.target_loss, out / "loss_against_ratio.png")
    plot_motion_and_detail(results[headline], config, out / "motion_and_detail.png")
    if models:
        plot_predictions(results[headline], models, out / "predicted_against_measured.png")
    for name, (video, gazing, reconstruction, loss) in pictures.items():
        sheet(out / f"gaze_{name}.png", video[0], one_clip(gazing, 0), config, reconstruction[0],
              f"{name}: loss {loss[0].mean():.3f}", loss[0].tolist())

    if cfg.target_loss:
        result["needed"] = needed_ratios(results, cfg.target_loss)
        print_columns(f"ratio needed for loss {cfg.target_loss:g}", {"": result["needed"]})

    # models that stop by themselves
    if cfg.requirements and models:
        requirements = sorted(float(text) for text in cfg.requirements.split(","))
        result["stops"] = {}
        for name, gaze in models.items():
            rows = []
            for requirement in requirements:
                with autocast:
                    rows.append(stop_at(cfg, mae, gaze, items, requirement, device))
            result["stops"][name] = rows
            print_columns(f"{name} stops", {f"{i + 1}.": row for i, row in enumerate(rows)})
            save(out, result, t0)

    save(out, result | {"finished": True}, t0)
    print(f"\npictures and eval.json are in {out}")
    if cfg.report:
        write_report(cfg, results[headline], result, time.time() - t0)


if __name__ == "__main__":
    run.launch(main, VideoError)
