"""What `test_distributed.py` starts with torchrun, two processes on gloo: `-m helpers.distributed CASE FILE`.

Each case trains on two rows, one per rank, of which the second has no hard token, and writes what the first rank has.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor

from helpers.models import labels, tah, token_ids
from tah import TaHForCausalLM
from tah.core.loss import shift
from tah.model import TrainingPass

SEAMS = {"next_input": "hidden", "output": "zero_init", "max_depth": 3}


def batch() -> dict[str, Tensor]:
    """Two rows [2, T]; only the first has hard tokens."""
    ids, depth_labels = token_ids(), labels(depth=3)
    depth_labels[1] = 1
    targets = ids.clone()
    targets[:, :3], targets[1, 8:] = -100, -100  # rows of different weight
    return {"input_ids": ids, "labels": targets, "depth_labels": depth_labels}


def model() -> TaHForCausalLM:
    made = tah(**SEAMS).train()
    made.decider.requires_grad_(False)
    return made


def items(rows: dict[str, Tensor]) -> int:
    return int((shift(rows["labels"]) != -100).sum())


def alone() -> dict[str, Tensor]:
    """Loss and gradients of both rows in one process."""
    one, rows = model(), batch()
    loss = one(**rows, num_items_in_batch=items(rows)).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in one.named_parameters() if p.grad is not None}


def ddp(**options: TrainingPass) -> dict[str, Tensor]:
    """As DDP trains: gradients averaged, so each loss is multiplied by the number of ranks.

    Args:
        options: of the forward.
    """
    from torch.nn.parallel import DistributedDataParallel

    rank, world, rows = dist.get_rank(), dist.get_world_size(), batch()
    inner = model()
    wrapped = DistributedDataParallel(inner, find_unused_parameters=False)
    mine = {name: x[rank : rank + 1] for name, x in rows.items()}
    loss = wrapped(**mine, num_items_in_batch=items(rows), **options).loss
    (loss * world).backward()
    dist.all_reduce(loss := loss.detach())
    return {"loss": loss} | {n: p.grad for n, p in inner.named_parameters() if p.grad is not None}


def fsdp2() -> dict[str, Tensor]:
    """FSDP2 by hand (Trainer would run DDP on CPU without a word): every layer and the root sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, world, rows = dist.get_rank(), dist.get_world_size(), batch()
    inner, mesh = model(), init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in inner.decoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(inner, mesh=mesh)
    mine = {name: x[rank : rank + 1] for name, x in rows.items()}
    loss = inner(**mine, num_items_in_batch=items(rows)).loss
    (loss * world).backward()
    dist.all_reduce(loss := loss.detach())
    return {"loss": loss} | {n: p.grad.full_tensor() for n, p in inner.named_parameters() if p.grad is not None}


def evaluate() -> dict[str, Tensor]:
    """FSDP2 in evaluation: ranks must stay in step although nothing is trained."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, rows = dist.get_rank(), batch()
    inner, mesh = model().eval(), init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in inner.decoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(inner, mesh=mesh)
    mine = {name: x[rank : rank + 1] for name, x in rows.items()}
    with torch.no_grad():
        loss = inner(**mine, num_items_in_batch=items(rows), training=TrainingPass(idle=True)).loss
    dist.all_reduce(loss)
    return {"loss": loss}


def starve() -> dict[str, Tensor]:
    """Control: without idle passes the rank without hard tokens breaks the other."""
    return ddp(training=TrainingPass(idle=False))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    result = {"ddp": ddp, "fsdp2": fsdp2, "evaluate": evaluate, "starve": starve}[sys.argv[1]]()
    if dist.get_rank() == 0:
        torch.save(result, sys.argv[2])
    dist.barrier()
    dist.destroy_process_group()
