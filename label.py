"""Find gaze sequences by greedy search with the frozen reconstructor, as training targets for train_ntp.py.

    python label.py config/toy_label.py
    torchrun --nproc_per_node=8 label.py --root=data/mine --videomae=out/videomae    # every process labels its share
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 label.py …   # both nodes
    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 label.py config/toy_label.py       # on a CPU: one process per core

For each slot of a frame every patch not yet gazed is tried, and the one that leaves the lowest reconstruction loss of
that frame is kept, with that loss (paper, section 3.4). Writes <out> in the published gazing_labels.json format:
    {"dataset/split/file.mp4": {"gazing_pos": [[id + V·t, …] per frame], "task_losses": [[loss after it, …] per frame]}}
While it runs, each process appends a line per finished clip to <out>.rankN.jsonl, so a killed run loses one clip each.
<out> holds the clips that this run was asked for (splits, max_clips), those that an earlier one did included.

The naive way runs the whole reconstructor once per candidate. Here the candidates of a step are one batch, and only
the tokens of the current frame are computed: the network is block-causal, so the keys and values of earlier frames
never change. `--naive=true` does it the slow way, with the same result, for comparison.
"""
import json
import sys
import time
import warnings
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Clips, VideoError, check_names, to_model_pixels, video_key
from gazing import draw_ratio, parse_alpha, split_ratio, to_budgets
from lib import configurator, run
from lib.checkpoint import write_whole
from videomae import load_videomae


@dataclass
class Config:
    root: str = "data/toy"             # folders with train/ and val/, separated by commas
    splits: str = "train,val"          # which of them to label
    videomae: str = "out/videomae"     # the reconstructor: folder or state-dict file
    loss_type: str = "l1"              # reconstruction loss: l1, dinov2_reg and siglip2, joined by +
    loss_weights: str = "1"            # of its terms (published: l1+dinov2_reg+siglip2 with 1+0.3+0.3)
    dinov2_reg: str | None = None      # folder or hub id of that network; none: in the videomae file, else published
    siglip2: str | None = None
    out: str | None = None             # label file; none: <first root>/gazing_labels.json
    n_frames: int = 16                 # clip length
    stride: int = 1                    # source frames per clip frame
    ratio_min: float = 0.02            # average gazing ratio of a clip: exponential between min and max (paper)
    ratio_max: float = 0.2
    ratio_rate: float = 10.0           # of the exponential
    alpha: str = "10,3"                # Dirichlet split over frames, the last value repeated (paper: 10,3,3,…)
    max_clips: int = 0                 # label only the first so many of each split; 0: all
    max_candidates: int = 512          # candidates in one batch: bounds memory
    naive: bool = False                # whole forward pass per candidate, for measuring
    seed: int = 666                    # budgets of a clip depend on this and its name only
    device: str = "auto"               # auto | cpu | cuda

    def check(self):
        configurator.check_at_least(self, n_frames=1, stride=1, max_clips=0, max_candidates=1, seed=0)
        configurator.check_above_zero(self, "ratio_rate")
        configurator.check_share(self, "ratio_min", "ratio_max")
        configurator.check_order(self, ("ratio_min", "ratio_max"))
        parse_alpha(self.alpha, self.n_frames)


class Past:
    """Keys and values of a stack of blocks for everything before the current frame. One clip."""

    def __init__(self, blocks, x):
        """x (1, 1, D): the CLS token, which sees itself only. self.out is what the stack makes of it."""
        self.blocks, self.kv = blocks, None
        self.out = self.append(x)

    def run(self, x):
        """x (C, L, D): C alternatives for the current frame's tokens -> (output (C, L, D), their keys and values)."""
        new = []
        for i, block in enumerate(self.blocks):
            q, k, v = block.qkv(x)
            new.append((k, v))
            if self.kv:  # the past is shared by all alternatives
                k, v = (torch.cat([p.expand(len(x), -1, -1, -1), a], dim=2)
                        for p, a in zip(self.kv[i], (k, v), strict=True))
            x = block.finish(x, F.scaled_dot_product_attention(q, k, v))
        return x, new

    def append(self, x):
        """Make x (1, L, D) part of the past; returns its output."""
        out, new = self.run(x)
        if self.kv:
            new = [[torch.cat(pair, dim=2) for pair in zip(old, n, strict=True)]
                   for old, n in zip(self.kv, new, strict=True)]
        self.kv = new
        return out


@torch.inference_mode()
def greedy(mae, video, budgets, max_candidates=512):
    """Greedy gaze sequence of one clip.

    video (T, 3, R, R) normalised; budgets (T,) patches to take in each frame. Returns (gazing_pos, task_losses), lists
    over frames of ids within the frame and of the frame's loss after each. Equal to running
    mae(video, gazing, [t]) for every candidate, at the cost of the current frame's tokens only.
    """
    V, P = mae.config.num_ids, mae.config.ids_per_scale[-1]
    e, d = mae.vit.embeddings, mae.decoder
    T = len(video)
    tokens = e(e.patches(video[None])[0], torch.arange(T * V, device=video.device)).view(T, V, -1)
    grid = d.grid_positions()  # (V, D')
    encoder = Past(mae.vit.encoder.layer, e.cls())
    decoder = Past(d.decoder_layers, d.cls(mae.vit.layernorm(encoder.out)))
    gazing_pos, task_losses = [], []
    for t, n_t in enumerate(budgets):
        chosen, losses, empty = [], [], d.mask_token[0] + grid + d.time_embed[t]  # (V, D'): a frame nothing is known of
        target = mae.loss.target(video[t:t + 1])
        for _ in range(n_t):
            rest = [i for i in range(V) if i not in chosen]
            ids = torch.tensor([chosen + [i] for i in rest], device=video.device)  # (C, j + 1)
            tried = []
            for part in ids.split(max_candidates):
                h = d.decoder_embed(mae.vit.layernorm(encoder.run(tokens[t][part])[0])) + grid[part] + d.time_embed[t]
                x = empty.expand(len(part), -1, -1).scatter(1, part.unsqueeze(-1).expand_as(h), h)
                finest = decoder.run(x)[0][:, V - P:]
                tried.append(mae.loss(d.pixels(finest), target))
            tried = torch.cat(tried)
            best = int(tried.argmin())
            chosen.append(rest[best])
            losses.append(float(tried[best]))
        ids = torch.tensor([chosen], device=video.device)
        h = mae.vit.layernorm(encoder.append(tokens[t][ids]))
        decoder.append(d.decoder_embed(h) + grid[ids] + d.time_embed[t])  # later frames see this one's gazes only
        gazing_pos.append(chosen)
        task_losses.append(losses)
    return gazing_pos, task_losses


@torch.inference_mode()
def greedy_naive(mae, video, budgets, max_candidates=512):
    """The same result by whole forward passes, one candidate at a time."""
    V, gazing_pos, task_losses = mae.config.num_ids, [], []
    for t, n_t in enumerate(budgets):
        gazing_pos.append([])
        task_losses.append([])
        for _ in range(n_t):
            best = (float("inf"), None)
            for i in range(V):
                if i not in gazing_pos[t]:
                    frames = [*gazing_pos[:t], gazing_pos[t] + [i]]
                    pos = torch.tensor([[p + V * s for s, f in enumerate(frames) for p in f]], device=video.device)
                    gazing = {"gazing_pos": pos, "if_padded_gazing": torch.zeros_like(pos, dtype=torch.bool),
                              "num_gazing_each_frame": torch.tensor([len(f) for f in frames])}
                    best = min(best, (float(mae(video[None, :t + 1], gazing, [t])[1]), i))
            task_losses[t].append(best[0])
            gazing_pos[t].append(best[1])
    return gazing_pos, task_losses


def clip_budgets(cfg, key, V):
    """Patches per frame of a clip, from the seed and its key alone: the same on every machine and after a restart."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{cfg.seed} {key}".encode()))
    ratio = draw_ratio("exponential", 0, cfg.ratio_min, cfg.ratio_max, cfg.ratio_rate, generator)
    return to_budgets(split_ratio("dirichlet", ratio, cfg.n_frames, cfg.alpha, generator), V)


def read_parts(out, settings):
    """Labels of finished clips from all <out>.rankN.jsonl, whatever number of processes wrote them."""
    labels = {}
    for path in sorted(out.parent.glob(out.name + ".rank*.jsonl")):
        for i, line in enumerate(path.read_text().splitlines()):
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the line a killed process was writing
                continue
            if "settings" in entry and entry["settings"] != settings:
                changed = [k for k in settings if settings[k] != entry["settings"].get(k)]
                raise ValueError(f"{path}:{i + 1} was made with other settings ({', '.join(changed)}): "
                                 f"delete {out.name}.rank*.jsonl to start anew, or choose another out")
            if "key" in entry:
                labels[entry["key"]] = {"gazing_pos": entry["gazing_pos"], "task_losses": entry["task_losses"]}
    return labels


def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    rank, world, device = run.init_processes(cfg.device)
    mae = load_videomae(cfg, device)
    c, V = mae.config, mae.config.num_ids
    out = Path(cfg.out or Path(cfg.root.split(",")[0]) / "gazing_labels.json")
    # may change between runs
    free = ("out", "device", "dinov2_reg", "siglip2", "max_candidates", "naive", "splits", "max_clips")
    settings = {k: v for k, v in asdict(cfg).items() if k not in free}
    # a reconstructor that was trained anew under the same name finds other labels
    settings["weights"] = f"{sum(p.double().abs().sum().item() for p in mae.parameters()):.6g}"
    out.parent.mkdir(parents=True, exist_ok=True)
    done = read_parts(out, settings)
    run.barrier()  # nobody writes before all have read, or they would share out different lists

    clips = [Clips(cfg.root, split, cfg.n_frames, c.image_size, stride=cfg.stride) for split in cfg.splits.split(",")]
    for data in clips:
        check_names([video_key(path) for path in data.paths], cfg.root)
    asked = {video_key(data.paths[i]): (data, i) for data in clips
             for i in range(min(len(data), cfg.max_clips or len(data)))}
    todo = [clip for key, clip in asked.items() if key not in done]
    mine = todo[rank::world]
    if rank == 0:
        print(f"{c.scales} px: {V} ids per frame, {cfg.n_frames} frames; "
              f"{len(asked) - len(todo)} clips labelled before, {len(todo)} to do in {world} process(es)")
    search = greedy_naive if cfg.naive else greedy
    t0, n_candidates, n_bad = time.time(), 0, 0
    with open(f"{out}.rank{rank}.jsonl", "a") as part:
        part.write("\n" + json.dumps({"settings": settings}) + "\n")  # the newline ends a line cut off by a kill
        for data, i in tqdm(mine, desc="labels", unit="clip", disable=rank > 0, mininterval=2):
            try:
                video = to_model_pixels(data.read(data.paths[i]).to(device))
            except VideoError as error:
                warnings.warn(str(error), stacklevel=1)
                n_bad += 1
                continue
            budgets = clip_budgets(cfg, video_key(data.paths[i]), V)
            pos, losses = search(mae, video, budgets, cfg.max_candidates)
            pos = [[p + V * t for p in frame] for t, frame in enumerate(pos)]
            losses = [[round(x, 6) for x in frame] for frame in losses]
            part.write(json.dumps({"key": video_key(data.paths[i]), "gazing_pos": pos, "task_losses": losses}) + "\n")
            part.flush()
            n_candidates += sum(V * n - n * (n - 1) // 2 for n in budgets)
    seconds = time.time() - t0
    total, n_bad = run.all_sum(n_candidates, n_bad)
    run.barrier()
    if rank == 0:
        done = read_parts(out, settings)
        labels = {key: done[key] for key in asked if key in done}
        if not labels:
            raise VideoError(f"{cfg.root}: none of the {len(asked)} videos could be read, no labels written")
        write_whole(out, json.dumps(labels))
        if mine:
            print(f"{seconds / len(mine):.4f} s per clip and process, "
                  f"{total / max(seconds, 1e-9):.0f} candidates per second in all")
        print(f"{out}: labels of {len(labels)} clips"
              + (f"; {int(n_bad)} unreadable files left out" if n_bad else "")
              + (f"; {len(done) - len(labels)} more, not asked for now, stay in {out.name}.rank*.jsonl"
                 if len(done) > len(labels) else ""))
    run.finish()


if __name__ == "__main__":
    main()
