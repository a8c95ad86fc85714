"""Which versions go together."""

import pytest
from packaging.specifiers import SpecifierSet

from megaswift.errors import LaunchError
from megaswift.launch import versions
from megaswift.launch.versions import (
    NOTED,
    REFUSED,
    RULES,
    WARNED,
    WATCHED,
    check_versions,
    conflicts,
    installed,
    unmet_requirements,
)

GOOD = {
    "torch": "2.8.0+cu128",
    "megatron-core": "0.16.1",
    "transformer-engine": "2.10.0+769ed778",
    "flash-attn": "2.8.3",
    "apex": "0.1",
}


def effects(**changes: str) -> list[str]:
    found = conflicts({**GOOD, **{name.replace("_", "-"): value for name, value in changes.items()}})
    return [one.effect for one in found]


def test_versions_that_go_together_pass() -> None:
    assert effects() == effects(torch="2.6.0", flash_attn="2.7.4.post1") == []
    assert effects(megatron_core="0.18.0", transformer_engine="2.18.0") == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"transformer_engine": "2.9.0"}, [WARNED]),  # reads flash-attn up to 2.8.1
        ({"transformer_engine": "2.12.0"}, [WARNED]),  # newer than Megatron-Core 0.16 is tested with
        ({"transformer_engine": "2.12.0", "megatron_core": "0.17.0"}, []),
        ({"transformer_engine": "2.5.0"}, [WARNED, WARNED]),  # both
        ({"transformer_engine": "1.13.0"}, [WARNED, REFUSED]),
        ({"transformer_engine": "2.10.0", "flash_attn": "2.8.3.post1"}, [WARNED]),
        ({"torch": "2.5.1"}, [REFUSED]),
        ({"torch": "2.9.0"}, [NOTED]),
        ({"torch": "2.7.0", "flash_attn": "2.7.4.post1"}, [NOTED]),
        ({"apex": "0.9.10.dev0"}, [REFUSED]),
    ],
)
def test_versions_that_do_not_are_named(changes: dict[str, str], expected: list[str]) -> None:
    assert effects(**changes) == expected


def test_packages_that_are_not_installed_conflict_with_nothing() -> None:
    for name in GOOD:
        assert conflicts({name: GOOD[name]}) == []


def test_every_rule_has_a_source_and_versions_that_can_be_read() -> None:
    for rule in RULES:
        assert rule.source and rule.why
        SpecifierSet(rule.versions), SpecifierSet(rule.needs)


def test_this_environment_fits_together() -> None:
    check_versions()
    assert unmet_requirements(installed(WATCHED)) == []


def test_what_cannot_work_ends_a_run_with_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda names: {**GOOD, "apex": "0.9.10.dev0"})
    with pytest.raises(LaunchError, match=r"^apex 0.9.10.dev0: it is a toolkit for Pyramid.*issues/1063"):
        check_versions()


def test_a_requirement_that_is_not_met_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2.0", "tokenizers<=0.23.0,>=0.22", 'colorama; extra == "dev"', "what is this"]
    monkeypatch.setattr(versions, "requires", lambda name: lines)
    there = {"tokenizers": "0.24.1", "torch": "2.8.0+cpu"}
    monkeypatch.setattr(versions, "version", lambda name: there[name])
    (found,) = unmet_requirements({"transformers": "5.0.0"})
    assert found.packages == "transformers 5.0.0 and tokenizers 0.24.1"
    assert found.why.startswith("transformers requires tokenizers") and found.effect == WARNED
