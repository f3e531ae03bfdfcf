"""The frozen reconstructor: a block-causal, multi-scale masked autoencoder for video, and the losses that judge it.

    mae = VideoMAE.from_pretrained("out/toy/videomae")         # a folder, a state-dict file or a hub id
    reconstruction, loss = mae(video, gazing, frames=[0, 7])   # (B, F, 3, R, R), (B, F)

From the gazed patches alone it paints whole frames: frame t is reconstructed from the patches gazed in frames <= t
(paper, section 3.3 and appendix). `gazing` is the dict described in model.py; video comes from
`data.to_model_pixels`.
Module and parameter names follow Hugging Face's ViTMAE, so that published files load without a renaming table.

Dimension key: B clips, T frames, F frames to reconstruct, S scales, V patch ids per frame, N gaze slots, L tokens,
D width.
"""
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from data import IMAGE_MEAN, IMAGE_STD
from gazing import Grids
from lib.attention import block_causal_attention
from lib.cpu import Linear, linear, quicken
from lib.weights import announce, assign, download, is_hub_id, old_name, read_config, read_tensors, save_folder

WEIGHT_FILES = ("model.safetensors", "videomae.pt", "pytorch_model.bin")  # in a folder or on the hub, the first found
# Parameters that a plain ViTMAE lacks; taken as start weights they are drawn anew.
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
        for which in ("", "decoder_"):
            d, n = getattr(self, f"{which}hidden_size"), getattr(self, f"{which}num_attention_heads")
            if d % 4 or d % n:
                raise ValueError(f"{which}hidden_size={d} must be a multiple of 4 and of its num_attention_heads={n}")

    @classmethod
    def from_file(cls, path):
        known = {f.name for f in fields(cls)}
        return read_config(path, lambda d: cls(**{k: v for k, v in d.items() if k in known}))


# ----------------------------------------------------------------------------------------------------------------------
# transformer


class Block(nn.Module):
    """Pre-norm transformer block with the module names of ViTMAELayer."""

    def __init__(self, dim, num_heads, mlp, eps):
        super().__init__()
        def dense(i, o):
            return nn.ModuleDict({"dense": Linear(i, o)})
        self.num_heads = num_heads
        self.attention = nn.ModuleDict({
            "attention": nn.ModuleDict({n: Linear(dim, dim) for n in ("query", "key", "value")}),
            "output": dense(dim, dim)})
        self.intermediate, self.output = dense(dim, mlp), dense(mlp, dim)
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)

    def qkv(self, x):
        y = self.layernorm_before(x)
        return [rearrange(self.attention.attention[n](y), "b l (h d) -> b h l d", h=self.num_heads)
                for n in ("query", "key", "value")]

    def finish(self, x, y):  # y (B, H, L, d): what attention returned
        x = x + self.attention.output.dense(rearrange(y, "b h l d -> b l (h d)"))
        return x + self.output.dense(F.gelu(self.intermediate.dense(self.layernorm_after(x))))

    def forward(self, x, ends, keep):
        q, k, v = self.qkv(x)
        return self.finish(x, block_causal_attention(q, k, v, ends, keep))


def sincos_positions(dim, side):
    """(1 + side², dim) fixed positions: zeros for CLS; column in the first half, row in the second, sin then cos."""
    freq = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, col = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    halves = [torch.cat([torch.sin(a), torch.cos(a)], dim=1) for a in (x.reshape(-1, 1) * freq for x in (col, row))]
    return torch.cat([torch.zeros(1, dim), torch.cat(halves, dim=1).float()])


# ----------------------------------------------------------------------------------------------------------------------
# encoder and decoder


class Embeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        d, side = c.hidden_size, c.image_size // c.patch_size
        self.c = c
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d))
        self.position_embeddings = nn.Parameter(sincos_positions(d, side).unsqueeze(0), requires_grad=False)
        self.scale_embed = nn.Parameter(torch.zeros(len(c.scale_list), d))
        self.time_embed = nn.Parameter(torch.zeros(c.max_num_frames, d))
        self.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(c.num_channels, d, c.patch_size, c.patch_size)})

    def grid_positions(self):
        """(V, D): the finest grid's positions resized bicubically to every scale's grid, plus the scale embeddings."""
        side = self.c.image_size // self.c.patch_size
        grid = rearrange(self.position_embeddings[:, 1:], "1 (h w) d -> 1 d h w", h=side)
        out = []
        for s, n in enumerate(self.c.scale_list):
            n = n // self.c.patch_size
            p = grid if n == side else F.interpolate(grid, (n, n), mode="bicubic", align_corners=False)
            out.append(rearrange(p, "1 d h w -> (h w) d") + self.scale_embed[s])
        return torch.cat(out)

    def patches(self, video):
        """video (B, T, 3, R, R) -> the pixels of every patch id of every frame (B, T·V, 3·p·p)."""
        B, p, out = len(video), self.c.patch_size, []
        for side in self.c.scale_list:
            x = video.flatten(0, 1)
            if side != x.shape[-1]:
                x = F.interpolate(x, (side, side), mode="bicubic", align_corners=False)
            out.append(rearrange(x, "bt c (h p) (w q) -> bt (h w) (c p q)", p=p, q=p))
        return rearrange(torch.cat(out, dim=1), "(b t) v d -> b (t v) d", b=B)

    def forward(self, patches, pos):
        """patches (…, 3·p·p) and their ids + V·t (…) -> tokens (…, D): only what is gazed gets embedded."""
        V, conv = self.c.num_ids, self.patch_embeddings.projection
        x = linear(patches, conv.weight.flatten(1), conv.bias)
        return x + self.grid_positions()[pos % V] + self.time_embed[pos // V]

    def cls(self):  # (1, 1, D)
        return self.cls_token + self.position_embeddings[:, :1]


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        d, side = c.decoder_hidden_size, c.image_size // c.patch_size
        self.c = c
        self.mask_token = nn.Parameter(torch.zeros(1, 1, d))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(d, side).unsqueeze(0), requires_grad=False)
        self.decoder_scale_embed = nn.Parameter(torch.zeros(len(c.scale_list), d))
        self.time_embed = nn.Parameter(torch.zeros(c.max_num_frames, d))
        self.decoder_embed = Linear(c.hidden_size, d)
        self.decoder_layers = nn.ModuleList(
            Block(d, c.decoder_num_attention_heads, c.decoder_intermediate_size, c.layer_norm_eps)
            for _ in range(c.decoder_num_hidden_layers))
        self.decoder_norm = nn.LayerNorm(d, eps=c.layer_norm_eps)
        self.decoder_pred = Linear(d, c.patch_size ** 2 * c.num_channels)

    def grid_positions(self):
        """(V, D). A quirk the published weights rely on: the flattened positions are resized in one dimension."""
        flat = self.decoder_pos_embed[:, 1:].transpose(1, 2).unsqueeze(2)  # (1, D, 1, P)
        out = []
        for s, n in enumerate(self.c.ids_per_scale):
            p = flat if n == flat.shape[-1] else F.interpolate(flat, (1, n), mode="bicubic", align_corners=False)
            out.append(p[0, :, 0].T + self.decoder_scale_embed[s])
        return torch.cat(out)

    def cls(self, h):  # h (B, 1, encoder width): the encoder's CLS -> (B, 1, D)
        return self.decoder_embed(h) + self.decoder_pos_embed[:, :1]

    def pixels(self, x):
        """Hidden states of a frame's finest tokens (…, P, D) -> pixels (…, 3, R, R)."""
        c = self.c
        x = self.decoder_pred(self.decoder_norm(x))
        return rearrange(x, "... (h w) (p q c) -> ... c (h p) (w q)", h=c.image_size // c.patch_size, p=c.patch_size,
                         q=c.patch_size)


class VideoMAE(nn.Module):
    """See the module's docstring. loss_type and loss_weights: terms joined by '+', for instance
    "l1+dinov2_reg+siglip2" and "1+0.3+0.3"; dinov2_reg and siglip2: folder or hub id of those networks (none: the
    published one)."""

    def __init__(self, config, loss_type="l1", loss_weights="1", dinov2_reg=None, siglip2=None):
        super().__init__()
        c = self.config = config
        self.vit = nn.ModuleDict({
            "embeddings": Embeddings(c),
            "encoder": nn.ModuleDict({"layer": nn.ModuleList(
                Block(c.hidden_size, c.num_attention_heads, c.intermediate_size, c.layer_norm_eps)
                for _ in range(c.num_hidden_layers))}),
            "layernorm": nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)})
        self.decoder = Decoder(c)
        std = c.initializer_range
        for name, p in self.named_parameters():
            if p.requires_grad and p.dim() > 1:
                nn.init.normal_(p, std=std)
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
        folder = path if path.is_dir() else None
        if folder:
            if config is None and (folder / "config.json").is_file():
                config = VideoMAEConfig.from_file(folder / "config.json")
            path = next((folder / n for n in WEIGHT_FILES if (folder / n).is_file()), folder / WEIGHT_FILES[0])
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no VideoMAE weights there (expected a folder written by "
                                    "train_videomae.py or transformers, a state-dict file, or a hub id)")
        return cls.from_state(read_tensors(path), config or VideoMAEConfig(), path, bool(folder), loss_type=loss_type,
                              loss_weights=loss_weights, dinov2_reg=dinov2_reg, siglip2=siglip2)

    @classmethod
    def from_state(cls, state, config, source, draw=False, **loss):
        """The same of the state dict that the file `source` holds, a checkpoint's too, whose own perceptual networks a
        resumed run must have. draw: scale and time embeddings are drawn if it has none."""
        with torch.device("meta"):
            mae = cls(config)
        tensors, networks = {}, {term: {} for term in NETWORKS}
        for name, t in state.items():
            name = name.removeprefix("module.").removeprefix("mae.").removeprefix("loss.networks.")
            term, _, rest = name.partition(".")
            if term in networks:
                networks[term][old_name(rest)] = t
            else:
                tensors[old_name(name)] = t
        if draw and not any(n in tensors for n in VIDEO_ONLY):
            std = config.initializer_range
            tensors |= {n: torch.randn(mae.get_parameter(n).shape) * std for n in VIDEO_ONLY}
        assign(mae, tensors, f"{source} and the config")
        mae.loss = ReconstructionLoss(**loss, networks=networks, source=source)
        return mae

    def save_pretrained(self, folder):
        """Write config.json + model.safetensors; perceptual networks are left out."""
        weights = {n: p for n, p in self.state_dict().items() if not n.startswith("loss.")}
        save_folder(folder, weights, asdict(self.config) | {"model_type": "vit_mae"})

    def freeze(self):
        return self.eval().requires_grad_(False)

    # ---- reconstruction

    def forward(self, video, gazing, frames):
        """Reconstruct frames from the gazes of these and earlier frames, and measure each one's loss.

        video (B, T, 3, R, R) normalised pixels; frames: F indices in any order, the output follows it. gazing: B clips,
        or G·B copies (copy-major, g·B + b), whose patch embeddings and loss targets are then computed once per clip.
        Returns (reconstruction (rows, F, 3, R, R), loss (rows, F)).
        """
        reconstruction = self.reconstruct(video, gazing, frames)
        rows, B = len(reconstruction), len(video)
        target = self.loss.target(video[:, frames])
        loss = self.loss(reconstruction.unflatten(0, (rows // B, B)), target)  # (G, B, F)
        return reconstruction, loss.flatten(0, 1)

    def reconstruct(self, video, gazing, frames):
        frames = [int(f) for f in frames]
        n = gazing["num_gazing_each_frame"].tolist()
        assert video.shape[-1] == video.shape[-2] == self.config.image_size and len(n) == video.shape[1]
        last = max(frames) + 1  # nothing later can matter
        n = n[:last]
        N = sum(n)
        padded = gazing["if_padded_gazing"][:, :N]
        rows, B = len(padded), len(video)
        assert rows % B == 0
        pos = gazing["gazing_pos"][:, :N].masked_fill(padded, 0)  # padded: any token; the caller's tensor stays
        keep = F.pad(~padded, (1, 0), value=True) if padded.any() else None

        # encoder: CLS and the gazed tokens, block-causal over frames
        e = self.vit.embeddings
        clip = torch.arange(rows, device=pos.device).unsqueeze(1) % B
        x = torch.cat([e.cls().expand(rows, -1, -1), e(e.patches(video[:, :last])[clip, pos], pos)], dim=1)
        ends = [1]
        for n_t in n:
            ends.append(ends[-1] + n_t)
        for layer in self.vit.encoder.layer:
            x = layer(x, ends, keep)
        x = self.vit.layernorm(x)
        return self.decode(x, pos, padded, n, frames)

    def decode(self, x, pos, padded, n, frames):
        """x (rows, 1 + N, D) encoded CLS, gazes -> pixels of `frames`. These get all V tokens, others their gazes."""
        d, V = self.decoder, self.config.num_ids
        rows, P = len(x), self.config.ids_per_scale[-1]
        seen, grid = d.decoder_embed(x[:, 1:]), d.grid_positions()
        parts, keep, ends, at, full_at = [d.cls(x[:, :1])], [padded.new_ones(rows, 1)], [1], 0, {}
        for t, n_t in enumerate(n):
            slots, ids, pad = seen[:, at:at + n_t], pos[:, at:at + n_t] - V * t, padded[:, at:at + n_t]
            ids = ids.masked_fill(pad, 0)
            if t in frames:
                full_at[t] = ends[-1]
                full = d.mask_token.expand(rows, V + 1, -1)
                # padded slots are written to a column that is cut off again
                index = ids.masked_fill(pad, V).unsqueeze(-1).expand_as(slots)
                part = full.scatter(1, index, slots.to(full.dtype))[:, :V] + grid  # autocast halves slots
                keep.append(padded.new_ones(rows, V))
            else:
                part = slots + grid[ids]
                keep.append(~pad)
            parts.append(part + d.time_embed[t])
            ends.append(ends[-1] + part.shape[1])
            at += n_t
        x = torch.cat(parts, dim=1)
        keep = torch.cat(keep, dim=1)
        keep = None if not padded.any() else keep
        for layer in d.decoder_layers:
            x = layer(x, ends, keep)
        finest = torch.stack([x[:, full_at[t] + V - P:full_at[t] + V] for t in frames], dim=1)
        return d.pixels(finest)


# ----------------------------------------------------------------------------------------------------------------------
# losses


class ReconstructionLoss(nn.Module):
    """Weighted sum of terms, each one number per frame.

    l1: mean |x̂ - x| over normalised pixels. dinov2_reg, siglip2: mean squared difference of the patch tokens' last four
    hidden states in that network, which is frozen. networks: {term: tensors} that the file `source` holds.
    """

    def __init__(self, loss_type="l1", loss_weights="1", dinov2_reg=None, siglip2=None, networks=None, source=None):
        super().__init__()
        self.terms = loss_type.split("+")
        try:
            self.weights = [float(w) for w in loss_weights.split("+")]
        except ValueError:
            raise ValueError(f"loss_weights={loss_weights!r}: write a number per term, joined by +") from None
        if len(self.terms) != len(self.weights):
            raise ValueError(
                f"loss_type={loss_type!r} and loss_weights={loss_weights!r} name different numbers of terms")
        for term in self.terms:
            if term != "l1" and term not in NETWORKS:
                raise ValueError(f"loss_type={loss_type!r}: unknown term {term!r}, known: l1, {', '.join(NETWORKS)}")
        folders = {"dinov2_reg": dinov2_reg, "siglip2": siglip2}
        self.networks = nn.ModuleDict({
            term: perceptual_network(term, folders[term], (networks or {}).get(term), source)
            for term in self.terms if term != "l1"})
        self.eval().requires_grad_(False)

    def train(self, mode=True):  # the networks stay in eval mode whatever their parent does
        return super().train(False)

    def features(self, term, x):
        """Normalised pixels (…, 3, R, R) -> hidden states (…, P, 4·D) of the network's own patches."""
        network, (_, mean, std) = self.networks[term], NETWORKS[term]
        ours, theirs = ([torch.tensor(v, device=x.device).view(3, 1, 1) for v in pair]
                        for pair in ((IMAGE_MEAN, IMAGE_STD), (mean, std)))
        pixels = (((x * ours[1] + ours[0] + 1) / 2 - theirs[0]) / theirs[1]).flatten(0, -4)  # neither cut nor resized
        if term == "siglip2":
            h, layers, skip = network.embeddings(pixels, interpolate_pos_encoding=True), network.encoder.layers, 0
        else:  # CLS and registers come first
            skip = 1 + network.config.num_register_tokens
            h, layers = network.embeddings(pixels), network.encoder.layer
        states = [h]
        for layer in layers:
            h = layer(h, None)  # no mask
            h = h[0] if isinstance(h, tuple) else h  # transformers 4 returns tuples
            states.append(h)
        return torch.cat(states[-4:], dim=2)[:, skip:].unflatten(0, x.shape[:-3]).float()

    @torch.no_grad()
    def target(self, frames):
        """What `forward` needs of the true frames (…, 3, R, R); compute it once where it is used often."""
        return {term: frames if term == "l1" else self.features(term, frames) for term in self.terms}

    def forward(self, reconstruction, target):
        """reconstruction (…, 3, R, R), target from self.target (broadcast) -> loss (…)"""
        loss = 0.0
        for term, weight in zip(self.terms, self.weights, strict=True):
            if term == "l1":
                value = (reconstruction - target[term]).abs().mean(dim=(-3, -2, -1))
            else:
                value = (self.features(term, reconstruction) - target[term]).square().mean(dim=(-2, -1))
            loss = loss + weight * value
        return loss


def perceptual_network(term, folder, tensors, source):
    """The network of a loss term. Its weights are `tensors` (of the file `source`) or, if there are none, those of the
    folder or hub id, which gives the sizes in any case (none: the published network)."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, SiglipVisionConfig, SiglipVisionModel
    kind, kind_config, sizes = {  # DINOv2's published sizes are not its defaults
        "dinov2_reg": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, dict(image_size=518, patch_size=14)),
        "siglip2": (SiglipVisionModel, SiglipVisionConfig, {})}[term]
    if not tensors:
        folder = folder or NETWORKS[term][0]
    if folder and not Path(folder).is_dir():
        announce(folder)
    try:
        if tensors:
            with torch.device("meta"):
                network, info = kind(kind_config.from_pretrained(folder) if folder else kind_config(**sizes)), {}
        else:
            network, info = kind.from_pretrained(folder, output_loading_info=True)
    except OSError as e:
        raise FileNotFoundError(f"{term}={folder}: neither a folder with this network nor reachable on the hub "
                                f"({type(e).__name__}); the VideoMAE's file may hold its weights") from e
    if info.get("missing_keys"):
        raise ValueError(f"{term}={folder} lacks {', '.join(sorted(info['missing_keys'])[:8])}")
    network = getattr(network, "vision_model", network)  # SigLIP in transformers 4 wraps it once more
    if tensors:
        assign(network, tensors, f"{term} in {source} and its config", old_name)
    if tensors and term == "siglip2":  # not in files
        network.embeddings.position_ids = torch.arange(network.embeddings.num_positions).unsqueeze(0)
    return quicken(network.float())


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
