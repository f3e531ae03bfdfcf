# The published reconstructor: ViT-L encoder, 8-layer decoder, 224 px, 16 frames.
# Fine-tuned from facebook/vit-mae-large there.
# Sizes, ratio and split are the defaults of train_videomae.py; steps, batch and learning rate are ours (not published).
crop = "random"
dtype = "bfloat16"
