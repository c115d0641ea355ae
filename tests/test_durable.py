"""Files as others may read them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from sft.durable import as_readable_as


def test_files_become_as_readable_as_another(tmp_path: Path) -> None:
    """safetensors makes files that nobody but their owner reads."""
    reference, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    reference.write_text("{}")
    reference.chmod(0o644)
    save_file({"a": torch.zeros(1)}, weights)
    weights.chmod(0o600)
    as_readable_as(reference, [weights])
    assert weights.stat().st_mode & 0o777 == 0o644
