"""Label files: what is refused, and that packed ones say the same as the JSON they were made of."""
import json
import pickle

import numpy as np
import pytest

import lib.labels as label_files


@pytest.mark.parametrize("text", ['{"a": {"gazing_pos": [[1', "[]", '{"a": {"gazing_pos": []}}', ""])
def test_broken_label_file(tmp_path, text):
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(ValueError, match="labels.json"):
        label_files.load_labels(tmp_path / "labels.json")


GOOD = ([[3, 1], [], [9]], [[0.5, 0.4], [], [0.1]])  # 3 frames of 4 ids


@pytest.mark.parametrize("pos, losses, message", [
    (GOOD[0][:2], GOOD[1][:2], "2 frames"),
    (GOOD[0], GOOD[1][:2], "2 of losses"),
    ([[3, 1], [], [3]], GOOD[1], "frame 2: id 3"),
    ([[4, 1], [], [9]], GOOD[1], "frame 0: id 4"),
    ([[-1, 1], [], [9]], GOOD[1], "frame 0: id -1"),
    ([[3, 1.0], [], [9]], GOOD[1], "frame 0: id 1.0"),
    ([[3, 3], [], [9]], GOOD[1], "frame 0 takes a patch twice"),
    ([[3], [], [9]], GOOD[1], "frame 0 has 1 gazes but 2 losses"),
    (GOOD[0], [[0.5, 0.4], [], [float("nan")]], "frame 2 has a loss"),
    (GOOD[0], [[0.5, 0.4], [], [None]], "frame 2 has a loss")])
def test_check_label(pos, losses, message):
    label_files.check_label("key", {"gazing_pos": GOOD[0], "task_losses": GOOD[1]}, 3, 4, "l.json")
    with pytest.raises(ValueError, match=message) as error:
        label_files.check_label("set/train/a.mp4", {"gazing_pos": pos, "task_losses": losses}, 3, 4, "l.json")
    assert "l.json" in str(error.value) and "set/train/a.mp4" in str(error.value)


@pytest.fixture
def labels():
    rng = np.random.default_rng(0)
    frames = [[rng.permutation(9)[:n] + 9 * t for t, n in enumerate(row)] for row in rng.integers(0, 5, (40, 3))]
    return {f"dätä\udcff/train/{name}.mp4": {"gazing_pos": [f.tolist() for f in frames[i]],
                                           "task_losses": [rng.random(len(f)).round(6).tolist() for f in frames[i]]}
            for i, name in enumerate(rng.permutation(40))}


def test_packed_labels(tmp_path, labels):
    (tmp_path / "l.json").write_text(json.dumps(labels))
    packed = label_files.load_labels(label_files.pack_labels(tmp_path / "l.json"))
    assert len(packed) == 40 and set(packed) == set(labels)
    for key, label in labels.items():
        assert packed[key]["gazing_pos"] == label["gazing_pos"]
        for a, b in zip(packed[key]["task_losses"], label["task_losses"], strict=True):
            assert (np.array(a, np.float32) == np.array(b, np.float32)).all()
    key = next(iter(labels))
    assert packed.known([key, "x", key + "y", "dätä"]) == [True, False, False, False]
    for missing in ("x", key + "y", "", "zzz/" * 20):
        with pytest.raises(KeyError):
            packed[missing]
    assert packed.fits(3, 9) and not packed.fits(4, 9) and not packed.fits(3, 8) and not packed.fits(3, 10)
    label_files.check_labels(packed, 3, 9, "l")
    copied = pickle.dumps(packed)
    assert len(copied) < 300 and pickle.loads(copied)[key] == packed[key], "workers get the path, not the labels"
    (tmp_path / "l.json").write_text(json.dumps(labels) + " ")
    with pytest.warns(UserWarning, match="changed since it was packed"):
        label_files.load_labels(tmp_path / "l.packed")
    (tmp_path / "bad.json").write_text(json.dumps(labels | {"x": {"gazing_pos": [], "task_losses": []}}))
    with pytest.raises(ValueError, match="expected 3"):
        label_files.pack_labels(tmp_path / "bad.json", tmp_path / "l.packed")
    with pytest.warns(UserWarning):
        assert len(label_files.load_labels(tmp_path / "l.packed")) == 40, "what was packed before survives"
    with pytest.raises(FileExistsError, match="another name"):
        label_files.pack_labels(tmp_path / "l.json", tmp_path)


def test_two_labels_of_a_name(tmp_path):
    (tmp_path / "l.json").write_text('{"a": {"gazing_pos": [], "task_losses": []}, "a": {"gazing_pos": [], '
                                     '"task_losses": []}}')
    with pytest.raises(ValueError, match="two entries for 'a'"):
        label_files.pack_labels(tmp_path / "l.json")
