"""verify.py on random weights, which must fail in clear words; the real ones cannot be had in tests."""
import pytest
from conftest import normal_video, tiny_gaze, tiny_mae

import verify


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("random")
    tiny_gaze(max_num_frames=16).save_pretrained(path)
    return path


def test_a_random_checkpoint_fails_in_clear_words(folder, toy, capsys, monkeypatch):
    video = sorted((toy / "val").iterdir())[0]
    monkeypatch.setattr("sys.argv", ["verify.py", f"--ckpt={folder}", f"--video={video}"])
    with pytest.raises(SystemExit, match=r"\d+ of \d+ checks differ: .* does not behave as nvidia/AutoGaze"):
        verify.main()
    out = capsys.readouterr().out
    assert "DIFFERS  parameters: " in out and "published: 3258240" in out
    assert "DIFFERS  slots of each frame: [" in out and "published: [198, 10, 10" in out
    assert "DIFFERS  size of the video: (32, 48), published: (448, 448)" in out
    assert "ok       max_num_frames: 16" in out
    assert "SHA-256" in out and "skipped  reconstruction" in out


def test_a_model_of_shorter_clips_is_reported_too(tmp_path, toy, capsys, monkeypatch):
    tiny_gaze(max_num_frames=4).save_pretrained(tmp_path)
    video = sorted((toy / "val").iterdir())[0]
    monkeypatch.setattr("sys.argv", ["verify.py", f"--ckpt={tmp_path}", f"--video={video}"])
    with pytest.raises(SystemExit, match="checks differ"):
        verify.main()
    out = capsys.readouterr().out
    assert "DIFFERS  max_num_frames: 4, published: 16" in out
    assert "skipped  gazes and reconstruction: they are of clips of 16 frames" in out


def test_reconstruction_is_compared_at_every_known_ratio(capsys):
    report = verify.Report()
    verify.check_quality(report, tiny_gaze(), tiny_mae().freeze(), normal_video(1, 2, 40))
    out = capsys.readouterr().out
    assert report.n_checks == 5 * 3 + 2 and "DIFFERS  loss at ratio 0.1: " in out
    assert "share gazed at ratio 0.75, requirement 0.7" in out


def test_the_licence_comes_before_everything(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["verify.py", "--video=none.mp4", "--videomae=bfshi/VideoMAE_AutoGaze"])
    with pytest.raises(FileNotFoundError, match="none.mp4: no such file; it is the example input of AutoGaze's code"):
        verify.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("licence of")] == [
        "licence of nvidia/AutoGaze: NVIDIA licence, non-commercial research only",
        "licence of bfshi/VideoMAE_AutoGaze: NVIDIA licence, non-commercial research only"]
