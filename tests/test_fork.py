"""A fork of train_grpo.py with a reward of its own and no reconstructor: ten new lines in two places."""
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import train_grpo
from data import Clips, collate, to_model_pixels
from gazing import split_ratio
from model import Gaze

SOURCE = Path(train_grpo.__file__).read_text()

# Gazes at the coarse scale are rewarded: 4 of the 20 patches of a frame.
REWARD = '''def reward(mae, video, gazing, frames, max_rows=0):
    shares = []
    for ids, padded in split_frames(gazing):
        coarse = (ids % 20 < 4) & ~padded
        shares.append(coarse.sum(dim=1) / (~padded).sum(dim=1))
    return torch.stack(shares, dim=1)[:, list(frames)]
'''
NO_RECONSTRUCTOR = "    mae = None\n"

SETTINGS = [
    "--scales=16+32", "--patch_size=8", "--hidden_size=32", "--intermediate_size=64", "--num_layers=1", "--num_heads=4",
    "--num_multi_token_pred=3", "--n_frames=4", "--device=cpu", "--n_workers=0",
    "--batch_size=2", "--val_clips=3", "--init_from=scratch", "--initializer_range=0.2", "--group_size=6",
    "--split=mean", "--ratio=0.3", "--val_ratio=0.3",
    "--recon_sample_rate=0.5", "--optimizer=adam", "--lr=0.05", "--lr_schedule=constant", "--steps=2", "--log_every=1",
    "--val_every=1"]


def replace_function(source, name, text):
    """Put text in the place of a function, its decorators aside."""
    pattern = rf"^def {name}\(.*?(?=^\S)"
    assert len(re.findall(pattern, source, flags=re.DOTALL | re.MULTILINE)) == 1
    return re.sub(pattern, lambda match: text + "\n\n", source, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """The forked script as a module; its copy lies beside nothing, the repository is on sys.path."""
    load = ("    mae = load_videomae(cfg, device)\n    mae.checks_values = False\n"
            "    check_fit(mae, gaze, cfg.init_from)\n")
    assert SOURCE.count(load) == 1 and SOURCE.count("FORK: what") == SOURCE.count("FORK: load") == 1
    path = tmp_path / "train_coarse.py"
    path.write_text(replace_function(SOURCE.replace(load, NO_RECONSTRUCTOR), "reward", REWARD))
    spec = importlib.util.spec_from_file_location("train_coarse", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_coarse", module)
    spec.loader.exec_module(module)
    return module


def test_a_fork_is_ten_lines_in_two_places(fork, toy, tmp_path, monkeypatch):
    assert len((REWARD + NO_RECONSTRUCTOR).splitlines()) <= 10
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["train_coarse.py", *SETTINGS, f"--root={toy}", f"--out_dir={out}"])
    fork.main()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    validated = [row["val_reward"] for row in rows if "val_reward" in row]
    trained = [row["reward"] for row in rows if "reward" in row]
    assert len(validated) == 3 and len(trained) == 2 and all(0 <= reward <= 1 for reward in validated + trained)
    assert (out / "val.png").stat().st_size > 1000

    # best/ is the model with the highest reward of the fork
    assert len(set(validated)) > 1, "the steps should differ"
    clips = Clips(toy, "val", n_frames=4, size=32)
    video = to_model_pixels(collate([clips[i] for i in range(3)])["video"])
    gazing = Gaze.from_pretrained(out / "best").generate(video, split_ratio("mean", 0.3, 4, "10,3", None))
    best = fork.reward(None, video, gazing, range(4)).mean().item()
    assert best == pytest.approx(max(validated), abs=1e-5)
    assert torch.load(out / "last.pt", weights_only=True)["best"] == pytest.approx(-max(validated), abs=1e-5)


def test_the_reward_goes_up(fork, toy, tmp_path, monkeypatch):
    """More gazes at the coarse scale after a few steps: the update follows the fork's reward."""
    settings = [*SETTINGS, "--steps=12", "--lr=0.01", "--batch_size=4", "--val_every=100", "--log_every=3"]
    monkeypatch.setattr(sys, "argv", ["train_coarse.py", *settings, f"--root={toy}", f"--out_dir={tmp_path / 'out'}"])
    fork.main()
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert rewards[-1] > rewards[0] + 0.1, rewards
