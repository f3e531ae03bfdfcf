r"""Ask a language model about a video of which it reads only the gazed patches.

    python chat.py --video=my.mp4 --question="What happens?"                  # tiny random models, to show the flow
    python chat.py --video=my.mp4 --question="What happens?" --ckpt=nvidia/AutoGaze \
        --model=HuggingFaceTB/SmolVLM2-500M-Video-Instruct
    python chat.py --video=my.mp4 --random=published --n_frames=64            # random again; times of the real size

--model takes a hub id or folder of SmolVLM, Idefics3, LLaVA, LLaVA-OneVision, PaliGemma (mllm.py says how each reads
gazes) or Qwen-VL (mllm_qwen.py), --ckpt a gaze model. Frames are spread evenly over the video; their centre square is
seen, by a Qwen-VL all of them. Prints the answer, how many tokens were kept, and how long each part took, by the clock
and on the processor: decode the video, select patches, encode them, prefill (the prompt's pass through the language
model, up to the first new token), generate the rest. Its share is of the time to that token.
"""
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from data import VideoError, count_frames, decode, open_video, video_stream
from lib import configurator, run
from lib.log import peak_memory
from lib.weights import announce, is_hub_id
from mllm import GazeMLLM
from mllm_qwen import GazeQwen
from model import Gaze, GazeConfig


@dataclass
class Config:
    video: str = ""                    # the file to ask about
    question: str = "What happens in this video?"
    model: str | None = None           # language model with a vision tower, folder or hub id; none: a tiny random one
    ckpt: str | None = None            # gaze model, folder or hub id; none: a random one, only without model
    random: Literal["tiny", "published"] = "tiny"  # size of the random ones; published: to measure times
    n_frames: int = 16                 # frames to look at, spread evenly
    gazing_ratio: float | None = 0.1   # share of the patch ids that each frame may take
    task_loss_requirement: float | None = None  # a frame is finished when its predicted loss falls to this
    max_new_tokens: int = 64           # of the answer
    max_pixels: int = 448 * 448        # of a frame in a Qwen-VL, which sees it whole; other models have their own size
    batch_size: int = 16               # tiles at once in the gaze model
    device: str = "auto"               # auto | cpu | cuda | mps
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the language model

    def check(self):
        if not self.video:
            raise ValueError("no video given: write --video=my.mp4")
        if self.model is not None and self.ckpt is None:
            raise ValueError("no gaze model given: write --ckpt=out/toy/grpo, or --ckpt=nvidia/AutoGaze (its licence "
                             "is for non-commercial research only)")
        configurator.check_at_least(self, n_frames=1, max_new_tokens=2, max_pixels=1, batch_size=1)
        if self.gazing_ratio is not None:
            configurator.check_share(self, "gazing_ratio")


# ----------------------------------------------------------------------------------------------------------------------
# models


# AutoGaze; SigLIP so400m at 448 px; a language model as large as Qwen2-0.5B
PUBLISHED_VISION = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
                        image_size=448)
PUBLISHED_TEXT = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                      num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True)
TINY_VISION = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, image_size=224)
TINY_TEXT = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=258)


def random_models(size):
    """A gaze model and a LLaVA-OneVision with random weights, whose words are bytes. size: tiny | published."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
    torch.manual_seed(0)
    if size == "tiny":
        gaze = Gaze(GazeConfig(hidden_size=48, num_layers=2))
        vision, text = TINY_VISION, TINY_TEXT
    else:
        gaze = Gaze(GazeConfig())
        vision, text = PUBLISHED_VISION, PUBLISHED_TEXT
    vision = vision | dict(model_type="siglip_vision_model", patch_size=16, vision_use_head=False)
    text = text | dict(model_type="qwen2", pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = LlavaOnevisionConfig(vision_config=vision, text_config=text, image_token_index=256, video_token_index=257,
                                  vision_feature_layer=-1, vision_feature_select_strategy="full")
    return gaze, LlavaOnevisionForConditionalGeneration(config)


def load_models(cfg):
    """(gaze model, language model, its processor or None)."""
    if cfg.model is None:
        gaze, model = random_models(cfg.random)
        print(f"no --model: a random one of {cfg.random} size shows the flow. Its answer is noise")
        if cfg.ckpt is not None:
            gaze = Gaze.from_pretrained(cfg.ckpt)
        return gaze, model.to(getattr(torch, cfg.dtype)), None

    from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
    if not Path(cfg.model).is_dir():
        if not is_hub_id(cfg.model):
            raise FileNotFoundError(f"model={cfg.model}: neither a folder nor a hub id")
        announce(cfg.model)
    gaze = Gaze.from_pretrained(cfg.ckpt)
    model = AutoModelForImageTextToText.from_pretrained(cfg.model, torch_dtype=getattr(torch, cfg.dtype))
    if is_qwen(model):  # its processor needs torchvision for videos, and nothing of it is used here
        return gaze, model, AutoTokenizer.from_pretrained(cfg.model)
    return gaze, model, AutoProcessor.from_pretrained(cfg.model)


def is_qwen(model):
    return model.config.model_type.startswith("qwen")


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


def to_qwen_ids(question, model, tokenizer, keep, times):
    """The prompt (1, L') with a video token for each place of keep (pairs, h, w); times: seconds of the frames."""
    c = model.config
    names = [c.vision_start_token_id, c.video_token_id, c.vision_end_token_id]
    start, token, end = tokenizer.convert_ids_to_tokens(names)
    n_pairs = len(keep)
    if c.model_type == "qwen3_vl":  # reads when each pair was seen, in the middle of it
        n_tokens = keep[0].numel()
        video = ""
        for t in range(n_pairs):
            seconds = (times[2 * t] + times[min(2 * t + 1, len(times) - 1)]) / 2
            video += f"<{seconds:.1f} seconds>{start}{token * n_tokens}{end}"
    else:
        video = start + token * keep.numel() + end
    text = tokenizer.apply_chat_template([{"role": "user", "content": video + question}], add_generation_prompt=True,
                                         tokenize=False)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


# ----------------------------------------------------------------------------------------------------------------------
# the parts and their times


def spread(path, n_frames):
    """Indices of n_frames frames spread evenly over a video, or of all of a shorter one; and when they show, in seconds
    by the average frame rate."""
    last = count_frames(path) - 1
    indices = sorted(set(np.linspace(0, last, n_frames).round().astype(int).tolist()))
    with open_video(path) as container:
        rate = video_stream(container, path).average_rate or 25
    return indices, [i / float(rate) for i in indices]


def chunks(path, indices, n, seconds, device):
    """Yield the frames at these indices, n at a time: (up to n, 3, H, W) uint8."""
    images = decode(path, set(indices))
    with tqdm(total=len(indices), desc="frames", unit="frame", leave=False) as bar:
        while True:
            with timed(seconds, "decode", device):
                frames = [torch.from_numpy(np.ascontiguousarray(image)) for _, image in islice(images, n)]
            if not frames:
                return
            yield torch.stack(frames).permute(0, 3, 1, 2)
            bar.update(len(frames))


def now(device):
    """Seconds by the clock and of this process on the processor, as an array."""
    return np.array([run.now(device), time.process_time()])


@contextmanager
def timed(seconds, part, device):
    start = now(device)
    yield
    seconds[part] = seconds.get(part, 0) + now(device) - start


class Clock:
    """Streamer for generate(): when the first new token came. A point for each token goes to the screen."""

    def __init__(self, device):
        self.device = device
        self.n_calls = 0
        self.first = None

    def put(self, ids):
        self.n_calls += 1
        if self.n_calls == 2:  # the first call brings the prompt
            self.first = now(self.device)
        print(".", end="", file=sys.stderr, flush=True)

    def end(self):
        print(file=sys.stderr)


def look(mllm, video, indices, cfg, device, seconds):
    """Select and encode, chunk by chunk, so that of a long video only tokens are kept. Returns two lists: what tokens()
    and what select() return, frame by frame or token by token, and chunk by chunk."""
    n = mllm.gaze.config.max_num_frames
    n += n % 2  # pairs of frames
    chosen = []
    tokens = []
    for frames in chunks(video, indices, n, seconds, device):
        with timed(seconds, "select", device):
            chosen.append(mllm.select(frames, cfg.gazing_ratio, cfg.task_loss_requirement, cfg.batch_size))
        with timed(seconds, "encode", device):
            tokens += mllm.tokens(frames, chosen[-1])
    return tokens, chosen


@torch.no_grad()
def answer(generate, cfg, device, seconds):
    """generate(**settings) of the language model -> ids of the answer."""
    clock = Clock(device)
    start = now(device)
    ids = generate(max_new_tokens=cfg.max_new_tokens, do_sample=False, streamer=clock)
    end = now(device)
    seconds["prefill"] = clock.first - start
    seconds["generate"] = end - clock.first
    return ids[0]


def print_times(seconds):
    """seconds: of every part, by the clock and on the processor."""
    to_first_token = sum(seconds.values()) - seconds["generate"]
    for part, spent in seconds.items():
        line = f"{part:10}{spent[0]:9.3f} s, on the processor {spent[1]:9.3f} s"
        if part != "generate":
            line += f", {spent[1] / to_first_token[1]:4.0%}"
        print(line)


def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    _, _, device = run.init_processes(cfg.device)
    if not Path(cfg.video).is_file():
        raise FileNotFoundError(f"video={cfg.video}: no such file")
    gaze, model, processor = load_models(cfg)
    gaze.eval().to(device)
    model.eval().to(device)
    indices, times = spread(cfg.video, cfg.n_frames)
    seconds = {}

    if is_qwen(model):
        mllm = GazeQwen(model, gaze, cfg.max_pixels)
        tokens, keep = look(mllm, cfg.video, indices, cfg, device, seconds)
        tokens = torch.stack(tokens)
        keep = torch.cat(keep)
        ids = to_qwen_ids(cfg.question, model, processor, keep, times).to(device)
        step = (times[-1] - times[0]) / max(1, len(times) - 1)
        new_ids = answer(partial(mllm.generate, tokens, keep, ids, 2 * step), cfg, device, seconds)
        n_all = keep.numel()
        n_video = len(tokens)
        n_prompt = ids.shape[1] - n_all + n_video
        tokenizer = processor
    else:
        mllm = GazeMLLM(model, gaze)
        tokens, _ = look(mllm, cfg.video, indices, cfg, device, seconds)
        ids = to_ids(cfg.question, model, processor).to(device)
        embeds = mllm.embed(tokens, ids)
        new_ids = answer(partial(mllm.generate, embeds), cfg, device, seconds)
        rows, columns = mllm.siglip.grids[-1]
        n_all = len(tokens) * rows * columns // mllm.merge ** 2
        n_video = sum(len(frame) for frame in tokens)
        n_prompt = embeds.shape[1]
        tokenizer = None if processor is None else processor.tokenizer

    print(f"{len(indices)} frames: {n_video} tokens in place of {n_all}, the prompt has {n_prompt}")
    print_times(seconds)
    rate = len(new_ids) / (seconds["prefill"] + seconds["generate"])[0]
    print(f"{len(new_ids)} new tokens, {rate:.2f} a second; peak memory {peak_memory(device):.2f} GiB")
    if tokenizer is None:
        print(f"answer: {bytes(i for i in new_ids.tolist() if i < 256)!r}")
    else:
        print(f"answer: {tokenizer.decode(new_ids, skip_special_tokens=True)}")


if __name__ == "__main__":
    run.launch(main, VideoError)
