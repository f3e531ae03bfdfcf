"""The gaze model: a small convolutional encoder and a LLaMA-style decoder that names patches, frame by frame.

    gaze = Gaze(GazeConfig())                                  # fresh weights, published size (3.3 M parameters)
    gaze = Gaze.from_pretrained("out/toy/grpo")                # a folder, or a Hugging Face hub id
    out = gaze.generate(video, gazing_ratio=0.1)               # choose patches: video (B, T, 3, R, R) -> dict
    log_prob, task_loss = gaze(video, out)                     # score given patches, with gradients

A *gaze* of B clips is a dict of three tensors, frame after frame along N (paper, section 3):
    gazing_pos             (B, N) int64   patch id within its frame + V * frame
    if_padded_gazing       (B, N) bool    True = a dummy slot; its gazing_pos means nothing
    num_gazing_each_frame  (T,)   int64   slots of each frame, the same for all clips; sums to N

Dimension key: B clips, T frames, S scales, V patch ids per frame (all scales), P vision tokens per frame (finest
scale), K slots predicted at once, N slots of a clip, L tokens of a clip, D width, H heads.
"""
import functools
import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from gazing import Grids, Tiling, join_frames, pack_front, split_frames
from lib.attention import causal_attention
from lib.cpu import Linear, linear, pack
from lib.weights import assign, load_gaze, published_name, save_gaze

# ----------------------------------------------------------------------------------------------------------------------
# configuration


@dataclass
class GazeConfig(Grids):
    scales: str = "32+64+112+224"      # side lengths at which a frame is looked at, ascending; the last: input size R
    patch_size: int = 16
    max_num_frames: int = 16           # frames of a training clip
    hidden_size: int = 192             # D
    num_layers: int = 4
    num_heads: int = 6
    intermediate_size: int = 384       # SwiGLU
    num_conv_blocks: int = 1
    num_multi_token_pred: int = 10     # K
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_factor: float = 8.0           # llama3 scaling
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_length: int = 8192
    initializer_range: float = 0.02    # of fresh weights
    gazing_ratio: float = 0.75         # used by generate() when the caller gives neither ratio nor requirement
    task_loss_requirement: float | None = None
    reference_decoding: bool = False   # generate as the published code does (stale positions, per-slot stopping)
    reference_file: dict = field(default_factory=dict, repr=False)  # config.json as read; saving keeps its other keys

    def __post_init__(self):
        self.check_sizes()
        if sorted(set(self.scale_list)) != self.scale_list:
            raise ValueError(f"scales={self.scales!r} must ascend")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of 2 * num_heads={self.num_heads}")
        if not 1 <= self.num_multi_token_pred <= self.num_ids:
            raise ValueError(f"num_multi_token_pred={self.num_multi_token_pred} must be in 1..{self.num_ids}, "
                             "the ids of a frame")

    @property
    def image_size(self):  # R
        return self.scale_list[-1]


# ----------------------------------------------------------------------------------------------------------------------
# encoder: causal in time, one token per patch of the finest scale


class ConvBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv3d = nn.Conv3d(dim, dim, (3, 3, 3), padding=(0, 1, 1))  # no padding in time: the past is put in front

    def forward(self, x, past):  # (B, D, T, h, w), the two input frames before it (B, D, 2, h, w)
        x, conv = torch.cat([past, x], dim=2), self.conv3d
        if x.shape[2] == 3:  # one frame of a stream: its three times are channels of a 2-D convolution, twice as fast
            y = F.conv2d(x.flatten(1, 2), conv.weight.flatten(1, 2), conv.bias, padding=1).unsqueeze(2)
        else:
            y = conv(x)
        return F.relu(y), x[:, :, -2:]


class Encoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        p, d = c.patch_size, c.hidden_size
        self.temporal_conv = nn.Conv3d(3, d, (1, p, p), stride=(1, p, p))
        self.norm = nn.LayerNorm(d, eps=1e-5)
        self.blocks = nn.ModuleList(ConvBlock(d) for _ in range(c.num_conv_blocks))
        self.out_proj = nn.Conv3d(d, d, 1)

    def forward(self, video, past=None):
        """video (B, T, 3, R, R) -> tokens (B, T, P, D), and the past that the next frames need."""
        B, T = video.shape[:2]
        conv = self.temporal_conv  # one frame deep, so a 2-D convolution does it, which is faster on every device
        x = F.conv2d(video.flatten(0, 1), conv.weight[:, :, 0], conv.bias, stride=conv.stride[1:])
        x = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        x = rearrange(x, "(b t) d h w -> b d t h w", b=B)
        if past is None:
            past = [x.new_zeros(B, x.shape[1], 2, *x.shape[3:])] * len(self.blocks)
        new_past = []
        for block, before in zip(self.blocks, past, strict=True):
            x, last = block(x, before)
            new_past.append(last)
        x = rearrange(x, "b d t h w -> b t (h w) d")
        return linear(x, self.out_proj.weight.flatten(1), self.out_proj.bias), new_past


# ----------------------------------------------------------------------------------------------------------------------
# decoder


def rope_frequencies(c):
    """Rotation per position of each half-dimension, with the llama3 stretching of long wavelengths."""
    dim = c.hidden_size // c.num_heads
    freq = 1.0 / c.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    wavelength = 2 * math.pi / freq
    low, high = c.rope_low_freq_factor, c.rope_high_freq_factor
    blend = (c.rope_original_length / wavelength - low) / (high - low)
    blend = blend.clamp(0, 1)  # 1: short wavelength, kept; 0: long, slowed down by the factor
    return blend * freq + (1 - blend) * freq / c.rope_factor


def rotate(x, cos, sin):
    """Half-split rotation of x (…, L, d): its halves a, b become a·cos - b·sin, b·cos + a·sin. cos (…, L, d) holds
    [cos, cos] and sin [-sin, sin], which takes four passes over x in place of seven."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([b, a], dim=-1) * sin


class RMSNorm(nn.RMSNorm):
    def forward(self, x):  # in float32, whatever the types of x and weight
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        d, m = c.hidden_size, c.intermediate_size
        self.num_heads = c.num_heads
        self.self_attn = nn.ModuleDict({
            n: nn.Linear(d, d, bias=False) for n in ("q_proj", "k_proj", "v_proj", "o_proj")})
        self.mlp = nn.ModuleDict(dict(gate_proj=nn.Linear(d, m, bias=False), up_proj=nn.Linear(d, m, bias=False),
                                      down_proj=nn.Linear(m, d, bias=False)))
        self.input_layernorm = RMSNorm(d, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(d, c.rms_norm_eps)

    def joined(self):
        """The weights that the same input meets, as one matrix each: (3·D, D) of q, k, v, (2·M, D) of the MLP; then
        those of the two outputs, (D, D) and (D, M)."""
        attn, mlp = self.self_attn, self.mlp
        return (torch.cat([attn[n].weight for n in ("q_proj", "k_proj", "v_proj")]),
                torch.cat([mlp[n].weight for n in ("gate_proj", "up_proj")]), attn.o_proj.weight, mlp.down_proj.weight)

    def forward(self, x, cos, sin, mask=None, remember=None, wanted=None, joined=None):
        """x (B, L, D), which are the last L tokens of those that `remember(k, v)` returns: it puts new keys and values
        behind the cached ones. Causal; else as `mask` (B | 1, 1, L, keys) says, which is added to scores.
        wanted (B, M): the tokens whose output is of use; returns (B, M, D)."""
        L = x.shape[1]
        qkv, gate_up, out, down = joined or self.joined()
        y = linear(self.input_layernorm(x), qkv).unflatten(2, (3 * self.num_heads, -1)).transpose(1, 2)
        y, v = y.split([2 * self.num_heads, self.num_heads], dim=1)  # (B, H, L, d)
        q, k = rotate(y, cos, sin).to(v.dtype).chunk(2, dim=1)  # autocast halves v
        if remember is not None:
            k, v = remember(k, v)
        if wanted is not None:
            x, q = take(x, wanted), take(q.transpose(1, 2).flatten(2), wanted).unflatten(2, (self.num_heads, -1))
            q = q.transpose(1, 2)
            if mask is None:
                seen = k.shape[2] - L + wanted.unsqueeze(-1)
                mask = (torch.arange(k.shape[2], device=x.device) <= seen).unsqueeze(1)
            else:
                mask = take(mask.squeeze(1).expand(len(x), -1, -1), wanted).unsqueeze(1)
        y = causal_attention(q, k, v) if mask is None else F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + linear(y.transpose(1, 2).flatten(2), out)
        gate, up = linear(self.post_attention_layernorm(x), gate_up).chunk(2, dim=-1)
        return x + linear(F.silu(gate) * up, down)


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.num_ids + 1, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.register_buffer("frequencies", rope_frequencies(c), persistent=False)

    def forward(self, x, positions=None, mask=None, remember=None, wanted=None, joined=None):
        """x (B, L, D) -> (B, L, D) before the final norm, or only the tokens at wanted (B, M): the last layer leaves
        out the others, of which nothing but keys and values matters there. positions (L,) or (B, L); default 0, 1, 2,
        …. joined: of each layer, see Layer.joined. mask, remember: see Layer.forward."""
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        angle = positions.unsqueeze(-1) * self.frequencies.float()  # (…, L, d/2)
        if angle.dim() == 3:
            angle = angle.unsqueeze(1)  # the same for all heads
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask, None if remember is None else functools.partial(remember, i),
                      wanted if i == len(self.layers) - 1 else None, None if joined is None else joined[i])
        return x




def take(x, index):  # rows of x (B, L, D) at index (B, M) -> (B, M, D)
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


# ----------------------------------------------------------------------------------------------------------------------
# the model


class Gaze(nn.Module):
    """Encoder, decoder and two multi-token heads (paper, section 3.2). Pixels come from data.to_model_pixels."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.encoder = Encoder(c)
        self.pos_embed = nn.Parameter(torch.zeros(c.ids_per_scale[-1], c.hidden_size))
        self.decoder = Decoder(c)
        self.lm_head = Linear(c.hidden_size, c.num_multi_token_pred * (c.num_ids + 1), bias=False)
        self.task_loss_prediction_head = nn.Linear(c.hidden_size, c.num_multi_token_pred, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1 and not name.startswith("encoder."):  # the encoder's convolutions keep torch's own init
                nn.init.normal_(p, std=c.initializer_range)

    # ---- files

    @classmethod
    def from_pretrained(cls, folder):
        """Load config.json + model.safetensors from a folder or a hub id. ValueError names tensors that do not fit."""
        config, tensors, source = load_gaze(folder, GazeConfig)
        gaze = cls(config)
        assign(gaze, tensors, source, published_name)
        return gaze

    def save_pretrained(self, folder):
        """Write config.json + model.safetensors, readable by the published code. A file appears whole or not at all."""
        save_gaze(folder, self.state_dict(), self.config)

    # ---- scoring given gazes

    def embed(self, video, past=None):
        """video (B, T, 3, R', R') of any square size -> vision tokens (B, T, P, D) and encoder's past (streaming)."""
        R = self.config.image_size
        if video.shape[-2:] != (R, R):
            B = video.shape[0]
            video = F.interpolate(video.flatten(0, 1), (R, R), mode="bicubic", align_corners=False)
            video = video.unflatten(0, (B, -1))
        x, past = self.encoder(video, past)
        return x + self.pos_embed, past

    def forward(self, video, gazing, policy="reference", temperature=1.0):
        """Log-probability and predicted loss of given gazes.

        video (B, T, 3, R, R); `gazing` as in the module's docstring, of B clips or of G·B copies (copy-major: g·B + b;
        the encoder then runs once per clip). Returns (log_prob, task_loss), both (rows, N): the log-probability of each
        slot's patch (0 at padded slots), and the reconstruction loss predicted for the frame *after* that slot.
        policy "reference": plain softmax over all V + 1 ids. "sampling": the distribution generate() draws from, that
        is logits / temperature with the padding id and the ids already gazed in this frame excluded.
        """
        c = self.config
        V, K, P = c.num_ids, c.num_multi_token_pred, c.ids_per_scale[-1]
        pos, padded, n = gazing["gazing_pos"], gazing["if_padded_gazing"], gazing["num_gazing_each_frame"].tolist()
        B, N = pos.shape
        assert len(n) == video.shape[1] and sum(n) == N == padded.shape[1] and B % video.shape[0] == 0
        vision, _ = self.embed(video)
        vision = vision.repeat(B // video.shape[0], 1, 1, 1)
        frame = torch.repeat_interleave(torch.arange(len(n), device=pos.device), torch.tensor(n, device=pos.device))
        ids = torch.where(padded, V, pos - V * frame)  # (B, N) within the frame

        # one sequence: for each frame its vision tokens, then its slots; real tokens packed to the front, so that plain
        # causal attention never sees padding and a token's position is its index
        slots, keep, real = self.decoder.embed_tokens(ids), [], torch.ones(B, P, dtype=torch.bool, device=pos.device)
        x, sources, slot_row, at, length = [], [], [], 0, 0
        for t, n_t in enumerate(n):
            x += [vision[:, t], slots[:, at:at + n_t]]
            keep += [real, ~padded[:, at:at + n_t]]
            # the last vision token predicts slots 0..K-1, slot K-1 predicts the next K, and so on
            slot_row += [len(sources) * K + j for j in range(n_t)]
            sources += [length + P - 1 + K * b for b in range(n_t // K + 1)]
            at, length = at + n_t, length + P + n_t
        x = torch.cat(x, dim=1)
        sources = torch.tensor(sources, device=pos.device).expand(B, -1)
        if padded.any():
            order, went = pack_front(torch.cat(keep, dim=1))
            x, sources = take(x, order), went.gather(1, sources)
        h = self.decoder.norm(self.decoder(x, wanted=sources))  # (B, M, D)

        slot_row = torch.tensor(slot_row, device=pos.device, dtype=torch.long)
        logits = self.lm_head(h).view(B, -1, V + 1)[:, slot_row].float()  # (B, N, V + 1)
        if policy == "sampling":
            logits = (logits / temperature).masked_fill(already_gazed(ids, n, V), float("-inf"))
        else:
            assert policy == "reference", policy
        log_prob = logits.log_softmax(-1).gather(2, ids.unsqueeze(-1)).squeeze(-1)
        # "after slot j" is what the model says before slot j + 1: the next head, or the next source's first one
        task_loss = self.task_loss_prediction_head(h).view(B, -1)[:, slot_row + 1].float()
        return log_prob.masked_fill(padded, 0.0), task_loss

    # ---- choosing gazes

    def generate(self, video, gazing_ratio=None, task_loss_requirement=None, temperature=0.0, reference=None,
                 generator=None, num_copies=1, target_scales=None, target_patch_size=None):
        """Choose patches for whole clips.

        video: (B, T, 3, R', R') normalised pixels. gazing_ratio: share of the V patches each frame may take, a float, a
        list of T, or (B, T); at least one patch per frame. task_loss_requirement: a frame is finished when its
        predicted loss falls to this value, a float or (B, T). Ratio only: no early stop. Requirement only: any number
        of patches. Neither: the config's settings. temperature 0 takes the best patch, else samples. reference: decode
        as the published code does (default: the config's reference_decoding). num_copies: G rollouts of each clip,
        copy-major (values given per clip then have G·B rows). target_scales, target_patch_size: choose patches for an
        encoder with these, in tiles; see Tiling.
        Returns the gaze dict of the module's docstring plus gazing_mask, a list of S tensors (G·B, T, V_s) of 0/1.
        """
        B, T = video.shape[:2]
        for name, value in (("gazing_ratio", gazing_ratio), ("task_loss_requirement", task_loss_requirement)):
            if value is not None and torch.as_tensor(value).dim() > 0 and torch.as_tensor(value).shape[-1] != T:
                raise ValueError(f"{name} has values for {torch.as_tensor(value).shape[-1]} frames, the video has {T}")
        if target_scales is not None or target_patch_size is not None:
            tiling = Tiling(self.config, target_scales, target_patch_size)
            out = self.generate(tiling.cut(video), tiling.repeat(gazing_ratio), tiling.repeat(task_loss_requirement),
                                temperature, reference, generator, num_copies)
            return tiling.join(out["gazing_mask"])
        stream = GazeStream(self, B * num_copies, gazing_ratio, task_loss_requirement, temperature, reference,
                            generator)
        if stream.reference and B * num_copies > 1 and (stream.requirement is not None or stream.ratio_per_clip):
            # in published decoding clips that stop at different slots disturb each other; it means them one at a time
            def row(value, i):
                return value if value is None or torch.as_tensor(value).dim() < 2 or len(value) == 1 else value[i:i + 1]
            return self.merge([
                self.generate(video[i % B:i % B + 1], row(gazing_ratio, i), row(task_loss_requirement, i), temperature,
                              reference, generator) for i in range(B * num_copies)])
        with torch.no_grad():
            return stream.run(self.embed(video)[0].repeat(num_copies, 1, 1, 1))

    def stream(self, batch_size=1, gazing_ratio=None, task_loss_requirement=None, temperature=0.0, reference=None,
               generator=None):
        """Frame in, gaze out: an object whose step(frame (B, 3, R', R')) returns that frame's gaze dict."""
        stream = GazeStream(self, batch_size, gazing_ratio, task_loss_requirement, temperature, reference, generator)
        # room for the usual clip: a frame during which the cache has to grow takes up to twice its time
        c = self.config
        stream.reserve(c.max_num_frames * (c.ids_per_scale[-1] + min(int(stream.budget(0).max()), c.num_ids // 4)))
        return stream

    def gazing_mask(self, gazing):
        """List of S tensors (B, T, V_s), 1 where a patch is gazed."""
        V, n = self.config.num_ids, gazing["num_gazing_each_frame"]
        pos, padded = gazing["gazing_pos"], gazing["if_padded_gazing"]
        flat = torch.zeros(len(pos), len(n) * V + 1, device=pos.device)
        flat.scatter_(1, torch.where(padded, len(n) * V, pos), 1.0)  # padded slots fall into one column, cut off
        return list(flat[:, :-1].view(len(pos), len(n), V).split(self.config.ids_per_scale, dim=2))

    def merge(self, rows):
        """Gaze dicts of single clips -> one dict of the batch."""
        out = []
        for t, parts in enumerate(zip(*(split_frames(row) for row in rows), strict=True)):
            n_t = max(ids.shape[1] for ids, _ in parts)
            ids = [F.pad(i, (0, n_t - i.shape[1]), value=self.config.num_ids * (t + 1)) for i, _ in parts]
            out.append((torch.cat(ids), torch.cat([F.pad(p, (0, n_t - p.shape[1]), value=True) for _, p in parts])))
        gazing = join_frames(out)
        return gazing | {"gazing_mask": self.gazing_mask(gazing)}


def already_gazed(ids, n, V):
    """(B, N, V + 1) True where an id was taken earlier in the same frame, and for the padding id V everywhere."""
    taken = []
    for frame_ids in ids.split(n, dim=1):
        one_hot = F.one_hot(frame_ids, V + 1)
        taken.append((one_hot.cumsum(1) - one_hot) > 0)
    taken = torch.cat(taken, dim=1)
    taken[..., V] = True
    # a padded slot "takes" V, whose logit must stay finite to be gathered: its log-probability is set to 0 afterwards
    return taken & (ids != V).unsqueeze(-1)








def per_clip_and_frame(value, B, name):
    """float | list of T | (B, T) -> a function of t that gives (B,) values."""
    value = torch.as_tensor(value, dtype=torch.float64).cpu()
    if value.isnan().any() or value.numel() == 0:
        raise ValueError(f"{name}={value.tolist()} is not a number for every frame")
    if value.dim() == 0:
        return lambda t: value.expand(B)
    if value.dim() == 2 and len(value) == 1:
        value = value[0]
    if value.dim() == 2 and len(value) != B:
        raise ValueError(f"{name} has {len(value)} rows for {B} clips")

    def at(t):
        if t >= value.shape[-1]:
            raise ValueError(f"{name} has values for {value.shape[-1]} frames, frame {t} was asked")
        return value[t].expand(B) if value.dim() == 1 else value[:, t]
    return at


MANY = 64  # from so many new tokens on, causal attention on a CPU is quicker without a mask (a frame; not ten gazes)


class GazeStream:
    """The state of decoding: the encoder's last frames, the KV cache, and the last block of gazes not yet in it.

    Each clip's real tokens lie packed at the front of its row of the cache, so a clip's result cannot depend on what
    its batch neighbours do, and a token's RoPE position is its index.
    """

    def __init__(self, model, batch_size, gazing_ratio, task_loss_requirement, temperature, reference, generator):
        c = self.c = model.config
        self.model, self.B, self.temperature, self.generator = model, batch_size, temperature, generator
        self.reference = c.reference_decoding if reference is None else reference
        if gazing_ratio is None and task_loss_requirement is None:
            gazing_ratio, task_loss_requirement = c.gazing_ratio, c.task_loss_requirement
        if temperature < 0:
            raise ValueError(f"temperature must be 0 (take the best) or above, got {temperature}")
        ratio = torch.as_tensor(1.0 if gazing_ratio is None else gazing_ratio, dtype=torch.float64)
        if ratio.numel() == 0 or not ((ratio >= 0) & (ratio <= 1)).all() or ratio.max() == 0:
            raise ValueError(f"gazing_ratio must lie in (0, 1], got {gazing_ratio}")
        self.ratio = per_clip_and_frame(ratio, batch_size, "gazing_ratio")
        self.ratio_per_clip = ratio.dim() == 2 and len(ratio) > 1
        self.requirement = None
        if task_loss_requirement is not None:
            self.requirement = per_clip_and_frame(task_loss_requirement, batch_size, "task_loss_requirement")
        self.frame, self.past, self.pending = 0, None, None
        p = next(model.parameters())
        self.device = p.device
        # an int while all clips have the same number of tokens, else (B,)
        self.length, self.longest = 0, 0
        kind = self.device.type  # under autocast keys come in its type: kept so, not turned into it at every step
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else p.dtype
        with torch.no_grad():
            self.joined = [[pack(w.to(dtype)) for w in layer.joined()] for layer in model.decoder.layers]
            self.heads = torch.cat([model.lm_head.weight, model.task_loss_prediction_head.weight]).to(dtype)
        self.cache = p.new_empty(2, c.num_layers, batch_size, c.num_heads, 0, c.hidden_size // c.num_heads, dtype=dtype)

    @torch.no_grad()
    def step(self, frame):
        """frame (B, 3, R', R') normalised pixels -> this frame's gaze dict; gazing_pos counts within the frame."""
        if len(frame) != self.B:
            raise ValueError(f"this stream has batch_size={self.B}, the frame is of {len(frame)} clips")
        vision, self.past = self.model.embed(frame.unsqueeze(1), self.past)
        gazing = join_frames([self.gaze_frame(vision[:, 0])])
        return gazing | {"gazing_mask": self.model.gazing_mask(gazing)}

    @torch.no_grad()
    def run(self, vision):  # (B, T, P, D): all frames at once
        T, V = vision.shape[1], self.c.num_ids
        self.reserve(sum(vision.shape[2] + int(self.budget(t).max()) for t in range(T)) + self.c.num_multi_token_pred)
        frames = [self.gaze_frame(vision[:, t]) for t in range(T)]
        gazing = join_frames([(ids + V * t, padded) for t, (ids, padded) in enumerate(frames)])
        return gazing | {"gazing_mask": self.model.gazing_mask(gazing)}

    def budget(self, t):
        # 1e-4: a ratio written as n / V must give n, whatever the rounding
        return (self.ratio(t) * self.c.num_ids + 1e-4).floor().long().clamp(min=1)

    def reserve(self, length):
        have = self.cache.shape[4]
        if length > have:
            cache = self.cache.new_zeros(*self.cache.shape[:4], max(length, 2 * have), self.cache.shape[5])
            cache[..., :have, :] = self.cache
            self.cache = cache
            # 0 where token i of those that come next may look if `room` tokens lie before it, else -inf; for fewer
            # tokens before, columns are left out on the left
            room, q = cache.shape[4], self.c.ids_per_scale[-1] + self.c.num_multi_token_pred
            q = min(q, MANY) if self.device.type == "cpu" else q
            self.causal = cache.new_full((q, room + q), float("-inf")).triu(room + 1)

    def feed(self, x, keep, positions=None):
        """Append tokens x (B, q, D) to the cache; keep (B, q) | None marks the real ones. Returns what the last of
        them says (B, D)."""
        B, q = x.shape[:2]
        last = torch.full((B, 1), q - 1, device=self.device)
        if keep is not None and bool(keep.all()):
            keep = None
        if keep is not None:
            order, went = pack_front(keep)
            x, last = take(x, order), went[:, -1:]
        uniform = isinstance(self.length, int)
        start = self.length if uniform else self.length.unsqueeze(1)
        index = torch.arange(q, device=self.device) + start  # (q,) | (B, q)
        total = self.longest + q
        self.reserve(total)
        # every query sees the keys up to itself; what lies behind a clip's last real token is overwritten later
        if uniform and q >= MANY and self.device.type == "cpu":
            mask = None
        elif uniform:
            left = self.cache.shape[4] - start
            mask = self.causal[None, None, :q, left:left + total]
            mask = mask if self.device.type == "cpu" else mask.contiguous()  # kernels ask for aligned rows
        else:
            seen = torch.arange(total, device=self.device) <= index.unsqueeze(-1)
            mask = torch.zeros(seen.shape, dtype=self.cache.dtype, device=self.device)
            mask = mask.masked_fill_(~seen, float("-inf")).unsqueeze(1)

        def remember(layer, k, v):
            for cache, new in zip(self.cache[:, layer], (k, v), strict=True):
                if uniform:
                    cache[:, :, self.length:total] = new
                else:
                    cache.scatter_(2, index[:, None, :, None].expand_as(new), new.to(cache.dtype))
            return self.cache[:, layer, :, :, :total].to(v.dtype)

        positions = index if positions is None else positions
        h = self.model.decoder(x, positions, mask, remember, last, self.joined)
        if keep is None:
            self.length, self.longest = self.length + q, total
        else:
            self.length = self.length + keep.sum(1)
            self.longest = int(self.length.max())
            if int(self.length.min()) == self.longest:
                self.length = self.longest
        return h[:, 0]

    def gaze_frame(self, vision):
        """vision (B, P, D) -> ids within the frame (B, n_t) and padding (B, n_t)."""
        model, V, K, B = self.model, self.c.num_ids, self.c.num_multi_token_pred, self.B
        P = vision.shape[1]
        x, keep = vision, None
        if self.pending is not None:  # the last block of the frame before enters with this frame's vision tokens
            ids, padded = self.pending
            x = torch.cat([model.decoder.embed_tokens(ids), vision], dim=1)
            keep = None if padded is None else F.pad(~padded, (0, P), value=True)
        h = self.feed(x, keep)
        seen = self.length
        budget = self.budget(self.frame)
        limit = int(budget.max())
        # clips that cannot stop before the limit are not asked: on a GPU every answer would be waited for
        may_stop = self.requirement is not None or int(budget.min()) < limit
        budget = budget.to(self.device)
        requirement = None if self.requirement is None else self.requirement(self.frame).to(self.device)
        banned = torch.zeros(B, V + 1, dtype=torch.bool, device=self.device)
        banned[:, V] = True
        stopped = torch.zeros(B, dtype=torch.bool, device=self.device)
        all_ids, all_padded = [], []
        while True:
            logits, loss = linear(model.decoder.norm(h), self.heads).float().split([K * (V + 1), K], dim=1)
            logits = logits.unflatten(1, (K, V + 1)).masked_fill(banned.unsqueeze(1), float("-inf"))
            picks, ids, padded = [], [], []
            for i in range(min(K, limit - K * len(all_ids))):
                j = K * len(all_ids) + i
                pick = self.choose(logits[:, i])
                logits.scatter_(2, pick.view(B, 1, 1).expand(B, K, 1), float("-inf"))
                picks.append(pick)
                pad = stopped
                if may_stop:
                    over = budget <= j
                    if requirement is not None and j > 0:
                        over = over | (loss[:, i] <= requirement)
                    stopped = stopped | over
                    pad = over if self.reference else stopped
                    pick = pick.masked_fill(pad, V)
                padded.append(pad)
                ids.append(pick)
            banned.scatter_(1, torch.stack(picks, 1), True)
            ids, padded = torch.stack(ids, 1), torch.stack(padded, 1)
            all_ids.append(ids)
            all_padded.append(padded)
            if K * len(all_ids) >= limit or (may_stop and bool(stopped.all())):
                break
            positions = None
            if self.reference:  # the published code decodes every block at the positions of the last K vision tokens
                start = seen if isinstance(seen, int) else seen.unsqueeze(1)
                positions = torch.arange(-K, 0, device=self.device) + start
            h = self.feed(model.decoder.embed_tokens(ids), ~padded if may_stop else None, positions)
        self.pending = ids, padded if may_stop else None
        self.frame += 1
        ids, padded = torch.cat(all_ids, 1), torch.cat(all_padded, 1)
        if may_stop and not self.reference:
            n_t = int((~padded).sum(1).max())
            ids, padded = ids[:, :n_t], padded[:, :n_t]
        return ids, padded

    def choose(self, logits):  # (B, V + 1) -> (B,)
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits / self.temperature
        if self.reference and logits.shape[-1] > 50:  # the published code samples through its library's top-50 filter
            logits = logits.masked_fill(logits < logits.topk(50).values[:, -1:], float("-inf"))
        return torch.multinomial(logits.softmax(-1), 1, generator=self.generator).squeeze(1)


def describe(config):
    """One line for logs: what the settings mean in numbers."""
    c = config
    return (f"{c.scales} px, patch {c.patch_size}: {'+'.join(map(str, c.ids_per_scale))} = {c.num_ids} ids per frame, "
            f"{c.max_num_frames} frames, {c.num_multi_token_pred} slots at once")


