"""Completions by the model itself: transformers holds the gathered weights for as long as it generates.

Letters: B rows generated at once, S tokens of the longest prompt, L tokens of the longest completion, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megaswift.metadata.meta import ModelMeta
from megaswift.parity.reference import without_progress_bars
from megaswift.rollout.chosen_experts import choices_of, experts_of_rows
from megaswift.rollout.engine import Answer, Prompt, Sampling, Weights

AT_ONCE = 128  # rows of one call: their keys and values lie beside the training state


class EmbeddedEngine:
    """The trained model by itself, as a RolloutEngine: each token is decided by the key of its prompt, on any layout."""

    adapts = False  # its weights are gathered on the device that trains, and merged there

    def __init__(
        self, meta: ModelMeta, *, pad_id: int, trust_remote_code: bool = False, tells_experts: bool = False
    ) -> None:
        self._meta, self._pad_id, self._trust = meta, pad_id, trust_remote_code
        self._tells_experts = tells_experts
        self._model: Any = None

    def load(self, weights: Weights, adapter: str | None = None) -> None:
        """Open the weights with transformers."""
        self._model = generating_model(self._meta, dict(weights), trust_remote_code=self._trust)

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Answer]:
        """Return one completion of each prompt."""
        stops, answers = set(sampling.stop_ids), []
        for start in range(0, len(prompts), AT_ONCE):
            some = prompts[start : start + AT_ONCE]
            ids = [prompt.ids for prompt in some]
            drawn = [chances(prompt.key, length=sampling.max_tokens) for prompt in some]
            with choices_of(self._model) if self._tells_experts else nullcontext() as seen:
                found = complete(self._model, ids, drawn, sampling, pad_id=self._pad_id)
            experts = [None] * len(some) if seen is None else experts_of_rows(seen, ids, found)
            answers += [
                Answer(ids=one, stopped=one[-1] in stops, experts=chosen)
                for one, chosen in zip(found, experts, strict=True)
            ]
        return answers

    def rest(self) -> None:
        """Drop the model."""
        self._model = None


def generating_model(
    meta: ModelMeta, tensors: dict[str, torch.Tensor], *, trust_remote_code: bool = False
) -> Any:
    """Return the transformers model of the tensors of its file; transformers itself knows how those become modules."""
    config = AutoConfig.from_pretrained(meta.folder, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):  # the tensors are not quantised
        del config.quantization_config
    first = next(iter(tensors.values()))
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    with without_progress_bars():
        model = kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=first.dtype, device_map={"": first.device}
        )
    return model.eval()


@torch.inference_mode()
def complete(
    model: Any,
    prompts: Sequence[np.ndarray],
    chances: Sequence[np.ndarray],
    sampling: Sampling,
    *,
    pad_id: int,
) -> list[list[int]]:
    """Return one completion of each prompt: its ids up to and with the first of the stop ids, or as many as there is room for.

    `chances` are numbers from 0 to 1, float64 [L] for each prompt, that decide every token of its completion.
    """
    found: list[list[int]] = []
    for start in range(0, len(prompts), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        found += _complete(model, prompts[some], np.stack(chances[some]), sampling, pad_id)
    return found


def _complete(
    model: Any,
    prompts: Sequence[np.ndarray],
    chances_BL: np.ndarray,
    sampling: Sampling,
    pad_id: int,
) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids_BS = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    mask_BS = torch.zeros_like(ids_BS)
    for row, prompt in enumerate(prompts):
        ids_BS[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask_BS[row, longest - len(prompt) :] = 1
    steps: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.repetition_penalty != 1:
        steps.insert(0, _Repeated(sampling.repetition_penalty, mask_BS.bool()))
    if sampling.top_k > 0:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    settings = GenerationConfig(
        max_new_tokens=chances_BL.shape[1],
        do_sample=False,
        eos_token_id=list(sampling.stop_ids) or None,
        pad_token_id=pad_id,
    )
    model.generation_config = settings  # transformers fills what is not given from there
    out_BL = model.generate(
        ids_BS.to(model.device),
        attention_mask=mask_BS.to(model.device),
        generation_config=settings,
        logits_processor=LogitsProcessorList([*steps, _Draw(chances_BL, prompt_length=longest)]),
    )[:, longest:].tolist()
    return [_until(row, set(sampling.stop_ids)) for row in out_BL]


def _until(ids: list[int], stop_ids: set[int]) -> list[int]:
    """Return the ids up to the first that stops, with it."""
    end = next((place for place, token in enumerate(ids) if token in stop_ids), len(ids) - 1)
    return ids[: end + 1]


class _Repeated(LogitsProcessor):
    """Divides positive logits of tokens that a row holds, and multiplies negative ones: Keskar et al. 2019 (arXiv 1909.05858), section
    4.1, in the form of transformers and vLLM. Padding, which depends on the other rows, is no part of a row.
    """

    def __init__(self, penalty: float, mask_BS: torch.Tensor) -> None:
        self._penalty, self._mask_BS = penalty, mask_BS

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores [B, V] with those of the row's tokens changed."""
        ids = input_ids.clone()
        prompts, last_B1 = ids[:, : self._mask_BS.shape[1]], ids[:, self._mask_BS.shape[1] - 1, None]
        prompts.copy_(torch.where(self._mask_BS.to(ids.device), prompts, last_B1))
        own = scores.gather(1, ids)
        return scores.scatter(1, ids, torch.where(own < 0, own * self._penalty, own / self._penalty))


class _Draw(LogitsProcessor):
    """Leaves the token that a given chance draws from the distribution: sampling without a random state."""

    def __init__(self, chances_BL: np.ndarray, *, prompt_length: int) -> None:
        self._chances_BL, self._prompt_length = torch.from_numpy(chances_BL), prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return -inf for all but one token of every row [B, V]."""
        place = input_ids.shape[1] - self._prompt_length
        sums_BV = scores.double().softmax(-1).cumsum(-1)
        chance_B1 = self._chances_BL[:, place, None].to(sums_BV.device) * sums_BV[:, -1:]
        token_B1 = torch.searchsorted(sums_BV, chance_B1, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, float("-inf")).scatter_(1, token_B1, 0.0)


def chances(key: Sequence[int], *, length: int) -> np.ndarray:
    """Return what decides the tokens of a completion, float64 [length]: a function of the key alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(tuple(key)))).random(length)
