"""REAL: rewards are labels, and a group of completions is told apart by how the model has come to see them.

With s the mean of log(pi/pi_old) over the tokens of a completion, and the better completions of a group those with A > 0:
    log(1 + sum over the better of exp(-s/tau)) + log(1 + sum over the others of exp(s/tau))
"Rewards as Labels: Revisiting RLVR from a Classification Perspective", 2026 (arXiv 2602.05630); a mean over groups, where groups
without both kinds count 0, as in ms-swift 4.6. Completions that carry no loss (--overlong_filter) have no label.

Completions of a group are in micro batches of any ranks. The sums over the others of a kind are found before the step, without
gradients, so that each completion adds its own term to them: the gradient is that of the whole group. Where the model is still the
one that wrote the completions all s are 0, and no forward pass is needed.

Letters: B batch, S sequence, N completions of a micro batch, M of the global batch: P groups of G.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from megaswift.data.batches import MicroBatch
from megaswift.tasks.answers import document_sums
from megaswift.tasks.everyone import of_all_ranks
from megaswift.tasks.task import RunModel, look


@dataclass(frozen=True, kw_only=True)
class Peers:
    """The other completions of a kind in the group of each completion; float64, [N] or [P, G]."""

    signs: torch.Tensor  # -1 for the better, 1 for the others, 0 where there is no loss
    rests: torch.Tensor  # log(1 + sum of exp(sign s / tau)) over the others of its kind
    numbers: torch.Tensor  # completions of its kind in the group, itself included


def label_losses(scores_N: torch.Tensor, peers: Peers, *, temperature: float, group: int) -> torch.Tensor:
    """Return the loss of every completion [N]: a mean over completions is the mean over groups of so many.

    All completions of a kind have the same term; each has its share of the value, and the gradient of all of it.
    """
    terms_N = torch.logaddexp(peers.rests, peers.signs * scores_N / temperature)
    shares_N = terms_N.detach() / peers.numbers.clamp(min=1) + terms_N - terms_N.detach()
    return group * torch.where(peers.signs == 0, 0.0, shares_N)


def peers_of(
    scores_PG: torch.Tensor, advantages_PG: torch.Tensor, carries_PG: torch.Tensor, *, temperature: float
) -> Peers:
    """Return the peers of all completions of whole groups [P, G], given whether (1 or 0) each carries loss; all float64."""
    kinds_PG = torch.where(advantages_PG > 0, -1.0, 1.0).double() * carries_PG
    is_peer_PGG = (kinds_PG[:, :, None] == kinds_PG[:, None]) & (kinds_PG != 0)[:, :, None]
    has_both_P1 = (kinds_PG < 0).any(1, keepdim=True) & (kinds_PG > 0).any(1, keepdim=True)
    is_itself_GG = torch.eye(kinds_PG.shape[1], dtype=torch.bool, device=kinds_PG.device)
    terms_PGG = (kinds_PG * scores_PG / temperature)[:, None].masked_fill(
        ~is_peer_PGG | is_itself_GG, -torch.inf
    )
    rests_PG = torch.cat([terms_PGG, torch.zeros_like(scores_PG)[:, :, None]], 2).logsumexp(2)
    return Peers(signs=kinds_PG * has_both_P1, rests=rests_PG, numbers=is_peer_PGG.sum(2).double())


def peers_of_batches(
    batches: list[MicroBatch], chunks: Sequence[Any], *, temperature: float, group: int, run: RunModel
) -> list[Peers]:
    """Return the peers of the completions of each micro batch, on the last pipeline stage; others return [].

    Every rank of the world calls it. What moves: four numbers of each completion between ranks of dp.
    """
    device = next(chunks[0].parameters()).device
    if batches[0].old_logps is not None:
        scores = look(chunks, batches, _scores, run=run)
    elif parallel_state.is_pipeline_last_stage():
        scores = [torch.zeros(len(batch.sample_ids), dtype=torch.float64) for batch in batches]
    else:
        scores = []
    if not scores:
        return []
    facts = [_facts(batch, values.to(device)) for batch, values in zip(batches, scores, strict=True)]
    table_M4, first = of_all_ranks(torch.cat(facts), parallel_state.get_data_parallel_group())
    order_M = table_M4[:, 0].argsort()  # groups lie together
    ordered = [values_M.view(-1, group) for values_M in table_M4[order_M, 1:].unbind(1)]
    whole = peers_of(*ordered, temperature=temperature)
    places_M, sizes = order_M.argsort(), [len(values) for values in facts]
    places = places_M[first : first + sum(sizes)].split(sizes)
    return [
        Peers(**{name: values.flatten()[some] for name, values in vars(whole).items()}) for some in places
    ]


def _facts(batch: MicroBatch, scores_N: torch.Tensor) -> torch.Tensor:
    """Return the place in the rollout, the score, the advantage and whether it carries loss of every completion, float64 [N, 4]."""
    assert batch.targets is not None, "completions come with advantages"
    device = scores_N.device
    numbers_N = torch.tensor(batch.sample_ids, dtype=torch.float64, device=device)
    carries_N = document_sums((batch.loss_mask != 0).to(device, non_blocking=True), batch) > 0
    return torch.stack([numbers_N, scores_N, batch.targets.to(scores_N), carries_N.double()], 1)


def _scores(batch: MicroBatch, losses_BS: torch.Tensor) -> torch.Tensor:
    """Return the mean of log(pi/pi_old) over each completion, float64 [N]."""
    assert batch.old_logps is not None
    carries_BS = (batch.loss_mask != 0).to(losses_BS.device, non_blocking=True)
    log_ratio_BS = (-losses_BS.double() - batch.old_logps.to(losses_BS.device)) * carries_BS
    return document_sums(log_ratio_BS, batch) / document_sums(carries_BS, batch).clamp(min=1)
