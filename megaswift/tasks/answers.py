"""Log-probabilities of whole answers, out of the token losses that the output layer gives.

The loss of a token is -log p(token | what comes before), and its mask is not zero on the answer alone: so the sum over a
document is log pi(y | x). No logits are formed again.

Letters: B batch, S sequence, N documents of a micro batch, P pairs: N = 2P, chosen and rejected in turn.
"""

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

from megaswift.data.batches import MicroBatch


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a loss over answers is computed from; all float64, on the device of the model."""

    logps_N: torch.Tensor  # log pi(y | x), discounted where the loss discounts tokens; carries gradients
    lengths_N: torch.Tensor  # tokens of the answers
    references_N: torch.Tensor | None = None  # log pi_ref(y | x)
    plain_N: torch.Tensor | None = (
        None  # log pi(y | x) without discounts, where there are any; carries gradients
    )
    targets_R: torch.Tensor | None = None  # of each row: kto 1 or 0; rm the margin, nan where there is none

    @property
    def pairs(self) -> "Pairs":
        """The answers two by two."""
        references_N = torch.zeros_like(self.logps_N) if self.references_N is None else self.references_N
        return Pairs(
            chosen_P=self.logps_N[0::2],
            rejected_P=self.logps_N[1::2],
            plain_chosen_P=(self.logps_N if self.plain_N is None else self.plain_N)[0::2],
            chosen_length_P=self.lengths_N[0::2],
            rejected_length_P=self.lengths_N[1::2],
            ref_chosen_P=references_N[0::2],
            ref_rejected_P=references_N[1::2],
        )


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Log-probabilities and lengths of chosen and rejected answers."""

    chosen_P: torch.Tensor
    rejected_P: torch.Tensor
    plain_chosen_P: torch.Tensor  # without discounts
    chosen_length_P: torch.Tensor
    rejected_length_P: torch.Tensor
    ref_chosen_P: torch.Tensor  # 0 where there is no reference
    ref_rejected_P: torch.Tensor

    @property
    def nll_P(self) -> torch.Tensor:
        """Negative log-likelihood of a token of the chosen answer, a mean over the answer."""
        return -self.plain_chosen_P / self.chosen_length_P


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The loss of every row, and values whose means are logged by name; each may have another number of entries."""

    losses_R: torch.Tensor
    metrics: dict[str, torch.Tensor]


def document_sums(values_BS: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Return the sum over each document of a micro batch, float64 [N], in the order of `batch.sample_ids`.

    Values may have further dims, which stay. Summed piece by piece: an indexed sum on a GPU has no fixed order, and a resumed run must repeat itself. Every cp rank
    calls it alike and gets the whole sums; a gradient goes to the tokens of this rank, as each holds its own.
    """
    if batch.cu_seqlens is None:
        return values_BS.double().sum(1)
    if not batch.sample_ids:
        return values_BS.new_zeros(0, *values_BS.shape[2:], dtype=torch.float64)
    pieces = values_BS[0].split(tokens_here(batch))[: len(batch.sample_ids)]
    sums_N = torch.stack([piece.sum(0, dtype=torch.float64) for piece in pieces])
    if batch.plan is None:
        return sums_N
    # Forward a sum over the ranks, backward nothing: all of them compute the same loss from it.
    return reduce_from_tensor_model_parallel_region(sums_N, group=parallel_state.get_context_parallel_group())


def tokens_here(batch: MicroBatch) -> list[int]:
    """Return how many tokens of each document this rank holds; they lie in the order of the documents."""
    assert batch.cu_seqlens is not None, "rows of several documents"
    plan = batch.plan
    if plan is None:
        return batch.cu_seqlens.diff().tolist()
    ring_rank, inner_rank = divmod(parallel_state.get_context_parallel_rank(), plan.inner)
    first, end = (part * plan.tokens_per_rank for part in (inner_rank, inner_rank + 1))
    return [
        max(0, min(late.start + late.length, end) - max(early.start, first))
        for early, late in plan.pieces[ring_rank]
    ]


def whole_rows(values_CT: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Return values of this cp rank's tokens at their places in the whole row of documents [C, S], with those of other ranks.

    Every cp rank calls it alike; a gradient goes to the tokens of this rank, as all ranks compute the same loss from the row.
    """
    if batch.plan is None:
        return values_CT
    assert batch.cu_seqlens is not None, "rows of several documents"
    places_T = _places(batch).to(values_CT.device, non_blocking=True)
    row_CS = values_CT.new_zeros(len(values_CT), int(batch.cu_seqlens[-1]))
    row_CS = row_CS.index_copy(1, places_T, values_CT)
    return reduce_from_tensor_model_parallel_region(row_CS, group=parallel_state.get_context_parallel_group())


def _places(batch: MicroBatch) -> torch.Tensor:
    """Return where in the whole row of documents the tokens of this cp rank are, int64 [T]."""
    assert batch.cu_seqlens is not None, "rows of several documents"
    firsts_T = batch.cu_seqlens[:-1].repeat_interleave(torch.tensor(tokens_here(batch)))
    return firsts_T + batch.position_ids[0]


def beyond_the_shorter(batch: MicroBatch, device: torch.device) -> torch.Tensor:
    """Return which tokens of answers lie behind as many as the shorter answer of their pair has, bool [B, S].

    Every cp rank calls it alike and gets those of its own tokens.
    """
    carries_BS = (batch.loss_mask != 0).to(device, torch.int64, non_blocking=True)
    if batch.cu_seqlens is None:
        lengths_N = carries_BS.sum(1)
        shorter_N = lengths_N.view(-1, 2).amin(1).repeat_interleave(2)
        return (carries_BS != 0) & (carries_BS.cumsum(1) > shorter_N[:, None])
    row_S = whole_rows(carries_BS, batch)[0]
    documents = batch.cu_seqlens.diff().to(device, non_blocking=True)
    ends_N = batch.cu_seqlens[1:].to(device, torch.int64, non_blocking=True)
    counts_S = row_S.cumsum(0)
    lengths_N = torch.diff(counts_S[ends_N - 1], prepend=counts_S.new_zeros(1))
    before_N = counts_S[ends_N - 1] - lengths_N
    pairs = len(batch.sample_ids)  # padding, a document of its own, has no answer
    shorter_N = lengths_N.clone()
    shorter_N[:pairs] = lengths_N[:pairs].view(-1, 2).amin(1).repeat_interleave(2)
    beyond_S = (row_S != 0) & (counts_S > (before_N + shorter_N).repeat_interleave(documents))
    return beyond_S[None] if batch.plan is None else beyond_S[_places(batch).to(device)][None]


def answers_of(batch: MicroBatch, losses_BS: torch.Tensor, *, ld_alpha: float | None = None) -> Answers:
    """Return the answers of a micro batch, given each token's cross-entropy on the last pipeline stage.

    With `ld_alpha` tokens beyond the length of the shorter answer of a pair count so much.
    """
    device = losses_BS.device
    references, targets = (
        None if values is None else values.to(device, torch.float64, non_blocking=True)
        for values in (batch.references, batch.targets)
    )
    carries_loss_BS = (batch.loss_mask != 0).to(device, non_blocking=True)
    plain_N = -document_sums(losses_BS, batch)
    logps_N = plain_N
    if ld_alpha is not None:
        beyond_BS = beyond_the_shorter(batch, device)
        logps_N = -document_sums(torch.where(beyond_BS, ld_alpha * losses_BS, losses_BS), batch)
    return Answers(
        logps_N=logps_N,
        plain_N=plain_N,
        lengths_N=document_sums(carries_loss_BS, batch),
        references_N=references,
        targets_R=targets,
    )


def reward_metrics(
    chosen_P: torch.Tensor, rejected_P: torch.Tensor, *, logps: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return what is logged of pairs under TRL's names: their rewards, and `logps`, of chosen and rejected answers."""
    metrics = {
        "rewards/chosen": chosen_P,
        "rewards/rejected": rejected_P,
        "rewards/margins": chosen_P - rejected_P,
        "rewards/accuracies": (chosen_P > rejected_P).double(),
        "logps/chosen": logps[0],
        "logps/rejected": logps[1],
    }
    return {name: values.detach() for name, values in metrics.items()}


PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
