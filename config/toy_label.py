# Greedy labels for the toy run: a fifth of a millisecond per candidate and core.
root = "data/toy"
videomae = "out/toy/videomae"
out = "out/toy/gazing_labels.json"
n_frames = 8
ratio_min = 0.05
ratio_max = 0.3
ratio_rate = 5.0
