"""gaze.py from the command line, on a small random model and generated videos. GAZE_CLIPS=folder python -m pytest
tests/test_gaze_cli.py also looks at the first video of that folder."""
import contextlib
import io
import os
import struct
import subprocess
import sys
from pathlib import Path
from unittest import mock

import av
import numpy as np
import pytest
import torch

import gaze
from data import VIDEO_SUFFIXES, VideoError
from model import Gaze, GazeConfig
from videomae import VideoMAE, VideoMAEConfig

ROOT = Path(__file__).parent.parent
SCALES, PATCH, FRAMES, V, PANEL = "16+32", 8, 4, 20, 288  # 4 + 16 ids; panels of 9 x 32 pixels
STRIP, GAP = 26, 4


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with a gaze model, two reconstructors (one of other scales) and videos."""
    folder = tmp_path_factory.mktemp("gaze")
    torch.manual_seed(0)
    Gaze(GazeConfig(scales=SCALES, patch_size=PATCH, max_num_frames=FRAMES, hidden_size=32, num_layers=1, num_heads=2,
                    intermediate_size=32, num_multi_token_pred=3, gazing_ratio=0.2)).save_pretrained(folder / "model")
    for name, scales in (("mae", SCALES), ("other", "8+32")):
        VideoMAE(VideoMAEConfig(
            scales=scales, max_num_frames=FRAMES, image_size=32, patch_size=PATCH, hidden_size=32, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=32, decoder_hidden_size=32, decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2, decoder_intermediate_size=32)).save_pretrained(folder / name)
    write(folder / "odd.mp4", 10, 51, 75)
    write(folder / "one.mp4", 1, 75, 51)
    (folder / "text.mp4").write_text("not a video")
    return folder


def write(path, n, height, width):
    """Dark with a bright square in the middle of the lower right quarter of the centre square."""
    picture = np.full((height, width, 3), 20, dtype=np.uint8)
    side = min(height, width)
    y, x = ((n - side) // 2 + round(0.625 * side) for n in (height, width))
    picture[y:y + side // 4, x:x + side // 4] = 230
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "4", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv444p"
        for _ in range(n):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def run(*args):
    return subprocess.run([sys.executable, "gaze.py", "--device=cpu", *args], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def look(folder, video, *args, as_script=False):
    """Look at a video -> (npz as a dict, frames of the overlay, printed text). In this process: importing takes longer
    than all else."""
    out, text = folder / "out" / Path(video).stem, io.StringIO()
    args = [f"--video={folder / video}", f"--ckpt={folder / 'model'}", f"--out={out}", *args]
    if as_script:
        done = run(*args)
        assert done.returncode == 0, done.stderr
        text.write(done.stdout)
    else:
        with mock.patch("sys.argv", ["gaze.py", "--device=cpu", *args]), contextlib.redirect_stdout(text):
            gaze.main()
    assert (out / "sheet.png").stat().st_size > 1000
    assert sorted(os.listdir(out)) == ["gaze.npz", "overlay.mp4", "sheet.png"]
    with av.open(str(out / "overlay.mp4")) as container:
        frames = [f.to_ndarray(format="rgb24").astype(int) for f in container.decode(video=0)]
    return dict(np.load(out / "gaze.npz")), frames, text.getvalue()


def check(npz, frames, n, panels):
    """A whole gaze of n frames, and an overlay that has as many."""
    pos, counts = npz["gazing_pos"], npz["num_gazing_each_frame"]
    assert pos.shape == npz["if_padded_gazing"].shape == (1, counts.sum()) and not npz["if_padded_gazing"].any()
    assert len(counts) == len(npz["source_frame"]) == n and counts.min() >= 1
    assert (pos[0] // V == np.repeat(np.arange(n), counts)).all()  # every id belongs to its own frame
    assert len(set(pos[0].tolist())) == pos.size
    assert str(npz["scales"]) == SCALES and npz["patch_size"] == PATCH
    assert len(frames) == n and frames[0].shape == (STRIP + PANEL, panels * (PANEL + GAP) - GAP, 3)


def test_video_with_reconstruction(folder):
    npz, frames, text = look(folder, "odd.mp4", f"--videomae={folder / 'mae'}", "--gazing_ratio=1", "--batch_size=2",
                             as_script=True)
    check(npz, frames, n=10, panels=4)
    assert npz["source_frame"].tolist() == list(range(10)) and (npz["num_gazing_each_frame"] == V).all()
    assert npz["crop"].tolist() == [0, 12, 51] and npz["source_size"].tolist() == [51, 75]
    assert "reconstruction loss" in text and "ratio 1.0000" in text and "10 of 10 frames = 3 chunks" in text
    # all panels show the bright square in the same place: at ratio 1 every patch is gazed
    for panel in range(3):
        x = panel * (PANEL + GAP)
        grey = frames[5][STRIP:, x:x + PANEL].mean(-1)
        outlines = 9 * PATCH * np.arange(5)
        keep = np.abs(np.arange(PANEL)[:, None] - outlines).min(1) > 4
        rows, columns = (np.flatnonzero((grey > 150)[keep][:, keep].any(axis)) for axis in (1, 0))
        for found in (np.flatnonzero(keep)[rows], np.flatnonzero(keep)[columns]):
            assert abs(found.min() - 0.625 * PANEL) < 14 and abs(found.max() - 0.875 * PANEL) < 14, (panel, found)


def test_part_of_a_video(folder):
    npz, frames, text = look(folder, "odd.mp4", "--start=0.25", "--stride=2", "--max_frames=3", "--fps=2.5",
                             "--task_loss_requirement=0.5")
    check(npz, frames, n=3, panels=3)
    assert npz["source_frame"].tolist() == [2, 4, 6]
    assert "reconstruction loss" not in text
    with av.open(str(folder / "out/odd/overlay.mp4")) as container:
        assert container.streams.video[0].average_rate == 2.5


def test_one_frame_portrait(folder):
    npz, frames, _ = look(folder, "one.mp4", "--max_frames=0", as_script=True)
    check(npz, frames, n=1, panels=3)
    assert npz["num_gazing_each_frame"].tolist() == [4]  # 0.2 of 20: the model's own ratio
    assert npz["crop"].tolist() == [12, 0, 51]


def test_turned_phone_video(folder):
    """A display matrix in the file turns the picture: the overlay shows it upright."""
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    movie = (folder / "odd.mp4").read_bytes()
    at = movie.index(identity, movie.index(b"tkhd"))
    (folder / "turned.mp4").write_bytes(movie[:at] + clockwise + movie[at + len(identity):])
    npz, frames, text = look(folder, "turned.mp4", "--max_frames=1")
    assert npz["source_size"].tolist() == [75, 51] and "51x75, stored turned" in text
    grey = frames[0][STRIP:, :PANEL].mean(-1)
    assert grey[3 * PANEL // 4, PANEL // 4] > 150 > grey[3 * PANEL // 4, 3 * PANEL // 4]  # lower right went lower left


@pytest.mark.parametrize("args, message", [
    ("--video=DIR/none.mp4", "none.mp4: no such file"),
    ("--video=DIR/text.mp4", "text.mp4: cannot be read as a video"),
    ("--video=DIR/odd.mp4 --ckpt=DIR/none", "none: no such folder"),
    ("--video=DIR/odd.mp4 --ckpt=DIR/model --videomae=DIR/none", "none: no VideoMAE weights"),
    ("--video=DIR/odd.mp4 --ckpt=DIR/model --videomae=DIR/other", "is for scales 8+32"),
    ("--video=DIR/odd.mp4 --ckpt=DIR/model --videomae=DIR/model", "model is no reconstructor"),
    ("--video=DIR/odd.mp4 --start=9", "start=9 lies beyond the end"),
    ("--video=DIR/odd.mp4 --ckpt=DIR/model --sheet_chunk=3", "10 frames make 3 chunks"),
    ("--ckpt=DIR/model", "no video given"),
])
def test_mistakes(folder, args, message, capsys):
    with mock.patch("sys.argv", ["gaze.py", "--device=cpu", *args.replace("DIR", str(folder)).split()]):
        with pytest.raises((FileNotFoundError, ValueError, VideoError, SystemExit)) as error:
            gaze.main()
    assert message in str(error.value) + capsys.readouterr().err


def test_mistake_ends_in_one_line(folder):
    done = run(f"--video={folder / 'none.mp4'}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.skipif("GAZE_CLIPS" not in os.environ, reason="GAZE_CLIPS names no folder of real videos")
def test_real_clip(folder):
    video = sorted(p for p in Path(os.environ["GAZE_CLIPS"]).rglob("*") if p.suffix in VIDEO_SUFFIXES)[0]
    npz, frames, _ = look(folder, video, "--max_frames=8", f"--videomae={folder / 'mae'}")
    check(npz, frames, n=8, panels=4)
