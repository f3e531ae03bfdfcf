# UniGaze-L: ViT-L/16, 303 M parameters. For unigaze.train and for unigaze.train_mae; put a protocol's file behind it.
image_size = 224
patch_size = 16
hidden_size = 1024
depth = 24
num_heads = 16
