"""ARGaze's training: losses, schedules and optimizer against published figures; runs, killed, resumed and shared."""
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_argaze_model import GOLDEN, published
from two_processes import two_processes

from argaze import make_data, train
from argaze.model import ARGaze, published_name
from argaze.train import Config, coordinate_loss, learning_rate, make_optimizer, own_slots, reverse_kl
from lib.loader import Feed

ROOT = Path(__file__).parent.parent
NUMBERS = json.loads((GOLDEN / "numbers.json").read_text())


@pytest.fixture(scope="module")
def want():
    return load_file(GOLDEN / "tensors.safetensors")


# ----------------------------------------------------------------------------------------------------------------------
# loss


def losses(logits, want):
    kl, entropy = reverse_kl(logits, want["gt"])
    counted = want["labels"][..., 2] == 1
    coord = coordinate_loss(logits, want["labels"][..., :2], counted, counted.sum())
    return kl, entropy, coord


@pytest.mark.parametrize("kind", ["ref", "fix", "v2_ref", "v2_fix"])
def test_losses_are_the_published_ones(want, kind):
    figure = kind.replace("_", ".") if "v2" in kind else f"v1.{kind}"
    found = losses(want[f"{figure}.logits"].squeeze(1), want)
    for name, value in zip(("kl", "entropy", "coord"), found, strict=True):
        assert value.item() == pytest.approx(NUMBERS["loss"][kind][name], rel=1e-4), name


def test_a_target_of_any_scale_gives_the_same_loss(want):
    """The released code takes targets with peak 1 of EgoExo4D as they come, which is an error."""
    logits = want["v1.fix.logits"].squeeze(1)
    kl = reverse_kl(logits, want["gt_peak1"])[0]
    assert kl.item() == pytest.approx(NUMBERS["loss"]["fix"]["kl_gt_peak1_normalised"], rel=1e-4)


@pytest.mark.parametrize("figure, variant, weights", [
    ("fix.kl", "template", (0.0, 0.0)), ("ref.kl", "template", (0.0, 0.0)),
    ("ref.kl+1.0*entropy", "template", (1.0, 0.0)),
    ("v2_fix.kl+2*coord", "twocross", (0.0, 2.0)), ("v2_ref.kl+2*coord", "twocross", (0.0, 2.0))])
def test_gradients_are_the_published_ones(want, figure, variant, weights):
    compat = "ref" in figure
    model = published(variant, compat=compat, history_values="logits", train_encoder=variant == "twocross")
    kl, entropy, coord = losses(model(want["clip"].movedim(1, 2)), want)
    (kl + weights[0] * entropy + weights[1] * coord).backward()

    named = {published_name(name): p.grad for name, p in model.named_parameters()}
    for name, norm in NUMBERS["grad_norm"][figure].items():
        if norm is not None and norm > 1e-5:  # smaller: rounding of a gradient that is 0
            assert named[name].norm().item() == pytest.approx(norm, rel=1e-4), name
        elif norm is None and not (compat and name.startswith("multiscale_proj")):  # released: never trained
            assert named[name] is None, name
    for name in (name for name in want if name.startswith(f"grad.{figure}.")):
        expected, found = want[name], named[name.removeprefix(f"grad.{figure}.")]
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), name


# ----------------------------------------------------------------------------------------------------------------------
# schedules and optimizer


@pytest.mark.parametrize("name, epochs, settings", [
    ("v1", 15, {}), ("v2_egtea_ego4d", 30, dict(lr_start=1e-6, lr_end=0.0, warmup=2.0))])
def test_learning_rates_are_the_published_ones(name, epochs, settings):
    cfg = Config(**settings)
    for epoch, value in NUMBERS["lr"][name]:
        assert learning_rate(cfg, epoch, epochs) == pytest.approx(value, rel=1e-6)


def test_weight_decay_spares_what_the_published_code_spares():
    model = published("template")
    groups = {decays: set() for decays in (False, True)}
    for group in make_optimizer(model, Config()).param_groups:
        groups[group["weight_decay"] > 0] |= {id(p) for p in group["params"]}
    names = {decays: {name for name, p in model.named_parameters() if id(p) in ids} for decays, ids in groups.items()}
    assert names[True] == set(NUMBERS["weight_decay"])
    assert names[False] == set(NUMBERS["no_weight_decay"]) - {"roi_prompt_embed"}


def test_encoder_blocks_learn_slower_the_deeper_they_lie():
    model = published("twocross", train_encoder=True)
    optimizer = make_optimizer(model, Config(encoder_lr=0.1, layer_decay=0.5))
    scales = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    named = {published_name(name): scales.get(id(p)) for name, p in model.named_parameters()}
    found = [named[f"encoder.layer.{i}.norm1.weight"] for i in range(4)]
    assert found == pytest.approx([0.0125, 0.025, 0.05, 0.1])
    assert named["query_tokens"] == 1 and named["encoder.norm.weight"] is None


def test_own_predictions_become_more_frequent_and_depend_on_seed_and_step_only():
    cfg = Config(own_start=0.0, own_end=0.5, own_epochs=10.0, n_frames=1000)
    assert not own_slots(cfg, 0, 0.0, 3)[0].any()
    slots, probability = own_slots(cfg, 7, 5.0, 3)
    assert probability == pytest.approx(0.25)
    assert slots.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert own_slots(cfg, 9, 99.0, 3)[1] == 0.5
    assert torch.equal(slots, own_slots(cfg, 7, 5.0, 3)[0])
    assert not torch.equal(slots, own_slots(cfg, 8, 5.0, 3)[0])


# ----------------------------------------------------------------------------------------------------------------------
# runs

ARGS = ["--encoder=random:16x2x2x32", "--train_encoder=true", "--scene_layers=-2,-1",
        "--image_size=32", "--patch_size=16", "--decoder_layers=1", "--decoder_heads=2", "--decoder_ffn=32",
        "--head_widths=8+8", "--heatmap_size=8", "--label_size=8", "--label_sigma=1.0", "--history=2", "--n_frames=4",
        "--stride=1", "--n_workers=0", "--device=cpu", "--batch_size=4", "--micro_batch=2", "--steps=4", "--lr=1e-3",
        "--own_start=0.5", "--own_end=0.5", "--val_every=2", "--save_every=2", "--log_every=1"]
TIMES = ("time", "ms_per_step", "data_ms", "memory_gb")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("argaze") / "toy"
    make_data.make(make_data.Config(out=str(root), n_train=6, n_val=3, n_frames=4, size=32, n_workers=1))
    return root


@pytest.fixture
def run(toy, tmp_path, monkeypatch):
    """run(folder, *args, die_at=None): main() in this process; between the micro-batches of step die_at `die` is
    called: by default it raises, as if killed."""
    fetch = Feed.__next__

    def killed():
        raise KeyboardInterrupt

    def main(folder, *args, die_at=None, die=killed):
        fetched = []

        def fetch_or_die(feed):
            fetched.append(1)
            if die_at is not None and len(fetched) == 2 * die_at + 2:
                die()
            return fetch(feed)
        monkeypatch.setattr(Feed, "__next__", fetch_or_die)
        monkeypatch.setattr(sys, "argv", ["train", *ARGS, f"--root={toy}", f"--out_dir={tmp_path / folder}", *args])
        torch.manual_seed(12345)
        if die_at is None or die is not killed:
            train.main()
        else:
            with pytest.raises(KeyboardInterrupt):
                train.main()
        return tmp_path / folder
    return main


def metrics(folder):
    """{(step, names): values}, all finite, without times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    return {(row["step"], *row): row for row in rows}


def assert_same_run(whole, halves):
    lines = [len((folder / "metrics.jsonl").read_text().splitlines()) for folder in (whole, halves)]
    assert lines[0] == lines[1], "no row is missing or doubled"
    assert metrics(whole) == metrics(halves)
    for name in ("model.safetensors", "best/model.safetensors"):
        assert (whole / name).read_bytes() == (halves / name).read_bytes(), name


@pytest.mark.parametrize("args", [
    ["--template=crop"], ["--variant=twocross", "--coord_weight=2", "--decay_all=true"],
    ["--dtype=bfloat16", "--template=tokens", "--augment=false"]], ids=lambda args: args[0][2:])
def test_a_resumed_run_equals_an_uninterrupted_one(run, args):
    """Bit for bit, though it was killed in the middle of an accumulation, after its checkpoint."""
    whole = run("whole", *args)
    run("halves", *args, die_at=3)
    assert_same_run(whole, run("halves", *args, "--init_from=resume"))


def test_sigterm_saves_and_leaves(run):
    whole = run("whole")
    halves = run("halves", die_at=2, die=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert torch.load(halves / "last.pt", weights_only=True)["step"] == 3
    assert_same_run(whole, run("halves", "--init_from=resume"))


def test_one_process_two_processes_and_accumulation_train_alike(run, toy, tmp_path):
    """The norm of the gradient shows a wrong scale, which AdamW would hide."""
    args = ["--micro_batch=4", "--coord_weight=2", "--dropout=0", "--encoder_lr=1"]
    # DINOv3 jitters its positions in training mode, by one draw per pass: without that passes are alike
    args += ["--train_encoder=false", "--steps=2"]
    one, accumulated = run("one", *args), run("accumulated", *args, "--micro_batch=1")
    two_processes("argaze.train", *ARGS, *args, f"--root={toy}", f"--out_dir={tmp_path / 'two'}")

    rows = metrics(one)
    for folder in (accumulated, tmp_path / "two"):
        others = metrics(folder)
        assert rows.keys() == others.keys()
        for key, row in rows.items():
            for name, value in row.items():
                assert others[key][name] == pytest.approx(value, rel=1e-3, abs=2e-5), (folder, key, name)
        first, second = ARGaze.from_pretrained(one).state_dict(), ARGaze.from_pretrained(folder).state_dict()
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=0, atol=1e-4, msg=name)


def test_a_run_goes_on_from_a_folder_and_leaves_a_picture(run):
    first = run("first")
    assert (first / "val.png").stat().st_size > 1000
    second = run("second", f"--init_from={first}", "--train_encoder=false")
    before, after = ARGaze.from_pretrained(first), ARGaze.from_pretrained(second)
    assert torch.equal(before.multiscale_proj[0].weight, after.multiscale_proj[0].weight) is False
    for name, value in before.encoder.state_dict().items():
        assert torch.equal(value, after.encoder.state_dict()[name]), name


def test_a_published_checkpoint_can_be_trained_on(run, tmp_path):
    first = run("first")
    tensors = load_file(first / "model.safetensors")
    torch.save({"epoch": 1, "model_state": tensors}, tmp_path / "published.pyth")
    run("second", f"--init_from={tmp_path / 'published.pyth'}")


def test_one_batch_is_learned_by_heart():
    torch.manual_seed(0)  # of dropout
    model = published("template", history_values="probability").train()
    video = load_file(GOLDEN / "tensors.safetensors")["clip"].movedim(1, 2)
    target = load_file(GOLDEN / "tensors.safetensors")["gt"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found = []
    for _ in range(25):
        kl, _ = reverse_kl(model(video), target)
        kl.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(kl.item())
    assert found[-1] < 0.5 * found[0]


@pytest.mark.parametrize("settings, message", [
    (dict(own_end=1.5), "own_end=1.5"), (dict(lr=0.0), "lr=0.0"), (dict(history=-1), "history=-1"),
    (dict(entropy_weight=-1.0), "entropy_weight"), (dict(head_widths="a"), "head_widths")])
def test_settings_that_no_run_can_have_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings).check()


def test_run_as_a_file_it_says_how_to_run_it():
    done = subprocess.run([sys.executable, "argaze/train.py"], cwd=ROOT, capture_output=True, text=True)
    assert "python -m argaze.train" in done.stderr


def test_the_published_settings_are_valid():
    from lib import configurator
    for name in ("egtea", "ego4d", "egoexo4d", "twocross"):
        configurator.load(Config, [str(ROOT / "config" / f"argaze_{name}.py")], verbose=False)
