"""CUDA graphs of the second pass: a pass of few tokens takes less time than the launches of its kernels.

A graph has a fixed number of rows, and reads its inputs from tensors of its own. A pass runs the smallest graph with
room for its tokens. The remaining rows are tokens at position 0 of the first request. Their keys go to an entry of the
pool that no token has (`DeepPool.spare`), and their output is dropped. Passes of more tokens, and passes of mixed
depths, have no graph.

Shapes: M tokens of a pass, m rows of a graph, N pages of the longest request, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.distributed.parallel_state import graph_capture
from vllm.forward_context import set_forward_context

from .attention import DeepPass

if TYPE_CHECKING:
    from .model import TaHForCausalLM

SIZES = (1, 2, 4, 8, 16, 32, 64)  # rows; a step that only decodes rarely has more hard tokens

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


@dataclass
class PassGraph:
    """A recorded pass of m rows, and the tensors that it reads and writes."""

    x: Tensor  # [m, D] inputs
    deep: DeepPass  # positions, entries and owners [m]; tables [m, N]
    replay: Callable[[], None]
    out: Tensor  # [m, D] contribution to the final hidden states

    def run(self, deep: DeepPass, x: Tensor) -> Tensor:
        """Run the planned pass `deep` of M <= m tokens with inputs `x` [M, D]; return its output [M, D].

        The host does not wait.
        """
        M, mine = len(x), self.deep
        assert deep.tables is not None and deep.owners is not None
        assert mine.tables is not None and mine.owners is not None
        self.x[:M].copy_(x)
        rows = [(mine.positions, deep.positions, 0), (mine.owners, deep.owners, 0)]
        rows.append((mine.entries, deep.entries, deep.pool.spare))
        for held, given, of_others in rows:
            held[:M].copy_(given)
            held[M:].fill_(of_others)
        requests, pages = deep.tables.shape
        mine.tables[:requests, :pages].copy_(deep.tables)
        self.replay()
        return self.out[:M].clone()  # the next graph may use the memory of `out`


class PassGraphs:
    """Graphs of the second pass, by their number of rows.

    Args:
        model: Model whose cache and pool are allocated, and whose kernel attends at depth 2.
        longest: Maximum tokens of a request.
        most: Rows of the largest graph that is needed.
        record: Function that takes the computation of a graph and returns what repeats it, and its output. Tests on a
            CPU, where nothing can be recorded, give one that computes again.
    """

    def __init__(self, model: TaHForCausalLM, longest: int, most: int, record: Record) -> None:
        sizes = [size for size in SIZES if size < 2 * most]
        self.by_size = {size: self._record(model, size, longest, record) for size in reversed(sizes)}

    def fitting(self, tokens: int) -> PassGraph | None:
        """Return the smallest graph with room for a number of tokens, if there is one."""
        return next((self.by_size[size] for size in sorted(self.by_size) if size >= tokens), None)

    @staticmethod
    def _record(model: TaHForCausalLM, size: int, longest: int, record: Record) -> PassGraph:
        pool, pages = model.pool, -(-longest // model.pages.block) * (model.pages.block // model.pages.page)
        device = pool.keys.device
        at, owners = (torch.zeros(size, dtype=torch.long, device=device) for _ in range(2))
        entries = torch.full((size,), pool.spare, device=device)
        tables = torch.zeros(size, pages, dtype=torch.int32, device=device)  # block 0 is no request's
        own = model.config.attention == "own"
        deep = DeepPass(pool, own, at, entries, owners=owners, tables=tables)
        x = pool.keys.new_zeros(size, model.config.hidden_size)
        replay, out = record(lambda: model.run_pass(deep, x.clone()))  # layers may write into their input
        return PassGraph(x, deep, replay, out)


@torch.inference_mode()
def record_graphs(model: TaHForCausalLM, vllm_config: Any) -> PassGraphs:
    """Record the graphs of a model on a GPU.

    Args:
        model: Model whose cache and pool are allocated.
        vllm_config: Configuration of vLLM.

    Raises:
        RuntimeError: A pass cannot be recorded; the message names the setting that leaves the graphs out.
    """
    memory, device = torch.cuda.graph_pool_handle(), model.pool.keys.device

    def record(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        compute()  # compiles kernels; libraries allocate
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory, stream=torch.cuda.current_stream(device)):
            out = compute()
        return graph.replay, out

    most, longest = vllm_config.scheduler_config.max_num_seqs, vllm_config.model_config.max_model_len
    with ExitStack() as stack:
        stack.enter_context(set_forward_context(None, vllm_config, num_tokens=SIZES[-1]))
        stack.enter_context(graph_capture(device))  # of the processes' all-reduce, too
        try:
            return PassGraphs(model, longest, most, record)
        except RuntimeError as error:
            raise RuntimeError(
                f"the second pass cannot be recorded as a CUDA graph ({str(error).splitlines()[0]}); "
                """--additional-config '{"second_pass_graphs": false}' leaves its graphs out"""
            ) from error
        finally:
            model.current.deep = None
