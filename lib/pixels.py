"""Pixels that a model is given: wrong ones are named, where else a convolution would fail or nonsense come out."""
import math

import torch

LARGEST = 20  # of normalised pixels, which lie within -7 and 3; of bytes, 255


def check_video(video, like, recipe, size=None, name="video", values=True):
    """Return video (B, T, 3, H, W) in the floating-point type of the weights `like`, or raise a ValueError that says
    what is wrong with it. recipe: how a user makes such pixels, for the message. size: H and W, if they are given.
    values=False: do not look at the values, which would wait for a GPU."""
    check_tensor(video, like, "(B, T, 3, H, W)", name)
    check_shape(video, size, name)
    if not video.is_floating_point():
        raise ValueError(f"{name} is {video.dtype}, 0..255? Give {recipe}")
    if values:
        check_values(video, -LARGEST, LARGEST, recipe, name)
    return video.to(like.dtype)


def check_frames(frames):
    """ValueError unless frames are a tensor (T, 3, H, W) of uint8, at least one of them."""
    found = f"a {type(frames).__name__}"
    if isinstance(frames, torch.Tensor):
        if frames.dtype == torch.uint8 and frames.dim() == 4 and frames.shape[1] == 3 and frames.numel():
            return
        found = f"{frames.dtype} {tuple(frames.shape)}"
    raise ValueError(f"frames are {found}, expected a tensor (T, 3, H, W) of torch.uint8, 0..255, as data.read_frames "
                     "gives; of a list of (H, W, 3): torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)")


def check_tensor(pixels, like, form, name):
    """ValueError unless pixels are a tensor on the device of the weights `like`."""
    if not isinstance(pixels, torch.Tensor):
        raise ValueError(f"{name} is a {type(pixels).__name__}, expected a tensor {form}")
    if pixels.device != like.device:
        raise ValueError(f"{name} is on {pixels.device}, the model on {like.device}: move one of them")


def check_values(pixels, low, high, recipe, name):
    """ValueError unless pixels, floats, all lie in low..high."""
    extremes = pixels.detach().aminmax()
    darkest, brightest = torch.stack(extremes).tolist()     # one wait on a GPU
    if not (math.isfinite(darkest) and math.isfinite(brightest)):
        raise ValueError(f"{name} holds NaN or infinity")
    if darkest < low or brightest > high:
        hint = ", 0..255?" if brightest > LARGEST else "."
        raise ValueError(f"{name} has values of {darkest:.4g} to {brightest:.4g}{hint} Give {recipe}")


def check_shape(video, size, name):
    shape = tuple(video.shape)
    has_shape = f"{name} has shape {shape}, expected (B, T, 3, H, W)"
    if len(shape) == 4:
        raise ValueError(f"{has_shape}: of a single clip, {name}.unsqueeze(0)")
    if len(shape) != 5:
        raise ValueError(has_shape)
    if shape[2] != 3 and shape[1] == 3:
        raise ValueError(f"{has_shape}: this looks like (B, 3, T, H, W), give {name}.transpose(1, 2)")
    if shape[2] != 3 and shape[4] == 3:
        raise ValueError(f"{has_shape}: this looks like (B, T, H, W, 3), give {name}.movedim(-1, 2)")
    if shape[2] != 3:
        raise ValueError(f"{has_shape}: 3 channels are red, green and blue")
    if video.numel() == 0:
        raise ValueError(f"{has_shape}: there is nothing in it")
    if size is not None and shape[3:] != (size, size):
        raise ValueError(f"{has_shape}: H and W must be {size}, data.resize_crop makes them so")
