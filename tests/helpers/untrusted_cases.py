"""Directories that a stranger might have made: each function breaks a good copy of one.

The base is the tiny Llama of `conftest.py`, the checkpoint the TaH model of it. `test_untrusted.py` has them refused.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Change = Callable[[Path], Any]
WEIGHTS, INDEX, EVIL = "model.safetensors", "model.safetensors.index.json", "evil.bin"


class Evil:
    """Makes a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def pickled(name: str, keep: bool = False, marker: str = "ran") -> Change:
    def change(where: Path) -> None:
        torch.save({"x": Evil(where / marker)}, where / name)
        if not keep:
            (where / WEIGHTS).unlink()

    return change


def index(make: Callable[[list[str]], Any], keep: bool = False, text: str | None = None) -> Change:
    """An index in place of the weights, its `weight_map` made from the names of the tensors."""

    def change(where: Path) -> None:
        torch.save({"x": Evil(where / "ran")}, where / EVIL)
        names = list(load_file(where / WEIGHTS))
        (where / WEIGHTS).rename(where / "part.safetensors")
        if keep:
            (where.parent / "part.safetensors").write_bytes((where / "part.safetensors").read_bytes())
        data = {"metadata": {}, "weight_map": make(names)}
        (where / INDEX).write_text(json.dumps(data) if text is None else text)

    return change


def all_in(name: Any, **options: Any) -> Change:
    return index(lambda names: dict.fromkeys(names, name), **options)


def absolute(where: Path) -> None:
    all_in("x.safetensors")(where)
    names = list(json.loads((where / INDEX).read_text())["weight_map"])
    named = dict.fromkeys(names, str(where / "part.safetensors"))
    (where / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": named}))


def config(**values: Any) -> Change:
    """Values of the model itself."""

    def change(where: Path) -> None:
        path = where / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def of_base(**values: Any) -> Change:
    """Values of the base: in `base_config` of a checkpoint, at the top of a base."""

    def change(where: Path) -> None:
        path = where / "config.json"
        data = json.loads(path.read_text())
        inner = data.get("base_config", data)
        inner |= values
        path.write_text(json.dumps(data))

    return change


def text(name: str, value: str | bytes) -> Change:
    return lambda where: (where / name).write_bytes(value.encode() if isinstance(value, str) else value)


def header(
    change_header: Callable[[dict[str, Any]], Any], tail: Callable[[bytes], bytes] = lambda data: data
) -> Change:
    """Other entries at the head of the weights, above the same contents."""

    def change(where: Path) -> None:
        data = (where / WEIGHTS).read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        head = json.loads(data[8 : 8 + size])
        change_header(head)
        new = json.dumps(head).encode()
        (where / WEIGHTS).write_bytes(struct.pack("<Q", len(new)) + new + tail(data[8 + size :]))

    return change


def raw(make: Callable[[bytes], bytes]) -> Change:
    return lambda where: (where / WEIGHTS).write_bytes(make((where / WEIGHTS).read_bytes()))


def numbers(dtype: torch.dtype, which: str = "") -> Change:
    """The weights whose names hold `which` as numbers of another kind."""

    def change(where: Path) -> None:
        tensors = load_file(where / WEIGHTS)
        found = {name: (t.mul(40).to(dtype) if which in name else t) for name, t in tensors.items()}
        save_file(found, where / WEIGHTS, metadata={"format": "pt"})

    return change


def first(head: dict[str, Any]) -> dict[str, Any]:
    return head[sorted(name for name in head if name != "__metadata__")[0]]


def link_to_nothing(where: Path) -> None:
    (where / WEIGHTS).unlink()
    (where / WEIGHTS).symlink_to("/dev/zero")


def a_directory(where: Path) -> None:
    (where / WEIGHTS).unlink()
    (where / WEIGHTS).mkdir()


# Files that are no safetensors, or lead elsewhere. What they are called, and how they come about.
PICKLES: dict[str, Change] = {
    "pytorch_model.bin": pickled("pytorch_model.bin"),
    "a shard of pickles": pickled("pytorch_model-00001-of-00001.bin"),
    "an index of pickles": lambda where: (
        pickled(EVIL)(where),
        (where / "pytorch_model.bin.index.json").write_text('{"metadata": {}, "weight_map": {"x": "evil.bin"}}'),
    ),
    "model.pt": pickled("model.pt"),
    "an index naming a pickle": all_in(EVIL),
    "an index naming one pickle among shards": index(
        lambda names: {name: EVIL if at == 3 else "part.safetensors" for at, name in enumerate(names)}
    ),
    "an index naming a pickle with a null": all_in("evil.bin\0.safetensors"),
    "transformers_weights naming a pickle": lambda where: (
        pickled("adapter_model.bin", keep=True)(where),
        config(transformers_weights="adapter_model.bin")(where),
    ),
    "transformers_weights of another directory": config(transformers_weights="../x.safetensors"),
    "transformers_weights that is a list": config(transformers_weights=["model.safetensors"]),
    "a pickled adapter beside it": lambda where: (
        pickled("adapter_model.bin", keep=True)(where),
        (where / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "someone/else"}'),
    ),
    "a pickle called safetensors": lambda where: torch.save({"x": Evil(where / "ran")}, where / WEIGHTS),
    "a distributed checkpoint": pickled("shard-00001-model-00001-of-00001.safetensors"),
}
PATHS: dict[str, Change] = {
    "the directory above": all_in("../part.safetensors", keep=True),
    "far above": all_in("../../part.safetensors"),
    "absolute": absolute,
    "back and forth": lambda where: all_in(f"../{where.name}/part.safetensors")(where),
    "a directory below": all_in("sub/part.safetensors"),
    "the same directory, in dots": all_in("./part.safetensors"),
    "backslashes": all_in("..\\part.safetensors"),
    "a URL": all_in("https://evil.example/part.safetensors"),
    "hidden": all_in(".part.safetensors"),
    "empty": all_in(""),
    "a number": all_in(3),
    "null": all_in(None),
    "a list": all_in(["part.safetensors"]),
    "a line break": all_in("part\n.safetensors"),
    "another ending": all_in("part.safetensors.bin"),
    "missing": all_in("model-00001-of-00002.safetensors"),
}
INDEXES: dict[str, Change] = {
    "no JSON": all_in("x", text="{"),
    "empty file": all_in("x", text=""),
    "a list": all_in("x", text="[]"),
    "no map": all_in("x", text='{"metadata": {}}'),
    "an empty map": all_in("x", text='{"metadata": {}, "weight_map": {}}'),
    "a list for a map": all_in("x", text='{"metadata": {}, "weight_map": ["part.safetensors"]}'),
    "a list for metadata": index(lambda names: {}, text='{"metadata": [], "weight_map": {"a": "part.safetensors"}}'),
    "deep": all_in("x", text="[" * 100_000),
    "a long number": all_in("x", text='{"weight_map": ' + "9" * 10_000 + "}"),
    "a surrogate": all_in("x", text='{"weight_map": {"\\ud800": "part.safetensors"}}'),
}
HEADS: dict[str, Change] = {
    "empty": raw(lambda data: b""),
    "seven bytes": raw(lambda data: data[:7]),
    "cut in the head": raw(lambda data: data[:100]),
    "cut in the contents": raw(lambda data: data[:-100]),
    "more behind it": raw(lambda data: data + b"x" * 64),
    "a head of 2^63 bytes": raw(lambda data: struct.pack("<Q", 2**63) + data[8:]),
    "a head of 2^64-1 bytes": raw(lambda data: b"\xff" * 8 + data[8:]),
    "a head of 10^12 bytes": raw(lambda data: struct.pack("<Q", 10**12) + data[8:]),
    "a head that is no JSON": raw(lambda data: data[:8] + b"}" + data[9:]),
    "overlapping tensors": header(
        lambda head: [entry.update(data_offsets=[0, 128]) for k, entry in head.items() if k != "__metadata__"]
    ),
    "negative offsets": header(lambda head: first(head).update(data_offsets=[-4, 128])),
    "offsets beyond the end": header(lambda head: first(head).update(data_offsets=[0, 10**12])),
    "a shape of 10^18": header(lambda head: first(head).update(shape=[10**9, 10**9])),
    "a shape that overflows": header(lambda head: first(head).update(shape=[2**63, 4])),
    "a negative shape": header(lambda head: first(head).update(shape=[-1, 4])),
    "an unknown dtype": header(lambda head: first(head).update(dtype="F99")),
    "a shape of strings": header(lambda head: first(head).update(shape=["a"])),
    "no offsets": header(lambda head: first(head).pop("data_offsets")),
    "all of it zeros": raw(lambda data: bytes(len(data))),
    "HTML": raw(lambda data: b"<!DOCTYPE html><html>404</html>"),
    "a directory": a_directory,
    "a device": link_to_nothing,
}
KINDS: dict[str, Change] = {
    f"{str(dtype).removeprefix('torch.')} {which or 'everywhere'}": numbers(dtype, which)
    for dtype, which in [
        (torch.int8, ""),
        (torch.int64, ""),
        (torch.int32, ""),
        (torch.int16, ""),
        (torch.uint8, ""),
        (torch.bool, ""),
        (torch.int8, "embed_tokens"),
        (torch.int64, "norm"),
        (torch.int8, "q_proj.weight"),
        (torch.complex64, "lm_head"),
    ]
}
SIZES: dict[str, Change] = {  # of a base, and so of a checkpoint of one
    "10^7 layers": of_base(num_hidden_layers=10**7),
    "10^9 layers": of_base(num_hidden_layers=10**9),
    "-1 layers": of_base(num_hidden_layers=-1),
    "NaN layers": of_base(num_hidden_layers=float("nan")),
    "infinitely many layers": of_base(num_hidden_layers=float("inf")),
    "10^400 layers": of_base(num_hidden_layers=10**400),
    "10^5 layers, listed": of_base(num_hidden_layers=10**5, layer_types=["full_attention"] * 10**5),
    "hidden states of 256 GB": of_base(hidden_size=2**30),
    "hidden states of 10^12": of_base(hidden_size=10**12, head_dim=8),
    "a vocabulary of 10^9": of_base(vocab_size=10**9),
    "a vocabulary of 10^18": of_base(vocab_size=10**18),
    "an MLP of 10^9": of_base(intermediate_size=10**9),
    "10^9 heads": of_base(num_attention_heads=10**9, head_dim=8),
    "heads of 10^9": of_base(head_dim=10**9),
    "hidden_size 0": of_base(hidden_size=0),
    "hidden_size negative": of_base(hidden_size=-32),
    "hidden_size in words": of_base(hidden_size="huge"),
    "hidden_size null": of_base(hidden_size=None),
    "another family with 10^7 layers": of_base(model_type="gpt2", n_layer=10**7),
    "another family with 10^6 positions": of_base(model_type="gpt_neo", max_position_embeddings=10**6),
}
OWN: dict[str, Change] = {  # of a checkpoint alone
    "lora_rank 10^9": config(lora_rank=10**9),
    "lora_rank in words": config(lora_rank="16"),
    "lora_rank NaN": config(lora_rank=float("nan")),
    "lora_alpha NaN": config(lora_alpha=float("nan")),
    "lora_alpha null": config(lora_alpha=None),
    "lora_dropout in words": config(lora_dropout="none"),
    "lora_targets a word": config(lora_targets="q_proj"),
    "lora_targets numbers": config(lora_targets=[1, 2]),
    "max_depth 10^9": config(max_depth=10**9),
    "max_depth 1.5": config(max_depth=1.5),
    "mix_topk -1": config(mix_topk=-1),
    "threshold null": config(threshold=None),
    "random_seed in words": config(random_seed="x"),
    "decider a list": config(decider=["lean"]),
    "decider of 10^9": config(decider={"kind": "lean", "width": 10**9}),
    "decider of -1": config(decider={"kind": "lean", "width": -1}),
    "decider of no kind": config(decider={"kind": ["lean"]}),
    "decider of 10^5 blocks": config(decider={"kind": "mlp", "hidden_dims": [8] * 10**5}),
    "decider of huge blocks": config(decider={"kind": "mlp", "hidden_dims": [10**8, 10**8]}),
    "decider dropout NaN": config(decider={"kind": "mlp", "dropout": float("nan")}),
    "decider layers a number": config(decider={"kind": "lean", "layers": 3}),
    "base_config a word": config(base_config="llama"),
    "base_config a list": config(base_config=[1]),
    "base_config null": config(base_config=None),
}
FAMILIES: dict[str, Change] = {
    "unknown": of_base(model_type="never_heard_of"),
    "unknown, with code": of_base(
        model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    ),
    "a number": of_base(model_type=3),
    "a list": of_base(model_type=["llama"]),
    "long": of_base(model_type="x" * 10_000),
    "empty": of_base(model_type=""),
    "spaces": of_base(model_type="llama "),
    "of pictures": of_base(model_type="vit"),
    "a kernel to download": of_base(_attn_implementation="someone/kernel"),
    "a kernel for experts": of_base(experts_implementation="someone/kernel"),
    "config.json cut": text("config.json", '{"model_type": '),
    "config.json a list": text("config.json", "[]"),
    "config.json not UTF-8": text("config.json", b'{"model_type": "\xff"}'),
    "config.json deep": text("config.json", '{"model_type": "llama", "x": ' + "[" * 100_000 + "]" * 100_000 + "}"),
}
