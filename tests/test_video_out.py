"""lib/video_out.py: what lies in the files, and that nothing half-written is left."""
import os

import av
import numpy as np
import pytest
import torch
from conftest import tiny_gaze
from PIL import Image

from data import to_model_pixels
from gazing import sheet
from lib import video_out
from lib.video_out import VideoWriter

GREY = np.full((33, 45, 3), 90, np.uint8)


def read(path):
    with av.open(f"file:{path}") as container:
        return [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]


def test_a_film_holds_the_pictures_and_is_even(tmp_path):
    path = tmp_path / "new folder" / "12:30.mp4"
    with VideoWriter(path, fps=8) as film:
        for level in (40, 120, 200):
            film.write(np.full((33, 45, 3), level, np.uint8))
    frames = read(path)
    assert [frame.shape for frame in frames] == [(34, 46, 3)] * 3
    assert [frame.mean() for frame in frames] == pytest.approx([40, 120, 200], abs=3)
    assert os.listdir(path.parent) == ["12:30.mp4"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_film_leaves_nothing_and_keeps_what_was_there(tmp_path, error):
    (tmp_path / "a.mp4").write_text("the last run's")
    with pytest.raises(error):
        with VideoWriter(tmp_path / "a.mp4", fps=8) as film:
            film.write(GREY)
            raise error
    assert os.listdir(tmp_path) == ["a.mp4"] and (tmp_path / "a.mp4").read_text() == "the last run's"


def test_a_film_without_pictures_is_no_file(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", fps=8):
        pass
    assert os.listdir(tmp_path) == []


def test_pictures_of_another_size_are_refused(tmp_path):
    with pytest.raises(AssertionError):
        with VideoWriter(tmp_path / "a.mp4", fps=8) as film:
            film.write(GREY)
            film.write(GREY[1:])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_named(tmp_path):
    os.symlink("/dev/full", tmp_path / ".a.mp4")
    with pytest.raises(OSError, match="a.mp4.*No space left"):
        with VideoWriter(tmp_path / "a.mp4", fps=8) as film:
            for _ in range(300):
                film.write(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def changed(picture):
    """Rows and columns (first, last) in which a picture differs from GREY."""
    y, x = np.nonzero((picture != GREY).any(2))
    return y.min(), y.max(), x.min(), x.max()


def test_drawing_stays_where_it_is_meant_and_leaves_the_picture_alone():
    before = GREY.copy()
    assert changed(video_out.draw_boxes(GREY, [(10, 5, 20, 30)], "red", width=1)) == (5, 29, 10, 19)
    assert changed(video_out.draw_cross(GREY, (20, 10), "red", size=5, width=1)) == (5, 15, 15, 25)
    assert changed(video_out.draw_arrow(GREY, (5, 16), (40, 16), "red", width=2))[2:] == (5, 40)
    assert changed(video_out.draw_text(GREY, "a long text", (0, 0), max_width=20))[3] <= 21
    assert (video_out.draw_arrow(GREY, (5, 5), (5, 5)) != GREY).any(), "an arrow without length is a dot"
    assert (GREY == before).all()


def test_heat_is_strongest_at_its_peak_and_leaves_zeros_as_they_are():
    heat = np.zeros((3, 3))
    heat[0, 2] = 5
    picture = video_out.draw_heat(GREY, heat)
    difference = abs(picture.astype(int) - GREY).sum(2)
    assert np.unravel_index(difference.argmax(), difference.shape) > (0, 30) and (difference[20:, :20] == 0).all()
    assert (video_out.draw_heat(GREY, heat * 0) == GREY).all()


def test_a_contact_sheet_has_a_row_per_name_and_a_column_per_picture(tmp_path):
    levels = {"a": (30, 60, 90), "b": (120, 150)}
    rows = {name: [np.full((8, 8, 3), level, np.uint8) for level in row] for name, row in levels.items()}
    video_out.contact_sheet(tmp_path / "sheet.png", rows, titles=["x"] * 3, captions=["y"] * 3,
                            legend={"fine": "red"}, title="A sheet", cell=40)
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    counts = dict(zip(*np.unique(sheet[..., 0], return_counts=True), strict=True))
    assert all(counts[level] >= 1600 for row in levels.values() for level in row)
    assert os.listdir(tmp_path) == ["sheet.png"]


def test_panels_stand_side_by_side_under_their_labels():
    frame = video_out.side_by_side([GREY, GREY], ["left", "right"], ["white", "red"], gap=4, strip=26, narrowest=60)
    assert frame.shape == (26 + 33, 60 + 4 + 60, 3)
    assert (frame[26:, :45] == GREY).all() and (frame[26:, 64:109] == GREY).all()
    assert frame[:26, :60].max() > 200


def test_a_sheet_shows_gazed_pixels_and_outlines_where_the_patches_lie(tmp_path):
    """One coarse patch, top right, in frame 0; one fine patch, bottom left, in frame 1; a padded slot shows nothing."""
    config = tiny_gaze().config  # 16+32 px, patch 8: ids 0..3 and 4..19; cells of 160 px, 40 px per fine patch
    gazing = {"gazing_pos": torch.tensor([[1, 9, 20 + 16]]),
              "if_padded_gazing": torch.tensor([[False, True, False]]), "num_gazing_each_frame": torch.tensor([2, 1])}
    video = to_model_pixels(torch.full((2, 3, 32, 32), 200))
    sheet(tmp_path / "a.png", video, gazing, config, reconstruction=video, title="A clip", losses=[0.1, 0.2])
    picture = np.array(Image.open(tmp_path / "a.png")).astype(int)

    def cell(row, column):
        y = 44 + 164 * row
        x = 22 + 164 * column
        return picture[y:y + 160, x:x + 160]

    assert (cell(0, 0) == 200).all() and (cell(3, 1) == 200).all()
    for column, rows, columns in ((0, slice(0, 80), slice(80, 160)), (1, slice(120, 160), slice(0, 40))):
        want = np.zeros((160, 160), bool)
        want[rows, columns] = True
        assert ((cell(2, column) == 200).all(2) == want).all(), "gazed pixels"
        outline = (cell(1, column) != 100).any(2)
        assert outline.any() and not outline[~want].any() and not outline[rows, columns].all()
