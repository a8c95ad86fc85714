"""Fine-tune any open model with Megatron-Core and get a Hugging Face checkpoint back."""

from typing import Any

__all__ = ["get_model_meta"]  # the one re-export: the public one-liner that needs neither torch nor transformers


def __getattr__(name: str) -> Any:
    """Import the re-export when it is asked for: every command imports this module, few read a model's facts."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megaswift.metadata.read import get_model_meta

    return get_model_meta
