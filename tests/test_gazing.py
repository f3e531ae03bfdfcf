"""gazing.py: where the slots of a gazing lie, and how gazings are cut and put together."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import normal_video, tiny_gaze

from gazing import (
    Tiling,
    drop_empty_slots,
    grid,
    join_chunks,
    join_clips,
    join_frames,
    last_slots,
    locate,
    random_gazing,
    rows,
    split_frames,
    to_device,
    to_masks,
)

V = 20  # 2 x 2 patches of 16 px, 4 x 4 of 8 px, on 32 px
TENSORS = ("gazing_pos", "if_padded_gazing", "num_gazing_each_frame")


@pytest.fixture
def config():
    return tiny_gaze().config


@pytest.fixture
def gazing():
    """Three clips of three frames, with an empty frame, padding behind the gazes and in front of one."""
    frames = [torch.tensor([[0, 4, 19], [3, 7, V], [V, 5, V]]), torch.zeros(3, 0, dtype=torch.long),
              torch.tensor([[1, 2], [16, V], [V, 9]])]
    return join_frames([(ids + V * t, ids == V) for t, ids in enumerate(frames)])


def same(a, b):
    real = ~a["if_padded_gazing"]
    return (a["num_gazing_each_frame"].tolist() == b["num_gazing_each_frame"].tolist()
            and torch.equal(a["if_padded_gazing"], b["if_padded_gazing"])
            and torch.equal(a["gazing_pos"][real], b["gazing_pos"][real]))


# ----------------------------------------------------------------------------------------------------------------------
# where slots lie

def test_every_slot_is_located(gazing, config):
    place = locate(gazing, config)
    assert torch.equal(place["padded"], gazing["if_padded_gazing"])
    for b in range(3):
        for i in range(5):
            found = [int(place[key][b, i]) for key in ("frame", "scale", "row", "column")]
            if gazing["if_padded_gazing"][b, i]:
                assert found == [-1] * 4 and place["box"][b, i].isnan().all()
                continue
            frame, patch = divmod(int(gazing["gazing_pos"][b, i]), V)
            scale, within, side = (0, patch, 2) if patch < 4 else (1, patch - 4, 4)
            row, column = divmod(within, side)
            assert found == [frame, scale, row, column]
            step = 32 / side
            assert place["box"][b, i].tolist() == [row * step, column * step, (row + 1) * step, (column + 1) * step]


def test_a_box_is_where_the_patch_comes_from(config):
    """Light up one box of the source, crop and resize as clips are: the patch of that id, and it alone, is lit."""
    config.scales, config.patch_size = "32", 8
    everything = join_frames([(torch.arange(16).unsqueeze(0), torch.zeros(1, 16, dtype=torch.bool))])
    for source_size, crop in [((64, 96), None), ((96, 64), None), ((80, 128), (16, 8, 64))]:
        place = locate(everything, config, source_size, crop)
        top, left, side = crop or ((source_size[0] - 64) // 2, (source_size[1] - 64) // 2, 64)
        for i, box in enumerate(place["box"][0].int().tolist()):
            picture = torch.zeros(source_size)
            picture[box[0]:box[2], box[1]:box[3]] = 1
            square = picture[top:top + side, left:left + side]
            patches = F.avg_pool2d(square[None, None], side // 4).flatten()
            assert patches.tolist() == [float(j == i) for j in range(16)]


def test_boxes_in_tiles(config):
    """A frame of 40 x 72 px in 2 x 3 tiles: one scale covers it without gaps, whatever the size of the source."""
    tiling = Tiling(config, [(24, 40), (40, 72)], 8)
    n_ids = sum(h * w for h, w in tiling.grids)
    ids = torch.arange(n_ids).unsqueeze(0)
    everything = join_frames([(ids, torch.zeros_like(ids, dtype=torch.bool))] * 2)
    everything["gazing_pos"][:, n_ids:] += n_ids
    for source_size in [(40, 72), (400, 720), (100, 72)]:
        place = locate(everything, config, source_size, tiling.crop(source_size), tiling.grids)
        for frame in range(2):
            for scale, (n_rows, n_columns) in enumerate(tiling.grids):
                chosen = (place["frame"] == frame) & (place["scale"] == scale)
                assert chosen.sum() == n_rows * n_columns
                assert place["row"][chosen].max() == n_rows - 1 and place["column"][chosen].max() == n_columns - 1
        boxes = place["box"][chosen]  # of the finest scale: 5 x 9 patches, that fit
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        assert area.sum().item() == pytest.approx(source_size[0] * source_size[1], rel=1e-5)
        assert place["box"][..., 2].max() <= source_size[0] and place["box"][..., 3].max() <= source_size[1]
    with pytest.raises(ValueError, match="crop=tiling.crop"):
        locate(everything, config, (40, 72), grids=tiling.grids)


def test_what_a_stream_gives_is_located_too(config):
    step = tiny_gaze().stream(2, gazing_ratio=0.4).step(normal_video(2, 1)[:, 0])
    place = locate(step, config)
    assert (place["frame"] == 0).all() and place["box"].max() <= 32


def test_masks_and_their_union(gazing, config):
    masks = to_masks(gazing, config.ids_per_scale)
    place = locate(gazing, config)
    for scale, side in enumerate((2, 4)):
        expected = torch.zeros(3, 3, side, side)
        for b, i in ((place["scale"] == scale).nonzero().tolist()):
            expected[b, place["frame"][b, i], place["row"][b, i], place["column"][b, i]] = 1
        assert torch.equal(masks[scale], expected.flatten(2))
    for size in [(4, 4), (8, 16), (32, 32)]:
        union = grid(masks, size)
        expected = torch.zeros(3, 3, *size, dtype=torch.bool)
        for b, i in (~gazing["if_padded_gazing"]).nonzero().tolist():
            y0, x0, y1, x1 = (place["box"][b, i] / 32 * torch.tensor([*size, *size])).int().tolist()
            expected[b, place["frame"][b, i], y0:y1, x0:x1] = True
        assert torch.equal(union, expected)


def test_union_on_a_grid_that_does_not_fit():
    """Three cells over two patches: the middle one has its centre on the border, which belongs to the second patch."""
    mask = [torch.tensor([[[1.0, 0, 1, 0]]])]
    assert grid(mask, (1, 3))[0, 0].tolist() == [[True, False, False]]
    assert grid([torch.tensor([[[0.0, 1, 0]]])], (1, 6), [(1, 3)])[0, 0].tolist() == [[False, False, True, True] +
                                                                                  [False, False]]


def test_last_slots(gazing):
    assert last_slots(gazing).tolist() == [[2, 3, 4], [1, 3, 3], [1, 3, 4]]


# ----------------------------------------------------------------------------------------------------------------------
# cut and join

def test_frames_come_back(gazing):
    assert same(join_frames(split_frames(gazing)), gazing)


def test_clips_come_back(gazing):
    gazing["gazing_mask"] = to_masks(gazing, [4, 16])
    parts = [rows(gazing, 1), rows(gazing, slice(2, 3)), rows(gazing, torch.tensor([0]))]
    assert [len(part["gazing_pos"]) for part in parts] == [1, 1, 1]
    assert torch.equal(parts[0]["gazing_mask"][1], gazing["gazing_mask"][1][1:2])
    assert same(join_clips(parts, V), rows(gazing, [1, 2, 0]))


def test_clips_of_other_lengths_are_padded(gazing):
    shorter = drop_empty_slots(rows(gazing, [1]))
    assert shorter["num_gazing_each_frame"].tolist() == [2, 0, 1]
    together = join_clips([shorter, rows(gazing, [0])], V)
    assert same(together, rows(gazing, [1, 0]))


def test_a_frame_without_gazes_keeps_a_slot():
    ids = torch.full((2, 3), V)
    assert drop_empty_slots(join_frames([(ids, ids == V)]))["num_gazing_each_frame"].tolist() == [1]


def test_chunks_of_a_long_video():
    gaze, video = tiny_gaze(), normal_video(2, 10)
    chunks = video.split(4, dim=1)
    whole = join_chunks([gaze.generate(chunk, 0.3) for chunk in chunks], V)
    assert whole["num_gazing_each_frame"].tolist() == [6] * 10
    assert (whole["gazing_pos"] // V == torch.arange(10).repeat_interleave(6)).all()
    second = gaze.generate(video[:, 4:8], 0.3)["gazing_pos"]
    assert torch.equal(whole["gazing_pos"][:, 24:48], second + 4 * V)


def test_moving_a_gazing_keeps_the_counts_on_the_cpu(gazing):
    gazing["gazing_mask"] = to_masks(gazing, [4, 16])
    moved = to_device(gazing, "meta")
    assert moved["gazing_pos"].device.type == moved["gazing_mask"][0].device.type == "meta"
    assert moved["num_gazing_each_frame"].device.type == "cpu"


def test_random_gazings_take_distinct_patches():
    out = random_gazing([3, V, 1], 2, V)
    assert out["num_gazing_each_frame"].tolist() == [3, V, 1]
    for t, (ids, padded) in enumerate(split_frames(out)):
        assert not padded.any()
        for clip in ids - V * t:
            assert len(set(clip.tolist())) == len(clip) and set(clip.tolist()) <= set(range(V))


@pytest.mark.parametrize("change, named", [
    (dict(hidden_size=-1e9), "hidden_size=-1000000000.0"), (dict(hidden_size=[32]), r"hidden_size=\[32\]"),
    (dict(patch_size=True), "patch_size=True"), (dict(num_layers=10 ** 9), "num_layers=1000000000"),
    (dict(intermediate_size=10 ** 20), "intermediate_size"), (dict(rope_factor=[8]), r"rope_factor=\[8\]"),
    (dict(rms_norm_eps=math.nan), "rms_norm_eps"), (dict(scales=32), "scales=32"), (dict(scales="0+32"), "scales")])
def test_nonsense_in_a_config_is_named(change, named):
    with pytest.raises(ValueError, match=named):
        tiny_gaze(**change)


# ----------------------------------------------------------------------------------------------------------------------
# own choices


@pytest.mark.parametrize("allowed, ids", [("32", range(4, 20)), ("16+32", range(20)), ([3, 7, 9], [3, 7, 9]),
                                          (torch.tensor([0, 19]), [0, 19])])
@pytest.mark.parametrize("reference", [False, True])
def test_only_allowed_ids_are_gazed_at(allowed, ids, reference):
    video = normal_video(2, 2)
    gaze = tiny_gaze()
    out = gaze.generate(video, gazing_ratio=1.0, allowed=allowed, reference=reference)
    for positions, padded in split_frames(out):
        assert [sorted((clip % V).tolist()) for clip in positions] == [list(ids)] * 2 and not padded.any()

    # the target's numbering does not matter: two tiles are gazed at, each with these ids only
    wide = gaze.generate(normal_video(1, 2), 1.0, allowed="32", target_scales=[(16, 32), (32, 64)], reference=reference)
    assert wide["gazing_mask"][0].sum() == 0 and wide["gazing_mask"][1].all()


@pytest.mark.parametrize("allowed", ["224", [], [20], [-1], [0.5], torch.ones(V, dtype=torch.bool)])
def test_ids_and_scales_that_the_model_lacks_are_refused(allowed):
    with pytest.raises(ValueError, match="allowed"):
        tiny_gaze().generate(normal_video(1, 1), 1.0, allowed=allowed)
