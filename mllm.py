"""A language model of transformers that reads only the gazed patches of a video.

    model = AutoModelForImageTextToText.from_pretrained("llava-hf/llava-onevision-qwen2-0.5b-ov-hf")
    mllm = GazeMLLM(model, gaze)                                   # gaze: model.Gaze
    gazing = mllm.select(frames, gazing_ratio=0.1)                 # frames (T, 3, H, W) uint8
    tokens = mllm.tokens(frames, gazing)                           # of each frame (n_t, D)
    embeds = mllm.embed(tokens, input_ids)                         # (1, L, D): the prompt with the tokens in it
    answer = mllm.generate(embeds, max_new_tokens=64)              # ids of the new tokens

Frames are encoded one by one, so a long video goes chunk by chunk through select() and tokens(), as in chat.py: what is
kept of a chunk is what the language model reads. Three kinds of models, by how patches become tokens:

    one patch, one token      LLaVA, LLaVA-OneVision, PaliGemma with SigLIP: GazeMLLM, patches of several scales
    s x s patches, one token  SmolVLM, Idefics3: GazeMLLM; Qwen-VL: mllm_qwen.py. The union of all scales lies on the
                              model's one grid; a token stays if any of its patches is gazed
    nine gazes, one token     NVILA-HD-Video: gaze_for_nvila puts this gaze model into its processor, whose model then
                              does the rest; merge_neighbours is what its projector takes

These models (but NVILA) were trained on whole pictures of one scale and have never seen gazes: what that costs them is
for the user to measure. With every patch of the finest scale gazed, their output is that of the whole model.

Dimension key: T frames, V patch ids per frame, N gaze slots, n_t tokens of frame t, L tokens of the prompt, D width of
the language model, d width of the vision tower, h, w the tower's grid, s patches along the side of a token.
"""
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange

from data import resize_crop, to_model_pixels
from gazing import TENSORS, Grids, all_patches, join_clips, join_frames, marked_ids, merged_groups, split_frames
from siglip import GazeSigLIP

NVILA_RATIO = [0.2] + [0.06] * 15   # of the frames of a tile; recommended with its weights, as is the next
NVILA_REQUIREMENT = 0.6
NVILA_BATCH = 16                    # clips at once in the gaze model

# what GazeMLLM knows. FORK: for another model_type add it, and say in __init__ where its tower and projector are
KINDS = ("llava", "llava_onevision", "paligemma", "smolvlm", "idefics3")

# ----------------------------------------------------------------------------------------------------------------------
# models with a SigLIP tower


def check_models(model, gaze, kinds):
    """ValueError unless model is one of transformers, of these kinds and for generation, and gaze a model.Gaze."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in kinds or not hasattr(model, "generate"):
        raise ValueError(f"the language model is a {type(model).__name__} of model_type={kind}, expected one with "
                         f"generate(), of {', '.join(kinds)}. GazeMLLM is for models with a SigLIP, "
                         "mllm_qwen.GazeQwen for Qwen-VL, gaze_for_nvila for NVILA")
    if not hasattr(getattr(gaze, "config", None), "scale_list"):
        raise ValueError(f"the gaze model is a {type(gaze).__name__}, expected a model.Gaze: Gaze.from_pretrained(…)")


class GazeMLLM:
    """model: of transformers, for conditional generation; gaze: model.Gaze. The model's tower goes on as GazeSigLIP,
    its projector and language model as they are; weights are shared, not copied. The tower looks at the gaze model's
    scales, in proportion to its own image size. ValueError: a model of another kind."""

    def __init__(self, model, gaze):
        check_models(model, gaze, KINDS)
        self.model = model
        self.gaze = gaze
        self.config = model.config
        self.kind = model.config.model_type
        inner = model.model
        self.merge = 1                      # s
        layer = -1
        norm = True

        if self.kind in ("smolvlm", "idefics3"):
            tower = inner.vision_model
            self.project = inner.connector.modality_projection
            self.merge = self.config.scale_factor
        else:
            tower = inner.vision_tower
            self.project = inner.multi_modal_projector
        if "llava" in self.kind:
            layer = self.config.vision_feature_layer  # of hidden_states, which are without the last norm
            norm = False
        if not isinstance(layer, int):
            raise ValueError(f"vision_feature_layer={layer}: GazeMLLM reads one layer of the vision tower")

        # the tower's own image size is the finest scale
        size = self.config.vision_config.image_size
        self.patch_size = self.config.vision_config.patch_size
        self.scales = []
        for side in gaze.config.scale_list:
            self.scales.append(max(self.patch_size, side * size // gaze.config.image_size))
        tower_scales = self.scales if self.merge == 1 else self.scales[-1:]
        self.siglip = GazeSigLIP(tower, tower_scales, "bidirectional", frame_independent=True, layer=layer, norm=norm)
        self.size = size

    @torch.no_grad()
    def select(self, frames, gazing_ratio=None, task_loss_requirement=None, batch_size=None):
        """Choose patches: frames (T, 3, H, W) uint8, of which the centre square is seen -> a gazing for tokens().
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
        groups = merged_groups(gazing["gazing_mask"], self.siglip.grids[-1], self.merge)
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
    def embed(self, tokens, input_ids):
        """tokens: list over frames of (n_t, D). input_ids (1, L'): the prompt, with the model's image token once for
        the whole video or once for each frame. Returns (1, L, D), the tokens in its place. ValueError: not one prompt,
        or another number of image tokens."""
        if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or len(input_ids) != 1:
            raise ValueError("input_ids must be the ids (1, L) of one prompt: "
                             "processor.tokenizer(text, return_tensors='pt').input_ids")
        ids = input_ids[0]
        places = (ids == self.config.image_token_id).nonzero().flatten().tolist()
        if len(places) == 1:
            tokens = [torch.cat(tokens)]
        if len(places) != len(tokens):
            raise ValueError(f"the prompt holds the image token (id {self.config.image_token_id}) {len(places)} times: "
                             f"write it once for the video, or once for each of its {len(tokens)} frames, and "
                             "use processor.tokenizer, since processor() repeats it")

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


def gaze_at_groups(groups, merge):
    """The gazing of all patches of whole groups, group by group: groups (B, T, h, w) bool, of merge x merge patches of
    one grid; within a group row by row. Ids count the patches of that grid."""
    h, w = groups.shape[2:]
    V = h * w * merge ** 2
    patches = torch.arange(V, device=groups.device)
    patches = rearrange(patches, "(i y j x) -> (i j) (y x)", i=h, y=merge, j=w, x=merge)

    frames = []
    for t, kept in enumerate(groups.flatten(2).unbind(1)):
        order, padded = marked_ids(kept)
        ids = patches[order].flatten(1) + V * t
        frames.append((ids, padded.repeat_interleave(merge ** 2, dim=1)))
    return join_frames(frames)


def put_embeds(embeds, module, args, kwargs):
    """Forward hook: the prompt's embeddings for the first pass; later ones are of one token."""
    if kwargs["inputs_embeds"].shape == embeds.shape:
        kwargs = kwargs | {"inputs_embeds": embeds}
    return args, kwargs


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
    the recommended ones. Its model then merges and reads what is gazed. batch_size: clips at once in the gaze model."""
    if not hasattr(processor, "target_scales"):
        raise ValueError(f"a {type(processor).__name__} has no target_scales: this is for NVILA-HD-Video's processor")

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
            # few at a time: 16 frames of a tile at the target size are large, and four clips of the gaze model
            for units in video.split(max(1, batch_size // 4)):
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
