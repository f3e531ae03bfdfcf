"""Gazes in front of language models: against the whole models of transformers, tiny and random."""
import inspect
import os
import types
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny_gaze

import chat
from gazing import all_patches, check_gazing, from_heatmap, merged_groups
from mllm import GazeMLLM, GridsOf, gaze_at_groups, gaze_for_nvila, merge_neighbours
from mllm_qwen import GazeQwen
from model import GazeConfig

close = torch.testing.assert_close
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, vocab_size=100)
VISION = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32,
              patch_size=8)
IMAGE = 99
KINDS = ["llava", "llava_onevision", "paligemma", "smolvlm", "idefics3"]


def tiny_model(kind):
    """A model of transformers and how many tokens it makes of a whole picture."""
    import transformers as tf
    torch.manual_seed(0)
    vision = VISION | dict(model_type="siglip_vision_model", vision_use_head=False)
    ends = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    llama = TEXT | ends | dict(model_type="llama")
    if kind == "llava":
        config = tf.LlavaConfig(vision_config=vision, text_config=llama, image_token_index=IMAGE,
                                vision_feature_layer=-2, vision_feature_select_strategy="full")
        model, n_tokens = tf.LlavaForConditionalGeneration(config), 16
    elif kind == "llava_onevision":
        config = tf.LlavaOnevisionConfig(vision_config=vision, text_config=llama, image_token_index=IMAGE,
                                         video_token_index=98, vision_feature_layer=-1,
                                         vision_feature_select_strategy="full", image_grid_pinpoints=[[32, 32]])
        model, n_tokens = tf.LlavaOnevisionForConditionalGeneration(config), 17
    elif kind == "paligemma":
        gemma = TEXT | ends | dict(model_type="gemma")
        config = tf.PaliGemmaConfig(vision_config=vision | dict(projection_dim=32), text_config=gemma,
                                    image_token_index=IMAGE, projection_dim=32, hidden_size=32)
        model, n_tokens = tf.PaliGemmaForConditionalGeneration(config), 16
    else:
        name = "SmolVLM" if kind == "smolvlm" else "Idefics3"
        config = getattr(tf, f"{name}Config")(vision_config=VISION, text_config=llama, image_token_id=IMAGE,
                                              scale_factor=2, pad_token_id=0)
        model, n_tokens = getattr(tf, f"{name}ForConditionalGeneration")(config), 4
    return model.eval().requires_grad_(False), n_tokens


def tiny_frames(n_frames=2, side=32):
    return torch.randint(256, (n_frames, 3, side, side), generator=torch.Generator().manual_seed(1)).byte()


def whole(mllm, n_frames):
    """The gazing of everything at the finest scale."""
    return all_patches(mllm.siglip, 1, n_frames, scale=-1) if mllm.merge == 1 else gaze_at_groups(
        torch.ones(1, n_frames, 2, 2, dtype=torch.bool), 2)


def picture_inputs(kind, frames):
    """What the whole model takes."""
    pixels = frames / 127.5 - 1
    if kind in ("smolvlm", "idefics3"):
        return {"pixel_values": pixels[None]}
    if kind == "llava_onevision":
        sizes = torch.tensor([[32, 32]] * len(frames))
        return {"pixel_values": pixels[:, None], "image_sizes": sizes, "batch_num_images": torch.tensor([len(frames)])}
    return {"pixel_values": pixels}


def right_positions(kind, model):
    """transformers 4.57 looks up i / n · (1 - 1e-6) among the boundaries i / n, so in float32 (bfloat16 rounds the
    factor away) SmolVLM and Idefics3 give patches 0, 1, 2, 3 of a row the positions 0, 0, 1, 2."""
    if kind in ("smolvlm", "idefics3") and transformers.__version__ < "5":
        table = model.model.vision_model.embeddings.position_embedding
        table.register_forward_pre_hook(lambda _, args: (torch.arange(args[0].shape[1]).expand_as(args[0]),))


@pytest.fixture(scope="module", params=KINDS)
def tiny(request):
    model, n_tokens = tiny_model(request.param)
    return request.param, model, n_tokens


def prompt(n_tokens, n_frames=2):
    picture = [IMAGE] * n_tokens
    ids = [1, 5, *picture, 6]
    for _ in range(n_frames - 1):
        ids += [*picture, 7]
    return torch.tensor([ids + [8, 9]])


# ----------------------------------------------------------------------------------------------------------------------
# models with a SigLIP tower


def test_with_everything_gazed_the_answer_is_the_whole_models(tiny):
    kind, model, n_tokens = tiny
    frames = tiny_frames()
    right_positions(kind, model)
    mllm = GazeMLLM(model, tiny_gaze())
    ids = prompt(n_tokens)
    types = {"token_type_ids": torch.zeros_like(ids)} if kind == "paligemma" else {}
    inputs = picture_inputs(kind, frames) | types
    expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits

    embeds = mllm.embed(mllm.tokens(frames, whole(mllm, 2)), prompt(1))
    assert embeds.shape[1] == ids.shape[1]
    logits = model(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **types).logits
    close(logits, expected, rtol=1e-4, atol=1e-5)

    settings = dict(max_new_tokens=4, do_sample=False)
    answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, **settings)
    assert mllm.generate(embeds, **settings).tolist() == answer[:, ids.shape[1]:].tolist()


def test_fewer_gazes_are_fewer_tokens(tiny):
    kind, model, n_tokens = tiny
    frames = tiny_frames()
    mllm = GazeMLLM(model, tiny_gaze())
    gazing = mllm.select(frames, gazing_ratio=[0.05, 0.15])
    tokens = mllm.tokens(frames, gazing)
    newline = int(kind == "llava_onevision")
    assert all(0 < len(frame) < n_tokens for frame in tokens)
    if mllm.merge == 1:
        assert [len(frame) - newline for frame in tokens] == [1, 3]
    embeds = mllm.embed(tokens, prompt(1))
    assert embeds.shape == (1, prompt(1).shape[1] - 2 + sum(len(frame) for frame in tokens), 32)
    assert mllm.generate(embeds, max_new_tokens=2, min_new_tokens=2, do_sample=False).shape == (1, 2)


def test_one_image_token_stands_for_the_whole_video():
    mllm = GazeMLLM(tiny_model("llava")[0], tiny_gaze())
    frames = tiny_frames(6)  # more than the gaze model's clips have
    gazing = mllm.select(frames, gazing_ratio=0.2)
    tokens = mllm.tokens(frames, gazing)
    embeds = mllm.embed(tokens, torch.tensor([[1, IMAGE, 5]]))
    assert embeds.shape[1] == 2 + int(gazing["num_gazing_each_frame"].sum())
    with pytest.raises(ValueError, match="2 times: write it once for the video, or once for each of its 6 frames"):
        mllm.embed(tokens, torch.tensor([[1, IMAGE, IMAGE, 5]]))


def test_chunks_of_a_video_give_the_tokens_of_the_whole():
    mllm = GazeMLLM(tiny_model("llava")[0], tiny_gaze())
    frames = tiny_frames(6)
    tokens = mllm.tokens(frames, mllm.select(frames, gazing_ratio=0.2))
    parts = []
    for chunk in frames.split(4):  # as long as the gaze model's clips
        parts += mllm.tokens(chunk, mllm.select(chunk, gazing_ratio=0.2))
    close(tokens, parts, rtol=1e-5, atol=1e-6)


def test_other_models_are_refused_by_name():
    model, gaze = tiny_model("llava")[0], tiny_gaze()
    with pytest.raises(ValueError, match="model_type=qwen2_vl.*GazeQwen"):
        GazeMLLM(tiny_qwen("qwen2_vl"), gaze)
    with pytest.raises(ValueError, match="model_type=llava, expected one .*qwen3_vl"):
        GazeQwen(model, gaze)
    with pytest.raises(ValueError, match="the language model is a LlavaModel .* expected one with generate"):
        GazeMLLM(model.model, gaze)
    with pytest.raises(ValueError, match="the language model is a str"):
        GazeMLLM("llava-hf/some", gaze)
    with pytest.raises(ValueError, match="the gaze model is a LlavaForConditionalGeneration, expected a model.Gaze"):
        GazeMLLM(model, model)


def test_a_clip_tower_is_refused():
    vision = VISION | dict(model_type="clip_vision_model")
    config = transformers.LlavaConfig(vision_config=vision, text_config=TEXT | dict(model_type="llama"))
    with pytest.raises(ValueError, match="CLIP.*expected a SiglipVisionModel"):
        GazeMLLM(transformers.LlavaForConditionalGeneration(config), tiny_gaze())


@pytest.mark.parametrize("frames, found", [
    (tiny_frames() / 255, r"torch.float32 \(2, 3, 32, 32\)"), (tiny_frames()[0], r"torch.uint8 \(3, 32, 32\)"),
    (tiny_frames().movedim(1, 3), r"torch.uint8 \(2, 32, 32, 3\)"), (list(tiny_frames()), "a list"),
    (tiny_frames()[:0], r"torch.uint8 \(0, 3, 32, 32\)"), (tiny_frames().numpy(), "a ndarray")])
def test_frames_of_another_form_are_refused(frames, found):
    for mllm in (GazeMLLM(tiny_model("llava")[0], tiny_gaze()), GazeQwen(tiny_qwen("qwen2_vl"), tiny_gaze())):
        with pytest.raises(ValueError, match=f"frames are {found}.*expected a tensor .T, 3, H, W. of torch.uint8"):
            mllm.select(frames, 0.2)


def test_a_prompt_is_one_row_of_ids():
    mllm = GazeMLLM(tiny_model("llava")[0], tiny_gaze())
    tokens = [torch.zeros(3, 32)]
    for ids in (torch.tensor([1, IMAGE]), torch.tensor([[1, IMAGE]] * 2), [[1, IMAGE]]):
        with pytest.raises(ValueError, match="input_ids must be the ids .1, L. of one prompt"):
            mllm.embed(tokens, ids)


def test_another_processor_than_nvilas_is_refused():
    with pytest.raises(ValueError, match="a SimpleNamespace has no target_scales.*NVILA"):
        gaze_for_nvila(types.SimpleNamespace(), tiny_gaze())


# ----------------------------------------------------------------------------------------------------------------------
# Qwen-VL

VIDEO = 98


def tiny_qwen(kind):
    import transformers as tf
    torch.manual_seed(0)
    text = TEXT | dict(rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
                       rope_scaling={"rope_type": "default", "type": "mrope", "mrope_section": [1, 1, 2]},
                       pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ids = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=96, vision_end_token_id=97)
    if kind == "qwen2_vl":
        vision = dict(depth=2, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=8)
        model = tf.Qwen2VLForConditionalGeneration(tf.Qwen2VLConfig(vision_config=vision, text_config=text, **ids))
    elif kind == "qwen3_vl":
        vision = dict(depth=3, hidden_size=16, out_hidden_size=32, num_heads=2, intermediate_size=32, patch_size=8,
                      num_position_embeddings=16, deepstack_visual_indexes=[0, 1])
        model = tf.Qwen3VLForConditionalGeneration(tf.Qwen3VLConfig(vision_config=vision, text_config=text, **ids))
    else:
        vision = dict(depth=2, hidden_size=16, out_hidden_size=32, num_heads=2, intermediate_size=32, patch_size=8,
                      window_size=32, fullatt_block_indexes=[1])
        model = tf.Qwen2_5_VLForConditionalGeneration(tf.Qwen2_5_VLConfig(vision_config=vision, text_config=text,
                                                                          **ids))
    return model.eval().requires_grad_(False)


def qwen_frames():
    return tiny_frames(4, 48)[..., :32, :]


def qwen_prompt(kind):
    """Of two pairs of frames with 2 x 3 tokens each; Qwen3-VL wants text between them."""
    between = [97, 10, 96] if kind == "qwen3_vl" else []
    return torch.tensor([[1, 5, 96] + [VIDEO] * 6 + between + [VIDEO] * 6 + [97, 6, 7]])


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def qwen(request):
    return GazeQwen(tiny_qwen(request.param), tiny_gaze())


def whole_answer(qwen, ids, **settings):
    grid = qwen.grid(torch.ones(2, 2, 3))
    rows = qwen.patches(qwen_frames())
    types = {}
    if "mm_token_type_ids" in inspect.signature(qwen.model.model.get_rope_index).parameters:
        types["mm_token_type_ids"] = (ids == VIDEO).int() * 2
    return qwen.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values_videos=rows,
                               video_grid_thw=grid, **types, **settings)[:, ids.shape[1]:]


def test_qwen_with_all_tokens_kept_answers_as_the_whole_model(qwen):
    settings = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    ids = qwen_prompt(qwen.kind)
    keep = torch.ones(2, 2, 3, dtype=torch.bool)
    answer = qwen.generate(qwen.tokens(qwen_frames(), keep), keep, ids, **settings)
    assert answer.tolist() == whole_answer(qwen, ids, **settings).tolist()


def test_kept_qwen_tokens_keep_their_positions(qwen):
    """Seen by the language model: positions of the whole video, and behind it those that its length asks for."""
    seen = []
    hook = qwen.model.model.language_model.rotary_emb.register_forward_pre_hook(lambda _, args, kw: seen.append(
        kw.get("position_ids", args[1] if len(args) > 1 else None)), with_kwargs=True)
    keep = torch.zeros(2, 2, 3, dtype=torch.bool)
    keep[0, 1, 2] = keep[0, 0, 1] = True
    tokens = qwen.tokens(qwen_frames(), keep)
    answer = qwen.generate(tokens, keep, qwen_prompt(qwen.kind), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    hook.remove()
    assert len(tokens) == 2 and answer.shape == (1, 3)
    places = seen[0][:, 0]
    n_text = int((qwen_prompt(qwen.kind) != VIDEO).sum())
    assert places.shape == (3, n_text + 2)
    assert places[:, :3].tolist() == [[0, 1, 2]] * 3
    assert places[1:, 3:5].tolist() == [[3 + 0, 3 + 1], [3 + 1, 3 + 2]]  # rows, columns
    after = int(seen[1][0, 0, 0])
    assert after == int(places.max()) + 1 and int(seen[2][0, 0, 0]) == after + 1


def test_qwen_pairs_of_frames_are_encoded_by_themselves(qwen):
    """So chunks give the tokens of the whole video, kept or not."""
    frames = qwen_frames()
    keep = torch.zeros(2, 2, 3, dtype=torch.bool)
    keep[1] = True
    every = qwen.tokens(frames, torch.ones_like(keep))
    close(qwen.tokens(frames, keep), every[6:], rtol=1e-4, atol=1e-5)
    close(qwen.tokens(frames[2:], keep[1:]), every[6:], rtol=1e-4, atol=1e-5)
    close(qwen.tokens(frames[:3], keep[:2])[:, 0], qwen.tokens(frames[[0, 1, 2, 2]], keep)[:, 0])


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 encodes all patches")
def test_qwen_towers_get_the_kept_patches_only(kind):
    qwen = GazeQwen(tiny_qwen(kind), tiny_gaze())
    sizes = []
    qwen.model.model.visual.patch_embed.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    keep = torch.zeros(2, 2, 3, dtype=torch.bool)
    keep[1, 1] = True
    qwen.tokens(qwen_frames(), keep)
    assert sizes == [3 * 4]


def test_qwen_patches_are_those_of_its_image_processor():
    from transformers import Qwen2VLImageProcessor
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Processor
    except ImportError:
        Processor = Qwen2VLImageProcessor
    frames = qwen_frames()[:1]
    qwen = GazeQwen(tiny_qwen("qwen2_vl"), tiny_gaze())
    processor = Processor(patch_size=8, merge_size=2, temporal_patch_size=2, do_resize=False)
    expected = processor(frames[0].permute(1, 2, 0).numpy(), return_tensors="pt")
    assert qwen.grid(torch.ones(1, 2, 3)).tolist() == expected["image_grid_thw"].tolist() == [[1, 4, 6]]
    close(qwen.patches(frames), expected["pixel_values"], rtol=1e-4, atol=1e-4)


def test_gazes_choose_qwen_tokens(qwen):
    frames = qwen_frames()
    keep = qwen.select(frames, gazing_ratio=0.05)
    assert keep.shape == (2, 2, 3) and 0 < keep.sum() < 12
    tokens = qwen.tokens(frames, keep)
    with pytest.raises(ValueError, match="the 6 tokens of the video, got .* with 12 video tokens"):
        qwen.generate(tokens, keep[:1], qwen_prompt(qwen.kind))
    with pytest.raises(ValueError, match="1 tokens for the .* places of keep"):
        qwen.generate(tokens[:1], torch.ones_like(keep), qwen_prompt(qwen.kind))
    with pytest.raises(ValueError, match="these frames have 24 patches, keep has .* of 48"):
        qwen.tokens(frames[:2], keep)
    with pytest.raises(ValueError, match="keep has 0 of 48"):
        qwen.tokens(frames, torch.zeros_like(keep))


def test_large_frames_are_made_smaller_for_qwen():
    qwen = GazeQwen(tiny_qwen("qwen2_vl"), tiny_gaze(), max_pixels=32 * 64)
    assert qwen.resize(torch.zeros(2, 3, 100, 200, dtype=torch.uint8)).shape == (2, 3, 32, 64)
    assert qwen.resize(torch.zeros(2, 3, 4, 30, dtype=torch.uint8)).shape == (2, 3, 16, 32)


def test_the_last_frame_of_an_odd_number_comes_twice():
    qwen = GazeQwen(tiny_qwen("qwen2_vl"), tiny_gaze())
    frames = qwen_frames()[:3]
    close(qwen.resize(frames), frames[[0, 1, 2, 2]])
    assert qwen.select(frames, 0.1).shape == (2, 2, 3)


# ----------------------------------------------------------------------------------------------------------------------
# NVILA-HD-Video

LAYOUTS = [([56, 112, 224, 448], 16, 1038), ([56, 112, 196, 392], 14, 1060)]


def tiny_nvila(sides, patch_size, max_num_frames=2, num_multi_token_pred=3, **settings):
    """What is read of the processor; and a gaze model of the published scales."""
    processor = types.SimpleNamespace(target_scales=sides, target_patch_size=patch_size, **settings)
    gaze = tiny_gaze(scales="32+64+112+224", patch_size=16, hidden_size=16, num_layers=1, num_heads=2,
                     max_num_frames=max_num_frames, num_multi_token_pred=num_multi_token_pred)
    return gaze_for_nvila(processor, gaze), gaze


@pytest.mark.parametrize("sides, patch_size, n_ids", LAYOUTS)
def test_nvila_layouts(sides, patch_size, n_ids):
    """Ids of two videos' tiles, each within its frame's, and the same number of slots for all of them."""
    processor, gaze = tiny_nvila(sides, patch_size, gazing_ratio_tile=[0.02, 0.01], task_loss_requirement_tile=None)
    assert GridsOf(sides, patch_size).num_ids == n_ids
    video = torch.randn(3, 2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    info = processor._get_gazing_info_from_videos({
        "pixel_values_videos_tiles_autogaze": [video[:2], video[2:]],
        "pixel_values_videos_thumbnails": [video[0, :, None], video[2, :1, None]]})
    assert sorted(info) == sorted(f"{name}_{part}" for part in ("tiles", "thumbnails") for name in (
        "gazing_pos", "if_padded_gazing", "num_gazing_each_frame"))

    # tiles: what the gaze model says of each by itself
    counts = info["num_gazing_each_frame_tiles"]
    assert [x.shape for x in counts] == [(2, 2), (1, 2)] and counts[0][1].equal(counts[1][0])
    alone = gaze.generate(video[2:], [0.02, 0.01], target_scales=sides, target_patch_size=patch_size)
    position = info["gazing_pos_tiles"][1]
    padded = info["if_padded_gazing_tiles"][1]
    real = alone["gazing_pos"][~alone["if_padded_gazing"]]
    assert position[~padded].tolist() == real.tolist()
    check_gazing({"gazing_pos": position, "if_padded_gazing": padded, "num_gazing_each_frame": counts[1][0]}, 1, 2)

    # a tile's mask, put together of 2 x 2, is seen in the ids of every scale
    masks = torch.cat(alone["gazing_mask"], dim=2)[0].flatten().nonzero().flatten()
    assert masks.tolist() == sorted(real.tolist()) and masks.max() < 2 * n_ids

    # thumbnails: everything, one frame each
    assert [x.tolist() for x in info["num_gazing_each_frame_thumbnails"]] == [[[n_ids]] * 2, [[n_ids]]]
    assert info["gazing_pos_thumbnails"][1].tolist() == [list(range(n_ids))]


@pytest.mark.parametrize("sides, patch_size, n_ids", LAYOUTS)
def test_nvila_tiles_of_16_frames(sides, patch_size, n_ids):
    """With the recommended settings, every field as the model takes it."""
    processor, gaze = tiny_nvila(sides, patch_size, max_num_frames=16, num_multi_token_pred=10)
    tiles = torch.randn(2, 16, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    thumbnails = tiles[0, :3, None]
    info = processor._get_gazing_info_from_videos({
        "pixel_values_videos_tiles_autogaze": [tiles], "pixel_values_videos_thumbnails": [thumbnails]})
    fields = {name: value[0] for name, value in info.items()}
    counts = fields["num_gazing_each_frame_tiles"]
    N = int(counts[0].sum())
    assert counts.shape == (2, 16) and counts.dtype == torch.int64 and counts[0].equal(counts[1])
    assert fields["gazing_pos_tiles"].shape == (2, N) and fields["gazing_pos_tiles"].dtype == torch.int64
    assert fields["if_padded_gazing_tiles"].shape == (2, N) and fields["if_padded_gazing_tiles"].dtype == torch.bool

    # ids count on from frame to frame
    frame = torch.arange(16).repeat_interleave(counts[0])
    real = ~fields["if_padded_gazing_tiles"]
    assert (fields["gazing_pos_tiles"] // n_ids == frame)[real].all()

    assert fields["gazing_pos_thumbnails"].shape == (3, n_ids)
    assert fields["num_gazing_each_frame_thumbnails"].tolist() == [[n_ids]] * 3
    assert not fields["if_padded_gazing_thumbnails"].any()


def test_nine_neighbours_in_id_order_are_one_token():
    config = GazeConfig(scales="16+32", patch_size=8)
    heat = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    gazing = from_heatmap(heat, [20, 9, 4], config)
    gazing["if_padded_gazing"][1, 5] = True
    order = torch.cat([torch.randperm(n) + first for n, first in ((20, 0), (9, 20), (4, 29))])
    gazing["gazing_pos"] = gazing["gazing_pos"][:, order]
    features = gazing["gazing_pos"].float().unsqueeze(-1) + 1
    gazing["if_padded_gazing"] = gazing["if_padded_gazing"][:, order]
    tokens = merge_neighbours(features, gazing)
    assert [[len(frame) for frame in clip] for clip in tokens] == [[3, 1, 1], [3, 1, 1]]
    assert tokens[0][0].flatten()[:20].tolist() == list(range(1, 21)) and tokens[0][0][2, 2:].tolist() == [0] * 7
    assert int((tokens[1][0] > 0).sum()) == 19
    assert all(frame.flatten()[frame.flatten() > 0].diff().gt(0).all() for clip in tokens for frame in clip)


# ----------------------------------------------------------------------------------------------------------------------
# chat.py


def test_chat_shows_the_flow_without_a_download(toy, capsys, monkeypatch):
    video = sorted((toy / "val").iterdir())[0]
    monkeypatch.setattr("sys.argv", ["chat.py", f"--video={video}", "--n_frames=3", "--max_new_tokens=4"])
    chat.main()
    out = capsys.readouterr().out
    assert "a random one of tiny size shows the flow. Its answer is noise" in out
    assert "3 frames: " in out and "tokens in place of 588" in out
    for part in ("decode", "select", "encode", "prefill", "generate"):
        assert f"{part} " in out


def tiny_tokenizer(folder):
    """One that knows bytes and Qwen's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:80]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, [], unk_token=alphabet[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    filler = [f"<{i}>" for i in range(len(alphabet), 96)]
    names = ["<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>"]  # ids 96 to 99
    tokenizer.add_special_tokens({"additional_special_tokens": filler + names})
    tokenizer.chat_template = "{% for m in messages %}user {{ m['content'] }}{% endfor %} assistant"
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_chat_with_a_qwen(kind, toy, tmp_path, capsys, monkeypatch):
    tiny_qwen(kind).save_pretrained(tmp_path / "qwen")
    tiny_tokenizer(tmp_path / "qwen")
    tiny_gaze().save_pretrained(tmp_path / "gaze")
    video = sorted((toy / "val").iterdir())[0]  # 32 x 48 pixels
    arguments = [f"--video={video}", f"--model={tmp_path / 'qwen'}", f"--ckpt={tmp_path / 'gaze'}", "--n_frames=3"]
    monkeypatch.setattr("sys.argv", ["chat.py", *arguments, "--max_new_tokens=4", "--gazing_ratio=0.05"])
    chat.main()
    out = capsys.readouterr().out
    assert "3 frames: " in out and "tokens in place of 12, the prompt has" in out
    assert "answer: " in out and "prefill " in out


def test_qwen3_reads_when_frames_were_seen(tmp_path):
    from transformers import AutoTokenizer
    tiny_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    keep = torch.ones(2, 1, 2, dtype=torch.bool)
    ids = chat.to_qwen_ids("A?", tiny_qwen("qwen3_vl"), tokenizer, keep, [0.0, 0.5, 1.0])
    marks = [i for i in ids[0].tolist() if i >= 96]
    assert marks == [96, VIDEO, VIDEO, 97] * 2
    ids = chat.to_qwen_ids("A?", tiny_qwen("qwen2_vl"), tokenizer, keep, [0.0, 0.5, 1.0])
    assert [i for i in ids[0].tolist() if i >= 96] == [96, *[VIDEO] * 4, 97]


@pytest.mark.parametrize("arguments, message", [
    ({}, "no video given"), (dict(video="x.mp4", model="a/b"), "no gaze model given.*non-commercial"),
    (dict(video="x.mp4", gazing_ratio=2.0), "gazing_ratio")])
def test_wrong_questions_are_answered(arguments, message):
    with pytest.raises(ValueError, match=message):
        chat.Config(**arguments).check()


# ----------------------------------------------------------------------------------------------------------------------
# helpers in gazing.py


def test_groups_with_one_gazed_patch_are_kept_whole():
    mask = torch.zeros(1, 4, 16)
    mask[0, 0, 5] = mask[0, 2, 11] = 1
    groups = merged_groups([mask], (4, 4), merge=2, n_frames=2)
    assert groups.tolist() == [[[[True, False], [False, False]], [[False, False], [False, True]]]]
    gazing = gaze_at_groups(groups, 2)
    assert gazing["gazing_pos"].tolist() == [[0, 1, 4, 5, 26, 27, 30, 31]]
    assert not gazing["if_padded_gazing"].any() and gazing["num_gazing_each_frame"].tolist() == [4, 4]
    with pytest.raises(ValueError, match="3 x 4 patches does not split into groups of 2 x 2"):
        merged_groups([torch.zeros(1, 1, 12)], (3, 4), grids=[(3, 4)])


def test_a_heat_map_is_gazed_at_coarse_to_fine():
    config = GazeConfig(scales="16+32", patch_size=8)
    flat = torch.ones(1, 1, 8, 8)
    assert from_heatmap(flat, 4, config)["gazing_pos"].tolist() == [[0, 1, 2, 3]]  # spread out: coarse patches

    peak = torch.zeros(2, 2, 8, 8)
    peak[0, :, 2, 6] = 1
    peak[1, :, 7, 0] = 1
    gazing = from_heatmap(peak, [1, 2], config)
    assert gazing["num_gazing_each_frame"].tolist() == [1, 2]
    fine = [4 + 1 * 4 + 3, 4 + 3 * 4 + 0]
    assert gazing["gazing_pos"][:, 0].tolist() == fine
    assert [(gazing["gazing_mask"][1][clip, 0] > 0).nonzero().item() + 4 for clip in range(2)] == fine
    check_gazing(gazing, 2, 2)

    everything = from_heatmap(torch.rand(1, 1, 4, 4), config.num_ids, config)
    assert everything["gazing_pos"].tolist() == [list(range(config.num_ids))]


@pytest.mark.parametrize("heat, budget, message", [
    (torch.ones(1, 4, 4), 3, "heat has shape"), (-torch.ones(1, 1, 4, 4), 3, "from 0 up"),
    (torch.full((1, 1, 4, 4), float("nan")), 3, "finite"), (torch.ones(1, 1, 4, 4), 0, "budget=0: give 1 to 20"),
    (torch.ones(1, 1, 4, 4), 0.1, "budget=0.1: give 1 to 20"),
    (torch.ones(1, 2, 4, 4), [3], "each of the 2 frames")])
def test_wrong_heat_maps_are_refused(heat, budget, message):
    with pytest.raises(ValueError, match=message):
        from_heatmap(heat, budget, GazeConfig(scales="16+32", patch_size=8))


# ----------------------------------------------------------------------------------------------------------------------
# docs/mllm.md


def test_the_example_for_your_own_model_runs():
    page = (Path(__file__).parent.parent / "docs" / "mllm.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) < 30
    found = {}
    exec(code, found)
    model = tiny_model("llava")[0]
    gaze = tiny_gaze()
    frames = tiny_frames()
    ids = torch.tensor([[1, IMAGE, 5]])
    embeds = found["embed_video"](model, gaze, frames, ids, ratio=0.2)
    mllm = GazeMLLM(model, gaze)
    close(embeds, mllm.embed(mllm.tokens(frames, mllm.select(frames, 0.2)), ids))
    assert model.generate(inputs_embeds=embeds, max_new_tokens=2, min_new_tokens=2).shape == (1, 2)


@pytest.mark.skipif("GAZE_CLIPS" not in os.environ, reason="torch.export takes seconds, as real clips do")
def test_the_exported_decoding_step_agrees_with_the_model():
    page = (Path(__file__).parent.parent / "docs" / "mllm.md").read_text()
    code = page.split("## Export")[1].split("```python\n")[1].split("```")[0]
    gaze = tiny_gaze(num_layers=1).eval().requires_grad_(False)
    ids = torch.tensor([[3, 7, 11]])
    shape = gaze.stream(gazing_ratio=0.1).cache.shape
    cache = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = {"torch": torch, "gaze": gaze, "ids": ids, "cache": cache}
    exec(code, found)
    with torch.no_grad():
        expected = found["Step"](gaze, 20)(ids, cache)
    close(found["program"].module()(ids, cache), expected)
    assert not expected[2].equal(cache)
