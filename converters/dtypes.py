"""Raw elements of one dtype as those of another, by numpy alone."""

import numpy as np
import numpy.typing as npt


def cast(bits: npt.NDArray[np.unsignedinteger], source: str, target: str) -> npt.NDArray[np.unsignedinteger]:
    """Return raw elements of one dtype as those of another, rounded to the nearest, ties to even, as torch does."""
    if source == target:
        return bits
    if source == "BF16":
        wide = bits.astype(np.uint32) << np.uint32(16)
    else:
        wide = bits.view({"F16": np.float16, "F32": np.float32}[source]).astype(np.float32).view(np.uint32)
    if target == "F32":
        return wide
    if target == "F16":
        with np.errstate(over="ignore"):  # too large becomes infinite, as in torch
            return wide.view(np.float32).astype(np.float16).view(np.uint16)
    half = np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))
    is_nan = (wide & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, np.uint32(0x7FC0), (wide + half) >> np.uint32(16)).astype(np.uint16)
