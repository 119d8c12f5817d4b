"""The training benchmark measures what it says: variants, hard tokens, memory. No time is compared with anything."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

from helpers.families import TINY
from tah import TaHForCausalLM
from tah.benchmarks import bench_train
from tah.benchmarks.bench_train import Setup, Trainee
from tah.benchmarks.measure import Row, save, texts
from tah.load import load_tokenizer

FOLDER = Path(__file__).parents[2] / "benchmark"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu_train

    return gpu_train


def test_result(tiny_base, tmp_path):
    result = bench_train.bench_train(
        Setup(str(tiny_base)), shapes=((2, 30),), repeats=1, memory=False, labels=(8, 40, 64)
    )
    rows = [Row(**row) for row in result["rows"]]
    assert [(row.task, row.variant) for row in rows] == [
        *(("step, 2 x 30", variant) for variant in bench_train.VARIANTS),
        *(("labels", variant) for variant in bench_train.LABELLING),
    ]
    assert all(row.ratio == 1 for row in rows if row.variant in ("plain", "prefill"))
    assert all(row.median > 0 and row.tokens_per_second > 0 for row in rows)
    assert result["machine"]["torch"] == torch.__version__ and result["settings"]["hard"] == 0.12
    save(result, bench_train.markdown(result), tmp_path / "out", "bench_train")
    assert json.loads((tmp_path / "out" / "bench_train.json").read_text()) == result
    table = (tmp_path / "out" / "bench_train.md").read_text().splitlines()
    assert len(table) == 2 + len(rows)
    assert table[4].endswith("| 1.20 |") and table[9].endswith("| 1.11 |") and table[3].endswith("|  |")


def test_hard_labels_hit_only_positions_that_predict():
    labels = bench_train.hard_labels(3, 101)
    assert labels.shape == (3, 101) and (labels == 2).sum(1).tolist() == [12, 12, 12]
    assert (labels[:, -1] == 1).all() and labels.unique().tolist() == [1, 2]
    assert (labels == bench_train.hard_labels(3, 101)).all() and (labels[0] != labels[1]).any()


@pytest.mark.parametrize("variant", bench_train.VARIANTS)
def test_a_variant_trains_what_it_says_on_the_tokens_it_says(variant, tiny_base):
    trainee = Trainee(variant, Setup(str(tiny_base), checkpointing=variant == "stage 1"))
    before = {name: parameter.clone() for name, parameter in trainee.model.named_parameters()}
    depths = []
    if isinstance(trainee.model, TaHForCausalLM):
        trainee.model.register_forward_hook(lambda module, args, out: depths.append(out.depth_count))
    step = trainee.stepper(2, 34)
    for _ in range(2):  # an adapter's A moves once its B has
        step()
    moved = {name for name, parameter in trainee.model.named_parameters() if (parameter != before[name]).any()}
    adapter = {name for name in before if "lora_" in name}
    base = set(before) - adapter
    want = {"plain": base, "standard": base, "stage 1": base | adapter}
    assert moved == want.get(variant, adapter)
    hard = {"standard": 0, "stage 1": 4, "stage 1, LoRA": 4}
    assert all((count > 1).sum(1).tolist() == [hard[variant]] * 2 for count in depths)
    assert len(depths) == (2 if variant in hard else 0)


def test_plain_and_standard_compute_the_same_loss(tiny_base):
    ids, labels = torch.arange(40).view(2, 20) + 3, bench_train.hard_labels(2, 20)
    plain, standard = (Trainee(v, Setup(str(tiny_base))).loss(ids, labels) for v in ("plain", "standard"))
    torch.testing.assert_close(plain, standard)
    half = Trainee("stage 1", Setup(str(tiny_base), precision="autocast")).loss(ids, labels)
    assert half.dtype == torch.float32 and half != standard
    assert Trainee("plain", Setup(str(tiny_base), precision="bfloat16")).model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="unknown precision 'int8'; choose from float32, bfloat16, autocast"):
        Trainee("plain", Setup(str(tiny_base), precision="int8"))


def test_memory_is_measured_in_a_process_that_reports_trouble(tiny_base):
    assert bench_train.peak_memory("stage 1", Setup(str(tiny_base)), 1, 32) > 0
    with pytest.raises(RuntimeError, match="measuring memory of plain failed: .*no model '/no/such/model'"):
        bench_train.peak_memory("plain", Setup("/no/such/model"), 1, 32)


def test_a_tah_checkpoint_can_be_given(tiny_checkpoint):
    setup = Setup(str(tiny_checkpoint))
    assert setup.wrapped().config.lora_rank == 4 and not isinstance(setup.plain(), TaHForCausalLM)


def test_gpu_script_on_a_tiny_model(script):
    config = {**TINY, "head_dim": 8, "tie_word_embeddings": True, "max_position_embeddings": 128}
    rows = script.measure(config, 60, 1, "cpu", peak=1e12, memory=False)
    assert [(row["checkpointing"], row["variant"]) for row in rows] == [
        (on, variant) for on in (False, True) for variant in script.VARIANTS
    ]
    assert all(0 < row["mfu"] < 1 and row["dtype"] == "bfloat16" for row in rows)


def test_flops_are_those_that_torch_counts(script):
    """Of the plain step, up to attention's half of the keys; of a second pass, exactly its share."""
    from torch.utils.flop_counter import FlopCounterMode

    config = Qwen3Config(**{**TINY, "head_dim": 8, "attn_implementation": "eager"})
    model = TaHForCausalLM(
        TaHForCausalLM.config_class(base_config=config, decider=None, policy="never", lora_rank=4)
    ).train()
    ids = torch.randint(3, 97, (1, 60))
    with FlopCounterMode(display=False) as counter:
        model.base(ids, labels=ids).loss.backward()
    attention = 3 * 60 * 2 * 60 * 4 * 8 * 2
    counted = counter.get_total_flops()  # transformers below 5.20 also multiplies matrices for rotary angles
    assert script.step_flops(model, 60, 60) + attention == pytest.approx(counted, rel=1e-4)
    lora = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    more = script.step_flops(model, 60, 60, hard=60) - script.step_flops(model, 60, 60)
    head = 2 * 32 * 97
    assert more == script.step_flops(model, 60, 60) + 60 * (3 * 2 * lora - 2 * head)


def test_texts_have_the_lengths_asked_for(tiny_base):
    short, long = texts(load_tokenizer(str(tiny_base)), [5, 40])
    assert (len(short), len(long)) == (5, 40) and short != long[:5]
