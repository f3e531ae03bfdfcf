"""How long everything takes, how much memory, and how far that is from what the hardware could do.

    python bench.py                                                      # CPU, one thread, published sizes: long
    python bench.py --cases="generate 1 clip,generate 4 clips,NTP"       # only cases that contain one of these texts
    python bench.py --cases=reward,GRPO --dtype=bfloat16 --threads=2
    python bench.py --device=cuda --dtype=bfloat16 --compile=true --encoder_sides=224,448,896 --out=out/bench_gpu.json

Prints a table and writes it to --out. Weights are random: time does not depend on them, gazes are what they are.

`x limit` is the time divided by the least it could take: the arithmetic of the work, counted from the sizes (every
layer for every token, causal attention half, a backward pass as two forward ones), divided by the rate of a large
matrix product, PyTorch's own `a @ a`, measured in the same type before and after each case. Leaving out work can bring
it below 1, and so does linear.py, where it multiplies faster; its rate is in the heading.
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
from typing import Literal

import numpy as np
import torch
import torch.nn as nn

import flops
import make_data
import train_grpo
from data import read_frames, resize_crop, to_model_pixels
from gazing import random_gazing, split_frames, to_budgets
from label import greedy
from lib import configurator, run
from lib.cpu import linear, quicken
from lib.log import git_commit, peak_memory
from model import Gaze, GazeConfig
from siglip import GazeSigLIP
from train_ntp import ntp_loss
from videomae import ReconstructionLoss, VideoMAE, VideoMAEConfig


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
    reward_frames: str = "2,16"        # frames to reconstruct
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
    return run.now(device)


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


def matmul_rate(cfg, device, product=torch.matmul):
    """Floating-point operations per second of a large matrix product."""
    n = cfg.matmul or (8192 if device.type == "cuda" else 1024)
    a = torch.randn(n, n, device=device, dtype=getattr(torch, cfg.dtype))
    return 2 * n ** 3 / best_time(lambda: product(a, a), device, 10, 1.0)[0]


def reset_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory starts anew


def peak_mib(device):
    status = Path("/proc/self/status")
    if device.type == "cuda" or not status.exists():  # elsewhere: the peak since the process began
        return peak_memory(device) * 1024
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024


def measure(name, case, setup):
    """One row of the table. A case returns (run, work, more): work(result) counts operations, or none; more(seconds,
    result) adds figures."""
    cfg, device, (function, *args) = setup.cfg, setup.device, case
    torch.manual_seed(cfg.seed)  # the same work whichever cases run
    run, work, more = function(setup, *args)
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


class Setup:
    """What the cases share."""

    def __init__(self, cfg, device):
        self.cfg, self.device, self.c = cfg, device, cfg.gaze()
        self.T, self.R, self.ratio = cfg.n_frames, self.c.image_size, float(cfg.ratios.split(",")[0])
        self.n = to_budgets([self.ratio] * self.T, self.c.num_ids)  # gazes per frame of everything but generate
        self.compiled = cfg.compile and device.type != "cpu"
        torch.manual_seed(cfg.seed)
        self.gaze = Gaze(self.c).to(device)
        if self.compiled:
            self.gaze.compile()
            self.gaze.encoder.compile()

    @functools.cached_property  # 1.3 GB: made when the first case asks for it
    def mae(self):
        mae = VideoMAE(self.cfg.mae()).to(self.device).freeze()
        if self.compiled:
            for layer in (*mae.vit.encoder.layer, *mae.decoder.decoder_layers):
                layer.compile()
        return mae

    def clips(self, B, side=None):
        return torch.randn(B, self.T, 3, side or self.R, side or self.R, device=self.device)

    def random_gazes(self, B):
        gazing = random_gazing(self.n, B, self.c.num_ids)
        return {k: v if k == "num_gazing_each_frame" else v.to(self.device) for k, v in gazing.items()}

    def usual_frames(self, count):
        """Where `count` frames drawn at random lie on average: the time depends on the last of them."""
        return [round((i + 1) * (self.T + 1) / (count + 1)) - 1 for i in range(count)]


def nothing_more(seconds, result):
    return {}


def generate(s, B, ratio, requirement=None):
    def work(gazing):  # what each clip took
        counts = torch.stack([(~padded).sum(1) for _, padded in split_frames(gazing)], dim=1).tolist()
        return sum(flops.gaze(s.c, row) for row in counts)

    def more(seconds, gazing):
        return {"clips_per_s": B / seconds,
                "gazes_per_frame": (~gazing["if_padded_gazing"]).sum().item() / (B * s.T)}
    video = s.clips(B)
    return lambda: s.gaze.generate(video, ratio, requirement), work, more


def stream(s):
    video, best = s.clips(1)[0], [math.inf] * s.T

    def run():
        state = s.gaze.stream(1, s.ratio)
        for t in range(s.T):
            start = clock(s.device)
            state.step(video[t:t + 1])
            best[t] = min(best[t], clock(s.device) - start)

    def more(seconds, result):
        return {"first_ms": best[0] * 1000, "last_ms": best[-1] * 1000, "slowest_ms": max(best) * 1000}
    return run, lambda result: flops.gaze(s.c, s.n), more


def ntp(s, at_once):
    B = s.cfg.ntp_clips
    video, gazing = s.clips(B), s.random_gazes(B)
    gazing["task_losses"] = torch.rand(gazing["gazing_pos"].shape, device=s.device)

    def run():
        s.gaze.zero_grad(set_to_none=True)
        for i in range(0, B, at_once):  # micro-batches, as train_ntp.py --micro_batch has them
            part = {k: v if k == "num_gazing_each_frame" else v[i:i + at_once] for k, v in gazing.items()}
            nll, error = ntp_loss(*s.gaze(video[i:i + at_once], part), part, B * sum(s.n))
            (nll + error).backward()
    return run, lambda result: 3 * B * flops.gaze(s.c, s.n), nothing_more


def reward(s, n_frames):
    mae, video, gazing = s.mae, s.clips(1), s.random_gazes(1)
    frames = s.usual_frames(n_frames)

    def run():
        with torch.no_grad():
            return mae(video, gazing, frames)[1]
    return run, lambda result: flops.mae(mae.config, s.n, frames), lambda *_: {"frames": frames}


def label_search(s):
    mae, video = s.mae, s.clips(1)[0, :s.cfg.label_frames]
    ours, naive, candidates = flops.search(mae.config, s.cfg.label_frames, s.cfg.label_slots)
    return (lambda: greedy(mae, video, [s.cfg.label_slots] * s.cfg.label_frames), lambda result: ours,
            lambda seconds, result: {"candidates_per_s": candidates / seconds, "naive_gflop": naive / 1e9})


def grpo(s, part):
    G, B, mae = s.cfg.group_size, s.cfg.grpo_clips, s.mae
    settings = train_grpo.Config(init_from="scratch", n_frames=s.T, group_size=G, split="uniform", ratio=s.ratio)
    frames = s.usual_frames(max(1, s.T // 8))
    video, gazing, loss = s.clips(B), s.random_gazes(B * G), perceptual_loss(s.cfg).to(s.device)
    decoder, encoder = B * G * flops.gaze_decoder(s.c, s.n), B * flops.gaze_encoder(s.c, s.T)

    def run_reward(copies=1):  # copies = G: as if every rollout were a clip of its own
        old, mae.loss = mae.loss, loss
        train_grpo.measure(mae, video.repeat(copies, 1, 1, 1, 1), gazing, frames, 0)
        mae.loss = old

    def run_update():
        s.gaze.zero_grad(set_to_none=True)
        log_prob, task_loss = s.gaze(video, gazing, settings.policy, 1.0)
        (train_grpo.grpo_loss(log_prob, torch.ones_like(log_prob)) + task_loss.mean()).backward()
    painted = flops.mae(mae.config, s.n, frames)  # one rollout
    judged = len(frames) * flops.perceptual(s.cfg.vit(), s.R, s.c.patch_size)  # its frames, or those of one target
    run, work = {
        "rollout": (lambda: train_grpo.roll_out(s.gaze, video, settings, 0, 1.0), encoder + decoder),
        "reward": (run_reward, B * (G * painted + (G + 1) * judged)),
        "reward unshared": (lambda: run_reward(G), B * G * (painted + 2 * judged)),
        "update": (run_update, 3 * (encoder + decoder))}[part]
    return run, lambda result: work, nothing_more


def encode(s, side, gazed):
    """SigLIP on every patch of the finest scale, frame by frame, as it comes; or vit.py on the gazed patches of all
    scales, one block-causal sequence, whose choice is part of the time."""
    p, k = s.c.patch_size, side // s.R
    network, video, tiles, per_frame = siglip(s.cfg, side).to(s.device), s.clips(1, side), k * k, (side // p) ** 2
    sides = [scale * k for scale in s.c.scale_list]
    vit = GazeSigLIP(network, sides)

    def choose():
        if k == 1:
            return s.gaze.generate(video, s.ratio)
        return s.gaze.generate(video, s.ratio, target_scales=sides, target_patch_size=p)

    def run():
        with torch.no_grad():
            return vit(video, choose()) if gazed else network(video[0]).last_hidden_state

    many = [m * tiles for m in s.n]
    if gazed:
        work = tiles * flops.gaze(s.c, s.n) + flops.vit(s.cfg.vit(), sum(many), flops.block_pairs(many), p)
    else:
        work = flops.vit(s.cfg.vit(), s.T * per_frame, s.T * per_frame ** 2, p)
    return run, lambda result: work, nothing_more


def decode(s):
    folder = tempfile.TemporaryDirectory()
    path = Path(s.cfg.video or f"{folder.name}/clip.mp4")
    if not s.cfg.video:
        toy = make_data.ToyConfig(n_frames=s.T, height=s.cfg.video_side, width=s.cfg.video_side)
        make_data.write_video(path, make_data.render_clip(np.random.default_rng(s.cfg.seed), toy))

    def run(folder=folder):  # which lives as long as this function
        return to_model_pixels(resize_crop(read_frames(path, s.T), s.R))
    return run, None, nothing_more


def cases(cfg):
    """{name: (function, its arguments)}"""
    out = {}  # names without commas, which separate them in --cases
    for B in ints(cfg.clips):
        clips = "1 clip" if B == 1 else f"{B} clips"
        for r in map(float, cfg.ratios.split(",")):
            out[f"generate {clips} at ratio {r:g}"] = (generate, B, r)
        out[f"generate {clips} with early stop"] = (generate, B, 0.75, cfg.requirement)
    out["stream 1 clip"] = (stream,)
    out[f"NTP forward and backward of {cfg.ntp_clips} clips"] = (ntp, cfg.ntp_clips)
    out[f"NTP forward and backward of {cfg.ntp_clips} clips, one at a time"] = (ntp, 1)
    for side in ints(cfg.encoder_sides):
        out[f"encoder at {side} px on all patches"] = (encode, side, False)
        out[f"encoder at {side} px on gazes, choosing them included"] = (encode, side, True)
    out["decoding a video"] = (decode,)
    for frames in ints(cfg.reward_frames):
        out[f"reward of {frames} frames"] = (reward, frames)
    for part in ("rollout", "reward", "reward unshared", "update"):
        out[f"GRPO {part} for {cfg.grpo_clips} x {cfg.group_size}"] = (grpo, part)
    out[f"label search of {cfg.label_frames} frames x {cfg.label_slots}"] = (label_search,)
    return out


def siglip(cfg, side):
    from transformers import SiglipVisionConfig, SiglipVisionModel
    return SiglipVisionModel(SiglipVisionConfig(
        **cfg.vit(), image_size=side, patch_size=cfg.patch_size, vision_use_head=False)).eval()


def perceptual_loss(cfg):
    """The published loss with random networks."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    sizes = cfg.vit()
    sizes["mlp_ratio"] = sizes.pop("intermediate_size") // sizes["hidden_size"]
    dino = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, image_size=518, patch_size=14))
    loss = ReconstructionLoss()
    loss.terms, loss.weights = ["l1", "dinov2_reg", "siglip2"], [1.0, 0.3, 0.3]
    network = siglip(cfg, cfg.gaze().image_size)
    loss.networks = nn.ModuleDict({"dinov2_reg": dino, "siglip2": getattr(network, "vision_model", network)})
    return quicken(loss).eval().requires_grad_(False)


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
    _, _, device = run.init_processes(cfg.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.tf32
    if device.type == "cpu" and cfg.compile:
        print("compile: never on a CPU")
    wanted = [text.strip().lower() for text in cfg.cases.split(",")]
    known = cases(cfg)
    todo = {name: case for name, case in known.items() if any(text in name.lower() for text in wanted)}
    if not todo:
        raise ValueError(f"cases={cfg.cases!r} fits none of: " + "; ".join(known))
    one = device.type == "cpu" and cfg.threads == 1
    about = {"command": " ".join(sys.argv), "commit": git_commit(),
             "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "python": platform.python_version(),
             "torch": torch.__version__, "processor": processor(), "dtype": cfg.dtype, "seed": cfg.seed,
             "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "threads": cfg.threads,
             "clock": "processor time" if one else "wall time",
             "linear.py": f"{matmul_rate(cfg, device, linear) / 1e9:.0f} GFLOP/s"}
    print("\n".join(f"{k}: {v}" for k, v in about.items()))
    print(f"{'case':<52}{'seconds':>10}{'runs':>5}{'peak MiB':>10}{'GFLOP':>10}{'GFLOP/s':>10}{'x limit':>9}")
    rows, setup = [], Setup(cfg, device)
    for name, case in todo.items():
        rows.append(measure(name, case, setup))
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
