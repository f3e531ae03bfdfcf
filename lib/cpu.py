"""What makes a CPU fast, behind the signatures of torch's own functions. On other devices these are torch's functions.

    y = linear(x, weight, bias)                                        # F.linear; Linear: nn.Linear
    y = scaled_dot_product_attention(q, k, v, is_causal=True)          # F.scaled_dot_product_attention

linear() multiplies through oneDNN, twice as fast on AMD CPUs with AVX-512: PyTorch hands float32 products to MKL, which
reaches 110 GFLOP/s on one core of such an EPYC; oneDNN, which PyTorch contains too, reaches 240. Intel's processors
were not tried. `torch.backends.mkldnn.enabled = False` switches it off.

Dimension key: B clips, H heads, L queries, K keys, d width of a head.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

ONEDNN_IS_FASTER = (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
                    and torch.backends.cpu.get_cpu_capability() == "AVX512")

MIN_MULTIPLICATIONS = 4e6              # of a product: below, calling oneDNN costs more (15 us for 3) than it saves
MIN_MULTIPLICATIONS_PER_HEAD = 4e6     # of attention: below, torch's own operator is faster
MIN_WEIGHTS_TO_PACK = 50_000
MIN_QUERIES_WITHOUT_MASK = 64          # a frame's tokens; a block of ten gazes is faster with a mask
QUERIES_AT_ONCE = 256                  # of causal attention: fewer scores are computed in vain, more calls are needed


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


def rms_norm(x, eps):
    """F.rms_norm without weights over the last dimension, in float32 whatever the type of x: x (…, D) -> (…, D)."""
    y = x.float()
    if x.is_cuda:
        return F.rms_norm(y, y.shape[-1:], eps=eps).to(x.dtype)  # one kernel

    # on a CPU, torch's takes twice as many passes
    length = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    root = torch.hypot(length * y.shape[-1] ** -0.5, y.new_tensor(eps ** 0.5))
    return (y / root).to(x.dtype)


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


def scaled_dot_product_attention(q, k, v, attn_mask=None, is_causal=False):
    """torch's function for q (B, H, L, d) and k, v (B, H, K, d), with one difference: with is_causal the queries are
    the last L of the K tokens, on a CPU also where K > L (torch: the first). First derivatives only."""
    if by_head_pays(q, k):
        if is_causal:
            return CausalByHead.apply(q, k, v)
        if not torch.is_grad_enabled():
            if attn_mask is None:
                return attend_by_head(q, k, v)
            if is_key_mask(attn_mask):
                return attend_by_head(q, k, v, keep=attn_mask[:, 0, 0])

    if is_causal and q.shape[2] < k.shape[2]:
        return attend_past_and_new(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)


def needs_no_mask(q):
    """Whether causal attention of these queries to more keys is faster with is_causal=True than with a mask."""
    return q.device.type == "cpu" and q.shape[2] >= MIN_QUERIES_WITHOUT_MASK


def min_tokens_by_block(device):
    """Block-causal attention of fewer tokens is faster in one call with a mask than in one call per block. On a CPU the
    mask makes 339 tokens in 14 blocks take 1.5 times as long."""
    return 256 if device.type == "cpu" else 1024


def attend_past_and_new(q, k, v):
    """Causal attention on a CPU, where a mask would cost 14 %. Attend to the past and to the new keys separately, then
    merge the two with their log-sum-exp, which only this operator returns."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    sizes = [k.shape[2] - q.shape[2], q.shape[2]]
    past_k, new_k = k.split(sizes, dim=2)
    past_v, new_v = v.split(sizes, dim=2)
    past, past_sum = attend(q, past_k, past_v)
    new, new_sum = attend(q, new_k, new_v, is_causal=True)

    past_share = torch.sigmoid(past_sum - new_sum).unsqueeze(-1)
    return torch.lerp(new, past, past_share.to(new.dtype))


def by_head_pays(q, k):
    n_multiplications = q.shape[2] * k.shape[2] * q.shape[3]
    if n_multiplications < MIN_MULTIPLICATIONS_PER_HEAD:
        return False
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return not torch.is_grad_enabled()
    return onednn_pays(q)


def is_key_mask(mask):
    """Whether a mask says of each clip's keys which may be seen: (B, 1, 1, K) bool."""
    return mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1:3] == (1, 1)


def attend_by_head(q, k, v, keep=None, is_causal=False):
    """Attention in half to three quarters of the time of torch's operator: its products are those of linear(), and the
    scores of one head stay in the processor's cache. keep (B, K) True for keys that may be seen, at least one."""
    out = torch.empty_like(q)
    q = q * q.shape[-1] ** -0.5
    for b, h, rows, keys in parts(q, k, is_causal):
        keep_keys = None if keep is None else keep[b]
        queries = q[b, h, rows]
        values = v[b, h, keys]
        probabilities = attention_probabilities(queries, k[b, h, keys], keep_keys, is_causal)
        out[b, h, rows] = linear(probabilities, values.T)
    return out


def parts(q, k, is_causal):
    """Yield (clip, head, slice of its queries, slice of the keys that these see). The last queries, which see most
    keys, come first, so that the scores of the others fit into the same memory."""
    n_queries = q.shape[2]
    n_past = k.shape[2] - n_queries
    step = QUERIES_AT_ONCE if is_causal else n_queries

    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for start in reversed(range(0, n_queries, step)):
                end = min(start + step, n_queries)
                n_keys = n_past + end if is_causal else k.shape[2]
                yield b, h, slice(start, end), slice(0, n_keys)


def attention_probabilities(q, k, keep, is_causal):
    """q (L, d), scaled; k (K, d); keep (K,) bool or None -> (L, K)."""
    scores = linear(q, k)
    if keep is not None:
        scores.masked_fill_(~keep, float("-inf"))
    if is_causal:
        n = len(q)
        is_later = torch.ones(n, n, dtype=torch.bool).triu(1)
        scores[:, -n:].masked_fill_(is_later, float("-inf"))
    return torch.softmax(scores, dim=-1, out=scores)


class CausalByHead(torch.autograd.Function):
    """attend_by_head(is_causal=True) with its first derivatives."""

    @staticmethod
    def forward(ctx, q, k, v):
        q, k, v = with_whole_rows(q), with_whole_rows(k), with_whole_rows(v)
        out = attend_by_head(q, k, v, is_causal=True)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, out = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        q = q * scale
        grad = grad.contiguous()
        mean = (grad * out).sum(-1, keepdim=True)      # of the gradient under each query's probabilities

        q_grad = torch.empty_like(q)
        k_grad = torch.zeros_like(k)
        v_grad = torch.zeros_like(v)
        for b, h, rows, keys in parts(q, k, is_causal=True):
            queries = q[b, h, rows]
            some_keys = k[b, h, keys]
            out_grad = grad[b, h, rows]
            probabilities = attention_probabilities(queries, some_keys, None, is_causal=True)

            # Gradient of the scores: each probability times how far its value's gradient lies above the mean.
            score_grad = linear(out_grad, v[b, h, keys])
            score_grad.sub_(mean[b, h, rows]).mul_(probabilities)

            q_grad[b, h, rows] = linear(score_grad, some_keys.T).mul_(scale)
            k_grad[b, h, keys] += linear(queries.T, score_grad.T).T
            v_grad[b, h, keys] += linear(out_grad.T, probabilities.T).T
        return q_grad, k_grad, v_grad


def with_whole_rows(x):
    """x (B, H, L, d) with each head's rows one behind the other, which oneDNN multiplies without copying them."""
    if x.stride()[2:] == (x.shape[3], 1):
        return x
    return x.contiguous()
