"""Do published weights behave here as they are published?

    python verify.py --ckpt=nvidia/AutoGaze --video=autogaze_example_input.mp4
    python verify.py --ckpt=nvidia/AutoGaze --video=… --videomae=bfshi/VideoMAE_AutoGaze     # and its reconstructions

Both are under NVIDIA's licence for non-commercial research only; it is named before anything is fetched. Prints a line
for each thing that is publicly known of them and ends with exit code 1 if one differs. The video is the example of
AutoGaze's code (github.com/NVlabs/AutoGaze): 64 frames of 448 px. Its figures are third parties' measurements.
"""
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from data import VideoError, count_frames, from_model_pixels, read_frames, resize_crop, to_model_pixels
from eval import psnr, ssim
from lib import configurator, run
from lib.log import count_parameters
from lib.weights import LICENCES, download, is_hub_id, published_name
from model import Gaze, GazeConfig
from videomae import VideoMAE, check_fit

N_FRAMES = 64
SLOTS = [198] + [10] * 15           # of each frame of the first clip, at ratio .75 and requirement .7
N_GAZES = 213                       # of these 348 slots, not padded
# (ratio, requirement): mean loss, PSNR in dB and SSIM of the four 16-frame clips; none: not known
QUALITY = {(0.10, None): (1.293, 25.1, 0.838), (0.25, None): (0.925, 27.8, 0.903), (0.50, None): (0.809, 29.0, 0.921),
           (0.75, None): (0.702, 29.6, 0.934), (1.00, None): (0.717, 29.4, 0.927), (0.75, 0.7): (0.940, None, None)}
RATIO_WITH_STOP = 0.053             # gazed at .75 with requirement .7
TOLERANCE = (0.01, 0.15, 0.005)     # of loss, PSNR and SSIM


@dataclass
class Config:
    ckpt: str = "nvidia/AutoGaze"      # gaze model: hub id or folder
    video: str = "autogaze_example_input.mp4"  # the example clip of AutoGaze's code
    videomae: str | None = None        # reconstructor, with perceptual networks: hub id, folder, file; none: skipped
    device: str = "auto"               # auto | cpu | cuda


class Report:
    """A line for each check; how many differ."""

    def __init__(self):
        self.n_checks = 0
        self.n_wrong = 0

    def line(self, name, measured, expected, is_same):
        self.n_checks += 1
        self.n_wrong += not is_same
        if is_same:
            print(f"ok       {name}: {measured}")
        else:
            print(f"DIFFERS  {name}: {measured}, published: {expected}")

    def number(self, name, measured, expected, tolerance=0.0):
        self.line(name, round(measured, 4), expected, abs(measured - expected) <= tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# the checks


def describe_file(folder):
    """Print what identifies the weights. There is no published checksum to compare with."""
    file = Path(folder) / "model.safetensors"
    checksum = hashlib.sha256(file.read_bytes()).hexdigest()
    print(f"note     {file}: SHA-256 {checksum}")
    if file.parent.parent.name == "snapshots":
        print(f"note     revision {file.parent.name}")


def shapes_of(gaze):
    return {published_name(name): tuple(p.shape) for name, p in gaze.state_dict().items()}


def check_tensors(report, gaze):
    with torch.device("meta"):
        published = Gaze(GazeConfig())
    report.number("parameters", count_parameters(gaze), count_parameters(published))

    shapes = shapes_of(gaze)
    expected = shapes_of(published)
    wrong = [name for name in expected if shapes.get(name) != expected[name]]
    report.number("tensors", len(shapes), len(expected))
    report.number("tensors of another name or shape", len(wrong), 0)

    for key in ("scales", "patch_size", "max_num_frames", "num_multi_token_pred"):
        value = getattr(gaze.config, key)
        known = getattr(published.config, key)
        report.line(key, value, known, value == known)
    is_reference = gaze.config.reference_decoding
    report.line("decodes as the published code does", is_reference, True, is_reference)


def check_gazes(report, gaze, video):
    """video (1, 16, 3, 448, 448): the first clip."""
    gazing = gaze.generate(video, 0.75, 0.7, reference=True)
    slots = gazing["num_gazing_each_frame"].tolist()
    report.line("slots of each frame", slots, SLOTS, slots == SLOTS)
    report.number("slots", sum(slots), sum(SLOTS))
    report.number("gazes", int((~gazing["if_padded_gazing"]).sum()), N_GAZES)


@torch.no_grad()
def check_quality(report, gaze, mae, clips):
    """clips (4, 16, 3, 448, 448): mean loss, PSNR and SSIM of their reconstruction at every known ratio."""
    R = gaze.config.image_size
    small = F.interpolate(clips.flatten(0, 1), (R, R), mode="bicubic", align_corners=False)  # as the gaze model does
    small = small.unflatten(0, clips.shape[:2])

    for (ratio, requirement), expected in QUALITY.items():
        measured = []
        gazed = []
        for clip in small.split(1):
            gazing = gaze.generate(clip, ratio, requirement, reference=True)
            painted, loss = mae(clip, gazing, range(clip.shape[1]))
            painted = from_model_pixels(painted)
            pixels = from_model_pixels(clip)
            measured.append(torch.stack([loss.mean(), psnr(painted, pixels).mean(), ssim(painted, pixels).mean()]))
            gazed.append(torch.cat(gazing["gazing_mask"], dim=2).mean())

        setting = f"ratio {ratio:g}"
        if requirement is not None:
            setting += f", requirement {requirement:g}"
            report.number(f"share gazed at {setting}", float(torch.stack(gazed).mean()), RATIO_WITH_STOP, 0.002)
        means = torch.stack(measured).mean(dim=0).tolist()
        for i, name in enumerate(("loss", "PSNR", "SSIM")):
            if expected[i] is not None:
                report.number(f"{name} at {setting}", means[i], expected[i], TOLERANCE[i])


# ----------------------------------------------------------------------------------------------------------------------


def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    _, _, device = run.init_processes(cfg.device)
    for source in (cfg.ckpt, cfg.videomae):
        if source in LICENCES:
            print(f"licence of {source}: {LICENCES[source]}")
    if not Path(cfg.video).is_file():
        raise FileNotFoundError(f"video={cfg.video}: no such file; it is the example input of AutoGaze's code, "
                                "github.com/NVlabs/AutoGaze")

    folder = cfg.ckpt
    if is_hub_id(cfg.ckpt):
        folder = download(cfg.ckpt, ["model.safetensors"])
    gaze = Gaze.from_pretrained(folder).to(device).eval()
    mae = None
    if cfg.videomae is not None:
        mae = VideoMAE.from_pretrained(cfg.videomae, None, "l1+dinov2_reg+siglip2", "1+0.3+0.3").to(device).freeze()
        check_fit(mae, gaze, cfg.ckpt)
    frames = read_frames(cfg.video, N_FRAMES)
    video = to_model_pixels(resize_crop(frames, min(frames.shape[-2:])).to(device))
    clips = video.unflatten(0, (-1, 16))

    report = Report()
    describe_file(folder)
    check_tensors(report, gaze)
    size = tuple(frames.shape[-2:])
    report.line("size of the video", size, (448, 448), size == (448, 448))
    report.number("frames of the video", count_frames(cfg.video), N_FRAMES)
    if gaze.config.max_num_frames < 16:
        print("skipped  gazes and reconstruction: they are of clips of 16 frames")
    else:
        check_gazes(report, gaze, clips[:1])
        if mae is None:
            print("skipped  reconstruction: give --videomae=bfshi/VideoMAE_AutoGaze")
        else:
            check_quality(report, gaze, mae, clips)

    if report.n_wrong:
        raise SystemExit(f"{report.n_wrong} of {report.n_checks} checks differ: {cfg.ckpt} does not behave as "
                         "nvidia/AutoGaze was measured to: other weights, another video, or an error in this code")
    print(f"all {report.n_checks} checks agree with what is published")


if __name__ == "__main__":
    run.launch(main, VideoError)
