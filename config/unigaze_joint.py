# Train on the training part of all five sets, validate and test on their other parts.
protocol = "joint"
