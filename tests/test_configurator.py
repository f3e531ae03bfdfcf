"""Settings: what a person types or writes into a file becomes the typed value, or an error that says what to write."""
import importlib
import re
import runpy
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pytest

from lib import configurator
from lib.configurator import ConfigError


@dataclass
class Config:
    # data
    root: str = "data/toy"                                 # folders, separated by commas
    labels: str | None = None                              # none = <root>/labels.json
    # ---- optimizer ----
    # (published values)
    lr: float = 5e-4                                       # peak # of the schedule
    clip: float | None = 1.0
    steps: int = 1000                                      # optimizer steps
    limit: int | None = None
    compile: bool = False                                  # faster after a minute
    split: Literal["uniform", "dirichlet"] = "uniform"     # how the budget is drawn
    patch: Literal[8, 16] | None = (
        16
    )  # pixels

    # about check, not about a key
    def check(self):
        if self.steps < 0:
            raise ValueError("steps is negative: write --steps=0 or more")


def load(*argv):
    return configurator.load(Config, argv, verbose=False)


def write(path, text):
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("arg, expected", [
    ("--lr=1", 1.0), ("lr=1e-3", 1e-3), ("--lr=-.5", -0.5),
    ("--clip=none", None), ("--clip=2", 2.0),
    ("--steps=1e3", 1000), ("steps=7", 7), ("--steps=123456789", 123456789),
    ("--limit=None", None), ("--limit=3", 3),
    ("--compile=true", True), ("--compile=False", False), ("compile=1", True), ("--compile=0", False),
    ("--compile=YES", True), ("--compile=no", False), ("--compile=On", True), ("--compile=off", False),
    ("--root=5", "5"), ("--root=true", "true"), ("--root=none", "none"), ("--root=", ""), ("--root=a=b", "a=b"),
    ("root=--x y", "--x y"), ("--root=a.py", "a.py"), ("root=a.py", "a.py"),
    ("--labels=none", None), ("--labels=x.json", "x.json"),
    ("--split=dirichlet", "dirichlet"), ("--patch=8", 8), ("--patch=none", None),
])
def test_typed_values(arg, expected):
    key = arg.removeprefix("--").split("=")[0]
    value = getattr(load(arg), key)
    assert value == expected and type(value) is type(expected)
    assert asdict(load(arg)) == asdict(Config()) | {key: expected}


@pytest.mark.parametrize("argv, words", [
    (["--lrr=1"], ["'lrr'", "command line", "did you mean lr?"]),
    (["--step=1"], ["did you mean steps?"]),
    (["-lr=1"], ["'-lr'", "did you mean lr?"]),
    (["--compil"], ["did you mean compile?"]),
    (["--zzzzzz=1"], ["'zzzzzz'", "-h lists"]),
    (["--lr", "0.1"], ["--lr has no value", "write --lr=value"]),
    (["lr", "=", "0.1"], ["write --lr=value"]),
    (["--compile"], ["--compile=true"]),
    (["config/toy"], ["'config/toy'", "key=value", ".py"]),
    (["config/absent.py"], ["config/absent.py", "not found"]),
    (["runs/lr=1/absent.py"], ["runs/lr=1/absent.py", "not found"]),
    (["--lr=fast"], ["lr", "expected float", "'fast'", "command line"]),
    (["--lr="], ["expected float"]), (["--lr=nan"], ["expected float"]), (["--lr=-inf"], ["expected float"]),
    (["--lr=none"], ["expected float"]), (["--lr=true"], ["expected float"]), (["--lr=1e999"], ["expected float"]),
    (["--steps=1.5"], ["expected int", "'1.5'"]), (["--steps=inf"], ["expected int"]),
    (["--steps=none"], ["expected int"]), (["--steps=true"], ["expected int"]),
    (["--limit=many"], ["expected int | none"]),
    (["--compile=2"], ["expected bool"]), (["--compile=none"], ["expected bool"]), (["--compile="], ["expected bool"]),
    (["--split=Uniform"], ["expected uniform | dirichlet"]), (["--patch=9"], ["expected 8 | 16 | none"]),
    (["--steps=-1"], ["write --steps=0"]),
])
def test_errors(argv, words):
    with pytest.raises(ConfigError) as e:
        load(*argv)
    assert all(word in str(e.value) for word in words), str(e.value)


@pytest.mark.parametrize("line, expected", [
    ("lr = 1", 1.0), ("lr = 1e-3", 1e-3), ("steps = 1e3", 1000), ("steps = 3 * 10", 30), ("compile = True", True),
    ("clip = None", None), ("labels = 'none'", "none"), ("root = '5'", "5"), ("patch = 8", 8), ("patch = None", None),
    ("import math as compile_\nfrom pathlib import Path\n_half = 2\ndef f(): pass\nlr = _half / 4", 0.5),
    ("lr: float = 0.25", 0.25),
])
def test_file_values(tmp_path, line, expected):
    path = write(tmp_path / "c.py", line)
    key = line.splitlines()[-1].replace(":", " ").split()[0]
    value = getattr(load(path), key)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize("line, words", [
    ("learn = 1\nstpes = 5", ["'learn'"]), ("stpes = 5", ["'stpes'", "did you mean steps?"]),
    ("lr = '1e-3'", ["lr", "expected float", "'1e-3'"]), ("lr = True", ["expected float"]), ("lr = None", ["expected"]),
    ("lr = float('nan')", ["expected float"]), ("lr = 10 ** 400", ["expected float"]),
    ("steps = 1.5", ["expected int"]), ("steps = True", ["expected int"]), ("steps = '5'", ["expected int"]),
    ("compile = 1", ["expected bool"]), ("compile = 'true'", ["expected bool"]), ("root = 5", ["expected str"]),
    ("root = None", ["expected str"]), ("split = 'even'", ["uniform | dirichlet"]), ("patch = '8'", ["8 | 16 | none"]),
    ("patch = 8.0", ["8 | 16 | none"]), ("def split(): pass", ["split", "expected"]),
    ("lr: 1e-3", ["lr has no value", "write lr = value"]), ("lr = x", ["NameError"]), ("lr = = 1", ["SyntaxError"]),
    ("exit(3)", ["SystemExit: 3"]),
])
def test_file_errors(tmp_path, line, words):
    path = write(tmp_path / "c.py", line)
    with pytest.raises(ConfigError) as e:
        load(path)
    assert all(word in str(e.value) for word in [*words, path]), str(e.value)


@dataclass
class Run:
    seed: int = 0
    device: str = "auto"
    out_dir: str = "out/run"


@pytest.mark.parametrize("argument, words", [
    ("device=0+32", r"device=0\+32: possible are auto, cpu, mps, cuda"), ("device=out", "device=out: possible are"),
    ("device=cuda:x", "device=cuda:x"), ("seed=-1", "seed=-1 must lie between 0 and 4294967295"),
    ("seed=1e38", "seed=1000.*must be at most 4294967295"), ("seed=4294967296", "must be at most"),
    ("out_dir=/", "out_dir=/ holds the folder you work in"), ("out_dir=.", "out_dir=. holds"),
    ("out_dir=..", "out_dir=.. holds")])
def test_keys_that_mean_the_same_in_every_script(argument, words):
    with pytest.raises(ConfigError, match=words):
        configurator.load(Run, [argument], verbose=False)
    configurator.load(Run, ["device=cuda:1", "seed=4294967295", "out_dir=/tmp/x"], verbose=False)


def test_last_wins_and_each_override_is_printed_once(tmp_path, capsys, monkeypatch):
    a, b = write(tmp_path / "a.py", "lr = 1\nsteps = 1"), write(tmp_path / "b.py", "lr = 2")
    assert load(a, b).lr == 2 and load(b, a).lr == 1
    assert load(a, "--lr=3").lr == 3 and load("--lr=3", a).lr == 1 and load("--lr=3", "lr=4").lr == 4

    assert capsys.readouterr().out == ""
    monkeypatch.delenv("RANK", raising=False)
    configurator.load(Config, [a, "--lr=0.001"])
    assert capsys.readouterr().out == f"override lr = 0.001 (command line)\noverride steps = 1 ({a})\n"
    monkeypatch.setenv("RANK", "1")
    configurator.load(Config, [a])
    assert capsys.readouterr().out == ""


def test_help():
    text = configurator.help_text(Config)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert text.startswith("Settings: what a person types")
    assert lines[lines.index("data"):] == [
        "data",
        "--root=data/toy str: folders, separated by commas",
        "--labels=none str | none: none = <root>/labels.json",
        "",
        "optimizer",
        "(published values)",
        "--lr=0.0005 float: peak # of the schedule",
        "--clip=1.0 float | none",
        "--steps=1000 int: optimizer steps",
        "--limit=none int | none",
        "--compile=false bool: faster after a minute",
        "--split=uniform uniform | dirichlet: how the budget is drawn",
        "--patch=16 8 | 16 | none: pixels",
    ]


SCRIPT = '''"""Trains a toy. python toy.py --lr=1"""
from __future__ import annotations
import sys
import types
from dataclasses import dataclass
from lib import configurator

@dataclass
class Config:
    # optimizer
    lr: float | None = 5e-4  # published

if __name__ == "__main__":
    print(configurator.parse(Config, sys.argv[1:]))
'''


@pytest.mark.parametrize("argv, code, out, err", [
    (["lr=1"], 0, ["override lr = 1.0 (command line)", "Config(lr=1.0)"], []),
    (["--lrr=1", "-h"], 0, ["Trains a toy.", "optimizer", "--lr=0.0005", "float | none: published"], []),
    (["--help"], 0, ["published"], []),
    (["--lrr=1"], 2, [], ["error: unknown key 'lrr' (command line): did you mean lr?"]),
])
def test_script(tmp_path, monkeypatch, argv, code, out, err):
    monkeypatch.setenv("PYTHONPATH", str(Path(configurator.__file__).parent.parent))
    monkeypatch.delenv("RANK", raising=False)
    path = write(tmp_path / "toy.py", SCRIPT)
    run = subprocess.run([sys.executable, path, *argv], capture_output=True, text=True)
    assert run.returncode == code and "Traceback" not in run.stderr and bool(run.stderr) == bool(err), run.stderr
    assert all(words in run.stdout for words in out) and all(words in run.stderr for words in err)


def test_option_table():
    """Every key in docs/options.md exists in the scripts named behind it."""
    import train_grpo
    import train_ntp
    import train_videomae
    scripts = {"N": train_ntp.Config, "G": train_grpo.Config, "V": train_videomae.Config}
    root = Path(configurator.__file__).parent.parent
    rows = [line.split("|") for line in (root / "docs/options.md").read_text().splitlines() if line.startswith("|")]
    found = 0
    for cell in (row[2] for row in rows[2:]):
        for keys, names in re.findall(r"((?:`\w+`(?:, )?)+) ((?:[NGV] ?)+)", cell):
            for key in re.findall(r"`(\w+)`", keys):
                for name in names.split():
                    assert key in scripts[name].__dataclass_fields__, (key, name)
                    found += 1
    assert found > 80


ROOT = Path(configurator.__file__).parent.parent


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/*.py")), ids=lambda path: path.stem)
def test_config_files(path):
    """Each loads, with nothing missing, in the script that it is for: the last word of its name, paper left out."""
    if "argaze" in path.stem or "unigaze" in path.stem:
        pytest.skip("of another system, which has its own test")
    last = path.stem.removesuffix("_paper").split("_")[-1]
    names = {"perceptual": "train_grpo", "label": "label", "eval": "eval", "data": "make_data"}
    script = importlib.import_module(names.get(last, f"train_{last}"))
    if last == "data":
        cls = script.ToyConfig if "toy" in path.stem else script.CutConfig
    else:
        cls = script.Config
    cfg = configurator.load(cls, [str(path)], verbose=False)
    assert isinstance(cfg, cls)
    if last != "perceptual" and not path.stem.endswith("_paper"):  # these change what an earlier file has set
        defaults = asdict(cls())
        names = set(runpy.run_path(str(path))) & defaults.keys()
        assert names and all(getattr(cfg, name) != defaults[name] for name in names), "it repeats a default"
