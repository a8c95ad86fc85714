"""Megatron adapters and PEFT folders: the same logits as peft computes, in every layout, also with different A matrices."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megaswift.config.model import ModelConfig
from megaswift.config.run import RunConfig
from megaswift.config.tuner import TunerConfig
from megaswift.converters.adapters import load_peft, save_peft
from megaswift.converters.export import export_hf
from megaswift.converters.load import load_weights
from megaswift.converters.lora_targets import adapted_modules, whole_tensors
from megaswift.converters.peft_folder import read_adapter
from megaswift.errors import ConfigError, WeightsError
from megaswift.mcore.process_groups import initialise
from megaswift.metadata.read import get_model_meta
from megaswift.models.build import build_model
from megaswift.models.lora import apply_lora
from megaswift.models.tuner import finish_tuner
from megaswift.parallel.layout import Layout
from megaswift.platforms.platform import select_platform
from megaswift.training.freeze import open_modules
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny
from tests.harness.training import Case, prepared, steps

LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(world=2, tp=2),
    "tp4": Layout(world=4, tp=4),  # more ranks than kv heads
    "tp2_pp2": Layout(world=4, tp=2, pp=2),
    "tp2_ep2_etp2": Layout(world=4, tp=2, ep=2, etp=2, sequence_parallel=True),
}
RUN = RunConfig(model=ModelConfig(torch_dtype="float32"))
TOKENS = torch.tensor([[5, 17, 99, 3, 42, 130, 1]])
# The Megatron model and transformers round differently; logits are of order 1.
TOLERANCE = 2e-5


def build(
    rank: int, folder: Path, layout: Layout, tuner: TunerConfig, ranks: Mapping[str, int] | None = None
) -> list[Any]:
    initialise(layout, seed=1, timeout_min=2)
    meta = get_model_meta(folder)
    chunks = build_model(meta, RUN, layout, select_platform("cpu"))
    apply_lora(chunks, tuner, meta, seed=3, ranks=ranks, modules=adapted_modules(meta, tuner))
    open_modules(chunks, meta, layout, rank, tuner)
    load_weights(chunks, meta, layout, rank, folder)
    finish_tuner(chunks, tuner, device=torch.device("cpu"), seed=1, fresh=True)
    return chunks


def from_peft(
    rank: int, world_size: int, folder: Path, adapter_folder: Path, output: Path, layout: Layout
) -> dict[str, int]:
    """Load an adapter, then save it as a PEFT folder and merged into the model; return the ranks that differ."""
    meta = get_model_meta(folder)
    adapter = read_adapter(adapter_folder, meta)
    tuner = adapter.adopt(TunerConfig(tuner_type="lora"), meta)
    chunks = build(rank, folder, layout, tuner, adapter.ranks(meta))
    load_peft(chunks, meta, layout, rank, adapter)
    save_peft(chunks, meta, layout, rank, output / "adapter", tuner=tuner, dtype="float32")
    export_hf(chunks, meta, layout, rank, output / "merged", dtype="float32", merge_lora=True)
    return adapter.ranks(meta)


def trained(
    rank: int, world_size: int, folder: Path, output: Path, layout: Layout, tuner: TunerConfig
) -> None:
    """Make adapters with a B that is the same under every layout, and save them both ways."""
    meta = get_model_meta(folder)
    chunks = build(rank, folder, layout, tuner)
    randomise(chunks, folder, layout, rank, tuner)
    save_peft(chunks, meta, layout, rank, output / "adapter", tuner=tuner, dtype="float32")
    export_hf(chunks, meta, layout, rank, output / "merged", dtype="float32", merge_lora=True)


def randomise(chunks: list[Any], folder: Path, layout: Layout, rank: int, tuner: TunerConfig) -> None:
    """Give every B random elements; copies of one element on several ranks get one value by being loaded."""
    generator = torch.Generator().manual_seed(rank)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.endswith("lora_b.weight"):
                parameter.data.normal_(generator=generator, std=0.3)
            elif parameter.requires_grad and "lora_" not in name:
                parameter.data *= 1.25


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(TOKENS).logits
    return found


def base_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def make_peft(folder: Path, output: Path, *, seed: int = 0, **settings: Any) -> torch.Tensor:
    """Save a random adapter with peft itself and return the adapted model's logits."""
    torch.manual_seed(seed)
    model = get_peft_model(
        base_model(folder), LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    )
    for name, parameter in model.named_parameters():
        if "magnitude" in name:  # peft starts with the norms of the rows, which change nothing
            parameter.data *= 0.5 + torch.rand(parameter.shape)
    model.save_pretrained(output)
    return logits(model)


def check_equal(a: Path, b: Path) -> None:
    """Compare two adapter files bit by bit."""
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (a, b))
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.ranks(4)
@pytest.mark.parametrize("layout", ["one", "tp2", "tp4", "tp2_pp2"])
@pytest.mark.parametrize(("name", "use_dora"), [("llama-tied", False), ("qwen2", False), ("qwen2", True)])
def test_adapter_of_peft_comes_back_bit_identical_and_merges_to_the_same_logits(
    tmp_path: Path, name: str, use_dora: bool, layout: str
) -> None:
    folder = save_tiny(name, tmp_path / "model")
    expected = make_peft(
        folder, tmp_path / "peft", r=3, lora_alpha=5, target_modules=DENSE, use_dora=use_dora
    )
    found = run_distributed(
        from_peft, LAYOUTS[layout].world, folder, tmp_path / "peft", tmp_path, LAYOUTS[layout]
    )
    assert found[0]["decoder.layers.3.self_attention.linear_qkv"] == 9
    assert found[0]["decoder.layers.0.mlp.linear_fc1"] == 6
    check_equal(tmp_path / "peft", tmp_path / "adapter")
    assert (logits(base_model(tmp_path / "merged")) - expected).abs().max() < TOLERANCE
    reopened = PeftModel.from_pretrained(base_model(folder), tmp_path / "adapter")
    assert torch.equal(logits(reopened), expected)


@pytest.mark.ranks(2)
def test_heads_that_tp_does_not_divide_keep_their_adapters(tmp_path: Path) -> None:
    folder = save_tiny(
        "llama", tmp_path / "model", hidden_size=72, num_attention_heads=9, num_key_value_heads=3
    )
    expected = make_peft(folder, tmp_path / "peft", r=2, lora_alpha=4, target_modules=DENSE)
    run_distributed(from_peft, 4, folder, tmp_path / "peft", tmp_path, Layout(world=4, tp=4))
    check_equal(tmp_path / "peft", tmp_path / "adapter")
    assert (logits(base_model(tmp_path / "merged")) - expected).abs().max() < TOLERANCE


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": DENSE},
        {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": DENSE},
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "lora_alpha": 6, "target_modules": ["down_proj"], "layers_to_transform": [1, 3]},
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": DENSE,
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"layers.1.mlp.up_proj": 20},
        },
    ],
    ids=["rslora", "dora", "q_and_v_only", "some_layers", "patterns"],
)
def test_settings_of_peft_give_the_same_function(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = save_tiny("llama-tied", tmp_path / "model")
    expected = make_peft(folder, tmp_path / "peft", **settings)
    run_distributed(from_peft, 2, folder, tmp_path / "peft", tmp_path, LAYOUTS["tp2"])
    assert (logits(base_model(tmp_path / "merged")) - expected).abs().max() < TOLERANCE
    reopened = PeftModel.from_pretrained(base_model(folder), tmp_path / "adapter")
    assert (logits(reopened) - expected).abs().max() < TOLERANCE


@pytest.mark.ranks(2)
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gemma4_text"])
def test_adapter_with_a_shared_a_opens_in_peft(tmp_path: Path, name: str, use_rslora: bool) -> None:
    folder = save_tiny(name, tmp_path / "model")
    tuner = TunerConfig(tuner_type="lora", lora_rank=3, lora_alpha=7, use_rslora=use_rslora)
    run_distributed(trained, 1, folder, tmp_path, LAYOUTS["one"], tuner)
    expected = logits(base_model(tmp_path / "merged"))
    opened = PeftModel.from_pretrained(base_model(folder), tmp_path / "adapter")
    assert (logits(opened) - expected).abs().max() < TOLERANCE
    assert (expected - logits(base_model(folder))).abs().max() > 0.01  # the adapter does something
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.2.self_attn"
    assert torch.equal(tensors[f"{prefix}.q_proj.lora_A.weight"], tensors[f"{prefix}.v_proj.lora_A.weight"])
    found = run_distributed(from_peft, 2, folder, tmp_path / "adapter", tmp_path / "again", LAYOUTS["tp2"])
    assert found[0] == {}
    check_equal(tmp_path / "adapter", tmp_path / "again" / "adapter")


@pytest.mark.ranks(4)
@pytest.mark.parametrize("layout", ["tp2", "tp2_pp2"])
@pytest.mark.parametrize(
    ("name", "modules", "files"),
    [
        ("llama", ["embed_tokens", "lm_head"], {"model.embed_tokens.weight", "lm_head.weight"}),
        ("llama-tied", ["lm_head", "model.norm"], {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}),
        ("qwen2", ["1.self_attn.o_proj", "1.input_layernorm"], {"model.layers.1.self_attn.o_proj.weight", "model.layers.1.input_layernorm.weight"}),
    ],
)  # fmt: skip
def test_modules_that_train_whole_lie_in_the_folder_and_come_back(
    tmp_path: Path, name: str, modules: list[str], files: set[str], layout: str
) -> None:
    folder = save_tiny(name, tmp_path / "model")
    cut = ["q_proj", "k_proj", "v_proj"]  # their B is cut by tp: every rank may draw its own
    tuner = TunerConfig(tuner_type="lora", lora_rank=3, target_modules=cut, modules_to_save=modules)
    run_distributed(trained, LAYOUTS[layout].world, folder, tmp_path, LAYOUTS[layout], tuner)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    whole = {tensor.removeprefix("base_model.model.") for tensor in tensors if "lora_" not in tensor}
    assert whole == files
    base = load_file(folder / "model.safetensors")
    for tensor in files & base.keys():
        assert torch.equal(tensors[f"base_model.model.{tensor}"], 1.25 * base[tensor])
    expected = logits(base_model(tmp_path / "merged"))
    opened = PeftModel.from_pretrained(base_model(folder), tmp_path / "adapter")
    assert (logits(opened) - expected).abs().max() < TOLERANCE
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(config["modules_to_save"]) == {tensor.removesuffix(".weight") for tensor in files}
    again = tmp_path / "again"
    run_distributed(from_peft, LAYOUTS[layout].world, folder, tmp_path / "adapter", again, LAYOUTS[layout])
    check_equal(tmp_path / "adapter", again / "adapter")
    assert torch.equal(logits(base_model(again / "merged")), expected)


@pytest.mark.ranks(2)
def test_whole_modules_of_peft_are_read(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    settings = {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["gate_proj", "up_proj"],
        "modules_to_save": ["lm_head", "o_proj"],
    }
    torch.manual_seed(0)
    model = get_peft_model(
        base_model(folder), LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    )
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data *= 1.5
    model.save_pretrained(tmp_path / "peft")
    run_distributed(from_peft, 2, folder, tmp_path / "peft", tmp_path, LAYOUTS["tp2"])
    assert (logits(base_model(tmp_path / "merged")) - logits(model)).abs().max() < TOLERANCE
    check_equal(tmp_path / "peft", tmp_path / "adapter")


def test_a_tied_matrix_that_peft_has_parted_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama-tied", tmp_path / "model")
    make_peft(
        folder,
        tmp_path / "peft",
        r=2,
        lora_alpha=4,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
    )
    with pytest.raises(WeightsError, match="apart, and they are one matrix"):
        read_adapter(tmp_path / "peft", get_model_meta(folder))


@pytest.mark.parametrize(
    ("model", "modules", "message"),
    [
        ("llama", ["embed_token"], "modules_to_save=embed_token is no module of llama. Did you mean embed_tokens?"),
        ("llama", ["down_proj"], "which get an adapter too"),
        ("llama", ["q_proj"], "without model.layers.0.self_attn.k_proj.weight, model.layers.0.self_attn.v_proj.weight"),
        ("qwen3_moe", ["mlp.gate"], "transformers packs experts under other names"),
    ],
)  # fmt: skip
def test_modules_that_cannot_train_whole_are_refused(
    tmp_path: Path, model: str, modules: list[str], message: str
) -> None:
    meta = get_model_meta(save_tiny(model, tmp_path))
    tuner = TunerConfig(tuner_type="lora", target_modules=["down_proj"], modules_to_save=modules)
    with pytest.raises(ConfigError) as refused:
        whole_tensors(meta, tuner)
    assert message in str(refused.value)


SOME = r"model\.layers\.(0\.self_attn\.o|[13]\.mlp\.(gate|up))_proj"


@pytest.mark.ranks(2)
def test_an_adapter_of_some_modules_opens_in_peft(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    tuner = TunerConfig(tuner_type="lora", lora_rank=3, lora_alpha=7, target_regex=SOME)
    run_distributed(trained, 2, folder, tmp_path, Layout(world=2, pp=2), tuner)
    names = {
        "model.layers.0.self_attn.o_proj",
        *(f"model.layers.{layer}.mlp.{name}_proj" for layer in (1, 3) for name in ("gate", "up")),
    }
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors} == names
    assert (
        set(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]) == names
    )
    opened = PeftModel.from_pretrained(base_model(folder), tmp_path / "adapter")
    assert {name.split(".lora_A")[0] for name, _ in opened.named_modules() if name.endswith("lora_A")} == {
        f"base_model.model.{name}" for name in names
    }
    expected = logits(base_model(tmp_path / "merged"))
    assert (logits(opened) - expected).abs().max() < TOLERANCE
    assert (expected - logits(base_model(folder))).abs().max() > 0.01
    run_distributed(from_peft, 1, folder, tmp_path / "adapter", tmp_path / "again", LAYOUTS["one"])
    assert (logits(base_model(tmp_path / "again" / "merged")) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("model", "expression", "message"),
    [
        (
            "llama",
            r"layers\.0\.mlp\.up_proj",
            "matches no module of llama; it must match the whole name, such as model.layers.0",
        ),
        (
            "llama",
            r".*\.q_proj",
            "matches model.layers.0.self_attn.q_proj without model.layers.0.self_attn.k_proj",
        ),
        ("llama", r"lm_head|.*down_proj", "matches lm_head, which can have no adapter"),
        ("mixtral", r".*layers\.1.*experts\.0\..*", "or they are experts of one layer"),
    ],
)
def test_an_expression_that_names_no_whole_module_is_refused(
    tmp_path: Path, model: str, expression: str, message: str
) -> None:
    meta = get_model_meta(save_tiny(model, tmp_path))
    with pytest.raises(ConfigError) as refused:
        adapted_modules(meta, TunerConfig(tuner_type="lora", target_regex=expression))
    assert message in str(refused.value)


def feed_forward_gradients(rank: int, world_size: int, folder: Path) -> list[float]:
    """Return the largest gradient of each layer's B where the feed-forward part alone has adapters and is recomputed."""
    tuner = {"tuner_type": "lora", "lora_dropout": 0.0, "target_regex": r".*\.(gate|up)_proj"}
    recomputed = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    with prepared(folder, Case(name="mlp", settings={"tuner": tuner, "training": recomputed})) as trained:
        steps(trained, 0, 1)
        layers = trained.engine.chunks[0].module.decoder.layers
        return [float(layer.mlp.linear_fc1.lora_b.weight.abs().max()) for layer in layers]


def test_adapters_of_recomputed_parts_train_in_the_first_layer_too(tmp_path: Path) -> None:
    (largest,) = run_distributed(feed_forward_gradients, 1, save_tiny("llama", tmp_path))
    assert min(largest) > 0


def mix(rank: int, world_size: int, folder: Path, adapter_folder: Path, output: Path, layout: Layout) -> None:
    """Load stacked adapters and fill the zero blocks of B, as training does."""
    meta = get_model_meta(folder)
    adapter = read_adapter(adapter_folder, meta)
    tuner = adapter.adopt(TunerConfig(tuner_type="lora"), meta)
    chunks = build(rank, folder, layout, tuner, adapter.ranks(meta))
    load_peft(chunks, meta, layout, rank, adapter)
    if rank == 0:  # one element on one rank is enough for all to change the file
        weight = chunks[0].decoder.layers[0].self_attention.linear_qkv.lora_b.weight
        weight.data[-1, 0] = 0.5
    save_peft(chunks, meta, layout, rank, output / "adapter", tuner=tuner, dtype="float32")
    export_hf(chunks, meta, layout, rank, output / "merged", dtype="float32", merge_lora=True)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_stacked_adapter_that_has_trained_is_written_with_its_whole_rank(
    tmp_path: Path, use_rslora: bool
) -> None:
    folder = save_tiny("llama-tied", tmp_path / "model")
    make_peft(folder, tmp_path / "peft", r=2, lora_alpha=4, use_rslora=use_rslora, target_modules=DENSE)
    run_distributed(mix, 2, folder, tmp_path / "peft", tmp_path, LAYOUTS["tp2"])
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {f"model.layers.0.self_attn.{name}_proj": 6 for name in "qkv"}
    opened = PeftModel.from_pretrained(base_model(folder), tmp_path / "adapter")
    assert (logits(opened) - logits(base_model(tmp_path / "merged"))).abs().max() < TOLERANCE


@pytest.mark.ranks(4)
@pytest.mark.parametrize("layout", ["one", "tp2_ep2_etp2"])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_packed_experts_of_peft_are_read(tmp_path: Path, name: str, layout: str) -> None:
    folder = save_tiny(name, tmp_path / "model")
    targets = {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    expected = make_peft(folder, tmp_path / "peft", r=2, lora_alpha=4, **targets)
    run_distributed(from_peft, LAYOUTS[layout].world, folder, tmp_path / "peft", tmp_path, LAYOUTS[layout])
    assert (logits(base_model(tmp_path / "merged")) - expected).abs().max() < TOLERANCE


@pytest.mark.ranks(1)
@pytest.mark.parametrize(
    ("name", "expression"),
    [("qwen3_moe", None), ("mixtral", None), ("mixtral", r".*layers\.2\..*experts\.\d+\.w[123]")],
)
def test_adapters_of_experts_open_in_peft(tmp_path: Path, name: str, expression: str | None) -> None:
    folder = save_tiny(name, tmp_path / "model")
    tuner = TunerConfig(tuner_type="lora", lora_rank=2, lora_alpha=6, target_regex=expression)
    run_distributed(trained, 1, folder, tmp_path, LAYOUTS["one"], tuner)
    opened = PeftModel.from_pretrained(base_model(folder), tmp_path / "adapter")
    assert (logits(opened) - logits(base_model(tmp_path / "merged"))).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, r"lm_head\.lora_A"),
        ({"target_modules": ["q_proj"], "bias": "all"}, "bias='all'"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["act_fn"]}, "modules_to_save=act_fn in"),
    ],
)
def test_adapters_that_megatron_cannot_hold_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    make_peft(folder, tmp_path / "peft", r=2, lora_alpha=4, **settings)
    with pytest.raises(WeightsError, match=message):
        read_adapter(tmp_path / "peft", get_model_meta(folder))


def test_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    make_peft(folder, tmp_path / "peft", r=2, lora_alpha=4, target_modules=["q_proj"])
    other = save_tiny("llama", tmp_path / "other", hidden_size=32)
    with pytest.raises(WeightsError, match="belongs to another model"):
        read_adapter(tmp_path / "peft", get_model_meta(other))


@pytest.mark.parametrize("damage", ["no weights", "no config", "not LoRA"])
def test_incomplete_adapter_is_refused(tmp_path: Path, damage: str) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    make_peft(folder, tmp_path / "peft", r=2, lora_alpha=4, target_modules=["q_proj"])
    if damage == "no weights":
        (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    elif damage == "no config":
        (tmp_path / "peft" / "adapter_config.json").unlink()
    else:
        (tmp_path / "peft" / "adapter_config.json").write_text(
            '{"peft_type": "IA3", "r": 2, "lora_alpha": 2}'
        )
    with pytest.raises(WeightsError, match=r"adapter_model\.safetensors|adapter_config\.json"):
        read_adapter(tmp_path / "peft", get_model_meta(folder))


def test_half_of_a_pair_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    make_peft(folder, tmp_path / "peft", r=2, lora_alpha=4, target_modules=["q_proj"])
    path = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight")
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=r"layers\.1\.self_attn\.q_proj\.lora_A"):
        read_adapter(tmp_path / "peft", get_model_meta(folder))


def dora_gradients(rank: int, world_size: int, folder: Path, adapter: Path, output: Path) -> None:
    """Write the gradients of the mean square of the logits as if they were an adapter, and the logits."""
    meta = get_model_meta(folder)
    found = read_adapter(adapter, meta)
    tuner = found.adopt(TunerConfig(tuner_type="lora", lora_dropout=0.0), meta)
    layout = Layout()
    (chunk,) = chunks = build(rank, folder, layout, tuner)
    load_peft(chunks, meta, layout, rank, found)
    seen = chunk(TOKENS, torch.arange(TOKENS.shape[1])[None], None)
    seen.float().square().mean().backward()
    for parameter in chunk.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(parameter.grad)
    save_peft(chunks, meta, layout, rank, output, tuner=tuner, dtype="float32")


def test_gradients_of_dora_are_those_of_peft(tmp_path: Path) -> None:
    folder = save_tiny("qwen2", tmp_path / "model")
    tuner = TunerConfig(tuner_type="lora", lora_rank=4, lora_dropout=0.0, use_dora=True)
    run_distributed(trained, 1, folder, tmp_path, Layout(), tuner)  # weights that Megatron fuses share A
    model = PeftModel.from_pretrained(base_model(folder), tmp_path / "adapter", is_trainable=True)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 0.5 + torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "peft")
    model(TOKENS).logits.square().mean().backward()
    run_distributed(dora_gradients, 1, folder, tmp_path / "peft", tmp_path / "gradients")
    found = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_file = name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")
            if "lora_A" in name and not any(alone in name for alone in ("o_proj", "down_proj")):
                continue  # a shared A has the sum of these
            scale = float(parameter.grad.abs().max())
            assert scale > 0
            assert float((found[in_file] - parameter.grad).abs().max()) <= 1e-5 * scale, name
            compared += 1
    assert compared == 4 * (7 + 7 + 2)  # layers; norms, B, and A


PISSA = TunerConfig(
    tuner_type="lora",
    lora_rank=4,
    lora_alpha=8,
    lora_dropout=0.0,
    init_weights="pissa",
    target_modules=["o_proj", "down_proj"],
)


def pissa_start(rank: int, world_size: int, folder: Path) -> dict[str, tuple[torch.Tensor, ...]]:
    """Return A, B and their gradients at the start, by the name of the linear in transformers, and the logits."""
    (chunk,) = build(rank, folder, Layout(), PISSA)
    seen = chunk(TOKENS, torch.arange(TOKENS.shape[1])[None], None)
    seen.float().square().mean().backward()
    found = {}
    for number, layer in enumerate(chunk.decoder.layers):
        linears = {
            "self_attn.o_proj": layer.self_attention.linear_proj,
            "mlp.down_proj": layer.mlp.linear_fc2,
        }
        for name, linear in linears.items():
            pair = linear.lora_a.weight, linear.lora_b.weight
            found[f"layers.{number}.{name}"] = tuple(x.detach() for w in pair for x in (w, w.grad))
    return {**found, "logits": (seen.detach(),)}


def test_the_start_of_pissa_and_its_gradients_are_those_of_peft(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    base = base_model(folder)
    before = base(TOKENS).logits.detach()
    settings = LoraConfig(
        init_lora_weights="pissa",
        r=4,
        lora_alpha=8,
        target_modules=PISSA.target_modules,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, settings)
    model(TOKENS).logits.square().mean().backward()
    [found] = run_distributed(pissa_start, 1, folder)
    # The base is not touched, so that nothing changes at the start: B A - B_0 A_0 = 0.
    torch.testing.assert_close(found.pop("logits")[0][..., : before.shape[-1]], before, rtol=0, atol=1e-5)
    theirs = dict(model.named_parameters())
    assert len(found) == 2 * 4
    for name, (a_RD, grad_a_RD, b_FR, grad_b_FR) in found.items():
        ours = a_RD, grad_a_RD, b_FR.t(), grad_b_FR.t()
        matrices = [theirs[f"base_model.model.model.{name}.lora_{letter}.default.weight"] for letter in "AB"]
        a, b = matrices
        assert a.grad is not None and b.grad is not None
        signs_R1 = (ours[0] * a.detach()).sum(1).sign()[:, None]  # singular vectors have none of their own
        for x_R, y_R in zip(ours, (a.detach(), a.grad, b.detach().t(), b.grad.t()), strict=True):
            scale = float(y_R.abs().max())
            assert scale > 0 and float((signs_R1 * x_R - y_R).abs().max()) <= 2e-5 * scale, name


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_4"])
def test_an_adapter_of_pissa_opens_in_peft_beside_the_untouched_base(tmp_path: Path, how: str) -> None:
    folder = save_tiny("qwen2", tmp_path / "model")
    tuner = TunerConfig(tuner_type="lora", lora_rank=4, lora_dropout=0.0, init_weights=how)
    run_distributed(trained, 1, folder, tmp_path, Layout(), tuner)
    adapted = logits(PeftModel.from_pretrained(base_model(folder), tmp_path / "adapter"))
    merged = logits(base_model(tmp_path / "merged"))
    torch.testing.assert_close(adapted, merged, rtol=0, atol=1e-4 * float(merged.abs().max()))
    assert float((merged - logits(base_model(folder))).abs().max()) > 1e-2


def first_moves(rank: int, world_size: int, folder: Path, ratio: float | None) -> dict[str, torch.Tensor]:
    """Return how far the first step moves each matrix of the adapters."""
    case = Case(
        name="lora+",
        settings={"tuner": {"tuner_type": "lora", "lora_dropout": 0.0, "lorap_lr_ratio": ratio}},
    )
    with prepared(folder, case) as trained:
        (chunk,) = trained.engine.chunks
        matrices = {name: weight for name, weight in chunk.named_parameters() if weight.requires_grad}
        before = {name: weight.detach().clone() for name, weight in matrices.items()}
        steps(trained, 0, 1)
        return {name: weight.detach() - before[name] for name, weight in matrices.items()}


def test_lora_plus_moves_b_so_many_times_as_far(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    (plain,), (faster,) = (run_distributed(first_moves, 1, folder, ratio) for ratio in (None, 16.0))
    for name, move in plain.items():
        if name.endswith("lora_b.weight"):  # from zero: no weight decay yet
            torch.testing.assert_close(faster[name], 16 * move, rtol=1e-5, atol=0)
            assert move.any()
        else:
            assert torch.equal(faster[name], move)


def dora_on_experts(rank: int, world_size: int, folder: Path) -> str:
    """Return what is said about DoRA on the linears of experts."""
    with pytest.raises(ConfigError) as refused:
        build(rank, folder, Layout(), TunerConfig(tuner_type="lora", use_dora=True))
    return str(refused.value)


def test_dora_on_experts_is_refused(tmp_path: Path) -> None:
    (said,) = run_distributed(dora_on_experts, 1, save_tiny("qwen3_moe", tmp_path))
    assert said.startswith("use_dora=true is not built for experts")
