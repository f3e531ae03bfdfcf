r"""Ask a language model about a video of which it reads only the gazed patches.

    python chat.py --video=my.mp4 --question="What happens?"                  # tiny random models, to show the flow
    python chat.py --video=my.mp4 --question="What happens?" --ckpt=nvidia/AutoGaze \
        --model=HuggingFaceTB/SmolVLM2-500M-Video-Instruct

--model takes a hub id or folder of SmolVLM, Idefics3, LLaVA, LLaVA-OneVision or PaliGemma (mllm.py says how each reads
gazes), --ckpt a gaze model. Frames are spread evenly over the video; their centre square is seen. Prints the answer,
how many tokens were kept, and how long each part took: decode the video, select patches, encode them, prefill (the
prompt's pass through the language model, up to the first new token), generate the rest.
"""
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from data import VideoError, count_frames, decode
from lib import configurator, run
from lib.weights import announce, is_hub_id
from mllm import GazeMLLM
from model import Gaze, GazeConfig


@dataclass
class Config:
    video: str = ""                    # the file to ask about
    question: str = "What happens in this video?"
    model: str | None = None           # language model with a vision tower, folder or hub id; none: a tiny random one
    ckpt: str | None = None            # gaze model, folder or hub id; none: a random one, only without model
    n_frames: int = 16                 # frames to look at, spread evenly
    gazing_ratio: float | None = 0.1   # share of the patch ids that each frame may take
    task_loss_requirement: float | None = None  # a frame is finished when its predicted loss falls to this
    max_new_tokens: int = 64           # of the answer
    batch_size: int = 16               # tiles at once in the gaze model
    device: str = "auto"               # auto | cpu | cuda | mps
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the language model

    def check(self):
        if not self.video:
            raise ValueError("no video given: write --video=my.mp4")
        if self.model is not None and self.ckpt is None:
            raise ValueError("no gaze model given: write --ckpt=out/toy/grpo, or --ckpt=nvidia/AutoGaze (its licence "
                             "is for non-commercial research only)")
        configurator.check_at_least(self, n_frames=1, max_new_tokens=2, batch_size=1)
        if self.gazing_ratio is not None:
            configurator.check_share(self, "gazing_ratio")


# ----------------------------------------------------------------------------------------------------------------------
# models


def tiny_models():
    """A gaze model and a LLaVA-OneVision, tiny and random, whose words are bytes."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
    torch.manual_seed(0)
    gaze = Gaze(GazeConfig(hidden_size=48, num_layers=2))
    vision = dict(model_type="siglip_vision_model", hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                  num_attention_heads=3, image_size=224, patch_size=16, vision_use_head=False)
    text = dict(model_type="llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=258, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = LlavaOnevisionConfig(vision_config=vision, text_config=text, image_token_index=256, video_token_index=257,
                                  vision_feature_layer=-1, vision_feature_select_strategy="full")
    return gaze, LlavaOnevisionForConditionalGeneration(config)


def load_models(cfg):
    """(gaze model, language model, its processor or None)."""
    if cfg.model is None:
        gaze, model = tiny_models()
        print("no --model: a tiny random one shows the flow. Its answer is noise")
        return (gaze if cfg.ckpt is None else Gaze.from_pretrained(cfg.ckpt)), model, None

    from transformers import AutoModelForImageTextToText, AutoProcessor
    if not Path(cfg.model).is_dir():
        if not is_hub_id(cfg.model):
            raise FileNotFoundError(f"model={cfg.model}: neither a folder nor a hub id")
        announce(cfg.model)
    gaze = Gaze.from_pretrained(cfg.ckpt)
    model = AutoModelForImageTextToText.from_pretrained(cfg.model, torch_dtype=getattr(torch, cfg.dtype))
    return gaze, model, AutoProcessor.from_pretrained(cfg.model)


def to_ids(question, model, processor):
    """The prompt (1, L') with the image token once, where the video belongs."""
    kind = model.config.model_type
    if processor is None:
        return torch.tensor([[1, 256, *question.encode(), 10]])
    image = processor.tokenizer.decode([model.config.image_token_id])
    if kind == "paligemma":
        return processor.tokenizer(f"{image}<bos>{question}\n", add_special_tokens=False,
                                   return_tensors="pt").input_ids

    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    if kind in ("smolvlm", "idefics3"):  # what their processor writes around a whole picture
        fence = "<fake_token_around_image>"
        text = text.replace(image, f"{fence}<global-img>{image}{fence}")
    return processor.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


# ----------------------------------------------------------------------------------------------------------------------
# the parts and their times


def read_spread(path, n_frames):
    """n_frames frames spread evenly over a video, or all of a shorter one -> (T, 3, H, W) uint8."""
    last = count_frames(path) - 1
    wanted = set(np.linspace(0, last, n_frames).round().astype(int).tolist())
    frames = []
    for _, image in tqdm(decode(path, wanted), total=len(wanted), desc="decode", unit="frame", leave=False):
        frames.append(torch.from_numpy(np.ascontiguousarray(image)))
    return torch.stack(frames).permute(0, 3, 1, 2)


@contextmanager
def timed(seconds, part, device):
    start = run.now(device)
    yield
    seconds[part] = run.now(device) - start


class Clock:
    """Streamer for generate(): when the first new token came. A point for each token goes to the screen."""

    def __init__(self):
        self.n_calls = 0
        self.first = None

    def put(self, ids):
        self.n_calls += 1
        if self.n_calls == 2:  # the first call brings the prompt
            self.first = time.perf_counter()
        print(".", end="", file=sys.stderr, flush=True)

    def end(self):
        print(file=sys.stderr)


@torch.no_grad()
def ask(mllm, frames, ids, cfg, device, seconds):
    """Select, encode, generate. Returns (new ids, length of the prompt, number of tokens of the video)."""
    with timed(seconds, "select", device):
        gazing = mllm.select(frames, cfg.gazing_ratio, cfg.task_loss_requirement, cfg.batch_size)
    with timed(seconds, "encode", device):
        embeds = mllm.embed(frames, gazing, ids.to(device))

    clock = Clock()
    start = run.now(device)
    answer = mllm.generate(embeds, max_new_tokens=cfg.max_new_tokens, do_sample=False, streamer=clock)
    end = run.now(device)
    seconds["prefill"] = clock.first - start
    seconds["generate"] = end - clock.first
    return answer[0], embeds.shape[1], embeds.shape[1] - ids.shape[1] + 1


def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    _, _, device = run.init_processes(cfg.device)
    if not Path(cfg.video).is_file():
        raise FileNotFoundError(f"video={cfg.video}: no such file")
    gaze, model, processor = load_models(cfg)
    mllm = GazeMLLM(model.eval().to(device), gaze.eval().to(device))

    seconds = {}
    with timed(seconds, "decode", device):
        frames = read_spread(cfg.video, cfg.n_frames)
    ids = to_ids(cfg.question, model, processor)
    answer, n_prompt, n_video = ask(mllm, frames, ids, cfg, device, seconds)

    rows, columns = mllm.siglip.grids[-1]
    n_all = len(frames) * rows * columns // mllm.merge ** 2
    print(f"{len(frames)} frames at {mllm.size} px: {n_video} tokens in place of {n_all}, the prompt has {n_prompt}")
    for part, spent in seconds.items():
        print(f"{part:10}{spent:9.3f} s")
    print(f"{len(answer)} tokens, {len(answer) / (seconds['prefill'] + seconds['generate']):.1f} a second")
    if processor is None:
        print(f"answer: {bytes(i for i in answer.tolist() if i < 256)!r}")
    else:
        print(f"answer: {processor.tokenizer.decode(answer, skip_special_tokens=True)}")


if __name__ == "__main__":
    run.launch(main, VideoError)
