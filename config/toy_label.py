# Greedy labels for the toy run.
root = "data/toy"
videomae = "out/toy/videomae"
out = "out/toy/gazing_labels.json"
n_frames = 8
ratio_min = 0.1         # 17 of 168 patches
ratio_max = 0.2         # 34
ratio_rate = 5.0
alpha = "18,3"          # nearly half of the budget goes to the first frame, the rest follows what changes
