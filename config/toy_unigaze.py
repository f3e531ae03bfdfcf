# Gaze on one toy set, tested on the other: 48 px, 0.45 M parameters. Two CPU cores, one minute.
data = "data/toy_unigaze"   # python -m unigaze.make_data
protocol = "toy"
out_dir = "out/toy/unigaze"
n_workers = 0
image_size = 48
patch_size = 8
hidden_size = 96
depth = 4
num_heads = 4
epochs = 12
lr = 1e-3                   # narrow models want more
log_every = 50
