"""How long the main work takes, how much memory, and how far that is from what the hardware could do.

    OMP_NUM_THREADS=1 python bench.py                                  # CPU, one thread: ten minutes
    python bench.py --device=cuda --dtype=bfloat16                     # GPU
    python bench.py --quick=true --device=cuda                         # tiny networks: does everything run?

Published sizes (16 frames of 224 px, 265 ids per frame, ViT-L reconstructor), random weights. Prints a table as
Markdown and writes it to --out:
    seconds    best of several runs. One thread of a CPU: processor time, which other processes disturb least; else wall
    MiB        peak of the process so far (CPU; runtime and weights included), or of the tensors of the case on a GPU
    x limit    seconds over the least they could be: the arithmetic, counted from the sizes, over the best rate of a
               large product or convolution seen in this run, whichever library did it. Leaving out work can bring it
               below 1, as the last layer of the gaze model does, which computes three tokens per frame
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
import torch.nn.functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel

from gazing import random_gazing, to_budgets, to_device
from label import greedy
from lib import configurator, run
from lib.checkpoint import write_whole
from lib.log import git_commit, peak_memory
from model import Gaze, GazeConfig
from siglip import GazeSigLIP
from train_grpo import grpo_loss
from train_ntp import ntp_loss
from videomae import VideoMAE, VideoMAEConfig

GROUP = 4                              # rollouts of the GRPO step; published: 12
RATIOS = (0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass
class Config:
    cases: str = ""                    # only cases whose name contains one of these texts, joined by commas; "": all
    quick: bool = False                # tiny networks, one run each: shows that all runs, its times mean nothing
    n_runs: int = 5                    # of each case, unless these take more than `seconds`
    seconds: float = 20.0              # after so many no further run of a case begins
    out: str = "out/bench.json"
    device: str = "auto"               # auto | cpu | cuda
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of autocast and of the large products

    def check(self):
        configurator.check_at_least(self, n_runs=1, seconds=0)


@dataclass
class Sizes:
    gaze: GazeConfig
    mae: VideoMAEConfig
    siglip: dict
    product: int                       # side of the large matrix product
    batches: tuple                     # clips at once in generate
    large: tuple                       # sides in pixels of the larger pictures for SigLIP
    large_frames: int                  # of which a clip has so many frames


def sizes_of(cfg, device):
    siglip = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
    if cfg.quick:
        gaze = GazeConfig(scales="16+32", patch_size=8, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64,
                          num_multi_token_pred=3, max_num_frames=4)
        mae = VideoMAEConfig(scales="16+32", patch_size=8, image_size=32, max_num_frames=8, hidden_size=32,
                             num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, decoder_hidden_size=32,
                             decoder_num_hidden_layers=2, decoder_num_attention_heads=4, decoder_intermediate_size=64)
        siglip = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        return Sizes(gaze, mae, siglip, product=64, batches=(2,), large=(64,), large_frames=2)
    if device.type == "cuda":
        return Sizes(GazeConfig(), VideoMAEConfig(), siglip, product=8192, batches=(4, 16, 64, 256), large=(448, 896),
                     large_frames=16)
    return Sizes(GazeConfig(), VideoMAEConfig(), siglip, product=1024, batches=(4,), large=(448, 896), large_frames=1)


# ----------------------------------------------------------------------------------------------------------------------
# arithmetic: operations of matrix products, a multiply-add being two; attention counts the keys that a query may see


def transformer_flops(n_tokens, n_pairs, dim, mlp, n_layers, mlp_matrices=2):
    weights = 4 * dim * dim + mlp_matrices * dim * mlp
    products = 2 * n_tokens * weights
    attention = 4 * n_pairs * dim
    return n_layers * (products + attention)


def block_pairs(sizes):
    """Pairs of a query and a key that it sees, where each block sees itself and all earlier ones."""
    n_pairs = 0
    n_tokens = 0
    for size in sizes:
        n_tokens += size
        n_pairs += size * n_tokens
    return n_pairs


def gaze_flops(c, counts):
    """Gaze model, one clip with counts[t] gazes in frame t."""
    D = c.hidden_size
    K = c.num_multi_token_pred
    n_vision = c.ids_per_scale[-1] * len(counts)
    n_tokens = n_vision + sum(counts)
    n_pairs = n_tokens * (n_tokens + 1) // 2

    weights_of_encoder = D * (3 * c.patch_size ** 2 + 27 * D * c.num_conv_blocks + D)
    encoder = 2 * n_vision * weights_of_encoder
    decoder = transformer_flops(n_tokens, n_pairs, D, c.intermediate_size, c.num_layers, 3)
    n_blocks = sum(ceil(n / K) for n in counts)
    heads = 2 * n_blocks * D * K * (c.num_ids + 2)
    return encoder + decoder + heads


def mae_flops(c, counts, frames):
    """Reconstruct `frames` of one clip with counts[t] gazes in frame t. Nothing after the last of them is needed."""
    counts = counts[:max(frames) + 1]
    seen = [1, *counts]
    painted = [1]
    for t, n in enumerate(counts):
        painted.append(c.num_ids if t in frames else n)

    D = c.hidden_size
    encoder = transformer_flops(sum(seen), block_pairs(seen), D, c.intermediate_size, c.num_hidden_layers)
    d = c.decoder_hidden_size
    decoder = transformer_flops(sum(painted), block_pairs(painted), d, c.decoder_intermediate_size,
                                c.decoder_num_hidden_layers)

    # patches to tokens, encoder to decoder, tokens to pixels
    pixels = 3 * c.patch_size ** 2
    products = sum(counts) * pixels * D
    products += sum(seen) * D * d
    products += len(frames) * c.ids_per_scale[-1] * d * pixels
    return encoder + decoder + 2 * products


def siglip_flops(c, patch_size, n_tokens, n_pairs):
    D = c["hidden_size"]
    embedding = 2 * n_tokens * 3 * patch_size ** 2 * D
    return embedding + transformer_flops(n_tokens, n_pairs, D, c["intermediate_size"], c["num_hidden_layers"])


# ----------------------------------------------------------------------------------------------------------------------
# the work. Each function yields (name, what does the work once, its arithmetic)


def normal_pixels(n_clips, n_frames, side, device):
    return torch.randn(n_clips, n_frames, 3, side, side, device=device).clamp(-2, 2)


def choosing(sizes, device):
    c = sizes.gaze
    T = c.max_num_frames
    gaze = Gaze(c).to(device)
    clip = normal_pixels(1, T, c.image_size, device)

    for ratio in RATIOS:
        flops = gaze_flops(c, to_budgets([ratio] * T, c.num_ids))
        yield f"generate 1 clip at ratio {ratio}", partial(gaze.generate, clip, ratio), flops

    # random weights predict losses near 0, so no frame ends early: what asking after every block costs
    requirement = -1e9
    flops = gaze_flops(c, to_budgets([0.75] * T, c.num_ids))
    yield "generate 1 clip at ratio 0.75 with a requirement", partial(gaze.generate, clip, 0.75, requirement), flops

    counts = to_budgets([0.1] * T, c.num_ids)
    for n_clips in sizes.batches:
        clips = normal_pixels(n_clips, T, c.image_size, device)
        flops = n_clips * gaze_flops(c, counts)
        yield f"generate {n_clips} clips at ratio 0.1", partial(gaze.generate, clips, 0.1), flops

    def stream():
        state = gaze.stream(1, 0.1)
        for frame in clip.unbind(1):
            state.step(frame)
    yield f"stream of {T} frames at ratio 0.1", stream, gaze_flops(c, counts)


def encoding(sizes, device):
    """SigLIP on all patches of the finest scale, frame by frame, or on gazed ones, whose choice is part of the work."""
    c = sizes.gaze
    gaze = Gaze(c).to(device)
    for side in (c.image_size, *sizes.large):
        T = c.max_num_frames if side == c.image_size else sizes.large_frames
        factor = side // c.image_size
        network = SiglipVisionModel(SiglipVisionConfig(
            **sizes.siglip, image_size=side, patch_size=c.patch_size, vision_use_head=False)).eval().to(device)
        network.requires_grad_(False)
        clip = normal_pixels(1, T, side, device)
        n_patches = (side // c.patch_size) ** 2
        flops = siglip_flops(sizes.siglip, c.patch_size, T * n_patches, T * n_patches ** 2)
        yield f"SigLIP, {T} frames of {side} px, all patches", partial(network, clip[0]), flops

        # larger frames are gazed at in tiles, each at the ratio of a frame
        scales = [scale * factor for scale in c.scale_list]
        siglip = GazeSigLIP(network, scales)
        counts = to_budgets([0.1] * T, c.num_ids)
        gazed = [n * factor ** 2 for n in counts]
        flops = factor ** 2 * gaze_flops(c, counts)
        flops += siglip_flops(sizes.siglip, c.patch_size, sum(gazed), block_pairs(gazed))

        def look_and_encode(clip=clip, siglip=siglip, target=scales if factor > 1 else None):
            gazing = gaze.generate(clip, 0.1, target_scales=target, target_patch_size=target and c.patch_size)
            return siglip(clip, gazing)
        yield f"SigLIP, {T} frames of {side} px, 10 % gazed, choosing included", look_and_encode, flops


def training(sizes, device):
    c = sizes.gaze
    T = c.max_num_frames
    gaze = Gaze(c).to(device)
    mae = VideoMAE(sizes.mae).to(device).freeze()
    gaze.checks_values = mae.checks_values = False
    counts = to_budgets([0.1] * T, c.num_ids)

    # stage 1
    clips = normal_pixels(4, T, c.image_size, device)
    labels = to_device(random_gazing(counts, 4, c.num_ids), device)
    labels["task_losses"] = torch.zeros_like(labels["gazing_pos"], dtype=torch.float32)

    def ntp_forward():
        log_prob, task_loss = gaze(clips, labels)
        nll, error = ntp_loss(log_prob, task_loss, labels, labels["gazing_pos"].numel())
        return nll + error

    def ntp_step():
        gaze.zero_grad()
        ntp_forward().backward()
    yield "NTP of 4 clips, forward", torch.no_grad()(ntp_forward), 4 * gaze_flops(c, counts)
    yield "NTP of 4 clips, forward and backward", ntp_step, 4 * 3 * gaze_flops(c, counts)

    # reward
    clip = clips[:1]
    frames = [T // 3, 2 * T // 3]  # where two random ones lie on average
    one = to_device(random_gazing(counts, 1, c.num_ids), device)
    yield "reward of 2 frames", partial(mae, clip, one, frames), mae_flops(sizes.mae, counts, frames)
    yield f"reward of {T} frames", partial(mae, clip, one, range(T)), mae_flops(sizes.mae, counts, range(T))

    # stage 2, part by part
    roll_out = partial(gaze.generate, clip, 0.1, temperature=1.0, num_copies=GROUP)
    group = roll_out()

    def update():
        gaze.zero_grad()
        log_prob, task_loss = gaze(clip, group, policy="sampling")
        (grpo_loss(log_prob, torch.ones_like(log_prob)) + task_loss.mean()).backward()
    name = f"GRPO of 1 clip, {GROUP} rollouts"
    yield f"{name}: roll out", roll_out, GROUP * gaze_flops(c, counts)
    yield f"{name}: reward", partial(mae, clip, group, frames), GROUP * mae_flops(sizes.mae, counts, frames)
    yield f"{name}: update", update, GROUP * 3 * gaze_flops(c, counts)

    # one slot of the search; a clip has as many as gazes
    V = c.num_ids
    search = partial(greedy, mae, clip[0, :1], [1], 64)
    yield f"label search, one slot of {V} candidates", search, V * mae_flops(sizes.mae, [1], [0])


# ----------------------------------------------------------------------------------------------------------------------
# measuring


def best_time(work, cfg, device):
    """Fewest seconds of a few runs, of which the first may compile kernels."""
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if one_thread else partial(run.now, device)
    seconds = []
    while len(seconds) < (1 if cfg.quick else cfg.n_runs) and sum(seconds) < max(cfg.seconds, 1e-9):
        start = clock()
        work()
        seconds.append(clock() - start)
    return min(seconds)


def best_rates(sizes, cfg, device):
    """Operations per second of large products and of a convolution, by name of the library's function."""
    n = sizes.product
    dtype = getattr(torch, cfg.dtype)
    a = torch.randn(n, n, device=device, dtype=dtype)
    works = {"torch.mm": (partial(torch.mm, a, a), 2 * n ** 3)}

    # the two ways of oneDNN, which PyTorch takes for a linear layer on some processors only
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        multiply = partial(torch.ops.mkldnn._linear_pointwise, a, a, None, "none", [], "")
        works["oneDNN linear"] = multiply, 2 * n ** 3
    d = n // 4
    image = torch.randn(8, d, 32, 32, device=device, dtype=dtype)
    kernel = torch.randn(d, d, 3, 3, device=device, dtype=dtype)
    works["convolution"] = partial(F.conv2d, image, kernel, padding=1), 2 * 8 * 32 ** 2 * d ** 2 * 9

    rates = {}
    for name, (work, flops) in works.items():
        rates[name] = flops / best_time(work, cfg, device)
    return rates


def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    _, _, device = run.init_processes(cfg.device)
    torch.manual_seed(0)
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    about = f"torch {torch.__version__}, {device}, {cfg.dtype}, {torch.get_num_threads()} thread(s), {git_commit()}"
    print(about)

    sizes = sizes_of(cfg, device)
    half = torch.autocast(device.type, getattr(torch, cfg.dtype), enabled=cfg.dtype != "float32")
    rates = best_rates(sizes, cfg, device)
    rows = []
    for group in (choosing, encoding, training):
        for name, work, flops in group(sizes, device):
            if not any(text in name for text in cfg.cases.split(",")):
                continue
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with half:
                seconds = best_time(work, cfg, device)
            rows.append({"case": name, "seconds": seconds, "mib": peak_memory(device) * 1024, "gflop": flops / 1e9})
            print(f"{name}: {seconds:.4f} s", flush=True)

        # a processor that others use too reaches its best rate now and then
        for name, rate in best_rates(sizes, cfg, device).items():
            rates[name] = max(rate, rates[name])

    if not rows:
        raise ValueError(f"cases={cfg.cases!r} is in the name of no case")
    rates = {name: rate / 1e9 for name, rate in rates.items()}
    limit = max(rates.values())
    listed = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    print(f"\n{about}; GFLOP/s: {listed}\n")
    print("|work|seconds|MiB|GFLOP|x limit|\n|---|--:|--:|--:|--:|")
    for row in rows:
        row["times_limit"] = row["seconds"] * limit / row["gflop"]
        print("|{case}|{seconds:.3g}|{mib:.0f}|{gflop:.0f}|{times_limit:.2f}|".format(**row))
    write_whole(cfg.out, json.dumps({"about": about, "gflops": rates, "cases": rows}, indent=1))


if __name__ == "__main__":
    run.launch(main)
