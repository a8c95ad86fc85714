"""Weights are there when they are read, also where gathering them overlaps with the forward pass, in many small buckets."""

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from megaswift.training import optimizer
from tests.distributed.test_layouts import LOSS_TOLERANCE, NORM_TOLERANCE, Curve
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny
from tests.harness.training import Case, curves, temporary_folder

BUCKET = 2000  # elements; Megatron's own buckets hold 40 million, more than a tiny model
MODELS = ("llama", "llama-tied", "qwen3_next")


@cache
def folder_of(model: str) -> Path:
    return save_tiny(model, temporary_folder())


def case(**parallel: Any) -> Case:
    training = {"global_batch_size": 4, "micro_batch_size": 1, "train_iters": 6}
    settings = {"data": {"packing": True, "packing_length": 64}, "training": training, "parallel": parallel}
    return Case(name="case", settings=settings)


def with_small_buckets(rank: int, world_size: int, folder: Path, cases: list[Case]) -> dict[str, Curve]:
    whole: Any = optimizer.DistributedDataParallelConfig
    optimizer.DistributedDataParallelConfig = partial(whole, bucket_size=BUCKET)  # type: ignore[misc]
    try:
        return curves(rank, world_size, folder, cases)
    finally:
        optimizer.DistributedDataParallelConfig = whole  # type: ignore[misc]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("model", MODELS)
def test_gathered_while_it_computes_a_model_trains_like_one_rank(model: str) -> None:
    (one,) = run_distributed(curves, 1, folder_of(model), [case()])
    overlapped = case(overlap_grad_reduce=True, overlap_param_gather=True)
    for seen in run_distributed(with_small_buckets, 2, folder_of(model), [overlapped]):
        for (loss, norm), (one_loss, one_norm) in zip(seen["case"], one["case"], strict=True):
            assert loss == pytest.approx(one_loss, rel=LOSS_TOLERANCE)
            assert norm == pytest.approx(one_norm, rel=NORM_TOLERANCE)
