"""Causal attention without the masks that would cost time or memory and, on a CPU, with the products of linear.py."""
import torch
import torch.nn.functional as F

from lib.cpu import linear, usable

FEW = 4e6  # multiplications per head; below, F.scaled_dot_product_attention is quicker


def causal_attention(q, k, v):
    """Causal attention of queries (B, H, q, d), the last q of the L tokens of keys and values (B, H, L, d)."""
    past = k.shape[2] - q.shape[2]
    if by_head_pays(q, k.shape[2]):
        return CausalByHead.apply(q, k, v)
    if past == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # For a CPU, where a mask costs a seventh of the time and the past needs none: both parts by themselves, each
    # weighted by its sum of exponentials, which only this operator returns.
    part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    old, old_sum = part(q, k[:, :, :past], v[:, :, :past])
    new, new_sum = part(q, k[:, :, past:], v[:, :, past:], is_causal=True)
    return torch.lerp(new, old, torch.sigmoid(old_sum - new_sum).unsqueeze(-1).to(new.dtype))


def block_causal_attention(q, k, v, ends, keep=None):
    """Attention in which a block of tokens sees itself and all earlier blocks.

    q, k, v (B, H, L, d); ends: index after the last token of each block, ascending, the last is L. keep (B, L) True for
    tokens that others may see, at least one in each clip's first block. No L x L mask: each block's queries meet a
    growing slice of the keys.
    """
    # short: one call with a mask is quicker than one per block; on a CPU at 339 tokens in 14 blocks it takes 1.5 times
    # as long, and at 800 1.6 times
    if q.shape[2] < (1024 if q.is_cuda else 256):
        block = torch.repeat_interleave(torch.arange(len(ends)), torch.tensor(ends).diff(prepend=torch.tensor([0])))
        mask = (block.unsqueeze(1) >= block).to(q.device)  # (L, L)
        if keep is not None:
            mask = mask & keep[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if q.device.type == "cpu":
        k, v = k.contiguous(), v.contiguous()  # once, or every block copies its slice
    out, start = [], 0
    for end in ends:
        if end > start:
            block, keys, values = q[:, :, start:end], k[:, :, :end], v[:, :, :end]
            if by_head_pays(block, end) and not torch.is_grad_enabled():
                out.append(attend_by_head(block, keys, values, None if keep is None else keep[:, :end]))
            else:
                mask = None if keep is None else keep[:, None, None, :end]
                out.append(F.scaled_dot_product_attention(block, keys, values, mask))
        start = end
    return torch.cat(out, dim=2)


def by_head_pays(q, keys):
    return (q.device.type == "cpu" and q.shape[2] * keys * q.shape[3] >= FEW
            and (usable(q) or q.dtype == torch.bfloat16 and not torch.is_grad_enabled()))


def attend_by_head(q, k, v, keep=None, causal=False):
    """F.scaled_dot_product_attention up to rounding, in half to three quarters of its time: its products are those of
    linear.py, and scores stay in the processor's cache. keep (B, keys) True for keys that may be seen, at least one;
    causal: the queries are the last of the keys."""
    out, q = torch.empty_like(q), q * q.shape[-1] ** -0.5
    for b, h, rows, keys in parts(q, k, causal):
        p = probabilities(q[b, h, rows], k[b, h, keys], None if keep is None else keep[b], causal)
        out[b, h, rows] = linear(p, v[b, h, keys].T)
    return out


def parts(q, k, causal):
    """Clip, head, a slice of its queries and the slice of keys that these see. Causal: in parts of 256 queries, so that
    few scores are computed in vain; the largest first, so that the next ones fit into its memory."""
    L, past = q.shape[2], k.shape[2] - q.shape[2]
    step = 256 if causal else L
    for b in range(len(q)):
        for h in range(q.shape[1]):
            for start in reversed(range(0, L, step)):
                end = min(start + step, L)
                yield b, h, slice(start, end), slice(0, past + end if causal else None)


def probabilities(q, k, keep, causal):  # (rows, d), (keys, d), (keys,) -> (rows, keys)
    scores = linear(q, k)
    if keep is not None:
        scores.masked_fill_(~keep, float("-inf"))
    if causal:
        later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        scores[:, -len(q):].masked_fill_(later, float("-inf"))
    return torch.softmax(scores, dim=-1, out=scores)


class CausalByHead(torch.autograd.Function):
    """attend_by_head(causal=True) and its gradients, the first only."""

    @staticmethod
    def forward(ctx, q, k, v):
        q, k, v = (x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous() for x in (q, k, v))
        out = attend_by_head(q, k, v, causal=True)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, out = ctx.saved_tensors
        scale, grad = q.shape[-1] ** -0.5, grad.contiguous()
        q, mean = q * scale, (grad * out).sum(-1, keepdim=True)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for b, h, rows, keys in parts(q, k, True):
            queries, g = q[b, h, rows], grad[b, h, rows]
            p = probabilities(queries, k[b, h, keys], None, True)
            d = linear(g, v[b, h, keys]).sub_(mean[b, h, rows]).mul_(p)
            dq[b, h, rows] = linear(d, k[b, h, keys].T).mul_(scale)
            dk[b, h, keys] += linear(queries.T, d.T).T
            dv[b, h, keys] += linear(g.T, p.T).T
        return dq, dk, dv
