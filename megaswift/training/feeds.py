"""Which feed a run has: rows, completions that are rewarded, or completions that a teacher judges; and who answers held-back rows."""

from typing import Any

from megatron.core import parallel_state

from megaswift.checkpoint.store import Checkpoint
from megaswift.config.run import RunConfig
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import Layout
from megaswift.tasks.task import RunModel
from megaswift.training.callbacks import Predict
from megaswift.training.engine import Engine
from megaswift.training.feed import TrainFeed
from megaswift.training.guides import Guides
from megaswift.training.setup import Sets


def make_feed(
    run: RunConfig,
    meta: ModelMeta,
    layout: Layout,
    engine: Engine,
    sets: Sets,
    guides: Guides,
    *,
    checkpoint: Checkpoint | None,
    run_model: RunModel,
    group: Any,
) -> TrainFeed:
    """Return the feed of a resolved run; `checkpoint` is the one that it goes on from. Every rank calls it; raises UserError."""
    shared: dict[str, Any] = {"checkpoint": checkpoint, "group": group}
    # Those of completions wait for transformers' models: seconds.
    if sets.prompts is not None:
        from megaswift.training.distillation_feed import distillation_feed

        return distillation_feed(run, meta, layout, engine, sets, guides, **shared)
    if sets.rows is not None:
        from megaswift.training.rollout_feed import rollout_feed

        return rollout_feed(run, meta, layout, engine, sets, guides, run_model=run_model, **shared)
    return TrainFeed(
        sets.train,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp=layout.dp,
        ahead=run.data.dataloader_num_workers > 0,
        noise_alpha=run.training.neftune_noise_alpha,
    )


def make_predictions(
    run: RunConfig,
    meta: ModelMeta,
    layout: Layout,
    engine: Engine,
    sets: Sets,
    feed: TrainFeed,
    **shared: Any,
) -> Predict | None:
    """Return what answers held-back rows at validations, if something does; `shared` as in make_feed. Every rank calls it."""
    if sets.held_back is not None and run.logging.eval_iters:
        from megaswift.training.held_back import held_back_rewards

        return held_back_rewards(sets.held_back, feed)
    if sets.questions is None:
        return None
    from megaswift.training.predictions import predictions_of  # waits for transformers' models, too

    return predictions_of(run, meta, layout, engine, sets, **shared)
