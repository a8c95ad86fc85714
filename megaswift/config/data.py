"""Settings: data sets, templates, packing."""

from dataclasses import dataclass
from typing import Any

from megaswift.config.field import setting


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows to train on and how they become token ids."""

    dataset: list[str] = setting(
        [], "files, folders or ids; `path#500` samples 500 rows", aliases=("train_dataset",)
    )
    val_dataset: list[str] = setting([], "rows for the validation loss, same syntax")
    split_dataset_ratio: float = setting(0.0, "share of --dataset held back for validation")
    data_seed: int | None = setting(None, "seed of sampling, shuffling and splitting; default: --seed")
    dataset_shuffle: bool = setting(
        True, "shuffle the training rows anew each epoch", aliases=("train_dataloader_shuffle",)
    )
    interleave_prob: list[str] = setting(
        [],
        "one share for each --dataset: rows are drawn from the sets in these proportions, not set after set",
    )
    stopping_strategy: str = setting(
        "first_exhausted",
        "an interleaved epoch ends with the first set that runs out, or when all have and the others began again",
        choices=("first_exhausted", "all_exhausted"),
    )
    streaming: bool = setting(
        False, "read and tokenise rows while training instead of before; needs --train_iters"
    )
    shuffle_buffer_size: int = setting(
        1000, "with --streaming: rows that are read, shuffled and packed together"
    )
    prepared_dir: str | None = setting(
        None, "folder of `megaswift data --prepare`; the run's own sets are looked up there by what they hold"
    )
    columns: dict[str, Any] = setting({}, 'rename columns: {"old": "new"}')
    strict: bool = setting(False, "stop at the first bad row instead of reporting and counting it")
    system: str | None = setting(None, "system message (text or a .txt file) for rows that have none")
    use_chat_template: bool = setting(
        True, "render messages with the tokenizer's chat template; false: plain concatenation"
    )
    agent_template: str | None = setting(
        None,
        "format of tools and calls that the chat template must have, as it is what writes them; default: any",
        choices=("hermes", "qwen3_coder", "qwen3_5", "glm4_5"),
    )
    loss_scale: str = setting(
        "default",
        "which tokens carry loss: every assistant turn (default), the last one (last_round), or all tokens (all). Rules for their "
        "parts are added with +: ignore_empty_think and ignore_think_prefix leave tags out, hermes, react, alpha_umi and qwen weigh "
        "the calls of agents twice",
    )
    enable_thinking: bool | None = setting(None, "passed to chat templates of thinking models")
    max_length: int | None = setting(None, "tokens a sample may have; default: the model's context length")
    truncation_strategy: str = setting(
        "delete",
        "what to do with longer samples: drop and count, cut the left or right end, or split (text rows)",
        choices=("delete", "left", "right", "split"),
    )
    packing: bool = setting(False, "pack samples into rows of --packing_length (global best-fit decreasing)")
    packing_length: int | None = setting(None, "tokens in a pack; default: --max_length")
    padding_free: bool = setting(True, "concatenate the samples of a micro batch instead of padding them")
    group_by_length: bool = setting(
        False,
        "rows of like length follow each other: 4096 at a time are sorted, long ones first",
    )
    dataset_num_proc: int = setting(1, "processes that encode rows", aliases=("preprocess_num_proc",))
    dataloader_num_workers: int = setting(0, "processes that build batches", aliases=("num_workers",))
    model_name: list[str] = setting(
        [], "replaces {{NAME}} in self-cognition rows; of two names the first is for Chinese rows"
    )
    model_author: list[str] = setting([], "replaces {{AUTHOR}} in self-cognition rows, one or two alike")
