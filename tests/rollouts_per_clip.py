"""train_grpo.py with rollouts drawn clip by clip, from seeds that only the clip and the step give: then any number of
processes and micro-batches sees the same rollouts."""
import zlib

import torch

import train_grpo
from gazing import join_clips, one_clip, to_masks

original = train_grpo.roll_out


def roll_out(gaze, videos, cfg, step, temperature):
    rows = []
    for clip in torch.cat(videos):
        torch.manual_seed(zlib.crc32(clip.numpy().tobytes()) + step)
        rows += original(gaze, [clip[None]], cfg, step, temperature)
    clips = [one_clip(row, g) for g in range(cfg.group_size) for row in rows]
    gazing = join_clips(clips, gaze.config.num_ids)
    return [gazing | {"gazing_mask": to_masks(gazing, gaze.config.ids_per_scale)}]


def main():
    train_grpo.roll_out = roll_out
    train_grpo.main()
