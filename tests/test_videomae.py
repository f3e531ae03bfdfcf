"""videomae.py: what the reconstruction of a frame may depend on, its loss, and its files."""
import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import normal_video, tiny_mae
from safetensors.torch import load_file, save_file

import lib.attention as attention
import lib.weights as weights
import videomae
from gazing import random_gazing
from videomae import ReconstructionLoss, VideoMAE, VideoMAEConfig

V, T = 20, 4
close = torch.testing.assert_close


def padded_gazing(n_clips, seed=0):
    """Random gazes of 5, 3, 4 and 2 slots. Some slots are padded, all of frame 1 of clip 1."""
    gazing = random_gazing([5, 3, 4, 2], n_clips, V, torch.Generator().manual_seed(seed))
    padded = torch.zeros_like(gazing["gazing_pos"], dtype=torch.bool)
    padded[0, 3:5] = padded[1, 5:8] = padded[-1, 11] = True
    return gazing | {"if_padded_gazing": padded}


def rows(gazing, index):
    return {k: v if v.dim() == 1 else v[index] for k, v in gazing.items()}


# ----------------------------------------------------------------------------------------------------------------------
# what a reconstruction depends on

@pytest.mark.parametrize("frame", range(T))
def test_causality(mae, video, frame):
    """Gazes and pixels of later frames do not matter; the frame's own gazes do."""
    gazing, start = padded_gazing(3), [0, 5, 8, 12, 14]
    picture = mae(video, gazing, [frame])[0]
    other_video, other = video.clone(), padded_gazing(3, seed=1)
    other_video[:, frame + 1:] = normal_video(3, T, seed=2)[:, frame + 1:]
    for name in ("gazing_pos", "if_padded_gazing"):
        other[name][:, :start[frame + 1]] = gazing[name][:, :start[frame + 1]]
    other["if_padded_gazing"][:, start[frame + 1]:] ^= True
    assert torch.equal(mae(other_video, other, [frame])[0], picture)
    moved = copy.deepcopy(gazing)
    moved["gazing_pos"][2, start[frame]] = V * frame + (moved["gazing_pos"][2, start[frame]] + 7) % V
    again = mae(video, moved, [frame])[0]
    assert torch.equal(again[:2], picture[:2]) and not torch.allclose(again[2], picture[2], atol=1e-4)


def test_cut_off_frames(mae, video):
    gazing = padded_gazing(3)
    short = {k: v[:2] if v.dim() == 1 else v[:, :8] for k, v in gazing.items()}
    close(mae(video[:, :2], short, [1])[0], mae(video, gazing, [1])[0], rtol=1e-4, atol=1e-5)


def test_ungazed_pixels_are_not_seen(mae, video):
    """All gazes are of the finest scale: pixels outside these patches must not reach the picture, only the loss."""
    gazing = random_gazing([3] * T, 3, 16, torch.Generator().manual_seed(0))
    frame = torch.arange(T).repeat_interleave(3)
    ids = gazing["gazing_pos"] - 16 * frame
    gazing["gazing_pos"] = ids + 4 + V * frame
    seen = torch.zeros(3, T, 16).flatten(1).scatter(1, ids + 16 * frame, 1.0).view(3, T, 1, 4, 4)
    seen = seen.repeat_interleave(8, 3).repeat_interleave(8, 4)
    other = video * seen + normal_video(3, T, seed=5) * (1 - seen)
    (a, loss_a), (b, loss_b) = (mae(v, gazing, range(T)) for v in (video, other))
    close(a, b, rtol=0, atol=1e-6)
    assert (loss_a != loss_b).all()


@pytest.mark.parametrize("frames", [[0, 1, 2, 3], [3], [1, 3]])
def test_padded_slots_do_not_matter(mae, video, frames):
    """Neither in frames that are reconstructed nor in others."""
    gazing = padded_gazing(3)
    padded = gazing["if_padded_gazing"]
    picture, loss = mae(video, gazing, frames)
    for value in (-1, 0, 7, V * T):
        noisy = gazing | {"gazing_pos": gazing["gazing_pos"].masked_fill(padded, value)}
        before = copy.deepcopy(noisy)
        assert torch.equal(mae(video, noisy, frames)[0], picture)
        close(noisy, before, rtol=0, atol=0)
    for b in range(3):  # as if the slots were not there
        counts = [int(n) for n in (~padded[b]).int().split([5, 3, 4, 2]) for n in [n.sum()]]
        alone = {"gazing_pos": gazing["gazing_pos"][b:b + 1, ~padded[b]], "num_gazing_each_frame": torch.tensor(counts),
                 "if_padded_gazing": torch.zeros(1, sum(counts), dtype=torch.bool)}
        one = mae(video[b:b + 1], alone, frames)
        close(one[0][0], picture[b], rtol=1e-4, atol=1e-5)
        close(one[1][0], loss[b], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frames", [[3, 1], [2, 0, 3, 1], [3], range(3)])
def test_order_of_frames(mae, video, frames):
    """The output follows `frames`, and asking in another order changes nothing else."""
    gazing = padded_gazing(3)
    picture, loss = mae(video, gazing, frames)
    order = [sorted(frames).index(f) for f in frames]
    same = mae(video, gazing, sorted(frames))
    assert torch.equal(picture, same[0][:, order]) and torch.equal(loss, same[1][:, order])


def test_copies_equal_a_repeated_video(mae, video):
    """Copy-major rows, with gradients too; the video is (B, …) where the gazes are (G·B, …)."""
    mae.requires_grad_(True)
    gazing, results = padded_gazing(12), []
    for v in (video, video.repeat(4, 1, 1, 1, 1)):
        mae.zero_grad()
        picture, loss = mae(v, gazing, [1, 3])
        loss.square().sum().backward()
        results.append([picture, loss, *(p.grad.clone() for p in mae.parameters())])
    for a, b in zip(*results, strict=True):
        close(a, b, rtol=1e-3, atol=1e-4)
    alone = mae(video[1:2], rows(gazing, slice(7, 8)), [1, 3])  # row 7 is copy 2 of clip 1
    close(alone[1][0], results[0][1][7], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("L, ends, calls", [
    (30, [1, 5, 5, 9, 30], 1), (30, [30], 1), (1030, [1, 5, 5, 9, 1030], 4), (1030, [1030], 1),
    (1024, [1, 600, 1024], 3)])
@pytest.mark.parametrize("with_keep", [False, True])
def test_block_causal_attention(monkeypatch, L, ends, calls, with_keep):
    """The definition against one call with a mask, and one call per block (from 1024 tokens on)."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, L, 8)
    keep = torch.rand(2, L) > 0.3 if with_keep else None
    if with_keep:
        keep[:, 0] = True
    block = torch.tensor([sum(i >= e for e in ends) for i in range(L)])
    mask = (block[:, None] >= block).expand(2, 1, L, L)
    if with_keep:
        mask = mask & keep[:, None, None]
    want = ((q @ k.mT / 8 ** 0.5).masked_fill(~mask, float("-inf")).softmax(-1)) @ v
    made, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **kw: made.append(1) or attend(*a, **kw))
    close(attention.BlockCausal(ends, q.device, keep)(q, k, v), want, rtol=1e-4, atol=1e-5)
    assert len(made) == calls


def test_long_sequences_give_the_same_picture(mae, video, monkeypatch):
    """Above 1024 tokens attention runs block by block."""
    gazing, shift = padded_gazing(3), 1100
    want = mae(video, gazing, [1, 3])

    class Padded(attention.BlockCausal):  # tokens that nobody may see behind the real ones
        def __init__(self, ends, device, keep):
            keep = torch.ones(3, ends[-1], dtype=torch.bool) if keep is None else keep
            super().__init__([*ends, ends[-1] + shift], device, F.pad(keep, (0, shift)))

        def __call__(self, *qkv):
            return super().__call__(*(F.pad(x, (0, 0, 0, shift)) for x in qkv))[:, :, :-shift]
    monkeypatch.setattr(videomae, "BlockCausal", Padded)
    for a, b in zip(mae(video, gazing, [1, 3]), want, strict=True):
        close(a, b, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# loss

def test_l1_by_hand():
    a, b = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    b[1, 0, 0, 0] = -47
    for weight in (1, 0.5):
        loss = ReconstructionLoss("l1", str(weight))
        assert loss(a, loss.target(b)).tolist() == pytest.approx([weight, weight * (1 + 46 / 48)])


def test_loss_is_of_the_pictures(mae, video):
    picture, loss = mae(video, padded_gazing(3), [2, 0])
    close(loss, (picture - video[:, [2, 0]]).abs().mean((2, 3, 4)))


@pytest.mark.parametrize("loss_type, weights", [("l2", "1"), ("l1+l2", "1+1"), ("l1", "1+1")])
def test_bad_losses(loss_type, weights):
    with pytest.raises(ValueError, match="loss_type"):
        ReconstructionLoss(loss_type, weights)


IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
HALF = torch.full((2, 3, 1, 1), 0.5)


@pytest.mark.parametrize("term, stats, skip", [("dinov2_reg", IMAGENET, 5), ("siglip2", HALF, 0)])
def test_perceptual_terms(networks, term, stats, skip):
    """From a folder, against transformers' own hidden states; the same in a parent's training mode."""
    folder, network = networks[term]
    loss = ReconstructionLoss(f"{term}+l1", "2+0.5", **{term: str(folder)})
    assert not any(p.requires_grad for p in loss.parameters())
    a, b = normal_video(2, side=32, seed=3), normal_video(2, side=32, seed=4)

    def hidden(x):
        pixels = (x * IMAGENET[1] + IMAGENET[0] + 1) / 2  # 0..1
        states = network((pixels.flatten(0, 1) - stats[0]) / stats[1], output_hidden_states=True).hidden_states
        return torch.cat(states[-4:], dim=2)[:, skip:]
    want = 2 * (hidden(a) - hidden(b)).square().mean((1, 2)) + 0.5 * (a - b).abs().flatten(0, 1).mean((1, 2, 3))
    close(loss(a, loss.target(b)), want.view(2, 4), rtol=1e-4, atol=0)
    assert torch.nn.Sequential(loss).train()[0](a, loss.target(b)).equal(loss(a, loss.target(b)))


def test_targets_are_computed_once_per_clip(networks, video):
    mae, seen = tiny_mae(), []
    mae.loss = ReconstructionLoss("siglip2", "1", siglip2=networks["siglip2"][0])
    mae.loss.networks["siglip2"].embeddings.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    gazing = padded_gazing(12)
    loss = mae(video, gazing, [1, 3])[1]
    assert sorted(seen) == [3 * 2, 12 * 2]
    close(loss, mae(video.repeat(4, 1, 1, 1, 1), gazing, [1, 3])[1], rtol=1e-4, atol=1e-5)


def test_where_networks_come_from(tmp_path, mae, networks):
    """The file's weights win over the folder's and may have either transformers' names; what we save has none."""
    loss_of = dict(loss_type="dinov2_reg+siglip2", loss_weights="1+1", **{n: str(f) for n, (f, _) in networks.items()})
    mae.save_pretrained(tmp_path)
    again = VideoMAE.from_pretrained(tmp_path, **loss_of)
    want = again.loss(*(x := normal_video(1), again.loss.target(x.flip(0, 1))))
    again.save_pretrained(tmp_path / "b")
    assert load_file(tmp_path / "b/model.safetensors").keys() == load_file(tmp_path / "model.safetensors").keys()
    new, old = dict(mae.state_dict()), dict(mae.state_dict())
    for term, (folder, _) in networks.items():
        for n, t in load_file(folder / "model.safetensors").items():
            old[f"{term}.{n}"] = new[f"{term}.{n}"] = t + 0.1
    for k in list(old):
        for a, b in weights.NEW_NAMES[2:6]:
            if k.startswith("dinov2_reg.") and b in k:
                new[k.replace(b, a)] = new.pop(k)
        if "siglip2." in k:
            new["siglip2." + k.split("siglip2.")[1].removeprefix("vision_model.")] = new.pop(k)
    assert new.keys() != old.keys()
    losses = []
    for state in (old, new):
        torch.save(state, tmp_path / "videomae.pt")
        loss = VideoMAE.from_pretrained(tmp_path / "videomae.pt", mae.config, **loss_of).loss
        losses.append(loss(x, loss.target(x.flip(0, 1))))
    assert torch.equal(*losses) and (losses[0] != want).all()
    old.pop("siglip2." + next(k for k in old if k.startswith("siglip2.")).split("siglip2.")[1])
    torch.save(old, tmp_path / "videomae.pt")
    with pytest.raises(ValueError, match="siglip2 in .*videomae.pt .*missing"):
        VideoMAE.from_pretrained(tmp_path / "videomae.pt", mae.config, **loss_of)


def test_networks_that_are_not_there(tmp_path, networks):
    (tmp_path / "config.json").write_text((networks["dinov2_reg"][0] / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="dinov2_reg"):
        ReconstructionLoss("dinov2_reg", "1", dinov2_reg=tmp_path)
    state = load_file(networks["dinov2_reg"][0] / "model.safetensors")
    state.pop("embeddings.register_tokens")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks embeddings.register_tokens"):
        ReconstructionLoss("dinov2_reg", "1", dinov2_reg=tmp_path)


def test_overfits_one_batch():
    mae, video = tiny_mae(), F.interpolate(normal_video(2, side=4).flatten(0, 1), 32).unflatten(0, (2, T))
    gazing = random_gazing([8, 4, 4, 4], 2, V, torch.Generator().manual_seed(0))
    optimizer, losses = torch.optim.Adam(mae.parameters(), lr=5e-3), []
    for _ in range(60):
        loss = mae(video, gazing, [0, 3])[1].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


# ----------------------------------------------------------------------------------------------------------------------
# files

def test_fixed_positions():
    """Column half first, sin then cos, CLS zero; they do not learn, and a fresh model has them (the file's win)."""
    table = videomae.sincos_positions(8, 3)
    angle = torch.tensor([2.0, 2.0 / 100])  # column 2; row 1 for the second half
    want = torch.cat([angle.sin(), angle.cos(), (angle / 2).sin(), (angle / 2).cos()])
    assert table.shape == (10, 8) and (table[0] == 0).all()
    close(table[1 + 3 * 1 + 2], want)
    mae = tiny_mae()
    for p, dim in ((mae.vit.embeddings.position_embeddings, 32), (mae.decoder.decoder_pos_embed, 24)):
        assert not p.requires_grad and torch.equal(p[0], videomae.sincos_positions(dim, 4))


def test_save_and_load(tmp_path, mae, video):
    with torch.no_grad():
        mae.decoder.decoder_pos_embed.normal_()
    mae.save_pretrained(tmp_path / "a" / "b")
    again = VideoMAE.from_pretrained(tmp_path / "a" / "b").freeze()
    assert again.config == mae.config
    assert all(torch.equal(a, b) for a, b in zip(mae.state_dict().values(), again.state_dict().values(), strict=True))
    # not to the last bit: tensors that lie elsewhere in memory are multiplied in another order
    for a, b in zip(mae(video, padded_gazing(3), [1, 3]), again(video, padded_gazing(3), [1, 3]), strict=True):
        close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "mae.", "module.mae.", "module."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_state_dict_files(tmp_path, mae, prefix, suffix):
    """Prefixes go, perceptual networks that the loss does not use are ignored."""
    state = {prefix + k: v.clone() for k, v in mae.state_dict().items()}
    state[prefix + "dinov2_reg.encoder.weight"] = state[prefix + "siglip2.weight"] = torch.zeros(2)
    state[prefix + "siglip2.weight"] = torch.ones(2)
    path = tmp_path / f"videomae{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    again = VideoMAE.from_pretrained(path, mae.config).state_dict()
    assert again.keys() == mae.state_dict().keys()
    assert all(torch.equal(again[k], v) for k, v in mae.state_dict().items())


@pytest.mark.parametrize("change, named", [
    (lambda t: t.pop("decoder.mask_token"), "missing decoder.mask_token"),
    (lambda t: t.update({"x.decoder.mask_token": t.pop("decoder.mask_token")}), "unexpected x.decoder.mask_token"),
    (lambda t: t.update({"decoder.mask_token": torch.zeros(1, 1, 9)}), r"decoder.mask_token is \(1, 1, 9\)")])
def test_weights_that_do_not_fit(tmp_path, mae, change, named):
    mae.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=named):
        VideoMAE.from_pretrained(tmp_path)


def vitmae():
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    c = {k: v for k, v in vars(tiny_mae().config).items() if k not in ("scales", "max_num_frames")}
    torch.manual_seed(0)
    return ViTMAEForPreTraining(ViTMAEConfig(**c | dict(mask_ratio=0.5))).eval()


def test_start_weights(tmp_path, mae, monkeypatch):
    """A folder of transformers' ViTMAE: one frame seen at one scale is then reconstructed as it does."""
    monkeypatch.setattr(videomae, "BlockCausal",  # there CLS sees all, not only itself
                        lambda ends, device, keep: F.scaled_dot_product_attention)
    theirs, image, noise = vitmae(), normal_video(2, 1), torch.arange(16.0).expand(2, 16)
    with torch.no_grad():
        theirs.vit.embeddings.cls_token.normal_()
        want = theirs.unpatchify(theirs(image[:, 0], noise=noise).logits)  # sees the first half of the patches
    theirs.save_pretrained(tmp_path)
    config = VideoMAEConfig(**vars(mae.config) | dict(scales="32"))
    ours = VideoMAE.from_pretrained(tmp_path, config)
    for name in videomae.VIDEO_ONLY:
        assert 0.1 < ours.get_parameter(name).std() < 0.3, "drawn with the config's spread"
        ours.get_parameter(name).data.zero_()
    ids = torch.arange(8).expand(2, 8)
    gazing = {"gazing_pos": ids, "if_padded_gazing": ids < 0, "num_gazing_each_frame": torch.tensor([8])}
    close(ours(image, gazing, [0])[0][:, 0], want, rtol=1e-4, atol=1e-4)
    # other scales, names as transformers 5 has them in memory or 4 in files, a pickled file
    state = {k.replace("vit.encoder.layer.", "vit.layers."): v for k, v in theirs.state_dict().items()}
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    again = VideoMAE.from_pretrained(tmp_path, mae.config)
    assert torch.equal(again.decoder.decoder_pred.weight, ours.decoder.decoder_pred.weight)
    assert torch.equal(again.vit.encoder.layer[1].output.dense.weight, ours.vit.encoder.layer[1].output.dense.weight)
    with pytest.raises(ValueError, match="missing vit.embeddings.scale_embed"):  # a file is no start weights
        VideoMAE.from_pretrained(tmp_path / "pytorch_model.bin", mae.config)


def test_hub_ids(tmp_path, mae, monkeypatch, capsys):
    """The licence is printed first; the first weights file that the repository has is taken."""
    import huggingface_hub
    torch.save({"mae." + k: v for k, v in mae.state_dict().items()}, tmp_path / "videomae.pt")

    printed = []

    def fetch(hub_id, name, local_files_only):
        printed.append(capsys.readouterr().out)
        if not (tmp_path / name).is_file():
            raise huggingface_hub.utils.LocalEntryNotFoundError(name)
        return str(tmp_path / name)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    again = VideoMAE.from_pretrained("bfshi/VideoMAE_AutoGaze", mae.config)
    assert "bfshi/VideoMAE_AutoGaze" in printed[0] and "non-commercial" in printed[0]
    assert len(printed) == 3 and torch.equal(again.decoder.mask_token, mae.decoder.mask_token)


def test_loading_maps_the_file(tmp_path, mae):
    """Memory holds the weights once (2 GB at full size): they are the file's pages. Writing to them spares the file."""
    torch.save(mae.state_dict(), tmp_path / "videomae.pt")
    before = (tmp_path / "videomae.pt").read_bytes()
    again = VideoMAE.from_pretrained(tmp_path / "videomae.pt", mae.config)
    where = sorted(p.data_ptr() for p in again.parameters())
    assert where[-1] - where[0] < len(before), "one mapping"
    again.decoder.mask_token.data.add_(1)
    assert (tmp_path / "videomae.pt").read_bytes() == before


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pt"):
        VideoMAE.from_pretrained(tmp_path / "nothing.pt")


def test_config(tmp_path):
    """The default is the published ViT-L; keys of a Hugging Face file that are not ours are ignored."""
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "mask_ratio": 0.75, "architectures": ["x"]}')
    assert VideoMAEConfig.from_file(tmp_path / "config.json") == VideoMAEConfig(hidden_size=64)
    for bad in (dict(scales="32+64"), dict(scales="30+224")):
        with pytest.raises(ValueError, match="scales"):
            VideoMAEConfig(**bad)


def test_the_reconstructor_of_the_repository_sees_more_with_more_patches():
    small = VideoMAE.from_pretrained(Path(__file__).parent.parent / "weights/small/videomae").freeze()
    ramp = torch.linspace(-1, 1, 64)
    video = (ramp.view(-1, 1) * ramp).expand(1, 2, 3, 64, 64)
    few, many = (small(video, random_gazing([n, n], 1, 21, torch.Generator().manual_seed(0)), [1])[1] for n in (2, 15))
    assert many < few
