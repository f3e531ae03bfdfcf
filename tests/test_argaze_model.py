"""ARGaze's model: parity with the published code (tests/golden/argaze_tiny, figures it computed), streaming, files.

In the figures' names `ref` has the published errors, which compat repeats, and `fix` has not; see the docstrings there.
"""
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from argaze_tiny import tiny_argaze
from safetensors.torch import load_file, save_file

from argaze.model import (
    ARGaze,
    ARGazeConfig,
    block_outputs,
    build_encoder,
    crop,
    position_code,
    published_name,
    region,
    sample_tokens,
)

GOLDEN = Path(__file__).parent / "golden" / "argaze_tiny"
SIZES = dict(image_size=64, decoder_layers=2, decoder_heads=4, decoder_ffn=64, head_widths="16+8")
RANDOM = "random:32x3x4x64"
close = torch.testing.assert_close


@pytest.fixture(scope="module")
def want():
    return load_file(GOLDEN / "tensors.safetensors")


@pytest.fixture(scope="module")
def video(want):  # (B, T, 3, H, W) uint8
    return want["clip"].movedim(1, 2)


def published(variant, **settings):
    own = dict(history=2, heatmap_size=18) if variant == "template" else dict(history=3, heatmap_size=20)
    config = ARGazeConfig(variant=variant, encoder=str(GOLDEN / "vit"), **SIZES | own | settings)
    file = "v1_weights.safetensors" if variant == "template" else "v2_weights.safetensors"
    return ARGaze.from_published(GOLDEN / file, config)


def fresh(seed=0, **settings):
    torch.manual_seed(seed)
    return ARGaze(ARGazeConfig(**SIZES | dict(encoder=RANDOM, heatmap_size=18) | settings)).eval()


def clip(B=2, T=5, seed=0):
    return torch.randint(0, 256, (B, T, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def assert_figure(got, expected):
    close(got, expected.reshape(got.shape), atol=2e-4, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# parity


def test_positions_crops_sampled_tokens_and_regions_are_the_published_ones(want, video):
    close(position_code(4, 32), want["pos"])
    frames = (video[:1, 0].float() / 255).expand(2, -1, -1, -1)
    close(crop(frames, want["crop.centers"][[0, 2]], 0.35, 64), want["crop.out"])
    close(sample_tokens(want["v1.fix.scene"][:, 0], want["crop.centers"][[0, 2]], 0.35), want["sample.out"])
    close(region(want["crop.centers"], 0.25, 16, 4).byte(), want["roi.mask"])
    close(region(want["crop.centers"], 0.25, 16, 16).byte(), want["roi.mask16"])


def test_the_encoders_states_are_those_of_transformers(want):
    encoder = published("template").encoder
    outputs, normed = block_outputs(encoder, want["vit.pixels"])
    close(torch.cat(outputs), want["vit.hidden"][1:], atol=1e-5, rtol=1e-5)
    close(normed[0], want["vit.normed"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant, name", [("template", "v1"), ("twocross", "v2")])
@pytest.mark.parametrize("compat, kind", [(False, "fix"), (True, "ref")])
@pytest.mark.parametrize("last_norm", [False, True])
@torch.no_grad()
def test_free_running_logits_are_the_published_ones(want, video, variant, name, compat, kind, last_norm):
    model = published(variant, compat=compat, last_norm=last_norm, history_values="logits")
    figure = f"{name}.{kind}_normed" if last_norm else f"{name}.{kind}"
    assert_figure(model(video), want[f"{figure}.logits"])
    assert_figure(model(video.float() / 255), want[f"{figure}.logits"])


@torch.no_grad()
def test_history_of_probabilities_is_the_published_choice(want, video):
    assert_figure(published("template")(video), want["v1.fixp.logits"])


@pytest.mark.parametrize("name, values", [("fix", "logits"), ("ref", "logits"), ("fixp", "probability")])
@torch.no_grad()
def test_each_steps_scene_template_center_and_history_are_the_published_ones(want, video, name, values):
    model = published("template", compat=name == "ref", history_values=values)
    state, frames = model.start(2), video.float() / 255
    for t in range(4):
        assert_figure(state["center"], want[f"v1.{name}.centers"][t])
        if t in (1, 3):
            assert_figure(model.map_tokens(state["history"]), want[f"v1.{name}.hist"][t // 2])
        if name != "fixp":
            square = crop(frames[:, max(0, t - 1)], state["center"], 0.35, 64)
            assert_figure(model.encode(square), want[f"v1.{name}.tmpl"][t])
            assert_figure(model.encode(frames[:, t]), want[f"v1.{name}.scene"][:, t])
        state = model.step(video[:, t], state)[1]


@pytest.mark.parametrize("name", ["fix", "ref"])
@torch.no_grad()
def test_each_steps_attention_bias_is_the_published_one(want, video, name):
    model = published("twocross", compat=name == "ref")
    state = model.start(2)
    for t in range(4):
        assert_figure(state["history"].flatten(1), want[f"v2.{name}.bias"][t])
        state = model.step(video[:, t], state)[1]


@pytest.mark.parametrize("compat, kind", [(False, "fix"), (True, "ref")])
@torch.no_grad()
def test_teacher_forcing_and_scheduled_sampling_are_the_published_ones(want, video, compat, kind):
    model = published("template", compat=compat, history_values="logits" if compat else "probability")
    points = want["labels"][..., :2]
    assert_figure(model(video, want["gt"], points=points), want[f"v1.tf_{kind}.logits"])
    own = torch.cat([want["ss.use_pred"], want["ss.use_pred_center"].unsqueeze(1)], dim=1)
    assert_figure(model(video, want["gt"], own, points), want[f"v1.ss_{kind}.logits"])


@torch.no_grad()
def test_true_centers_with_predicted_history_are_the_published_ones(want, video):
    own = torch.tensor([[True, True, False]]).expand(4, -1)
    model = published("template", compat=True, history_values="logits")
    assert_figure(model(video, want["gt"], own), want["v1.gtcenter_ref.logits"])


# ----------------------------------------------------------------------------------------------------------------------
# clips and streams

SETTINGS = [dict(), dict(history=0), dict(template="tokens"), dict(template="roi"), dict(template="none"),
            dict(history_values="logits", heatmap_size=20), dict(compat=True),
            dict(variant="twocross", history=5), dict(variant="twocross", history=0, heatmap_size=9),
            dict(scene_layers="-1,1", history=1, decoder_layers=1, head_widths="8+12", heatmap_size=112)]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@torch.no_grad()
def test_a_stream_equals_the_clip(settings):
    model, video = fresh(**settings), clip()
    logits, state = model(video), model.start(2)
    for t in range(5):
        step, state = model.step(video[:, t], state)
        close(step, logits[:, t], atol=1e-5, rtol=0)
    assert logits.shape[2:] == 2 * (model.config.heatmap_size,)


@pytest.mark.parametrize("variant", ["template", "twocross"])
@torch.no_grad()
def test_a_later_frame_never_moves_an_earlier_prediction(variant):
    model, video = fresh(variant=variant), clip()
    other = torch.cat([video[:, :3], clip(seed=1)[:, 3:]], dim=1)
    first, second = model(video), model(other)
    assert torch.equal(first[:, :3], second[:, :3])
    assert not torch.allclose(first[:, 3], second[:, 3])


@pytest.mark.parametrize("variant", ["template", "twocross"])
@torch.no_grad()
def test_what_was_seen_before_moves_a_prediction(variant, video):
    model, other = published(variant, template="none"), video.clone()
    other[:, 0] = 255 - other[:, 0]
    moved = (model(video) - model(other)).abs().amax(dim=(0, 2, 3))
    assert (moved > 1e-4).all()


@pytest.mark.parametrize("variant", ["template", "twocross"])
def test_a_stream_needs_constant_memory(variant):
    model = fresh(variant=variant)
    frame, state = clip(B=1, T=1)[:, 0], model.start(1)

    def elements(state):
        return sum(t.numel() for t in state.values() if t is not None)

    _, state = model.step(frame, state)
    first = elements(state)
    for _ in range(50):
        _, state = model.step(frame, state)
    assert elements(state) == first
    assert not any(t.requires_grad for t in state.values() if t is not None)


def test_step_leaves_the_state_it_was_given_as_it_was():
    model, video = fresh(), clip()
    _, state = model.step(video[:, 0], model.start(2))
    kept = {key: None if t is None else t.clone() for key, t in state.items()}
    model.step(video[:, 1], state)
    assert all(t is None or torch.equal(t, state[key]) for key, t in kept.items())


@torch.no_grad()
def test_all_own_predictions_under_teacher_forcing_are_a_free_run():
    model, video = fresh(), clip()
    own = torch.ones(5, 4, dtype=torch.bool)
    assert torch.equal(model(video, torch.rand(2, 5, 9, 9), own), model(video))


@pytest.mark.parametrize("variant", ["template", "twocross"])
@torch.no_grad()
def test_true_maps_are_read_at_any_size_and_scale(variant):
    model, video, maps = fresh(variant=variant), clip(), torch.rand(2, 5, 12, 8)
    points = torch.rand(2, 5, 2)
    close(model(video, maps, points=points), model(video, maps * 0.01, points=points), atol=1e-5, rtol=0)
    assert not torch.allclose(model(video, maps, points=points), model(video))


@torch.no_grad()
def test_predict_finds_a_peak_and_its_spread():
    logits = torch.full((1, 21, 41), -30.0)
    logits[0, 5, 30] = 30.0
    probability, point, spread = ARGaze.predict(logits)
    close(probability.sum(), torch.tensor(1.0))
    close(point, torch.tensor([[0.75, 0.25]]))
    assert spread.item() < 1e-3 < ARGaze.predict(torch.zeros(1, 21, 41))[2].item()


# ----------------------------------------------------------------------------------------------------------------------
# what is trained


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("settings", SETTINGS + [dict(train_encoder=True, scene_layers="-3,-2")], ids=str)
def test_every_trainable_parameter_gets_a_gradient(settings):
    model = fresh(**settings).train()
    model(clip())[:, :, ::2].square().mean().backward()
    missing = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not missing


def test_a_frozen_encoder_stays_in_evaluation_mode_and_untrained():
    model = fresh().train()
    assert not model.encoder.training and model.decoder_layers.training
    assert not any(name.startswith("encoder.") for name in trainable(model))


def encoder_parts(model):
    return {name.split(".")[1] for name in trainable(model) if name.startswith("encoder.")}


def test_a_trained_encoder_keeps_its_embeddings_and_final_norm_unless_it_is_fresh():
    blocks = encoder_parts(published("twocross", train_encoder=True))
    assert len(blocks) == 1 and not blocks & {"embeddings", "norm"}
    assert encoder_parts(fresh(train_encoder=True)) == blocks | {"embeddings"}


# ----------------------------------------------------------------------------------------------------------------------
# files


@pytest.mark.parametrize("variant", ["template", "twocross"])
def test_a_saved_model_comes_back_without_its_encoders_folder(tmp_path, variant, video):
    model = published(variant)
    model.config.encoder = "a/folder/that/is/gone"
    model.save_pretrained(tmp_path)
    again = ARGaze.from_pretrained(tmp_path)
    assert torch.equal(again(video), model(video))
    assert again.config == model.config and trainable(again) == trainable(model)


@pytest.mark.parametrize("form", ["pyth", "pt", "safetensors"])
def test_a_published_checkpoint_loads_in_every_form(tmp_path, form, video):
    model = published("template")
    tensors = load_file(GOLDEN / "v1_weights.safetensors")
    encoder = {f"encoder.{name}": t for name, t in load_file(GOLDEN / "vit" / "model.safetensors").items()}
    whole = {f"module.{name}": t for name, t in (tensors | encoder).items()}
    path = tmp_path / f"checkpoint.{form}"
    if form == "safetensors":
        save_file(whole, path)
    elif form == "pt":
        torch.save(whole, path)
    else:
        torch.save({"epoch": 3, "model_state": whole, "optimizer_state": {"state": {}}, "cfg": "TRAIN: 1"}, path)
    assert torch.equal(ARGaze.from_published(path, model.config)(video), model(video))


def test_newer_names_of_the_encoder_load_too(tmp_path, video):
    model = published("template")
    tensors = model.state_dict()
    newer = {name.replace("encoder.layer.", "encoder.model.layer."): t for name, t in tensors.items()}
    save_file({name: t.contiguous() for name, t in newer.items()}, tmp_path / "newer.safetensors")
    assert torch.equal(ARGaze.from_published(tmp_path / "newer.safetensors", model.config)(video), model(video))


def test_tensors_that_are_missing_or_left_over_are_named(tmp_path):
    tensors = load_file(GOLDEN / "v1_weights.safetensors")
    tensors["surplus"] = tensors.pop("query_tokens")
    save_file(tensors, tmp_path / "bad.safetensors")
    config = published("template").config
    with pytest.raises(ValueError, match="missing query_tokens.*unexpected surplus"):
        ARGaze.from_published(tmp_path / "bad.safetensors", config)
    with pytest.raises(ValueError, match="holds no encoder"):
        ARGaze.from_published(GOLDEN / "v1_weights.safetensors", replace(config, encoder="random:"))


def test_a_file_that_is_cut_off_is_named(tmp_path):
    path = tmp_path / "cut.pyth"
    torch.save({"model_state": {"a": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="cut.pyth is cut off"):
        ARGaze.from_published(path)


@pytest.mark.parametrize("file, config", [
    ("argaze_v1_keys.txt", ARGazeConfig()),
    ("argaze_v2_keys.txt", ARGazeConfig(variant="twocross", history=5, heatmap_size=96))])
def test_at_the_published_size_names_and_shapes_are_those_of_the_published_checkpoints(file, config):
    lines = [line.split("\t") for line in (GOLDEN / file).read_text().splitlines() if not line.startswith("#")]
    with torch.device("meta"):
        model = ARGaze(config, build_encoder(config, weights=False))
    shapes = {published_name(name): str(tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    assert shapes == dict(lines)


# ----------------------------------------------------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize("bad, message", [
    (torch.zeros(2, 5, 3, 64, 63), "takes"), (torch.zeros(2, 3, 64, 64), "takes"),
    (torch.zeros(2, 0, 3, 64, 64), "takes"),
    (torch.full((1, 1, 3, 64, 64), 255.0), "values of 255 to 255, 0..255. Give uint8"),
    (-torch.ones(1, 1, 3, 64, 64), r"values of -1 to -1. Give uint8, or floats in \[0, 1\]"),
    (torch.full((1, 1, 3, 64, 64), float("nan")), "NaN"), (torch.zeros(1, 1, 3, 64, 64, dtype=torch.int64), "int64"),
    (torch.zeros(1, 1, 3, 64, 64, dtype=torch.complex64), "complex64"),
    (torch.zeros(1, 1, 3, 64, 64, device="meta"), "is on meta, the model on cpu"),
    (torch.zeros(1, 1, 3, 64, 64).numpy(), "is a ndarray, expected a tensor")])
def test_a_video_that_does_not_fit_is_told_so(bad, message):
    model = fresh()
    with pytest.raises(ValueError, match=message):
        model(bad)
    if bad.ndim == 5 and bad.shape[1]:
        with pytest.raises(ValueError, match=message):
            model.step(bad[:, 0], model.start(len(bad)))


def test_a_state_of_other_streams_is_told_so():
    model = fresh()
    with pytest.raises(ValueError, match="2 frames, the state is of 3 streams"):
        model.step(clip()[:2, 0], model.start(3))


@pytest.mark.parametrize("settings", [dict(template="crop"), dict(template="tokens"), dict(template="roi"),
                                      dict(variant="twocross")])
def test_frames_are_cast_to_the_type_of_the_weights(settings):
    model = fresh(**settings).eval()
    want = model(clip())
    got = model.bfloat16()(clip().double() / 255)
    assert (got - want).abs().max() < 0.2 * want.abs().max()


@pytest.mark.parametrize("truth, message", [
    (dict(heatmaps=torch.ones(2, 4, 8, 8)), "of the video's frames"), (dict(own=torch.ones(5, 4)), "need heatmaps"),
    (dict(heatmaps=torch.ones(2, 5, 8, 8), own=torch.ones(5, 3)), r"own is \(5, 3\)")])
def test_truth_that_does_not_fit_is_told_so(truth, message):
    with pytest.raises((AssertionError, ValueError), match=message):
        fresh()(clip(), **truth)


@pytest.mark.parametrize("settings, message", [
    (dict(variant="v3"), "variant='v3'"), (dict(history=-1), "history=-1"), (dict(image_size=60), "multiple of patch"),
    (dict(head_widths="16"), "head_widths='16'"), (dict(scene_layers="last"), "scene_layers='last'"),
    (dict(scene_layers="-9"), "blocks 1 to 3"), (dict(heatmap_size=0), "heatmap_size=0"),
    (dict(decoder_heads=5), "decoder_heads=5"), (dict(encoder="random:64x3"), "4 whole numbers"),
    (dict(template_scale=0.0), "template_scale=0.0")])
def test_settings_that_no_model_can_have_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        fresh(**settings)


@pytest.mark.parametrize("name", ["Dinov2", "Dinov2WithRegisters", "ViT"])
@torch.no_grad()
def test_other_encoders_of_transformers_fit_too(tmp_path, name):
    import transformers
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=56,
                 patch_size=14)
    encoder = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes)).eval()
    encoder.save_pretrained(tmp_path / "vit")
    model = fresh(encoder=str(tmp_path / "vit"), image_size=56, patch_size=14)
    frames = torch.rand(2, 3, 56, 56)
    states = encoder(frames, output_hidden_states=True).hidden_states
    close(block_outputs(model.encoder, frames)[0][0], states[1], atol=1e-5, rtol=1e-5)

    video = torch.randint(0, 256, (1, 2, 3, 56, 56), dtype=torch.uint8)
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(ARGaze.from_pretrained(tmp_path / "model")(video), model(video))


def test_an_encoder_that_is_nowhere_is_named():
    with pytest.raises(FileNotFoundError, match="no/such/folder"):
        fresh(encoder="no/such/folder")


def test_an_encoder_of_another_patch_size_is_told_so():
    with pytest.raises(ValueError, match="--patch_size=16"):
        ARGaze(ARGazeConfig(**SIZES | dict(encoder=str(GOLDEN / "vit"), patch_size=8)))


@pytest.mark.parametrize("change, says", [
    (lambda maps, points: (maps.log(), points), "heatmaps holds NaN or infinity"),
    (lambda maps, points: (-maps, points), "heatmaps has values of"),
    (lambda maps, points: (maps[:, :1], points), r"heatmaps are \(1, 1, 8, 8\), expected \(1, 2, h, w\)"),
    (lambda maps, points: (maps[0], points), "heatmaps are"), (lambda maps, points: (maps.numpy(), points), "ndarray"),
    (lambda maps, points: (maps, points * float("nan")), "points holds NaN"),
    (lambda maps, points: (maps, points * 640), "points has values of.*x and y in 0..1"),
    (lambda maps, points: (maps, points[0]), r"points are \(2, 2\), expected \(1, 2, 2\)")])
def test_wrong_true_maps_and_points_are_named(change, says):
    maps = torch.zeros(1, 2, 8, 8)
    maps[..., 3, 4] = 1
    maps, points = change(maps, torch.full((1, 2, 2), 0.5))
    with pytest.raises(ValueError, match=says):
        tiny_argaze()(torch.zeros(1, 2, 3, 32, 32), maps, points=points)
