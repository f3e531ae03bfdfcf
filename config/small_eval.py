# Evaluation of the small model on held-out videos.
root = "data/small_eval"
# make_data.py cut config/small_data.py --zoom=1 --hop=9 --max_windows=10 --out=data/small_eval
n_frames = 8
ratios = "0.2,0.1,0.05"
max_clips = 100
greedy_clips = 100
