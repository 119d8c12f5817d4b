"""Directories of strangers: refused in one line, nothing run, nothing allocated; good ones of every shape load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from helpers import untrusted_cases as cases
from helpers.families import tiny
from helpers.hub_cache import publish, use
from helpers.models import distance, tah, token_ids
from tah import TaHConfig, TaHForCausalLM
from tah.checkpoints.chat_template import check_template, template_fault
from tah.checkpoints.untrusted import check_model, empty_base
from tah.config import refuse_kernels
from tah.load import check_tah, load_base, load_tah, load_tokenizer
from tah.session import Session
from tah_cli.app import run

FILES = cases.PICKLES | cases.PATHS | cases.INDEXES | cases.HEADS | cases.KINDS
ADVICE = ("torch.load", "weights_only", "use_safetensors", "trust_remote_code", "CVE", "Traceback")
OF_A_BASE = FILES | cases.SIZES | cases.FAMILIES


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_base, tmp_path / "base")


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def refused(load: Any, where: Path) -> str:
    """The line with which it is refused."""
    with pytest.raises(ValueError) as error:
        load(str(where))
    line = str(error.value)
    assert "\n" not in line and 20 < len(line) < 500, line
    assert not [word for word in ADVICE if word in line], line
    assert not (where / "ran").exists()
    return line


def test_a_missing_tensor_is_found_without_loading(checkpoint: Path) -> None:
    """As `tah serve` checks before it starts an engine, which takes minutes."""
    check_tah(str(checkpoint))
    tensors = load_file(checkpoint / "model.safetensors")
    name = next(name for name in tensors if name.startswith("decider."))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, checkpoint / "model.safetensors")
    assert f"missing tensors {name}" in refused(check_tah, checkpoint)


@pytest.mark.parametrize("case", OF_A_BASE)
def test_base_is_refused(base: Path, case: str) -> None:
    OF_A_BASE[case](base)
    assert str(base) in refused(load_base, base)
    refused(TaHForCausalLM.from_base, base)


@pytest.mark.parametrize("case", FILES | cases.SIZES | cases.OWN | cases.FAMILIES)
def test_checkpoint_is_refused(checkpoint: Path, case: str) -> None:
    (FILES | cases.SIZES | cases.OWN | cases.FAMILIES)[case](checkpoint)
    refused(TaHForCausalLM.from_pretrained, checkpoint)
    refused(load_tah, checkpoint)


def test_the_line_says_what_and_where(base: Path, checkpoint: Path) -> None:
    expected = {
        "pytorch_model.bin": "has no model.safetensors; pytorch_model.bin is not read: a pickle can run code; save the",
        "an index naming a pickle": "is 'evil.bin', not a .safetensors file of its own directory; it is not followed",
        "far above": "is '../../part.safetensors', not a .safetensors file of its own directory; it is not followed",
        "10^7 layers": "config.json: num_hidden_layers=10000000 cannot be, but the weights hold",
        "int8 everywhere": "has I8 numbers, not floating point ones",
        "unknown": "model_type is 'never_heard_of', a family that transformers",
        "hidden states of 256 GB": "weights, but the files hold",
    }
    for load, good in ((load_base, base), (load_tah, checkpoint)):
        for case, line in expected.items():
            where = shutil.copytree(good, good.with_name("case"))
            OF_A_BASE[case](where)
            assert line in refused(load, where), case
            shutil.rmtree(where)


def test_commands_refuse_with_exit_2(base: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases.PICKLES["pytorch_model.bin"](base)
    cases.PATHS["far above"](checkpoint)
    for words in (["generate", base, "hi"], ["inspect", base], ["generate", checkpoint, "hi"], ["inspect", checkpoint]):
        assert run([str(word) for word in words]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and not [word for word in ADVICE if word in said]
    assert not (base / "ran").exists() and not (checkpoint / "ran").exists()


ALLOCATES_NOTHING = """
import json, resource, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from helpers import untrusted_cases as cases
from transformers.utils import logging
from tah.load import load_base, load_tah, quiet
quiet()
base, checkpoint = Path(sys.argv[2]), Path(sys.argv[3])
load_base(str(base)), load_tah(str(checkpoint))
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, size + 2**28))
before, found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {}
for load, good, several in ((load_base, base, cases.SIZES), (load_tah, checkpoint, cases.SIZES | cases.OWN)):
    for name, change in several.items():
        where = good.with_name("case")
        shutil.copytree(good, where)
        change(where)
        try:
            load(str(where))
            found[name] = "loaded"
        except ValueError as error:
            found.setdefault(name, "refused")
        except BaseException as error:
            found[name] = type(error).__name__
        shutil.rmtree(where)
print(json.dumps([found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system's limit of memory is Linux's")
def test_sizes_are_refused_with_nothing_allocated(base: Path, checkpoint: Path) -> None:
    """In a process that may take 256 MB more than it has after loading the good ones, and that takes less than 128."""
    words = [sys.executable, "-c", ALLOCATES_NOTHING, str(Path(__file__).parent), str(base), str(checkpoint)]
    path = os.pathsep.join([str(Path(sys.modules["tah"].__file__ or "").parents[1]), *sys.path])
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found, kilobytes = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(cases.SIZES | cases.OWN)
    assert {name: what for name, what in found.items() if what != "refused"} == {}
    assert kilobytes < 128 * 1024


# -- good ones ---------------------------------------------------------------------------------------------------------


def sharded(where: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(where)
    (where / cases.WEIGHTS).unlink()
    model.save_pretrained(where, max_shard_size="20KB")
    assert len(list(where.glob("model-*.safetensors"))) > 2


def linked(where: Path) -> None:
    """As in the hub's cache, and as people do to save room."""
    blob = where.parent / "blobs"
    blob.mkdir()
    (where / cases.WEIGHTS).rename(blob / "0123")
    (where / cases.WEIGHTS).symlink_to(blob / "0123")


def with_a_pickle_beside(where: Path) -> None:
    cases.pickled("pytorch_model.bin", keep=True)(where)
    cases.pickled("optimizer.pt", keep=True)(where)


def more_tensors(where: Path) -> None:
    """Buffers of integers, which older families save, and a tensor that nobody wants."""
    tensors = load_file(where / cases.WEIGHTS)
    tensors["model.layers.0.self_attn.position_ids"] = torch.arange(8)
    tensors["model.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, where / cases.WEIGHTS, metadata={"format": "pt"})


GOOD = {
    "as it is": lambda where: None,
    "shards": sharded,
    "a link": linked,
    "a pickle beside it": with_a_pickle_beside,
    "half precision": cases.numbers(torch.float16),
    "an index beside the whole": lambda where: (where / cases.INDEX).write_text("{"),
    "named by config.json": lambda where: (
        (where / cases.WEIGHTS).rename(where / "own.safetensors"),
        cases.config(transformers_weights="own.safetensors")(where),
    ),
    "unknown entries": cases.config(layers_to_love=10**9, note="num_hidden_layers", max_window_layers=10**6),
    "many positions": cases.of_base(max_position_embeddings=10**7),
}


@pytest.mark.parametrize("case", GOOD)
@pytest.mark.parametrize("kind", ["base", "checkpoint"])
def test_good_ones_load(base: Path, checkpoint: Path, kind: str, case: str) -> None:
    where, load = (base, load_base) if kind == "base" else (checkpoint, load_tah)
    wanted = load(str(where)).eval()
    GOOD[case](where)
    found = load(str(where)).eval().float()
    ids = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        scale = 40 if case == "half precision" else 1
        if scale == 1:
            assert distance(found(ids).logits, wanted(ids).logits) == 0
    assert not (where / "ran").exists()


def test_good_base_with_buffers_of_integers(base: Path) -> None:
    more_tensors(base)
    load_base(str(base))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "qwen3_moe", "phi", "cohere", "gptj", "opt"])
def test_good_families_load(tmp_path: Path, family: str) -> None:
    try:
        model = tiny(family)
    except KeyError:
        pytest.skip("no tiny model of that family")
    model.save_pretrained(tmp_path / "base")
    load_base(str(tmp_path / "base"))
    held = check_model(tmp_path / "base")
    assert held.elements >= model.num_parameters() * 0.9


@pytest.mark.parametrize(
    "options", [{}, {"decider": {"kind": "mlp", "topk": 8}}, {"output": "zero_init"}, {"lora_rank": 0}]
)
def test_good_checkpoints_load_in_shards(tmp_path: Path, options: dict[str, Any]) -> None:
    model = tah(**options)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / cases.INDEX).is_file()
    with torch.no_grad():
        again = TaHForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(token_ids(), policy="always").logits, model(token_ids(), policy="always").logits)


def test_a_config_without_files_is_checked_too() -> None:
    with pytest.raises(ValueError, match="model_type is 'never_heard_of', a family that") as error:
        TaHConfig(base_config={"model_type": "never_heard_of"})
    assert len(str(error.value)) < 200


# -- what switches a check off -----------------------------------------------------------------------------------------

QUANTIZED = {  # entries that transformers does not take for quantized weights, wherever a stranger puts them
    "null": {"quantization_config": None},
    "empty": {"quantization_config": {}},
    "no method": {"quantization_config": {"bits": 4}},
    "an unknown method": {"quantization_config": {"quant_method": "mine"}},
    "a method that is a list": {"quantization_config": {"quant_method": ["gptq"]}},
    "elsewhere": {"foo": {"quantization_config": {"quant_method": "gptq"}}},
    "in a list": {"foo": [{"quantization_config": {"quant_method": "gptq"}}]},
    "in the positions": {"rope_scaling": None, "extra": {"text_config": {"quantization_config": {"bits": 4}}}},
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_no_entry_makes_integers_weights(base: Path, checkpoint: Path, case: str) -> None:
    for load, where in ((load_base, base), (load_tah, checkpoint)):
        cases.numbers(torch.int8, "q_proj.weight")(where)
        cases.of_base(**QUANTIZED[case])(where)
        assert "has I8 numbers, not floating point ones" in refused(load, where)
        shutil.rmtree(where)


@pytest.mark.parametrize("value", [False, True, 1, 4.5, "gptq", [{"quant_method": "gptq"}], [[]]])
def test_quantization_config_of_a_wrong_kind(base: Path, value: Any) -> None:
    cases.numbers(torch.int8, "q_proj.weight")(base)
    cases.config(quantization_config=value)(base)
    refused(load_base, base)


@pytest.mark.parametrize("case", ["null", "elsewhere", "in a list"])
def test_such_an_entry_beside_good_weights_is_no_fault(base: Path, case: str) -> None:
    cases.config(**QUANTIZED[case])(base)
    load_base(str(base))


def test_quantized_weights_are_still_taken_for_such(base: Path) -> None:
    """The check lets them through; whether this machine can read them is for transformers to say."""
    cases.numbers(torch.int8, "q_proj.weight")(base)
    cases.config(quantization_config={"quant_method": "gptq", "bits": 4})(base)
    check_model(base, lambda: empty_base(base))


@pytest.mark.parametrize("value", ["load", "int8", "bool", "", "float", "os", "torch.save", "bfloat17", "x" * 10_000])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype_that_is_none(base: Path, checkpoint: Path, name: str, value: str) -> None:
    if value == "float":  # another name of torch's for float32
        return
    for load, where in ((load_base, base), (load_tah, checkpoint)):
        cases.of_base(**{name: value})(where)
        assert f"{name}={value[:40]!r} is no floating point type of torch" in refused(load, where)


@pytest.mark.parametrize("value", ["float32", "bfloat16", "float16", "float64", None])
def test_dtype_that_is_one(base: Path, value: str | None) -> None:
    cases.config(dtype=value)(base)
    load_base(str(base))


def test_a_transposed_tensor_is_named(base: Path, checkpoint: Path) -> None:
    """It has the right size, so only the loader sees it."""
    for load, where in ((load_base, base), (TaHForCausalLM.from_base, base), (load_tah, checkpoint)):
        tensors = load_file(where / cases.WEIGHTS)
        name = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight"))
        if tensors[name].shape == (48, 32):
            save_file(tensors | {name: tensors[name].T.contiguous()}, where / cases.WEIGHTS, metadata={"format": "pt"})
        line = refused(load, where)
        assert f"{name} is [32, 48], not [48, 32]" in line and "report" not in line


def test_a_transposed_tensor_is_accepted_where_asked_for(base: Path) -> None:
    cases.config(vocab_size=300)(base)
    refused(TaHForCausalLM.from_base, base)
    TaHForCausalLM.from_base(str(base), ignore_mismatched_sizes=True)


# -- what the caller asks for ------------------------------------------------------------------------------------------

OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(__file__).with_name("ran").touch()
class MyConfig(LlamaConfig):
    model_type = "myllama"
class MyForCausalLM(LlamaForCausalLM):
    config_class = MyConfig
"""


def with_code(where: Path) -> None:
    (where / "mine.py").write_text(OWN_CODE)
    classes = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyForCausalLM"}
    cases.config(model_type="myllama", architectures=["MyForCausalLM"], auto_map=classes)(where)


@pytest.mark.parametrize("hub", [False, True])
def test_code_of_a_model_runs_where_the_caller_says_so(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: bool
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    use(tmp_path / "hub", tmp_path / "ours", monkeypatch)
    wanted = TaHForCausalLM.from_base(str(base))
    with_code(base)
    name = f"someone/{'code-on-the-hub' if hub else 'x'}"
    source = name if hub else str(base)
    publish(tmp_path / "hub", name, base)
    for load in (TaHForCausalLM.from_base, load_base, lambda it: TaHForCausalLM.from_base(it, trust_remote_code=False)):
        with pytest.raises(ValueError, match="model_type is 'myllama', a family that transformers"):
            load(source)
    assert not list((tmp_path / "modules").rglob("ran"))
    found = TaHForCausalLM.from_base(source, trust_remote_code=True)
    assert type(found.base).__name__ == "MyForCausalLM" and list((tmp_path / "modules").rglob("ran"))
    ids = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        assert torch.equal(found(ids).logits, wanted(ids).logits)


def test_sizes_are_compared_of_trusted_models_too(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    with_code(base)
    cases.config(vocab_size=10**9)(base)
    with pytest.raises(ValueError, match="weights, but the files hold"):
        TaHForCausalLM.from_base(str(base), trust_remote_code=True)


KERNELS = ["flash_attention_2", "someone/kernel", {"": "someone/kernel"}]


@pytest.mark.parametrize("entry", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_callers_kernel_counts(base: Path, checkpoint: Path, kernel: Any, entry: str) -> None:
    for where in (base, checkpoint):
        cases.of_base(**{entry: kernel})(where)
    loaders: list[tuple[Any, Path]] = [(TaHForCausalLM.from_pretrained, checkpoint)]
    if entry[0] != "_":
        loaders.append((TaHForCausalLM.from_base, base))
    if kernel == "flash_attention_2":
        cases.config(**{entry: kernel})(checkpoint)
    for load, where in loaders:
        for chosen in ("eager", "sdpa"):
            model = load(str(where), attn_implementation=chosen)
            assert model.base.config._attn_implementation == chosen
        with pytest.raises((ValueError, ImportError)) as error:
            load(str(where))
        assert ("FlashAttention2" if kernel == "flash_attention_2" else "names the kernel") in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {"_attn_implementation": "someone/kernel"},
        {"text_config": {"attn_implementation": "someone/kernel"}},
        {"_attn_implementation": {"": "someone/kernel"}, "attn_implementation": "sdpa"},
    ],
)
def test_a_kernel_that_transformers_would_use_all_the_same(base: Path, values: dict[str, Any]) -> None:
    """It replaces the caller's choice by an entry with an underscore."""
    cases.config(**values)(base)
    with pytest.raises(ValueError, match="names the kernel .*someone/kernel.*, which is code to download"):
        TaHForCausalLM.from_base(str(base), attn_implementation="eager")


def test_one_setting_of_the_caller_does_not_open_the_other(base: Path) -> None:
    cases.config(attn_implementation="eager", experts_implementation="someone/kernel")(base)
    with pytest.raises(ValueError, match="names the kernel 'someone/kernel', which is code to download"):
        TaHForCausalLM.from_base(str(base), attn_implementation="eager")
    deep = {"a": [{"text_config": {"_experts_implementation": "x/y"}}]}
    top: dict[Any, Any] = {"experts_implementation": "x/y", 0: "LABEL_0"}
    refuse_kernels(top, given=["experts_implementation"])
    for described, given in ((deep, ["experts_implementation"]), (deep, []), (top, ["attn_implementation"]), (top, [])):
        with pytest.raises(ValueError, match="the configuration names the kernel 'x/y'"):
            refuse_kernels(described, given=given)


# -- what is handed to vLLM --------------------------------------------------------------------------------------------


def test_serve_looks_at_a_checkpoint_first(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(sys.modules["tah_cli.serve"], "find_spec", lambda name: True)
    monkeypatch.setattr(os, "execv", lambda program, words: started.append(words))
    assert run(["serve", str(checkpoint)]) == 0 and len(started) == 1
    wrong: dict[str, tuple[cases.Change, str]] = {
        "sizes": (cases.of_base(intermediate_size=10**9), "weights, but the files hold"),
        "many layers": (cases.of_base(num_hidden_layers=10**7), "cannot be, but the weights hold"),
        "decider": (cases.config(decider={"kind": "lean", "width": 10**9}), "weights, but the files hold"),
        "numbers": (cases.numbers(torch.int8, "q_proj.weight"), "has I8 numbers"),
        "dtype": (cases.config(dtype="load"), "is no floating point type"),
        "template that hangs": (cases.text("chat_template.jinja", BAD_TEMPLATES["a loop too long"]), "chat template"),
        "template cut": (cases.text("chat_template.jinja", BAD_TEMPLATES["no end"]), "cannot be read: line 1"),
        "no tokenizer": (lambda where: [path.unlink() for path in where.glob("*token*")], "has no usable tokenizer"),
    }
    for name, (change, said) in wrong.items():
        where = shutil.copytree(checkpoint, checkpoint.with_name("case"))
        change(where)
        capsys.readouterr()
        assert run(["serve", str(where)]) == 2, name
        line = capsys.readouterr().err
        assert said in line and line.count("\n") == 1, (name, line)
        shutil.rmtree(where)
    assert len(started) == 1


# -- chat templates ----------------------------------------------------------------------------------------------------

ONCE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
BAD_TEMPLATES = {
    "loops within loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a loop too long": "{% for a in range(10 ** 9) %}{% endfor %}",
    "a power": "{% if 9 ** (9 ** 9) %}{% endif %}",
    "a long text": "{{ 'a' * 10 ** 12 }}",
    "a longer and longer text": "{% set all = namespace(x='aa') %}" + "{% set all.x = all.x + all.x %}" * 60,
    "padding": "{{ '{:>99999999999}'.format('') }}",
    "a macro of itself": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "much around little": "{{ 'abc ' * 10 ** 6 }}",
    "the way out of the sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "the way through a function": "{{ raise_exception.__globals__.sys }}",
    "the messages changed": "{{ messages.append(messages[0]) }}",
    "no end": "{% for message in messages %}",
    "an unknown tag": "{% run 'x' %}",
    "an unknown filter": "{{ messages | evil }}",
}
UNREADABLE = ("no end", "an unknown tag", "an unknown filter")
GOOD_TEMPLATES = {
    "plain": ONCE,
    "answers marked": "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "no system message": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + ONCE,
    "a date": "{{ strftime_now('%d %b %Y') }}" + ONCE,
    "JSON": "{{ messages | tojson(indent=2) }}",
    "backwards": "{% for m in messages[::-1] %}{{ m.content }}{% endfor %}",
    "a few numbers": "{% for k in range(3) %}{{ k }}{% endfor %}" + ONCE,
    "what is not given": "{{ tools[0].name }}" + ONCE,
    "a namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}",
    "a macro": "{% macro say(m) %}{{ m.content }}{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
}


def with_template(base: Path, template: Any) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("case", BAD_TEMPLATES)
def test_bad_template_is_refused(base: Path, case: str) -> None:
    with_template(base, BAD_TEMPLATES[case]).save_pretrained(base)
    assert "chat template" in refused(load_tokenizer, base)
    if case not in UNREADABLE:
        refused(Session.open, base)
        return
    session = Session.open(str(base))  # which may be asked to leave the template out
    assert session.encode([{"role": "user", "content": "hi"}], raw=True)
    with pytest.raises(ValueError, match="cannot write this conversation .* tah generate --raw does without"):
        session.encode([{"role": "user", "content": "hi"}])
    assert run(["generate", str(base), "hi", "--raw", "--max-new-tokens", "2"]) == 0
    assert run(["generate", str(base), "hi"]) == 2


@pytest.mark.parametrize("case", GOOD_TEMPLATES)
def test_good_template_is_taken(tiny_base: Path, case: str) -> None:
    check_template(with_template(tiny_base, GOOD_TEMPLATES[case]), "there")


def test_each_of_several_templates_is_tried(tiny_base: Path) -> None:
    several = {"default": ONCE, "tool_use": BAD_TEMPLATES["no end"]}
    with pytest.raises(ValueError, match="there: the chat template 'tool_use' cannot be read: line 1"):
        check_template(with_template(tiny_base, several), "there")
    check_template(with_template(tiny_base, None), "there")


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("/bin/false", "could not be tried: the process that renders it ended with code 1"),
        ("/nonexistent/python", "could not be tried: Python cannot be started as '/nonexistent/python' (No such file"),
        ("", "could not be tried: Python cannot be started as ''"),
        ("/bin/sh", "could not be tried: the process that renders it ended with code"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="programs of Unix")
def test_a_probe_that_fails_does_not_blame_the_template(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, program: str, said: str
) -> None:
    template_fault.cache_clear()
    tokenizer = with_template(tiny_base, ONCE)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", program)
        with pytest.raises(ValueError) as error:
            check_template(tokenizer, "there")
        assert f"there: the chat template {said}" in str(error.value) and "\n" not in str(error.value)
        assert "time or memory" not in str(error.value)
    check_template(tokenizer, "there")  # the failure is not remembered
