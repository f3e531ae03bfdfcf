"""bench.py runs at tiny sizes, and its arithmetic is what torch counts. Nothing here looks at the time."""
import json

import pytest
import torch
from conftest import normal_video, tiny_gaze, tiny_mae
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
from gazing import random_gazing


@pytest.fixture
def run(monkeypatch, tmp_path):
    def run(*args):
        words = ["bench.py", "--quick=true", "--device=cpu", f"--out={tmp_path}/bench.json", *args]
        monkeypatch.setattr("sys.argv", words)
        bench.main()
        return json.loads((tmp_path / "bench.json").read_text())
    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_cases(run, dtype):
    out = run(f"--dtype={dtype}")
    names = [row["case"] for row in out["cases"]]
    for word, n in dict(generate=7, stream=1, NTP=2, SigLIP=4, reward=3, GRPO=3, label=1).items():
        assert sum(word in name for name in names) == n, word
    for row in out["cases"]:
        assert row["seconds"] > 0 and row["mib"] > 0 and row["gflop"] > 0 and row["times_limit"] > 0
    assert dtype in out["about"] and torch.__version__ in out["about"]


def test_only_the_cases_asked_for_run(run):
    out = run("--cases=stream,2 clips at ratio")
    assert [row["case"] for row in out["cases"]] == ["generate 2 clips at ratio 0.1", "stream of 4 frames at ratio 0.1"]


def test_cases_that_fit_none_are_named(run):
    with pytest.raises(ValueError, match="cases='nonsense' is in the name of no case"):
        run("--cases=nonsense")


# ----------------------------------------------------------------------------------------------------------------------
# the counted arithmetic; torch counts attention as if every query saw every key


def counted_by_torch(run):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("frames", [[1], [0, 3]])
def test_arithmetic_of_the_reconstructor(frames):
    mae, n = tiny_mae().freeze(), [3, 1, 5, 2]
    gazing = random_gazing(n, 1, 20)
    sizes, c = n[:frames[-1] + 1], mae.config
    encoder, decoder = [1, *sizes], [1, *(20 if t in frames else k for t, k in enumerate(sizes))]
    unseen = sum(4 * dim * layers * (sum(blocks) ** 2 - bench.block_pairs(blocks)) for dim, layers, blocks in (
        (c.hidden_size, c.num_hidden_layers, encoder), (c.decoder_hidden_size, c.decoder_num_hidden_layers, decoder)))
    got = counted_by_torch(lambda: mae(normal_video(1), gazing, frames))
    assert bench.mae_flops(c, n, frames) + unseen == pytest.approx(got, rel=0.01)


def test_arithmetic_of_the_gaze_model():
    """The count is of every layer for every token, the model may leave out some of the last layer's."""
    gaze, n = tiny_gaze(), [3, 1, 5, 2]
    c, tokens = gaze.config, 4 * 16 + sum(n)
    last = bench.transformer_flops(tokens, tokens * tokens, c.hidden_size, c.intermediate_size, 1, 3)
    unseen = 4 * c.hidden_size * c.num_layers * (tokens ** 2 - tokens * (tokens + 1) // 2)
    limit = bench.gaze_flops(c, n) + unseen
    got = counted_by_torch(lambda: gaze(normal_video(1), random_gazing(n, 1, 20)))
    assert limit - last < got < 1.05 * limit
