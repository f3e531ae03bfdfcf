"""What users get wrong, one row each: what was done, the error, and the words it has to say (file or key, and why)."""
import json
import math
import re
import resource
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_gaze, tiny_mae

import data
import eval as eval_
import label
import make_data
import train_grpo
import train_ntp
import train_videomae
import unigaze.train
from data import VideoError
from lib import labels as label_files
from lib import run, video_out
from lib.checkpoint import save_state, state_of, take_data_folder, take_folder, take_output
from lib.loader import StepSampler
from lib.text import write_whole
from model import Gaze
from unigaze.convert import write_h5
from videomae import ReconstructionLoss, VideoMAE

V = 20  # ids per frame
SIZES = ["--scales=16+32", "--patch_size=8", "--hidden_size=32", "--num_layers=1", "--num_heads=2",
         "--intermediate_size=32", "--num_multi_token_pred=3", "--n_frames=4", "--n_workers=0", "--device=cpu",
         "--batch_size=2", "--micro_batch=0"]


def call(script, *args):
    """main() of a script in this process."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", ["script", *args])
        script.main()


# ---- settings: one line and exit code 2, before anything is loaded

@pytest.mark.parametrize("script, args, says", [
    *((script, "--init_from=", "init_from is empty") for script in (train_ntp, train_grpo, unigaze.train)),
    (train_ntp, "--lrr=1", "unknown key 'lrr'.*did you mean lr"),
    (train_ntp, "--lr=fast", "lr: expected float, got 'fast'"),
    (train_ntp, "--lr=0", "lr=0.0"), (train_ntp, "--epochs=0", "epochs"), (train_ntp, "--steps=0", "steps=0"),
    (train_ntp, "--val_ratio=0", "val_ratio=0"), (train_ntp, "--val_ratio=1.1", "val_ratio=1.1"),
    (train_ntp, "--alpha=1,0", "alpha='1,0'"), (train_ntp, "--alpha=1,2,3 --n_frames=2", "alpha='1,2,3'.*2 numbers"),
    (train_ntp, "--num_multi_token_pred=266", "num_multi_token_pred=266.*1..265"),
    (train_ntp, "--scales=32+60", r"scales='32\+60'.*patch_size=16"),
    (train_ntp, "--scales=64+32", "ascend"),
    (train_ntp, "--batch_size=0", "batch_size=0"), (train_ntp, "--micro_batch=-1", "micro_batch=-1"),
    (train_ntp, "--val_every=0", "val_every=0"), (train_ntp, "--warmup=1", "warmup=1"),
    (train_ntp, "--dtype=fp8", "auto | float32 | bfloat16 | float16"),
    (train_grpo, "--group_size=1", "group_size must be at least 2"),
    (train_grpo, "--recon_sample_rate=0.01", "recon_sample_rate=0.01 of 16 frames"),
    (train_grpo, "--temperature=0", "temperature must be above 0"),
    (train_grpo, "--ratio_min=0.5", "ratio_min=0.5 is above ratio_max=0.2"),
    (train_grpo, "--requirement_min=2", "requirement_min=2.0 is above"),
    (train_grpo, "--init_from=scratch --hidden_size=100", "hidden_size=100.*num_heads=6"),
    (train_videomae, "--ratio_max=2", "ratio_max=2.0"), (train_videomae, "--recon_frames=17", "recon_frames"),
    (train_videomae, "--scales=32+60", "scales="), (label, "--ratio_max=2", "ratio_max"),
    (make_data, "toy --n_train=-1", "n_train=-1"), (make_data, "cut --hop=-1", "hop=-1"),
    *((script, f"--{bad}", bad.split("=")[0]) for script, bads in (
        (train_ntp, "alpha=x alpha=1,nan scales=a scales=32+ patch_size=0 num_heads=0 seed=-1 task_loss_weight=-1"),
        (train_grpo, "gamma=2 gamma=-1 seed=-1"),
        (train_videomae, "num_attention_heads=0 num_attention_heads=3 hidden_size=33 patch_size=0 beta2=2 clip_grad=0 "
                         "clip_grad=-1 scales=a scales= weight_decay=-1 recon_frames=0"),
        (label, "ratio_rate=0 stride=0 max_clips=-1 n_frames=0 alpha=x ratio_min=0.5 ratio_rate=-1"),
        (eval_, "ratios=0.2, ratios=2 ratios=a ratios= max_clips=0 max_clips=-1 n_frames=0 stride=0 batch_size=0 "
                "alpha=x greedy_clips=-1 models=random=a models=a=b,a=c models=a models=a=b=c,d models=a= models==b")
        ) for bad in bads.split()),
    *((script, f"--{key}={value}", f"{key}=.*must") for script, keys in (
        (train_ntp, "batch_size hidden_size num_layers intermediate_size n_frames"),
        (train_grpo, "batch_size group_size"),
        (train_videomae, "batch_size decoder_num_hidden_layers intermediate_size max_num_frames"))
      for key in keys.split() for value in ("1e9", "99999999999999999999"))])
def test_settings(script, args, says, capsys):
    with pytest.raises(SystemExit) as stop:
        call(script, *args.split())
    assert stop.value.code == 2
    assert re.search(says, capsys.readouterr().err)


# ---- labels, as JSON and packed

def one(change):
    """Labels of the toy clips with one of them changed in place."""
    def labels(good):
        good = json.loads(json.dumps(good))
        change(good["toy/train/000002.mp4"]["gazing_pos"], good["toy/train/000002.mp4"]["task_losses"])
        return json.dumps(good)
    return labels


WHERE = r"labels.json.*toy/train/000002.mp4'.*"
LABELS = [
    ("id beyond the last", one(lambda pos, loss: pos[2].__setitem__(0, 3 * V)), WHERE + "id 60 is not in 40..59"),
    ("id of another frame", one(lambda pos, loss: pos[1].__setitem__(0, 5)), WHERE + "frame 1: id 5 is not in 20..39"),
    ("id below zero", one(lambda pos, loss: pos[0].__setitem__(0, -1)), WHERE + "id -1"),
    ("id no whole number", one(lambda pos, loss: pos[0].__setitem__(0, 1.5)), WHERE + "id 1.5"),
    ("an id twice", one(lambda pos, loss: pos[0].__setitem__(1, pos[0][0])), WHERE + "takes a patch twice: 1"),
    ("NaN", one(lambda pos, loss: loss[0].__setitem__(0, math.nan)), WHERE + "frame 0 has a loss that is not a finite"),
    ("null", one(lambda pos, loss: loss[0].__setitem__(0, None)), WHERE + "frame 0 has a loss that is not a finite"),
    ("true for an id", one(lambda pos, loss: pos[0].__setitem__(0, True)), WHERE + "id True"),
    ("beyond float32", one(lambda pos, loss: loss[0].__setitem__(0, 1e300)), WHERE + "loss that is not a finite"),
    ("beyond any float", one(lambda pos, loss: loss[0].__setitem__(0, -10 ** 400)), WHERE + "loss that is not a fin"),
    ("a loss missing", one(lambda pos, loss: loss[0].pop()), WHERE + "2 gazes but 1 losses"),
    ("a frame missing", one(lambda pos, loss: (pos.pop(), loss.pop())), WHERE + "3 frames.*expected 4"),
    ("losses of a frame missing", one(lambda pos, loss: loss.pop()), WHERE + "3 of losses"),
    ("no list", one(lambda pos, loss: pos.__setitem__(0, 7)), WHERE + "needs a list per frame"),
    ("no losses at all", lambda good: '{"toy/train/000002.mp4": {"gazing_pos": []}}', "labels.json.*'task_losses'"),
    ("cut off", lambda good: json.dumps(good)[:-40], "labels.json is not valid JSON.*cut off"),
    ("empty file", lambda good: "", "labels.json is not valid JSON"),
    ("a list", lambda good: "[]", "labels.json: expected an object of labels by video"),
    ("not JSON behind a label", lambda good: json.dumps(good)[:-1] + ", }", "labels.json is not valid JSON"),
    ("two objects", lambda good: json.dumps(good) + '\n{"b": {}}', "labels.json is not valid JSON.*Extra data"),
    ("a key twice", lambda good: json.dumps(good)[:-1] + ", " + json.dumps(good)[1:], "two entries for 'toy/train/0"),
    ("half a character", lambda good: json.dumps(good | {"\ud83d.mp4": next(iter(good.values()))}), "half a character"),
    ("deep", lambda good: '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "labels.json.*(nested too deeply|list)"),
    ("of other videos", lambda good: json.dumps({k.replace("toy", "else"): v for k, v in good.items()}),
     "no label fits a video of .*toy/train/000000.mp4.*else/train/")]


@pytest.fixture(scope="module")
def good():
    """Every frame but the last, which is empty: nothing gazed is allowed."""
    frames = [[V * t + 1, V * t + 7] for t in range(3)] + [[]]
    return {f"toy/{split}/{i:06d}.mp4": {"gazing_pos": frames, "task_losses": [[0.5, 0.4]] * 3 + [[]]}
            for split, n in (("train", 6), ("val", 3)) for i in range(n)}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("text, says", [row[1:] for row in LABELS], ids=[row[0] for row in LABELS])
def test_labels(tmp_path, toy, good, text, says, packed):
    path = tmp_path / "labels.json"
    path.write_text(text(good))
    with pytest.raises(ValueError, match=says.replace("labels.json", r"labels\.(json|packed)")):
        path = label_files.pack_labels(path) if packed else path
        call(train_ntp, *SIZES, f"--root={toy}", f"--labels={path}", f"--out_dir={tmp_path}")
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kept", [[0, 1, 2], [1], []])
def test_empty_frames_are_allowed(tmp_path, toy, good, packed, kept):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({key: {name: [frame if t in kept else [] for t, frame in enumerate(frames)]
                                      for name, frames in entry.items()} for key, entry in good.items()}))
    path = label_files.pack_labels(path) if packed else path
    call(train_ntp, *SIZES, f"--root={toy}", f"--labels={path}", f"--out_dir={tmp_path}", "--steps=1")
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert math.isfinite(last["val_ntp"]) and (last["val_ntp"] > 0) == bool(kept)
    assert 0 not in kept or last["val_first_accuracy"] <= 1


# ---- videos, checkpoints, disks. Checkpoints have no files of single ranks: nothing of that kind can be missing

def all_corrupt(folder, toy):
    for split in ("train", "val"):
        (folder / "toy" / split).mkdir(parents=True)
        for i in range(2):
            (folder / "toy" / split / f"{i}.mp4").write_bytes(b"")
    call(train_videomae, *[a for a in SIZES if a.split("=")[0][2:] not in ("num_layers", "num_heads",
         "num_multi_token_pred")], f"--root={folder / 'toy'}", f"--out_dir={folder}", "--num_hidden_layers=1",
         "--decoder_num_hidden_layers=1", "--max_num_frames=4", "--decoder_hidden_size=32")


def resume(folder, toy, *args, text=None, **entries):
    """Resume from a checkpoint with other settings, with other entries (None: without), or from a damaged one."""
    (folder / "labels.json").write_text("{}")
    cfg = train_ntp.configurator.load(train_ntp.Config, [*SIZES], verbose=False)
    gaze = Gaze(cfg.model())
    gaze.save_pretrained(folder)
    optimizer = torch.optim.Adam(gaze.parameters())
    state = state_of(1, gaze, optimizer, torch.amp.GradScaler("cpu", enabled=False), 3.0, cfg, 1) | entries
    save_state(folder / "last.pt", {name: value for name, value in state.items() if value is not None})
    if text is not None:
        (folder / "last.pt").write_bytes(text)
    call(train_ntp, *SIZES, *args, "--init_from=resume", f"--root={toy}", f"--labels={folder / 'labels.json'}",
         f"--out_dir={folder}")


def changed_optimizer(folder, change):
    """Resume with Adam's state after a step, of which something was changed."""
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    change(state)
    cfg = train_ntp.Config(out_dir=str(folder), dtype="float32")
    run.prepare(module, optimizer, cfg, 1, torch.device("cpu"), {"optimizer": state, "scaler": {}})


def wrong_prefix(folder, toy):
    torch.save({f"encoder.{k}": v for k, v in tiny_mae().state_dict().items()}, folder / "videomae.pt")
    VideoMAE.from_pretrained(folder / "videomae.pt", tiny_mae().config)


def pickled(name, state, share=1.0):
    """A weights file that torch.save wrote, of which only a share is there."""
    def load(folder, toy):
        torch.save(state, folder / name)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:int(len(whole) * share)])
        VideoMAE.from_pretrained(folder if name.endswith(".bin") else folder / name, tiny_mae().config)
    return load


def other_scales(folder, toy):
    tiny_mae(scales="8+32").save_pretrained(folder / "mae")
    tiny_gaze().save_pretrained(folder / "gaze")
    call(train_grpo, f"--videomae={folder / 'mae'}", f"--init_from={folder / 'gaze'}", "--n_frames=4",
         "--recon_sample_rate=0.5", f"--root={toy}", f"--out_dir={folder}", "--device=cpu")


def disk_full(folder, toy):
    save_state(folder / "last.pt", {"step": 7})
    (folder / ".last.pt").symlink_to("/dev/full")
    try:
        save_state(folder / "last.pt", {"step": 8, "model": torch.zeros(100000)})
    finally:
        assert torch.load(folder / "last.pt", weights_only=True) == {"step": 7} and len(list(folder.iterdir())) == 1


def damaged_pack(folder, toy):
    (folder / "l.json").write_text('{"a/b/c.mp4": {"gazing_pos": [[1]], "task_losses": [[0.5]]}}')
    packed = label_files.pack_labels(folder / "l.json")
    whole = (packed / "ids.npy").read_bytes()
    (packed / "ids.npy").write_bytes(whole[:-2])
    label_files.load_labels(packed)


def mixed_pack(folder, toy):
    text = json.dumps({"a/b/c.mp4": {"gazing_pos": [[1]], "task_losses": [[0.5]]}})
    (folder / "l.json").write_text(text)
    packed = label_files.pack_labels(folder / "l.json")
    (folder / "m.json").write_text(text.replace("[1]", "[1, 2]").replace("[0.5]", "[0.5, 0.4]"))
    shutil.copy(label_files.pack_labels(folder / "m.json") / "ids.npy", packed)
    label_files.load_labels(packed)


def wandb_missing(folder, toy):
    with pytest.MonkeyPatch.context() as m:
        m.setitem(sys.modules, "wandb", None)
        train_ntp.configurator.load(train_ntp.Config, ["--wandb=x"], verbose=False)


@pytest.mark.filterwarnings("ignore:skipped")
def same_names(folder, toy):
    """Searching takes long: refused before, not by the training that reads the labels."""
    for name in "ab":
        (folder / name).mkdir()
        (folder / name / "toy").symlink_to(toy)
    tiny_mae().save_pretrained(folder / "mae")
    call(label, f"--root={folder}/a/toy,{folder}/b/toy", f"--videomae={folder / 'mae'}", "--n_frames=4", "--device=cpu")


def damaged_config(folder, make, change):
    make().save_pretrained(folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(change(text))
    make().from_pretrained(folder)


@pytest.mark.parametrize("do, error, says", [
    (all_corrupt, VideoError, "all 2 videos from .*0.mp4 on are unreadable"),
    (lambda f, toy: call(train_ntp, *SIZES, "--init_from=resume", f"--out_dir={f}", f"--root={toy}"),
     FileNotFoundError, "last.pt: no such checkpoint; init_from=resume needs"),
    (lambda f, toy: resume(f, toy, "--hidden_size=64"), ValueError, r"last.pt.*hidden_size=64 \(was 32\)"),
    (lambda f, toy: resume(f, toy, text=b"PK\3\4 cut"), ValueError, "last.pt is not a checkpoint of this script"),
    (lambda f, toy: resume(f, toy, text=b""), ValueError, "last.pt is not a checkpoint of this script"),
    *((lambda f, toy, name=name, value=value: resume(f, toy, **{name: value}), ValueError,
       f"last.pt is not a checkpoint of this script: {says}") for name, value, says in (
        *((name, None, f"{name} is missing") for name in ("step", "best", "model", "optimizer", "scaler", "config")),
        ("step", "7", "step is no int"), ("best", [1], "best is no float"), ("model", [], "model is no dict"),
        ("step", -1, "step is -1"), ("step", True, "step is no int"), ("best", math.nan, "best is NaN"),
        ("model", {"a": torch.zeros(1).to_sparse()}, "model holds something"),
        ("model", {"a": torch.zeros(1).expand(10 ** 12)}, "model holds something"),
        ("optimizer", {"state": [torch.zeros(1, device="meta")]}, "optimizer holds tensors of another kind"),
        ("model", {"a": 1}, "model holds something else than tensors"),
        ("config", {"lr": torch.zeros(2)}, "config holds something else than settings"))),
    (lambda f, toy: resume(f, toy, model={"a": torch.ones(1)}), ValueError, "last.pt and config.json do not fit"),
    *((lambda f, toy, change=change: changed_optimizer(f, change), ValueError,
       f"last.pt is not a checkpoint of this script.*{says}") for change, says in (
        (lambda state: state["state"][1].pop("exp_avg"), "exp_avg.*missing"),
        (lambda state: state["state"].pop(1), "exp_avg.*missing"),
        (lambda state: state["state"][0]["exp_avg"].resize_(1), r"exp_avg is \(1,\), its weight \(2, 2\)"),
        (lambda state: state["state"][0]["exp_avg"].fill_(math.nan), "exp_avg holds NaN"),
        (lambda state: state["state"][0]["step"].resize_(0), r"step is \(0,\)"),
        (lambda state: state["state"][0]["exp_avg_sq"].fill_(-1), "exp_avg_sq is below 0"),
        (lambda state: state["param_groups"][0].pop("lr"), "lr"),
        (lambda state: state["param_groups"][0].update(lr="x"), "str"),
        (lambda state: state.pop("param_groups"), "param_groups"))),
    (lambda f, toy: StepSampler(9, 1, 0, 1, 0, 0, 7, 1), ValueError, "checkpoint is of step 7, this run ends at 1"),
    (lambda f, toy: call(train_ntp, *SIZES, f"--init_from={f}"), FileNotFoundError, "has no config.json"),
    (wrong_prefix, ValueError, "videomae.pt and the config do not fit: missing vit.embeddings.cls_token"),
    *((pickled(name, {"a": torch.zeros(1000)}, share), ValueError, f"{name} is cut off or no file of weights: copy it")
      for name in ("videomae.pt", "pytorch_model.bin") for share in (0, 0.01, 0.5, 0.99)),
    (pickled("videomae.pt", [torch.zeros(1)]), ValueError, "videomae.pt is .*no dict of tensors"),
    (pickled("pytorch_model.bin", {"model": {}}), ValueError, "pytorch_model.bin is .*no dict of tensors"),
    (pickled("videomae.pt", torch.nn.Linear(1, 1)), ValueError, "videomae.pt is .*or save a state_dict"),
    (other_scales, ValueError, r"scales 8\+32.*16\+32"),
    (disk_full, OSError, "last.pt could not be written, is the disk full"),
    (damaged_pack, ValueError, "ids.npy.*pack again|pack again.*ids.npy"),
    (mixed_pack, ValueError, "labels=.*its files are of different label files: pack again"),
    (lambda f, toy: label_files.load_labels(f), ValueError, "labels=.*not a folder written by"),
    (lambda f, toy: label_files.load_labels(f / "none.json"), FileNotFoundError, "none.json does not exist: label.py"),
    (lambda f, toy: same_names(f, toy), ValueError, "two folders have the same last name"),
    *((lambda f, toy, m=m, change=change: damaged_config(f, m, change), ValueError, f"config.json.*{says}")
      for m in (tiny_gaze, tiny_mae) for change, says in (
          (lambda _: "{", "not valid JSON"), (lambda _: "[]", "expected an object"),
          (lambda text: text.replace("16+32", "x+y"), r"scales='x\+y'"),
          (lambda text: text.replace('"hidden_size": 32', '"hidden_size": null'), "hidden_size=None"))),
    *((lambda f, toy, name=name: Gaze.from_pretrained(name), FileNotFoundError, "none has no config.json")
      for name in ("out/none", "./none/none", "/none", "../none/none")),
    (lambda f, toy: VideoMAE.from_pretrained("./none/none"), FileNotFoundError, "none/none.* no VideoMAE weights"),
    (lambda f, toy: ReconstructionLoss("l1", "a"), ValueError, "loss_weights='a'"),
    (lambda f, toy: tiny_gaze().stream(1).step(torch.zeros(2, 3, 32, 32)), ValueError, "batch_size=1.*2 clips"),
    (lambda f, toy: tiny_gaze().generate(torch.zeros(1, 4, 3, 32, 32), target_patch_size=0), ValueError,
     "target_patch_size=0"),
    *((lambda f, toy, sides=sides: tiny_gaze().generate(torch.zeros(1, 4, 3, 32, 32), target_scales=sides), ValueError,
       "target_scales=.* must be sides joined") for sides in ("a", "", [])),
    (lambda f, toy: data.list_videos(f / "none", "train"), FileNotFoundError, "none does not exist: expected videos"),
    (wandb_missing, ValueError, "wandb=x needs the package: pip install wandb")])
def test_files(tmp_path, toy, do, error, says):
    with pytest.raises(error, match=says):
        do(tmp_path, toy)


# ---- a script as it is started

@pytest.mark.parametrize("script, args, names", [
    ("train_ntp", "--labels=none.json --root=none", "none.json"),
    ("train_videomae", "--root=none --hidden_size=32 --num_hidden_layers=1 --decoder_num_hidden_layers=1", "none"),
    ("train_grpo", "--init_from=none/none/none", "none/none/none"),
    ("label", "--videomae=none/none/none", "none/none/none"),
    ("label", "--teacher=none/none/none", "none/none/none"),
    ("eval", "--videomae=none/none/none", "none/none/none"),
    ("show", "--video=none.mp4", "none.mp4"),
    ("chat", "--video=none.mp4", "none.mp4"),
    ("verify", "--video=none.mp4", "none.mp4"),
    ("bench", "--device=mps", "device=mps"),
    ("make_data", "none", "none"),
    ("make_data", "cut --src=none", "none"),
    ("data", "pack none.json", "none.json"),
    ("argaze.train", "--root=none --encoder=random:16x3x2x32", "none"),
    ("argaze.train", "--init_from=none/none/none", "none/none/none"),
    ("argaze.eval", "--root=none", "none"),
    ("argaze.show", "--ckpt=none/none/none --video=none.mp4", "none/none/none"),
    ("argaze.data", "check --root=none", "none"),
    ("argaze.data", "none", "none"),
    ("argaze.make_data", "--out=/dev/null/none", "/dev/null/none"),
    ("unigaze.train", "--data=none --hidden_size=32 --num_heads=2 --depth=1", "none"),
    ("unigaze.train", "--init_from=none", "none"),
    ("unigaze.train_mae", "--data=none --hidden_size=32 --num_heads=2 --depth=1 --decoder_depth=1", "none"),
    ("unigaze.show", "--ckpt=none --video=none.mp4", "none"),
    ("unigaze.data", "check none none", "none"),
    ("unigaze.convert", "gazecapture none none", "none"),
    ("unigaze.make_data", "--out=/dev/null/none", "/dev/null/none")])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_what_is_missing_is_said_in_one_line(tmp_path, monkeypatch, capsys, script, args, names):
    """On stderr, and the exit code is 2: in every script of the three systems."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *args.split()])
    monkeypatch.setattr(run, "LOOP", [])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(script, run_name="__main__")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and names in error, error


@pytest.mark.parametrize("name, room, write", [
    ("gaze.json", 9, lambda path: write_whole(path, "x" * 10)),
    ("last.pt", 9, lambda path: save_state(path, {"step": 1})),
    ("config.json", 9, lambda path: tiny_gaze().save_pretrained(path.parent)),
    ("model.safetensors", 9000, lambda path: tiny_gaze().save_pretrained(path.parent)),
    ("gt_gaze.txt", 9, lambda path: unigaze.train.write_results(path.parent, 1, {"gaze": [1]})),
    ("sheet.png", 9, lambda path: video_out.save_picture(path, np.zeros((9, 9, 3), np.uint8))),
    ("00000.h5", 9, lambda path: write_h5(path, {"face_gaze": np.zeros((9, 2))}))])
def test_a_full_disk_keeps_what_was_there(tmp_path, name, room, write):
    """The error names the file; nothing half-written stays. room: bytes that a file may have."""
    (tmp_path / name).write_text("before")
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
    try:
        with pytest.raises(OSError, match=f"{name} could not be written, is the disk full"):
            write(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    files = [path.name for path in tmp_path.iterdir() if path.is_file()]
    assert (tmp_path / name).read_text() == "before" and files == [name]


def test_files_of_other_settings_are_refused(tmp_path):
    take_data_folder(tmp_path, {"size": 1})
    take_data_folder(tmp_path, {"size": 1})
    with pytest.raises(ValueError, match="holds files made with other settings.*make_data.json"):
        take_data_folder(tmp_path, {"size": 2})
    (tmp_path / "make_data.json").write_text("{")
    with pytest.raises(ValueError, match="make_data.json is not valid JSON"):
        take_data_folder(tmp_path, {"size": 1})


HOLDER = """
import sys, time
from pathlib import Path
from lib.checkpoint import take_folder
take_folder(Path(sys.argv[1]), keep=True)
print("holds", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("keep", [False, True])
def test_a_folder_that_a_run_still_writes_to_is_refused(tmp_path, keep):
    """The second run says who holds it; when that has ended, its result is moved aside, or gone on with."""
    out = tmp_path / "out"
    root = Path(train_ntp.__file__).parent
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, out], cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "holds\n"
        (out / "last.pt").write_text("a run")
        with pytest.raises(ValueError, match=f"out_dir=.*out is in use by process {holder.pid} on .*since"):
            take_folder(out, keep)
        with pytest.raises(ValueError, match=f"out=.*out is in use by process {holder.pid}"):
            take_output(out)
        assert (out / "last.pt").exists()
    finally:
        holder.kill()
        holder.wait()
    take_folder(out, keep)
    assert (out / "last.pt").exists() == keep and (tmp_path / "out.1" / "last.pt").exists() != keep
