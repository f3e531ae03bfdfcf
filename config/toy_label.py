# Greedy labels for the toy run.
root = "data/toy"
videomae = "out/toy/videomae"
out = "out/toy/gazing_labels.json"
n_frames = 8
ratio_min = 0.08        # 13 of 168 patches
ratio_max = 0.2         # 33
ratio_rate = 5.0
