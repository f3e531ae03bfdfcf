"""Every stage on a GPU that is pretended: tensors of two devices never meet, and the pretence itself is right."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import normal_video, tiny_gaze
from pretend_gpu import MixedDevices, PaperGPU

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("mix", [
    lambda gpu, cpu: gpu + cpu, lambda gpu, cpu: torch.cat([gpu, cpu]), lambda gpu, cpu: gpu.mul_(cpu),
    lambda gpu, cpu: torch.nn.Linear(3, 3).to("cuda")(cpu), lambda gpu, cpu: gpu.numpy(),
    lambda gpu, cpu: gpu.__setitem__(0, cpu), lambda gpu, cpu: gpu.gather(0, cpu.long()),
    lambda gpu, cpu: torch.rand(3, device="cuda", generator=torch.Generator())])
def test_what_a_gpu_refuses(mix):
    with pytest.raises(MixedDevices, match="test_pretend_gpu.py"), PaperGPU():
        mix(torch.ones(3, device="cuda"), torch.ones(3))


def test_what_a_gpu_takes():
    with PaperGPU() as gpu:
        x = torch.ones(3).to("cuda")
        y = (x * torch.tensor(2.0))[torch.tensor([0, 1])]  # numbers and indices may come from the CPU
        module = torch.nn.Linear(2, 2).to("cuda")
        module(y).sum().backward()
        assert y.device.type == module.weight.grad.device.type == "cuda" and y.is_cuda
        assert x.cpu().device.type == torch.ones(3).device.type == "cpu"
        torch.empty(3).copy_(x)
    assert gpu.n_calls > 5


def test_waits_are_counted_by_line():
    with PaperGPU() as gpu:
        x = torch.ones(3, device="cuda")
        for _ in range(4):
            x.sum().item()
        if x.max() > 0:
            x.tolist()
    assert gpu.waits.total() == 6 and gpu.waits.most_common(1)[0][1] == 4
    assert "x.sum().item()" in gpu.waits.most_common(1)[0][0]


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("settings", [
    dict(gazing_ratio=0.6), dict(gazing_ratio=[0.9, 0.2, 0.35, 0.5]), dict(gazing_ratio=0.6, temperature=1.0)])
def test_generate_at_a_ratio_is_never_waited_for(settings, reference):
    """After the one look at the pixels nothing is read from the GPU or sent to it, so a CUDA graph could hold it."""
    gaze, video = tiny_gaze(), normal_video(3)
    want = gaze.generate(video, **settings, reference=reference)
    with PaperGPU() as gpu:
        gaze.to("cuda")
        video = video.to("cuda")
        gpu.copies.clear()
        gpu.waits.clear()
        got = gaze.generate(video, **settings, reference=reference, num_copies=2)
    assert gpu.waits.total() == 1 and "pixels.py" in gpu.waits.most_common(1)[0][0], gpu.waits
    assert not gpu.copies, gpu.copies
    if "temperature" not in settings:
        assert torch.equal(got["gazing_pos"], want["gazing_pos"].repeat(2, 1))


def test_generate_with_a_requirement_is_waited_for_once_per_block():
    with PaperGPU() as gpu:
        gaze, video = tiny_gaze().to("cuda"), normal_video(3).to("cuda")
        gpu.waits.clear()
        gazing = gaze.generate(video, 0.9, torch.linspace(-3, 3, 12).view(3, 4))
    n_blocks = sum(-(-n // 3) for n in gazing["num_gazing_each_frame"].tolist())
    reads = sum(n for line, n in gpu.waits.items() if "model.py" in line)
    assert n_blocks <= reads <= n_blocks + 4, gpu.waits  # a block in which no clip goes on is read and then dropped


SIZES = "--scales=16+32 --patch_size=8 --hidden_size=32 --intermediate_size=64"
RUN = "--n_frames=4 --n_workers=0 --batch_size=4 --micro_batch=2 --val_clips=3 --steps=2 --log_every=1"
STAGES = [
    f"train_videomae.py {SIZES} {RUN} --max_num_frames=4 --num_hidden_layers=1 --num_attention_heads=2 "
    "--decoder_hidden_size=32 --decoder_num_hidden_layers=1 --decoder_num_attention_heads=2 --root=TOY "
    "--decoder_intermediate_size=64 --recon_frames=2 --out_dir=OUT/mae",
    "label.py --root=TOY --videomae=OUT/mae --out=OUT/labels.json --n_frames=4 --ratio_min=0.1",
    f"train_ntp.py {SIZES} {RUN} --root=TOY --labels=OUT/labels.json --videomae=OUT/mae --out_dir=OUT/ntp "
    "--num_layers=1 --num_heads=2 --num_multi_token_pred=3 --mirror=true",
    f"train_grpo.py {RUN} --root=TOY --videomae=OUT/mae --init_from=OUT/ntp --out_dir=OUT/grpo --group_size=3 "
    "--recon_sample_rate=0.5",
    "eval.py --root=TOY --videomae=OUT/mae --models=grpo=OUT/grpo --out_dir=OUT/eval --n_frames=4 --ratios=0.1",
    "show.py --video=TOY/val/000000.mp4 --ckpt=OUT/grpo --videomae=OUT/mae --out=OUT/show",
]


# what the stages above have made being there: no log line, validation at the start and the end only
QUIET = "--log_every=99 --val_every=99 --save_every=99"
STEPS = [
    STAGES[0] + f" {QUIET} --steps=",
    STAGES[2] + f" {QUIET} --steps=",
    STAGES[3] + f" {QUIET} --split=mean --ratio=0.3 --rollout_batch=4 --steps=",
]
ARGAZE = [
    "argaze.train config/toy_argaze.py --root=ARGAZE --out_dir=OUT/argaze --steps=2 --val_every=2 --batch_size=2 "
    "--log_every=1",
    "argaze.eval --root=ARGAZE --ckpt=OUT/argaze --out_dir=OUT/argaze_eval --n_frames=6 --stride=1 --n_workers=0",
    "argaze.show --video=TOY/val/000000.mp4 --ckpt=OUT/argaze --out=OUT/argaze.mp4",
]
UNIGAZE = [
    "unigaze.train_mae config/toy_unigaze_mae.py --data=UNIGAZE --out_dir=OUT/faces --steps=2 --batch_size=4",
    "unigaze.train config/toy_unigaze.py --data=UNIGAZE --init_from=OUT/faces --out_dir=OUT/unigaze --steps=2 "
    "--batch_size=4",
    "unigaze.show --video=TOY/val/000000.mp4 --ckpt=OUT/unigaze --faces=whole --out=OUT/unigaze_show",
]


@pytest.fixture(scope="module")
def toys(toy, tmp_path_factory):
    """Folders of generated data, by the word that stands for each in the commands."""
    folder = tmp_path_factory.mktemp("toys")
    commands = [f"argaze.make_data --out={folder}/argaze --n_train=4 --n_val=2 --n_workers=1",
                f"unigaze.make_data --out={folder}/unigaze --n_faces=18 --n_workers=1"]
    for command in commands:
        subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, check=True, capture_output=True)
    return {"UNIGAZE": f"{folder}/unigaze", "ARGAZE": f"{folder}/argaze", "TOY": str(toy)}


def run_on_paper(toys, tmp_path, stages):
    """One after the other in one process, each with what the ones before it have made. Returns what they print."""
    words = []
    for stage in stages:
        for name, folder in toys.items():
            stage = stage.replace(f"={name}", f"={folder}")
        words += [*stage.replace("OUT", str(tmp_path)).split(), "--device=cuda", "--"]
    done = subprocess.run([sys.executable, "tests/pretend_gpu.py", *words], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("on paper: ") == len(stages)
    return done.stdout


@pytest.mark.parametrize("stages", [ARGAZE, UNIGAZE], ids=["argaze", "unigaze"])
def test_stages_never_mix_devices(toys, tmp_path, stages):
    run_on_paper(toys, tmp_path, stages)


def test_stages_never_mix_devices_and_training_steps_never_wait(toys, tmp_path):
    """A run of six steps waits for the GPU as often as one of two: for its validations and its end. That grad_norm is
    asked where the weights lie is no wait on a GPU; how often the best weights are saved depends on luck."""
    pairs = [steps + n for steps in STEPS for n in "26"]
    printed = run_on_paper(toys, tmp_path, STAGES + pairs)
    waits = []
    for run in printed.split("on paper: ")[len(STAGES):-1]:
        lines = re.findall(r"^ *([0-9]+) (\S+\.py:.*)$", run, re.M)
        waits.append({line: int(n) for n, line in lines if "clip_grad_norm_" not in line and "weights.py" not in line})
    assert len(waits) == len(pairs)
    for short, long in zip(waits[::2], waits[1::2], strict=True):
        assert short == long
