"""Preference losses and gradients against TRL's own trainers: same weights, same reference, same tokens."""

from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.orpo import ORPOTrainer

from megaswift.config.preference import PreferenceConfig
from megaswift.data.encode import EncodedSet
from megaswift.kernels.linear_divergence.ops import OutputLayer, linear_divergence
from megaswift.tasks.catalogue import PAIR_LOSSES
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny
from tests.harness.training import Case, curves, synthetic_judged, temporary_folder
from tests.unit.small_tokenizers import small_tokenizer
from tests.unit.test_preference_losses import answers_of_pairs

TOLERANCE = 1e-5  # float32 on both sides; TRL's ORPO computes its odds in float32 as well
# name -> settings of ours, and of TRL
DPO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({"loss_type": "sigmoid"}, {}),
    "ipo": ({"loss_type": "ipo"}, {"loss_type": ["ipo"]}),
    "hinge": ({"loss_type": "hinge"}, {"loss_type": ["hinge"]}),
    "robust": (
        {"loss_type": "robust", "label_smoothing": 0.2},
        {"loss_type": ["robust"], "label_smoothing": 0.2},
    ),
    "sigmoid_norm": ({"loss_type": "sigmoid_norm"}, {"loss_type": ["sigmoid_norm"]}),
    **{
        name: ({"loss_type": name}, {"loss_type": [name]})
        for name in ("discopop", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")
    },
    "mpo": (
        {"loss_type": "sigmoid bco_pair", "loss_weights": ["0.8", "0.2"]},
        {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]},
    ),
    **{
        name: ({"f_divergence_type": name}, {"f_divergence_type": name})
        for name in ("forward_kl", "js_divergence")
    },
    "alpha_divergence": (
        {"loss_type": "ipo", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {
            "loss_type": ["ipo"],
            "f_divergence_type": "alpha_divergence",
            "f_alpha_divergence_coef": 0.3,
        },
    ),
    "ld": ({"ld_alpha": 0.3}, {"ld_alpha": 0.3}),
    "exo_pair": ({"loss_type": "exo_pair"}, {"loss_type": ["exo_pair"], "label_smoothing": 1e-3}),
}
KTO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "kto": ({"undesirable_weight": 0.8}, {"undesirable_weight": 0.8}),
    "apo": ({"loss_type": "apo_zero_unpaired"}, {"loss_type": "apo_zero_unpaired"}),
}
BETA = 0.5


@cache
def folders() -> tuple[Path, Path]:
    """The trained model and the reference, which differ."""
    return tuple(save_tiny(name, temporary_folder()) for name in ("llama", "llama-tied"))  # type: ignore[return-value]


@cache
def ours() -> dict[str, list[tuple[float, float]]]:
    rows = {
        "data": {"padding_free": False},
        "training": {"global_batch_size": 8, "micro_batch_size": 4, "train_iters": 1},
    }
    kinds = {"dpo": DPO, "kto": KTO}
    cases = [
        Case(
            name=f"{kind} {name}",
            task="rlhf",
            settings={
                **rows,
                "preference": {"rlhf_type": kind, "beta": BETA, "ref_model": str(folders()[1]), **settings},
            },
        )
        for kind, names in kinds.items()
        for name, (settings, _) in names.items()
    ]
    return run_distributed(curves, 1, folders()[0], cases)[0]


def padded(encoded: EncodedSet, entries: list[int]) -> dict[str, torch.Tensor]:
    spans = [slice(start, end) for start, end in pairwise(encoded.starts.tolist())]
    ids = [torch.tensor(np.array(encoded.input_ids[spans[entry]])).long() for entry in entries]
    masks = [torch.tensor(np.array(encoded.loss_weights[spans[entry]])).long() for entry in entries]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        "completion_mask": pad_sequence(masks, batch_first=True),
    }


def options(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "gradient_checkpointing": False,
        **more,
    }


def loss_and_norm(trainer: Any, inputs: dict[str, Any]) -> tuple[float, float]:
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    norms = [
        parameter.grad.double().norm()
        for parameter in trainer.model.parameters()
        if parameter.grad is not None
    ]
    return float(loss), float(torch.stack(norms).norm())


def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tokenizer() -> Any:
    return small_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}", special=[])


def agree(found: tuple[float, float], expected: tuple[float, float]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=TOLERANCE)
    assert found[1] == pytest.approx(expected[1], rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", DPO)
def test_dpo_has_the_loss_and_gradient_of_trl(name: str, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = DPOTrainer(
        model(folders()[0]), model(folders()[1]), args=DPOConfig(**options(tmp_path, beta=BETA, **DPO[name][1])),
        train_dataset=rows, processing_class=tokenizer(),
    )  # fmt: skip
    inputs = padded(synthetic_judged("dpo"), [*range(0, 16, 2), *range(1, 16, 2)])
    agree(ours()[f"dpo {name}"][0], loss_and_norm(trainer, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", KTO)
def test_kto_has_the_loss_and_gradient_of_trl(name: str, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": "a", "completion": word, "label": word == "b"} for word in "bc"])
    trainer = KTOTrainer(
        model(folders()[0]), model(folders()[1]),
        args=KTOConfig(**options(tmp_path, beta=BETA, per_device_train_batch_size=2, **KTO[name][1])),
        train_dataset=rows, processing_class=tokenizer(),
    )  # fmt: skip
    encoded = synthetic_judged("kto")
    assert encoded.targets is not None and encoded.mismatched is not None
    inputs = padded(encoded, list(range(8))) | {"label": torch.tensor(encoded.targets) == 1}
    if name == "kto":
        inputs |= {f"KL_{key}": value for key, value in padded(encoded.mismatched, list(range(8))).items()}
    agree(ours()[f"kto {name}"][0], loss_and_norm(trainer, inputs))


def test_orpo_simpo_and_cpo_have_the_losses_of_trl() -> None:
    pairs = answers_of_pairs().pairs
    chosen, rejected = pairs.chosen_P / pairs.chosen_length_P, pairs.rejected_P / pairs.rejected_length_P
    plain = {
        "rpo_alpha": None,
        "alpha": 0.0,
        "accelerator": SimpleNamespace(device="cpu"),
        "label_smoothing": 0.1,
    }
    orpo, *_ = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=BETA, **plain), chosen, rejected)
    assert torch.allclose(loss_of("orpo"), pairs.nll_P - orpo, rtol=0, atol=1e-6)
    simpo = SimpleNamespace(beta=BETA, loss_type="simpo", simpo_gamma=0.7, **plain)
    assert torch.allclose(
        loss_of("simpo", simpo_gamma=0.7, label_smoothing=0.1),
        CPOTrainer.cpo_loss(simpo, chosen, rejected)[0],
        rtol=0,
        atol=1e-12,
    )
    for form in ("sigmoid", "hinge", "ipo"):
        smoothing = 0.1 if form == "sigmoid" else 0.0
        cpo = SimpleNamespace(beta=BETA, loss_type=form, **plain)
        logps = (chosen, rejected) if form == "ipo" else (pairs.chosen_P, pairs.rejected_P)
        expected = CPOTrainer.cpo_loss(cpo, *logps)[0]
        assert torch.allclose(
            loss_of("cpo", loss_type=form, label_smoothing=smoothing), expected, rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_divergence_from_a_teacher_is_that_of_trl(beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        OutputLayer(
            hidden=torch.randn(9, 8, generator=generator), weight=torch.randn(31, 8, generator=generator)
        )
        for _ in range(2)
    )
    found = linear_divergence(student, teacher, torch.ones(9), beta=beta, vocab_size=31)
    logits = [(layer.hidden @ layer.weight.T)[None] for layer in (student, teacher)]
    theirs = GKDTrainer.generalized_jsd_loss(*logits, labels=torch.zeros(1, 9).long(), beta=beta)
    assert float(found) / 9 == pytest.approx(float(theirs), rel=TOLERANCE)


def loss_of(kind: str, **settings: Any) -> torch.Tensor:
    chosen = PreferenceConfig(rlhf_type=kind, beta=BETA, cpo_alpha=0.0, **settings)
    return PAIR_LOSSES[kind][0](answers_of_pairs(), chosen).losses_R
