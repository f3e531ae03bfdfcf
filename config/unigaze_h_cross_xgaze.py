# The released unigaze_h14_cross_X: H trained on ETH-XGaze, tested on the other sets. Give --init_from=MAE: from scratch
# this size does not generalise. Published: 4 GPUs, so a step has 128 faces.
image_size = 224
patch_size = 14
hidden_size = 1280
depth = 32
num_heads = 16
protocol = "cross_xgaze"
