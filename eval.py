"""Which way of choosing patches reconstructs held-out videos best, at equal budgets?

    python eval.py --root=data/mine --videomae=out/videomae --models=ntp=out/ntp,grpo=out/grpo

Compares, at the same number of patches in every frame: random patches; uniform (coarse to fine, evenly spread); frame
difference (first frame coarse to fine, later frames where pixels changed most); greedy search with the reconstructor;
and trained gaze models. Prints and writes a table of reconstruction loss against ratio, plots, one contact sheet per
method, and how well the models' own loss prediction fits what is measured. Writes <out_dir>/eval.json.
"""
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import configurator
import viz
from data import Clips, normalize
from label import greedy
from model import Gaze, join_frames, one_clip
from videomae import load_videomae


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
    greedy_clips: int = 256            # clips for greedy at ratios other than the first
    batch_size: int = 16               # clips at once
    seed: int = 666                    # of the random baseline
    device: str = "auto"               # auto | cpu | cuda

    def check(self):
        for r in self.ratios.split(","):
            if not 0 < float(r) <= 1:
                raise ValueError(f"ratios={self.ratios}: every ratio must lie in (0, 1]")
        for m in filter(None, self.models.split(",")):
            if "=" not in m:
                raise ValueError(f"models={self.models}: write name=folder,name=folder")


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


def from_lists(frames, V, device):
    """Ids within the frame, per frame a (B, n_t) tensor -> gaze dict."""
    gazing = join_frames([(ids + V * t, torch.zeros_like(ids, dtype=torch.bool)) for t, ids in enumerate(frames)])
    return {k: v.to(device) for k, v in gazing.items()}


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
    return from_lists(frames, sum(config.ids_per_scale), video.device)


def frame_diff_gazing(video, budgets, config):
    """First frame as `uniform`; later the patches, of any scale, whose pixels changed most since the frame before.

    A patch counts by its mean absolute difference times its share of what a fine patch resolves, so a coarse patch wins
    only where the change is spread out.
    """
    V, p, R = sum(config.ids_per_scale), config.patch_size, config.scale_list[-1]
    frames = [torch.tensor([uniform_order(config)[:budgets[0]]] * len(video))]
    for t in range(1, len(budgets)):
        diff = (video[:, t] - video[:, t - 1]).abs().mean(1, keepdim=True)  # (B, 1, R, R)
        scores = []
        for side in config.scale_list:
            cells = F.adaptive_avg_pool2d(diff, side // p).flatten(1)  # mean change under each patch of this scale
            scores.append(cells * (side / R))
        frames.append(torch.cat(scores, 1).argsort(dim=1, descending=True)[:, :budgets[t]].cpu())
    return from_lists(frames, V, video.device)


def greedy_gazing(mae, video, budgets):
    found = [greedy(mae, clip, budgets)[0] for clip in video]
    frames = [torch.tensor([f[t] for f in found]) for t in range(len(budgets))]
    return from_lists(frames, sum(mae.config.ids_per_scale), video.device)


@torch.no_grad()
def measure(cfg, mae, models, loader, ratio, device, with_greedy):
    """{method: {loss, per_frame, predicted, …}} over all clips of the loader, and the first batch's gazes."""
    c, V, T = mae.config, sum(mae.config.ids_per_scale), cfg.n_frames
    ratios = common.split_ratio("mean", ratio, T, cfg.alpha, None)
    budgets = common.to_budgets(ratios, V)
    losses, predicted, shares, first = {}, {}, {}, {}
    for i, batch in enumerate(tqdm(loader, desc=f"ratio {ratio:g}", unit="batch")):
        video = normalize(batch["video"].to(device))
        generator = torch.Generator().manual_seed(cfg.seed + i)
        gazings = {"random": common.random_gazing(budgets, len(video), V, generator),
                   "uniform": uniform_gazing(video, budgets, c), "frame_diff": frame_diff_gazing(video, budgets, c)}
        for name, gaze in models.items():
            gazings[name] = gaze.generate(video, gazing_ratio=ratios)
        if with_greedy and i * cfg.batch_size < with_greedy:
            gazings["greedy"] = greedy_gazing(mae, video, budgets)
        for name, gazing in gazings.items():
            gazing = {k: v.to(device) for k, v in gazing.items() if k != "gazing_mask"}
            assert gazing["num_gazing_each_frame"].tolist() == budgets, f"{name} does not keep the budget"
            recon, loss = mae(video, gazing, range(T))
            losses.setdefault(name, []).append(loss.cpu())
            if name in models:
                said = models[name](video, gazing)[1].gather(1, common.last_slots(gazing))
                predicted.setdefault(name, []).append(said.cpu())
            ids = gazing["gazing_pos"] % V
            edges = torch.tensor([0, *c.ids_per_scale]).cumsum(0).tolist()
            shares.setdefault(name, []).append(torch.tensor([((ids >= a) & (ids < b)).float().mean() for a, b in
                                                             zip(edges, edges[1:], strict=False)]))
            if i == 0:
                first[name] = (video, gazing, recon, loss)
    out = {}
    for name in losses:
        loss = torch.cat(losses[name])
        out[name] = {"loss": loss.mean().item(), "clips": len(loss), "per_frame": loss.mean(0).tolist(),
                     "share_per_scale": torch.stack(shares[name]).mean(0).tolist()}
        if name in predicted:
            p = torch.cat(predicted[name])
            centred = (p - p.mean(), loss - loss.mean())
            out[name]["predicted"] = p.mean().item()
            out[name]["predicted_mae"] = (p - loss).abs().mean().item()
            correlation = (centred[0] * centred[1]).mean() / (p.std() * loss.std() + 1e-12)
            out[name]["predicted_correlation"] = correlation.item()
            out[name]["scatter"] = torch.stack([p, loss], -1).flatten(0, 1)[:2000].tolist()
    return out, first, budgets


def gap_closed(table, name):
    """(random - x) / (random - greedy) in per cent."""
    r, g = table["random"]["loss"], table["greedy"]["loss"]
    return 100 * (r - table[name]["loss"]) / (r - g)


def print_table(results):
    names = list(next(iter(results.values())))
    print(f"\n{'loss at ratio':<16}" + "".join(f"{r:>10}" for r in results) + "   gap closed at " + next(iter(results)))
    for name in names:
        closed = ""
        if "greedy" in names:
            closed = f"{gap_closed(next(iter(results.values())), name):>10.0f} %"
        losses = (f"{t[name]['loss']:>10.4f}" if name in t else f"{'-':>10}" for t in results.values())
        print(f"{name:<16}" + "".join(losses) + closed)


def plot(results, out):
    fig, ax = viz.plt.subplots(figsize=(5.5, 4))
    for name in next(iter(results.values())):
        points = sorted((float(r), t[name]["loss"]) for r, t in results.items() if name in t)
        style = "--" if name in ("random", "uniform", "frame_diff") else "-"
        ax.plot(*zip(*points, strict=True), marker="o", ms=4, label=name, ls=style)
    ax.set(xlabel="gazing ratio (share of all patches)", ylabel="reconstruction loss", title="held-out clips")
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
    fig.tight_layout()
    viz.save_figure(fig, out / "loss_against_ratio.png")
    table = next(iter(results.values()))
    models = [n for n in table if "scatter" in table[n]]
    if models:
        fig, axes = viz.plt.subplots(1, len(models), figsize=(3.6 * len(models), 3.6), squeeze=False)
        for ax, name in zip(axes[0], models, strict=True):
            x, y = zip(*table[name]["scatter"], strict=True)
            ax.scatter(x, y, s=4, alpha=0.3)
            low, high = min(*x, *y), max(*x, *y)
            ax.plot([low, high], [low, high], color="black", lw=0.8)
            ax.set(xlabel="predicted loss", ylabel="measured loss",
                   title=f"{name}: r = {table[name]['predicted_correlation']:.2f}")
        fig.tight_layout()
        viz.save_figure(fig, out / "predicted_against_measured.png")


def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    _, _, device = common.init_processes(cfg.device)
    out, t0 = Path(cfg.out_dir), time.time()
    mae = load_videomae(cfg, device)
    models = {}
    for entry in filter(None, cfg.models.split(",")):
        name, folder = entry.split("=", 1)
        models[name] = Gaze.from_pretrained(folder).to(device).eval()
        if models[name].config.scales != mae.config.scales:
            raise ValueError(f"{folder} looks at scales {models[name].config.scales}, "
                             f"{cfg.videomae} at {mae.config.scales}")
    clips = Clips(cfg.root, cfg.split, cfg.n_frames, mae.config.image_size, stride=cfg.stride)
    n = min(len(clips), cfg.max_clips)
    items, unreadable = [], set()
    for i in range(n):
        item = clips[i]
        unreadable.update(item["unreadable"])
        if item["path"] not in {x["path"] for x in items}:  # an unreadable file is passed over, not replaced by a twin
            items.append(item)
    batches = [{"video": torch.stack([x["video"] for x in items[i:i + cfg.batch_size]])}
               for i in range(0, len(items), cfg.batch_size)]
    results, pictures, budgets = {}, {}, {}
    for i, ratio in enumerate(cfg.ratios.split(",")):
        with_greedy = cfg.greedy * (len(items) if i == 0 else cfg.greedy_clips)
        results[ratio], first, budgets[ratio] = measure(cfg, mae, models, batches, float(ratio), device, with_greedy)
        pictures = pictures or first
    print_table(results)
    for name, (video, gazing, recon, loss) in pictures.items():
        viz.sheet(out / f"gaze_{name}.png", video[0], one_clip(gazing, 0), mae.config, reconstruction=recon[0],
                  losses=loss[0].tolist(), title=f"{name}: loss {loss[0].mean():.3f}")
    plot(results, out)
    for table in results.values():
        for name, row in table.items():
            row.pop("scatter", None)
            if "greedy" in table:
                row["gap_closed"] = gap_closed(table, name)
    (out / "eval.json").write_text(json.dumps(
        {"config": asdict(cfg), "commit": common.git_commit(), "clips": len(items), "unreadable": len(unreadable),
         "budgets": budgets, "seconds": time.time() - t0, "results": results}, indent=1) + "\n")
    print(f"\n{len(items)} clips, budgets per frame {budgets[cfg.ratios.split(',')[0]]}; "
          f"pictures and eval.json in {out}")


if __name__ == "__main__":
    main()
