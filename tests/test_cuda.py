"""What only a GPU can show; skipped where there is none, and not run on one yet."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import normal_video, tiny_gaze, tiny_mae
from test_pretend_gpu import STAGES

from gazing import to_device
from lib import run

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_gpu_gazes_as_the_cpu_does(cuda_graph):
    gaze, video = tiny_gaze(), normal_video(3)
    want = gaze.generate(video, 0.6)["gazing_pos"]
    gaze.to("cuda")
    for _ in range(3):  # then a graph is recorded and replayed
        got = gaze.generate(video.to("cuda"), 0.6, cuda_graph=cuda_graph)["gazing_pos"]
        assert torch.equal(got.cpu(), want)


def test_losses_in_bfloat16_are_those_of_float32():
    mae, video = tiny_mae().freeze(), normal_video(2)
    gazing = tiny_gaze().generate(video, 0.5)
    _, want = mae(video, gazing, [1, 3])
    mae.to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        _, got = mae(video.to("cuda"), to_device(gazing, "cuda"), [1, 3])
    assert got.mean().item() == pytest.approx(want.mean().item(), rel=1e-3)


def test_every_stage_takes_a_step_and_goes_on(toy, tmp_path):
    for stage in STAGES:
        words = stage.replace("=TOY", f"={toy}").replace("OUT", str(tmp_path)).split()
        commands = [words]
        if words[0].startswith("train"):
            commands.append([*words, "--init_from=resume", "--steps=3"])
        for command in commands:
            done = subprocess.run([sys.executable, *command, "--device=cuda"], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]


def test_one_process_of_nccl(tmp_path):
    """Numbers of Python's travel over gloo, gradients over nccl."""
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert run.all_sum(1, 2.5) == [1, 2.5]
        run.barrier()
        ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1).to("cuda"))
        ddp(torch.ones(2, 3, device="cuda")).sum().backward()
        assert ddp.module.weight.grad.eq(2).all()
    finally:
        dist.destroy_process_group()
