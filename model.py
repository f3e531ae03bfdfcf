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
    allowed_ids,
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
    may_be_padded,
    pack_front,
    per_row,
    rows,
    split_frames,
    to_budgets,
    to_masks,
    where_slots_are_predicted,
)
from lib.attention import causal_attention
from lib.cpu import Linear, add_linear, conv3d, linear, pack
from lib.cuda_graph import replay
from lib.loader import send
from lib.pixels import check_tensor, check_video
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


def rope_frequencies(c, device):
    """Rotation per position of each half-dimension (d / 2), with the llama3 stretching of long wavelengths. In float32:
    rounded to bfloat16 they would be off by three radians at position 3,500."""
    d = c.hidden_size // c.num_heads
    exponent = torch.arange(0, d, 2, dtype=torch.float32, device=device) / d
    freq = 1.0 / c.rope_theta ** exponent

    # 1: a short wavelength, kept; 0: a long one, slowed down by the factor
    wavelength = 2 * math.pi / freq
    low = c.rope_low_freq_factor
    high = c.rope_high_freq_factor
    n_turns = c.rope_original_length / wavelength
    kept = (n_turns - low) / (high - low)
    kept = kept.clamp(0, 1)
    return kept * freq + (1 - kept) * freq / c.rope_factor


def rope_turns(c, n_tokens, device):
    """Complex factors that rotate queries, keys and values at positions 0, 1, 2, …: (n_tokens, 3, 1, d / 2), the same
    for all heads. Those of values are 1: one product serves all three."""
    positions = torch.arange(n_tokens, device=device)
    angle = positions.unsqueeze(1) * rope_frequencies(c, device)
    turn = torch.polar(torch.ones_like(angle), angle)
    return torch.stack([turn, turn, torch.ones_like(turn)], dim=1).unsqueeze(2)


def rotate(x, turns):
    """x (B, L, 3, H, d), whose neighbours along d are the parts of complex numbers; turns (…, L, 3, 1, d / 2)."""
    pairs = x.float().unflatten(-1, (-1, 2))
    turned = torch.view_as_complex(pairs) * turns
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def take(x, index):
    """Tokens of x (B, …, L, D) at index (B, Q) -> (B, …, Q, D)."""
    index = index.unsqueeze(-1)
    if x.dim() == 4:
        index = index.unsqueeze(1)  # the same for all heads
    return x.gather(-2, index.expand(*x.shape[:-2], -1, x.shape[-1]))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.num_heads = c.num_heads
        self.eps = c.rms_norm_eps
        self.self_attn = nn.ModuleDict({
            "q_proj": nn.Linear(c.hidden_size, c.hidden_size, bias=False),
            "k_proj": nn.Linear(c.hidden_size, c.hidden_size, bias=False),
            "v_proj": nn.Linear(c.hidden_size, c.hidden_size, bias=False),
            "o_proj": nn.Linear(c.hidden_size, c.hidden_size, bias=False)})
        self.mlp = nn.ModuleDict({
            "gate_proj": nn.Linear(c.hidden_size, c.intermediate_size, bias=False),
            "up_proj": nn.Linear(c.hidden_size, c.intermediate_size, bias=False),
            "down_proj": nn.Linear(c.intermediate_size, c.hidden_size, bias=False)})
        self.input_layernorm = nn.RMSNorm(c.hidden_size)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size)

    def joined_weights(self):
        """The weights that the same input meets, as one matrix each: q, k, v (3·D, D), their output (D, D), gate and up
        (2·M, D), down (D, M). The norms' weights scale the columns of what follows them."""
        attn, mlp = self.self_attn, self.mlp

        # RoPE rotates numbers of a head's first half with those of its second: put them side by side
        def in_pairs(weight):
            return weight.unflatten(0, (self.num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)

        qkv = torch.cat([in_pairs(attn.q_proj.weight), in_pairs(attn.k_proj.weight), attn.v_proj.weight])
        qkv = qkv * self.input_layernorm.weight
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        gate_up = gate_up * self.post_attention_layernorm.weight
        return qkv, attn.o_proj.weight, gate_up, mlp.down_proj.weight

    def forward(self, x, turns, query_index=None):
        """x (B, L, D) -> (B, L, D), causal. With query_index (B, Q) only these tokens are returned, (B, Q, D); the
        others still serve as keys and values."""
        qkv, out, gate_up, down = self.joined_weights()
        q, k, v = self.project(x, turns, qkv)
        if query_index is None:
            y = causal_attention(q, k, v)
        else:
            visible = torch.arange(x.shape[1], device=x.device) <= query_index.unsqueeze(-1)
            x = take(x, query_index)
            q = take(q, query_index)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible.unsqueeze(1))
        return self.finish(x, y, out, gate_up, down)

    def project(self, x, turns, qkv):
        """Before attention: x (B, L, D) -> queries, keys and values (3, B, H, L, d)."""
        y = F.rms_norm(x, x.shape[-1:], eps=self.eps)
        y = linear(y, qkv)
        y = y.unflatten(2, (3, self.num_heads, -1))
        return rotate(y, turns).permute(2, 0, 3, 1, 4)

    def finish(self, x, y, out, gate_up, down):
        """After attention: x (B, L, D), and y (B, H, L, d) that it found -> (B, L, D)."""
        y = y.transpose(1, 2).flatten(2)
        x = add_linear(x, y, out)

        # SwiGLU
        y = F.rms_norm(x, x.shape[-1:], eps=self.eps)
        y = linear(y, gate_up)
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
        return add_linear(x, y, down)


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.num_ids + 1, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_layers))
        self.norm = nn.RMSNorm(c.hidden_size)

    def forward(self, x, query_index=None):
        """x (B, L, D) -> (B, L, D) before the final norm, or (B, Q, D), the tokens at query_index (B, Q)."""
        turns = rope_turns(self.config, x.shape[1], x.device)
        for layer in self.layers[:-1]:
            x = layer(x, turns)

        # only the last layer leaves tokens out: the keys and values of all are needed up to there
        return self.layers[-1](x, turns, query_index)


# ----------------------------------------------------------------------------------------------------------------------
# the model


class Gaze(nn.Module):
    """Encoder, decoder and two multi-token heads (paper, section 3.2). Pixels come from data.to_model_pixels."""

    checks_values = True  # of pixels; a training script, which knows them, does not: a GPU is waited for

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
        video = check_video(video, self.pos_embed, "data.to_model_pixels(frames)", values=self.checks_values)
        height, width = video.shape[3:]
        if must_be_square and height != width:
            raise ValueError(f"video has {height} x {width} pixels, expected a square: cut one out (data.resize_crop), "
                             "or let generate(target_scales=...) look at the whole frame in tiles")
        return video

    def check_length(self, n_frames, fix):
        if n_frames > self.config.max_num_frames:
            raise ValueError(f"the video has {n_frames} frames, the model knows max_num_frames="
                             f"{self.config.max_num_frames}: {fix}")

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
        self.check_length(video.shape[1], "give fewer")
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
        query_index = send(query_index, tokens.device).expand(n_rows, -1)
        head_of_slot = send(head_of_slot, tokens.device)

        # pack real tokens to the front: causal attention then never sees padding, and a token's position is its index
        if may_be_padded(padded):
            permutation, new_index = pack_front(is_real)
            tokens = take(tokens, permutation)
            query_index = new_index.gather(1, query_index)

        # run, and read the heads of the tokens that predict
        h = self.decoder(tokens, query_index=query_index)
        h = F.rms_norm(h, h.shape[-1:], self.decoder.norm.weight, self.config.rms_norm_eps)  # (rows, Q, D)
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
                 batch_size=None, allowed=None, cuda_graph=False):
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
        together, which bounds memory; default: all clips, 16 chunks or tiles. allowed: gaze only at these scales,
        "112+224", or ids, in this model's own numbering whatever the target; the ratio stays a share of all V.
        cuda_graph: from the second call with the same sizes and budgets on, replay the decoder as one CUDA graph, if
        all clips have the same budget and there is neither requirement, generator nor allowed (not yet run on a GPU).

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
        if allowed is not None:
            allowed = allowed_ids(allowed, self.config)
            ratio = ratio.clamp(max=int(allowed.sum()) / self.config.num_ids)
            allowed = allowed.to(video.device)

        # tiles of whole frames are clips of their own
        if in_tiles:
            tiling = Tiling(self.config, target_scales, target_patch_size)
            n_tiles = tiling.rows * tiling.columns
            clips = tiling.clips(video)
            ratio = ratio.repeat_interleave(n_tiles, dim=0)
            requirement = requirement.repeat_interleave(n_tiles, dim=0)

        # so are the chunks of a long video
        n_chunks = math.ceil(T / self.config.max_num_frames)
        if not chunk:
            self.check_length(T, "give fewer, or let generate(chunk=True) take it in chunks, each of which starts "
                                 "afresh")
        if n_chunks > 1:
            clips = cut_chunks(clips, self.config.max_num_frames)
            ratio = torch.stack(cut_chunks(ratio, self.config.max_num_frames))
            requirement = torch.stack(cut_chunks(requirement, self.config.max_num_frames))

        # how many run together
        if stream_class.needs_single_clips(ratio, requirement):
            batch_size = 1
        elif batch_size is None:
            batch_size = PIECES_AT_ONCE if in_tiles or n_chunks > 1 else len(ratio)

        # The encoder runs once per clip, however many copies there are. Without copies its tokens are dropped batch by
        # batch, so that a long video takes no more memory than a short one.
        encoded = (self.embed(part)[0] for part in batches(clips, batch_size))  # (clips, T, P, D) each
        if num_copies > 1:
            tokens = torch.cat(list(encoded))
            clip_of_row = torch.arange(len(ratio), device=tokens.device) % len(tokens)
            encoded = (tokens[index] for index in clip_of_row.split(batch_size))

        # then the decoder
        parts = []
        for start, vision in zip(range(0, len(ratio), batch_size), encoded, strict=True):
            part = slice(start, start + batch_size)
            parts.append(self.decode(vision, stream_class, ratio[part], requirement[part], temperature, generator,
                                     allowed, cuda_graph))
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

    def decode(self, vision, stream_class, ratio, requirement, temperature, generator, allowed, cuda_graph):
        """vision (B, T, P, D), ratio and requirement (B, T) -> gazing."""
        def work(vision):
            stream = stream_class(self, ratio, requirement, temperature, generator)
            stream.allowed = allowed
            return stream.run(vision)

        in_step = bool((ratio == ratio[:1]).all() and requirement.max() == -math.inf)
        if not (cuda_graph and vision.is_cuda and in_step and generator is None and allowed is None):
            return work(vision)
        key = stream_class, str(self.config), tuple(ratio[0].tolist()), temperature
        return replay(work, vision, key, self)

    def stream(self, batch_size=1, gazing_ratio=None, task_loss_requirement=None, temperature=0.0, reference=None,
               generator=None):
        """Frame in, gazing out: an object whose step(frame (B, 3, R', R')) returns that frame's gazing. Arguments as in
        generate. The model knows clips of max_num_frames frames: begin a new stream after so many."""
        stream_class, ratio, requirement = self.settings(batch_size, gazing_ratio, task_loss_requirement, temperature,
                                                         reference)
        stream = stream_class(self, ratio, requirement, temperature, generator)

        # room for the usual clip: a frame during which the cache has to grow takes up to twice its time
        n_slots = min(max(stream.budget(0)), self.config.num_ids // 4)
        stream.reserve(self.config.max_num_frames * (self.config.ids_per_scale[-1] + n_slots))
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


# ----------------------------------------------------------------------------------------------------------------------
# decoding


class GazeStream:
    """The state of decoding: the encoder's last frames, the keys and values of all tokens so far, and the last block of
    gazes, whose own are still missing.

    Each clip's real tokens lie packed at the front of its row of the cache, so a clip's result cannot depend on what
    its neighbours do, and a token's RoPE position is its index. How many there are is counted in Python. While all
    clips have the same number, attention needs no mask, and nothing is read from the device or copied to it.
    """

    allowed = None      # (V,) bool: ids that may be chosen; none: all
    n_likeliest = None  # samples are drawn from so many of the likeliest patches; none: from all

    def __init__(self, model, ratio, requirement, temperature, generator):
        self.model = model
        self.config = model.config
        self.ratio = ratio              # (B,) for all frames, or (B, T)
        self.requirement = requirement  # the same; -inf: none
        self.temperature = temperature
        self.generator = generator

        # weights as decoding wants them: under autocast in its type, which keys and values then have too
        parameter = model.pos_embed
        self.device = parameter.device
        dtype = parameter.dtype
        if torch.is_autocast_enabled(self.device.type):
            dtype = torch.get_autocast_dtype(self.device.type)
        with torch.no_grad():
            self.weights = []
            for layer in model.decoder.layers:
                self.weights.append([pack(weight.to(dtype)) for weight in layer.joined_weights()])
            heads = [model.lm_head.weight, model.task_loss_prediction_head.weight]
            self.heads = (torch.cat(heads) * model.decoder.norm.weight).to(dtype)

        c = self.config
        B = len(ratio)
        self.batch_size = B
        self.frame = 0
        self.past = None                # of the encoder
        shape = (c.num_layers, 2, B, c.num_heads, 0, c.hidden_size // c.num_heads)
        self.cache = torch.empty(shape, dtype=dtype, device=self.device)
        self.lengths = [0] * B          # tokens of each clip in the cache

        self.has_requirement = bool((requirement > -math.inf).any())
        self.is_padding = torch.arange(c.num_ids + 1, device=self.device).expand(B, -1) == c.num_ids

        # the last block of gazes (B, n), and how many of each clip's are real: these come first
        self.block = torch.zeros(B, 0, dtype=torch.long, device=self.device)
        self.n_real = [0] * B

    @staticmethod
    def needs_single_clips(ratio, requirement):
        """Whether clips have to be decoded one by one; ratio, requirement (B, T)."""
        return False

    @torch.no_grad()
    def step(self, frame):
        """frame (B, 3, R', R') normalised pixels -> this frame's gazing; gazing_pos counts within the frame."""
        check_tensor(frame, self.model.pos_embed, "(B, 3, H, W)", "frame")
        if frame.dim() != 4 or frame.shape[1] != 3:
            raise ValueError(f"frame has shape {tuple(frame.shape)}, expected (B, 3, H, W)")
        if len(frame) != self.batch_size:
            raise ValueError(f"this stream has batch_size={self.batch_size}, the frame is of {len(frame)} clips")
        video = self.model.check(frame.unsqueeze(1))
        self.model.check_length(self.frame + 1, "begin a new stream")

        vision, self.past = self.model.embed(video, self.past)
        ids, padded = self.gaze_frame(vision[:, 0])
        gazing = join_frames([(ids, padded)])
        gazing["gazing_mask"] = to_masks(gazing, self.config.ids_per_scale)
        return gazing

    @torch.no_grad()
    def run(self, vision):
        """All frames at once: vision (B, T, P, D) -> gazing."""
        T, P = vision.shape[1:3]
        n_tokens = T * P
        for t in range(T):
            n_tokens += max(self.budget(t))
        self.reserve(n_tokens)

        frames = []
        for t in range(T):
            ids, padded = self.gaze_frame(vision[:, t])
            ids = ids + self.config.num_ids * t
            frames.append((ids, padded))
        return join_frames(frames)

    def reserve(self, n_tokens):
        """Make room for so many tokens of a clip."""
        room = self.cache.shape[4]
        if n_tokens > room:
            shape = list(self.cache.shape)
            shape[4] = max(n_tokens, 2 * room)
            larger = self.cache.new_zeros(shape)
            larger[..., :room, :] = self.cache
            self.cache = larger
            self.turns = rope_turns(self.config, shape[4], self.device)

    def budget(self, t):
        """Most patches of frame t, at least one: a number for each clip."""
        ratio = at_frame(self.ratio, t, "gazing_ratio")
        return to_budgets(ratio.tolist(), self.config.num_ids)

    def gaze_frame(self, vision):
        """vision (B, P, D) -> ids within the frame (B, n_t) and padding (B, n_t)."""
        V = self.config.num_ids
        K = self.config.num_multi_token_pred
        B = self.batch_size

        # If no clip can stop early, skip the test: reading it would synchronise the GPU after every block.
        budget = self.budget(self.frame)
        n_slots = max(budget)
        may_stop = min(budget) < n_slots or self.has_requirement
        if may_stop:
            requirement = at_frame(self.requirement, self.frame, "task_loss_requirement")
            budget = send(torch.tensor(budget), self.device).unsqueeze(1)
            requirement = send(requirement, self.device).unsqueeze(1)

        # the padding id, and what has been chosen in this frame
        banned = self.is_padding
        if self.allowed is not None:
            banned = banned | ~F.pad(self.allowed, (0, 1))
        stopped = torch.zeros(B, 1, dtype=torch.bool, device=self.device)
        all_stopped = False
        frame_ids = []
        frame_padded = []
        for first_slot in range(0, n_slots, K):
            # feed the block before this one: a frame's last block enters with the next frame's vision tokens
            h = self.feed(vision if first_slot == 0 else None)

            # one token names the next K slots
            n = min(K, n_slots - first_slot)
            logits, predicted_loss = self.read_heads(h)
            logits = logits[:, :n].masked_fill(banned.unsqueeze(1), -math.inf)
            ids = self.choose(logits)
            self.block = ids
            self.n_real = [n] * B

            # a frame is finished by its budget, or by its predicted loss, never before its first slot
            if may_stop:
                slot = torch.arange(first_slot, first_slot + n, device=self.device)
                is_low = predicted_loss[:, :n] <= requirement
                finished = (slot >= budget) | (is_low & (slot > 0))
                padded = self.pad(stopped, finished)
                ids = ids.masked_fill(padded, V)
                stopped = stopped | finished.any(dim=1, keepdim=True)

                # the one read of a block; its real gazes are put in front
                n_real = (~padded).sum(1)
                *self.n_real, all_stopped = torch.cat([n_real, stopped.all(dim=0)]).tolist()
                longest = max(self.n_real)
                permutation, _ = pack_front(~padded)
                self.block = ids.gather(1, permutation)[:, :longest]
                ids, padded = self.trim(ids, padded, longest)
                frame_padded.append(padded)

            banned = banned.scatter(1, ids, True)
            frame_ids.append(ids)
            if all_stopped:
                break

        self.frame += 1
        ids = torch.cat(frame_ids, dim=1)
        padded = torch.cat(frame_padded, dim=1) if may_stop else torch.zeros_like(ids, dtype=torch.bool)
        return ids, padded

    def read_heads(self, h):
        """h (B, D) -> logits (B, K, V + 1) and predicted losses (B, K)."""
        V = self.config.num_ids
        K = self.config.num_multi_token_pred
        h = F.rms_norm(h, h.shape[-1:], eps=self.config.rms_norm_eps)
        y = linear(h, self.heads).float()
        logits, predicted_loss = y.split([K * (V + 1), K], dim=1)
        return logits.unflatten(1, (K, V + 1)), predicted_loss

    def choose(self, logits):
        """logits (B, n, V + 1) of n slots, -inf at banned ids -> distinct ids (B, n). Changes the logits."""
        # to draw from a softmax, add Gumbel noise and take the best; noise is its negative
        if self.temperature > 0:
            noise = torch.empty_like(logits).exponential_(generator=self.generator)
            noise = noise.clamp_(min=1e-8).log_()  # without the limit, a 0 would win against -inf
            if self.n_likeliest is None:
                logits.sub_(noise, alpha=self.temperature)

        B, n = logits.shape[:2]
        ids = torch.empty(B, n, 1, dtype=torch.long, device=self.device)
        for i in range(n):
            scores = logits[:, i]
            if self.n_likeliest is not None and self.temperature > 0:
                lowest = scores.topk(min(self.n_likeliest, scores.shape[1])).values[:, -1:]
                scores = scores.masked_fill(scores < lowest, -math.inf).sub_(noise[:, i], alpha=self.temperature)
            torch.argmax(scores, dim=1, keepdim=True, out=ids[:, i])

            # no later slot takes the same patch
            if i < n - 1:
                logits.scatter_(2, ids[:, i:i + 1].expand(-1, n, -1), -math.inf)
        return ids.squeeze(2)

    def pad(self, stopped, finished):
        """Which slots of a block are padded (B, n): those of clips that stopped before (B, 1), and those from the first
        one on at which the frame is finished (B, n)."""
        return stopped | (finished.cumsum(1) > 0)

    def trim(self, ids, padded, longest):
        """The block's slots up to the last one that any clip takes."""
        return ids[:, :longest], padded[:, :longest]

    def feed(self, vision=None):
        """Put the last block, and vision tokens (B, P, D) behind it, into the cache. Returns the state of the last
        token (B, D), before the final norm."""
        x = self.model.decoder.embed_tokens(self.block)
        lengths = [before + n for before, n in zip(self.lengths, self.n_real, strict=True)]
        if vision is not None:
            x = torch.cat([x, vision], dim=1)
            lengths = [n + vision.shape[1] for n in lengths]
        end = max(lengths)
        self.reserve(end + 1)

        # where the new tokens go: the same place for all clips, if none is longer than the others
        start = self.lengths[0]
        index = slice(start, start + x.shape[1])
        mask = None
        if set(self.lengths) != {start} or set(lengths) != {index.stop}:
            index, mask = self.places(x.shape[1], end)
        self.lengths = lengths
        positions = self.positions(index, vision)
        turns = self.turns[positions]
        layers = self.model.decoder.layers
        for i, layer in enumerate(layers):
            qkv, out, gate_up, down = self.weights[i]
            qkv = layer.project(x, turns, qkv)  # (3, B, H, n, d)
            q = qkv[0]
            put(self.cache[i], index, qkv[1:])
            keys, values = self.cache[i]  # (B, H, room, d)
            keys = keys[:, :, :end].to(q.dtype)
            values = values[:, :, :end].to(q.dtype)

            # the last layer answers for the last token alone
            if i == len(layers) - 1:
                x = x[:, -1:]
                q = q[:, :, -1:]
                mask = None if mask is None else mask[:, :, -1:]
            if mask is None:
                y = causal_attention(q, keys, values)
            else:
                y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            x = layer.finish(x, y, out, gate_up, down)
        return x[:, 0]

    def places(self, n_new, end):
        """For clips of different lengths: the index (B, n_new) of each new token in the cache, whose first `end` places
        are read, and the mask (B, 1, n_new, end) to add to scores."""
        n_gazes = self.block.shape[1]
        first_gaze, n_real = send(torch.tensor([self.lengths, self.n_real]), self.device).unsqueeze(2)
        offset = torch.arange(n_new, device=self.device)

        # vision tokens follow a clip's last real gaze; what is padded goes where nothing is read
        index = first_gaze + torch.where(offset < n_gazes, offset, offset - n_gazes + n_real)
        is_padded = (offset >= n_real) & (offset < n_gazes)
        index = index.masked_fill(is_padded, end)

        # a token sees those up to itself; what lies behind a clip's last real token is overwritten later
        visible = torch.arange(end, device=self.device) <= index.unsqueeze(-1)
        mask = self.cache.new_zeros(visible.shape)
        mask.masked_fill_(~visible, -math.inf)
        return index, mask.unsqueeze(1)

    def positions(self, index, vision):
        """RoPE positions of tokens that go to `index`, a slice or (B, n); vision: None if they are a block alone."""
        return index


class ReferenceStream(GazeStream):
    """Decoding as the published code does it, which shaped the released weights. Where it differs:

    - Every block after a frame's first is decoded at the positions of that frame's last K vision tokens.
    - Each slot is tested by itself: after a padded slot a block can hold real gazes again, and its padding stays.
    - Samples are drawn from the 50 likeliest patches, the default of the library that the published code samples with.
    - Clips that stop at different slots influence each other, so generate() runs them one by one.
    """

    n_likeliest = 50

    @staticmethod
    def needs_single_clips(ratio, requirement):
        return bool((requirement > -math.inf).any() or (ratio != ratio[:1]).any())

    def positions(self, index, vision):
        K = self.config.num_multi_token_pred
        if vision is not None:
            self.frame_end = self.lengths
            return index
        if isinstance(index, slice):
            return slice(self.frame_end[0] - K, self.frame_end[0])
        offsets = torch.arange(-K, 0, device=self.device)
        return send(torch.tensor(self.frame_end), self.device).unsqueeze(1) + offsets

    def pad(self, stopped, finished):
        return finished

    def trim(self, ids, padded, longest):
        return ids, padded


def put(cache, index, new):
    """Write keys and values (2, B, H, n, d) into a layer's cache (2, B, H, room, d), at a slice of its tokens or at
    index (B, n)."""
    if isinstance(index, slice):
        cache[:, :, :, index] = new
    else:
        index = index[:, None, :, None].expand_as(new)
        cache.scatter_(3, index, new.to(cache.dtype))
