# Greedy labels for the toy run.
root = "out/toy/data"  # make toy generates it
videomae = "out/toy/videomae"
out = "out/toy/gazing_labels.json"
n_frames = 4
ratio_min = 0.12        # 10 of 84 patches
ratio_max = 0.27        # 23
ratio_rate = 5.0
alpha = "7,3"           # the first frame gets most, the rest follows what changes
max_clips = 3000        # training clips that get labels
exact = True            # 21 ids: few enough to try them all
