"""A Qwen-VL that reads only the gazed patches of a video. Its patches lie on one grid; 2 x 2 of them in a pair of
frames are a token, which stays if any of its patches is gazed.

    qwen = GazeQwen(model, gaze)                     # a Qwen2-VL, Qwen2.5-VL or Qwen3-VL of transformers; model.Gaze
    keep = qwen.select(frames, gazing_ratio=0.1)     # frames (T, 3, H, W) uint8 -> (T / 2, h / s, w / s) bool
    tokens = qwen.tokens(frames, keep)               # of the kept places
    answer = qwen.generate(tokens, keep, input_ids)  # the prompt as of the whole video

Dimension key: T frames, h, w the tower's grid of patches, s = 2 patches along the side of a token, p pixels along the
side of a patch, L' tokens of the whole prompt, D width of the language model.
"""
import inspect
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange

from data import resize, to_model_pixels
from gazing import merged_groups
from lib.pixels import check_frames
from mllm import check_models

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# mean and standard deviation of the pixels that the first two kinds of towers take; of Qwen3-VL all are 0.5
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class GazeQwen:
    """model: of transformers, for conditional generation; gaze: model.Gaze. Frames are seen whole, and made
    smaller if they have more than max_pixels. Pairs of frames are encoded by themselves, so a long video can go chunk
    by chunk, an even number of frames in each but the last.

    Under transformers 5 Qwen2-VL and Qwen3-VL encode the kept patches only. Qwen2.5-VL, whose tower attends in windows,
    and transformers 4 encode all of them and then leave tokens out: the language model's work shrinks, the tower's not.
    """

    def __init__(self, model, gaze, max_pixels=448 * 448):
        check_models(model, gaze, KINDS)
        self.model = model
        self.gaze = gaze
        self.kind = model.config.model_type
        vision = model.config.vision_config
        self.patch_size = vision.patch_size
        self.merge = vision.spatial_merge_size  # s
        self.max_pixels = max_pixels

    def resize(self, frames):
        """Frames (T, 3, H, W) uint8 at a size of whole tokens, and as whole pairs: of an odd number the last one comes
        twice. ValueError: other frames."""
        check_frames(frames)
        if len(frames) % 2:
            frames = torch.cat([frames, frames[-1:]])
        side = self.patch_size * self.merge
        height, width = frames.shape[-2:]
        shrink = min(1.0, (self.max_pixels / (height * width)) ** 0.5)
        size = []
        for length in (height, width):
            size.append(side * max(1, round(length * shrink / side)))
        return resize(frames, tuple(size))

    @torch.no_grad()
    def select(self, frames, gazing_ratio=None, task_loss_requirement=None, batch_size=None):
        """Which tokens to keep: frames (T, 3, H, W) uint8 -> (T / 2, h / s, w / s) bool. batch_size: tiles at once in
        the gaze model; other arguments as in Gaze.generate."""
        frames = self.resize(frames).to(self.gaze.pos_embed.device)
        p = self.patch_size
        h = frames.shape[-2] // p
        w = frames.shape[-1] // p

        # the gaze model's scales on this grid
        finest = self.gaze.config.grids[-1][0]
        grids = []
        sides = []
        for n_patches, _ in self.gaze.config.grids:
            rows = max(1, h * n_patches // finest)
            columns = max(1, w * n_patches // finest)
            grids.append((rows, columns))
            sides.append((rows * p, columns * p))
        video = to_model_pixels(frames).unsqueeze(0)
        gazing = self.gaze.generate(video, gazing_ratio, task_loss_requirement, target_scales=sides,
                                    target_patch_size=p, chunk=True, batch_size=batch_size)
        return merged_groups(gazing["gazing_mask"], (h, w), self.merge, n_frames=2, grids=grids)[0]

    def grid(self, keep):
        """Of keep (T / 2, h / s, w / s): number of pairs, rows and columns of patches, (1, 3) as transformers wants."""
        n_pairs, rows, columns = keep.shape
        return torch.tensor([[n_pairs, rows * self.merge, columns * self.merge]], device=keep.device)

    def patches(self, frames):
        """frames (T, 3, H, W) uint8 -> rows of pixels (T / 2 · h · w, 3 · 2 · p · p) as the tower takes them, token by
        token."""
        frames = self.resize(frames).to(self.model.device)
        pixels = frames / 127.5 - 1
        if self.kind != "qwen3_vl":
            mean = torch.tensor(MEAN, device=frames.device).view(3, 1, 1)
            std = torch.tensor(STD, device=frames.device).view(3, 1, 1)
            pixels = (frames / 255 - mean) / std
        p = self.patch_size
        return rearrange(pixels, "(t f) c (i y a) (j x b) -> (t i j y x) (c f a b)", f=2, y=self.merge, x=self.merge,
                         a=p, b=p)

    @torch.no_grad()
    def tokens(self, frames, keep):
        """frames (T, 3, H, W) uint8, keep of select() -> (kept, layers, D): what the language model gets, and, with
        Qwen3-VL, what it adds in its first layers. ValueError: a keep of other frames, or of nothing."""
        visual = self.model.model.visual
        rows = self.patches(frames).to(visual.dtype)
        keep = keep.to(rows.device)
        patches_kept = keep.flatten().repeat_interleave(self.merge ** 2)
        if len(patches_kept) != len(rows) or not keep.any():
            raise ValueError(f"these frames have {len(rows)} patches, keep has {int(keep.sum())} of "
                             f"{len(patches_kept)}: give the keep that select() returns for them")

        settings = self.kept_patches(keep, patches_kept)
        if settings:
            rows = rows[patches_kept]
        out = visual(rows, grid_thw=self.grid(keep), **settings)

        # transformers 4 returns a tensor, with a list of further ones for Qwen3-VL
        if isinstance(out, torch.Tensor):
            layers = [out]
        elif isinstance(out, tuple):
            layers = [out[0], *out[1]]
        else:
            layers = [out.pooler_output, *getattr(out, "deepstack_features", [])]
        tokens = torch.stack(layers, dim=1)
        return tokens if settings else tokens[keep.flatten()]

    def kept_patches(self, keep, patches_kept):
        """Arguments with which the tower encodes the kept tokens' patches only; none where it cannot."""
        try:
            from transformers import vision_utils
        except ImportError:
            return {}
        if self.kind == "qwen2_5_vl":
            return {}

        # their places in the picture, and where each pair of frames ends; one without any is no sequence
        grid = self.grid(keep)
        position = vision_utils.get_vision_position_ids(grid, self.merge)
        n_kept = keep.flatten(1).sum(dim=1) * self.merge ** 2
        ends = F.pad(n_kept.cumsum(0), (1, 0)).unique()
        settings = {"position_ids": position[patches_kept], "cu_seqlens": ends.int()}
        if self.kind == "qwen3_vl":
            visual = self.model.model.visual
            index, weight = vision_utils.get_vision_interpolation_indices_and_weights(
                grid, visual.num_grid_per_side, visual.interpolation_mode, visual.interpolation_align_corners,
                self.merge)
            settings["interp_indices"] = index[patches_kept]
            settings["interp_weights"] = weight[patches_kept]
        return settings

    @torch.no_grad()
    def generate(self, tokens, keep, input_ids, seconds=None, **settings):
        """input_ids (1, L'): the prompt as of the whole video, in it a video token for each place of keep (T / 2,
        h / s, w / s), of which those that are kept get the tokens; they stay at the positions that they have in the
        whole video. seconds: between pairs of frames, for Qwen2.5-VL. settings: those of transformers' generate.
        Returns ids (1, new tokens). ValueError: a prompt of another shape."""
        inner = self.model.model
        is_video = input_ids == self.model.config.video_token_id
        n_video = int(is_video.sum())
        if len(input_ids) != 1 or n_video != keep.numel():
            raise ValueError(f"expected one prompt with the {keep.numel()} tokens of the video, got {len(input_ids)} "
                             f"with {n_video} video tokens: chat.to_qwen_ids writes it")
        n_kept = int(keep.sum())
        if len(tokens) != n_kept:
            raise ValueError(f"{len(tokens)} tokens for the {n_kept} places of keep: give what tokens() returns for it")

        # positions of all tokens, of which the kept ones keep theirs; which arguments there are depends on the version
        keep = keep.to(input_ids.device)
        arguments = {"video_grid_thw": self.grid(keep)}
        known = inspect.signature(inner.get_rope_index).parameters
        if "mm_token_type_ids" in known:
            arguments["mm_token_type_ids"] = is_video.int() * 2
        if "second_per_grid_ts" in known and seconds is not None:
            arguments["second_per_grid_ts"] = torch.tensor([seconds], device=input_ids.device)
        positions, _ = inner.get_rope_index(input_ids=input_ids, **arguments)      # (3, 1, L')
        stays = ~is_video[0]
        stays[is_video[0]] = keep.flatten()

        embed_text = inner.get_input_embeddings()
        embeds = embed_text(input_ids[:, stays])
        is_video = is_video[:, stays]
        embeds[is_video] = tokens[:, 0].to(embeds.dtype)
        mask = torch.ones_like(is_video, dtype=torch.long)

        # generate() would count positions and forget the layers: a hook puts them in
        first = {"position_ids": positions[:, :, stays]}
        _, *layers = tokens.unbind(1)
        if layers:
            first["visual_pos_masks"] = is_video
            first["deepstack_visual_embeds"] = layers
        hook = inner.language_model.register_forward_pre_hook(partial(put_positions, first), with_kwargs=True)
        try:
            return self.model.generate(inputs_embeds=embeds, attention_mask=mask, **settings)
        finally:
            hook.remove()


def put_positions(first, module, args, kwargs):
    """Forward hook: the prompt's pass gets what `first` holds; later tokens count on from its highest position."""
    prompt = first["position_ids"]
    n_new = kwargs["inputs_embeds"].shape[1]
    cache = kwargs.get("cache", kwargs.get("past_key_values"))  # as it is called in transformers 5.24, and before
    n_past = 0 if cache is None else cache.get_seq_length()
    if n_past == 0:
        assert n_new == prompt.shape[2], "generate(use_cache=False) is not known here"
        return args, kwargs | first
    next_position = prompt.max() + 1
    position = next_position + n_past - prompt.shape[2]
    positions = position + torch.arange(n_new, device=prompt.device)
    kwargs["position_ids"] = positions.expand(3, 1, -1)
    return args, kwargs
