# The published reconstructor: ViT-L encoder, 8-layer decoder, 224 px, 16 frames.
# Fine-tuned from facebook/vit-mae-large there.
# Sizes, ratio and split are the defaults of train_videomae.py; steps, batch and learning rate are ours (not published).
n_frames = 16
scales = "32+64+112+224"
ratio_min = 0.02
ratio_max = 0.2
alpha = "10,3"
crop = "random"
dtype = "bfloat16"
