"""Settings: which model, in which dtype."""

from dataclasses import dataclass

from megaswift.config.field import setting
from megaswift.config.reranker import TASK_TYPES

DTYPES = ("bfloat16", "float16", "float32")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model to train and how to read it."""

    model: str | None = setting(
        None, "hub id or folder with config.json and safetensors", aliases=("model_id_or_path",)
    )
    mcore_model: str | None = setting(
        None,
        "Megatron-Core checkpoint (torch_dist, saved under any layout) to read the weights from; config.json and tokenizer are those "
        "of --model, or lie beside it",
        aliases=("load",),
    )
    model_type: str | None = setting(None, "override the model_type of config.json")
    model_revision: str | None = setting(None, "branch, tag or commit on the hub", aliases=("revision",))
    use_hf: bool = setting(True, "look ids up on Hugging Face rather than ModelScope")
    hub_token: str | None = setting(None, "token for private repositories")
    torch_dtype: str | None = setting(
        None,
        "dtype of weights and activations; default: config.json's on a GPU, float32 on a CPU",
        choices=DTYPES,
        aliases=("dtype",),
    )
    trust_remote_code: bool = setting(False, "allow code from the model folder to run")
    task_type: str = setting(
        "causal_lm",
        "what the model gives: the next token, labels of the whole row (column label), its embedding, or how well a document fits "
        "a query: by a head of its own (reranker), or by how much likelier the answer yes is than no (generative_reranker)",
        choices=("causal_lm", "seq_cls", "embedding", *TASK_TYPES),
    )
    num_labels: int | None = setting(None, "seq_cls: how many labels there are, or numbers to predict")
    problem_type: str | None = setting(
        None,
        "seq_cls: one of the labels, any number of them, or numbers; default: regression for one label, else single_label_classification",
        choices=PROBLEM_TYPES,
    )
    attention_backend: str = setting(
        "auto",
        "core attention: auto lets Transformer Engine choose on a GPU and uses SDPA on a CPU",
        choices=("auto", "flash", "fused", "unfused", "local"),
    )
    new_special_tokens: list[str] = setting(
        [],
        "special tokens that the model gets: words, and files .txt of them, separated by blanks. Where their ids go beyond the rows of the "
        "embedding and the output layer, these get more, which begin as the mean of the others",
    )
    random_init: bool = setting(
        False, "start from random weights instead of reading safetensors (pre-training)"
    )

    @property
    def reads_safetensors(self) -> bool:
        """Whether the weights are those in the folder of the model."""
        return not self.random_init and self.mcore_model is None

    @property
    def problem(self) -> str:
        """The problem_type of a classifier."""
        return self.problem_type or ("regression" if self.num_labels == 1 else "single_label_classification")
