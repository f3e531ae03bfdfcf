"""python -m argaze.show: files, pipes, pictures, bad input."""
import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from argaze_tiny import tiny_argaze
from piped import piped

from argaze import show
from argaze.model import ARGaze
from data import VideoError, count_frames, decode
from lib.video_out import VideoWriter


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("argaze") / "ckpt"
    tiny_argaze().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def movie(tmp_path_factory):
    """13 frames of 90 x 48."""
    path = tmp_path_factory.mktemp("movie") / "in.mp4"
    pictures = np.random.default_rng(0).integers(0, 255, (13, 6, 12, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    with VideoWriter(path, 10) as film:
        for picture in pictures[:, :, :90]:
            film.write(picture)
    return path


def run(*args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["argaze.show", *map(str, args)])
        show.main()


@pytest.mark.parametrize("stride, n_looks", [(1, 13), (4, 4)])
def test_every_frame_is_drawn_and_every_stride_th_is_looked_at(ckpt, movie, tmp_path, stride, n_looks):
    out = tmp_path / "out.mp4"
    run(f"--video={movie}", f"--ckpt={ckpt}", f"--out={out}", f"--stride={stride}")
    assert count_frames(out) == 13
    table = np.loadtxt(out.with_suffix(".csv"), delimiter=",", skiprows=1)
    assert table[:, 0].tolist() == list(range(0, 13, stride)) and len(table) == n_looks
    assert (table[:, 2] >= 21).all() and (table[:, 2] <= 69).all()  # in the centre square
    assert (table[:, 3] >= 0).all() and (table[:, 3] <= 48).all()


def test_the_film_shows_what_a_whole_clip_gives(ckpt, movie, tmp_path):
    out = tmp_path / "out.mp4"
    run(f"--video={movie}", f"--ckpt={ckpt}", f"--out={out}")
    images = [image for _, image in decode(movie, range(13))]
    video, _ = show.crop_square(images, torch.zeros(13, 2), torch.zeros(13, dtype=torch.bool), 32)
    model = ARGaze.from_pretrained(ckpt)
    with torch.no_grad():
        _, points, _ = model.predict(model(video.unsqueeze(0))[0])
    table = np.loadtxt(out.with_suffix(".csv"), delimiter=",", skiprows=1)
    np.testing.assert_allclose(table[:, 2:4], points.numpy() * 48 + [21, 0], atol=0.06)


def test_the_cross_lies_on_the_most_likely_place():
    picture = np.full((64, 100, 3), 90, np.uint8)
    heat = np.zeros((16, 16), np.float32)
    heat[4, 12] = 1
    film = show.draw(picture, heat, (12.5 / 16, 4.5 / 16), "")
    x, y = show.Square(picture).to_pixels((12.5 / 16, 4.5 / 16))
    assert film[round(y), round(x)].min() > 200  # the white cross
    assert (film[round(y) + 2, round(x) + 2] != 90).all() and (film[55, 5] == 90).all()


def test_a_pipe_is_looked_at_until_it_ends(ckpt, tmp_path):
    stream = tmp_path / "in.ts"
    with av.open(str(stream), "w", format="mpegts") as target:
        track = target.add_stream("mpeg2video", rate=25)
        track.width, track.height, track.pix_fmt = 96, 48, "yuv420p"
        for level in range(12):
            picture = np.full((48, 96, 3), 20 * level, np.uint8)
            target.mux(track.encode(av.VideoFrame.from_ndarray(picture)))
        target.mux(track.encode(None))

    out = tmp_path / "pipe.mp4"
    with piped(stream):
        run("--video=-", f"--ckpt={ckpt}", f"--out={out}")
    assert count_frames(out) == 12


@pytest.mark.parametrize("content", [None, "a,b\n"])
def test_what_is_no_video_is_named(ckpt, tmp_path, content):
    path = tmp_path / "no.mp4"
    if content:
        path.write_text(content)
    with pytest.raises(VideoError, match="no.mp4: cannot be read as a video"):
        run(f"--video={path}", f"--ckpt={ckpt}", f"--out={tmp_path / 'out.mp4'}")
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("name", ["12:30.mp4", os.fsdecode(b"\xff\xe4.mp4")])
def test_videos_of_any_name(movie, tmp_path, name):
    (tmp_path / name).write_bytes(movie.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert len(list(show.read_video(name))) == 13


def test_ctrl_c_leaves_a_complete_film(ckpt, movie, tmp_path, monkeypatch):
    calls = []

    def look(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return np.ones((4, 4), np.float32), [0.5, 0.5], 0.1, None

    monkeypatch.setattr(show, "look", look)
    run(f"--video={movie}", f"--ckpt={ckpt}", f"--out={tmp_path / 'out.mp4'}")
    assert count_frames(tmp_path / "out.mp4") == 5


@pytest.mark.skipif("GAZE_CLIPS" not in os.environ, reason="GAZE_CLIPS: a folder of real videos")
def test_real_videos_are_drawn_to_their_end(ckpt, tmp_path):
    for path in sorted(Path(os.environ["GAZE_CLIPS"]).glob("*.mp4"))[:3]:
        out = tmp_path / path.name
        run(f"--video={path}", f"--ckpt={ckpt}", f"--out={out}", "--stride=8", "--seconds=0.5", "--height=96")
        n_looks = len(out.with_suffix(".csv").read_text().splitlines()) - 1
        assert 8 * (n_looks - 1) < count_frames(out) <= 8 * n_looks
