"""
A person's own correction, fitted from a few known targets. Eyes differ: their line of sight lies some degrees beside
the axis that a camera sees, differently for everybody. In radians, in the normalised crop:

    gaze <- matrix · gaze + offset

show.py makes the file (--targets) and uses it (--calibration).
"""
import json

import numpy as np
import torch

from lib.text import as_numbers, read_csv, read_json, write_whole
from unigaze.model import angular_error

SHRINK = 1e-3    # radians², pulls the matrix to the identity where targets hardly differ


def read_targets(path):
    """{frame: (3,) mm} of a table with the columns frame, x, y, z."""
    targets = {}
    try:
        rows = read_csv(path)
        _, names = next(rows, (1, []))
        columns = [names.index(name) for name in ("frame", "x", "y", "z")]
        for line, fields in rows:
            frame, *position = [fields[column] for column in columns]
            targets[int(frame)] = np.array(position, dtype=np.float64)
            if not np.isfinite(targets[int(frame)]).all():
                raise ValueError(f"line {line} is not finite")
    except FileNotFoundError:
        raise FileNotFoundError(f"targets={path}: no such file") from None
    except (IndexError, ValueError) as error:
        raise ValueError(f"targets={path}: a table with the columns frame,x,y,z is expected ({error})") from error
    return targets


def fit(predicted, true):
    """Matrix (2, 2) and offset (2,) that bring predicted angles (n, 2) to the true ones. From three directions on an
    affine map, with fewer an offset."""
    correction = true - predicted
    offset = correction.mean(axis=0)
    directions = np.unique(true.round(2), axis=0)
    if len(directions) < 3:
        return np.eye(2), offset

    # ridge regression of the correction
    middle = predicted.mean(axis=0)
    x = predicted - middle
    y = correction - offset
    A = x.T @ x + SHRINK * len(x) * np.eye(2)
    b = x.T @ y
    change = np.linalg.solve(A, b).T
    offset = offset - change @ middle
    return np.eye(2) + change, offset


def save(path, pairs):
    """Fit a list of (predicted, true) angles, say what it brings, write the file."""
    if len(pairs) < 2:
        raise ValueError(f"{len(pairs)} frames of --targets show exactly one face: at least two are needed")
    predicted = np.array([pair[0] for pair in pairs])
    true = np.array([pair[1] for pair in pairs])
    matrix, offset = fit(predicted, true)
    before = mean_error(predicted, true)
    after = mean_error(predicted @ matrix.T + offset, true)

    content = {"matrix": matrix.tolist(), "offset": offset.tolist(), "frames": len(pairs)}
    write_whole(path, json.dumps(content, indent=1) + "\n")
    print(f"{path}: fitted to {len(pairs)} frames, error {before:.2f}° before, {after:.2f}° after (on these frames)")


def mean_error(a, b):
    """Degrees."""
    return float(angular_error(torch.from_numpy(a), torch.from_numpy(b)).mean())


def load(path):
    """Matrix and offset of a file that save() wrote."""
    try:
        content = read_json(path)
        matrix = as_numbers(content["matrix"], (2, 2))
        offset = as_numbers(content["offset"], (2,))
    except FileNotFoundError:
        raise FileNotFoundError(f"calibration={path}: no such file; --targets makes one") from None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"calibration={path} is no file of --targets ({error})") from error
    return matrix, offset
