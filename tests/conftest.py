"""Tiny models and videos that all tests share. Weights are enlarged, so that decisions have clear margins and a wrong
position or a wrong key shows: with fresh weights the decoder hardly looks at its past."""
import signal

import pytest
import torch

import make_data
from model import Gaze, GazeConfig
from videomae import VideoMAE, VideoMAEConfig

torch.set_num_threads(1)

SCALES = dict(scales="16+32", patch_size=8)  # 4 + 16 = 20 ids per frame


def tiny_gaze(seed=0, **config):
    defaults = SCALES | dict(hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64, num_multi_token_pred=3,
                             max_num_frames=4)
    torch.manual_seed(seed)
    gaze = Gaze(GazeConfig(**defaults | config))
    with torch.no_grad():
        for p in (gaze.pos_embed, *gaze.decoder.parameters()):
            if p.dim() > 1:
                p *= 10
        gaze.lm_head.weight *= 20
        gaze.task_loss_prediction_head.weight *= 20
    return gaze


def tiny_mae(seed=0, **config):
    defaults = SCALES | dict(image_size=32, max_num_frames=8, hidden_size=32, num_hidden_layers=2,
                             num_attention_heads=4, intermediate_size=64, decoder_hidden_size=24,
                             decoder_num_hidden_layers=2, decoder_num_attention_heads=4, decoder_intermediate_size=48,
                             initializer_range=0.2)
    torch.manual_seed(seed)
    return VideoMAE(VideoMAEConfig(**defaults | config))


def normal_video(n_clips, n_frames=4, side=32, seed=1):
    return torch.randn(n_clips, n_frames, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def sigterm_ends_the_tests():
    """Training scripts that ran in this process have taken the signal over."""
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture
def gaze():
    return tiny_gaze()


@pytest.fixture
def mae():
    return tiny_mae().freeze()


@pytest.fixture
def video():
    return normal_video(3)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Folder with 6 + 3 generated clips of 4 frames."""
    root = tmp_path_factory.mktemp("data") / "toy"
    make_data.toy(make_data.ToyConfig(out=str(root), n_train=6, n_val=3, n_frames=4, height=32, width=48, n_workers=1))
    return root


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    """Folders of tiny perceptual networks as transformers writes them; their weights are large enough to matter, their
    dropout would show in training mode. DINOv2: patch 14 of 56 px, so 32 px are 2 x 2 patches at resized positions."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, SiglipVisionConfig, SiglipVisionModel
    root, sizes = tmp_path_factory.mktemp("networks"), dict(hidden_size=16, num_hidden_layers=5, num_attention_heads=2)
    torch.manual_seed(0)
    made = {"dinov2_reg": Dinov2WithRegistersModel(Dinov2WithRegistersConfig(
        **sizes, image_size=56, patch_size=14, initializer_range=0.2, hidden_dropout_prob=0.5, drop_path_rate=0.5)),
        "siglip2": SiglipVisionModel(SiglipVisionConfig(
            **sizes, image_size=32, patch_size=8, intermediate_size=32, attention_dropout=0.5))}
    for name, network in made.items():
        network.save_pretrained(root / name)
    return {name: (root / name, network.eval()) for name, network in made.items()}
