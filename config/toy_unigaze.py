# Gaze on one toy set, tested on the other: 48 px, 0.2 M parameters. Half a minute of one CPU core.
data = "data/toy_unigaze"   # python -m unigaze.make_data
protocol = "toy"
out_dir = "out/toy/unigaze"
n_workers = 0
image_size = 48
patch_size = 12
hidden_size = 64
depth = 4
num_heads = 4
epochs = 6
lr = 1e-3                   # narrow models want more
valid_epoch = 6
log_every = 100
