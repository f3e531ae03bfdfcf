"""Weight files: the published formats, in and out, and the Hugging Face hub.

All models load and save through here; what they compute can be read without it.
"""
import contextlib
import json
import os
import shutil
import socket
import zipfile
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from lib.configurator import LARGEST_SIZE, MOST_LAYERS
from lib.text import read_json, written_whole

# Our module names against those in published files: prefixes, first match wins.
PUBLISHED_NAMES = (("encoder.", "gazing_model.vision_model."), ("pos_embed", "gazing_model.connector.pos_embed"),
                   ("decoder.", "gazing_model.gaze_decoder.model."), ("", "gazing_model.gaze_decoder."))
# Names since transformers 5, in memory and as it writes them, against those of transformers 4 and of published files.
NEW_NAMES = (("vit.layers.", "vit.encoder.layer."), ("decoder.decoder_encoder.layer.", "decoder.decoder_layers."),
             ("attention.q_proj.", "attention.attention.query."), ("attention.k_proj.", "attention.attention.key."),
             ("attention.v_proj.", "attention.attention.value."), ("attention.o_proj.", "attention.output.dense."),
             ("mlp.fc1.", "intermediate.dense."), ("mlp.fc2.", "output.dense."))
LICENCES = {"nvidia/AutoGaze": "NVIDIA licence, non-commercial research only",
            "bfshi/VideoMAE_AutoGaze": "NVIDIA licence, non-commercial research only",
            "facebook/vit-mae-large": "Apache-2.0", "facebook/dinov2-with-registers-base": "Apache-2.0",
            "google/siglip2-base-patch16-224": "Apache-2.0",
            "UniGaze/UniGaze-models": "MG-NC-RAI-2.0: non-commercial, also what is distilled from them",
            "facebook/dinov3-vits16-pretrain-lvd1689m": "DINOv3 licence; gated, accept it on its page and set HF_TOKEN"}

# ----------------------------------------------------------------------------------------------------------------------
# files


def read_tensors(file, part=None):
    """{name: tensor} of a state-dict file. The file is mapped, not read: memory holds what gets used, once. part: the
    entry that holds them where the file is a whole training checkpoint. ValueError: it is cut off or something else."""
    from safetensors.torch import load_file
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))  # old: no zip
        if isinstance(tensors, dict) and part in tensors:
            tensors = tensors[part]
        if not isinstance(tensors, dict) or not all(map(is_plain, tensors.values())):
            raise TypeError("it holds no dict of tensors, as a module's state_dict() is")
        return tensors
    except Exception as error:  # of many kinds: safetensors', pickle's, zip's
        raise ValueError(f"{file} is cut off or no file of weights: copy it again, or save a state_dict() there "
                         f"({type(error).__name__}: {error})") from error


def is_plain(value):
    """Whether a value from a file is a tensor with all its numbers: not sparse, not without data, and not one number
    spread over a shape that memory cannot hold."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def save_folder(folder, tensors, config):
    """Write config.json + model.safetensors, as transformers names them. A file appears whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    config_file = Path(folder) / "config.json"
    weight_file = Path(folder) / "model.safetensors"
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with written_whole(config_file) as new_config:
        new_config.write_text(json.dumps(config, indent=2) + "\n")
        with written_whole(weight_file) as new_weights:
            try:
                save_file(tensors, new_weights, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(str(error)) from error
            shutil.copymode(new_config, new_weights)    # safetensors' own is for the owner only


def build(make):
    """The module that make() makes. ValueError, before it takes memory, if this machine has less than it needs."""
    check_memory(make)
    return make()


def check_memory(make):
    """ValueError if this machine has less memory than the module that make() makes. It is made on the meta device."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        n_parameters = sum(p.numel() for p in make().parameters())
    needed = 4 * n_parameters / 2 ** 30
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 ** 30
    if needed > memory:
        raise ValueError(f"these sizes make a model of {n_parameters / 1e9:.0f} billion weights, {needed:.0f} GiB; "
                         f"this machine has {memory:.0f}")


def load_module(make, tensors, source, name=lambda n: n):
    """Return the module that make() makes, with `tensors` as its weights. What does not fit is found before the module
    takes memory: names and shapes are compared on the meta device first. The rest as in assign."""
    with torch.device("meta"):
        check_shapes(make(), tensors, source, name)
    module = make()
    assign(module, tensors, source, name)
    return module


def assign(module, tensors, source, name=lambda n: n):
    """Make `tensors` (name -> tensor) the weights of module, in float32; those that are already are not copied. `name`
    turns the module's names into theirs. ValueError names what is missing, unexpected, of another shape, or holds NaN
    or infinity."""
    check_shapes(module, tensors, source, name)
    check_finite(tensors, source)
    weights = {own: tensors[name(own)].float() for own in module.state_dict()}
    module.load_state_dict(weights, assign=True)


def check_shapes(module, tensors, source, name):
    weights = {name(own): p for own, p in module.state_dict().items()}
    wrong = [f"missing {n}" for n in weights if n not in tensors]
    wrong += [f"unexpected {n}" for n in tensors if n not in weights]
    for n, tensor in tensors.items():
        if n not in weights:
            continue
        shape = tuple(weights[n].shape)
        if tuple(tensor.shape) != shape:
            wrong.append(f"{n} is {tuple(tensor.shape)}, the config needs {shape}")
        elif weights[n].is_floating_point() and not tensor.is_floating_point():
            wrong.append(f"{n} is of type {tensor.dtype}")

    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"{source} do not fit: {'; '.join(wrong[:8])}{more}")


def check_finite(tensors, source):
    """ValueError names the first of `tensors` (name -> tensor) with NaN or infinity. Half a second for 1.3 GB."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        extremes = torch.stack(tensor.detach().aminmax())   # a quarter of the time of isfinite().all()
        if not extremes.isfinite().all():
            raise ValueError(f"{source}: {name} holds NaN or infinity, so the run that wrote it went wrong")


# ----------------------------------------------------------------------------------------------------------------------
# configs


def read_config(path, build):
    """build(the dict in a config.json). ValueError names the file."""
    config = read_json(path)
    try:
        if not isinstance(config, dict):
            raise ValueError(f"expected an object, found a {type(config).__name__}")
        return build(config)
    except KeyError as e:
        raise ValueError(f"{path}: not the config of this model, key {e} is missing") from e
    except (AttributeError, TypeError, ValueError) as e:
        raise ValueError(f"{path}: {e}") from e


# ----------------------------------------------------------------------------------------------------------------------
# networks of the transformers library


def load_network(network_class, config_class, name, called, **options):
    """The network of a folder or hub id `name`, with its weights. `called` is what errors call it.

    FileNotFoundError: it is not there, or out of reach. ValueError: it is damaged, or weights are missing or NaN."""
    config, offline = load_network_config(config_class, name, called)
    with network_errors(called):
        network, info = network_class.from_pretrained(str(name), config=config, output_loading_info=True,
                                                      local_files_only=offline, **options)
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise ValueError(f"{called} lacks {', '.join(missing[:8])}: it holds another network")
    check_finite(network.state_dict(), called)
    return network


def load_network_config(config_class, name, called):
    """(its config.json as a config of transformers, whether the hub is out of reach)."""
    offline = False
    if not Path(name).is_dir():
        if not is_hub_id(name):
            raise FileNotFoundError(f"{called}: neither a folder with config.json and model.safetensors nor a hub id")
        announce(name)
        offline = not hub_in_reach()
    with network_errors(called):
        config = config_class.from_pretrained(str(name), local_files_only=offline)
        check_network_config(config.to_dict())
    return config, offline


def network_config(settings, called):
    """The same of a dict, part of a config.json of ours."""
    from transformers import AutoConfig
    with network_errors(called):
        check_network_config(settings)
        return AutoConfig.for_model(**settings)


def check_network_config(settings):
    """ValueError names a size with which building would never end."""
    for key, value in settings.items():
        largest = MOST_LAYERS if "layers" in key else LARGEST_SIZE
        if isinstance(value, int) and value > largest:
            raise ValueError(f"{key}={value} must be at most {largest}")


@contextlib.contextmanager
def network_errors(called):
    """What transformers raises, of many kinds, becomes an error that names the network."""
    try:
        yield
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(f"{called}: neither a folder with all of it nor in reach on the hub: {reason}"
                                ) from error
    except Exception as error:
        raise ValueError(f"{called} is damaged, or no network that this version of transformers knows "
                         f"({type(error).__name__}: {error})") from error


# ----------------------------------------------------------------------------------------------------------------------
# names


def published_name(name):
    ours, theirs = next((o, t) for o, t in PUBLISHED_NAMES if name.startswith(o))
    return theirs + name[len(ours):]


def old_name(name):
    """A parameter's name as in transformers 4's ViTMAE, whichever version it comes from. The perceptual networks' names
    become comparable: those of the file and those of the installed version go through it alike."""
    for new, old in NEW_NAMES:
        name = name.replace(new, old)
    return name.removeprefix("vision_model.")  # SigLIP's


# ----------------------------------------------------------------------------------------------------------------------
# the gaze model's folders


def load_gaze(folder, make):
    """(make(settings): a GazeConfig, {published name: tensor}, where they come from) of a folder or a hub id."""
    folder = download(str(folder), ["model.safetensors"]) if is_hub_id(folder) else Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: not a folder written by save_pretrained")
    file = folder / "model.safetensors"
    config = read_config(folder / "config.json", lambda d: make(**gaze_settings(d)))
    return config, read_tensors(file), f"{file} and its config.json"


def save_gaze(folder, state, config):
    save_folder(folder, {published_name(n): t for n, t in state.items()}, gaze_config_json(config))


def gaze_settings(d):
    """Arguments of GazeConfig from a config.json as the published code writes it. KeyError: a key is missing."""
    network = section(d, "gaze_model_config")
    vision = section(network, "vision_model_config")
    decoder = section(network, "gaze_decoder_config")
    rope = section(decoder, "rope_scaling" if decoder.get("rope_scaling") else "rope_parameters")

    gazing_ratio = section(section(d, "gazing_ratio_config"), "fixed")["gazing_ratio"]
    requirement = None
    if d.get("has_task_loss_requirement_during_inference", False):
        requirement = section(section(d, "task_loss_requirement_config"), "fixed")["task_loss_requirement"]

    return dict(
        scales=str(d["scales"]),
        patch_size=vision["kernel_size"],
        max_num_frames=d["max_num_frames"],
        hidden_size=decoder["hidden_size"],
        num_layers=decoder["num_hidden_layers"],
        num_heads=decoder["num_attention_heads"],
        intermediate_size=decoder["intermediate_size"],
        num_conv_blocks=vision["depth"],
        num_multi_token_pred=decoder["num_multi_token_pred"],
        rms_norm_eps=decoder["rms_norm_eps"],
        initializer_range=decoder.get("initializer_range", 0.02),
        rope_theta=decoder.get("rope_theta") or rope["rope_theta"],
        rope_factor=rope["factor"],
        rope_low_freq_factor=rope["low_freq_factor"],
        rope_high_freq_factor=rope["high_freq_factor"],
        rope_original_length=rope["original_max_position_embeddings"],
        gazing_ratio=gazing_ratio,
        task_loss_requirement=requirement,
        reference_decoding=d.get("reference_decoding", True),
        reference_file=d)


def section(settings, key):
    """settings[key], which must hold keys of its own."""
    value = settings[key]
    if not isinstance(value, dict):
        raise ValueError(f"{key}={value!r} must be an object")
    return value


def gaze_config_json(c):
    """What config.json holds of a model.GazeConfig, in the published layout."""
    d = json.loads(json.dumps(c.reference_file))  # a deep copy: keys we do not use survive
    g = d.setdefault("gaze_model_config", {})
    g.update(input_img_size=c.image_size, num_vision_tokens_each_frame=c.num_ids)
    g.setdefault("vision_model_config", {}).update(
        hidden_dim=c.hidden_size, out_dim=c.hidden_size, depth=c.num_conv_blocks,
        kernel_size=c.patch_size, temporal_patch_size=1, trunk_temporal_kernel_size=3,
        trunk_spatial_kernel_size=3)
    g.setdefault("connector_config", {}).update(hidden_dim=c.hidden_size, num_tokens=c.ids_per_scale[-1])
    g.setdefault("gaze_decoder_config", {}).update(
        model_type="llama", hidden_size=c.hidden_size, num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads, num_key_value_heads=c.num_heads,
        head_dim=c.hidden_size // c.num_heads, intermediate_size=c.intermediate_size, hidden_act="silu",
        attention_bias=False, mlp_bias=False, attention_dropout=0.0, vocab_size=c.num_ids + 1,
        eos_token_id=c.num_ids, bos_token_id=None, max_position_embeddings=131072,
        num_multi_token_pred=c.num_multi_token_pred, rms_norm_eps=c.rms_norm_eps,
        initializer_range=c.initializer_range, rope_theta=c.rope_theta, tie_word_embeddings=False,
        rope_scaling=dict(rope_type="llama3", factor=c.rope_factor, low_freq_factor=c.rope_low_freq_factor,
                          high_freq_factor=c.rope_high_freq_factor,
                          original_max_position_embeddings=c.rope_original_length))
    for name, value in (("gazing_ratio", c.gazing_ratio), ("task_loss_requirement", c.task_loss_requirement)):
        section = d.setdefault(f"{name}_config", dict(sample_strategy_during_training="fixed"))
        section["sample_strategy_during_inference"] = "fixed"
        section["fixed"] = {name: 0.7 if value is None else value}
    d.setdefault("gazing_ratio_each_frame_config", dict(
        sample_strategy_during_training="uniform", sample_strategy_during_inference="uniform", uniform={}))
    d.setdefault("has_task_loss_requirement_during_training", False)
    d.update(architectures=["AutoGaze"], model_type="autogaze", scales=c.scales,
             max_num_frames=c.max_num_frames, num_vision_tokens_each_frame=c.num_ids,
             reference_decoding=c.reference_decoding,
             has_task_loss_requirement_during_inference=c.task_loss_requirement is not None)
    return d


# ----------------------------------------------------------------------------------------------------------------------
# the hub


def is_hub_id(path):
    """Whether path, which is no folder here, looks like owner/name on the Hugging Face hub. Ours write to out/."""
    first, path = str(path).split("/")[0], Path(path)
    return (not path.exists() and len(path.parts) == 2 and not path.parent.exists()
            and first not in ("out", "data", ".", "..", ""))


def announce(hub_id):
    licence = LICENCES.get(hub_id, "see its page there for the licence")
    print(f"fetching {hub_id} from huggingface.co, unless cached; licence: {licence}")


def download(hub_id, weights):
    """Fetch config.json and the first of the files `weights` that a hub repository has; their folder in the cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
    announce(hub_id)
    folder, error, offline = None, None, not hub_in_reach()
    for file in ("config.json", *weights):
        try:
            folder = Path(hf_hub_download(hub_id, file, local_files_only=offline)).parent
        except EntryNotFoundError as e:
            error, offline = e, offline or isinstance(e, LocalEntryNotFoundError)  # what is cached must do
            continue
        except Exception as e:  # whatever a wrong name or missing rights raise
            folder, error = None, e
            break
        if file in weights:
            break
    if folder is None:
        raise FileNotFoundError(f"{hub_id}: neither a folder here nor in reach on the hub ({type(error).__name__}): "
                                f"check the name, or fetch it where there is a network, with hf download {hub_id}")
    return folder


def hub_in_reach():
    """Whether the hub's server answers. Without this question a machine without network would wait for a minute."""
    from huggingface_hub import constants
    if constants.HF_HUB_OFFLINE:
        return False
    server = urlsplit(constants.ENDPOINT)
    if server.scheme in getproxies():
        return True  # the proxy knows
    try:
        socket.create_connection((server.hostname, server.port or 443), timeout=5).close()
    except OSError:
        return False
    return True
