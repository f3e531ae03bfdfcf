# Train on MPIIFaceGaze, test on all other sets.
protocol = "cross_mpii"
