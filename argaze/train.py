"""Train ARGaze on EGTEA Gaze+, Ego4D, EgoExo4D or the toy.

    python -m argaze.make_data && python -m argaze.train config/toy_argaze.py                  # 2 CPU cores, minutes
    python -m argaze.train config/argaze_egtea.py --root=/data/egtea                           # one GPU
    torchrun --nproc_per_node=8 -m argaze.train config/argaze_ego4d.py --root=/data/ego4d
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 -m argaze.train … # both nodes

The loss is the reverse Kullback-Leibler divergence of predicted and true heat maps, with the entropy of the prediction
and the distance of its soft-argmax as options. While training, past maps and template centers are the model's own
predictions with a probability that grows (scheduled sampling); 1 all along is what the released code does. Validation
is free-running. Writes out_dir/{config.json, model.safetensors}, and best/, for ARGaze.from_pretrained.
"""
if not __package__:
    raise SystemExit("run it from the root of the repository as a module: python -m argaze.train …")

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from argaze.data import GazeClips, collate, heatmaps, label_map
from argaze.eval import Metrics
from argaze.model import DINOV3_S, ARGaze, ARGazeConfig, blocks, build_encoder, expected_point, resize, to_probability
from data import VideoError
from lib import configurator, run, video_out
from lib.checkpoint import keep_best, load_state, save_state, state_of
from lib.loader import Feed, StepSampler, make_loader, shard
from lib.log import Log, Means, check_finite, count_parameters
from lib.weights import assign, build


@dataclass
class Config:
    # data
    dataset: Literal["auto", "egtea", "ego4d", "egoexo4d"] = "auto"  # auto: by what lies in root
    root: str = "data/argaze_toy"      # as downloaded; python -m argaze.data check says what is missing
    frames: str = ""                   # folder of extracted pictures to read in place of the videos
    out_dir: str = "out/argaze"        # weights, metrics.jsonl, pictures
    n_frames: int = 8                  # clip length (published)
    stride: int = 8                    # source frames per clip frame (published; EgoExo4D: always 8 a second)
    augment: bool = True               # random window, crop and flip
    label_size: int | None = None      # cells per side of the true maps; none: as the data set's evaluation has it
    label_sigma: float | None = None   # their spread in cells; none: the same
    cache: bool = False                # keep decoded frames in memory: for small sets
    n_workers: int = 8                 # decoding processes (published); 0: decode in the training process
    # model: published sizes
    variant: Literal["template", "twocross"] = "template"  # the paper's | the authors' later one
    encoder: str = DINOV3_S            # folder or hub id of a ViT (DINOv3 is gated); "random:64x4x4x128": fresh
    image_size: int = 224              # pixels
    patch_size: int = 16               # of the encoder
    decoder_layers: int = 3
    decoder_heads: int = 8
    decoder_ffn: int = 1536
    head_widths: str = "256+128"
    history: int = 3                   # past heat maps that are seen; 0: none
    heatmap_size: int = 64             # cells per side of the predicted map
    template: Literal["crop", "tokens", "roi", "none"] = "crop"  # what is seen of the place gazed at last
    template_scale: float = 0.35       # its side over the frame's
    scene_layers: str = "-3,-2,-1"     # encoder states that are fused
    history_values: Literal["probability", "logits"] = "probability"
    last_norm: bool = False            # final norm on the encoder's last state
    train_encoder: bool = False        # its blocks too (published for twocross)
    dropout: float = 0.1
    init_from: str = "scratch"         # scratch | resume | folder of ours | published checkpoint file
    # loss
    entropy_weight: float = 0.0        # of the prediction's entropy; the released code adds it with 1, which rules
    coord_weight: float = 0.0          # of the distance of soft-argmax and gaze (twocross: 2)
    own_start: float = 0.0             # probability that a slot takes the model's own prediction, at the start
    own_end: float = 0.3               # and from own_epochs on (paper's keys; the released code trains with 1 and 1)
    own_epochs: float = 10.0
    # optimisation
    epochs: float = 15.0               # passes over the training clips (published)
    steps: int | None = None           # optimizer steps, in place of epochs
    batch_size: int = 8                # clips per step over all processes (published)
    micro_batch: int = 0               # most clips at once in one process; 0: all of its share
    lr: float = 1e-4                   # where the cosine starts (published)
    lr_start: float = 1e-5             # where the warm-up starts (published)
    lr_end: float = 1e-6               # where the cosine ends (published)
    warmup: float = 5.0                # epochs from lr_start to the cosine's value there (published)
    encoder_lr: float = 0.1            # rate of the encoder's last block over lr (published for twocross)
    layer_decay: float = 1.0           # and of each block over that of the next one
    weight_decay: float = 0.05         # AdamW (published)
    decay_all: bool = False            # decay biases and norms too (published for twocross)
    clip_grad: float = 1.0             # largest norm of the gradient (published); 0: any
    # validation
    train_split: str = "train"
    val_split: str = "test"            # EGTEA and Ego4D have no other (published)
    val_clips: int = 1000000           # most clips of it that are used
    val_every: int = 1000              # steps
    best: Literal["f1", "l2"] = "f1"   # by which best/ is chosen (published: f1, on Ego4D l2)
    # run
    save_every: int = 1000             # steps
    log_every: int = 10                # steps
    seed: int = 0                      # published
    device: str = "auto"               # auto | cpu | cuda
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # autocast; auto: float32 on a CPU, else bfloat16
    tf32: bool = True                  # on a GPU: what stays in float32 is multiplied in TF32 (10 bits of mantissa)
    compile: bool = False              # torch.compile for the training pass; never on a CPU
    wandb: str | None = None           # project to mirror metrics.jsonl to; none: off

    def check(self):
        configurator.check_at_least(
            self, n_frames=1, stride=1, n_workers=0, batch_size=1, micro_batch=0, steps=1, val_every=1, save_every=1,
            log_every=1, val_clips=1, seed=0, lr_start=0, lr_end=0, entropy_weight=0, coord_weight=0, own_start=0,
            own_end=0, own_epochs=0, warmup=0, weight_decay=0, clip_grad=0, label_size=2)
        configurator.check_above_zero(self, "lr", "epochs", "encoder_lr", "layer_decay", "label_sigma")
        configurator.check_wandb(self)
        for key in ("own_start", "own_end"):
            if getattr(self, key) > 1:
                raise ValueError(f"{key}={getattr(self, key)} is a probability, at most 1")
        self.model()

    def model(self):
        keys = ARGazeConfig.__dataclass_fields__.keys() & self.__dataclass_fields__.keys()
        return ARGazeConfig(**{key: getattr(self, key) for key in keys})


# ----------------------------------------------------------------------------------------------------------------------
# loss


def reverse_kl(logits, target):
    """(KL divergence of the prediction P from the target Q, entropy of P), means over frames.

    logits (B, T, h, w), P = softmax(logits / 2); target (B, T, h', w') of any scale. The divergence is divided by its
    largest possible value log(h·w), the entropy is in nats. A prediction may sit on one of two peaks, not between them.
    """
    P = to_probability(logits, 2).flatten(2)                             # (B, T, h·w)
    Q = resize(target, logits.shape[-2:]).flatten(2)
    Q = Q / Q.sum(-1, keepdim=True)

    log_p = (P + 1e-10).log()
    log_q = (Q + 1e-10).log()
    kl = (P * (log_p - log_q)).sum(-1)
    kl = kl / math.log(P.shape[-1])
    entropy = -(P * log_p).sum(-1)
    return kl.mean(), entropy.mean()


def coordinate_loss(logits, points, counted, n_counted):
    """Smooth L1 distance of soft-argmax (temperature 0.5) and gaze, summed over x and y.

    Sum over the counted frames (B, T) divided by n_counted, which the caller counts over the whole batch.
    """
    predicted = expected_point(to_probability(logits, 0.5))
    distance = F.smooth_l1_loss(predicted, points, reduction="none").sum(-1)
    return (distance * counted).sum() / n_counted


# ----------------------------------------------------------------------------------------------------------------------
# optimizer


def learning_rate(cfg, epoch, epochs):
    """Cosine from lr to lr_end; during the warm-up linear from lr_start to the cosine's value at its end."""

    def cosine(epoch):
        height = (1 + math.cos(math.pi * epoch / epochs)) / 2
        return cfg.lr_end + (cfg.lr - cfg.lr_end) * height

    warm = min(cfg.warmup, epochs)
    if epoch < warm:
        return cfg.lr_start + (cosine(warm) - cfg.lr_start) * epoch / warm
    return cosine(epoch)


def make_optimizer(model, cfg):
    """AdamW with a group per rate and decay. group["scale"]: its rate over that of the decoder."""
    # blocks of a trained encoder learn slower, unless it is a fresh one
    scales = {}
    if not model.config.encoder.startswith("random:"):
        scale = cfg.encoder_lr
        for block in reversed(blocks(model.encoder)):
            for parameter in block.parameters():
                scales[parameter] = scale
            scale *= cfg.layer_decay

    groups = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = cfg.weight_decay if cfg.decay_all or parameter.dim() > 1 else 0.0
            key = scales.get(parameter, 1.0), decay
            group = groups.setdefault(key, {"params": [], "scale": key[0], "weight_decay": decay})
            group["params"].append(parameter)
    return torch.optim.AdamW(groups.values(), lr=cfg.lr)


# ----------------------------------------------------------------------------------------------------------------------
# scheduled sampling


def own_slots(cfg, step, epoch, history):
    """(T, k + 1) bool: which slots of history, and in the last column which template, take the model's own prediction;
    and the probability that they do. One draw per step, for all clips and processes."""
    probability = cfg.own_end
    if epoch < cfg.own_epochs:
        probability = cfg.own_start + (cfg.own_end - cfg.own_start) * epoch / cfg.own_epochs
    generator = run.shared_generator(cfg.seed, step)
    draw = torch.rand(cfg.n_frames, history + 1, generator=generator)
    return draw < probability, probability


# ----------------------------------------------------------------------------------------------------------------------
# validation


@torch.no_grad()
def validate(model, loader, metrics, autocast, device):
    """Free-running metrics over all ranks, and the first clip with its prediction for a picture."""
    model.eval()
    first = None
    for batch in loader:
        with autocast:
            logits = model(batch["video"].to(device))
        metrics.add(logits, batch["points"].to(device), batch["counted"].to(device))
        if first is None:
            first = batch["video"][0], logits[0].float().cpu(), batch["points"][0]
    model.train()
    return metrics.read(), first


def save_picture(path, title, video, logits, points):
    """Write a clip's frames with the predicted heat map, its point as a cross and the true gaze as a box."""
    probability, predicted, _ = ARGaze.predict(logits)
    side = video.shape[-1]
    plain = []
    drawn = []
    for t, frame in enumerate(video.permute(0, 2, 3, 1).numpy()):
        x, y = (points[t] * side).tolist()
        half = side / 20
        box = (x - half, y - half, x + half, y + half)
        picture = video_out.draw_boxes(frame, [box], "lime", max(1, side // 100))
        plain.append(picture)

        heat = video_out.draw_heat(frame, probability[t].numpy())
        place = (predicted[t] * side).tolist()
        drawn.append(video_out.draw_cross(heat, place, "white", side // 16, 1))
    video_out.contact_sheet(path, {"true gaze": plain, "prediction": drawn}, title=title)


# ----------------------------------------------------------------------------------------------------------------------


def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    rank, world, device = run.start(cfg)
    out = Path(cfg.out_dir)

    # ---- model
    torch.manual_seed(cfg.seed)  # the same weights on all ranks
    start = 0
    best = math.inf
    resumed = None
    if cfg.init_from == "resume":
        resumed = load_state(out, cfg, world, {*ARGazeConfig.__dataclass_fields__, "n_frames"})
        start = resumed["step"]
        best = resumed["best"]
        model = ARGaze.from_pretrained(out)  # for its config.json: sizes may come from what the run started from
        assign(model, resumed["model"], f"{out}/last.pt and config.json")
        model.freeze()
    elif cfg.init_from == "scratch":
        encoder = build_encoder(cfg.model())
        model = build(lambda: ARGaze(cfg.model(), encoder))
    elif Path(cfg.init_from).is_file():
        model = ARGaze.from_published(cfg.init_from, cfg.model())
    else:
        model = ARGaze.from_pretrained(cfg.init_from)
        model.config.train_encoder = cfg.train_encoder
        model.freeze()
    model.to(device).train()
    model.checks_values = False  # maps are made here
    R = model.config.image_size

    # ---- data
    settings = dict(n_frames=cfg.n_frames, size=R, stride=cfg.stride, frames=cfg.frames, cache=cfg.cache, seed=cfg.seed)
    train = GazeClips(cfg.dataset, cfg.root, cfg.train_split, augment=cfg.augment, **settings)
    val = GazeClips(cfg.dataset, cfg.root, cfg.val_split, **settings)
    run.check_same(training_clips=len(train), validation_clips=len(val))

    # the order of the training clips follows from seed and step
    total = cfg.steps or math.ceil(cfg.epochs * len(train) / cfg.batch_size)
    epochs = total * cfg.batch_size / len(train)
    sampler = StepSampler(len(train), cfg.batch_size, rank, world, cfg.micro_batch, cfg.seed, start, total)
    loader = Feed(make_loader(train, sampler, cfg.n_workers, collate))

    # every process validates on its share
    n_val = min(len(val), cfg.val_clips)
    if n_val < world:
        raise ValueError(f"{n_val} clips for validation are fewer than the {world} processes")
    val_loader = make_loader(val, shard(n_val, rank, world, sampler.micro), cfg.n_workers, collate)

    # true maps: those of the data set's evaluation, unless told otherwise
    true_maps = label_map(train.dataset, cfg.label_size, cfg.label_sigma)

    # ---- optimizer
    optimizer = make_optimizer(model, cfg)
    ddp, sync, autocast, scaler, precision = run.prepare(model, optimizer, cfg, world, device, resumed)
    million = 1e6
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log = Log(cfg, rank, world, device, [
        f"ARGaze, {model.config.variant}: {count_parameters(model) / million:.2f} M parameters, "
        f"{count_parameters(model.encoder) / million:.2f} M of them in the encoder; {trained / million:.2f} M trained",
        f"{sampler.arithmetic}; {total} steps = {epochs:.1f} epochs of {len(train)} clips",
        f"{train.dataset}: {len(train)} training clips, {n_val} for validation, each {cfg.n_frames} frames of "
        f"3 x {R} x {R} uint8",
        f"starts at step {start}; {precision}"], start)

    # ---- loop
    unreadable = set()
    t0 = time.time()
    for step in range(start, total + 1):
        stop = run.stopping()
        if (step % cfg.val_every == 0 or step == total) and not stop:
            metrics, first = validate(model, val_loader, Metrics(true_maps), autocast, device)
            named = {f"val_{name}": value for name, value in metrics.items()}
            log.write(step, total, step - start, **named)
            badness = metrics["l2"] if cfg.best == "l2" else -metrics["f1"]
            best = keep_best(model, out, badness, best, rank)
            if rank == 0:
                title = f"step {step}: F1 {metrics['f1']:.3f}, L2 {metrics['l2']:.3f}"
                save_picture(out / "val.png", title, *first)
        if (step % cfg.save_every == 0 or step == total or stop) and rank == 0:
            model.save_pretrained(out)
            save_state(out / "last.pt", state_of(step, model, optimizer, scaler, best, cfg, world))
        if step == total or stop:
            break

        # rates and draws of this step, a pure function of step and seed
        run.seed_step(cfg.seed, step, rank, world)
        epoch = step * cfg.batch_size / len(train)
        lr = learning_rate(cfg, epoch, epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        own, own_probability = own_slots(cfg, step, epoch, model.config.history)

        # the coordinate loss is a mean over the counted frames of the whole batch
        batches = [next(loader) for _ in range(sampler.n_micro)]
        n_counted = torch.cat([batch["counted"] for batch in batches]).sum().item()
        n_counted = max(1, run.all_sum(n_counted)[0])

        means = Means()
        for micro, batch in enumerate(batches):
            unreadable.update(batch["unreadable"])
            video = batch["video"].to(device, non_blocking=True)         # (B, T, 3, R, R) uint8
            points = batch["points"].to(device)                          # (B, T, 2)
            share = len(video) / sampler.local                           # of this process's clips
            target = heatmaps(points, tracked=batch["tracked"].to(device), **true_maps)

            with sync(last=micro == sampler.n_micro - 1):
                with autocast:
                    logits = ddp(video, target, own, points)             # (B, T, h, w)
                kl, entropy = reverse_kl(logits, target)
                coord = coordinate_loss(logits, points, batch["counted"].to(device), n_counted)
                coord = coord * world  # a sum over processes, which DDP averages
                loss = (kl + cfg.entropy_weight * entropy) * share + cfg.coord_weight * coord
                scaler.scale(loss).backward()
            means.add(share, kl=kl, entropy=entropy)
            means.add(1.0, coord=coord, loss=loss)

        keys = [key for batch in batches for key in batch["key"]]
        check_finite(sum(means.sums.values()).item(), step, keys)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad or math.inf)
        run.update(optimizer, scaler)

        if (step + 1) % cfg.log_every == 0:
            log.write(step + 1, total, step + 1 - start, **means.read(), grad_norm=norm.item(), lr=lr,
                      own=own_probability, epoch=epoch, ms_per_step=(time.time() - t0) * 1000 / cfg.log_every,
                      data_ms=loader.waited_ms(cfg.log_every), unreadable=run.count_distinct(unreadable))
            t0 = time.time()
    run.finish()


if __name__ == "__main__":
    run.launch(main, VideoError)
