"""Train gaze on any mix of data sets, and test it on others.

    python -m unigaze.train config/toy_unigaze.py                                    # one CPU core, half a minute
    python -m unigaze.train config/unigaze_h_cross_xgaze.py --data=data/faces --init_from=mae_h14_checkpoint-299.pth
    torchrun --nproc_per_node=4 -m unigaze.train config/unigaze_b.py config/unigaze_joint.py --data=data/faces
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 -m unigaze.train …
    python -m unigaze.train config/unigaze_b.py config/unigaze_joint.py --mode=test --init_from=out/unigaze

The published command line works too: torchrun -m unigaze.train use_autocast=True exp=blank.yaml batch_size=32
exp.model=configs/model/mae_h_14_gaze.yaml exp.data=configs/exp/cross/train_X.yaml exp.loss=configs/loss/l1_loss.yaml …

L1 loss on pitch and yaw, Adam, one-cycle learning rate (paper, section 4). Writes out_dir/{config.json,
model.safetensors} for UniGaze.from_pretrained, best/ by the mean error over the validation sets, epoch_NN/ every
save_epoch, metrics.jsonl, and results/SET/{gt_gaze,gt_head,subject_key}.txt, results/SET/epoch_N/pred_gaze.txt.
"""
if not __package__:
    raise SystemExit("run it from the root of the repository as a module: python -m unigaze.train …")

import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from lib import configurator, run
from lib.checkpoint import keep_best, load_state, save_state, state_of, take_output
from lib.loader import Feed, StepSampler, make_loader, shard
from lib.log import Log, Means, check_finite, count_parameters
from lib.text import written_whole
from lib.weights import assign, build
from unigaze.data import FaceError, collate, open_set, open_sets, protocol
from unigaze.model import UniGaze, UniGazeConfig, angular_error, read_published


@dataclass
class Config:
    # data
    data: str = "data/faces"           # folder with a folder per data set: xgaze_v2_224, mpii, … (unigaze/README.md)
    protocol: str = "cross_xgaze"      # what to train, validate and test on: PROTOCOLS in unigaze/data.py
    mode: Literal["train", "test"] = "train"  # test: only the validation and test sets, with the weights of init_from
    out_dir: str = "out/unigaze"       # weights, metrics.jsonl, results
    n_workers: int = 8                 # reading processes per training process; 0: read in the training process
    # model: B/16; config/unigaze_l.py and config/unigaze_h.py are the larger ones
    image_size: int = 224              # pixels; faces of another size are resized
    patch_size: int = 16
    hidden_size: int = 768
    depth: int = 12
    num_heads: int = 12
    drop_path: float = 0.1             # published
    init_from: str = "scratch"         # scratch | resume | folder or file of a UniGaze or of a masked autoencoder
    ckpt_resume: str | None = None     # a published epoch_NN.pth.tar to go on from, with its epoch and Adam's state
    # optimisation
    loss: Literal["l1", "l2"] = "l1"   # of pitch and yaw in radians
    epochs: int = 12                   # passes over the training faces (published; its older README says 6)
    steps: int | None = None           # optimizer steps, in place of epochs
    batch_size: int = 32               # faces at once in EACH process (published: on 4 GPUs a step has 128)
    grad_accumulation_steps: int = 1   # batches per optimizer step
    lr: float = 1e-4                   # peak; published, whatever the number of GPUs
    weight_decay: float = 1e-6         # coupled, on every parameter (published)
    scheduler: Literal["OneCycleLR", "StepLR"] = "OneCycleLR"  # StepLR: a tenth every 5 epochs
    # evaluation
    test_batch_size: int = 100         # faces at once in each process (published)
    valid_epoch: int = 3               # validate every so many epochs, and after the last
    eval_epoch: int = 12               # the same for the test sets
    save_epoch: int = 12               # keep the weights of every such epoch as epoch_NN
    # run
    save_every: int = 500              # steps between checkpoints to resume from, besides the end of each epoch
    log_every: int = 100               # steps (published)
    seed: int = 42                     # published
    device: str = "auto"               # auto | cpu | cuda
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # autocast; auto: float32 on a CPU, else bfloat16
    tf32: bool = True                  # on a GPU: what stays in float32 is multiplied in TF32 (10 bits of mantissa)
    compile: bool = False              # torch.compile for the training pass; never on a CPU
    wandb: str | None = None           # project to mirror metrics.jsonl to; none: off

    def check(self):
        configurator.check_at_least(
            self, n_workers=0, epochs=1, steps=1, batch_size=1, grad_accumulation_steps=1, test_batch_size=1, seed=0,
            valid_epoch=1, eval_epoch=1, save_epoch=1, save_every=1, log_every=1, weight_decay=0)
        configurator.check_above_zero(self, "lr")
        configurator.check_wandb(self)
        self.model()
        protocol(self.protocol)
        if self.mode == "test" and self.init_from in ("scratch", "resume"):
            raise ValueError(f"mode=test needs trained weights: init_from=FOLDER or FILE, not {self.init_from}")
        if self.ckpt_resume and self.init_from != "scratch":
            raise ValueError("ckpt_resume and init_from both name weights to start from: give one of them")

    def model(self):
        return UniGazeConfig(self.image_size, self.patch_size, self.hidden_size, self.depth, self.num_heads,
                             self.drop_path)


# ----------------------------------------------------------------------------------------------------------------------
# the published command line

CONFIGS = Path(__file__).parent.parent / "config"
DATASETS = {"X": "xgaze", "GC": "gazecapture", "MPII": "mpii", "ED": "eyediap", "G360": "gaze360"}


def translate(argv):
    """The published Hydra arguments in this script's words; all others stay as they are. ValueError: nothing here
    corresponds to one."""
    translated = []
    for arg in argv:
        key, _, value = arg.removeprefix("--").partition("=")
        name = Path(value).stem

        if key in ("exp", "exp.trainer"):  # both only repeat what is the default here
            continue
        elif key == "use_autocast":
            arg = "--dtype=auto" if value.lower() == "true" else "--dtype=float32"
        elif key == "exp.exp_name":
            arg = f"--out_dir=out/{value}"
        elif key == "exp.loss":
            arg = "--loss=" + name.removesuffix("_loss")
        elif key == "exp.scheduler":
            arg = f"--scheduler={name}"
        elif key == "exp.model":
            arg = model_config(value)
        elif key == "exp.data":
            arg = "--protocol=" + protocol_name(value)
        translated.append(arg)
    return translated


def model_config(path):
    """configs/model/mae_h_14_gaze.yaml -> config/unigaze_h.py"""
    size = re.search(r"_(b_?16|l_?16|h_?14)", path.lower())
    if size is None:
        raise ValueError(f"exp.model={path}: only the vision transformers b_16, l_16 and h_14 are here")
    return str(CONFIGS / f"unigaze_{size[1][0]}.py")


def protocol_name(path):
    """configs/exp/cross/train_X.yaml -> cross_xgaze"""
    if "joint" in path:
        return "joint"
    kind = "within" if "within" in path else "cross"
    letters = Path(path).stem.removeprefix("train_")
    if kind not in path or letters not in DATASETS:
        raise ValueError(f"exp.data={path}: no such protocol here, give --protocol=NAME (PROTOCOLS in unigaze/data.py)")
    return f"{kind}_{DATASETS[letters]}"


# ----------------------------------------------------------------------------------------------------------------------
# schedules


def one_cycle(step, total, lr):
    """(learning rate, Adam's first beta) of torch's OneCycleLR at its defaults: up for 30 % of the steps from lr / 25,
    then down to lr / 250,000. Beta goes the other way, from .95 to .85 and back."""
    peak = 0.3 * total - 1
    if step <= peak:
        lowest = lr / 25
        share = step / peak
    else:
        lowest = lr / 250_000
        share = 1 - (step - peak) / (total - 1 - peak)
    height = (1 - math.cos(math.pi * share)) / 2
    return lowest + (lr - lowest) * height, 0.95 - 0.1 * height


def step_lr(step, steps_per_epoch, lr):
    """A tenth of the learning rate every 5 epochs."""
    return lr * 0.1 ** (step // (5 * steps_per_epoch))


# ----------------------------------------------------------------------------------------------------------------------
# evaluation


@torch.no_grad()
def predict(gaze, faces, cfg, rank, world, device, autocast):
    """Gazes of a whole set, over all processes. Returns float64 arrays in the order of the set: gaze, head, prediction
    (n, 2) in radians, and key (n, 1): the number of the subject, for Gaze360 the row in its file (published)."""
    batches = shard(len(faces), rank, world, cfg.test_batch_size)
    loader = make_loader(faces, batches, cfg.n_workers, collate)
    rows = [torch.empty(0, 7)]
    gaze.eval()
    for batch in tqdm(loader, faces.name, leave=False, disable=rank > 0):
        with autocast:
            prediction = gaze(batch["image"].to(device, non_blocking=True))
        prediction = prediction.float().cpu()
        head = batch["head"].nan_to_num()  # published: zeros where a file has none
        key = batch["row"] if faces.name.startswith("gaze360") else batch["subject"]
        rows.append(torch.cat([batch["gaze"], head, prediction, key.unsqueeze(1)], dim=1))
    gaze.train()

    # process r had faces r, r + world, r + 2 world, …
    table = np.empty((len(faces), 7))
    for r, part in enumerate(run.from_all(torch.cat(rows))):
        table[r::world] = part
    truth, head, prediction, key = np.split(table, [2, 4, 6], axis=1)
    return {"gaze": truth, "head": head, "prediction": prediction, "key": key}


def write_results(folder, epoch, result):
    """The published result files of one set: text, a face per line."""
    folder = Path(folder)
    epoch_folder = folder / f"epoch_{epoch}"
    epoch_folder.mkdir(parents=True, exist_ok=True)
    files = {folder / "gt_gaze.txt": "gaze", folder / "gt_head.txt": "head", folder / "subject_key.txt": "key",
             epoch_folder / "pred_gaze.txt": "prediction"}
    for path, name in files.items():
        with written_whole(path) as temporary:
            np.savetxt(temporary, result[name], delimiter=",")


def evaluate(gaze, sets, cfg, epoch, rank, world, device, autocast):
    """Mean and standard deviation of each set's errors in degrees: ({NAME_deg: mean}, {NAME_std: std}). Prints them
    beside the error of a constant guess, the mean gaze of the set itself, and writes the result files."""
    means = {}
    stds = {}
    for faces in sets:
        result = predict(gaze, faces, cfg, rank, world, device, autocast)
        error = angular_error(result["prediction"], result["gaze"])
        mean = error.mean().item()
        std = error.std(correction=0).item()
        means[f"{faces.name}_deg"] = mean
        stds[f"{faces.name}_std"] = std

        if rank == 0:
            write_results(Path(cfg.out_dir) / "results" / faces.name, epoch, result)
            guess = result["gaze"].mean(axis=0, keepdims=True)
            constant = angular_error(guess, result["gaze"]).mean()
            print(f"{faces.name}, {len(faces)} faces: gaze error mean: {mean:.3f}  -  std: {std:.3f} "
                  f"(a constant guess: {constant:.3f})")
    return means, stds


# ----------------------------------------------------------------------------------------------------------------------


def main():
    cfg = configurator.parse(Config, translate(sys.argv[1:]))
    rank, world, device = run.init_processes(cfg.device)
    run.check_same(**vars(cfg))
    run.stop_on_sigterm()
    out = Path(cfg.out_dir)

    # ---- model
    torch.manual_seed(cfg.seed)  # the same weights on all ranks
    resumed = None
    if cfg.init_from == "resume":
        resumed = load_state(out, cfg, world, {*UniGazeConfig.__dataclass_fields__, "protocol"})
        gaze = build(lambda: UniGaze(cfg.model()))
        assign(gaze, resumed["model"], f"{out}/last.pt")
    elif cfg.ckpt_resume or cfg.init_from != "scratch":
        gaze = UniGaze.from_published(cfg.ckpt_resume or cfg.init_from, cfg.model())
    else:
        gaze = build(lambda: UniGaze(cfg.model()))
    gaze.to(device)
    n_parameters = count_parameters(gaze) / 1e6

    # ---- data. FORK: a set of your own is a line in SETS of unigaze/data.py
    names = protocol(cfg.protocol)
    val_sets = [open_set(cfg.data, name, cfg.image_size) for name in names["val"]]
    test_sets = [open_set(cfg.data, name, cfg.image_size) for name in names["test"]]
    counts = [f"{faces.name} {len(faces)}" for faces in val_sets + test_sets]
    run.check_same(faces_to_test=counts)

    # ---- optimizer
    optimizer = torch.optim.Adam(gaze.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    ddp, sync, autocast, scaler, precision = run.prepare(gaze, optimizer, cfg, world, device, resumed)
    if cfg.mode == "test":
        if rank == 0:
            take_output(out)
        evaluate(gaze, val_sets + test_sets, cfg, 1001, rank, world, device, autocast)  # published: epoch 1001
        run.finish()
        return

    # ---- order of the data: an epoch is as many whole steps as there are
    train = open_sets(cfg.data, names["train"], cfg.image_size)
    run.check_same(training_faces=len(train))
    step_size = cfg.batch_size * cfg.grad_accumulation_steps * world
    per_epoch = len(train) // step_size
    if per_epoch == 0:
        raise ValueError(f"{len(train)} training faces are fewer than a step's {step_size}: lower batch_size")
    total = cfg.steps or cfg.epochs * per_epoch

    start = 0
    best = math.inf
    if resumed:
        start = resumed["step"]
        best = resumed["best"]
    if cfg.ckpt_resume:
        published = read_published(cfg.ckpt_resume)
        if type(published.get("epoch")) is not int or "optimizer" not in published:
            raise ValueError(f"ckpt_resume={cfg.ckpt_resume} holds no epoch or no state of Adam: for weights alone "
                             "there is --init_from")
        start = published["epoch"] * per_epoch
        run.load_optimizer(optimizer, published["optimizer"], cfg.ckpt_resume)
    sampler = StepSampler(len(train), step_size, rank, world, cfg.batch_size, cfg.seed, start, total)
    loader = Feed(make_loader(train, sampler, cfg.n_workers, collate))
    log = Log(cfg, rank, world, device, [
        f"UniGaze, {cfg.image_size} px in patches of {cfg.patch_size}, {n_parameters:.2f} M parameters",
        sampler.arithmetic,
        f"steps {start} to {total}, {per_epoch} an epoch of {len(train)} faces ({', '.join(names['train'])})",
        f"faces to test: {', '.join(counts)}",
        precision], start)

    # ---- loop
    loss_of = F.l1_loss if cfg.loss == "l1" else F.mse_loss
    unreadable = set()
    t0 = time.time()
    for step in range(start, total + 1):
        stop = run.stopping()
        last = step == total
        epoch = step // per_epoch
        epoch_ended = step > 0 and step % per_epoch == 0
        validates = last or epoch_ended and epoch % cfg.valid_epoch == 0
        tests = last or epoch_ended and epoch % cfg.eval_epoch == 0

        # validate, and keep the model with the lowest mean over the sets in best/
        if validates and val_sets and not stop:
            means, stds = evaluate(gaze, val_sets, cfg, epoch, rank, world, device, autocast)
            mean = sum(means.values()) / len(means)
            best = keep_best(gaze, out, mean, best, rank)
            log.write(step, total, step - start, val_deg=mean, **means, **stds)
        if tests and test_sets and not stop:
            means, stds = evaluate(gaze, test_sets, cfg, epoch, rank, world, device, autocast)
            log.write(step, total, step - start, **means, **stds)

        # save
        if (epoch_ended or last or stop or step % cfg.save_every == 0) and rank == 0:
            gaze.save_pretrained(out)
            save_state(out / "last.pt", state_of(step, gaze, optimizer, scaler, best, cfg, world))
        if epoch_ended and epoch % cfg.save_epoch == 0 and rank == 0:
            gaze.save_pretrained(out / f"epoch_{epoch:02d}")
        if last or stop:
            break

        # this step's learning rate: the schedule counts batches, not optimizer steps (published)
        if cfg.scheduler == "OneCycleLR":
            batches = cfg.grad_accumulation_steps
            lr, beta = one_cycle((step + 1) * batches - 1, total * batches, cfg.lr)
        else:
            lr = step_lr(step, per_epoch, cfg.lr)
            beta = 0.9
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["betas"] = (beta, 0.999)

        # which faces skip which blocks, drawn for the whole step: it does not depend on the number of processes
        draws = gaze.vit.draw(step_size, run.shared_generator(cfg.seed, step))
        draws = draws.split(sampler.local)[rank].split(sampler.micro)

        losses = Means()
        keys = []
        for micro in range(sampler.n_micro):
            batch = next(loader)
            keys += batch["key"]
            unreadable.update(batch["unreadable"])
            images = batch["image"].to(device, non_blocking=True)    # (B, 3, S, S)
            target = batch["gaze"].to(device, non_blocking=True)     # (B, 2)
            share = len(images) / sampler.local                      # of this process's faces

            with sync(last=micro == sampler.n_micro - 1):
                with autocast:
                    prediction = ddp(images, draws[micro])
                loss = loss_of(prediction.float(), target)
                scaler.scale(loss * share).backward()
            losses.add(share, loss=loss)

        check_finite(losses.sums["loss"].item(), step, keys)
        run.update(optimizer, scaler)

        if (step + 1) % cfg.log_every == 0:
            ms_per_step = (time.time() - t0) * 1000 / cfg.log_every
            log.write(step + 1, total, step + 1 - start, **losses.read(), lr=lr, epoch=(step + 1) / per_epoch,
                      ms_per_step=ms_per_step, data_ms=loader.waited_ms(cfg.log_every),
                      unreadable=run.count_distinct(unreadable))
            t0 = time.time()
    run.finish()


if __name__ == "__main__":
    run.launch(main, FaceError)
