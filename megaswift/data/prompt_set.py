"""Prompts as token ids, with the rows behind them."""

from dataclasses import dataclass

import numpy as np

from megaswift.data.encode import EncodedSet
from megaswift.data.prompts import PromptRow, PromptRows


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Entries of `encoded` are prompts; `rows` are those of the set that they come from."""

    encoded: EncodedSet
    rows: PromptRows

    def ids(self, entry: int) -> np.ndarray:
        """Return a prompt, int32 [tokens]."""
        return np.asarray(self.encoded.input_ids[self.encoded.starts[entry] : self.encoded.starts[entry + 1]])

    def row(self, entry: int) -> PromptRow:
        """Return what reward functions may read about a prompt."""
        return self.rows[int(self.encoded.samples[entry])]
