"""Settings: forms of GRPO's loss that do not clip ratios, or weigh what they clip."""

from dataclasses import dataclass

from megaswift.config.field import setting


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """How some forms of the loss weigh tokens (`megaswift rlhf --rlhf_type grpo --loss_type sapo`, fipo, real)."""

    tau_pos: float = setting(
        1.0, "sapo: how soon the gate closes for better completions as the ratio leaves 1; more: sooner"
    )
    tau_neg: float = setting(1.05, "sapo: and for worse completions")
    fipo_decay_rate: float = setting(
        32.0, "fipo: tokens behind a token after which what becomes of them counts half for it"
    )
    fipo_clip_range: float | None = setting(
        0.2, "fipo: weights are held to 1 and this more; none or 0: not held to anything"
    )
    fipo_clip_high_only: bool = setting(
        True, "fipo: weights never fall below 1; false: they may by fipo_clip_range"
    )
    fipo_safety_threshold: float | None = setting(
        4.0,
        "fipo: tokens of worse completions have no weight above 1 where their ratio is above this; none: as all",
    )
    real_tau: float = setting(
        0.5, "real: temperature of the scores that tell better completions of a group from worse ones"
    )
