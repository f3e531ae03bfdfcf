"""
Faces in .h5 files: which sets and protocols there are, how files are read, and a check of what is there.

    python -m unigaze.data check data/faces cross_xgaze               # what is there of a protocol, and check.png

On disk: <root>/<folder of the set>/<subject>.h5, a folder may be a link. A file holds face_patch (n, S, S, 3) uint8,
face_gaze and face_head_pose (n, 2), and more that nothing here needs.

Signs, as published: a label is pitch and yaw in radians of MINUS the direction of sight in the normalised camera (x
right, y down, z away). So pitch > 0 looks up, and yaw > 0 looks to the LEFT of the picture. README.md has a picture.

Dimension key: n faces in a file, S side of a crop, B batch.
"""

if not __package__:
    raise SystemExit("run it from the root of the repository as a module: python -m unigaze.data check …")

import contextlib
import math
import os
import random
import sys
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

from lib import configurator, video_out
from lib.run import launch
from unigaze.normalise import arrow_on_crop, resize

COLUMNS = ("face_patch", "face_gaze", "face_head_pose")
XGAZE_CAMERAS = 18    # consecutive rows of an XGaze file that are one frame
MAX_OPEN = 128        # files kept open per worker; 1,179 subjects of GazeCapture would meet the system's limit
MAX_SIDE = 4096       # pixels of a crop; a larger one is a damaged header
MAX_FAILURES = 100    # so many unreadable faces in a row mean a broken disk or mount, not a few bad sectors


class FaceError(Exception):
    """A file that cannot be used as a subject's faces. The message names the file and what is wrong with it."""


# ----------------------------------------------------------------------------------------------------------------------
# sets and protocols. FORK: a set of your own is one line in SETS, a comparison of your own one line in PROTOCOLS

@dataclass(frozen=True)
class Split:
    folder: str                     # under the root
    subjects: tuple | None = None   # names of the files without .h5; None: all in the folder
    count: int | None = None        # subjects the published list has, where the folder decides
    color: str = "bgr"              # order on disk; GazeCapture has rgb
    views: int | None = None        # XGaze: so many random cameras of the 18 of each frame
    frames: tuple | None = None     # XGaze: [first, last) frame of each subject
    every: int = 1                  # rows 0, every, 2 every ... of each file
    share: float = 1.0              # random share of each file's rows


def numbered(pattern, numbers):
    return tuple(pattern.format(i) for i in numbers)


# the 80 subjects of XGaze with public labels; the published split cuts them at 82
XGAZE = (0, 3, 4, 5, 6, 7, 8, 9, 10, 13, 14, 15, 16, 18, 19, 21, 24, 26, 27, 28, 29, 30, 31, 32, 33, 35, 36, 38, 39,
         40, 41, 43, 44, 45, 46, 48, 50, 51, 52, 55, 56, 57, 58, 59, 60, 61, 62, 63, 65, 66, 67, 69, 72, 73, 75, 76,
         78, 79, 80, 81, 83, 84, 85, 88, 90, 92, 95, 98, 99, 100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 111)
XGAZE_60 = numbered("subject{:04d}", XGAZE[:60])
XGAZE_20 = numbered("subject{:04d}", XGAZE[60:])
EYEDIAP_CS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 14, 15, 16)   # nobody recorded persons 12 and 13 with a screen

SETS = {
    "xgaze_0_80sub": Split("xgaze_v2_224", XGAZE_60 + XGAZE_20, frames=(0, 1000)),
    "xgaze_0_60sub": Split("xgaze_v2_224", XGAZE_60, frames=(0, 1000)),
    "xgaze_60_80sub": Split("xgaze_v2_224", XGAZE_20, frames=(0, 1000)),
    "xgaze_0_80sub_d3": Split("xgaze_v2_224", XGAZE_60 + XGAZE_20, frames=(0, 1000), views=3),
    "xgaze_0_60sub_d3": Split("xgaze_v2_224", XGAZE_60, frames=(0, 1000), views=3),
    "xgaze_60_80sub_d3": Split("xgaze_v2_224", XGAZE_20, frames=(0, 1000), views=3),
    "mpiigaze": Split("mpii", numbered("p{:02d}", range(15))),
    "mpiigaze_train": Split("mpii", numbered("p{:02d}", range(10))),
    "mpiigaze_test": Split("mpii", numbered("p{:02d}", range(10, 15))),
    "eyediap_cs": Split("eyediap_cs", numbered("person_{}", EYEDIAP_CS)),
    "eyediap_cs_train": Split("eyediap_cs", numbered("person_{}", EYEDIAP_CS[:8])),
    "eyediap_cs_test": Split("eyediap_cs", numbered("person_{}", EYEDIAP_CS[8:])),
    "eyediap_ft": Split("eyediap_ft", numbered("person_{}", range(1, 17))),
    "eyediap_ft_train": Split("eyediap_ft", numbered("person_{}", range(1, 9))),
    "eyediap_ft_test": Split("eyediap_ft", numbered("person_{}", range(9, 17))),
    "gaze360_train": Split("gaze360_224_train", count=230),
    "gaze360_test": Split("gaze360_224_test", count=52),
    "gazecapture_train": Split("gazecapture_train_224", count=1179, color="rgb"),
    "gazecapture_test": Split("gazecapture_test", count=139, color="rgb"),
    "gazecapture_train_ds15": Split("gazecapture_train_224", count=1179, color="rgb", every=15),
    "gazecapture_test_ds15": Split("gazecapture_test", count=139, color="rgb", every=15),
    # faces without labels, for pre-training
    "vggface2": Split("vggface2_224", share=0.2),
    "vfhq": Split("vfhq_224"),
    "celebv": Split("celebv_224", every=3),
    "sfhq_t2i": Split("sfhq_t2i_224"),
    "facesyn": Split("facesyn_224"),
    "ffhq_albedo_nv": Split("ffhq_albedo_nv_256"),
    "xgaze_mvs_dense": Split("xgaze_mvs_dense_224", count=60),
    # make_data.py
    "toy_xgaze_train": Split("toy_xgaze", numbered("subject{:04d}", range(18))),
    "toy_xgaze_test": Split("toy_xgaze", numbered("subject{:04d}", range(18, 24))),
    "toy_mpii_train": Split("toy_mpii", numbered("p{:02d}", range(8))),
    "toy_mpii_test": Split("toy_mpii", numbered("p{:02d}", range(8, 16))),
}

EYEDIAP = ("eyediap_cs", "eyediap_ft")
HALVES = ("mpiigaze_test", "eyediap_cs_test", "eyediap_ft_test")
PRETRAINING = ("vggface2", "vfhq", "celebv", "sfhq_t2i", "facesyn", "ffhq_albedo_nv", "xgaze_mvs_dense")

PROTOCOLS = {
    # train on one set, test on all others; which part of XGaze the other four test on is our choice
    "cross_xgaze": {
        "train": ("xgaze_0_80sub_d3",),
        "val": HALVES,
        "test": ("gazecapture_test", "gaze360_test", "mpiigaze", *EYEDIAP),
    },
    "cross_gazecapture": {
        "train": ("gazecapture_train_ds15", "gazecapture_test_ds15"),
        "val": HALVES,
        "test": ("xgaze_60_80sub_d3", "gaze360_test", "mpiigaze", *EYEDIAP),
    },
    "cross_mpii": {
        "train": ("mpiigaze",),
        "val": ("eyediap_cs_test", "eyediap_ft_test"),
        "test": ("xgaze_60_80sub_d3", "gazecapture_test", "gaze360_test", *EYEDIAP),
    },
    "cross_eyediap": {
        "train": EYEDIAP,
        "val": ("mpiigaze_test",),
        "test": ("xgaze_60_80sub_d3", "gazecapture_test", "gaze360_test", "mpiigaze"),
    },
    "cross_gaze360": {
        "train": ("gaze360_train", "gaze360_test"),
        "val": HALVES,
        "test": ("xgaze_60_80sub_d3", "gazecapture_test", "mpiigaze", *EYEDIAP),
    },

    # train on all, test on what none has seen
    "joint": {
        "train": ("xgaze_0_60sub_d3", "gazecapture_train_ds15", "mpiigaze_train", "eyediap_cs_train",
                  "eyediap_ft_train", "gaze360_train"),
        "val": ("eyediap_cs_test", "eyediap_ft_test", "gaze360_test", "mpiigaze_test"),
        "test": ("xgaze_60_80sub", "gazecapture_test"),
    },

    # within one set; older than the paper
    "within_xgaze": {
        "train": ("xgaze_0_60sub_d3",),
        "val": ("xgaze_60_80sub_d3",),
        "test": ("xgaze_60_80sub",),
    },
    "within_mpii": {
        "train": ("mpiigaze_train",),
        "val": ("mpiigaze_test",),
        "test": ("mpiigaze_test",),
    },
    "within_gazecapture": {
        "train": ("gazecapture_train_ds15",),
        "val": ("gazecapture_test_ds15",),
        "test": ("gazecapture_test",),
    },
    "within_gaze360": {
        "train": ("gaze360_train",),
        "val": ("gaze360_test",),
        "test": ("gaze360_test",),
    },
    "within_eyediap": {
        "train": ("eyediap_cs_train", "eyediap_ft_train"),
        "val": ("eyediap_cs_test", "eyediap_ft_test"),
        "test": ("eyediap_cs_test", "eyediap_ft_test"),
    },

    # pre-training without labels, and the toy
    "mae": {"train": PRETRAINING, "val": (), "test": ()},
    "toy": {"train": ("toy_xgaze_train",), "val": ("toy_xgaze_test",), "test": ("toy_mpii_test",)},
    "toy_mae": {"train": ("toy_xgaze_train", "toy_mpii_train"), "val": (), "test": ()},
}


def protocol(name):
    """{"train": names, "val": names, "test": names} of the sets in SETS that a protocol uses."""
    if name not in PROTOCOLS:
        raise ValueError(f"protocol={name}: there is none of that name, only {', '.join(PROTOCOLS)}")
    if not PROTOCOLS[name]["train"]:
        raise ValueError(f"protocol={name} has no set to train on: name one in PROTOCOLS of unigaze/data.py")
    return PROTOCOLS[name]


def open_set(root, name, size=224, labelled=True, head_limit=None):
    """The set `name` of SETS as Faces, from its folder under `root`."""
    if name not in SETS:
        raise ValueError(f"there is no set {name!r}, only {', '.join(SETS)}")
    return Faces(Path(root, SETS[name].folder), SETS[name], name, size, labelled, head_limit=head_limit)


def open_sets(root, names, size=224, labelled=True, head_limit=None):
    """Several sets as one, one after the other; every face counts the same, as published."""
    if not names:
        raise ValueError("no set to read: the protocol names none")
    return Concat([open_set(root, name, size, labelled, head_limit) for name in names])


# ----------------------------------------------------------------------------------------------------------------------
# reading

def list_subjects(folder, split, name):
    """Paths of the split's files. FileNotFoundError names what is missing."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: the set {name} is a folder of .h5 files there (or a link)")
    there = [path.stem for path in sorted(folder.glob("*.h5")) if not path.name.startswith(".")]
    if not there:
        raise FileNotFoundError(f"{folder}: there is no .h5 file for the set {name}")
    subjects = there if split.subjects is None else split.subjects
    missing = [f"{subject}.h5" for subject in subjects if subject not in there]
    if missing:
        raise FileNotFoundError(f"{folder}: {len(missing)} of the {len(subjects)} subjects of {name} are missing: "
                                f"{', '.join(missing[:5])}")
    if split.count and len(subjects) != split.count:
        warnings.warn(f"{folder}: {len(subjects)} subjects, the published {name} has {split.count}", stacklevel=4)
    return [folder / f"{subject}.h5" for subject in subjects]


@contextlib.contextmanager
def damage_named(path):
    """What h5py makes of damaged bytes becomes a FaceError that names the file."""
    try:
        yield
    except (OSError, KeyError, RuntimeError, TypeError, ValueError, MemoryError) as error:
        raise FaceError(f"{path}: cannot be read as HDF5, perhaps it was cut off ({error})") from error


def open_file(path):
    with damage_named(path):
        return h5py.File(path, "r", locking=False)   # read only; network disks often know no locks


def inspect_file(path, labelled):
    """Number of faces in a file. FaceError if it holds none, or what no reader could use."""
    with damage_named(path), open_file(path) as file:
        if "face_patch" not in file:
            is_grouped = any(isinstance(value, h5py.Group) for value in file.values())
            hint = "groups of persons: convert it, python -m unigaze.convert gazecapture"
            raise FaceError(f"{path}: has no face_patch, only {hint if is_grouped else ', '.join(file) or 'nothing'}")
        if labelled and "face_gaze" not in file:
            raise FaceError(f"{path}: has no face_gaze, so there is nothing to train or test on")
        for name in COLUMNS:
            if name in file:
                check_column(file[name], path)

        patch = file["face_patch"]
        is_square = patch.ndim == 4 and 0 < patch.shape[1] == patch.shape[2] <= MAX_SIDE and patch.shape[3] == 3
        if not is_square or patch.dtype != np.uint8:
            raise FaceError(f"{path}: face_patch is {patch.dtype} of shape {patch.shape}, not uint8 (n, S, S, 3)")
        n = len(patch)
        for name in ("face_gaze", "face_head_pose"):
            column = file.get(name)
            if column is not None and (column.shape != (n, 2) or column.dtype.kind != "f"):
                raise FaceError(f"{path}: {name} has shape {column.shape} of {column.dtype}, not floats ({n}, 2) as "
                                "face_patch")

        # a sample of the labels: all of XGaze's would take minutes
        if labelled and n:
            rows = np.linspace(0, n - 1, 32).astype(int)
            check_angles(file["face_gaze"][np.unique(rows)], path)
        return n


def check_column(column, path):
    """FaceError unless it is a data set that was written to the end: HDF5 reads what was not as zeros."""
    if not isinstance(column, h5py.Dataset):
        raise FaceError(f"{path}: {column.name} is no data set")
    if column.chunks:
        n_chunks = 1
        for length, chunk in zip(column.shape, column.chunks, strict=True):
            n_chunks *= math.ceil(length / chunk)
        n_written = column.id.get_num_chunks()
    else:
        n_chunks = min(column.size, 1)
        n_written = min(column.id.get_storage_size(), 1)
    if n_written < n_chunks:
        raise FaceError(f"{path}: of the {n_chunks} chunks of {column.name} only {n_written} were written")


def check_angles(gaze, path):
    """FaceError unless all of (..., 2) are pitch and yaw in radians."""
    if not np.isfinite(gaze).all():
        raise FaceError(f"{path}: face_gaze holds values that are not finite")
    pitch, yaw = np.abs(gaze).reshape(-1, 2).max(axis=0)
    if pitch > math.pi / 2 + 1e-3 or yaw > math.pi + 1e-3:
        raise FaceError(f"{path}: face_gaze reaches {pitch:.2f}, {yaw:.2f}, beyond pitch (1.57) and yaw (3.14) in "
                        "radians: are these degrees, or yaw before pitch?")


class Faces(torch.utils.data.Dataset):
    """Faces of one set. An item: {"image": (3, size, size) uint8 RGB; "gaze", "head": (2,) float32 pitch and yaw in
    radians, NaN where the file has none (the published readers: 0); "key": "<set>/<subject>/<row>"; "set"; "path";
    "subject": number of the file; "row" in the file; "index" as it was asked for; "unreadable": files passed over}.

    folder: of the .h5 files. split: which of them, and how they are stored. size: of the images, None: as stored.
    labelled: raise FaceError, here and not after hours, where a file has no gaze. Files are opened when a worker first
    reads them. Which faces are drawn (views, share) depends on `seed` only; the published draw is that of 0, whatever
    the seed of the training. head_limit: leave out heads turned by so many degrees or more. item index + epoch ·
    len(self) is the same face: what a trainer draws for it (a crop, a flip) can depend on "index" alone, so that a
    resumed run equals an uninterrupted one. An unreadable face is replaced by the first of the next file, with a
    warning: never silently, never fatally.
    """

    def __init__(self, folder, split=None, name="faces", size=224, labelled=True, seed=0, head_limit=None):
        self.split = split or Split(str(folder))
        self.name = name
        self.size = size
        self.labelled = labelled
        self.paths = list_subjects(Path(folder), self.split, name)

        # of every face the file it is in, and its row there
        generator = random.Random(seed)
        files = []
        rows = []
        for number, path in enumerate(self.paths):
            chosen = choose_rows(inspect_file(path, labelled), self.split, generator)
            if head_limit is not None:
                chosen = facing_rows(path, chosen, head_limit)
            files.append(np.full(len(chosen), number))
            rows.append(chosen)
        self.files = np.concatenate(files)
        self.rows = np.concatenate(rows)
        if not len(self.rows):
            raise FaceError(f"{folder}: the {len(self.paths)} files of {name} hold no faces to use")

        self.open = OrderedDict()                            # number of a file -> its columns
        self.process = os.getpid()
        self.warned = set()

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return (self[i] for i in range(len(self)))           # no index is out of range, so Python would not stop

    def __getstate__(self):
        return self.__dict__ | {"open": OrderedDict()}       # an open file cannot travel to another process

    def columns(self, number):
        """The data sets of file `number`, open."""
        if self.process != os.getpid():                      # a forked worker: what its parent opened is not its own
            self.open = OrderedDict()
            self.process = os.getpid()
        if number not in self.open:
            if len(self.open) >= MAX_OPEN:
                _, oldest = self.open.popitem(last=False)
                oldest["face_patch"].file.close()
            file = open_file(self.paths[number])
            self.open[number] = {name: file[name] for name in COLUMNS if name in file}
        self.open.move_to_end(number)
        return self.open[number]

    def read(self, number, row):
        """Image (size, size, 3) RGB, gaze (2,) and head pose (2,) of one row of file `number`."""
        path = self.paths[number]
        angles = {"face_gaze": np.full(2, np.nan), "face_head_pose": np.full(2, np.nan)}
        with damage_named(f"{path}: face {row}"):
            columns = self.columns(number)
            image = columns["face_patch"][row]
            for name in angles:
                if name in columns:
                    angles[name] = columns[name][row].astype(np.float32)

        if self.labelled:
            check_angles(angles["face_gaze"], path)
        if self.split.color == "bgr":
            image = image[..., ::-1]
        return resize(image, self.size), angles["face_gaze"], angles["face_head_pose"]

    def __getitem__(self, index):
        i = index % len(self)
        unreadable = []
        for _ in range(min(MAX_FAILURES, len(self))):
            number = int(self.files[i])
            row = int(self.rows[i])
            path = self.paths[number]
            try:
                image, gaze, head = self.read(number, row)
                break
            except FaceError as error:
                unreadable.append(str(path))
                if path not in self.warned:
                    self.warned.add(path)
                    warnings.warn(f"skipped, a face of the next file is used instead: {error}", stacklevel=2)
                i = np.searchsorted(self.files, number, side="right") % len(self)
        else:
            raise FaceError(f"{len(unreadable)} faces in a row are unreadable, first in {unreadable[0]}")

        image = np.ascontiguousarray(image.transpose(2, 0, 1))
        return {
            "image": torch.from_numpy(image),
            "gaze": torch.as_tensor(gaze, dtype=torch.float32),
            "head": torch.as_tensor(head, dtype=torch.float32),
            "key": f"{self.name}/{path.stem}/{row}",
            "set": self.name,
            "path": str(path),
            "subject": number,
            "row": row,
            "index": index,
            "unreadable": unreadable,
        }


class Concat(torch.utils.data.Dataset):
    """Several Faces one after the other. Index i + epoch · len(self) is face i, as in Faces."""

    def __init__(self, sets):
        self.sets = list(sets)
        self.starts = np.cumsum([0] + [len(faces) for faces in self.sets])

    def __len__(self):
        return int(self.starts[-1])

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index):
        i = index % len(self)
        k = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.sets[k][int(i - self.starts[k])] | {"index": index}


def choose_rows(n, split, generator):
    """Rows of a file with n faces that a split uses, ascending."""
    first, last = split.frames or (0, n)
    if split.views:
        # published: random cameras of each frame, an unfinished last frame left out
        rows = []
        for t in range(first, min(last, n // XGAZE_CAMERAS)):
            cameras = generator.sample(range(XGAZE_CAMERAS), split.views)
            rows += [XGAZE_CAMERAS * t + camera for camera in sorted(cameras)]
    elif split.frames:
        rows = range(XGAZE_CAMERAS * first, min(n, XGAZE_CAMERAS * last))
    else:
        rows = range(n)
    if split.share < 1:
        rows = sorted(generator.sample(rows, round(split.share * len(rows))))
    return np.array(rows, dtype=np.int64)[::split.every]


def facing_rows(path, rows, head_limit):
    """Those rows of a file whose head is turned by less than head_limit degrees, pitch and yaw together (published)."""
    with damage_named(path), open_file(path) as file:
        if "face_head_pose" not in file:
            raise FaceError(f"{path}: has no face_head_pose, which limit_head_pose needs")
        head = file["face_head_pose"][:][rows]
    turned = np.linalg.norm(head, axis=1)
    return rows[turned < np.radians(head_limit)]


def collate(items):
    """Items of Faces -> one batch: image (B, 3, S, S) uint8, gaze and head (B, 2) float32, subject, row, index (B,)
    int64, lists of key, set and path; unreadable files of all items in one list."""
    batch = {name: [item[name] for item in items] for name in items[0]}
    for name in ("image", "gaze", "head"):
        batch[name] = torch.stack(batch[name])
    for name in ("subject", "row", "index"):
        batch[name] = torch.tensor(batch[name])
    batch["unreadable"] = [path for paths in batch["unreadable"] for path in paths]
    return batch


# ----------------------------------------------------------------------------------------------------------------------
# check: what is there, and is it what it should be

def check(root, names, picture="check.png"):
    """Print what there is of the sets `names` under `root`, write the first face of each with its arrow to
    `picture`, and return the list of complaints."""
    complaints = []
    titles = []
    faces = []
    print(f"{'set':24} {'subjects':>8} {'faces':>9} {'pixels':>6}   gaze: pitch, yaw in degrees (mean ± std)")
    for name in names:
        labelled = name not in PRETRAINING
        try:
            found = open_set(root, name, None, labelled)
            rows = np.linspace(0, len(found) - 1, 256).astype(int)
            batch = collate([found[int(i)] for i in np.unique(rows)])
        except (FaceError, OSError) as error:
            print(f"{name:24} {error}")
            complaints.append(f"{name}: {error}")
            continue

        # what it holds, in a line
        gaze = np.degrees(batch["gaze"].numpy())
        pitch, yaw = gaze.mean(axis=0)
        pitch_std, yaw_std = gaze.std(axis=0)
        spread = f"{pitch:.1f} ± {pitch_std:.1f}, {yaw:.1f} ± {yaw_std:.1f}" if labelled else "no labels"
        side = batch["image"].shape[-1]
        print(f"{name:24} {len(found.paths):8} {len(found):9} {side:6}   {spread}")

        # what seems wrong with it
        for text in find_mistakes(batch, labelled):
            print(f"{'':24} {text}")
            complaints.append(f"{name}: {text}")

        # its first face
        image = batch["image"][0].permute(1, 2, 0).numpy()
        image = video_out.resize(image, 224, 224)
        title = name
        if labelled:
            tip = arrow_on_crop(np.radians(gaze[0]), 224)
            image = video_out.draw_arrow(image, (112, 112), 112 + tip)
            title = f"{name}: {gaze[0, 0]:.0f}, {gaze[0, 1]:.0f}"
        faces.append(image)
        titles.append(title)

    if faces:
        video_out.contact_sheet(picture, {"first face": faces}, titles, cell=224)
        print(f"{picture}: the first face of each set with its label; the arrow must lead to where the eyes look")
    return complaints


def find_mistakes(batch, labelled):
    """Complaints about a sample of a set: colours swapped, pictures or labels mirrored."""
    complaints = []
    images = batch["image"].numpy().astype(np.float64)                         # (n, 3, S, S)
    S = images.shape[-1]
    rows = slice(S // 3, 2 * S // 3)
    columns = slice(S // 4, 3 * S // 4)
    middle = images[:, :, rows, columns]
    red, _, blue = middle.mean(axis=(0, 2, 3))
    if blue > red + 3:
        complaints.append(f"skin is more blue ({blue:.0f}) than red ({red:.0f}): is the order on disk the other one? "
                          "(color of this set in SETS)")
    if not labelled:
        return complaints

    yaw = batch["gaze"][:, 1].numpy()
    head = batch["head"][:, 1].numpy()
    if np.isnan(head).any():
        return complaints
    together = correlation(yaw, head)
    if together < -0.3:
        complaints.append(f"yaw of gaze and of head have opposite signs (correlation {together:.2f}): one is mirrored")

    # heads that face the camera: their irises must lie where the eyes are turned to
    is_frontal = np.abs(head) < 0.35
    offset = iris_offset(images[is_frontal].mean(axis=1))
    turned = correlation((yaw - head)[is_frontal], offset)
    if turned > 0.25:
        complaints.append(f"eyes look to the other side than their labels (correlation {turned:.2f}): pictures or yaw "
                          "are mirrored; positive yaw is to the left of the picture")
    return complaints


def correlation(a, b):
    """0 where there are too few values, or none that differ."""
    if len(a) < 16 or a.std() < 1e-6 or b.std() < 1e-6:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def iris_offset(grey):
    """(n, S, S) normalised crops -> (n,) how far left or right (-1..1) the dark part of the eyes lies. Normalisation
    puts the eyes of everyone to the same place."""
    S = grey.shape[-1]
    total = 0
    for left, right in ((0.19, 0.38), (0.62, 0.81)):
        rows = slice(round(0.30 * S), round(0.45 * S))
        columns = slice(round(left * S), round(right * S))
        eye = grey[:, rows, columns]
        middle_grey = np.median(eye, axis=(1, 2), keepdims=True)
        dark = (middle_grey - eye).clip(0)
        x = np.linspace(-1, 1, eye.shape[2])
        moment = (dark * x).sum(axis=(1, 2))
        total = total + moment / (dark.sum(axis=(1, 2)) + 1e-9)
    return total / 2


def main():
    configurator.command(["check"], __doc__)
    if len(sys.argv) != 4:
        raise ValueError("check takes the folder of the sets and a protocol; -h shows an example")
    names = protocol(sys.argv[3].removeprefix("protocol="))
    complaints = check(sys.argv[2], dict.fromkeys(names["train"] + names["val"] + names["test"]))
    raise SystemExit(f"{len(complaints)} complaints" if complaints else 0)


if __name__ == "__main__":
    launch(main, FaceError)
