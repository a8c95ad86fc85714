"""The decoder with a language-model head, whose output layer runs only for tokens that carry loss.

Letters: S sequence, B batch, T chosen tokens, D model size, O scores of a token.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.parallel_state import get_tensor_model_parallel_rank
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)

from megaswift.kernels.linear_cross_entropy.ops import linear_cross_entropy
from megaswift.metadata.meta import Multipliers
from megaswift.models.gathered import gathered
from megaswift.models.layer_inputs import Carried, PerLayerEmbedding
from megaswift.models.neftune import TokenNoise, with_token_noise
from megaswift.models.replay import Replay


class CausalLM(GPTModel):
    """Megatron's GPTModel with a loss that skips tokens of weight zero and never sees vocabulary padding."""

    logical_vocab_size: int  # rows of the file's embedding; the rest of the sharded rows is padding
    multipliers = Multipliers()
    gives_states = False  # the last stage returns hidden states [B, S, D] in place of losses (tasks/gkd.py, entropy.py, reranker.py)
    notes_right = False  # each call leaves right_BS behind (tasks/sft.py)
    right_BS: torch.Tensor | None = None  # bool: tokens with loss whose label is the likeliest one
    layer_inputs: PerLayerEmbedding | None  # what makes the inputs of layers, where they have some
    carried: Carried
    replay: Replay | None = None  # where experts may be chosen elsewhere
    _noise: TokenNoise | None = None
    all_trains = True  # on this rank and all others; else checkpoints hold what trains, and the rest is in the model's files
    layers_alike = True  # the same parameters train in every layer
    scores = False  # the output layer is a score_head (models/score.py): every token's scores [B, S, O] are returned

    def set_multipliers(self, multipliers: Multipliers) -> None:
        """Multiply the embeddings, and the logits, by the model's constants."""
        self.multipliers = multipliers
        if self.pre_process and multipliers.embedding != 1.0:
            self.embedding.register_forward_hook(
                lambda module, inputs, output: output * torch.tensor(multipliers.embedding).to(output)
            )

    def _preprocess(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        made = super()._preprocess(input_ids, *args, **kwargs)
        if self._noise is not None and self.training and self.pre_process:
            rank = get_tensor_model_parallel_rank() if self.config.sequence_parallel else 0
            made = (with_token_noise(made[0], self._noise, rank=rank), *made[1:])
        if self.layer_inputs is not None:
            self.carried.inputs = self.layer_inputs(input_ids, made[0])
        return made

    def forward(
        self, *args: Any, noise: TokenNoise | None = None, experts: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As Megatron's; in training with `noise` on the embeddings, and with `experts` [B, S, layers, K] where a model replays them."""
        assert experts is None or self.replay is not None, "built for it: models/build.py"
        self._noise = noise
        if self.replay is not None:
            device, parallel = next(self.parameters()).device, self.config.sequence_parallel
            self.replay.begin(experts, device, sequence_parallel=parallel)
        try:
            output = super().forward(*args, **kwargs)
        finally:
            self._noise = None
            self.carried.clear()
        if self.replay is not None:
            self.replay.remember(output)
        return output

    def _postprocess(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not self.post_process or self.mtp_process:
            return super()._postprocess(hidden_states, *args, labels=labels, loss_mask=loss_mask, **kwargs)
        if self.multipliers.logits != 1.0:
            hidden_states = hidden_states * self.multipliers.logits
        if self.gives_states:
            return self._of_all_tokens(hidden_states).transpose(0, 1)
        if labels is None or self.scores:
            logits = super()._postprocess(hidden_states, *args, labels=None, loss_mask=loss_mask, **kwargs)
            cap = self.multipliers.logits_softcap
            return logits if cap is None else cap * torch.tanh(logits / cap)
        assert loss_mask is not None, "labels come with their weights"
        return self._token_losses(hidden_states, labels, loss_mask)

    @property
    def output_weight(self) -> torch.Tensor:
        """The rows of the output layer that this rank holds [V/tp, D]."""
        layer: Any = gathered(
            self.output_layer
        )  # without weights where it shares those of this stage's embedding
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return layer.weight

    def output_rows(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Return the rows of the output layer for a few tokens, on every tensor-parallel rank [tokens, D].

        Every rank of tp calls it alike, and computes the same from the rows: a gradient stays with the rank that holds a row.
        What moves: the rows, once around tp.
        """
        group, weight_VD = self.output_layer.tp_group, self.output_weight
        places = torch.tensor(token_ids) - group.rank() * len(weight_VD)
        is_here = (places >= 0) & (places < len(weight_VD))
        places = places.clamp(0, len(weight_VD) - 1).to(weight_VD.device, non_blocking=True)
        # A rank without these rows reads another and drops it: its weight too must get a gradient, if one of zeros.
        rows = weight_VD[places] * is_here.to(weight_VD, non_blocking=True)[:, None]
        return reduce_from_tensor_model_parallel_region(rows, group=group)

    def _of_all_tokens(self, hidden_SBD: torch.Tensor) -> torch.Tensor:
        if self.config.sequence_parallel:
            # Every tp rank needs all tokens below; the gradient is summed over tp there, so this only splits it.
            return gather_from_sequence_parallel_region(hidden_SBD, tensor_parallel_output_grad=False)
        return hidden_SBD

    def _token_losses(
        self, hidden_SBD: torch.Tensor, labels_BS: torch.Tensor, loss_mask_BS: torch.Tensor
    ) -> torch.Tensor:
        """Return each token's cross-entropy [B, S], float32, zero where the mask is zero; note what is right."""
        layer = self.output_layer
        hidden_SBD = self._of_all_tokens(hidden_SBD)
        chosen_SB = loss_mask_BS.transpose(0, 1) != 0
        hidden_TD = hidden_SBD[chosen_SB]
        labels_T = labels_BS.transpose(0, 1)[chosen_SB]
        right_T = torch.empty_like(labels_T, dtype=torch.bool) if self.notes_right else None
        losses_T = linear_cross_entropy(
            copy_to_tensor_model_parallel_region(
                hidden_TD, group=layer.tp_group
            ),  # sums the gradient over tp
            self.output_weight,
            labels_T,
            loss_weights_T=loss_mask_BS.transpose(0, 1)[chosen_SB],
            group=layer.tp_group if layer.tp_group.size() > 1 else None,
            vocab_size=self.logical_vocab_size,
            softcap=self.multipliers.logits_softcap,
            right_T=right_T,
        )
        if right_T is not None:
            self.right_BS = torch.zeros_like(chosen_SB).masked_scatter(chosen_SB, right_T).transpose(0, 1)
        losses_SB = torch.zeros(chosen_SB.shape, dtype=torch.float32, device=losses_T.device)
        return losses_SB.masked_scatter(chosen_SB, losses_T).transpose(0, 1)
