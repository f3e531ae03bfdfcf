"""Pixels that a model is given: wrong ones are named, where else a convolution would fail or nonsense come out."""
import math

import torch


def check_video(video, like, recipe, size=None, name="video"):
    """Return video (B, T, 3, H, W) in the floating-point type of the weights `like`, or raise a ValueError that says
    what is wrong with it. recipe: how a user makes such pixels, for the message. size: H and W, if they are given."""
    shape = tuple(video.shape)
    if video.dim() != 5:
        raise ValueError(f"{name} has shape {shape}, expected 5 dimensions (B, T, 3, H, W); of a single clip: "
                         f"{name}.unsqueeze(0)")
    if shape[2] != 3 and shape[1] == 3:
        raise ValueError(f"{name} has shape {shape}, which looks like (B, 3, T, H, W): give {name}.transpose(1, 2)")
    if shape[2] != 3:
        raise ValueError(f"{name} has shape {shape}, expected 3 channels (RGB) in (B, T, 3, H, W)")
    if 0 in shape:
        raise ValueError(f"{name} has shape {shape}: nothing in it")
    if size is not None and shape[3:] != (size, size):
        raise ValueError(f"{name} has {shape[3]} x {shape[4]} pixels, this model takes {size} x {size}: "
                         "data.resize_crop makes them")

    if not video.is_floating_point():
        raise ValueError(f"{name} is {video.dtype}, 0..255? Give {recipe}")
    if video.device != like.device:
        raise ValueError(f"{name} is on {video.device}, the model on {like.device}: move one of them")

    darkest, brightest = torch.stack(video.detach().aminmax()).tolist()     # one wait on a GPU
    if not (math.isfinite(darkest) and math.isfinite(brightest)):
        raise ValueError(f"{name} holds NaN or infinity")
    if max(-darkest, brightest) > 20:
        raise ValueError(f"{name} has values of {darkest:.4g} to {brightest:.4g}, 0..255? Give {recipe}")
    return video.to(like.dtype)
