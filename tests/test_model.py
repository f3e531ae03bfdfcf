"""model.py: what generate, stream and forward promise each other, checked against a decoder that keeps no cache."""
import copy
import itertools
import json
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import normal_video, tiny_gaze
from safetensors.torch import load_file, save_file

import model
from gazing import join_frames, split_frames
from lib import run
from lib.attention import causal_attention
from model import Gaze, GazeConfig

V, T = 20, 4
MIXED = torch.tensor([[9, 1, 4, 6], [2, 7, 1, 20], [5, 5, 3, 1]]) / V  # (B, T), rows of unequal length
TENSORS = ("gazing_pos", "if_padded_gazing", "num_gazing_each_frame")


def make_gazing(frames):
    """Lists over clips of lists over frames of ids within the frame -> gaze dict."""
    out = []
    for t in range(len(frames[0])):
        n_t = max(len(clip[t]) for clip in frames)
        ids = torch.tensor([clip[t] + [V] * (n_t - len(clip[t])) for clip in frames], dtype=torch.long)
        ids = ids.view(len(frames), n_t)
        out.append((ids + V * t, ids == V))
    return join_frames(out)


def random_frames(n_clips, counts, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [[torch.randperm(V, generator=g)[:n].tolist() for n in counts] for _ in range(n_clips)]


def as_frames(gazing, row):
    """Gaze dict -> one clip's ids within the frame, without padding."""
    return [(ids[row][~pad[row]] - V * t).tolist() for t, (ids, pad) in enumerate(split_frames(gazing))]


@torch.no_grad()
def slow_generate(gaze, video, budgets, requirement=None):
    """Greedy gazes of one clip (1, T, …): the whole sequence goes through the plain decoder again for every block.

    Returns (ids per frame, and per frame the losses predicted before slots 0, 1, …, n_t).
    """
    K, vision = gaze.config.num_multi_token_pred, gaze.embed(video)[0]
    past, all_ids, all_losses = [], [], []

    def ask(tokens):  # what the last token says: logits (K, V + 1) and losses (K,)
        h = gaze.decoder.norm(gaze.decoder(torch.cat(tokens, dim=1))[:, -1])
        return gaze.lm_head(h).view(K, V + 1), gaze.task_loss_prediction_head(h)[0].tolist()

    for t, budget in enumerate(budgets):
        past.append(vision[:, t])
        ids, losses = [], []
        while True:
            embedded = [gaze.decoder.embed_tokens(torch.tensor([ids]))] if ids else []
            if len(ids) % K == 0:
                logits, says = ask(past + embedded)
            losses.append(says[len(ids) % K])
            done = requirement is not None and len(ids) > 0 and losses[-1] <= requirement
            if done or len(ids) == min(budget, V):
                break
            order = logits[len(ids) % K].argsort(descending=True).tolist()
            ids.append(next(i for i in order if i != V and i not in ids))
        past += embedded
        all_ids.append(ids)
        all_losses.append(losses)
    return all_ids, all_losses


# ----------------------------------------------------------------------------------------------------------------------
# decoding

@pytest.mark.parametrize("K", [1, 3, 20])
@pytest.mark.parametrize("budgets, requirement", [
    ([8, 8, 8, 8], None), ([3, 1, 6, 9], None), ([20, 20, 20, 20], None), ([15, 20, 9, 20], 0.0),
    ([20, 3, 20, 20], -2.0)])
def test_equals_decoding_without_cache(video, K, budgets, requirement):
    """Also pins which head serves which slot, and that forward's losses are those that stopping looks at."""
    gaze = tiny_gaze(num_multi_token_pred=K)
    out = gaze.generate(video, [n / V for n in budgets], requirement)
    task_loss = gaze(video, out)[1].split(out["num_gazing_each_frame"].tolist(), dim=1)
    stopped = 0
    for b in range(len(video)):
        ids, losses = slow_generate(gaze, video[b:b + 1], budgets, requirement)
        assert as_frames(out, b) == ids
        for t in range(T):
            n = len(ids[t])
            torch.testing.assert_close(task_loss[t][b, :n], torch.tensor(losses[t][1:]), rtol=1e-4, atol=1e-4)
            stopped += n < budgets[t]
    assert (stopped > 0) == (requirement is not None), "the requirement should decide somewhere"


@pytest.mark.parametrize("kwargs", [
    dict(gazing_ratio=0.4), dict(gazing_ratio=MIXED), dict(task_loss_requirement=-1.0),
    dict(gazing_ratio=0.6, task_loss_requirement=torch.linspace(-3, 3, 12).view(3, 4)),
    dict(gazing_ratio=0.4, temperature=0.8), dict(task_loss_requirement=-1.0, temperature=0.8)])
@pytest.mark.parametrize("blocks", [1, 2])
def test_streaming_equals_the_whole_clip(video, kwargs, blocks):
    gaze = tiny_gaze(num_conv_blocks=blocks)
    whole = gaze.generate(video, **kwargs, generator=torch.Generator().manual_seed(5))
    stream = gaze.stream(3, **kwargs, generator=torch.Generator().manual_seed(5))
    for t, (ids, padded) in enumerate(split_frames(whole)):
        part = stream.step(video[:, t])
        assert torch.equal(part["if_padded_gazing"], padded)
        assert part["num_gazing_each_frame"].tolist() == [ids.shape[1]]
        assert torch.equal((part["gazing_pos"] + V * t)[~padded], ids[~padded])
        for mask, all_masks in zip(part["gazing_mask"], whole["gazing_mask"], strict=True):
            assert torch.equal(mask[:, 0], all_masks[:, t])


def test_frames_of_many_tokens(monkeypatch):
    """From 64 tokens on a frame's attention is computed in two parts, which must not change what is chosen, also where
    clips have different lengths."""
    gaze, video = tiny_gaze(scales="32+64", patch_size=8), normal_video(2, 3, 64)
    ratios = torch.tensor([[0.05, 0.2, 0.1], [0.3, 0.1, 0.1]])
    uniform, mixed = gaze.generate(video, ratios[0].tolist()), gaze.generate(video, ratios)
    past = []

    def masked(q, k, v):
        past.append(k.shape[2] - q.shape[2])
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(past[-1])
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    monkeypatch.setattr(model, "causal_attention", masked)
    assert torch.equal(gaze.generate(video, ratios[0].tolist())["gazing_pos"], uniform["gazing_pos"])
    assert max(past) > 64, "decoding does not use it"
    for b in range(2):
        alone = gaze.generate(video[b:b + 1], ratios[b].tolist())["gazing_pos"][0]
        assert mixed["gazing_pos"][b][~mixed["if_padded_gazing"][b]].tolist() == alone.tolist()


@pytest.mark.parametrize("past", [0, 1, 50])
def test_attention_to_the_past_and_the_new(past):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8) for n in (20, past + 20, past + 20))
    mask = torch.ones(20, past + 20, dtype=torch.bool).tril(past)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(causal_attention(q, k, v), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("ratio, requirement", [
    (MIXED, None), (None, -1.0), (0.8, 0.0), (MIXED, torch.linspace(-3, 3, 12).view(3, 4)), (None, -2.0)])
def test_a_clip_does_not_depend_on_its_neighbours(gaze, video, ratio, requirement, reference):
    def row(x, b):
        return x[b:b + 1] if torch.is_tensor(x) else x
    out = gaze.generate(video, ratio, requirement, reference=reference)
    log_prob, task_loss = gaze(video, out)
    counts = set()
    for b in range(3):
        alone = gaze.generate(video[b:b + 1], row(ratio, b), row(requirement, b), reference=reference)
        assert as_frames(alone, 0) == as_frames(out, b)
        for mask, masks in zip(alone["gazing_mask"], out["gazing_mask"], strict=True):
            assert torch.equal(mask[0], masks[b])
        for one, many in zip(gaze(video[b:b + 1], alone), (log_prob, task_loss), strict=True):
            real = ~alone["if_padded_gazing"], ~out["if_padded_gazing"][b]
            torch.testing.assert_close(one[real[0]], many[b][real[1]], rtol=1e-4, atol=1e-4)
        counts.add(tuple(map(len, as_frames(out, b))))
    assert len(counts) > 1, "all clips took equally many, so this shows nothing"


@pytest.mark.parametrize("kwargs", [dict(gazing_ratio=0.5), dict(task_loss_requirement=-1.0)])
def test_the_future_changes_nothing(gaze, video, kwargs):
    before = gaze.generate(video, **kwargs)
    for t in range(1, T):
        other = video.clone()
        other[:, t:] = normal_video(3, T - t, seed=9)
        after = gaze.generate(other, **kwargs)
        for b in range(3):
            assert as_frames(after, b)[:t] == as_frames(before, b)[:t]
        assert not torch.equal(after["gazing_pos"], before["gazing_pos"])


@pytest.mark.parametrize("policy", ["reference", "sampling"])
def test_forward_is_causal(gaze, video, policy):
    gazing = make_gazing(random_frames(3, [5, 4, 7, 3]))
    before = gaze(video, gazing, policy, 0.7)
    for t in range(1, T):  # another frame t moves what is said from its first slot on, and nothing earlier
        other, end = video.clone(), gazing["num_gazing_each_frame"][:t].sum()
        other[:, t] = normal_video(3, 1, seed=9)[:, 0]
        for x, y in zip(before, gaze(other, gazing, policy, 0.7), strict=True):
            assert torch.equal(x[:, :end], y[:, :end]) and (x[:, end:] != y[:, end:]).all()
    for i in range(19):  # another id in slot i: nothing before it moves, nor do other clips
        other, frame = copy.deepcopy(gazing), sum(i >= e for e in (5, 9, 16))
        taken = set((gazing["gazing_pos"][0] - V * frame).tolist())
        other["gazing_pos"][0, i] = V * frame + min(set(range(V)) - taken)
        log_prob, task_loss = gaze(video, other, policy, 0.7)
        assert torch.equal(log_prob[:, :i], before[0][:, :i]) and log_prob[0, i] != before[0][0, i]
        assert torch.equal(task_loss[:, :i], before[1][:, :i])
        assert torch.equal(log_prob[1:], before[0][1:])


# ----------------------------------------------------------------------------------------------------------------------
# budgets and stopping

@pytest.mark.parametrize("ratio, counts", [
    (0.4, [8] * 4), (1e-9, [1] * 4), (1, [20] * 4), (0.0999, [1] * 4), ([0.9, 0.2, 0.37, 0.5], [18, 4, 7, 10]),
    ([0, 0.1, 0, 0], [1, 2, 1, 1]), (torch.tensor([[0.9, 0.2, 0.35, 0.5]], dtype=torch.float32), [18, 4, 7, 10])])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_budget(gaze, video, ratio, counts, temperature):
    out = gaze.generate(video, ratio, temperature=temperature)
    assert out["num_gazing_each_frame"].tolist() == counts and not out["if_padded_gazing"].any()
    for b in range(3):
        for ids in as_frames(out, b):
            assert len(set(ids)) == len(ids) and set(ids) <= set(range(V))
    for n, mask in zip((4, 16), out["gazing_mask"], strict=True):
        assert mask.shape == (3, T, n) and set(mask.unique().tolist()) <= {0.0, 1.0}
    joined = torch.cat(out["gazing_mask"], dim=2)
    assert joined.sum(2).tolist() == [list(map(float, counts))] * 3
    assert joined.flatten(1).gather(1, out["gazing_pos"]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scales", ["16+32", "8+16+24"])
def test_a_ratio_written_as_n_over_v_gives_n(dtype, scales):
    gaze = tiny_gaze(scales=scales)
    n_ids = gaze.config.num_ids
    n = torch.arange(1, n_ids + 1)
    stream = gaze.stream(gazing_ratio=(n.to(dtype) / n_ids))
    assert [max(stream.budget(t)) for t in range(n_ids)] == n.tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_chooses_the_same(gaze, video):
    gaze, video = gaze.cuda(), video.cuda()
    for ratio in (0.4, [0.9, 0.2, 0.37, 0.5], 0.4, 0.4):  # the third call records
        with torch.no_grad():
            gaze.pos_embed += 1  # a recorded graph reads the weights as they are now
        want = gaze.generate(video, ratio)
        assert torch.equal(gaze.generate(video, ratio, cuda_graph=True)["gazing_pos"], want["gazing_pos"])


@torch.no_grad()
def test_layers_are_not_compiled_anew_for_other_lengths(monkeypatch):
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **settings: compile_with(f, backend="eager", **settings))
    decoder = tiny_gaze().decoder
    want = decoder(torch.ones(3, 9, 32))
    run.compile_layers(decoder)
    decoder(torch.ones(2, 5, 32))
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(decoder(torch.ones(3, 9, 32)), want)


def test_mixed_budgets(gaze, video):
    out = gaze.generate(video, MIXED)
    assert [list(map(len, as_frames(out, b))) for b in range(3)] == (MIXED * V).round().int().tolist()
    assert out["num_gazing_each_frame"].tolist() == [9, 7, 4, 20]


@pytest.mark.parametrize("requirement, counts", [(math.inf, [1] * 4), (-math.inf, [20] * 4)])
def test_extreme_requirements(gaze, video, requirement, counts):
    out = gaze.generate(video, task_loss_requirement=requirement)
    assert out["num_gazing_each_frame"].tolist() == counts and not out["if_padded_gazing"].any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("requirement", [-2.0, 0.0, torch.linspace(-3, 3, 12).view(3, 4)])
def test_early_stop(gaze, video, requirement, temperature):
    """The first predicted loss at or below the requirement ends the frame, never before its first gaze."""
    out = gaze.generate(video, 0.8, requirement, temperature)
    need = torch.as_tensor(requirement).expand(3, T)
    task_loss = gaze(video, out)[1].split(out["num_gazing_each_frame"].tolist(), dim=1)
    for t, (_, padded) in enumerate(split_frames(out)):
        assert not padded[:, 0].any() and (~padded).any(0).all(), "the frame is as long as its longest clip"
        assert (padded.int().diff(dim=1) >= 0).all(), "padding lies behind the gazes"
        for b, n in enumerate((~padded).sum(1).tolist()):
            assert (task_loss[t][b, :n - 1] > need[b, t]).all()
            assert n == 16 or task_loss[t][b, n - 1] <= need[b, t]


def test_settings_of_the_config_are_used_when_the_caller_gives_none(gaze, video):
    gaze.config.gazing_ratio, gaze.config.task_loss_requirement = 0.3, None
    assert gaze.generate(video)["num_gazing_each_frame"].tolist() == [6] * 4
    gaze.config.task_loss_requirement = math.inf
    assert gaze.generate(video)["num_gazing_each_frame"].tolist() == [1] * 4
    assert gaze.generate(video, gazing_ratio=0.2)["num_gazing_each_frame"].tolist() == [4] * 4
    assert gaze.generate(video, task_loss_requirement=-math.inf)["num_gazing_each_frame"].tolist() == [20] * 4


def test_other_frame_sizes_are_resized(gaze):
    large = normal_video(2, side=48)
    small = F.interpolate(large.flatten(0, 1), (32, 32), mode="bicubic", align_corners=False).unflatten(0, (2, 4))
    assert torch.equal(gaze.generate(large, 0.3)["gazing_pos"], gaze.generate(small, 0.3)["gazing_pos"])


@pytest.mark.parametrize("scales, patch, size, grids, tiles", [
    ([24, 40], 8, (40, 40), [(3, 3), (5, 5)], (2, 2)), ("28+56", 7, (56, 56), [(4, 4), (8, 8)], (2, 2)),
    (None, 16, (64, 64), [(2, 2), (4, 4)], (1, 1)), ([(16, 32), (32, 72)], None, (32, 72), [(2, 4), (4, 9)], (1, 3)),
    ([16, 33], 8, (33, 33), [(2, 2), (4, 4)], (2, 2))])
def test_tiles(gaze, scales, patch, size, grids, tiles):
    """Each tile is gazed at as a clip of its own; its gazes come back at their place in the whole frame."""
    target, p = dict(target_scales=scales, target_patch_size=patch), patch or 8
    video, ratios = normal_video(2, side=max(size))[..., :size[0], :size[1]], torch.rand(2, 4)
    out = gaze.generate(video, ratios, **target)
    padded = F.pad(video, (0, tiles[1] * 4 * p - size[1], 0, tiles[0] * 4 * p - size[0]))
    want = [torch.zeros(2, 4, tiles[0] * g, tiles[1] * g) for g in (2, 4)]
    for i in range(tiles[0]):
        for j in range(tiles[1]):
            tile = padded[..., i * 4 * p:(i + 1) * 4 * p, j * 4 * p:(j + 1) * 4 * p]
            for whole, mask, g in zip(want, gaze.generate(tile, ratios)["gazing_mask"], (2, 4), strict=True):
                whole[:, :, i * g:(i + 1) * g, j * g:(j + 1) * g] = mask.view(2, 4, g, g)
    want = [m[:, :, :h, :w].flatten(2) for m, (h, w) in zip(want, grids, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(out["gazing_mask"], want, strict=True))
    want, count = torch.cat(want, dim=2), sum(h * w for h, w in grids)
    assert out["num_gazing_each_frame"].tolist() == want.sum(2).amax(0).tolist()
    for b in range(2):
        for t, (ids, padded) in enumerate(split_frames(out)):
            assert (ids - count * t)[b, ~padded[b]].tolist() == want[b, t].nonzero().flatten().tolist()
    copies = gaze.generate(video, ratios.repeat(3, 1), num_copies=3, **target)
    for a, b in zip(copies["gazing_mask"], out["gazing_mask"], strict=True):
        assert torch.equal(a, b.repeat(3, 1, 1))
    larger = F.interpolate(video.flatten(0, 1), scale_factor=2).unflatten(0, (2, 4))
    small = F.interpolate(larger.flatten(0, 1), size, mode="bicubic", align_corners=False).unflatten(0, (2, 4))
    assert torch.equal(*(gaze.generate(v, 0.3, **target)["gazing_pos"] for v in (larger, small)))


@pytest.mark.parametrize("target", [dict(target_scales="64"), dict(target_scales="16+32+64"),
                                    dict(target_scales=[64, 64]), dict(target_scales=[4, 64])])
def test_targets_that_do_not_fit(gaze, video, target):
    with pytest.raises(ValueError, match="target_scales"):
        gaze.generate(video, 0.3, **target)


@pytest.mark.parametrize("kwargs, named", [
    (dict(gazing_ratio=0), "gazing_ratio"), (dict(gazing_ratio=1.5), "gazing_ratio"),
    (dict(gazing_ratio=-0.1), "gazing_ratio"),
    (dict(gazing_ratio=[0.5, 0.5, -0.1, 0.5]), "gazing_ratio"), (dict(gazing_ratio=math.nan), "gazing_ratio"),
    (dict(gazing_ratio=torch.full((2, 4), 0.5)), "gazing_ratio has 2 rows for 3 clips"),
    (dict(gazing_ratio=[0.5, 0.5]), "gazing_ratio has values for 2 frames"),
    (dict(task_loss_requirement=torch.zeros(2, 4)), "task_loss_requirement has 2 rows for 3 clips"),
    (dict(task_loss_requirement=[0.5]), "task_loss_requirement has values for 1 frames")])
def test_bad_arguments(gaze, video, kwargs, named):
    with pytest.raises(ValueError, match=named):
        gaze.generate(video, **kwargs)


# ----------------------------------------------------------------------------------------------------------------------
# scoring

@pytest.mark.parametrize("K", [2, 3])
def test_sampling_policy_is_the_distribution_drawn_from(K):
    """All alternatives of a slot, scored one by one: the free ids' probabilities sum to 1, taken ids have none."""
    gaze, video, temperature = tiny_gaze(num_multi_token_pred=K), normal_video(1), 0.7
    frames = random_frames(1, [5, 1, 3, 4])[0]
    for t, j in [(0, 0), (0, 1), (0, 4), (1, 0), (2, 2), (3, 3)]:
        tries = [[ids if s != t else ids[:j] + [i] for s, ids in enumerate(frames[:t + 1])] for i in range(V)]
        gazing = make_gazing(tries)
        score = gaze(video[:, :t + 1], gazing, "sampling", temperature)[0][:, -1].detach()
        assert score.exp().sum() == pytest.approx(1, abs=1e-5)
        assert [i for i in range(V) if score[i] == -math.inf] == sorted(frames[t][:j])
        # the plain policy differs by temperature, mask and the share of the end token
        plain = gaze(video[:, :t + 1], gazing)[0][:, -1].detach()
        free = score > -math.inf
        torch.testing.assert_close((plain[free] / temperature).log_softmax(0), score[free], rtol=1e-4, atol=1e-4)
        assert plain.isfinite().all() and plain.exp().sum() < 1


def test_reference_policy_is_the_plain_softmax(gaze):
    video, frames = normal_video(1), random_frames(1, [4, 7, 2, 3])
    log_prob = gaze(video, make_gazing(frames))[0][0]
    tokens, at = [], 0
    vision = gaze.embed(video)[0]
    for t, ids in enumerate(frames[0]):
        tokens.append(vision[:, t])
        for j, i in enumerate(ids):
            if j % 3 == 0:
                h = gaze.decoder.norm(gaze.decoder(torch.cat(tokens, dim=1))[:, -1])
                logits = gaze.lm_head(h).view(3, V + 1).log_softmax(-1)
            assert log_prob[at].item() == pytest.approx(logits[j % 3, i].item(), abs=1e-4)
            tokens.append(gaze.decoder.embed_tokens(torch.tensor([[i]])))
            at += 1


@pytest.mark.parametrize("policy", ["reference", "sampling"])
def test_padding_is_never_seen(gaze, video, policy):
    """Zero at padded slots, whatever id they hold; real slots as if there were no padding."""
    frames = random_frames(3, [6, 3, 0, 5])
    frames[1][0], frames[2][1], frames[0][3] = frames[1][0][:2], [], frames[0][3][:1]  # empty frames are allowed
    gazing = make_gazing(frames)
    padded = gazing["if_padded_gazing"]
    out = gaze(video, gazing, policy, 0.7)
    assert (out[0][padded] == 0).all() and out[1].isfinite().all()
    noisy = gazing | {"gazing_pos": gazing["gazing_pos"].masked_fill(padded, -1)}
    for x, y in zip(out, gaze(video, noisy, policy, 0.7), strict=True):
        assert torch.equal(x[~padded], y[~padded])
    for b in range(3):
        alone = make_gazing(frames[b:b + 1])
        for x, y in zip(out, gaze(video[b:b + 1], alone, policy, 0.7), strict=True):
            torch.testing.assert_close(x[b][~padded[b]], y[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("K", [1, 3])
def test_sampled_frequencies(K):
    """4000 rollouts of one frame and two gazes against exp(sum of log-probabilities) of all 380 sequences."""
    gaze, video, n, temperature = tiny_gaze(num_multi_token_pred=K), normal_video(1, 1), 4000, 0.7
    out = gaze.generate(video, 2 / V, temperature=temperature, num_copies=n, generator=torch.Generator().manual_seed(0))
    sequences = list(itertools.permutations(range(V), 2))
    scores = {p: gaze(video, make_gazing([[list(s)] for s in sequences]), p, temperature)[0].sum(1).exp().detach()
              for p in ("sampling", "reference")}
    p = scores["sampling"]
    assert p.sum() == pytest.approx(1, abs=1e-4)
    drawn = torch.zeros(V * V).index_add_(0, out["gazing_pos"] @ torch.tensor([V, 1]), torch.ones(n))
    drawn = drawn[torch.tensor(sequences) @ torch.tensor([V, 1])] / n
    assert drawn.sum() == pytest.approx(1)
    # total variation of an exact sampler: at most this on average, and 0.03 above it once in a thousand seeds
    bound = 0.5 * (p * (1 - p) / n).sqrt().sum().item() + 0.03
    assert 0.5 * (drawn - p).abs().sum() < bound
    other = scores["reference"] / scores["reference"].sum()
    assert 0.5 * (drawn - other).abs().sum() > 1.5 * bound, "the test has no power"


@pytest.mark.parametrize("policy", ["reference", "sampling"])
def test_copies_equal_a_repeated_video(gaze, video, policy):
    seeded = torch.Generator().manual_seed(0)
    gazing = gaze.generate(video, MIXED.repeat(4, 1), temperature=1.0, num_copies=4, generator=seeded)
    assert len(gazing["gazing_pos"]) == 12 and not torch.equal(gazing["gazing_pos"][:3], gazing["gazing_pos"][3:6])
    results = []
    for v in (video, video.repeat(4, 1, 1, 1, 1)):
        gaze.zero_grad()
        log_prob, task_loss = gaze(v, gazing, policy, 1.3)
        (log_prob.sum() + task_loss[~gazing["if_padded_gazing"]].sum()).backward()
        results.append([log_prob, *(p.grad.clone() for p in gaze.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    repeated = gaze.generate(video.repeat(2, 1, 1, 1, 1), 0.4)
    assert torch.equal(gaze.generate(video, 0.4, num_copies=2)["gazing_pos"], repeated["gazing_pos"])


@pytest.mark.parametrize("kwargs", [dict(), dict(reference=True), dict(task_loss_requirement=torch.zeros(3, T))])
def test_arguments_stay_as_they_are(gaze, video, kwargs):
    arguments = dict(video=video, gazing_ratio=MIXED.clone(), **kwargs)
    if "reference" in kwargs:
        arguments["gazing_ratio"] = 0.4
    before = copy.deepcopy(arguments)
    gazing = gaze.generate(**arguments)
    gazing_before = copy.deepcopy(gazing)
    for policy in ("reference", "sampling"):
        gaze(video, gazing, policy)
    torch.testing.assert_close(arguments, before, rtol=0, atol=0)
    torch.testing.assert_close(gazing, gazing_before, rtol=0, atol=0)
    assert not gazing["gazing_pos"].requires_grad


# ----------------------------------------------------------------------------------------------------------------------
# wrong input

def wrong(video):
    with_nan = video.clone()
    with_nan[1, 2, 0, 5, 5] = math.nan
    return {
        "shape .4, 3, 32, 32., expected .B, T, 3, H, W.": video[0],
        "looks like .B, 3, T, H, W.": video.transpose(1, 2),
        "3 channels are red, green and blue": video[:, :, [0, 1, 2, 0]],
        "nothing in it": video[:, :0],
        "uint8": video.byte(),
        "values of .* to 255": (video - video.min()) * 255 / (video.max() - video.min()),
        "NaN": with_nan,
        "32 x 24 pixels, expected a square": video[..., :24],
    }


def test_wrong_videos_are_named(gaze, video):
    gazing = gaze.generate(video, 0.3)
    for message, bad in wrong(video).items():
        with pytest.raises(ValueError, match=message):
            gaze.generate(bad, 0.3)
        if bad.dim() == 5 and bad.shape[1]:
            with pytest.raises(ValueError, match=message):
                gaze(bad, gazing)
            with pytest.raises(ValueError):
                stream = gaze.stream(3, 0.3)
                for t in range(4):
                    stream.step(bad[:, t])
    with pytest.raises(ValueError, match="frame has shape"):
        gaze.stream(3).step(video)
    with pytest.raises(ValueError, match="frame is a ndarray, expected a tensor"):
        gaze.stream(3).step(video[:, 0].numpy())


def test_more_frames_than_the_model_knows_are_refused_wherever_they_come_in(gaze):
    video = normal_video(1, 5)
    with pytest.raises(ValueError, match="5 frames.*max_num_frames=4: give fewer"):
        gaze(video, gaze.generate(video, 0.3, chunk=True))
    stream = gaze.stream(1, 0.3)
    for t in range(4):
        stream.step(video[:, t])
    with pytest.raises(ValueError, match="5 frames.*max_num_frames=4: begin a new stream"):
        stream.step(video[:, 4])


def test_gazings_of_other_videos_are_named(gaze, video):
    gazing = gaze.generate(video, 0.3)
    with pytest.raises(ValueError, match="gazing is of 3 clips, the video of 2"):
        gaze(video[:2], gazing)
    with pytest.raises(ValueError, match="gazing is of 4 frames, the video has 3"):
        gaze(video[:, :3], gazing)
    with pytest.raises(ValueError, match="sum of num_gazing_each_frame"):
        gaze(video, gazing | {"gazing_pos": gazing["gazing_pos"][:, 1:]})
    with pytest.raises(ValueError, match="batch_size=0"):
        gaze.generate(video, 0.3, batch_size=0)


def test_pixels_are_cast_to_the_type_of_the_weights(gaze, video):
    half = tiny_gaze().to(torch.bfloat16)
    gazing = half.generate(video, 0.3)
    assert gazing["num_gazing_each_frame"].tolist() == [6] * 4
    assert all(x.isfinite().all() for x in half(video, gazing))
    assert half.stream(3, 0.3).step(video[:, 0])["gazing_pos"].shape == (3, 6)
    exact = gaze.generate(video, 0.3)["gazing_pos"]
    assert torch.equal(gaze.generate(video.double(), 0.3)["gazing_pos"], exact)


# ----------------------------------------------------------------------------------------------------------------------
# long and large videos

def test_long_videos_are_refused_or_cut(gaze):
    with pytest.raises(ValueError, match="10 frames.*max_num_frames=4.*chunk=True"):
        gaze.generate(normal_video(1, 10), 0.3)


@pytest.mark.parametrize("settings", [
    dict(gazing_ratio=0.3), dict(gazing_ratio=torch.linspace(0.1, 0.9, 20).view(2, 10)),
    dict(task_loss_requirement=-1.0), dict(gazing_ratio=0.4, reference=True),
    dict(gazing_ratio=0.8, task_loss_requirement=0.0, reference=True)])
@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_chunks_are_clips_of_their_own(gaze, settings, batch_size):
    video = normal_video(2, 10)
    whole = gaze.generate(video, **settings, chunk=True, batch_size=batch_size)
    assert len(whole["num_gazing_each_frame"]) == 10
    for start in (0, 4, 8):
        own = settings | {k: v[:, start:start + 4] for k, v in settings.items() if torch.is_tensor(v)}
        part = gaze.generate(video[:, start:start + 4], **own)
        for b in range(2):
            assert as_frames(whole, b)[start:start + 4] == as_frames(part, b)
        for masks, own_masks in zip(whole["gazing_mask"], part["gazing_mask"], strict=True):
            assert torch.equal(masks[:, start:start + 4], own_masks)


def test_copies_of_chunks(gaze):
    video = normal_video(2, 6)
    once = gaze.generate(video, 0.3, chunk=True)["gazing_pos"]
    assert torch.equal(gaze.generate(video, 0.3, chunk=True, num_copies=3)["gazing_pos"], once.repeat(3, 1))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_change_nothing(gaze, video, batch_size):
    for settings in (dict(gazing_ratio=MIXED), dict(task_loss_requirement=-1.0), dict(target_scales="48+96"),
                     dict(gazing_ratio=MIXED.repeat(2, 1), num_copies=2)):
        together = gaze.generate(video, **settings)
        parts = gaze.generate(video, **settings, batch_size=batch_size)
        assert all(torch.equal(together[key], parts[key]) for key in TENSORS[1:])
        real = ~together["if_padded_gazing"]
        assert torch.equal(together["gazing_pos"][real], parts["gazing_pos"][real])


def test_tiles_of_a_long_video(gaze):
    video = normal_video(1, 6, side=64)[..., :40]
    target = dict(target_scales=[(32, 20), (64, 40)])
    whole = gaze.generate(video, 0.3, chunk=True, **target)
    parts = [gaze.generate(video[:, :4], 0.3, **target), gaze.generate(video[:, 4:], 0.3, **target)]
    for s, mask in enumerate(whole["gazing_mask"]):
        assert torch.equal(mask, torch.cat([part["gazing_mask"][s] for part in parts], dim=1))


def test_the_encoder_runs_once_per_clip_and_never_on_more_than_a_batch(gaze, monkeypatch):
    sizes, embed = [], gaze.embed
    monkeypatch.setattr(gaze, "embed", lambda video, past=None: sizes.append(len(video)) or embed(video, past))
    gaze.generate(normal_video(1, 4, side=128), 0.3, target_scales="128+256", num_copies=2, batch_size=7)
    assert sizes == [7] * 9 + [1]  # 8 x 8 tiles


def test_a_long_video_keeps_the_tokens_of_one_batch_only(gaze, monkeypatch):
    made, embed = [], gaze.embed
    alive = []

    def watched(video, past=None):
        alive.append(sum(tokens() is not None for tokens in made))
        vision, past = embed(video, past)
        made.append(weakref.ref(vision))
        return vision, past
    monkeypatch.setattr(gaze, "embed", watched)
    gaze.generate(normal_video(1, 40), 0.3, chunk=True, batch_size=2)
    assert len(alive) == 5 and max(alive) <= 1


# ----------------------------------------------------------------------------------------------------------------------
# files and configuration

def without_file(config):
    return {k: v for k, v in vars(config).items() if k != "reference_file"}


@pytest.mark.parametrize("config", [
    dict(), dict(reference_decoding=True, gazing_ratio=0.1, task_loss_requirement=-0.5),
    dict(num_conv_blocks=2, num_multi_token_pred=5, rope_theta=1e4, rope_factor=2.0, rope_original_length=64,
         rms_norm_eps=1e-3)])
def test_save_and_load(tmp_path, video, config):
    gaze = tiny_gaze(**config)
    gaze.save_pretrained(tmp_path / "new" / "folder")
    again = Gaze.from_pretrained(tmp_path / "new" / "folder")
    assert without_file(again.config) == without_file(gaze.config)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    a, b = gaze.generate(video), again.generate(video)
    assert all(torch.equal(a[k], b[k]) for k in TENSORS)
    assert all(torch.equal(x, y) for x, y in zip(gaze.state_dict().values(), again.state_dict().values(), strict=True))
    # not to the last bit: tensors that lie elsewhere in memory are multiplied in another order
    for x, y in zip(gaze(video, a), again(video, a), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    assert all(p.requires_grad for p in again.parameters())
    again.save_pretrained(tmp_path)  # a second time changes nothing
    assert without_file(Gaze.from_pretrained(tmp_path).config) == without_file(gaze.config)


def test_saving_keeps_foreign_keys(tmp_path, gaze):
    gaze.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"somebody": {"elses": 1}}))
    Gaze.from_pretrained(tmp_path).save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["somebody"] == {"elses": 1}


@pytest.mark.parametrize("change, named", [
    (lambda t: t.pop("gazing_model.gaze_decoder.lm_head.weight"), "missing gazing_model.gaze_decoder.lm_head.weight"),
    (lambda t: t.update(stranger=torch.zeros(2)), "unexpected stranger"),
    (lambda t: t.update({"gazing_model.connector.pos_embed": torch.zeros(9, 32)}),
     r"connector.pos_embed is \(9, 32\), .*\(16, 32\)")])
def test_weights_that_do_not_fit(tmp_path, gaze, change, named):
    gaze.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=named):
        Gaze.from_pretrained(tmp_path)


def test_not_a_model_folder(tmp_path, gaze):
    with pytest.raises(FileNotFoundError, match="config.json"):
        Gaze.from_pretrained(tmp_path)
    gaze.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="not the config of this model"):
        Gaze.from_pretrained(tmp_path)


@pytest.mark.parametrize("config, named", [
    (dict(scales="32+16"), "scales"), (dict(scales="16+16"), "scales"), (dict(scales="12+32"), "scales"),
    (dict(hidden_size=36), "hidden_size"), (dict(num_multi_token_pred=0), "num_multi_token_pred"),
    (dict(num_multi_token_pred=21), "num_multi_token_pred")])
def test_config_errors(config, named):
    with pytest.raises(ValueError, match=named):
        GazeConfig(**dict(scales="16+32", patch_size=8, hidden_size=32, num_heads=4, num_multi_token_pred=3) | config)
