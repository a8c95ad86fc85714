"""Two outcomes side by side."""

from megaswift.parity.documents import Outcome, read_tensors

# In float32 the two sides differ by the order of their sums; these are some tens of times what correct models show.
LOGITS_LIMIT = 1e-4  # of the largest logit
LOSS_LIMIT = 1e-5  # relative
GRADIENT_LIMIT = 1e-4  # of the gradient's norm
SMALLEST_NORM = 1e-8  # a gradient below it is zero but for rounding


def differences(ours: Outcome, theirs: Outcome) -> list[str]:
    """Return what differs by more than the limits, one line each; empty when the sides agree."""
    found = []
    if ours.logits_TV.shape != theirs.logits_TV.shape:
        found.append(f"logits are {list(ours.logits_TV.shape)}, not {list(theirs.logits_TV.shape)}")
    else:
        scale = theirs.logits_TV.abs().max()
        size = float((ours.logits_TV - theirs.logits_TV).abs().max() / scale)
        if not size <= LOGITS_LIMIT:  # NaN fails too
            found.append(f"logits differ by {size:.1e} of the largest (limit {LOGITS_LIMIT:.0e})")
    size = abs(ours.loss - theirs.loss) / abs(theirs.loss)
    if not size <= LOSS_LIMIT:
        found.append(f"loss is {ours.loss:.6f}, not {theirs.loss:.6f}")
    return found + gradient_differences(ours, theirs)


def gradient_differences(ours: Outcome, theirs: Outcome) -> list[str]:
    """Return the gradients that differ, by the names of the file's tensors."""
    found = []
    mine, expected = read_tensors(ours.gradients), read_tensors(theirs.gradients)
    found += [
        f"{name} has a gradient in one of the two models only"
        for name in sorted(mine.keys() ^ expected.keys())
    ]
    for name in sorted(mine.keys() & expected.keys(), key=_by_layer):
        if mine[name].shape != expected[name].shape:
            found.append(f"{name} is {list(mine[name].shape)}, not {list(expected[name].shape)}")
            continue
        norm = expected[name].norm().clamp_min(SMALLEST_NORM)
        size = float((mine[name] - expected[name]).norm() / norm)
        if not size <= GRADIENT_LIMIT:
            found.append(f"gradient of {name} differs by {size:.1e} (limit {GRADIENT_LIMIT:.0e})")
    return found


def _by_layer(name: str) -> tuple[list[int], str]:
    return [int(part) for part in name.split(".") if part.isdigit()], name
