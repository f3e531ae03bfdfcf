"""Losses and schedules by hand, learning on one batch, and the scripts from videos to evaluation at tiny sizes."""
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import rollouts_per_clip
import torch
from conftest import normal_video, tiny_gaze
from safetensors.torch import save_file
from two_processes import two_processes

import train_grpo
import train_ntp
import train_videomae
from data import collate_gaze, to_model_pixels
from gazing import (
    draw_ratio,
    join_frames,
    last_slots,
    parse_alpha,
    random_gazing,
    split_frames,
    split_ratio,
    to_budgets,
)
from lib import run as processes
from lib import weights
from lib.labels import pack_labels
from lib.loader import Feed, StepSampler, divide_batch, shard
from lib.log import Log, LossCheck, check_finite
from lib.optim import MatrixMuon, exponential, learning_rate, orthogonalize
from model import Gaze
from train_grpo import discounted_advantages, grpo_loss
from train_ntp import label_loss, ntp_loss
from videomae import VideoMAE

ROOT = Path(__file__).parent.parent
V = 20


def gazing_of(padded, counts):
    """A gaze dict of which only the padding (B, N) matters."""
    padded = torch.tensor(padded, dtype=torch.bool)
    return {"gazing_pos": torch.zeros(padded.shape, dtype=torch.long), "if_padded_gazing": padded,
            "num_gazing_each_frame": torch.tensor(counts)}


# ----------------------------------------------------------------------------------------------------------------------
# losses

def test_first_accuracy_is_of_clips_with_a_first_gaze(gaze):
    video = torch.randint(256, (2, 4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first = gaze.generate(to_model_pixels(video[:1, :1]), gazing_ratio=1e-9)["gazing_pos"].item()
    pos, losses = [[[first], [], [], []], [[], [V], [], []]], [[[0.5], [], [], []], [[], [0.5], [], []]]
    batch = {"video": video, "gazing_pos": pos, "task_losses": losses}
    assert label_loss(gaze, [batch], "cpu")["val_first_accuracy"] == 1
    assert label_loss(gaze, [batch | {"gazing_pos": pos[1:] * 2, "task_losses": losses[1:] * 2}], "cpu")[
        "val_first_accuracy"] == 0


def test_ntp_loss_by_hand():
    gazing = gazing_of([[0, 0, 1], [0, 1, 1]], [2, 1]) | {"task_losses": torch.tensor([[1.0, 2, 3], [4, 5, 6]])}
    log_prob, task_loss = torch.tensor([[-1.0, -2, -9], [-3, -9, -9]]), torch.tensor([[0.0, 2, 9], [1, 9, 9]])
    nll, error = ntp_loss(log_prob, task_loss, gazing, 3)
    assert (nll.item(), error.item()) == pytest.approx((2.0, 10 / 3))  # (1 + 2 + 3) / 3, (1 + 0 + 9) / 3
    halves = [ntp_loss(log_prob[i:i + 1], task_loss[i:i + 1],
                       {k: v if v.dim() == 1 else v[i:i + 1] for k, v in gazing.items()}, 3) for i in range(2)]
    assert sum(h[0] for h in halves).item() == pytest.approx(2.0), "micro-batches add up to the whole"


def test_discounted_advantages_by_hand():
    """Frames of 3, 2 and 1 slots; frame 0 is rewarded with 1 and -2, frame 2 with 10 and 0; gamma 0.5."""
    gazing = gazing_of([[0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 1, 0]], [3, 2, 1])
    got = discounted_advantages(torch.tensor([[1.0, 10], [-2, 0]]), [0, 2], gazing, 0.5)
    late = [10 * 0.5 ** d for d in (5, 4, 3, 2, 1, 0)]
    assert got[0].tolist() == pytest.approx([0.25 + late[0], 0.5 + late[1], 1 + late[2], *late[3:]])
    assert got[1].tolist() == pytest.approx([-1, -2, 0, 0, 0, 0]), "padded slots neither count nor get any"
    swapped = discounted_advantages(torch.tensor([[10.0, 1], [0, -2]]), [2, 0], gazing, 0.5)
    assert torch.equal(swapped, got)


def test_grpo_loss_by_hand():
    log_prob = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]], requires_grad=True)
    advantage = torch.tensor([[1.0, 2.0], [-5.0, 0.0]])
    loss = grpo_loss(log_prob, advantage)
    loss.backward()
    assert loss.item() == pytest.approx(1.0)  # -((1 + 2) + (-5)) / 2
    assert torch.equal(log_prob.grad, -advantage / 2)


@pytest.mark.parametrize("policy", ["sampling", "reference"])
def test_equal_rewards_teach_nothing(gaze, policy):
    video = normal_video(2)
    gazing = gaze.generate(video, 0.3, temperature=1.0, num_copies=3, generator=torch.Generator().manual_seed(0))
    reward = torch.tensor([[0.3, -1.0], [2.0, 0.1]]).repeat(3, 1).view(3, 2, 2)
    advantage = discounted_advantages((reward - reward.mean(0)).flatten(0, 1), [1, 3], gazing, 0.99)
    grpo_loss(gaze(video, gazing, policy)[0], advantage).backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-6 for p in gaze.parameters())


def test_one_batch_is_learned_by_heart():
    """Labels of unequal length: afterwards greedy gazing repeats them and the loss prediction fits."""
    torch.manual_seed(0)
    gaze, video = Gaze(tiny_gaze().config), normal_video(2)
    g = torch.Generator().manual_seed(0)
    counts = [[7, 3, 1, 4], [4, 5, 6, 1]]
    labels = [[(torch.randperm(V, generator=g)[:n] + V * t).tolist() for t, n in enumerate(c)] for c in counts]
    losses = [[torch.rand(n, generator=g).tolist() for n in c] for c in counts]
    gazing = collate_gaze(labels, losses, V)
    n_real, first = sum(map(sum, counts)), None
    optimizer = torch.optim.Adam(gaze.parameters(), lr=5e-3)
    for _ in range(80):
        nll, error = ntp_loss(*gaze(video, gazing), gazing, n_real)
        first = first or nll.item()
        optimizer.zero_grad()
        (nll + error).backward()
        optimizer.step()
    assert first == pytest.approx(math.log(V + 1), rel=0.1) and nll < 0.1 and error < 0.05
    out = gaze.generate(video, torch.tensor(counts) / V)
    got = [[ids[b][~pad[b]].tolist() for ids, pad in split_frames(out)] for b in range(2)]
    assert got == labels


@pytest.mark.parametrize("policy", ["sampling", "reference"])
def test_grpo_finds_the_rewarded_patch(policy):
    """One frame of two gazes, reward 1 where patch 7 is among them: it is taken more and more often."""
    torch.manual_seed(0)
    gaze, video, g = Gaze(tiny_gaze().config), normal_video(1, 1), torch.Generator().manual_seed(0)
    optimizer, shares = torch.optim.Adam(gaze.parameters(), lr=2e-3), []
    for _ in range(30):
        gazing = gaze.generate(video, 2 / V, temperature=1.0, num_copies=32, generator=g)
        hit = (gazing["gazing_pos"] == 7).any(1, keepdim=True).float()
        advantage = discounted_advantages(hit - hit.mean(), [0], gazing, 0.995)
        optimizer.zero_grad()
        grpo_loss(gaze(video, gazing, policy)[0], advantage).backward()
        optimizer.step()
        shares.append(hit.mean().item())
    assert sum(shares[:3]) / 3 < 0.2 and sum(shares[-3:]) / 3 > 0.6


# ----------------------------------------------------------------------------------------------------------------------
# order of the data, budgets, schedules

def clips_per_step(n, batch_size, world, micro, start=0, total=9, seed=3):
    """Sorted clips of every step, over all ranks."""
    steps = [[] for _ in range(start, total)]
    for rank in range(world):
        sampler = StepSampler(n, batch_size, rank, world, micro, seed, start, total)
        batches = list(sampler)
        assert len(batches) == len(sampler) == (total - start) * sampler.n_micro
        assert max(map(len, batches)) <= (micro or batch_size)
        for i, batch in enumerate(batches):
            steps[i // sampler.n_micro] += batch
    return [sorted(s) for s in steps]


@pytest.mark.parametrize("n, batch_size", [(12, 4), (10, 6), (3, 6), (7, 12)])
def test_clips_of_a_step(n, batch_size):
    whole = clips_per_step(n, batch_size, 1, 0)
    assert all(len(s) == batch_size for s in whole)
    for world, micro in [(1, 1), (1, 4), (2, 0), (2, 1), (2, 2)]:
        assert clips_per_step(n, batch_size, world, micro) == whole
        assert clips_per_step(n, batch_size, world, micro, start=4) == whole[4:]
    assert n < batch_size or clips_per_step(n, batch_size, 1, 0, seed=4) != whole
    sampler = StepSampler(n, batch_size, 0, 1, 0, 3, 0, 9)
    stream = [i for batch in sampler for i in batch]
    assert [i // n for i in stream] == sorted(i // n for i in stream), "an item says its epoch"
    stream = [i % n for i in stream]
    epochs = [stream[i:i + n] for i in range(0, len(stream) - n + 1, n)]
    assert all(sorted(e) == list(range(n)) for e in epochs), "an epoch has every clip once"
    assert len(epochs) < 2 or epochs[0] != epochs[1]


@pytest.mark.parametrize("batch_size, world, taken", [(8, 2, 8), (5, 2, 4), (7, 2, 8), (1, 4, 4), (64, 3, 63)])
def test_a_batch_that_does_not_divide_is_adjusted_with_one_warning(batch_size, world, taken):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert [divide_batch(batch_size, rank, world) for rank in range(world)] == [taken] * world
    assert [f"batch_size={batch_size} " in str(w.message) for w in said] == [True] * (taken != batch_size)


@pytest.mark.parametrize("micro, arithmetic", [
    (0, "12 clips x 1 micro-batches"), (4, "4 clips x 3 micro-batches"), (9, "6 clips x 2 micro-batches"),
    (5, "4 clips x 3 micro-batches"), (50, "12 clips x 1 micro-batches"), (8, "6 clips x 2 micro-batches")])
def test_micro_batches_are_as_equal_as_can_be(micro, arithmetic):
    sampler = StepSampler(50, 24, 1, 2, micro, 0, 0, 2)
    assert sampler.arithmetic == f"batch 24 = {arithmetic} x 2 processes"
    uneven = StepSampler(50, 7, 0, 1, 3, 0, 0, 1)
    assert uneven.arithmetic == "batch 7 = (3 + 3 + 1) clips in 3 micro-batches x 1 processes"
    assert [len(batch) for batch in uneven] == [3, 3, 1]


@pytest.mark.parametrize("n, world", [(10, 1), (10, 3), (2, 4), (9, 2)])
def test_shards_cover_everything_once(n, world):
    shards = [shard(n, rank, world, 3) for rank in range(world)]
    assert sorted(i for s in shards for batch in s for i in batch) == list(range(n))
    assert all(1 <= len(batch) <= 3 for s in shards for batch in s)


@pytest.mark.parametrize("kind, mean", [("fixed", 0.3), ("uniform", 0.11), ("exponential", None)])
def test_draw_ratio(kind, mean):
    low, high, rate, g = 0.02, 0.2, 10.0, torch.Generator().manual_seed(0)
    draws = torch.tensor([draw_ratio(kind, 0.3, low, high, rate, g) for _ in range(2000)])
    if kind == "fixed":
        assert (draws == 0.3).all()
        return
    assert draws.min() >= low and draws.max() <= high and draws.min() < 0.03 and draws.max() > 0.18
    if mean is None:  # of an exponential cut off to (low, high)
        a, b = math.exp(-rate * low), math.exp(-rate * high)
        mean = ((low + 1 / rate) * a - (high + 1 / rate) * b) / (a - b)
    assert draws.mean().item() == pytest.approx(mean, rel=0.03)


def test_split_ratio():
    g = torch.Generator().manual_seed(0)
    assert split_ratio("uniform", 0.3, 4, "10,3", g).tolist() == [0.3] * 4
    shares = torch.tensor([10, 3, 3, 3]) / 19 * 4
    assert split_ratio("mean", 0.1, 4, "10,3", None).tolist() == pytest.approx((shares * 0.1).tolist())
    draws = torch.stack([split_ratio("dirichlet", 0.1, 4, "10,3", g) for _ in range(2000)])
    assert draws.sum(1).tolist() == pytest.approx([0.4] * 2000) and draws.min() > 0
    assert draws.mean(0).tolist() == pytest.approx((shares * 0.1).tolist(), rel=0.05)
    # variance of a Dirichlet's share: a (A - a) / (A² (A + 1))
    assert draws[:, 0].var().item() == pytest.approx(0.4 ** 2 * 10 * 9 / (19 ** 2 * 20), rel=0.15)
    full = split_ratio("mean", 0.9, 4, "10,3", None)
    assert full.tolist() == pytest.approx([1, *(shares * 0.9)[1:].tolist()]), "a frame has no more than all patches"
    a, b = (split_ratio("dirichlet", 0.1, 4, "5", torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize("alpha, n_frames", [("1,2,3", 2), ("0,1", 4), ("-1", 4)])
def test_bad_alpha(alpha, n_frames):
    with pytest.raises(ValueError, match="alpha"):
        parse_alpha(alpha, n_frames)


def test_budgets_follow_the_rule_of_generate(gaze):
    ratios = [0.0, 0.049, 0.05, 3 / 20, 0.1499, 7 / 20, 0.999, 1.0]
    stream = gaze.stream(gazing_ratio=ratios)
    assert to_budgets(ratios, V) == [1, 1, 1, 3, 2, 7, 19, 20]
    assert [max(stream.budget(t)) for t in range(len(ratios))] == [1, 1, 1, 3, 2, 7, 19, 20]
    gazing = random_gazing([3, 20, 1], 5, V, torch.Generator().manual_seed(0))
    for t, (ids, padded) in enumerate(split_frames(gazing)):
        assert not padded.any() and (ids // V == t).all() and all(len(set(r)) == len(r) for r in ids.tolist())


def test_last_slots():
    frames = [(torch.zeros(2, n, dtype=torch.long), torch.tensor(pad, dtype=torch.bool))
              for n, pad in [(3, [[0, 0, 0], [0, 1, 1]]), (1, [[0], [0]]), (2, [[0, 1], [0, 0]])]]
    assert last_slots(join_frames(frames)).tolist() == [[2, 3, 4], [0, 3, 5]]


def test_schedules():
    def lr(kind, *steps):
        return [learning_rate(kind, step, 100, 1.0, 0.1, 0.2) for step in steps]
    assert lr("constant", 0, 50, 100) == [1.0] * 3
    assert lr("linear", 0, 50, 100) == pytest.approx([1.0, 0.55, 0.1])
    assert lr("linear_w_warmup", 0, 9, 19, 20, 60, 100) == pytest.approx([0.05, 0.5, 1.0, 1.0, 0.55, 0.1])
    assert learning_rate("linear_w_warmup", 0, 3, 1.0, 0.0, 0.1) == 1.0, "no step to warm up in"
    assert [exponential(s, 10, 3, 0.03) for s in (0, 5, 10)] == pytest.approx([3, 0.3, 0.03])


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(loss):
    with pytest.raises(FloatingPointError, match="step 7.*a/b/c.mp4"):
        check_finite(loss, 7, ["a/b/c.mp4"])


def test_losses_and_weights_are_checked_when_asked():
    module = torch.nn.Linear(2, 2)
    losses = LossCheck()
    for step, loss in enumerate([1.0, 2.0]):
        losses.add(torch.tensor(loss), step, ["a.mp4"])
    losses.check(module)
    with torch.no_grad():
        module.weight[0, 0] = math.nan
    losses.check(module)  # no step since
    losses.add(torch.tensor(1.0), 2, ["a.mp4"])
    with pytest.raises(FloatingPointError, match="weights are not finite after step 2"):
        losses.check(module)
    for step in (3, 4):
        losses.add(torch.tensor(math.inf), step, [f"{step}.mp4"])
    with pytest.raises(FloatingPointError, match="loss is inf at step 3; clips of this step: 3.mp4"):
        losses.check()


def test_a_broken_step_is_never_saved(run, stages, tmp_path, monkeypatch):
    """A loss that is not finite between two log lines: the checkpoint before it stays, and the error names the step."""
    real = train_ntp.ntp_loss
    calls = []

    def breaks(*args):
        calls.append(1)
        nll, error = real(*args)
        return (nll * math.nan if len(calls) == 8 else nll), error
    monkeypatch.setattr(train_ntp, "ntp_loss", breaks)
    with pytest.raises(FloatingPointError, match="at step"):
        run(train_ntp, [*NTP, "--steps=9", "--log_every=99", "--val_every=99", "--save_every=2"], "out")
    state = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    assert state["step"] > 0 and all(weight.isfinite().all() for weight in state["model"].values())


@pytest.mark.parametrize("split", ["mean", "self"])
def test_rollouts_of_several_micro_batches_at_once(gaze, split):
    """At a temperature that takes the best patch they are those of each micro-batch by itself."""
    cfg = train_grpo.Config(n_frames=4, group_size=2, ratio=0.4, split=split, requirement="fixed",
                            task_loss_requirement=0.0)
    videos = [normal_video(2), normal_video(1, seed=5)]
    together = train_grpo.roll_out(gaze, videos, cfg, 0, 1e-9)
    for video, got in zip(videos, together, strict=True):
        want, = train_grpo.roll_out(gaze, [video], cfg, 0, 1e-9)
        for key in ("gazing_pos", "if_padded_gazing", "num_gazing_each_frame"):
            real = ~want["if_padded_gazing"] if key == "gazing_pos" else ...
            assert torch.equal(got[key][real], want[key][real])


@pytest.mark.parametrize("shape", [(2, 24, 24), (1, 16, 40), (3, 40, 16)])
def test_an_orthogonalized_matrix_has_singular_values_near_1(shape):
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert values.quantile(0.1) > 0.5 and values.max() < 1.3


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9")
def test_muon_takes_the_steps_of_torchs_muon():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(24, 16), (16, 24), (16, 24)]]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = MatrixMuon(ours, 0.1), torch.optim.Muon(theirs, 0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0.02)  # torch computes in bfloat16; a step changes weights by 0.1


# ----------------------------------------------------------------------------------------------------------------------
# the scripts

SIZES = ["--scales=16+32", "--patch_size=8", "--hidden_size=32", "--intermediate_size=64"]
RUN = ["--n_frames=4", "--device=cpu", "--n_workers=0", "--batch_size=4", "--micro_batch=2", "--val_clips=3",
       "--log_every=1"]
MAE = [*SIZES, *RUN, "--max_num_frames=8", "--num_hidden_layers=1", "--num_attention_heads=2",
       "--decoder_hidden_size=32", "--decoder_num_hidden_layers=1", "--decoder_num_attention_heads=2",
       "--decoder_intermediate_size=64", "--recon_frames=2", "--ratio_max=0.4", "--steps=4", "--val_every=2",
       "--save_every=2"]
NTP = [*SIZES, *RUN, "--num_layers=2", "--num_heads=4", "--num_multi_token_pred=3", "--epochs=4", "--save_every=3",
       "--val_every=3", "--optimizer=adam", "--lr=1e-3"]
GRPO = [*RUN, "--group_size=3", "--recon_sample_rate=0.5", "--optimizer=adam", "--epochs=2.7", "--save_every=2",
        "--val_every=2", "--ratio=0.3"]
TIMES = ("time", "ms_per_step", "data_ms", "memory_gb", "rollout_s", "reward_s", "update_s")


def launch(script, *args, cwd, processes=1, works=True):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / script), *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env)
    assert (done.returncode == 0) == works, done.stdout + done.stderr
    return done.stdout + done.stderr


def metrics(folder):
    """{(step, names): values}; a resumed run writes the validation of its first step again."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        numbers = [x for v in row.values() for x in (v if isinstance(v, list) else [v])]
        assert all(math.isfinite(x) for x in numbers), row
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
    return {(row["step"], *row): row for row in rows}


@pytest.fixture(scope="module")
def stages(tmp_path_factory, toy):
    """Folder of a reconstructor, labels and a gaze model, made by command line."""
    folder = tmp_path_factory.mktemp("stages")
    launch("train_videomae.py", *MAE, f"--root={toy}", "--out_dir=mae", cwd=folder)
    launch("label.py", f"--root={toy}", "--videomae=mae", "--out=labels.json", "--n_frames=4", "--device=cpu",
           cwd=folder)
    pack_labels(folder / "labels.json")
    launch("train_ntp.py", *NTP, f"--root={toy}", "--labels=labels.packed", "--videomae=mae", "--out_dir=ntp",
           "--n_workers=1", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def grpo(stages, toy):
    launch("train_grpo.py", *GRPO, f"--root={toy}", "--videomae=mae", "--init_from=ntp", "--out_dir=grpo", cwd=stages)
    return stages / "grpo"


def test_train_videomae(stages):
    rows = metrics(stages / "mae")
    assert sorted({step for step, *_ in rows}) == [0, 1, 2, 3, 4]
    assert [r["step"] for r in rows.values() if "val_loss" in r] == [0, 2, 4]
    assert VideoMAE.from_pretrained(stages / "mae").config.ids_per_scale == [4, 16]
    assert (stages / "mae" / "val.png").stat().st_size > 1000


def test_perceptual_losses_and_start_weights(run, networks, tmp_path):
    """Fine-tune a ViTMAE of transformers with all three terms, resume it; the other stages take them too."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    sizes = dict(a[2:].split("=") for a in MAE if any(w in a for w in ("hidden", "mediate", "heads", "patch")))
    config = ViTMAEConfig(image_size=32, **{k: int(v) for k, v in sizes.items()})
    ViTMAEForPreTraining(config).save_pretrained(tmp_path / "start")
    loss = ["--loss_type=l1+dinov2_reg+siglip2", "--loss_weights=1+0.3+0.3",
            *(f"--{name}={folder}" for name, (folder, _) in networks.items())]
    start = [*MAE, *loss, f"--init_from={tmp_path / 'start'}"]
    run(train_videomae, start, "whole")
    run(train_videomae, start, "halves", die_at=2)
    run(train_videomae, [*start, "--init_from=resume"], "halves")
    assert_same_run(tmp_path)
    measured = []
    for args in ([], loss):
        run(train_ntp, [*NTP, *args, "--steps=1"], "ntp")
        run(train_grpo, [*GRPO, *args, "--steps=1"], "grpo")
        measured.append([r["val_loss"] for r in metrics(tmp_path / "ntp").values() if "val_loss" in r][-1])
        measured.append([-r["val_reward"] for r in metrics(tmp_path / "grpo").values() if "val_reward" in r][-1])
    assert measured[2] > 1.01 * measured[0] and measured[3] > 1.01 * measured[1]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_resumed_with_perceptual_networks_of_a_weights_file(run, networks, tmp_path, monkeypatch, suffix):
    """The checkpoint holds them: neither file nor hub is asked again, and bits do not change."""
    import transformers
    for name, (_, network) in networks.items():  # with no folder given the sizes are the published ones, here these
        kind = {"dinov2_reg": "Dinov2WithRegistersConfig", "siglip2": "SiglipVisionConfig"}[name]
        monkeypatch.setattr(transformers, kind, lambda config=network.config, **sizes: config)
    monkeypatch.setattr(weights, "announce", lambda hub_id: pytest.fail(f"asks for {hub_id}"))
    cfg = train_videomae.configurator.load(train_videomae.Config, MAE, verbose=False)
    torch.manual_seed(0)
    state = VideoMAE(cfg.model()).state_dict()
    for name, (_, network) in networks.items():
        state |= {f"{name}.{k}": v for k, v in network.state_dict().items()}
    path = tmp_path / f"videomae{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    args = [*MAE, "--loss_type=l1+dinov2_reg+siglip2", "--loss_weights=1+0.3+0.3"]
    run(train_videomae, [*args, f"--init_from={path}"], "whole")
    run(train_videomae, [*args, f"--init_from={path}"], "halves", die_at=3)
    path.unlink()
    run(train_videomae, [*args, "--init_from=resume"], "halves")
    assert_same_run(tmp_path)


def test_train_ntp(stages, toy):
    rows = metrics(stages / "ntp")
    steps = [r for r in rows.values() if "ntp" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[0]["ntp"] < 1.2 * math.log(V + 1)
    # three steps see every clip twice; single steps see different clips, so their losses do not compare
    assert sum(r["ntp"] for r in steps[3:]) < sum(r["ntp"] for r in steps[:3])
    validations = [r for r in rows.values() if "val_ntp" in r]
    assert [r["step"] for r in validations] == [0, 3, 6]
    assert all(r["val_ntp"] < 1.2 * math.log(V + 1) for r in validations)  # three clips: they need not improve
    assert all({"val_loss", "val_predicted", "val_first_accuracy"} <= r.keys() for r in validations)
    gaze = Gaze.from_pretrained(stages / "ntp")
    assert not gaze.config.reference_decoding and gaze.config.gazing_ratio == 0.1
    assert gaze.generate(normal_video(1))["num_gazing_each_frame"].tolist() == [2] * 4
    assert (stages / "ntp" / "val.png").stat().st_size > 1000
    run = json.loads((stages / "ntp" / "run.json").read_text())
    assert run["config"]["lr"] == 1e-3 and run["world"] == 1


def test_train_grpo_self(grpo):
    """Budgets from the model's own early stopping (the default split)."""
    steps = [r for r in metrics(grpo).values() if "reward" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5]
    for row in steps:
        assert row["reward"] == pytest.approx(-row["measured"], rel=1e-4)
        assert sum(row["per_scale"]) == pytest.approx(1, abs=0.01) and 1 <= row["gazes_per_frame"] <= 6
        assert 0 < row["entropy"] < math.log(V) + 0.3 and 0 <= row["no_spread"] <= 1
    Gaze.from_pretrained(grpo)
    assert (grpo / "val.png").stat().st_size > 1000


@pytest.mark.parametrize("split, more", [
    ("dirichlet", ["--gazing_ratio=exponential", "--policy=sampling", "--optimizer=sgd", "--val_split=dirichlet"]),
    ("uniform", ["--stop_early=1", "--requirement=fixed", "--task_loss_requirement=0.9", "--reward_batch=2"]),
    ("mean", ["--temperature_end=0.5", "--val_ratio=0.75", "--val_requirement=0.9", "--micro_batch=0"])])
def test_train_grpo_other_splits(stages, toy, tmp_path, split, more):
    launch("train_grpo.py", *GRPO, f"--root={toy}", "--videomae=mae", "--init_from=ntp", f"--out_dir={tmp_path}",
           f"--split={split}", "--epochs=1", *more, cwd=stages)
    steps = [r for r in metrics(tmp_path).values() if "reward" in r]
    assert len(steps) == 2 and all(r["reward_spread"] > 0 for r in steps)
    if split == "mean":
        assert steps[0]["gazes_per_frame"] == 21 / 4  # 0.3 · 4 · 20 · (10, 3, 3, 3) / 19 = 12.6, 3.8, 3.8, 3.8
    before, after = (Gaze.from_pretrained(f) for f in (stages / "ntp", tmp_path))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_eval(stages, grpo, toy):
    launch("eval.py", f"--root={toy}", "--videomae=mae", "--models=ntp=ntp,grpo=grpo", "--out_dir=eval", "--n_frames=4",
           "--ratios=0.1,0.3", "--batch_size=2", "--greedy_clips=2", "--device=cpu", cwd=stages)
    report = json.loads((stages / "eval" / "eval.json").read_text())
    assert report["budgets"] == {"0.1": [4, 1, 1, 1], "0.3": [12, 3, 3, 3]}
    table = report["results"]["0.1"]
    assert table.keys() == {"random", "uniform", "frame_diff", "ntp", "grpo", "greedy"}
    assert table["greedy"]["loss"] == min(row["loss"] for row in table.values())
    for row in table.values():
        assert row["clips"] == 3 and sum(row["share_per_scale"]) == pytest.approx(1, abs=1e-4)
        assert sum(row["per_frame"]) / 4 == pytest.approx(row["loss"], rel=1e-4)
    names = {p.name for p in (stages / "eval").glob("*.png")}
    assert {"loss_against_ratio.png", "predicted_against_measured.png", "gaze_ntp.png", "gaze_random.png"} <= names


@pytest.fixture
def run(stages, toy, tmp_path, monkeypatch):
    """run(script, args, folder, die_at=None): main() in this process, in whose step die_at, between micro-batches,
    `die` is called: by default it raises, as if killed."""
    files = {train_videomae: [], train_ntp: [f"--labels={stages / 'labels.json'}", f"--videomae={stages / 'mae'}"],
             train_grpo: [f"--init_from={stages / 'ntp'}", f"--videomae={stages / 'mae'}"]}
    fetch = Feed.__next__

    def killed():
        raise KeyboardInterrupt

    def main(script, args, folder, die_at=None, die=killed):
        fetched = []

        def fetch_or_die(feed):
            fetched.append(1)
            if die_at is not None and len(fetched) == 2 * die_at + 2:
                die()
            return fetch(feed)
        monkeypatch.setattr(Feed, "__next__", fetch_or_die)
        argv = ["script", *files[script], *args, f"--root={toy}", f"--out_dir={tmp_path / folder}"]
        monkeypatch.setattr(sys, "argv", argv)
        torch.manual_seed(12345)
        if die_at is None or die is not killed:
            script.main()
        else:
            with pytest.raises(KeyboardInterrupt):
                script.main()
    return main


@pytest.mark.parametrize("script, args, die_at", [
    (train_videomae, MAE, 3), (train_videomae, [*MAE, "--crop=random", "--random_start=true", "--n_workers=1",
                                 "--optimizer=adamw"], 2),
    (train_ntp, [*NTP, "--save_every=2", "--mirror=true"], 3), (train_ntp, [*NTP, "--optimizer=muon"], 3),
    (train_grpo, GRPO, 3),
    (train_grpo, [*GRPO, "--split=dirichlet", "--crop=random", "--optimizer=sgd", "--dtype=float16"], 2)])
def test_a_resumed_run_equals_an_uninterrupted_one(run, tmp_path, script, args, die_at):
    """Bit for bit, though it was killed in the middle of an epoch and of an accumulation, after its checkpoint."""
    run(script, args, "whole")
    run(script, args, "halves", die_at=die_at)
    run(script, [*args, "--init_from=resume"], "halves")
    assert_same_run(tmp_path)


def assert_same_run(tmp_path):
    """The runs in the folders whole and halves have left the same, whatever happened to the second one."""
    whole, halves = ((tmp_path / f / "metrics.jsonl").read_text().splitlines() for f in ("whole", "halves"))
    assert len(whole) == len(halves), "no row is missing or doubled"
    assert metrics(tmp_path / "halves") == metrics(tmp_path / "whole")
    a, b = (torch.load(tmp_path / f / "last.pt", weights_only=True) for f in ("halves", "whole"))
    assert a["step"] == b["step"] and a["best"] == b["best"]
    for name in a["model"]:
        assert torch.equal(a["model"][name], b["model"][name]), name
    for folder in ("best", "."):
        a, b = ((tmp_path / f / folder / "model.safetensors").read_bytes() for f in ("halves", "whole"))
        assert a == b, folder


@pytest.mark.parametrize("script, args", [(train_ntp, NTP), (train_grpo, GRPO), (train_videomae, MAE)])
def test_sigterm_saves_and_leaves(run, tmp_path, script, args):
    """A preempted job: the step is finished, last.pt written, the script returns, and the run goes on from there."""
    run(script, args, "whole")
    run(script, args, "halves", die_at=2, die=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert torch.load(tmp_path / "halves" / "last.pt", weights_only=True)["step"] == 3
    run(script, [*args, "--init_from=resume"], "halves")
    assert_same_run(tmp_path)


KILLED_WRITING = """
import io, os, signal, sys, torch
sys.path.insert(0, sys.argv.pop(1))
import train_ntp
save, calls = torch.save, []

def save_half_the_third(state, file):
    calls.append(1)
    if len(calls) < 3:
        return save(state, file)
    whole = io.BytesIO()
    save(state, whole)
    file.write_bytes(whole.getvalue()[:len(whole.getvalue()) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_half_the_third
train_ntp.main()
"""


def test_killed_while_a_checkpoint_is_written(run, stages, toy, tmp_path):
    args = [*NTP, "--save_every=1"]
    run(train_ntp, args, "whole")
    (tmp_path / "killed.py").write_text(KILLED_WRITING)
    launch(tmp_path / "killed.py", ROOT, *args, f"--labels={stages / 'labels.json'}", f"--videomae={stages / 'mae'}",
           f"--root={toy}", f"--out_dir={tmp_path / 'halves'}", cwd=tmp_path, works=False)
    assert (tmp_path / "halves" / ".last.pt").exists()
    assert torch.load(tmp_path / "halves" / "last.pt", weights_only=True)["step"] == 1
    run(train_ntp, [*args, "--init_from=resume"], "halves")
    assert_same_run(tmp_path)


STEPS = ["--steps=20", "--batch_size=8", "--val_every=20", "--save_every=20", "--val_clips=2"]


@pytest.mark.parametrize("script, args", [
    (train_ntp, [*NTP, "--optimizer=sgd", "--lr=0.02"]), (train_ntp, [*NTP, "--optimizer=muon"]),
    (train_grpo, [*GRPO, "--optimizer=sgd", "--lr=0.01"])])
def test_one_process_two_processes_and_accumulation_train_alike(run, stages, toy, tmp_path, monkeypatch, script, args):
    """Losses of 20 steps with batch 8, 4 + 4 and 2 x 4. With SGD, as Adam hides a wrong scale of gradients, and with
    Muon, which in bfloat16 made more of the order of sums."""
    monkeypatch.setattr(train_grpo, "roll_out", rollouts_per_clip.roll_out)
    for name, micro in (("one", 8), ("accumulated", 4)):
        run(script, [*args, *STEPS, f"--micro_batch={micro}"], name)
    files = [f"--labels={stages / 'labels.json'}"] if script is train_ntp else [f"--init_from={stages / 'ntp'}"]
    out = two_processes("train_ntp" if script is train_ntp else "rollouts_per_clip", *args, *STEPS, *files,
                        "--micro_batch=4", f"--root={toy}", f"--videomae={stages / 'mae'}",
                        f"--out_dir={tmp_path / 'two'}")
    assert "batch 8 = 4 clips x 1 micro-batches x 2 processes" in out
    runs = {name: {key: row for key, row in metrics(tmp_path / name).items() if key[0] > 0}
            for name in ("one", "two", "accumulated")}
    moved = Gaze.from_pretrained(tmp_path / "one").state_dict()
    assert any((v - moved[k]).abs().max() > 1e-3 for k, v in Gaze.from_pretrained(stages / "ntp").state_dict().items())
    for name in ("two", "accumulated"):
        assert runs["one"].keys() == runs[name].keys() and len(runs[name]) == 21
        for key, row in runs["one"].items():
            for field in {"ntp", "task_error", "reward", "measured", "reward_spread"} & row.keys():
                # metrics have six digits: above 1 the last one is 1e-5
                assert row[field] == pytest.approx(runs[name][key][field], abs=2e-5), (name, key, field)
        for k, v in Gaze.from_pretrained(tmp_path / name).state_dict().items():
            torch.testing.assert_close(v, moved[k], rtol=0, atol=1e-5, msg=k)


def test_a_corrupt_file_counts_once(stages, toy, tmp_path):
    """Both processes meet it again and again."""
    shutil.copytree(toy, tmp_path / "toy")
    (tmp_path / "toy" / "train" / "000001.mp4").write_bytes(b"no video")
    out = two_processes("train_ntp", *NTP, "--steps=6", f"--root={tmp_path / 'toy'}",
                        f"--labels={stages / 'labels.json'}", f"--out_dir={tmp_path / 'out'}")
    assert out.count("000001.mp4: cannot") == 2
    assert [row["unreadable"] for row in metrics(tmp_path / "out").values() if "unreadable" in row][-1] == 1


@pytest.mark.parametrize("script, args", [(train_ntp, NTP), (train_grpo, GRPO)])
def test_the_result_gazes_as_it_was_validated(run, stages, tmp_path, script, args):
    """Whatever the folder that it started from says, and after a resume."""
    more = ["--steps=1", "--val_ratio=0.25", "--val_requirement=0.5"]
    run(script, [*args, *more, f"--init_from={stages / 'ntp'}"], "out")
    for resumed in (False, True):
        if resumed:
            run(script, [*args, *more, "--val_requirement=none", "--init_from=resume"], "out")
        config = Gaze.from_pretrained(tmp_path / "out").config
        assert (config.gazing_ratio, config.task_loss_requirement) == (0.25, None if resumed else 0.5)


def test_processes_with_different_settings_are_refused(stages, toy, tmp_path):
    (tmp_path / "c.py").write_text("import os\nlr = 0.1 if os.environ['RANK'] == '0' else 0.2\n")
    out = launch("train_ntp.py", *NTP, tmp_path / "c.py", f"--root={toy}", "--labels=labels.json", "--out_dir=none",
                 cwd=stages, processes=2, works=False)
    assert "process 1 has lr=0.2, process 0 0.1: start all processes with the same command" in out


@pytest.mark.parametrize("script, args", [
    (train_ntp, NTP), (train_grpo, GRPO), (train_videomae, [*MAE, "--initializer_range=0.3"])])
def test_half_precision(run, tmp_path, script, args):
    """Losses close to those of float32; float16 keeps the state of its gradient scaler."""
    first = {}
    for dtype in ("float32", "bfloat16", "float16"):
        run(script, [*args, f"--dtype={dtype}", "--steps=2", "--val_every=9", "--compile=true"], dtype)
        row = [r for r in metrics(tmp_path / dtype).values() if "lr" in r][-1]
        first[dtype] = row["measured" if script is train_grpo else "ntp" if script is train_ntp else "loss"]
        scaler = torch.load(tmp_path / dtype / "last.pt", weights_only=True)["scaler"]
        assert bool(scaler) == (dtype == "float16")
    assert first["bfloat16"] == pytest.approx(first["float32"], rel=0.05) and len(set(first.values())) > 1
    assert first["float16"] == pytest.approx(first["float32"], rel=0.02)


def test_rewards_in_parts(gaze, mae):
    """reward_batch changes memory, not rewards; padded slots and unequal budgets included."""
    video, frames = normal_video(2), [1, 3]
    gazing = gaze.generate(video, torch.rand(6, 4), temperature=1.0, num_copies=3)
    whole = -mae(video, gazing, frames)[1]
    for most in (0, 1, 2, 4, 5, 100):
        torch.testing.assert_close(train_grpo.reward(mae, video, gazing, frames, most), whole)


def test_mirror_moves_gazes_with_the_pixels():
    """The mean colour under every gazed patch stays the same, and all four reflections occur."""
    torch.manual_seed(0)
    config = tiny_gaze().config
    V, T = config.num_ids, 2
    video = torch.rand(40, 1, 3, config.image_size, config.image_size)[:1].expand(40, T, -1, -1, -1)
    ids = torch.rand(40, T, V).argsort(-1)[..., :5]
    gazing = {"gazing_pos": (ids + V * torch.arange(T)[:, None]).flatten(1),
              "num_gazing_each_frame": torch.tensor([5, 5]),
              "if_padded_gazing": torch.rand(40, 5 * T) < 0.2}
    before = gazing["gazing_pos"].clone()

    def colours(video, pos):
        cells = [torch.nn.functional.adaptive_avg_pool2d(video.flatten(0, 1), s // config.patch_size).flatten(2)
                 for s in config.scale_list]
        cells = torch.cat(cells, -1).view(40, T, 3, V).transpose(1, 2).flatten(2)  # (B, 3, T·V)
        return cells.gather(2, pos.unsqueeze(1).expand(-1, 3, -1))
    new_video, new = train_ntp.mirror(video, gazing, config)
    real = ~gazing["if_padded_gazing"]
    assert torch.equal(gazing["gazing_pos"], before)
    want, got = (colours(v, g["gazing_pos"]).transpose(1, 2)[real] for v, g in ((video, gazing), (new_video, new)))
    torch.testing.assert_close(got, want)
    assert len({tuple(v.flatten().tolist()) for v in new_video}) == 4


def test_wandb_mirrors_the_metrics(tmp_path, monkeypatch):
    logged = []
    fake = types.SimpleNamespace(init=lambda **about: logged.append(about) or fake,
                                 log=lambda row, step: logged.append((step, row)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    cfg = train_grpo.Config(out_dir=str(tmp_path / "run"), wandb="project")
    Log(cfg, 0, 1, torch.device("cpu"), []).write(3, reward=0.5, per_scale=[0.25, 0.75])
    assert logged[0]["project"] == "project" and logged[0]["config"]["gamma"] == 0.995
    step, row = logged[1]
    assert step == 3 and row["reward"] == 0.5 and row["per_scale/1"] == 0.75 and "per_scale" not in row


class Alone:
    """Stands in for DistributedDataParallel where a test plays the processes one after the other."""

    def __init__(self, module):
        self.module, self.no_sync = module, contextlib.nullcontext

    def __call__(self, *args):
        return self.module(*args)


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("script, args, draw", [
    (train_videomae, MAE, (train_videomae, "random_gazing")),
    (train_grpo, [*GRPO, "--split=mean"], (train_grpo, "roll_out"))])
def test_every_process_draws_for_itself(run, monkeypatch, script, args, draw, resumed):
    """Random gazes and rollouts must differ between processes, or more of them add nothing but repetition."""
    states, original = [[], []], getattr(*draw)
    if resumed:
        run(script, args, "out", die_at=2)
    for rank in (1, 0):
        def record(*args, rank=rank):
            if not isinstance(args[-1], torch.Generator):  # validation brings a generator
                states[rank].append(torch.get_rng_state().numpy().tobytes())
            return original(*args)
        monkeypatch.setattr(*draw, record)
        monkeypatch.setattr(processes, "DistributedDataParallel", Alone)
        monkeypatch.setattr(processes, "init_processes", lambda device, rank=rank: (rank, 2, torch.device("cpu")))
        run(script, [*args, "--init_from=resume"] if resumed else args, "out")
    assert len(states[0]) == len(states[1]) > 1
    assert not set(states[0]) & set(states[1]), "some draws are the same"
