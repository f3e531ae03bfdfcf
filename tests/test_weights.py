"""Weight files: what is wrong in them is named before it costs memory, and what is written can be read by others."""
import json
import os
import resource
import stat

import pytest
import torch
import torch.nn as nn
from argaze_tiny import tiny_argaze
from conftest import tiny_gaze, tiny_mae
from safetensors.torch import load_file, save_file

from argaze.model import ARGaze, ARGazeConfig, build_encoder
from lib import weights
from model import Gaze, GazeConfig
from unigaze.model import UniGaze, UniGazeConfig
from videomae import VideoMAE, VideoMAEConfig


def tiny_unigaze():
    torch.manual_seed(0)
    return UniGaze(UniGazeConfig(image_size=16, patch_size=8, hidden_size=16, depth=1, num_heads=2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_that_are_not_finite_are_refused(tmp_path, mae, value, suffix):
    state = {name: t.clone() for name, t in mae.state_dict().items()}
    state["decoder.decoder_pred.weight"][3, 4] = value
    file = tmp_path / f"videomae{suffix}"
    (torch.save if suffix == ".pt" else save_file)(state, file)
    with pytest.raises(ValueError, match=f"videomae{suffix}.*decoder.decoder_pred.weight holds NaN or infinity"):
        VideoMAE.from_pretrained(file, mae.config)


def test_shapes_are_compared_before_memory_is_taken():
    tensors = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"weight is \(3, 2\), the config needs \(10000000, 10000000\)"):
        weights.load_module(lambda: nn.Linear(10 ** 7, 10 ** 7), tensors, "file and config")  # 400 TB


def test_load_module():
    tensors = {"weight": torch.randn(3, 2, dtype=torch.float64), "bias": torch.randn(3)}
    module = weights.load_module(lambda: nn.Linear(2, 3), tensors, "file")
    assert torch.equal(module.weight, tensors["weight"].float())
    assert module.bias.data_ptr() == tensors["bias"].data_ptr(), "not copied"


def test_saved_weights_have_the_mode_of_the_config(tmp_path):
    before = os.umask(0o027)
    try:
        tiny_mae().save_pretrained(tmp_path)
    finally:
        os.umask(before)
    for name in ("config.json", "model.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640


def config_of(folder, change):
    """config.json of a gaze model with one change."""
    tiny_gaze().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("change, key", [
    (lambda c: c.update(gaze_model_config=[1]), "gaze_model_config"),
    (lambda c: c["gaze_model_config"].update(gaze_decoder_config="x"), "gaze_decoder_config"),
    (lambda c: c["gaze_model_config"]["gaze_decoder_config"].update(hidden_size="wide"), "hidden_size='wide'"),
    (lambda c: c["gaze_model_config"]["gaze_decoder_config"].update(rope_scaling=8), "rope_scaling"),
    (lambda c: c["gaze_model_config"]["gaze_decoder_config"].update(num_hidden_layers=None), "num_layers=None"),
    (lambda c: c["gaze_model_config"]["gaze_decoder_config"].pop("rms_norm_eps"), "'rms_norm_eps' is missing"),
    (lambda c: c.update(gazing_ratio_config=0.1), "gazing_ratio_config=0.1"),
    (lambda c: c.update(scales="big"), "scales='big'")])
def test_nonsense_in_a_config_is_named_with_file_and_key(tmp_path, change, key):
    with pytest.raises(ValueError, match=f"config.json: .*{key}"):
        weights.load_gaze(config_of(tmp_path, change), GazeConfig)


@pytest.mark.parametrize("text, message", [
    ('{"hidden_size": "wide"}', "hidden_size='wide'"), ('{"patch_size": 0}', "patch_size=0"), ("[]", "expected an obj"),
    ('{"scales": 5}', "scales=5"), ('{"layer_norm_eps": null}', "layer_norm_eps=None"), ("{", "not valid JSON")])
def test_nonsense_in_a_reconstructor_config(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        VideoMAEConfig.from_file(tmp_path / "config.json")


@pytest.mark.parametrize("make, change, message", [
    (tiny_argaze, {"decoder_ffn": 4_000_000}, "decoder_ffn=4000000 must be a whole number from 1 to"),
    (tiny_argaze, {"decoder_ffn": 1_000_000}, r"do not fit: .*ffn.* is \(32.*needs \(1000000"),
    (tiny_argaze, {"history": 1.5}, "history=1.5"), (tiny_argaze, {"dropout": [1]}, r"dropout=\[1\]"),
    (tiny_argaze, {"encoder_config": 5}, "encoder_config=5 must be an object"),
    (tiny_argaze, {"encoder_config": {"model_type": "none"}}, "config.json.*none"),
    (tiny_unigaze, {"depth": 10 ** 9}, "depth=1000000000 must be a whole number from 1 to 1,000"),
    (tiny_unigaze, {"drop_path": None}, "drop_path=None must be a number"),
    (tiny_unigaze, {"hidden_size": 1_000_000}, r"do not fit: .* is \(.*16\), the config needs")])
def test_sizes_in_a_config_are_compared_before_memory_is_taken(tmp_path, make, change, message):
    make().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message):
        type(make()).from_pretrained(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_a_model_that_memory_cannot_hold_is_refused():
    config = GazeConfig(hidden_size=100_002, num_heads=3, intermediate_size=1_000_000, num_layers=2)
    with pytest.raises(ValueError, match="make a model of .* billion weights, .* GiB; this machine has"):
        weights.build(lambda: Gaze(config))


@pytest.mark.parametrize("change, message", [
    (lambda t: t.to(torch.int32), "is of type torch.int32"),
    (lambda t: t.to(torch.complex64), "is of type torch.complex64"),
    (lambda t: t.to_sparse(), "no file of weights"), (lambda t: t.to("meta"), "no file of weights"),
    (lambda t: torch.zeros(1).expand(10 ** 12), "no file of weights")])
def test_tensors_of_another_kind_are_refused(tmp_path, change, message):
    tensors = tiny_unigaze().state_dict()
    tensors["gaze_fc.weight"] = change(tensors["gaze_fc.weight"])
    torch.save(tensors, tmp_path / "gaze.pt")
    with pytest.raises(ValueError, match=f"gaze.pt.*{message}"):
        UniGaze.from_published(tmp_path / "gaze.pt", tiny_unigaze().config)


def test_saved_weights_are_whole_or_absent(tmp_path, monkeypatch, mae):
    """A crash while writing leaves what was there."""
    mae.save_pretrained(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    monkeypatch.setattr(weights.json, "dumps", lambda *a, **kw: 1 / 0)
    other = tiny_mae(seed=1)
    with pytest.raises(ZeroDivisionError):
        other.save_pretrained(tmp_path)
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("key, value, says", [
    ("num_hidden_layers", 10 ** 9, "num_hidden_layers=1000000000 must be at most 1000"),
    ("hidden_size", "x", "hidden_siz"), ("num_attention_heads", 3, "shape"), ("hidden_act", "none", "none"),
    ("initializer_range", None, "initializer_range"),
    ("pos_embed_jitter", [], "pos_embed_jitter"), ("model_type", "x", "x"), ("rope_theta", "x", "rope_theta")])
def test_networks_that_transformers_cannot_build_are_refused(tmp_path, key, value, says):
    tiny_argaze().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["encoder_config"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json: its encoder_config is damaged.*{says}"):
        ARGaze.from_pretrained(tmp_path)


def test_damaged_networks_of_transformers_are_named(tmp_path):
    encoder = tiny_argaze().encoder

    def load():
        return build_encoder(ARGazeConfig(encoder=str(tmp_path), patch_size=8, image_size=32))
    encoder.save_pretrained(tmp_path)
    assert torch.equal(load().norm.weight, encoder.norm.weight)
    encoder.norm.weight.data[3] = float("nan")
    encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"encoder={tmp_path}: norm.weight holds NaN"):
        load()
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=f"encoder={tmp_path} is damaged"):
        load()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"encoder={tmp_path}: .*model.safetensors"):
        load()


def test_without_network_the_hub_is_not_tried_for_long(monkeypatch):
    def unreachable(address, timeout):
        raise OSError("no network")
    monkeypatch.setattr("socket.create_connection", unreachable)
    with pytest.raises(FileNotFoundError, match="none/of-these: neither a folder here nor in reach.*hf download"):
        Gaze.from_pretrained("none/of-these")
    with pytest.raises(FileNotFoundError, match="encoder=none/of-these: neither a folder .*nor in reach on the hub"):
        build_encoder(ARGazeConfig(encoder="none/of-these"))
