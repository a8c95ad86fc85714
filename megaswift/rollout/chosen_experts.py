"""Which experts an engine chose for every token while it generated: how transformers is asked, and what any engine must tell.

Letters: B rows generated at once, S tokens of the longest prompt, T tokens of prompts with their completions, L layers with experts,
K experts of a token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from megaswift.errors import TrainingError
from megaswift.metadata.meta import ModelMeta, MoEMeta
from megaswift.rollout.engine import Answer
from megaswift.rollout.rollout import first_experts

MOST_IN_A_BYTE = 256
Seen = list[list[torch.Tensor]]  # by layer with experts, the experts of the tokens of each call [tokens, K]


@contextmanager
def choices_of(model: Any) -> Iterator[Seen]:
    """Yield what is filled as long as the context lasts.

    In transformers 5 a layer calls its module `experts` with hidden states, the experts of each token, and their weights; Llama 4's
    are not told (config/rollout_rules.py). Raises TrainingError in a call that is another.
    """
    blocks = [module for name, module in model.named_modules() if name.endswith(".experts")]
    seen: Seen = [[] for _ in blocks]
    hooks = [
        block.register_forward_pre_hook(
            lambda module, inputs, calls=calls: calls.append(_chosen(module, inputs))
        )
        for block, calls in zip(blocks, seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _chosen(module: Any, inputs: tuple[Any, ...]) -> torch.Tensor:
    given = inputs[1] if len(inputs) > 1 else None
    if not isinstance(given, torch.Tensor) or given.ndim != 2 or given.is_floating_point():
        raise TrainingError(
            f"router_replay_mode=R3 cannot tell the experts of {type(module).__name__}, which is not given their numbers. Choose R2."
        )
    return given.to(torch.int16)


def experts_of_rows(
    seen: Seen, prompts: Sequence[np.ndarray], completions: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """Return the experts of each row's prompt and completion, int16 [T - 1, L, K]: the last token was never read.

    Prompts were padded on the left to S and read at once, then came one token of every row at a time.
    """
    rows, longest = len(prompts), max(map(len, prompts))
    layers = []
    for first, *later in seen:
        steps = [first.unflatten(0, (rows, longest)), *(step[:, None] for step in later)]
        layers.append(torch.cat(steps, 1))
    every_BTLK = torch.stack(layers, 2).cpu().numpy()
    found = []
    for row, (prompt, ids) in enumerate(zip(prompts, completions, strict=True)):
        begin = longest - len(prompt)
        found.append(every_BTLK[row, begin : begin + len(prompt) + len(ids) - 1])
    return found


def told_experts(prompts: Sequence[np.ndarray], answers: Sequence[Answer], meta: ModelMeta) -> np.ndarray:
    """Return the experts of each token of prompts with their answers, uint8 or int16 [T, L, K]. Raises TrainingError.

    The last token of an answer, which no engine read and no label follows, goes to the first K.
    """
    assert meta.moe is not None, "checked by config/rollout_rules.py"
    dtype = expert_dtype(meta.moe)
    parts: list[np.ndarray] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        told = _told(answer.experts, len(prompt) + len(answer.ids) - 1, meta.moe).astype(dtype)
        parts += [told, first_experts(1, told)]
    return np.concatenate(parts)


def _told(experts: np.ndarray | None, tokens: int, moe: MoEMeta) -> np.ndarray:
    """Return what is told of one answer [tokens, L, K], having looked whether it can be true."""
    if experts is None:
        raise TrainingError(
            "router_replay_mode=R3: the engine does not say which experts it chose. Start vLLM's servers with `megaswift rollout "
            "--vllm_engine_kwargs '{\"enable_return_routed_experts\": true}'`, or choose R2."
        )
    if experts.ndim == 3 and experts.shape[1] == len(moe.layer_is_moe):  # vLLM has a place for each layer
        experts = experts[:, list(moe.layer_is_moe)]
    expected = (tokens, sum(moe.layer_is_moe), moe.topk)
    if experts.shape != expected:
        raise TrainingError(
            f"router_replay_mode=R3: the engine tells experts of [tokens, layers, choices] {list(experts.shape)}, and {list(expected)} "
            "are needed. Choose R2."
        )
    ordered = np.sort(experts, -1)
    if (ordered[..., 1:] == ordered[..., :-1]).any() or ordered.max() >= moe.num_experts:
        raise TrainingError(
            f"router_replay_mode=R3: the engine tells tokens that do not have {moe.topk} different ones of {moe.num_experts} experts. "
            "Choose R2."
        )
    return experts


def expert_dtype(moe: MoEMeta) -> type[np.uint8] | type[np.int16]:
    """Return the smallest type for the numbers of a model's experts."""
    return np.uint8 if moe.num_experts <= MOST_IN_A_BYTE else np.int16
