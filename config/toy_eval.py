# Evaluation of the toy run.
n_frames = 4
ratios = "0.251,0.15,0.4"   # the first is the one that the models were trained for
alpha = "12,3"              # the first frame gets most, the rest follows what changes
greedy_clips = 32           # at the other ratios
