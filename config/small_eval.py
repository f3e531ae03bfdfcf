# Evaluation of the small model on held-out videos.
root = "data/small_eval"    # make_data.py cut config/small_data.py --out=data/small_eval --max_windows=10
n_frames = 8
ratios = "0.1,0.05,0.2"
max_clips = 173
greedy = False              # 10 s a clip: with --greedy=true --max_clips=24
