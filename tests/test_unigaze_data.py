"""UniGaze's data: against figures of the published readers, the normalisation, bad files by name, the toy faces."""
import json
import os
import pickle
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from unigaze import convert, data, make_data, normalise
from unigaze.data import FaceError, Faces, Split

GOLDEN = Path(__file__).parent / "golden" / "unigaze_data"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
IMAGE_MEAN = np.array([0.485, 0.456, 0.406])[:, None, None]
IMAGE_STD = np.array([0.229, 0.224, 0.225])[:, None, None]

# how each case of expected.json is read
XGAZE = Split("xgaze", ("subject0000", "subject0003"))
GAZECAPTURE = Split("gazecapture", ("00002", "00003", "00005"), color="rgb")
CASES = {
    "xgaze, all": XGAZE,
    "xgaze, d3 (3 random cameras of 18 per frame, seed 0)": replace(XGAZE, views=3),
    "xgaze, d3, seed 7": replace(XGAZE, views=3),
    "xgaze, frame_tag [1, 2]": replace(XGAZE, frames=(1, 2)),
    "mpii": Split("mpii", ("p00", "p10")),
    "eyediap_cs": Split("eyediap_cs", ("person_1", "person_9")),
    "eyediap_ft": Split("eyediap_ft", ("person_1", "person_9")),
    "gaze360_train (key = row in the file, unlike the others)": Split("gaze360_train"),
    "gazecapture, rgb": GAZECAPTURE,
    "gazecapture, ds15": replace(GAZECAPTURE, every=15),
    "gazecapture read as bgr (wrong on purpose)": Split("gazecapture", ("00003",)),
}


def read_golden(name):
    split = CASES[name]
    return Faces(GOLDEN / split.folder, split, size=224, labelled=False, seed=7 if "seed 7" in name else 0)


def imagenet(image):
    return (image.astype(np.float64) / 255 - IMAGE_MEAN) / IMAGE_STD


def write_faces(path, n=20, size=16, **columns):
    """A file of n faces of random pixels; a column given as None is left out."""
    rng = np.random.default_rng(0)
    defaults = {"face_patch": rng.integers(0, 255, (n, size, size, 3), dtype=np.uint8),
                "face_gaze": rng.uniform(-0.5, 0.5, (n, 2)).astype(np.float32),
                "face_head_pose": rng.uniform(-0.5, 0.5, (n, 2)).astype(np.float32)}
    convert.write_h5(path, {key: value for key, value in (defaults | columns).items() if value is not None})
    return path


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Two subjects of toy_xgaze, one of toy_mpii, 36 faces each."""
    folder = tmp_path_factory.mktemp("toy")
    cfg = make_data.Config(out=str(folder), n_faces=36)
    for i in range(2):
        make_data.write_subject((folder / "toy_xgaze" / f"subject{i:04d}.h5", "toy_xgaze", i, cfg))
    make_data.write_subject((folder / "toy_mpii" / "p00.h5", "toy_mpii", 0, cfg))
    return folder


@pytest.fixture
def toy_set(monkeypatch):
    monkeypatch.setitem(data.SETS, "toy", Split("toy_xgaze"))


# ----------------------------------------------------------------------------------------------------------------------
# the published layouts


@pytest.mark.parametrize("name", CASES)
def test_every_published_layout_is_read_as_the_published_readers_do(name):
    expected = EXPECTED["datasets"][name]
    faces = read_golden(name)
    if "length" in expected:
        assert len(faces) == expected["length"]
    if "file_rows" in expected:
        assert np.stack([faces.files, faces.rows], axis=1).tolist() == expected["file_rows"]

    for wanted in expected.get("items", []):
        item = faces[wanted["index"]]
        image = item["image"].numpy()
        assert [item["subject"], item["row"]] == wanted["file_row"]
        assert image[:, 0, 0].tolist() == wanted["rgb0"] and image[:, 112, 112].tolist() == wanted["rgb_mid"]
        np.testing.assert_allclose(imagenet(image).mean(axis=(1, 2)), wanted["mean"], atol=1e-5)
        np.testing.assert_allclose(np.nan_to_num(item["gaze"].numpy()), wanted["gaze"], rtol=1e-5)
        np.testing.assert_allclose(np.nan_to_num(item["head"].numpy()), wanted["head"], rtol=1e-5)


def test_all_layouts_of_the_figures_are_covered():
    assert set(CASES) == set(EXPECTED["datasets"])


def test_cameras_are_drawn_as_published():
    wanted = EXPECTED["d3_choice"]["seed0_first_40"]
    rows = data.choose_rows(18 * len(wanted), Split("x", views=3), data.random.Random(0))
    assert rows.tolist() == [18 * t + camera for t, cameras in enumerate(wanted) for camera in sorted(cameras)]


def test_heads_beyond_the_limit_are_left_out_as_published(tmp_path):
    figures = json.loads((GOLDEN.parent / "unigaze_tiny" / "extra.json").read_text())["mae_augment"]
    head = np.array(figures["head_pose"])
    write_faces(tmp_path / "a.h5", n=len(head), face_head_pose=head)
    faces = Faces(tmp_path, size=16, head_limit=figures["head_pose_limit_deg"])
    assert faces.rows.tolist() == figures["kept_rows"]


def test_a_limit_of_heads_needs_their_poses(tmp_path):
    write_faces(tmp_path / "a.h5", face_head_pose=None)
    with pytest.raises(FaceError, match=r"a\.h5: has no face_head_pose"):
        Faces(tmp_path, size=16, head_limit=40)


def test_unlabelled_faces_have_nan_not_zero():
    item = Faces(GOLDEN / "gazecapture", GAZECAPTURE, labelled=False)[34]
    assert item["gaze"].isnan().all() and item["head"].isnan().all()


@pytest.mark.parametrize("case", json.loads((GOLDEN / "preprocess.json").read_text())["cases"], ids=lambda c: c["key"])
def test_resizing_gives_the_published_bytes(case):
    tensors = load_file(GOLDEN / "preprocess.safetensors")
    image = tensors[case["key"] + ".in"]
    if case["color_type"] == "bgr":
        image = image[..., ::-1]
    image = data.resize(image, 32).transpose(2, 0, 1)
    np.testing.assert_allclose(imagenet(image), tensors[case["key"] + ".out"], atol=1e-5)


def test_protocols_name_sets_that_exist_and_have_the_published_counts():
    for name in data.PROTOCOLS:
        assert {s for names in data.protocol(name).values() for s in names} <= set(data.SETS)
    counts = {name: len(data.SETS[name].subjects) for name in data.SETS if data.SETS[name].subjects}
    assert counts["xgaze_0_80sub"] == 80 and counts["xgaze_0_60sub"] == 60 and counts["xgaze_60_80sub"] == 20
    assert counts["eyediap_cs"] == 14 and counts["eyediap_cs_test"] == 6 and counts["eyediap_ft"] == 16
    assert counts["mpiigaze_train"] == 10 and counts["mpiigaze_test"] == 5


# ----------------------------------------------------------------------------------------------------------------------
# items, workers, epochs


def test_an_index_of_a_later_epoch_is_the_same_face_and_keeps_its_number(toy):
    faces = Faces(toy / "toy_xgaze", size=48)
    first, later = faces[5], faces[5 + 3 * len(faces)]
    assert later["index"] == 5 + 3 * len(faces) and torch.equal(first["image"], later["image"])


def test_sets_joined_are_one_after_the_other(toy):
    one, two = Faces(toy / "toy_xgaze", size=48), Faces(toy / "toy_mpii", size=48)
    both = data.Concat([one, two])
    assert len(both) == len(one) + len(two)
    assert both[len(one)]["path"] == two[0]["path"] and both[len(both) + 3]["key"] == one[3]["key"]


def test_workers_open_their_own_files_and_read_the_same(toy):
    faces = Faces(toy / "toy_mpii", size=48)
    here = data.collate([faces[i] for i in range(8)])   # files are open here when the workers start
    loader = torch.utils.data.DataLoader(faces, 8, num_workers=2, collate_fn=data.collate)
    there = next(iter(loader))
    assert torch.equal(here["image"], there["image"]) and here["key"] == there["key"]
    assert there["image"].shape == (8, 3, 48, 48) and there["image"].dtype == torch.uint8


def test_a_set_with_open_files_can_be_sent_to_another_process(toy):
    faces = Faces(toy / "toy_mpii", size=48)
    item = faces[0]
    assert torch.equal(pickle.loads(pickle.dumps(faces))[0]["image"], item["image"])


def test_few_files_are_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_OPEN", 2)
    for i in range(4):
        write_faces(tmp_path / f"{i}.h5", n=2)
    faces = Faces(tmp_path, size=16)
    for i in range(len(faces)):
        faces[i]
    assert len(faces.open) == 2


# ----------------------------------------------------------------------------------------------------------------------
# bad input is named


def test_a_missing_subject_is_named(tmp_path):
    write_faces(tmp_path / "p00.h5")
    with pytest.raises(FileNotFoundError, match=r"1 of the 2 subjects of mpii are missing: p01\.h5"):
        Faces(tmp_path, Split("mpii", ("p00", "p01")), "mpii")


def test_another_count_than_published_is_said(tmp_path):
    write_faces(tmp_path / "000000.h5")
    with pytest.warns(UserWarning, match="1 subjects, the published gaze360_test has 52"):
        Faces(tmp_path, data.SETS["gaze360_test"], "gaze360_test", size=16)


def test_a_file_that_was_cut_off_is_named(tmp_path):
    path = write_faces(tmp_path / "p00.h5")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(FaceError, match=r"p00\.h5: cannot be read as HDF5, perhaps it was cut off"):
        Faces(tmp_path)


@pytest.mark.parametrize("script", ["data", "convert", "make_data", "show"])
def test_a_script_run_as_a_file_says_how_to_run_it(script):
    path = Path(data.__file__).with_name(f"{script}.py")
    done = subprocess.run([sys.executable, path], capture_output=True, text=True)
    assert done.returncode == 1 and f"python -m unigaze.{script}" in done.stderr


@pytest.mark.parametrize("columns, text", [
    (dict(face_patch=None), "has no face_patch, only face_gaze"),
    (dict(face_gaze=None), "has no face_gaze"),
    (dict(face_patch=np.zeros((20, 16, 12, 3), np.uint8)), r"not uint8 \(n, S, S, 3\)"),
    (dict(face_patch=np.zeros((20, 16, 16, 3), np.float32)), "face_patch is float32"),
    (dict(face_gaze=np.zeros((19, 2), np.float32)), r"face_gaze has shape \(19, 2\).*not floats \(20, 2\)"),
    (dict(face_gaze=np.full((20, 2), 12.5, np.float32)), "are these degrees"),
    (dict(face_gaze=np.full((20, 2), np.nan, np.float32)), "not finite"),
])
def test_a_file_that_does_not_fit_is_named(tmp_path, columns, text):
    write_faces(tmp_path / "p00.h5", **columns)
    with pytest.raises(FaceError, match=f"p00.h5: .*{text}"):
        Faces(tmp_path, size=16)


def test_a_label_in_degrees_between_the_sampled_rows_is_found_when_it_is_read(tmp_path):
    gaze = np.zeros((2000, 2), np.float32)
    gaze[7] = 30
    write_faces(tmp_path / "a.h5", n=2000, size=4, face_gaze=gaze)
    write_faces(tmp_path / "b.h5", n=2, size=4)
    faces = Faces(tmp_path, size=4)
    with pytest.warns(UserWarning, match="are these degrees"):
        assert faces[7]["path"].endswith("b.h5")


def test_gazecapture_in_one_file_asks_for_the_converter(tmp_path):
    (tmp_path / "all.h5").write_bytes((GOLDEN / "gazecapture_sted_raw.h5").read_bytes())
    with pytest.raises(FaceError, match="convert it, python -m unigaze.convert gazecapture"):
        Faces(tmp_path)


def test_an_empty_protocol_and_an_unknown_one_are_refused(monkeypatch):
    monkeypatch.setitem(data.PROTOCOLS, "mine", {"train": (), "val": (), "test": ()})
    with pytest.raises(ValueError, match="protocol=mine has no set to train on"):
        data.protocol("mine")
    with pytest.raises(ValueError, match="none of that name, only cross_xgaze"):
        data.protocol("cross")
    assert data.protocol("mae")["test"] == ()
    with pytest.raises(ValueError, match="no set to read"):
        data.open_sets("anywhere", ())


def test_damaged_rows_are_replaced_by_the_next_file_with_one_warning(tmp_path):
    damaged = write_faces(tmp_path / "a.h5", n=4, face_patch=np.full((4, 16, 16, 3), 7, np.uint8))
    write_faces(tmp_path / "b.h5", n=4)
    with h5py.File(damaged) as file:
        chunk = file["face_patch"].id.get_chunk_info(1)
    content = bytearray(damaged.read_bytes())
    content[chunk.byte_offset:chunk.byte_offset + chunk.size] = b"\xff" * chunk.size   # no lzf
    damaged.write_bytes(content)

    faces = Faces(tmp_path, size=16)
    with pytest.warns(UserWarning, match=r"a\.h5: face 1: cannot be read"):
        item = faces[1]
    assert item["key"] == "faces/b/0" and item["unreadable"] == [str(damaged)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        faces[1]


# ----------------------------------------------------------------------------------------------------------------------
# check


def test_check_finds_nothing_wrong_with_the_toy_and_draws_it(toy, toy_set, tmp_path, capsys):
    assert data.check(toy, ["toy"], tmp_path / "check.png") == []
    assert Image.open(tmp_path / "check.png").size[0] > 224
    assert "2        72     48" in capsys.readouterr().out


def test_check_notices_colours_in_the_wrong_order(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(data.SETS, "toy", Split("toy_xgaze", color="rgb"))
    complaints = data.check(toy, ["toy"], tmp_path / "check.png")
    assert len(complaints) == 1 and "skin is more blue" in complaints[0]


@pytest.mark.parametrize("mirror", ["pictures", "labels"])
def test_check_notices_a_mirrored_set(toy, toy_set, tmp_path, mirror):
    for path in (toy / "toy_xgaze").glob("*.h5"):
        with h5py.File(path) as file:
            columns = {name: file[name][:] for name in file}
        if mirror == "pictures":
            columns["face_patch"] = columns["face_patch"][:, :, ::-1]
        else:
            columns["face_gaze"] = columns["face_gaze"] * [1, -1]
        convert.write_h5(tmp_path / "toy_xgaze" / path.name, columns)
    complaints = data.check(tmp_path, ["toy"], tmp_path / "check.png")
    assert any("mirrored" in text for text in complaints)


def test_check_goes_on_after_a_set_that_is_not_there(toy, toy_set, tmp_path):
    complaints = data.check(toy, ["mpiigaze", "toy"], tmp_path / "check.png")
    assert len(complaints) == 1 and complaints[0].startswith("mpiigaze") and (tmp_path / "check.png").exists()


# ----------------------------------------------------------------------------------------------------------------------
# converters


def test_gazecapture_is_converted_to_a_file_per_person_that_can_be_read(tmp_path):
    assert convert.convert_gazecapture(GOLDEN / "gazecapture_sted_raw.h5", tmp_path) == 2
    faces = Faces(tmp_path, Split("", color="rgb"))
    with h5py.File(GOLDEN / "gazecapture_sted_raw.h5") as raw:
        labels, pixels = raw["00028/labels"][1], raw["00028/pixels"][1]
    item = faces[4]
    assert len(faces) == 5 and item["key"] == "faces/00028/1"
    np.testing.assert_allclose(torch.cat([item["gaze"], item["head"]]).numpy(), labels[:4])

    assert item["image"][:, 112, 112].tolist() == pixels[64, 64].tolist()   # both cameras' middle


def test_sessions_of_eyediap_become_a_file_per_person(tmp_path):
    write_faces(tmp_path / "1_A_CS_S.h5", n=3)
    write_faces(tmp_path / "1_A_CS_M.h5", n=2)
    write_faces(tmp_path / "14_B_FT_S.h5", n=4)
    write_faces(tmp_path / "1_A_DS_S.h5", n=4)   # targets that jump: in no published protocol
    assert convert.convert_eyediap(tmp_path, tmp_path / "out") == {"eyediap_cs/person_1.h5": 5,
                                                                "eyediap_ft/person_14.h5": 4}
    with h5py.File(tmp_path / "out/eyediap_cs/person_1.h5") as merged, h5py.File(tmp_path / "1_A_CS_M.h5") as first:
        assert merged["face_patch"].chunks == (1, 16, 16, 3) and merged["face_patch"].compression == "lzf"
        assert (merged["face_gaze"][:2] == first["face_gaze"][:]).all()


# ----------------------------------------------------------------------------------------------------------------------
# normalisation

NORMALISE = json.loads((GOLDEN / "normalise.json").read_text())["cases"]


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * np.abs(b).max())


@pytest.mark.parametrize("i", range(len(NORMALISE)))
def test_normalisation_and_labels_are_the_published_ones(i):
    case = NORMALISE[i]
    head, centre = normalise.rotation_matrix(case["head_rotation_vector"]), np.array(case["face_center"])
    for wanted in case["results"]:
        camera = wanted["focal_norm"], wanted["distance_norm"], wanted["roi"][0]
        R, W = normalise.normalisation(np.array(case["K"]), head, centre, *camera)
        close(R, wanted["R"])
        close(W / W[2, 2], wanted["W_over_W22"])
        close(normalise.head_label(R, head), wanted["head_pose"])
        close(normalise.gaze_label(R, centre, case["gaze_target"]), wanted["label_pitchyaw"])


@pytest.mark.parametrize("i", range(len(NORMALISE)))
def test_warped_crops_have_the_published_bytes(i):
    tensors, wanted = load_file(GOLDEN / "normalise.safetensors"), NORMALISE[i]["results"][3]
    crop = normalise.warp(tensors["image_bgr"], np.array(wanted["W"]), wanted["roi"][0])
    assert np.abs(crop.astype(int) - tensors[f"warped{i}"]).max() == 0


@pytest.mark.parametrize("i", range(len(NORMALISE)))
def test_the_inverse_brings_a_prediction_back_to_the_camera_and_its_arrow_to_the_picture(i):
    case = NORMALISE[i]
    wanted, R, centre = case["denormalise"], np.array(case["results"][0]["R"]), np.array(case["face_center"])
    vector = normalise.to_camera(wanted["pred_pitchyaw"], R)
    close(vector, wanted["vector_camera"])
    close(normalise.to_pitchyaw(vector), wanted["pitchyaw_camera"])
    close(normalise.arrow(wanted["pred_pitchyaw"], R, centre, np.array(case["K"])),
          [wanted["ray_start_px"], wanted["ray_end_px"]])


def test_a_photograph_is_normalised_to_the_published_bytes():
    wanted = json.loads((GOLDEN / "astronaut.json").read_text())
    left, top, right, bottom = wanted["crop_box"]
    image = np.asarray(Image.open(GOLDEN / "astronaut.jpg").convert("RGB"))[top:bottom, left:right]
    head = normalise.rotation_matrix(wanted["rotation_vector"])
    R, W = normalise.normalisation(np.array(wanted["K"]), head, np.array(wanted["face_center"]))
    close(R, wanted["R"])
    difference = normalise.warp(image, W).astype(int) - np.asarray(Image.open(GOLDEN / "astronaut_normalised.png"))
    assert np.abs(difference).max() <= 2


@pytest.mark.parametrize("angles", [(0.0, 0.0, 0.0), (0.3, -0.8, 0.1), (-0.4, 0.9, 0.5), (0.2, 0.3, 3.0), (0, 0, -1.6)])
def test_the_head_pose_of_projected_points_is_found(angles):
    pitch, yaw, roll = angles
    R = normalise.rotation_matrix([0, 0, roll]) @ normalise.rotation_matrix([0, yaw, 0])
    R = R @ normalise.rotation_matrix([pitch, 0, 0])
    t, K = np.array([40.0, -60, 700]), np.array([[900.0, 0, 320], [0, 880, 240], [0, 0, 1]])
    points = normalise.project(normalise.FACE_MODEL @ R.T + t, K)
    found_R, found_t = normalise.head_pose(points, normalise.FACE_MODEL, K)
    np.testing.assert_allclose(found_R, R, atol=1e-6)
    np.testing.assert_allclose(found_t, t, rtol=1e-5)


def test_landmarks_are_picked_from_68_as_published():
    figures = json.loads((GOLDEN / "normalise.json").read_text())
    landmarks = np.array(figures["lm68"])
    assert landmarks[normalise.FIFTY_OF_68].tolist() == figures["lm50_of_68"]
    assert landmarks[normalise.SIX_OF_68].tolist() == figures["eyes_nose_of_68"]


def test_angles_and_vectors_are_inverse():
    angles = np.random.default_rng(0).uniform(-1.5, 1.5, (50, 2)) * [1, 2]
    np.testing.assert_allclose(normalise.to_pitchyaw(3 * normalise.to_vector(angles)), angles, atol=1e-12)


def test_rows_of_the_raw_annotations_are_read():
    expected = json.loads((GOLDEN / "raw/expected.json").read_text())
    wanted = expected["xgaze subject0000_update.csv"]
    row = convert.read_xgaze((GOLDEN / "raw/subject0000_update.csv").read_text().splitlines()[0])
    assert row["image"] == wanted["key"]
    assert row["target"].tolist() == wanted["gaze_target"] and row["translation"].tolist() == wanted["head_translation"]
    assert row["rotation_vector"].tolist() == wanted["head_rotation"]
    assert row["landmarks"][[0, -1]].tolist() == [wanted["landmarks68_first"], wanted["landmarks68_last"]]
    assert row["model_points"][[0, -1]].tolist() == [wanted["projected50_first"], wanted["projected50_last"]]

    wanted = expected["mpii p00.txt"]
    row = convert.read_mpii((GOLDEN / "raw/p00.txt").read_text().splitlines()[0])
    assert row["image"] == wanted["key"] and row["landmarks"].tolist() == wanted["landmarks6"]
    assert row["target"].tolist() == wanted["gaze_target"] and row["eye"] == "left"

    wanted = expected["gaze360 train.label"]["rows"]
    lines = (GOLDEN / "raw/train.label").read_text().splitlines()[1:]
    for line, result in zip(lines, wanted, strict=True):
        row = convert.read_gaze360(line)
        assert (row["image"], row["subject"], row["img_name"]) == (result["face"], result["subject"],
                                                                   result["img_name"])
        np.testing.assert_allclose(row["sight"], result["face_to_target"])
        np.testing.assert_allclose(normalise.to_pitchyaw(-row["sight"]), result["label_if_R_is_identity"], rtol=1e-9)


def test_sessions_of_eyediap_are_read(tmp_path):
    wanted = json.loads((GOLDEN / "raw/expected.json").read_text())["eyediap"]
    K, targets = convert.read_eyediap(GOLDEN / "raw", every=5)
    assert K.tolist() == wanted["K"] and list(targets) == wanted["frames_used_step5"]
    for frame, target in targets.items():
        np.testing.assert_allclose(target, wanted["screen_mm"][str(frame)])
    for frame, target in convert.read_targets(GOLDEN / "raw/ball_tracking.txt", ball=True).items():
        np.testing.assert_allclose(target, wanted["ball_mm"][str(frame)])


def normalise_astronaut(model):
    """Her crop from six landmarks, and the rotation that made it."""
    figures = json.loads((GOLDEN / "astronaut.json").read_text())
    left, top, right, bottom = figures["crop_box"]
    image = np.asarray(Image.open(GOLDEN / "astronaut.jpg").convert("RGB"))[top:bottom, left:right]
    K = np.array(figures["K"])
    head, t = normalise.head_pose(np.array(figures["six_landmarks"]) - [left, top], model, K)
    R, W = normalise.normalisation(K, head, normalise.face_centre(model, head, t))
    return normalise.warp(image, W), R, figures


@pytest.mark.skipif("GAZE_FACE_MODEL" not in os.environ, reason="GAZE_FACE_MODEL: the published 50-point model")
def test_with_the_published_face_model_landmarks_give_the_published_crop():
    crop, R, figures = normalise_astronaut(normalise.load_face_model(os.environ["GAZE_FACE_MODEL"]))
    published = np.asarray(Image.open(GOLDEN / "astronaut_normalised.png"))
    np.testing.assert_allclose(R, figures["R"], atol=1e-3)
    assert np.abs(crop.astype(int) - published).max() <= 2


def test_with_our_face_model_the_crop_is_turned_by_less_than_a_degree():
    _, R, figures = normalise_astronaut(normalise.FACE_MODEL)
    cosine = (np.trace(R @ np.transpose(figures["R"])) - 1) / 2
    assert np.degrees(np.arccos(cosine)) < 1


@pytest.mark.parametrize("text, problem", [("1 2\n3 4\n", "expected"), ("a b c\n", "not rows")])
def test_a_file_that_is_no_face_model_is_named(tmp_path, text, problem):
    (tmp_path / "face_model.txt").write_text(text)
    with pytest.raises(ValueError, match=f"face_model.txt: .*{problem}"):
        normalise.load_face_model(tmp_path / "face_model.txt")


# ----------------------------------------------------------------------------------------------------------------------
# toy faces


def test_toy_faces_depend_on_the_seed_only(toy, tmp_path):
    cfg = make_data.Config(out=str(tmp_path), n_faces=36)
    make_data.write_subject((tmp_path / "again.h5", "toy_xgaze", 1, cfg))
    make_data.write_subject((tmp_path / "other.h5", "toy_xgaze", 1, replace(cfg, seed=1)))
    with (h5py.File(toy / "toy_xgaze/subject0001.h5") as first, h5py.File(tmp_path / "again.h5") as again,
          h5py.File(tmp_path / "other.h5") as other):
        assert (first["face_patch"][:] == again["face_patch"][:]).all()
        assert (first["face_gaze"][:] != other["face_gaze"][:]).any()


def test_toy_irises_lie_where_the_label_says(toy):
    batch = data.collate(list(Faces(toy / "toy_mpii", size=48)))
    turned = (batch["gaze"] - batch["head"])[:, 1].numpy()
    offset = data.iris_offset(batch["image"].double().mean(dim=1).numpy())
    assert data.correlation(turned, offset) < -0.8   # positive yaw is to the left of the picture


def test_toy_labels_are_the_eyes_seen_from_the_head():
    rng = np.random.default_rng(0)
    views = make_data.draw_views(rng, make_data.STYLES["toy_xgaze"], 10)
    sight = np.einsum("nij,nj->ni", views["rotations"], views["sight"])
    np.testing.assert_allclose(normalise.to_vector(views["gaze"]), -sight, atol=1e-12)
