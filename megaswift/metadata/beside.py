"""The Hugging Face files that lie beside a Megatron-Core checkpoint: config.json, tokenizer and so on."""

import os
from pathlib import Path

MODEL_FILES = "hf"  # where `megaswift convert` puts them


def model_beside(checkpoint: Path) -> Path | None:
    """Return the folder with config.json that belongs to a checkpoint; None where there is none.

    `checkpoint` may be the folder of one iteration or the one above. ms-swift (4.6.0.dev0) leaves the files in the latter itself.
    """
    checkpoint = checkpoint.expanduser()
    above = Path(os.path.abspath(checkpoint)).parent  # also of one that ends in ..
    places = (checkpoint / MODEL_FILES, above / MODEL_FILES, checkpoint, above)
    return next((place for place in places if (place / "config.json").is_file()), None)
