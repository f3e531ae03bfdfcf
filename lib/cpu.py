"""What makes a CPU fast, behind the signatures of torch's own functions. On other devices these are torch's functions.

    y = linear(x, weight, bias)                                        # F.linear; Linear: nn.Linear
    y = conv3d(x, weight, bias)                                        # F.conv3d
    y = attend_past_and_new(q, k, v)                                   # causal attention

PyTorch hands float32 products to MKL, which leaves half of some AMD processors unused; oneDNN, which PyTorch contains
too, does not. Which of the two is faster is measured when this file is imported.
`torch.backends.mkldnn.enabled = False` switches oneDNN off.

Dimension key: B clips, H heads, L queries, K keys, d width of a head.
"""
import math
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

MIN_MULTIPLICATIONS = 4e6              # of a product: below, calling oneDNN costs more (15 us for 3) than it saves
MIN_WEIGHTS_TO_PACK = 50_000
MIN_QUERIES_WITHOUT_MASK = 64          # a frame's tokens; a block of ten gazes is faster with a mask


# ----------------------------------------------------------------------------------------------------------------------
# products


def linear(x, weight, bias=None):
    """F.linear: x (…, K), weight (N, K) or what pack() made of it, bias (N,) -> (…, N). First derivatives only."""
    if weight.is_mkldnn:
        return onednn_linear(x.float(), weight, bias)

    is_large = x.numel() * len(weight) > MIN_MULTIPLICATIONS
    if is_large and weight.dtype == x.dtype and onednn_pays(x):
        return OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def add_linear(x, y, weight):
    """x + linear(y, weight), x (…, N), y (…, K); where it can be, as one product that adds to x."""
    is_large = y.numel() * len(weight) > MIN_MULTIPLICATIONS and onednn_pays(y)
    if weight.is_mkldnn or is_large or not x.dtype == y.dtype == weight.dtype:
        return x + linear(y, weight)
    if torch.is_autocast_enabled(x.device.type):  # it would halve x too
        return x + linear(y, weight)
    total = torch.addmm(x.flatten(0, -2), y.flatten(0, -2), weight.T)
    return total.view(x.shape)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


def quicken(network):
    """Turn the nn.Linear layers of another library's network into Linear, in place."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return network


def pack(weight):
    """A copy of weight (N, K) for linear() without gradients, which later changes of the weight do not reach. On a CPU
    it is laid out for oneDNN where that pays: 1.6 times as fast for ten rows, not for one."""
    if weight.numel() >= MIN_WEIGHTS_TO_PACK and onednn_pays(weight):
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return weight.clone()


def onednn_pays(x):
    is_on = ONEDNN_IS_FASTER and torch.backends.mkldnn.enabled and not torch.is_autocast_enabled("cpu")
    return is_on and x.device.type == "cpu" and x.dtype == torch.float32


def onednn_linear(x, weight, bias=None):
    # With gaps between its rows a weight is multiplied a thousand times slower.
    if not (weight.is_mkldnn or weight.is_contiguous() or weight.T.is_contiguous()):
        weight = weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def onednn_gain():
    """How many times as fast oneDNN multiplies two 256 x 256 matrices as torch.mm does: 0.9 on a Zen 3, 2 on a Zen 5.
    Takes 20 ms."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return 0.0
    x = torch.ones(256, 256, device="cpu", dtype=torch.float32)
    fewest_seconds = [math.inf, math.inf]
    for _ in range(20):
        for i, multiply in enumerate((torch.mm, onednn_linear)):
            start = time.perf_counter()
            multiply(x, x)
            fewest_seconds[i] = min(fewest_seconds[i], time.perf_counter() - start)
    return fewest_seconds[0] / fewest_seconds[1]


# Where the two are level, noise must not decide: a resumed run has to equal an uninterrupted one bit for bit.
ONEDNN_IS_FASTER = onednn_gain() > 1.3


class OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        x_rows = x.reshape(-1, x.shape[-1])
        grad_rows = grad.reshape(-1, grad.shape[-1])
        x_grad = weight_grad = bias_grad = None

        if ctx.needs_input_grad[0]:
            x_grad = onednn_linear(grad, weight.T)

        # oneDNN copies a transposed first factor, so let it be the smaller one.
        if ctx.needs_input_grad[1] and weight.shape[0] <= weight.shape[1]:
            weight_grad = onednn_linear(grad_rows.T, x_rows.T)
        elif ctx.needs_input_grad[1]:
            weight_grad = onednn_linear(x_rows.T, grad_rows.T).T

        if ctx.needs_input_grad[2]:
            bias_grad = grad_rows.sum(0)
        return x_grad, weight_grad, bias_grad


# ----------------------------------------------------------------------------------------------------------------------
# convolutions


def conv3d(x, weight, bias=None, stride=(1, 1, 1), padding=(0, 0, 0)):
    """F.conv3d of x (B, C, T, h, w) without stride or padding in time. A kernel one frame deep, or as deep as x, is a
    convolution in two dimensions, which is twice as fast."""
    if weight.shape[2] == 1:
        frames = x.transpose(1, 2)
        y = F.conv2d(frames.flatten(0, 1), weight[:, :, 0], bias, stride[1:], padding[1:])
        return y.unflatten(0, frames.shape[:2]).transpose(1, 2)
    if weight.shape[2] == x.shape[2]:
        return F.conv2d(x.flatten(1, 2), weight.flatten(1, 2), bias, stride[1:], padding[1:]).unsqueeze(2)
    return F.conv3d(x, weight, bias, stride, padding)


# ----------------------------------------------------------------------------------------------------------------------
# attention


def needs_no_mask(q):
    """Whether attend_past_and_new is faster than a mask."""
    return q.device.type == "cpu" and q.shape[2] >= MIN_QUERIES_WITHOUT_MASK and not q.requires_grad


def attend_past_and_new(q, k, v):
    """Causal attention of q (B, H, L, d), the last L of K > L tokens, to k and v (B, H, K, d), without gradients. With
    a mask, generate takes 6 to 9 % longer. Attend to the past and to the new keys separately, then merge the two with
    their log-sum-exp, which only this operator returns."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    sizes = [k.shape[2] - q.shape[2], q.shape[2]]
    past_k, new_k = k.split(sizes, dim=2)
    past_v, new_v = v.split(sizes, dim=2)
    past, past_sum = attend(q, past_k, past_v)
    new, new_sum = attend(q, new_k, new_v, is_causal=True)

    past_share = torch.sigmoid(past_sum - new_sum).unsqueeze(-1)
    return torch.lerp(new, past, past_share.to(new.dtype))


def min_tokens_by_block(device):
    """Block-causal attention of fewer tokens is faster in one call with a mask than in one call per block. On a CPU the
    mask makes 339 tokens in 14 blocks take 1.5 times as long."""
    return 256 if device.type == "cpu" else 1024
