"""Fine-tune any open model with Megatron-Core and get a Hugging Face checkpoint back."""

from megaswift.metadata.read import get_model_meta

__all__ = ["get_model_meta"]  # the one re-export: the public one-liner that needs neither torch nor transformers
