"""Stage 2: GRPO. The gaze model samples groups of gaze sequences and is pushed towards those that reconstruct better.

    python train_grpo.py config/toy_grpo.py                                          # 2 CPU cores, about two minutes
    python train_grpo.py config/grpo.py --init_from=out/ntp --root=data/mine         # one GPU
    torchrun --nproc_per_node=8 train_grpo.py config/grpo.py --init_from=out/ntp --root=a,b,c
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_grpo.py … # both nodes

Per step: G rollouts of each clip; reward of a reconstructed frame = minus its loss; advantage = reward minus the
group's mean. Strictly on-policy, so there is no ratio clipping, no reference model and no KL term, and the advantage is
divided neither by the group's spread nor by length (paper, section 3.4). Writes out_dir/{config.json,
model.safetensors}.
"""
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import model
from data import Clips, collate, to_model_pixels
from gazing import draw_ratio, last_slots, one_clip, parse_alpha, sheet, split_frames, split_ratio
from lib import configurator, run
from lib.checkpoint import keep_best, load_state, save_state, state_of
from lib.loader import Feed, StepSampler, make_loader, shard
from lib.log import Log, check_finite, count_parameters
from lib.optim import exponential, learning_rate, make_optimizer
from model import Gaze, GazeConfig
from videomae import check_fit, load_videomae


@dataclass
class Config:
    # data
    root: str = "data/toy"             # folders with train/ and val/, separated by commas
    videomae: str = "out/videomae"     # the reconstructor that gives the reward: folder or state-dict file
    loss_type: str = "l1"              # reconstruction loss: l1, dinov2_reg and siglip2, joined by +
    loss_weights: str = "1"            # of its terms (published: l1+dinov2_reg+siglip2 with 1+0.3+0.3)
    dinov2_reg: str | None = None      # folder or hub id of that network; none: in the videomae file, else published
    siglip2: str | None = None
    out_dir: str = "out/grpo"          # weights, metrics.jsonl, pictures
    n_frames: int = 16                 # clip length
    stride: int = 1                    # source frames per clip frame
    random_start: bool = False         # clips start anywhere in the video, not at its first frame
    crop: Literal["center", "random"] = "center"  # random: one random resized crop for all frames of a clip
    cache: bool = False                # keep all decoded clips in memory: for sets that fit
    n_workers: int = 4                 # decoding processes; 0: decode in the training process
    # model
    init_from: str = "out/ntp"         # folder or hub id of a gaze model | resume | scratch (then the sizes below)
    scales: str = "32+64+112+224"
    patch_size: int = 16
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 6
    intermediate_size: int = 384
    num_conv_blocks: int = 1
    num_multi_token_pred: int = 10
    initializer_range: float = 0.02
    # rollouts
    group_size: int = 12               # rollouts per clip (published)
    gazing_ratio: Literal["fixed", "uniform", "exponential"] = "fixed"  # average share of the patches of a clip
    ratio: float = 0.75                # fixed (published: a cap, with split = self)
    ratio_min: float = 0.02            # uniform and exponential
    ratio_max: float = 0.2
    ratio_rate: float = 10.0           # exponential
    split: Literal["uniform", "mean", "dirichlet", "self"] = "self"  # self: what one rollout needs (published)
    alpha: str = "10,3"                # mean and dirichlet; the last value is repeated
    stop_early: bool = False           # the requirement also ends frames of the group's rollouts, whatever the split
    requirement: Literal["fixed", "uniform"] = "uniform"  # loss to reach, for split = self and stop_early (published)
    task_loss_requirement: float = 0.7 # fixed
    requirement_min: float = 0.5       # uniform (published: 0.5 to 1)
    requirement_max: float = 1.0
    temperature: float = 1.0           # of sampling at the first step
    temperature_end: float = 1.0       # at the last; exponential in between (paper: 0.01)
    # GRPO
    policy: Literal["sampling", "reference"] = "reference"  # log π to train; reference: plain softmax (published)
    recon_sample_rate: float = 0.125   # share of the frames that give a reward, random each step (published: 2 of 16)
    gamma: float = 0.995               # discount per gaze between a patch and the end of the rewarded frame (published)
    task_loss_weight: float = 1.0      # of the loss-prediction error
    # optimisation
    epochs: float = 1.0                # passes over the training clips (published script; the paper says 3)
    steps: int | None = None           # optimizer steps, in place of epochs
    batch_size: int = 64               # clips per step over all processes (published script; the paper says 256)
    micro_batch: int = 2               # most clips at once in one process, group_size copies of each; 0: all its share
    reward_batch: int = 0              # most rollouts at once in the reconstructor, which bounds its memory; 0: all
    optimizer: Literal["adam", "sgd", "muon"] = "sgd"  # published: plain SGD without momentum
    lr: float = 5e-4                   # published
    lr_end: float = 0.0
    lr_schedule: Literal["linear", "linear_w_warmup", "constant"] = "linear_w_warmup"
    warmup: float = 0.1                # share of the steps
    # validation
    val_ratio: float = 0.1             # gazing ratio
    val_split: Literal["uniform", "dirichlet", "mean"] = "mean"  # dirichlet: one draw for all evaluations
    val_requirement: float | None = None  # stop a frame at this predicted loss (published: 0.7, with val_ratio 0.75)
    val_clips: int = 256               # clips of the validation set that are used
    val_every: int = 1000              # steps (published)
    # run
    save_every: int = 500              # steps (published)
    log_every: int = 10                # steps
    seed: int = 666                    # published
    device: str = "auto"               # auto | cpu | cuda
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # autocast; auto: float32 on a CPU, else bfloat16
    tf32: bool = True                  # on a GPU: what stays in float32 is multiplied in TF32 (10 bits of mantissa)
    compile: bool = False              # torch.compile for the training pass; never on a CPU
    wandb: str | None = None           # project to mirror metrics.jsonl to; none: off

    def check(self):
        if self.group_size < 2:
            raise ValueError("group_size must be at least 2: a rollout is compared with its group, "
                             "alone it teaches nothing")
        if int(self.recon_sample_rate * self.n_frames) < 1 or self.recon_sample_rate > 1:
            raise ValueError(f"recon_sample_rate={self.recon_sample_rate} of {self.n_frames} frames leaves none for "
                             f"the reward: use 1/{self.n_frames} to 1")
        if min(self.temperature, self.temperature_end) <= 0:
            raise ValueError("temperature must be above 0: a group of equal rollouts teaches nothing")
        configurator.check_at_least(
            self, n_frames=1, stride=1, n_workers=0, batch_size=1, micro_batch=0, steps=1, val_every=1, save_every=1,
            log_every=1, val_clips=1, seed=0, lr_end=0, task_loss_weight=0, reward_batch=0)
        configurator.check_above_zero(self, "lr", "epochs", "ratio_rate")
        configurator.check_share(self, "val_ratio", "ratio", "ratio_min", "ratio_max")
        configurator.check_fraction(self, "warmup")
        configurator.check_order(self, ("ratio_min", "ratio_max"), ("requirement_min", "requirement_max"))
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma} must lie between 0 and 1")
        configurator.check_wandb(self)
        parse_alpha(self.alpha, self.n_frames)
        if self.init_from == "scratch":
            self.model()

    def model(self):
        keys = GazeConfig.__dataclass_fields__.keys() & self.__dataclass_fields__.keys()
        keys -= {"gazing_ratio", "task_loss_requirement"}  # of rollouts here, of validation in the model's config
        return GazeConfig(**{k: getattr(self, k) for k in keys}, max_num_frames=self.n_frames)


def discounted_advantages(advantage, frames, gazing, gamma):
    """Advantage of every slot (rows, N) from that of every rewarded frame (rows, F).

    A frame's advantage goes to all real slots up to the end of that frame, times gamma ** (number of real slots in
    between), and to nothing later; several rewarded frames add up.
    """
    real = ~gazing["if_padded_gazing"]
    count = real.cumsum(1)  # real slots up to and including this one
    ends = gazing["num_gazing_each_frame"].cumsum(0).tolist()
    out = torch.zeros(real.shape, device=advantage.device)
    for a, f in zip(advantage.unbind(1), frames, strict=True):
        later = count[:, ends[f] - 1:ends[f]] - count[:, :ends[f]]
        out[:, :ends[f]] += a.unsqueeze(1) * gamma ** later * real[:, :ends[f]]
    return out


def grpo_loss(log_prob, advantage):
    """Per-clip sums over slots, then the mean over clips. exp(log π - detach) is 1: only its gradient matters."""
    return -(torch.exp(log_prob - log_prob.detach()) * advantage).sum(1).mean()


def roll_out(gaze, video, cfg, step, temperature):
    """G sampled gazes of every clip, copy-major. Draws of ratio and requirement are the same on all ranks."""
    T, V = cfg.n_frames, gaze.config.num_ids
    shared = run.shared_generator(cfg.seed, step)
    ratio = draw_ratio(cfg.gazing_ratio, cfg.ratio, cfg.ratio_min, cfg.ratio_max, cfg.ratio_rate, shared)
    need = None
    if cfg.split == "self" or cfg.stop_early:
        need = draw_ratio(
            cfg.requirement, cfg.task_loss_requirement, cfg.requirement_min, cfg.requirement_max, 0, shared)
    if cfg.split == "self":
        own = gaze.generate(video, gazing_ratio=ratio, task_loss_requirement=need, temperature=temperature)
        ratios = torch.stack([(~p).sum(1) for _, p in split_frames(own)], dim=1) / V  # (B, T)
        ratios = ratios.repeat(cfg.group_size, 1)
    else:
        ratios = split_ratio(cfg.split, ratio, T, cfg.alpha, shared)
    return gaze.generate(video, ratios, need if cfg.stop_early else None, temperature, num_copies=cfg.group_size)


@torch.no_grad()
def measure(mae, video, gazing, frames, most):
    """Loss (G·B, F) of every rollout's rewarded frames, at most `most` rollouts at once (0: all), whole copies of the
    batch; what the loss needs of the true frames is computed once per clip."""
    B, rows, target = len(video), len(gazing["gazing_pos"]), mae.loss.target(video[:, frames])
    n, losses = max(1, (most or rows) // B) * B, []
    for i in range(0, rows, n):
        part = {k: v if k == "num_gazing_each_frame" else v[i:i + n] for k, v in gazing.items() if k != "gazing_mask"}
        made = mae.reconstruct(video, part, frames)
        losses.append(mae.loss(made.unflatten(0, (-1, B)), target).flatten(0, 1))
    return torch.cat(losses).float()


@torch.no_grad()
def validate(gaze, mae, loader, ratios, requirement, device):
    """Greedy gazes of validation clips and what the reconstructor makes of them, over all ranks.

    ratios (T,) share of the patches that each frame may take. Returns ({val_loss: mean over clips and frames,
    val_ratio, val_predicted: the model's own estimate of the loss}, tensors for one picture); without a reconstructor
    no losses.
    """
    sums, picture = [0.0] * 4, None
    for batch in loader:
        video = to_model_pixels(batch["video"].to(device))
        gazing = gaze.generate(video, gazing_ratio=ratios, task_loss_requirement=requirement)
        real = ~gazing["if_padded_gazing"]
        recon = None
        if mae is not None:
            recon, loss = mae(video, gazing, range(video.shape[1]))
            predicted = gaze(video, gazing)[1].gather(1, last_slots(gazing))
            sums[0] += loss.mean(1).sum().item()
            sums[1] += predicted.mean(1).sum().item()
        sums[2] += real.sum().item() / (video.shape[1] * gaze.config.num_ids)
        sums[3] += len(video)
        if picture is None:
            picture = video[0], one_clip(gazing, 0), recon
    loss, predicted, ratio, count = run.all_sum(*sums)
    metrics = {"val_ratio": ratio / count}
    if mae is not None:
        metrics = {"val_loss": loss / count, "val_predicted": predicted / count} | metrics
    return metrics, picture


def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    rank, world, device = run.start(cfg)
    out = Path(cfg.out_dir)

    # ---- models
    start, best, resumed = 0, math.inf, None
    if cfg.init_from == "resume":
        resumed = load_state(out, cfg, world, {"n_frames"})
        start, best = resumed["step"], resumed["best"]
        gaze = Gaze.from_pretrained(out)
        gaze.load_state_dict(resumed["model"])
    elif cfg.init_from == "scratch":
        torch.manual_seed(cfg.seed)  # the same weights on all ranks
        gaze = Gaze(cfg.model())
    else:
        gaze = Gaze.from_pretrained(cfg.init_from)
    gaze.config.reference_decoding = False  # the policy that samples must be the one that is trained
    # what the result gazes at unless told otherwise is what it was validated at, also when it started from a folder
    gaze.config.gazing_ratio, gaze.config.task_loss_requirement = cfg.val_ratio, cfg.val_requirement
    gaze.to(device)
    mae = load_videomae(cfg, device)
    check_fit(mae, gaze, cfg.init_from)

    # ---- data
    R = gaze.config.image_size
    args = dict(n_frames=cfg.n_frames, size=R, stride=cfg.stride, cache=cfg.cache)
    train = Clips(cfg.root, "train", random_start=cfg.random_start, crop=cfg.crop, seed=cfg.seed, **args)
    val = Clips(cfg.root, "val", **args)
    run.check_same(training_clips=len(train), validation_clips=len(val))
    total = cfg.steps or math.ceil(cfg.epochs * len(train) / cfg.batch_size)
    sampler = StepSampler(len(train), cfg.batch_size, rank, world, cfg.micro_batch, cfg.seed, start, total)
    loader = Feed(make_loader(train, sampler, cfg.n_workers, collate))
    n_val = min(len(val), cfg.val_clips)
    val_loader = make_loader(val, shard(n_val, rank, world, 16), 0, collate)
    val_ratios = split_ratio(cfg.val_split, cfg.val_ratio, cfg.n_frames, cfg.alpha,
                                    run.shared_generator(cfg.seed, 0))

    # ---- optimizer
    optimizer = make_optimizer(cfg.optimizer, gaze, cfg.lr)
    ddp, sync, autocast, scaler, precision = run.prepare(gaze, optimizer, cfg, world, device, resumed)
    n_recon = int(cfg.recon_sample_rate * cfg.n_frames)
    log = Log(cfg, rank, world, device, [
        f"Gaze {model.describe(gaze.config)}; {count_parameters(gaze) / 1e6:.2f} M parameters; "
        f"reconstructor {count_parameters(mae) / 1e6:.2f} M, frozen",
        f"{sampler.arithmetic}, {cfg.group_size} rollouts each, {n_recon} rewarded frames; "
        f"{total} steps = {total * cfg.batch_size / len(train):.1f} epochs of {len(train)} clips",
        f"{len(train)} training clips, {n_val} for validation, each {cfg.n_frames} frames of 3 x {R} x {R} uint8"
        + (f"; resumed at step {start}" if resumed else ""), precision], start)

    # ---- loop
    unreadable, t0 = set(), time.time()
    for step in range(start, total + 1):
        stop = run.stopping()
        if (step % cfg.val_every == 0 or step == total) and not stop:
            metrics, picture = validate(gaze, mae, val_loader, val_ratios, cfg.val_requirement, device)
            log.write(step, total, step - start, **metrics)
            if rank == 0:
                sheet(out / "val.png", *picture[:2], gaze.config, reconstruction=picture[2][0],
                      title=f"GRPO, step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in metrics.items()))
            best = keep_best(gaze, out, metrics["val_loss"], best, rank)
        if (step % cfg.save_every == 0 or step == total or stop) and rank == 0:
            gaze.save_pretrained(out)
            save_state(out / "last.pt", state_of(step, gaze, optimizer, scaler, best, cfg, world))
        if step == total or stop:
            break
        run.seed_step(cfg.seed, step, rank, world)
        lr = learning_rate(cfg.lr_schedule, step, total, cfg.lr, cfg.lr_end, cfg.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        temperature = exponential(step, total, cfg.temperature, cfg.temperature_end)
        frames = torch.randperm(cfg.n_frames, generator=run.shared_generator(cfg.seed, step))
        frames = frames[:n_recon].sort().values.tolist()
        stats, per_scale, seconds, keys = torch.zeros(8), torch.zeros(len(gaze.config.ids_per_scale)), [0.0] * 3, []
        for i in range(sampler.n_micro):
            batch = next(loader)
            keys += batch["key"]
            unreadable.update(batch["unreadable"])
            video = to_model_pixels(batch["video"].to(device, non_blocking=True))
            B, share = len(video), len(video) / sampler.local
            clock = [run.now(device)]
            with autocast:
                gazing = roll_out(gaze, video, cfg, step, temperature)
            clock.append(run.now(device))
            with autocast:
                loss = measure(mae, video, gazing, frames, cfg.reward_batch)
            clock.append(run.now(device))
            reward = -loss.view(cfg.group_size, B, n_recon)
            advantage = discounted_advantages((reward - reward.mean(0)).flatten(0, 1), frames, gazing, cfg.gamma)
            with sync(last=i == sampler.n_micro - 1):
                with autocast:
                    log_prob, task_loss = ddp(video, gazing, cfg.policy, temperature)
                predicted = task_loss.gather(1, last_slots(gazing)[:, frames])
                error = ((predicted - loss) ** 2).mean()  # every rewarded frame has a last real slot
                scaler.scale((grpo_loss(log_prob, advantage) + cfg.task_loss_weight * error) * share).backward()
            clock.append(run.now(device))
            seconds = [s + b - a for s, a, b in zip(seconds, clock, clock[1:], strict=False)]
            real, spread = ~gazing["if_padded_gazing"], reward.std(0)
            stats += share * torch.tensor([
                reward.mean(), spread.mean(), (spread < 1e-6).float().mean(), -log_prob.detach().sum() / real.sum(),
                real.sum() / (len(real) * cfg.n_frames), predicted.detach().mean(), loss.mean(), error.detach()])
            per_scale += share * torch.stack([m.sum().cpu() for m in gazing["gazing_mask"]]) / real.sum().cpu()
        check_finite(stats.sum().item(), step, keys)
        run.update(optimizer, scaler)
        if (step + 1) % cfg.log_every == 0:
            means = run.all_sum(*(x / world for x in [*stats.tolist(), *per_scale.tolist()]))
            # entropy: mean -log π of the sampled patches, exact only if they are drawn from π (policy=sampling)
            names = ("reward", "reward_spread", "no_spread", "entropy", "gazes_per_frame", "predicted",
                     "measured", "task_error")
            log.write(step + 1, total, step + 1 - start, **dict(zip(names, means, strict=False)),
                      per_scale=[round(x, 3) for x in means[len(names):]], temperature=temperature, lr=lr,
                      rollout_s=seconds[0], reward_s=seconds[1], update_s=seconds[2],
                      ms_per_step=(time.time() - t0) * 1000 / cfg.log_every,
                      data_ms=loader.waited_ms(cfg.log_every), unreadable=run.count_distinct(unreadable))
            t0 = time.time()
    run.finish()


if __name__ == "__main__":
    main()
