"""Passes at depth 2 before the server accepts requests, so that no request waits for the compilation of a kernel.

vLLM warms up depth 1 only. After its warm-up it reports kernels that are compiled, or ends with
`--jit-monitor-mode=error`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context

from .attention import DeepTokens
from .transfer import indices

if TYPE_CHECKING:
    from .model import TaHForCausalLM

SPLITS = (1, 2, 4, 8, 16, 32, 64)  # all that `kernel.choose_splits` returns; each is compiled on its own


@torch.inference_mode()
def warm_up(model: TaHForCausalLM, vllm_config: Any) -> None:
    """Run a pass at depth 2 per variant of the kernel, and one of several tokens; the pool is as before.

    The tokens are those of block 0, which vLLM assigns to no request.

    Args:
        model: Model whose cache and pool are allocated. Without the kernel, nothing runs.
        vllm_config: Configuration of vLLM.
    """
    if not model.by_kernel:
        return
    pool, rows = model.pool, min(2, model.pages.block, model.pool.capacity)
    places = np.arange(rows)
    pool.take(places)
    tables = np.zeros((1, 1), np.int32)
    (entries,) = indices(pool.keys.device, pool.entries[places])
    with set_forward_context(None, vllm_config, num_tokens=rows):
        for count, splits in [(rows, 1), *((1, splits) for splits in SPLITS)]:
            tokens = DeepTokens(np.zeros(count, np.int64), places[:count], places[:count], tables)
            model._run_rows(tokens, pool.keys.new_zeros(count, model.config.hidden_size), splits)
    pool.release(places)
    pool.flush()
    pool.keys[:, entries], pool.values[:, entries] = 0, 0
    model.current.deep = None
