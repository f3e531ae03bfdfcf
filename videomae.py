"""The frozen reconstructor: a block-causal, multi-scale masked autoencoder for video, and the losses that judge it.

    mae = VideoMAE.from_pretrained("out/toy/videomae")         # a folder, a state-dict file or a hub id
    reconstruction, loss = mae(video, gazing, frames=[0, 7])   # (B, F, 3, R, R), (B, F)

From the gazed patches alone it reconstructs whole frames: frame t from the patches gazed in frames <= t (paper, section
3.3 and appendix). `gazing` is the dict described in gazing.py; video holds the pixels of data.to_model_pixels. Modules
and parameters have the names of Hugging Face's ViTMAE, so that published files load without a renaming table.

Dimension key: B clips, T frames, F frames to reconstruct, S scales, V patch ids per frame, P of them at the finest
scale, N gaze slots, L tokens, D width, rows: B clips or G·B copies of them (copy-major, g·B + b).
"""
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from data import IMAGE_MEAN, IMAGE_STD
from gazing import Grids, check_gazing, may_be_padded
from lib.attention import BlockCausal
from lib.cpu import Linear, linear, quicken
from lib.loader import send
from lib.pixels import check_video
from lib.weights import (
    assign,
    download,
    is_hub_id,
    load_network,
    load_network_config,
    network_errors,
    old_name,
    read_config,
    read_tensors,
    save_folder,
)

WEIGHT_FILES = ("model.safetensors", "videomae.pt", "pytorch_model.bin")  # in a folder or on the hub, the first found

# Parameters that a plain ViTMAE lacks. Where its weights are the start, these are drawn anew.
VIDEO_ONLY = ("vit.embeddings.scale_embed", "vit.embeddings.time_embed", "decoder.decoder_scale_embed",
              "decoder.time_embed")

# Perceptual networks: hub id of the published loss, mean and spread of the pixels that they expect.
NETWORKS = {"dinov2_reg": ("facebook/dinov2-with-registers-base", IMAGE_MEAN, IMAGE_STD),
            "siglip2": ("google/siglip2-base-patch16-224", (0.5,) * 3, (0.5,) * 3)}


@dataclass
class VideoMAEConfig(Grids):
    """Field names of Hugging Face's ViTMAEConfig plus scales and max_num_frames. Defaults: the published ViT-L."""
    scales: str = "32+64+112+224"
    max_num_frames: int = 256
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02

    def __post_init__(self):
        self.check_sizes()
        if self.scale_list[-1] != self.image_size:
            raise ValueError(f"scales={self.scales!r} must end with image_size={self.image_size}")

        for part in ("", "decoder_"):
            width = getattr(self, f"{part}hidden_size")
            n_heads = getattr(self, f"{part}num_attention_heads")
            if width % 4 or width % n_heads:
                raise ValueError(f"{part}hidden_size={width} must be a multiple of 4 and of "
                                 f"{part}num_attention_heads={n_heads}")

    @classmethod
    def from_file(cls, path):
        """Read a config.json. Keys of Hugging Face's that are not ours are ignored."""
        names = [field.name for field in fields(cls)]

        def build(settings):
            return cls(**{name: settings[name] for name in names if name in settings})
        return read_config(path, build)


# ----------------------------------------------------------------------------------------------------------------------
# transformer


class Block(nn.Module):
    """Pre-norm transformer block with the module names of ViTMAELayer."""

    def __init__(self, dim, num_heads, mlp, eps):
        super().__init__()
        self.num_heads = num_heads
        self.layernorm_before = nn.LayerNorm(dim, eps=eps)
        self.attention = nn.ModuleDict({
            "attention": nn.ModuleDict({
                "query": Linear(dim, dim),
                "key": Linear(dim, dim),
                "value": Linear(dim, dim),
            }),
            "output": nn.ModuleDict({"dense": Linear(dim, dim)}),
        })
        self.layernorm_after = nn.LayerNorm(dim, eps=eps)
        self.intermediate = nn.ModuleDict({"dense": Linear(dim, mlp)})
        self.output = nn.ModuleDict({"dense": Linear(mlp, dim)})

    def forward(self, x, attend):
        """x (rows, L, D); attend: a BlockCausal"""
        q, k, v = self.qkv(x)
        return self.finish(x, attend(q, k, v))

    def qkv(self, x):
        """x (rows, L, D) -> q, k, v (rows, H, L, d)"""
        x = self.layernorm_before(x)
        projections = self.attention.attention.values()
        return [rearrange(project(x), "b l (h d) -> b h l d", h=self.num_heads) for project in projections]

    def finish(self, x, y):
        """What comes after attention, whose result is y (rows, H, L, d)."""
        y = rearrange(y, "b h l d -> b l (h d)")
        x = x + self.attention.output.dense(y)
        y = self.intermediate.dense(self.layernorm_after(x))
        return x + self.output.dense(F.gelu(y))


def sincos_positions(dim, side):
    """(1 + side², dim) fixed positions: zeros for CLS; column in the first half, row in the second, sin then cos."""
    exponent = torch.arange(dim // 4, dtype=torch.float64) / (dim // 4)
    frequency = 1.0 / 10000 ** exponent
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")

    halves = []
    for place in (column, row):
        angle = place.reshape(-1, 1) * frequency
        halves += [angle.sin(), angle.cos()]
    table = torch.cat(halves, dim=1).float()
    return torch.cat([torch.zeros(1, dim), table])


# ----------------------------------------------------------------------------------------------------------------------
# encoder and decoder


class Embeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        d = c.hidden_size
        self.side = c.image_size // c.patch_size        # of the finest grid, in patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d))
        positions = sincos_positions(d, self.side).unsqueeze(0)
        self.position_embeddings = nn.Parameter(positions, requires_grad=False)
        self.scale_embed = nn.Parameter(torch.zeros(len(c.scale_list), d))
        self.time_embed = nn.Parameter(torch.zeros(c.max_num_frames, d))
        projection = nn.Conv2d(c.num_channels, d, kernel_size=c.patch_size, stride=c.patch_size)
        self.patch_embeddings = nn.ModuleDict({"projection": projection})

    def forward(self, patches, positions):
        """patches (…, 3·p·p) and their ids + V·t (…) -> tokens (…, D): only what is gazed gets embedded."""
        V = self.c.num_ids
        conv = self.patch_embeddings.projection
        x = linear(patches, conv.weight.flatten(1), conv.bias)
        place = self.grid_positions()[positions % V]
        time = self.time_embed[positions // V]
        return x + place + time

    def cls(self):  # (1, 1, D)
        return self.cls_token + self.position_embeddings[:, :1]

    def patches(self, video):
        """video (B, T, 3, R, R) -> the pixels of every patch id of every frame (B, T·V, 3·p·p)."""
        p = self.c.patch_size
        frames = video.flatten(0, 1)
        patches = []
        for side in self.c.scale_list:
            x = frames
            if side != x.shape[-1]:
                x = F.interpolate(x, (side, side), mode="bicubic", align_corners=False)
            patches.append(rearrange(x, "bt c (h p) (w q) -> bt (h w) (c p q)", p=p, q=p))
        patches = torch.cat(patches, dim=1)
        return rearrange(patches, "(b t) v d -> b (t v) d", b=len(video))

    def grid_positions(self):
        """(V, D): the finest grid's positions resized bicubically to every scale's grid, plus the scale embeddings."""
        grid = rearrange(self.position_embeddings[:, 1:], "1 (h w) d -> 1 d h w", h=self.side)
        positions = []
        for scale, size in enumerate(self.c.scale_list):
            side = size // self.c.patch_size
            x = grid
            if side != self.side:
                x = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
            positions.append(rearrange(x, "1 d h w -> (h w) d") + self.scale_embed[scale])
        return torch.cat(positions)


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        d = c.decoder_hidden_size
        self.side = c.image_size // c.patch_size
        self.mask_token = nn.Parameter(torch.zeros(1, 1, d))
        positions = sincos_positions(d, self.side).unsqueeze(0)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_scale_embed = nn.Parameter(torch.zeros(len(c.scale_list), d))
        self.time_embed = nn.Parameter(torch.zeros(c.max_num_frames, d))

        self.decoder_embed = Linear(c.hidden_size, d)
        self.decoder_layers = nn.ModuleList(
            Block(d, c.decoder_num_attention_heads, c.decoder_intermediate_size, c.layer_norm_eps)
            for _ in range(c.decoder_num_hidden_layers))
        self.decoder_norm = nn.LayerNorm(d, eps=c.layer_norm_eps)
        self.decoder_pred = Linear(d, c.patch_size ** 2 * c.num_channels)

    def cls(self, encoded):
        """The encoder's CLS (rows, 1, its width) -> the decoder's (rows, 1, D)."""
        return self.decoder_embed(encoded) + self.decoder_pos_embed[:, :1]

    def grid_positions(self):
        """(V, D). A quirk the published weights rely on: the flattened positions are resized in one dimension."""
        flat = rearrange(self.decoder_pos_embed[:, 1:], "1 p d -> 1 d 1 p")
        positions = []
        for scale, n_ids in enumerate(self.c.ids_per_scale):
            x = flat
            if n_ids != flat.shape[-1]:
                x = F.interpolate(flat, (1, n_ids), mode="bicubic", align_corners=False)
            positions.append(rearrange(x, "1 d 1 p -> p d") + self.decoder_scale_embed[scale])
        return torch.cat(positions)

    def pixels(self, x):
        """Hidden states of a frame's finest tokens (…, P, D) -> pixels (…, 3, R, R)."""
        p = self.c.patch_size
        x = self.decoder_pred(self.decoder_norm(x))
        return rearrange(x, "... (h w) (p q c) -> ... c (h p) (w q)", h=self.side, p=p, q=p)


# ----------------------------------------------------------------------------------------------------------------------
# the model


class VideoMAE(nn.Module):
    """See the module's docstring. loss_type and loss_weights: terms joined by '+', for instance
    "l1+dinov2_reg+siglip2" and "1+0.3+0.3"; dinov2_reg and siglip2: folder or hub id of those networks (None: the
    published one)."""

    checks_values = True  # of pixels; a training script, which knows them, does not: a GPU is waited for

    def __init__(self, config, loss_type="l1", loss_weights="1", dinov2_reg=None, siglip2=None):
        super().__init__()
        c = self.config = config
        layers = nn.ModuleList(
            Block(c.hidden_size, c.num_attention_heads, c.intermediate_size, c.layer_norm_eps)
            for _ in range(c.num_hidden_layers))
        self.vit = nn.ModuleDict({
            "embeddings": Embeddings(c),
            "encoder": nn.ModuleDict({"layer": layers}),
            "layernorm": nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps),
        })
        self.decoder = Decoder(c)

        for name, p in self.named_parameters():
            if p.requires_grad and p.dim() > 1:
                nn.init.normal_(p, std=c.initializer_range)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        self.loss = ReconstructionLoss(loss_type, loss_weights, dinov2_reg, siglip2)

    # ---- files

    @classmethod
    def from_pretrained(cls, path, config=None, loss_type="l1", loss_weights="1", dinov2_reg=None, siglip2=None):
        """Load a state dict (.pt, .safetensors; config=None: the published ViT-L), or a folder or hub id (config.json
        and weights). A folder of transformers' ViTMAE gives start weights: scale and time embeddings are drawn.

        Perceptual networks come from the file if it holds them, else from dinov2_reg and siglip2 (as in the class).
        FileNotFoundError: no weights there; ValueError names tensors that do not fit."""
        path = download(str(path), WEIGHT_FILES) if is_hub_id(path) else Path(path)
        is_folder = path.is_dir()
        if is_folder:
            config_file = path / "config.json"
            if config is None and config_file.is_file():
                config = VideoMAEConfig.from_file(config_file)
            found = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
            path = found[0] if found else path / WEIGHT_FILES[0]

        if not path.is_file():
            raise FileNotFoundError(f"{path}: no VideoMAE weights there (expected a folder written by "
                                    "train_videomae.py or transformers, a state-dict file, or a hub id)")
        return cls.from_state(read_tensors(path), config or VideoMAEConfig(), path, draw=is_folder, loss_type=loss_type,
                              loss_weights=loss_weights, dinov2_reg=dinov2_reg, siglip2=siglip2)

    @classmethod
    def from_state(cls, state, config, source, draw=False, **loss):
        """Build the model from a state dict. Perceptual networks in it are used: a resumed run must keep its own.
        `source` names the file in errors. `draw`: missing scale and time embeddings are initialised at random."""
        with torch.device("meta"):
            mae = cls(config)

        # sort the tensors: the reconstructor's, and those of each perceptual network
        weights = {}
        networks = {term: {} for term in NETWORKS}
        for name, tensor in state.items():
            for prefix in ("module.", "mae.", "loss.networks."):
                name = name.removeprefix(prefix)
            first, _, rest = name.partition(".")
            if first in networks:
                networks[first][old_name(rest)] = tensor
            else:
                weights[old_name(name)] = tensor

        if draw and not any(name in weights for name in VIDEO_ONLY):
            for name in VIDEO_ONLY:
                weights[name] = torch.randn(mae.get_parameter(name).shape) * config.initializer_range

        assign(mae, weights, f"{source} and the config")
        mae.loss = ReconstructionLoss(**loss, networks=networks, source=source)
        return mae

    def save_pretrained(self, folder):
        """Write config.json + model.safetensors; perceptual networks are left out."""
        weights = {name: p for name, p in self.state_dict().items() if not name.startswith("loss.")}
        save_folder(folder, weights, asdict(self.config) | {"model_type": "vit_mae"})

    def freeze(self):
        return self.eval().requires_grad_(False)

    # ---- reconstruction

    def forward(self, video, gazing, frames):
        """Reconstruct frames from the gazes of these and earlier frames, and measure each one's loss.

        video (B, T, 3, R, R), pixels of data.to_model_pixels; frames: F indices in any order, the output follows it.
        gazing: of B clips, or of G·B copies (copy-major, g·B + b), whose loss targets and patches are then computed
        once per clip. Returns (reconstruction (rows, F, 3, R, R), loss (rows, F)).
        ValueError names what is wrong with the video, the gazing or the frames.
        """
        reconstruction = self.reconstruct(video, gazing, frames)
        copies = reconstruction.unflatten(0, (-1, len(video)))         # (G, B, F, 3, R, R)
        true = frames_of(video, frames).to(self.decoder.mask_token.dtype)
        loss = self.loss(copies, self.loss.target(true))               # (G, B, F)
        return reconstruction, loss.flatten(0, 1)

    def reconstruct(self, video, gazing, frames):
        """The first half of forward: -> (rows, F, 3, R, R)."""
        frames = [int(t) for t in frames]
        video = check_video(video, self.decoder.mask_token, "data.to_model_pixels(frames)", self.config.image_size,
                            values=self.checks_values)
        T = video.shape[1]
        check_gazing(gazing, len(video), T)
        if T > self.config.max_num_frames:
            raise ValueError(f"video has {T} frames, this reconstructor is for {self.config.max_num_frames}")
        if not frames or min(frames) < 0 or max(frames) >= T:
            raise ValueError(f"frames={frames}: name at least one of the video's frames, 0..{T - 1}")

        # nothing after the last frame to reconstruct can matter
        n_frames = max(frames) + 1
        counts = gazing["num_gazing_each_frame"].tolist()[:n_frames]
        N = sum(counts)
        padded = gazing["if_padded_gazing"][:, :N]
        positions = gazing["gazing_pos"][:, :N].masked_fill(padded, 0)          # padded slots: any patch

        # encoder: CLS and the gazed patches. Copies of a clip share its patches
        embeddings = self.vit.embeddings
        rows, B = len(padded), len(video)
        clip = torch.arange(rows, device=positions.device).unsqueeze(1) % B     # (rows, 1)
        patches = embeddings.patches(video[:, :n_frames])[clip, positions]      # (rows, N, 3·p·p)
        cls = embeddings.cls().expand(rows, -1, -1)
        x = torch.cat([cls, embeddings(patches, positions)], dim=1)             # (rows, 1 + N, D)

        keep = F.pad(~padded, (1, 0), value=True) if may_be_padded(padded) else None
        attend = BlockCausal(list(accumulate([1, *counts])), x.device, keep)
        for layer in self.vit.encoder.layer:
            x = layer(x, attend)
        x = self.vit.layernorm(x)                                               # (rows, 1 + N, D)
        return self.decode(x, positions, padded, counts, frames)

    def decode(self, encoded, positions, padded, counts, frames):
        """encoded (rows, 1 + N, D) CLS and gazed patches -> pixels of `frames` (rows, F, 3, R, R). Frames to
        reconstruct get all V tokens, other frames only their gazed ones."""
        decoder = self.decoder
        V, P = self.config.num_ids, self.config.ids_per_scale[-1]
        rows = len(encoded)
        device = encoded.device
        all_ids = torch.arange(V, device=device).expand(rows, V)

        # 1. where every frame's tokens lie, which patches they stand for, and where each slot's token goes
        starts, patch_id, visible, slot_place = [0], [], [], []
        slots_of_frame = positions.split(counts, dim=1)
        padded_of_frame = padded.split(counts, dim=1)
        for t, n_slots in enumerate(counts):
            start = starts[t]
            pad = padded_of_frame[t]
            slots = (slots_of_frame[t] - V * t).masked_fill(pad, 0)             # patch ids within the frame
            if t in frames:
                starts.append(start + V)
                patch_id.append(all_ids)
                visible.append(pad.new_ones(rows, V))
                slot_place.append(start + slots)
            else:
                starts.append(start + n_slots)
                patch_id.append(slots)
                visible.append(~pad)
                places = torch.arange(start, start + n_slots, device=device)
                slot_place.append(places.expand(rows, n_slots))
        n_tokens = starts[-1]

        # 2. fill: mask tokens everywhere, then the gazed ones; padded slots go to a last column, which is cut off
        gazed = decoder.decoder_embed(encoded[:, 1:])                           # (rows, N, D)
        place = torch.cat(slot_place, dim=1).masked_fill(padded, n_tokens)      # (rows, N)
        place = place.unsqueeze(-1).expand_as(gazed)
        x = decoder.mask_token.expand(rows, n_tokens + 1, -1)
        x = x.scatter(1, place, gazed.to(x.dtype))                              # autocast halves gazed
        x = x[:, :n_tokens]

        # say which patch and which frame; CLS in front
        sizes = torch.tensor(starts).diff()
        frame = torch.repeat_interleave(torch.arange(len(counts)), sizes)
        frame = send(frame, device)
        x = x + F.embedding(torch.cat(patch_id, dim=1), decoder.grid_positions())
        x = x + decoder.time_embed[frame]
        x = torch.cat([decoder.cls(encoded[:, :1]), x], dim=1)                  # (rows, 1 + n_tokens, D)

        # 3. transformer; the finest tokens, a frame's last ones, are its picture
        keep = None
        if may_be_padded(padded):
            keep = torch.cat([padded.new_ones(rows, 1), *visible], dim=1)
        ends = [1 + start for start in starts]
        attend = BlockCausal(ends, device, keep)
        for layer in decoder.decoder_layers:
            x = layer(x, attend)
        finest = [x[:, ends[t + 1] - P:ends[t + 1]] for t in frames]
        return decoder.pixels(torch.stack(finest, dim=1))


# ----------------------------------------------------------------------------------------------------------------------
# losses


def frames_of(video, frames):
    """video (B, T, …) -> its frames (B, F, …), a list of numbers. As an index, the list would be copied to a GPU."""
    return torch.stack([video[:, t] for t in frames], dim=1)


class ReconstructionLoss(nn.Module):
    """Weighted sum of terms, each one number per frame.

    l1: mean |x̂ - x| over normalised pixels. dinov2_reg, siglip2: mean squared difference of the patch tokens' last four
    hidden states in that network, which is frozen. networks: {term: tensors} that the file `source` holds.
    """

    def __init__(self, loss_type="l1", loss_weights="1", dinov2_reg=None, siglip2=None, networks=None, source=None):
        super().__init__()
        self.terms = loss_type.split("+")
        try:
            self.weights = [float(weight) for weight in loss_weights.split("+")]
        except ValueError:
            raise ValueError(f"loss_weights={loss_weights!r}: write a number per term, joined by +") from None

        if len(self.terms) != len(self.weights):
            raise ValueError(
                f"loss_type={loss_type!r} and loss_weights={loss_weights!r} name different numbers of terms")
        for term in self.terms:
            if term != "l1" and term not in NETWORKS:
                raise ValueError(f"loss_type={loss_type!r}: unknown term {term!r}, known: l1, {', '.join(NETWORKS)}")

        folders = {"dinov2_reg": dinov2_reg, "siglip2": siglip2}
        networks = networks or {}
        self.networks = nn.ModuleDict()
        for term in self.terms:
            if term != "l1":
                self.networks[term] = perceptual_network(term, folders[term], networks.get(term), source)
        self.eval().requires_grad_(False)

    def train(self, mode=True):  # the networks stay in eval mode whatever their parent does
        return super().train(False)

    @torch.no_grad()
    def target(self, frames):
        """What `forward` needs of the true frames (…, 3, R, R); compute it once where it is used often."""
        return {term: frames if term == "l1" else self.features(term, frames) for term in self.terms}

    def forward(self, reconstruction, target):
        """reconstruction (…, 3, R, R), target from self.target (broadcast) -> loss (…)"""
        loss = 0.0
        for term, weight in zip(self.terms, self.weights, strict=True):
            if term == "l1":
                difference = reconstruction - target[term]
                value = difference.abs().mean(dim=(-3, -2, -1))
            else:
                difference = self.features(term, reconstruction) - target[term]
                value = difference.square().mean(dim=(-2, -1))
            loss = loss + weight * value
        return loss

    def features(self, term, x):
        """Normalised pixels (…, 3, R, R) -> hidden states (…, P, 4·D) of the network's own patches."""
        network = self.networks[term]

        # from our normalisation to the network's; nothing is clamped or resized
        def per_channel(values):
            return send(torch.tensor(values), x.device).view(3, 1, 1)
        _, mean, std = NETWORKS[term]
        pixels = (x * per_channel(IMAGE_STD) + per_channel(IMAGE_MEAN) + 1) / 2         # 0..1
        pixels = (pixels - per_channel(mean)) / per_channel(std)
        pixels = pixels.flatten(0, -4)

        if term == "siglip2":
            h = network.embeddings(pixels, interpolate_pos_encoding=True)
            layers = network.encoder.layers
            n_special = 0
        else:
            h = network.embeddings(pixels)
            layers = network.encoder.layer
            n_special = 1 + network.config.num_register_tokens      # CLS and registers come first

        states = [h]
        for layer in layers:
            h = layer(h, None)                                      # no mask
            h = h[0] if isinstance(h, tuple) else h                 # transformers 4 returns tuples
            states.append(h)
        features = torch.cat(states[-4:], dim=2)[:, n_special:]
        return features.unflatten(0, x.shape[:-3]).float()


def perceptual_network(term, folder, tensors, source):
    """The network of a loss term. Its weights are `tensors` (of the file `source`) or, if there are none, those of the
    folder or hub id (None: the published network's), which gives the sizes in any case."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, SiglipVisionConfig, SiglipVisionModel
    if term == "dinov2_reg":
        model_class, config_class = Dinov2WithRegistersModel, Dinov2WithRegistersConfig
        published_sizes = dict(image_size=518, patch_size=14)       # these are not the class's defaults
    else:
        model_class, config_class = SiglipVisionModel, SiglipVisionConfig
        published_sizes = {}

    if not tensors and not folder:
        folder = NETWORKS[term][0]
    called = f"{term}={folder}"
    if not tensors:
        network = load_network(model_class, config_class, folder, called)
    else:
        config = config_class(**published_sizes)
        if folder:
            config, _ = load_network_config(config_class, folder, called)
        with network_errors(called), torch.device("meta"):
            network = model_class(config)

    network = getattr(network, "vision_model", network)             # SigLIP in transformers 4 wraps it once more
    if tensors:
        assign(network, tensors, f"{term} in {source} and its config", old_name)
        if term == "siglip2":                                       # not in files
            network.embeddings.position_ids = torch.arange(network.embeddings.num_positions).unsqueeze(0)
    return quicken(network.float())


# ----------------------------------------------------------------------------------------------------------------------
# for scripts


def load_videomae(cfg, device):
    """The frozen reconstructor that a script's settings name: cfg.videomae, loss_type, loss_weights and networks.
    ValueError: it is for shorter clips than cfg.n_frames."""
    mae = VideoMAE.from_pretrained(cfg.videomae, None, cfg.loss_type, cfg.loss_weights, cfg.dinov2_reg, cfg.siglip2)
    if mae.config.max_num_frames < cfg.n_frames:
        raise ValueError(f"videomae={cfg.videomae} is for {mae.config.max_num_frames} frames, n_frames={cfg.n_frames}")
    return mae.to(device).freeze()


def check_fit(mae, gaze, name):
    """ValueError if the patch ids of a gaze model, called `name`, mean other patches to the reconstructor."""
    m, g = mae.config, gaze.config
    if (m.scales, m.patch_size) != (g.scales, g.patch_size):
        raise ValueError(f"the reconstructor is for scales {m.scales}, patch {m.patch_size}; {name} for {g.scales}, "
                         f"{g.patch_size}: give models that fit")
