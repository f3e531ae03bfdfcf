"""A language model of transformers that reads only the gazed patches of a video.

    model = AutoModelForImageTextToText.from_pretrained("llava-hf/llava-onevision-qwen2-0.5b-ov-hf")
    mllm = GazeMLLM(model, gaze)                                   # gaze: model.Gaze
    gazing = mllm.select(frames, gazing_ratio=0.1)                 # frames (T, 3, H, W) uint8
    embeds = mllm.embed(frames, gazing, input_ids)                 # (1, L, D): the prompt with the gazed patches in it
    answer = mllm.generate(embeds, max_new_tokens=64)              # ids of the new tokens

Three kinds of models, by how patches become tokens:
    one patch, one token      LLaVA, LLaVA-OneVision, PaliGemma with SigLIP: GazeMLLM, patches of several scales
    s x s patches, one token  SmolVLM, Idefics3: GazeMLLM; Qwen2-VL, Qwen2.5-VL: generate_qwen. The union of all scales
                              lies on the model's one grid; a token stays if any of its patches is gazed
    nine gazes, one token     NVILA-HD-Video: gaze_for_nvila puts this gaze model into its processor, whose model then
                              does the rest; merge_neighbours is what its projector takes

These models (but NVILA) were trained on whole pictures of one scale and have never seen gazes: what that costs them is
for the user to measure. With every patch of the finest scale gazed, their output is that of the whole model.

Dimension key: T frames, V patch ids per frame, N gaze slots, n_t tokens of frame t, L tokens of the prompt, D width of
the language model, d width of the vision tower, h, w the tower's grid.
"""
import inspect
from functools import partial

import torch
import torch.nn.functional as F

from data import resize_crop, to_model_pixels
from gazing import TENSORS, Grids, all_patches, gaze_at_groups, join_clips, merged_groups, split_frames
from siglip import GazeSigLIP

NVILA_RATIO = [0.2] + [0.06] * 15   # of the frames of a tile; recommended with its weights, as is the next
NVILA_REQUIREMENT = 0.6
NVILA_BATCH = 16                    # tiles at once in the gaze model

# ----------------------------------------------------------------------------------------------------------------------
# models with a SigLIP tower


class GazeMLLM:
    """model: of transformers, for conditional generation; gaze: model.Gaze. The model's tower goes on as GazeSigLIP,
    its projector and language model as they are; weights are shared, not copied.

    scales: at which the tower looks at a frame, as many as the gaze model has; None: the gaze model's, in proportion to
    the tower's image size. ValueError: a model of another kind."""

    def __init__(self, model, gaze, scales=None):
        self.model = model
        self.gaze = gaze
        self.config = model.config
        self.kind = model.config.model_type
        inner = model.model
        self.merge = 1                      # s: patches along the side of a token
        layer = -1
        norm = True

        if self.kind in ("smolvlm", "idefics3"):
            tower = inner.vision_model
            self.project = inner.connector.modality_projection
            self.merge = self.config.scale_factor
        elif self.kind in ("llava", "llava_onevision", "paligemma"):
            tower = inner.vision_tower
            self.project = inner.multi_modal_projector
        else:
            raise ValueError(f"model_type={self.kind}: GazeMLLM knows llava, llava_onevision, paligemma, smolvlm and "
                             "idefics3; for qwen2_vl and qwen2_5_vl call generate_qwen, for NVILA gaze_for_nvila; for "
                             "another one say here where its tower and projector are")
        if "llava" in self.kind:
            layer = self.config.vision_feature_layer  # of hidden_states, which are without the last norm
            norm = False
        network = getattr(tower, "vision_model", tower)
        if not hasattr(network, "post_layernorm") or type(layer) is not int:
            raise ValueError(f"the vision tower, a {type(tower).__name__}, is no SigLIP whose one layer is read")

        # the tower's own image size is the finest scale
        tower_config = self.config.vision_config
        size = tower_config.image_size
        p = tower_config.patch_size
        if scales is None:
            scales = []
            for side in gaze.config.scale_list:
                scales.append(max(p, side * size // gaze.config.image_size))
        self.scales = scales
        self.tower_scales = scales if self.merge == 1 else scales[-1:]
        self.siglip = GazeSigLIP(tower, self.tower_scales, "bidirectional", frame_independent=True, layer=layer,
                                 norm=norm)
        self.size = self.siglip.scales[-1][0]
        self.patch_size = p

    @torch.no_grad()
    def select(self, frames, gazing_ratio=None, task_loss_requirement=None, batch_size=None):
        """Choose patches: frames (T, 3, H, W) uint8, of which the centre square is seen -> a gazing for embed().
        batch_size: tiles at once in the gaze model, which bounds memory; other arguments as in Gaze.generate."""
        device = self.gaze.pos_embed.device
        clip = resize_crop(frames, self.size)
        video = to_model_pixels(clip.to(device)).unsqueeze(0)
        gazing = self.gaze.generate(video, gazing_ratio, task_loss_requirement, target_scales=self.scales,
                                    target_patch_size=self.patch_size, chunk=True, batch_size=batch_size)
        return self.whole_tokens(gazing)

    def whole_tokens(self, gazing):
        """The gazing of all patches of the tokens in which something is gazed. Where a patch is a token: the same."""
        if self.merge == 1:
            return gazing
        grids = GridsOf(self.scales, self.patch_size).grids
        groups = merged_groups(gazing["gazing_mask"], self.siglip.grids[-1], self.merge, grids=grids)
        return gaze_at_groups(groups, self.merge)

    @torch.no_grad()
    def tokens(self, frames, gazing):
        """frames (T, 3, H, W) uint8 and their gazing, of one clip -> list over frames of (n_t, D): what the language
        model gets in the place of each picture."""
        weight = self.siglip.network.embeddings.patch_embedding.weight
        clip = resize_crop(frames, self.size).to(weight.device)
        features = self.siglip(clip.unsqueeze(0) / 127.5 - 1, gazing)[0]            # (N, d)

        embed_text = self.model.get_input_embeddings()
        counts = gazing["num_gazing_each_frame"].tolist()
        padded = gazing["if_padded_gazing"][0].split(counts)
        tokens = []
        for frame, is_padded in zip(features.split(counts), padded, strict=True):
            frame = frame[~is_padded]
            frame = frame.unflatten(0, (-1, self.merge ** 2)).flatten(1)            # s·s patches side by side
            frame = self.project(frame)

            # transformers 4 multiplies all embeddings by this again, 5 the text's beforehand
            if self.kind == "paligemma" and not hasattr(embed_text, "embed_scale"):
                frame = frame / self.config.text_config.hidden_size ** 0.5
            if self.kind == "llava_onevision":
                newline = self.model.model.image_newline
                frame = torch.cat([frame, newline.unsqueeze(0)])                    # ends every picture
            tokens.append(frame)
        return tokens

    @torch.no_grad()
    def embed(self, frames, gazing, input_ids):
        """input_ids (1, L'): the prompt, with the model's image token once for the whole video or once for each frame.
        Returns (1, L, D), the gazed patches' tokens in its place. ValueError: another number of image tokens."""
        tokens = self.tokens(frames, gazing)
        ids = input_ids[0]
        places = (ids == self.config.image_token_id).nonzero().flatten().tolist()
        if len(places) == 1:
            tokens = [torch.cat(tokens)]
        if len(places) != len(tokens):
            raise ValueError(f"the prompt holds the image token (id {self.config.image_token_id}) {len(places)} times: "
                             f"write it once for the video, or once for each of its {len(tokens)} frames")

        embed_text = self.model.get_input_embeddings()
        parts = []
        start = 0
        for place, frame in zip(places, tokens, strict=True):
            parts += [embed_text(ids[start:place]), frame]
            start = place + 1
        parts.append(embed_text(ids[start:]))
        return torch.cat([part.to(tokens[0].dtype) for part in parts]).unsqueeze(0)

    @torch.no_grad()
    def generate(self, embeds, **settings):
        """embeds (1, L, D) -> ids (1, new tokens). settings: those of transformers' generate."""
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        if self.kind != "paligemma":
            return self.model.generate(inputs_embeds=embeds, attention_mask=mask, **settings)

        # PaliGemma's generate() takes ids only: a hook puts the embeddings in. Type 0: the prompt sees all of itself
        ids = torch.zeros_like(mask)
        language_model = self.model.model.language_model
        hook = language_model.register_forward_pre_hook(partial(put_embeds, embeds), with_kwargs=True)
        try:
            answer = self.model.generate(input_ids=ids, token_type_ids=ids, attention_mask=mask, **settings)
        finally:
            hook.remove()
        return answer[:, ids.shape[1]:]


def put_embeds(embeds, module, args, kwargs):
    """Forward hook: the prompt's embeddings for the first pass; later ones are of one token."""
    if kwargs["inputs_embeds"].shape == embeds.shape:
        kwargs = kwargs | {"inputs_embeds": embeds}
    return args, kwargs


# ----------------------------------------------------------------------------------------------------------------------
# Qwen-VL: patches lie on one grid, merge x merge of them and frames in pairs are a token


@torch.no_grad()
def select_qwen(gaze, frames, model, grid_thw, gazing_ratio=None, task_loss_requirement=None, batch_size=None):
    """Which tokens of a Qwen-VL's video to keep. frames (T, 3, H, W) uint8, whole; grid_thw: the processor's
    video_grid_thw[0], (T / 2, h, w). Returns (T / 2, h / 2, w / 2) bool."""
    vision = model.config.vision_config
    h, w = int(grid_thw[1]), int(grid_thw[2])
    finest = gaze.config.grids[-1][0]
    grids = []
    for side, _ in gaze.config.grids:
        grids.append((max(1, h * side // finest), max(1, w * side // finest)))

    p = gaze.config.patch_size
    video = to_model_pixels(frames.to(gaze.pos_embed.device)).unsqueeze(0)
    gazing = gaze.generate(video, gazing_ratio, task_loss_requirement, chunk=True, batch_size=batch_size,
                           target_scales=[(rows * p, columns * p) for rows, columns in grids], target_patch_size=p)
    return merged_groups(gazing["gazing_mask"], (h, w), vision.spatial_merge_size, vision.temporal_patch_size, grids)[0]


@torch.no_grad()
def generate_qwen(model, inputs, keep, **settings):
    """Generate with some tokens of a video only. inputs: of the processor, for one prompt with one video; keep: of
    select_qwen. The kept tokens stay at the positions that they have in the whole video.

    Qwen2-VL under transformers 5 encodes the kept patches only. Qwen2.5-VL, whose tower attends in windows, and
    transformers 4 encode all of them and then leave tokens out: the language model's work shrinks, the tower's not.
    Returns ids (1, new tokens). ValueError: a prompt of another shape."""
    inner = model.model
    ids = inputs["input_ids"]
    grid_thw = inputs["video_grid_thw"]
    is_video = ids == model.config.video_token_id
    keep = keep.flatten().to(ids.device)
    if len(ids) != 1 or len(grid_thw) != 1 or int(is_video.sum()) != len(keep):
        raise ValueError(f"expected one prompt with the {len(keep)} tokens of one video, got {tuple(ids.shape)} ids "
                         f"with {int(is_video.sum())} video tokens of {len(grid_thw)} videos")

    # positions of all tokens, of which the kept ones keep theirs; which arguments there are depends on the version
    known = inspect.signature(inner.get_rope_index).parameters
    arguments = {name: value for name, value in inputs.items() if name in known}
    if "mm_token_type_ids" in known:
        arguments["mm_token_type_ids"] = is_video.int() * 2
    positions, _ = inner.get_rope_index(**arguments)                              # (3, 1, L)
    stays = ~is_video[0]
    stays[is_video[0]] = keep

    features = encode_qwen(model, inputs["pixel_values_videos"], grid_thw, keep)  # (kept, D)
    embeds = inner.get_input_embeddings()(ids)[:, stays]
    embeds[:, is_video[0][stays]] = features.to(embeds.dtype)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=ids.device)

    # generate() would count positions: a hook puts in those of the prompt, then the ones behind its highest
    prompt = positions[:, :, stays]
    hook = inner.language_model.register_forward_pre_hook(partial(put_positions, prompt), with_kwargs=True)
    try:
        return model.generate(inputs_embeds=embeds, attention_mask=mask, **settings)
    finally:
        hook.remove()


def put_positions(prompt, module, args, kwargs):
    """Forward hook: prompt (3, 1, L) for the first pass; a later pass of one token is told where it would count."""
    n_prompt = prompt.shape[2]
    n_new = kwargs["inputs_embeds"].shape[1]
    cache = kwargs.get("cache", kwargs.get("past_key_values"))  # as it is called in transformers 5.24, and before
    n_past = 0 if cache is None else cache.get_seq_length()
    if n_past == 0:
        positions = prompt
        if n_new > n_prompt:  # without a cache every pass begins at the start
            behind = prompt.max() + 1 + torch.arange(n_new - n_prompt, device=prompt.device)
            positions = torch.cat([prompt, behind.expand(3, 1, -1)], dim=2)
    else:
        first = prompt.max() + 1 + n_past - n_prompt
        positions = (first + torch.arange(n_new, device=prompt.device)).expand(3, 1, -1)
    return args, kwargs | {"position_ids": positions}


def encode_qwen(model, pixels, grid_thw, keep):
    """pixels (T / 2 · h · w, …), the processor's rows of patches, group by group -> features (kept, D)."""
    visual = model.model.visual
    merge = model.config.vision_config.spatial_merge_size
    pixels = pixels.to(visual.dtype)
    try:
        from transformers.vision_utils import get_vision_position_ids
    except ImportError:
        get_vision_position_ids = None
    if get_vision_position_ids is None or model.config.model_type != "qwen2_vl":
        out = visual(pixels, grid_thw=grid_thw)
        out = out if isinstance(out, torch.Tensor) else out.pooler_output
        return out[keep]

    # the rows of kept groups, their places in the picture, and how many there are in each pair of frames
    rows = keep.repeat_interleave(merge ** 2)
    places = get_vision_position_ids(grid_thw, merge)[rows]
    counts = rows.view(int(grid_thw[0, 0]), -1).sum(dim=1)
    ends = F.pad(counts.cumsum(0), (1, 0)).unique().int()                         # a pair without any has no sequence
    return visual(pixels[rows], grid_thw=grid_thw, position_ids=places, cu_seqlens=ends).pooler_output


# ----------------------------------------------------------------------------------------------------------------------
# NVILA-HD-Video


def merge_neighbours(features, gazing, n_merged=9):
    """What NVILA's projector takes: features (B, N, d) of GazeSigLIP with layer=-2, norm=False -> list over clips of
    lists over frames of (ceil(n_t / 9), 9 · d). Nine neighbours in the order of their ids lie side by side; the last
    token of a frame is filled up with zeros. n_t: real gazes."""
    counts = gazing["num_gazing_each_frame"].tolist()
    by_frame = features.split(counts, dim=1)
    merged = []
    for clip in range(len(features)):
        tokens = []
        for (ids, padded), frame in zip(split_frames(gazing), by_frame, strict=True):
            real = ~padded[clip]
            order = ids[clip, real].argsort()
            x = frame[clip, real][order]
            missing = -len(x) % n_merged
            x = F.pad(x, (0, 0, 0, missing))
            tokens.append(x.unflatten(0, (-1, n_merged)).flatten(1))
        merged.append(tokens)
    return merged


def gaze_for_nvila(processor, gaze, batch_size=NVILA_BATCH):
    """Let NVILA-HD-Video's processor choose patches with this gaze model, by its hook _get_gazing_info_from_videos.

    Scales, patch size, ratios and requirements are the processor's attributes, as from_pretrained sets them; without,
    the recommended ones. Its model then merges and reads what is gazed. batch_size: tiles at once in the gaze model."""
    def hook(videos_inputs):
        info = {}
        recommended = {"tile": (NVILA_RATIO, NVILA_REQUIREMENT), "thumbnail": (1, None)}
        for part, (ratio, requirement) in recommended.items():
            ratio = getattr(processor, f"gazing_ratio_{part}", ratio)
            requirement = getattr(processor, f"task_loss_requirement_{part}", requirement)

            # the gaze model's pixels; the processor leaves them out where everything is gazed
            name = f"pixel_values_videos_{part}s"
            videos = videos_inputs.get(f"{name}_autogaze")
            if videos is None:
                videos = videos_inputs.get(name)
            if videos is not None:
                info |= gaze_at_units(gaze, videos, f"{part}s", ratio, requirement, processor, batch_size)
        return info

    processor._get_gazing_info_from_videos = hook
    return processor


def gaze_at_units(gaze, videos, part, ratio, requirement, processor, batch_size):
    """videos: list of (tiles, T, 3, H, W), model pixels -> the lists of one part, a tensor of each for every video:
    gazing_pos (tiles, N), if_padded_gazing (tiles, N), num_gazing_each_frame (tiles, T)."""
    sides = [int(side) for side in processor.target_scales]
    p = processor.target_patch_size
    encoder = GridsOf(sides, p)
    n_units = [len(video) for video in videos]
    n_frames = videos[0].shape[1]

    if ratio == 1 and requirement is None:
        gazing = all_patches(encoder, sum(n_units), n_frames)
    else:
        parts = []
        for video in videos:
            for units in video.split(batch_size):  # few at a time: a tile at the target size is large
                units = units.to(gaze.pos_embed)
                parts.append(gaze.generate(units, ratio, requirement, target_scales=sides, target_patch_size=p,
                                           batch_size=batch_size))
        gazing = join_clips(parts, encoder.num_ids)

    # every tile with its own row of counts, and all of it video by video
    gazing["num_gazing_each_frame"] = gazing["num_gazing_each_frame"].expand(sum(n_units), -1)
    info = {}
    for name in TENSORS:
        info[f"{name}_{part}"] = list(gazing[name].split(n_units))
    return info


class GridsOf(Grids):
    """Patch ids of an encoder with these scales: 56+112+224+448 px with patches of 16 have 9 + 49 + 196 + 784 = 1,038,
    56+112+196+392 with 14 have 16 + 64 + 196 + 784 = 1,060."""

    def __init__(self, sides, patch_size):
        self.scales = "+".join(str(side) for side in sides)
        self.patch_size = patch_size
