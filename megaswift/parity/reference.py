"""The side of transformers: random weights, logits, loss and gradients.

Letters: T tokens of all documents, V vocabulary.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

from megaswift.parity.documents import Outcome, loss_weights, packs, total_weight

CHOICE_BIAS = "e_score_correction_bias"  # files hold it in float32, whatever the dtype of the weights
LAYER_SCALAR = "layer_scalar"  # a buffer, that is a constant too

# Of heads that remember many tokens. Those that forget at once prove little, and lose digits in the sums of their decays.
DECAY = "linear_attn.A_log"


def save_random(
    config: PreTrainedConfig,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **loading: Any,
) -> Path:
    """Save a random model; norms and biases are random too, so that none can go missing unseen. Return `folder`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **loading)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(DECAY):
                parameter.uniform_(-3.0, 0.0)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(std=0.08)
        state = model.state_dict()
        for key in state:
            if key.endswith(CHOICE_BIAS):
                state[key].normal_(std=0.1)
            elif key.endswith(LAYER_SCALAR):
                state[key] = torch.empty_like(state[key]).uniform_(0.5, 1.5).to(dtype)
            else:
                state[key] = state[key].to(dtype)
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)  # no longer the same memory, so save_pretrained would write both
    model.to(dtype).save_pretrained(folder, state_dict=state)
    return folder


def read_config(folder: Path, *, trust_remote_code: bool) -> PreTrainedConfig:
    """Return transformers' own reading of the folder's config.json; raises what transformers raises."""
    return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Let transformers read and write without bars: the models here are a megabyte."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def has_trusted_code(config: Mapping[str, Any], folder: Path | None, *, trust_remote_code: bool) -> bool:
    """Whether the model's folder brings code of its own that may run."""
    return "auto_map" in config and trust_remote_code and folder is not None


def write_question(config: Mapping[str, Any], target: Path, *, code_from: Path | None) -> None:
    """Write a config.json for transformers to read, with the code of the folder `code_from`, or without any."""
    asked = {key: value for key, value in config.items() if code_from is not None or key != "auto_map"}
    (target / "config.json").write_text(json.dumps(asked))
    if code_from is not None:
        for path in code_from.glob("*.py"):
            shutil.copyfile(path, target / path.name)


def class_defaults(
    config: Mapping[str, Any], folder: Path | None, *, trust_remote_code: bool
) -> dict[str, Any]:
    """Return what the class of a config.json takes for every key, given or not."""
    own_code = has_trusted_code(config, folder, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="megaswift-config-") as scratch:
        write_question(config, Path(scratch), code_from=folder if own_code else None)
        return dict(read_config(Path(scratch), trust_remote_code=own_code).to_dict())


def transformers_outcome(folder: Path, gradients: Path, *, trust_remote_code: bool = False) -> Outcome:
    """Run a folder's model in float32, one document at a time, and leave the gradients in the folder `gradients`."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=trust_remote_code
    ).eval()
    vocab_size = model.config.vocab_size
    logits, losses = [], []
    for document in (document for pack in packs(vocab_size) for document in pack):
        logits_TV = model(document[None]).logits[0]
        token_losses = F.cross_entropy(logits_TV[:-1], document[1:], reduction="none")
        losses.append((token_losses * loss_weights(document)).sum())
        logits.append(logits_TV.detach())
    loss = torch.stack(losses).sum() / total_weight(vocab_size)
    loss.backward()
    for name, parameter in model.named_parameters():
        # Constants stay as they are on both sides.
        if parameter.requires_grad and not name.endswith(CHOICE_BIAS):
            parameter.data = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    model.save_pretrained(gradients)
    return Outcome(logits_TV=torch.cat(logits), loss=float(loss.detach()), gradients=gradients)
