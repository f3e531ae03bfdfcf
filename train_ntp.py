"""Stage 1: next-token prediction. The gaze model learns to continue the greedy gaze sequences that label.py found.

    python train_ntp.py config/toy_ntp.py                                            # 2 CPU cores, three to six minutes
    python train_ntp.py config/ntp.py --root=data/mine --labels=labels.json          # one GPU
    torchrun --nproc_per_node=8 train_ntp.py config/ntp.py --root=a,b,c --labels=gazing_labels.json
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_ntp.py … # both nodes

The loss is the cross-entropy of the labelled patches plus the squared error of the predicted reconstruction loss after
each of them (paper, section 3.4). Writes out_dir/{config.json, model.safetensors} for Gaze.from_pretrained, and the
same in out_dir/best for the model with the lowest validation loss.

Dimension key: B clips, T frames, N gaze slots, V patch ids per frame, R side of the frame in pixels.
"""
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import model
from data import Clips, VideoError, collate, collate_gaze, to_model_pixels
from gazing import last_slots, one_clip, parse_alpha, sheet, split_ratio, to_device
from lib import configurator, run
from lib.checkpoint import keep_best, load_state, save_state, state_of
from lib.labels import check_labels, load_labels
from lib.loader import Feed, StepSampler, make_loader, send, shard
from lib.log import Log, LossCheck, count_parameters
from lib.optim import learning_rate, make_optimizer
from lib.weights import assign, build
from model import Gaze, GazeConfig
from videomae import check_fit, load_videomae


@dataclass
class Config:
    # data
    root: str = "data/toy"             # folders with train/ and val/, separated by commas
    labels: str = "gazing_labels.json" # written by label.py, or the published files; large ones: data.py pack
    videomae: str | None = None        # reconstructor for the validation loss: folder or file; none: no such loss
    loss_type: str = "l1"              # reconstruction loss: l1, dinov2_reg and siglip2, joined by +
    loss_weights: str = "1"            # of its terms (published: l1+dinov2_reg+siglip2 with 1+0.3+0.3)
    dinov2_reg: str | None = None      # folder or hub id of that network; none: in the videomae file, else published
    siglip2: str | None = None
    out_dir: str = "out/ntp"           # weights, metrics.jsonl, pictures
    n_frames: int = 16                 # clip length
    stride: int = 1                    # source frames per clip frame
    mirror: bool = False               # flip clips and their labels left-right and up-down at random: for small sets
    cache: bool = False                # keep all decoded clips in memory: for sets that fit
    n_workers: int | None = None       # decoding processes; none: one per core; 0: decode in the training process
    # model: the published 3.3 M parameters
    scales: str = "32+64+112+224"      # the last is the input size
    patch_size: int = 16               # pixels
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 6
    intermediate_size: int = 384
    num_conv_blocks: int = 1           # of the encoder: 3 x 3 patches of 3 frames each; with more it sees further
    num_multi_token_pred: int = 10     # patches named per decoder step
    initializer_range: float = 0.02    # of fresh weights; narrow models want more, about 1 / sqrt(width)
    init_from: str = "scratch"         # scratch | resume | folder or hub id of a gaze model
    # optimisation
    epochs: float = 150.0              # passes over the training clips (published)
    steps: int | None = None           # optimizer steps, in place of epochs
    batch_size: int = 1024             # clips per step over all processes (published script; the paper says 256)
    micro_batch: int = 32              # most clips at once in one process (published); 0: all of its share
    optimizer: Literal["adam", "sgd", "muon"] = "adam"
    lr: float = 5e-4                   # published
    lr_end: float = 1e-5               # published
    lr_schedule: Literal["linear", "linear_w_warmup", "constant"] = "linear"
    warmup: float = 0.1                # share of the steps, for linear_w_warmup
    task_loss_weight: float = 1.0      # of the loss-prediction error
    # validation
    val_ratio: float = 0.1             # gazing ratio (published)
    val_split: Literal["uniform", "dirichlet", "mean"] = "mean"  # dirichlet: one draw for all evaluations (published)
    val_requirement: float | None = None  # stop a frame at this predicted loss (published: none)
    alpha: str = "10,3"                # relative budget of the frames, the last value repeated
    val_clips: int = 256               # clips of the validation set that are used
    val_every: int = 3000              # steps (published)
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
        configurator.check_at_least(
            self, n_frames=1, stride=1, n_workers=0, batch_size=1, micro_batch=0, steps=1, lr_end=0,
            task_loss_weight=0, val_clips=1, val_every=1, save_every=1, log_every=1)
        configurator.check_above_zero(self, "lr", "epochs")
        configurator.check_share(self, "val_ratio")
        configurator.check_fraction(self, "warmup")
        configurator.check_wandb(self)
        parse_alpha(self.alpha, self.n_frames)
        self.model()

    def model(self):
        return GazeConfig(**configurator.shared(self, GazeConfig), max_num_frames=self.n_frames)


# ----------------------------------------------------------------------------------------------------------------------
# loss


def ntp_loss(log_prob, task_loss, gazing, n_real):
    """Sums over the batch of (cross-entropy, squared error of the predicted loss), both divided by n_real slots.

    The published loss: per clip the sum over its real slots, divided by the mean number of real slots per clip, then
    the mean over clips. With n_real counted over the whole step that is one division, and exact in any micro-batch.
    """
    real = ~gazing["if_padded_gazing"]
    nll = -(log_prob * real).sum() / n_real
    error = ((task_loss - gazing["task_losses"]) ** 2 * real).sum() / n_real
    return nll, error


def labelled_batch(batch, V, device):
    """Normalised video (B, T, 3, R, R) and the labels as a gaze dict, both on the device."""
    video = to_model_pixels(batch["video"].to(device, non_blocking=True))
    gazing = collate_gaze(batch["gazing_pos"], batch["task_losses"], V)
    return video, to_device(gazing, device)


def mirror(video, gazing, config):
    """Flip each clip of a batch left-right and up-down with probability 1/2 each, and its gazed ids with it."""
    V = config.num_ids
    pos = gazing["gazing_pos"]
    for dim in (-1, -2):
        # where each id goes; grids are (row, column), so dim means the same as in the video
        table = []
        first = 0
        for n_ids in config.ids_per_scale:
            side = math.isqrt(n_ids)
            table.append(first + torch.arange(n_ids).view(side, side).flip(dim).flatten())
            first += n_ids
        table.append(torch.tensor([V]))  # the padding id stays
        table = send(torch.cat(table), pos.device)

        flip = torch.rand(len(video), device=video.device) < 0.5         # (B,)
        ids = torch.where(gazing["if_padded_gazing"], V, pos % V)
        pos = torch.where(flip.unsqueeze(1), pos - ids + table[ids], pos)
        video = torch.where(flip.view(-1, 1, 1, 1, 1), video.flip(dim), video)
    return video, gazing | {"gazing_pos": pos}


# ----------------------------------------------------------------------------------------------------------------------
# validation


@torch.no_grad()
def label_loss(gaze, loader, device):
    """Validation NTP loss per slot, loss-prediction error, how often the first gaze of a clip is the labelled one."""
    nll_sum = error_sum = 0.0
    n_real = n_hits = n_first = 0
    for batch in loader:
        video, gazing = labelled_batch(batch, gaze.config.num_ids, device)
        nll, error = ntp_loss(*gaze(video, gazing), gazing, 1.0)
        nll_sum += nll.item()
        error_sum += error.item()
        n_real += (~gazing["if_padded_gazing"]).sum().item()

        # the first gaze, against the label's if there is one in the first frame
        predicted = gaze.generate(video[:, :1], gazing_ratio=1e-9)["gazing_pos"][:, 0].tolist()
        for predicted_id, label in zip(predicted, batch["gazing_pos"], strict=True):
            if label[0]:
                n_hits += predicted_id == label[0][0]
                n_first += 1

    nll_sum, error_sum, n_real, n_hits, n_first = run.all_sum(nll_sum, error_sum, n_real, n_hits, n_first)
    n_real = max(n_real, 1)
    return {"val_ntp": nll_sum / n_real, "val_task_error": error_sum / n_real,
            "val_first_accuracy": n_hits / max(n_first, 1)}


@torch.no_grad()
def validate(gaze, mae, loader, ratios, requirement, device):
    """Greedy gazes of the validation clips and what the reconstructor makes of them, over all ranks.

    ratios (T,): share of the patches that each frame may take. Returns ({val_loss: mean over clips and frames,
    val_predicted: the model's own estimate of it, val_ratio}, the first clip's tensors for a picture). Without a
    reconstructor there are no losses and no reconstruction.
    """
    loss_sum = predicted_sum = ratio_sum = 0.0
    n_clips = 0
    example = None
    for batch in loader:
        video = to_model_pixels(batch["video"].to(device))
        frames = range(video.shape[1])
        gazing = gaze.generate(video, gazing_ratio=ratios, task_loss_requirement=requirement)
        ratio_sum += (~gazing["if_padded_gazing"]).sum().item() / (len(frames) * gaze.config.num_ids)
        n_clips += len(video)

        reconstruction = None
        if mae:
            reconstruction, loss = mae(video, gazing, frames)            # (B, T, 3, R, R), (B, T)
            predicted = gaze(video, gazing)[1].gather(1, last_slots(gazing))
            loss_sum += loss.mean(dim=1).sum().item()
            predicted_sum += predicted.mean(dim=1).sum().item()
        if example is None:
            example = video[0], one_clip(gazing, 0), reconstruction[0] if mae else None

    loss_sum, predicted_sum, ratio_sum, n_clips = run.all_sum(loss_sum, predicted_sum, ratio_sum, n_clips)
    metrics = {}
    if mae:
        metrics["val_loss"] = loss_sum / n_clips
        metrics["val_predicted"] = predicted_sum / n_clips
    metrics["val_ratio"] = ratio_sum / n_clips
    return metrics, example


# ----------------------------------------------------------------------------------------------------------------------


def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    rank, world, device = run.start(cfg)
    out = Path(cfg.out_dir)

    # ---- model. FORK: your own encoder takes the place of the class Encoder in model.py
    torch.manual_seed(cfg.seed)  # the same weights on all ranks
    start, best, resumed = 0, math.inf, None
    if cfg.init_from == "resume":
        resumed = load_state(out, cfg, world, {*GazeConfig.__dataclass_fields__, "n_frames"})
        start, best = resumed["step"], resumed["best"]
        gaze = Gaze.from_pretrained(out)  # for its config.json: sizes may come from what the run started from
        assign(gaze, resumed["model"], f"{out}/last.pt and config.json")
    elif cfg.init_from == "scratch":
        gaze = build(lambda: Gaze(cfg.model()))
    else:
        gaze = Gaze.from_pretrained(cfg.init_from)
    gaze.config.reference_decoding = False  # trained at exact positions, so decode at exact positions
    gaze.config.max_num_frames = max(gaze.config.max_num_frames, cfg.n_frames)
    # Save the validation ratio and requirement as the checkpoint's defaults for generate().
    gaze.config.gazing_ratio = cfg.val_ratio
    gaze.config.task_loss_requirement = cfg.val_requirement
    gaze.to(device)
    gaze.checks_values = False  # pixels come from data.Clips
    V = gaze.config.num_ids

    # ---- reconstructor, for the validation loss only
    mae = None
    if cfg.videomae:
        mae = load_videomae(cfg, device)
        mae.checks_values = False
        check_fit(mae, gaze, "the gaze model")

    # ---- data. FORK: any dataset whose items are like those of data.Clips with labels
    labels = load_labels(cfg.labels)
    check_labels(labels, cfg.n_frames, V, cfg.labels)
    R = gaze.config.image_size
    clips = dict(n_frames=cfg.n_frames, size=R, stride=cfg.stride, labels=labels, cache=cfg.cache)
    train = Clips(cfg.root, "train", **clips)
    val = Clips(cfg.root, "val", **clips)
    run.check_same(training_clips=len(train), validation_clips=len(val))

    total = cfg.steps or math.ceil(cfg.epochs * len(train) / cfg.batch_size)
    sampler = StepSampler(len(train), cfg.batch_size, rank, world, cfg.micro_batch, cfg.seed, start, total)
    loader = Feed(make_loader(train, sampler, cfg.n_workers, collate))
    n_val = min(len(val), cfg.val_clips)
    val_loader = make_loader(val, shard(n_val, rank, world, sampler.micro), 0, collate)
    val_ratios = split_ratio(
        cfg.val_split, cfg.val_ratio, cfg.n_frames, cfg.alpha, run.shared_generator(cfg.seed, 0))

    # ---- optimizer
    optimizer = make_optimizer(cfg.optimizer, gaze, cfg.lr)
    ddp, sync, autocast, scaler, precision = run.prepare(gaze, optimizer, cfg, world, device, resumed)
    n_parameters = count_parameters(gaze) / 1e6
    n_encoder = count_parameters(gaze.encoder) / 1e6
    n_epochs = total * cfg.batch_size / len(train)
    log = Log(cfg, rank, world, device, [
        f"Gaze {model.describe(gaze.config)}; {n_parameters:.2f} M parameters, of which encoder {n_encoder:.2f} M",
        sampler.arithmetic,
        f"{total} steps = {n_epochs:.1f} epochs of {len(train)} clips; {n_val} clips for validation",
        f"a clip: {cfg.n_frames} frames of 3 x {R} x {R} uint8",
        precision], start)

    # ---- loop
    unreadable = set()
    losses = LossCheck()
    t0 = time.time()
    for step in range(start, total + 1):
        stop = run.stopping()

        # validate, and keep the model with the lowest loss on the labels in best/
        if (step % cfg.val_every == 0 or step == total) and not stop:
            losses.check(gaze)
            metrics, example = validate(gaze, mae, val_loader, val_ratios, cfg.val_requirement, device)
            labelled = label_loss(gaze, val_loader, device)
            log.write(step, total, step - start, **labelled, **metrics)
            best = keep_best(gaze, out, labelled["val_ntp"], best, rank)
            if rank == 0:
                video, gazing, reconstruction = example
                sheet(out / "val.png", video, gazing, gaze.config, reconstruction=reconstruction,
                      title=f"NTP, step {step}: loss on labels {labelled['val_ntp']:.3f}")

        # save; after the last step there is nothing else to do
        if (step % cfg.save_every == 0 or step == total or stop) and rank == 0:
            losses.check(gaze)
            gaze.save_pretrained(out)
            save_state(out / "last.pt", state_of(step, gaze, optimizer, scaler, best, cfg, world))
        if step == total or stop:
            break

        # this step's learning rate
        run.seed_step(cfg.seed, step, rank, world)
        lr = learning_rate(cfg.lr_schedule, step, total, cfg.lr, cfg.lr_end, cfg.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # The loss is a mean over the real slots of the whole step, so they are counted first: here per process.
        batches = [next(loader) for _ in range(sampler.n_micro)]
        n_real = 0
        for batch in batches:
            n_real += sum(len(frame) for clip in batch["gazing_pos"] for frame in clip)
        n_real = max(1, run.all_sum(n_real)[0]) / world

        nll_sum = error_sum = 0.0
        keys = []
        for micro, batch in enumerate(batches):
            keys += batch["key"]
            unreadable.update(batch["unreadable"])
            video, gazing = labelled_batch(batch, V, device)
            if cfg.mirror:
                video, gazing = mirror(video, gazing, gaze.config)

            with sync(last=micro == sampler.n_micro - 1):
                with autocast:
                    log_prob, task_loss = ddp(video, gazing)
                    nll, error = ntp_loss(log_prob, task_loss, gazing, n_real)
                loss = nll + cfg.task_loss_weight * error
                scaler.scale(loss).backward()  # micro-batches add up, DDP takes the mean over processes
            nll_sum += nll.detach()
            error_sum += error.detach()

        losses.add(nll_sum + error_sum, step, keys)
        run.update(optimizer, scaler)

        # the log line; in between nothing is read from a GPU
        if (step + 1) % cfg.log_every == 0:
            losses.check()
            nll, error = run.all_sum(nll_sum.item() / world, error_sum.item() / world)
            epoch = (step + 1) * cfg.batch_size / len(train)
            ms_per_step = (time.time() - t0) * 1000 / cfg.log_every
            log.write(step + 1, total, step + 1 - start, ntp=nll, task_error=error, lr=lr, epoch=epoch,
                      ms_per_step=ms_per_step, data_ms=loader.waited_ms(cfg.log_every),
                      unreadable=run.count_distinct(unreadable))
            t0 = time.time()
    run.finish()


if __name__ == "__main__":
    run.launch(main, VideoError)
