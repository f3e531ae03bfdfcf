"""Wrong videos and gazings are answered by name, by every network that takes them."""
import pytest
import torch
from conftest import normal_video, tiny_mae

from gazing import random_gazing
from lib.pixels import check_video
from siglip import GazeSigLIP

GOOD = normal_video(2, 4)


def with_value(value):
    video = GOOD.clone()
    video[1, 2, 0, 5, 5] = value
    return video


WRONG = [
    (GOOD.numpy(), "is a ndarray, expected a tensor"),
    (GOOD[0], r"\(4, 3, 32, 32\), expected \(B, T, 3, H, W\).*unsqueeze\(0\)"),
    (GOOD[0, 0], r"\(3, 32, 32\), expected \(B, T, 3, H, W\)"),
    (GOOD.transpose(1, 2), r"looks like \(B, 3, T, H, W\), give .*transpose\(1, 2\)"),
    (GOOD.movedim(2, -1), r"looks like \(B, T, H, W, 3\), give .*movedim\(-1, 2\)"),
    (GOOD[:, :, :1], "3 channels"),
    (GOOD[:, :0], "nothing in it"),
    (GOOD[:0], "nothing in it"),
    ((GOOD * 50).byte(), "is torch.uint8, 0..255"),
    ((GOOD * 50).clamp(0, 255), r"has values of 0 to \d+.*, 0..255"),
    (with_value(float("nan")), "holds NaN or infinity"),
    (with_value(float("inf")), "holds NaN or infinity"),
    (GOOD.to("meta"), "is on meta, the model on cpu")]


@pytest.mark.parametrize("video, message", WRONG)
def test_wrong_pixels(video, message):
    with pytest.raises(ValueError, match=message):
        check_video(video, torch.zeros(1), "data.to_model_pixels(frames)")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_floating_point_types_are_cast(dtype):
    assert check_video(GOOD.to(dtype), torch.zeros(1), "").dtype == torch.float32


@pytest.fixture
def gazing():
    return random_gazing([3, 1, 2, 2], 2, 20)


def test_the_reconstructor_names_wrong_input(mae, gazing):
    for video, message in [*WRONG, (normal_video(2, 4, side=48), "H and W must be 32")]:
        with pytest.raises(ValueError, match=message):
            mae(video, gazing, [0])
    with pytest.raises(ValueError, match="to_model_pixels"):
        mae((GOOD * 50).byte(), gazing, [0])


def test_siglip_names_wrong_input(gazing):
    from transformers import SiglipVisionConfig, SiglipVisionModel
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    siglip = GazeSigLIP(SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=8)), "16+32")
    for video, message in WRONG:
        with pytest.raises(ValueError, match=message):
            siglip(video, gazing)
    with pytest.raises(ValueError, match="gazing is of 2 clips, pixels of 1"):
        siglip(GOOD[:1], gazing)


def test_the_reconstructor_takes_other_floating_point_types(mae, gazing):
    picture, loss = mae(GOOD.double(), gazing, [1])
    assert picture.dtype == loss.dtype == torch.float32


@pytest.mark.parametrize("change, message", [
    (dict(gazing_pos=torch.zeros(2, 7, dtype=torch.long)), r"gazing_pos \(2, 7\).* must be \(B, 8\)"),
    (dict(num_gazing_each_frame=torch.tensor([4, 4])), "gazing is of 2 frames, the video has 4"),
    (dict(gazing_pos=torch.zeros(3, 8, dtype=torch.long), if_padded_gazing=torch.zeros(3, 8, dtype=torch.bool)),
     "gazing is of 3 clips, the video of 2")])
def test_a_gazing_that_does_not_fit_the_video(mae, gazing, change, message):
    with pytest.raises(ValueError, match=message):
        mae(GOOD, gazing | change, [0])


@pytest.mark.parametrize("frames", [[], [4], [-1]])
def test_frames_that_are_not_there(mae, gazing, frames):
    with pytest.raises(ValueError, match="the video's frames, 0..3"):
        mae(GOOD, gazing, frames)


def test_more_frames_than_the_reconstructor_knows(gazing):
    with pytest.raises(ValueError, match="video has 4 frames, this reconstructor is for 3"):
        tiny_mae(max_num_frames=3)(GOOD, gazing, [0])
