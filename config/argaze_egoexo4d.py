# ARGaze on EgoExo4D as published (the first model, "template"): all defaults of train.py but these.
dataset = "egoexo4d"
out_dir = "out/argaze_egoexo4d"
epochs = 15
batch_size = 12
augment = False
val_split = "val"
val_every = 1964        # an epoch of 23,571 clips
save_every = 1964
