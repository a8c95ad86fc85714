"""The entropy of what an output layer predicts."""
