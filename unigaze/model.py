"""UniGaze: where a face looks, from one normalised crop (Qin et al. 2025, arXiv 2502.02307).

    model = load("unigaze_h14_joint")            # a released model (its licence is printed first), a folder or a file
    pitchyaw = model(images)                     # (B, 3, 224, 224) uint8 RGB -> (B, 2) pitch and yaw in radians

A plain vision transformer reads the crop, and one linear layer turns its CLS token into two angles. FaceMAE is the same
transformer as a masked autoencoder on faces: pre-training with it is what lets gaze carry over to other data sets.

Signs (a README picture shows them): pitch is positive upwards, yaw is positive towards the left edge of the picture.
The vector of to_vector points the other way, from what is looked at to the face. A mirrored crop has the yaw negated.

Dimension key: B faces, S side of the crop, p side of a patch, N patches, L = N + 1 tokens (CLS first), D width,
K patches that the autoencoder sees.
"""
import argparse
import math
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat

from lib.configurator import check_patches, check_sizes
from lib.cpu import Linear
from lib.pixels import LARGEST, check_tensor, check_values
from lib.weights import assign, download, is_plain, read_config, read_tensors, save_folder

RELEASED = "UniGaze/UniGaze-models"        # on the Hugging Face hub
HEADS = {768: 12, 1024: 16, 1280: 16}      # of the published widths: weights do not tell the number of heads
MEAN = (0.485, 0.456, 0.406)               # ImageNet's, of RGB in 0..1
STD = (0.229, 0.224, 0.225)


@dataclass
class UniGazeConfig:
    image_size: int = 224      # side of the crop in pixels
    patch_size: int = 16
    hidden_size: int = 768     # B 768, L 1024, H 1280
    depth: int = 12            # B 12, L 24, H 32
    num_heads: int = 12        # B 12, L 16, H 16
    drop_path: float = 0.1     # share of faces that skip the last block in training; for earlier blocks less, linearly

    def __post_init__(self):
        check_sizes(self)
        check_patches("image_size", self.image_size, self.patch_size)
        check_multiple(self, "hidden_size", "num_heads")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path} must lie in [0, 1)")

    @property
    def num_patches(self):
        return (self.image_size // self.patch_size) ** 2


@dataclass
class FaceMAEConfig(UniGazeConfig):
    drop_path: float = 0.0
    decoder_hidden_size: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    mask_ratio: float = 0.75   # share of the patches that is hidden
    norm_pix_loss: bool = True # every patch's pixels are standardised before they are predicted

    def __post_init__(self):
        super().__post_init__()
        check_multiple(self, "decoder_hidden_size", "decoder_num_heads")
        if self.hidden_size % 4 or self.decoder_hidden_size % 4:
            raise ValueError(f"hidden_size={self.hidden_size} and decoder_hidden_size={self.decoder_hidden_size} must "
                             "be multiples of 4: sine and cosine of row and of column")
        if not 0 < self.num_visible < self.num_patches:
            raise ValueError(f"mask_ratio={self.mask_ratio} must hide some of the {self.num_patches} patches, not all")

    @property
    def num_visible(self):
        return int(self.num_patches * (1 - self.mask_ratio))


def check_multiple(config, whole, part):
    size = getattr(config, whole)
    unit = getattr(config, part)
    if size % unit:
        raise ValueError(f"{whole}={size} must be a multiple of {part}={unit}")


# ----------------------------------------------------------------------------------------------------------------------
# the vision transformer


class Attention(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b h l d", three=3, h=self.num_heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, "b h l d -> b l (h d)"))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, num_heads, drop_path=0.0):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width)

    def forward(self, x, draws=None):
        """x (B, L, D). draws (B, 2): uniform numbers that decide which samples skip the two branches; none: no one."""
        if draws is None or self.drop_path == 0:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))

        # drop path: the branches that stay are enlarged, so that the mean stays
        kept = draws >= self.drop_path
        weight = kept.to(x.dtype) / (1 - self.drop_path)
        weight = weight.view(-1, 2, 1, 1)
        x = x + weight[:, 0] * self.attn(self.norm1(x))
        return x + weight[:, 1] * self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, width):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, x):
        return rearrange(self.proj(x), "b d h w -> b (h w) d")


class ViT(nn.Module):
    """Pre-norm vision transformer with a CLS token, as in timm. Parameter names are those of the published files."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_patches + 1, D))
        self.patch_embed = PatchEmbed(config.patch_size, D)
        rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList([Block(D, config.num_heads, rate) for rate in rates])
        self.norm = nn.LayerNorm(D, eps=1e-6)

    def normalize(self, images):
        """images as in forward -> normalised, in the type of the weights. ValueError says what is wrong with them."""
        check_tensor(images, self.pos_embed, "(faces, 3, H, W)", "images")
        return imagenet_normalize(images, self.config.image_size).to(self.pos_embed.dtype)

    def draw(self, n_faces, generator=None):
        """(B, depth, 2) uniform numbers for the drop path of n_faces. Draw them outside where they must not depend on
        how a batch is divided."""
        return torch.rand(n_faces, self.config.depth, 2, generator=generator)

    def forward(self, images, draws=None):
        """images (B, 3, S, S) uint8 RGB or normalised -> (B, L, D) after the last norm, CLS first. In training mode
        `draws` of draw() decide the drop path; without them it draws its own."""
        images = self.normalize(images)
        patches = self.patch_embed(images)
        cls = self.cls_token.expand(len(patches), -1, -1)
        x = torch.cat([cls, patches], dim=1) + self.pos_embed

        if not self.training or self.config.drop_path == 0:
            draws = [None] * len(self.blocks)
        else:
            draws = self.draw(len(x)) if draws is None else draws
            draws = draws.to(x.device, non_blocking=True).unbind(1)
        for block, draw in zip(self.blocks, draws, strict=True):
            x = block(x, draw)
        return self.norm(x)


class UniGaze(nn.Module):
    """The gaze model: vit (ViT) and gaze_fc (Linear), under the published names."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vit = ViT(config)
        self.gaze_fc = Linear(config.hidden_size, 2)
        init_weights(self)

    def forward(self, images, draws=None):
        """images (B, 3, S, S): uint8 RGB, or floats that went through imagenet_normalize(). Returns (B, 2) pitch and
        yaw in radians. ValueError: images of another size or type."""
        tokens = self.vit(images, draws)
        return self.gaze_fc(tokens[:, 0])

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, whole or not at all."""
        save_folder(folder, self.state_dict(), asdict(self.config))

    @classmethod
    def from_pretrained(cls, folder):
        """The model of a folder that save_pretrained wrote; an autoencoder's folder gives a fresh gaze_fc."""
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}: not a folder written by save_pretrained")
        config = read_config(folder / "config.json", config_of)
        return cls.from_published(folder, config)

    @classmethod
    def from_published(cls, path, config=None):
        """The model of a weight file: released safetensors, a trainer's epoch_NN.pth.tar, a plain state dict, or a
        masked autoencoder, Meta's too, which comes without a gaze_fc: that one is drawn afresh.

        config: a UniGazeConfig; none: read off the weights, which works for the published widths. Position embeddings
        are resized to its image_size. FileNotFoundError, or a ValueError that names what does not fit.
        """
        tensors = read_published(path)["model"]
        is_autoencoder = "gaze_fc.weight" not in tensors
        tensors = vit_tensors(tensors) if is_autoencoder else without_head(tensors)
        config = config or guess_config(tensors, path)

        if is_autoencoder:
            fresh = init_weights(Linear(config.hidden_size, 2))
            tensors["gaze_fc.weight"] = fresh.weight
            tensors["gaze_fc.bias"] = fresh.bias
        if "vit.pos_embed" in tensors:
            try:
                tensors["vit.pos_embed"] = resize_positions(tensors["vit.pos_embed"], config.num_patches)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error

        # build without memory, then let the file's tensors be the weights
        with torch.device("meta"):
            model = cls(config)
        assign(model, tensors, f"the weights in {path}")
        return model


def load(name_or_path, device="cpu"):
    """A trained UniGaze in evaluation mode: the name of a released model (unigaze_b16_joint, unigaze_l16_joint,
    unigaze_h14_joint, unigaze_h14_cross_X; fetched from huggingface.co, licence MG-NC-RAI-2.0: non-commercial), a
    folder of save_pretrained, or a file that from_published reads."""
    path = Path(name_or_path)
    if not path.exists() and path.name.startswith("unigaze_"):
        file = f"{path.stem}.safetensors"
        path = download(RELEASED, [file]) / file
    read = UniGaze.from_pretrained if path.is_dir() else UniGaze.from_published
    return read(path).to(device).eval()


# ----------------------------------------------------------------------------------------------------------------------
# the masked autoencoder


class FaceMAE(ViT):
    """Masked autoencoder (He et al. 2022) on faces. The encoder's parameters have the names of the ViT's own."""

    def __init__(self, config):
        super().__init__(config)
        D = config.decoder_hidden_size
        self.grid = config.image_size // config.patch_size
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.decoder_embed = Linear(config.hidden_size, D)
        self.decoder_blocks = nn.ModuleList()
        for _ in range(config.decoder_depth):
            self.decoder_blocks.append(Block(D, config.decoder_num_heads))
        self.decoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder_pred = Linear(D, 3 * config.patch_size ** 2)

        # positions are fixed waves here; the gaze model goes on to train them
        self.pos_embed = nn.Parameter(sincos_positions(config.hidden_size, self.grid), requires_grad=False)
        self.decoder_pos_embed = nn.Parameter(sincos_positions(D, self.grid), requires_grad=False)
        init_weights(self)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images, noise=None):
        """images (B, 3, S, S) as in UniGaze; noise (B, N) decides what is hidden (see encode), none: drawn here.
        Returns (loss: a scalar, prediction (B, N, p·p·3), mask (B, N) 1 = hidden)."""
        images = self.normalize(images)
        if noise is None:
            noise = torch.rand(len(images), self.config.num_patches, device=images.device)
        latent, mask, restore = self.encode(images, noise)
        prediction = self.decode(latent, restore)
        return self.loss(images, prediction, mask), prediction, mask

    def encode(self, images, noise):
        """Encode the K patches of least noise, in the order of their noise.

        Returns (latent (B, K + 1, D), mask (B, N) 1 = hidden, restore (B, N): where each patch went in that order)."""
        K = self.config.num_visible
        order = noise.argsort(dim=1)
        restore = order.argsort(dim=1)
        mask = (restore >= K).float()

        patches = self.patch_embed(images) + self.pos_embed[:, 1:]
        visible = take(patches, order[:, :K])
        cls = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls.expand(len(visible), -1, -1), visible], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, restore

    def decode(self, latent, restore):
        """latent (B, K + 1, D), restore (B, N) of encode -> predicted pixels (B, N, p·p·3) of every patch."""
        x = self.decoder_embed(latent)
        cls = x[:, :1]
        visible = x[:, 1:]
        n_hidden = self.config.num_patches - self.config.num_visible
        hidden = self.mask_token.to(x.dtype).expand(len(x), n_hidden, -1)
        patches = take(torch.cat([visible, hidden], dim=1), restore)

        x = torch.cat([cls, patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        x = self.decoder_norm(x)
        return self.decoder_pred(x)[:, 1:]

    def loss(self, images, prediction, mask):
        """Mean squared error of the hidden patches' pixels."""
        target = self.patchify(images)
        if self.config.norm_pix_loss:
            mean, std = patch_statistics(target)
            target = (target - mean) / std
        error = (prediction.float() - target).square().mean(dim=2)
        return (error * mask).sum() / mask.sum()

    def patchify(self, images):
        """(B, 3, S, S) -> (B, N, p·p·3), each patch as (row, column, channel)."""
        p = self.config.patch_size
        return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)

    def paint(self, images, prediction, mask):
        """Pictures of a reconstruction: visible patches as they are, hidden ones as predicted, with the mean and the
        spread of the original patch where norm_pix_loss took them away. images normalised -> (B, 3, S, S) in 0..1."""
        patches = self.patchify(images)
        if self.config.norm_pix_loss:
            mean, std = patch_statistics(patches)
            prediction = prediction.float() * std + mean
        patches = torch.where(mask.unsqueeze(2) > 0, prediction, patches)
        p = self.config.patch_size
        pixels = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=self.grid, p=p, q=p)
        pixels = pixels * channels(STD, pixels) + channels(MEAN, pixels)
        return pixels.clamp(0, 1)

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, whole or not at all."""
        save_folder(folder, self.state_dict(), asdict(self.config))

    @classmethod
    def from_published(cls, path, config):
        """The autoencoder with its decoder, of a published mae_*.pth or of a folder of save_pretrained. Its fixed
        positions must be of the config's size."""
        with torch.device("meta"):
            model = cls(config)
        assign(model, read_published(path)["model"], f"the weights in {path}")
        return model


def patch_statistics(patches):
    """Mean and standard deviation (unbiased) of each patch, both (B, N, 1)."""
    mean = patches.mean(dim=2, keepdim=True)
    var = patches.var(dim=2, keepdim=True)
    return mean, torch.sqrt(var + 1e-6)


def take(tokens, index):
    """tokens (B, N, D), index (B, K) -> the tokens of each face in the order of its index (B, K, D)"""
    return tokens.gather(1, repeat(index, "b k -> b k d", d=tokens.shape[2]))


# ----------------------------------------------------------------------------------------------------------------------
# pixels, positions, first weights


def imagenet_normalize(images, size):
    """uint8 RGB (B, 3, size, size) -> ImageNet-normalised float32; floats are taken to be that already."""
    if images.dim() != 4 or images.shape[1:] != (3, size, size):
        raise ValueError(f"images are {tuple(images.shape)}, expected (faces, 3, {size}, {size})")
    if images.dtype == torch.uint8:
        images = images.float() / 255
        return (images - channels(MEAN, images)) / channels(STD, images)
    recipe = "uint8 RGB, or what imagenet_normalize() returns"
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}: give {recipe}")
    if len(images):
        check_values(images, -LARGEST, LARGEST, recipe, "images")
    return images


def channels(values, like):
    return torch.tensor(values, device=like.device).view(3, 1, 1)


def sincos_positions(width, grid):
    """Fixed 2-D position embeddings (1, 1 + grid², width): sines and cosines of the column in the first half, of the
    row in the second; zeros for CLS."""
    step = 4 / width
    frequencies = 10000 ** -torch.arange(0, 1, step, dtype=torch.float64)[:width // 4]
    places = torch.arange(grid, dtype=torch.float64)
    angles = torch.outer(places, frequencies)
    wave = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width / 2)
    column = repeat(wave, "x d -> (y x) d", y=grid)
    row = repeat(wave, "y d -> (y x) d", x=grid)
    table = torch.cat([column, row], dim=1)
    table = F.pad(table, (0, 0, 1, 0))  # CLS
    return table.float().unsqueeze(0)


def resize_positions(positions, n_patches):
    """Position embeddings (1, 1 + n, D) for another number of patches, bicubic; CLS keeps its own. ValueError: they
    are of no square."""
    shape = tuple(positions.shape)
    if len(shape) != 3 or shape[1] < 2 or math.isqrt(shape[1] - 1) ** 2 != shape[1] - 1:
        raise ValueError(f"position embeddings are {shape}, expected (1, 1 + n * n, width)")
    if positions.shape[1] == n_patches + 1:
        return positions
    cls = positions[:, :1].float()
    patches = positions[:, 1:].float()
    side = math.isqrt(n_patches)
    grid = rearrange(patches, "1 (h w) d -> 1 d h w", h=math.isqrt(patches.shape[1]))
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return torch.cat([cls, rearrange(grid, "1 d h w -> 1 (h w) d")], dim=1)


def init_weights(module):
    """Xavier-uniform matrices (the patch convolution as one too), zero biases: the MAE's rule, for any width."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.flatten(1))
            nn.init.zeros_(part.bias)
        elif isinstance(part, ViT) and part.pos_embed.requires_grad:
            nn.init.trunc_normal_(part.pos_embed, std=0.02)
            nn.init.trunc_normal_(part.cls_token, std=0.02)
    return module


# ----------------------------------------------------------------------------------------------------------------------
# published files


def read_published(path):
    """What a weight file holds: {"model": {name: tensor}} and, from a trainer's checkpoint, "epoch", "schedule" and
    "optimizer": Adam's state_dict, numbered for a model without vit.head.

    Nothing in the file is executed: of types other than tensors only argparse's Namespace and the class OneCycleLR are
    let in, and a stored function becomes its name. Weights are mapped, not copied.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    if path.suffix == ".safetensors":
        return {"model": read_tensors(path)}
    allowed = [argparse.Namespace, torch.optim.lr_scheduler.OneCycleLR, (stored_name, "builtins.getattr")]
    try:
        with torch.serialization.safe_globals(allowed):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        model = state.get("model_state", state.get("model", state))
        model = {name.removeprefix("module."): tensor for name, tensor in model.items()}
        if not all(map(is_plain, model.values())):
            raise TypeError("it holds no dict of tensors")
        found = {"model": model, "epoch": state.get("epoch"), "schedule": state.get("schedule_state")}
        if "optim_state" in state:
            found["optimizer"] = renumber(state["optim_state"], list(model))
        return found
    except Exception as error:  # of many kinds: pickle's, zip's, of entries that are missing
        raise ValueError(f"{path} is cut off or no file of weights ({type(error).__name__}: {error})") from error


def stored_name(owner, name):
    """Stands in for getattr while a file is read: the schedule of torch 2.0 and older stores a function."""
    return name


def renumber(adam, names):
    """Adam's state_dict without the parameters of vit.head, which the published model has and never trains."""
    group = adam["param_groups"][0]
    if len(group["params"]) != len(names):
        return adam  # written without them
    kept = [i for i, name in enumerate(names) if not name.startswith("vit.head.")]
    state = {}
    for new, old in enumerate(kept):
        if old in adam["state"]:
            state[new] = adam["state"][old]
    params = list(range(len(kept)))
    return {"state": state, "param_groups": [group | {"params": params}]}


def without_head(tensors):
    """The released weights but for timm's classifier of 1000 classes, which nothing uses."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("vit.head.")}


def vit_tensors(tensors):
    """An autoencoder's weights, under the names of a gaze model and without its decoder."""
    decoder = ("decoder_", "mask_token")
    return {f"vit.{name}": tensor for name, tensor in tensors.items() if not name.startswith(decoder)}


def config_of(saved):
    """UniGazeConfig from the dict of a config.json, an autoencoder's too."""
    return UniGazeConfig(**{key: saved[key] for key in UniGazeConfig.__dataclass_fields__})


def guess_config(tensors, path):
    """The sizes that weights show. ValueError where they do not."""
    try:
        width, _, patch_size, _ = tensors["vit.patch_embed.proj.weight"].shape
        grid = math.isqrt(tensors["vit.pos_embed"].shape[1] - 1)
    except (IndexError, KeyError, ValueError) as error:
        raise ValueError(f"{path} holds no UniGaze and no face autoencoder ({error} is missing or odd)") from error
    depth = len([name for name in tensors if name.endswith(".attn.qkv.weight")])
    if width not in HEADS:
        raise ValueError(f"{path}: weights do not tell the number of heads, and width {width} is none of the published "
                         f"{', '.join(map(str, HEADS))}: give config=UniGazeConfig(…)")
    return UniGazeConfig(grid * patch_size, patch_size, width, depth, HEADS[width])


# ----------------------------------------------------------------------------------------------------------------------
# angles


def to_vector(pitchyaw):
    """Pitch and yaw (N, 2) in radians -> unit vectors (N, 3)."""
    pitch, yaw = torch.as_tensor(pitchyaw).unbind(-1)
    x = pitch.cos() * yaw.sin()
    y = pitch.sin()
    z = pitch.cos() * yaw.cos()
    return torch.stack([x, y, z], dim=-1)


def to_pitchyaw(vector):
    """Vectors (N, 3) of any length -> pitch in -π/2..π/2 and yaw in -π..π (N, 2), radians."""
    vector = torch.as_tensor(vector)
    x, y, z = F.normalize(vector, dim=-1).unbind(-1)
    pitch = y.clamp(-1, 1).asin()
    yaw = torch.atan2(x, z)
    return torch.stack([pitch, yaw], dim=-1)


def angular_error(a, b):
    """Angle between two gazes in degrees, (N,) float64, in 0..180. a, b: pitch and yaw (N, 2) in radians, or vectors
    (N, 3); a vector of length 0 is 90° from any. The cosine is clipped: rounding never makes it NaN."""
    cosine = (unit_vector(a) * unit_vector(b)).sum(dim=-1)
    return cosine.clamp(-1, 1).acos().rad2deg()


def unit_vector(gaze):
    gaze = torch.as_tensor(gaze).double()
    if gaze.shape[-1] == 2:
        gaze = to_vector(gaze)
    length = gaze.norm(dim=-1, keepdim=True)
    return gaze / length.clamp(min=1e-7)
