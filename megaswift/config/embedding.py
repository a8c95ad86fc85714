"""Settings: embeddings, and what they are compared with."""

from dataclasses import dataclass
from typing import Any

from megaswift.config.field import setting

LOSS_TYPES = ("infonce", "cosine_similarity", "contrastive")  # the default first


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """How the texts of a row are pulled together and apart (`megaswift sft --task_type embedding`)."""

    infonce_temperature: float = setting(0.1, "infonce: similarities are divided by it")
    infonce_use_batch: bool = setting(
        True, "infonce: the texts of all other rows of the global batch are negatives too"
    )
    infonce_hard_negatives: int = setting(
        0, "infonce: negatives (negative_messages) that every row has; more are left out, fewer take turns"
    )
    mrl_dims: dict[str, Any] = setting(
        {},
        'train the first so many numbers of embeddings to be embeddings by themselves, each loss with a weight: {"64": 0.5, "768": 1}',
    )
