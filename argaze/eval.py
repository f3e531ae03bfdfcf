"""How well does a model find gaze? The metrics of the field, baselines, the worst clips, speed.

    python -m argaze.eval --ckpt=out/argaze --root=/data/egtea                       # one split: "test"
    python -m argaze.eval --ckpt=egtea.pyth --root=/data/egtea                       # a published checkpoint
    python -m argaze.eval --ckpt=out/argaze --root=/data/egoexo4d --splits=test,test_ood_site,test_ood_task
    python -m argaze.eval --root=/data/egtea                                         # baselines only

The model runs free, as in use: it sees its own past predictions and never the truth. Means are over all counted frames
of a split (fixations; EgoExo4D: visible gaze), not over batches. Prints a table and writes into out_dir:

    eval.json         every metric of every method and split
    frames_SPLIT.csv  a row per frame: prediction, truth, F1, distance (columns of the published code)
    worst_SPLIT.png   the clips with the largest mean distance, frame by frame: true and predicted gaze

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

from argaze.data import LABEL_MAPS, GazeClips, collate, heatmaps
from argaze.model import ARGaze
from data import VideoError
from lib import configurator, run, video_out
from lib.checkpoint import write_whole
from lib.loader import make_loader, shard

THRESHOLDS = torch.linspace(0, 0.02, 11, dtype=torch.float64)
LABEL_THRESHOLD = 0.001  # cells of the true map above it are to be found
EPSILON = 1e-6

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
    field_of_view: float = 60.0   # degrees, of the camera that the angular error is told for (published)
    baselines: bool = True        # measure them too
    mean_clips: int = 256         # training clips for the baseline "mean"
    worst: int = 8                # clips on the page of the worst
    batch_size: int = 8           # clips at once
    n_workers: int = 4            # decoding processes
    seed: int = 0                 # of the random baseline
    device: str = "auto"          # auto | cpu | cuda

    def check(self):
        configurator.check_at_least(self, n_frames=1, stride=1, max_clips=1, mean_clips=1, worst=0, batch_size=1,
                                    n_workers=0, seed=0)
        configurator.check_above_zero(self, "field_of_view")


# ----------------------------------------------------------------------------------------------------------------------
# metrics of single frames


def stretched_maps(logits):
    """Logits (N, h, w) -> probabilities at the temperature of the loss, stretched to the range 0 to 1 in every map."""
    maps = (logits.float() / 2).flatten(1).softmax(1).view(logits.shape)
    low = maps.amin((1, 2), keepdim=True)
    high = maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low + EPSILON)


def resize(maps, size):
    if maps.shape[1:] == size:
        return maps
    return F.interpolate(maps.unsqueeze(1), size, mode="bilinear", align_corners=False).squeeze(1)


def center_of_mass(maps):
    """(N, h, w) -> (N, 2): x, y in cells, counted from 0."""
    h, w = maps.shape[1:]
    total = maps.sum((1, 2))
    x = (maps.sum(1) * torch.arange(w, device=maps.device)).sum(1) / total
    y = (maps.sum(2) * torch.arange(h, device=maps.device)).sum(1) / total
    return torch.stack([x, y], dim=1)


def overlap(maps, target):
    """Recall (N, K) and precision (N, K) of the cells of maps (N, h, w) above each threshold, against those of the true
    maps (N, H, W)."""
    maps = resize(maps, target.shape[1:])
    true = (target > LABEL_THRESHOLD).flatten(1)
    recall, precision = [], []
    for threshold in THRESHOLDS.tolist():
        found = (maps > threshold).flatten(1)
        n_hits = (found & true).sum(1).float()
        recall.append(n_hits / (true.sum(1) + EPSILON))
        precision.append(n_hits / (found.sum(1) + EPSILON))
    return torch.stack(recall, dim=1), torch.stack(precision, dim=1)


def angle(maps, points, field_of_view):
    """(N,) degrees between the directions of the map's center of mass and of points (N, 2), for a camera that sees
    `field_of_view` degrees horizontally and vertically."""
    h, w = maps.shape[1:]
    depth = 0.5 / math.tan(math.radians(field_of_view / 2))

    def direction(offset):
        return F.pad(offset.double(), (0, 1), value=depth)

    found = direction(center_of_mass(maps) / torch.tensor([w, h], device=maps.device) - 0.5)
    cosine = F.cosine_similarity(found, direction(points - 0.5), dim=1)
    return torch.rad2deg(cosine.clamp(-1, 1).acos())


def area_under_curve(maps, points, size):
    """(N,) share of cells no more likely than the one of the true gaze, on the grid size = (H, W) of true maps.

    A Gaussian around the map's center of mass takes the place of the map. The published code takes the center of mass
    on the grid h x w and uses it on H x W; here the map is resized first.
    """
    h, w = size
    center = center_of_mass(resize(maps, size)).round()
    label = (points * torch.tensor([w - 1, h - 1], device=maps.device)).round().long()

    def blurred(position, length):
        """(N, length): an impulse, blurred; what would lie beyond the border is mirrored at it."""
        cells = torch.arange(length, device=maps.device)
        total = 0.0
        for image in (position, -1 - position, 2 * length - 1 - position):
            away = (cells - image.unsqueeze(1)).abs().double()
            total = total + torch.exp(-away ** 2 / (2 * 3.2 ** 2)) * (away <= 13)
        return total

    blob = blurred(center[:, 1], h).unsqueeze(2) * blurred(center[:, 0], w).unsqueeze(1)      # (N, H, W)
    at_label = blob[torch.arange(len(blob)), label[:, 1], label[:, 0]]
    above = (blob > at_label[:, None, None] * (1 + 1e-9)).sum((1, 2))
    return 1 - above / (h * w)


def frame_metrics(logits, points, label_map, field_of_view=60.0):
    """{name: tensor (N, ...)} of single frames. logits (N, h, w), points (N, 2) in [0, 1], label_map: keywords of
    heatmaps()."""
    h, w = logits.shape[1:]
    maps = stretched_maps(logits)
    target = heatmaps(points, **label_map)
    recall, precision = overlap(maps, target)

    best = logits.flatten(1).argmax(1)
    column = (best % w) / (w - 1)
    row = (best // w) / (h - 1)
    predicted = torch.stack([column, row], dim=1)
    expected = center_of_mass(maps) / torch.tensor([w - 1, h - 1], device=maps.device)
    return {"recall": recall, "precision": precision, "predicted": predicted,
            "l2": (predicted - points).norm(dim=1), "l2_mean": (expected - points).norm(dim=1),
            "auc": area_under_curve(maps, points, target.shape[1:]),
            "angle": angle(maps, points, field_of_view)}


# ----------------------------------------------------------------------------------------------------------------------
# metrics of a set


def f1_score(recall, precision):
    return 2 * recall * precision / (recall + precision + EPSILON)


class Metrics:
    """Means over all counted frames of a set; keeps sums and never maps.

    dataset gives the true maps of its published evaluation; size, sigma, window: other ones, see data.heatmaps.
    field_of_view: degrees, of the camera that the angular error is told for.
    """

    def __init__(self, dataset="egtea", field_of_view=60.0, **label_map):
        self.label_map = LABEL_MAPS[dataset] | label_map
        self.field_of_view = field_of_view
        self.sums = {}
        self.n_frames = 0

    def add(self, logits, points, counted):
        """logits (B, T, h, w), points (B, T, 2), counted (B, T) bool. Returns the frame_metrics of all B * T frames."""
        frames = frame_metrics(logits.float().flatten(0, 1), points.flatten(0, 1), self.label_map, self.field_of_view)
        counted = counted.flatten()
        for name in ("recall", "precision", "l2", "l2_mean", "auc", "angle"):
            total = frames[name][counted].double().sum(0).cpu()
            self.sums[name] = self.sums.get(name, 0) + total
        self.n_frames += int(counted.sum())
        return frames

    def read(self):
        """{name: mean} over the frames of all processes, which all have to call it. F1, recall and precision are those
        of the threshold with the best F1; l2 is the distance of the most likely cell, l2_mean that of the expected
        point, angle in degrees. ValueError: no frame was counted."""
        n_frames = run.all_sum(self.n_frames)[0]
        if not n_frames:
            raise ValueError("no frame of the set has a gaze point that counts: is all of it untracked?")
        means = {}
        for name, total in self.sums.items():
            means[name] = torch.tensor(run.all_sum(*total.flatten().tolist()), dtype=torch.float64) / n_frames

        f1 = f1_score(means["recall"], means["precision"])
        best = int(f1.argmax())
        return {"f1": f1[best].item(), "recall": means["recall"][best].item(),
                "precision": means["precision"][best].item(), "threshold": THRESHOLDS[best].item(),
                "l2": means["l2"].item(), "l2_mean": means["l2_mean"].item(), "auc": means["auc"].item(),
                "angle": means["angle"].item(), "n_frames": int(n_frames)}


# ----------------------------------------------------------------------------------------------------------------------
# methods: what predicts logits (B, T, h, w) of a batch


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


def make_baselines(cfg, data):
    """{name: function of a batch}."""
    generator = torch.Generator().manual_seed(cfg.seed)

    def center(batch):
        return gaussians(torch.full_like(batch["points"], 0.5))

    def random(batch):
        return gaussians(torch.rand(batch["points"].shape, generator=generator))

    def last(batch):
        points = batch["points"].roll(1, dims=1)
        points[:, 0] = 0.5
        return gaussians(points)

    baselines = {"center": center, "random": random, "last": last}
    try:
        train = open_split(cfg, "train", data.size)
    except (OSError, ValueError) as error:
        print(f"no baseline \"mean\": {error}")
        return baselines

    # a map whose probabilities are the mean of true maps
    total = torch.zeros(64, 64, dtype=torch.float64)
    for index in torch.linspace(0, len(train) - 1, min(len(train), cfg.mean_clips)).long().tolist():
        item = train[index]
        true = heatmaps(item["points"][item["counted"]], 64)
        total += true.double().sum(0)
    logits = 2 * (total / total.sum() + 1e-8).log().float()
    baselines["mean"] = lambda batch: logits.expand(*batch["points"].shape[:2], 64, 64)
    return baselines


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
    metrics = {name: Metrics(data.dataset, cfg.field_of_view) for name in methods}
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
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return results, joined, keys


def write_csv(path, frames, keys, threshold):
    """A row per frame, with the columns of the published code; F1, recall and precision are those at the threshold.

    keys: of the clips, in the order of the frames.
    """
    k = int((THRESHOLDS - threshold).abs().argmin())
    recall = frames["recall"][:, k]
    precision = frames["precision"][:, k]
    numbers = torch.stack([f1_score(recall, precision), recall, precision, frames["l2"]], dim=1)
    numbers = torch.cat([numbers, frames["predicted"], frames["truth"]], dim=1).tolist()
    n_frames = len(numbers) // len(keys)

    lines = ["video_name,frame_idx,clip_index,batch_index,frame_offset,f1,recall,precision,l2,pred_x,pred_y,gt_x,gt_y,"
             "valid,threshold"]
    for i, row in enumerate(numbers):
        clip, offset = divmod(i, n_frames)
        number = int(frames["number"][i])
        texts = ",".join(f"{value:.6f}" for value in row)
        valid = int(frames["counted"][i])
        lines.append(f"{keys[clip]},{number},{clip},0,{offset},{texts},{valid},{threshold:.3f}")
    write_whole(path, "\n".join(lines) + "\n")


def find_worst(frames, n_frames, n_worst):
    """[(mean distance, clip index)] of the clips with the largest mean distance over their counted frames."""
    counted = frames["counted"].view(-1, n_frames)
    distance = frames["l2"].view(-1, n_frames) * counted
    mean = distance.sum(1) / counted.sum(1).clamp(min=1)
    values, indices = mean.topk(min(n_worst, len(mean)))
    return list(zip(values.tolist(), indices.tolist(), strict=True))


@torch.no_grad()
def draw_worst(path, worst, data, method):
    """The worst clips, a row each: the predicted map, the predicted point (red) and the true one (green)."""
    sheet = {}
    for distance, index in worst:
        batch = collate([data[index]])
        logits = method(batch)[0].float().cpu()
        maps = stretched_maps(logits)
        pictures = []
        for t, image in enumerate(batch["video"][0]):
            picture = video_out.draw_heat(image.permute(1, 2, 0).numpy(), maps[t].numpy(), opacity=0.5)
            picture = video_out.resize(picture, 128, 128)
            h, w = maps[t].shape
            row, column = divmod(maps[t].argmax().item(), w)
            predicted = (127 * column / (w - 1), 127 * row / (h - 1))
            picture = video_out.draw_cross(picture, predicted, "red", 6)
            if batch["tracked"][0, t]:
                picture = video_out.draw_cross(picture, (127 * batch["points"][0, t]).tolist(), "lime", 6)
            pictures.append(picture)
        sheet[f"L2 {distance:.2f}"] = pictures
    legend = {"predicted": "red", "true": "lime"}
    video_out.contact_sheet(path, sheet, legend=legend, title="the clips with the largest mean distance", cell=128)


# ----------------------------------------------------------------------------------------------------------------------
# speed


@torch.no_grad()
def measure_speed(model, device, n_frames=8, repeats=10):
    """Milliseconds per frame of a stream, and of running the last n_frames anew for each, as the published demo does."""
    R = model.config.image_size
    video = torch.randint(0, 256, (1, n_frames, 3, R, R), dtype=torch.uint8, device=device)
    state = model.start(1)
    for t in range(n_frames):  # warm-up; from here on the history is full
        _, state = model.step(video[:, t], state)
    model(video)

    start = run.now(device)
    for i in range(repeats):
        _, state = model.step(video[:, i % n_frames], state)
    streaming = (run.now(device) - start) * 1000 / repeats

    repeats = max(1, repeats // 4)
    start = run.now(device)
    for _ in range(repeats):
        model(video)
    anew = (run.now(device) - start) * 1000 / repeats
    return {"ms_per_frame": streaming, "ms_per_frame_anew": anew, "saved": anew / streaming}


# ----------------------------------------------------------------------------------------------------------------------
# the script


def print_table(split, results, n_clips):
    n_frames = next(iter(results.values()))["n_frames"]
    print(f"\n{split}: {n_frames:,} counted frames of {n_clips:,} clips")
    print(" " * 10 + "".join(f"{column:>11}" for column in COLUMNS))
    for name, values in results.items():
        print(f"{name:<10}" + "".join(f"{values[column]:11.4f}" for column in COLUMNS))


def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    _, _, device = run.init_processes(cfg.device)
    out = Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    report = {"config": asdict(cfg), "splits": {}, "worst": {}}

    model = None
    side = 224
    if cfg.ckpt:
        model = load_model(cfg.ckpt, device)
        side = model.config.image_size

    def run_model(batch):
        return model(batch["video"].to(device)).cpu()

    for split in cfg.splits.split(","):
        # 1. what to compare; the model comes last
        data = open_split(cfg, split, side)
        methods = {}
        if cfg.baselines or model is None:
            methods = make_baselines(cfg, data)
        if model is not None:
            methods["model"] = run_model

        # 2. metrics
        results, frames, keys = measure(cfg, data, methods)
        report["splits"][split] = results
        print_table(split, results, len(keys))

        # 3. single frames and the worst clips, of the last method
        last = list(methods)[-1]
        write_csv(out / f"frames_{split}.csv", frames, keys, results[last]["threshold"])
        worst = find_worst(frames, cfg.n_frames, cfg.worst)
        report["worst"][split] = [(keys[index], distance) for distance, index in worst]
        if worst:
            draw_worst(out / f"worst_{split}.png", worst, data, methods[last])

    # 4. speed
    if model is not None:
        speed = measure_speed(model, device, cfg.n_frames)
        report["speed"] = speed
        print(f"\none stream: {speed['ms_per_frame']:.1f} ms per frame; running the last {cfg.n_frames} frames anew for "
              f"each: {speed['ms_per_frame_anew']:.1f} ms; streaming saves a factor of {speed['saved']:.1f}")
    write_whole(out / "eval.json", json.dumps(report, indent=1))
    print(f"{out}: eval.json, frames_*.csv, worst_*.png")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, VideoError) as error:
        raise SystemExit(f"error: {error}") from None
