"""TRL's SFTTrainer on one json file of messages, packed by its best-fit-decreasing strategy; run in TRL's venv."""

import json
import sys


def main() -> None:
    """Train as the settings file says: model, data, output, lora (bool), checkpointing (bool), steps, length."""
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    with open(sys.argv[1]) as file:
        settings = json.load(file)
    config = SFTConfig(
        output_dir=settings["output"],
        max_length=settings["length"],
        packing=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        gradient_checkpointing=settings["checkpointing"],
        max_steps=settings["steps"],
        learning_rate=1e-5,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
    )
    lora = (
        LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        if settings["lora"]
        else None
    )
    data = load_dataset("json", data_files=settings["data"], split="train")
    SFTTrainer(model=settings["model"], args=config, train_dataset=data, peft_config=lora).train()
