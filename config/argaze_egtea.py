# ARGaze on EGTEA Gaze+ as published (the first model, "template"): all defaults of train.py but these.
dataset = "egtea"
out_dir = "out/argaze_egtea"
epochs = 15
batch_size = 8
template_scale = 0.35   # the published scripts; the published YAML file says 0.25
val_every = 1038        # an epoch of 8,299 clips
save_every = 1038
# The released code also adds the entropy with weight 1, which rules the loss, and trains free-running from the start:
# --entropy_weight=1 --own_start=1 --own_end=1
