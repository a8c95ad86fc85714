"""Settings: rerankers, and the documents that a query is learnt with."""

from dataclasses import dataclass

from megaswift.config.field import setting

LOSS_TYPES = ("pointwise_reranker", "listwise_reranker")  # the default first
TASK_TYPES = ("reranker", "generative_reranker")


@dataclass(frozen=True, kw_only=True)
class RerankerConfig:
    """Which documents of a row are scored, and how scores are compared (`--task_type reranker` and `generative_reranker`).

    Names are those of ms-swift's environment variables.
    """

    max_positive_samples: int = setting(
        1, "positive_messages of a row that are learnt from, each in a group of its own; more are left out"
    )
    max_negative_samples: int = setting(
        7,
        "negative_messages in the group of each positive; where a row has more, its next group takes the next ones",
    )
    listwise_reranker_temperature: float = setting(1.0, "listwise_reranker: scores are divided by it")
    listwise_reranker_min_group_size: int = setting(
        2, "listwise_reranker: rows with fewer documents in a group are reported and left out"
    )
    generative_reranker_positive_token: str = setting("yes", "the answer that says a document is relevant")
    generative_reranker_negative_token: str = setting("no", "the answer that says it is not")
