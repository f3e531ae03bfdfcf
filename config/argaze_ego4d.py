# ARGaze on Ego4D as published (the first model, "template"): all defaults of train.py but these.
dataset = "ego4d"
out_dir = "out/argaze_ego4d"
epochs = 15
batch_size = 8
label_sigma = 3.2       # the published -1 is OpenCV's choice for a window of 19
val_every = 1914        # an epoch of 15,310 clips
save_every = 1914
best = "l2"
