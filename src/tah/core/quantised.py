"""Quantised bases: what marks a quantised layer, and what of such a base is trained.

A quantised layer maps [..., I] to [..., O] like `nn.Linear`, and its weight is in a packed format of some library. The
facts below hold for torchao, quanto, bitsandbytes, GPTQ, AWQ and HQQ alike, so no library is imported here.

Shapes: ... any leading dimensions, I input width, O output width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (nn.Parameter, Tensor)  # exact types of weights whose numbers may be used without calling their layer


def is_packed(tensor: Tensor) -> bool:
    """Return whether a tensor holds quantised numbers: integers, 8-bit floats, or a tensor subclass of a library."""
    if hasattr(tensor, "device_mesh"):  # a DTensor is sharded, not quantised
        return False
    return type(tensor) not in PLAIN or not tensor.is_floating_point() or tensor.dtype.itemsize == 1


def plain_values(tensor: Any) -> Tensor:
    """Return the numbers of a tensor: dequantised if it is a packed subclass with a floating point dtype."""
    facade = is_packed(tensor) and tensor.is_floating_point() and tensor.dtype.itemsize > 1
    return tensor.dequantize() if facade else tensor


def is_quantised_layer(module: nn.Module) -> bool:
    """Return whether a module is a quantised linear layer: it has two widths, and a packed tensor of its own."""
    if not all(type(getattr(module, name, None)) is int for name in ("in_features", "out_features")):
        return False
    return any(map(is_packed, _own(module)))


def is_quantised(base: nn.Module) -> bool:
    """Return whether a base has a quantised layer or a quantised embedding."""
    return any(map(is_packed, base.parameters())) or any(map(is_quantised_layer, base.modules()))


def quantisation_of(base: nn.Module) -> str | None:
    """Return the kinds of quantised layers of a base, such as `Linear(Int8Tensor)`; None without quantised layers.

    Two bases of one kind may still differ in group sizes or in the calibration.
    """
    kinds = set()
    for module in base.modules():
        own = _own(module) if is_quantised_layer(module) else module.parameters(recurse=False)
        if (packed := next(filter(is_packed, own), None)) is not None:
            kinds.add(_kind(module, packed))
    return ", ".join(sorted(kinds)) or None


def compute_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype in which a model computes: that of its first plain floating point parameter."""
    floats = [tensor.dtype for tensor in model.parameters() if type(tensor) in PLAIN and not is_packed(tensor)]
    return floats[0] if floats else torch.get_default_dtype()


def freeze_quantised(base: nn.Module) -> None:
    """Freeze all parameters of a base if it is quantised. LoRA, linear maps and decider are then what is trained."""
    if is_quantised(base):
        base.requires_grad_(False)


def check_frozen(base: nn.Module) -> None:
    """Raise `ValueError` if a quantised base has a parameter to train.

    Quantised weights have no gradient, and the rest of the base is not saved with the adapter. What PEFT adds to the
    base is trained and saved by PEFT.
    """
    theirs = tuple(f"{name}." for name, module in base.named_modules() if type(module).__module__.startswith("peft."))
    trained = [
        name
        for name, weight in base.named_parameters()
        if weight.requires_grad
        and ".lora_" not in name
        and (not name.startswith(theirs) or ".base_layer." in name or ".original_module." in name)
    ]
    if trained and is_quantised(base):
        raise ValueError(
            f"{trained[0]} requires a gradient, but the base is quantised ({quantisation_of(base)}) and stays frozen; "
            "train LoRA, linear maps and decider, or load the base unquantised"
        )


def check_gradient(module: nn.Module, x: Tensor, y: Tensor) -> None:
    """Raise `ValueError` if the input of a layer in training has a gradient that its output does not pass on.

    Layers that quantise their input, too, may detach it, and some kernels have no backward, for which torch only warns.
    The gradients of all LoRA below would be wrong.

    Args:
        module: The layer.
        x: Its input [..., I].
        y: Its output [..., O].
    """
    if not x.requires_grad or not torch.is_grad_enabled():
        return
    node, passes = y.grad_fn, y.requires_grad
    for _ in range(4):  # from the output to the kernel: casts and views
        if node is None or node is x.grad_fn:
            break
        passes = passes and node.name() != "WarnNotImplemented"
        node = node.next_functions[0][0] if node.next_functions else None
    if not passes:
        raise ValueError(
            f"a quantised layer ({quantisation_of(module)}) passes no gradient to its input, so the adapter cannot be "
            "trained; choose a quantisation of weights only, with a kernel that has a backward"
        )


def _own(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _kind(module: nn.Module, weight: Any) -> str:
    layer = getattr(module, "stock", type(module)).__name__  # the class before LoRA was added
    form = "" if type(weight) in PLAIN else type(weight).__name__
    # bitsandbytes and quanto name the number format of one class of weights in these two attributes.
    precision = getattr(weight, "quant_type", None) or getattr(getattr(weight, "qtype", None), "name", None)
    return f"{layer}({' '.join(filter(None, [form, precision])) or str(weight.dtype).removeprefix('torch.')})"
