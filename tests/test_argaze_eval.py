"""ARGaze's evaluation: metrics against the published figures, sums, baselines, and the script as a user runs it."""
import csv
import json
from pathlib import Path

import pytest
import torch
from argaze_tiny import tiny_argaze
from safetensors.torch import load_file

from argaze import eval as gaze_eval
from argaze import make_data
from argaze.data import FIXATION, label_map
from argaze.eval import Metrics, f1_score

GOLDEN = Path(__file__).parent / "golden"
NUMBERS = json.loads((GOLDEN / "argaze_tiny" / "numbers.json").read_text())["metrics"]
NAMES = {"egtea": "egteagaze", "ego4d": "ego4dgaze", "egoexo4d": "Egoexo4dgaze"}


@pytest.fixture(scope="module")
def tensors():
    return load_file(GOLDEN / "argaze_data" / "gt_metrics.safetensors")


def measured(tensors, dataset):
    metrics = Metrics(label_map(dataset))
    counted = torch.tensor(NUMBERS["types"][NAMES[dataset]]) == FIXATION[dataset]
    frames = metrics.add(tensors["metrics.logits"][:, 0].float(), tensors["metrics.xy"], counted)
    return metrics, frames


@pytest.mark.parametrize("dataset", NAMES)
def test_metrics_are_the_published_ones(tensors, dataset):
    metrics, _ = measured(tensors, dataset)
    found, want = metrics.read(), NUMBERS[NAMES[dataset]]
    for name, value in want["best"].items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    assert found["n_frames"] == want["n_tracked"]
    assert found["l2"] == pytest.approx(want["l2_argmax"], abs=1e-6)
    assert found["l2_mean"] == pytest.approx(want["l2_expectation"], abs=1e-6)
    assert found["angle"] == pytest.approx(want["aae_degrees"], abs=1e-4)
    assert found["auc"] == pytest.approx(want["auc_predictions_resized_first"], abs=1e-3)


@pytest.mark.parametrize("dataset", NAMES)
def test_recall_and_precision_agree_at_every_threshold(tensors, dataset):
    metrics, _ = measured(tensors, dataset)
    want = NUMBERS[NAMES[dataset]]
    means = {name: metrics.sums[name] / metrics.n_frames for name in ("recall", "precision")}
    for name, values in means.items():
        assert values.tolist() == pytest.approx(want[name], abs=1e-6), name
    assert f1_score(**means).tolist() == pytest.approx(want["f1"], abs=1e-6)


def test_a_set_in_parts_has_the_metrics_of_the_whole(tensors):
    whole, _ = measured(tensors, "egtea")
    parts = Metrics(label_map("egtea"))
    counted = torch.tensor(NUMBERS["types"]["egteagaze"]) == FIXATION["egtea"]
    for b in range(2):
        parts.add(tensors["metrics.logits"][b:b + 1, 0], tensors["metrics.xy"][b:b + 1], counted[b:b + 1])
    assert parts.read() == pytest.approx(whole.read(), rel=1e-6)


def test_a_set_without_counted_frames_has_no_metrics(tensors):
    metrics = Metrics(label_map("egtea"))
    metrics.add(tensors["metrics.logits"][:, 0], tensors["metrics.xy"], torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="no frame of the set has a gaze point"):
        metrics.read()


def test_a_process_without_a_clip_sums_what_the_others_sum(tensors, monkeypatch):
    sent = []
    monkeypatch.setattr(gaze_eval.run, "all_sum", lambda *values: sent.append(len(values)) or [1.0] * len(values))
    Metrics(label_map("egtea")).read()
    alone = sent.copy()
    sent.clear()
    measured(tensors, "egtea")[0].read()
    assert sent == alone


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["argaze.eval"])
    monkeypatch.setattr(gaze_eval.run, "init_processes", lambda device: (0, 2, torch.device("cpu")))
    with pytest.raises(ValueError, match="without torchrun"):
        gaze_eval.main()


def test_a_perfect_prediction_is_near_the_best_scores(tensors):
    points = torch.rand(1, 6, 2, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    truth = gaze_eval.heatmaps(points, 64, sigma=3.4)
    metrics = Metrics(label_map("egtea"))
    metrics.add(2 * (truth + 1e-8).log(), points, torch.ones(1, 6, dtype=torch.bool))
    found = metrics.read()
    assert found["f1"] > 0.85 and found["l2"] < 0.03 and found["auc"] > 0.99 and found["angle"] < 2


# ---- the script

@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What python -m argaze.eval leaves for an untrained model and all baselines, and its folder."""
    root = tmp_path_factory.mktemp("argaze_eval")
    make_data.make(make_data.Config(out=str(root / "toy"), n_train=6, n_val=3, n_frames=6, size=48, n_workers=1))
    tiny_argaze().save_pretrained(root / "ckpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["argaze.eval", f"--root={root / 'toy'}", f"--ckpt={root / 'ckpt'}", "--stride=1",
                                   "--splits=test,train", f"--out_dir={root / 'out'}", "--n_workers=0", "--worst=2",
                                   "--n_frames=6"])
        gaze_eval.main()
    return json.loads((root / "out" / "eval.json").read_text()), root / "out"


def test_every_method_is_measured_on_every_split(report):
    results = report[0]["splits"]
    assert results.keys() == {"test", "train"}
    for split in results.values():
        assert split.keys() == {"center", "random", "last", "mean", "model"}
        assert all(0 <= values["f1"] <= 1 for values in split.values())


def test_the_last_true_point_beats_the_centre_on_the_toy(report):
    results = report[0]["splits"]["train"]
    assert results["last"]["l2"] < results["center"]["l2"] and results["last"]["f1"] > results["center"]["f1"]


def test_the_rows_of_single_frames_average_to_the_table(report):
    values = report[0]["splits"]["test"]["model"]
    rows = list(csv.DictReader((report[1] / "frames_test.csv").open()))
    counted = [row for row in rows if row["valid"] == "1"]
    assert len(rows) == 18 and len(counted) == values["n_frames"]
    for column, name in (("l2", "l2"), ("recall", "recall"), ("precision", "precision")):
        mean = sum(float(row[column]) for row in counted) / len(counted)
        assert mean == pytest.approx(values[name], abs=2e-6), name


def test_the_worst_clips_are_drawn_and_named(report):
    (key, distance), (_, next_distance) = report[0]["worst"]["test"]
    assert distance >= next_distance and key.startswith("test/")
    assert (report[1] / "worst_test.png").stat().st_size > 1000


def test_both_ways_of_streaming_are_timed(report):
    assert report[0]["speed"].keys() == {"ms_per_frame", "ms_per_frame_anew", "saved"}
