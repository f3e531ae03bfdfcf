# Train on GazeCapture (every 15th face of both parts), test on all other sets.
protocol = "cross_gazecapture"
