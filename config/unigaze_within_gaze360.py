# Train and test within Gaze360. Older than the paper's protocols.
protocol = "within_gaze360"
