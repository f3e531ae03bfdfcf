# Train on 60 subjects of ETH-XGaze, test on the other 20. Older than the paper's protocols.
protocol = "within_xgaze"
