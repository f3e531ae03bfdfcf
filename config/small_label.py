# Greedy labels for the small model.
root = "data/small"
videomae = "out/small/videomae"
out = "out/small/gazing_labels.json"
n_frames = 8
ratio_min = 0.06        # 10 of 168 patches
ratio_max = 0.35        # 59
ratio_rate = 5.0
exact = True            # 21 ids: few enough to try them all
