"""Models of unknown types: taken for a known family when the comparison proves it, refused otherwise."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from megaswift.converters.candidates import candidates
from megaswift.converters.tensor_files import read_folder
from megaswift.errors import ModelError
from megaswift.metadata.proven import NOTE
from megaswift.metadata.read import get_model_meta
from megaswift.parity.infer import other_defaults
from megaswift.parity.reference import save_random
from tests.harness.distributed import run_distributed
from tests.harness.tiny import SIZES, save_tiny
from tests.parity.test_verify import verified

CODE = {
    "configuration_{name}.py": """
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "{name}"
""",
    "modeling_{name}.py": """
from transformers import LlamaForCausalLM
from .configuration_{name} import OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * {factor}
        return output
""",
}


def saved(model_type: str, folder: Path) -> Path:
    return save_random(AutoConfig.for_model(model_type, **SIZES), folder)


def renamed(name: str, folder: Path, *, factor: float = 1.0) -> Path:
    """Return a Llama under a name that transformers does not know, with code of its own that scales the logits.

    Two models in one process need two names: transformers keeps the classes that it has loaded.
    """
    config = json.loads((save_tiny("llama", folder) / "config.json").read_text())
    auto_map = {
        "AutoConfig": f"configuration_{name}.OwnConfig",
        "AutoModelForCausalLM": f"modeling_{name}.OwnForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps({**config, "model_type": name, "auto_map": auto_map}))
    for file, text in CODE.items():
        (folder / file.format(name=name)).write_text(text.format(name=name, factor=factor))
    return folder


def test_a_type_that_transformers_knows_is_taken_for_the_family_that_computes_the_same(
    tmp_path: Path,
) -> None:
    folder = saved("iquestcoder", tmp_path / "model")
    with pytest.raises(ModelError, match=r"convert --verify --model .* looks for one that computes the same"):
        get_model_meta(folder)
    [(code, text)] = run_distributed(verified, 1, folder, [], False)
    assert code == 0, text
    assert "against transformers' iquestcoder" in text
    meta = get_model_meta(folder)
    assert (meta.model_type, meta.family) == ("iquestcoder", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(ModelError, match="model_type=iquestcoder"):  # the note is about another config.json
        get_model_meta(folder)


def test_a_type_whose_names_fit_but_not_its_mathematics_is_refused(tmp_path: Path) -> None:
    folder = saved("helium", tmp_path / "model")  # a Llama by its names, whose rotary pairs are neighbours
    assert "llama" in {
        one.family for one in candidates(_config(folder), folder, read_folder(folder)) if not one.fault
    }
    [(code, text)] = run_distributed(verified, 1, folder, [], False)
    assert code == 2 and "llama: logits differ by" in text
    assert not (folder / NOTE).exists()


def test_a_refusal_names_the_keys_and_tensors_that_do_not_fit(tmp_path: Path) -> None:
    folder = saved("glm", tmp_path / "model")
    [(code, text)] = run_distributed(verified, 1, folder, [], False)
    assert code == 2
    assert "glm4: The tensors of" in text
    assert "missing: model.layers.0.post_self_attn_layernorm.weight" in text


def test_names_alone_are_no_proof(tmp_path: Path) -> None:
    folder = renamed("nobody", tmp_path / "model")
    [(code, text)] = run_distributed(verified, 1, folder, [], False)
    assert code == 2
    assert "By its keys and tensors it could be" in text and "llama" in text and "names prove nothing" in text
    assert "--trust_remote_code true runs it" in text


def test_own_code_is_compared_with_if_it_is_trusted(tmp_path: Path) -> None:
    trusted = ["--trust_remote_code", "true"]
    [(code, text)] = run_distributed(verified, 1, renamed("nobody", tmp_path / "same"), trusted, False)
    assert code == 0 and "nobody (llama) against its own code" in text, text
    assert get_model_meta(tmp_path / "same").family == "llama"
    other = renamed("somebody", tmp_path / "other", factor=2.0)
    [(code, text)] = run_distributed(verified, 1, other, trusted, False)
    assert code == 2 and "llama: logits differ by" in text


def test_a_key_that_the_class_fills_otherwise_is_a_fault(tmp_path: Path) -> None:
    config = _config(save_tiny("llama", tmp_path / "model"))
    assert other_defaults(config, None, "llama", trust_remote_code=False) == []
    del config["max_position_embeddings"]
    (fault,) = other_defaults({**config, "model_type": "qwen3"}, None, "llama", trust_remote_code=False)
    assert fault == (
        "max_position_embeddings is absent from config.json; the class takes 32768, the family llama 2048"
    )


def _config(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "config.json").read_text()))
