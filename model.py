"""The gaze model: a small convolutional encoder and a LLaMA-style decoder that names patches, frame by frame.

    gaze = Gaze(GazeConfig())                                  # fresh weights, published size (3.3 M parameters)
    gaze = Gaze.from_pretrained("out/toy/grpo")                # a folder, or a Hugging Face hub id
    gazing = gaze.generate(video, gazing_ratio=0.1)            # choose patches: video (B, T, 3, R, R) -> dict
    log_prob, task_loss = gaze(video, gazing)                  # score given patches, with gradients
    stream = gaze.stream(); gazing = stream.step(frame)        # frame by frame, with the same result

A *gazing* of B clips is a dict of three tensors, frame after frame along N (paper, section 3; see gazing.py):
    gazing_pos             (B, N) int64   patch id within its frame + V * frame
    if_padded_gazing       (B, N) bool    True = a padded slot; its gazing_pos means nothing
    num_gazing_each_frame  (T,)   int64   slots of each frame, the same for all clips; sums to N

Dimension key: B clips, T frames, S scales, V patch ids per frame (all scales), P vision tokens per frame (finest
scale), K slots predicted at once, N slots of a clip, L tokens of a clip, Q of them whose output is read, D width,
H heads, d width of a head, M width of the MLP.
"""
import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from gazing import (
    Grids,
    Tiling,
    already_gazed,
    at_frame,
    batches,
    check_gazing,
    cut_chunks,
    drop_empty_slots,
    every_frame,
    frame_of_slot,
    join_chunks,
    join_clips,
    join_frames,
    pack_front,
    per_row,
    rows,
    split_frames,
    to_masks,
)
from lib.attention import causal_attention
from lib.cpu import Linear, conv3d, linear, pack
from lib.pixels import check_video
from lib.weights import load_gaze, load_module, published_name, save_gaze

PIECES_AT_ONCE = 16  # chunks of long videos and tiles of large ones that run together unless batch_size says otherwise

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
    intermediate_size: int = 384       # M, of SwiGLU
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
    reference_decoding: bool = False   # generate as the published code does, see ReferenceStream
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
        if not 0 < self.gazing_ratio <= 1:
            raise ValueError(f"gazing_ratio={self.gazing_ratio} must lie in (0, 1]")
        if type(self.task_loss_requirement) not in (int, float, type(None)):
            raise ValueError(f"task_loss_requirement={self.task_loss_requirement!r} must be a number or none")
        for key in ("rope_theta", "rope_factor", "rope_low_freq_factor", "rms_norm_eps"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key}={getattr(self, key)} must be above 0")
        if self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise ValueError(f"rope_high_freq_factor={self.rope_high_freq_factor} must be above "
                             f"rope_low_freq_factor={self.rope_low_freq_factor}")

    @property
    def image_size(self):  # R
        return self.scale_list[-1]


def describe(config):
    """One line for logs: what the settings mean in numbers."""
    ids = "+".join(str(n) for n in config.ids_per_scale)
    return (f"{config.scales} px, patch {config.patch_size}: {ids} = {config.num_ids} ids per frame, "
            f"{config.max_num_frames} frames, {config.num_multi_token_pred} slots at once")


# ----------------------------------------------------------------------------------------------------------------------
# encoder: causal in time, one token per patch of the finest scale


class ConvBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv3d = nn.Conv3d(dim, dim, (3, 3, 3), padding=(0, 1, 1))  # no padding in time: the past is put in front

    def forward(self, x, past):
        """x (B, D, T, h, w) and the two input frames before it (B, D, 2, h, w) -> the same shape, and the last two."""
        x = torch.cat([past, x], dim=2)
        y = conv3d(x, self.conv3d.weight, self.conv3d.bias, padding=self.conv3d.padding)
        return F.relu(y), x[:, :, -2:]


class Encoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        patch = (1, c.patch_size, c.patch_size)
        self.temporal_conv = nn.Conv3d(3, c.hidden_size, patch, stride=patch)
        self.norm = nn.LayerNorm(c.hidden_size, eps=1e-5)
        self.blocks = nn.ModuleList(ConvBlock(c.hidden_size) for _ in range(c.num_conv_blocks))
        self.out_proj = nn.Conv3d(c.hidden_size, c.hidden_size, 1)

    def forward(self, video, past=None):
        """video (B, T, 3, R, R) -> tokens (B, T, P, D), and the past that the next frames need."""
        conv = self.temporal_conv
        x = video.transpose(1, 2)
        x = conv3d(x, conv.weight, conv.bias, stride=conv.stride)  # (B, D, T, h, w)
        x = x.movedim(1, -1)
        x = self.norm(x)
        x = x.movedim(-1, 1)

        # before the first frame there are two frames of zeros
        if past is None:
            B, D, _, h, w = x.shape
            past = [x.new_zeros(B, D, 2, h, w) for _ in self.blocks]

        new_past = []
        for block, frames_before in zip(self.blocks, past, strict=True):
            x, last_frames = block(x, frames_before)
            new_past.append(last_frames)

        x = x.flatten(3)
        x = x.permute(0, 2, 3, 1)  # (B, T, P, D)
        x = linear(x, self.out_proj.weight.flatten(1), self.out_proj.bias)
        return x, new_past


# ----------------------------------------------------------------------------------------------------------------------
# decoder


def rope_frequencies(c):
    """Rotation per position of each half-dimension (d / 2), with the llama3 stretching of long wavelengths."""
    d = c.hidden_size // c.num_heads
    exponent = torch.arange(0, d, 2, dtype=torch.float32) / d
    freq = 1.0 / c.rope_theta ** exponent

    # 1: a short wavelength, kept; 0: a long one, slowed down by the factor
    wavelength = 2 * math.pi / freq
    low = c.rope_low_freq_factor
    high = c.rope_high_freq_factor
    n_turns = c.rope_original_length / wavelength
    kept = (n_turns - low) / (high - low)
    kept = kept.clamp(0, 1)
    return kept * freq + (1 - kept) * freq / c.rope_factor


def rotate(x, cos, sin):
    """Half-split rotation of x (…, L, d): its halves a, b become a·cos - b·sin, b·cos + a·sin. cos (…, L, d) holds
    [cos, cos] and sin [-sin, sin], which takes four passes over x in place of seven."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([b, a], dim=-1) * sin


def take(x, index):
    """Tokens of x (B, …, L, D) at index (B, Q) -> (B, …, Q, D)."""
    index = index.unsqueeze(-1)
    if x.dim() == 4:
        index = index.unsqueeze(1)  # the same for all heads
    return x.gather(-2, index.expand(*x.shape[:-2], -1, x.shape[-1]))


class RMSNorm(nn.RMSNorm):
    def forward(self, x):  # in float32, whatever the types of x and weight
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, c, index):
        super().__init__()
        self.index = index  # 0, 1, … from the first layer on
        self.num_heads = c.num_heads
        self.self_attn = nn.ModuleDict({
            "q_proj": nn.Linear(c.hidden_size, c.hidden_size, bias=False),
            "k_proj": nn.Linear(c.hidden_size, c.hidden_size, bias=False),
            "v_proj": nn.Linear(c.hidden_size, c.hidden_size, bias=False),
            "o_proj": nn.Linear(c.hidden_size, c.hidden_size, bias=False)})
        self.mlp = nn.ModuleDict({
            "gate_proj": nn.Linear(c.hidden_size, c.intermediate_size, bias=False),
            "up_proj": nn.Linear(c.hidden_size, c.intermediate_size, bias=False),
            "down_proj": nn.Linear(c.intermediate_size, c.hidden_size, bias=False)})
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def joined_weights(self):
        """The weights that the same input meets, as one matrix each: q, k, v (3·D, D), their output (D, D), gate and up
        (2·M, D), down (D, M)."""
        attn, mlp = self.self_attn, self.mlp
        qkv = torch.cat([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight])
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        return qkv, attn.o_proj.weight, gate_up, mlp.down_proj.weight

    def forward(self, x, cos, sin, query_index=None, cache=None, weights=None):
        """x (B, L, D) -> (B, L, D), causal. With query_index (B, Q) only these tokens are returned, (B, Q, D); the
        others still serve as keys and values. cache: a KVCache of the tokens before x, x's are put in. weights: what
        joined_weights() returns, if it is at hand."""
        qkv, out, gate_up, down = weights or self.joined_weights()
        n_heads = self.num_heads

        # queries, keys and values; the first two are rotated together
        y = self.input_layernorm(x)
        y = linear(y, qkv)
        y = y.unflatten(2, (3 * n_heads, -1))
        y = y.transpose(1, 2)  # (B, 3·H, L, d)
        qk, v = y.split([2 * n_heads, n_heads], dim=1)
        qk = rotate(qk, cos, sin)
        qk = qk.to(v.dtype)  # autocast halves v
        q, k = qk.chunk(2, dim=1)
        mask = None
        if cache is not None:
            k, v, mask = cache.append(self.index, k, v)

        # causal attention, of all tokens or of those at query_index
        if query_index is not None:
            mask = query_mask(query_index, x.shape[1], k.shape[2], mask)
            x = take(x, query_index)
            q = take(q, query_index)
        if mask is None:
            y = causal_attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = y.transpose(1, 2).flatten(2)
        x = x + linear(y, out)

        # SwiGLU
        y = self.post_attention_layernorm(x)
        y = linear(y, gate_up)
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
        return x + linear(y, down)


def query_mask(query_index, n_tokens, n_keys, mask):
    """The mask (B, 1, Q, keys) of some queries, given that of all n_tokens, the last of the keys (None: causal)."""
    if mask is not None:
        return take(mask, query_index)
    last_visible = query_index + n_keys - n_tokens
    visible = torch.arange(n_keys, device=query_index.device) <= last_visible.unsqueeze(-1)
    return visible.unsqueeze(1)


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.num_ids + 1, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.register_buffer("frequencies", rope_frequencies(c), persistent=False)

    def forward(self, x, positions=None, query_index=None, cache=None, weights=None):
        """x (B, L, D) -> (B, L, D) before the final norm, or (B, Q, D), the tokens at query_index (B, Q).

        positions (B | 1, L): of the tokens; default 0, 1, 2, …. cache, weights (a list over layers): see Layer.
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        angle = positions.unsqueeze(-1) * self.frequencies.float()
        angle = angle.unsqueeze(1)  # (B | 1, 1, L, d / 2), the same for all heads
        cos = angle.cos().to(x.dtype)
        sin = angle.sin().to(x.dtype)
        cos = torch.cat([cos, cos], dim=-1)
        sin = torch.cat([-sin, sin], dim=-1)

        # only the last layer leaves tokens out: the keys and values of all are needed up to there
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            layer_weights = None if weights is None else weights[i]
            layer_query_index = query_index if i == last else None
            x = layer(x, cos, sin, layer_query_index, cache, layer_weights)
        return x


# ----------------------------------------------------------------------------------------------------------------------
# the model


class Gaze(nn.Module):
    """Encoder, decoder and two multi-token heads (paper, section 3.2). Pixels come from data.to_model_pixels."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        P = config.ids_per_scale[-1]
        K = config.num_multi_token_pred
        D = config.hidden_size
        self.encoder = Encoder(config)
        self.pos_embed = nn.Parameter(torch.zeros(P, D))
        self.decoder = Decoder(config)
        self.lm_head = Linear(D, K * (config.num_ids + 1), bias=False)
        self.task_loss_prediction_head = nn.Linear(D, K, bias=False)

        # the encoder's convolutions keep torch's own initialisation
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and not name.startswith("encoder."):
                nn.init.normal_(parameter, std=config.initializer_range)

    # ---- files

    @classmethod
    def from_pretrained(cls, folder):
        """Load config.json + model.safetensors from a folder or a hub id. ValueError names tensors that do not fit."""
        config, tensors, source = load_gaze(folder, GazeConfig)
        return load_module(lambda: cls(config), tensors, source, published_name)

    def save_pretrained(self, folder):
        """Write config.json + model.safetensors, readable by the published code. A file appears whole or not at all."""
        save_gaze(folder, self.state_dict(), self.config)

    # ---- scoring given gazes

    def check(self, video, must_be_square=True):
        """The video in the type of the weights. ValueError names what is wrong with it."""
        video = check_video(video, self.pos_embed, "data.to_model_pixels(frames)")
        height, width = video.shape[3:]
        if must_be_square and height != width:
            raise ValueError(f"video has {height} x {width} pixels, expected a square: cut one out (data.resize_crop), "
                             "or let generate(target_scales=...) look at the whole frame in tiles")
        return video

    def embed(self, video, past=None):
        """video (B, T, 3, R', R') of any square size -> vision tokens (B, T, P, D) and encoder's past (streaming)."""
        R = self.config.image_size
        if video.shape[-2:] != (R, R):
            frames = F.interpolate(video.flatten(0, 1), (R, R), mode="bicubic", align_corners=False)
            video = frames.unflatten(0, video.shape[:2])
        vision, past = self.encoder(video, past)
        return vision + self.pos_embed, past

    def forward(self, video, gazing, policy="reference", temperature=1.0):
        """Log-probability and predicted loss of given gazes.

        video (B, T, 3, R, R); `gazing` as in the module's docstring, of B clips or of G·B copies (copy-major: g·B + b;
        the encoder then runs once per clip). Returns (log_prob, task_loss), both (rows, N): the log-probability of each
        slot's patch (0 at padded slots), and the reconstruction loss predicted for the frame *after* that slot.
        policy "reference": plain softmax over all V + 1 ids. "sampling": the distribution generate() draws from, that
        is logits / temperature with the padding id and the ids already gazed in this frame excluded.
        """
        video = self.check(video)
        check_gazing(gazing, *video.shape[:2])
        V = self.config.num_ids
        K = self.config.num_multi_token_pred
        position = gazing["gazing_pos"]
        padded = gazing["if_padded_gazing"]
        counts = gazing["num_gazing_each_frame"].tolist()
        B, T = video.shape[:2]
        n_rows = len(position)

        # embed: vision tokens once per clip, then the slots' ids within their frames
        vision, _ = self.embed(video)
        vision = vision.repeat(n_rows // B, 1, 1, 1)
        ids = position - V * frame_of_slot(gazing)
        ids = ids.masked_fill(padded, V)
        slots = self.decoder.embed_tokens(ids)

        # one sequence: for each frame its vision tokens, then its slots
        P = vision.shape[2]
        slots = slots.split(counts, dim=1)
        is_slot_real = (~padded).split(counts, dim=1)
        is_vision_real = padded.new_ones(n_rows, P)
        tokens = []
        is_real = []
        for t in range(T):
            tokens += [vision[:, t], slots[t]]
            is_real += [is_vision_real, is_slot_real[t]]
        tokens = torch.cat(tokens, dim=1)
        is_real = torch.cat(is_real, dim=1)
        query_index, head_of_slot = where_slots_are_predicted(counts, P, K)
        query_index = query_index.to(tokens.device).expand(n_rows, -1)
        head_of_slot = head_of_slot.to(tokens.device)

        # pack real tokens to the front: causal attention then never sees padding, and a token's position is its index
        if padded.any():
            permutation, new_index = pack_front(is_real)
            tokens = take(tokens, permutation)
            query_index = new_index.gather(1, query_index)

        # run, and read the heads of the tokens that predict
        h = self.decoder(tokens, query_index=query_index)
        h = self.decoder.norm(h)  # (rows, Q, D)
        logits = self.lm_head(h)
        logits = logits.unflatten(2, (K, V + 1)).flatten(1, 2)  # (rows, Q·K, V + 1)
        logits = logits[:, head_of_slot].float()  # (rows, N, V + 1)
        if policy == "sampling":
            logits = logits / temperature
            taken = already_gazed(ids, counts, V)
            logits = logits.masked_fill(taken, -math.inf)
        else:
            assert policy == "reference", policy
        log_prob = logits.log_softmax(-1)
        log_prob = log_prob.gather(2, ids.unsqueeze(-1)).squeeze(-1)

        # the loss after slot j is the one predicted before slot j + 1: the next head, or the next token's first one
        predicted_loss = self.task_loss_prediction_head(h).flatten(1)
        task_loss = predicted_loss[:, head_of_slot + 1].float()
        return log_prob.masked_fill(padded, 0.0), task_loss

    # ---- choosing gazes

    @torch.no_grad()
    def generate(self, video, gazing_ratio=None, task_loss_requirement=None, temperature=0.0, reference=None,
                 generator=None, num_copies=1, target_scales=None, target_patch_size=None, chunk=False,
                 batch_size=None):
        """Choose patches for whole clips.

        video: (B, T, 3, R', R') normalised pixels. gazing_ratio: share of the V patches each frame may take, a float, a
        list of T, or (B, T); at least one patch per frame. task_loss_requirement: a frame is finished when its
        predicted loss falls to this value, a float or (B, T). Ratio only: no early stop. Requirement only: any number
        of patches. Neither: the config's settings. temperature 0 takes the best patch, else samples. reference: decode
        as the published code does (default: the config's reference_decoding). num_copies: G rollouts of each clip,
        copy-major (values given per clip then have G·B rows).

        target_scales, target_patch_size: choose patches for an encoder with these, in tiles; see Tiling. Frames need
        not be square then. chunk: take a video of more than max_num_frames in chunks of that length, each of which
        starts afresh; without it such a video is a ValueError. batch_size: how many clips, chunks or tiles run
        together, which bounds memory; default: all clips, 16 chunks or tiles.

        Returns the dict of the module's docstring plus gazing_mask, a list of S tensors (G·B, T, V_s) of 0/1.
        """
        in_tiles = target_scales is not None or target_patch_size is not None
        video = self.check(video, must_be_square=not in_tiles)
        B, T = video.shape[:2]
        stream_class, ratio, requirement = self.settings(B * num_copies, gazing_ratio, task_loss_requirement,
                                                         temperature, reference)
        ratio = every_frame(ratio, T, "gazing_ratio")
        requirement = every_frame(requirement, T, "task_loss_requirement")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        clips = video

        # tiles of whole frames are clips of their own
        if in_tiles:
            tiling = Tiling(self.config, target_scales, target_patch_size)
            n_tiles = tiling.rows * tiling.columns
            clips = tiling.clips(video)
            ratio = ratio.repeat_interleave(n_tiles, dim=0)
            requirement = requirement.repeat_interleave(n_tiles, dim=0)

        # so are the chunks of a long video
        n_chunks = math.ceil(T / self.config.max_num_frames)
        if n_chunks > 1 and not chunk:
            raise ValueError(f"the video has {T} frames, the model knows max_num_frames={self.config.max_num_frames}: "
                             "give fewer, or let generate(chunk=True) take it in chunks, each of which starts afresh")
        if n_chunks > 1:
            clips = cut_chunks(clips, self.config.max_num_frames)
            ratio = torch.stack(cut_chunks(ratio, self.config.max_num_frames))
            requirement = torch.stack(cut_chunks(requirement, self.config.max_num_frames))

        # how many run together
        if stream_class.needs_single_clips(ratio, requirement):
            batch_size = 1
        elif batch_size is None:
            batch_size = PIECES_AT_ONCE if in_tiles or n_chunks > 1 else len(ratio)

        # the encoder runs once per clip, however many copies there are; then the decoder
        vision = []
        for part in batches(clips, batch_size):
            vision.append(self.embed(part)[0])
        vision = torch.cat(vision)  # (clips, T, P, D)
        parts = []
        for index in torch.arange(len(ratio)).split(batch_size):
            stream = stream_class(self, ratio[index], requirement[index], temperature, generator)
            gazing = stream.run(vision[index % len(vision)])
            parts.append(gazing)
        gazing = join_clips(parts, self.config.num_ids)

        # put chunks and tiles together
        if n_chunks > 1:
            chunks = [rows(gazing, slice(i, None, n_chunks)) for i in range(n_chunks)]
            gazing = drop_empty_slots(join_chunks(chunks, self.config.num_ids))
            gazing = join_frames(split_frames(gazing)[:T])
        masks = to_masks(gazing, self.config.ids_per_scale)
        if in_tiles:
            return tiling.join(masks)
        return gazing | {"gazing_mask": masks}

    def stream(self, batch_size=1, gazing_ratio=None, task_loss_requirement=None, temperature=0.0, reference=None,
               generator=None):
        """Frame in, gazing out: an object whose step(frame (B, 3, R', R')) returns that frame's gazing. Arguments as in
        generate. The model knows clips of max_num_frames frames: begin a new stream after so many."""
        stream_class, ratio, requirement = self.settings(batch_size, gazing_ratio, task_loss_requirement, temperature,
                                                         reference)
        stream = stream_class(self, ratio, requirement, temperature, generator)

        # room for the usual clip: a frame during which the cache has to grow takes up to twice its time
        n_slots = min(int(stream.budget(0).max()), self.config.num_ids // 4)
        stream.cache.reserve(self.config.max_num_frames * (self.config.ids_per_scale[-1] + n_slots))
        return stream

    def settings(self, n_rows, gazing_ratio, task_loss_requirement, temperature, reference):
        """What the arguments of generate and stream mean: the class that decodes, and gazing ratio and requirement of
        each row, (n_rows,) for all frames or (n_rows, T). No requirement is one of -inf."""
        if gazing_ratio is None and task_loss_requirement is None:
            gazing_ratio = self.config.gazing_ratio
            task_loss_requirement = self.config.task_loss_requirement
        if gazing_ratio is None:
            gazing_ratio = 1.0
        if task_loss_requirement is None:
            task_loss_requirement = -math.inf
        ratio = per_row(gazing_ratio, n_rows, "gazing_ratio")
        requirement = per_row(task_loss_requirement, n_rows, "task_loss_requirement")

        if ratio.min() < 0 or ratio.max() > 1 or ratio.max() == 0:
            raise ValueError(f"gazing_ratio must lie in (0, 1], got {gazing_ratio}")
        if temperature < 0:
            raise ValueError(f"temperature must be 0 (take the best) or above, got {temperature}")
        if reference is None:
            reference = self.config.reference_decoding
        return ReferenceStream if reference else GazeStream, ratio, requirement


def where_slots_are_predicted(counts, n_vision, K):
    """Which token predicts which slot, in a sequence of n_vision vision tokens and counts[t] slots for each frame t.

    The last vision token of a frame predicts slots 0 to K-1, slot K-1 the next K, and so on. Returns query_index (Q,),
    the index of these tokens, and head_of_slot (N,): query number · K + head that a slot's logits come from.
    """
    counts = torch.tensor(counts)
    frames = torch.arange(len(counts))

    # a frame has a query per K slots, and one more behind a full last block: for the loss after its last slot
    n_queries = counts // K + 1
    first_query = n_queries.cumsum(0) - n_queries
    frame = frames.repeat_interleave(n_queries)
    block = torch.arange(len(frame)) - first_query[frame]
    first_token = n_vision * frames + counts.cumsum(0) - counts
    query_index = first_token[frame] + n_vision - 1 + K * block

    # slot j of a frame: head j % K of its query j // K
    frame = frames.repeat_interleave(counts)
    first_slot = counts.cumsum(0) - counts
    j = torch.arange(len(frame)) - first_slot[frame]
    return query_index, first_query[frame] * K + j


# ----------------------------------------------------------------------------------------------------------------------
# decoding


class KVCache:
    """Keys and values of all tokens so far.

    Each clip's real tokens lie packed at the front of its row, so a clip's result cannot depend on what its batch
    neighbours do, and a token's RoPE position is its index. While all clips have the same number of tokens, attention
    needs no mask.
    """

    def __init__(self, c, batch_size, dtype, device):
        shape = (2, c.num_layers, batch_size, c.num_heads, 0, c.hidden_size // c.num_heads)
        self.tensor = torch.empty(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)  # tokens of each clip
        self.longest = 0
        self.same_length = True

    def reserve(self, n_tokens):
        """Make room for so many tokens."""
        room = self.tensor.shape[4]
        if n_tokens > room:
            shape = list(self.tensor.shape)
            shape[4] = max(n_tokens, 2 * room)
            larger = self.tensor.new_zeros(shape)
            larger[..., :room, :] = self.tensor
            self.tensor = larger

    def begin(self, n_new):
        """Before so many new tokens are appended: their indices, (B, n_new) or (1, n_new), the same for all clips."""
        self.end = self.longest + n_new
        self.reserve(self.end)
        self.index = self.lengths.unsqueeze(1) + torch.arange(n_new, device=self.lengths.device)
        self.mask = None
        if self.same_length:
            self.index = self.index[:1]
        else:
            # a token sees those up to itself; what lies behind a clip's last real token is overwritten later
            keys = torch.arange(self.end, device=self.lengths.device)
            visible = keys <= self.index.unsqueeze(-1)
            mask = self.tensor.new_zeros(visible.shape)
            mask.masked_fill_(~visible, -math.inf)
            self.mask = mask.unsqueeze(1)
        return self.index

    def append(self, layer, k, v):
        """New keys and values (B, H, n_new, d) of a layer -> all of its keys and values, and the mask (B, 1, n_new, L)
        to add to scores, None where plain causal attention will do."""
        keys, values = self.tensor[:, layer]  # (B, H, room, d)
        if self.same_length:
            keys[:, :, self.longest:self.end] = k
            values[:, :, self.longest:self.end] = v
        else:
            index = self.index[:, None, :, None].expand_as(k)
            keys.scatter_(2, index, k.to(keys.dtype))
            values.scatter_(2, index, v.to(values.dtype))
        keys = keys[:, :, :self.end].to(k.dtype)
        values = values[:, :, :self.end].to(v.dtype)
        return keys, values, self.mask

    def finish(self, keep):
        """After all layers: keep (B, n_new) says which of the new tokens are real; None: all of them."""
        if keep is None:
            self.lengths = self.lengths + self.index.shape[1]
            self.longest = self.end
        else:
            self.lengths = self.lengths + keep.sum(1)
            lengths = self.lengths.tolist()
            self.longest = max(lengths)
            self.same_length = min(lengths) == max(lengths)


class GazeStream:
    """The state of decoding: the encoder's last frames, the KV cache, and the last block of gazes not yet in it."""

    def __init__(self, model, ratio, requirement, temperature, generator):
        self.model = model
        self.config = model.config
        self.ratio = ratio              # (B,) for all frames, or (B, T)
        self.requirement = requirement  # the same; -inf: none
        self.temperature = temperature
        self.generator = generator

        self.batch_size = len(ratio)
        self.frame = 0
        self.past = None                # of the encoder
        self.last_block = None          # (embeddings, keep) of the last block, which enters with the next frame

        # weights as decoding wants them: under autocast in its type, which keys and values then have too
        parameter = next(model.parameters())
        self.device = parameter.device
        dtype = parameter.dtype
        if torch.is_autocast_enabled(self.device.type):
            dtype = torch.get_autocast_dtype(self.device.type)
        with torch.no_grad():
            self.weights = []
            for layer in model.decoder.layers:
                self.weights.append([pack(weight.to(dtype)) for weight in layer.joined_weights()])
            heads = [model.lm_head.weight, model.task_loss_prediction_head.weight]
            self.heads = torch.cat(heads).to(dtype)
        self.cache = KVCache(self.config, self.batch_size, dtype, self.device)

    @staticmethod
    def needs_single_clips(ratio, requirement):
        """Whether clips have to be decoded one by one; ratio, requirement (B, T)."""
        return False

    @torch.no_grad()
    def step(self, frame):
        """frame (B, 3, R', R') normalised pixels -> this frame's gazing; gazing_pos counts within the frame."""
        if frame.dim() != 4:
            raise ValueError(f"frame has shape {tuple(frame.shape)}, expected (B, 3, height, width)")
        if len(frame) != self.batch_size:
            raise ValueError(f"this stream has batch_size={self.batch_size}, the frame is of {len(frame)} clips")
        video = self.model.check(frame.unsqueeze(1))

        vision, self.past = self.model.embed(video, self.past)
        ids, padded = self.gaze_frame(vision[:, 0])
        gazing = join_frames([(ids, padded)])
        gazing["gazing_mask"] = to_masks(gazing, self.config.ids_per_scale)
        return gazing

    @torch.no_grad()
    def run(self, vision):
        """All frames at once: vision (B, T, P, D) -> gazing."""
        T, P = vision.shape[1:3]
        n_tokens = T * P + self.config.num_multi_token_pred
        for t in range(T):
            n_tokens += int(self.budget(t).max())
        self.cache.reserve(n_tokens)

        frames = []
        for t in range(T):
            ids, padded = self.gaze_frame(vision[:, t])
            ids = ids + self.config.num_ids * t
            frames.append((ids, padded))
        return join_frames(frames)

    def budget(self, t):
        """(B,) most patches of frame t, at least one."""
        # 1e-4: a ratio written as n / V must give n, whatever the rounding
        ratio = at_frame(self.ratio, t, "gazing_ratio")
        n_patches = ratio * self.config.num_ids + 1e-4
        return n_patches.long().clamp(min=1)

    def gaze_frame(self, vision):
        """vision (B, P, D) -> ids within the frame (B, n_t) and padding (B, n_t)."""
        V = self.config.num_ids
        K = self.config.num_multi_token_pred
        B = self.batch_size

        # If no clip can stop early, skip the test: reading it would synchronise the GPU after every block.
        budget = self.budget(self.frame)
        requirement = at_frame(self.requirement, self.frame, "task_loss_requirement")
        n_slots = int(budget.max())
        may_stop = bool(budget.min() < n_slots or requirement.max() > -math.inf)
        budget = budget.to(self.device)
        requirement = requirement.to(self.device)

        # the padding id and what has been chosen in this frame
        banned = torch.zeros(B, V + 1, dtype=torch.bool, device=self.device)
        banned[:, V] = True
        stopped = torch.zeros(B, dtype=torch.bool, device=self.device)
        all_ids = []
        all_padded = []
        h = self.feed_frame(vision)
        while True:
            # one token names the next K slots: logits (B, K, V + 1) and the loss predicted before each slot (B, K)
            logits, predicted_loss = self.read_heads(h)
            logits = logits.masked_fill(banned.unsqueeze(1), -math.inf)
            first_slot = K * len(all_ids)
            ids = []
            padded = []
            for i in range(min(K, n_slots - first_slot)):
                # no later slot of the block takes the same patch
                patch = self.choose(logits[:, i])
                index = patch.view(B, 1, 1).expand(B, K, 1)
                logits.scatter_(2, index, -math.inf)

                # a frame is finished by its budget, or by its predicted loss, never before its first slot
                is_padded = stopped
                if may_stop:
                    finished = budget <= first_slot + i
                    if first_slot + i > 0:
                        finished = finished | (predicted_loss[:, i] <= requirement)
                    is_padded = self.pad(stopped, finished)
                    stopped = stopped | finished
                    patch = patch.masked_fill(is_padded, V)
                ids.append(patch)
                padded.append(is_padded)

            ids = torch.stack(ids, dim=1)
            padded = torch.stack(padded, dim=1)
            banned.scatter_(1, ids, True)
            all_ids.append(ids)
            all_padded.append(padded)

            # feed the block, unless it is the frame's last: that one enters with the next frame's vision tokens
            block = self.model.decoder.embed_tokens(ids)
            keep = ~padded if may_stop else None
            if K * len(all_ids) >= n_slots:
                break
            if may_stop and bool(stopped.all()):
                break
            h = self.feed_block(block, keep)

        self.last_block = block, keep
        self.frame += 1
        ids = torch.cat(all_ids, dim=1)
        padded = torch.cat(all_padded, dim=1)
        if may_stop:
            ids, padded = self.trim(ids, padded)
        return ids, padded

    def read_heads(self, h):
        """h (B, D) -> logits (B, K, V + 1) and predicted losses (B, K)."""
        V = self.config.num_ids
        K = self.config.num_multi_token_pred
        h = self.model.decoder.norm(h)
        y = linear(h, self.heads).float()
        logits, predicted_loss = y.split([K * (V + 1), K], dim=1)
        return logits.unflatten(1, (K, V + 1)), predicted_loss

    def choose(self, logits):
        """(B, V + 1) -> patch ids (B,)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits / self.temperature
        probabilities = logits.softmax(-1)
        patch = torch.multinomial(probabilities, 1, generator=self.generator)
        return patch.squeeze(1)

    def pad(self, stopped, finished):
        """Which clips get a padded slot: those that stopped before, and those whose frame is finished at this slot."""
        return stopped | finished

    def trim(self, ids, padded):
        """The frame's slots up to the last one that any clip takes."""
        n_real = (~padded).sum(1)
        n_t = int(n_real.max())
        return ids[:, :n_t], padded[:, :n_t]

    def feed_frame(self, vision):
        """Feed a frame's vision tokens, and in front of them the last block of the frame before."""
        if self.last_block is None:
            return self.feed(vision)
        block, keep = self.last_block
        if keep is not None:
            keep = F.pad(keep, (0, vision.shape[1]), value=True)
        return self.feed(torch.cat([block, vision], dim=1), keep)

    def feed_block(self, block, keep):
        """Feed a block of gazes (B, K, D)."""
        return self.feed(block, keep)

    def feed(self, x, keep=None, positions=None):
        """Put tokens x (B, n_new, D) behind the cached ones; keep (B, n_new): which are real, None: all. Returns the
        state of the last one (B, D), before the final norm."""
        last = torch.full((len(x), 1), x.shape[1] - 1, device=self.device)
        if keep is not None and bool(keep.all()):
            keep = None
        if keep is not None:
            permutation, new_index = pack_front(keep)
            x = take(x, permutation)
            last = new_index[:, -1:]

        index = self.cache.begin(x.shape[1])
        if positions is None:
            positions = index
        h = self.model.decoder(x, positions, last, self.cache, self.weights)
        self.cache.finish(keep)
        return h[:, 0]


class ReferenceStream(GazeStream):
    """Decoding as the published code does it, which shaped the released weights. Where it differs:

    - Every block after a frame's first is decoded at the positions of that frame's last K vision tokens.
    - Each slot is tested by itself: after a padded slot a block can hold real gazes again, and its padding stays.
    - Samples are drawn from the 50 likeliest patches, the default of the library that the published code samples with.
    - Clips that stop at different slots influence each other, so generate() runs them one by one.
    """

    @staticmethod
    def needs_single_clips(ratio, requirement):
        return bool((requirement > -math.inf).any() or (ratio != ratio[:1]).any())

    def feed_frame(self, vision):
        h = super().feed_frame(vision)
        offsets = torch.arange(-self.config.num_multi_token_pred, 0, device=self.device)
        self.stale_positions = self.cache.lengths.unsqueeze(1) + offsets
        return h

    def feed_block(self, block, keep):
        return self.feed(block, keep, self.stale_positions)

    def pad(self, stopped, finished):
        return finished

    def trim(self, ids, padded):
        return ids, padded

    def choose(self, logits):
        if self.temperature > 0 and logits.shape[-1] > 50:
            lowest = logits.topk(50).values[:, -1:]
            logits = logits.masked_fill(logits < lowest, -math.inf)
        return super().choose(logits)
