# Train and test within GazeCapture. Older than the paper's protocols.
protocol = "within_gazecapture"
