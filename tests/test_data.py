"""data.py and make_data.py on small generated videos. GAZE_CLIPS=folder python -m pytest tests/test_data.py also reads
every video below that folder."""

import copy
import json
import os
import struct
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import data
import lib.labels as label_files
import make_data


def write(path, frames, container_options=None):
    """Like make_data.write_video, but nearly lossless, any size, any container."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "1", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def grey(values, h=32, w=48):
    """A clip whose frame t has grey level values[t]."""
    return np.broadcast_to(np.array(values, np.uint8)[:, None, None, None], (len(values), h, w, 3)).copy()


def levels(frames):
    return [round(v) for v in frames.float().mean((1, 2, 3)).tolist()]


def write_audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.time_base, frame.pts = 16000, Fraction(1, 16000), 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


# ----------------------------------------------------------------------------------------------------------------------
# decoding

@pytest.mark.parametrize("h, w", [(32, 48), (48, 32), (32, 32), (31, 45), (17, 90)])
def test_round_trip(tmp_path, h, w):
    y, x = np.mgrid[:h, :w]
    frames = np.stack([np.stack([y * 255 / h, x * 255 / w, 0 * x + 40 * t], -1) for t in range(5)]).astype(np.uint8)
    got = data.read_frames(write(tmp_path / "a.mp4", frames), 5)
    assert got.dtype == torch.uint8 and got.shape == (5, 3, h, w)
    assert (got.permute(0, 2, 3, 1).numpy().astype(int) - frames).__abs__().mean() < 2


@pytest.mark.parametrize("n_frames, start, stride, wanted", [
    (4, 0, 1, [0, 10, 20, 30]), (3, 2, 3, [20, 50, 80]), (1, 7, 1, [70]), (4, 18, 1, [180, 190, 190, 190]),
    (3, 50, 2, [190, 190, 190])])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_the_right_frames(tmp_path, n_frames, start, stride, wanted, suffix):
    path = write(tmp_path / f"a{suffix}", grey(range(0, 200, 10)))
    assert data.count_frames(path) == 20
    got = levels(data.read_frames(path, n_frames, start, stride))
    assert len(got) == len(wanted) and max(abs(a - b) for a, b in zip(got, wanted, strict=True)) <= 2, got


def test_one_frame(tmp_path):
    path = write(tmp_path / "a.mp4", grey([77]))
    assert data.count_frames(path) == 1 and data.read_frames(path, 3).shape == (3, 3, 32, 48)
    assert len(list(data.decode(path, range(10 ** 15)))) == 1, "all frames, however many they are"


def test_unreadable_files(tmp_path):
    good = write(tmp_path / "good.mp4", grey(range(20))).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(good[:len(good) * 2 // 3])  # the index is at the end of the file
    (tmp_path / "garbage.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "text.mp4").write_text("<html>404 not found</html>")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "codec.mp4").write_bytes(good.replace(b"avc1", b"zzzz"))
    (tmp_path / "folder.mp4").mkdir()
    write_audio(tmp_path / "audio.mp4")
    for name in ("cut", "garbage", "text", "empty", "codec", "folder", "audio", "missing"):
        for read in (data.count_frames, lambda path: data.read_frames(path, 4)):
            with pytest.raises(data.VideoError, match=f"{name}.mp4"):
                read(tmp_path / f"{name}.mp4")


def test_truncated_but_not_lost(tmp_path):
    rng = np.random.default_rng(0)  # noise, so that frames are large and the cut falls between them
    frames = rng.integers(0, 255, (20, 32, 48, 3), dtype=np.uint8)
    good = write(tmp_path / "a.mp4", frames, {"movflags": "faststart"}).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(good[:len(good) // 2])
    got = data.read_frames(tmp_path / "cut.mp4", 20)
    assert got.shape == (20, 3, 32, 48) and (got[-1] == got[-2]).all() and (got[0] != got[-1]).any()


def test_size_changes_in_the_middle(tmp_path):
    for name, h in (("a", 32), ("b", 64)):
        write(tmp_path / f"{name}.h264", grey([100] * 4, h=h))
    joined = tmp_path / "joined.mp4"  # a raw stream under a wrong name: found out by content
    joined.write_bytes((tmp_path / "a.h264").read_bytes() + (tmp_path / "b.h264").read_bytes())
    assert data.read_frames(joined, 8).shape == (8, 3, 32, 48)


def write_as(path, frames, codec, pix_fmt, flags=0, pts=None, **options):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.codec_context.flags |= flags
        for t, frame in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pix_fmt)
            if pts:
                frame.pts, frame.time_base = pts[t], Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


INTERLACED = 0x40000 | 0x20000000  # AV_CODEC_FLAG_INTERLACED_DCT and _ME


X264 = "keyint=20:scenecut=0:bframes=3"


@pytest.mark.parametrize("name, codec, options, vary, skips", [
    ("b.mp4", "libx264", {"x264-params": X264}, False, True),
    ("open.ts", "libx264", {"x264-params": X264 + ":open-gop=1"}, False, True),
    ("vary.mkv", "libx264", {"x264-params": X264}, True, True),
    ("no_index.mkv", "libx264", {"x264-params": X264}, False, True),
    ("refresh.mp4", "libx264", {"x264-params": "keyint=20:intra-refresh=1"}, False, True),  # has no real keyframes
    ("old.avi", "mpeg4", {"g": "20", "bf": "2"}, False, False),
    ("raw.h264", "libx264", {"x264-params": X264}, False, False),  # no time stamps
    ("new.webm", "libvpx-vp9", {"g": "20", "deadline": "realtime", "cpu-used": "8"}, False, True),
    ("cut.ts", "mpeg2video", {"g": "20", "bf": "2"}, False, False),
])
def test_skipping_to_the_keyframe(tmp_path, name, codec, options, vary, skips):
    """Frames are those that decoding from the start gives, bit for bit, also with frames out of order in the file."""
    rng, path = np.random.default_rng(0), str(tmp_path / name)
    noise = rng.integers(0, 256, (72, 64), dtype=np.uint8)
    form = {"ts": "mpegts", "h264": "h264"}.get(name.split(".")[1])
    with av.open(path, "w", format=form, options={"live": "1"} if name == "no_index.mkv" else {}) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000 if vary else 25)
        pts = 0
        for t in range(75):
            frame = av.VideoFrame.from_ndarray(np.roll(noise, 3 * t, axis=1), format="yuv420p")
            frame.pts, frame.time_base = pts, Fraction(1, 1000 if vary else 25)
            pts += int(rng.integers(5, 90)) if vary else 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if name == "cut.ts":
        Path(path).write_bytes(Path(path).read_bytes()[188 * 40:])
    want = dict(data.decode(path, range(75), skip=False))
    assert len({image.tobytes() for image in want.values()}) == len(want) > 50
    assert (data.keyframe_before(path, 50)[0] > 0) == skips
    for first in (1, 19, 20, 21, 38, 39, 40, 41, 50, len(want) - 1, 90):
        wanted = {first, first + 2}
        got = list(data.decode(path, wanted))
        assert [i for i, _ in got] == [i for i, _ in data.decode(path, wanted, skip=False)] and got
        assert all(np.array_equal(image, want[i]) for i, image in got)


@pytest.mark.parametrize("name, codec, pix_fmt, more", [
    ("10 bit.mp4", "libx264", "yuv420p10le", {}), ("grey.mp4", "libx264", "gray", {}),
    ("interlaced.mkv", "libx264", "yuv420p", {"flags": INTERLACED, "x264-params": "tff=1"}),
    ("vfr.mp4", "libx264", "yuv420p", {"pts": [0, 1, 2, 10, 11, 30, 31, 60]}),
    ("b-frames.mov", "libx264", "yuv420p", {"bf": "3"}), ("10 bit.mov", "prores_ks", "yuv422p10le", {}),
    ("vp9.webm", "libvpx-vp9", "yuv420p", {"deadline": "realtime", "cpu-used": "8"}),
    ("mpeg4.avi", "mpeg4", "yuv420p", {"qscale": "2"}), ("mjpeg.avi", "mjpeg", "yuvj444p", {}),
    ("hevc.mkv", "libx265", "yuv420p10le", {"x265-params": "log-level=none"})])
def test_formats(tmp_path, name, codec, pix_fmt, more):
    """Frames come by their number, whatever their times, with the right brightness and size."""
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    values = range(40, 200, 20)
    write_as(tmp_path / name, grey(values, 48, 64), codec, pix_fmt, **more)
    assert data.count_frames(tmp_path / name) == 8
    got = data.read_frames(tmp_path / name, 8)
    assert got.shape == (8, 3, 48, 64)
    if pix_fmt == "gray":  # written as they are, read as the 16..235 that a video without a range tag means
        values = [(v - 16) * 255 / 219 for v in values]
    assert max(abs(a - b) for a, b in zip(levels(got), values, strict=True)) <= 4, levels(got)
    assert data.resize_crop(got, 32).shape == (8, 3, 32, 32)


def with_display_matrix(path, new, matrix):
    """Copy a file of write() with another display matrix (a, b, c, d): x goes to (a, b), y to (c, d)."""
    def fixed(a, b, c, d):
        return struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)

    good = path.read_bytes()
    at = good.index(fixed(1, 0, 0, 1), good.index(b"tkhd"))
    new.write_bytes(good[:at] + fixed(*matrix) + good[at + 36:])
    return new


@pytest.mark.parametrize("matrix, want", [
    ((0, -1, 1, 0), lambda x: np.rot90(x, 1, (1, 2))), ((-1, 0, 0, -1), lambda x: np.rot90(x, 2, (1, 2))),
    ((0, 1, -1, 0), lambda x: np.rot90(x, 3, (1, 2))), ((-1, 0, 0, 1), lambda x: x[:, :, ::-1]),
    ((1, 0, 0, -1), lambda x: x[:, ::-1]), ((0, 1, 1, 0), lambda x: x.swapaxes(1, 2)),
    ((0, -1, -1, 0), lambda x: x[:, ::-1, ::-1].swapaxes(1, 2))])
def test_turned_and_mirrored_videos_come_upright(tmp_path, matrix, want):
    """A phone held sideways, a selfie camera: the file's display matrix says where the stored axes point."""
    frames = grey([60, 60], 32, 48)
    frames[:, :8, :8] = 220  # bright upper left corner
    frames[:, :8, -8:] = 140
    path = with_display_matrix(write(tmp_path / "a.mp4", frames), tmp_path / "turned.mp4", matrix)
    got = data.read_frames(path, 2)
    want = torch.from_numpy(want(frames).copy()).permute(0, 3, 1, 2)
    assert got.shape == want.shape and (got.float() - want.float()).abs().mean() < 2


def test_an_angle_other_than_a_quarter_turn_is_said(tmp_path):
    path = with_display_matrix(write(tmp_path / "a.mp4", grey([60, 60])), tmp_path / "turned.mp4", (2, 1, -1, 2))
    with pytest.warns(UserWarning, match="nearest one is taken"):
        assert data.read_frames(path, 2).shape == (2, 3, 32, 48)


@pytest.mark.parametrize("name", ["12:30.mp4", "file:x.mp4", "a b%20?.mp4", os.fsdecode(b"\xff\xe4.mp4")])
def test_files_of_any_name(tmp_path, name):
    os.rename(write(tmp_path / "a.mp4", grey(range(0, 200, 10))), tmp_path / name)
    assert data.count_frames(tmp_path / name) == 20
    assert levels(data.read_frames(tmp_path / name, 2, start=10)) == pytest.approx([100, 110], abs=2)


@pytest.mark.parametrize("name, form, want", [("a.mp4", "mp4", 16), ("a.ts", "mpegts", 64)])
def test_of_several_tracks_the_default_or_the_largest_is_read(tmp_path, name, form, want):
    """Written in this order, mp4 makes the first track the default one; ts knows no default."""
    with av.open(str(tmp_path / name), "w", format=form) as container:
        streams = []
        for size in (16, 64, 32):
            stream = container.add_stream("libx264", rate=8)
            stream.height, stream.width, stream.pix_fmt = size, size, "yuv420p"
            streams.append(stream)
        for _ in range(3):
            for stream in streams:
                picture = np.full((stream.height, stream.width, 3), stream.height, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    frames = data.read_frames(tmp_path / name, 1)
    assert frames.shape == (1, 3, want, want) and levels(frames) == pytest.approx([want], abs=2)


def test_frames_are_counted_where_the_header_cannot_be_right(tmp_path):
    part = write(tmp_path / "part.mp4", grey(range(0, 250, 5)), {"movflags": "frag_every_frame"})
    with av.open(str(part)) as container:
        assert container.streams.video[0].frames < 10, "the header knows the first fragment"
    assert data.count_frames(part) == 50

    write_as(tmp_path / "lie.avi", grey(range(0, 250, 5)), "mpeg4", "yuv420p")
    movie = (tmp_path / "lie.avi").read_bytes()
    at = movie.index(b"strh") + 8 + 32
    (tmp_path / "lie.avi").write_bytes(movie[:at] + struct.pack("<I", 2 ** 31 - 1) + movie[at + 4:])
    with av.open(str(tmp_path / "lie.avi")) as container:
        assert container.streams.video[0].frames == 2 ** 31 - 1
    assert data.count_frames(tmp_path / "lie.avi") == 50


def test_what_an_edit_list_cuts_off_is_neither_counted_nor_decoded(tmp_path):
    movie = bytearray(write(tmp_path / "a.mp4", grey(range(0, 250, 5))).read_bytes())
    at = movie.index(b"elst") + 12
    duration, begin = struct.unpack(">Ii", movie[at:at + 8])
    with av.open(str(tmp_path / "a.mp4")) as container:
        one_frame = int(1 / (8 * container.streams.video[0].time_base))
    movie[at:at + 8] = struct.pack(">Ii", duration * 33 // 50, begin + 17 * one_frame)
    (tmp_path / "cut.mp4").write_bytes(movie)
    frames = [image for _, image in data.decode(tmp_path / "cut.mp4", range(50))]
    assert data.count_frames(tmp_path / "cut.mp4") == len(frames) == 33
    assert frames[0].mean() == pytest.approx(85, abs=2)


def test_a_frame_that_is_lost_does_not_shift_those_behind_it(tmp_path):
    """Here all bytes of frame 5; its place is taken by the frame before."""
    whole = write(tmp_path / "a.mkv", grey(range(0, 200, 10)))
    with av.open(str(whole)) as source, av.open(str(tmp_path / "hole.mkv"), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                copy = av.Packet(bytes(packet.size) if packet.pts == 5 * 125 else bytes(packet))
                copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
                copy.is_keyframe, copy.stream = packet.is_keyframe, stream
                container.mux(copy)
    got = dict(data.decode(tmp_path / "hole.mkv", range(20)))
    assert len(got) > 15 and all(abs(image.mean() - 10 * i) < 12 for i, image in got.items())


# ----------------------------------------------------------------------------------------------------------------------
# pixels

def triangle(n_in, n_out):
    """(n_out, n_in) weights of an antialiased bilinear resize, from its definition."""
    scale = n_in / n_out
    support = max(scale, 1.0)
    centre = (np.arange(n_out) + 0.5) * scale
    weights = np.maximum(0, 1 - abs(np.arange(n_in) + 0.5 - centre[:, None]) / support)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("h, w, size", [(90, 160, 64), (50, 31, 64), (64, 64, 64), (41, 40, 16), (300, 20, 32)])
def test_resize_crop(h, w, size):
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, h, w), dtype=np.uint8)
    new_h, new_w = size * h // min(h, w), size * w // min(h, w)
    rows = np.rint(frames @ triangle(w, new_w).T)  # 8-bit after each of the two passes
    want = np.rint(triangle(h, new_h) @ rows)[..., (new_h - size) // 2:, (new_w - size) // 2:][..., :size, :size]
    got = data.resize_crop(torch.from_numpy(frames), size)
    assert got.shape == (2, 3, size, size) and got.dtype == torch.uint8 and got.is_contiguous()
    difference = abs(got.numpy() - want)
    assert difference.max() <= 2 and (difference <= 1).mean() > 0.99


def test_resize_by_hand():
    row = torch.tensor([0, 100, 200, 40], dtype=torch.uint8).expand(1, 3, 4, 4)
    # 4 -> 2: triangle of half width 2 around 1 and 3: weights (3, 3, 1)/7 and (1, 3, 3)/7
    assert data.resize_crop(row, 2)[0, 0].tolist() == [[71, 117]] * 2


def test_random_crop():
    frames = torch.arange(90, dtype=torch.uint8).view(1, 1, 1, 90).expand(2, 3, 60, 90)
    crops = [data.resize_crop(frames, 16, "random", torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert (crops[0] == crops[1]).all() and (crops[0] != crops[2]).any() and (crops[0][0] == crops[0][1]).all()
    for h, w in ((60, 90), (4, 300), (1, 1)):
        for _ in range(50):
            top, left, bh, bw = data.random_box(h, w)
            assert 0 <= top <= h - bh and 0 <= left <= w - bw and bh > 0 and bw > 0


def test_normalize():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    y = data.to_model_pixels(x)
    assert y.dtype == torch.float32 and torch.equal(y, data.to_model_pixels(x.float()))
    assert y[0, 0, 0, 0].item() == pytest.approx((-1 - 0.485) / 0.229)
    assert y[0, 2, 15, 15].item() == pytest.approx((1 - 0.406) / 0.225)
    assert torch.allclose(data.from_model_pixels(y), x / 255, atol=1e-6) and data.from_model_pixels(y * 9).max() == 1


# ----------------------------------------------------------------------------------------------------------------------
# clips

@pytest.fixture
def root(tmp_path):
    for name, value in (("a", 10), ("b", 60), ("c", 110)):
        write(tmp_path / "set" / "train" / f"{name}.mp4", grey([value] * 4))
    return tmp_path / "set"


def test_list_videos(root, tmp_path):
    write(tmp_path / "other" / "train" / "0.MP4", grey([1]))
    (root / "train" / "notes.txt").touch()
    (root / "train" / "._a.mp4").touch()
    names = [os.path.basename(p) for p in data.list_videos(f"{root},{tmp_path / 'other'}", "train")]
    assert names == ["a.mp4", "b.mp4", "c.mp4", "0.MP4"]
    assert data.video_key(root / "train" / "a.mp4") == "set/train/a.mp4"
    (root / "val").mkdir()
    for folder, split in ((tmp_path / "nowhere", "train"), (root, "test"), (root, "val"), (f"{root},", "train")):
        with pytest.raises(FileNotFoundError, match="expected videos"):
            data.list_videos(folder, split)


def test_clips(root):
    clips = data.Clips(root, "train", n_frames=6, size=16)
    item = clips[1]
    assert len(clips) == 3 and item["video"].shape == (6, 3, 16, 16) and item["unreadable"] == []
    assert item["key"] == "set/train/b.mp4" and Path(item["path"]) == root / "train" / "b.mp4"
    batch = data.collate([clips[0], clips[2]])
    assert batch["video"].shape == (2, 6, 3, 16, 16) and batch["unreadable"] == []
    assert batch["key"] == ["set/train/a.mp4", "set/train/c.mp4"]


@pytest.mark.parametrize("cache", [False, True])
def test_corrupt_among_good(root, cache):
    bad = root / "train" / "b.mp4"
    bad.write_bytes(b"not a video")
    with pytest.warns(UserWarning, match="b.mp4") as record:
        clips = data.Clips(root, "train", 4, 16, cache=cache)
        items = [clips[i] for i in range(len(clips))] + [clips[i] for i in range(len(clips))]
    assert len(record) == 1
    if cache:
        assert [item["key"][-5] for item in items] == list("acac")
    else:
        assert [item["key"][-5] for item in items] == list("accacc")
        assert data.collate(items)["unreadable"] == [str(bad)] * 2
    assert all(abs(item["video"].float().mean() - {"a": 10, "c": 110}[item["key"][-5]]) < 2 for item in items)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.filterwarnings("ignore:skipped")
def test_all_corrupt(root, cache):
    for path in (root / "train").iterdir():
        path.write_bytes(b"")
    with pytest.raises(data.VideoError, match="all 3 .*unreadable"):
        data.Clips(root, "train", 4, 16, cache=cache)[0]


def test_random_start(tmp_path):
    write(tmp_path / "train" / "a.mp4", grey(range(0, 200, 10)))
    clips = data.Clips(tmp_path, "train", 3, 32, stride=2, random_start=True)
    starts = [round(levels(clips[epoch]["video"])[0] / 10) for epoch in range(60)]
    assert starts[7] == round(levels(clips[7]["video"])[0] / 10), "the same epoch, the same start"
    assert len(set(starts)) > 8 and min(starts) >= 0 and max(starts) <= 15
    with pytest.raises(ValueError, match="cache"):
        data.Clips(tmp_path, "train", 3, 32, crop="random", cache=True)
    with pytest.raises(ValueError, match="labels"):
        data.Clips(tmp_path, "train", 3, 32, random_start=True, labels={})


# ----------------------------------------------------------------------------------------------------------------------
# labels

def test_labelled_clips(root, tmp_path, capsys):
    label = {"gazing_pos": [[1, 0], []], "task_losses": [[0.5, 0.4], []]}
    (tmp_path / "labels.json").write_text(json.dumps({"set/train/c.mp4": label, "set/train/gone.mp4": label}))
    labels = label_files.load_labels(tmp_path / "labels.json")
    clips = data.Clips(root, "train", 2, 16, labels=labels)
    assert "1 videos" in capsys.readouterr().out
    assert len(clips) == 1 and data.collate([clips[0]])["gazing_pos"] == [label["gazing_pos"]]
    with pytest.raises(ValueError, match="set/train/a.mp4.*other/train/x.mp4"):
        data.Clips(root, "train", 2, 16, labels={"other/train/x.mp4": label})


def test_collate_gaze():
    pos = [[[3, 1], [], [9]], [[0], [], [8, 11, 10]]]
    losses = [[[0.5, 0.25], [], [0.75]], [[1.0], [], [3.0, 2.0, 1.0]]]
    before = copy.deepcopy((pos, losses))
    for _ in range(2):  # a second pass sees the same lists
        gaze = data.collate_gaze(pos, losses, n_ids=4)
        assert gaze["gazing_pos"].tolist() == [[3, 1, 9, 12, 12], [0, 4, 8, 11, 10]]
        assert gaze["if_padded_gazing"].int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 0, 0, 0]]
        assert gaze["num_gazing_each_frame"].tolist() == [2, 0, 3]
        assert gaze["task_losses"].tolist() == [[0.5, 0.25, 0.75, 0.75, 0.75], [1, 1, 3, 2, 1]]
    assert (pos, losses) == before
    assert {k: v.dtype for k, v in gaze.items()} == {
        "gazing_pos": torch.int64, "if_padded_gazing": torch.bool, "num_gazing_each_frame": torch.int64,
        "task_losses": torch.float32}
    assert "task_losses" not in data.collate_gaze(pos, None, 4)
    assert data.collate_gaze([[[]], [[2]]], [[[]], [[0.5]]], 4)["task_losses"].tolist() == [[0.0], [0.5]]
    assert data.collate_gaze([[[], []]], None, 4)["gazing_pos"].shape == (1, 0)


def test_packed_labelled_clips(root, tmp_path):
    label = {"gazing_pos": [[1, 0], []], "task_losses": [[0.5, 0.25], []]}
    (tmp_path / "l.json").write_text(json.dumps({f"set/train/{n}.mp4": label for n in "cax"}))
    packed = label_files.pack_labels(tmp_path / "l.json")
    clips = data.Clips(root, "train", 2, 16, labels=label_files.load_labels(packed))
    assert [clips[i]["key"][-5] for i in range(len(clips))] == ["a", "c"]
    assert clips[1]["gazing_pos"] == label["gazing_pos"] and clips[1]["task_losses"] == label["task_losses"]


# ----------------------------------------------------------------------------------------------------------------------
# make_data.py

def test_toy(tmp_path):
    def make(name, **keys):
        cfg = make_data.ToyConfig(**{"n_train": 4, "n_val": 2, "n_workers": 1, **keys, "out": str(tmp_path / name)})
        make_data.toy(cfg)
        return {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.mp4")}

    a, b, c = make("a"), make("b", n_train=5), make("c", seed=1)
    assert len(a) == 6 and all(b[name] == a[name] != c[name] for name in a) and len(set(a.values())) == 6
    assert data.Clips(tmp_path / "a", "val", 8, 64)[0]["video"].float().std() > 10
    os.remove(tmp_path / "a" / "train" / "000002.mp4")
    assert make("a") == a
    with pytest.raises(ValueError, match="other settings"):
        make("a", seed=1)
    for height, width, n_frames in ((16, 16, 1), (2, 64, 2), (200, 90, 3)):
        cfg = make_data.ToyConfig(height=height, width=width, n_frames=n_frames)
        for i in range(12):
            clip = make_data.render_clip(np.random.default_rng(i), cfg)
            assert clip.shape == (n_frames, height, width, 3) and clip.dtype == np.uint8


def test_bounce():
    assert make_data.bounce(3, 2, 6, 5).tolist() == [3, 5, 3, 1, 1, 3]
    assert make_data.bounce(1, -2, 3, 5).tolist() == [1, 1, 3] and make_data.bounce(0, 3, 2, 0).tolist() == [0, 0]


def test_cut(tmp_path, capsys):
    for name, n in (("x/a", 40), ("y/a", 40), ("x/short", 3)):
        write(tmp_path / "src" / f"{name}.mp4", grey([5 * i for i in range(n)]))
    (tmp_path / "src" / "bad.mp4").write_bytes(b"")
    cfg = make_data.CutConfig(src=str(tmp_path / "src"), out=str(tmp_path / "out"), n_frames=4, stride=2, size=16,
                              hop=5, max_windows=4, val_videos=1, seed=2, n_workers=1)
    with pytest.warns(UserWarning, match="1 of 4 source files") as record:
        make_data.COMMANDS["cut"][1](cfg)
    assert len(record) == 1
    made = sorted(p.name for p in (tmp_path / "out").rglob("*.mp4"))
    assert made == [f"a{n}_{s:06d}.mp4" for n in ("-1", "") for s in (0, 10, 20, 30)] + ["short_000000.mp4"]
    window = next((tmp_path / "out").rglob("a_000010.mp4"))
    assert data.read_frames(window, 4).shape == (4, 3, 16, 24)
    assert max(abs(a - b) for a, b in zip(levels(data.read_frames(window, 4)), [50, 60, 70, 80], strict=True)) < 4
    sources = {split: {p.name.split("_")[0] for p in (tmp_path / "out" / split).glob("*.mp4")}
               for split in ("train", "val")}
    assert len(sources["val"]) == 1 and not sources["train"] & sources["val"]
    for path in (tmp_path / "src").rglob("*.mp4"):
        path.write_bytes(b"")
    with pytest.raises(data.VideoError, match="4 of 4"):
        make_data.COMMANDS["cut"][1](make_data.CutConfig(src=cfg.src, out=str(tmp_path / "none"), n_workers=1))


def test_cut_squares_stay_where_they_are_and_differ_between_windows(tmp_path):
    slope = np.zeros((40, 60, 3), np.uint8)
    slope[..., 0] = np.arange(40)[:, None] * 6
    slope[..., 1] = np.arange(60) * 4
    for name in ("a", "b"):
        make_data.write_video(tmp_path / "src" / f"{name}.mp4", [slope] * 24)
    cfg = make_data.CutConfig(src=str(tmp_path / "src"), out=str(tmp_path / "out"), n_frames=4, stride=2, size=16,
                              hop=8, val_videos=1, n_workers=1, zoom=0.5)
    make_data.COMMANDS["cut"][1](cfg)
    places = []
    for window in sorted((tmp_path / "out").rglob("*.mp4")):
        frames = data.read_frames(window, 4).float()               # (T, 3, 16, 16)
        assert (frames - frames[0]).abs().max() < 8
        places.append(frames[0, :2].mean((1, 2)))
    places = torch.stack(places)
    assert len(places) >= 4
    assert torch.pdist(places).min() > 1


def test_scan(tmp_path):
    for name, h, w in (("large", 90, 120), ("small", 20, 70), ("exact", 32, 32)):
        image = np.zeros((h, w, 3), np.uint8)
        image[..., 0], image[..., 1] = np.arange(h)[:, None] * 2, np.arange(w) * 2
        (tmp_path / "src").mkdir(exist_ok=True)
        with av.open(str(tmp_path / "src" / f"{name}.png"), "w", format="image2") as container:
            stream = container.add_stream("png", rate=1)
            stream.height, stream.width, stream.pix_fmt = h, w, "rgb24"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
    cfg = make_data.ScanConfig(src=str(tmp_path / "src"), out=str(tmp_path / "out"), n_frames=4, window=32, step=10,
                               n_per_image=2, n_workers=1)
    make_data.COMMANDS["scan"][1](cfg)
    made = list((tmp_path / "out").rglob("*.mp4"))
    assert len(made) == 6 and all(data.read_frames(p, 4).shape == (4, 3, 32, 32) for p in made)
    corners = data.read_frames(next(p for p in made if p.name == "large_000.mp4"), 4)[:, :2].float().mean((2, 3)) / 2
    assert (corners - corners[0]).abs().sum() > 5  # the window moves


@pytest.mark.parametrize("cls, key, value", [(make_data.ToyConfig, "height", 95), (make_data.CutConfig, "stride", 0),
                                             (make_data.ScanConfig, "val_fraction", 0.0)])
def test_settings_are_checked(cls, key, value):
    with pytest.raises(ValueError, match=key):
        cls(**{key: value}).check()


def test_help_lists_the_keys_of_all_commands(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["make_data.py", "-h"])
    make_data.main()
    text = capsys.readouterr().out
    assert all(f"\n{word}" in text for word in ("toy:", "cut:", "scan:", "  --n_train=", "  --hop=", "  --window="))


@pytest.mark.skipif("GAZE_CLIPS" not in os.environ, reason="GAZE_CLIPS names no folder of videos")
def test_real_clips():
    paths = [p for p in Path(os.environ["GAZE_CLIPS"]).rglob("*") if p.suffix.lower() in data.VIDEO_SUFFIXES]
    assert paths
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in paths:
            assert data.count_frames(path) > 0
            video = data.resize_crop(data.read_frames(path, 16), 224)
            assert video.shape == (16, 3, 224, 224) and video.float().std() > 5, path
