"""Experts that an engine tells: transformers' are those of a pass over the whole text, and what cannot be true is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megaswift.errors import TrainingError
from megaswift.metadata.meta import ModelMeta, MoEMeta
from megaswift.metadata.read import get_model_meta
from megaswift.rollout.chosen_experts import told_experts
from megaswift.rollout.engine import Answer, Prompt, Sampling
from megaswift.rollout.generate import EmbeddedEngine
from tests.harness.tiny import save_tiny
from tests.unit.test_specs import LLAMA

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=6, stop_ids=tuple(range(60, 131)))


@pytest.mark.parametrize(
    "name", ["qwen3_moe", "qwen2_moe-mixed", "deepseek_v3", "gpt_oss", "mixtral", "gemma4_text"]
)
@torch.no_grad()
def test_transformers_tells_what_it_chose(tmp_path: Path, name: str) -> None:
    """Prompts of several lengths, completions that end at different times."""
    folder = save_tiny(name, tmp_path)
    meta = get_model_meta(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine: Any = EmbeddedEngine(meta, pad_id=0, tells_experts=True)
    engine._model = model
    numbers = np.random.default_rng(3)
    prompts = [
        Prompt(ids=numbers.integers(3, 131, size).astype(np.int32), key=(size,)) for size in (3, 9, 5, 4)
    ]
    answers = engine.complete(prompts, SAMPLING)
    assert len({len(answer.ids) for answer in answers}) > 1
    found_TLK = told_experts([prompt.ids for prompt in prompts], answers, meta)
    assert found_TLK.dtype == np.uint8
    begin = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [*prompt.ids.tolist(), *answer.ids]
        expected = chosen(model, ids)
        own = found_TLK[begin : begin + len(ids)]
        assert np.array_equal(np.sort(own[:-1], -1), expected[:-1])
        assert (own[-1] == np.arange(own.shape[2])).all()
        begin += len(ids)
    assert begin == len(found_TLK)


def chosen(model: Any, ids: list[int]) -> np.ndarray:
    """Return the experts of a text in ascending order [T, L, K]."""
    blocks = [module for name, module in model.named_modules() if name.endswith(".experts")]
    seen: list[torch.Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1])) for block in blocks
    ]
    model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return torch.stack(seen, 1).sort(-1).values.numpy()


def meta_of(*, num_experts: int = 4) -> ModelMeta:
    """Return the facts of a model whose second layer has experts."""
    moe = MoEMeta(num_experts=num_experts, topk=2, ffn_hidden_size=8, layer_is_moe=(False, True))
    return ModelMeta(**{**vars(LLAMA), "moe": moe})


def told(experts: Any, **facts: Any) -> np.ndarray:
    """Return what is made of the experts of a prompt of two tokens with an answer of two."""
    answer = Answer(ids=[5, 6], stopped=True, experts=None if experts is None else np.array(experts))
    return told_experts([np.array([3, 4])], [answer], meta_of(**facts))


def test_layers_without_experts_are_left_out() -> None:
    """vLLM has a place for them."""
    found_TLK = told([[[0, 0], [1, 3]], [[0, 0], [2, 0]], [[0, 0], [3, 2]]])
    assert found_TLK.tolist() == [[[1, 3]], [[2, 0]], [[3, 2]], [[0, 1]]]
    assert told([[[299, 1]]] * 3, num_experts=300).dtype == np.int16


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (None, "does not say which experts it chose. Start vLLM's servers with `megaswift rollout --vllm_engine_kwargs"),
        ([[[0, 1]]] * 4, r"\[4, 1, 2\], and \[3, 1, 2\] are needed"),
        ([[[0, 1, 2]]] * 3, r"\[3, 1, 3\], and \[3, 1, 2\] are needed"),
        ([[[1, 1]]] * 3, "do not have 2 different ones of 4 experts"),
        ([[[1, 4]]] * 3, "do not have 2 different ones of 4 experts"),
    ],
)  # fmt: skip
def test_what_cannot_be_replayed_is_refused(experts: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        told(experts)
