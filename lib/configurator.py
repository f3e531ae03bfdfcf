"""
Settings of a script: a dataclass at its top (a type, a default and a comment per key), then

    cfg = configurator.parse(Config, sys.argv[1:])

    python train.py config/toy.py --lr=1e-3 labels=none     # from left to right, the last one wins
    python train.py -h                                      # every key with its default and its comment

Types: int, float, bool, str, Literal, and each with `| None`. A config file is plain Python, `lr = 1e-3` per line;
names that start with _ are its own. A method check(self) of the class runs last and raises ValueError with the fix.
"""
import ast
import difflib
import importlib.util
import inspect
import io
import math
import os
import re
import runpy
import sys
import textwrap
import tokenize
from dataclasses import fields
from decimal import Decimal
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

SWITCH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
SHELL = "command line"


class ConfigError(ValueError):
    """A setting the user has to change; the message says where it stands and what to write."""


def parse(cls, argv):
    """load() for a script: answers -h, and a mistake ends in one line and exit code 2 instead of a traceback."""
    if "-h" in argv or "--help" in argv:
        print(help_text(cls))
        raise SystemExit(0)
    try:
        return load(cls, argv)
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None


def command(names, doc):
    """The first word of the command line for a script of several commands. -h prints doc. Raises ValueError."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in ("-h", "--help"):
        print(doc.strip())
        raise SystemExit(0)
    if word not in names:
        raise ValueError(f"{word!r} is no command: choose from {', '.join(names)}; -h shows how they are used")
    return word


def load(cls, argv, verbose=None):
    """cls with the overrides in argv. verbose: print them; None = on rank 0 only. Raises ConfigError."""
    hints = get_type_hints(cls)
    chosen = {}  # key -> (value, source)
    for arg in argv:
        key, equals, text = arg.removeprefix("--").partition("=")
        if arg.endswith(".py") and not (equals and key.isidentifier()):  # init=a.py is a setting, runs/lr=1/a.py a file
            for key, value in read_file(arg, hints).items():
                chosen[key] = convert(key, hints, value, arg), arg
        elif equals:
            chosen[key] = convert(key, hints, text, SHELL), SHELL
        elif key in hints:  # `--key value` or a bare `--flag`: one form only, so that no typo passes as a value
            form = f"--{key}=true or --{key}=false" if hints[key] is bool else f"--{key}=value"
            raise ConfigError(f"{arg} has no value ({SHELL}): write {form}")
        elif arg.startswith("-"):
            raise unknown(key, hints, SHELL)
        else:
            raise ConfigError(f"{arg!r} ({SHELL}) is neither key=value nor a config file (.py)")

    try:
        cfg = cls(**{key: value for key, (value, _) in chosen.items()})
        check_common(cfg)
        if hasattr(cfg, "check"):
            cfg.check()
    except ValueError as e:
        # where the settings stand that it is about
        sources = [source for key, (_, source) in chosen.items() if re.search(rf"\b{key}\b", str(e))]
        where = f" ({', '.join(dict.fromkeys(sources))})" if sources else ""
        raise ConfigError(f"{e}{where}") from e

    if verbose or verbose is None and os.environ.get("RANK", "0") == "0":
        for key, (value, source) in chosen.items():
            print(f"override {key} = {value!r} ({source})")
    return cfg


def read_file(path, hints):
    """{key: value} of a config file."""
    if not os.path.isfile(path):
        raise ConfigError(f"config file {path} not found (looked from {os.getcwd()})")
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as e:
        raise ConfigError(f"config file {path}: {type(e).__name__}: {e}") from e

    # YAML's `lr: 1e-3` is valid Python that sets nothing
    for key in names.get("__annotations__", {}).keys() - names:
        raise ConfigError(f"{key} has no value ({path}): write {key} = value")

    # modules, functions and classes are no settings, unless they took a key's name: then convert refuses them
    settings = {}
    for key, value in names.items():
        if key in hints or not (key.startswith("_") or isinstance(value, ModuleType) or callable(value)):
            settings[key] = value
    return settings


def unknown(key, hints, source):
    near = difflib.get_close_matches(key.replace("-", "_"), hints, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "-h lists the keys"
    return ConfigError(f"unknown key {key!r} ({source}): {hint}")


def convert(key, hints, value, source):
    """value as the type of key asks: text from the shell is read, Python from a file has to have the type already."""
    if key not in hints:
        raise unknown(key, hints, source)
    hint = hints[key]
    typed = source == SHELL
    word = value.lower() if typed else value

    if get_origin(hint) in (Union, UnionType):
        if value is None or typed and word == "none":
            return None
        hint = next(a for a in get_args(hint) if a is not NoneType)

    if get_origin(hint) is Literal:
        for choice in get_args(hint):
            if typed and str(choice) == value:
                return choice
            if not typed and choice == value and type(choice) is type(value):
                return choice

    elif hint is bool:
        if typed and word in SWITCH:
            return SWITCH[word]
        if isinstance(value, bool):
            return value

    elif hint is str:
        if isinstance(value, str):
            return value

    elif hint in (int, float) and (typed or type(value) in (int, float)):
        try:
            number = float(value)
            if hint is float and math.isfinite(number):
                return number
            if hint is int and number.is_integer():
                return int(Decimal(str(value)))  # 1e3 is 1000, and a long seed keeps the digits a float would lose
        except (ValueError, OverflowError):
            pass
    raise ConfigError(f"{key}: expected {type_name(hints[key])}, got {value!r} ({source})")


def type_name(hint):
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    return " | ".join(map(type_name, get_args(hint))) or ("none" if hint is NoneType else hint.__name__)


def help_text(cls):
    """The script's docstring, then every key with its default, type and comment."""
    doc = getattr(sys.modules.get(cls.__module__), "__doc__", None) or ""
    lines = [doc.strip(), "", "settings with their defaults; config/file.py and --key=value override, last one wins"]
    hints = get_type_hints(cls)
    comments = read_comments(cls)
    default = cls()
    for field in fields(cls):
        heading, comment = comments.get(field.name, ([], ""))
        if heading:
            lines += ["", *heading]
        value = getattr(default, field.name)
        if value is None or isinstance(value, bool):
            value = str(value).lower()
        setting = f"--{field.name}={value}"
        colon = ": " if comment else ""
        lines.append(f"  {setting:<32}  {type_name(hints[field.name])}{colon}{comment}")
    return "\n".join(lines).strip()


def read_comments(cls):
    """{key: (comment lines right above, comment at the end of its line)}; empty where there is no source file."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    notes = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}  # by line number

    found = {}
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        heading = []
        line = node.lineno - 1
        while line in notes and notes[line].line.strip().startswith("#"):
            heading.insert(0, notes[line].string.strip("#-= "))
            line -= 1
        comment = ""
        if node.end_lineno in notes:
            comment = notes[node.end_lineno].string.lstrip("# ")
        found[node.target.id] = heading, comment
    return found


def shared(cfg, other):
    """{key: value} of the settings that are fields of the dataclass `other` too, such as a model's sizes."""
    names = {field.name for field in fields(cfg)} & {field.name for field in fields(other)}
    return {name: getattr(cfg, name) for name in names}


# ----------------------------------------------------------------------------------------------------------------------
# what a script's check() may ask


# Numbers above these are refused before memory is taken for them, or minutes pass. Seeds of steps are products of seed.
LARGEST = {"seed": 2 ** 32 - 1, "batch_size": 1_000_000, "n_frames": 100_000, "group_size": 10_000, "n_workers": 1000}
LARGEST_NUMBER = 1_000_000_000  # for all other keys
LARGEST_SIZE = 1_000_000        # of any width or count in a model's config
MOST_LAYERS = 1000
MOST_PATCHES = 256              # along a side of the picture


def check_common(cfg):
    """Keys that mean the same in every script, and all numbers. load() asks this by itself."""
    for key, value in vars(cfg).items():
        most = LARGEST.get(key, LARGEST_NUMBER)
        if type(value) in (int, float) and abs(value) > most:
            raise ValueError(f"{key}={value} must be at most {most}")
    device = getattr(cfg, "device", "auto")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", device):
        raise ValueError(f"device={device}: possible are auto, cpu, mps, cuda (one per process) and cuda:0, cuda:1, …")
    if getattr(cfg, "init_from", None) == "":
        raise ValueError("init_from is empty: give scratch, resume, or where the weights are")
    seed = getattr(cfg, "seed", 0)
    if seed < 0:
        raise ValueError(f"seed={seed} must lie between 0 and {LARGEST['seed']}")
    for key in ("out_dir", "out"):
        folder = getattr(cfg, key, None)
        if folder is not None and Path.cwd().is_relative_to(Path(folder).resolve()):
            raise ValueError(f"{key}={folder} holds the folder you work in: give results a folder of their own")


def check_sizes(config, may_be_zero=()):
    """Of a model's config, also one from a file: ValueError names the first value that no model can have."""
    for setting in fields(config):
        key = setting.name
        value = getattr(config, key)

        if setting.type is int:
            counts_layers = "layers" in key or "blocks" in key or "depth" in key
            lowest = 0 if key in may_be_zero else 1
            highest = MOST_LAYERS if counts_layers else LARGEST_SIZE
            if type(value) is not int or not lowest <= value <= highest:
                raise ValueError(f"{key}={value!r} must be a whole number from {lowest} to {highest:,}")

        if setting.type is float:
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(f"{key}={value!r} must be a number")

        if setting.type in (bool, str) and type(value) is not setting.type:
            raise ValueError(f"{key}={value!r} must be {'true or false' if setting.type is bool else 'a text'}")


def check_patches(key, side, patch_size):
    """ValueError unless `side`, the value of key in pixels, gives a whole number of patches, and not too many."""
    if side % patch_size or not 1 <= side // patch_size <= MOST_PATCHES:
        raise ValueError(f"{key}={side} must be a multiple of patch_size={patch_size}, at most {MOST_PATCHES} patches")


def check_at_least(cfg, **minimum):
    """ValueError if a key is below its minimum; none is no value and passes."""
    for key, least in minimum.items():
        value = getattr(cfg, key)
        if value is not None and value < least:
            raise ValueError(f"{key}={value} must be at least {least}")


def check_above_zero(cfg, *keys):
    for key in keys:
        value = getattr(cfg, key)
        if value is not None and value <= 0:
            raise ValueError(f"{key}={value} must be above 0")


def check_share(cfg, *keys):
    """ValueError unless each key holds a share in (0, 1], or several of them joined by commas."""
    for key in keys:
        value = getattr(cfg, key)
        if not all(0 < v <= 1 for v in numbers(value)):
            raise ValueError(f"{key}={value} must lie in (0, 1], it is a share")


def check_fraction(cfg, *keys):
    for key in keys:
        value = getattr(cfg, key)
        if not 0 <= value < 1:
            raise ValueError(f"{key}={value} must lie in [0, 1)")


def check_order(cfg, *pairs):
    """ValueError if the first key of a pair is above the second."""
    for low, high in pairs:
        if getattr(cfg, low) > getattr(cfg, high):
            raise ValueError(f"{low}={getattr(cfg, low)} is above {high}={getattr(cfg, high)}")


def check_wandb(cfg):
    if cfg.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"wandb={cfg.wandb} needs the package: pip install wandb, or --wandb=none")


def numbers(text):
    """Parse '10,3'. Anything else gives [nan], so that every range check fails."""
    try:
        return [float(v) for v in str(text).split(",")]
    except ValueError:
        return [math.nan]
