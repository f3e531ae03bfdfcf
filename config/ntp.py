# NTP with the settings of the published training script.
n_frames = 16
scales = "32+64+112+224"
num_multi_token_pred = 10
epochs = 150
batch_size = 1024       # the paper says 256: config/ntp_paper.py
micro_batch = 32        # per process
optimizer = "adam"
lr = 5e-4
lr_end = 1e-5
lr_schedule = "linear"
val_ratio = 0.1
val_split = "dirichlet"
val_every = 3000
save_every = 500
seed = 666
