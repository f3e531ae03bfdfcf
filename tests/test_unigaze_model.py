"""UniGaze's model: parity with the published code (tests/golden/unigaze_tiny, figures it computed), files, angles."""
import argparse
import copy
import json
import math
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from unigaze.model import (
    FaceMAE,
    FaceMAEConfig,
    UniGaze,
    UniGazeConfig,
    angular_error,
    imagenet_normalize,
    load,
    read_published,
    resize_positions,
    to_pitchyaw,
    to_vector,
)

GOLDEN = Path(__file__).parent / "golden" / "unigaze_tiny"
TINY = UniGazeConfig(image_size=32, patch_size=8, hidden_size=32, depth=3, num_heads=2)
TINY_MAE = FaceMAEConfig(32, 8, 32, 3, 2, decoder_hidden_size=16, decoder_depth=2, decoder_num_heads=2)
close = torch.testing.assert_close


def figures(name):
    return json.loads((GOLDEN / name).read_text())


@pytest.fixture(scope="module")
def want():
    return load_file(GOLDEN / "gaze_acts.safetensors")


@pytest.fixture(scope="module")
def want_mae():
    return load_file(GOLDEN / "mae_acts.safetensors")


@pytest.fixture
def gaze():
    return UniGaze.from_published(GOLDEN / "gaze.safetensors", TINY).eval()


@pytest.fixture
def mae():
    return FaceMAE.from_published(GOLDEN / "mae_checkpoint-299.pth", replace(TINY_MAE))


def assert_relative(got, expected, tolerance=1e-5):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def assert_gradients(module, norms, tensors):
    """Gradients of a module: their norms by name, and some whole ones."""
    for name, parameter in module.named_parameters():
        if norms.get(name) is not None:
            assert parameter.grad.norm().item() == pytest.approx(norms[name], rel=1e-4), name
        if f"grad.{name}" in tensors:
            assert_relative(parameter.grad, tensors[f"grad.{name}"], 1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# the gaze model


def test_every_activation_is_the_published_one(gaze, want):
    got = {}
    vit = gaze.vit
    vit.patch_embed.register_forward_hook(lambda m, args, out: got.update(patch_embed=out))
    vit.blocks[0].register_forward_pre_hook(lambda m, args: got.update(tokens=args[0]))
    vit.norm.register_forward_hook(lambda m, args, out: got.update(norm=out, cls=out[:, 0]))
    for i, block in enumerate(vit.blocks):
        block.attn.register_forward_hook(lambda m, args, out, i=i: got.update({f"attn{i}": out}))
        block.register_forward_hook(lambda m, args, out, i=i: got.update({f"block{i}": out}))
    got["pred_gaze"] = gaze(want["input"])
    assert len(got) == 11
    for name, value in got.items():
        assert_relative(value, want[name])


def test_eight_bit_rgb_gives_the_same_as_normalised_pixels(gaze, want):
    assert_relative(gaze(want["rgb"].permute(0, 3, 1, 2)), want["pred_gaze"])


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_losses_and_all_gradients_are_the_published_ones(gaze, want, kind):
    loss_of = F.l1_loss if kind == "l1" else F.mse_loss
    loss = loss_of(gaze(want["input"]), want["target"])
    loss.backward()
    expected = figures("gaze.json")
    assert loss.item() == pytest.approx(expected[f"loss_{kind}"], rel=1e-5)
    norms = {name: norm for name, norm in expected[f"grad_norms_{kind}"].items() if norm is not None}
    assert norms.keys() == dict(gaze.named_parameters()).keys()
    assert_gradients(gaze, norms, want if kind == "l1" else {})


def test_drop_path_rates_are_the_published_ones():
    for key, rates in figures("gaze.json")["drop_path"].items():
        depth, rate = key.replace(", rate", "").removeprefix("depth ").split()
        vit = UniGaze(UniGazeConfig(8, 8, 8, int(depth), 1, float(rate))).vit
        assert [block.drop_path for block in vit.blocks] == pytest.approx(rates, abs=1e-9)


def test_drop_path_skips_both_branches_of_the_faces_drawn(gaze, want):
    gaze.train()
    draws = torch.ones(3, 3, 2)
    draws[1, 2] = 0.0  # face 1 skips the last block
    got = {}
    gaze.vit.blocks[2].register_forward_hook(lambda m, args, out: got.update(before=args[0], after=out))
    gaze(want["input"], draws)
    close(got["after"][1], got["before"][1])
    assert not torch.equal(got["after"][0], got["before"][0])


def test_what_is_left_by_drop_path_keeps_its_mean(gaze, want):
    x = want["block1"]
    block = gaze.vit.blocks[2]
    kept = block(x, torch.ones(3, 2)) - x
    attn = block.attn(block.norm1(x)) / 0.9
    close(kept, attn + block.mlp(block.norm2(x + attn)) / 0.9)


@pytest.mark.parametrize("images, message", [
    (torch.zeros(1, 3, 40, 40, dtype=torch.uint8), r"\(1, 3, 40, 40\), expected \(faces, 3, 32, 32\)"),
    (torch.zeros(3, 32, 32, dtype=torch.uint8), r"\(3, 32, 32\), expected \(faces, 3, 32, 32\)"),
    (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "int64"), (torch.zeros(1, 3, 32, 32).numpy(), "is a ndarray"),
    (torch.full((1, 3, 32, 32), math.nan), "NaN"), (torch.full((1, 3, 32, 32), 255.0), "0..255. Give uint8"),
    (torch.zeros(1, 3, 32, 32, device="meta"), "is on meta, the model on cpu")])
def test_wrong_pictures_are_refused_by_name(gaze, images, message):
    with pytest.raises(ValueError, match=message):
        gaze(images)


def test_pictures_are_cast_to_the_type_of_the_weights(gaze):
    images = torch.randn(2, 3, 32, 32)
    want = gaze(images)
    close(gaze(images.double()), want)
    half = copy.deepcopy(gaze).bfloat16()
    assert (half(images) - want).abs().max() < 0.05 and half(images.byte()).dtype == torch.bfloat16


@pytest.mark.parametrize("sizes", [(32, 5, 32, 3, 2), (32, 8, 30, 3, 4), (32, 8, 32, 0, 2), (32, 8, 32, 3, 0)])
def test_sizes_that_no_model_can_have_are_refused(sizes):
    with pytest.raises(ValueError, match="must be"):
        UniGazeConfig(*sizes)


def test_the_published_sizes_have_the_published_number_of_parameters():
    sizes = {85_798_656: (224, 16, 768, 12, 12), 303_301_632: (224, 16, 1024, 24, 16),
             630_764_800: (224, 14, 1280, 32, 16)}
    for count, size in sizes.items():
        with torch.device("meta"):
            gaze = UniGaze(UniGazeConfig(*size))
        assert sum(p.numel() for p in gaze.vit.parameters()) == count


# ----------------------------------------------------------------------------------------------------------------------
# the masked autoencoder


def test_the_autoencoder_computes_the_published_figures(mae, want_mae):
    latent, mask, restore = mae.encode(want_mae["input"], want_mae["noise"])
    assert_relative(latent, want_mae["latent"])
    close(mask, want_mae["mask"])
    close(restore, want_mae["ids_restore"])
    assert_relative(mae.decode(latent, restore), want_mae["pred"])
    close(mae.patchify(want_mae["input"]), want_mae["patchified"])


@pytest.mark.parametrize("kind", ["norm_pix", "raw_pix"])
def test_the_autoencoders_losses_and_gradients_are_the_published_ones(mae, want_mae, kind):
    mae.config.norm_pix_loss = kind == "norm_pix"
    loss = mae(want_mae["input"], want_mae["noise"])[0]
    loss.backward()
    expected = figures("mae.json")
    assert loss.item() == pytest.approx(expected[f"loss_{kind}"], rel=1e-5)
    assert_gradients(mae, expected[f"grad_norms_{kind}"], want_mae if kind == "norm_pix" else {})


def test_fixed_positions_are_the_published_waves_and_stay(want_mae):
    mae = FaceMAE(TINY_MAE)
    close(mae.pos_embed.data, want_mae["init.pos_embed"])
    close(mae.decoder_pos_embed.data, want_mae["init.decoder_pos_embed"])
    assert not mae.pos_embed.requires_grad and not mae.decoder_pos_embed.requires_grad


def test_a_perfect_prediction_has_no_loss_and_paints_the_face(mae, want_mae):
    images = want_mae["rgb"].permute(0, 3, 1, 2)
    normal = imagenet_normalize(images, 32)
    patches = mae.patchify(normal)
    std = (patches.var(dim=2, keepdim=True) + 1e-6).sqrt()
    perfect = (patches - patches.mean(dim=2, keepdim=True)) / std
    assert mae.loss(normal, perfect, torch.ones(2, 16)) < 1e-10
    close(mae.paint(normal, perfect, torch.ones(2, 16)), images / 255, atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# files


def test_a_trainers_checkpoint_gives_its_weights_and_adam_without_the_unused_head():
    state = read_published(GOLDEN / "trainer_epoch_02.pth.tar")
    gaze = UniGaze.from_published(GOLDEN / "trainer_epoch_02.pth.tar", TINY)
    optimizer = torch.optim.Adam(gaze.parameters())
    optimizer.load_state_dict(state["optimizer"])
    assert state["epoch"] == 2
    for name, parameter in gaze.named_parameters():
        close(parameter.data, state["model"][name])
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape


def test_adam_of_a_checkpoint_written_without_the_head_stays_as_it_is(tmp_path, gaze):
    optimizer = torch.optim.Adam(gaze.parameters())
    gaze(torch.zeros(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    torch.save({"epoch": 1, "model_state": {f"module.{n}": t for n, t in gaze.state_dict().items()},
                "optim_state": optimizer.state_dict(), "schedule_state": {}}, tmp_path / "epoch_01.pth.tar")
    state = read_published(tmp_path / "epoch_01.pth.tar")
    assert state["model"].keys() == gaze.state_dict().keys()
    close(state["optimizer"]["state"], optimizer.state_dict()["state"])

    for shape in ((17,), (1, 1, 16), (1, 8, 16)):
        torch.save(gaze.state_dict() | {"vit.pos_embed": torch.zeros(shape)}, tmp_path / "odd.pt")
        with pytest.raises(ValueError, match="odd.pt: position embeddings are"):
            UniGaze.from_published(tmp_path / "odd.pt", gaze.config)

    torch.save({"model_state": gaze.state_dict(), "optim_state": {"param_groups": []}}, tmp_path / "epoch_01.pth.tar")
    with pytest.raises(ValueError, match="epoch_01.pth.tar is cut off or no file of weights"):
        read_published(tmp_path / "epoch_01.pth.tar")


def test_a_schedule_that_holds_a_function_is_read_without_running_anything():
    state = read_published(GOLDEN / "legacy_schedule.pth.tar")
    assert state["schedule"]["anneal_func"] == "_annealing_cos"
    assert "gaze_fc.weight" in state["model"]


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return print, ("this must not be printed",)
    torch.save({"model_state": {}, "args": Attack()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="bad.pth is cut off or no file of weights"):
        read_published(tmp_path / "bad.pth")


def test_an_autoencoders_file_gives_its_encoder_and_a_fresh_gaze_layer(want_mae):
    torch.manual_seed(0)
    gaze = UniGaze.from_published(GOLDEN / "mae_checkpoint-299.pth", TINY).eval()
    assert_relative(gaze.vit(want_mae["input"])[:, 0], want_mae["gaze_after_load.cls"])
    assert gaze.gaze_fc.weight.abs().sum() > 0
    assert all(p.requires_grad for p in gaze.parameters())


def test_position_embeddings_are_resized_as_published(want_mae):
    for side in (3, 6):
        close(resize_positions(want_mae["resize.in"], side * side), want_mae[f"resize.to_{side}x{side}"])
    larger = UniGazeConfig(48, 8, 32, 3, 2)
    assert UniGaze.from_published(GOLDEN / "gaze.safetensors", larger)(torch.zeros(1, 3, 48, 48)).shape == (1, 2)


def test_sizes_are_read_off_weights_of_a_published_width(tmp_path):
    gaze = UniGaze(UniGazeConfig(28, 14, 1280, 2, 16))
    save_file(gaze.state_dict(), tmp_path / "gaze.safetensors")
    assert UniGaze.from_published(tmp_path / "gaze.safetensors").config == gaze.config
    with pytest.raises(ValueError, match="give config=UniGazeConfig"):
        UniGaze.from_published(GOLDEN / "gaze.safetensors")


def test_saved_folders_come_back_whole(tmp_path, gaze, mae, want):
    gaze.save_pretrained(tmp_path / "gaze")
    again = load(tmp_path / "gaze")
    assert again.config == gaze.config and not again.training
    close(again(want["input"]), gaze(want["input"]))

    mae.save_pretrained(tmp_path / "mae")
    close(FaceMAE.from_published(tmp_path / "mae", TINY_MAE).state_dict(), mae.state_dict())
    close(UniGaze.from_pretrained(tmp_path / "mae").vit.cls_token, mae.cls_token)


def test_the_licence_is_printed_before_a_released_model_is_fetched(monkeypatch, capsys):
    def fetch(hub_id, file, local_files_only):
        assert "MG-NC-RAI-2.0: non-commercial" in capsys.readouterr().out
        raise OSError("no network in a test")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    with pytest.raises(FileNotFoundError, match="UniGaze/UniGaze-models"):
        load("unigaze_h14_joint")


def test_weights_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"gaze.safetensors do not fit: .*vit.blocks.3"):
        UniGaze.from_published(GOLDEN / "gaze.safetensors", UniGazeConfig(32, 8, 32, 4, 2))
    with pytest.raises(ValueError, match=r"gaze_fc.weight is \(2, 32\), the config needs \(2, 64\)"):
        UniGaze.from_published(GOLDEN / "gaze.safetensors", UniGazeConfig(32, 8, 64, 3, 2))
    with pytest.raises(FileNotFoundError, match="nothing.pth"):
        UniGaze.from_published(tmp_path / "nothing.pth")
    cut = tmp_path / "cut.pth"
    cut.write_bytes((GOLDEN / "mae_checkpoint-299.pth").read_bytes()[:100_000])
    with pytest.raises(ValueError, match="cut.pth is cut off"):
        UniGaze.from_published(cut, TINY)
    torch.save({"model": {"weight": torch.zeros(2)}, "args": argparse.Namespace(a=1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth holds no UniGaze"):
        UniGaze.from_published(tmp_path / "other.pth")


def test_files_are_mapped_so_that_an_optimizer_in_them_takes_no_memory():
    assert zipfile.is_zipfile(GOLDEN / "mae_checkpoint-299.pth")
    state = read_published(GOLDEN / "trainer_epoch_02.pth.tar")
    sizes = {tensor.untyped_storage().nbytes() for tensor in state["model"].values()}
    assert max(sizes) < 200_000  # each tensor maps its own part of the file


# ----------------------------------------------------------------------------------------------------------------------
# angles


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def test_vectors_and_angles_are_the_published_ones():
    want = figures("angles.json")
    close(to_vector(doubles(want["pitchyaw"])), doubles(want["vector"]), atol=1e-9, rtol=0)
    close(to_pitchyaw(doubles(want["vector"])), doubles(want["back"]), atol=1e-9, rtol=0)
    close(to_pitchyaw(doubles(want["vectors_in"])), doubles(want["pitchyaw_of_vectors"]), atol=1e-9, rtol=0)


def test_errors_in_degrees_are_exact_and_never_nan():
    want = figures("angles.json")
    a = doubles([pair["a"] for pair in want["pairs"]])
    b = doubles([pair["b"] for pair in want["pairs"]])
    exact = doubles([pair["exact_deg"] for pair in want["pairs"]])
    close(angular_error(a, b), exact, atol=2e-6, rtol=0)
    assert not angular_error(a.float(), a.float()).isnan().any()


def test_a_vector_of_length_zero_is_90_degrees_from_all():
    want = figures("angles.json")["zero_vector"]
    close(angular_error(doubles(want["a"]), doubles(want["b"])), doubles(want["reference"]))


def test_a_mirrored_gaze_has_the_opposite_yaw():
    pitchyaw = doubles([[0.2, 0.3]])
    mirrored = to_vector(pitchyaw) * doubles([-1, 1, 1])
    close(to_pitchyaw(mirrored), doubles([[0.2, -0.3]]))
