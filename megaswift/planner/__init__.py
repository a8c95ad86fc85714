"""Memory model, time model and the search over layouts; no torch."""
