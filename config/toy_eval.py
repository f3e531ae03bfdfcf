# Evaluation of the toy run.
n_frames = 4
ratios = "0.18,0.12,0.27"   # the first is the one that the models were trained for
alpha = "7,3"               # the first frame gets most, the rest follows what changes
greedy_clips = 32           # at the other ratios
