# UniGaze-H: ViT-H/14, 631 M parameters. For unigaze.train and for unigaze.train_mae; put a protocol's file behind it.
image_size = 224
patch_size = 14
hidden_size = 1280
depth = 32
num_heads = 16
