"""What eval.py measures: figures by hand, motion vectors of a drawn video, one run with every option."""
import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import normal_video, tiny_gaze, tiny_mae

import eval as ev
from data import VideoError, read_frames, read_motion, resize_crop

ROOT = Path(__file__).parent.parent
C = tiny_mae().config  # 16+32 px, patch 8: ids 0..3 and 4..19


# ----------------------------------------------------------------------------------------------------------------------
# figures by hand

def test_psnr_by_hand():
    a = torch.full((2, 3, 8, 8), 0.5)
    assert ev.psnr(a, a + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)).tolist() == pytest.approx([20, 40], abs=1e-3)
    assert ev.psnr(a, a).tolist() == [100, 100]


def test_ssim_by_hand():
    """Plain pictures have no variance, a picture of window size has one window; and the same picture is 1."""
    a, b = torch.full((2, 3, 16, 24), 0.2), torch.full((2, 3, 16, 24), 0.6)
    want = (2 * 0.2 * 0.6 + 1e-4) / (0.2 ** 2 + 0.6 ** 2 + 1e-4)
    assert ev.ssim(a, b).tolist() == pytest.approx([want] * 2, abs=1e-5)
    x, y = torch.rand(2, 1, 3, 11, 11, generator=torch.Generator().manual_seed(0)).double().numpy()
    at = np.exp(-(np.arange(11) - 5) ** 2 / 4.5)
    w = np.outer(at, at) / at.sum() ** 2
    channels = []
    for p, q in zip(x[0], y[0], strict=True):
        mp, mq = (w * p).sum(), (w * q).sum()
        vp, vq, cov = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum(), (w * (p - mp) * (q - mq)).sum()
        channels.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp ** 2 + mq ** 2 + 1e-4) * (vp + vq + 9e-4)))
    x, y = (torch.from_numpy(v).float() for v in (x, y))
    assert ev.ssim(x, y).item() == pytest.approx(np.mean(channels), abs=1e-5)
    assert ev.ssim(x, x).item() == pytest.approx(1, abs=1e-5)
    assert ev.ssim(x, 1 - x).item() < 0
    assert ev.ssim(x[..., :8, :8], y[..., :8, :8]).shape == (1,), "smaller than the window"


def test_needed_ratios_by_hand():
    points = [(0.2, 0.5), (0.1, 0.9), (0.4, 0.3)]
    results = {str(r): {"a": {"ratio": r, "loss": loss}} for r, loss in points}
    results["0.2"]["b"] = results["0.1"]["b"] = {"ratio": 0.2, "loss": 0.6}  # greedy may lack a ratio
    needed = [ev.needed_ratios(results, target) for target in (0.7, 0.5, 0.4, 0.9, 0.2)]
    assert [n["a"] for n in needed] == [pytest.approx(0.15), pytest.approx(0.2), pytest.approx(0.3), "at most 0.100",
                                        "not by 0.400"]
    assert needed[0]["b"] == "at most 0.200" and needed[1]["b"] == "not by 0.200"


def gazing_of(ids):
    """One clip: per frame a list of ids within it."""
    return ev.from_lists([torch.tensor([i]) for i in ids], 20, "cpu")


def test_motion_and_detail_under_gazes():
    video = torch.full((1, 3, 3, 32, 32), 0.5)
    video[:, 1, :, 8:16, 16:24] += 0.3  # fine patch 1 * 4 + 2, id 10, in coarse patch id 1; changes back in frame 2
    motion = ev.per_patch(ev.changes(video), C)

    def score(ids):
        return ev.over_mean(*ev.under_gazes(gazing_of(ids), motion, C).sum(0).tolist())
    assert score([[0], [10], [10]]) == pytest.approx(16), "one of 16 patches has all of it"
    assert score([[10], [1], [1]]) == pytest.approx(4)
    assert score([[10], [10, 4], [5]]) == pytest.approx(16 / 3) and score([[10], [4], [5]]) == 0
    still = torch.zeros_like(motion)
    assert ev.over_mean(*ev.under_gazes(gazing_of([[0], [1], [2]]), still, C).sum(0).tolist()) == 1

    sums = ev.under_gazes(gazing_of([[0], [10, 3], [5]]), ev.per_patch(ev.details(video), C), C)
    assert sums[:, 0].tolist() == [2, 2]
    coarse, fine = (ev.over_mean(*row) for row in sums.tolist())
    assert coarse == 0 and fine == pytest.approx(16 * (14 + 2 ** 0.5) / (30 + 2 ** 0.5)), "of its outline"
    assert ev.over_mean(*ev.under_gazes(gazing_of([[5], [4], [4]]), motion, C)[0].tolist()) is None, "no coarse gaze"


def test_random_gazes_of_noise_score_one():
    video = normal_video(64, 3)
    gazing = ev.random_gazing([5, 5, 5], 64, 20, torch.Generator().manual_seed(0))
    for x in (ev.changes(video), ev.details(video)):
        sums = ev.under_gazes(gazing, ev.per_patch(x, C), C)
        assert [ev.over_mean(*row) for row in sums.tolist()] == pytest.approx([1, 1], abs=0.02)


def test_ranked_gazing_takes_what_changes(video):
    change = torch.zeros(3, 4, 32, 32)
    change[:, 2, 8:16, 16:24] = 1  # all of fine patch id 10, a quarter of coarse patch id 1
    frames = ev.ranked_gazing(change, [3, 2, 2, 1], C)
    ids = (frames["gazing_pos"] % 20)[0].split([3, 2, 2, 1])
    assert ids[0].tolist() == ev.uniform_order(C)[:3] and ids[2].tolist() == [10, 1]
    still = ids[1].tolist() + ids[3].tolist()
    assert len(set(still)) == 3 and min(still) >= 4, "where nothing changes, other fine patches in every frame"


def test_tiles_are_those_of_generate(gaze):
    """The gaze of a whole frame at twice the side is that of its tiles taken as clips."""
    items = [{"video": torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8,
                                     generator=torch.Generator().manual_seed(i))} for i in range(2)]
    (i, tiles, moved), = ev.batches(ev.Config(batch_size=8), items, C, "cpu", None)
    assert i == 0 and moved is None and tiles.shape == (8, 4, 3, 32, 32)
    whole = torch.stack([ev.to_model_pixels(x["video"]) for x in items])
    assert torch.equal(tiles[1], whole[0, :, :, :32, 32:]) and torch.equal(tiles[6], whole[1, :, :, 32:, :32])
    mask = gaze.generate(whole, gazing_ratio=0.3, target_scales="32+64")["gazing_mask"][1].view(2, 4, 8, 8)
    part = gaze.generate(tiles, gazing_ratio=0.3)["gazing_mask"][1].view(8, 4, 4, 4)
    assert torch.equal(mask[0, :, :4, 4:], part[1]) and torch.equal(mask[1, :, 4:, :4], part[6])


# ----------------------------------------------------------------------------------------------------------------------
# motion vectors

def moving_square(path, name="libx264", shape=(96, 144), step=4, n=9, **options):
    """A textured square of 32 px that goes right by `step` per frame, over a textured background that rests."""
    rng, (h, w) = np.random.default_rng(0), shape
    back, square = (rng.integers(0, 255, (a // 4, b // 4, 3)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
                    for a, b in (shape, (32, 32)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(name, rate=8, options=options)
        stream.height, stream.width, stream.pix_fmt = h, w, "yuvj420p" if name == "mjpeg" else "yuv420p"
        stream.bit_rate = 4_000_000
        for t in range(n):
            image = back.copy()
            image[h // 2 - 16:h // 2 + 16, w // 2 - 32 + step * t:w // 2 + step * t] = square
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def centre(x):
    y_x = torch.stack(torch.meshgrid(*(torch.arange(n) + 0.5 for n in x.shape), indexing="ij"))
    return ((y_x * x).sum((1, 2)) / x.sum()).tolist()


@pytest.mark.parametrize("name, shape, options", [
    ("libx264", (96, 144), {"preset": "ultrafast"}), ("libx264", (160, 112), {"bf": "2"}), ("mpeg4", (96, 144), {})])
def test_vectors_lie_on_the_moving_square(tmp_path, name, shape, options):
    """Where it is, with source frames between the clip's, in landscape and portrait, with and without B-frames."""
    path, stride = moving_square(tmp_path / "a.mp4", name, shape, **options), 2
    moved = read_motion(path, 4, 48, stride)
    video = resize_crop(read_frames(path, 4, 0, stride), 48).float()
    assert moved.shape == (4, 48, 48) and (moved[0] == 0).all()
    scale = min(shape) / 48
    for t in (1, 2, 3):
        x = (shape[1] / 2 - 16 + 4 * (stride * t - 0.5) - (shape[1] - min(shape)) / 2) / scale  # between the two frames
        assert centre(moved[t]) == pytest.approx([24, x], abs=4)
        inside = moved[t, 20:28, int(x) - 4:int(x) + 4].mean()
        assert inside > 5 * moved[t, :8].mean() and inside > 2 * stride
        if "bf" not in options:  # a vector to a frame further away is longer
            assert inside == pytest.approx(4 * stride, rel=0.5)
        change = (video[t] - video[t - 1]).abs().mean(0)
        assert centre(change) == pytest.approx(centre(moved[t]), abs=4), "the pixels' geometry"


def test_short_and_intra_only_videos(tmp_path):
    short = moving_square(tmp_path / "a.mp4", n=3)
    moved = read_motion(short, 5, 32)
    assert (moved[1:3].amax((1, 2)) > 1).all() and (moved[3:] == 0).all(), "the last frame is repeated"
    assert read_motion(moving_square(tmp_path / "b.mp4", n=1), 2, 32).abs().sum() == 0
    assert read_motion(moving_square(tmp_path / "c.avi", "mjpeg"), 4, 32) is None
    (tmp_path / "d.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match="d.mp4"):
        read_motion(tmp_path / "d.mp4", 4, 32)


# ----------------------------------------------------------------------------------------------------------------------
# the script

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    tiny_mae().save_pretrained(folder / "mae")
    tiny_gaze().save_pretrained(folder / "a")
    return folder


def test_every_option(trained, toy):
    (trained / "seconds.txt").write_text("data 3\nvideomae 61.5\n")
    args = ["--videomae=mae", "--models=a=a", f"--root={toy}", "--out_dir=out", "--n_frames=2", "--alpha=1",
            "--ratios=0.3,1", "--batch_size=2", "--greedy_clips=0", "--codec=true", "--requirements=0.5,1,1.5,2,2.5",
            "--target_loss=0.9", "--report=report.json", "--device=cpu"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, ROOT / "eval.py", *args], cwd=trained, env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((trained / "out" / "eval.json").read_text())
    assert result["clips"] == 3 and result["finished"] and list(result["results"]) == ["0.3", "1"]
    methods = ["random", "uniform", "frame_diff", "codec", "a"]
    table, full = result["results"]["0.3"], result["results"]["1"]
    assert list(table) == [*methods, "greedy"] and list(full) == methods
    assert table["greedy"]["loss"] == min(row["loss"] for row in table.values()) and table["greedy"]["psnr"] > 0
    for row in full.values():  # all patches, whatever the order: the same for all
        assert row["ratio"] == 1
        for key in ("loss", "psnr", "ssim", "motion", "detail_per_scale"):
            assert row[key] == pytest.approx(full["random"][key], rel=1e-3), key
        assert row["motion"] == pytest.approx(1, rel=1e-4) and row["share_per_scale"] == pytest.approx([0.2, 0.8])
    assert table["frame_diff"]["motion"] > 1.2 * table["uniform"]["motion"]
    assert result["needed"].keys() == table.keys()
    for rows in result["stops"].values():
        assert len(rows) == 5 and all(0 <= r["share_met"] <= 1 for r in rows)
        ratios = [r["ratio"] for r in rows]
        assert ratios == sorted(ratios, reverse=True) and ratios[0] > ratios[-1] >= 1 / 20
    names = {p.stem for p in (trained / "out").glob("*.png")}
    assert {"loss_against_ratio", "motion_and_detail", "predicted_against_measured", "gaze_codec", "gaze_a"} <= names

    report = json.loads((trained / "report.json").read_text())
    assert list(report) == ["loss", "ratio", "gap_closed", "seconds", "seed", "clips", "commit"]
    assert report["loss"] == {name: row["loss"] for name, row in table.items()}
    assert report["gap_closed"]["random"] == 0 and report["gap_closed"]["greedy"] == 100
    assert report["seconds"].pop("eval") > 0
    assert report["seconds"] == {"data": 3, "videomae": 61.5} and report["ratio"] == 12 / 40
    line = next(line for line in done.stdout.splitlines() if line.startswith("a ") and "%" in line)
    assert line.split()[1] == f"{table['a']['loss']:.4f}" and line.split()[4] == f"{table['a']['predicted']:.4f}"


def run(monkeypatch, folder, *args):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["eval.py", "--videomae=mae", "--n_frames=2", "--ratios=0.3", "--greedy=false",
                                      "--device=cpu", *args])
    ev.main()


def test_a_larger_side_is_measured_in_tiles(trained, toy, monkeypatch):
    run(monkeypatch, trained, f"--root={toy}", "--out_dir=small")
    run(monkeypatch, trained, f"--root={toy}", "--out_dir=large", "--side=64", "--batch_size=5")
    small, large = (json.loads((trained / f / "eval.json").read_text())["results"]["0.3"] for f in ("small", "large"))
    assert small["uniform"]["clips"] == 3 and large["uniform"]["clips"] == 12
    assert large["uniform"]["loss"] != small["uniform"]["loss"]


def test_wrong_settings(trained, toy, monkeypatch, capsys):
    with pytest.raises(ValueError, match="side=48.*multiple of 32"):
        run(monkeypatch, trained, f"--root={toy}", "--side=48")
    for wrong in ("--requirements=low", "--models=a", "--models=a=x,a=y", "--models=random=x", "--models==x"):
        with pytest.raises(SystemExit):
            run(monkeypatch, trained, f"--root={toy}", wrong)
        assert f"error: {wrong[2:]}: write" in capsys.readouterr().err


def test_a_crash_keeps_what_was_measured(trained, toy, tmp_path, monkeypatch):
    args, measure, calls = [f"--root={toy}", "--models=a=a", "--ratios=0.3,1"], ev.measure, []

    def die(*args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("dies")
        return measure(*args)
    run(monkeypatch, trained, *args, f"--out_dir={tmp_path / 'whole'}")
    monkeypatch.setattr(ev, "measure", die)
    with pytest.raises(RuntimeError, match="dies"):
        run(monkeypatch, trained, *args, f"--out_dir={tmp_path / 'part'}")
    whole, part = (json.loads((tmp_path / f / "eval.json").read_text()) for f in ("whole", "part"))
    assert whole["finished"] and not part["finished"] and not (tmp_path / "part" / ".eval.json").exists()
    assert part["results"] == {"0.3": whole["results"]["0.3"]}


def test_without_motion_vectors_codec_is_left_out(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "val").mkdir()
    moving_square(tmp_path / "val" / "a.mp4")
    moving_square(tmp_path / "val" / "b.avi", "mjpeg")
    run(monkeypatch, trained, f"--root={tmp_path}", "--out_dir=left_out", "--codec=true")
    assert "codec is left out: 1 of 2 files, such as" in capsys.readouterr().out
    report = json.loads((trained / "left_out" / "eval.json").read_text())
    assert list(report["results"]["0.3"]) == ["random", "uniform", "frame_diff"] and "stops" not in report
