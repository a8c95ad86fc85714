"""Reward models: sequence-classification models whose one score of a conversation is its reward.

Letters: B conversations, S tokens of the longest.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from megaswift.config.reward_rules import reward_names
from megaswift.config.run import RunConfig
from megaswift.data.sample import Message, Sample
from megaswift.data.template import Template
from megaswift.data.tokenizer import load_tokenizer, pad_id_of
from megaswift.errors import ConfigError
from megaswift.metadata.hub import Files, locate
from megaswift.parity.reference import without_progress_bars

AT_ONCE = (
    16  # conversations of one forward pass: nothing is kept of them, and they lie beside the training state
)


class RewardModel:
    """A reward function: the score of each conversation, rendered by the model's own chat template."""

    def __init__(self, name: str, run: RunConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        """Hold the whole model on `device`, without gradients. Raises UserError."""
        trust, use_hf = run.model.trust_remote_code, run.model.use_hf
        folder = str(locate(name, use_hf=use_hf, files=Files.ALL))
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
            if config.num_labels != 1:
                raise ConfigError(
                    f"reward_model={name} has num_labels={config.num_labels}, and a reward is one number. Give a sequence-classification "
                    "model with one label, as `megaswift rlhf --rlhf_type rm` exports it."
                )
            with without_progress_bars():
                model, report = AutoModelForSequenceClassification.from_pretrained(
                    folder, config=config, dtype=dtype, trust_remote_code=trust, output_loading_info=True
                )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"reward_model={name} is not opened by transformers: {error} Give a whole model; `megaswift export --merge_lora true` "
                "merges an adapter."
            ) from error
        if report["missing_keys"]:
            raise ConfigError(
                f"reward_model={name} lacks {', '.join(sorted(report['missing_keys'])[:3])}, so its scores would be random. Give a "
                "trained reward model."
            )
        self._model = model.to(device).eval().requires_grad_(False)
        tokenizer = load_tokenizer(folder, trust_remote_code=trust)
        # Where transformers is not told which token is padding, it reads rows one by one.
        self._pad_id, self._at_once = pad_id_of(tokenizer), AT_ONCE if config.pad_token_id is not None else 1
        self._pad_id = self._pad_id if config.pad_token_id is None else config.pad_token_id
        self._template = Template.from_config(run.data, tokenizer, max_length=None)

    @torch.inference_mode()
    def __call__(self, completions: list[str], messages: list[list[Message]], **columns: Any) -> list[float]:
        """Return the score of each conversation."""
        texts = [
            self._template.prompt(Sample(source="completion", messages=tuple(turns))) for turns in messages
        ]
        encoder = self._template.encoder
        bos = [] if self._template.uses_chat_template else encoder.bos
        ids = [[*bos, *one.tolist()] for one in encoder.encode(texts)]
        found: list[float] = []
        for start in range(0, len(ids), self._at_once):
            found += self._scores(ids[start : start + self._at_once])
        return found

    def _scores(self, ids: Sequence[list[int]]) -> list[float]:
        longest = max(map(len, ids))
        ids_BS = torch.full((len(ids), longest), self._pad_id)
        mask_BS = torch.zeros_like(ids_BS)
        for row, own in enumerate(ids):
            ids_BS[row, : len(own)] = torch.tensor(own)
            mask_BS[row, : len(own)] = 1
        device = self._model.device
        scores_B1 = self._model(ids_BS.to(device), attention_mask=mask_BS.to(device)).logits
        scores: list[float] = scores_B1[:, 0].double().tolist()
        return scores


def load_reward_models(run: RunConfig, *, device: torch.device, dtype: torch.dtype) -> dict[str, RewardModel]:
    """Return the reward models of a resolved run by the names under which they are logged; raises UserError."""
    chosen = run.reward
    names = reward_names(chosen)[len(chosen.reward_funcs) :][: len(chosen.reward_model)]
    return {
        name: RewardModel(model, run, device=device, dtype=dtype)
        for name, model in zip(names, chosen.reward_model, strict=True)
    }
