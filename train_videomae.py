"""Train the reconstructor: a masked autoencoder on videos that sees random multi-scale gazes and paints whole frames.

    python train_videomae.py config/toy_videomae.py                                  # 2 CPU cores, three to six minutes
    python train_videomae.py config/videomae.py --root=data/mine                     # one GPU, published ViT-L
    torchrun --nproc_per_node=8 train_videomae.py config/videomae.py --root=a,b,c
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_videomae.py …

Ratio and split over frames are drawn as for the labels (label.py), one draw per step, the same on all ranks. The loss
is that of a few randomly chosen frames. Writes out_dir/{config.json, model.safetensors}, and the same in out_dir/best
for the model with the lowest validation loss.

Dimension key: B clips, T frames, F frames to reconstruct, V patch ids per frame, R side of the frame in pixels.
"""
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from data import Clips, VideoError, collate, to_model_pixels
from gazing import as_sides, draw_ratio, one_clip, parse_alpha, random_gazing, sheet, split_ratio, to_budgets, to_device
from lib import configurator, run
from lib.checkpoint import keep_best, load_state, save_state, state_of
from lib.loader import Feed, StepSampler, make_loader, shard
from lib.log import Log, LossCheck, Means, count_parameters
from lib.optim import Muon, fused, learning_rate
from lib.weights import check_memory
from videomae import VideoMAE, VideoMAEConfig


@dataclass
class Config:
    # data
    root: str = "data/toy"             # folders with train/ and val/, separated by commas
    out_dir: str = "out/videomae"      # weights, metrics.jsonl, pictures
    n_frames: int = 16                 # clip length
    stride: int = 1                    # source frames per clip frame
    random_start: bool = False         # clips start anywhere in the video, not at its first frame
    crop: Literal["center", "random"] = "center"  # random: one random resized crop for all frames of a clip
    cache: bool = False                # keep all decoded clips in memory: for sets that fit
    n_workers: int | None = None       # decoding processes; none: one per core; 0: decode in the training process
    # model: the published ViT-L
    scales: str = "32+64+112+224"      # the last is the input size
    patch_size: int = 16               # pixels
    max_num_frames: int = 256          # learned time embeddings
    hidden_size: int = 1024            # encoder width
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048
    initializer_range: float = 0.02    # of fresh weights; narrow models want more, about 1 / sqrt(width)
    init_from: str = "scratch"         # scratch | resume | folder, file or hub id to start from, a ViTMAE's too
    # gazes: the same draws as label.py
    ratio_min: float = 0.02            # share of all patches that is shown; exponential between min and max
    ratio_max: float = 0.2
    ratio_rate: float = 10.0           # of the exponential
    alpha: str = "10,3"                # Dirichlet split over frames, the last value repeated: the first frame gets most
    recon_frames: int = 4              # frames reconstructed per clip and step
    loss_type: str = "l1"              # reconstruction loss: l1, dinov2_reg and siglip2, joined by +
    loss_weights: str = "1"            # of its terms (published: l1+dinov2_reg+siglip2 with 1+0.3+0.3)
    dinov2_reg: str | None = None      # folder or hub id of that network; none: in init_from, else published
    siglip2: str | None = None
    # optimisation
    steps: int = 50000                 # optimizer steps
    batch_size: int = 128              # clips per step over all processes
    micro_batch: int = 16              # most clips at once in one process; 0: all of its share
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-4                   # peak
    lr_end: float = 0.0
    warmup: float = 0.05               # share of the steps
    weight_decay: float = 0.05         # as MAE; not with muon
    beta2: float = 0.95                # as MAE
    clip_grad: float = 1.0             # largest gradient norm
    # run
    seed: int = 666
    device: str = "auto"               # auto | cpu | cuda
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # autocast; auto: float32 on a CPU, else bfloat16
    tf32: bool = True                  # on a GPU: what stays in float32 is multiplied in TF32 (10 bits of mantissa)
    compile: bool = False              # torch.compile for the layers that are trained; never on a CPU
    wandb: str | None = None           # project to mirror metrics.jsonl to; none: off
    log_every: int = 50                # steps
    val_every: int = 2000              # steps
    save_every: int = 500              # steps
    val_clips: int = 256               # clips of the validation set that are used

    def check(self):
        configurator.check_at_least(
            self, n_frames=1, stride=1, n_workers=0, batch_size=1, micro_batch=0, steps=1, lr_end=0, weight_decay=0,
            val_clips=1, val_every=1, save_every=1, log_every=1)
        configurator.check_above_zero(self, "lr", "ratio_rate", "clip_grad")
        configurator.check_share(self, "ratio_min", "ratio_max")
        configurator.check_fraction(self, "warmup", "beta2")
        configurator.check_order(self, ("ratio_min", "ratio_max"))
        configurator.check_wandb(self)
        parse_alpha(self.alpha, self.n_frames)
        self.model()
        if not 1 <= self.recon_frames <= self.n_frames <= self.max_num_frames:
            raise ValueError(f"need 1 <= recon_frames={self.recon_frames} <= n_frames={self.n_frames} <= "
                             f"max_num_frames={self.max_num_frames}")

    def model(self):
        side = as_sides(self.scales)[-1][0]
        return VideoMAEConfig(**configurator.shared(self, VideoMAEConfig), image_size=side)


def draw_budgets(cfg, V, generator):
    """Patches per frame of one clip, as label.py draws them: a ratio, then a split over the frames."""
    ratio = draw_ratio("exponential", 0, cfg.ratio_min, cfg.ratio_max, cfg.ratio_rate, generator)
    return to_budgets(split_ratio("dirichlet", ratio, cfg.n_frames, cfg.alpha, generator), V)


def make_optimizer(mae, cfg):
    if cfg.optimizer == "muon":
        return Muon(mae, cfg.lr, betas=(0.9, cfg.beta2))

    # as MAE: no weight decay on biases and norms
    params = [p for p in mae.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2), **fused(params))


@torch.no_grad()
def evaluate(mae, loader, cfg, device):
    """Mean loss over validation clips with fixed random gazes, all frames; and one picture's tensors."""
    mae.eval()
    V = mae.config.num_ids
    loss_sum = 0.0
    n_clips = 0
    example = None
    for i, batch in enumerate(loader):
        video = to_model_pixels(batch["video"].to(device))
        generator = torch.Generator().manual_seed(i)  # the same gazes at every evaluation
        gazing = random_gazing(draw_budgets(cfg, V, generator), len(video), V, generator)
        gazing = to_device(gazing, device)
        reconstruction, loss = mae(video, gazing, range(cfg.n_frames))   # (B, T, 3, R, R), (B, T)

        loss_sum += loss.mean(dim=1).sum().item()
        n_clips += len(video)
        if example is None:
            example = video[0], one_clip(gazing, 0), reconstruction[0]

    mae.train()
    loss_sum, n_clips = run.all_sum(loss_sum, n_clips)
    return loss_sum / n_clips, example


# ----------------------------------------------------------------------------------------------------------------------


def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    rank, world, device = run.start(cfg)
    out = Path(cfg.out_dir)

    # ---- model
    model_cfg = cfg.model()
    loss_args = dict(loss_type=cfg.loss_type, loss_weights=cfg.loss_weights, dinov2_reg=cfg.dinov2_reg,
                     siglip2=cfg.siglip2)
    torch.manual_seed(cfg.seed)  # the same weights on all ranks
    start, best, resumed = 0, math.inf, None
    if cfg.init_from == "resume":
        resumed = load_state(out, cfg, world, VideoMAEConfig.__dataclass_fields__.keys())
        start, best = resumed["step"], resumed["best"]
        mae = VideoMAE.from_state(resumed["model"], model_cfg, out / "last.pt", **loss_args)
    elif cfg.init_from == "scratch":
        check_memory(lambda: VideoMAE(model_cfg))
        mae = VideoMAE(model_cfg, **loss_args)
    else:
        mae = VideoMAE.from_pretrained(cfg.init_from, model_cfg, **loss_args)
    mae.to(device)
    mae.checks_values = False  # pixels come from data.Clips
    V, R = model_cfg.num_ids, model_cfg.image_size

    # ---- data. FORK: any dataset whose items are like those of data.Clips
    clips = dict(n_frames=cfg.n_frames, size=R, stride=cfg.stride, cache=cfg.cache)
    train = Clips(cfg.root, "train", random_start=cfg.random_start, crop=cfg.crop, seed=cfg.seed, **clips)
    val = Clips(cfg.root, "val", **clips)
    run.check_same(training_clips=len(train), validation_clips=len(val))

    sampler = StepSampler(len(train), cfg.batch_size, rank, world, cfg.micro_batch, cfg.seed, start, cfg.steps)
    loader = Feed(make_loader(train, sampler, cfg.n_workers, collate))
    n_val = min(len(val), cfg.val_clips)
    val_loader = make_loader(val, shard(n_val, rank, world, sampler.micro), 0, collate)

    # ---- optimizer
    optimizer = make_optimizer(mae, cfg)
    ddp, sync, autocast, scaler, precision = run.prepare(mae, optimizer, cfg, world, device, resumed)
    n_encoder = count_parameters(mae.vit) / 1e6
    n_decoder = count_parameters(mae.decoder) / 1e6
    log = Log(cfg, rank, world, device, [
        f"VideoMAE {cfg.scales}: {V} ids per frame; {n_encoder:.2f} M encoder + {n_decoder:.2f} M decoder parameters",
        sampler.arithmetic,
        f"{len(train)} training clips, {n_val} for validation, each {cfg.n_frames} frames of 3 x {R} x {R} uint8",
        precision], start)

    # ---- loop
    unreadable = set()
    losses = LossCheck()
    t0 = time.time()
    for step in range(start, cfg.steps + 1):
        stop = run.stopping()

        # validate, and keep the model with the lowest loss in best/
        if (step % cfg.val_every == 0 or step == cfg.steps) and not stop:
            losses.check(mae)
            val_loss, example = evaluate(mae, val_loader, cfg, device)
            log.write(step, cfg.steps, step - start, val_loss=val_loss)
            best = keep_best(mae, out, val_loss, best, rank)
            if rank == 0:
                video, gazing, reconstruction = example
                sheet(out / "val.png", video, gazing, model_cfg, reconstruction=reconstruction,
                          title=f"step {step}: loss {val_loss:.3f}")

        # save; after the last step there is nothing else to do
        if (step % cfg.save_every == 0 or step == cfg.steps or stop) and rank == 0:
            losses.check(mae)
            mae.save_pretrained(out)
            save_state(out / "last.pt", state_of(step, mae, optimizer, scaler, best, cfg, world))
        if step == cfg.steps or stop:
            break

        # this step's learning rate, budgets and frames
        run.seed_step(cfg.seed, step, rank, world)
        lr = learning_rate("linear_w_warmup", step, cfg.steps, cfg.lr, cfg.lr_end, cfg.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        generator = run.shared_generator(cfg.seed, step)
        budgets = draw_budgets(cfg, V, generator)
        frames = torch.randperm(cfg.n_frames, generator=generator)
        frames = frames[:cfg.recon_frames].sort().values.tolist()

        means = Means()
        keys = []
        for micro in range(sampler.n_micro):
            batch = next(loader)
            keys += batch["key"]
            unreadable.update(batch["unreadable"])
            video = to_model_pixels(batch["video"].to(device, non_blocking=True))  # (B, T, 3, R, R)
            share = len(video) / sampler.local                               # of this process's clips

            # random gazes, other ones in every clip and process
            gazing = to_device(random_gazing(budgets, len(video), V), device)

            with sync(last=micro == sampler.n_micro - 1):
                with autocast:
                    _, loss_of_frame = ddp(video, gazing, frames)        # (B, F)
                    loss = loss_of_frame.mean()
                scaler.scale(loss * share).backward()
            means.add(share, loss=loss)

        losses.add(means.total(), step, keys)
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(mae.parameters(), cfg.clip_grad)
        run.update(optimizer, scaler)

        # the log line; in between nothing is read from a GPU
        if (step + 1) % cfg.log_every == 0:
            losses.check()
            ms_per_step = (time.time() - t0) * 1000 / cfg.log_every
            log.write(step + 1, cfg.steps, step + 1 - start, **means.read(), lr=lr, grad_norm=grad_norm.item(),
                      gazes_per_clip=sum(budgets), ms_per_step=ms_per_step, data_ms=loader.waited_ms(cfg.log_every),
                      unreadable=run.count_distinct(unreadable))
            t0 = time.time()
    run.finish()


if __name__ == "__main__":
    run.launch(main, VideoError)
