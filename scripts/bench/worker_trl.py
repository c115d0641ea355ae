"""One training of TRL's; prints speed, memory and losses as JSON. Runs in the benchmark's own environment."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

from common import peak_gib


def main(settings: dict[str, Any]) -> None:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = load_dataset("json", data_files=settings["rows"], split="train")
    best = settings["mode"] == "best"
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "output_dir": folder, "max_steps": settings["steps"], "learning_rate": settings["lr"],
            "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 1.0, "report_to": [],
            "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "completion_only_loss": True,
            "per_device_train_batch_size": settings["examples"], "train_sampling_strategy": "sequential",
            "optim": "adamw_torch_fused", "max_length": settings["max_tokens"],
        }  # fmt: skip
        options["use_cpu"] = not torch.cuda.is_available()
        if best:
            options |= {
                "packing": True, "max_length": settings["tokens_a_step"], "per_device_train_batch_size": 1,
                "gradient_checkpointing": False,
            }  # fmt: skip
        kwargs: dict[str, Any] = {}
        if settings["tuning"] == "qlora":
            kwargs["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )  # fmt: skip
        if best:
            # the base in the precision that computes: weights that are frozen need no more
            kwargs["dtype"] = "float32" if settings["tuning"] == "full" else "bfloat16"
        if kwargs:
            options["model_init_kwargs"] = kwargs
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model=settings["model"], args=SFTConfig(**options), train_dataset=rows, callbacks=[Clock()],
            peft_config=None if settings["tuning"] == "full" else lora,
        )  # fmt: skip
        counted = trainer.train_dataset
        trainer.train()
        per_step = settings["examples"] if not best else 1
        taken = counted.select(range(min(len(counted), per_step * settings["steps"])))
        tokens = [len(row["input_ids"]) for row in taken]
        after_first = sum(tokens[per_step:])
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(
        json.dumps(
            {
                "tokens_per_second": after_first / (ends[-1] - ends[0]),
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else peak_gib(),
                "losses": losses,
                "tokens": sum(tokens),
            }
        )
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
