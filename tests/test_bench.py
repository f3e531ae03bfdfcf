"""bench.py runs at tiny sizes, and its arithmetic is what torch counts. Nothing here looks at the time."""
import json

import pytest
import torch
from conftest import normal_video, tiny_gaze, tiny_mae
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
import flops
from gazing import random_gazing

TINY = ["scales=16+32", "patch_size=8", "hidden_size=32", "num_layers=2", "num_heads=4", "intermediate_size=64",
        "num_multi_token_pred=3", "n_frames=4", "mae_hidden_size=32", "mae_num_hidden_layers=2",
        "mae_num_attention_heads=4", "mae_intermediate_size=64", "mae_decoder_hidden_size=32",
        "mae_decoder_num_hidden_layers=2", "mae_decoder_num_attention_heads=4", "mae_decoder_intermediate_size=64",
        "vit_hidden_size=32", "vit_num_hidden_layers=5", "vit_num_attention_heads=4", "vit_intermediate_size=64",
        "clips=1,2", "reward_frames=1,2", "group_size=2", "encoder_sides=32,64", "video_side=64", "repeats=1",
        "matmul=64", "device=cpu"]


def run(monkeypatch, tmp_path, *args):
    threads = torch.get_num_threads()
    monkeypatch.setattr("sys.argv", ["bench.py", *TINY, f"out={tmp_path}/bench.json", *args])
    try:
        bench.main()
    finally:
        torch.set_num_threads(threads)
    return json.loads((tmp_path / "bench.json").read_text())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_cases(monkeypatch, tmp_path, dtype):
    out = run(monkeypatch, tmp_path, f"dtype={dtype}")
    rows = {row["case"]: row for row in out["cases"]}
    for word, n in dict(generate=6, stream=1, NTP=2, encoder=4, decoding=1, reward=4, GRPO=4, label=1).items():
        assert sum(word in name for name in rows) == n, word
    for name, row in rows.items():
        assert row["runs"] == 1 and row["seconds"] >= 0 and row["peak_mib"] > 0 and row["matmul_gflops"] > 0
        assert (row["gflop"] is None) == ("decoding" in name)
    assert rows["generate 2 clips at ratio 0.1"]["gazes_per_frame"] == 2
    assert rows["label search of 1 frames x 1"]["naive_gflop"] >= rows["label search of 1 frames x 1"]["gflop"]
    assert {"command", "commit", "torch", "threads", "clock"} <= out["about"].keys() and out["config"]["seed"] == 666


def test_filter(monkeypatch, tmp_path):
    out = run(monkeypatch, tmp_path, "cases=Stream,decoding")
    assert [row["case"] for row in out["cases"]] == ["stream 1 clip", "decoding a video"]
    with pytest.raises(ValueError, match="cases='nonsense' fits none of: generate 1 clip at ratio 0.1; "):
        run(monkeypatch, tmp_path, "cases=nonsense")


@pytest.mark.parametrize("bad, message", [
    ("clips=1,x", "clips='1,x' must be whole numbers"), ("encoder_sides=40", "multiples of 32"),
    ("reward_frames=9", "more frames than n_frames=4")])
def test_bad_settings(monkeypatch, tmp_path, capsys, bad, message):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, bad)
    assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# the counted arithmetic; torch counts attention as if every query saw every key

def counted_by_torch(run):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("frames", [[1], [0, 3]])
def test_flops_of_the_reconstructor(frames):
    mae, n = tiny_mae().freeze(), [3, 1, 5, 2]
    gazing = random_gazing(n, 1, 20)
    sizes, c = n[:frames[-1] + 1], mae.config
    encoder, decoder = [1, *sizes], [1, *(20 if t in frames else k for t, k in enumerate(sizes))]
    unseen = sum(4 * dim * layers * (sum(blocks) ** 2 - flops.block_pairs(blocks)) for dim, layers, blocks in (
        (c.hidden_size, c.num_hidden_layers, encoder), (c.decoder_hidden_size, c.decoder_num_hidden_layers, decoder)))
    got = counted_by_torch(lambda: mae(normal_video(1), gazing, frames))
    assert flops.mae(c, n, frames) + unseen == pytest.approx(got, rel=0.01)


def test_flops_of_the_gaze_model():
    """The count is of every layer for every token, the model may leave out some of the last layer's."""
    gaze, n = tiny_gaze(), [3, 1, 5, 2]
    c, tokens = gaze.config, 4 * 16 + sum(n)
    last = flops.stack(tokens, tokens * tokens, c.hidden_size, c.intermediate_size, 1, 3)
    unseen = 4 * c.hidden_size * c.num_layers * (tokens ** 2 - tokens * (tokens + 1) // 2)
    limit = flops.gaze(c, n) + unseen
    got = counted_by_torch(lambda: gaze(normal_video(1), random_gazing(n, 1, 20)))
    assert limit - last < got < 1.05 * limit
