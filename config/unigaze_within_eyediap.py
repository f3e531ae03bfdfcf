# Train on EYEDIAP's first eight persons, test on the others. Older than the paper's protocols.
protocol = "within_eyediap"
