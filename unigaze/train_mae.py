"""Pre-train the masked autoencoder on faces without labels: a quarter of the patches is shown, the rest is predicted.

    python -m unigaze.train_mae config/toy_unigaze_mae.py                            # one CPU core, two minutes
    torchrun --nproc_per_node=4 -m unigaze.train_mae config/unigaze_b.py --data=data/faces
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 -m unigaze.train_mae …
    python -m unigaze.train config/unigaze_b.py --init_from=out/unigaze_mae          # then train gaze from it

The recipe of MAE (He et al. 2022) with the faces and the augmentation of UniGaze (paper, section 3). The published H
took 120 hours on 4 H100. Writes out_dir/{config.json, model.safetensors}, metrics.jsonl and faces.png: what is shown,
what the model makes of it, and the faces.
"""
if not __package__:
    raise SystemExit("run it from the root of the repository as a module: python -m unigaze.train_mae …")

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from lib import configurator, run
from lib.checkpoint import load_state, save_state, state_of
from lib.loader import Feed, StepSampler, make_loader
from lib.log import Log, Means, check_finite, count_parameters
from lib.video_out import contact_sheet
from lib.weights import assign, build
from unigaze.data import FaceError, collate, open_sets, protocol
from unigaze.model import FaceMAE, FaceMAEConfig, imagenet_normalize
from unigaze.normalise import resize


@dataclass
class Config:
    # data
    data: str = "data/faces"           # folder with a folder of .h5 files per data set (unigaze/README.md)
    protocol: str = "mae"              # which of them: the sets to train on of a protocol in unigaze/data.py
    augment: bool = True               # random crops, colours and flips
    limit_head_pose: float | None = None  # degrees; leave out heads that are turned further
    out_dir: str = "out/unigaze_mae"   # weights, metrics.jsonl, faces.png
    n_workers: int = 8                 # reading processes per training process; 0: read in the training process
    # model: B/16; config/unigaze_l.py and config/unigaze_h.py are the larger ones
    image_size: int = 224              # pixels; faces of another size are resized
    patch_size: int = 16
    hidden_size: int = 768
    depth: int = 12
    num_heads: int = 12
    decoder_hidden_size: int = 512     # the decoder is thrown away after pre-training
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    mask_ratio: float = 0.75           # share of the patches that is hidden
    norm_pix_loss: bool = True         # predict every patch's pixels less their mean, over their spread
    init_from: str = "scratch"         # scratch | resume | folder or file of a masked autoencoder of the same sizes
    # optimisation: all published
    epochs: float = 300.0              # passes over the faces
    steps: int | None = None           # optimizer steps, in place of epochs
    batch_size: int = 64               # faces at once in EACH process
    grad_accumulation_steps: int = 8   # batches per optimizer step: 2,048 faces on 4 GPUs
    blr: float = 1.5e-4                # learning rate per 256 faces of a step
    warmup_epochs: float = 40.0        # linear from 0; a cosine to 0 follows
    weight_decay: float = 0.05         # not on biases and norms
    # run
    save_every: int = 500              # steps
    log_every: int = 20                # steps
    seed: int = 0
    device: str = "auto"               # auto | cpu | cuda
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # autocast; auto: float32 on a CPU, else bfloat16
    tf32: bool = True                  # on a GPU: what stays in float32 is multiplied in TF32 (10 bits of mantissa)
    compile: bool = False              # torch.compile for the training pass; never on a CPU
    wandb: str | None = None           # project to mirror metrics.jsonl to; none: off

    def check(self):
        configurator.check_at_least(self, n_workers=0, steps=1, batch_size=1, grad_accumulation_steps=1, seed=0,
                                    warmup_epochs=0, weight_decay=0, save_every=1, log_every=1)
        configurator.check_above_zero(self, "epochs", "blr", "limit_head_pose")
        configurator.check_wandb(self)
        self.model()
        protocol(self.protocol)

    def model(self):
        return FaceMAEConfig(self.image_size, self.patch_size, self.hidden_size, self.depth, self.num_heads, 0.0,
                             self.decoder_hidden_size, self.decoder_depth, self.decoder_num_heads, self.mask_ratio,
                             self.norm_pix_loss)


# ----------------------------------------------------------------------------------------------------------------------
# augmentation


class Augmented(torch.utils.data.Dataset):
    """Faces with a random crop, colour and flip that depend on the seed and the item's index alone."""

    def __init__(self, faces, seed):
        self.faces = faces
        self.seed = seed

    def __len__(self):
        return len(self.faces)

    def __getitem__(self, index):
        item = self.faces[index]
        random = np.random.default_rng([self.seed, index])
        return item | {"image": augment(item["image"], random)}


def augment(image, random):
    """image (3, S, S) uint8 -> the same, as published: every second one is cropped, every second one changes its
    colours, one of 20 is grey, every second one is mirrored."""
    if random.random() < 0.5:
        image = crop_centre(image, random.uniform(0.75, 0.9))
    if random.random() < 0.5:
        image = jitter(image, random)
    if random.random() < 0.05:
        colourless = grey(image.float())
        image = colourless.round().byte().expand(3, -1, -1)
    if random.random() < 0.5:
        image = image.flip(-1)
    return image


def crop_centre(image, rate):
    """The middle of a picture (3, S, S), `rate` of its side, enlarged to the old size."""
    size = image.shape[1]
    side = int(size * rate)
    start = (size - side) // 2
    middle = image[:, start:start + side, start:start + side]
    enlarged = resize(middle.permute(1, 2, 0).numpy(), size)
    return torch.from_numpy(enlarged).permute(2, 0, 1)


def jitter(image, random):
    """Brightness, contrast, saturation and hue of (3, S, S) uint8 in random order, in the published ranges. The hue
    turns about the grey axis of RGB here, not in HSV."""
    x = image.float()
    for change in random.permutation(4):
        if change == 0:
            x = x * random.uniform(0.7, 1.3)
        elif change == 1:
            x = grey(x).mean().lerp(x, random.uniform(0.4, 1.8))
        elif change == 2:
            x = grey(x).lerp(x, random.uniform(0.8, 1.2))
        else:
            turn = turn_hue(random.uniform(-0.15, 0.15))
            x = (turn @ x.flatten(1)).view_as(x)
        x = x.clamp(0, 255)
    return x.round().byte()


def grey(x):
    """(3, S, S) -> (1, S, S)"""
    weights = torch.tensor([[0.299, 0.587, 0.114]])
    return (weights @ x.flatten(1)).view(1, *x.shape[1:])


def turn_hue(turns):
    """Rotation matrix (3, 3) of colours about the grey axis, by a share of a whole turn."""
    cos = math.cos(2 * math.pi * turns)
    sin = math.sin(2 * math.pi * turns)
    same = (1 - cos) / 3
    plus = same + sin / math.sqrt(3)
    minus = same - sin / math.sqrt(3)
    return torch.tensor([[cos + same, minus, plus], [plus, cos + same, minus], [minus, plus, cos + same]])


# ----------------------------------------------------------------------------------------------------------------------
# schedule, optimizer, picture


def learning_rate(epoch, epochs, warmup, lr):
    """At a fractional epoch: linear warm-up from 0 to lr, then half a cosine to 0."""
    if epoch < warmup:
        return lr * epoch / warmup
    share = (epoch - warmup) / (epochs - warmup)
    return lr * (1 + math.cos(math.pi * share)) / 2


def make_optimizer(mae, lr, weight_decay):
    """AdamW with MAE's betas. Biases and norms do not decay; the tokens do, as published."""
    trained = [p for p in mae.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1]
    others = [p for p in trained if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


@torch.no_grad()
def draw_faces(path, mae, images):
    """Write a picture with a column per face: what the model sees, what it makes of it, the face. With norm_pix_loss a
    painted patch has the mean and the spread of the true one, which the model does not predict."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(len(images), mae.config.num_patches, generator=generator)
    normal = imagenet_normalize(images, mae.config.image_size)
    loss, prediction, mask = mae(normal, noise.to(images.device))
    painted = mae.paint(normal, prediction, mask)
    hidden = F.interpolate(mask.view(-1, 1, mae.grid, mae.grid), scale_factor=mae.config.patch_size)
    seen = images / 255 * (1 - hidden)
    rows = {}
    for name, pixels in (("seen", seen), ("painted", painted), ("face", images / 255)):
        pictures = (pixels * 255).round().byte()
        rows[name] = list(pictures.permute(0, 2, 3, 1).cpu().numpy())
    contact_sheet(path, rows, title=f"error in the hidden patches: {loss.item():.3f}")


def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    rank, world, device = run.init_processes(cfg.device)
    run.check_same(**vars(cfg))
    run.stop_on_sigterm()
    out = Path(cfg.out_dir)

    # ---- model
    torch.manual_seed(cfg.seed)  # the same weights on all ranks
    resumed = None
    start = 0
    if cfg.init_from == "resume":
        resumed = load_state(out, cfg, world, {*FaceMAEConfig.__dataclass_fields__, "protocol"})
        start = resumed["step"]
        mae = build(lambda: FaceMAE(cfg.model()))
        assign(mae, resumed["model"], f"{out}/last.pt")
    elif cfg.init_from == "scratch":
        mae = build(lambda: FaceMAE(cfg.model()))
    else:
        mae = FaceMAE.from_published(cfg.init_from, cfg.model())
    mae.to(device)
    n_parameters = count_parameters(mae) / 1e6

    # ---- data
    names = protocol(cfg.protocol)["train"]
    faces = open_sets(cfg.data, names, cfg.image_size, labelled=False, head_limit=cfg.limit_head_pose)
    run.check_same(faces=len(faces))
    train = Augmented(faces, cfg.seed) if cfg.augment else faces
    step_size = cfg.batch_size * cfg.grad_accumulation_steps * world
    total = cfg.steps or math.ceil(cfg.epochs * len(faces) / step_size)
    epochs = total * step_size / len(faces)
    sampler = StepSampler(len(faces), step_size, rank, world, cfg.batch_size, cfg.seed, start, total)
    loader = Feed(make_loader(train, sampler, cfg.n_workers, collate))

    # eight faces for the picture, from all over the sets
    numbers = np.linspace(0, len(faces) - 1, 8).astype(int)
    shown = torch.stack([faces[i]["image"] for i in numbers]).to(device)

    # ---- optimizer
    peak = cfg.blr * step_size / 256
    optimizer = make_optimizer(mae, peak, cfg.weight_decay)
    ddp, sync, autocast, scaler, precision = run.prepare(mae, optimizer, cfg, world, device, resumed)
    log = Log(cfg, rank, world, device, [
        f"FaceMAE, {cfg.image_size} px in patches of {cfg.patch_size}, {n_parameters:.2f} M parameters, "
        f"{mae.config.num_visible} of {mae.config.num_patches} patches shown",
        sampler.arithmetic,
        f"{total} steps = {epochs:.1f} epochs of {len(faces)} faces ({', '.join(names)}); peak lr {peak:.3g}",
        precision], start)

    # ---- loop
    unreadable = set()
    t0 = time.time()
    for step in range(start, total + 1):
        stop = run.stopping()
        last = step == total

        # save
        if (step % cfg.save_every == 0 or last or stop) and rank == 0:
            mae.save_pretrained(out)
            save_state(out / "last.pt", state_of(step, mae, optimizer, scaler, math.inf, cfg, world))
            draw_faces(out / "faces.png", mae, shown)
        if last or stop:
            break

        # this step's learning rate
        epoch = step * step_size / len(faces)
        lr = learning_rate(epoch, epochs, min(cfg.warmup_epochs, epochs), peak)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # what is hidden, drawn for the whole step: it does not depend on the number of processes
        generator = run.shared_generator(cfg.seed, step)
        noise = torch.rand(step_size, mae.config.num_patches, generator=generator)
        noise = noise.split(sampler.local)[rank].split(sampler.micro)

        losses = Means()
        keys = []
        for micro in range(sampler.n_micro):
            batch = next(loader)
            keys += batch["key"]
            unreadable.update(batch["unreadable"])
            images = batch["image"].to(device, non_blocking=True)    # (B, 3, S, S)
            share = len(images) / sampler.local                      # of this process's faces

            with sync(last=micro == sampler.n_micro - 1):
                with autocast:
                    loss, _, _ = ddp(images, noise[micro].to(device, non_blocking=True))
                scaler.scale(loss * share).backward()
            losses.add(share, loss=loss)

        check_finite(losses.sums["loss"].item(), step, keys)
        run.update(optimizer, scaler)

        if (step + 1) % cfg.log_every == 0:
            ms_per_step = (time.time() - t0) * 1000 / cfg.log_every
            log.write(step + 1, total, step + 1 - start, **losses.read(), lr=lr, epoch=epoch, ms_per_step=ms_per_step,
                      data_ms=loader.waited_ms(cfg.log_every), unreadable=run.count_distinct(unreadable))
            t0 = time.time()
    run.finish()


if __name__ == "__main__":
    run.launch(main, FaceError)
