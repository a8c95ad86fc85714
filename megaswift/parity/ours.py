"""The side of Megatron: the converter's loading and export, and a model of this project.

Letters: T tokens of all documents, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from megaswift.config.model import ModelConfig
from megaswift.config.run import RunConfig
from megaswift.converters.export import export_hf
from megaswift.converters.load import load_weights
from megaswift.mcore.process_groups import destroy, initialise
from megaswift.metadata.meta import ModelMeta
from megaswift.models.attention import packed_documents
from megaswift.models.build import build_model
from megaswift.models.causal_lm import CausalLM
from megaswift.parallel.layout import Layout
from megaswift.parity.documents import Outcome, loss_weights, packs, total_weight
from megaswift.platforms.platform import select_platform

RUN = RunConfig(model=ModelConfig(torch_dtype="float32"))
SEED = 1
TIMEOUT_MIN = 2.0


@contextmanager
def one_rank() -> Iterator[None]:
    """Let this process be a world of one CPU rank, without a network."""
    select_platform("cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        initialise(Layout(), seed=SEED, timeout_min=TIMEOUT_MIN)
        yield
    finally:
        destroy()
        dist.destroy_process_group()


def load(meta: ModelMeta, folder: Path, *, layout: Layout, rank: int) -> CausalLM:
    """Return the model with the weights of `folder`; raises WeightsError where they do not fit. No pipeline stages."""
    (model,) = build_model(meta, RUN, layout, select_platform("cpu"))
    load_weights([model], meta, layout, rank, folder)
    return model.eval()


def megatron_outcome(
    meta: ModelMeta, folder: Path, gradients: Path, *, layout: Layout | None = None, rank: int = 0
) -> Outcome:
    """Run a folder's model in float32 on packed documents, and leave the gradients in the folder `gradients`.

    Every rank of `layout` calls it, whose groups stand; the logits are those of the rank's part of the vocabulary.
    """
    layout = layout or Layout()
    model = load(meta, folder, layout=layout, rank=rank)
    logits, total = [], 0.0
    for documents in packs(meta.vocab_size):
        tokens = torch.cat(documents)[None]
        positions = torch.cat([torch.arange(len(one)) for one in documents])[None]
        labels = torch.cat([torch.cat([one[1:], one[:1]]) for one in documents])[None]
        weights = torch.cat([torch.cat([loss_weights(one), torch.zeros(1)]) for one in documents])[None]
        lengths = [len(one) for one in documents]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        packed = packed_documents(cu_seqlens, max(lengths), device=tokens.device)
        with torch.no_grad():
            logits.append(model(tokens, positions, None, packed_seq_params=packed)[0, :, : meta.vocab_size])
        losses = model(tokens, positions, None, labels=labels, loss_mask=weights, packed_seq_params=packed)
        loss = (losses * weights).sum() / total_weight(meta.vocab_size)
        loss.backward()
        total += float(loss.detach())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    export_hf([model], meta, layout, rank, gradients, dtype="float32")
    return Outcome(logits_TV=torch.cat(logits), loss=total, gradients=gradients)
