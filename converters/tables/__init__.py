"""One table of weights for each family of models."""
