# Train on p00 to p09 of MPIIFaceGaze, test on p10 to p14. Older than the paper's protocols.
protocol = "within_mpii"
