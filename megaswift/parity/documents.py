"""What both sides compute: documents, which of their tokens carry loss, and what comes of it.

Letters: T tokens of all documents, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

# Documents of each pack. Some are longer than the windows and the stretched contexts of small models; the documents of
# one pack are all on the same side of it, because a stretching that depends on the length looks at a whole batch.
PACKS = ((5, 1, 12), (23, 17))
SMALLEST_TOKEN = 3  # those below are special


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one side computes."""

    logits_TV: torch.Tensor  # float32
    loss: float
    gradients: Path  # a Hugging Face folder


def packs(vocab_size: int) -> list[list[torch.Tensor]]:
    """Return the token ids of the documents of each pack, int64."""
    generator = torch.Generator().manual_seed(3)
    return [
        [torch.randint(SMALLEST_TOKEN, vocab_size, (length,), generator=generator) for length in lengths]
        for lengths in PACKS
    ]


def loss_weights(document: torch.Tensor) -> torch.Tensor:
    """Return the weights of the tokens document[1:], float32; some carry no loss."""
    return (document[1:] % 3 != 0).float()


def total_weight(vocab_size: int) -> float:
    """Return by what the summed loss of all documents is divided."""
    return float(sum(loss_weights(document).sum() for pack in packs(vocab_size) for document in pack))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a Hugging Face folder."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # safe_open is no mapping
    return found
