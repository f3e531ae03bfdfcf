# Train on Gaze360 (both parts), test on all other sets.
protocol = "cross_gaze360"
