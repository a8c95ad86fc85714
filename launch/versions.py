"""Which versions go together: one table with its sources, and what installed packages say about each other."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from megaswift.errors import LaunchError
from megaswift.logs import get_logger

log = get_logger("versions")

REFUSED, WARNED, NOTED = (
    "refused",
    "warned",
    "noted",
)  # a run stops; logs it; `megaswift doctor` alone says it


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Two packages that do not go together unless the second is one that the first `needs`."""

    package: str
    versions: str  # of the package that the rule is about
    other: str | None  # None: the versions themselves are wrong
    needs: str  # versions of the other package
    effect: str
    why: str
    source: str


NO_WHEEL = "there is no wheel for this torch: it works where it was compiled with it, which `megaswift doctor --load` tries"


def _flash(versions: str, newest: str, tag: str) -> Rule:
    return Rule(
        package="transformer-engine",
        versions=versions,
        other="flash-attn",
        needs=f">=2.1.1,<={newest}",
        effect=WARNED,
        why="Transformer Engine does not use it then, and attention falls back to cuDNN's",
        source=f"TransformerEngine {tag}, dot_product_attention/utils.py, FlashAttentionUtils",
    )


RULES = (
    Rule(
        package="megatron-core",
        versions=">=0.16",
        other="torch",
        needs=">=2.6",
        effect=REFUSED,
        why="Megatron-Core uses functions that older ones lack",
        source="megatron-core 0.16.1 to 0.19.0, pyproject.toml, dependencies",
    ),
    Rule(
        package="megatron-core",
        versions=">=0.16,<0.17",
        other="transformer-engine",
        needs=">=2.9.0a0,<2.12",
        effect=WARNED,
        why="NVIDIA tests this Megatron-Core with other versions of Transformer Engine",
        source="megatron-core 0.16.0 and 0.16.1, pyproject.toml, extra dev; 0.17 and later name no bounds",
    ),
    Rule(
        package="transformer-engine",
        versions="<2.4",
        other=None,
        needs="",
        effect=REFUSED,
        why="this project needs 2.4 or newer",
        source="pyproject.toml, extra gpu",
    ),
    _flash(">=2.4,<2.6", "2.7.4.post1", "v2.4 and v2.5"),
    _flash(">=2.6,<2.10", "2.8.1", "v2.6 to v2.9"),
    _flash(">=2.10,<2.19", "2.8.3", "v2.10 to v2.18"),
    Rule(
        package="flash-attn",
        versions=">=2.7.3,<2.8",
        other="torch",
        needs="<2.7",
        effect=NOTED,
        why=NO_WHEEL,
        source="flash-attention v2.7.3 to v2.7.4.post1, .github/workflows/publish.yml",
    ),
    Rule(
        package="flash-attn",
        versions=">=2.8,<2.9",
        other="torch",
        needs="<2.9",
        effect=NOTED,
        why=NO_WHEEL,
        source="flash-attention v2.8.3.post1, .github/workflows/publish.yml",
    ),
    Rule(
        package="apex",
        versions="==0.9.10.dev0",
        other=None,
        needs="",
        effect=REFUSED,
        why="it is a toolkit for Pyramid web sites that has NVIDIA's package's name, and Megatron-Core fails on it. Uninstall it, "
        "and build https://github.com/NVIDIA/apex where it is wanted",
        source="https://github.com/NVIDIA/apex/issues/1063",
    ),
)
# Packages whose own requirements are looked at.
WATCHED = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "transformer-engine-torch",
    "flash-attn",
    "transformers",
    "tokenizers",
    "datasets",
    "peft",
    "safetensors",
)


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """Packages that are installed and do not go together."""

    packages: str  # "transformer-engine 2.9.0 and flash-attn 2.8.3"
    effect: str
    why: str
    source: str

    def __str__(self) -> str:
        return f"{self.packages}: {self.why} ({self.source})."


def installed(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def conflicts(versions: Mapping[str, str]) -> list[Conflict]:
    """Return what the table says about these versions (package -> version)."""
    return [_conflict(rule, versions) for rule in RULES if _applies(rule, versions)]


def unmet_requirements(versions: Mapping[str, str]) -> list[Conflict]:
    """Return which requirements of the installed packages among `versions`, as they state them, are not met."""
    found = []
    for name, own in versions.items():
        for line in requires(name) or ():
            try:
                wanted = Requirement(line)
            except InvalidRequirement:  # older than the standard
                continue
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
                continue
            there = installed([wanted.name]).get(wanted.name)
            if there is not None and not _among(there, str(wanted.specifier)):
                packages = f"{name} {own} and {wanted.name} {there}"
                why = f"{name} requires {wanted.name} {wanted.specifier}"
                source = f"metadata of {name} {own}"
                found.append(Conflict(packages=packages, effect=WARNED, why=why, source=source))
    return found


def check_versions() -> None:
    """Log what does not go together in this environment; raises LaunchError for what cannot work."""
    names = {name for rule in RULES for name in (rule.package, rule.other) if name is not None}
    for conflict in conflicts(installed(sorted(names))):
        if conflict.effect == REFUSED:
            raise LaunchError(str(conflict))
        if conflict.effect == WARNED:
            log.warning("%s", conflict)


def _applies(rule: Rule, versions: Mapping[str, str]) -> bool:
    own, other = versions.get(rule.package), None if rule.other is None else versions.get(rule.other)
    if own is None or not _among(own, rule.versions):
        return False
    return rule.other is None or (other is not None and not _among(other, rule.needs))


def _conflict(rule: Rule, versions: Mapping[str, str]) -> Conflict:
    packages = f"{rule.package} {versions[rule.package]}"
    if rule.other is not None:
        packages += f" and {rule.other} {versions[rule.other]}, not {rule.needs}"
    return Conflict(packages=packages, effect=rule.effect, why=rule.why, source=rule.source)


def _among(found: str, specifier: str) -> bool:
    """Say whether a version is among those of a specifier; local parts such as +cu128 do not count, odd ones pass."""
    try:
        public = Version(found).public
    except InvalidVersion:
        return True
    return SpecifierSet(specifier).contains(public, prereleases=True)
