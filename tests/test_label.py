"""label.py: the fast greedy search against the definition, budgets, and restarts."""
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import normal_video, tiny_gaze, tiny_mae
from safetensors.torch import load_file

import label
import train_ntp
from data import collate_gaze
from gazing import join_frames
from lib import run as processes
from lib.labels import check_label, load_labels
from videomae import ReconstructionLoss

ROOT = Path(__file__).parent.parent
V = 20


def gazing_of(frames):
    """Ids within the frame, lists over frames, of one clip -> gaze dict."""
    return join_frames([(torch.tensor([ids], dtype=torch.long) + V * t, torch.zeros(1, len(ids), dtype=torch.bool))
                        for t, ids in enumerate(frames)])


@torch.inference_mode()
def greedy_naive(mae, video, budgets):
    """The definition: a whole forward pass for every candidate."""
    ids, losses = [], []
    for t, n_t in enumerate(budgets):
        ids.append([])
        losses.append([])
        for _ in range(n_t):
            tried = {}
            for i in set(range(V)) - set(ids[t]):
                gazing = gazing_of([*ids[:t], [*ids[t], i]])
                tried[i] = float(mae(video[None, :t + 1], gazing, [t])[1])
            best = min(tried, key=tried.get)
            ids[t].append(best)
            losses[t].append(tried[best])
    return ids, losses


# ----------------------------------------------------------------------------------------------------------------------
# the search

@pytest.mark.parametrize("seed, budgets, max_candidates", [
    (0, [3, 2, 1, 2], 512), (1, [1, 1, 1, 1], 7), (2, [5, 1, 3, 1], 1), (3, [20, 1, 1, 20], 512)])
def test_greedy(seed, budgets, max_candidates):
    """Equal to whole forward passes, and each recorded loss is what the reconstructor says about the gazes so far."""
    mae, video = tiny_mae(seed).freeze(), normal_video(1, seed=seed)
    ids, losses = label.greedy(mae, video[0], budgets, max_candidates)
    assert [len(f) for f in ids] == [len(f) for f in losses] == budgets
    if max(budgets) < V:  # the slow way
        naive_ids, naive_losses = greedy_naive(mae, video[0], budgets)
        assert ids == naive_ids
        for a, b in zip(losses, naive_losses, strict=True):
            assert a == pytest.approx(b, abs=1e-5)
    for t in range(4):
        for j in range(budgets[t]):
            so_far = [*ids[:t], ids[t][:j + 1]]
            measured = mae(video[:, :t + 1], gazing_of(so_far), [t])[1]
            assert losses[t][j] == pytest.approx(measured.item(), abs=1e-5)
        assert len(set(ids[t])) == budgets[t] and set(ids[t]) <= set(range(V))


def test_greedy_with_perceptual_loss(networks):
    mae, video = tiny_mae(), normal_video(1)[0]
    folders = {name: folder for name, (folder, _) in networks.items()}
    mae.loss = ReconstructionLoss("l1+dinov2_reg+siglip2", "1+0.3+0.3", **folders)
    (ids, losses), (naive_ids, naive_losses) = (f(mae.freeze(), video, [2, 1, 1, 1]) for f in (
        label.greedy, greedy_naive))
    assert ids == naive_ids
    for a, b in zip(losses, naive_losses, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_every_pick_is_the_best(mae):
    """By brute force over all patches not yet taken, for the first and a later frame."""
    video = normal_video(1)
    ids, losses = label.greedy(mae, video[0], [3, 2, 2, 1])
    for t, j in [(0, 0), (0, 2), (2, 1), (3, 0)]:
        tried = {}
        for i in set(range(V)) - set(ids[t][:j]):
            frames = [*ids[:t], [*ids[t][:j], i]]
            tried[i] = mae(video[:, :t + 1], gazing_of(frames), [t])[1].item()
        assert ids[t][j] == min(tried, key=tried.get)
        assert losses[t][j] == pytest.approx(min(tried.values()), abs=1e-5)
    assert len({round(x, 4) for x in tried.values()}) > 5, "candidates should differ"


def test_every_pick_is_the_best_of_those_tried(mae):
    """The losses are true ones, nothing is taken twice, and the generator alone decides."""
    video = normal_video(1)[0]

    def sampled(n_tried, seed):
        return label.greedy(mae, video, [3, 2, 2, 20], n_tried=n_tried, generator=torch.Generator().manual_seed(seed))
    ids, losses = sampled(5, 0)
    assert sampled(5, 0) == (ids, losses)
    assert sampled(5, 1)[0] != ids
    assert [len(set(frame)) for frame in ids] == [3, 2, 2, 20]

    exact_ids, exact_losses = label.greedy(mae, video, [3, 2, 2, 20])
    all_ids, all_losses = sampled(V, 0)
    assert all_ids == exact_ids
    assert sum(all_losses, []) == pytest.approx(sum(exact_losses, []), abs=1e-5)
    assert exact_losses[0][0] < losses[0][0], "five of twenty miss the best"

    order = torch.randperm(V, generator=torch.Generator().manual_seed(0))
    tried = {i: mae(video[None, :1], gazing_of([[i]]), [0])[1].item() for i in order[:5].tolist()}
    assert ids[0][0] == min(tried, key=tried.get)
    assert losses[0][0] == pytest.approx(min(tried.values()), abs=1e-5)


def test_budgets():
    """They depend on the seed and the clip's name only, and keep to the ratios asked for."""
    cfg = label.Config(n_frames=4, ratio_min=0.1, ratio_max=0.4)
    keys = [f"toy/train/{i:06d}.mp4" for i in range(400)]
    budgets = [label.clip_budgets(cfg, k, 400) for k in keys]
    assert [label.clip_budgets(cfg, k, 400) for k in reversed(keys)] == budgets[::-1]
    torch.manual_seed(5)
    assert label.clip_budgets(cfg, keys[7], 400) == budgets[7]
    reseeded = label.Config(n_frames=4, ratio_min=0.1, ratio_max=0.4, seed=1)
    assert label.clip_budgets(reseeded, keys[7], 400) != budgets[7]
    assert len({tuple(b) for b in budgets}) > 390
    table = torch.tensor(budgets, dtype=torch.float64)
    assert table.min() >= 1 and table.max() <= 400
    shares = table.sum(1) / (4 * 400)
    assert shares.min() > 0.08 and shares.max() < 0.401 and shares.min() < 0.12 and shares.max() > 0.3
    assert table.mean(0)[0] / table.mean(0)[1:].mean() == pytest.approx(10 / 3, rel=0.2)  # less where a frame is full


# ----------------------------------------------------------------------------------------------------------------------
# the command

@pytest.fixture(scope="module")
def job(tmp_path_factory, toy):
    """Arguments of a small labelling job (4 clips), and the labels of an uninterrupted run in this process."""
    folder = tmp_path_factory.mktemp("label")
    tiny_mae().save_pretrained(folder / "mae")
    args = [f"--root={toy}", f"--videomae={folder / 'mae'}", "--splits=train", "--n_frames=4", "--ratio_min=0.1",
            "--exact=false", "--n_tried=8", "--max_clips=4", "--device=cpu"]
    run(args, folder / "whole.json")
    return args, json.loads((folder / "whole.json").read_text())


def run(args, out, *more, script=label):
    """label.main() as a command line would run it, in this process: a new one takes two seconds to start."""
    key = "out" if script is label else "out_dir"
    argv, sys.argv = sys.argv, [script.__name__, *args, f"--{key}={out}", *more]
    try:
        script.main()
    finally:
        sys.argv = argv


def finished(path):
    return [json.loads(line)["key"] for line in path.read_text().splitlines() if '"key"' in line]


def test_labels_round_trip(job, tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(job[1]))
    labels = load_labels(path)
    assert sorted(labels) == [f"toy/train/{i:06d}.mp4" for i in range(4)]
    for key, entry in labels.items():
        check_label(key, entry, 4, V, path)
        cfg = label.Config(n_frames=4, ratio_min=0.1)
        assert [len(f) for f in entry["gazing_pos"]] == label.clip_budgets(cfg, key, V)
    entries = list(labels.values())
    gazing = collate_gaze([e["gazing_pos"] for e in entries], [e["task_losses"] for e in entries], V)
    assert gazing["num_gazing_each_frame"].tolist() == [max(len(e["gazing_pos"][t]) for e in entries) for t in range(4)]
    for b, entry in enumerate(entries):
        real = ~gazing["if_padded_gazing"][b]
        assert gazing["gazing_pos"][b, real].tolist() == sum(entry["gazing_pos"], [])
        assert gazing["task_losses"][b, real].tolist() == pytest.approx(sum(entry["task_losses"], []))


def test_a_teachers_choices_are_labels(job, tmp_path):
    teacher = tiny_gaze()
    teacher.save_pretrained(tmp_path / "teacher")
    run(job[0], tmp_path / "taught.json", f"--teacher={tmp_path / 'teacher'}")
    labels = load_labels(tmp_path / "taught.json")
    for key, entry in labels.items():
        check_label(key, entry, 4, V, "taught.json")
        counts = [len(f) for f in entry["gazing_pos"]]
        assert counts == label.clip_budgets(label.Config(n_frames=4, ratio_min=0.1), key, V)
    assert {k: e["gazing_pos"] for k, e in labels.items()} != {k: e["gazing_pos"] for k, e in job[1].items()}


def test_a_teachers_labels_train_another_model(toy, tmp_path):
    tiny_gaze().save_pretrained(tmp_path / "teacher")
    common = [f"--root={toy}", "--n_frames=4", "--device=cpu"]
    run([*common, "--max_clips=2", "--ratio_min=0.1"], tmp_path / "taught.json", f"--teacher={tmp_path / 'teacher'}")

    tiny_gaze(seed=1).save_pretrained(tmp_path / "pupil")
    settings = ["--steps=1", "--batch_size=2", "--lr=1e-3", "--n_workers=0", f"--init_from={tmp_path / 'pupil'}"]
    run([*common, *settings, f"--labels={tmp_path / 'taught.json'}"], tmp_path / "out", script=train_ntp)
    before = load_file(tmp_path / "pupil" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    changed = [name for name in after if not after[name].equal(before[name])]
    assert len(changed) > 0.9 * len(after)


def test_resume(job, tmp_path):
    """A run killed while it wrote a line: the same labels, and only what is missing is done again."""
    args, whole = job
    out, part = tmp_path / "labels.json", tmp_path / "labels.json.rank0.jsonl"
    command = [sys.executable, str(ROOT / "label.py"), *args, f"--out={out}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=env, cwd=tmp_path, capture_output=True)
    assert json.loads(out.read_text()) == whole
    lines = part.read_text().split("\n")
    at = [i for i, line in enumerate(lines) if '"key"' in line]
    part.write_text("\n".join(lines[:at[2]] + [lines[at[2]][:len(lines[at[2]]) // 2]]))  # two and a half clips are left
    out.unlink()
    again = subprocess.run(command, check=True, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert "2 clips labelled before, 2 to do" in again.stdout
    assert json.loads(out.read_text()) == whole
    assert part.read_text().startswith("\n".join(lines[:at[2]])), "what was there stays"
    assert sum('"key"' in line for line in part.read_text().splitlines()) == 5  # 2 whole, 1 cut, 2 anew


def test_a_finished_run_does_nothing_and_more_clips_are_added(job, tmp_path, capsys):
    args, whole = job
    run(args, tmp_path / "a.json", "--max_clips=2")
    assert sorted(json.loads((tmp_path / "a.json").read_text())) == sorted(whole)[:2]
    run(args, tmp_path / "a.json")
    assert len(finished(tmp_path / "a.json.rank0.jsonl")) == 4
    assert json.loads((tmp_path / "a.json").read_text()) == whole
    run(args, tmp_path / "a.json")
    assert len(finished(tmp_path / "a.json.rank0.jsonl")) == 4
    assert json.loads((tmp_path / "a.json").read_text()) == whole


def test_only_the_clips_asked_for_are_written(job, toy, tmp_path, capsys):
    """An earlier run's others stay in the progress file and come back when they are asked for."""
    args, whole = job
    out, keys = tmp_path / "a.json", sorted(whole)
    run(args, out)
    run(args, out, "--max_clips=2")
    assert list(json.loads(out.read_text())) == keys[:2]
    said = capsys.readouterr().out
    assert "2 clips labelled before, 0 to do" in said and "2 more, not asked for now, stay in a.json.rank*" in said
    run(args, out, "--splits=val", "--max_clips=1")
    assert list(json.loads(out.read_text())) == ["toy/val/000000.mp4"]
    run(args, out)
    assert json.loads(out.read_text()) == whole and len(finished(tmp_path / "a.json.rank0.jsonl")) == 5


def test_candidates_that_share_the_past_find_what_those_with_copies_of_it_find(mae, video, monkeypatch):
    ids, losses = label.greedy(mae, video[0], [3, 2, 2, 5])
    monkeypatch.setattr(label, "MANY_QUERIES", 0)
    copied_ids, copied_losses = label.greedy(mae, video[0], [3, 2, 2, 5])
    assert copied_ids == ids
    assert sum(copied_losses, []) == pytest.approx(sum(losses, []), abs=1e-5)


def test_a_slot_tries_the_best_of_before_then_what_was_never_tried_then_what_was_tried_longest_ago():
    gains = {5: 0.1, 3: 0.9, 1: 0.2, 7: 0.5}
    tried = label.shortlist([0, 1, 2, 3, 4, 5, 7], gains, 8, torch.Generator().manual_seed(0))
    assert tried[:2] == [3, 7]
    assert set(tried[2:5]) == {0, 2, 4}
    assert tried[5:] == [5, 1]
    assert len(label.shortlist(list(range(20)), gains, 8, torch.Generator())) == 8


@pytest.mark.parametrize("change", ["seed=1", "ratio_max=0.3", "alpha=5,1", "n_tried=3", "exact=true"])
def test_other_settings_are_refused(job, tmp_path, change):
    args, _ = job
    run(args, tmp_path / "a.json", "--max_clips=1")
    with pytest.raises(ValueError, match=f"a.json.rank0.jsonl.*other settings .{change.split('=')[0]}.*delete"):
        run(args, tmp_path / "a.json", f"--{change}")


def test_exact_labels_of_the_time_before_there_was_another_search(job, tmp_path):
    args, part = job[0], tmp_path / "a.json.rank0.jsonl"
    run(args, tmp_path / "a.json", "--exact=true", "--max_clips=1")
    for line in part.read_text().splitlines():
        if '"settings"' in line:
            assert not {"exact", "n_tried"} & json.loads(line)["settings"].keys()
    run(args, tmp_path / "a.json", "--exact=true", "--max_clips=1", "--n_tried=3")
    assert len(finished(part)) == 1


def test_labels_of_another_reconstructor_are_refused(job, tmp_path):
    args = [*job[0], f"--videomae={tmp_path / 'mae'}", "--max_clips=1"]
    tiny_mae().save_pretrained(tmp_path / "mae")
    run(args, tmp_path / "a.json")
    tiny_mae(seed=1).save_pretrained(tmp_path / "mae")
    with pytest.raises(ValueError, match="weights.*delete"):
        run(args, tmp_path / "a.json")


def test_small_batches_give_the_same_labels(job, tmp_path):
    args, whole = job
    run(args, tmp_path / "small.json", "--max_candidates=6", "--max_clips=1")
    (key, got), = json.loads((tmp_path / "small.json").read_text()).items()
    assert got["gazing_pos"] == whole[key]["gazing_pos"]
    for a, b in zip(got["task_losses"], whole[key]["task_losses"], strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_processes_share_the_work(job, tmp_path, monkeypatch):
    """Two processes, here threads, of which one starts late: every clip is labelled, by one of them."""
    args, whole = job
    meet = threading.Barrier(2)

    def init_processes(device):
        rank = int(threading.current_thread().name)
        time.sleep(0.5 * (rank == 0))
        return rank, 2, torch.device("cpu")
    monkeypatch.setattr(processes, "init_processes", init_processes)
    monkeypatch.setattr(processes, "barrier", lambda: meet.wait(60))
    monkeypatch.setattr(processes, "all_sum", lambda *values: values)
    monkeypatch.setattr(sys, "argv", ["label.py", *args, f"--out={tmp_path / 'a.json'}"])
    threads = [threading.Thread(target=label.main, name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = [finished(tmp_path / f"a.json.rank{rank}.jsonl") for rank in range(2)]
    assert sorted(done[0] + done[1]) == sorted(whole)
    assert json.loads((tmp_path / "a.json").read_text()) == whole


def test_unreadable_clips_are_left_out(job, tmp_path):
    args, _ = job
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "bad.mp4").write_text("not a video")
    with pytest.warns(UserWarning, match="bad.mp4"), pytest.raises(Exception, match="none of the 1 videos"):
        run([f"--root={tmp_path}", *args[1:]], tmp_path / "a.json")
