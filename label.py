"""Find gaze sequences by greedy search with the frozen reconstructor, as training targets for train_ntp.py.

    python label.py config/toy_label.py
    python label.py config/toy_label.py --teacher=out/toy/grpo --out=taught.json     # a gaze model's own choices
    torchrun --nproc_per_node=8 label.py --root=data/mine --videomae=out/videomae    # every process labels its share
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 label.py …   # both nodes
    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 label.py config/toy_label.py       # on a CPU: one process per core

For each slot of a frame patches not yet gazed are tried, and the one that leaves the lowest reconstruction loss of that
frame is kept, with that loss (paper, section 3.4). With --exact=true all of them are tried, else n_tried: some that
gained most when last tried in this frame, the others those not tried for longest. That is ten times faster with 265
ids, and the loss is about a per cent higher (docs/training.md). With --teacher the labels are what a trained gaze model
takes at the same budgets, and the losses that it predicts, to train another like it. Writes <out> in the published
gazing_labels.json format:
    {"dataset/split/file.mp4": {"gazing_pos": [[id + V·t, …] per frame], "task_losses": [[loss after it, …] per frame]}}
While it runs, each process appends a line per finished clip to <out>.rankN.jsonl, so a killed run loses one clip each.
<out> holds the clips that this run was asked for (splits, max_clips), those that an earlier one did included.

The candidates of a slot are one batch, and only the tokens of the current frame are computed: the network is
block-causal, so the keys and values of earlier frames never change.

Dimension key: T frames, V patch ids per frame, P of them at the finest scale, C candidates, L tokens, D width of the
reconstructor's encoder, D' of its decoder.
"""
import json
import sys
import time
import warnings
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Clips, VideoError, check_names, to_model_pixels, video_key
from gazing import draw_ratio, parse_alpha, split_ratio, to_budgets
from lib import configurator, run
from lib.attention import attend_shared
from lib.checkpoint import lock
from lib.labels import check_fields
from lib.text import naming, write_whole
from model import Gaze
from videomae import load_videomae


@dataclass
class Config:
    root: str = "data/toy"             # folders with train/ and val/, separated by commas
    splits: str = "train,val"          # which of them to label
    teacher: str | None = None         # a gaze model, folder or hub id, whose choices to write down; none: search
    videomae: str = "out/videomae"     # the reconstructor: folder or state-dict file; not needed with a teacher
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
    exact: bool = False                # true: try every patch in every slot (paper), ten times slower; else n_tried
    n_tried: int = 26                  # a tenth of 265 ids; more of them: lower loss, slower (docs/training.md)
    max_candidates: int = 512          # candidates in one batch: bounds memory
    seed: int = 666                    # budgets of a clip depend on this and its name only
    device: str = "auto"               # auto | cpu | cuda
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # autocast; auto: float32 on a CPU, else bfloat16
    tf32: bool = True                  # on a GPU: what stays in float32 is multiplied in TF32 (10 bits of mantissa)

    def check(self):
        configurator.check_at_least(self, n_frames=1, stride=1, max_clips=0, n_tried=1, max_candidates=1,
                                    seed=0)
        configurator.check_above_zero(self, "ratio_rate")
        configurator.check_share(self, "ratio_min", "ratio_max")
        configurator.check_order(self, ("ratio_min", "ratio_max"))
        parse_alpha(self.alpha, self.n_frames)


# May change between runs that share a label file: these do not change the label of a clip.
FREE = ("out", "device", "dinov2_reg", "siglip2", "max_candidates", "splits", "max_clips")

# ----------------------------------------------------------------------------------------------------------------------
# greedy search


MANY_QUERIES = 64  # with fewer, copying the past's keys for every candidate is what takes the time


class Past:
    """Keys and values of a stack of blocks for everything before the current frame. One clip."""

    def __init__(self, blocks, x):
        """x (1, 1, D): the CLS token, which sees itself only. self.out is what the stack makes of it."""
        self.blocks = blocks
        self.kv = None  # per block, keys and values (1, H, L, d)
        self.out = self.append(x)

    def run(self, x):
        """x (C, L, D): C alternatives for the current frame's tokens -> (output (C, L, D), their keys and values)."""
        new = []
        for i, block in enumerate(self.blocks):
            q, k, v = block.qkv(x)
            new.append((k, v))
            if not self.kv:
                y = F.scaled_dot_product_attention(q, k, v)
            elif q.shape[2] < MANY_QUERIES:
                y = attend_shared(q, k, v, *self.kv[i])
            else:
                y = F.scaled_dot_product_attention(q, *self.with_past(i, k, v))
            x = block.finish(x, y)
        return x, new

    def with_past(self, i, k, v):
        """Keys and values (C, H, L, d) behind those of block i's past, which all alternatives share."""
        past_k, past_v = self.kv[i]
        past_k = past_k.expand(len(k), -1, -1, -1)
        past_v = past_v.expand(len(v), -1, -1, -1)
        return torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)

    def append(self, x):
        """Make x (1, L, D) part of the past; returns its output."""
        out, new = self.run(x)
        if self.kv:
            new = [self.with_past(i, k, v) for i, (k, v) in enumerate(new)]
        self.kv = new
        return out


def shortlist(rest, gains, n_tried, generator):
    """Which n_tried of the patches `rest` to try in a slot. gains: {id: what it gained when last tried in this frame},
    the one tried longest ago first. A quarter are the best of these; the others were never tried, drawn at random, or
    tried longest ago."""
    best = sorted((i for i in gains if i in rest), key=gains.get, reverse=True)
    best = best[:n_tried // 4]
    shuffled = [rest[i] for i in torch.randperm(len(rest), generator=generator)]
    never = [i for i in shuffled if i not in gains]
    others = [i for i in gains if i in rest and i not in best]
    return (best + never + others)[:n_tried]


@torch.inference_mode()
def greedy(mae, video, budgets, max_candidates=512, n_tried=None, generator=None):
    """Greedy gaze sequence of one clip.

    video (T, 3, R, R) normalised; budgets (T,) patches to take in each frame. n_tried: how many of the patches not yet
    taken are tried in a slot, see shortlist(); None: all. generator: on the CPU. Returns (gazing_pos, task_losses),
    lists over frames of ids within the frame and of the frame's loss after each. Equal to running
    mae(video, gazing, [t]) for every candidate, at the cost of the current frame's tokens only.
    """
    V, P = mae.config.num_ids, mae.config.ids_per_scale[-1]
    embeddings, d = mae.vit.embeddings, mae.decoder
    T = len(video)
    positions = torch.arange(T * V, device=video.device)
    tokens = embeddings(embeddings.patches(video[None])[0], positions)
    tokens = tokens.view(T, V, -1)
    grid = d.grid_positions()  # (V, D')

    encoder = Past(mae.vit.encoder.layer, embeddings.cls())
    decoder = Past(d.decoder_layers, d.cls(mae.vit.layernorm(encoder.out)))
    gazing_pos, task_losses = [], []
    for t, n_t in enumerate(budgets):
        empty = d.mask_token[0] + grid + d.time_embed[t]  # (V, D'): a frame nothing is known of
        target = mae.loss.target(video[t:t + 1])
        x, _ = decoder.run(empty[None])
        loss_before = mae.loss(d.pixels(x[:, V - P:]), target)
        chosen, losses, gains = [], [], {}
        for _ in range(n_t):
            rest = [i for i in range(V) if i not in chosen]
            if n_tried is not None:
                rest = shortlist(rest, gains, n_tried, generator)
            ids = torch.tensor([chosen + [i] for i in rest], device=video.device)  # (C, j + 1)

            # the loss with each candidate
            tried = []
            for part in ids.split(max_candidates):
                h, _ = encoder.run(tokens[t][part])
                h = d.decoder_embed(mae.vit.layernorm(h)) + grid[part] + d.time_embed[t]
                place = part.unsqueeze(-1).expand_as(h)
                x = empty.expand(len(part), -1, -1).scatter(1, place, h)
                x, _ = decoder.run(x)
                picture = d.pixels(x[:, V - P:])
                tried.append(mae.loss(picture, target))
            tried = torch.cat(tried)

            for i, gain in zip(rest, (loss_before - tried).tolist(), strict=True):
                gains.pop(i, None)  # so that the order is by when each was last tried
                gains[i] = gain

            best = int(tried.argmin())
            loss_before = tried[best]
            chosen.append(rest[best])
            losses.append(float(loss_before))

        # later frames see this one's gazes only
        ids = torch.tensor([chosen], device=video.device)
        h = mae.vit.layernorm(encoder.append(tokens[t][ids]))
        decoder.append(d.decoder_embed(h) + grid[ids] + d.time_embed[t])
        gazing_pos.append(chosen)
        task_losses.append(losses)
    return gazing_pos, task_losses


@torch.no_grad()
def ask(teacher, video, budgets):
    """What a gaze model takes of one clip, in place of greedy: the same arguments, the same kind of result."""
    V = teacher.config.num_ids
    gazing = teacher.generate(video[None], torch.tensor([budgets]) / V)
    _, predicted = teacher(video[None], gazing)  # (1, N), the loss after each gaze
    ids = gazing["gazing_pos"][0] % V
    return ([frame.tolist() for frame in ids.split(budgets)],
            [frame.tolist() for frame in predicted[0].split(budgets)])


# ----------------------------------------------------------------------------------------------------------------------
# the command


def clip_generator(cfg, key):
    """Random numbers from the seed and a clip's key alone: the same on every machine and after a restart."""
    return torch.Generator().manual_seed(zlib.crc32(f"{cfg.seed} {key}".encode()))


def clip_budgets(cfg, key, V):
    """Patches per frame of a clip."""
    generator = clip_generator(cfg, key)
    ratio = draw_ratio("exponential", 0, cfg.ratio_min, cfg.ratio_max, cfg.ratio_rate, generator)
    return to_budgets(split_ratio("dirichlet", ratio, cfg.n_frames, cfg.alpha, generator), V)


def label_clip(network, cfg, data, i):
    """The label of clip i of `data`, as it goes into the file. network: the reconstructor, or the teacher."""
    path = data.paths[i]
    key = video_key(path)
    device = next(network.parameters()).device
    video = to_model_pixels(data.read(path).to(device))
    V = network.config.num_ids
    budgets = clip_budgets(cfg, key, V)
    if cfg.teacher:
        ids, losses = ask(network, video, budgets)
    else:
        n_tried = None if cfg.exact else cfg.n_tried
        ids, losses = greedy(network, video, budgets, cfg.max_candidates, n_tried, clip_generator(cfg, key))

    gazing_pos = []
    task_losses = []
    for t in range(cfg.n_frames):
        gazing_pos.append([patch_id + V * t for patch_id in ids[t]])
        task_losses.append([round(loss, 6) for loss in losses[t]])
    return {"key": key, "gazing_pos": gazing_pos, "task_losses": task_losses}


def settings_of(cfg, network, dtype):
    """What the labels depend on. A network that was trained anew under the same name finds other labels."""
    settings = {key: value for key, value in asdict(cfg).items() if key not in FREE}
    del settings["dtype"], settings["tf32"]
    if dtype != "float32":  # files of the time when there was no other do not say so
        settings["dtype"] = dtype
    if not cfg.teacher:
        del settings["teacher"]
    if cfg.exact:  # as files of the time when there was no other search
        del settings["exact"], settings["n_tried"]
    else:  # an earlier one drew all n_tried at random
        settings["search"] = "shortlist"
    checksum = sum(p.double().abs().sum().item() for p in network.parameters())
    return settings | {"weights": f"{checksum:.6g}"}


def read_parts(out, settings):
    """Labels of finished clips from all <out>.rankN.jsonl, whatever number of processes wrote them."""
    labels = {}
    for path in sorted(out.parent.glob(out.name + ".rank*.jsonl")):
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            try:
                entry = dict(json.loads(line))
                if "key" in entry:
                    check_fields(entry["key"], entry, path)
            except (ValueError, TypeError, AttributeError):  # the line a killed process was writing
                continue
            if "settings" in entry and entry["settings"] != settings:
                before = entry["settings"]
                changed = [key for key in before | settings if settings.get(key) != before.get(key)]
                raise ValueError(f"{path}:{number} was made with other settings ({', '.join(changed)}): "
                                 f"delete {out.name}.rank*.jsonl to start anew, or choose another out")
            if "key" in entry:
                labels[entry["key"]] = {"gazing_pos": entry["gazing_pos"], "task_losses": entry["task_losses"]}
    return labels


def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    rank, world, device = run.init_processes(cfg.device)
    if cfg.teacher:
        network = Gaze.from_pretrained(cfg.teacher).to(device).eval()
    else:
        network = load_videomae(cfg, device)
    network.checks_values = False  # pixels come from data.Clips
    c = network.config

    # ---- what earlier runs have done
    first_root = cfg.root.split(",")[0]
    out = Path(cfg.out or f"{first_root}/gazing_labels.json")
    if rank == 0:
        lock(f"{out}.lock", f"out={out}")
    run.barrier()
    autocast, dtype = run.precision(cfg, device)
    settings = settings_of(cfg, network, dtype)
    done = read_parts(out, settings)
    run.barrier()  # nobody writes before all have read, or they would share out different lists

    # ---- what there is to do, and this process's share of it
    asked = {}
    for split in cfg.splits.split(","):
        data = Clips(cfg.root, split, cfg.n_frames, c.image_size, stride=cfg.stride)
        keys = [video_key(path) for path in data.paths]
        check_names(keys, cfg.root)
        for i, key in enumerate(keys[:cfg.max_clips or None]):
            asked[key] = data, i
    todo = [clip for key, clip in asked.items() if key not in done]
    mine = todo[rank::world]
    if rank == 0:
        print(f"{c.scales} px: {c.num_ids} ids per frame, {cfg.n_frames} frames; "
              f"{len(asked) - len(todo)} clips labelled before, {len(todo)} to do in {world} process(es)")

    # ---- label: a line per clip, so that a killed run loses one
    t0 = time.time()
    n_candidates = n_bad = 0
    with open(f"{out}.rank{rank}.jsonl", "a") as part:
        part.write("\n" + json.dumps({"settings": settings}) + "\n")  # the newline ends a line cut off by a kill
        for data, i in tqdm(mine, desc="labels", unit="clip", disable=rank > 0, mininterval=2):
            try:
                with autocast:
                    label = label_clip(network, cfg, data, i)
            except VideoError as error:
                warnings.warn(str(error), stacklevel=1)
                n_bad += 1
                continue
            with naming(part.name):
                part.write(json.dumps(label) + "\n")
                part.flush()
            n_tried = c.num_ids if cfg.exact else cfg.n_tried  # of a search; a teacher tries none
            for losses in label["task_losses"]:
                n_candidates += sum(min(n_tried, c.num_ids - j) for j in range(len(losses)))
    seconds = time.time() - t0

    # ---- one file of all processes' labels
    n_candidates, n_bad = run.all_sum(n_candidates, n_bad)
    run.barrier()
    if rank == 0:
        done = read_parts(out, settings)
        labels = {key: done[key] for key in asked if key in done}
        if not labels:
            raise VideoError(f"{cfg.root}: none of the {len(asked)} videos could be read, no labels written")
        write_whole(out, json.dumps(labels))

        if mine:
            rate = n_candidates / max(seconds, 1e-9)
            searched = "" if cfg.teacher else f", {rate:.0f} candidates per second in all"
            print(f"{seconds / len(mine):.4f} s per clip and process{searched}")
        print(f"{out}: labels of {len(labels)} clips")
        if n_bad:
            print(f"{int(n_bad)} unreadable files left out")
        if len(done) > len(labels):
            print(f"{len(done) - len(labels)} more, not asked for now, stay in {out.name}.rank*.jsonl")
    run.finish()


if __name__ == "__main__":
    run.launch(main, VideoError)
