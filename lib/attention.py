"""Causal and block-causal attention without the masks that would cost time or memory.

Dimension key: B clips, H heads, q queries, L tokens, d width of a head.
"""
import functools
import math

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from lib.cpu import attend_past_and_new, min_tokens_by_block, needs_no_mask


def causal_attention(q, k, v):
    """Each token attends to itself and to the tokens before it. q (B, H, q, d): the last q of the L tokens whose keys
    and values are k, v (B, H, L, d)."""
    n_queries, n_tokens = q.shape[2], k.shape[2]
    if n_queries == n_tokens:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if n_queries == 1:
        return F.scaled_dot_product_attention(q, k, v)    # the last token sees all
    if needs_no_mask(q):
        return attend_past_and_new(q, k, v)

    # CUDA kernels know this mask by name; spelled out, it would rule out flash attention. Not yet run on a GPU
    if q.device.type == "cuda":
        mask = causal_lower_right(n_queries, n_tokens)
    else:
        room = -(-n_tokens // 1024) * 1024
        mask = causal_mask(n_queries, room, q.dtype, q.device)[:, room - n_tokens:]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@functools.lru_cache(maxsize=4)   # made for many lengths: for fewer tokens, columns are left out on the left
@torch.inference_mode(False)      # a mask made for inference could not be used with gradients later
def causal_mask(n_queries, n_tokens, dtype, device):
    """(q, L) to add to scores: 0 where the i-th of the last q tokens may look, itself included, else -inf."""
    mask = torch.full((n_queries, n_tokens), float("-inf"), dtype=dtype, device=device)
    return mask.triu(n_tokens - n_queries + 1)


def attend_shared(q, k, v, past_k, past_v):
    """Attention of C alternatives q, k, v (C, H, L, d) to themselves and to one past (1, H, P, d), which is not copied:
    the queries of all alternatives meet it as the rows of one product. In the encoder at published sizes, late in a
    clip, 2.3 times as fast on a CPU."""
    C, H, L, d = q.shape
    P = past_k.shape[2]
    q = q / math.sqrt(d)
    rows = q.transpose(0, 1).flatten(1, 2)                                # (H, C·L, d)
    to_past = rows @ past_k[0].transpose(1, 2)
    to_past = to_past.unflatten(1, (C, L)).transpose(0, 1)                # (C, H, L, P)
    to_own = q @ k.transpose(2, 3)                                        # (C, H, L, L)

    weights = torch.cat([to_past, to_own], dim=3).softmax(dim=3)
    of_past = weights[..., :P].transpose(0, 1).flatten(1, 2) @ past_v[0]  # (H, C·L, d)
    of_past = of_past.unflatten(1, (C, L)).transpose(0, 1)
    return of_past + weights[..., P:] @ v


class BlockCausal:
    """Attention in which each block of tokens (a frame) sees itself and all earlier blocks. Made once for all layers.

    ends: the index after the last token of each block, ascending; the last is L. keep (B, L): True for tokens that
    others may see, at least one in each clip's first block.
    """

    def __init__(self, ends, device, keep=None):
        self.ends = ends
        self.keep = None if keep is None else keep[:, None, None, :]    # (B, 1, 1, L)

        # short sequences: one call with a mask is faster than one call per block
        self.mask = None
        if ends[-1] < min_tokens_by_block(device):
            self.mask = block_causal_mask(ends, device)
            if keep is not None:
                self.mask = self.mask & self.keep

    def __call__(self, q, k, v):
        """q, k, v (B, H, L, d) -> (B, H, L, d)"""
        if self.mask is not None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)

        # long ones without an L x L mask: the queries of a block meet a growing slice of the keys
        k, v = k.contiguous(), v.contiguous()             # once; else every block may copy its slice
        out = []
        start = 0
        for end in self.ends:
            if end > start:
                visible = None if self.keep is None else self.keep[..., :end]
                block = q[:, :, start:end]
                out.append(F.scaled_dot_product_attention(block, k[:, :, :end], v[:, :, :end], attn_mask=visible))
            start = end
        return torch.cat(out, dim=2)


def block_causal_mask(ends, device):
    """(L, L) bool, True where the row's token may look at the column's. Made on the device, so nothing is copied."""
    mask = torch.zeros(ends[-1], ends[-1], dtype=torch.bool, device=device)
    start = 0
    for end in ends:
        mask[start:end, :end] = True
        start = end
    return mask
