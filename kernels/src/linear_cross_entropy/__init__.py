"""Output layer and cross-entropy in one, without the full logits."""
