"""JSON and csv files that people bring along, of which whatever is wrong becomes a ValueError that names the file; and
files of any kind that are written whole or not at all."""
import contextlib
import csv
import json
import os
from pathlib import Path

import numpy as np


def read_json(path, name=None):
    """What a JSON file holds. name: what the errors call it. Refused too: names that occur twice in an object, of which
    json would keep the last."""
    name = name or str(path)
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file, object_pairs_hook=unique)
    except KeyError as error:
        raise ValueError(f"{name} has two entries for {error.args[0]!r}") from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON, was it cut off? ({error})") from error


def unique(pairs):
    """dict of a JSON object; KeyError if a name occurs twice."""
    found = {}
    for name, value in pairs:
        if name in found:
            raise KeyError(name)
        found[name] = value
    return found


def as_numbers(value, shape):
    """Array of this shape, float64, from lists of a JSON file. ValueError: texts, null or infinity among them."""
    array = np.array(value)
    if array.dtype.kind not in "iuf" or array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"expected finite numbers of shape {shape}, found {str(value)[:80]}")
    return array.astype(np.float64)


def whole_number(entry, key):
    """entry[key], from 0 on. ValueError names the key; KeyError: it is missing."""
    value = entry[key]
    if type(value) not in (int, float) or not 0 <= value < 2 ** 53 or value != int(value):
        raise ValueError(f"{key}={str(value)[:80]} must be a whole number from 0 on")
    return int(value)


def read_csv(path, name=None):
    """Yield (line number, fields) of a csv file without its empty lines, blanks around the fields removed."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            for line, fields in enumerate(csv.reader(file), 1):
                fields = [field.strip() for field in fields]
                if any(fields):
                    yield line, fields
    except csv.Error as error:
        raise ValueError(f"{name or path} is no csv file ({error})") from error


# ----------------------------------------------------------------------------------------------------------------------
# written


class WriteError(OSError):
    """A file could not be written; the message names it."""


@contextlib.contextmanager
def naming(path):
    """What goes wrong while `path` is written becomes a WriteError."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, RuntimeError) as error:  # torch's and HDF5's writers report a full disk as a RuntimeError
        raise WriteError(f"{path} could not be written, is the disk full? ({error})") from error


@contextlib.contextmanager
def written_whole(path):
    """Gives a temporary name to write to. The file gets its own name when the block ends well; else, as after a kill or
    on a full disk, the one before it stays. Raises WriteError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}")  # hidden: who lists videos passes over it
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path, text):
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")  # names of files may not be UTF-8
