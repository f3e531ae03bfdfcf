"""show.py from the command line, on a small random model and generated videos. GAZE_CLIPS=folder python -m pytest
tests/test_show.py also looks at the first video of that folder."""
import contextlib
import io
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import make_data
import show
from data import VIDEO_SUFFIXES, VideoError, read_frames, to_model_pixels
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
    for name, cut in (("model", "cut"), ("mae", "cut_mae")):
        shutil.copytree(folder / name, folder / cut)
        os.truncate(folder / cut / "model.safetensors", 1000)
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
    return subprocess.run([sys.executable, "show.py", "--device=cpu", *args], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def look(folder, video, *args, as_script=False):
    """Look at a video -> (npz as a dict, frames of the overlay, printed text). In this process: importing takes longer
    than all else."""
    out, text = folder / "out" / Path(video).stem, io.StringIO()
    shutil.rmtree(out, ignore_errors=True)
    args = [f"--video={folder / video}", f"--ckpt={folder / 'model'}", f"--out={out}", *args]
    if as_script:
        done = run(*args)
        assert done.returncode == 0, done.stderr
        text.write(done.stdout)
    else:
        with mock.patch("sys.argv", ["show.py", "--device=cpu", *args]), contextlib.redirect_stdout(text):
            show.main()
    assert (out / "sheet.png").stat().st_size > 1000
    assert {*os.listdir(out)} - {"lock"} == {"gaze.json", "gaze.npz", "overlay.mp4", "sheet.png"}
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
    assert "ratio: 1.0\n" in text and "10 of 10 frames" in text
    numbers = json.loads((folder / "out/odd/gaze.json").read_text())
    assert npz["loss"].shape == (10,) and numbers["reconstruction_loss"] == pytest.approx(npz["loss"].mean())
    # all panels show the bright square in the same place: at ratio 1 every patch is gazed
    for panel in range(3):
        x = panel * (PANEL + GAP)
        grey = frames[5][STRIP:, x:x + PANEL].mean(-1)
        outlines = 9 * PATCH * np.arange(5)
        keep = np.abs(np.arange(PANEL)[:, None] - outlines).min(1) > 4
        rows, columns = (np.flatnonzero((grey > 150)[keep][:, keep].any(axis)) for axis in (1, 0))
        for found in (np.flatnonzero(keep)[rows], np.flatnonzero(keep)[columns]):
            assert abs(found.min() - 0.625 * PANEL) < 14 and abs(found.max() - 0.875 * PANEL) < 14, (panel, found)


def test_without_a_model_the_one_of_the_repository_looks(folder):
    write(folder / "plain.mp4", 3, 48, 64)
    with mock.patch("sys.argv", ["show.py", "--device=cpu", f"--video={folder / 'plain.mp4'}", f"--out={folder}"]):
        show.main()
    about = json.loads((folder / "gaze.json").read_text())
    assert about["frames"] == 3
    assert about["reconstruction_loss"] > 0


def test_the_repositorys_model_looks_better_than_chance_at_clips_unlike_those_it_knows():
    gaze = Gaze.from_pretrained(show.SMALL / "gaze")
    mae = VideoMAE.from_pretrained(show.SMALL / "videomae").freeze()
    toy = make_data.ToyConfig(height=64, width=64, n_frames=8)
    clips = torch.stack([torch.from_numpy(make_data.render_clip(np.random.default_rng(i), toy)) for i in range(8)])
    video = to_model_pixels(clips.movedim(-1, 2))
    out = gaze.generate(video, gazing_ratio=0.3)

    # as many patches of each frame at random
    draw = torch.Generator().manual_seed(0)
    ids = []
    for t, n in enumerate(out["num_gazing_each_frame"].tolist()):
        ids.append(torch.rand(8, 21, generator=draw).topk(n).indices + 21 * t)
    chance = dict(out, gazing_pos=torch.cat(ids, dim=1))
    assert mae(video, out, range(8))[1].mean() < 0.95 * mae(video, chance, range(8))[1].mean()


def test_part_of_a_video(folder):
    npz, frames, text = look(folder, "odd.mp4", "--start=0.25", "--fps=4", "--max_frames=3",
                             "--task_loss_requirement=0.5")
    check(npz, frames, n=3, panels=3)
    assert npz["source_frame"].tolist() == [2, 4, 6]
    assert "reconstruction_loss" not in text
    with av.open(str(folder / "out/odd/overlay.mp4")) as container:
        assert container.streams.video[0].average_rate == 4


def test_labels_say_what_is_shown(folder, monkeypatch):
    texts, draw = [], show.View.draw
    monkeypatch.setattr(show.View, "draw", lambda self, picture, frame, where, labels, *rest:
                        texts.append(labels) or draw(self, picture, frame, where, labels, *rest))
    npz, frames, _ = look(folder, "odd.mp4", "--start=0.5", "--max_frames=6")
    coarse = [int(((pos := npz["gazing_pos"][0] - V * t) >= 0)[pos < 4].sum()) for t in range(6)]
    assert texts == [[f"frame {4 + t}  {0.5 + t / 8:.2f} s  20.0 % gazed", f"scale 16 px: {n} of 4",
                      f"scale 32 px: {4 - n} of 16"] for t, n in enumerate(coarse)]
    for a, b in zip(frames, frames[1:], strict=False):
        assert abs(a - b)[:STRIP, :PANEL].max() > 50 and a[:STRIP, PANEL + GAP:].max() > 200  # drawn, and anew


def test_a_short_chunk_is_not_filled_up(folder, monkeypatch):
    lengths, embed = [], Gaze.embed
    monkeypatch.setattr(Gaze, "embed", lambda self, x, *past: lengths.append(x.shape[1]) or embed(self, x, *past))
    look(folder, "odd.mp4", "--batch_size=1")
    assert lengths == [4, 4, 2]


def test_one_frame_portrait(folder):
    npz, frames, _ = look(folder, "one.mp4", as_script=True)
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
    assert npz["source_size"].tolist() == [75, 51] and "51x75" in text
    grey = frames[0][STRIP:, :PANEL].mean(-1)
    assert grey[3 * PANEL // 4, PANEL // 4] > 150 > grey[3 * PANEL // 4, 3 * PANEL // 4]  # lower right went lower left


@pytest.mark.parametrize("args, message", [
    ("--video=DIR/none.mp4", "none.mp4: no such file"),
    ("--video=DIR/text.mp4", "text.mp4: cannot be read as a video"),
    ("--video=DIR/model", "model: a folder, not a file"),
    ("--video=DIR/odd.mp4 --ckpt=DIR/cut", "model.safetensors is cut off"),
    ("--video=DIR/odd.mp4 --ckpt=DIR/model --videomae=DIR/cut_mae", "model.safetensors is cut off"),
    ("--video=DIR/odd.mp4 --ckpt=DIR/none", "none: no such folder"),
    ("--video=DIR/odd.mp4 --ckpt=DIR/model --videomae=DIR/none", "none: no VideoMAE weights"),
    ("--video=DIR/odd.mp4 --ckpt=DIR/model --videomae=DIR/other", "is for scales 8+32"),
    ("--video=DIR/odd.mp4 --ckpt=DIR/model --videomae=DIR/model", "model is no reconstructor"),
    ("--video=DIR/odd.mp4 --start=9", "start=9 lies beyond the end"),
    ("--ckpt=DIR/model", "no video given"),
    ("--video=DIR/odd.mp4 --fps=9", "fps=9 is above the video's 8"),
    ("--video=DIR/odd.mp4 --ckpt=DIR/model --live=true --fps=9", "fps=9 is above the video's 8"),
    ("--video=DIR/odd.mp4 --batch_size=0", "batch_size=0 must be at least 1"),
    ("--video=DIR/odd.mp4 --duration=0", "duration=0.0 must be above 0"),
    ("--video=DIR/odd.mp4 --scale=0", "scale=0.0 must lie in (0, 4]"),
    ("--video=DIR/odd.mp4 --scale=1 --videomae=DIR/mae", "leave out --scale or --videomae"),
    ("--video=DIR/odd.mp4 --scale=1 --live=true", "leave out --scale, --videomae"),
    ("--video=DIR/text.mp4 --ckpt=DIR/model --live=true", "cannot be read as a video stream"),
    ("--video=DIR/odd.mp4 --ckpt=DIR/model --live=true --start=9", "ended before the first frame to look at"),
])
def test_mistakes(folder, args, message, capsys):
    with mock.patch("sys.argv", ["show.py", "--device=cpu", *args.replace("DIR", str(folder)).split()]):
        with pytest.raises((FileNotFoundError, ValueError, VideoError, SystemExit)) as error:
            show.main()
    assert message in str(error.value) + capsys.readouterr().err


def test_mistake_ends_in_one_line(folder):
    done = run(f"--video={folder / 'none.mp4'}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1

# ----------------------------------------------------------------------------------------------------------------------
# whole frames in tiles, parts of a video, live


def moving(path, n, height, width, codec="ffv1", form=None):
    """Noise, so that every frame has its own gaze; lossless."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = height, width, "bgr0" if codec == "ffv1" else "yuv420p"
        for _ in range(n):
            picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def as_generated(folder, video, n, ratio):
    """(gaze of the whole frames by generate() alone, their size in patches)"""
    frames = read_frames(folder / video, n)
    H, W = frames.shape[2:]
    grids = [(math.ceil(H * g / 32), math.ceil(W * g / 32)) for g in (2, 4)]
    h, w = (PATCH * k for k in grids[-1])
    clip = F.pad(to_model_pixels(frames), (0, w - W, 0, h - H))[None]
    gazing = Gaze.from_pretrained(folder / "model").eval().generate(
        clip, ratio, target_scales=[(PATCH * y, PATCH * x) for y, x in grids], target_patch_size=PATCH)
    return gazing, grids


@pytest.mark.parametrize("size", [(51, 75), (75, 51), (40, 33), (1, 1)])
def test_tiles_line_up_with_pixels(folder, size):
    moving(folder / "noise.mkv", FRAMES, *size)
    npz, frames, text = look(folder, "noise.mkv", "--scale=1", "--gazing_ratio=0.3", "--batch_size=2")
    gazing, grids = as_generated(folder, "noise.mkv", FRAMES, 0.3)
    keep = ~gazing["if_padded_gazing"][0]
    assert np.array_equal(npz["gazing_pos"][0], gazing["gazing_pos"][0][keep])
    assert npz["grids"].tolist() == [list(g) for g in grids] and npz["source_size"].tolist() == list(size)
    # from ids to pixels by what gaze.npz says, against the masks
    top, left, side = npz["crop"]
    V, starts = int(npz["grids"].prod(1).sum()), [0, int(npz["grids"][0].prod())]
    for s, (g, (rows, columns)) in enumerate(zip((2, 4), grids, strict=True)):
        want = gazing["gazing_mask"][s][0].view(FRAMES, rows, columns).bool().numpy()
        got, step = np.zeros((FRAMES, *size), bool), int(side / g)
        for i in npz["gazing_pos"][0]:
            if starts[s] <= i % V < starts[s] + rows * columns:
                y, x = divmod(i % V - starts[s], columns)
                y, x = int(top + y * side / g), int(left + x * side / g)
                assert y < size[0] and x < size[1]  # no gaze into the padding
                got[i // V, y:y + step, x:x + step] = True
        assert np.array_equal(got, want.repeat(step, 1).repeat(step, 2)[:, :size[0], :size[1]])


def test_tiles_in_the_overlay(folder):
    """At ratio 1 all panels show the bright square where it is; two chunks, the last one not full."""
    npz, frames, text = look(folder, "odd.mp4", "--scale=1", "--gazing_ratio=1", "--max_frames=6")
    assert "75x51 pixels in 2 rows x 3 columns of tiles" in text and len(frames) == 6
    assert (npz["num_gazing_each_frame"] == npz["grids"].prod(1).sum()).all()
    w = frames[5].shape[1] // 3
    for panel in range(3):
        grey = frames[5][STRIP:, panel * w:(panel + 1) * w - GAP].mean(-1)
        y, x = (np.flatnonzero((grey > 190).mean(1 - a) > 0.06) for a in (0, 1))
        for found, start, length in ((y, 32, 51), (x, 44, 75)):  # pixels 32 to 44 of 51 rows, 44 to 56 of 75 columns
            scale = grey.shape[length == 75] / length
            assert abs(found.min() - start * scale) < 14 and abs(found.max() - (start + 12) * scale) < 14
    numbers = json.loads((folder / "out/odd/gaze.json").read_text())
    assert numbers["frames"] == 6 and numbers["ratio"] == 1 and numbers["settings"]["scale"] == 1
    assert abs(sum(numbers["share_per_scale"].values()) - 1) < 1e-9


@pytest.mark.parametrize("args, want, fps", [
    ("--start=0.25 --duration=0.75 --fps=4", [2, 4, 6], 4),
    ("--start=0.25 --duration=0.75 --fps=3", [2, 4, 7], 3),
    ("--duration=0.01", [0], 8),
    ("--duration=99 --max_frames=3", [0, 1, 2], 8),
])
@pytest.mark.parametrize("live", ["false", "true"])
def test_which_frames(folder, args, want, fps, live):
    npz, frames, _ = look(folder, "odd.mp4", f"--live={live}", *args.split())
    check(npz, frames, n=len(want), panels=3)
    assert npz["source_frame"].tolist() == want
    with av.open(str(folder / "out/odd/overlay.mp4")) as container:
        assert container.streams.video[0].average_rate == fps


@pytest.mark.parametrize("args", [[], ["--task_loss_requirement=0.5"]])
def test_live_equals_file(folder, args):
    """Also past a window's end: 10 frames, windows of 4."""
    moving(folder / "live.mkv", 10, 51, 75)
    whole, _, _ = look(folder, "live.mkv", *args)
    live, frames, text = look(folder, "live.mkv", "--live=true", *args)
    assert len(frames) == 10 and "live" in text and "ms_per_frame" in text
    assert whole.keys() == live.keys() and all(np.array_equal(whole[k], live[k]) for k in whole)


def interrupt_after(n, monkeypatch, times=1):
    """Ctrl-C when n frames are drawn, or SIGTERM the second time."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with SIGINT ignored
    draw, drawn = show.View.draw, []

    def draw_and_interrupt(*args):
        drawn.append(1)
        if len(drawn) == n:
            for number in (signal.SIGINT, signal.SIGTERM)[:times]:
                signal.raise_signal(number)
        return draw(*args)

    monkeypatch.setattr(show.View, "draw", draw_and_interrupt)


@pytest.mark.parametrize("interrupt", [False, True])
def test_live_from_a_pipe(folder, interrupt, monkeypatch):
    """Ends with its writer; on Ctrl-C at once, though the writer holds the pipe open."""
    moving(folder / "film.ts", 100, 32, 48, codec="mpeg2video", form="mpegts")
    pipe, done = folder / f"pipe{interrupt}", threading.Event()
    os.mkfifo(pipe)

    def write_slowly():
        with contextlib.suppress(BrokenPipeError), open(pipe, "wb") as file:
            file.write((folder / "film.ts").read_bytes())
            file.flush()
            done.wait(60 if interrupt else 0)

    interrupt_after(6 if interrupt else 1000, monkeypatch)
    writer = threading.Thread(target=write_slowly)
    writer.start()
    npz, frames, _ = look(folder, pipe.name)
    done.set()
    writer.join()
    check(npz, frames, n=6 if interrupt else 100, panels=3)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("name", ["-", "pipe:0"])
def test_standard_input(folder, name):
    moving(folder / "in.ts", 6, 32, 48, codec="mpeg2video", form="mpegts")
    with open(folder / "in.ts", "rb") as film:
        stdin = os.dup(0)
        os.dup2(film.fileno(), 0)
    try:
        npz, frames, _ = look(folder, "stdin", f"--video={name}")
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
    check(npz, frames, n=6, panels=3)


def test_file_interrupted(folder, monkeypatch):
    interrupt_after(1, monkeypatch)
    npz, frames, text = look(folder, "odd.mp4")
    check(npz, frames, n=FRAMES, panels=3)  # the chunk is finished
    assert "stopped after frame 3: 4 frames, not 10" in text


def test_interrupted_twice_leaves_the_files_of_the_last_run(folder, monkeypatch):
    look(folder, "odd.mp4", "--max_frames=1")
    before = {path: path.read_bytes() for path in (folder / "out/odd").iterdir()}
    interrupt_after(1, monkeypatch, times=2)
    with pytest.raises(KeyboardInterrupt):
        with mock.patch("sys.argv", ["show.py", "--device=cpu", f"--video={folder / 'odd.mp4'}",
                                     f"--ckpt={folder / 'model'}", f"--out={folder / 'out/odd'}"]):
            show.main()
    assert {path: path.read_bytes() for path in (folder / "out/odd").iterdir()} == before


@pytest.mark.parametrize("name", ["12:30.mp4", os.fsdecode(b"\xff\xe4.mp4")])
def test_videos_of_any_name(folder, tmp_path, name):
    shutil.copy(folder / "one.mp4", tmp_path / name)
    done = subprocess.run([sys.executable, ROOT / "show.py", "--device=cpu", f"--video={name}",
                           f"--ckpt={folder / 'model'}"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "out" / "gaze" / name[:-4])) == [
        "gaze.json", "gaze.npz", "lock", "overlay.mp4", "sheet.png"]


@pytest.mark.skipif("GAZE_CLIPS" not in os.environ, reason="GAZE_CLIPS names no folder of real videos")
def test_real_clip(folder):
    video = sorted(p for p in Path(os.environ["GAZE_CLIPS"]).resolve().rglob("*") if p.suffix in VIDEO_SUFFIXES)[0]
    npz, frames, _ = look(folder, video, "--max_frames=8", f"--videomae={folder / 'mae'}")
    check(npz, frames, n=8, panels=4)
