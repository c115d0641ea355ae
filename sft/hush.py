"""Keeps libraries from talking over what a command says: their progress bars, and what they tell each other."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any


def hush_progress_bars() -> None:
    """No progress bars of libraries where there is no terminal to draw them on. Call before any of them is imported:
    they read this once."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def hush_libraries() -> None:
    """Call once, after the command line is read. Warnings that a user could act on still show."""
    from transformers.utils import logging as transformers_logging

    disable: Any = transformers_logging.disable_progress_bar
    disable()
    # names that transformers deprecates and PEFT still uses: nothing that a user of this program could change
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    # PEFT holds an adapter's patterns against modules alone, and misses the parameters (experts) that they are for.
    # Where a pattern truly leads nowhere, the adapter's weights do not fit its layers, and it is refused.
    warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match any targeted")
    # said by us, with what it means for an export (`adapterparts.parted_note`), where merging parts the weights
    warnings.filterwarnings("ignore", message=r"Model has `tie_word_embeddings=True` and a tied layer is part")
    # bitsandbytes says on import that an optional package of faster CPU kernels is missing
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.CRITICAL)
