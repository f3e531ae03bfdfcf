"""Stage 2: GRPO. The gaze model samples groups of gaze sequences and is pushed towards those that reconstruct better.

    python train_grpo.py config/toy_grpo.py                                          # 2 CPU cores, about two minutes
    python train_grpo.py config/grpo.py --init_from=out/ntp --root=data/mine         # one GPU
    torchrun --nproc_per_node=8 train_grpo.py config/grpo.py --init_from=out/ntp --root=a,b,c
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_grpo.py … # both nodes

Per step: G rollouts of each clip; reward of a reconstructed frame = minus its loss; advantage = reward minus the
group's mean. Strictly on-policy, so there is no ratio clipping, no reference model and no KL term, and the advantage is
divided neither by the group's spread nor by length (paper, section 3.4). Writes out_dir/{config.json,
model.safetensors}, and the same in out_dir/best for the model with the highest validation reward.

Your own reward: replace reward(), and in main() what it needs. Both places are marked FORK.

Dimension key: B clips, G rollouts of each, T frames, F rewarded frames, N gaze slots, V patch ids per frame, R side.
"""
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import model
from data import Clips, VideoError, collate, to_model_pixels
from gazing import (
    draw_ratio,
    drop_empty_slots,
    last_slots,
    one_clip,
    parse_alpha,
    rows,
    sheet,
    split_frames,
    split_ratio,
)
from lib import configurator, run
from lib.checkpoint import keep_best, load_state, save_state, state_of
from lib.loader import Feed, StepSampler, make_loader, send, shard
from lib.log import Log, LossCheck, Means, Stopwatch, count_parameters
from lib.optim import exponential, learning_rate, make_optimizer
from lib.weights import assign, build
from model import Gaze, GazeConfig
from videomae import VideoMAE, check_fit, frames_of, load_videomae


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
    n_workers: int | None = None       # decoding processes; none: one per core; 0: decode in the training process
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
    stop_early: float = 0.0            # share of the steps whose rollouts a requirement ends too, whatever the split
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
    rollout_batch: int = 0             # most clips that are rolled out at once, where memory allows; 0: as micro_batch
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
    compile: bool = False              # torch.compile for the layers that are trained; never on a CPU
    wandb: str | None = None           # project to mirror metrics.jsonl to; none: off

    def check(self):
        if self.group_size < 2:
            raise ValueError("group_size must be at least 2: a rollout is compared with its group, "
                             "alone it teaches nothing")
        if self.recon_sample_rate > 1 or int(self.recon_sample_rate * self.n_frames) < 1:
            raise ValueError(f"recon_sample_rate={self.recon_sample_rate} of {self.n_frames} frames leaves none for "
                             f"the reward: use 1/{self.n_frames} to 1")
        if min(self.temperature, self.temperature_end) <= 0:
            raise ValueError("temperature must be above 0: a group of equal rollouts teaches nothing")
        for key in ("gamma", "stop_early"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}={getattr(self, key)} must lie between 0 and 1")
        configurator.check_at_least(
            self, n_frames=1, stride=1, n_workers=0, batch_size=1, micro_batch=0, rollout_batch=0, reward_batch=0,
            steps=1, lr_end=0, task_loss_weight=0, val_clips=1, val_every=1, save_every=1, log_every=1)
        configurator.check_above_zero(self, "lr", "epochs", "ratio_rate")
        configurator.check_share(self, "val_ratio", "ratio", "ratio_min", "ratio_max")
        configurator.check_fraction(self, "warmup")
        configurator.check_order(self, ("ratio_min", "ratio_max"), ("requirement_min", "requirement_max"))
        configurator.check_wandb(self)
        parse_alpha(self.alpha, self.n_frames)
        if self.init_from == "scratch":
            self.model()

    def model(self):
        sizes = configurator.shared(self, GazeConfig)
        # These keys mean the rollouts here, and validation in the model's config.
        del sizes["gazing_ratio"], sizes["task_loss_requirement"]
        return GazeConfig(**sizes, max_num_frames=self.n_frames)


# ----------------------------------------------------------------------------------------------------------------------
# reward


@torch.no_grad()
def reward(mae, video, gazing, frames, max_rows=0):
    """FORK: what the model is trained for. Training, validation and the choice of best/ all call this function.

    video (B, T, 3, R, R) normalised pixels; gazing: G gazes of every clip, copy-major (row g·B + b); frames: the F
    frames that are rewarded. Returns (G·B, F), higher is better: here minus the reconstruction loss of each frame.
    mae: whatever main() loads for it. max_rows: most rollouts in the reconstructor at once (0: all).
    """
    B = len(video)
    n_rows = len(gazing["gazing_pos"])
    chunk = max(1, (max_rows or n_rows) // B) * B  # whole copies of the batch

    # The loss's view of the true frames is computed once per clip, not once per rollout.
    target = mae.loss.target(frames_of(video, frames))
    losses = []
    for first in range(0, n_rows, chunk):
        part = rows(gazing, slice(first, first + chunk))
        reconstruction = mae.reconstruct(video, part, frames)            # (rows, F, 3, R, R)
        loss = mae.loss(reconstruction.unflatten(0, (-1, B)), target)    # (G, B, F)
        losses.append(loss.flatten(0, 1))
    return -torch.cat(losses).float()


# ----------------------------------------------------------------------------------------------------------------------
# policy gradient


def discounted_advantages(advantage, frames, gazing, gamma):
    """Advantage of every slot (rows, N) from that of every rewarded frame (rows, F).

    A frame's advantage goes to all real slots up to the end of that frame, times gamma ** (number of real slots in
    between), and to nothing later; several rewarded frames add up.
    """
    real = ~gazing["if_padded_gazing"]
    count = real.cumsum(dim=1)  # real slots up to and including this one
    ends = gazing["num_gazing_each_frame"].cumsum(0).tolist()

    out = torch.zeros(real.shape, device=advantage.device)
    for i, frame in enumerate(frames):
        end = ends[frame]
        n_after = count[:, end - 1:end] - count[:, :end]                 # real slots between this one and the end
        weight = gamma ** n_after * real[:, :end]
        out[:, :end] += advantage[:, i:i + 1] * weight
    return out


def grpo_loss(log_prob, advantage):
    """Per-clip sums over slots, then the mean over clips. exp(log π - detach) is 1: only its gradient matters."""
    ratio = torch.exp(log_prob - log_prob.detach())
    return -(ratio * advantage).sum(dim=1).mean()


def roll_out(gaze, videos, cfg, step, temperature):
    """G sampled gazes of every clip, copy-major, for each of the micro-batches in `videos`: on a GPU they take hardly
    longer than one of them. Draws of ratio and requirement are the same on all ranks."""
    video = torch.cat(videos)
    generator = run.shared_generator(cfg.seed, step)
    ratio = draw_ratio(cfg.gazing_ratio, cfg.ratio, cfg.ratio_min, cfg.ratio_max, cfg.ratio_rate, generator)
    # In some steps rollouts stop by themselves, so that the head learns what is left where it stops.
    stops_early = cfg.stop_early > 0 and torch.rand((), generator=generator).item() < cfg.stop_early
    requirement = None
    if cfg.split == "self" or stops_early:
        requirement = draw_ratio(
            cfg.requirement, cfg.task_loss_requirement, cfg.requirement_min, cfg.requirement_max, 0, generator)

    # budgets of the frames: what one rollout needs to meet the requirement, or a split of the ratio
    if cfg.split == "self":
        own = gaze.generate(video, gazing_ratio=ratio, task_loss_requirement=requirement, temperature=temperature)
        counts = [(~padded).sum(dim=1) for _, padded in split_frames(own)]
        ratios = torch.stack(counts, dim=1) / gaze.config.num_ids        # (B, T)
        ratios = ratios.repeat(cfg.group_size, 1)
    else:
        ratios = split_ratio(cfg.split, ratio, cfg.n_frames, cfg.alpha, generator)

    if not stops_early:
        requirement = None
    gazing = gaze.generate(video, ratios, requirement, temperature, num_copies=cfg.group_size)
    if len(videos) == 1:
        return [gazing]

    # the rows of each micro-batch, and only the slots that its clips take
    row = torch.arange(cfg.group_size * len(video)).view(cfg.group_size, -1)
    gazings = []
    for part in row.split([len(clips) for clips in videos], dim=1):
        own = rows(gazing, send(part.flatten(), video.device))
        if cfg.split == "self" or stops_early:
            own |= drop_empty_slots(own)
        gazings.append(own)
    return gazings


# ----------------------------------------------------------------------------------------------------------------------
# validation


@torch.no_grad()
def validate(gaze, mae, loader, ratios, cfg, device):
    """Greedy gazes of the validation clips and their reward, over all ranks.

    ratios (T,): share of the patches that each frame may take. Returns ({val_reward: mean over clips and frames,
    val_predicted: the loss that the model expects, val_ratio}, the first clip's tensors for a picture).
    """
    reward_sum = predicted_sum = ratio_sum = 0.0
    n_clips = 0
    example = None
    for batch in loader:
        video = to_model_pixels(batch["video"].to(device))
        frames = range(video.shape[1])
        gazing = gaze.generate(video, gazing_ratio=ratios, task_loss_requirement=cfg.val_requirement)
        rewards = reward(mae, video, gazing, frames)                     # (B, T)
        predicted = gaze(video, gazing)[1].gather(1, last_slots(gazing))

        real = ~gazing["if_padded_gazing"]
        reward_sum += rewards.mean(dim=1).sum().item()
        predicted_sum += predicted.mean(dim=1).sum().item()
        ratio_sum += real.sum().item() / (len(frames) * gaze.config.num_ids)
        n_clips += len(video)

        if example is None:
            reconstruction = None
            if isinstance(mae, VideoMAE):
                reconstruction = mae.reconstruct(video[:1], rows(gazing, 0), frames)[0]
            example = video[0], one_clip(gazing, 0), reconstruction

    reward_sum, predicted_sum, ratio_sum, n_clips = run.all_sum(reward_sum, predicted_sum, ratio_sum, n_clips)
    metrics = {
        "val_reward": reward_sum / n_clips,
        "val_predicted": predicted_sum / n_clips,
        "val_ratio": ratio_sum / n_clips}
    return metrics, example


# ----------------------------------------------------------------------------------------------------------------------


def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    rank, world, device = run.start(cfg)
    out = Path(cfg.out_dir)

    # ---- model
    torch.manual_seed(cfg.seed)  # the same weights on all ranks
    start, best, resumed = 0, math.inf, None
    if cfg.init_from == "resume":
        resumed = load_state(out, cfg, world, {"n_frames"})
        start, best = resumed["step"], resumed["best"]
        gaze = Gaze.from_pretrained(out)  # for its config.json: sizes come from what the run started from
        assign(gaze, resumed["model"], f"{out}/last.pt and config.json")
    elif cfg.init_from == "scratch":
        gaze = build(lambda: Gaze(cfg.model()))
    else:
        gaze = Gaze.from_pretrained(cfg.init_from)
    gaze.config.reference_decoding = False  # the policy that samples must be the one that is trained
    gaze.config.max_num_frames = max(gaze.config.max_num_frames, cfg.n_frames)
    # Save the validation ratio and requirement as the checkpoint's defaults for generate().
    gaze.config.gazing_ratio = cfg.val_ratio
    gaze.config.task_loss_requirement = cfg.val_requirement
    gaze.to(device)
    gaze.checks_values = False  # pixels come from data.Clips

    # ---- reconstructor. FORK: load what reward() needs, or mae = None
    mae = load_videomae(cfg, device)
    mae.checks_values = False
    check_fit(mae, gaze, cfg.init_from)

    # ---- data. FORK: any dataset whose items are like those of data.Clips
    R = gaze.config.image_size
    clips = dict(n_frames=cfg.n_frames, size=R, stride=cfg.stride, cache=cfg.cache)
    train = Clips(cfg.root, "train", random_start=cfg.random_start, crop=cfg.crop, seed=cfg.seed, **clips)
    val = Clips(cfg.root, "val", **clips)
    run.check_same(training_clips=len(train), validation_clips=len(val))

    total = cfg.steps or math.ceil(cfg.epochs * len(train) / cfg.batch_size)
    sampler = StepSampler(len(train), cfg.batch_size, rank, world, cfg.micro_batch, cfg.seed, start, total)
    loader = Feed(make_loader(train, sampler, cfg.n_workers, collate))
    n_val = min(len(val), cfg.val_clips)
    val_loader = make_loader(val, shard(n_val, rank, world, 16), 0, collate)
    val_ratios = split_ratio(
        cfg.val_split, cfg.val_ratio, cfg.n_frames, cfg.alpha, run.shared_generator(cfg.seed, 0))

    # ---- optimizer
    optimizer = make_optimizer(cfg.optimizer, gaze, cfg.lr)
    ddp, sync, autocast, scaler, precision = run.prepare(gaze, optimizer, cfg, world, device, resumed)
    n_together = max(1, cfg.rollout_batch // sampler.micro)  # micro-batches that are rolled out together
    n_rewarded = int(cfg.recon_sample_rate * cfg.n_frames)
    n_parameters = count_parameters(gaze) / 1e6
    n_epochs = total * cfg.batch_size / len(train)
    log = Log(cfg, rank, world, device, [
        f"Gaze {model.describe(gaze.config)}; {n_parameters:.2f} M parameters",
        f"reconstructor: {count_parameters(mae) / 1e6:.2f} M parameters, frozen" if mae else "no reconstructor",
        f"{sampler.arithmetic}, {cfg.group_size} rollouts each, {n_rewarded} rewarded frames",
        f"{total} steps = {n_epochs:.1f} epochs of {len(train)} clips; {n_val} clips for validation",
        f"a clip: {cfg.n_frames} frames of 3 x {R} x {R} uint8",
        precision], start)

    # ---- loop
    unreadable = set()
    losses = LossCheck()
    t0 = time.time()
    for step in range(start, total + 1):
        stop = run.stopping()

        # validate, and keep the model with the highest reward in best/
        if (step % cfg.val_every == 0 or step == total) and not stop:
            losses.check(gaze)
            metrics, example = validate(gaze, mae, val_loader, val_ratios, cfg, device)
            log.write(step, total, step - start, **metrics)
            best = keep_best(gaze, out, -metrics["val_reward"], best, rank)
            if rank == 0:
                video, gazing, reconstruction = example
                sheet(out / "val.png", video, gazing, gaze.config, reconstruction=reconstruction,
                      title=f"GRPO, step {step}: reward {metrics['val_reward']:.3f}")

        # save; after the last step there is nothing else to do
        if (step % cfg.save_every == 0 or step == total or stop) and rank == 0:
            losses.check(gaze)
            gaze.save_pretrained(out)
            save_state(out / "last.pt", state_of(step, gaze, optimizer, scaler, best, cfg, world))
        if step == total or stop:
            break

        # this step's temperature, rewarded frames and learning rate
        run.seed_step(cfg.seed, step, rank, world)
        temperature = exponential(step, total, cfg.temperature, cfg.temperature_end)
        frames = torch.randperm(cfg.n_frames, generator=run.shared_generator(cfg.seed, step))
        frames = frames[:n_rewarded].sort().values.tolist()
        lr = learning_rate(cfg.lr_schedule, step, total, cfg.lr, cfg.lr_end, cfg.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr

        means = Means()
        keys = []
        rolled_out = []
        is_logged = (step + 1) % cfg.log_every == 0
        stopwatch = Stopwatch(device, is_logged)
        for micro in range(sampler.n_micro):
            # 1. roll out: G gazes of every clip, copy-major, of a few micro-batches at once
            if not rolled_out:
                videos = []
                for _ in range(min(n_together, sampler.n_micro - micro)):
                    batch = next(loader)
                    keys += batch["key"]
                    unreadable.update(batch["unreadable"])
                    videos.append(to_model_pixels(batch["video"].to(device, non_blocking=True)))
                stopwatch.lap()
                with autocast:
                    gazings = roll_out(gaze, videos, cfg, step, temperature)
                rolled_out = list(zip(videos, gazings, strict=True))
                means.add(1, rollout_s=stopwatch.lap())
            video, gazing = rolled_out.pop(0)                                # (B, T, 3, R, R), G·B rows
            share = len(video) / sampler.local                               # of this process's clips

            # 2. reward of a few random frames
            with autocast:
                rewards = reward(mae, video, gazing, frames, cfg.reward_batch)   # (G·B, F)

            # 3. advantage: above the group's mean, discounted back to the patches that led to it
            means.add(1, reward_s=stopwatch.lap())
            grouped = rewards.unflatten(0, (cfg.group_size, -1))             # (G, B, F)
            advantage = (grouped - grouped.mean(dim=0)).flatten(0, 1)
            advantage = discounted_advantages(advantage, frames, gazing, cfg.gamma)  # (G·B, N)

            # 4. update: policy gradient, and the head that predicts the loss at each rewarded frame's last gaze
            with sync(last=micro == sampler.n_micro - 1):
                with autocast:
                    log_prob, task_loss = ddp(video, gazing, cfg.policy, temperature)
                predicted = task_loss.gather(1, frames_of(last_slots(gazing), frames))
                error = (predicted + rewards).square().mean()                # the loss is minus the reward
                loss = grpo_loss(log_prob, advantage) + cfg.task_loss_weight * error
                scaler.scale(loss * share).backward()

            # 5. what the log tells. Entropy is the mean -log π of the sampled patches, exact with policy=sampling only.
            real = ~gazing["if_padded_gazing"]
            n_real = real.sum()
            spread = grouped.std(dim=0)
            per_scale = torch.stack([mask.sum() for mask in gazing["gazing_mask"]])
            means.add(share, reward=rewards.mean(), measured=-rewards.mean())
            means.add(share, reward_spread=spread.mean(), no_spread=(spread < 1e-6).float().mean())
            means.add(share, predicted=predicted.mean(), task_error=error, entropy=-log_prob.sum() / n_real)
            means.add(share, gazes_per_frame=n_real / (len(real) * cfg.n_frames), per_scale=per_scale / n_real)
            means.add(1, update_s=stopwatch.lap())

        losses.add(means.total(), step, keys)
        run.update(optimizer, scaler)

        # the log line; in between nothing is read from a GPU
        if is_logged:
            losses.check()
            ms_per_step = (time.time() - t0) * 1000 / cfg.log_every
            log.write(step + 1, total, step + 1 - start, **means.read(), temperature=temperature, lr=lr,
                      ms_per_step=ms_per_step, data_ms=loader.waited_ms(cfg.log_every),
                      unreadable=run.count_distinct(unreadable))
            t0 = time.time()
    run.finish()


if __name__ == "__main__":
    run.launch(main, VideoError)
