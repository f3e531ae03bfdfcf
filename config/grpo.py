# GRPO with the settings of the published training script, which are the defaults but for these.
# Its 2 clips per process stop on an assertion there, not here.
temperature = 3.0       # the script sets it for NTP; the paper says 1 to 0.01: config/grpo_paper.py
temperature_end = 0.3
val_ratio = 0.75        # a cap: val_requirement ends a frame
val_split = "uniform"
val_requirement = 0.7
