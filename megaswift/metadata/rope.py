"""Rotary positions of a config: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).

Names and defaults: transformers 5.23, modeling_rope_utils.py.
"""

from collections.abc import Mapping
from typing import Any

from megaswift.errors import ModelError, nearest
from megaswift.metadata.config_reader import ConfigReader
from megaswift.metadata.meta import RopeScaling

# Kind -> key of the file -> field of RopeScaling.
_FIELDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "ntk_alpha": {"alpha": "alpha"},
    "proportional": {"factor": "factor", "partial_rotary_factor": "proportion"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_max_position",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "longrope": {
        "factor": "factor",
        "original_max_position_embeddings": "original_max_position",
        "attention_factor": "attention_factor",
        "short_factor": "short_factor",
        "long_factor": "long_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_max_position",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
    },
}
_REQUIRED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "ntk_alpha": ("alpha",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
    "yarn": ("factor",),
}


def rope_parameters(config: ConfigReader) -> dict[str, Any]:
    """Return the rope dictionary of the file, or the family's default; the older name goes first."""
    older = config.values.get("rope_scaling")
    parameters = older or config.values.get("rope_parameters") or config.defaults["rope_parameters"] or {}
    if not isinstance(parameters, dict):
        raise config.fail("rope_scaling" if older else "rope_parameters", "It must be null or a dictionary.")
    return parameters


def theta(config: ConfigReader) -> float:
    """The base of the rotary frequencies; inside the rope dictionary it wins over the key beside it."""
    beside = config.get("rope_theta")
    return float(rope_parameters(config).get("rope_theta", beside))


def rotary_fraction(config: ConfigReader) -> float:
    """The part of a head that turns; inside the rope dictionary it wins over the key beside it."""
    beside = config.nullable("partial_rotary_factor", float)
    inside = rope_parameters(config).get("partial_rotary_factor")
    return float(inside or beside or 1.0)


def scaling(config: ConfigReader) -> RopeScaling | None:
    """The stretching of the frequencies, or None."""
    return scaling_of(rope_parameters(config), config)


def scaling_of(
    parameters: Mapping[str, Any], config: ConfigReader, *, understood: tuple[str, ...] = ()
) -> RopeScaling | None:
    """Return the stretching that one rope dictionary asks for; `understood` are keys that the caller reads itself.

    Raises ModelError on a kind or a key that is not known.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _FIELDS:
        known = nearest(str(kind), _FIELDS)
        raise ModelError(f"rope_type={kind!r} in config.json of {config.name} is not supported.{known}")
    fields = _FIELDS[kind]
    _check_keys(parameters, kind, config, understood)
    if kind == "default":
        return None
    values = {
        field: _frozen(parameters[key]) for key, field in fields.items() if parameters.get(key) is not None
    }
    if "original_max_position_embeddings" in fields:
        values.setdefault("original_max_position", config.get("max_position_embeddings"))
    return RopeScaling(kind=kind, **values)


def global_theta(config: ConfigReader) -> float:
    """The base of the layers with full attention, in families whose sliding layers have positions of their own."""
    beside = config.get("rope_theta")
    return float(_part(config, "full_attention").get("rope_theta", beside))


def global_scaling(config: ConfigReader) -> RopeScaling | None:
    """The stretching of the layers with full attention; the sliding layers must have none."""
    if scaling_of(_part(config, "sliding_attention"), config) is not None:
        raise config.fail("rope_parameters", "Stretched positions of sliding layers are not supported.")
    return scaling_of(_part(config, "full_attention"), config)


def local_theta(config: ConfigReader) -> float:
    """The base of the sliding layers: rope_local_base_freq where the family has that key, else the default."""
    beside = config.get("rope_local_base_freq" if "rope_local_base_freq" in config.defaults else "rope_theta")
    return float(_part(config, "sliding_attention").get("rope_theta", beside))


def _part(config: ConfigReader, kind: str) -> dict[str, Any]:
    """Return the rope dictionary of one kind of layer; the older flat rope_scaling is about full attention."""
    parts = config.values.get("rope_parameters") or config.defaults["rope_parameters"] or {}
    for name in sorted(set(parts) - {"full_attention", "sliding_attention"}):
        raise config.fail("rope_parameters", f"It has one dictionary for each kind of layer, not {name}.")
    older = config.values.get("rope_scaling") if kind == "full_attention" else None
    return {**(parts.get(kind) or {}), **(older or {})}


def _check_keys(
    parameters: Mapping[str, Any], kind: str, config: ConfigReader, understood: tuple[str, ...]
) -> None:
    """Refuse rope keys that the kind does not use, and rope dictionaries that lack what it needs."""
    known = {*_FIELDS[kind], "rope_theta", "rope_type", "type", *understood}
    if "partial_rotary_factor" in config.defaults:
        known.add("partial_rotary_factor")
    for key in sorted(set(parameters) - known):
        raise ModelError(
            f"{key}={parameters[key]!r} in the rope parameters of {config.name} means nothing for rope_type={kind}."
            f"{nearest(key, known)} Remove the key or name the rope_type that it belongs to."
        )
    for key in _REQUIRED.get(kind, ()):
        if parameters.get(key) is None:
            raise ModelError(
                f"The rope parameters of {config.name} lack {key}. rope_type={kind} needs it; add it."
            )


def _frozen(value: Any) -> Any:
    """Return lists as tuples of floats."""
    return tuple(float(one) for one in value) if isinstance(value, list) else value


ROPE: dict[str, Any] = {"rope_theta": theta, "rope_scaling": scaling}
PARTIAL_ROPE: dict[str, Any] = {**ROPE, "rotary_fraction": rotary_fraction}
