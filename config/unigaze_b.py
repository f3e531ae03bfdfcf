# UniGaze-B: ViT-B/16, 86 M parameters. For unigaze.train and for unigaze.train_mae; put a protocol's file behind it.
image_size = 224
patch_size = 16
hidden_size = 768
depth = 12
num_heads = 12
