"""A tiny ARGaze with random weights, for tests that need any model."""
import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from argaze.model import ARGaze, ARGazeConfig


def tiny_argaze():
    """32 px, 4 x 4 patches, heat maps of 16 x 16."""
    torch.manual_seed(0)
    encoder = DINOv3ViTModel(DINOv3ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                                             intermediate_size=32, patch_size=8, image_size=32, num_register_tokens=4))
    return ARGaze(ARGazeConfig(image_size=32, patch_size=8, decoder_layers=1, decoder_heads=2, decoder_ffn=32,
                               head_widths="8+8", heatmap_size=16), encoder)
