"""FP8 with one scale a block."""
