"""How long everything takes, how much memory, and how far that is from what the hardware could do.

    python bench.py                                                      # CPU, one thread, published sizes: an hour
    python bench.py --cases="generate 1 clip,generate 4 clips,NTP"       # only cases that contain one of these texts
    python bench.py --cases=reward,GRPO --dtype=bfloat16 --threads=2
    python bench.py --device=cuda --dtype=bfloat16 --compile=true --encoder_sides=224,448,896 --out=out/bench_gpu.json

Prints a table and writes it to --out. Weights are random: time does not depend on them, gazes are what they are.

`x limit` is the time divided by the least it could take: the arithmetic of the work, counted from the sizes (every
layer for every token, causal attention half, a backward pass as two forward ones), divided by the rate of a large
matrix product, measured in the same type before and after each case. Leaving out work can bring it below 1.
Seconds: best of several. One thread on a CPU: processor time, which other processes on the machine disturb least; else
time on the wall. Memory: peak of the whole process (CPU; runtime and weights included) or of the device's tensors.
"""
import functools
import json
import math
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import configurator
import flops
import make_data
import train_grpo
from data import normalize, read_frames, resize_crop
from label import greedy
from model import Gaze, GazeConfig, split_frames
from train_ntp import ntp_loss
from videomae import Embeddings, ReconstructionLoss, VideoMAE, VideoMAEConfig


@dataclass
class Config:
    cases: str = ""                    # run cases whose name contains one of these texts, separated by commas; "": all
    out: str = "out/bench.json"
    device: str = "auto"               # auto | cpu | cuda
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of autocast and of the matrix product
    tf32: bool = False                 # on a GPU: multiply float32 in TF32 (the matrix product too)
    compile: bool = False              # torch.compile for training passes and the gaze encoder; never on a CPU
    threads: int = 1                   # on a CPU
    repeats: int = 5                   # best of so many
    max_seconds: float = 20.0          # no further repetition of a case begins after this time
    matmul: int = 0                    # side of the matrix product; 0: 1024 on a CPU, 8192 on a GPU
    seed: int = 666
    # work
    n_frames: int = 16                 # clip length
    clips: str = "1,4,16,64"           # batches of generate
    ratios: str = "0.1,0.75"           # gazing ratios of generate; everything else takes the first
    requirement: float = -0.4          # of early stopping; with random weights it ends a frame after about 12 gazes
    ntp_clips: int = 4
    grpo_clips: int = 1
    group_size: int = 12
    reward_frames: str = "2,16"        # frames to reconstruct, spread at random
    label_frames: int = 1              # label search: frames and slots per frame
    label_slots: int = 1
    encoder_sides: str = "224"         # of the video that the encoder sees, multiples of the gaze model's
    video: str | None = None           # file to decode; none: one is made
    video_side: int = 448              # of that one
    # gaze model (published)
    scales: str = "32+64+112+224"
    patch_size: int = 16
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 6
    intermediate_size: int = 384
    num_multi_token_pred: int = 10
    # reconstructor (published: ViT-L, 330 M parameters)
    mae_hidden_size: int = 1024
    mae_num_hidden_layers: int = 24
    mae_num_attention_heads: int = 16
    mae_intermediate_size: int = 4096
    mae_decoder_hidden_size: int = 512
    mae_decoder_num_hidden_layers: int = 8
    mae_decoder_num_attention_heads: int = 16
    mae_decoder_intermediate_size: int = 2048
    # video encoder and the perceptual networks of GRPO's loss (SigLIP base, DINOv2 base)
    vit_hidden_size: int = 768
    vit_num_hidden_layers: int = 12
    vit_num_attention_heads: int = 12
    vit_intermediate_size: int = 3072

    def check(self):
        for key in ("clips", "reward_frames", "encoder_sides"):
            if not all(n.strip().isdigit() and int(n) > 0 for n in getattr(self, key).split(",")):
                raise ValueError(f"{key}={getattr(self, key)!r} must be whole numbers, separated by commas")
        if max(ints(self.reward_frames)) > self.n_frames:
            raise ValueError(f"reward_frames={self.reward_frames!r} asks for more frames than n_frames={self.n_frames}")
        if any(s % self.gaze().image_size for s in ints(self.encoder_sides)):
            raise ValueError(f"encoder_sides={self.encoder_sides!r} must be multiples of {self.gaze().image_size}, "
                             "the gaze model's input")

    def gaze(self):
        keys = GazeConfig.__dataclass_fields__.keys() & self.__dataclass_fields__.keys()
        return GazeConfig(**{k: getattr(self, k) for k in keys}, max_num_frames=self.n_frames)

    def mae(self):
        sizes = {k.removeprefix("mae_"): v for k, v in asdict(self).items() if k.startswith("mae_")}
        return VideoMAEConfig(self.scales, image_size=self.gaze().image_size, patch_size=self.patch_size, **sizes)

    def vit(self):
        return {k.removeprefix("vit_"): v for k, v in asdict(self).items() if k.startswith("vit_")}


def ints(text):
    return [int(n) for n in text.split(",")]


# ----------------------------------------------------------------------------------------------------------------------
# measuring


def clock(device):
    """Seconds: processor time with one thread on a CPU, else time on the wall when the device has finished."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time()
    return common.now(device)


def best_time(run, device, repeats, max_seconds):
    """(fewest seconds, what the last run returned, number of runs)"""
    if device.type == "cuda":
        run()  # kernels get chosen and compiled
    seconds, t0 = [], time.time()
    while not seconds or (len(seconds) < repeats and time.time() - t0 < max_seconds):
        start = clock(device)
        result = run()
        seconds.append(clock(device) - start)
    return min(seconds), result, len(seconds)


def matmul_rate(cfg, device):
    """Floating-point operations per second of a large matrix product."""
    n = cfg.matmul or (8192 if device.type == "cuda" else 1024)
    a = torch.randn(n, n, device=device, dtype=getattr(torch, cfg.dtype))
    return 2 * n ** 3 / best_time(lambda: a @ a, device, 10, 1.0)[0]


def reset_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory starts anew


def peak_mib(device):
    status = Path("/proc/self/status")
    if device.type == "cuda" or not status.exists():  # elsewhere: the peak since the process began
        return common.peak_memory(device) * 1024
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024


def measure(name, case, cfg, device):
    """One row of the table. case() -> (run, work, more): work(result) counts operations, or none; more(seconds, result)
    adds figures."""
    run, work, more = case()
    rate = matmul_rate(cfg, device)
    reset_peak(device)
    with torch.autocast(device.type, getattr(torch, cfg.dtype), cfg.dtype != "float32"):
        seconds, result, runs = best_time(run, device, cfg.repeats, cfg.max_seconds)
    row = {"case": name, "seconds": seconds, "runs": runs, "peak_mib": peak_mib(device), "gflop": None, "times": None}
    row["matmul_gflops"] = max(rate, matmul_rate(cfg, device)) / 1e9
    if work:
        row["gflop"] = work(result) / 1e9
        row["times"] = seconds * row["matmul_gflops"] / row["gflop"]
    return row | more(seconds, result)


# ----------------------------------------------------------------------------------------------------------------------
# cases: each sets up its work and returns (run, work, more) for measure()


def nothing_more(seconds, result):
    return {}


def cases(cfg, device):
    """{name: case}"""
    c, T, V, R = cfg.gaze(), cfg.n_frames, cfg.gaze().num_ids, cfg.gaze().image_size
    ratio = float(cfg.ratios.split(",")[0])
    compiled = cfg.compile and device.type != "cpu"
    n = common.to_budgets([ratio] * T, V)  # gazes per frame of everything but generate
    torch.manual_seed(cfg.seed)
    gaze = Gaze(c).to(device)
    if compiled:
        gaze.compile()
        gaze.encoder.compile()

    @functools.cache  # 1.3 GB: made when the first case asks for it
    def reconstructor():
        mae = VideoMAE(cfg.mae()).to(device).freeze()
        if compiled:
            for layer in (*mae.vit.encoder.layer, *mae.decoder.decoder_layers):
                layer.compile()
        return mae

    def clips(B, side=R):
        return torch.randn(B, T, 3, side, side, device=device)

    def random_gazes(B):
        return {k: v.to(device) if k != "num_gazing_each_frame" else v for k, v in
                common.random_gazing(n, B, V).items()}

    def generate(B, ratio, requirement=None):
        def work(gazing):  # what each clip took
            counts = torch.stack([(~padded).sum(1) for _, padded in split_frames(gazing)], dim=1).tolist()
            return sum(flops.gaze(c, row) for row in counts)

        def more(seconds, gazing):
            return {"clips_per_s": B / seconds,
                    "gazes_per_frame": (~gazing["if_padded_gazing"]).sum().item() / (B * T)}
        video = clips(B)
        return lambda: gaze.generate(video, ratio, requirement), work, more

    def stream():
        video, best = clips(1)[0], [math.inf] * T

        def run():
            state = gaze.stream(1, ratio)
            for t in range(T):
                start = clock(device)
                state.step(video[t:t + 1])
                best[t] = min(best[t], clock(device) - start)

        def more(seconds, result):
            return {"first_ms": best[0] * 1000, "last_ms": best[-1] * 1000, "slowest_ms": max(best) * 1000}
        return run, lambda result: flops.gaze(c, n), more

    def ntp():
        B = cfg.ntp_clips
        video, gazing = clips(B), random_gazes(B)
        gazing["task_losses"] = torch.rand(gazing["gazing_pos"].shape, device=device)

        def run():
            gaze.zero_grad(set_to_none=True)
            nll, error = ntp_loss(*gaze(video, gazing), gazing, B * sum(n))
            (nll + error).backward()
        return run, lambda result: 3 * B * flops.gaze(c, n), nothing_more

    def reward(n_frames):
        mae, video, gazing = reconstructor(), clips(1), random_gazes(1)
        frames = sorted(np.random.default_rng(cfg.seed).choice(T, n_frames, replace=False).tolist())

        def run():
            with torch.no_grad():
                return mae(video, gazing, frames)[1]
        return run, lambda result: flops.mae(mae.config, n, frames), lambda *_: {"frames": frames}

    def label_search():
        mae, video = reconstructor(), clips(1)[0, :cfg.label_frames]
        ours, naive, candidates = flops.search(mae.config, cfg.label_frames, cfg.label_slots)
        return (lambda: greedy(mae, video, [cfg.label_slots] * cfg.label_frames), lambda result: ours,
                lambda seconds, result: {"candidates_per_s": candidates / seconds, "naive_gflop": naive / 1e9})

    def grpo(part):
        G, B, mae = cfg.group_size, cfg.grpo_clips, reconstructor()
        settings = train_grpo.Config(init_from="scratch", n_frames=T, group_size=G, split="uniform", ratio=ratio)
        frames = sorted(np.random.default_rng(cfg.seed).choice(T, max(1, T // 8), replace=False).tolist())
        video, gazing, loss = clips(B), random_gazes(B * G), perceptual_loss(cfg).to(device)
        decoder, encoder = B * G * flops.gaze_decoder(c, n), B * flops.gaze_encoder(c, T)

        def run_reward(copies=1):  # copies = G: as if every rollout were a clip of its own
            old, mae.loss = mae.loss, loss
            train_grpo.measure(mae, video.repeat(copies, 1, 1, 1, 1), gazing, frames, 0)
            mae.loss = old

        def run_update():
            gaze.zero_grad(set_to_none=True)
            log_prob, task_loss = gaze(video, gazing, settings.policy, 1.0)
            (train_grpo.grpo_loss(log_prob, torch.ones_like(log_prob)) + task_loss.mean()).backward()
        painted = flops.mae(mae.config, n, frames)  # one rollout
        judged = len(frames) * flops.perceptual(cfg.vit(), R, c.patch_size)  # its frames, or those of one target
        run, work = {
            "rollout": (lambda: train_grpo.roll_out(gaze, video, settings, 0, 1.0), encoder + decoder),
            "reward": (run_reward, B * (G * painted + (G + 1) * judged)),
            "reward unshared": (lambda: run_reward(G), B * G * (painted + 2 * judged)),
            "update": (run_update, 3 * (encoder + decoder))}[part]
        return run, lambda result: work, nothing_more

    def encode(side, gazed):
        """The video encoder on every patch of the finest scale, frame by frame, as it comes; or, as one block-causal
        sequence, on the gazed patches of all scales, whose choice is part of the time."""
        vit, video, p, k = vision_transformer(cfg, side).to(device), clips(1, side), cfg.patch_size, side // R
        per_frame, tiles = (side // p) ** 2, k * k
        sides = [s * k for s in c.scale_list]
        positions = torch.randn(V * tiles, cfg.vit_hidden_size, device=device)
        weight = vit.embeddings.patch_embedding.weight.flatten(1)
        cut = SimpleNamespace(c=VideoMAEConfig("+".join(map(str, sides)), image_size=side, patch_size=p))

        @torch.no_grad()
        def run():
            if not gazed:
                return through(vit, vit.embeddings(video[0]), None)
            gazing = gaze.generate(video, ratio) if k == 1 else gaze.generate(
                video, ratio, target_scales=sides, target_patch_size=p)
            ids, counts = gazing["gazing_pos"], gazing["num_gazing_each_frame"].tolist()
            patches = Embeddings.patches(cut, video)[0, ids[0]]
            x = (F.linear(patches, weight) + positions[ids[0] % (V * tiles)]).unsqueeze(0)
            frame = torch.repeat_interleave(torch.arange(T), torch.tensor(counts)).to(device)
            seen = frame.unsqueeze(1) >= frame
            mask = torch.zeros(seen.shape, device=device, dtype=x.dtype).masked_fill(~seen, float("-inf"))
            return through(vit, x, mask[None, None])

        many = [m * tiles for m in n]
        work = (tiles * flops.gaze(c, n) + flops.vit(cfg.vit(), sum(many), flops.block_pairs(many), p) if gazed
                 else flops.vit(cfg.vit(), T * per_frame, T * per_frame ** 2, p))
        return run, lambda result: work, nothing_more

    def decode():
        folder = tempfile.TemporaryDirectory()
        path = Path(cfg.video or f"{folder.name}/clip.mp4")
        if not cfg.video:
            toy = make_data.ToyConfig(n_frames=T, height=cfg.video_side, width=cfg.video_side)
            make_data.write_video(path, make_data.render_clip(np.random.default_rng(cfg.seed), toy))

        def run(folder=folder):  # which lives as long as this function
            return normalize(resize_crop(read_frames(path, T), R))
        return run, None, nothing_more

    out = {}  # names without commas, which separate them in --cases
    for B in ints(cfg.clips):
        for r in map(float, cfg.ratios.split(",")):
            out[f"generate {B} clip{'s' * (B > 1)} at ratio {r:g}"] = functools.partial(generate, B, r)
        out[f"generate {B} clip{'s' * (B > 1)} with early stop"] = functools.partial(generate, B, 0.75, cfg.requirement)
    out["stream 1 clip"] = stream
    out[f"NTP forward and backward of {cfg.ntp_clips} clips"] = ntp
    for side in ints(cfg.encoder_sides):
        out[f"encoder at {side} px on all patches"] = functools.partial(encode, side, False)
        out[f"encoder at {side} px on gazes, choosing them included"] = functools.partial(encode, side, True)
    out["decoding a video"] = decode
    for frames in ints(cfg.reward_frames):
        out[f"reward of {frames} frames"] = functools.partial(reward, frames)
    for part in ("rollout", "reward", "reward unshared", "update"):
        out[f"GRPO {part} for {cfg.grpo_clips} x {cfg.group_size}"] = functools.partial(grpo, part)
    out[f"label search of {cfg.label_frames} frames x {cfg.label_slots}"] = label_search
    return out


def vision_transformer(cfg, side):
    from transformers import SiglipVisionConfig, SiglipVisionModel
    vit = SiglipVisionModel(SiglipVisionConfig(**cfg.vit(), image_size=side, patch_size=cfg.patch_size)).eval()
    return getattr(vit, "vision_model", vit)  # transformers 4 wraps it once more


def through(vit, x, mask):
    for layer in vit.encoder.layers:
        x = layer(x, mask)
        x = x[0] if isinstance(x, tuple) else x  # transformers 4
    return vit.post_layernorm(x)


def perceptual_loss(cfg):
    """The published loss with random networks."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    sizes = cfg.vit()
    sizes["mlp_ratio"] = sizes.pop("intermediate_size") // sizes["hidden_size"]
    dino = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, image_size=518, patch_size=14))
    loss = ReconstructionLoss()
    loss.terms, loss.weights = ["l1", "dinov2_reg", "siglip2"], [1.0, 0.3, 0.3]
    siglip = vision_transformer(cfg, cfg.gaze().image_size)
    loss.networks = nn.ModuleDict({"dinov2_reg": dino, "siglip2": siglip})
    return loss.eval().requires_grad_(False)


def line(row):
    def number(key, digits):
        return "-" if row[key] is None else f"{row[key]:.{digits}f}"
    known = ("case", "seconds", "runs", "peak_mib", "gflop", "times", "matmul_gflops")
    rest = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k not in known)
    return (f"{row['case']:<52}{number('seconds', 4):>10}{row['runs']:>5}{number('peak_mib', 0):>10}"
            f"{number('gflop', 1):>10}{number('matmul_gflops', 0):>10}{number('times', 2):>9}  {rest}")


def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    torch.set_num_threads(cfg.threads)
    _, _, device = common.init_processes(cfg.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.tf32
    if device.type == "cpu" and cfg.compile:
        print("compile: never on a CPU")
    wanted = [text.strip().lower() for text in cfg.cases.split(",")]
    todo = {name: case for name, case in cases(cfg, device).items() if any(text in name.lower() for text in wanted)}
    if not todo:
        raise ValueError(f"cases={cfg.cases!r} fits none of: " + "; ".join(cases(cfg, device)))
    one = device.type == "cpu" and cfg.threads == 1
    about = {"command": " ".join(sys.argv), "commit": common.git_commit(),
             "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "python": platform.python_version(),
             "torch": torch.__version__, "processor": processor(), "dtype": cfg.dtype, "seed": cfg.seed,
             "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "threads": cfg.threads,
             "clock": "processor time" if one else "wall time"}
    print("\n".join(f"{k}: {v}" for k, v in about.items()))
    print(f"{'case':<52}{'seconds':>10}{'runs':>5}{'peak MiB':>10}{'GFLOP':>10}{'GFLOP/s':>10}{'x limit':>9}")
    rows = []
    for name, case in todo.items():
        rows.append(measure(name, case, cfg, device))
        print(line(rows[-1]), flush=True)
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        Path(cfg.out).write_text(json.dumps({"about": about, "config": asdict(cfg), "cases": rows}, indent=1) + "\n")


def processor():
    file = Path("/proc/cpuinfo")
    names = [x.split(":")[1].strip() for x in file.read_text().splitlines() if x.startswith("model name")] \
        if file.exists() else []
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
