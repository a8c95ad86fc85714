"""TRL's GRPOTrainer with vLLM beside it, on one json file of prompts; run in an environment that holds both.

On processors TRL 1.16 cannot hand its weights to vLLM 0.32: `model.load_weights` fails on layers that vLLM has packed, and its
server mode speaks NCCL. So its vLLM gets them here as ours does, by this project's own worker method; what TRL does before and
after is its own. vLLM's settings that TRL does not pass on (float32, no compilation, size of the cache) are set as well.
"""

import json
import sys
import time
from functools import partial
from typing import Any


def main() -> None:
    """Train as the settings file says, and print the seconds of each step and of the two things that vLLM does in it."""
    import vllm
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from trl.generation import vllm_generation

    with open(sys.argv[1]) as file:
        settings = json.load(file)
    vllm_generation.LLM = partial(vllm.LLM, dtype="float32", **settings["engine"])

    def sync_weights(self: Any) -> None:
        self.llm.collective_rpc("megaswift_take", args=(self._iter_named_params(),))
        self.llm.reset_prefix_cache()

    spent: dict[str, list[float]] = {"sync": [], "generate": [], "step": [], "cpu": []}

    def timed(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            found = function(*args, **kwargs)
            spent[name].append(time.perf_counter() - began)
            return found

        return call

    kind = vllm_generation.VLLMGeneration
    kind.sync_weights = timed("sync", sync_weights)
    kind.generate = timed("generate", kind.generate)

    class Clock(TrainerCallback):
        """Notes how long steps take, from the end of one to the end of the next."""

        last: tuple[float, float] | None = None

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            now = time.perf_counter(), time.process_time()
            if self.last is not None:
                spent["step"].append(now[0] - self.last[0])
                spent["cpu"].append(now[1] - self.last[1])
            self.last = now

    def reward(completions: Any, **columns: Any) -> list[float]:
        return [-0.01 * len(one[0]["content"]) for one in completions]

    config = GRPOConfig(
        output_dir=settings["output"],
        per_device_train_batch_size=settings["batch"],
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        num_generations=settings["group"],
        max_completion_length=settings["longest"],
        max_steps=settings["steps"],
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        learning_rate=1e-6,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=settings["room"],
        model_init_kwargs={"dtype": "float32"},
    )
    data = load_dataset("json", data_files=settings["data"], split="train").rename_column(
        "messages", "prompt"
    )
    GRPOTrainer(
        model=settings["model"], reward_funcs=reward, args=config, train_dataset=data, callbacks=[Clock()]
    ).train()
    print(json.dumps(spent))


if __name__ == "__main__":
    main()
