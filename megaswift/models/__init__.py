"""Build the Megatron-Core model: layer specs, norm, attention, LoRA."""
