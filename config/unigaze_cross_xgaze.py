# Train on ETH-XGaze (3 of 18 cameras of each frame), test on all other sets.
protocol = "cross_xgaze"
