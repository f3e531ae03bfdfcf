"""
From what the data sets are handed out as to one .h5 file per subject, as unigaze/data.py reads them.

    python -m unigaze.convert gazecapture GazeCapture.h5 data/faces/gazecapture_train_224    # a group per person
    python -m unigaze.convert eyediap sessions/ data/faces           # 1_A_CS_S.h5 ... -> eyediap_cs/person_1.h5 ...

and, for who normalises the raw pictures: what a row of each set's annotations says. With unigaze/normalise.py it is

    row = read_mpii(line)
    R, W = normalisation(K, row["head_rotation"], row["centre"])
    face_patch, face_gaze = warp(image, W), gaze_label(R, row["centre"], row["target"])

Lengths are in mm, all in the camera of the picture. XGaze's cameras 3, 6 and 13 hang upside down: turn them first.
"""

if not __package__:
    raise SystemExit("run it from the root of the repository as a module: python -m unigaze.convert …")

import sys
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from lib import configurator
from lib.run import launch
from lib.text import written_whole
from unigaze.data import FaceError, check_angles, inspect_file, open_file
from unigaze.normalise import FOCAL, SIZE, camera_matrix, rotation_matrix, warp


def write_h5(path, columns):
    """Columns {name: array with a row per face} as the published files hold them: a chunk per row, lzf. The file
    gets its name when it is whole."""
    with written_whole(path) as temporary, h5py.File(temporary, "w") as file:
        for name, values in columns.items():
            row = values.shape[1:]
            file.create_dataset(name, data=values, chunks=(1, *row), maxshape=(None, *row), compression="lzf")


# ----------------------------------------------------------------------------------------------------------------------
# files of others


def convert_gazecapture(source, out):
    """GazeCapture as faze_preprocess writes it, one file with a group per person, -> <out>/<person>.h5.

    Its camera (f 500, 600 mm, 128 pixels) sees a little more than the published one (960, 600, 224), so pictures are
    warped. Labels stay, since both cameras look in the same direction, and pictures stay RGB. Which persons are for
    training only the published lists tell. Returns the number of persons.
    """
    # both cameras look along the same line from the same distance: only their matrices differ
    theirs = camera_matrix(500, 500, 64, 64)
    ours = camera_matrix(FOCAL, FOCAL, SIZE / 2, SIZE / 2)
    W = ours @ np.linalg.inv(theirs)

    with open_file(source) as file:
        persons = {}
        for name, group in file.items():
            if isinstance(group, h5py.Group) and "pixels" in group and "labels" in group:
                persons[name] = group
        if not persons:
            raise FaceError(f"{source}: no group per person with pixels and labels; has it been converted already?")

        for name, group in tqdm(persons.items(), desc="persons"):
            pixels = group["pixels"]
            labels = group["labels"][:].astype(np.float32)
            if pixels.shape[1:] != (128, 128, 3) or labels.shape != (len(pixels), 8):
                raise FaceError(f"{source}: {name} has pixels {pixels.shape} and labels {labels.shape}, not "
                                "(n, 128, 128, 3) and (n, 8)")
            gaze = labels[:, :2]
            head = labels[:, 2:4]
            check_angles(gaze, f"{source}, {name}")
            crops = np.stack([warp(image, W) for image in pixels])
            columns = {"face_patch": crops, "face_gaze": gaze, "face_head_pose": head}
            write_h5(Path(out, f"{name}.h5"), columns)
    return len(persons)


def convert_eyediap(folder, out):
    """EYEDIAP as the published script writes it, a file per session (<person>_<A or B>_<CS, DS or FT>_<S or M>.h5), ->
    <out>/eyediap_cs/person_<N>.h5 and eyediap_ft. Sessions come in the order of their names. Returns {file: rows}."""
    sessions = {}
    for path in sorted(Path(folder).glob("*.h5")):
        parts = path.stem.split("_")
        if len(parts) == 4 and parts[0].isdigit() and parts[2] in ("CS", "FT"):
            name = f"eyediap_{parts[2].lower()}/person_{int(parts[0])}.h5"
            sessions.setdefault(name, []).append(path)
    if not sessions:
        raise FaceError(f"{folder}: no file is called like a session with a screen or a ball, 1_A_CS_S.h5")

    n_rows = {}
    for name, paths in tqdm(sessions.items(), desc="persons"):
        columns = {}
        for path in paths:
            inspect_file(path, labelled=True)
            with open_file(path) as file:
                if columns and set(file) != set(columns):
                    raise FaceError(f"{path}: holds {', '.join(file)}, the sessions before it {', '.join(columns)}")
                for key in file:
                    columns.setdefault(key, []).append(file[key][:])

        merged = {key: np.concatenate(parts) for key, parts in columns.items()}
        write_h5(Path(out, name), merged)
        n_rows[name] = len(merged["face_patch"])
    return n_rows


# ----------------------------------------------------------------------------------------------------------------------
# rows of raw annotations


def read_xgaze(line):
    """A row of XGaze's <subject>_update.csv. Fields: frame, picture, 2 of the screen, 3 of the target, 3 head rotation,
    3 head translation, 68 landmarks, 50 projected points of the face model."""
    fields = line.strip().split(",")
    numbers = np.array(fields[2:], dtype=np.float64)
    return {
        "image": f"{fields[0]}/{fields[1]}",
        "target": numbers[2:5],
        "rotation_vector": numbers[5:8],
        "head_rotation": rotation_matrix(numbers[5:8]),
        "translation": numbers[8:11],
        "landmarks": numbers[11:147].reshape(68, 2),
        "model_points": numbers[147:247].reshape(50, 2),
    }


def read_mpii(line):
    """A row of MPIIFaceGaze's pNN.txt. Landmarks are four eye and two mouth corners."""
    fields = line.split()
    numbers = np.array(fields[1:27], dtype=np.float64)
    return {
        "image": fields[0],
        "screen": numbers[:2],
        "landmarks": numbers[2:14].reshape(6, 2),
        "rotation_vector": numbers[14:17],
        "head_rotation": rotation_matrix(numbers[14:17]),
        "translation": numbers[17:20],
        "centre": numbers[20:23],
        "target": numbers[23:26],
        "eye": fields[27],
    }


def read_gaze360(line):
    """A row of the label file of Gaze360's face crops. `sight` is where the person looks, in the camera."""
    face, _, _, origin, gaze, _ = line.split()
    x, y, z = [float(value) for value in gaze.split(",")]
    parts = origin.split("/")
    return {
        "image": face,
        "subject": parts[2],
        "img_name": "/".join(parts[1:]),
        "sight": np.array([-x, -y, z]),
    }


def read_eyediap(folder, every=15):
    """A session of EYEDIAP: K (3, 3) of its VGA camera, and {frame: target (3,)} of the frames whose state is OK, that
    have a target, and whose number divides by `every`. The screen's file wins over the ball's."""
    lines = Path(folder, "rgb_vga_calibration.txt").read_text().splitlines()
    fx, _, cx = [float(value) for value in lines[3].split(";")]
    _, fy, cy = [float(value) for value in lines[4].split(";")]

    screen = Path(folder, "screen_coordinates.txt")
    ball = Path(folder, "ball_tracking.txt")
    targets = read_targets(screen) if screen.exists() else read_targets(ball, ball=True)

    usable = {}
    for line in Path(folder, "gaze_state.txt").read_text().splitlines():
        frame, state = line.split()
        frame = int(frame)
        if state == "OK" and frame in targets and frame % every == 0:
            usable[frame] = targets[frame]
    return camera_matrix(fx, fy, cx, cy), usable


def read_targets(path, ball=False):
    """{frame: (3,) mm}. The ball's were recorded by a camera that looks back from a metre away."""
    targets = {}
    for line in path.read_text().splitlines()[1:]:
        fields = line.split(";")
        target = np.array(fields[-3:], dtype=np.float64)
        if not target.any():                           # no target in this frame
            continue
        if ball:
            target = np.array([1, -1, -1]) * (target - [0, 0, 1])
        targets[int(fields[0])] = 1000 * target
    return targets


def main():
    command = configurator.command(("gazecapture", "eyediap"), __doc__)
    if len(sys.argv) != 4:
        raise ValueError(f"{command} takes where the set is and the folder to write to; -h shows an example")
    source, target = sys.argv[2:]
    if command == "gazecapture":
        print(f"{target}: {convert_gazecapture(source, target)} persons")
    else:
        for name, n_rows in convert_eyediap(source, target).items():
            print(f"{name}: {n_rows} faces")


if __name__ == "__main__":
    launch(main, FaceError)
