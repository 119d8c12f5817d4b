"""TaH around a quantised base: the base in 8 or 4 bits and frozen, LoRA, maps and decider in full precision."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    QuantoConfig,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

from helpers.families import tiny
from helpers.models import distance, labels, shake, token_ids
from tah import TaHForCausalLM, load_adapter, save_adapter
from tah.checkpoints.adapter import BASE
from tah.checkpoints.contents import weights_fingerprint
from tah.core import fast
from tah.core.quantised import is_packed, is_quantised, is_quantised_layer, plain_values, quantisation_of

torchao = pytest.importorskip("torchao", reason="torchao is not installed")
from torchao.quantization import (  # noqa: E402
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerGroup  # noqa: E402

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))


@pytest.fixture(autouse=True)
def no_grad_by_default(request):
    with torch.set_grad_enabled(request.node.get_closest_marker("grad") is not None):
        yield


def installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def nf4(**options) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)


# Format -> configuration, the largest difference that a product with few rows may have from one with many (the
# libraries choose kernels by the number of rows; 8 bits of bitsandbytes quantise the activations too), and its name.
FORMATS = {
    "torchao-int8": (lambda: TorchAoConfig(Int8WeightOnlyConfig()), 1e-5, "Linear(Int8Tensor)"),
    "torchao-int4": (lambda: TorchAoConfig(INT4), 1e-5, "Linear(IntxUnpackedToInt8Tensor)"),
    "quanto-int8": (lambda: QuantoConfig("int8"), 1e-5, "QLinear(WeightQBytesTensor qint8)"),
    "quanto-int4": (lambda: QuantoConfig("int4"), 1e-5, "QLinear(WeightQBitsTensor qint4)"),
    "bitsandbytes-8bit": (lambda: BitsAndBytesConfig(load_in_8bit=True), 0.02, "Linear8bitLt(Int8Params)"),
    "bitsandbytes-4bit": (lambda: nf4(bnb_4bit_compute_dtype=torch.float32), 0.02, "Linear4bit(Params4bit nf4)"),
}
PACKED = {"gptq": "TorchLinear(int32)", "awq": "AwqTorchLinear(int32)"}  # quantised before they are loaded
FORMATS |= {name: (None, 1e-5 if name == "gptq" else 1e-3, kind) for name, kind in PACKED.items()}
PACKAGES = {"quanto": ["optimum.quanto"], "bitsandbytes": ["bitsandbytes"], "gptq": ["gptqmodel", "optimum.gptq"]}
PACKAGES["awq"] = PACKAGES["gptq"]


def needs(name: str):
    missing = [each for each in PACKAGES.get(name.partition("-")[0], ()) if not installed(each)]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


# Importing gptqmodel takes a minute.
EVERY = [pytest.param(name, marks=[needs(name)] + [pytest.mark.slow] * (name in PACKED)) for name in FORMATS]
AO = ["torchao-int8", "torchao-int4"]
OPTIONS = {"policy": "oracle", "mix_topk": 16, "lora_rank": 4}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def directory(request, tmp_path_factory) -> Path:
    """Directory of an unquantised tiny base."""
    made = tmp_path_factory.mktemp(request.param) / "base"
    tiny(request.param, **SIZES).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("llama") / "base"
    tiny("llama", **SIZES).save_pretrained(made)
    return made


def packed(directory: Path, name: str) -> Path:
    """A checkpoint of random 4-bit numbers in the format `gptq` or `awq`, beside the unquantised base."""
    made = directory.parent / name
    if made.exists():
        return made
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    base = AutoModelForCausalLM.from_pretrained(directory)
    tensors, random = base.state_dict(), torch.Generator().manual_seed(0)
    for layer, module in base.model.named_modules(prefix="model"):
        if isinstance(module, nn.Linear):
            widths = {
                "in_features": module.in_features,
                "out_features": module.out_features,
                "bias": False,
                "register_buffers": True,
            }
            kind = TorchLinear if name == "gptq" else AwqTorchLinear
            for key, its in kind(bits=4, group_size=32, sym=False, desc_act=False, **widths).state_dict().items():
                low, high = torch.iinfo(its.dtype).min if its.dtype == torch.int32 else 0, 2**31 - 1
                if key == "g_idx":
                    its = torch.arange(module.in_features, dtype=torch.int32) // 32
                elif key == "scales":
                    its = torch.rand(its.shape, generator=random).to(its.dtype) / 20
                else:
                    its = torch.randint(low, high, its.shape, generator=random, dtype=its.dtype)
                tensors[f"{layer}.{key}"] = its
            del tensors[f"{layer}.weight"]
    base.config.save_pretrained(made)
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((made / "config.json").read_text())
    settings = {"quant_method": name, "bits": 4, "group_size": 32, "zero_point": True}
    settings |= {"desc_act": False, "sym": False} if name == "gptq" else {"format": "gemm"}
    settings["backend"] = "torch" if name == "gptq" else "torch_awq"
    (made / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return made


def load(directory: Path, name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The base in a format."""
    if name in PACKED:
        return AutoModelForCausalLM.from_pretrained(packed(directory, name), dtype=dtype).eval()
    config = FORMATS[name][0]()
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, dtype=dtype).eval()


def wrap(base: PreTrainedModel, **options) -> TaHForCausalLM:
    return shake(TaHForCausalLM.from_base(base, **OPTIONS | options))


def dequantised(model: TaHForCausalLM, directory: Path, quantised: PreTrainedModel) -> TaHForCausalLM:
    """The same model around a plain base, whose weights are what each quantised layer computes for unit vectors.

    `quantised` is the model's base, loaded again. It is in training mode, since bitsandbytes changes its 4-bit weights
    for a less exact kernel in evaluation.
    """
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    layers = dict(quantised.train().named_modules())
    with torch.no_grad():
        for name, layer in base.named_modules():
            if isinstance(layer, nn.Linear) and is_quantised_layer(layers[name]):
                layer.weight.copy_(layers[name](torch.eye(layer.in_features)).T)
    made = TaHForCausalLM.from_base(base, **OPTIONS)
    made.load_state_dict({n: t for n, t in model.named_parameters() if "lora_" in n or "decider" in n}, strict=False)
    return made


@pytest.mark.parametrize("name", EVERY)
def test_never_equals_the_stock_quantised_model(directory, name):
    stock, model, ids = load(directory, name), wrap(load(directory, name)), token_ids(3)
    assert quantisation_of(model.base) == quantisation_of(stock) == FORMATS[name][2]
    assert torch.equal(model(ids, policy="never").logits, stock(ids).logits)
    assert distance(model(ids, policy="always").logits, stock(ids).logits) > 0.1  # control: LoRA and the mix count


@pytest.mark.parametrize("name", EVERY)
def test_a_row_alone_and_a_token_at_a_time_equal_the_batch(directory, name):
    model, ids, depths = wrap(load(directory, name)), token_ids(3), labels(3)
    whole = model(ids, depth_labels=depths)
    assert (whole.depth_count > 1).any() and (whole.depth_count == 1).any()
    alone = torch.cat([model(ids[i : i + 1], depth_labels=depths[i : i + 1]).logits for i in range(3)])
    parts, cache = [], None
    for at in range(ids.shape[1]):
        step = model(ids[:, at : at + 1], depth_labels=depths[:, at : at + 1], past_key_values=cache, use_cache=True)
        cache = step["cache"] if "cache" in step else step["past_key_values"]
        parts.append(step.logits)
    assert distance(alone, whole.logits) < FORMATS[name][1]
    assert distance(torch.cat(parts, dim=1), whole.logits) < FORMATS[name][1]


@pytest.mark.grad
@pytest.mark.parametrize("name", EVERY)
def test_loss_and_gradients_equal_those_of_the_dequantised_base(directory, name):
    model, ids, depths = wrap(load(directory, name)), token_ids(2), labels(2)
    plain = dequantised(model, directory, load(directory, name)).train()
    model.train()
    losses = [each(ids, labels=ids, depth_labels=depths).loss for each in (model, plain)]
    for loss in losses:
        loss.backward()
    near = 0.1 if name in ("bitsandbytes-8bit", "awq") else 1e-4  # they multiply in half precision
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=near / 10)
    wanted = dict(plain.named_parameters())
    lora = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert lora and all(weight.grad is not None and weight.dtype == torch.float32 for weight in lora.values())
    for key, weight in lora.items():
        difference = (weight.grad - wanted[key].grad).norm() / wanted[key].grad.norm()
        assert difference < near, key
    unlike = wanted["base.model.layers.0.mlp.up_proj.lora_B.weight"].grad
    other = wanted["base.model.layers.1.mlp.up_proj.lora_B.weight"].grad
    assert (unlike - other).norm() > 0.5 * unlike.norm()  # control: gradients of different layers are not close


@pytest.mark.parametrize("name", AO)
def test_generation_is_that_of_repeated_forwards(llama, name):
    model, ids = wrap(load(llama, name), policy="always"), token_ids(2, 6)
    wanted = ids
    for _ in range(5):
        wanted = torch.cat([wanted, model(wanted, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    made = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(made, wanted)
    never = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, policy="never")
    assert not torch.equal(made, never)


@pytest.mark.gpu
@pytest.mark.skipif(not installed("mslk"), reason="Int4WeightOnlyConfig of torchao needs mslk and a GPU")
def test_never_equals_the_stock_model_with_int4_kernels_on_a_gpu(llama):
    def make() -> PreTrainedModel:
        quantisation = TorchAoConfig(Int4WeightOnlyConfig(group_size=32))
        options = {"quantization_config": quantisation, "dtype": torch.bfloat16, "device_map": "cuda"}
        return AutoModelForCausalLM.from_pretrained(llama, **options).eval()

    stock, model, ids = make(), wrap(make()), token_ids(3).to("cuda")
    assert torch.equal(model(ids, policy="never").logits, stock(ids).logits)
    assert distance(model(ids, policy="always").logits, stock(ids).logits) > 0.1


def test_a_base_that_quantize_changed_in_place(llama):
    base = AutoModelForCausalLM.from_pretrained(llama)
    quantize_(base, Int8WeightOnlyConfig())  # the head, too
    stock, ids = copy.deepcopy(base), token_ids(2)
    model = wrap(base)
    assert is_packed(model.head.linear.weight) and not model.head.is_single_matrix
    assert torch.equal(model(ids, policy="never").logits, stock(ids).logits)
    plain = dequantised(model, llama, stock)
    depths = labels(2)
    assert distance(model(ids, depth_labels=depths).logits, plain(ids, depth_labels=depths).logits) < 1e-5


@pytest.mark.grad
def test_a_quantised_embedding_and_head_are_read_through_their_modules(llama):
    def make() -> PreTrainedModel:
        base = AutoModelForCausalLM.from_pretrained(llama)
        quantize_(base, INT4, lambda module, name: isinstance(module, nn.Linear | nn.Embedding))
        return base

    ids, depths, model = token_ids(2), labels(2), wrap(make())
    assert is_packed(model.get_input_embeddings().weight)
    assert torch.equal(model(ids, policy="never").logits, make()(ids).logits)
    plain = dequantised(model, llama, make())
    plain.base.model.embed_tokens.weight.data = plain_values(model.get_input_embeddings().weight)
    losses = [each.train()(ids, labels=ids, depth_labels=depths).loss for each in (model, plain)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    at = "base.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert distance(model.get_parameter(at).grad, plain.get_parameter(at).grad) < 1e-3


def test_the_base_of_a_trained_model_can_be_quantised_for_inference(llama, tmp_path):
    plain, ids = wrap(AutoModelForCausalLM.from_pretrained(llama), policy="always"), token_ids(2)
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantization_config would quantise LoRA and decider, too; load without it"):
        TaHForCausalLM.from_pretrained(tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    model = TaHForCausalLM.from_pretrained(tmp_path)
    own = lambda module, name: isinstance(module, nn.Linear) and "lora_" not in name and "lm_head" not in name  # noqa: E731
    quantize_(model.base, Int8WeightOnlyConfig(), own)
    base = AutoModelForCausalLM.from_pretrained(llama)
    quantize_(base, Int8WeightOnlyConfig(), own)
    before = wrap(base, policy="always")
    before.load_state_dict({n: t for n, t in plain.named_parameters() if "lora_" in n or "decider" in n}, strict=False)
    assert torch.equal(model(ids).logits, before(ids).logits)
    assert distance(model(ids).logits, plain(ids).logits) > 1e-4  # control
    assert quantisation_of(model.base) == FORMATS["torchao-int8"][2]


def test_fast_paths_leave_quantised_weights_to_their_layers(llama, monkeypatch):
    model, ids = wrap(load(llama, "torchao-int8")), token_ids(2)
    layer = model.base.model.layers[0].mlp.up_proj
    assert not fast.allowed(layer) and fast.allowed(model.base.lm_head)
    made = model(ids, policy="always").logits
    monkeypatch.setattr(fast, "ENABLED", False)
    assert distance(model(ids, policy="always").logits, made) < 1e-5


@pytest.mark.parametrize("name", EVERY)
def test_lora_has_the_dtype_in_which_the_base_computes(llama, name):
    model = TaHForCausalLM.from_base(load(llama, name, torch.bfloat16), lora_rank=4)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n or "decider" in n} == {torch.bfloat16}
    assert model(token_ids(1), policy="always").logits.dtype == torch.bfloat16


# -- training --------------------------------------------------------------------------------------------------------


def rows() -> Dataset:
    ids = token_ids(8, 10, seed=3)
    return Dataset.from_list([{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids])


def train(model: TaHForCausalLM, output: Path, resume: str | None = None, steps: int = 4) -> Trainer:
    arguments = TrainingArguments(
        str(output), max_steps=steps, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, seed=1,
        report_to="none", use_cpu=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.grad
@pytest.mark.parametrize("name", [pytest.param(*each.values, marks=each.marks) for each in EVERY])
def test_trainer_trains_the_adapter_saves_it_alone_and_resumes(llama, name, tmp_path):
    def fresh() -> TaHForCausalLM:
        torch.manual_seed(0)
        return TaHForCausalLM.from_base(load(llama, name), policy="always", lora_rank=4, mix_topk=16)

    model = fresh()
    before = {key: plain_values(weight).clone() for key, weight in model.named_parameters()}
    train(model, tmp_path / "whole")
    changed = {k for k, weight in model.named_parameters() if not torch.equal(plain_values(weight), before[k])}
    assert changed == {key for key in before if "lora_" in key}

    checkpoint = tmp_path / "whole" / "checkpoint-4"
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert {key for key in before if "lora_" in key or not key.startswith("base.")} == set(file.keys())
    resumed = fresh()
    train(resumed, tmp_path / "whole", resume=str(tmp_path / "whole" / "checkpoint-2"))
    torch.set_grad_enabled(False)  # bitsandbytes has other kernels with gradients
    ids = token_ids(2)
    wanted = model.eval()(ids).logits
    assert torch.equal(resumed.eval()(ids).logits, wanted)

    source = str(packed(llama, name) if name in PACKED else llama)
    for base in (source, load(llama, name)):
        loaded = TaHForCausalLM.from_pretrained(checkpoint, base=base)
        assert torch.equal(loaded(ids).logits, wanted)
        assert quantisation_of(loaded.base) == FORMATS[name][2]
    assert torch.equal(load_adapter(load(llama, name), checkpoint)(ids).logits, wanted)
    one_pass = TaHForCausalLM.from_pretrained(checkpoint, base=source, policy="never")
    assert torch.equal(one_pass(ids).logits, load(llama, name)(ids).logits)


@pytest.mark.grad
@pytest.mark.parametrize("name", AO)
def test_checkpointing_of_activations_changes_no_gradient(llama, name):
    model, ids = wrap(load(llama, name), policy="always"), token_ids(2)
    found = []
    for replayed in (False, True):
        model.train().zero_grad()
        if replayed:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        found.append({key: weight.grad for key, weight in model.named_parameters() if "lora_" in key})
    assert all(torch.equal(found[0][key], found[1][key]) and found[0][key].any() for key in found[0])


@pytest.mark.grad
def test_a_quantisation_of_activations_is_refused_in_training(llama):
    quantisation = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    base = AutoModelForCausalLM.from_pretrained(llama, quantization_config=quantisation, dtype=torch.float32)
    model, ids = wrap(base, policy="always"), token_ids(2)
    assert model(ids).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"quantised layer \(Linear\(Int8Tensor\)\) passes no gradient to its input"):
        model.train()(ids, labels=ids)


@pytest.mark.grad
def test_training_the_base_is_refused(llama):
    model = wrap(load(llama, "torchao-int8"))
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"embed_tokens.weight requires a gradient, but the base is quantised"):
        model.train()
    plain = TaHForCausalLM.from_base(AutoModelForCausalLM.from_pretrained(llama), lora_rank=4)
    assert not is_quantised(plain.base) and all(weight.requires_grad for weight in plain.train().parameters())


# -- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_an_adapter_is_saved_and_loaded_on_a_base_of_its_format(llama, name, tmp_path):
    model, ids = wrap(load(llama, name), policy="always"), token_ids(2)
    save_adapter(model, tmp_path, dtype=torch.float32)
    assert torch.equal(load_adapter(load(llama, name), tmp_path)(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match=r"belongs to a base that is .*\), but this one is not quantised; load"):
        load_adapter(AutoModelForCausalLM.from_pretrained(llama), tmp_path)
    other = tiny("llama", seed=5, **SIZES)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="of the same shape with other weights"):
        load_adapter(load(tmp_path / "other", name), tmp_path)


def test_a_checkpoint_without_its_base_names_what_is_missing(llama, tmp_path):
    model = wrap(load(llama, "torchao-int8"))
    model.save_pretrained(tmp_path / "made")
    files = {path.name for path in (tmp_path / "made").iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors", "README.md", BASE}
    with pytest.raises(
        ValueError, match=r"its base was loaded from a local directory; load it, and pass it: .*base="
    ) as error:
        TaHForCausalLM.from_pretrained(tmp_path / "made")
    assert str(llama) not in "".join(path.read_text() for path in (tmp_path / "made").glob("*.json"))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="but this one is not quantised"):
        TaHForCausalLM.from_pretrained(tmp_path / "made", base=AutoModelForCausalLM.from_pretrained(llama))

    base = AutoModelForCausalLM.from_pretrained(llama)
    quantize_(
        base, Int8WeightOnlyConfig(), lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name
    )
    wrap(base).save_pretrained(tmp_path / "in-place")
    with pytest.raises(ValueError, match="its base was quantised after loading; load it, and pass it"):
        TaHForCausalLM.from_pretrained(tmp_path / "in-place", base=str(llama))
    loaded = TaHForCausalLM.from_pretrained(tmp_path / "in-place", base=load(llama, "torchao-int8"))
    assert loaded.config.lora_rank == 4


def test_a_whole_checkpoint_replaces_one_without_a_base(llama, tmp_path):
    wrap(load(llama, "torchao-int8")).save_pretrained(tmp_path)
    plain, ids = wrap(AutoModelForCausalLM.from_pretrained(llama)), token_ids(2)
    plain.save_pretrained(tmp_path)
    assert not (tmp_path / BASE).exists()
    loaded = TaHForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids, policy="always").logits, plain(ids, policy="always").logits)


def test_damaged_and_foreign_tensors_are_refused(llama, tmp_path):
    wrap(load(llama, "torchao-int8")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"lora_rank": 5}))
    with pytest.raises(ValueError, match="model.safetensors does not fit its config.json: base.model.layers.0"):
        TaHForCausalLM.from_pretrained(tmp_path, base=str(llama))
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        TaHForCausalLM.from_pretrained(tmp_path, base=str(llama))


def test_the_example_runs():
    script = Path(__file__).parents[2] / "examples" / "hf_quantised.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0 and "difference to dequantised weights" in done.stdout, done.stderr


def test_a_fingerprint_reads_packed_weights(llama):
    first, again = (load(llama, "torchao-int8") for _ in range(2))
    assert weights_fingerprint(first) == weights_fingerprint(again)
    assert weights_fingerprint(first) != weights_fingerprint(load(llama, "torchao-int4"))
