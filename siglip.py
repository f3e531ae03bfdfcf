"""A SigLIP vision encoder that is fed with gazes: only the gazed patches of a video are embedded and encoded.

    siglip = GazeSigLIP.from_pretrained("google/siglip2-base-patch16-224", scales="32+64+112+224")  # or a folder
    out = gaze.generate(video, gazing_ratio=0.1)   # of another size: target_scales=, target_patch_size= as siglip has
    features = siglip(frames.float() / 127.5 - 1, out)   # (B, N, D), zeros in padded slots
    tokens = features[0][~out["if_padded_gazing"][0]]    # those of clip 0; mllm.py puts them into language models

The weights are those of transformers' SiglipVisionModel. New is what surrounds them: patches of several scales, the
image's position embedding resized to each scale's grid, and attention over all frames of a clip as one sequence. There
are no embeddings of scale or time: attention and the order of the tokens tell frames apart.

Padded slots are dropped, not masked: all clips' real tokens lie one behind the other in a single row (M, D), so norms,
projections and MLPs see nothing else, and attention runs within each clip's stretch of that row.

Dimension key: B clips, T frames, V patch ids per frame (all scales), N gaze slots of a clip, M real slots of the batch,
D width, H heads, p patch size.
"""
from itertools import accumulate

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from gazing import as_sides, check_gazing, frame_of_slot
from lib.attention import BlockCausal, causal_attention
from lib.cpu import linear, quicken
from lib.pixels import check_video
from lib.weights import load_network

ATTENTION = ("block_causal", "causal", "bidirectional")


class GazeSigLIP(nn.Module):
    """network: a SiglipVisionModel of transformers. scales: sides in pixels at which it looks at each frame, in the
    order of the gaze's ids: "32+64+112+224", or a list of ints or (height, width) pairs. What a side has beyond whole
    patches is not seen, as in SigLIP itself.

    attention: a token sees, in its clip, "block_causal" the tokens of its own and earlier frames; "causal" itself and
    the tokens before it; "bidirectional" all. frame_independent: and only those of its own frame. There is no dropout:
    SigLIP's is 0 in its published files.

    layer: which of transformers' hidden_states the features are: -1 those behind the last layer, -2 those before it,
    which many language models take. norm: with SigLIP's last norm; hidden_states are without.
    """

    def __init__(self, network, scales, attention="block_causal", frame_independent=False, layer=-1, norm=True):
        super().__init__()
        if attention not in ATTENTION:
            raise ValueError(f"attention={attention!r} is none of {', '.join(ATTENTION)}")
        self.attention = attention
        self.frame_independent = frame_independent
        self.norm = norm
        network = getattr(network, "vision_model", network)                 # transformers 4 wraps it once more
        embeddings = getattr(network, "embeddings", None)
        is_siglip = isinstance(getattr(embeddings, "patch_embedding", None), nn.Conv2d)
        if not is_siglip or hasattr(embeddings, "class_embedding"):         # CLIP has a class token
            raise ValueError(f"network is a {type(network).__name__}, expected a SiglipVisionModel of transformers; "
                             "of a folder or hub id: GazeSigLIP.from_pretrained")
        self.network = quicken(network)

        # hidden_states[0] are the embeddings, so there is one more of them than of layers
        n_layers = len(self.network.encoder.layers)
        if not -n_layers - 1 <= layer <= n_layers:
            raise ValueError(f"layer={layer}: this network has {n_layers} layers, give {-n_layers - 1} to {n_layers}")
        self.n_layers = layer if layer >= 0 else n_layers + 1 + layer
        self.patch_size = p = self.network.config.patch_size

        self.scales = as_sides(scales)
        if min(min(side) for side in self.scales) < p:
            raise ValueError(f"scales={scales!r}: every side must hold a patch, {p} pixels in this network")
        self.grids = [(h // p, w // p) for h, w in self.scales]
        self.ids_per_scale = [h * w for h, w in self.grids]
        self.num_ids = sum(self.ids_per_scale)  # V

    @classmethod
    def from_pretrained(cls, folder, scales=None, attention=None, frame_independent=None, layer=-1, norm=True):
        """Load a SigLIP (of transformers, the vision part or whole) from a folder or a hub id, in float32. What is None
        comes from config.json's scales, attn_type, frame_independent_encoding, which published gaze encoders have.

        FileNotFoundError: no weights there; ValueError: not a SigLIP, or scales given nowhere."""
        from transformers import SiglipVisionConfig, SiglipVisionModel
        network = load_network(SiglipVisionModel, SiglipVisionConfig, folder, f"siglip={folder}", use_safetensors=True)

        # settings that are not given come from config.json
        c = network.config
        if scales is None:
            scales = getattr(c, "scales", None)
        if scales is None:
            raise ValueError(f"{folder}/config.json has no scales: give scales=, for instance those of the gaze model")
        if attention is None:
            attention = getattr(c, "attn_type", "block_causal")
        if frame_independent is None:
            frame_independent = getattr(c, "frame_independent_encoding", False)
        return cls(network.float(), scales, attention, frame_independent, layer, norm)

    def forward(self, pixels, gazing):
        """pixels (B, T, 3, H, W) of any size, as SigLIP takes them: 0..255 / 127.5 - 1, not those of
        data.to_model_pixels. gazing: the dict of gazing.py, made for these scales and this patch size.

        Returns features (B, N, D) of `layer`, in the order of the gaze's slots; zeros in padded ones.
        ValueError: wrong pixels; a real slot's id is none of its frame's (a gaze for other scales or patches)."""
        weight = self.network.embeddings.patch_embedding.weight
        pixels = check_video(pixels, weight, "frames.float() / 127.5 - 1", name="pixels")
        B, T = pixels.shape[:2]
        check_gazing(gazing, B, T)
        if len(gazing["gazing_pos"]) != B:
            raise ValueError(f"gazing is of {len(gazing['gazing_pos'])} clips, pixels of {B}")
        clip, slot, frame, patch_id = self.real_slots(gazing)               # (M,) each
        x = self.embed(pixels.flatten(0, 1), clip * T + frame, patch_id)    # (M, D)

        # real slots of each clip's frames; clips that agree in these go through attention together, as rows
        counts = torch.bincount(clip * T + frame, minlength=B * T)
        counts = counts.view(B, T).tolist()
        rows = 1
        if all(row == counts[0] for row in counts):
            rows = B
            counts = counts[:1]

        # the sequences that attention runs over, one behind the other: of each, where its frames end
        if self.frame_independent:
            sequences = [[count] for row in counts for count in row]
        else:
            sequences = [list(accumulate(row)) for row in counts]
        views = [self.view(ends, x.device) for ends in sequences]

        for layer in self.network.encoder.layers[:self.n_layers]:
            attention = layer.self_attn
            y = layer.layer_norm1(x)
            projected = [attention.q_proj(y), attention.k_proj(y), attention.v_proj(y)]
            q, k, v = (rearrange(z, "(r m) (h d) -> r h m d", r=rows, h=attention.num_heads) for z in projected)
            y = self.attend(q, k, v, sequences, views)
            x = x + attention.out_proj(rearrange(y, "r h m d -> (r m) (h d)"))
            x = x + layer.mlp(layer.layer_norm2(x))

        if self.norm:
            x = self.network.post_layernorm(x)
        features = x.new_zeros(*gazing["gazing_pos"].shape, x.shape[1])
        return features.index_put((clip, slot), x)

    def real_slots(self, gazing):
        """(M,) clip, slot, frame and id within the frame of the slots that are not padded, clip by clip."""
        clip, slot = (~gazing["if_padded_gazing"]).nonzero(as_tuple=True)
        frame = frame_of_slot(gazing)[slot]
        patch_id = gazing["gazing_pos"][clip, slot] - self.num_ids * frame

        wrong = ((patch_id < 0) | (patch_id >= self.num_ids)).nonzero().flatten()
        if len(wrong):
            i = wrong[0]
            raise ValueError(
                f"gazing_pos of clip {int(clip[i])}, frame {int(frame[i])} holds id {int(patch_id[i])} (less "
                f"{self.num_ids} * frame), but a frame has ids 0..{self.num_ids - 1} at scales {self.scales}, patch "
                f"{self.patch_size}: call generate() with target_scales=siglip.scales, "
                "target_patch_size=siglip.patch_size")
        return clip, slot, frame, patch_id

    def embed(self, frames, frame, patch_id):
        """frames (B·T, 3, H, W); patch ids (M,) of frame (M,) -> (M, D). Only gazed patches are cut and embedded."""
        p = self.patch_size
        conv = self.network.embeddings.patch_embedding
        table = self.network.embeddings.position_embedding.weight.float()   # of the image size it was trained at
        side = int(len(table) ** 0.5)
        table = rearrange(table, "(h w) d -> 1 d h w", h=side)

        patches = frames.new_empty(len(patch_id), conv.weight[0].numel())   # (M, 3·p·p)
        positions = []
        first_id = 0
        for size, grid, n_ids in zip(self.scales, self.grids, self.ids_per_scale, strict=True):
            x = frames
            if x.shape[-2:] != size:
                x = F.interpolate(x, size, mode="bicubic", align_corners=False)
            x = x.unfold(2, p, p).unfold(3, p, p)                           # (B·T, 3, h, w, p, p), a view

            # the gazed patches of this scale
            is_here = (patch_id >= first_id) & (patch_id < first_id + n_ids)
            index = is_here.nonzero().flatten()
            cell = patch_id[index] - first_id
            row = cell // grid[1]
            column = cell % grid[1]
            patches[index] = x[frame[index], :, row, column].flatten(1)

            position = table
            if grid != (side, side):
                position = F.interpolate(table, grid, mode="bicubic", align_corners=False)
            positions.append(rearrange(position, "1 d h w -> (h w) d"))
            first_id += n_ids

        x = linear(patches, conv.weight.flatten(1), conv.bias)
        return x + torch.cat(positions).to(x.dtype)[patch_id]

    def view(self, ends, device):
        """The attention within a sequence whose frames have these ends: a function of q, k, v."""
        if self.attention == "causal":
            return causal_attention
        if self.attention == "bidirectional" or len(ends) == 1:
            return F.scaled_dot_product_attention
        return BlockCausal(ends, device)

    def attend(self, q, k, v, sequences, views):
        """q, k, v (rows, H, L, d): sequences one behind the other; of each, the ends of its frames within it."""
        out = [q[:, :, :0]]  # something to join, if no clip has a real slot
        start = 0
        for ends, view in zip(sequences, views, strict=True):
            end = start + ends[-1]
            if end > start:
                out.append(view(q[:, :, start:end], k[:, :, start:end], v[:, :, start:end]))
            start = end
        return torch.cat(out, dim=2)

    def pool(self, features, gazing):
        """features (B, N, D) of forward, after the last layer and norm -> (B, D), SigLIP's attention pooling over the
        real slots of each clip."""
        pooled = []
        for clip, padded in zip(features, gazing["if_padded_gazing"], strict=True):
            pooled.append(self.network.head(clip[~padded].unsqueeze(0)))
        return torch.cat(pooled)
