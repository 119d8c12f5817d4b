"""Bad input to the library: one clear ValueError that names the value, and nothing half-written."""

import errno
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from helpers.families import tiny
from helpers.models import distance, tah, token_ids
from tah import Confidence, DuoCache, Policy, Random, TaHConfig, TaHForCausalLM, UnsupportedBase
from tah.checkpoints.safe import replace_files
from tah.model import TrainingPass


@pytest.fixture(scope="module")
def model():
    return tah(policy="decider")


def llama(**config):
    return TaHConfig(base_config={"model_type": "llama", "num_hidden_layers": 4}, **config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_depth": 0}, "max_depth=0 must be an integer >= 1"),
        ({"max_depth": 2.5}, "max_depth=2.5 must be an integer"),
        ({"max_depth": 10**9}, "max_depth=1000000000 is more than 1000 passes"),
        ({"threshold": 1.5}, "threshold=1.5 must be a number in"),
        ({"threshold": "high"}, "threshold='high' must be a number"),
        ({"mix_topk": 0}, "mix_topk=0 must be an integer >= 1"),
        ({"lora_rank": -1}, "lora_rank=-1 must be an integer >= 0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0 must be in"),
        ({"random_rate": 2}, "random_rate=2 must be in"),
        ({"next_input": "mean"}, "unknown next_input 'mean'; choose from topk, hidden"),
        ({"attention": "full"}, "unknown attention 'full'; choose from duo, own"),
        ({"output": "mean"}, "unknown output 'mean'; choose from sum, zero_init"),
        ({"policy": "sometimes"}, "unknown policy 'sometimes'; choose from decider"),
        ({"confidence_measure": "vibes"}, "unknown confidence_measure 'vibes'; choose from"),
        ({"decider": {"kind": "tree"}}, "decider kind 'tree' is not one of lean, mlp"),
        ({"decider": {"kind": "lean", "depth": 3}}, "a lean decider has no option depth"),
        (
            {"decider": {"kind": "lean", "layers": [1, 5]}},
            r"decider layers \[1, 5\] must be hidden-state indices in 0..4",
        ),
        ({"decider": {"kind": "lean", "layers": [-1]}}, "must be hidden-state indices in 0..4"),
        ({"decider": {"kind": "lean", "layers": []}}, "must be hidden-state indices in 0..4"),
        ({"decider": None}, "policy='decider' needs a decider"),
    ],
)
def test_config(config, message):
    with pytest.raises(ValueError, match=message):
        llama(**config)


def test_config_cannot_name_code_to_download():
    with pytest.raises(ValueError, match="names the kernel 'someone/kernel'"):
        TaHConfig(base_config={"model_type": "llama", "_attn_implementation": "someone/kernel"})
    with pytest.raises(ValueError, match="names the kernel 'someone/kernel'"):
        TaHConfig.from_dict({"attn_implementation": "someone/kernel"})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"max_depth": 0}, "max_depth=0"),
        ({"max_depth": torch.tensor([2, 0])}, "max_depth=0"),
        ({"max_depth": torch.tensor([2, 2, 2])}, r"max_depth has shape \[3\].*one per row: \[2\]"),
        ({"threshold": -0.1}, "threshold=-0.1"),
        ({"threshold": torch.tensor([0.5, 1.2])}, "threshold=1.2"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"policy": "sometimes"}, "unknown policy 'sometimes'"),
        ({"policy": 3}, "policy=3 is neither a name nor a Policy"),
        ({"attention_mask": torch.ones(2, 5)}, r"attention_mask of shape \[2, 5\]"),
        ({"attention_mask": torch.ones(1, 1, 12, 12)}, "attention_mask of shape"),
        ({"position_ids": torch.zeros(2, 3, dtype=torch.long)}, "position_ids of shape"),
        ({"depth_labels": torch.ones(2, 11)}, "depth_labels of shape"),
        ({"labels": torch.ones(2, 11)}, "labels of shape"),
        ({"labels": token_ids(), "training": TrainingPass(loss_weights=[1.0])}, "1 loss_weights for a max_depth of 2"),
        ({"training": TrainingPass(follow_labels=True)}, "follow_labels needs depth_labels"),
        ({"inputs_embeds": torch.zeros(2, 12, 32)}, "exactly one of input_ids and inputs_embeds"),
        ({"output_hidden_states": True}, "output_hidden_states is not supported"),
    ],
)
def test_forward(model, call, message):
    with pytest.raises(ValueError, match=message):
        model(token_ids(), **call)


def test_forward_refuses_what_it_would_ignore(model):
    with pytest.raises(TypeError, match="unexpected arguments: treshold"):
        model(token_ids(), treshold=0.3)
    with pytest.raises(ValueError, match="treshold"):
        model.generate(token_ids(), treshold=0.3, max_new_tokens=2)
    with pytest.raises(ValueError, match="output_hidden_states is not supported"):
        model.generate(token_ids(), output_hidden_states=True, max_new_tokens=2)


def test_policies_check_their_arguments():
    with pytest.raises(ValueError, match="random rate 1.5 must be in"):
        Random(1.5)
    with pytest.raises(ValueError, match="unknown confidence measure 'vibes'; choose from probability, entropy"):
        Confidence("vibes")


def test_no_decider():
    with pytest.raises(ValueError, match="has no decider"):
        tah(decider=None)(token_ids(), policy="decider")


def test_layer_of_a_policy_out_of_range(model):
    class Deep(Policy):
        layers = (9,)

        def __call__(self, state):
            return torch.zeros(len(state.positions))

    with pytest.raises(ValueError, match=r"reads hidden states \[9\]; the base has 0..2"):
        model(token_ids(), policy=Deep())


@torch.no_grad()
def test_cache_of_another_batch_or_kind(model):
    from transformers import DynamicCache

    cache = model(token_ids(rows=2)).past_key_values
    with pytest.raises(ValueError, match="cache holds 2 rows but the input has 3"):
        model(token_ids(rows=3, length=1), past_key_values=cache)
    assert cache.get_seq_length() == 12  # nothing was written
    with pytest.raises(ValueError, match="DynamicCache; a TaH model needs a tah.DuoCache"):
        model(token_ids(), past_key_values=DynamicCache())
    next_ids, again = token_ids(rows=2, length=1), model(token_ids(rows=2)).past_key_values
    one, other = model(next_ids, cache=cache), model(next_ids, past_key_values=again)  # `cache` since transformers 5.24
    assert torch.equal(one.logits, other.logits)
    with pytest.raises(ValueError, match="two names for one argument"):
        model(token_ids(rows=2, length=1), past_key_values=cache, cache=cache)
    with pytest.raises(ValueError, match="cache_implementation='static' is not supported"):
        model.generate(token_ids(), cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match=r"crop\(5\)"):
        DuoCache().crop(5)


def test_empty_and_overlong_prompts(model):
    with pytest.raises(ValueError, match="prompt is empty"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"empty \(shape \[1, 0\]\)"):
        model(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="prompt has 65 tokens but the model has only 64 positions"):
        model.generate(token_ids(length=65), max_new_tokens=2)


def test_nan(model):
    broken = tah(policy="decider")
    with torch.no_grad():
        broken.decoder.layers[-1].mlp.down_proj.weight[0] = float("nan")
    with pytest.raises(ValueError, match="returned NaN after depth 1"):
        broken(token_ids())
    with pytest.raises(ValueError, match="logits of token 12 of row 0 are NaN"):
        broken.generate(token_ids(), policy="never", max_new_tokens=2, do_sample=False)


def test_unsupported_bases():
    with pytest.raises(UnsupportedBase, match="linear_attention"):
        TaHForCausalLM.from_base(tiny("qwen3_next"))
    with pytest.raises(UnsupportedBase, match="TaH model already"):
        TaHForCausalLM.from_base(tah())
    with pytest.raises(ValueError, match="unknown options: max_dept"):
        TaHForCausalLM.from_base(tiny("llama"), max_dept=3)
    with pytest.raises(ValueError, match=r"lora_targets \['nope'\]"):
        TaHForCausalLM.from_base(tiny("llama"), lora_targets=["q_proj", "nope"])
    with pytest.raises(ValueError, match="topk=500 is more than the vocabulary"):
        TaHForCausalLM.from_base(tiny("llama"), decider={"kind": "mlp", "topk": 500})
    with pytest.raises(ValueError, match="no base_config"):
        TaHForCausalLM(TaHConfig())


@pytest.fixture
def saved(tmp_path, model):
    model.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def edit(saved, change):
    tensors = load_file(saved / "model.safetensors")
    change(tensors)
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("decider.output.weight"), "missing tensors decider.output.weight"),
        (lambda t: [t.pop(k) for k in list(t) if "lora_A" in k], r"missing tensors .*lora_A.weight.* and \d+ more"),
        (lambda t: t.update({"base.extra": torch.zeros(2)}), "unexpected tensors base.extra"),
    ],
)
def test_incomplete_checkpoint(saved, change, message):
    edit(saved, change)
    with pytest.raises(ValueError, match=f"not a complete TaH checkpoint: {message}"):
        TaHForCausalLM.from_pretrained(saved)


def test_wrongly_shaped_tensor(saved):
    edit(saved, lambda t: t.update({"decider.output.bias": torch.zeros(7)}))
    with pytest.raises(ValueError, match="not a complete TaH checkpoint: wrongly shaped tensors decider.output.bias"):
        TaHForCausalLM.from_pretrained(saved)


def test_truncated_weights(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="weights are damaged or cut short"):
        TaHForCausalLM.from_pretrained(saved)


def test_config_with_a_bad_value(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"max_depth": -3}))
    with pytest.raises(ValueError, match="max_depth=-3"):
        TaHForCausalLM.from_pretrained(saved)


def test_disk_full_leaves_the_old_checkpoint(saved, monkeypatch):
    old = {path.name: path.read_bytes() for path in saved.iterdir()}
    before = TaHForCausalLM.from_pretrained(saved)
    other = tah(policy="always")
    real = PreTrainedModel.save_pretrained

    def full(self, directory, *args, **kwargs):
        real(self, directory, *args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(saved)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == old
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        other.save_pretrained(saved.parent / "new")
    assert [path.name for path in saved.parent.iterdir()] == ["m"]
    again = TaHForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        assert distance(again(token_ids()).logits, before(token_ids()).logits) == 0


def test_moving_files_into_place_is_all_there_is_to_a_save(tmp_path):
    """New files replace old ones whole; what else lies in the directory stays."""
    new, old = tmp_path / "new", tmp_path / "old"
    for folder in (new, old):
        folder.mkdir()
    (old / "tokenizer.json").write_text("kept")
    (old / "model-00001-of-00002.safetensors").write_text("stale")
    (old / "model-best.safetensors").write_text("somebody else's")
    (old / "config.json").write_text("old")
    (new / "config.json").write_text("new")
    (new / "model.safetensors").write_text("weights")
    replace_files(new, old)
    assert {p.name: p.read_text() for p in old.iterdir()} == {
        "tokenizer.json": "kept",
        "model-best.safetensors": "somebody else's",
        "config.json": "new",
        "model.safetensors": "weights",
    }


@pytest.mark.parametrize(
    ("returned", "named"),
    [(lambda state: None, "NoneType"), (lambda state: torch.ones_like(state.positions), "torch.int64")],
)
def test_a_policy_that_returns_no_logits(model, returned, named):
    with pytest.raises(ValueError, match=f"the policy returned {named}; return a tensor"):
        model(token_ids(), policy=returned)
