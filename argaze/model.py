"""ARGaze: where the wearer of a camera looks, frame by frame, from what it sees and where it looked before.

    model = ARGaze(ARGazeConfig())                           # DINOv3 ViT-S/16 from the hub (gated), a fresh decoder
    model = ARGaze.from_pretrained("out/argaze")             # a folder written by save_pretrained
    model = ARGaze.from_published("egtea.pyth")              # a published checkpoint, either variant
    logits = model(video)                                    # a clip: (B, T, 3, R, R) -> (B, T, h, w), free-running
    state = model.start(1)                                   # a stream: constant memory, equal to the clip
    logits, state = model.step(frame, state)                 # (B, 3, R, R) -> (B, h, w)
    probability, point, spread = model.predict(logits)

At every step a ViT encodes the frame and, in the variant "template", a crop of the last frame around the last gaze. In
a small decoder N query tokens read both, and the last k predicted heat maps; a head turns them into logits of a heat
map. The variant "twocross" reads the last k frames instead, and the heat maps bias where its attention goes.

Dimension key: B clips, T frames, R image size, g patches per side, N = g · g tokens of a frame, D width, k history,
h x w heat map. Points are (x, y) in [0, 1] from the top left corner; sizes are in pixels.
"""
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from lib.configurator import LARGEST_SIZE, MOST_LAYERS, check_patches, check_sizes
from lib.cpu import Linear, linear, quicken
from lib.pixels import check_tensor, check_values
from lib.weights import (
    build,
    download,
    is_hub_id,
    load_module,
    load_network,
    load_network_config,
    network_config,
    network_errors,
    read_config,
    read_tensors,
    save_folder,
    section,
)

DINOV3_S = "facebook/dinov3-vits16-pretrain-lvd1689m"
MEAN = (0.485, 0.456, 0.406)  # of ImageNet, which the encoders were trained with
STD = (0.229, 0.224, 0.225)
LARGE_MAP = 112               # cells per side from which on the published head doubles its map a third time

# ----------------------------------------------------------------------------------------------------------------------
# configuration


@dataclass
class ARGazeConfig:
    variant: str = "template"          # template (paper) | twocross (the authors' later model)
    encoder: str = DINOV3_S            # folder or hub id of a ViT; fresh: "random:width x layers x heads x mlp"
    image_size: int = 224              # R
    patch_size: int = 16               # the encoder's
    decoder_layers: int = 3
    decoder_heads: int = 8
    decoder_ffn: int = 1536
    head_widths: str = "256+128"       # channels of the head's two stages
    history: int = 3                   # k; 0: no memory of heat maps (published: 3, twocross 5)
    heatmap_size: int = 64             # side of the heat map in cells (published: 64, twocross 96)
    template: str = "crop"             # crop | tokens of the last frame, without a second pass | roi: mark it | none
    template_scale: float = 0.35       # its side over the shorter side of the frame (published scripts)
    scene_layers: str = "-3,-2,-1"     # encoder blocks whose outputs are fused: from 1, or backwards from -1
    history_values: str = "probability"  # what the decoder gets of past maps: p / max p | logits (as released)
    compat: bool = False               # repeat the released code's errors, for released weights
    last_norm: bool = False            # final norm on the last block's output, as transformers 4.56.0 to 4.57.1 had it
    train_encoder: bool = False        # train the encoder's blocks too (published for twocross)
    dropout: float = 0.1               # of decoder and head

    def __post_init__(self):
        choices = {"variant": ("template", "twocross"), "template": ("crop", "tokens", "roi", "none"),
                   "history_values": ("probability", "logits")}
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}={getattr(self, key)!r} must be one of {', '.join(allowed)}")

        check_sizes(self, may_be_zero=["history"])
        check_patches("image_size", self.image_size, self.patch_size)
        for key, most in (("heatmap_size", 1024), ("history", 1000)):
            if getattr(self, key) > most:
                raise ValueError(f"{key}={getattr(self, key)} must be at most {most}")
        if not 0 < self.template_scale <= 1:
            raise ValueError(f"template_scale={self.template_scale} must lie in (0, 1]")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")

        whole_numbers("head_widths", self.head_widths, "+", count=2, lowest=1)
        whole_numbers("scene_layers", self.scene_layers, ",")

    @property
    def grid(self):  # g
        return self.image_size // self.patch_size


def whole_numbers(key, text, separator, count=None, lowest=-MOST_LAYERS):
    """'256+128' -> [256, 128]. ValueError names the key."""
    try:
        numbers = [int(part) for part in text.split(separator)]
    except ValueError:
        numbers = []
    in_range = all(lowest <= number <= LARGEST_SIZE for number in numbers)
    if not numbers or not in_range or count not in (None, len(numbers)):
        raise ValueError(f"{key}={text!r} must be {count or ''} whole numbers from {lowest} to {LARGEST_SIZE}, joined "
                         f"by {separator!r}")
    return numbers


# ----------------------------------------------------------------------------------------------------------------------
# encoder: a Vision Transformer of the transformers library


def build_encoder(config, weights=True):
    """The network that config.encoder names; weights=False: untrained, for weights that will be loaded into it.

    FileNotFoundError: no such folder, or the hub does not give it. ValueError: its patches have another size.
    """
    from transformers import AutoConfig, AutoModel
    name = config.encoder
    if name == DINOV3_S and not weights:
        name = "random:"  # has its sizes, so nothing needs to be fetched
    if name.startswith("random:"):
        sizes = random_encoder_config(config, name.removeprefix("random:"))
        encoder = build(lambda: AutoModel.from_config(sizes))
    else:
        called = f"encoder={name}"
        if name == DINOV3_S:
            called += " (gated: accept its licence on huggingface.co and set HF_TOKEN; --encoder=random: needs none)"
        if weights:
            encoder = load_network(AutoModel, AutoConfig, name, called)
        else:
            encoder = AutoModel.from_config(load_network_config(AutoConfig, name, called)[0])

    patch_size = getattr(encoder.config, "patch_size", None)
    if patch_size != config.patch_size:
        raise ValueError(f"encoder={name} has patches of {patch_size} pixels: give --patch_size={patch_size} and an "
                         "image_size that is a multiple of it")
    return quicken(encoder.float())


def random_encoder_config(config, sizes):
    """A DINOv3 of the sizes in '64x4x4x128': width, layers, heads, MLP; without any those of ViT-S/16."""
    from transformers import DINOv3ViTConfig
    width, layers, heads, mlp = whole_numbers("encoder=random", sizes or "384x12x6x1536", "x", count=4, lowest=1)
    if layers > MOST_LAYERS or width % (4 * heads):
        raise ValueError(f"encoder=random:{sizes}: at most {MOST_LAYERS} layers, and a width (first number) that is a "
                         "multiple of 4 heads (third number)")
    return DINOv3ViTConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                           intermediate_size=mlp, patch_size=config.patch_size, image_size=config.image_size,
                           num_register_tokens=4)


@torch.no_grad()
def try_out(encoder, size):
    """Show it one picture: settings that do not go together, such as width and heads, fail here and not in training."""
    with torch.random.fork_rng(devices=[]):
        encoder.train()(torch.zeros(1, 3, size, size))
    encoder.eval()


def blocks(encoder):
    """The ModuleList of the encoder's blocks, whatever its name is."""
    for module in encoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == encoder.config.num_hidden_layers:
            return module
    raise ValueError(f"{type(encoder).__name__} has no list of blocks: choose another encoder")


def block_outputs(encoder, pixels):
    """(outputs of all blocks, each (B, tokens, D); the last one after the final norm).

    They are taken at the blocks: versions of transformers differ in whether the last of their hidden states is normed.
    """
    outputs = []

    def keep(block, inputs, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks(encoder)]
    try:
        normed = encoder(pixel_values=pixels).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    return outputs, normed


# ----------------------------------------------------------------------------------------------------------------------
# files of the published code


def published_name(name):
    """The encoder's blocks have had another name in memory since transformers 5.23."""
    return name.replace("encoder.model.layer.", "encoder.layer.")


def read_published(path):
    """{published name: tensor} of a state dict, or of the one within a training checkpoint."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    tensors = read_tensors(path, part="model_state")
    tensors = {published_name(name.removeprefix("module.")): tensor for name, tensor in tensors.items()}
    if "temporal_pos_embed.weight" not in tensors:
        raise ValueError(f"{path} is no checkpoint of ARGaze: temporal_pos_embed.weight is missing")
    return tensors


def published_config(tensors):
    """The settings that the weights in a file were released with."""
    history = len(tensors["temporal_pos_embed.weight"])
    if "decoder_layers.0.history_cross_attn.in_proj_weight" in tensors:
        return ARGazeConfig(variant="twocross", history=history, heatmap_size=96, train_encoder=True, compat=True)
    return ARGazeConfig(history=history, history_values="logits", compat=True)


# ----------------------------------------------------------------------------------------------------------------------
# maps, points and pictures


def resize(maps, size):
    """Maps (…, h, w) -> (…, *size), bilinear."""
    *leading, h, w = maps.shape
    flat = F.interpolate(maps.reshape(-1, 1, h, w), size, mode="bilinear", align_corners=False)
    return flat.view(*leading, *size)


def to_probability(logits, temperature):
    """softmax(logits / temperature) over maps (…, h, w), in float32."""
    flat = logits.float().flatten(-2) / temperature
    return flat.softmax(-1).view(logits.shape)


def expected_point(probability):
    """Mean position (…, 2) of maps (…, h, w) that sum to 1, whose cells lie at linspace(0, 1)."""
    h, w = probability.shape[-2:]
    x = torch.linspace(0, 1, w, device=probability.device)
    y = torch.linspace(0, 1, h, device=probability.device)
    mean_x = (probability.sum(-2) * x).sum(-1)
    mean_y = (probability.sum(-1) * y).sum(-1)
    return torch.stack([mean_x, mean_y], dim=-1)


def position_code(grid, width):
    """2-D sine and cosine code (N, D): the first half of the channels for the row, the second for the column."""
    exponent = torch.arange(width // 4) * 2 / width
    frequency = torch.exp(-math.log(10000.0) * exponent)
    angle = torch.arange(grid).unsqueeze(1) * frequency                  # (g, D/4)
    code = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)    # (g, D/2), sine and cosine in turn
    row = code.unsqueeze(1).expand(grid, grid, -1)
    column = code.unsqueeze(0).expand(grid, grid, -1)
    code = torch.cat([row, column], dim=-1)
    return code.flatten(0, 1)


def mirrored_range(center, side, length):
    """Indices (B, side) around center (B,) in [0, 1] of an axis of `length` pixels, mirrored at both of its ends."""
    last = length - 1
    first = torch.round(center * last).long() - side // 2
    index = first.unsqueeze(1) + torch.arange(side, device=center.device)
    index = index.abs()
    return last - (last - index).abs()


def crop(frames, centers, scale, size):
    """Squares of `scale` times the shorter side of frames (B, 3, H, W) around centers (B, 2): (B, 3, size, size)."""
    height, width = frames.shape[-2:]
    side = max(1, round(scale * min(height, width)))
    rows = mirrored_range(centers[:, 1], side, height)
    columns = mirrored_range(centers[:, 0], side, width)

    clip = torch.arange(len(frames), device=frames.device)
    clip = clip[:, None, None]
    rows = rows[:, :, None]
    columns = columns[:, None, :]
    square = frames[clip, :, rows, columns]                              # (B, side, side, 3)
    square = rearrange(square, "b h w c -> b c h w")
    return F.interpolate(square, (size, size), mode="bilinear", align_corners=False)


def sample_tokens(tokens, centers, scale):
    """Stand-in for a crop that needs no second pass: g x g tokens, read between the tokens (B, N, D) around centers."""
    grid = math.isqrt(tokens.shape[1])
    last = grid - 1
    offset = torch.linspace(-0.5, 0.5, grid, device=tokens.device)
    place = centers.unsqueeze(2) * last + offset * scale * grid          # (B, 2, g), in tokens from the first
    place = place / last * 2 - 1                                         # -1 and 1: the first and the last token
    x = place[:, 0].unsqueeze(1).expand(-1, grid, -1)
    y = place[:, 1].unsqueeze(2).expand(-1, -1, grid)
    where = torch.stack([x, y], dim=-1).to(tokens.dtype)                 # (B, g, g, 2)

    picture = rearrange(tokens, "b (h w) d -> b d h w", h=grid)
    sampled = F.grid_sample(picture, where, padding_mode="reflection", align_corners=True)
    return rearrange(sampled, "b d h w -> b (h w) d")


def region(centers, scale, size, grid):
    """Mask (B, g, g): 1 in the square of `scale` around centers (B, 2), drawn on size x size, then nearest cells."""
    cell = torch.arange(size, device=centers.device)
    low = (centers - scale / 2).unsqueeze(2) * size                      # (B, 2, 1)
    inside = (cell >= low) & (cell < low + scale * size)                 # (B, 2, size)
    columns, rows = inside.unbind(1)
    mask = rows.unsqueeze(2) & columns.unsqueeze(1)
    mask = mask.float().unsqueeze(1)
    return F.interpolate(mask, (grid, grid), mode="nearest").squeeze(1)


# ----------------------------------------------------------------------------------------------------------------------
# decoder and head


class Attention(nn.MultiheadAttention):
    """Has its parameters and their initialisation. bias (B, 1, 1, L): added to the scores of all queries and heads."""

    def __init__(self, width, heads, dropout):
        super().__init__(width, heads, dropout, batch_first=True)

    def forward(self, x, memory, bias=None):
        D = self.embed_dim
        H = self.num_heads
        q = linear(x, self.in_proj_weight[:D], self.in_proj_bias[:D])
        kv = linear(memory, self.in_proj_weight[D:], self.in_proj_bias[D:])
        q = rearrange(q, "b n (h d) -> b h n d", h=H)
        k, v = rearrange(kv, "b l (two h d) -> two b h l d", two=2, h=H)

        if bias is not None:
            bias = bias.to(q.dtype).expand(-1, 1, q.shape[2], -1)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        y = rearrange(y, "b h n d -> b n (h d)")
        return linear(y, self.out_proj.weight, self.out_proj.bias)


def feed_forward(config, width):
    return nn.Sequential(
        Linear(width, config.decoder_ffn),
        nn.GELU(),
        nn.Dropout(config.dropout),
        Linear(config.decoder_ffn, width),
        nn.Dropout(config.dropout))


class TemplateLayer(nn.Module):
    """The past heat maps are tokens before the queries; all of them read the memory."""

    def __init__(self, config, width):
        super().__init__()
        self.self_attn = Attention(width, config.decoder_heads, config.dropout)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn = Attention(width, config.decoder_heads, config.dropout)
        self.norm2 = nn.LayerNorm(width)
        self.ffn = feed_forward(config, width)
        self.norm3 = nn.LayerNorm(width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, memory, n_last=None):
        """x (B, L, D). n_last: return only so many of the last tokens, those that anything reads afterwards."""
        queries = x if n_last is None else x[:, -n_last:]
        update = self.self_attn(queries, x)
        x = self.norm1(queries + self.drop(update))
        update = self.cross_attn(x, memory)
        x = self.norm2(x + self.drop(update))
        return self.norm3(x + self.ffn(x))


class TwoCrossLayer(nn.Module):
    """The queries read the past frames, where the past heat maps bias them, and then the present frame."""

    def __init__(self, config, width):
        super().__init__()
        self.self_attn = Attention(width, config.decoder_heads, config.dropout)
        self.norm1 = nn.LayerNorm(width)
        self.history_cross_attn = Attention(width, config.decoder_heads, config.dropout)
        self.norm2 = nn.LayerNorm(width)
        self.current_cross_attn = Attention(width, config.decoder_heads, config.dropout)
        self.norm3 = nn.LayerNorm(width)
        self.ffn = feed_forward(config, width)
        self.norm4 = nn.LayerNorm(width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, memory, past, bias):
        update = self.self_attn(x, x)
        x = self.norm1(x + self.drop(update))
        if past.shape[1]:
            update = self.history_cross_attn(x, past, bias)
            x = self.norm2(x + self.drop(update))
        update = self.current_cross_attn(x, memory)
        x = self.norm3(x + self.drop(update))
        return self.norm4(x + self.ffn(x))


def doubling(config, width):
    """Layers that double the resolution of (B, width, h, w)."""
    if config.variant == "twocross":
        return [nn.Conv2d(width, 4 * width, 1), nn.PixelShuffle(2)]
    return [nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)]


def head_stage(config, n_in, n_out):
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, 3, padding=1),
        nn.ReLU(),
        nn.Dropout2d(config.dropout),
        *doubling(config, n_out),
        nn.ReLU())


# ----------------------------------------------------------------------------------------------------------------------
# the model


class ARGaze(nn.Module):
    """Parameters have the published names. encoder: a ViT; None: the one that config.encoder names."""

    checks_values = True  # of true maps; a training script, which makes them, does not: a GPU is waited for

    def __init__(self, config, encoder=None):
        super().__init__()
        c = config
        self.config = c
        self.encoder = build_encoder(c) if encoder is None else encoder
        D = self.encoder.config.hidden_size
        if D % 4 or D % c.decoder_heads:
            raise ValueError(f"the encoder's width {D} must be a multiple of 4 and of decoder_heads={c.decoder_heads}")

        # scene tokens: outputs of several blocks, fused
        self.scene_layers = whole_numbers("scene_layers", c.scene_layers, ",")
        n_blocks = self.encoder.config.num_hidden_layers
        for layer in self.scene_layers:
            if layer == 0 or abs(layer) > n_blocks:
                raise ValueError(f"scene_layers={c.scene_layers}: the encoder has blocks 1 to {n_blocks}, or -1 to "
                                 f"-{n_blocks}")
        n_scales = len(self.scene_layers)
        self.multiscale_proj = nn.ModuleList(Linear(D, D) for _ in range(n_scales))
        self.feature_proj = nn.Sequential(Linear(D * n_scales, D), nn.LayerNorm(D))

        # tokens of past heat maps, queries, embeddings
        self.hm_to_tokens = nn.Sequential(nn.Conv2d(1, D, 1), nn.LayerNorm([D, c.grid, c.grid]))
        self.query_tokens = nn.Parameter(torch.randn(1, c.grid ** 2, D) * 0.02)
        self.token_type_embed = nn.Embedding(3, D)                       # heat map; query; template or past frame
        self.temporal_pos_embed = nn.Embedding(c.history, D)             # oldest first
        if c.variant == "template":
            self.roi_prompt_embed = nn.Parameter(torch.zeros(D))
        self.register_buffer("position_code", position_code(c.grid, D), persistent=False)

        # decoder and head
        layer_class = TwoCrossLayer if c.variant == "twocross" else TemplateLayer
        self.decoder_layers = nn.ModuleList(layer_class(c, D) for _ in range(c.decoder_layers))
        first, second = whole_numbers("head_widths", c.head_widths, "+")
        self.pixel_decoder_conv1 = head_stage(c, D, first)
        self.pixel_decoder_conv2 = head_stage(c, first, second)
        is_large = c.heatmap_size >= LARGE_MAP
        self.pixel_final_upsample = nn.Sequential(*doubling(c, second)) if is_large else nn.Identity()
        self.pixel_final_proj = nn.Conv2d(second, 1, 1)
        self.freeze()

    def freeze(self):
        """Require gradients only of what training changes, so that no unused parameter stalls DDP."""
        c = self.config
        self.encoder.requires_grad_(False)
        if c.train_encoder:
            layers = blocks(self.encoder)
            n_used = max(layer % (len(layers) + 1) for layer in self.scene_layers)
            layers[:n_used].requires_grad_(True)

        # a fresh encoder has no embeddings worth keeping
        if c.train_encoder and c.encoder.startswith("random:"):
            for name, parameter in self.encoder.embeddings.named_parameters():
                parameter.requires_grad_(name != "mask_token")

        unused = []
        if c.variant == "twocross" or c.history == 0:
            unused.append(self.hm_to_tokens)
        if c.history == 0:
            unused.append(self.temporal_pos_embed)
        if c.history == 0 and c.variant == "twocross":
            for layer in self.decoder_layers:
                unused += [layer.history_cross_attn, layer.norm2]
        for module in unused:
            module.requires_grad_(False)
        if c.variant == "template":
            self.roi_prompt_embed.requires_grad_(c.template == "roi")

    def train(self, mode=True):
        super().train(mode)
        if not self.config.train_encoder:
            self.encoder.eval()  # in training mode DINOv3 rescales its positions at random
        return self

    # ---- files

    @classmethod
    def from_pretrained(cls, folder):
        """Load config.json + model.safetensors from a folder or a hub id. ValueError names tensors that do not fit."""
        from transformers import AutoModel
        if is_hub_id(folder):
            folder = download(str(folder), ["model.safetensors"])
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}: not a folder written by save_pretrained")

        def read(settings):
            keys = ARGazeConfig.__dataclass_fields__.keys() & settings.keys()
            config = ARGazeConfig(**{key: settings[key] for key in keys})
            return config, section(settings, "encoder_config")

        def make():
            with network_errors(called):
                encoder = AutoModel.from_config(encoder_config)
            return cls(config, quicken(encoder.float()))

        config, encoder_settings = read_config(folder / "config.json", read)
        called = f"{folder / 'config.json'}: its encoder_config"
        encoder_config = network_config(encoder_settings, called)
        file = folder / "model.safetensors"
        model = load_module(make, read_tensors(file), f"{file} and its config.json", published_name)
        with network_errors(called):
            try_out(model.encoder, config.image_size)
        model.freeze()  # assigned parameters are new ones
        return model.eval()

    def save_pretrained(self, folder):
        """Write config.json + model.safetensors, the encoder included. A file appears whole or not at all."""
        encoder_config = json.loads(self.encoder.config.to_json_string(use_diff=False))
        config = {"model_type": "argaze", **asdict(self.config), "encoder_config": encoder_config}
        tensors = {published_name(name): tensor for name, tensor in self.state_dict().items()}
        save_folder(folder, tensors, config)

    @classmethod
    def from_published(cls, path, config=None):
        """Load a checkpoint of the authors' code: .pyth, .pt (whole, or a state dict) or .safetensors.

        config: its sizes; None: those it was released with, run as released (compat). An encoder that the file lacks
        comes from config.encoder. ValueError names tensors that are missing or left over.
        """
        path = Path(path)
        tensors = read_published(path)
        config = config or published_config(tensors)
        has_encoder = any(name.startswith("encoder.") for name in tensors)
        if not has_encoder and config.encoder.startswith("random:"):
            raise ValueError(f"{path} holds no encoder: config.encoder must be a folder or a hub id")

        if not has_encoder:
            encoder = build_encoder(config)
            for name, tensor in encoder.state_dict().items():
                tensors[published_name(f"encoder.{name}")] = tensor
        model = load_module(lambda: cls(config, build_encoder(config, weights=False)), tensors,
                            f"The tensors of {path}", published_name)
        model.freeze()  # assigned parameters are new ones
        return model.eval()

    # ---- one frame

    def encode(self, frames):
        """frames (B, 3, R, R) in [0, 1] -> scene tokens (B, N, D)."""
        c = self.config
        mean = torch.tensor(MEAN, device=frames.device).view(3, 1, 1)
        std = torch.tensor(STD, device=frames.device).view(3, 1, 1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and c.train_encoder):
            pixels = ((frames - mean) / std).to(self.position_code.dtype)
            outputs, normed = block_outputs(self.encoder, pixels)
        if c.last_norm:
            outputs[-1] = normed

        # patches are the last N tokens; the released code takes the N after the first one, registers among them
        N = c.grid ** 2
        patches = slice(1, 1 + N) if c.compat else slice(-N, None)
        scales = []
        for layer, proj in zip(self.scene_layers, self.multiscale_proj, strict=True):
            output = outputs[layer] if layer < 0 else outputs[layer - 1]
            scales.append(proj(output[:, patches]))
        return self.feature_proj(torch.cat(scales, dim=-1))

    def encode_both(self, frame, state):
        """(scene tokens, template tokens or None), both (B, N, D), of the frame and of the last one's crop."""
        c = self.config
        if c.variant == "twocross" or c.template in ("none", "roi"):
            return self.encode(frame), None

        if c.template == "tokens":
            scene = self.encode(frame)
            last_scene = scene if state["scene"] is None else state["scene"]
            return scene, sample_tokens(last_scene, state["center"], c.template_scale)

        # one pass for both pictures
        last_frame = frame if state["frame"] is None else state["frame"]
        square = crop(last_frame, state["center"], c.template_scale, c.image_size)
        return self.encode(torch.cat([frame, square])).chunk(2)

    def look(self, frame, state):
        """Logits (B, h, w) of frame (B, 3, R, R) given what the state remembers, and its scene tokens (B, N, D)."""
        c = self.config
        scene, template = self.encode_both(frame, state)
        memory = scene + self.position_code
        queries = self.query_tokens + self.position_code + self.token_type_embed.weight[1]
        queries = queries.expand(len(frame), -1, -1)

        if c.variant == "twocross":
            past = self.frame_tokens(state["scenes"])
            bias = rearrange(state["history"], "b k h w -> b 1 1 (k h w)")
            x = queries
            for layer in self.decoder_layers:
                x = layer(x, memory, past, bias)
        else:
            if c.template == "roi":
                mask = region(state["center"], c.template_scale, 16, c.grid).flatten(1)
                mask = mask.to(memory.dtype)
                memory = memory + mask.unsqueeze(2) * self.roi_prompt_embed
            if template is not None:
                template = template + self.position_code + self.token_type_embed.weight[2]
                memory = torch.cat([template, memory], dim=1)
            x = queries
            if c.history:
                x = torch.cat([self.map_tokens(state["history"]), queries], dim=1)
            for layer in self.decoder_layers[:-1]:
                x = layer(x, memory)
            x = self.decoder_layers[-1](x, memory, n_last=queries.shape[1])

        # the 1 x 1 convolution may come before the resizing, and costs less there
        x = rearrange(x, "b (h w) d -> b d h w", h=c.grid)
        x = self.pixel_decoder_conv2(self.pixel_decoder_conv1(x))
        x = self.pixel_final_proj(self.pixel_final_upsample(x)).float()
        return resize(x, (c.heatmap_size, c.heatmap_size)).squeeze(1), scene

    def map_tokens(self, history):
        """Past heat maps (B, k, g, g) -> tokens (B, k·N, D)."""
        maps = rearrange(history, "b k h w -> (b k) 1 h w")
        tokens = self.hm_to_tokens(maps)                                 # (B·k, D, g, g)
        tokens = rearrange(tokens, "(b k) d h w -> b k (h w) d", k=history.shape[1])
        return self.past_tokens(tokens, self.token_type_embed.weight[0])

    def frame_tokens(self, scenes):
        """Past frames' tokens (B, k, N, D) -> (B, k·N, D)."""
        return self.past_tokens(scenes, self.token_type_embed.weight[2])

    def past_tokens(self, tokens, kind):
        """Add position, time and kind to tokens (B, k, N, D)."""
        tokens = tokens + self.position_code + kind
        tokens = tokens + self.temporal_pos_embed.weight.unsqueeze(1)
        return tokens.flatten(1, 2)

    # ---- memory

    def start(self, batch):
        """State of `batch` streams before their first frame. It keeps its size."""
        c = self.config
        like = self.position_code
        state = {"history": like.new_zeros(batch, c.history, c.grid, c.grid),  # past maps, oldest first
                 "center": like.new_full((batch, 2), 0.5)}                     # of the template
        if c.variant == "twocross":
            state["scenes"] = like.new_zeros(batch, c.history, *like.shape)    # past frames' tokens
        else:
            state["frame"] = None                                              # the last frame
            state["scene"] = None                                              # or its tokens
        return state

    def remember(self, state, frame, scene, logits):
        """The state after a frame. What was predicted enters without gradient."""
        c = self.config
        logits = logits.detach()
        past_map = self.past_map(logits).to(state["history"].dtype)
        new = {"history": append(state["history"], past_map),
               "center": expected_point(to_probability(logits, 1))}
        if c.variant == "twocross":
            new["scenes"] = append(state["scenes"], scene)
        else:
            new["frame"] = frame if c.template == "crop" else None
            new["scene"] = scene if c.template == "tokens" else None
        return new

    def past_map(self, logits):
        """What is remembered of predicted logits (…, h, w): (…, g, g)."""
        c = self.config
        size = (c.grid, c.grid)
        if c.variant == "twocross":
            return attention_bias(to_probability(resize(logits, size), 1))
        if c.history_values == "logits":
            return resize(logits, size)
        return resize(peak_1(to_probability(logits, 2)), size)

    def true_map(self, heatmaps):
        """What stands for it under teacher forcing, from true maps (…, h', w') of any scale: (…, g, g)."""
        c = self.config
        size = (c.grid, c.grid)
        if c.variant == "twocross":
            maps = resize(heatmaps, size)
            return attention_bias(maps / maps.sum((-2, -1), keepdim=True))
        if c.compat:  # released: as they come, peaks of 0.02 where there are logits else
            return resize(heatmaps, size)
        return resize(peak_1(heatmaps), size)

    def truth(self, heatmaps, own, points):
        """What teach() needs for all frames: maps (B, T, g, g), points (B, T, 2), own as nested lists."""
        c = self.config
        T = heatmaps.shape[1]
        heatmaps = heatmaps.float()
        if c.compat:  # released: the soft-argmax of probabilities, which is nearly the middle
            points = expected_point(to_probability(heatmaps, 1))
        elif points is None:
            points = expected_point(heatmaps / heatmaps.sum((2, 3), keepdim=True))

        n_slots = c.history + 1
        own = torch.zeros(T, n_slots) if own is None else torch.as_tensor(own)
        assert own.shape == (T, n_slots), f"own is {tuple(own.shape)}, needed is ({T}, {n_slots})"
        return self.true_map(heatmaps), points, own.tolist()

    def check_truth(self, heatmaps, points, B, T):
        check_tensor(heatmaps, self.position_code, "(B, T, h, w)", "heatmaps")
        if heatmaps.dim() != 4 or heatmaps.shape[:2] != (B, T) or heatmaps.numel() == 0:
            raise ValueError(f"heatmaps are {tuple(heatmaps.shape)}, expected ({B}, {T}, h, w), of the video's frames")
        if points is not None and points.shape != (B, T, 2):
            raise ValueError(f"points are {tuple(points.shape)}, expected ({B}, {T}, 2), of the video's frames")
        if self.checks_values:
            check_values(heatmaps, 0, math.inf, "maps of data.heatmaps(points)", "heatmaps")
            if points is not None:
                check_values(points, -1, 2, "x and y in 0..1", "points")

    def teach(self, state, maps, points, own, t):
        """The state before step t with the truth in it, but for the slots where own (k + 1) is True."""
        k = self.config.history
        history = state["history"].clone()
        for slot in range(max(0, k - t), k):
            if not own[slot]:
                history[:, slot] = maps[:, t - k + slot]
        taught = state | {"history": history}
        if t > 0 and not own[k]:
            taught["center"] = points[:, t - 1]
        return taught

    # ---- clips and streams

    def forward(self, video, heatmaps=None, own=None, points=None):
        """video (B, T, 3, R, R) uint8, or floats in [0, 1] -> logits (B, T, h, w).

        Without heatmaps free-running: history and template follow the model's own predictions. With true heatmaps
        (B, T, h', w') and gaze points (B, T, 2) teacher forcing; points default to the maps' centres of mass. With own
        (T, k + 1) bool scheduled sampling: where it is True, that slot of the history at step t, oldest first, or in
        the last column the template, takes the prediction. ValueError: shapes or values that do not fit.
        """
        self.check(video, 5)
        B, T = video.shape[:2]
        if heatmaps is not None:
            self.check_truth(heatmaps, points, B, T)
            maps, points, own = self.truth(heatmaps, own, points)
        elif own is not None or points is not None:
            raise ValueError("own and points need heatmaps")

        state = self.start(B)
        outputs = []
        for t in range(T):
            frame = to_unit(video[:, t])
            given = state
            if heatmaps is not None:
                given = self.teach(state, maps, points, own[t], t)
            logits, scene = self.look(frame, given)
            state = self.remember(state, frame, scene, logits)
            outputs.append(logits)
        return torch.stack(outputs, dim=1)

    @torch.no_grad()
    def step(self, frame, state):
        """One frame of a stream: (B, 3, R, R) uint8, or floats in [0, 1] -> logits (B, h, w), the next state."""
        self.check(frame, 4)
        if len(frame) != len(state["history"]):
            raise ValueError(f"video has {len(frame)} frames, the state is of {len(state['history'])} streams")
        frame = to_unit(frame)
        logits, scene = self.look(frame, state)
        return logits, self.remember(state, frame, scene, logits)

    @staticmethod
    def predict(logits):
        """Logits (…, h, w) -> probability (…, h, w) at the temperature of the loss; point (…, 2), the soft-argmax;
        spread (…), the standard deviation of gaze around that point, in the units of points."""
        probability = to_probability(logits, 2)
        point = expected_point(to_probability(logits, 1))
        h, w = logits.shape[-2:]
        x = torch.linspace(0, 1, w, device=logits.device)
        y = torch.linspace(0, 1, h, device=logits.device)
        x_squared = (x - point[..., :1]) ** 2                                  # (…, w)
        y_squared = (y - point[..., 1:]) ** 2                                  # (…, h)
        variance = (probability.sum(-2) * x_squared).sum(-1)
        variance = variance + (probability.sum(-1) * y_squared).sum(-1)
        return probability, point, variance.sqrt()

    def check(self, video, n_dims):
        """ValueError unless this is a video (B, T, 3, R, R), or with n_dims=4 a frame, as the model takes it."""
        R = self.config.image_size
        form = f"(B, T, 3, {R}, {R})" if n_dims == 5 else f"(B, 3, {R}, {R})"
        recipe = "uint8, or floats in [0, 1]; the model normalises them itself"
        check_tensor(video, self.position_code, form, "video")
        fits = video.dim() == n_dims and video.shape[-3:] == (3, R, R)
        if not fits or video.numel() == 0:
            raise ValueError(f"video has shape {tuple(video.shape)}, this model takes {form}")
        if video.is_floating_point():
            check_values(video, 0, 1, recipe, "video")
        elif video.dtype != torch.uint8:
            raise ValueError(f"video is {video.dtype}. Give {recipe}")


def to_unit(frames):
    """uint8, or [0, 1] -> float32 in [0, 1]."""
    if frames.dtype == torch.uint8:
        return frames.float() / 255
    return frames.float()


def append(past, new):
    """past (B, k, …) without its oldest and with new (B, …) as its newest."""
    both = torch.cat([past, new.unsqueeze(1)], dim=1)
    return both[:, 1:]


def peak_1(maps):
    return maps / maps.amax((-2, -1), keepdim=True)


def attention_bias(probability):
    """log(p · N) of maps (…, g, g), what attention adds to the score of a token: 0 where nothing is known."""
    N = probability.shape[-1] ** 2
    return probability.clamp(min=1e-6).log() + math.log(N)
