"""A GGUF file is a model like any other: converted once, quietly, by one process of several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft.errors import ModelError
from sft.gguf import gguf_file, model_source, tokenizer_source

BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these stand for themselves in byte-level BPE
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_gguf(path: Path) -> Any:
    """Writes a random two-layer Llama with a byte-level tokenizer; returns the model that it should become."""
    import gguf
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    others = [chr(256 + n) for n in range(256 - len(BYTES))]
    tokens = [*SPECIAL, *map(chr, BYTES), *others, "He"]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, rms_norm_eps=1e-5,
        )
    ).to(torch.bfloat16)  # fmt: skip
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * 257)
    writer.add_token_merges(["H e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}")
    heads = {"q": 4, "k": 2}
    for name, weight in model.state_dict().items():
        short = name.removeprefix("model.").replace("layers.", "blk.").replace("embed_tokens", "token_embd")
        for theirs, ours in {
            "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm",
        }.items():  # fmt: skip
            short = short.replace(theirs, ours)
        short = "output_norm.weight" if short == "norm.weight" else short
        values = weight.float().numpy()
        if (
            count := heads.get(name.rpartition("_proj")[0][-1:])
        ) and "attn" in short:  # llama.cpp's order of a rotation
            values = values.reshape(count, 2, -1, 32).swapaxes(1, 2).reshape(values.shape)
        if short != "lm_head.weight":
            writer.add_tensor(short, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


CONVERT = "import sys; from sft.gguf import model_source; print(model_source(sys.argv[1]))"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_two_processes_convert_once_and_quietly_and_the_weights_are_the_file_s(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    expected = make_gguf(tmp_path / "tiny.gguf")
    env = {**os.environ, "SFT_CACHE": str(tmp_path / "cache"), "TQDM_DISABLE": "1"}  # as the command line sets it
    converting = [
        subprocess.Popen(
            [sys.executable, "-c", CONVERT, str(tmp_path / "tiny.gguf")],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    (one, said), (other, also_said) = (process.communicate(timeout=120) for process in converting)
    assert [process.returncode for process in converting] == [0, 0], said + also_said
    assert one == other
    folder = Path(one.strip())
    assert (said + also_said).splitlines() == [f"tiny.gguf: converted once, into {folder}"]
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model", "model.lock"]

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "He"}], tokenize=False) == (
        "<|im_start|>user\nHe<|im_end|>\n"
    )


def test_names_that_stand_for_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one/a.gguf").touch()
    assert gguf_file(str(tmp_path / "one")) == tmp_path / "one/a.gguf"
    assert gguf_file(str(tmp_path / "one/a.gguf")) == tmp_path / "one/a.gguf"
    assert gguf_file("org/name") is None
    assert (tokenizer_source("org/name"), model_source("org/name")) == ("org/name", "org/name")
    (tmp_path / "one/b.gguf").touch()
    with pytest.raises(ModelError, match=r"should hold one \.gguf file, found: a\.gguf, b\.gguf"):
        gguf_file(str(tmp_path / "one"))
    (tmp_path / "one/config.json").write_text("{}")
    assert gguf_file(str(tmp_path / "one")) is None
    with pytest.raises(ModelError, match=r"there is no file 'none\.gguf'"):
        gguf_file("none.gguf")
    with pytest.raises(ModelError, match="package 'no_such_package' is not installed"):
        gguf_file("pkg://no_such_package")
