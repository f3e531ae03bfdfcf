# Train on EYEDIAP (screen and floating targets), test on all other sets.
protocol = "cross_eyediap"
