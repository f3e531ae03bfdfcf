"""Which way of choosing patches reconstructs held-out videos best, at equal budgets?

    python eval.py --root=data/mine --videomae=out/videomae --models=ntp=out/ntp,grpo=out/grpo
    python eval.py … --codec=true --target_loss=0.7 --strides=1,2,4 --sides=224,448 --requirements=auto --encoder=FOLDER

Compares, at the same number of patches in every frame: random patches; uniform (coarse to fine, evenly spread); frame
difference (first frame coarse to fine, later frames where pixels changed most); codec (the same with the file's motion
vectors); greedy search with the reconstructor; and trained gaze models. Prints and writes

- reconstruction loss against ratio, PSNR, SSIM, the ratio that each method needs for `target_loss`;
- motion and detail under the gazed patches over their mean in the frame (1: what random patches have): do gazes lie
  where something moves, and finer ones where there is detail?
- how well the models predict their own loss, and what comes of stopping by it (`requirements`);
- the same curves at other frame rates (`strides`) and resolutions (`sides`);
- how near a vision encoder's features of the gazed patches are to those of all patches (`encoder`).

Keys in this list are off by default, they cost time. Results go to the screen and to <out_dir>: eval.json (after each
part, "finished" tells the last), plots, one contact sheet per method.
"""
import json
import math
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import viz
from data import Clips, count_frames, from_model_pixels, read_motion, to_model_pixels
from gazing import Tiling, from_lists, last_slots, one_clip, parse_alpha, random_gazing, sheet, split_ratio, to_budgets
from label import greedy
from lib import configurator, run
from lib.checkpoint import write_whole
from lib.log import git_commit
from model import Gaze
from siglip import GazeSigLIP
from videomae import check_fit, load_videomae

UNTRAINED = ("random", "uniform", "frame_diff", "codec")  # dashed in plots
STUDIES = {"strides": "source frames per clip frame", "sides": "side of the frame in pixels"}


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
    n_frames: int = 16                 # clip length
    stride: int = 1                    # source frames per clip frame
    ratios: str = "0.05,0.1,0.2"       # average gazing ratios to measure at; the first is the headline of report.json
    alpha: str = "10,3"                # relative budget of the frames, the last value repeated
    max_clips: int = 256               # clips that are used
    greedy: bool = True                # include the greedy search (slow: one reconstruction per candidate)
    greedy_clips: int = 256            # clips for greedy at ratios other than the first; fewer: not quite comparable
    codec: bool = False                # include the files' motion vectors as a method (decodes every clip once more)
    target_loss: float | None = None   # tell the ratio that each method needs for it; published loss: 0.7, l1: your own
    requirements: str = ""             # let models stop at these predicted losses: "0.6,0.7", or "auto": five quantiles
    strides: str = ""                  # measure again at these source frames per clip frame, such as "1,2,4"
    sides: str = ""                    # and at these resolutions, multiples of the input side, in tiles: "224,448"
    study_clips: int = 64              # clips for requirements, strides and sides; without the greedy search
    encoder: str = ""                  # compare features: folder or hub id of a SigLIP
    batch_size: int = 16               # clips at once
    seed: int = 666                    # of the random baseline
    device: str = "auto"               # auto | cpu | cuda

    def check(self):
        configurator.check_at_least(
            self, n_frames=1, stride=1, max_clips=1, greedy_clips=0, study_clips=1, batch_size=1, seed=0)
        configurator.check_share(self, "ratios")
        parse_alpha(self.alpha, self.n_frames)
        entries = [m.partition("=") for m in self.models.split(",") if m]
        if len({name for name, _, folder in entries if name and folder} - {*UNTRAINED, "greedy"}) < len(entries):
            raise ValueError(f"models={self.models}: write name=folder,name=folder; every name once, none of "
                             f"{', '.join(UNTRAINED)}, greedy")
        whole = r"[1-9][0-9]*"
        for key, form, example in (("strides", whole, "1,2,4"), ("sides", whole, "224,448"),
                                   ("requirements", r"auto|[0-9]*\.?[0-9]+", "0.6,0.7 or auto")):
            if not all(re.fullmatch(form, v) for v in getattr(self, key).split(",") if getattr(self, key)):
                raise ValueError(f"{key}={getattr(self, key)}: write it like {example}")


def uniform_order(config):
    """All V ids from coarse to fine; within a scale evenly spread at any prefix (bit-reversed rows and columns)."""
    def spread(n):  # 0..n-1 so that every prefix is spread out
        bits = max(1, (n - 1).bit_length())
        return [i for i in (int(f"{k:0{bits}b}"[::-1], 2) for k in range(2 ** bits)) if i < n]
    order, start = [], 0
    for n in config.ids_per_scale:
        order += [start + i for i in spread(n)]
        start += n
    return order




def uniform_gazing(video, budgets, config):
    """First frame coarse to fine; later frames go on through the finest scale where the frame before stopped."""
    order, fine = uniform_order(config), config.ids_per_scale[-1]
    finest, at, frames = order[-fine:], 0, []
    for t, n in enumerate(budgets):
        if t == 0:
            ids, at = order[:n], max(0, n - len(order) + fine)
        else:
            ids = [finest[(at + i) % fine] for i in range(n)] if n <= fine else order[-n:]
            at += n
        frames.append(torch.tensor([ids] * len(video)))
    return from_lists(frames, config.num_ids, video.device)


def per_patch(x, config):
    """A quantity of every pixel (B, T, R, R) -> (B, T, V), its mean under each patch of all scales."""
    return torch.cat([F.adaptive_avg_pool2d(x, s // config.patch_size).flatten(2) for s in config.scale_list], dim=2)


def ranked_gazing(change, budgets, config):
    """First frame as `uniform`; later the patches, of any scale, under which `change` (B, T, R, R) is largest.

    A patch counts by its mean times its share of what a fine patch resolves, so a coarse patch wins only where the
    change is spread out.
    """
    side = torch.tensor(config.scale_list).repeat_interleave(torch.tensor(config.ids_per_scale)) / config.scale_list[-1]
    scores = per_patch(change, config) * side.to(change.device)
    frames = [torch.tensor([uniform_order(config)[:budgets[0]]] * len(change))]
    for t in range(1, len(budgets)):  # where nothing changes, on through the finest scale, evenly spread
        order = torch.tensor(uniform_order(config)[::-1], device=change.device).roll(-sum(budgets[1:t]))
        frames.append(order[scores[:, t, order].argsort(dim=1, descending=True, stable=True)[:, :budgets[t]]].cpu())
    return from_lists(frames, scores.shape[2], change.device)


def changes(video):
    """video (B, T, 3, R, R) -> (B, T, R, R) mean absolute difference to the frame before, 0 in the first frame."""
    return F.pad((video[:, 1:] - video[:, :-1]).abs().mean(2), (0, 0, 0, 0, 1, 0))


def details(video):
    """video (B, T, 3, R, R) -> (B, T, R, R) length of the brightness gradient, to the next pixel right and below."""
    grey = video.mean(2)
    right, below = F.pad(grey.diff(dim=3), (0, 1)), F.pad(grey.diff(dim=2), (0, 0, 0, 1))
    return (right.square() + below.square()).sqrt()


def greedy_gazing(mae, video, budgets):
    found = [greedy(mae, clip, budgets)[0] for clip in video]
    frames = [torch.tensor([f[t] for f in found]) for t in range(len(budgets))]
    return from_lists(frames, mae.config.num_ids, video.device)


# ----------------------------------------------------------------------------------------------------------------------
# measuring

def psnr(a, b):
    """Pictures (…, 3, H, W) in [0, 1] -> (…) dB; at most 100, for pictures that are the same."""
    return -10 * (a - b).square().mean(dim=(-3, -2, -1)).clamp(min=1e-10).log10()


def ssim(a, b):
    """Structural similarity of pictures (…, 3, H, W) in [0, 1] -> (…): per channel, Gaussian window of 11 pixels and
    sigma 1.5, only where it lies inside. In smaller pictures it shrinks to the largest odd side that fits."""
    n = min(11, *a.shape[-2:])
    n -= 1 - n % 2
    w = torch.exp(-(torch.arange(n, device=a.device) - n // 2).square() / (2 * 1.5 ** 2))
    rows, columns = (torch.stack([F.pad(w / w.sum(), (i, side - n - i)) for i in range(side - n + 1)])
                     for side in a.shape[-2:])  # as matrices, a row per place of the window: quicker than a convolution

    def blur(x):
        return rows @ x @ columns.mT
    ma, mb = blur(a), blur(b)
    aa, bb, ab = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
    similar = (2 * ma * mb + 0.01 ** 2) * (2 * ab + 0.03 ** 2)
    return (similar / ((ma * ma + mb * mb + 0.01 ** 2) * (aa + bb + 0.03 ** 2))).mean(dim=(-3, -2, -1))


def under_gazes(gazing, patches, config):
    """patches (B, T, V) from per_patch -> (S, 3), of each scale: its number of gazes, the sum of what lies
    under them, and the sum of the means of the frames they are in. The last two divided: 1 if gazes lie anywhere."""
    n = gazing["num_gazing_each_frame"].to(patches.device)
    frame = torch.repeat_interleave(torch.arange(len(n), device=n.device), n)  # (N,)
    ids = gazing["gazing_pos"] - patches.shape[2] * frame
    under = patches.flatten(1).gather(1, gazing["gazing_pos"])
    mean = patches[:, :, -config.ids_per_scale[-1]:].mean(2)[:, frame]  # the finest patches cover the frame once
    edges = torch.tensor([0, *config.ids_per_scale]).cumsum(0).tolist()
    here = [(ids >= a) & (ids < b) for a, b in zip(edges, edges[1:], strict=False)]
    return torch.stack([torch.stack([h.sum(), under[h].sum(), mean[h].sum()]) for h in here]).double().cpu()


def over_mean(n, under, mean):  # sums of under_gazes; 1 where there is nothing to find, None without a gaze
    return None if n == 0 else 1.0 if mean == 0 else under / mean


def choose(mae, models, video, moved, budgets, ratios, with_greedy, seed):
    """{method: gaze dict} of clips (B, T, 3, R, R); moved: (B, T, R, R) from the codec, or None."""
    c, V = mae.config, mae.config.num_ids
    gazings = {"random": random_gazing(budgets, len(video), V, torch.Generator().manual_seed(seed)),
               "uniform": uniform_gazing(video, budgets, c), "frame_diff": ranked_gazing(changes(video), budgets, c)}
    if moved is not None:
        gazings["codec"] = ranked_gazing(moved, budgets, c)
    for name, gaze in models.items():
        gazings[name] = gaze.generate(video, gazing_ratio=ratios)
    if with_greedy:
        gazings["greedy"] = greedy_gazing(mae, video, budgets)
    for name, gazing in gazings.items():
        assert gazing["num_gazing_each_frame"].tolist() == budgets, f"{name} does not keep the budget"
        gazings[name] = {k: v.to(video.device) for k, v in gazing.items() if k != "gazing_mask"}
    return gazings


def batches(cfg, items, config, device, note):
    """Items of `load` -> (first item, normalised clips (B, T, 3, R, R), codec's motion or None) per batch. Clips larger
    than the models' input are cut into tiles, row by row, and each tile is a clip: generate(target_scales=…) does the
    same, so these are its gazes of the whole frame."""
    k = items[0]["video"].shape[-1] // config.image_size
    tiling = Tiling(config, [s * k for s in config.scale_list], None)
    size = max(1, cfg.batch_size // k ** 2)
    for i in tqdm(range(0, len(items), size), desc=note, unit="batch"):
        part, moved = items[i:i + size], None
        if "motion" in part[0]:
            moved = tiling.cut(torch.stack([x["motion"] for x in part]).unsqueeze(2).to(device)).squeeze(2)
        yield i, tiling.cut(to_model_pixels(torch.stack([x["video"] for x in part]).to(device))), moved


@torch.no_grad()
def measure(cfg, mae, models, items, ratio, device, n_greedy=0, vit=None):
    """{method: {loss, psnr, ssim, per_frame, predicted, …}} over all clips, the first batch's gazes, the budgets."""
    c, V, T = mae.config, mae.config.num_ids, cfg.n_frames
    ratios = split_ratio("mean", ratio, T, cfg.alpha, None)
    budgets = to_budgets(ratios, V)
    sums, first = {}, {}
    for b, (i, video, moved) in enumerate(batches(cfg, items, c, device, f"ratio {ratio:g}")):
        pixels = from_model_pixels(video)  # in [0, 1]
        motion, detail = per_patch(changes(pixels), c), per_patch(details(pixels), c)
        if vit:
            everything = from_lists([torch.arange(V).expand(len(video), -1)] * T, V, device)
            whole = vit(pixels * 2 - 1, everything).mean(1)  # (B, D)
        gazings = choose(mae, models, video, moved, budgets, ratios, i < n_greedy, cfg.seed + b)
        for name, gazing in gazings.items():
            recon, loss = mae(video, gazing, range(T))
            shown = from_model_pixels(recon)
            got = {"loss": loss, "psnr": psnr(shown, pixels), "ssim": ssim(shown, pixels),  # (B, T) each
                   "motion": under_gazes(gazing, motion, c).sum(0, keepdim=True),
                   "detail": under_gazes(gazing, detail, c).unsqueeze(0)}
            if name in models:
                got["predicted"] = models[name](video, gazing)[1].gather(1, last_slots(gazing))
            if vit:
                got["similarity"] = F.cosine_similarity(vit(pixels * 2 - 1, gazing).mean(1), whole, dim=1)
            for key, value in got.items():
                sums.setdefault(name, {}).setdefault(key, []).append(value.cpu())
            if i == 0:
                first[name] = (video, gazing, recon, loss)
    out = {}
    for name, got in sums.items():
        got = {key: torch.cat(values) for key, values in got.items()}
        loss, detail = got["loss"], got["detail"].sum(0)
        out[name] = {key: got[key].mean().item() for key in ("loss", "psnr", "ssim", "predicted", "similarity")
                     if key in got}
        out[name] |= {"ratio": sum(budgets) / (T * V), "clips": len(loss), "per_frame": loss.mean(0).tolist(),
                      "share_per_scale": (detail[:, 0] / detail[:, 0].sum()).tolist(),
                      "motion": over_mean(*got["motion"].sum(0).tolist()),
                      "detail_per_scale": [over_mean(*scale) for scale in detail.tolist()]}
        if name in models:
            p = got["predicted"]
            correlation = ((p - p.mean()) * (loss - loss.mean())).mean() / (p.std() * loss.std() + 1e-12)
            out[name] |= {"predicted_mae": (p - loss).abs().mean().item(), "predicted_correlation": correlation.item(),
                          "scatter": torch.stack([p, loss], -1).flatten(0, 1)[:2000].tolist()}
    return out, first, budgets


@torch.no_grad()
def stopped(cfg, mae, gaze, items, requirement, device):
    """What comes of a model that ends each frame as soon as it predicts `requirement`, with no other limit: the ratio
    it takes, predicted and measured loss where it stops, the share of frames whose measured loss has met it."""
    ratio, predicted, measured = [], [], []
    for _, video, _ in batches(cfg, items, mae.config, device, f"stops at {requirement:.4f}"):
        gazing = gaze.generate(video, task_loss_requirement=requirement)
        ratio.append((~gazing["if_padded_gazing"]).float().sum(1).cpu() / (cfg.n_frames * gaze.config.num_ids))
        predicted.append(gaze(video, gazing)[1].gather(1, last_slots(gazing)).cpu())
        measured.append(mae(video, gazing, range(cfg.n_frames))[1].cpu())
    ratio, predicted, measured = (torch.cat(x) for x in (ratio, predicted, measured))
    return {"requirement": requirement, "ratio": ratio.mean().item(), "predicted": predicted.mean().item(),
            "measured": measured.mean().item(), "share_met": (measured <= requirement).float().mean().item()}


def needed_ratios(results, target):
    """{ratio: {method: row}} -> {method: the smallest ratio with loss <= target, on straight lines between what was
    measured, or a text if it is not among that}."""
    needed = {}
    for name in next(iter(results.values())):
        points = sorted((table[name]["ratio"], table[name]["loss"]) for table in results.values() if name in table)
        hit = next((i for i, (_, loss) in enumerate(points) if loss <= target), None)
        needed[name] = f"not by {points[-1][0]:.3f}" if hit is None else f"at most {points[0][0]:.3f}"
        if hit:
            (r0, l0), (r1, l1) = points[hit - 1:hit + 1]
            needed[name] = r0 + (r1 - r0) * (l0 - target) / (l0 - l1)
    return needed


# ----------------------------------------------------------------------------------------------------------------------
# tables and plots

def gap_closed(table, name):
    """(random - x) / (random - greedy) in per cent."""
    r, g = table["random"]["loss"], table["greedy"]["loss"]
    return 100 * (r - table[name]["loss"]) / (r - g)


def print_table(table, ratio, config):
    scales, wide = "".join(f"{f'{s} px':>8}" for s in config.scale_list), 8 * len(config.scale_list)
    print(f"\n{'':<52}{'% of gazes at':>{wide}}{'detail at':>{wide}}\n{f'at ratio {ratio}':<16}"
          f"{'gap closed':>12}{'PSNR dB':>8}{'SSIM':>8}{'motion':>8}{scales}{scales}")
    for name, row in table.items():
        numbers = [f"{gap_closed(table, name):>10.0f} %" if "greedy" in table else f"{'-':>12}", f"{row['psnr']:>8.2f}",
                   f"{row['ssim']:>8.3f}", f"{row['motion']:>8.2f}",
                   *(f"{100 * s:>8.0f}" for s in row["share_per_scale"]),
                   *(f"{'-':>8}" if d is None else f"{d:>8.2f}" for d in row["detail_per_scale"])]
        print(f"{name:<16}" + "".join(numbers))
    print("motion, detail: under the gazed patches over the mean of the frame; motion from the second frame on")


def print_columns(title, table):
    """table: {column: {method: number or text}}"""
    print(f"\n{title:<30}" + "".join(f"{column:>14}" for column in table))
    for name in next(iter(table.values())):
        cells = (column.get(name, "-") for column in table.values())
        print(f"{name:<30}" + "".join(f"{x:>14.4f}" if isinstance(x, float) else f"{x:>14}" for x in cells))


def curves(ax, results, target, title):  # loss against ratio, a line per method
    for name in next(iter(results.values())):
        points = sorted((t[name]["ratio"], t[name]["loss"]) for t in results.values() if name in t)
        ax.plot(*zip(*points, strict=True), marker="o", ms=4, label=name, ls="--" if name in UNTRAINED else "-")
    if target:
        ax.axhline(target, color="black", lw=0.8, ls=":", label="target loss")
    ax.set(xlabel="gazing ratio (share of all patches)", ylabel="reconstruction loss", title=title)
    ax.grid(alpha=0.3)


def plot(results, config, target, out):
    """The curves of all ratios; at the first one predicted against measured loss, and what lies under the gazes."""
    fig, ax = viz.plt.subplots(figsize=(5.5, 4), layout="tight")
    curves(ax, results, target, "held-out clips")
    ax.legend(fontsize=8)
    viz.save_figure(fig, out / "loss_against_ratio.png")
    table = next(iter(results.values()))
    models = [n for n in table if "scatter" in table[n]]
    if models:
        fig, axes = viz.plt.subplots(1, len(models), figsize=(3.6 * len(models), 3.6), squeeze=False, layout="tight")
        for ax, name in zip(axes[0], models, strict=True):
            x, y = zip(*table[name]["scatter"], strict=True)
            ax.scatter(x, y, s=4, alpha=0.3)
            ends = min(*x, *y), max(*x, *y)
            ax.plot(ends, ends, color="black", lw=0.8)
            ax.set(xlabel="predicted loss", ylabel="measured loss",
                   title=f"{name}: r = {table[name]['predicted_correlation']:.2f}")
        viz.save_figure(fig, out / "predicted_against_measured.png")

    fig, axes = viz.plt.subplots(1, 2, figsize=(11, 3.8), layout="tight")
    at, scales = torch.arange(len(table)), config.scale_list
    axes[0].bar(at, [row["motion"] for row in table.values()], color="#888888")
    axes[0].set(title="motion under gazes, from the second frame on", ylabel="times the mean of the frame")
    for s, side in enumerate(scales):
        heights = [row["detail_per_scale"][s] or 0 for row in table.values()]
        axes[1].bar(at + 0.8 * ((s + 0.5) / len(scales) - 0.5), heights, 0.8 / len(scales),
                    label=f"{side} px", color=viz.COLORS[s % len(viz.COLORS)])
    axes[1].set(title="detail under gazes (brightness gradient)", ylabel="times the mean of the frame")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), title="gazes at")
    for ax in axes:
        ax.axhline(1, color="black", lw=0.8)
        ax.set_xticks(at, list(table), rotation=30, ha="right")
    viz.save_figure(fig, out / "motion_and_detail.png")


def plot_stops(stops, out):
    """What stopping by the predicted loss gives: the loss that it keeps, the patches that it takes."""
    fig, axes = viz.plt.subplots(1, 2, figsize=(9, 3.8), layout="tight")
    for i, (name, rows) in enumerate(stops.items()):
        for ax, key, style in ((axes[0], "measured", "o-"), (axes[0], "predicted", "o:"), (axes[1], "ratio", "o-")):
            ax.plot([r["requirement"] for r in rows], [r[key] for r in rows], style, ms=4, color=f"C{i}", label=name)
    ends = [f(r["requirement"] for rows in stops.values() for r in rows) for f in (min, max)]
    axes[0].plot(ends, ends, color="black", lw=0.8)
    axes[0].set(ylabel="mean loss of a frame", title="solid: measured, dotted: predicted, black: required")
    axes[1].set(ylabel="gazing ratio (share of all patches)", title="patches taken until the model stops")
    axes[1].legend(fontsize=8)
    for ax in axes:
        ax.set_xlabel("required loss")
        ax.grid(alpha=0.3)
    viz.save_figure(fig, out / "stopping.png")


def plot_study(key, study, headline, target, out):
    """A panel of curves per value, and one across values: of the ratio needed, else of the loss."""
    values, axis = list(study["results"]), STUDIES[key]
    fig, axes = viz.plt.subplots(1, len(values) + 1, figsize=(3.8 * (len(values) + 1), 3.8), layout="tight")
    for ax, value in zip(axes, values, strict=False):
        if ax is not axes[0]:
            ax.sharey(axes[0])
        curves(ax, study["results"][value], target, f"{axis}: {value}")
    axes[0].legend(fontsize=7)
    table, what, note = study["loss"], f"loss at ratio {headline}", axis
    if target:
        table, what = study["needed"], f"ratio needed for loss {target:g}"
        note = f"{axis}\n(no point: not within what was measured)"
    for name in table[values[0]]:
        numbers = [x if isinstance(x := table[v][name], float) else math.nan for v in values]
        axes[-1].plot(range(len(values)), numbers, marker="o", ms=4, ls="--" if name in UNTRAINED else "-")
    axes[-1].set(xlabel=note, title=what, xlim=(-0.3, len(values) - 0.7))
    axes[-1].set_xticks(range(len(values)), values)
    axes[-1].grid(alpha=0.3)
    viz.save_figure(fig, out / f"{key}.png")


# ----------------------------------------------------------------------------------------------------------------------
# the run

def load(cfg, size, stride, limit, longest=0):
    """(items of the first clips of the split, unreadable files); items get "motion" if all have it and cfg asks.
    longest: pass over videos of fewer frames, whose repeated last frame would look like a still picture."""
    clips = Clips(cfg.root, cfg.split, cfg.n_frames, size, stride=stride)
    items, seen, unreadable = [], set(), set()
    for i in range(len(clips)):
        if len(items) == limit:
            break
        item = clips[i]
        unreadable.update(item["unreadable"])
        # an unreadable file is passed over, not replaced by a twin
        if item["path"] not in seen and (not longest or count_frames(item["path"]) >= longest):
            items.append(item)
        seen.add(item["path"])
    if not items:
        raise ValueError(f"strides={cfg.strides}: no video of {cfg.root} ({cfg.split}) has the {longest} frames that "
                         f"{cfg.n_frames} clip frames span at the largest stride: take smaller ones or longer videos")
    moved = [read_motion(item["path"], cfg.n_frames, size, stride) for item in items if cfg.codec]
    without = [item["path"] for item, m in zip(items, moved, strict=False) if m is None]
    if without:
        print(f"codec is left out: {len(without)} of {len(items)} files, such as {without[0]}, have no motion vectors")
    elif moved:
        items = [item | {"motion": m} for item, m in zip(items, moved, strict=True)]
    return items, unreadable


def save(out, report, t0):
    """Write eval.json, whole or not at all. Called after every part, so that a crash late in a run loses little."""
    results = {ratio: {name: {k: v for k, v in row.items() if k != "scatter"} for name, row in table.items()}
               for ratio, table in report["results"].items()}
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report | {"seconds": time.time() - t0, "results": results}, indent=1)
    write_whole(out / "eval.json", text + "\n")


def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    _, _, device = run.init_processes(cfg.device)
    out, t0 = Path(cfg.out_dir), time.time()
    mae = load_videomae(cfg, device)
    models, c = {}, mae.config
    for entry in filter(None, cfg.models.split(",")):
        name, folder = entry.split("=", 1)
        models[name] = Gaze.from_pretrained(folder).to(device).eval()
        check_fit(mae, models[name], folder)
    strides, sides = ([int(v) for v in filter(None, value.split(","))] for value in (cfg.strides, cfg.sides))
    if any(side % c.image_size for side in sides):
        raise ValueError(f"sides={cfg.sides}: must be multiples of {c.image_size}, the input of {cfg.videomae}")
    vit = None
    if cfg.encoder:  # its scales are such that its patches are ours: the ids are the same
        vit = GazeSigLIP.from_pretrained(cfg.encoder, scales="1024")  # any side that holds a patch
        vit = GazeSigLIP(vit.network, [s * vit.patch_size // c.patch_size for s in c.scale_list]).to(device).eval()
    longest = (cfg.n_frames - 1) * max(strides, default=0) + 1
    at_stride = {v: load(cfg, c.image_size, v, cfg.study_clips, longest)[0] for v in strides}
    items, unreadable = load(cfg, c.image_size, cfg.stride, cfg.max_clips)
    results, pictures, budgets = {}, {}, {}
    report = {"config": asdict(cfg), "commit": git_commit(), "clips": len(items), "unreadable": len(unreadable),
              "finished": False, "budgets": budgets, "results": results}
    for i, ratio in enumerate(cfg.ratios.split(",")):
        n_greedy = cfg.greedy * (len(items) if i == 0 else cfg.greedy_clips)
        table, first, budgets[ratio] = measure(cfg, mae, models, items, float(ratio), device, n_greedy, vit)
        for name, row in table.items():
            if "greedy" in table and table["greedy"]["clips"] == row["clips"]:
                row["gap_closed"] = gap_closed(table, name)
        results[ratio], pictures = table, pictures or first
        save(out, report, t0)
    headline = cfg.ratios.split(",")[0]
    print_columns("loss at ratio", {r: {name: row["loss"] for name, row in t.items()} for r, t in results.items()})
    print_table(results[headline], headline, c)
    for name, (video, gazing, recon, loss) in pictures.items():
        sheet(out / f"gaze_{name}.png", video[0], one_clip(gazing, 0), c, reconstruction=recon[0],
              losses=loss[0].tolist(), title=f"{name}: loss {loss[0].mean():.3f}")
    plot(results, c, cfg.target_loss, out)
    if cfg.target_loss:
        report["needed"] = needed_ratios(results, cfg.target_loss)
        print_columns(f"ratio needed for loss {cfg.target_loss:g}", {"": report["needed"]})
    if vit:
        print_columns("cosine with features of all",
                      {r: {name: row["similarity"] for name, row in t.items()} for r, t in results.items()})

    if cfg.requirements and models:
        report["stops"] = {}
        for name, gaze in models.items():
            said = torch.tensor([p for table in results.values() for p, _ in table[name]["scatter"]])
            wanted = said.quantile(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])).tolist()
            if cfg.requirements != "auto":
                wanted = sorted(float(r) for r in cfg.requirements.split(","))
            report["stops"][name] = rows = [stopped(cfg, mae, gaze, items[:cfg.study_clips], r, device) for r in wanted]
            print_columns(f"{name} stops", {f"{i + 1}.": row for i, row in enumerate(rows)})
            save(out, report, t0)
        plot_stops(report["stops"], out)

    for key, values in (("strides", strides), ("sides", sides)):
        study = {"clips": {}, "results": {}, "loss": {}, "needed": {}}
        for v in values:
            clips = at_stride[v] if key == "strides" else load(cfg, v, cfg.stride, cfg.study_clips)[0]
            print(f"{STUDIES[key]}: {v}, {len(clips)} clips")
            found = {r: measure(cfg, mae, models, clips, float(r), device)[0] for r in results}
            study["clips"][v] = len(clips)
            study["results"][v] = {r: {n: {k: row[k] for k in ("ratio", "loss")} for n, row in t.items()}
                                   for r, t in found.items()}
            study["loss"][v] = {name: row["loss"] for name, row in found[headline].items()}
            study["needed"][v] = needed_ratios(found, cfg.target_loss) if cfg.target_loss else {}
            report[key] = study
            save(out, report, t0)
        if values:
            print_columns(f"loss at ratio {headline}, {key}", study["loss"])
            if cfg.target_loss:
                print_columns(f"ratio for loss {cfg.target_loss:g}, {key}", study["needed"])
            plot_study(key, study, headline, cfg.target_loss, out)

    save(out, report | {"finished": True}, t0)
    print(f"\n{len(items)} clips, budgets per frame {budgets[headline]}; pictures and eval.json in {out}")


if __name__ == "__main__":
    main()
