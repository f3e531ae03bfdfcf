"""UniGaze's training: schedules and figures of the published code, exact resume, processes, the published commands."""
import json
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from two_processes import two_processes

from lib import configurator
from unigaze import train, train_mae
from unigaze.data import PROTOCOLS, SETS
from unigaze.model import FaceMAE, UniGaze, UniGazeConfig, angular_error, read_published

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "unigaze_tiny"
TINY = UniGazeConfig(image_size=32, patch_size=8, hidden_size=32, depth=3, num_heads=2)
SIZES = ["--image_size=16", "--patch_size=8", "--hidden_size=16", "--depth=2", "--num_heads=2", "--n_workers=0",
         "--log_every=1"]
close = torch.testing.assert_close


def figures(name):
    return json.loads((GOLDEN / name).read_text())


def write_faces(path, n_faces, seed):
    """A file in the published layout. The gaze can be read off the picture, so that it can be learnt."""
    random = np.random.default_rng(seed)
    gaze = random.uniform(-0.5, 0.5, (n_faces, 2)).astype(np.float32)
    patch = random.integers(0, 50, (n_faces, 16, 16, 3), dtype=np.uint8)
    patch[:, :8] += (gaze[:, 0] * 150 + 100).astype(np.uint8)[:, None, None, None]
    patch[:, 8:] += (gaze[:, 1] * 150 + 100).astype(np.uint8)[:, None, None, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["face_patch"] = patch
        file["face_gaze"] = gaze
        file["face_head_pose"] = gaze / 2


def write_sets(root, names, n_faces):
    """The files of some sets with the published names, n_faces in each. Where the folder decides: two files."""
    for name in names:
        split = SETS[name]
        subjects = split.subjects or ["00000", "00001"]
        for i, subject in enumerate(subjects):
            path = root / split.folder / f"{subject}.h5"
            if not path.exists():
                write_faces(path, n_faces, i)


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """The toy protocol's files with 6 faces each: 108 to train on, 36 and 48 to test on."""
    root = tmp_path_factory.mktemp("faces")
    toy = PROTOCOLS["toy"]
    write_sets(root, {*toy["train"], *toy["val"], *toy["test"], *PROTOCOLS["toy_mae"]["train"]}, 6)
    return root


def arguments(faces, out, script):
    """Those of every run of a script."""
    both = [f"--data={faces}", f"--out_dir={out}", *SIZES]
    if script is train:
        return [*both, "--protocol=toy"]
    return [*both, "--protocol=toy_mae", "--decoder_hidden_size=16", "--decoder_depth=1", "--decoder_num_heads=2"]


def run_train(monkeypatch, faces, out, *args, script=train):
    monkeypatch.setattr(sys, "argv", ["train", *arguments(faces, out, script), *args])
    script.main()


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [row["loss"] for row in rows(out) if "loss" in row]


# ----------------------------------------------------------------------------------------------------------------------
# figures of the published code


def test_learning_rates_and_betas_are_the_published_ones():
    want = figures("gaze.json")
    runs = {"20 steps, 1e-4": (20, 1e-4), "7 steps, 3e-4": (7, 3e-4), "12 x 200 steps, 1e-4": (2400, 1e-4)}
    for key, (total, lr) in runs.items():
        for step, *expected in want["one_cycle"][key]:
            assert train.one_cycle(step, total, lr) == pytest.approx(expected, rel=1e-9)
    assert train.one_cycle(12, 12, 1e-3)[0] == pytest.approx(want["train"]["final_lr"], rel=1e-9)
    for step, expected in enumerate(want["step_lr, step_size 5 epochs of 3 steps"]):
        assert train.step_lr(step, 3, 1e-4) == pytest.approx(expected, rel=1e-9)


def test_one_cycle_is_torchs_for_the_shortest_runs():
    for total in (1, 2, 3, 4, 10):
        optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=total)
        for step in range(total):
            assert train.one_cycle(step, total, 1e-3)[0] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
            optimizer.step()
            if step < total - 1:
                schedule.step()


@pytest.mark.parametrize("first", [0, 6])
def test_twelve_training_steps_are_the_published_ones_also_from_the_checkpoint_after_six(first):
    want = figures("gaze.json")["train"]
    tensors = load_file(GOLDEN / "gaze_acts.safetensors")
    path = GOLDEN / ("trainer_epoch_02.pth.tar" if first else "gaze.safetensors")
    gaze = UniGaze.from_published(path, TINY).eval()  # the figures are without drop path
    settings = want["settings"]
    optimizer = torch.optim.Adam(gaze.parameters(), weight_decay=settings["wd"])
    if first:
        optimizer.load_state_dict(read_published(path)["optimizer"])

    images = tensors["train.rgb"].permute(0, 3, 1, 2).split(3)
    targets = tensors["train.target"].split(3)
    for step in range(first, 12):
        lr, beta = train.one_cycle(step, 12, settings["lr"])
        assert [lr, beta] == pytest.approx([want["lr"][step], want["beta1"][step]], rel=1e-9)
        optimizer.param_groups[0].update(lr=lr, betas=(beta, 0.999))
        loss = F.l1_loss(gaze(images[step % 4]), targets[step % 4])
        assert loss.item() == pytest.approx(want["loss"][step], rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for name, parameter in gaze.named_parameters():
        assert parameter.norm().item() == pytest.approx(want["final_param_norms"][name], rel=1e-4), name
        if f"train.final.{name}" in tensors:
            close(parameter.data, tensors[f"train.final.{name}"], rtol=1e-4, atol=1e-5)
    close(gaze(tensors["input"]), tensors["train.final_pred"], rtol=1e-4, atol=1e-5)


def test_result_files_and_errors_are_the_published_ones(tmp_path):
    names = {"gaze": "gt_gaze.txt", "head": "gt_head.txt", "key": "subject_key.txt",
             "prediction": "epoch_3/pred_gaze.txt"}
    result = {key: np.loadtxt(GOLDEN / "eval" / name, delimiter=",") for key, name in names.items()}
    train.write_results(tmp_path, 3, result)
    for name in names.values():
        assert (tmp_path / name).read_text() == (GOLDEN / "eval" / name).read_text()
    error = angular_error(result["prediction"], result["gaze"])
    want = figures("extra.json")["eval"]
    assert error.tolist() == pytest.approx(want["errors_deg"], rel=1e-6)
    assert want["message"].strip() == f"gaze error mean: {error.mean():.3f}  -  std: {error.std(correction=0):.3f}"


def test_the_autoencoders_schedule_and_optimizer_groups_are_the_published_ones():
    want = figures("mae.json")
    (points,) = want["lr_schedule"].values()
    for epoch, lr in points:
        assert train_mae.learning_rate(epoch, 300, 40, 1.2e-3) == pytest.approx(lr, rel=1e-9, abs=1e-18)

    mae = FaceMAE(train_mae.Config(image_size=32, patch_size=8, hidden_size=32, depth=3, num_heads=2,
                                   decoder_hidden_size=16, decoder_depth=2, decoder_num_heads=2).model())
    names = {parameter: name for name, parameter in mae.named_parameters()}
    groups = train_mae.make_optimizer(mae, 1e-3, 0.05).param_groups
    for group, key in zip(groups, ("weight_decay", "no_weight_decay"), strict=True):
        assert {names[parameter] for parameter in group["params"]} == set(want["param_groups"][key])
        assert group["weight_decay"] == (0.05 if key == "weight_decay" else 0)


def test_centre_crops_of_the_augmentation_are_the_published_ones():
    want = load_file(GOLDEN / "mae_augment.safetensors")
    image = want["crop.in"].permute(2, 0, 1)
    for rate in (0.75, 0.8123, 0.9):
        crop = train_mae.crop_centre(image, rate).permute(1, 2, 0)
        close(crop.int(), want[f"crop.{rate}"].int(), atol=2, rtol=0)


def test_augmentation_depends_on_seed_and_index_alone(faces):
    face = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draws = [train_mae.augment(face, np.random.default_rng([0, i])) for i in range(40)]
    again = [train_mae.augment(face, np.random.default_rng([0, i])) for i in range(40)]
    assert all(torch.equal(a, b) for a, b in zip(draws, again, strict=True))
    assert len({a.numpy().tobytes() for a in draws}) > 20  # a quarter is neither cropped nor changed in colour
    assert {a.shape for a in draws} == {face.shape} and {a.dtype for a in draws} == {torch.uint8}


def test_turning_the_hue_leaves_grey_as_it_is_and_comes_round():
    close(train_mae.turn_hue(0.1) @ torch.ones(3), torch.ones(3))
    close(train_mae.turn_hue(1 / 3) @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-6, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# runs


def test_training_learns_and_writes_weights_results_and_the_best(monkeypatch, faces, tmp_path):
    run_train(monkeypatch, faces, tmp_path, "--epochs=20", "--batch_size=27", "--lr=2e-2", "--valid_epoch=10",
              "--save_epoch=10", "--drop_path=0", "--log_every=5")
    assert losses(tmp_path)[-1] < 0.7 * losses(tmp_path)[0]
    results = tmp_path / "results" / "toy_mpii_test"
    truth = np.loadtxt(results / "gt_gaze.txt", delimiter=",")
    answer = np.loadtxt(results / "epoch_20" / "pred_gaze.txt", delimiter=",")
    logged = rows(tmp_path)[-1]
    assert angular_error(answer, truth).mean().item() == pytest.approx(logged["toy_mpii_test_deg"], rel=1e-4)
    assert len(np.loadtxt(results / "subject_key.txt")) == 48
    for folder in (tmp_path, tmp_path / "best", tmp_path / "epoch_10", tmp_path / "epoch_20"):
        UniGaze.from_pretrained(folder)


@pytest.mark.parametrize("script", [train, train_mae])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(monkeypatch, faces, tmp_path, script):
    args = ["--steps=6", "--batch_size=4", "--grad_accumulation_steps=2", "--save_every=3"]
    run_train(monkeypatch, faces, tmp_path / "whole", *args, script=script)
    monkeypatch.setattr(script.run, "stopping", iter([False] * 3 + [True]).__next__)  # SIGTERM before step 3
    run_train(monkeypatch, faces, tmp_path / "parts", *args, script=script)
    monkeypatch.undo()
    run_train(monkeypatch, faces, tmp_path / "parts", *args, "--init_from=resume", script=script)
    close(load_file(tmp_path / "parts" / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors"),
          rtol=0, atol=0)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 6


def test_two_processes_do_what_one_does_in_training_and_evaluation(monkeypatch, faces, tmp_path):
    args = ["--steps=3", "--drop_path=0.5", "--test_batch_size=5"]
    run_train(monkeypatch, faces, tmp_path / "one", *args, "--batch_size=10")
    two_processes("unigaze.train", *arguments(faces, tmp_path / "two", train), *args, "--batch_size=5")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    close(load_file(tmp_path / "two" / "model.safetensors"), load_file(tmp_path / "one" / "model.safetensors"),
          rtol=1e-3, atol=1e-4)

    # the same weights give the same result files: every face once, in the order of the set
    answer = "results/toy_mpii_test/epoch_1001/pred_gaze.txt"
    monkeypatch.setattr(train.run, "from_all", lambda part: [part])
    weights = ["--mode=test", f"--init_from={tmp_path / 'two'}", "--test_batch_size=7"]
    run_train(monkeypatch, faces, tmp_path / "test", *weights)
    trained = np.loadtxt(tmp_path / "two" / answer.replace("1001", "0"), delimiter=",")
    np.testing.assert_allclose(np.loadtxt(tmp_path / "test" / answer, delimiter=","), trained, atol=1e-6)


def test_the_autoencoder_trains_alike_however_a_step_is_divided_also_over_two_processes(monkeypatch, faces, tmp_path):
    whole = ["--steps=2", "--batch_size=8", "--grad_accumulation_steps=1"]
    run_train(monkeypatch, faces, tmp_path / "whole", *whole, script=train_mae)
    parts = ["--steps=2", "--batch_size=2", "--grad_accumulation_steps=4"]
    run_train(monkeypatch, faces, tmp_path / "parts", *parts, script=train_mae)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)

    two = ["--steps=2", "--batch_size=4", "--grad_accumulation_steps=1"]
    two_processes("unigaze.train_mae", *arguments(faces, tmp_path / "two", train_mae), *two)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    close(load_file(tmp_path / "two" / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors"),
          rtol=1e-3, atol=1e-4)


def test_mode_test_needs_no_training_data(monkeypatch, faces, tmp_path, capsys):
    shutil.copytree(faces / "toy_mpii", tmp_path / "faces" / "toy_mpii")
    for i in range(18, 24):
        (tmp_path / "faces" / "toy_xgaze").mkdir(exist_ok=True)
        shutil.copy(faces / "toy_xgaze" / f"subject{i:04d}.h5", tmp_path / "faces" / "toy_xgaze")
    torch.manual_seed(0)
    UniGaze(UniGazeConfig(16, 8, 16, 2, 2)).save_pretrained(tmp_path / "gaze")
    run_train(monkeypatch, tmp_path / "faces", tmp_path / "out", "--mode=test", f"--init_from={tmp_path / 'gaze'}")
    assert "toy_mpii_test, 48 faces: gaze error mean" in capsys.readouterr().out
    assert (tmp_path / "out" / "results" / "toy_xgaze_test" / "epoch_1001" / "pred_gaze.txt").is_file()


def test_gaze_training_starts_from_the_autoencoder_of_train_mae(monkeypatch, faces, tmp_path):
    run_train(monkeypatch, faces, tmp_path / "mae", "--steps=1", script=train_mae)
    assert (tmp_path / "mae" / "faces.png").is_file()
    run_train(monkeypatch, faces, tmp_path / "gaze", "--steps=1", "--lr=1e-12", f"--init_from={tmp_path / 'mae'}")
    mae = load_file(tmp_path / "mae" / "model.safetensors")
    gaze = load_file(tmp_path / "gaze" / "model.safetensors")
    close(gaze["vit.blocks.0.mlp.fc1.weight"], mae["blocks.0.mlp.fc1.weight"])


def test_a_published_checkpoint_goes_on_with_its_epoch_and_adams_state(monkeypatch, faces, tmp_path):
    gaze = UniGaze(UniGazeConfig(16, 8, 16, 2, 2))
    optimizer = torch.optim.Adam(gaze.parameters())
    gaze(torch.zeros(1, 3, 16, 16)).sum().backward()
    optimizer.step()
    torch.save({"epoch": 2, "model_state": gaze.state_dict(), "optim_state": optimizer.state_dict(),
                "schedule_state": {}}, tmp_path / "epoch_02.pth.tar")
    run_train(monkeypatch, faces, tmp_path / "out", f"--ckpt_resume={tmp_path / 'epoch_02.pth.tar'}", "--epochs=3",
              "--batch_size=27")
    assert [row["step"] for row in rows(tmp_path / "out") if "loss" in row] == [9, 10, 11, 12]
    state = torch.load(tmp_path / "out" / "last.pt", weights_only=True)["optimizer"]["state"]
    assert {int(entry["step"]) for entry in state.values()} == {1 + 4}


@pytest.mark.filterwarnings("ignore:.*subjects, the published")
@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name.startswith(("cross", "joint", "within"))])
def test_every_published_protocol_starts_from_its_config(monkeypatch, every_set, tmp_path, name):
    monkeypatch.setattr(sys, "argv", ["train", str(ROOT / "config" / f"unigaze_{name}.py"), f"--data={every_set}",
                                      f"--out_dir={tmp_path}", "--steps=1", "--batch_size=2", *SIZES])
    train.main()
    logged = {key for row in rows(tmp_path) for key in row}
    assert {f"{tested}_deg" for tested in PROTOCOLS[name]["val"] + PROTOCOLS[name]["test"]} <= logged


@pytest.fixture(scope="module")
def every_set(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    published = [name for name, split in SETS.items() if split.subjects and not name.startswith("toy")]
    write_sets(root, [name for name in published if "xgaze" in name], 18)
    write_sets(root, [name for name in published if "xgaze" not in name], 1)
    write_sets(root, ["gaze360_train", "gaze360_test", "gazecapture_train", "gazecapture_test"], 16)
    return root


# ----------------------------------------------------------------------------------------------------------------------
# settings


def settings(*args):
    return configurator.load(train.Config, train.translate(args), verbose=False)


def test_the_published_command_line_is_understood():
    cfg = settings("use_autocast=True", "exp=blank.yaml", "batch_size=32", "test_batch_size=100", "epochs=6",
                   "valid_epoch=3", "eval_epoch=6", "save_epoch=6", "exp.loss=configs/loss/l1_loss.yaml",
                   "exp.exp_name=mae_H14_cross_X", "exp.model=configs/model/mae_h_14_gaze.yaml",
                   "exp.trainer=configs/trainer/simple_trainer.yaml", "exp.data=configs/exp/cross/train_X.yaml",
                   "exp.scheduler=configs/schedulers/OneCycleLR.yaml")
    assert (cfg.loss, cfg.scheduler, cfg.dtype, cfg.epochs) == ("l1", "OneCycleLR", "auto", 6)
    assert (cfg.patch_size, cfg.depth, cfg.protocol, cfg.out_dir) == (14, 32, "cross_xgaze", "out/mae_H14_cross_X")


def test_other_published_names_are_translated_too():
    seed = settings("exp.model=configs/model/mae/mae_vit_l_16_pretrain_1023/299epoch.yaml", "use_autocast=False",
                    "exp.data=configs/exp/joint/X_GC_M_ED_g360.yaml", "exp.loss=configs/loss/l2_loss.yaml")
    assert (seed.hidden_size, seed.protocol, seed.loss, seed.dtype) == (1024, "joint", "l2", "float32")
    assert settings("exp.data=configs/exp/1026_cross/train_G360.yaml").protocol == "cross_gaze360"
    assert settings("exp.data=configs/exp/within/train_ED.yaml").protocol == "within_eyediap"


@pytest.mark.parametrize("arg", ["exp.model=configs/model/resnet50.yaml", "exp.data=configs/exp/cross/train_Y.yaml"])
def test_published_names_that_are_not_here_are_refused_by_name(arg):
    with pytest.raises(ValueError, match=arg):
        train.translate([arg])


@pytest.mark.parametrize("args, message", [
    (["--protocol=nothing"], "nothing"), (["--patch_size=15"], "image_size=224"), (["--mode=test"], "mode=test needs"),
    (["--ckpt_resume=a", "--init_from=b"], "give one of them"), (["--epochs=0"], "epochs=0"), (["--lr=0"], "lr=0")])
def test_settings_that_cannot_work_are_refused_by_name(args, message):
    with pytest.raises(configurator.ConfigError, match=message):
        settings(*args)


def test_fewer_faces_than_a_step_are_refused(monkeypatch, faces, tmp_path):
    with pytest.raises(ValueError, match="108 training faces are fewer than a step's 200: lower batch_size"):
        run_train(monkeypatch, faces, tmp_path, "--batch_size=200")


def test_all_configs_load():
    for path in ROOT.glob("config/*unigaze*.py"):
        script = train_mae if path.stem.endswith("mae") else train
        configurator.load(script.Config, [str(path)], verbose=False)
