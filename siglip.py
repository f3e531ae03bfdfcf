"""A SigLIP vision encoder that is fed with gazes: only the gazed patches of a video are embedded and encoded.

    siglip = GazeSigLIP.from_pretrained("google/siglip2-base-patch16-224", scales="32+64+112+224")  # or a folder
    out = gaze.generate(video, gazing_ratio=0.1)   # of another size: target_scales=, target_patch_size= as siglip has
    features = siglip(frames.float() / 127.5 - 1, out)   # (B, N, D), zeros in padded slots
    tokens = features[0][~out["if_padded_gazing"][0]]                    # what a language model would take of clip 0

The weights are those of transformers' SiglipVisionModel. New is what surrounds them: patches of several scales, the
image's position embedding resized to each scale's grid, and attention over all frames of a clip as one sequence. There
are no embeddings of scale or time: attention and the order of the tokens tell frames apart.

Padded slots are dropped, not masked: all clips' real tokens lie one behind the other in a single row (M, D), so norms,
projections and MLPs see nothing else, and attention runs within each clip's stretch of that row.

Dimension key: B clips, T frames, V patch ids per frame (all scales), N gaze slots of a clip, M real slots of the batch,
D width, p patch size.
"""
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from gazing import as_sides
from lib.attention import block_causal_attention, causal_attention
from lib.cpu import linear, quicken
from lib.weights import announce, is_hub_id

ATTENTION = ("block_causal", "causal", "bidirectional")


class GazeSigLIP(nn.Module):
    """network: a SiglipVisionModel of transformers. scales: sides in pixels at which it looks at each frame, in the
    order of the gaze's ids: "32+64+112+224", or a list of ints or (height, width) pairs. What a side has beyond whole
    patches is not seen, as in SigLIP itself.

    attention: a token sees, in its clip, "block_causal" the tokens of its own and earlier frames; "causal" itself and
    the tokens before it; "bidirectional" all. frame_independent: and only those of its own frame. There is no dropout:
    SigLIP's is 0 in its published files.
    """

    def __init__(self, network, scales, attention="block_causal", frame_independent=False):
        super().__init__()
        self.network = quicken(getattr(network, "vision_model", network))  # transformers 4 wraps it once more
        if attention not in ATTENTION:
            raise ValueError(f"attention={attention!r} is none of {', '.join(ATTENTION)}")
        self.attention, self.frame_independent = attention, frame_independent
        self.patch_size = p = self.network.config.patch_size
        sides = as_sides(scales)
        if min(min(s) for s in sides) < p:
            raise ValueError(f"scales={scales!r}: every side must hold a patch, {p} pixels in this network")
        self.scales = sides
        self.grids = [(h // p, w // p) for h, w in sides]
        self.ids_per_scale = [h * w for h, w in self.grids]
        self.num_ids = sum(self.ids_per_scale)  # V

    @classmethod
    def from_pretrained(cls, folder, scales=None, attention=None, frame_independent=None):
        """Load a SigLIP (of transformers, the vision part or whole) from a folder or a hub id, in float32. What is None
        comes from config.json's scales, attn_type, frame_independent_encoding, which published gaze encoders have.

        FileNotFoundError: no weights there; ValueError: not a SigLIP, or scales given nowhere."""
        from transformers import SiglipVisionModel
        here = Path(folder).is_dir()
        nowhere = f"{folder}: neither a folder with a SigLIP's config.json and model.safetensors nor a hub id in reach"
        if not here and not is_hub_id(folder):
            raise FileNotFoundError(nowhere)
        if not here:
            announce(str(folder))
        try:
            network, info = SiglipVisionModel.from_pretrained(str(folder), output_loading_info=True,
                                                              use_safetensors=True)
        except OSError as e:
            raise FileNotFoundError(f"{nowhere} ({type(e).__name__})") from e
        if info["missing_keys"]:
            raise ValueError(f"{folder} is not a SigLIP: no {', '.join(sorted(info['missing_keys'])[:4])}, …")
        c = network.config
        scales = getattr(c, "scales", None) if scales is None else scales
        if scales is None:
            raise ValueError(f"{folder}/config.json has no scales: give scales=, for instance those of the gaze model")
        attention = attention or getattr(c, "attn_type", "block_causal")
        if frame_independent is None:
            frame_independent = getattr(c, "frame_independent_encoding", False)
        return cls(network.float(), scales, attention, frame_independent)

    def forward(self, pixels, gazing):
        """pixels (B, T, 3, H, W) of any size, as SigLIP takes them: 0..255 / 127.5 - 1, not normalised by
        data.to_model_pixels. gazing: the dict of model.py, made for these scales and this patch size.

        Returns features (B, N, D) after the last norm, in the order of the gaze's slots; zeros in padded ones.
        ValueError: a real slot's id is none of its frame's (a gaze for other scales or patches); 8-bit pixels."""
        if not pixels.is_floating_point():
            raise ValueError(f"pixels are {pixels.dtype}, 0..255: give frames.float() / 127.5 - 1")
        pos, padded, n = gazing["gazing_pos"], gazing["if_padded_gazing"], gazing["num_gazing_each_frame"].tolist()
        B, T = pixels.shape[:2]
        assert len(n) == T and pos.shape == padded.shape == (B, sum(n)), (pixels.shape, pos.shape, padded.shape, n)
        clip, slot = (~padded).nonzero(as_tuple=True)  # (M,) each; clip by clip, in the order of the slots
        frame = torch.repeat_interleave(torch.arange(T), torch.tensor(n)).to(pos.device)[slot]
        ids = pos[clip, slot] - self.num_ids * frame
        wrong = ((ids < 0) | (ids >= self.num_ids)).nonzero().flatten().tolist()
        if wrong:
            b, t, i = (int(x[wrong[0]]) for x in (clip, frame, ids))
            raise ValueError(
                f"gazing_pos of clip {b}, frame {t} holds id {i} (less {self.num_ids} * frame), but a frame has ids 0.."
                f"{self.num_ids - 1} at scales {self.scales}, patch {self.patch_size}: call generate() with "
                "target_scales=siglip.scales, target_patch_size=siglip.patch_size")
        x = self.embed(pixels.flatten(0, 1), clip * T + frame, ids)  # (M, D)

        count = torch.stack([(~part).sum(1) for part in padded.split(n, dim=1)], dim=1).tolist()  # (B, T) real slots
        rows = B if all(c == count[0] for c in count) else 1
        if rows > 1:  # clips alike go through attention together
            count = count[:1]
        if self.frame_independent:  # each frame is a sequence of one frame
            count = [[c] for row in count for c in row]
        sequences = [list(accumulate(c)) for c in count]  # of each, the ends of its frames
        for layer in self.network.encoder.layers:
            a, y = layer.self_attn, layer.layer_norm1(x)
            q, k, v = (rearrange(f(y), "(r m) (h d) -> r h m d", r=rows, h=a.num_heads)
                       for f in (a.q_proj, a.k_proj, a.v_proj))
            y = rearrange(self.attend(q, k, v, sequences), "r h m d -> (r m) (h d)")
            x = x + a.out_proj(y)
            x = x + layer.mlp(layer.layer_norm2(x))
        x = self.network.post_layernorm(x)
        return x.new_zeros(B, sum(n), x.shape[1]).index_put((clip, slot), x)

    def embed(self, frames, frame, ids):
        """frames (B·T, 3, H, W); patch ids (M,) of frame (M,) -> (M, D). Only gazed patches are cut and embedded."""
        e, p = self.network.embeddings, self.patch_size
        conv, table = e.patch_embedding, e.position_embedding.weight
        side = int(len(table) ** 0.5)
        table = rearrange(table.float(), "(h w) d -> 1 d h w", h=side)
        patches, positions, start = frames.new_empty(len(ids), conv.weight[0].numel()), [], 0
        for size, grid, n in zip(self.scales, self.grids, self.ids_per_scale, strict=True):
            x = frames
            if x.shape[-2:] != size:
                x = F.interpolate(x, size, mode="bicubic", align_corners=False)
            x = x.unfold(2, p, p).unfold(3, p, p)  # (B·T, 3, h, w, p, p), a view
            here = ((ids >= start) & (ids < start + n)).nonzero().flatten()
            i = ids[here] - start
            patches[here] = x[frame[here], :, i // grid[1], i % grid[1]].flatten(1)
            at = table if grid == (side, side) else F.interpolate(table, grid, mode="bicubic", align_corners=False)
            positions.append(rearrange(at, "1 d h w -> (h w) d"))
            start += n
        x = linear(patches.to(conv.weight.dtype), conv.weight.flatten(1), conv.bias)
        return x + torch.cat(positions).to(x.dtype)[ids]

    def attend(self, q, k, v, sequences):
        """q, k, v (rows, H, L, d): sequences one behind the other; of each, the ends of its frames within it."""
        out, start = [q[:, :, :0]], 0  # something to join, if no clip has a real slot
        for ends in sequences:
            here = [x[:, :, start:start + ends[-1]] for x in (q, k, v)]
            start += ends[-1]
            if ends[-1] == 0:  # nothing gazed
                continue
            if self.attention == "block_causal" and len(ends) > 1:
                out.append(block_causal_attention(*here, ends))
            else:
                out.append(causal_attention(*here) if self.attention == "causal" else
                           F.scaled_dot_product_attention(*here))
        return torch.cat(out, dim=2)

    def pool(self, features, gazing):
        """features (B, N, D) of forward -> (B, D), SigLIP's attention pooling over the real slots of each clip."""
        real = ~gazing["if_padded_gazing"]
        return torch.cat([self.network.head(f[r].unsqueeze(0)) for f, r in zip(features, real, strict=True)])
