"""What `tah doctor` says about a machine without a model: versions, devices, data types, families of bases."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from typing import Any

import torch
import transformers
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ..benchmarks.measure import alternate, machine, timed
from ..config import check_family
from ..device import Machine
from ..errors import first_line
from ..model import TaHForCausalLM
from ..vllm import installed as serving
from .lines import Found, Line, Skip, line_of

# Package -> what needs it, if it is not installed.
PACKAGES = {
    "tah": "",
    "torch": "",
    "transformers": "",
    "accelerate": "",
    "peft": "pip install 'tah[train]' has it, for training and for adapters of PEFT",
    "triton": "vLLM brings it, for the kernel of depth 2 on GPUs",
}
NO_SERVER = "not installed; tah serve needs it, in a separate environment"

# Largest allowed error of a product of matrices: the norm of the difference divided by the norm. TF32 has 3e-4.
PRODUCT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
MISSING = "not implemented for"  # in torch's errors about a type that a device does not have
SIDE, PRODUCTS = 512, 3  # side of the matrices, number of timed products

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
# Family -> what its tiny configuration has besides TINY: plain, windows, soft-caps, experts, sinks.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {**WINDOWS, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt_oss": {**WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2},
}


# -- versions ----------------------------------------------------------------------------------------------------------


def installed(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def supported(name: str) -> SpecifierSet:
    """Return the versions of a package that the installed `tah` supports, from its own metadata.

    The set is empty if `tah` does not restrict it. Extras count, too.

    Raises:
        Skip: `tah` has no metadata.
    """
    needed = [Requirement(line) for line in _own_metadata().get_all("Requires-Dist") or ()]
    found = SpecifierSet()
    for requirement in needed:
        if requirement.name == name:
            found = SpecifierSet(",".join({*map(str, found), *map(str, requirement.specifier)}))  # extras repeat ranges
    return found


def _own_metadata() -> Any:
    """Return the metadata of the installed `tah`."""
    try:
        return metadata.metadata("tah")
    except metadata.PackageNotFoundError as error:
        raise Skip(
            "tah runs without its metadata, so the supported versions are unknown; install it with pip"
        ) from error


def version_lines() -> Iterator[Line]:
    """Yield a line for Python and for every package on which results depend."""
    yield line_of("versions", "python", _python)
    for name, use in PACKAGES.items():
        yield line_of("versions", name, partial(_package, name, use))
    yield line_of("versions", "vllm", _server)


def _python() -> Found:
    return _version(platform.python_version(), SpecifierSet(_own_metadata()["Requires-Python"]))


def _version(version: str, needed: SpecifierSet) -> Found:
    bounds = ",".join(sorted(map(str, needed), reverse=True))  # >=5.16,<5.25
    text = f"{version}; supported: {bounds}" if bounds else version
    return Found(text, needed.contains(version, prereleases=True), {"version": version, "supported": bounds})


def _package(name: str, use: str) -> Found:
    version = installed(name)
    if version is None:
        raise Skip(f"not installed; {use}")
    return _version(version, supported(name))


def _server() -> Found:
    """Check vLLM, which may come from either of two distributions, as `tah serve` checks it."""
    found = serving.installed()
    if not found:
        raise Skip(NO_SERVER)
    if len(found) > 1:
        both = " and ".join(f"{name} {version}" for name, version in found.items())
        text = f"{both} write to the same directory; uninstall both, then install one of them"
        return Found(text, False, {"version": found, "supported": ""})
    ((name, version),) = found.items()
    on_cpu = serving.is_for_cpus(name, version)
    bounds = serving.supported(on_cpu)
    values = {"distribution": name, "version": version, "supported": bounds}
    return Found(f"{name} {version}; supported: {bounds}", serving.is_supported(version, on_cpu), values)


# -- devices -----------------------------------------------------------------------------------------------------------


def device_lines(device: torch.device) -> Iterator[Line]:
    """Yield a line for the processor, for every GPU, and for every data type on `device`."""
    yield line_of("devices", "cpu", _processor)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield line_of("devices", f"cuda:{index}", partial(_gpu, index, device))
    else:
        yield line_of("devices", "cuda", _no_gpu)
    yield line_of("devices", "mps", _mps)
    for dtype in PRODUCT:
        yield line_of("devices", str(dtype).removeprefix("torch."), partial(_data_type, dtype, device))


def _processor() -> Found:
    facts = machine()
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    memory = "" if total is None else f", {total / 2**30:.0f} GiB"
    text = f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads{memory}"
    return Found(text, None, {name: facts[name] for name in ("cpu", "cores", "threads")} | {"memory": total})


def _gpu(index: int, device: torch.device) -> Found:
    """Return what a GPU is. Its free memory is read only if the checks run on it.

    Reading it takes memory of the GPU, and fails if another process has the GPU for itself.
    """
    properties = torch.cuda.get_device_properties(index)
    total, free = properties.total_memory, None
    capability = f"{properties.major}.{properties.minor}"
    memory = f"{total / 2**30:.1f} GiB"
    if device.type == "cuda" and (torch.cuda.current_device() if device.index is None else device.index) == index:
        free = torch.cuda.mem_get_info(index)[0]
        memory = f"{free / 2**30:.1f} of {memory} free"
    text = f"{properties.name}, {memory}, compute capability {capability}"
    values = {"name": properties.name, "free": free, "memory": total, "capability": capability}
    return Found(text, None, values)


def _no_gpu() -> Found:
    if torch.version.cuda is None and torch.version.hip is None:
        raise Skip(f"torch {torch.__version__} is built without support of GPUs")
    raise Skip(f"torch {torch.__version__} finds no GPU or no driver")


def _mps() -> Found:
    if not torch.backends.mps.is_available():
        raise Skip(f"no Apple GPU that torch can use ({platform.system()})")
    return Found("an Apple GPU that torch can use")


def is_native(dtype: torch.dtype, device: torch.device, machine: Machine) -> bool:
    """Return whether a device of a machine computes in a data type without converting it."""
    return machine.choose_dtype(device.type, dtype) == dtype


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of two matrices, as the layers of a model compute it."""
    return a @ b


def _data_type(dtype: torch.dtype, device: torch.device) -> Found:
    """Measure the error and the speed of a product of two matrices on `device`."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(SIDE, SIDE, generator=generator).to(dtype) for _ in range(2))
    want = a.double() @ b.double()  # on the CPU, because Apple's GPUs have no float64
    a, b = a.to(device), b.to(device)
    try:
        got = product(a, b).cpu().double()
    except (RuntimeError, TypeError) as error:
        if not (isinstance(error, NotImplementedError | TypeError) or MISSING in str(error)):
            raise  # the device has the type and does not work
        raise Skip(f"{device.type} has no product of matrices in this type: {first_line(error)}") from error
    apart = float(((got - want).norm() / want.norm()).nan_to_num(torch.inf))
    # `item` waits for the product on every kind of device.
    seconds = alternate({"product": timed(lambda: product(a, b)[0, 0].item(), device)}, PRODUCTS)["product"]
    speed = 2 * SIDE**3 / statistics.median(seconds) / 1e9
    native = is_native(dtype, device, Machine.here())
    how = "" if native else ", not native: --dtype auto computes in float32"
    text = f"error {apart:.1e} (at most {PRODUCT[dtype]:.0e}), {speed:,.3g} GFLOP/s on {device}{how}"
    values = {"error": apart, "tolerance": PRODUCT[dtype], "gflops": speed, "native": native, "device": str(device)}
    return Found(text, apart <= PRODUCT[dtype], values)


# -- families ----------------------------------------------------------------------------------------------------------


def family_lines(device: torch.device) -> Iterator[Line]:
    """Yield a line for each of a few families: whether a tiny random model of it can be wrapped and iterates."""
    for family, more in FAMILIES.items():
        yield line_of("families", family, partial(_family, family, more, device))


@torch.no_grad()
def _family(family: str, more: dict[str, Any], device: torch.device) -> Found:
    """Wrap a tiny model, which probes it, and take two passes over a few tokens."""
    try:
        check_family(family)
    except ValueError as error:
        raise Skip(f"transformers {transformers.__version__} does not have it") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY, **more)).float()
        model = TaHForCausalLM.from_base(base.to(device), lora_rank=2)
    ids = torch.arange(3, 15, device=device)[None]
    out = model(ids, policy="always")
    right = bool((out.depth_count == 2).all()) and bool(out.logits.isfinite().all())
    text = "wrapped, probed, two passes" if right else "two passes give no finite logits"
    return Found(text, right, {"class": type(base).__name__})
