"""How well does a model find gaze? The metrics of the field, baselines, the worst clips, speed.

    python -m argaze.eval --ckpt=out/argaze --root=/data/egtea                       # one split: "test"
    python -m argaze.eval --ckpt=egtea.pyth --root=/data/egtea                       # a published checkpoint
    python -m argaze.eval --ckpt=out/argaze --root=/data/egoexo4d --splits=test,test_ood_site,test_ood_task
    python -m argaze.eval --root=/data/egtea                                         # baselines only

The model runs free, as in use: it sees its own past predictions and never the truth. Means are over all counted frames
of a split (fixations; EgoExo4D: visible gaze), not over batches. Prints a table and writes into out_dir:

    eval.json         every metric of every method and split
    frames_SPLIT.csv  a row per frame: prediction, truth, F1, distance (columns of the published code)
    worst_SPLIT.png   the clips with the largest mean distance: predicted heat map, predicted and true gaze

Baselines: center and random, Gaussians of 5 cells as published; mean, the mean true map of training clips, the best
that knows no picture; last, a Gaussian where gaze really was in the frame before, which no camera without an eye
tracker can know.

Dimension key: B clips, T frames, N counted frames, h x w predicted map, H x W true map, K = 11 thresholds.
"""
if not __package__:
    raise SystemExit("run it from the root of the repository as a module: python -m argaze.eval …")

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

from argaze.data import GazeClips, collate, heatmaps, label_map
from argaze.model import ARGaze, resize, to_probability
from data import VideoError
from lib import configurator, run, video_out
from lib.checkpoint import take_output
from lib.loader import make_loader, shard
from lib.text import write_whole

THRESHOLDS = torch.linspace(0, 0.02, 11, dtype=torch.float64)
LABEL_THRESHOLD = 0.001  # cells of the true map above it are to be found
EPSILON = 1e-6
BLUR = 3.2               # cells, of the Gaussian that AUC is computed with
FIELD_OF_VIEW = 60       # degrees, of the camera that the angular error is told for, in both directions
MEAN_CLIPS = 256         # training clips for the baseline "mean"

COLUMNS = ("f1", "recall", "precision", "threshold", "l2", "l2_mean", "auc", "angle")  # of the table


@dataclass
class Config:
    ckpt: str = ""                # folder written by argaze.train, or a published checkpoint; none: baselines only
    dataset: Literal["auto", "egtea", "ego4d", "egoexo4d"] = "auto"  # auto: by what lies in root
    root: str = "data/argaze_toy" # as downloaded; python -m argaze.data check says what is missing
    splits: str = "test"          # separated by commas
    frames: str = ""              # folder of extracted pictures to read in place of the videos
    out_dir: str = "out/argaze_eval"
    n_frames: int = 8             # clip length (published)
    stride: int = 8               # source frames per clip frame (published)
    max_clips: int = 1000000      # most clips of a split
    label_size: int | None = None # cells per side of the true maps; none: as in the data set's published evaluation
    label_sigma: float | None = None  # their spread in cells; none: the same
    worst: int = 8                # clips drawn in worst_SPLIT.png
    batch_size: int = 8           # clips at once
    n_workers: int = 4            # decoding processes
    seed: int = 0                 # of the random baseline
    device: str = "auto"          # auto | cpu | cuda

    def check(self):
        configurator.check_at_least(self, n_frames=1, stride=1, max_clips=1, label_size=2, worst=1, batch_size=1,
                                    n_workers=0, seed=0)
        configurator.check_above_zero(self, "label_sigma")


# ----------------------------------------------------------------------------------------------------------------------
# metrics of single frames


def stretched_maps(logits):
    """Logits (N, h, w) -> probabilities at the temperature of the loss, stretched to the range 0 to 1 in every map."""
    maps = to_probability(logits, 2)
    low = maps.amin((1, 2), keepdim=True)
    high = maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low + EPSILON)


def last_cell(maps):
    """(2,) x, y of the last cell."""
    h, w = maps.shape[1:]
    return torch.tensor([w - 1, h - 1], device=maps.device)


def most_likely(maps):
    """(N, h, w) -> (N, 2): the cell with the largest value, its x and y in [0, 1]."""
    w = maps.shape[2]
    index = maps.flatten(1).argmax(1)
    cell = torch.stack([index % w, index // w], dim=1)
    return cell / last_cell(maps)


def center_of_mass(maps):
    """(N, h, w) -> (N, 2): x, y in cells, counted from 0."""
    h, w = maps.shape[1:]
    columns = torch.arange(w, device=maps.device).float()
    rows = torch.arange(h, device=maps.device).float()
    x = maps.sum(1) @ columns
    y = maps.sum(2) @ rows
    total = maps.sum((1, 2))
    return torch.stack([x / total, y / total], dim=1)


def overlap(maps, target):
    """Recall (N, K) and precision (N, K) of the cells of maps (N, h, w) above each threshold, against those of the true
    maps (N, H, W)."""
    maps = resize(maps, target.shape[1:])
    true = (target > LABEL_THRESHOLD).flatten(1)
    n_true = true.sum(1)
    recall = []
    precision = []
    for threshold in THRESHOLDS.tolist():
        found = (maps > threshold).flatten(1)
        n_hits = (found & true).sum(1)
        recall.append(n_hits / (n_true + EPSILON))
        precision.append(n_hits / (found.sum(1) + EPSILON))
    return torch.stack(recall, dim=1), torch.stack(precision, dim=1)


def angle(maps, points):
    """(N,) degrees between the directions of the map's center of mass and of points (N, 2)."""
    half = math.radians(FIELD_OF_VIEW / 2)
    depth = 0.5 / math.tan(half)
    n_cells = last_cell(maps) + 1
    center = center_of_mass(maps) / n_cells

    # rays (N, 3) through the picture, which lies `depth` in front of the camera
    predicted = F.pad(center.double() - 0.5, (0, 1), value=depth)
    true = F.pad(points.double() - 0.5, (0, 1), value=depth)
    cosine = F.cosine_similarity(predicted, true, dim=1)
    return cosine.clamp(-1, 1).acos().rad2deg()


def blurred(position, length):
    """(N, length): an impulse at the cell position (N,), blurred; what lies beyond the border is mirrored at it."""
    cells = torch.arange(length, device=position.device)
    mirror_left = -1 - position
    mirror_right = 2 * length - 1 - position
    total = 0
    for image in (position, mirror_left, mirror_right):
        distance = cells - image.double().unsqueeze(1)
        weight = torch.exp(-distance ** 2 / (2 * BLUR ** 2))
        total = total + torch.where(distance.abs() > 4 * BLUR + 0.5, 0, weight)
    return total


def area_under_curve(maps, points, size):
    """(N,) share of cells no more likely than the one of the true gaze, on the grid size = (H, W) of true maps.

    A Gaussian around the map's center of mass takes the place of the map. The published code takes the center of mass
    on the grid h x w and uses it on H x W; here the map is resized first.
    """
    maps = resize(maps, size)
    h, w = size
    center = center_of_mass(maps).round()
    column = blurred(center[:, 0], w)
    row = blurred(center[:, 1], h)
    blob = row.unsqueeze(2) * column.unsqueeze(1)                         # (N, H, W)

    x, y = (points * last_cell(maps)).round().long().T
    label = y * w + x                                                     # (N,), of the flattened map
    values = blob.flatten(1)
    at_label = values.gather(1, label.unsqueeze(1))
    above = values > at_label * (1 + 1e-9)  # cells that are equal by symmetry differ by rounding
    return 1 - above.double().mean(1)


def frame_metrics(logits, points, label_map):
    """{name: tensor (N, ...)} of single frames. logits (N, h, w), points (N, 2) in [0, 1], label_map: keywords of
    heatmaps()."""
    maps = stretched_maps(logits)
    target = heatmaps(points, **label_map)
    recall, precision = overlap(maps, target)
    predicted = most_likely(logits)
    expected = center_of_mass(maps) / last_cell(maps)
    return {
        "recall": recall,
        "precision": precision,
        "predicted": predicted,
        "l2": (predicted - points).norm(dim=1),
        "l2_mean": (expected - points).norm(dim=1),
        "auc": area_under_curve(maps, points, target.shape[1:]),
        "angle": angle(maps, points),
    }


# ----------------------------------------------------------------------------------------------------------------------
# metrics of a set


def f1_score(recall, precision):
    return 2 * recall * precision / (recall + precision + EPSILON)


class Metrics:
    """Means over all counted frames of a set; keeps sums and never maps.

    label_map: keywords of data.heatmaps(), for the published evaluation those of data.label_map().
    """

    def __init__(self, label_map):
        self.label_map = label_map
        # a process without a clip has to send as many numbers as the others
        self.sums = {"recall": torch.zeros_like(THRESHOLDS), "precision": torch.zeros_like(THRESHOLDS)}
        for name in ("l2", "l2_mean", "auc", "angle"):
            self.sums[name] = torch.zeros((), dtype=torch.float64)
        self.n_frames = 0

    def add(self, logits, points, counted):
        """logits (B, T, h, w), points (B, T, 2), counted (B, T) bool. Returns the frame_metrics of all B * T frames."""
        logits = logits.float().flatten(0, 1)
        frames = frame_metrics(logits, points.flatten(0, 1), self.label_map)
        counted = counted.flatten()
        for name in self.sums:
            values = frames[name][counted]
            self.sums[name] += values.double().sum(0).cpu()
        self.n_frames += int(counted.sum())
        return frames

    def read(self):
        """{name: mean} over the frames of all processes, which all have to call it. F1, recall and precision are those
        of the threshold with the best F1; l2 is the distance of the most likely cell, l2_mean that of the expected
        point, angle in degrees. ValueError: no frame was counted."""
        n_frames = int(run.all_sum(self.n_frames)[0])
        if n_frames == 0:
            raise ValueError("no frame of the set has a gaze point that counts: is all of it untracked?")
        means = {}
        for name, total in self.sums.items():
            sums = run.all_sum(*total.flatten().tolist())
            means[name] = torch.tensor(sums, dtype=torch.float64) / n_frames

        # the threshold is chosen once for the whole set
        f1 = f1_score(means["recall"], means["precision"])
        best = int(f1.argmax())
        result = {
            "f1": f1[best].item(),
            "recall": means["recall"][best].item(),
            "precision": means["precision"][best].item(),
            "threshold": THRESHOLDS[best].item(),
        }
        for name in ("l2", "l2_mean", "auc", "angle"):
            result[name] = means[name].item()
        return result | {"n_frames": n_frames}


# ----------------------------------------------------------------------------------------------------------------------
# methods: functions from a batch to logits (B, T, h, w)


def load_model(ckpt, device):
    """A model from a folder written by argaze.train or from a checkpoint of the published code."""
    if Path(ckpt).is_file():
        model = ARGaze.from_published(ckpt)
    else:
        model = ARGaze.from_pretrained(ckpt)
    return model.to(device).eval()


def gaussians(points):
    """The published baselines' maps (B, T, 64, 64) around points, which are used as if they were logits."""
    return heatmaps(points, 64, sigma=5.0, window=None)


def center_baseline(batch):
    return gaussians(torch.full_like(batch["points"], 0.5))


def last_baseline(batch):
    points = batch["points"].roll(1, dims=1)
    points[:, 0] = 0.5
    return gaussians(points)


def random_baseline(seed):
    generator = torch.Generator().manual_seed(seed)

    def method(batch):
        return gaussians(torch.rand(batch["points"].shape, generator=generator))

    return method


def mean_baseline(train):
    """Its probabilities are the mean of the true maps of training clips."""
    total = torch.zeros(64, 64)
    n_clips = min(MEAN_CLIPS, len(train))
    for index in torch.linspace(0, len(train) - 1, n_clips).long().tolist():
        item = train[index]
        points = item["points"][item["counted"]]
        total += heatmaps(points, 64).sum(0)
    probability = total / total.sum()
    logits = 2 * (probability + 1e-8).log()

    def method(batch):
        B, T = batch["points"].shape[:2]
        return logits.expand(B, T, 64, 64)

    return method


# ----------------------------------------------------------------------------------------------------------------------
# one split


def open_split(cfg, split, size):
    return GazeClips(cfg.dataset, cfg.root, split, cfg.n_frames, size, cfg.stride, cfg.frames)


@torch.no_grad()
def measure(cfg, data, methods):
    """({method: metrics}, frames of the last method, keys of the clips) of a split. frames: {name: tensor (N, ...)} of
    all frames in order, as in frame_metrics, with the truth beside."""
    n_clips = min(len(data), cfg.max_clips)
    loader = make_loader(data, shard(n_clips, 0, 1, cfg.batch_size), cfg.n_workers, collate)
    true_maps = label_map(data.dataset, cfg.label_size, cfg.label_sigma)
    metrics = {name: Metrics(true_maps) for name in methods}
    parts = []
    keys = []
    for batch in tqdm(loader, desc="evaluating"):
        for name, method in methods.items():
            frames = metrics[name].add(method(batch), batch["points"], batch["counted"])
        frames["truth"] = batch["points"].flatten(0, 1)
        frames["counted"] = batch["counted"].flatten()
        frames["number"] = batch["frames"].flatten()
        parts.append(frames)
        keys += batch["key"]

    results = {name: sums.read() for name, sums in metrics.items()}
    joined = {}
    for name in parts[0]:
        joined[name] = torch.cat([part[name] for part in parts])
    return results, joined, keys


def write_csv(path, frames, keys, threshold):
    """A row per frame, with the columns of the published code; F1, recall and precision are those at the threshold.

    keys: of the clips, in the order of the frames.
    """
    k = THRESHOLDS.tolist().index(threshold)
    recall = frames["recall"][:, k]
    precision = frames["precision"][:, k]
    f1 = f1_score(recall, precision)
    scores = torch.stack([f1, recall, precision, frames["l2"]], dim=1)
    points = torch.cat([frames["predicted"], frames["truth"]], dim=1)
    n_frames = len(f1) // len(keys)

    lines = ["video_name,frame_idx,clip_index,batch_index,frame_offset,f1,recall,precision,l2,pred_x,pred_y,gt_x,gt_y,"
             "valid,threshold"]
    for i in range(len(f1)):
        clip = i // n_frames
        offset = i % n_frames
        number = int(frames["number"][i])
        counted = int(frames["counted"][i])
        values = scores[i].tolist() + points[i].tolist()
        text = ",".join(f"{value:.6f}" for value in values)
        lines.append(f"{keys[clip]},{number},{clip},0,{offset},{text},{counted},{threshold:.3f}")
    write_whole(path, "\n".join(lines) + "\n")


def find_worst(frames, n_frames, n_worst):
    """[(clip index, mean distance)] of the clips with the largest mean distance over their counted frames."""
    counted = frames["counted"].view(-1, n_frames)
    distance = frames["l2"].view(-1, n_frames)
    n_counted = counted.sum(1).clamp(min=1)
    mean = (distance * counted).sum(1) / n_counted
    order = mean.argsort(descending=True)[:n_worst]
    return [(index, mean[index].item()) for index in order.tolist()]


@torch.no_grad()
def draw_clips(path, data, clips, method):
    """A row of pictures per clip, {name: index in data}: predicted map, predicted point (white), true point (green)."""
    sheet = {}
    side = 128
    for name, index in clips.items():
        batch = collate([data[index]])
        logits = method(batch)[0].float()
        maps = stretched_maps(logits).numpy()
        predicted = most_likely(logits) * (side - 1)
        true = batch["points"][0] * (side - 1)

        pictures = []
        for t, image in enumerate(batch["video"][0]):
            picture = image.permute(1, 2, 0).numpy()
            picture = video_out.resize(picture, side, side)
            picture = video_out.draw_heat(picture, maps[t], opacity=0.5)
            picture = video_out.draw_cross(picture, predicted[t].tolist(), "white", 9)
            if batch["tracked"][0, t]:
                picture = video_out.draw_cross(picture, true[t].tolist(), "lime", 5)
            pictures.append(picture)
        sheet[name] = pictures
    video_out.contact_sheet(path, sheet, legend={"predicted": "white", "true": "lime"}, cell=side)


@torch.no_grad()
def measure_speed(model, device, n_frames, repeats=10):
    """Milliseconds per frame of a stream, and of running the last n_frames anew for each, as in the published demo."""
    R = model.config.image_size
    video = torch.randint(0, 256, (1, n_frames, 3, R, R), dtype=torch.uint8, device=device)
    state = model.start(1)
    for t in range(n_frames):  # from here on the history is full
        _, state = model.step(video[:, t], state)

    start = run.now(device)
    for i in range(repeats):
        _, state = model.step(video[:, i % n_frames], state)
    streaming = (run.now(device) - start) * 1000 / repeats

    start = run.now(device)
    for _ in range(3):
        model(video)
    anew = (run.now(device) - start) * 1000 / 3
    return {"ms_per_frame": streaming, "ms_per_frame_anew": anew, "saved": anew / streaming}


# ----------------------------------------------------------------------------------------------------------------------
# the script


def print_table(split, results, n_clips):
    n_frames = results["center"]["n_frames"]
    print(f"\n{split}: {n_frames:,} counted frames of {n_clips:,} clips")
    header = "".join(f"{column:>11}" for column in COLUMNS)
    print(f"{'':<10}{header}")
    for name, values in results.items():
        row = "".join(f"{values[column]:11.4f}" for column in COLUMNS)
        print(f"{name:<10}{row}")


def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    _, world, device = run.init_processes(cfg.device)
    if world > 1:
        raise ValueError("evaluation runs in one process: start it as python -m argaze.eval …, without torchrun")
    out = Path(cfg.out_dir)
    report = {"config": asdict(cfg), "splits": {}, "worst": {}}

    model = None
    side = 224
    if cfg.ckpt:
        model = load_model(cfg.ckpt, device)
        side = model.config.image_size
    take_output(out)

    def run_model(batch):
        return model(batch["video"].to(device)).cpu()

    # the model comes last: single frames and pictures are its
    methods = {"center": center_baseline, "random": random_baseline(cfg.seed), "last": last_baseline}
    try:
        methods["mean"] = mean_baseline(open_split(cfg, "train", side))
    except (OSError, ValueError) as error:
        print(f"no baseline mean: {error}")
    if model is not None:
        methods["model"] = run_model
    last = list(methods)[-1]

    for split in cfg.splits.split(","):
        # 1. metrics
        data = open_split(cfg, split, side)
        results, frames, keys = measure(cfg, data, methods)
        report["splits"][split] = results
        print_table(split, results, len(keys))

        # 2. single frames and the worst clips
        write_csv(out / f"frames_{split}.csv", frames, keys, results[last]["threshold"])
        worst = find_worst(frames, cfg.n_frames, cfg.worst)
        report["worst"][split] = [(keys[index], distance) for index, distance in worst]
        rows = {}
        for place, (index, distance) in enumerate(worst, 1):
            rows[f"{place}. L2 {distance:.3f}"] = index
        draw_clips(out / f"worst_{split}.png", data, rows, methods[last])
        write_whole(out / "eval.json", json.dumps(report, indent=1))

    # 3. speed
    if model is not None:
        speed = measure_speed(model, device, cfg.n_frames)
        report["speed"] = speed
        print(f"\none stream: {speed['ms_per_frame']:.1f} ms per frame; running the last {cfg.n_frames} frames anew "
              f"for each: {speed['ms_per_frame_anew']:.1f} ms; streaming saves a factor of {speed['saved']:.1f}")
    write_whole(out / "eval.json", json.dumps(report, indent=1))
    print(f"{out}: eval.json, frames_*.csv, worst_*.png")


if __name__ == "__main__":
    run.launch(main, VideoError)
