# Pre-training on the toy faces of both sets, without labels: 48 px, 0.6 M parameters. Two CPU cores, two minutes.
data = "data/toy_unigaze"   # python -m unigaze.make_data
protocol = "toy_mae"
out_dir = "out/toy/unigaze_mae"
n_workers = 0
image_size = 48
patch_size = 8
hidden_size = 96
depth = 4
num_heads = 4
decoder_hidden_size = 96
decoder_depth = 2
decoder_num_heads = 4
epochs = 40
warmup_epochs = 2
batch_size = 64
grad_accumulation_steps = 1
blr = 4e-3                  # narrow models want more
