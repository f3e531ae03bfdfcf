"""Kinds for fuzz.py: settings, weights and checkpoints of the three systems, all tiny. Errors have to name the
damaged file, or the setting; what is accepted has to build a model, and a resumed run has to take its next step."""
import contextlib
import re
import shutil
import sys
from dataclasses import asdict, fields
from pathlib import Path

import h5py
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, DINOv3ViTModel  # noqa: F401, read once, not in every child

import argaze.make_data
import argaze.train
import label
import make_data
import train_grpo
import train_ntp
import train_videomae
import unigaze.train
import unigaze.train_mae
from argaze.model import ARGaze, ARGazeConfig
from data import VideoError
from lib import configurator, run, weights
from model import Gaze
from unigaze.data import FaceError
from unigaze.model import FaceMAE, FaceMAEConfig, UniGaze, UniGazeConfig
from videomae import VideoMAE

GOLDEN = Path(__file__).parent / "golden"
ERRORS = (VideoError, FaceError, OSError, ValueError)
TRAINED = {"train_ntp": train_ntp, "train_grpo": train_grpo, "train_videomae": train_videomae,
           "argaze.train": argaze.train, "unigaze.train": unigaze.train, "unigaze.train_mae": unigaze.train_mae}
NEVER_DRAWN = ("out_dir", "out", "wandb", "device", "n_workers")

# sizes at which a run takes a tenth of a second
RUN = dict(device="cpu", n_workers=0, log_every=1)
CLIPS = RUN | dict(n_frames=4, batch_size=2, micro_batch=1, val_clips=2)
SETTINGS = {
    "train_ntp": CLIPS | dict(scales="16+32", patch_size=8, hidden_size=16, num_layers=1, num_heads=2, optimizer="muon",
                              intermediate_size=16, num_multi_token_pred=3),
    "train_grpo": CLIPS | dict(group_size=2, recon_sample_rate=0.5, ratio=0.3),
    "train_videomae": CLIPS | dict(scales="16+32", patch_size=8, hidden_size=16, num_hidden_layers=1,
                                   num_attention_heads=2, intermediate_size=16, decoder_hidden_size=16,
                                   decoder_num_hidden_layers=1, decoder_num_attention_heads=2, recon_frames=2,
                                   decoder_intermediate_size=16, max_num_frames=4, ratio_max=0.4),
    "argaze.train": CLIPS | dict(encoder="random:16x2x2x32", train_encoder=True, scene_layers="-1", image_size=32,
                                 patch_size=16, decoder_layers=1, decoder_heads=2, decoder_ffn=16, head_widths="4+4",
                                 heatmap_size=8, history=2, stride=1),
    "unigaze.train": RUN | dict(image_size=16, patch_size=8, hidden_size=16, depth=1, num_heads=2, protocol="toy",
                                batch_size=2, dtype="bfloat16"),
    "unigaze.train_mae": RUN | dict(image_size=16, patch_size=8, hidden_size=16, depth=1, num_heads=2, batch_size=2,
                                    decoder_hidden_size=16, decoder_depth=1, decoder_num_heads=2, protocol="toy_mae",
                                    grad_accumulation_steps=1)}

# ----------------------------------------------------------------------------------------------------------------------
# runs


def call(script, *args):
    """main() of a script, as from a command line."""
    sys.argv = ["script", *map(str, args)]
    torch.manual_seed(0)
    script.main()


def arguments(name, data):
    """The command line of a tiny run on what write_data made."""
    settings = dict(SETTINGS[name])
    if name.startswith("unigaze"):
        settings["data"] = data / "faces"
    else:
        settings["root"] = data / ("argaze" if name == "argaze.train" else "toy")
    if name == "train_ntp":
        settings["labels"] = data / "labels.json"
    if name == "train_grpo":
        settings |= dict(init_from=data / "gaze", videomae=data / "mae")
    return [f"--{key}={value}" for key, value in settings.items()]


def write_data(folder):
    """Clips, faces, labels, and a model of each kind, for all kinds of damage."""
    if folder.exists():
        return
    make_data.toy(make_data.ToyConfig(out=str(folder / "toy"), n_train=2, n_val=2, n_frames=4, height=32, width=48,
                                      n_workers=1))
    argaze.make_data.make(argaze.make_data.Config(out=str(folder / "argaze"), n_train=2, n_val=2, n_frames=4, size=32,
                                                  n_workers=1))
    random = np.random.default_rng(0)
    for protocol in ("toy", "toy_mae"):
        for name in {name for names in unigaze.data.protocol(protocol).values() for name in names}:
            split = unigaze.data.SETS[name]
            for subject in split.subjects or ["00000"]:
                path = folder / "faces" / split.folder / f"{subject}.h5"
                path.parent.mkdir(parents=True, exist_ok=True)
                with h5py.File(path, "w") as file:
                    file["face_patch"] = random.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
                    file["face_gaze"] = random.uniform(-0.5, 0.5, (2, 2)).astype(np.float32)
                    file["face_head_pose"] = random.uniform(-0.5, 0.5, (2, 2)).astype(np.float32)
    call(train_videomae, *arguments("train_videomae", folder), f"--out_dir={folder / 'mae'}", "--steps=1")
    call(label, f"--root={folder / 'toy'}", f"--videomae={folder / 'mae'}", f"--out={folder / 'labels.json'}",
         "--n_frames=4", "--device=cpu", "--ratio_max=0.2")
    call(train_ntp, *arguments("train_ntp", folder), f"--out_dir={folder / 'gaze'}", "--steps=1")


@contextlib.contextmanager
def until_training():
    """A run that gets as far as its log ends there, with a result."""
    class Begun(Exception):
        pass

    def begin(*args):
        raise Begun
    begins = {module: module.Log for module in TRAINED.values()}
    for module in begins:
        module.Log = begin
    with contextlib.suppress(Begun):
        yield


def case_of(folder):
    """Name of the folder that was copied before a file in it was damaged, see fuzz.damage_and_read."""
    return folder.name.split("_", 2)[2]


# ----------------------------------------------------------------------------------------------------------------------
# settings


def write_configs(folder):
    """A config file per script with all keys at tiny sizes, beside the data."""
    write_data(folder.parent / "data")
    for name, script in TRAINED.items():
        (folder / name).mkdir()
        cfg = configurator.load(script.Config, arguments(name, folder.parent / "data"), verbose=False)
        lines = [f"{key} = {value!r}" for key, value in asdict(cfg).items() if key not in NEVER_DRAWN]
        (folder / name / "config.py").write_text("\n".join(lines) + "\n")


def read_config(folder):
    start(folder, [str(folder / "config.py"), "--device=cpu", "--n_workers=0"])


def write_commands(folder):
    """A command line per script, an argument a line."""
    write_configs(folder)
    for name in TRAINED:
        lines = (folder / name / "config.py").read_text().splitlines()
        (folder / name / "config.py").unlink()
        words = ["--" + line.replace(" = ", "=").replace("'", "") for line in lines]
        (folder / name / "command.txt").write_text("\n".join(words) + "\n")


def read_command(folder):
    words = (folder / "command.txt").read_text(errors="surrogateescape").split("\n")
    words = [word for word in words if word and not re.match(f"-*({'|'.join(NEVER_DRAWN)})=", word)]
    start(folder, [*words, "--device=cpu", "--n_workers=0"])


def start(folder, command):
    """Start a run with these arguments, as far as its log. An error has to name a setting, the source or a file."""
    script = TRAINED[case_of(folder)]
    keys = [field.name for field in fields(script.Config)]
    values = []
    try:
        cfg = configurator.load(script.Config, [*command, f"--out_dir={folder / 'out'}"], verbose=False)
        values = [str(value) for value in asdict(cfg).values() if value]
        script.configurator.parse = lambda *args: cfg
        with until_training():
            call(script)
    except ERRORS as error:
        names_key = re.search(rf"command line|{re.escape(str(folder))}|\b({'|'.join(keys)})\b", str(error))
        assert names_key or any(value in str(error) for value in values), f"names no setting: {error}"
        raise ValueError(f"{folder}: {error}") from error


# ----------------------------------------------------------------------------------------------------------------------
# tensors


def change_tensors(path, draw):
    """One entry of a file of torch's or safetensors' is left out, or becomes something else."""
    is_safe = path.suffix == ".safetensors"
    content = load_file(path) if is_safe else torch.load(path, weights_only=False)
    places = list(walk(content))
    parent, key = draw.choice(places)
    value = parent[key]
    action = draw.choice(("missing", "other"))
    if action == "missing":
        del parent[key]
    else:
        parent[key] = draw.choice(others(value, draw, is_safe))
    if is_safe:
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)


def walk(content):
    """(container, key) of every entry, however deep."""
    keys = content if isinstance(content, dict) else range(len(content))
    for key in list(keys):
        yield content, key
        if isinstance(content[key], dict | list):
            yield from walk(content[key])


def others(value, draw, tensors_only):
    """What else may stand in the place of a value."""
    if not isinstance(value, torch.Tensor):
        return [None, -1, 7.5, float("nan"), "x", [], {}, [1], {"a": 1}, torch.zeros(2), 10 ** 18]
    spoilt = value.clone().flatten()
    if len(spoilt) and spoilt.is_floating_point():
        spoilt[draw.randrange(len(spoilt))] = draw.choice((float("nan"), float("inf"), -float("inf")))
    found = [spoilt.view(value.shape), value.flatten()[:-1], value.unsqueeze(0), value.to(torch.int32),
             value.to(torch.complex64), value.to(torch.bool), torch.zeros(1)]
    if not tensors_only:
        found += [None, "x", 3, {}, [value], torch.zeros(1).expand(10 ** 12), value.to_sparse(), value.to("meta")]
    return found


# ----------------------------------------------------------------------------------------------------------------------
# weights


def write_weights(folder):
    """Model folders as they are saved, and published files."""
    write_data(folder.parent / "data")
    torch.manual_seed(0)
    shutil.copytree(folder.parent / "data" / "gaze", folder / "gaze", ignore=shutil.ignore_patterns("best", "[!cm]*"))
    shutil.copytree(folder.parent / "data" / "mae", folder / "mae", ignore=shutil.ignore_patterns("best", "[!cm]*"))
    settings = configurator.load(argaze.train.Config, arguments("argaze.train", folder), verbose=False)
    ARGaze(settings.model()).save_pretrained(folder / "argaze")
    UniGaze(UniGazeConfig(16, 8, 16, 1, 2)).save_pretrained(folder / "unigaze")
    for name in ("v1_weights.safetensors", "trainer_epoch_02.pth.tar", "mae_checkpoint-299.pth"):
        source = GOLDEN / ("argaze_tiny" if name.startswith("v1") else "unigaze_tiny") / name
        (folder / name).mkdir()
        shutil.copy(source, folder / name)
    (folder / "mae.pt").mkdir()
    torch.save(weights.read_tensors(folder / "mae" / "model.safetensors"), folder / "mae.pt" / "mae.pt")


def read_weights(folder):
    case = case_of(folder)
    if case == "gaze":
        model = Gaze.from_pretrained(folder)
    elif case == "mae":
        model = VideoMAE.from_pretrained(folder)
    elif case == "mae.pt":
        cfg = configurator.load(train_videomae.Config, arguments("train_videomae", folder), verbose=False)
        model = VideoMAE.from_pretrained(folder / case, cfg.model())
    elif case == "argaze":
        model = ARGaze.from_pretrained(folder)
    elif case == "unigaze":
        model = UniGaze.from_pretrained(folder)
    elif case.startswith("v1"):
        config = ARGazeConfig(encoder=str(GOLDEN / "argaze_tiny" / "vit"), image_size=64, decoder_layers=2,
                              decoder_heads=4, decoder_ffn=64, head_widths="16+8", history=2, heatmap_size=18)
        model = ARGaze.from_published(folder / case, config)
    elif case.startswith("trainer"):
        model = UniGaze.from_published(folder / case, UniGazeConfig(32, 8, 32, 3, 2))
    else:
        model = FaceMAE.from_published(folder / case, FaceMAEConfig(32, 8, 32, 3, 2, 0.0, 16, 2, 2))
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cpu" and tensor.isfinite().all(), f"{name} is not finite"


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints


def write_checkpoints(folder):
    write_data(folder.parent / "data")
    for name, script in TRAINED.items():
        call(script, *arguments(name, folder.parent / "data"), f"--out_dir={folder / name}", "--steps=1")
        for path in [*folder.glob(f"{name}/best"), folder / name / "results"]:
            shutil.rmtree(path, ignore_errors=True)
        for path in folder.glob(f"{name}/*"):
            if path.name not in ("last.pt", "config.json", "model.safetensors", "metrics.jsonl"):
                path.unlink()


def read_checkpoint(folder):
    """Resume and take one step."""
    name = case_of(folder)
    run.LOOP.clear()
    call(TRAINED[name], *arguments(name, folder.parent / "data"), f"--out_dir={folder}", "--steps=2",
         "--init_from=resume")


KINDS = {"configs": (write_configs, read_config), "commands": (write_commands, read_command),
         "weights": (write_weights, read_weights), "checkpoints": (write_checkpoints, read_checkpoint)}
