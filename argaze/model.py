"""ARGaze: where the wearer of a camera looks, frame by frame, from what it sees and where it looked before.

    model = ARGaze(ARGazeConfig())                           # DINOv3 ViT-S/16 from the hub (gated) + fresh decoder
    model = ARGaze.from_pretrained("out/argaze")             # a folder written by save_pretrained
    model = ARGaze.from_published("egtea.pyth")              # a published checkpoint, either variant
    logits = model(video)                                    # clip: (B, T, 3, H, W) -> (B, T, h, w), free-running
    state = model.start(1)                                   # stream: constant memory, equal to the clip
    logits, state = model.step(frame, state)                 # (B, 3, H, W) -> (B, h, w)
    probability, point, spread = model.predict(logits)

Step t: a frozen ViT encodes frame t and, variant "template", a crop of frame t-1 around the last gaze. In a small
decoder N query tokens read both, and the last k predicted heat maps. A head makes logits of a heat map of them.
Variant "twocross" reads the last k *frames* instead, and the heat maps bias where its attention goes.

Dimension key: B clips, T frames, R image size, g patches per side, N = g·g tokens of a frame, D width, k history,
h × w heat map. Points are (x, y) in [0, 1] from the top left corner; sizes in pixels.
"""
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.cpu import linear, quicken
from lib.weights import announce, assign, download, is_hub_id, read_config, read_tensors, save_folder

DINOV3_S = "facebook/dinov3-vits16-pretrain-lvd1689m"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, what the encoders were trained with

# ----------------------------------------------------------------------------------------------------------------------
# configuration


@dataclass
class ARGazeConfig:
    variant: str = "template"          # template (paper) | twocross (the authors' later model)
    encoder: str = DINOV3_S            # folder or hub id of a ViT; "random:width=64,layers=4,heads=4,mlp=128": fresh
    image_size: int = 224              # R, pixels
    patch_size: int = 16               # the encoder's, pixels
    decoder_layers: int = 3
    decoder_heads: int = 8
    decoder_ffn: int = 1536
    head_widths: str = "256+128"       # channels of the two upsampling stages
    history: int = 3                   # k, heat maps remembered; 0: none (published: 3, twocross 5)
    heatmap_size: int | str = 64       # h = w, or "h x w" (published: 64, twocross 96)
    template: str = "crop"             # crop | tokens: of the last frame, cheaper | roi: mark the region | none
    template_scale: float = 0.35       # side of the template over the shorter side of the frame (published scripts)
    scene_layers: str = "-3,-2,-1"     # encoder states that are fused
    history_values: str = "probability"  # what the decoder sees of past maps: p / max p | logits (as released)
    compat: bool = False               # repeat the released code's errors, to load released weights
    last_norm: bool = False            # final norm on the last encoder state (transformers 4.56.0 to 4.57.1 had it)
    train_encoder: bool = False        # train the encoder's blocks too (published: twocross only)
    dropout: float = 0.1               # of the decoder

    def __post_init__(self):
        choices = dict(variant=("template", "twocross"), template=("crop", "tokens", "roi", "none"),
                       history_values=("probability", "logits"))
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}={getattr(self, key)!r} must be one of {', '.join(allowed)}")
        for key in ("image_size", "patch_size", "decoder_layers", "decoder_heads", "decoder_ffn"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")

        if self.history < 0:
            raise ValueError(f"history={self.history} must be at least 0")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")
        if not 0 < self.template_scale <= 1:
            raise ValueError(f"template_scale={self.template_scale} must lie in (0, 1]")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        if len(whole_numbers("head_widths", self.head_widths, "+")) != 2:
            raise ValueError(f"head_widths={self.head_widths!r} needs two numbers joined by +, as in 256+128")
        if len(self.map_size) != 2 or min(self.map_size) < 1:
            raise ValueError(f"heatmap_size={self.heatmap_size!r} must be a side, or height x width as in 48x64")
        whole_numbers("scene_layers", self.scene_layers, ",")

    @property
    def grid(self):  # g
        return self.image_size // self.patch_size

    @property
    def map_size(self):  # (h, w)
        sides = whole_numbers("heatmap_size", self.heatmap_size, "x")
        return sides * 2 if len(sides) == 1 else sides


def whole_numbers(key, value, separator):
    """'256+128' -> [256, 128]. ValueError names the key."""
    try:
        return [int(part) for part in str(value).split(separator)]
    except ValueError as error:
        raise ValueError(f"{key}={value!r} must be whole numbers joined by {separator}") from error


# ----------------------------------------------------------------------------------------------------------------------
# encoder: a Vision Transformer of transformers


def build_encoder(config, weights=True):
    """The network that config.encoder names. weights=False: with fresh weights, where others will be loaded.

    FileNotFoundError: no such folder, or the hub does not give it. ValueError: its patches are of another size.
    """
    from transformers import AutoConfig, AutoModel
    name = config.encoder
    published = name == DINOV3_S and not weights  # its sizes are known, so nothing has to be fetched
    if name.startswith("random:") or published:
        encoder = AutoModel.from_config(random_encoder_config(config, "" if published else name[len("random:"):]))
    else:
        if not Path(name).is_dir() and not is_hub_id(name):
            raise FileNotFoundError(f"encoder={name}: neither a folder here nor a hub id nor random:…")
        if is_hub_id(name):
            announce(name)
        try:
            encoder = AutoModel.from_pretrained(name) if weights else AutoModel.from_config(
                AutoConfig.from_pretrained(name))
        except OSError as error:
            raise FileNotFoundError(
                f"encoder={name} could not be loaded ({error}). DINOv3 is gated: accept its licence on "
                "huggingface.co and set HF_TOKEN, or give a folder that holds it, or --encoder=random:") from error

    encoder = getattr(encoder, "vision_model", encoder).float()  # of a CLIP or SigLIP, only what sees
    if encoder.config.patch_size != config.patch_size:
        raise ValueError(f"encoder={name} has patches of {encoder.config.patch_size} pixels: "
                         f"give --patch_size={encoder.config.patch_size} and an image_size that is a multiple of it")
    return quicken(encoder)


def random_encoder_config(config, sizes):
    """A DINOv3 of the given sizes, 'width=64,layers=4'; what is not given is that of ViT-S/16."""
    from transformers import DINOv3ViTConfig
    keys = dict(width="hidden_size", layers="num_hidden_layers", heads="num_attention_heads", mlp="intermediate_size")
    settings = dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
    for part in filter(None, sizes.split(",")):
        key, _, value = part.partition("=")
        if key not in keys or not value.isdigit():
            raise ValueError(f"encoder=random:{sizes} needs {', '.join(keys)}, as in random:width=64,layers=4")
        settings[keys[key]] = int(value)
    return DINOv3ViTConfig(patch_size=config.patch_size, image_size=config.image_size, num_register_tokens=4,
                           layer_norm_eps=1e-5, **settings)


def blocks(encoder):
    """The ModuleList of the encoder's blocks, whatever it is called there."""
    n = encoder.config.num_hidden_layers
    return next(m for m in encoder.modules() if isinstance(m, nn.ModuleList) and len(m) == n)


def encoder_states(encoder, pixels, wanted, last_norm):
    """States (B, tokens, D) of an encoder: state i is what block i reads, the last one what the last block writes.

    They are taken at the blocks, because versions of transformers differ in whether their last hidden state is that
    before or after the final norm. last_norm=True: the one after it.
    """
    states, handles = {}, []

    def keep_input(i):
        return lambda block, inputs: states.update({i: inputs[0]})

    def keep_output(block, inputs, output):
        states[len(layers)] = output[0] if isinstance(output, tuple) else output

    layers = blocks(encoder)
    for i, block in enumerate(layers):
        if i in wanted:
            handles.append(block.register_forward_pre_hook(keep_input(i)))
    handles.append(layers[-1].register_forward_hook(keep_output))
    try:
        output = encoder(pixel_values=pixels)
    finally:
        for handle in handles:
            handle.remove()
    if last_norm:
        states[len(layers)] = output.last_hidden_state
    return [states[i] for i in wanted]


# ----------------------------------------------------------------------------------------------------------------------
# files under the published names


def published_name(name):
    """Since transformers 5.23 the encoder's blocks have another name in memory than in published files."""
    return name.replace("encoder.model.layer.", "encoder.layer.")


def read_published(path):
    """{published name: tensor} of a checkpoint file: a state dict, or one within a training checkpoint."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if path.suffix == ".safetensors":
        tensors = read_tensors(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            tensors = state.get("model_state", state)
            tensors = {name: t for name, t in tensors.items() if isinstance(t, torch.Tensor)}
        except Exception as error:  # of many kinds: pickle's, zip's
            raise ValueError(f"{path} is cut off or no checkpoint of ARGaze "
                             f"({type(error).__name__}: {error})") from error
    return {published_name(name.removeprefix("module.")): t for name, t in tensors.items()}


def published_config(tensors):
    """The released settings of the variant that a checkpoint holds."""
    twocross = any("history_cross_attn" in name for name in tensors)
    if "temporal_pos_embed.weight" not in tensors:
        raise ValueError("this is no checkpoint of ARGaze: temporal_pos_embed.weight is missing")
    return ARGazeConfig(
        variant="twocross" if twocross else "template", heatmap_size=96 if twocross else 64,
        history=len(tensors["temporal_pos_embed.weight"]), train_encoder=twocross, history_values="logits", compat=True)


# ----------------------------------------------------------------------------------------------------------------------
# pictures, maps and points


def unit(frames):
    """uint8 or [0, 1] -> float32 in [0, 1]."""
    return frames.float() / 255 if frames.dtype == torch.uint8 else frames.float()


def resize(maps, size):
    """Maps (…, h, w) resized to (…, *size), bilinear."""
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return F.interpolate(flat, size, mode="bilinear", align_corners=False).view(*maps.shape[:-2], *size)


def shift(past, new):
    """Drop the oldest of past (B, k, …) and append new (B, …)."""
    return torch.cat([past, new.unsqueeze(1)], dim=1)[:, 1:]


def attention_bias(probability):
    """log(p · N) of maps (…, N): what attention adds to the score of a token; 0 where nothing is known."""
    return probability.clamp(min=1e-6).log() + math.log(probability.shape[-1])


def positions(grid, width):
    """2-D sine and cosine code (N, D): first half of the channels for the row, second for the column."""
    frequency = torch.exp(-math.log(10000.0) * torch.arange(width // 4) * 2 / width)
    angle = torch.arange(grid).unsqueeze(1) * frequency                   # (g, D/4)
    code = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)     # (g, D/2), sine and cosine in turn
    row = code.unsqueeze(1).expand(grid, grid, -1)
    column = code.unsqueeze(0).expand(grid, grid, -1)
    return torch.cat([row, column], dim=-1).flatten(0, 1)


def expected_point(probability):
    """Mean position (…, 2) of maps (…, h, w) that sum to 1; cells at linspace(0, 1)."""
    h, w = probability.shape[-2:]
    x = torch.linspace(0, 1, w, device=probability.device)
    y = torch.linspace(0, 1, h, device=probability.device)
    return torch.stack([(probability.sum(-2) * x).sum(-1), (probability.sum(-1) * y).sum(-1)], dim=-1)


def soft_argmax(logits, temperature=1.0):
    """Expected point (…, 2) of softmax(logits / temperature) over maps (…, h, w)."""
    return expected_point((logits.float() / temperature).flatten(-2).softmax(-1).view(logits.shape))


def crop(frames, centers, scale, size):
    """Squares of `scale` times the shorter side around centers (B, 2), resized to (B, 3, size, size).

    What lies outside of the frames (B, 3, H, W) is mirrored at their border.
    """
    height, width = frames.shape[-2:]
    side = max(1, round(scale * min(height, width)))

    def indices(center, length):
        first = torch.round(center * (length - 1)).long() - side // 2
        index = (first.unsqueeze(1) + torch.arange(side, device=frames.device)).abs()
        return length - 1 - (length - 1 - index).abs()

    rows, columns = indices(centers[:, 1], height), indices(centers[:, 0], width)
    batch = torch.arange(len(frames), device=frames.device).view(-1, 1, 1)
    square = frames[batch, :, rows.unsqueeze(2), columns.unsqueeze(1)]   # (B, side, side, 3)
    return F.interpolate(square.movedim(-1, 1), (size, size), mode="bilinear", align_corners=False)


def sample_tokens(tokens, centers, scale):
    """The crop's cheap stand-in: g × g tokens read between the tokens (B, N, D) of the frame, around centers (B, 2)."""
    grid = math.isqrt(tokens.shape[1])
    offset = torch.linspace(-0.5, 0.5, grid, device=tokens.device) * scale * grid
    x = centers[:, :1] * (grid - 1) + offset
    y = centers[:, 1:] * (grid - 1) + offset                             # (B, g), in tokens from the first
    points = torch.stack([x.unsqueeze(1).expand(-1, grid, -1), y.unsqueeze(2).expand(-1, -1, grid)], dim=-1)

    maps = tokens.mT.unflatten(2, (grid, grid))
    sampled = F.grid_sample(maps, (points / (grid - 1) * 2 - 1).to(maps.dtype), mode="bilinear",
                            padding_mode="reflection", align_corners=True)
    return sampled.flatten(2).mT


def region(centers, scale, size, grid):
    """Mask (B, g, g): 1 in the square of `scale` around centers (B, 2), drawn on size × size, then nearest cells."""
    cells = torch.arange(size, device=centers.device)
    low, high = centers * size - scale * size / 2, centers * size + scale * size / 2     # (B, 2)
    inside = (cells >= low.unsqueeze(-1)) & (cells < high.unsqueeze(-1))                 # (B, 2, size): columns, rows
    mask = (inside[:, 1].unsqueeze(2) & inside[:, 0].unsqueeze(1)).float()
    return F.interpolate(mask.unsqueeze(1), (grid, grid), mode="nearest").squeeze(1)


# ----------------------------------------------------------------------------------------------------------------------
# decoder


class Attention(nn.MultiheadAttention):
    """Its parameters and their initialisation, with a bias (B, 1, 1, L) that all queries and heads share."""

    def __init__(self, width, heads, dropout):
        super().__init__(width, heads, dropout, batch_first=True)

    def forward(self, x, memory, bias=None):
        D = self.embed_dim
        weight, b = self.in_proj_weight, self.in_proj_bias
        q = linear(x, weight[:D], b[:D])
        k, v = linear(memory, weight[D:], b[D:]).chunk(2, dim=-1)

        q, k, v = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        if bias is not None:
            bias = bias.to(q.dtype).expand(-1, 1, q.shape[2], -1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=self.dropout * self.training)
        return linear(y.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)


class Layer(nn.Module):
    """Post-norm decoder layer. template: self-attention over [history; queries], then cross-attention to the memory."""

    def __init__(self, config, width):
        super().__init__()
        c = config
        self.twocross = c.variant == "twocross"
        self.self_attn = Attention(width, c.decoder_heads, c.dropout)
        if self.twocross:
            self.history_cross_attn = Attention(width, c.decoder_heads, c.dropout)
            self.current_cross_attn = Attention(width, c.decoder_heads, c.dropout)
            self.norm4 = nn.LayerNorm(width)
        else:
            self.cross_attn = Attention(width, c.decoder_heads, c.dropout)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.ffn = quicken(nn.Sequential(nn.Linear(width, c.decoder_ffn), nn.GELU(), nn.Dropout(c.dropout),
                                         nn.Linear(c.decoder_ffn, width), nn.Dropout(c.dropout)))
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x, memory, history=None, bias=None, keep=None):
        """x (B, L, D). keep: compute only the last `keep` tokens, which nothing reads the others after."""
        queries = x if keep is None else x[:, -keep:]
        x = self.norm1(queries + self.drop(self.self_attn(queries, x)))
        if self.twocross:
            if history is not None:
                x = self.norm2(x + self.drop(self.history_cross_attn(x, history, bias)))
            x = self.norm3(x + self.drop(self.current_cross_attn(x, memory)))
            return self.norm4(x + self.ffn(x))
        x = self.norm2(x + self.drop(self.cross_attn(x, memory)))
        return self.norm3(x + self.ffn(x))


def doubling(config, width):
    """Layers that double the resolution of (B, width, h, w)."""
    if config.variant == "twocross":
        return [nn.Conv2d(width, 4 * width, 1), nn.PixelShuffle(2)]
    return [nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)]


def upsampling(config, n_in, n_out):
    """One stage of the head: a convolution, then twice the resolution."""
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1), nn.ReLU(), nn.Dropout2d(config.dropout),
                         *doubling(config, n_out), nn.ReLU())


# ----------------------------------------------------------------------------------------------------------------------
# the model


class ARGaze(nn.Module):
    """Parameters have the published names. encoder: a ViT of transformers; None: the one that config.encoder names."""

    def __init__(self, config, encoder=None):
        super().__init__()
        c = self.config = config
        self.encoder = build_encoder(c) if encoder is None else encoder
        D = self.encoder.config.hidden_size
        if D % 4 or D % c.decoder_heads:
            raise ValueError(f"the encoder's width {D} must be a multiple of 4 and of decoder_heads={c.decoder_heads}")

        # what the encoder's states become
        n_blocks = self.encoder.config.num_hidden_layers
        layers = whole_numbers("scene_layers", c.scene_layers, ",")
        if not all(-n_blocks - 1 <= i <= n_blocks for i in layers):
            raise ValueError(f"scene_layers={c.scene_layers}: the encoder has states 0 to {n_blocks}, or -1 backwards")
        self.scene_layers = [i % (n_blocks + 1) for i in layers]         # state i is what block i reads
        self.multiscale_proj = quicken(nn.ModuleList(nn.Linear(D, D) for _ in layers))
        self.feature_proj = quicken(nn.Sequential(nn.Linear(D * len(layers), D), nn.LayerNorm(D)))

        # what past heat maps become, and embeddings
        self.hm_to_tokens = nn.Sequential(nn.Conv2d(1, D, 1), nn.LayerNorm([D, c.grid, c.grid]))
        self.query_tokens = nn.Parameter(torch.randn(1, c.grid ** 2, D) * 0.02)
        self.token_type_embed = nn.Embedding(3, D)                       # heat map, query, template or past frame
        self.temporal_pos_embed = nn.Embedding(c.history, D)             # oldest first
        if c.variant == "template":
            self.roi_prompt_embed = nn.Parameter(torch.zeros(D))
        self.register_buffer("positions", positions(c.grid, D), persistent=False)

        # decoder and head
        self.decoder_layers = nn.ModuleList(Layer(c, D) for _ in range(c.decoder_layers))
        first, second = whole_numbers("head_widths", c.head_widths, "+")
        self.pixel_decoder_conv1 = upsampling(c, D, first)
        self.pixel_decoder_conv2 = upsampling(c, first, second)
        large = min(c.map_size) >= 112                                   # published maps of this size are doubled again
        self.pixel_final_upsample = nn.Sequential(*doubling(c, second)) if large else nn.Identity()
        self.pixel_final_proj = nn.Conv2d(second, 1, 1)
        self.freeze()

    def freeze(self):
        """Only what training changes requires gradients, so that an unused parameter never stalls DDP."""
        c = self.config
        self.encoder.requires_grad_(False)
        if c.train_encoder:
            blocks(self.encoder)[:max(self.scene_layers)].requires_grad_(True)

        unused = []
        if c.variant == "twocross" or c.history == 0:
            unused.append(self.hm_to_tokens)
        if c.history == 0:
            unused.append(self.temporal_pos_embed)
            for layer in self.decoder_layers if c.variant == "twocross" else ():
                unused += [layer.history_cross_attn, layer.norm2]
        for module in unused:
            module.requires_grad_(False)
        if c.variant == "template" and c.template != "roi":
            self.roi_prompt_embed.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        if not self.config.train_encoder:  # DINOv3 in training mode would jitter its positions at random
            self.encoder.eval()
        return self

    # ---- files

    @classmethod
    def from_pretrained(cls, folder):
        """Load config.json + model.safetensors from a folder or a hub id. ValueError names tensors that do not fit."""
        from transformers import AutoConfig, AutoModel
        folder = download(str(folder), ["model.safetensors"]) if is_hub_id(folder) else Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}: not a folder written by save_pretrained")

        def build(settings):
            encoder = AutoModel.from_config(AutoConfig.for_model(**settings["encoder_config"]))
            keys = ARGazeConfig.__dataclass_fields__.keys() & settings.keys()
            return cls(ARGazeConfig(**{key: settings[key] for key in keys}), quicken(encoder.float()))

        model = read_config(folder / "config.json", build)
        file = folder / "model.safetensors"
        assign(model, read_tensors(file), f"{file} and its config.json", published_name)
        model.freeze()
        return model.eval()

    def save_pretrained(self, folder):
        """Write config.json + model.safetensors, the encoder included. A file appears whole or not at all."""
        encoder_config = json.loads(self.encoder.config.to_json_string(use_diff=False))
        tensors = {published_name(name): t for name, t in self.state_dict().items()}
        save_folder(folder, tensors, {"model_type": "argaze", **asdict(self.config), "encoder_config": encoder_config})

    @classmethod
    def from_published(cls, path, config=None):
        """Load a checkpoint of the authors' code: .pyth, .pt (whole, or a state dict) or .safetensors.

        config: its sizes; None: the published ones of the variant that the file holds, run as released (compat). An
        encoder that the file lacks comes from config.encoder. ValueError names tensors that are missing or left over.
        """
        path = Path(path)
        tensors = read_published(path)
        config = published_config(tensors) if config is None else config
        whole = any(name.startswith("encoder.") for name in tensors)
        if not whole and config.encoder.startswith("random:"):
            raise ValueError(f"{path} holds no encoder: config.encoder must be a folder or a hub id")

        model = cls(config, build_encoder(config, weights=not whole))
        if not whole:
            tensors |= {published_name(f"encoder.{name}"): t for name, t in model.encoder.state_dict().items()}
        assign(model, tensors, f"The tensors of {path}", published_name)
        model.freeze()
        return model.eval()

    # ---- one frame

    def encode(self, frames):
        """frames (B, 3, R, R) in [0, 1] -> scene tokens (B, N, D): encoder states of several depths, fused."""
        c = self.config
        mean = torch.tensor(MEAN, device=frames.device).view(3, 1, 1)
        std = torch.tensor(STD, device=frames.device).view(3, 1, 1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and c.train_encoder):
            states = encoder_states(self.encoder, (frames - mean) / std, self.scene_layers, c.last_norm)

        # the patches are the last N tokens; the released code took the N after the first, registers among them
        N = c.grid ** 2
        patches = slice(1, 1 + N) if c.compat else slice(-N, None)
        scales = [proj(state[:, patches]) for proj, state in zip(self.multiscale_proj, states, strict=True)]
        return self.feature_proj(torch.cat(scales, dim=-1))

    def look(self, frame, state):
        """Logits (B, h, w) of frame (B, 3, R, R) given what the state remembers, and its scene tokens (B, N, D)."""
        c = self.config
        crops = c.variant == "template" and c.template == "crop"
        if crops:  # both pictures in one pass of the encoder
            before = frame if state["frame"] is None else state["frame"]
            square = crop(before, state["center"], c.template_scale, c.image_size)
            scene, template = self.encode(torch.cat([frame, square])).chunk(2)
        else:
            scene, template = self.encode(frame), None

        # tokens: what is asked, and what can be read
        kind = self.token_type_embed.weight
        queries = (self.query_tokens + self.positions + kind[1]).expand(len(frame), -1, -1)
        memory = scene + self.positions
        if c.variant == "twocross":
            x = self.decode_frames(queries, memory, state)
        else:
            if c.template == "tokens":
                template = sample_tokens(scene if state["scene"] is None else state["scene"], state["center"],
                                         c.template_scale)
            if c.template == "roi":
                mask = region(state["center"], c.template_scale, 16, c.grid).flatten(1).unsqueeze(2)
                memory = memory + mask * self.roi_prompt_embed
            if template is not None:
                memory = torch.cat([template + self.positions + kind[2], memory], dim=1)
            x = self.decode_maps(queries, memory, state)

        # head: tokens to picture, twice upsampled. A 1 × 1 convolution may come before a resize, and costs less there.
        x = x.mT.unflatten(2, (c.grid, c.grid))
        x = self.pixel_decoder_conv2(self.pixel_decoder_conv1(x))
        x = self.pixel_final_proj(self.pixel_final_upsample(x)).float()
        return resize(x, c.map_size).squeeze(1), scene

    def decode_maps(self, queries, memory, state):
        """Variant template: the past heat maps are tokens before the queries."""
        N = queries.shape[1]
        x = torch.cat([self.history_tokens(state["history"]), queries], dim=1)
        for layer in self.decoder_layers[:-1]:
            x = layer(x, memory)
        return self.decoder_layers[-1](x, memory, keep=N)

    def history_tokens(self, history):
        """Past maps (B, k, g, g), oldest first -> tokens (B, k·N, D)."""
        maps = self.hm_to_tokens(history.flatten(0, 1).unsqueeze(1))     # (B·k, D, g, g)
        tokens = maps.flatten(2).mT.unflatten(0, history.shape[:2]) + self.positions
        tokens = tokens + self.temporal_pos_embed.weight.unsqueeze(1) + self.token_type_embed.weight[0]
        return tokens.flatten(1, 2)

    def decode_frames(self, queries, memory, state):
        """Variant twocross: the past frames are read apart, where the past heat maps were high."""
        tokens = bias = None
        if self.config.history:
            tokens = state["scenes"] + self.positions
            tokens = tokens + self.temporal_pos_embed.weight.unsqueeze(1) + self.token_type_embed.weight[2]
            tokens = tokens.flatten(1, 2)                                # (B, k·N, D)
            bias = state["history"].flatten(1).unsqueeze(1).unsqueeze(1)  # (B, 1, 1, k·N)
        x = queries
        for layer in self.decoder_layers:
            x = layer(x, memory, tokens, bias)
        return x

    # ---- memory

    def start(self, batch):
        """State of `batch` streams before their first frame. It stays as large as it is."""
        c, p = self.config, self.positions
        state = {"history": p.new_zeros(batch, c.history, c.grid, c.grid),  # past maps, oldest first
                 "center": p.new_full((batch, 2), 0.5)}                  # where the template is taken
        if c.variant == "twocross":
            state["scenes"] = p.new_zeros(batch, c.history, *p.shape)    # past frames' tokens
        else:
            state["frame"] = state["scene"] = None                       # the last frame, or its tokens
        return state

    def remember(self, state, frame, scene, logits):
        """The state after a frame. What was predicted enters without gradient."""
        logits = logits.detach()
        new = {"history": shift(state["history"], self.past_map(logits)), "center": soft_argmax(logits)}
        if self.config.variant == "twocross":
            new["scenes"] = shift(state["scenes"], scene)
        else:
            new["frame"] = frame if self.config.template == "crop" else None
            new["scene"] = scene if self.config.template == "tokens" else None
        return new

    def past_map(self, logits):
        """What the decoder gets of predicted logits (…, h, w): (…, g, g)."""
        c = self.config
        size = (c.grid, c.grid)
        if c.variant == "twocross":
            return attention_bias(resize(logits, size).flatten(-2).softmax(-1)).unflatten(-1, size)
        if c.history_values == "logits":
            return resize(logits, size)
        probability = (logits / 2).flatten(-2).softmax(-1).view(logits.shape)
        return resize(probability / probability.amax((-2, -1), keepdim=True), size)

    def true_map(self, heatmaps):
        """The same of ground-truth maps (…, h', w'), which hold probabilities of any scale."""
        c = self.config
        size = (c.grid, c.grid)
        if c.variant == "twocross":
            maps = resize(heatmaps, size).flatten(-2)
            return attention_bias(maps / maps.sum(-1, keepdim=True)).unflatten(-1, size)
        if not c.compat:  # released: as they come, peaks of 0.02 where predictions have logits
            heatmaps = heatmaps / heatmaps.amax((-2, -1), keepdim=True)
        return resize(heatmaps, size)

    def teach(self, state, maps, points, own, t):
        """The state before step t with the truth in place of predictions, except in slots where own (k + 1) is True."""
        k = self.config.history
        history, center = state["history"].clone(), state["center"]
        for slot in range(max(0, k - t), k):
            if not own[slot]:
                history[:, slot] = maps[:, t - k + slot]
        if t > 0 and not own[k]:
            center = points[:, t - 1]
        return state | {"history": history, "center": center}

    # ---- clips and streams

    def forward(self, video, heatmaps=None, own=None, points=None):
        """Heat maps of a clip: video (B, T, 3, R, R) uint8, or floats in [0, 1] -> logits (B, T, h, w).

        Without heatmaps free-running: history and template follow the model's own predictions. With heatmaps
        (B, T, h', w') and points (B, T, 2), the true gaze, teacher forcing; without points they are the maps' centres
        of mass. With own (T, k + 1) scheduled sampling: where it is True, that slot of the history at step t, oldest
        first, or in the last column the template, takes the prediction. ValueError: shapes or values do not fit.
        """
        self.check(video, 5)
        B, T = video.shape[:2]
        if heatmaps is not None:
            heatmaps, points, own = self.check_truth(B, T, heatmaps, points, own)
            maps = self.true_map(heatmaps)
        elif own is not None or points is not None:
            raise ValueError("own and points mean something only with heatmaps")

        state, outputs = self.start(B), []
        for t in range(T):
            frame = unit(video[:, t])
            given = state if heatmaps is None else self.teach(state, maps, points, own[t], t)
            logits, scene = self.look(frame, given)
            state = self.remember(state, frame, scene, logits)
            outputs.append(logits)
        return torch.stack(outputs, dim=1)

    @torch.no_grad()
    def step(self, frame, state):
        """One frame of a stream: (B, 3, R, R) uint8, or floats in [0, 1] -> logits (B, h, w), next state."""
        self.check(frame, 4)
        frame = unit(frame)
        logits, scene = self.look(frame, state)
        return logits, self.remember(state, frame, scene, logits)

    @staticmethod
    def predict(logits):
        """Logits (…, h, w) -> probability (…, h, w) as in the loss, point (…, 2) by soft-argmax, and spread (…): the
        standard deviation of gaze around that point, in the units of points."""
        probability = (logits.float() / 2).flatten(-2).softmax(-1).view(logits.shape)
        point = soft_argmax(logits)
        h, w = logits.shape[-2:]
        x = torch.linspace(0, 1, w, device=logits.device) - point[..., :1]   # (…, w)
        y = torch.linspace(0, 1, h, device=logits.device) - point[..., 1:]   # (…, h)
        spread = (probability.sum(-2) * x ** 2).sum(-1) + (probability.sum(-1) * y ** 2).sum(-1)
        return probability, point, spread.sqrt()

    def check(self, video, dims):
        """ValueError unless this is video (or with dims=4 a frame) as the model takes it."""
        R = self.config.image_size
        if video.dim() != dims or tuple(video.shape[-3:]) != (3, R, R):
            form = f"(B, T, 3, {R}, {R})" if dims == 5 else f"(B, 3, {R}, {R})"
            raise ValueError(f"the video is {tuple(video.shape)}, this model takes {form}")
        if 0 in video.shape:
            raise ValueError(f"the video is empty: {tuple(video.shape)}")
        if video.dtype != torch.uint8:
            if not video.is_floating_point():
                raise ValueError(f"the video is {video.dtype}: give uint8, or floats in [0, 1]")
            low, high = video.min().item(), video.max().item()
            if not (low >= 0 and high <= 1):  # NaN fails too
                raise ValueError(f"the video holds values from {low:.4g} to {high:.4g}: give uint8, or floats in "
                                 "[0, 1]; the model normalises them itself")

    def check_truth(self, B, T, heatmaps, points, own):
        """The three arguments of teacher forcing, complete. ValueError names one of another shape."""
        k = self.config.history
        if heatmaps.dim() != 4 or tuple(heatmaps.shape[:2]) != (B, T):
            raise ValueError(f"heatmaps are {tuple(heatmaps.shape)}, the video needs ({B}, {T}, h, w)")
        heatmaps = heatmaps.float()
        if self.config.compat:  # as released: nearly the middle, because probabilities were taken for logits
            points = soft_argmax(heatmaps)
        elif points is None:
            points = expected_point(heatmaps / heatmaps.sum((-2, -1), keepdim=True))
        if tuple(points.shape) != (B, T, 2):
            raise ValueError(f"points are {tuple(points.shape)}, the video needs ({B}, {T}, 2)")
        own = torch.zeros(T, k + 1, dtype=torch.bool) if own is None else torch.as_tensor(own)
        if tuple(own.shape) != (T, k + 1):
            raise ValueError(f"own is {tuple(own.shape)}, the video needs ({T}, {k + 1}): history's slots, template")
        return heatmaps, points.float(), own.bool().tolist()
