# Greedy labels for the small model.
root = "data/small"
videomae = "out/small/videomae"
out = "out/small/gazing_labels.json"
n_frames = 8
ratio_min = 0.04        # 27 of 672 patches
ratio_max = 0.25        # 168
