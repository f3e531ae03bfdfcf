"""Parity with the published code. tests/golden holds what it computed (fp32, CPU, random weights with clear margins):
gaze.safetensors and tiles.safetensors for the checkpoint model/, videomae.safetensors for videomae_weights.safetensors.

The published code writes log(p + 1e-8) where log p is meant; `log_p` turns ours into theirs."""
import copy
from pathlib import Path

import pytest
import torch
from conftest import tiny_mae
from safetensors.torch import load_file

from data import collate_gaze
from lib.weights import published_name
from model import Gaze
from train_grpo import discounted_advantages, grpo_loss
from train_ntp import ntp_loss
from videomae import VideoMAE

GOLDEN = Path(__file__).parent / "golden"
V = 20
TENSORS = ("gazing_pos", "if_padded_gazing", "num_gazing_each_frame")
close = torch.testing.assert_close


@pytest.fixture(scope="module")
def want():
    return load_file(GOLDEN / "gaze.safetensors")


@pytest.fixture
def gaze():
    return Gaze.from_pretrained(GOLDEN / "model")


def gazing_of(tensors, name):
    return {k: tensors[f"{name}.{k}"] for k in TENSORS}


def log_p(log_prob):
    return torch.log(log_prob.exp() + 1e-8)


def assert_same_gazes(got, expected):
    """Padded slots' ids mean nothing."""
    real = ~expected["if_padded_gazing"]
    assert got["num_gazing_each_frame"].tolist() == expected["num_gazing_each_frame"].tolist()
    assert torch.equal(got["if_padded_gazing"], expected["if_padded_gazing"])
    assert torch.equal(got["gazing_pos"][real], expected["gazing_pos"][real])


def assert_same_gradients(gaze, want, prefix):
    names = {published_name(name): p for name, p in gaze.named_parameters()}
    assert {k for k in want if k.startswith(prefix)} == {prefix + name for name in names}
    for name, p in names.items():
        expected = want[prefix + name]
        assert (p.grad - expected).abs().max() <= 1e-4 * expected.abs().max(), name


# ----------------------------------------------------------------------------------------------------------------------
# gaze model

def test_checkpoint_is_read_as_published(gaze):
    c = gaze.config
    assert c.reference_decoding, "files without our own key are decoded as the published code does"
    assert (c.scales, c.patch_size, c.num_multi_token_pred, c.hidden_size, c.num_layers) == ("16+32", 8, 3, 32, 2)


def test_vision_tokens(gaze, want):
    close(gaze.embed(want["video"])[0], want["embed"], rtol=1e-4, atol=1e-5)


CASES = {"b_ratio04": 0.4, "b_ratio_list": [0.9, 0.2, 0.35, 0.5], "b_ratio1": 1.0, "b_video40": 0.4,
         "b_gen_int7": 7 / V, "b_gen_list": [9 / V, 1 / V, 4 / V, 6 / V]}


@pytest.mark.parametrize("name, ratio", CASES.items())
def test_gazes(gaze, want, name, ratio):
    video = want["video40" if name == "b_video40" else "video"]
    out = gaze.generate(video, gazing_ratio=ratio)
    assert_same_gazes(out, gazing_of(want, name))
    for s, mask in enumerate(out["gazing_mask"]):
        if f"{name}.gazing_mask{s}" in want:
            assert torch.equal(mask, want[f"{name}.gazing_mask{s}"].float())
    exact = gaze.generate(video, gazing_ratio=ratio, reference=False)
    assert not torch.equal(exact["gazing_pos"], out["gazing_pos"]), "exact positions should decide otherwise somewhere"


@pytest.mark.parametrize("name, settings", [
    ("c_req", dict(gazing_ratio=0.75, task_loss_requirement=-3.0)), ("c_reqonly", dict(task_loss_requirement=-6.0))])
def test_early_stopping(gaze, want, name, settings):
    together = gaze.generate(want["video"], **settings)
    for i in range(3):
        expected = gazing_of(want, f"{name}.s{i}")
        assert_same_gazes(gaze.generate(want["video"][i:i + 1], **settings), expected)
        # in a batch as alone (the published code lets clips disturb each other)
        pos, padded = together["gazing_pos"][i], together["if_padded_gazing"][i]
        assert torch.equal(pos[~padded], expected["gazing_pos"][~expected["if_padded_gazing"]])


def test_streaming(gaze, want):
    stream = gaze.stream(3, gazing_ratio=0.4)
    steps = [stream.step(want["video"][:, t])["gazing_pos"] + V * t for t in range(4)]
    assert torch.equal(torch.cat(steps, dim=1), want["e_stream_b_ratio04.gazing_pos"])


@pytest.mark.parametrize("name", ["b_ratio04", "b_ratio_list", "c_req"])
def test_scores(gaze, want, name):
    """c_req has padding in the middle of frames."""
    gazing = gazing_of(want, name)
    log_prob, task_loss = gaze(want["video"], gazing)
    real = ~gazing["if_padded_gazing"]
    close(log_p(log_prob)[real], want[f"d_{name}.log_action_probs"][real], rtol=0, atol=1e-4)
    close(task_loss[real], want[f"d_{name}.task_loss_prediction"][real], rtol=1e-4, atol=1e-4)


def test_ntp_loss_and_gradients(gaze, want):
    gazing = gazing_of(want, "f_gt") | {"task_losses": want["f_gt.task_losses"]}
    real = ~gazing["if_padded_gazing"]
    log_prob, task_loss = gaze(want["video"], gazing)
    close(log_p(log_prob)[real], want["f.log_action_probs"][real], rtol=0, atol=1e-4)
    nll, error = ntp_loss(log_p(log_prob), task_loss, gazing, real.sum())
    close(nll, want["f_opt1.ntp_loss"].mean(), rtol=1e-4, atol=0)
    close(error, want["f_opt1.task_loss_prediction_loss"].mean(), rtol=1e-4, atol=0)
    (nll + error).backward()
    assert_same_gradients(gaze, want, "f_grad.")


def test_label_collation(want):
    """The published one adds a slot to every frame that is padded for all clips; ours does not, the rest agrees."""
    expected = gazing_of(want, "f_gt") | {"task_losses": want["f_gt.task_losses"]}
    n, real = expected["num_gazing_each_frame"].tolist(), ~expected["if_padded_gazing"]
    ends = expected["num_gazing_each_frame"].cumsum(0)

    def as_lists(x):
        return [[values[keep].tolist() for values, keep in zip(row.split(n), r.split(n), strict=True)]
                for row, r in zip(x, real, strict=True)]
    got = collate_gaze(as_lists(expected["gazing_pos"]), as_lists(expected["task_losses"]), V)
    keep = torch.ones(int(ends[-1]), dtype=torch.bool)
    keep[ends - 1] = False
    assert got["num_gazing_each_frame"].tolist() == (expected["num_gazing_each_frame"] - 1).tolist()
    assert torch.equal(got["if_padded_gazing"], expected["if_padded_gazing"][:, keep])
    assert torch.equal(got["task_losses"], expected["task_losses"][:, keep])


def test_grpo_loss_and_gradients(gaze, want):
    """Four copies of two clips, rewards for frames 1 and 3; the slots of the loss-prediction error are random there."""
    gazing, reward = gazing_of(want, "g_info"), want["g.reward"]
    real = ~gazing["if_padded_gazing"]
    mask = want["g.task_losses_mask"] * real
    group_mean = reward.view(4, 2, 2).mean(0).repeat(4, 1)
    first = discounted_advantages((reward - group_mean)[:, :1], [1], gazing, 0.995)
    close(first, want["g.discounted_adv_reward0"], rtol=1e-4, atol=1e-5)
    advantage = discounted_advantages(reward - group_mean, [1, 3], gazing, 0.995)
    log_prob, task_loss = gaze(want["video"][:2], gazing)
    close(log_p(log_prob)[real], want["g.log_action_probs"][real], rtol=0, atol=1e-4)
    close(task_loss[real], want["g.task_loss_prediction"][real], rtol=1e-4, atol=1e-4)
    loss = grpo_loss(log_p(log_prob), advantage)
    close(loss, want["g_opt1.grpo_loss"].mean(), rtol=1e-4, atol=1e-5)
    close(-advantage.sum(1), want["g_opt1.grpo_loss"], rtol=1e-4, atol=1e-5)
    error = ((task_loss - want["g.task_losses"]) ** 2 * mask).sum(1) / mask.sum(1).mean()
    close(error, want["g_opt1.task_loss_prediction_loss"], rtol=1e-4, atol=0)
    (loss + error.mean()).backward()
    assert_same_gradients(gaze, want, "g_grad.")


@pytest.mark.parametrize("name, scales, patch", [("h_pad", [24, 40], 8), ("h_patch7", "28+56", 7)])
def test_other_scales_and_patch_sizes(gaze, name, scales, patch):
    want = load_file(GOLDEN / "tiles.safetensors")
    video, target = want[f"{name}.video"], dict(gazing_ratio=0.3, target_scales=scales, target_patch_size=patch)
    before, out = video.clone(), gaze.generate(video, **target)
    assert_same_gazes(out, gazing_of(want, name))
    for s, mask in enumerate(out["gazing_mask"]):
        assert torch.equal(mask, want[f"{name}.gazing_mask{s}"].float())
    assert torch.equal(video, before)


# ----------------------------------------------------------------------------------------------------------------------
# reconstructor

@pytest.fixture(scope="module")
def recon():
    return load_file(GOLDEN / "videomae.safetensors")


def load_mae(loss_type="l1", loss_weights="1"):
    return VideoMAE.from_pretrained(
        GOLDEN / "videomae_weights.safetensors", tiny_mae().config, loss_type=loss_type, loss_weights=loss_weights,
        dinov2_reg=GOLDEN / "dinov2_reg", siglip2=GOLDEN / "siglip2")


@pytest.fixture
def mae():
    return load_mae().freeze()


@pytest.mark.parametrize("name, frames", [
    ("f13", [1, 3]), ("f0123", [0, 1, 2, 3]), ("f13", [3, 1]), ("f0123", [3, 2, 1, 0]), ("f0123", [2, 0, 3, 1])])
def test_reconstruction(mae, recon, name, frames):
    gazing = {k: recon[k] for k in TENSORS}
    before = copy.deepcopy(gazing)
    picture, loss = mae(recon["video"], gazing, frames)
    order = [sorted(frames).index(f) for f in frames]
    close(picture, recon[f"l1.{name}.reconstruction"][:, order], rtol=0, atol=2e-4)
    close(loss, recon[f"l1.{name}.reconstruction_loss_each_reconstruction_frame"][:, order], rtol=0, atol=2e-4)
    close(gazing, before, rtol=0, atol=0)


def test_reconstructor_encoder(mae, recon):
    gazing, real, seen = {k: recon[k] for k in TENSORS}, ~recon["if_padded_gazing"], {}
    mae.vit.encoder.layer[0].register_forward_pre_hook(lambda _, args: seen.update(embeddings_out=args[0]))
    mae.vit.layernorm.register_forward_hook(lambda _, args, out: seen.update(encoder_last_hidden_state=out))
    mae(recon["video"], gazing, [3])
    for name, x in seen.items():
        close(x[:, 0], recon[name][:, 0], rtol=1e-4, atol=1e-4)
        close(x[:, 1:][real], recon[name][:, 1:][real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("term", ["l1", "dinov2_reg", "siglip2"])
def test_loss_terms(recon, term):
    """Three pictures, each term alone; the networks come from the file."""
    loss = load_mae(term).loss
    close(loss(recon["loss_pred"], loss.target(recon["loss_target"])), recon[f"loss_{term}"], rtol=1e-4, atol=0)


def test_published_loss_and_gradients(recon):
    mae, gazing = load_mae("l1+dinov2_reg+siglip2", "1+0.3+0.3").train(), {k: recon[k] for k in TENSORS}
    for name, frames in (("f0123", [0, 1, 2, 3]), ("f13", [1, 3])):
        loss = mae(recon["video"], gazing, frames)[1]
        close(loss, recon[f"l1dinosig.{name}.reconstruction_loss_each_reconstruction_frame"], rtol=1e-4, atol=0)
    loss.mean().backward()
    names = [n for n in recon if n.startswith("grad.mae.")]
    for n in names:
        grad = mae.get_parameter(n.removeprefix("grad.mae.")).grad
        assert (grad - recon[n]).abs().max() <= 1e-4 * recon[n].abs().max(), n
    assert len(names) == 4
