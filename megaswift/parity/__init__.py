"""A model against transformers: the same weights, tokens and loss on both sides, in float32."""
