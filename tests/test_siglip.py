"""The SigLIP encoder fed with gazes: against figures of the published code, and against transformers' own layers."""
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import normal_video, tiny_gaze
from safetensors.torch import load_file

from gazing import all_patches
from siglip import ATTENTION, GazeSigLIP

GOLDEN = Path(__file__).parent / "golden"
close = torch.testing.assert_close
TENSORS = ("gazing_pos", "if_padded_gazing", "num_gazing_each_frame")


@pytest.fixture(scope="module")
def want():
    return load_file(GOLDEN / "gaze_vit.safetensors")


@pytest.fixture
def vit():
    return load()


def load(**settings):
    return GazeSigLIP.from_pretrained(GOLDEN / "gaze_vit", **settings).eval().requires_grad_(False)


def tiny_vit(image_size, patch_size, scales, enlarged=3, **settings):
    from transformers import SiglipVisionConfig, SiglipVisionModel
    torch.manual_seed(0)
    network = SiglipVisionModel(SiglipVisionConfig(
        image_size=image_size, patch_size=patch_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64))
    with torch.no_grad():
        for p in network.parameters():
            if p.dim() > 1:
                p *= enlarged
    return GazeSigLIP(network, scales, **settings).eval().requires_grad_(False)


def random_gazing(V, n_real, seed=0):
    """n_real: for each clip the real slots of each frame; a frame has one slot more than its fullest clip."""
    g = torch.Generator().manual_seed(seed)
    n = [max(row) + 1 for row in zip(*n_real, strict=True)]
    pos = [torch.cat([torch.randperm(V, generator=g)[:k] + V * t for t, k in enumerate(n)]) for _ in n_real]
    padded = [torch.cat([torch.randperm(k, generator=g) >= r for k, r in zip(n, row, strict=True)]) for row in n_real]
    return dict(zip(TENSORS, (torch.stack(pos), torch.stack(padded), torch.tensor(n)), strict=True))


def expected(vit, pixels, gazing):
    """The same in the plainest way, one clip at a time: all patches embedded by transformers, then its own layers under
    an L x L mask over the clip's real slots."""
    out = torch.zeros(*gazing["gazing_pos"].shape, vit.network.config.hidden_size)
    n = gazing["num_gazing_each_frame"]
    frame_of_slot = torch.repeat_interleave(torch.arange(len(n)), n)
    for clip, pos, padded, result in zip(pixels, gazing["gazing_pos"], gazing["if_padded_gazing"], out, strict=True):
        all_patches = torch.cat([
            vit.network.embeddings(F.interpolate(clip, s, mode="bicubic", align_corners=False),
                                   interpolate_pos_encoding=True) for s in vit.scales], dim=1).flatten(0, 1)
        h, frame = all_patches[pos[~padded]].unsqueeze(0), frame_of_slot[~padded]
        order = {"block_causal": frame, "causal": torch.arange(len(frame)), "bidirectional": torch.zeros(len(frame))}
        order = order[vit.attention]
        sees = order.unsqueeze(1) >= order
        if vit.frame_independent:
            sees &= frame.unsqueeze(1) == frame
        mask = torch.zeros(sees.shape).masked_fill(~sees, float("-inf"))[None, None]
        for layer in vit.network.encoder.layers:
            h = layer(h, mask)
            h = h[0] if isinstance(h, tuple) else h  # transformers 4 returns tuples
        result[~padded] = vit.network.post_layernorm(h)[0]
    return out


def later(x, t):
    """x with other pixels from frame t on."""
    return torch.cat([x[:, :t], x[:, t:].flip(-1)], dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# against the published code


@pytest.mark.parametrize("frame_independent", [False, True])
def test_golden(want, frame_independent):
    vit = load(frame_independent=frame_independent)
    assert (vit.scales, vit.patch_size, vit.num_ids, vit.attention) == ([(16, 16), (32, 32)], 8, 20, "block_causal")
    gazing, seen = {k: want[k] for k in TENSORS}, []
    before, real = {k: v.clone() for k, v in gazing.items()}, ~want["if_padded_gazing"]
    vit.network.encoder.layers[0].layer_norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    out = vit(want["video"], gazing)
    close(seen[0], want["embeddings_out"][real], rtol=1e-4, atol=1e-5)  # real slots only: the padded ones are gone
    name = "frame_independent" if frame_independent else "block_causal"
    close(out[real], want[name][real], rtol=1e-4, atol=1e-5)
    assert (out[~real] == 0).all()
    close(gazing, before, rtol=0, atol=0)


def test_golden_other_input_size(vit, want):
    n = int(want["num_gazing_each_frame"][0])
    gazing = {"gazing_pos": want["gazing_pos"][:1, :n], "if_padded_gazing": want["if_padded_gazing"][:1, :n],
              "num_gazing_each_frame": torch.tensor([n])}
    real = ~gazing["if_padded_gazing"]
    close(vit(want["video48"], gazing)[real], want["video48.block_causal"][real], rtol=1e-4, atol=1e-5)


def test_all_patches_of_an_image_are_plain_siglip():
    """One frame, one scale, everything gazed: transformers' own output, pooled one too."""
    from transformers import SiglipVisionModel
    network = SiglipVisionModel.from_pretrained(GOLDEN / "gaze_vit").eval()
    vit, video = GazeSigLIP(network, "32").requires_grad_(False), normal_video(2, 1)
    gazing = dict(zip(TENSORS, (torch.arange(16).expand(2, -1), torch.zeros(2, 16, dtype=torch.bool),
                                torch.tensor([16])), strict=True))
    plain, out = network(video[:, 0]), vit(video, gazing)
    close(out, plain.last_hidden_state, rtol=1e-4, atol=1e-5)
    close(vit.pool(out, gazing), plain.pooler_output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, -3, -2, -1])
def test_features_of_a_layer_are_transformers_hidden_states(layer):
    """layer=-2, norm=False is what NVILA's projector takes."""
    from transformers import SiglipVisionModel
    vit = tiny_vit(32, 8, "32", enlarged=1, frame_independent=True, layer=layer, norm=False)
    video = normal_video(2, 3)
    out = vit(video, all_patches(vit, 2, 3))
    whole = SiglipVisionModel(vit.network.config).eval()
    getattr(whole, "vision_model", whole).load_state_dict(vit.network.state_dict())
    states = whole(video.flatten(0, 1), output_hidden_states=True).hidden_states[layer]
    close(out, states.reshape(out.shape), rtol=1e-5, atol=1e-5)


def test_whole_siglip_with_text(tmp_path, capsys):
    """As SigLIP is published: text and vision in one file, no scales in its config."""
    from transformers import SiglipConfig, SiglipModel
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = SiglipModel(SiglipConfig(text_config=sizes | dict(vocab_size=20, projection_size=16),
                                     vision_config=sizes | dict(image_size=32, patch_size=8))).eval()
    model.save_pretrained(tmp_path)
    vit, video = GazeSigLIP.from_pretrained(tmp_path, scales="16+32").requires_grad_(False), normal_video(1, 2)
    gazing = random_gazing(20, [[4, 3]])
    out = vit(video, gazing)
    close(out, GazeSigLIP(model.vision_model, "16+32")(video, gazing), rtol=0, atol=0)
    close(out, expected(vit, video, gazing), rtol=1e-4, atol=1e-5)
    assert "fetching" not in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# attention


@pytest.mark.parametrize("frame_independent", [False, True])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("n_real", [
    [[4, 3, 2], [1, 5, 2]], [[4, 0, 2], [0, 0, 1]], [[3, 2, 4], [3, 2, 4]], [[18] * 60, [9, 19] * 30]],
    ids=["uneven", "empty frames", "clips alike", "long"])
def test_against_masks(attention, frame_independent, n_real):
    vit = load(attention=attention, frame_independent=frame_independent)
    gazing, video = random_gazing(20, n_real), normal_video(2, len(n_real[0]))
    close(vit(video, gazing), expected(vit, video, gazing), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frame_independent", [False, True])
@pytest.mark.parametrize("attention", ATTENTION)
def test_causality(attention, frame_independent):
    """What a token can see, by changing pixels of later frames, of earlier frames, and of later slots of its frame."""
    vit, video = load(attention=attention, frame_independent=frame_independent), normal_video(1, 3)
    gazing = random_gazing(20, [[4, 5, 6]])
    first, second, third = (~p for p in gazing["if_padded_gazing"].split(gazing["num_gazing_each_frame"].tolist(), 1))
    real = torch.cat([first, second, third], dim=1)

    def changed(new_video=video, new_gazing=gazing):  # of each real slot: does it differ?
        return (vit(new_video, new_gazing) - vit(video, gazing)).abs().amax(-1)[real] > 1e-4
    out = changed(later(video, 2))
    assert out[9:].all() and out[:9].all() == out[:9].any() == (attention == "bidirectional" and not frame_independent)
    out = changed(torch.cat([video[:, :1].flip(-1), video[:, 1:]], dim=1))  # frame 0 alone
    assert out[:4].all() and out[4:].any() == out[4:].all() == (not frame_independent)
    last = real.nonzero()[8]  # the last real slot of frame 1
    pos = gazing["gazing_pos"].clone()
    pos[0, last[1]] = next(i for i in range(20, 40) if i not in pos[0, 5:11])
    out = changed(new_gazing=gazing | {"gazing_pos": pos})
    assert out[8] and out[4:8].all() == out[4:8].any() == (attention != "causal")


@pytest.mark.parametrize("attention", ATTENTION)
def test_padding_and_neighbours_do_not_matter(attention):
    vit, video, gazing = load(attention=attention), normal_video(2, 3), random_gazing(20, [[4, 3, 2], [1, 5, 2]])
    out, padded, n = vit(video, gazing), gazing["if_padded_gazing"], gazing["num_gazing_each_frame"]
    for rubbish in (-1, 20, 10 ** 9):
        other = gazing | {"gazing_pos": gazing["gazing_pos"].masked_fill(padded, rubbish)}
        assert torch.equal(vit(video, other), out)
    more = [F.pad(x, (0, 3), value=True) for x in padded.split(n.tolist(), dim=1)]
    more = {"gazing_pos": torch.cat([F.pad(x, (0, 3), value=-1) for x in gazing["gazing_pos"].split(n.tolist(), 1)], 1),
            "if_padded_gazing": torch.cat(more, dim=1), "num_gazing_each_frame": n + 3}
    assert torch.equal(vit(video, more)[~more["if_padded_gazing"]], out[~padded])
    pooled = vit.pool(out, gazing)
    for i in range(2):
        alone = {k: gazing[k][i:i + 1] for k in TENSORS[:2]} | {"num_gazing_each_frame": n}
        mine = vit(video[i:i + 1], alone)
        close(mine[0], out[i], rtol=1e-4, atol=1e-5)
        close(vit.pool(mine, alone)[0], pooled[i], rtol=1e-4, atol=1e-5)


def test_clips_without_gazes(vit):
    """Cropping tiles can leave none."""
    for n_real in ([[0, 0], [2, 1]], [[0, 0], [0, 0]]):
        gazing = random_gazing(20, n_real)
        out = vit(normal_video(2, 2), gazing)
        assert (out[gazing["if_padded_gazing"]] == 0).all() and vit.pool(out, gazing).isfinite().all()


def test_gradients():
    """A language model's loss can train the encoder; one that only trains the head gets by without."""
    vit = load().requires_grad_(True)
    gazing = random_gazing(20, [[4, 3], [1, 5]])
    vit(normal_video(2, 2), gazing).square().sum().backward()
    without = {n for n, p in vit.network.named_parameters() if p.grad is None}
    assert without == {n for n, _ in vit.network.named_parameters() if n.startswith("head.")}


# ----------------------------------------------------------------------------------------------------------------------
# other scales and patch sizes, straight from the gaze model


@pytest.mark.parametrize("image_size, patch_size, scales", [
    (28, 7, "14+28"), (32, 8, "24+48"), (30, 4, "10+30"), (32, 8, [(16, 24), (40, 64)])],
    ids=["patch 7", "tiles", "cut sides", "not square"])
def test_other_encoders(image_size, patch_size, scales):
    vit, video = tiny_vit(image_size, patch_size, scales), normal_video(2, 3, 48)
    gazing = tiny_gaze().generate(video, gazing_ratio=[0.4, 0.1, 0.2], target_scales=vit.scales,
                                  target_patch_size=vit.patch_size)
    assert [m.shape[2] for m in gazing["gazing_mask"]] == vit.ids_per_scale
    close(vit(video, gazing), expected(vit, video, gazing), rtol=1e-4, atol=1e-5)


def test_gazes_of_the_model_go_in_unchanged(vit):
    video, gaze = normal_video(3), tiny_gaze()
    gazing = gaze.generate(video, gazing_ratio=0.7, task_loss_requirement=[[0.0] * 4, [-3.0] * 4, [-6.0] * 4])
    assert gazing["if_padded_gazing"].any()
    out = vit(video, gazing)
    close(out, expected(vit, video, gazing), rtol=1e-4, atol=1e-5)
    # 16-bit weights: what a GPU would run
    close(vit.bfloat16()(video, gazing).float(), out, rtol=0.1, atol=0.15)


# ----------------------------------------------------------------------------------------------------------------------
# errors


def test_ids_of_other_scales_are_refused(vit):
    video = normal_video(2, 3)
    for V in (21, 60):  # of a gaze model that has more ids per frame
        gazing = random_gazing(V, [[4, 3, 2], [1, 5, 2]])
        with pytest.raises(ValueError, match=r"clip \d, frame \d holds id -?\d+ .* ids 0..19 .*target_scales"):
            vit(video, gazing)
    gazing["gazing_pos"] -= gazing["gazing_pos"]  # ids without V * frame
    with pytest.raises(ValueError, match="clip 0, frame 1 holds id -20"):
        vit(video, gazing)


def test_8_bit_pixels_are_refused(vit):
    with pytest.raises(ValueError, match="127.5"):
        vit(torch.zeros(1, 1, 3, 32, 32, dtype=torch.uint8), random_gazing(20, [[2]]))


@pytest.mark.parametrize("settings, message", [
    (dict(scales="16,32"), "sides joined by"), (dict(scales=[16, "x"]), "sides joined by"),
    (dict(scales=[16, 0.5]), "sides joined by"), (dict(scales=""), "sides joined by"),
    (dict(scales=[]), "sides joined by"), (dict(scales="4+32"), "8 pixels"), (dict(layer=9), "this network has"),
    (dict(attention="full"), "block_causal, causal, bidirectional")])
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        load(**settings)


def test_wrong_folders(tmp_path, monkeypatch, capsys):
    from transformers import SiglipVisionModel
    for name in (tmp_path, tmp_path / "none", "tests", "tests/none", "one", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="neither a folder"):
            GazeSigLIP.from_pretrained(name)
    assert "fetching" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="lacks embeddings.*another network"):
        GazeSigLIP.from_pretrained(GOLDEN / "model")
    SiglipVisionModel(load().network.config).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"scales"', '"something"'))
    with pytest.raises(ValueError, match="config.json has no scales"):
        GazeSigLIP.from_pretrained(tmp_path)
    assert GazeSigLIP.from_pretrained(tmp_path, scales="8+32").ids_per_scale == [1, 16]

    monkeypatch.setattr("lib.weights.hub_in_reach", lambda: False)
    with pytest.raises(FileNotFoundError, match="siglip=google/siglip2.* in reach on the hub"):
        GazeSigLIP.from_pretrained("google/siglip2-base-patch16-224")
    assert "fetching google/siglip2-base-patch16-224 from huggingface.co, unless cached; licence: Apache-2.0" in \
        capsys.readouterr().out
