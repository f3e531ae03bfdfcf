"""The files of EGTEA Gaze+, Ego4D and EgoExo4D, as their owners and the published code distribute them.

Every set becomes the same: list_clips gives the clips of a split, read_gaze the table of a video, (n, 3): a row per
frame with x, y in [0, 1] and a type. Frame numbers count from the start of the whole video everywhere, also for clips
that were cut out of it. The README says where each file comes from; errors name the file and the line.

Dimension key: n frames of a video, T frames of an item.
"""
import functools
import re
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.text import read_csv, read_json, whole_number

NAMES = {"egtea": "EGTEA Gaze+", "ego4d": "Ego4D", "egoexo4d": "EgoExo4D"}
UNTRACKED = {"egtea": 0, "ego4d": 3, "egoexo4d": 0}  # the type of frames without a gaze point
FIXATION = {"egtea": 1, "ego4d": 0, "egoexo4d": 1}   # the type that metrics count (EgoExo4D: visible)
SPLITS = {"egtea": "train,test", "ego4d": "train,test",
          "egoexo4d": "train,val,test_iid,test_ood_site,test_ood_task,test_ood_participant"}

MOST_FRAMES = 10_000_000   # of a video: four days at 30 per second
EGTEA_FPS = 24
EGTEA_SIZE = (1280, 960)   # pixels
EGTEA_EVENTS = {"Fixation": 1, "Saccade": 2}  # all others: 3
EGO4D_FPS = 30
EGO4D_SIZE = (1088, 1080)  # pixels that the published saccade threshold is meant for
EGO4D_CLIP = 5             # seconds
SACCADE = 40               # pixels from one frame to the next
EGOEXO4D_FPS = 8           # frames per second that are used
NANOSECONDS = {"ns": 1, "us": 1e3, "ms": 1e6}  # by the suffix of a column; all others are seconds
EGOEXO4D_SIDE = 1404       # pixels; the published code divides by it, though the videos have 1408

# What the published evaluation and preprocessing leave out.
ODD_CLIP = "OP03-R01-PastaSalad-879780-892210-F021084-F021444.mp4"
ODD_VIDEOS = ("4e07da0c", "5819e52c", "83081c5a", "a77682da")

LISTS = "in data/ of github.com/BolinLai/GLC"


@dataclass
class Clip:
    """A stretch of a video to sample from."""
    video: str     # whose table it reads
    name: str      # of the clip within the video
    path: Path     # mp4 file, or folder of pictures called by frame numbers
    offset: int    # frame of the video that the file begins with
    windows: list  # [(first frame, frame after the last)], places to sample from
    stride: int    # frames from one sampled frame to the next

    @property
    def key(self):
        return f"{self.video}/{self.name}"


def detect(root):
    """Which set lies in the folder, by what is in it."""
    # in this order: gaze_data lies in two of them, and `labels` writes gaze_frame_label for all
    marks = {"egoexo4d": ("takes.json", "captures", "split_assignments.csv"),
             "egtea": ("cropped_clips", "gaze_data"),
             "ego4d": ("clips.gaze", "full_scale.gaze", "gaze_frame_label")}
    if not Path(root).is_dir():
        raise FileNotFoundError(f"root={root} is no folder")
    for dataset, names in marks.items():
        if any(Path(root, name).exists() for name in names):
            return dataset
    holds = "; ".join(f"{NAMES[dataset]}: {' or '.join(names)}" for dataset, names in marks.items())
    raise FileNotFoundError(f"{root} looks like none of the three sets. They hold {holds}")


def list_clips(dataset, root, split, frames="", n_frames=8, stride=8):
    """[Clip] of a split, one of SPLITS ("test" of EgoExo4D: "test_iid").

    frames: a folder of pictures to be read in place of the videos, as `python -m argaze.data frames` makes it.
    EgoExo4D is used at 8 frames per second, whatever the stride.
    """
    root = Path(root)
    if dataset == "egtea":
        clips = egtea_clips(root, split, stride)
    elif dataset == "ego4d":
        clips = ego4d_clips(root, split, stride)
    else:
        clips = egoexo4d_clips(root, split, n_frames)
    if not clips:
        raise ValueError(f"{root}: the split {split!r} has no clip of {n_frames} frames")

    if frames:
        for clip in clips:
            clip.path = picture_folder(dataset, frames, clip, root)
            clip.offset = 0
    return clips


def picture_folder(dataset, frames, clip, root):
    """Where the pictures of a clip's video lie."""
    if dataset == "egoexo4d":
        return Path(frames) / clip.path.relative_to(root / "takes").with_suffix("")
    return Path(frames) / clip.video


def read_gaze(dataset, root, clip):
    """Table (n, 3) of the clip's video: x, y in [0, 1], type."""
    root = Path(root)
    if dataset == "egtea":
        return egtea_gaze(root, clip.video)
    if dataset == "ego4d":
        return ego4d_gaze(root, clip.video)
    return egoexo4d_gaze(root, clip.video, camera_of(clip.path))


# ----------------------------------------------------------------------------------------------------------------------
# csv files


def read_rows(path, hint):
    """Yield (line number, fields) of a csv file without its empty lines. hint: where the file comes from."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {hint}")
    yield from read_csv(path)


def read_table(path, columns, hint):
    """Like read_rows for a file whose first line names its columns: yields (line number, {column: field})."""
    rows = read_rows(path, hint)
    _, header = next(rows, (1, []))
    missing = [column for column in columns if column not in header]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; its first line is {','.join(header)!r}, "
                         f"expected {','.join(columns)}")

    for line, fields in rows:
        if len(fields) != len(header):
            raise ValueError(f"{path}, line {line}: {len(fields)} fields, the header has {len(header)}")
        yield line, dict(zip(header, fields, strict=True))


def to_number(text, path, line):
    """Float of a field. ValueError names file and line where it is none, or NaN."""
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise ValueError(f"{path}, line {line}: {text!r} is not a number")
    return value


def to_frame(text, path, line):
    """The same for the number of a frame: whole, from 0 on, and of no video that lasts for days."""
    number = to_number(text, path, line)
    if number != int(number) or not 0 <= number < MOST_FRAMES:
        raise ValueError(f"{path}, line {line}: {text!r} is no frame number, a whole number below {MOST_FRAMES:,}")
    return int(number)


def to_number_or_nan(text, path, line):
    """The same, NaN where the field is empty or says so: this sample was not tracked."""
    if text.lower() in ("", "nan"):
        return np.nan
    return to_number(text, path, line)


# ----------------------------------------------------------------------------------------------------------------------
# EGTEA Gaze+


def egtea_clips(root, split, stride=8):
    path = root / f"{split}_gaze_official.csv"
    clips = []
    for line, fields in read_rows(path, f"one clip a line, video/clip.mp4; {LISTS}"):
        video, _, name = fields[0].partition("/")
        found = re.search(r"-F(\d+)-F(\d+)\.mp4$", name)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"{path}, line {line}: {fields[0]!r} is no clip like video/name-F000001-F000021.mp4")
        if name == ODD_CLIP:
            continue

        first = int(found[1]) - 1
        end = int(found[2])
        file = root / "cropped_clips" / video / name
        clips.append(Clip(video, name, file, first, [(first, end)], stride))
    return clips


def egtea_gaze(root, video):
    """Table (n, 3) of a BeGaze export, either version. Types: 0 no sample, 1 fixation, 2 saccade, 3 other.

    Where a frame has several samples, each moves the point half way towards it and the last event counts. A point
    outside of the picture moves to the border and keeps its type, as in the published evaluation.
    """
    path = root / "gaze_data" / f"{video}.txt"
    if not path.is_file():
        path = root / "gaze_data" / f"{video}-GazeData.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{root / 'gaze_data' / video}.txt is missing (or {path.name}): gaze_data of EGTEA")

    # 34 lines of header; where it counts the samples tells the version
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    header = lines[:34]
    titles = [number for number, text in enumerate(header) if "## Number of Samples:" in text]
    if titles not in ([9], [10]):
        raise ValueError(f"{path} is no BeGaze export: '## Number of Samples:' must stand in its line 10 or 11")
    n_fields = 7 if titles == [9] else 26
    x_field = 3 if titles == [9] else 5

    gaze = {}
    for line, text in enumerate(lines[34:], 35):
        fields = text.split("\t")
        if not text.strip() or fields[1:2] == ["MSG"]:
            continue
        if len(fields) != n_fields:
            raise ValueError(f"{path}, line {line}: {len(fields)} fields between tabs, expected {n_fields}")
        frame = egtea_frame(fields[-2], path, line)
        x = to_number(fields[x_field], path, line)
        y = to_number(fields[x_field + 1], path, line)
        event = fields[-1].strip()

        if frame in gaze:
            before_x, before_y, _ = gaze[frame]
            x = (x + before_x) / 2
            y = (y + before_y) / 2
        gaze[frame] = (x, y, EGTEA_EVENTS.get(event, 3))
    if not gaze:
        raise ValueError(f"{path} holds no gaze sample below its 34 lines of header")

    # frames without a sample stay 0
    last = max(gaze)
    table = np.zeros((last + 1, 3))
    for frame, row in gaze.items():
        table[frame] = row
    width, height = EGTEA_SIZE
    table[:, 0] = table[:, 0].clip(0, width - 1) / width
    table[:, 1] = table[:, 1].clip(0, height - 1) / height
    return table.astype(np.float32)


def egtea_frame(text, path, line):
    """'1234', or 'hours:minutes:seconds:frame' -> frame number."""
    parts = [to_frame(part, path, line) for part in text.split(":")]
    if len(parts) != 4:
        return parts[0]
    hours, minutes, seconds, frame = parts
    number = ((hours * 60 + minutes) * 60 + seconds) * EGTEA_FPS + frame
    return to_frame(str(number), path, line)


# ----------------------------------------------------------------------------------------------------------------------
# Ego4D


def ego4d_clips(root, split, stride=8):
    """With <split>_ego4d_gaze_stride8.csv a clip has its windows, otherwise it is one window."""
    path = root / f"{split}_ego4d_gaze_stride8.csv"
    if not path.is_file():
        path = root / f"{split}_ego4d_gaze.csv"
    clips = {}
    for line, fields in read_rows(path, f"one clip a line, uid/uid_t0_t5.mp4; {LISTS}"):
        if fields[0] == "clip_path":
            continue
        found = re.fullmatch(r"([^/]+)/([^/]+_t(\d+)_t(\d+)\.mp4)", fields[0])
        if not found or len(fields) not in (1, 3):
            raise ValueError(f"{path}, line {line}: {','.join(fields)!r} is no clip like uid/uid_t0_t5.mp4, alone or "
                             "with the first frame of a window and the frame after its last")

        video, name = found[1], found[2]
        first = int(found[3]) * EGO4D_FPS
        end = int(found[4]) * EGO4D_FPS
        window = (first, end)
        if len(fields) == 3:
            window = (to_frame(fields[1], path, line), to_frame(fields[2], path, line))
        if not first <= window[0] < window[1] <= end:
            raise ValueError(f"{path}, line {line}: the window {window[0]}..{window[1]} is not part of the clip, which "
                             f"has the frames {first}..{end} of its video")

        file = root / "clips.gaze" / video / name
        clip = clips.setdefault(fields[0], Clip(video, name, file, first, [], stride))
        clip.windows.append(window)
    return list(clips.values())


def ego4d_gaze(root, video):
    """Table (n, 3) of a frame label file. Types: 0 fixation, 1 saccade, 2 outside (clipped), 3 untracked. A frame
    without a row is untracked."""
    path = root / "gaze_frame_label" / f"{video}_frame_label.csv"
    columns = ("frame", "x", "y", "gaze_type")
    rows = []
    for line, row in read_table(path, columns, "python -m argaze.data labels makes it from gaze/ and full_scale.gaze/"):
        frame = to_frame(row["frame"], path, line)
        x, y, kind = (to_number(row[column], path, line) for column in columns[1:])
        if kind not in (0, 1, 2, 3):
            raise ValueError(f"{path}, line {line}: gaze_type {row['gaze_type']!r} is none of 0, 1, 2, 3")
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise ValueError(f"{path}, line {line}: gaze ({row['x']}, {row['y']}) lies outside of the picture, 0 to 1")
        rows.append((frame, x, y, kind))
    if not rows:
        raise ValueError(f"{path} has no row below its header")

    rows = np.array(rows)
    numbers = rows[:, 0].astype(int)
    table = np.zeros((numbers.max() + 1, 3), np.float32)
    table[:, 2] = UNTRACKED["ego4d"]
    table[numbers] = rows[:, 1:]
    return table


def label_ego4d(path, n_frames):
    """Table (n_frames, 3) of a video, from its raw gaze file: every frame takes the nearest sample.

    The file's columns have no fixed names: the second is the time in seconds, the sixth and seventh are x and y from
    the bottom left corner.
    """
    samples = []
    for line, fields in read_rows(path, "gaze/<uid>.csv of `ego4d --datasets gaze`"):
        if line == 1:
            continue
        if len(fields) < 7:
            raise ValueError(f"{path}, line {line}: {len(fields)} columns, expected at least 7: the second is the time "
                             "in seconds, the sixth and seventh are x and y")
        time = to_number(fields[1], path, line)
        x = to_number_or_nan(fields[5], path, line)
        y = to_number_or_nan(fields[6], path, line)
        samples.append((time, x, 1 - y))
    if len(samples) < 3:
        raise ValueError(f"{path} holds {len(samples)} gaze samples, too few to label frames with")
    samples = np.array(samples)
    times = samples[:, 0]

    seconds = np.arange(n_frames) / EGO4D_FPS
    points = samples[nearest_samples(times, seconds, later_of_equal=True), 1:]
    inside = points.clip(0, 1)

    # a jump from the frame before is a saccade; outside wins over it
    ways = (points[1:] - inside[:-1]) * EGO4D_SIZE
    kind = np.zeros(n_frames)
    kind[1:] = np.linalg.norm(ways, axis=1) > SACCADE
    outside = (inside != points).any(axis=1)
    kind[outside] = 2

    # as published, tracking ends once the frame before has reached the last sample but one
    reached = np.searchsorted(times, seconds - 1 / EGO4D_FPS)
    ended = reached >= len(times) - 2
    ended[0] = False
    lost = np.isnan(points).any(axis=1)
    table = np.column_stack([inside, kind])
    table[ended | lost] = (0, 0, UNTRACKED["ego4d"])
    return table


def nearest_samples(times, moments, later_of_equal=False):
    """Index (m,) of the sample nearest to each of the moments (m,), in ascending times (n,)."""
    after = np.searchsorted(times, moments).clip(max=len(times) - 1)
    before = (after - 1).clip(min=0)
    gap_before = abs(times[before] - moments)
    gap_after = abs(times[after] - moments)
    if later_of_equal:
        return np.where(gap_before < gap_after, before, after)
    return np.where(gap_before <= gap_after, before, after)


def untracked_intervals(path):
    """{video: [(first second, last second)]} of ego4d_gaze_untracked.csv."""
    intervals = defaultdict(list)
    for line, fields in read_rows(path, f"uid,h:m:s,h:m:s,code a line; {LISTS}"):
        seconds = []
        for text in fields[1:3]:
            found = re.fullmatch(r"(\d+):(\d+):(\d+)", text)
            if not found:
                raise ValueError(f"{path}, line {line}: {','.join(fields)!r} is not uid,h:m:s,h:m:s,code")
            h, m, s = map(int, found.groups())
            seconds.append(h * 3600 + m * 60 + s)
        intervals[fields[0]].append(seconds)
    return intervals


def cut_ego4d(video, seconds, intervals):
    """Names of the five-second clips of a video that touch none of its untracked intervals [(first, last second)]."""
    names = []
    for start in range(0, int(seconds) - EGO4D_CLIP + 1, EGO4D_CLIP):
        end = start + EGO4D_CLIP
        if all(end < first or start > last for first, last in intervals):
            names.append(f"{video}_t{start}_t{end}.mp4")
    return names


# ----------------------------------------------------------------------------------------------------------------------
# EgoExo4D


def camera_of(path):
    """The wearer's camera, "aria01_214-1", from the path of its video or pictures."""
    found = re.search(r"aria\d+_214-1", str(path))
    if not found:
        raise ValueError(f"{path}: no video of the wearer's camera, called like aria01_214-1")
    return found[0]


@functools.lru_cache
def read_takes(root):
    """{take: (first row, row after the last)} of its frames in the capture's timesync.csv."""
    path = root / "takes.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: `egoexo --parts metadata` downloads it")
    rows = {}
    try:
        for take in read_json(path):
            if take.get("timesync_end_idx"):  # a few takes were never synchronised
                first = whole_number(take, "timesync_start_idx") + 1
                end = whole_number(take, "timesync_end_idx")
                rows[take["take_name"]] = (first, end)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: every take needs take_name, timesync_start_idx and timesync_end_idx ({error!r})"
                         ) from error
    return rows


@functools.lru_cache(64)
def capture_times(path, column):
    """[nanoseconds or None] of the rows of a timesync.csv."""
    rows = read_rows(path, "`egoexo --parts captures` downloads it")
    _, header = next(rows, (1, []))
    if column not in header:
        raise ValueError(f"{path} has no column {column}; its first line is {','.join(header)!r}")
    position = header.index(column)
    times = []
    for line, fields in rows:
        text = fields[position] if position < len(fields) else ""
        times.append(int(to_number(text, path, line)) if text else None)
    return times


def frame_times(root, take, camera):
    """(n,) nanoseconds of the take's frames. Rows without a time are no frames."""
    takes = read_takes(root)
    if take not in takes:
        raise ValueError(f"{root / 'takes.json'} has no times of the take {take!r}")
    capture = re.sub(r"_\d+$", "", take)
    path = root / "captures" / capture / "timesync.csv"
    times = capture_times(path, f"{camera}_capture_timestamp_ns")
    first, end = takes[take]
    times = [time for time in times[first:end] if time is not None]
    if len(times) < 2:
        raise ValueError(f"{path}: {camera} has {len(times)} times of {take}, in the rows {first}..{end}")
    return np.array(times)


def egoexo4d_clips(root, split, n_frames):
    """Windows of n_frames side by side, at 8 frames per second; a row of the list gives as many as fit."""
    path = root / "split_assignments.csv"
    columns = ("take_name", "video_path", "clip_start_time", "clip_end_time", "split")
    wanted = "TEST_IID" if split == "test" else split.upper()
    clips = []
    missing = {}
    splits = Counter()
    for line, row in read_table(path, columns, f"a csv file with the columns {','.join(columns)}"):
        splits[row["split"]] += 1
        if row["split"] != wanted:
            continue

        # lists hold the absolute paths of whoever made them
        file = root / "takes" / row["video_path"].rpartition("takes/")[2]
        try:
            times = frame_times(root, row["take_name"], camera_of(file))
        except FileNotFoundError as error:  # few users download all of it
            missing[row["take_name"]] = error
            continue
        fps = 1e9 / np.median(np.diff(times))
        start = round(to_number(row["clip_start_time"], path, line) * fps)
        end = round(to_number(row["clip_end_time"], path, line) * fps)
        start = min(max(start, 0), len(times) - 1)
        end = min(max(end, 0), len(times))

        stride = max(1, round(fps / EGOEXO4D_FPS))
        n_windows = len(range(start, end, stride)) // n_frames
        for i in range(n_windows):
            first = start + i * n_frames * stride
            window = (first, first + n_frames * stride)
            clips.append(Clip(row["take_name"], str(first), file, 0, [window], stride))

    if missing:
        warnings.warn(f"{path}: {len(missing)} takes are left out, first: {next(iter(missing.values()))}", stacklevel=4)
    if wanted not in splits:
        raise ValueError(f"{path} has no row of the split {wanted}; it has {', '.join(sorted(splits))}")
    return clips


def egoexo4d_gaze(root, take, camera):
    """Table (n, 3) of a take: the gaze sample nearest to each frame, type 1; type 0 where none lies within 1/16 s."""
    folder = root / "gaze_data" / "takes" / take / "eye_gaze"
    path = folder / "personalized_eye_gaze_2d.csv"
    if not path.is_file():
        path = folder / "general_eye_gaze_2d.csv"

    samples = []
    for line, row in read_table(path, ("x", "y"), "`egoexo --parts take_eye_gaze` downloads it"):
        column = next((name for name in row if "timestamp" in name), None)
        if column is None:
            raise ValueError(f"{path} has no column with a timestamp; its columns are {', '.join(row)}")
        suffix = column.rpartition("_")[2]
        time = to_number(row[column], path, line) * NANOSECONDS.get(suffix, 1e9)
        x = to_number_or_nan(row["x"], path, line)
        y = to_number_or_nan(row["y"], path, line)
        samples.append((time, x, y))
    if not samples:
        raise ValueError(f"{path} has no row below its header")
    samples.sort(key=lambda sample: sample[0])
    samples = np.array(samples)
    times = samples[:, 0].astype(np.int64)

    frames = frame_times(root, take, camera)
    nearest = nearest_samples(times, frames)
    near = abs(times[nearest] - frames) <= 0.5e9 / EGOEXO4D_FPS
    points = np.float32(samples[nearest, 1:]) / EGOEXO4D_SIDE
    seen = near & np.isfinite(points).all(axis=1)

    table = np.zeros((len(frames), 3), np.float32)
    table[seen, :2] = points[seen].clip(0, 1)
    table[seen, 2] = 1
    return table


def fill_gaps(rows):
    """Rows (T, 3) of a window: a frame without gaze takes the row of the nearest one with gaze, the earlier of two."""
    seen = np.flatnonzero(rows[:, 2] == 1)
    if len(seen) == 0:
        return rows
    nearest = []
    for t in range(len(rows)):
        closest = abs(seen - t).argmin()
        nearest.append(seen[closest])
    return rows[nearest]


# ----------------------------------------------------------------------------------------------------------------------
# sampling


def sample_frames(dataset, window, n_frames, stride, share=0.0):
    """(T,) frame numbers in a window (first, end). share in [0, 1): where in the room that is left; 0 to evaluate.

    EGTEA: spread evenly over T * stride frames, a shorter clip repeats its last frame; the others: every stride-th.
    """
    first, end = window
    length = n_frames * stride
    room = max(0, end - first - length)
    start = share * room
    if dataset == "egtea":
        places = np.linspace(start, start + length - 1, n_frames, dtype=np.float32)
    else:
        places = int(start) + stride * np.arange(n_frames)
    frames = first + places.astype(int)
    return frames.clip(max=end - 1)
