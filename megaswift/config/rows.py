"""How many texts a row of the data holds; they stay together in every batch and in every pack."""

from megaswift.config import embedding, reranker
from megaswift.config.reranker import TASK_TYPES
from megaswift.config.run import RunConfig

PAIRED = ("dpo", "orpo", "simpo", "cpo", "rm")  # whose rows hold two answers to one prompt


def texts_of_a_row(run: RunConfig) -> int:
    """Return the documents that a row becomes, at most."""
    if run.model.task_type == "embedding":  # a text, its positive, and its negatives
        return 2 + (run.embedding.infonce_hard_negatives if embedding_loss_of(run) == "infonce" else 0)
    if run.model.task_type in TASK_TYPES:  # groups of a positive and its negatives
        return run.reranker.max_positive_samples * (1 + run.reranker.max_negative_samples)
    return 2 if run.task == "rlhf" and run.preference.rlhf_type in PAIRED else 1


def embedding_loss_of(run: RunConfig) -> str:
    """Return the loss of embeddings."""
    return run.preference.loss_type or embedding.LOSS_TYPES[0]


def reranker_loss_of(run: RunConfig) -> str:
    """Return the loss of a reranker's scores."""
    return run.preference.loss_type or reranker.LOSS_TYPES[0]
