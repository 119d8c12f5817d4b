"""Compile the kernel for GPUs that are not here, and print what it takes; `test_kernel.py` runs this file.

A line of JSON per variant: bytes of shared memory, and whether matrix units and asynchronous copies are used.
"""

from __future__ import annotations

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tah.vllm import kernel

TYPES = {"query": "*{}", "cache": "*{}", "deep_keys": "*{}", "deep_values": "*{}", "entry_of_slot": "*i64"}
TYPES |= {"tables": "*i32", "owners": "*i64", "positions": "*i64", "sums": "*fp32", "scale": "fp32"}


def compiled(capability: int, dtype: str, K: int, G: int, own: bool, join: bool):
    """Compile `_attend` with the types, constants and alignments that a call has."""
    size = 4 if dtype == "fp32" else 2
    width = max(kernel.LEAST, triton.next_power_of_2(K))
    fixed = {"S": 16, "K": K, "G": G, "WIDTH": width, "GROUP": max(kernel.LEAST, triton.next_power_of_2(G))}
    fixed |= {"TILE": kernel.tile(width, size), "OWN": own, "JOIN": join, "WIDE": False}
    fixed |= {name: 1 for name in kernel._attend.arg_names if name.endswith("_column")}
    types = TYPES | {"out": "*fp32" if join else "*{}"}
    signature = {
        name: "constexpr" if name in fixed else types.get(name, "i32").format(dtype)
        for name in kernel._attend.arg_names
    }
    aligned = [at for at, name in enumerate(signature) if signature[name][0] == "*" or name.split("_")[-1] == "head"]
    source = ASTSource(
        kernel._attend, signature, constexprs=fixed, attrs={(at,): [["tt.divisibility", 16]] for at in aligned}
    )
    options = {"num_warps": 4 if size == 2 else 8, "num_stages": 2}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main() -> None:
    for variant in json.loads(sys.argv[1]):
        found = compiled(*variant)
        code = found.asm["ptx"]
        row = {"shared": found.metadata.shared, "matrix units": "mma" in code, "copies": "cp.async" in code}
        print(json.dumps(row))


if __name__ == "__main__":
    main()
