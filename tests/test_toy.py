"""toy.sh: which commands it runs, and which stages it skips. Its stages are tested in test_training.py and others."""
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Stands in for python: writes down its arguments, and a result where one is asked for.
PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$COMMANDS"
case "$*" in *"$FAIL"*) exit 7;; esac
for word in "$@"; do case "$word" in
    --report=*) touch "${word#*=}";;
    --out=*.json) touch "${word#*=}" "${word#*=}.rank0.jsonl";;
    --out=*) mkdir -p "${word#*=}/val";;
    --out_dir=*) mkdir -p "${word#*=}"; touch "${word#*=}/model.safetensors" "${word#*=}/val.png";;
esac; done
"""


@pytest.fixture
def toy_sh(tmp_path):
    """toy_sh(**variables): (exit code, output, scripts that ran in order)."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(fail="nothing", **variables):
        commands = tmp_path / "commands"
        commands.write_text("")
        env = os.environ | dict(PYTHON=str(python), COMMANDS=str(commands), FAIL=fail, OUT=str(tmp_path / "out"))
        done = subprocess.run(["bash", str(ROOT / "toy.sh")], env=env | variables, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr, commands.read_text().splitlines()
    return run


def scripts(commands):
    return sorted(word for line in commands for word in line.split() if word.endswith(".py") and "/" not in word)


EVERYTHING = sorted(["make_data.py", "train_videomae.py", "label.py", "train_ntp.py", "train_grpo.py",
                     "train_grpo.py", "eval.py"])


def test_all_stages_run_once_with_the_same_seed(toy_sh, tmp_path):
    code, output, commands = toy_sh(SEED="5")
    assert code == 0, output
    assert scripts(commands) == EVERYTHING and all("--seed=5" in line for line in commands)
    assert [line.split()[0] for line in (tmp_path / "out/seconds.txt").read_text().splitlines()] == [
        "data", "videomae", "labels", "ntp", "grpo", "eval"]
    code, output, commands = toy_sh(SEED="5")
    assert code == 0 and commands == [] and output.count("done before") == 6


def test_a_stage_is_repeated_with_all_after_it(toy_sh, tmp_path):
    toy_sh()
    (tmp_path / "out/ntp/model.safetensors").unlink()
    assert scripts(toy_sh()[2]) == ["eval.py", "train_grpo.py", "train_grpo.py", "train_ntp.py"]
    part = tmp_path / "out/gazing_labels.json.rank0.jsonl"
    part.write_text("of the reconstructor before")
    (tmp_path / "out/videomae/model.safetensors").unlink()
    assert scripts(toy_sh()[2]) == [name for name in EVERYTHING if name != "make_data.py"]
    assert part.read_text() == ""


@pytest.mark.parametrize("script, later", [
    ("label.py", ["train_ntp.py", "eval.py"]), ("init_from=scratch", ["eval.py"])])
def test_it_stops_at_a_stage_that_fails_and_goes_on_from_there(toy_sh, script, later):
    code, output, commands = toy_sh(fail=script)
    assert code != 0 and "eval.py" not in scripts(commands)
    code, output, commands = toy_sh()
    assert code == 0 and set(later) <= set(scripts(commands)) and "train_videomae.py" not in scripts(commands)


def test_other_settings_need_another_folder(toy_sh):
    toy_sh()
    code, output, commands = toy_sh(SEED="2")
    assert code == 2 and "SEED=666" in output and "give another OUT" in output and commands == []


def test_own_videos(toy_sh):
    code, output, commands = toy_sh(VIDEOS="my videos", PROCESSES="3")
    assert code == 0 and "make_data.py cut --src=my videos" in commands[0]
    assert "--nproc_per_node=3 train_videomae.py" in commands[1] and "--crop=random" in commands[1]
    assert any("--nproc_per_node=2 train_ntp.py" in line for line in commands)
