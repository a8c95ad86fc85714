"""Rewards of held-back prompts: what the model writes for them at a validation, judged as in training and never learnt from."""

import numpy as np

from megaswift.data.prompt_set import PromptSet
from megaswift.training.feed import TrainFeed
from megaswift.training.roller import Roller
from megaswift.training.rollout_feed import RolloutFeed

# Ends the keys of completions for held-back prompts: those of training end otherwise (training/roller.py), turns or not.
HELD_BACK = (0, 0, 0, 1)


class HeldBackRewards:
    """Has held-back prompts completed with the weights of now; every rank of the world calls it alike.

    The same chances decide at every validation, so that with the trained model as engine figures differ by its weights alone.
    """

    def __init__(self, roller: Roller, prompts: PromptSet, *, most: int | None) -> None:
        """`most` prompts are asked, the first ones; None: all."""
        self._roller, self._prompts = roller, prompts
        self._entries = np.arange(len(prompts.encoded))[:most]

    def __call__(self, step: int) -> dict[str, float]:
        """Return rewards and lengths of the completions after `step`. Raises UserError."""
        roller, chosen = self._roller, self._roller.run.rollout
        group = chosen.num_generations_eval or chosen.num_generations
        seed = roller.run.training.seed
        keys = [
            (seed, place, generation, *HELD_BACK)
            for place in range(len(self._entries))
            for generation in range(group)
        ]
        with roller.engine.settled_parameters():
            found = roller.completions(self._prompts, self._entries, keys)
        rollout = roller.joined(self._prompts, self._entries, found, position=0)
        if roller.table is not None:
            roller.write(self._prompts, self._entries, found, step=step)
        return rollout.figures(roller.names, roller.weights)


def held_back_rewards(prompts: PromptSet, feed: TrainFeed) -> HeldBackRewards:
    """Return what has these prompts completed by the engine that a run's feed completes others with."""
    assert isinstance(feed, RolloutFeed), "held-back prompts are those of a run on prompts"
    limit = feed.roller.run.logging.eval_iters
    return HeldBackRewards(feed.roller, prompts, most=None if limit < 0 else limit * feed.items_per_step)
