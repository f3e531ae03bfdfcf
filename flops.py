"""Arithmetic of the work, counted from the sizes: floating-point operations, a multiply-add being two.

Every layer counts for every token, attention for the keys that a query may see. Norms, activations and softmax, which
move memory rather than multiply, do not count. bench.py divides this by the rate of a large matrix product.
"""
import math


def stack(tokens, pairs, dim, mlp, layers, mlp_matrices=2):
    """Transformer layers over `tokens`; pairs: how many (query, key) there are in attention."""
    return layers * (2 * tokens * (4 * dim * dim + mlp_matrices * dim * mlp) + 4 * pairs * dim)


def gaze_encoder(c, n_frames):
    d = c.hidden_size
    return 2 * n_frames * c.ids_per_scale[-1] * (3 * c.patch_size ** 2 * d + 27 * d * d * c.num_conv_blocks + d * d)


def gaze_decoder(c, n):
    """One clip with n[t] gazes in frame t."""
    tokens, K = len(n) * c.ids_per_scale[-1] + sum(n), c.num_multi_token_pred
    heads = 2 * c.hidden_size * K * (c.num_ids + 2) * sum(math.ceil(k / K) for k in n)
    return heads + stack(tokens, tokens * (tokens + 1) // 2, c.hidden_size, c.intermediate_size, c.num_layers, 3)


def gaze(c, n):
    return gaze_encoder(c, len(n)) + gaze_decoder(c, n)


def block_pairs(sizes):
    """(query, key) pairs if a token sees its own and earlier blocks."""
    return sum(a * sum(sizes[:i + 1]) for i, a in enumerate(sizes))


def mae(c, n, frames):
    """Reconstruct `frames` of one clip with n[t] gazes in frame t. Nothing after the last of them is needed."""
    n = n[:max(frames) + 1]
    V, D, d, pixels = c.num_ids, c.hidden_size, c.decoder_hidden_size, 3 * c.patch_size ** 2
    encoder, decoder = [1, *n], [1, *(V if t in frames else n_t for t, n_t in enumerate(n))]
    return (stack(sum(encoder), block_pairs(encoder), D, c.intermediate_size, c.num_hidden_layers)
            + stack(sum(decoder), block_pairs(decoder), d, c.decoder_intermediate_size,
                          c.decoder_num_hidden_layers)
            + 2 * (sum(n) * pixels * D + sum(encoder) * D * d + len(frames) * c.ids_per_scale[-1] * d * pixels))


def search(c, n_frames, slots):
    """Greedy search: (only the current frame's tokens, whole reconstructions: the naive way, candidates)."""
    V, D, d, P = c.num_ids, c.hidden_size, c.decoder_hidden_size, c.ids_per_scale[-1]
    ours = naive = candidates = 0
    for t in range(n_frames):
        past = 1 + slots * t
        for j in range(slots):
            new = j + 1
            one = (stack(new, new * (past + new), D, c.intermediate_size, c.num_hidden_layers)
                   + stack(V, V * (past + V), d, c.decoder_intermediate_size, c.decoder_num_hidden_layers)
                   + 2 * (new * D * d + P * d * 3 * c.patch_size ** 2))
            ours += (V - j) * one
            naive += (V - j) * mae(c, [slots] * t + [new], [t])
            candidates += V - j
    return ours, naive, candidates


def vit(sizes, tokens, pairs, patch):
    """A plain vision transformer; sizes: dict with Hugging Face's names."""
    d = sizes["hidden_size"]
    layers = stack(tokens, pairs, d, sizes["intermediate_size"], sizes["num_hidden_layers"])
    return layers + 2 * tokens * 3 * patch ** 2 * d


def perceptual(sizes, side, patch):
    """DINOv2 (patch 14, CLS and four registers) and SigLIP on one frame."""
    dino, siglip = (side // 14) ** 2 + 5, (side // patch) ** 2
    return vit(sizes, dino, dino ** 2, 14) + vit(sizes, siglip, siglip ** 2, patch)
