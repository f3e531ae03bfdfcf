"""ARGaze's data: the three sets' own files (tests/golden/argaze_data, invented values), sampling, maps, bad input."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from argaze import data, formats, make_data
from data import VideoError
from lib.video_out import VideoWriter

GOLDEN = Path(__file__).parent / "golden" / "argaze_data"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
NUMBERS = json.loads((GOLDEN.parent / "argaze_tiny" / "numbers.json").read_text())
EGO4D = "aaaaaaaa-0000-4000-8000-000000000001"


@pytest.fixture(scope="session")
def gaze_toy(tmp_path_factory):
    """12 + 6 generated clips."""
    root = tmp_path_factory.mktemp("argaze") / "toy"
    make_data.make(make_data.Config(out=str(root), n_train=12, n_val=6, n_frames=8, size=64, n_workers=1))
    return root


@pytest.fixture
def broken(tmp_path):
    """A copy of the small files that a test may spoil."""
    shutil.copytree(GOLDEN, tmp_path / "sets")
    return tmp_path / "sets"


# ---- what the published readers make of the files

@pytest.mark.parametrize("video", ["OP99-R01-Toast", "P98-R02-Soup"])
def test_both_begaze_exports_are_read_as_published(video):
    expected = EXPECTED["egtea"][video]
    table = formats.egtea_gaze(GOLDEN / "egtea", video)
    want = np.zeros((expected["n_rows"], 3), np.float32)
    for row, values in expected["rows"].items():
        want[int(row)] = values
    np.testing.assert_array_equal(table, want)


def test_egtea_clips_are_sampled_at_the_published_frames():
    clips = formats.egtea_clips(GOLDEN / "egtea", "test")
    for clip, want in zip(clips, EXPECTED["egtea"]["clips"], strict=True):
        assert (clip.video, clip.name) == (want["video"], want["clip"])
        assert formats.sample_frames("egtea", clip.windows[0], 8, 8).tolist() == want["eval_global_frames"]


@pytest.mark.parametrize("case", NUMBERS["sampling_egtea"])
def test_a_random_start_in_egtea_gives_the_published_frames(case):
    first, end = case["F"][0] - 1, case["F"][1]
    room = max(1e-9, end - first - 64)
    frames = formats.sample_frames("egtea", (first, end), 8, 8, case["start"] / room)
    assert frames.tolist() == case["global_frame_and_label_row"]


def test_ego4d_frame_labels_are_made_and_read_as_published():
    raw = GOLDEN / "ego4d" / "gaze" / f"{EGO4D}.csv"
    want = np.array(EXPECTED["ego4d"]["frame_label"])
    assert want[:, 0].tolist() == list(range(20))
    np.testing.assert_allclose(formats.label_ego4d(raw, 20), want[:, 1:], atol=1e-12)
    np.testing.assert_allclose(formats.ego4d_gaze(GOLDEN / "ego4d", EGO4D), want[:, 1:], atol=1e-7)


def test_ego4d_clips_leave_out_what_touches_an_untracked_interval():
    intervals = formats.untracked_intervals(GOLDEN / "ego4d" / "ego4d_gaze_untracked.csv")
    assert formats.cut_ego4d(EGO4D, 47.3, intervals[EGO4D]) == EXPECTED["ego4d"]["clips_of_a_47_3_s_video"]


def test_ego4d_windows_and_their_frames_are_the_published_ones():
    clips = formats.ego4d_clips(GOLDEN / "ego4d", "test")
    windows = {clip.name: [list(window) for window in clip.windows] for clip in clips}
    assert windows == EXPECTED["ego4d"]["windows"]
    assert formats.sample_frames("ego4d", (64, 128), 8, 8).tolist() == EXPECTED["ego4d"]["frames_of_window_64_128"]
    drawn = NUMBERS["sampling_ego4d"][1]
    share = drawn["train_start"] / (150 - 64)
    assert formats.sample_frames("ego4d", (150, 300), 8, 8, share).tolist() == drawn["frames"]


@pytest.mark.parametrize("split", ["train", "test_iid"])
def test_egoexo4d_windows_have_the_published_frames_times_and_gaze(split):
    root = GOLDEN / "egoexo4d"
    clips = formats.egoexo4d_clips(root, split, 8)
    assert len(clips) == len(EXPECTED["egoexo4d"][split])
    for clip, want in zip(clips, EXPECTED["egoexo4d"][split], strict=True):
        take = clip.video
        frames = formats.sample_frames("egoexo4d", clip.windows[0], 8, clip.stride)
        assert take == want["take"] and frames.tolist() == want["frame_numbers"]
        assert formats.frame_times(root, take, "aria01_214-1")[frames].tolist() == want["timestamps_ns"]

        rows = formats.fill_gaps(formats.egoexo4d_gaze(root, take, "aria01_214-1")[frames])
        seen = rows[:, 2:] >= 0.5
        np.testing.assert_array_equal(np.where(seen, rows, np.float32([0.5, 0.5, 0])),
                                      np.float32(want["x_y_visible"]))


def test_an_egoexo4d_row_that_is_too_short_gives_no_window():
    assert formats.egoexo4d_clips(GOLDEN / "egoexo4d", "val", 8) == EXPECTED["egoexo4d"]["val"] == []


# ---- maps and crops

@pytest.mark.parametrize("name, settings", [
    ("egtea_sigma3", data.LABEL_MAPS["egtea"]), ("ego4d_sigma-1", data.LABEL_MAPS["ego4d"]),
    ("egoexo4d_sigma3", data.LABEL_MAPS["egoexo4d"]), ("egoexo4d_sigma-1", dict(size=64, sigma=1.0, window=None))])
def test_ground_truth_maps_are_the_published_ones(name, settings):
    tensors = load_file(GOLDEN / "gt_metrics.safetensors")
    for i, case in enumerate(NUMBERS["gt"]):
        map_ = data.heatmaps(torch.tensor([case["x"], case["y"]], dtype=torch.float64), **settings)
        want = case[name]
        assert map_.sum().item() == pytest.approx(want["sum"], rel=1e-6)
        assert map_.max().item() == pytest.approx(want["max"], rel=1e-6)
        assert list(divmod(map_.argmax().item(), map_.shape[1])) == want["argmax_row_col"]
        assert (map_ > 0.001).sum().item() == want["n_above_0_001"]
        if settings["window"]:
            assert (map_ > 0).sum().item() == want["n_nonzero"]
        if f"gt.{name}.{i}" in tensors:
            torch.testing.assert_close(map_, tensors[f"gt.{name}.{i}"], atol=1e-7, rtol=1e-5)


def test_maps_of_a_batch_are_those_of_the_published_loaders():
    tensors = load_file(GOLDEN.parent / "argaze_tiny" / "tensors.safetensors")
    labels = tensors["labels"]
    maps = data.heatmaps(labels[..., :2], 16, labels[..., 2] != 0)
    torch.testing.assert_close(maps, tensors["gt"], atol=1e-7, rtol=1e-5)
    maps = data.heatmaps(labels[..., :2], 18, window=None)
    torch.testing.assert_close(maps, tensors["gt_peak1"], atol=1e-6, rtol=1e-5)


def test_an_untracked_frame_has_a_uniform_map():
    maps = data.heatmaps(torch.full((2, 2), 0.3), (4, 8), torch.tensor([True, False]))
    torch.testing.assert_close(maps[1], torch.full((4, 8), 1 / 32))
    assert maps[0].max() > maps[1].max()


@pytest.mark.parametrize("case", NUMBERS["crop_eval"])
def test_evaluation_takes_the_published_square(case):
    height, width = case["image"]
    ramp = np.broadcast_to(np.linspace(0, 255, width)[None, :, None], (height, width, 3)).astype(np.uint8)
    points = torch.tensor(case["gaze"])
    video, after = data.crop_square([ramp], points, torch.ones(len(points), dtype=torch.bool), 224)
    assert video.shape == (1, 3, 224, 224)
    torch.testing.assert_close(after, torch.tensor(case["gaze_after"]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", NUMBERS["crop_train"])
def test_the_random_square_keeps_gaze_inside_as_published(case):
    height, width = case["resized"]
    for axis, size, name in ((0, width, "offset_range_x"), (1, height, "offset_range_y")):
        gaze = [point[axis] * size for point in case["gaze"]]
        assert data.crop_range(gaze, size, case["crop"]) == pytest.approx(case[name])


def test_gaze_follows_the_crop_and_the_mirror():
    """A picture with one bright cell at the gaze point still has it there after any augmentation."""
    image = np.zeros((96, 128, 3), np.uint8)
    image[30:34, 80:84] = 255
    points = torch.tensor([[82 / 128, 32 / 96]])
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        video, after = data.crop_square([image], points, torch.tensor([True]), 64, generator)
        y, x = torch.nonzero(video[0, 0] > 127).double().mean(0).tolist()
        assert after[0].tolist() == pytest.approx([(x + 0.5) / 64, (y + 0.5) / 64], abs=0.015)


# ---- the dataset

def test_an_item_has_the_clip_and_its_gaze(gaze_toy):
    clips = data.GazeClips("auto", gaze_toy, "test", size=64, stride=1)
    batch = data.collate([clips[i] for i in range(len(clips))])
    assert batch["video"].shape == (6, 8, 3, 64, 64) and batch["video"].dtype == torch.uint8
    assert batch["points"].shape == (6, 8, 2) and batch["tracked"].shape == (6, 8)
    assert batch["points"].min() >= 0 and batch["points"].max() <= 1 and batch["unreadable"] == []
    assert (batch["points"][~batch["tracked"]] == 0.5).all() and batch["counted"].sum() <= batch["tracked"].sum()


def test_a_draw_depends_on_seed_and_index_only(gaze_toy):
    clips = data.GazeClips("ego4d", gaze_toy, "train", size=48, stride=1, augment=True, seed=3)
    again = data.GazeClips("ego4d", gaze_toy, "train", size=48, stride=1, augment=True, seed=3, cache=True)
    again[2]
    for index in (5, 5 + len(clips), 5 + 2 * len(clips)):
        assert torch.equal(clips[index]["video"], again[index]["video"])
        assert torch.equal(clips[index]["points"], again[index]["points"])
    assert not torch.equal(clips[5]["video"], clips[5 + len(clips)]["video"])


def test_gaze_points_lie_on_the_object_that_was_touched(gaze_toy):
    """All objects of a toy clip have one colour, which the pixel at the gaze point has once the hand is gone."""
    clips = data.GazeClips("ego4d", gaze_toy, "test", size=64, stride=1)
    for item in (clips[i] for i in range(len(clips))):
        x, y = (item["points"] * 64).long().clamp(max=63).T
        colors = item["video"][torch.arange(8), :, y, x].float()
        assert (colors - colors.median(0).values)[2:4][item["tracked"][2:4]].abs().max() < 30


def test_the_same_settings_make_the_same_clips(gaze_toy, tmp_path):
    make_data.make(make_data.Config(out=str(tmp_path), n_train=2, n_val=1, n_frames=8, size=64, n_workers=1))
    name = "clips.gaze/train/train_t1_t2.mp4"
    assert (tmp_path / name).read_bytes() == (gaze_toy / name).read_bytes()
    with pytest.raises(ValueError, match="other settings"):
        make_data.make(make_data.Config(out=str(tmp_path), n_train=2, n_val=1, n_objects=3))


# ---- from the sets' own videos to items: the brightness of an invented frame is its number in the whole video

def write_movie(path, numbers):
    path.parent.mkdir(parents=True)
    with VideoWriter(path, 30, crf=1) as film:
        for number in numbers:
            film.write(np.full((48, 64, 3), number % 240, np.uint8))


def shown(item):
    return item["video"].float().mean((1, 2, 3))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_an_egtea_item_shows_the_frames_of_its_rows(broken, index):
    root = broken / "egtea"
    for clip in formats.list_clips("egtea", root, "test"):
        write_movie(clip.path.parent / "x" / clip.name, range(*clip.windows[0]))
        (clip.path.parent / "x" / clip.name).rename(clip.path)
        shutil.rmtree(clip.path.parent / "x")
    with pytest.warns(UserWarning, match="2 of 3 clips are shorter"):
        clips = data.GazeClips("egtea", root, "test", size=32)
    item = clips[index]
    frames = EXPECTED["egtea"]["clips"][index]["eval_global_frames"]
    assert item["frames"].tolist() == frames and (shown(item) - torch.tensor(frames)).abs().max() < 2

    # the middle square of 64 x 48
    table = formats.egtea_gaze(root, clips.clips[index].video)
    for t, frame in enumerate(frames):
        x, y, kind = table[frame] if frame < len(table) else (0, 0, 0)
        assert item["tracked"][t] == (kind > 0) and item["counted"][t] == (kind == 1)
        want = [min(max((x * 64 - 8) / 48, 0), 1), y] if kind else [0.5, 0.5]
        assert item["points"][t].tolist() == pytest.approx(want, abs=0.02)


def test_an_ego4d_item_shows_the_frames_of_its_window(broken):
    root = broken / "ego4d"
    for first, name in ((0, "t0_t5"), (450, "t15_t20")):
        folder = root / "clips.gaze" / EGO4D / name
        write_movie(folder / "x.mp4", range(first, first + 150))
        (folder / "x.mp4").rename(root / "clips.gaze" / EGO4D / f"{EGO4D}_{name}.mp4")
    clips = data.GazeClips("ego4d", root, "test", size=32)
    for index, first in ((0, 0), (1, 450)):
        frames = clips[index]["frames"]
        assert frames.tolist() == list(range(first, first + 64, 8))
        assert (shown(clips[index]) - frames % 240).abs().max() < 2
    assert clips[0]["counted"].tolist() == [True] + [False] * 7  # frame 8 is a saccade, the others have no row


def test_an_egoexo4d_item_shows_the_frames_of_its_window(broken, tmp_path):
    root = broken / "egoexo4d"
    folder = tmp_path / "lab_tea_01_4" / "frame_aligned_videos" / "aria01_214-1"
    folder.mkdir(parents=True)
    for number in range(64):
        Image.new("RGB", (64, 64), (number,) * 3).save(folder / f"frame_{number:05d}.jpg", quality=100)
    clips = data.GazeClips("egoexo4d", root, "test", size=32, frames=tmp_path)
    for item, want in zip((clips[0], clips[1]), EXPECTED["egoexo4d"]["test_iid"], strict=True):
        assert (shown(item) - torch.tensor(want["frame_numbers"])).abs().max() < 2
        rows = torch.tensor(want["x_y_visible"])
        assert torch.equal(item["points"], rows[:, :2]) and torch.equal(item["counted"], rows[:, 2] == 1)


# ---- bad input

@pytest.mark.parametrize("name, old, new, message", [
    ("ego4d/gaze/{}.csv", "0,0.004,0,0,0,0.5,0.5,1.0", "0,0.004,0.5", "line 2: 3 columns, expected at least 7"),
    ("ego4d/gaze/{}.csv", "0.021", "late", "line 3: 'late' is not a number"),
    ("egoexo4d/captures/lab_tea_01/timesync.csv", "aria01", "cam02", "no column aria01_214-1_capture"),
    ("egoexo4d/split_assignments.csv", "video_path", "path", "no column video_path; its first line"),
    ("egoexo4d/takes.json", "lab_tea_01_3", "lab_tea_01_9", "no times of the take 'lab_tea_01_3'"),
    *(("egoexo4d/takes.json", '"timesync_start_idx": 10', f'"timesync_start_idx": {value}', "start_idx=.*whole number")
      for value in ('"10"', "0.5", "-1", "true", "null", "1e30")),
    ("egoexo4d/gaze_data/takes/lab_tea_01_3/eye_gaze/personalized_eye_gaze_2d.csv", "tracking_timestamp_us", "t",
     "no column with a timestamp")])
def test_wrong_columns_are_named(broken, name, old, new, message):
    path = broken / name.format(EGO4D)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        if "ego4d/" in name and "egoexo4d" not in name:
            formats.label_ego4d(path, 20)
        else:
            clip = formats.list_clips("egoexo4d", broken / "egoexo4d", "train")[0]
            formats.read_gaze("egoexo4d", broken / "egoexo4d", clip)


def read(broken, dataset, split="test"):
    return data.GazeClips(dataset, broken / dataset, split)


def test_a_missing_list_is_named_and_explained(broken):
    (broken / "egtea" / "test_gaze_official.csv").unlink()
    with pytest.raises(FileNotFoundError, match="test_gaze_official.csv is missing.*one clip a line"):
        read(broken, "egtea")


def test_videos_that_are_all_missing_are_an_error(broken):
    with pytest.raises(FileNotFoundError, match="3 of 3 videos are missing.*argaze.data check"):
        read(broken, "egtea")


def test_an_unknown_split_names_those_that_exist(broken):
    with pytest.raises(ValueError, match="TEST_OOD_SITE; it has TEST_IID, TRAIN, VAL"):
        read(broken, "egoexo4d", "test_ood_site")


@pytest.mark.parametrize("text, message", [
    ("frame,x,y\n0,.5,.5\n", "no column gaze_type"), ("frame,x,y,gaze_type\n0,1.2,.5,0\n", "line 2: gaze .1.2, .5."),
    ("frame,x,y,gaze_type\n0,nan,.5,0\n", "line 2: 'nan' is not a number"), ("frame,x,y,gaze_type\n", "no row"),
    ("frame,x,y,gaze_type\n0,.5,.5,4\n", "line 2: gaze_type '4' is none of"),
    *((f"frame,x,y,gaze_type\n{frame},.5,.5,0\n", f"line 2: '{frame}' is no frame number")
      for frame in ("1e9", "-1", "0.5"))])
def test_a_bad_frame_label_names_file_and_line(broken, text, message):
    path = broken / "ego4d" / "gaze_frame_label" / f"{EGO4D}_frame_label.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        formats.ego4d_gaze(broken / "ego4d", EGO4D)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("old, new, message", [
    ("\t640.00\t", "\tNaN\t", "line 35: 'NaN' is not a number"), ("\t0\tFixation", "\tFixation", "line 35: 6 fields"),
    ("\t0\tFixation", "\t-1\tFixation", "line 35: '-1' is no frame number"),
    ("\t0\tFixation", "\t9999:0:0:0\tFixation", "line 35: '863913600' is no frame number"),
    ("## Number of Samples:", "## Samples:", "no BeGaze export")])
def test_a_bad_begaze_export_names_file_and_line(broken, old, new, message):
    path = broken / "egtea" / "gaze_data" / "OP99-R01-Toast.txt"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        formats.egtea_gaze(broken / "egtea", "OP99-R01-Toast")
    assert str(path) in str(error.value)


def test_a_window_outside_of_its_clip_is_an_error(broken):
    path = broken / "ego4d" / "test_ego4d_gaze_stride8.csv"
    path.write_text(f"{EGO4D}/{EGO4D}_t0_t5.mp4,100,164\n")
    with pytest.raises(ValueError, match="line 1: the window 100..164 is not part"):
        formats.ego4d_clips(broken / "ego4d", "test")


@pytest.mark.parametrize("text, message", [("name,frame,x\n1,2,3\n", "is text and no video"), (None, "missing")])
def test_a_clip_that_is_no_video_is_replaced_with_a_warning(gaze_toy, tmp_path, text, message):
    root = shutil.copytree(gaze_toy, tmp_path / "toy")
    clips = data.GazeClips("ego4d", root, "test", size=64, stride=1)
    bad = Path(clips[0]["path"])
    bad.write_text(text) if text else bad.unlink()
    with pytest.warns(UserWarning, match=f"the next clip is used instead.*{message}"):
        item = clips[0]
    assert item["unreadable"] == [str(bad)] and item["key"] == clips[1]["key"]


def test_a_video_with_fewer_frames_than_its_label_is_named(gaze_toy):
    clip = data.GazeClips("ego4d", gaze_toy, "test", size=64, stride=1).clips[0]
    with pytest.raises(VideoError, match="ends before its frame 36, frame 40 is needed"):
        data.read_frames(clip, clip.offset + np.array([0, 40]))


def test_a_clip_shorter_than_the_window_is_announced(gaze_toy):
    with pytest.warns(UserWarning, match="6 of 6 clips are shorter than 8 frames with stride 2"):
        data.GazeClips("ego4d", gaze_toy, "test", size=64, stride=2)


def test_a_video_without_a_gaze_file_is_left_out_with_a_warning(broken):
    root = broken / "egtea"
    for clip in formats.list_clips("egtea", root, "test"):
        clip.path.parent.mkdir(parents=True, exist_ok=True)
        clip.path.touch()
    (root / "gaze_data" / "OP99-R01-Toast.txt").unlink()
    with pytest.warns(UserWarning, match="1 videos have no gaze file.*OP99-R01-Toast.txt is missing"):
        clips = data.GazeClips("egtea", root, "test", stride=2)
    assert {clip.video for clip in clips.clips} == {"P98-R02-Soup"}


def test_a_take_without_times_is_left_out_with_a_warning(broken):
    root = broken / "egoexo4d"
    with open(root / "split_assignments.csv", "a") as file:
        file.write("lab_tea_02_1,takes/lab_tea_02_1/frame_aligned_videos/aria01_214-1.mp4,0,2.4,TEST_IID,,,,,,\n")
    takes = json.loads((root / "takes.json").read_text())
    takes.append({"take_name": "lab_tea_02_1", "timesync_start_idx": 0, "timesync_end_idx": 9})
    (root / "takes.json").write_text(json.dumps(takes))
    with pytest.warns(UserWarning, match="1 takes are left out.*lab_tea_02/timesync.csv is missing"):
        clips = formats.list_clips("egoexo4d", root, "test")
    assert len(clips) == 2


def test_a_set_without_any_tracked_frame_is_an_error(gaze_toy, tmp_path):
    root = shutil.copytree(gaze_toy, tmp_path / "toy")
    (root / "gaze_frame_label" / "test_frame_label.csv").write_text("frame,x,y,gaze_type\n0,0,0,3\n")
    with pytest.raises(ValueError, match="gaze is tracked in no frame of its 6 clips"):
        data.GazeClips("ego4d", root, "test", size=64, stride=1)


# ---- commands

def command(*args):
    """The exit code, or the message of an error."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises((SystemExit, OSError, ValueError)) as end:
        patch.setattr("sys.argv", ["argaze.data", *map(str, args)])
        data.main()
    return end.value.code if isinstance(end.value, SystemExit) else str(end.value)


def test_check_says_what_is_there(gaze_toy, capsys):
    assert not command("check", f"--root={gaze_toy}", "--stride=1")
    text = capsys.readouterr().out
    assert "Ego4D" in text and "6 clips of 1 videos" in text and "PROBLEM" not in text


def test_check_says_what_is_missing(broken, capsys):
    (broken / "ego4d" / "gaze" / "x.mp4").write_text("c0,timestamp_s,x,y\n")
    assert command("check", f"--root={broken / 'ego4d'}")
    text = capsys.readouterr().out
    assert "train_ego4d_gaze.csv is missing" in text and "0 of 2 clips" in text
    assert "x.mp4 is a csv file saved as .mp4: rename it to x.csv" in text


def test_frames_written_as_pictures_give_the_same_item(gaze_toy, tmp_path):
    assert not command("frames", f"--root={gaze_toy}", f"--frames={tmp_path}", "--splits=test")
    movie = data.GazeClips("ego4d", gaze_toy, "test", size=64, stride=1)[3]
    pictures = data.GazeClips("ego4d", gaze_toy, "test", size=64, stride=1, frames=tmp_path)[3]
    assert torch.equal(movie["points"], pictures["points"])
    assert (movie["video"].float() - pictures["video"].float()).abs().mean() < 3
    (tmp_path / "test" / "000090.jpg").unlink()
    data.picture_names.cache_clear()
    assert command("check", f"--root={gaze_toy}", f"--frames={tmp_path}", "--splits=test", "--stride=1")


def test_a_video_that_gives_too_few_pictures_is_named(broken, tmp_path):
    root = broken / "ego4d"
    write_movie(root / "full_scale.gaze" / f"{EGO4D}.mp4", range(300))
    with pytest.raises(data.VideoError, match=f"{EGO4D}.mp4 ends before its frame 513: 128 of 192 pictures"):
        command("frames", f"--root={root}", f"--frames={tmp_path / 'out'}", "--splits=test")
    assert len(list((tmp_path / "out" / EGO4D).iterdir())) == 128


def test_labels_of_raw_gaze_are_what_training_reads(broken, gaze_toy):
    root = broken / "ego4d"
    movie = root / "full_scale.gaze" / f"{EGO4D}.mp4"
    movie.parent.mkdir()
    shutil.copy(next(gaze_toy.glob("clips.gaze/test/*.mp4")), movie)
    want = formats.ego4d_gaze(root, EGO4D)[:8]
    shutil.rmtree(root / "gaze_frame_label")
    assert not command("labels", f"--root={root}")
    np.testing.assert_allclose(formats.ego4d_gaze(root, EGO4D), want, atol=1e-6)


def test_labels_need_the_list_of_untracked_intervals(broken, capsys):
    (broken / "ego4d" / "ego4d_gaze_untracked.csv").unlink()
    assert "ego4d_gaze_untracked.csv is missing" in command("labels", f"--root={broken / 'ego4d'}")


@pytest.mark.parametrize("dataset", ["egtea", "egoexo4d"])
def test_labels_of_the_other_sets_hold_their_tables(broken, dataset):
    assert not command("labels", f"--root={broken / dataset}", "--splits=test")
    clip = formats.list_clips(dataset, broken / dataset, "test")[0]
    assert formats.detect(broken / dataset) == dataset
    path = broken / dataset / "gaze_frame_label" / f"{clip.video}_frame_label.csv"
    rows = np.loadtxt(path, delimiter=",", skiprows=1)
    np.testing.assert_allclose(rows[:, 1:], formats.read_gaze(dataset, broken / dataset, clip), atol=1e-6)


def test_a_folder_that_is_none_of_the_sets_is_named(tmp_path):
    assert command("check", f"--root={tmp_path / 'nowhere'}") == f"root={tmp_path / 'nowhere'} is no folder"
    assert "looks like none of the three sets" in command("check", f"--root={tmp_path}")
