"""Where a model's files are found: folders, both hub caches, and what is said when they are nowhere."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from megaswift.errors import ModelError
from megaswift.metadata import hub
from megaswift.metadata.hub import Files, locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def model(folder: Path, *, shards: tuple[str, ...] = (), indexed: tuple[str, ...] = ()) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for shard in shards:
        (folder / shard).write_bytes(b"")
    if indexed:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict(enumerate(indexed))})
        )
    return folder


@pytest.fixture
def hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of Hugging Face and one of ModelScope, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    return tmp_path / "hf" / "models--owner--name-1.5"


def snapshot(
    repository: Path, commit: str = COMMIT, revision: str = "main", **files: tuple[str, ...]
) -> Path:
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    return model(repository / "snapshots" / commit, **files)


def test_a_snapshot_without_a_tokenizer_is_completed_where_there_is_a_network(
    monkeypatch: pytest.MonkeyPatch, hugging_face: Path
) -> None:
    begun = snapshot(hugging_face)
    assert locate("owner/name-1.5") == begun  # no network: it may have none
    asked = []

    def download(*arguments: object) -> Path:
        asked.append(arguments)
        (begun / "tokenizer.json").write_text("{}")
        return begun

    monkeypatch.setattr(hub, "_download_from_hugging_face", download)
    assert locate("owner/name-1.5") == locate("owner/name-1.5") == begun
    assert len(asked) == 1


def test_a_folder_comes_before_any_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hugging_face: Path
) -> None:
    snapshot(hugging_face)
    folder = model(tmp_path / "owner" / "name-1.5")
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name-1.5").resolve() == folder
    assert locate(folder) == folder


def test_the_snapshot_of_main_is_found(hugging_face: Path) -> None:
    folder = snapshot(hugging_face)
    assert locate("owner/name-1.5") == folder


def test_a_revision_is_a_branch_or_a_commit(hugging_face: Path) -> None:
    snapshot(hugging_face)
    branch = snapshot(hugging_face, commit="f" * 40, revision="v2")
    assert locate("owner/name-1.5", revision="v2") == branch
    assert locate("owner/name-1.5", revision="f" * 40) == branch
    assert locate("owner/name-1.5").name == COMMIT


@pytest.mark.parametrize("place", ["models/owner/name-1.5", "owner/name-1.5", "models/owner/name-1___5"])
def test_each_layout_of_modelscope_s_cache_is_found(tmp_path: Path, hugging_face: Path, place: str) -> None:
    folder = model(tmp_path / "ms" / place)
    assert locate("owner/name-1.5") == folder
    assert locate("owner/name-1.5", use_hf=False) == folder
    with pytest.raises(ModelError):
        locate("owner/name-1.5", revision="v2")


def test_use_hf_decides_which_cache_goes_first(tmp_path: Path, hugging_face: Path) -> None:
    theirs, ours = model(tmp_path / "ms" / "models" / "owner" / "name-1.5"), snapshot(hugging_face)
    assert locate("owner/name-1.5") == ours
    assert locate("owner/name-1.5", use_hf=False) == theirs


def test_facts_need_a_config_and_weights_need_every_indexed_shard(hugging_face: Path) -> None:
    folder = snapshot(hugging_face, shards=("a.safetensors",), indexed=("a.safetensors", "b.safetensors"))
    assert locate("owner/name-1.5") == folder
    with pytest.raises(
        ModelError, match=r"has no weights \(\*\.safetensors\) in .*hf download owner/name-1\.5"
    ):
        locate("owner/name-1.5", files=Files.ALL)
    (folder / "b.safetensors").write_bytes(b"")
    assert locate("owner/name-1.5", files=Files.ALL) == folder


def test_one_file_of_weights_needs_no_index(hugging_face: Path) -> None:
    folder = snapshot(hugging_face, shards=("model.safetensors",))
    assert locate("owner/name-1.5", files=Files.ALL) == folder


def test_a_missing_model_says_where_was_looked_and_how_to_bring_it(
    tmp_path: Path, hugging_face: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        locate("owner/name-1.5")
    text = str(caught.value)
    assert "config.json" in text and str(hugging_face) in text and str(tmp_path / "ms") in text
    assert "`hf download owner/name-1.5`" in text and "login node" in text
    with pytest.raises(ModelError, match="modelscope download --model owner/name"):
        locate("owner/name-1.5", use_hf=False)


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "a/b/c", "bad name"])
def test_what_is_neither_folder_nor_id_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="neither a folder nor a hub id"):
        locate(name)


def test_a_download_brings_what_was_asked_for(hugging_face: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def download(name: str, **keys: object) -> str:
        asked.update(keys, name=name)
        return str(snapshot(hugging_face, shards=("model.safetensors",)))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("owner/name-1.5", revision="v2", files=Files.ALL, token="t").name == COMMIT
    assert (asked["name"], asked["revision"], asked["token"]) == ("owner/name-1.5", "v2", "t")
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list) and {"*.safetensors", "*.json"} <= set(patterns)
    assert not any("bin" in pattern for pattern in patterns)
