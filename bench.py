"""How long the main work takes, how much memory, and how far that is from what the hardware could do.

    OMP_NUM_THREADS=1 python bench.py                                  # CPU, one thread
    python bench.py --device=cuda --dtype=bfloat16                     # GPU

Published sizes (16 frames of 224 px, 265 ids per frame, ViT-L reconstructor), random weights. Writes a table to --out:
    seconds    best of several runs. One thread of a CPU: processor time, which other processes disturb least; else wall
    MiB        peak so far, of the process (CPU; runtime and weights included) or of the tensors on a GPU
    x limit    seconds over the least they could be: the arithmetic, counted from the sizes, over the best rate of a
               large matrix product seen in this run, torch's own or lib/cpu.py's. Leaving out work can bring it below 1
"""
import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Literal

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from gazing import random_gazing, to_budgets, to_device
from label import greedy
from lib import configurator, run
from lib.checkpoint import write_whole
from lib.cpu import linear
from lib.log import git_commit, peak_memory
from model import Gaze, GazeConfig
from siglip import GazeSigLIP
from train_grpo import grpo_loss
from train_ntp import ntp_loss
from videomae import VideoMAE, VideoMAEConfig

GAZE, MAE = GazeConfig(), VideoMAEConfig()
SIGLIP = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
GROUP = 4                              # rollouts of the GRPO step; published: 12
PRODUCT = {"cpu": 1024, "cuda": 8192}  # side of the large matrix product


@dataclass
class Config:
    cases: str = ""                    # only cases whose name contains one of these texts, joined by commas; "": all
    out: str = "out/bench.json"
    device: str = "auto"               # auto | cpu | cuda
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of autocast and of the large product


# ----------------------------------------------------------------------------------------------------------------------
# arithmetic: operations of matrix products, a multiply-add being two; attention counts the keys that a query may see


def transformer_flops(n_tokens, n_pairs, dim, mlp, n_layers, mlp_matrices=2):
    per_token = 2 * (4 * dim * dim + mlp_matrices * dim * mlp)
    return n_layers * (n_tokens * per_token + 4 * n_pairs * dim)


def block_pairs(sizes):
    return sum(size * sum(sizes[:i + 1]) for i, size in enumerate(sizes))


def gaze_flops(c, counts):
    """Gaze model, one clip with counts[t] gazes in frame t."""
    d, K = c.hidden_size, c.num_multi_token_pred
    n_vision = c.ids_per_scale[-1] * len(counts)
    n_tokens = n_vision + sum(counts)
    encoder = 2 * n_vision * d * (3 * c.patch_size ** 2 + 27 * d * c.num_conv_blocks + d)
    decoder = transformer_flops(n_tokens, n_tokens * (n_tokens + 1) // 2, d, c.intermediate_size, c.num_layers, 3)
    heads = 2 * d * K * (c.num_ids + 2) * sum(ceil(n / K) for n in counts)
    return encoder + decoder + heads


def mae_flops(c, counts, frames):
    """Reconstruct `frames` of one clip with counts[t] gazes in frame t. Nothing after the last of them is needed."""
    D, d, pixels = c.hidden_size, c.decoder_hidden_size, 3 * c.patch_size ** 2
    counts = counts[:max(frames) + 1]
    seen = [1, *counts]
    painted = [1, *(c.num_ids if t in frames else n for t, n in enumerate(counts))]
    encoder = transformer_flops(sum(seen), block_pairs(seen), D, c.intermediate_size, c.num_hidden_layers)
    mlp, n_layers = c.decoder_intermediate_size, c.decoder_num_hidden_layers
    decoder = transformer_flops(sum(painted), block_pairs(painted), d, mlp, n_layers)
    projections = sum(counts) * pixels * D + sum(seen) * D * d + len(frames) * c.ids_per_scale[-1] * d * pixels
    return encoder + decoder + 2 * projections


def siglip_flops(n_tokens, n_pairs):
    d, n_layers, _, mlp = SIGLIP.values()
    return 2 * n_tokens * 3 * GAZE.patch_size ** 2 * d + transformer_flops(n_tokens, n_pairs, d, mlp, n_layers)


# ----------------------------------------------------------------------------------------------------------------------
# the work


def cases(device):
    """Yield (name, function that does the work once, its arithmetic)."""
    T, R, V, P = GAZE.max_num_frames, GAZE.image_size, GAZE.num_ids, GAZE.ids_per_scale[-1]
    video = torch.randn(4, T, 3, R, R, device=device).clamp(-2, 2)
    one = video[:1]
    counts = to_budgets([0.1] * T, V)
    gazing = to_device(random_gazing(counts, 4, V), device)
    one_gazing = to_device(random_gazing(counts, 1, V), device)
    gaze = Gaze(GAZE).to(device)

    for name, clips, ratio in (("1 clip", one, 0.1), ("4 clips", video, 0.1), ("1 clip", one, 0.75)):
        flops = len(clips) * gaze_flops(GAZE, to_budgets([ratio] * T, V))
        yield f"generate {name} at ratio {ratio}", partial(gaze.generate, clips, ratio), flops

    def stream():
        state = gaze.stream(1, 0.1)
        for frame in one.unbind(1):
            state.step(frame)
    yield f"stream of {T} frames", stream, gaze_flops(GAZE, counts)

    def ntp_step():
        gaze.zero_grad()
        targets = gazing | {"task_losses": torch.zeros_like(gazing["gazing_pos"], dtype=torch.float32)}
        nll, error = ntp_loss(*gaze(video, gazing), targets, gazing["gazing_pos"].numel())
        (nll + error).backward()
    yield "NTP step of 4 clips", ntp_step, 4 * 3 * gaze_flops(GAZE, counts)       # backward is twice forward

    # SigLIP on all patches of the finest scale, each frame by itself, or on gazed ones, whose choice is part of it
    network = SiglipVisionModel(SiglipVisionConfig(
        **SIGLIP, image_size=R, patch_size=GAZE.patch_size, vision_use_head=False)).eval().to(device)
    siglip = GazeSigLIP(network, GAZE.scales).requires_grad_(False)
    yield "SigLIP on all patches", lambda: network(one[0]), siglip_flops(T * P, T * P * P)
    flops = gaze_flops(GAZE, counts) + siglip_flops(sum(counts), block_pairs(counts))
    yield "SigLIP on gazed patches", lambda: siglip(one, gaze.generate(one, 0.1)), flops

    mae = VideoMAE(MAE).to(device).freeze()
    frames = [T // 3, 2 * T // 3]  # where two random ones lie on average
    yield "reward of 2 frames", lambda: mae(one, one_gazing, frames), mae_flops(MAE, counts, frames)
    yield f"reward of {T} frames", lambda: mae(one, one_gazing, range(T)), mae_flops(MAE, counts, range(T))

    def grpo_step():
        gaze.zero_grad()
        group = gaze.generate(one, 0.1, temperature=1.0, num_copies=GROUP)
        loss = mae(one, group, frames)[1].sum(dim=1, keepdim=True)
        log_prob, task_loss = gaze(one, group, policy="sampling")
        (grpo_loss(log_prob, loss.mean() - loss) + task_loss.mean()).backward()
    flops = GROUP * (4 * gaze_flops(GAZE, counts) + mae_flops(MAE, counts, frames))
    yield f"GRPO step of 1 clip, group of {GROUP}", grpo_step, flops
    yield f"label search, {V} candidates", lambda: greedy(mae, one[0, :1], [1], 64), V * mae_flops(MAE, [1], [0])


# ----------------------------------------------------------------------------------------------------------------------
# measuring


def best_time(work, device):
    """Fewest seconds of five runs, of which the first may compile kernels. After 20 seconds no further one begins."""
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if one_thread else partial(run.now, device)
    seconds = []
    while len(seconds) < 5 and sum(seconds) < 20:
        start = clock()
        work()
        seconds.append(clock() - start)
    return min(seconds)


def product_rate(cfg, device):
    side = PRODUCT[device.type]
    a = torch.randn(side, side, device=device, dtype=getattr(torch, cfg.dtype))
    seconds = [best_time(partial(product, a, a), device) for product in (torch.mm, linear)]
    return 2 * side ** 3 / min(seconds)


def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    _, _, device = run.init_processes(cfg.device)
    torch.manual_seed(0)
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    about = f"torch {torch.__version__}, {device}, {cfg.dtype}, {torch.get_num_threads()} thread(s), {git_commit()}"
    print(about)

    rows, rate = [], product_rate(cfg, device)
    for name, work, flops in cases(device):
        if not any(text in name for text in cfg.cases.split(",")):
            continue
        with torch.autocast(device.type, getattr(torch, cfg.dtype), enabled=cfg.dtype != "float32"):
            seconds = best_time(work, device)
        rows.append({"case": name, "seconds": seconds, "mib": peak_memory(device) * 1024, "gflop": flops / 1e9})
        print(f"{name}: {seconds:.4f} s", flush=True)
        rate = max(rate, product_rate(cfg, device))

    if not rows:
        raise ValueError(f"cases={cfg.cases!r} is in the name of no case")
    print(f"\n{'case':40}   seconds      MiB     GFLOP  x limit, which is {rate / 1e9:.0f} GFLOP/s")
    for row in rows:
        row["times_limit"] = row["seconds"] * rate / 1e9 / row["gflop"]
        print("{case:40} {seconds:9.4f} {mib:8.0f} {gflop:9.1f} {times_limit:8.2f}".format(**row))
    write_whole(cfg.out, json.dumps({"about": about, "product_gflops": rate / 1e9, "cases": rows}, indent=1))


if __name__ == "__main__":
    run.launch(main)
