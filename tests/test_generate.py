"""transformers' own `generate` on a TaH model: cached = uncached = batched, for every way of decoding."""

import io

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline

from helpers.families import VOCAB
from helpers.models import LENGTH, distance, middle, pad, tah, token_ids
from tah import Confidence, DuoCache, Random, TaHConfig, TaHForCausalLM

NEW = 10
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module", params=["duo", "own"])
def model(request):
    return tah(policy="random", random_rate=0.4, max_depth=3, attention=request.param)


def by_hand(model, ids, **rule):
    """Greedy decoding without a cache: the whole sequence again for every token."""
    with torch.no_grad():
        for _ in range(NEW):
            ids = torch.cat([ids, model(ids, use_cache=False, **rule).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def test_greedy_equals_loop(model):
    ids = token_ids()
    out = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(out.sequences, by_hand(model, ids))
    with torch.no_grad():
        again = model(out.sequences)
    assert torch.equal(out.depth_count[:, :-1], again.depth_count[:, :-1]) and (out.depth_count[:, -1] == 0).all()
    assert torch.equal(out.continue_logits[:, :-1].nan_to_num(7), again.continue_logits[:, :-1].nan_to_num(7))
    assert out.depth_count.unique().tolist() == [0, 1, 2, 3]
    assert not torch.equal(out.sequences, by_hand(model, ids, policy="never"))  # control: iterating matters


def test_uncached_equals_cached(model):
    ids = token_ids()
    cached = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    uncached = model.generate(ids, **GREEDY, use_cache=False, return_dict_in_generate=True)
    assert torch.equal(cached.sequences, uncached.sequences)
    assert torch.equal(cached.depth_count, uncached.depth_count)


@pytest.mark.parametrize("policy", ["random", "confidence", "decider"])
def test_left_padded_batch_equals_single_rows(policy):
    model = tah(policy=policy, random_rate=0.3)
    ids = token_ids(rows=3)
    model.config.threshold = 0.5 if policy == "random" else middle(model(ids).continue_prob)
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, :9] = 0, 0
    batch = model.generate(ids, attention_mask=mask, **GREEDY, return_dict_in_generate=True)
    for row, start in ((0, 0), (1, 5), (2, 9)):
        alone = model.generate(ids[row : row + 1, start:], **GREEDY, return_dict_in_generate=True)
        assert torch.equal(batch.sequences[row, start:], alone.sequences[0])
        assert torch.equal(batch.depth_count[row, start:], alone.depth_count[0])
    assert batch.depth_count.max() == 2


@pytest.mark.parametrize("beams", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams_equal_uncached(model, beams):
    ids = token_ids()
    cached = model.generate(ids, **GREEDY, **beams, return_dict_in_generate=True)
    uncached = model.generate(ids, **GREEDY, **beams, use_cache=False, return_dict_in_generate=True)
    assert torch.equal(cached.sequences, uncached.sequences)
    assert torch.equal(cached.depth_count, uncached.depth_count)
    with torch.no_grad():
        again = model(cached.sequences).depth_count
    assert torch.equal(cached.depth_count[:, :-1], again[:, :-1])
    assert not torch.equal(cached.sequences, model.generate(ids, **GREEDY, **beams, policy="never"))


def test_prompt_lookup_equals_greedy(model):
    ids = token_ids(rows=1).repeat(1, 2)
    want = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    got = model.generate(ids, **GREEDY, prompt_lookup_num_tokens=3, return_dict_in_generate=True)
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(got.depth_count, want.depth_count)


def test_assisted_equals_greedy(model):
    ids = token_ids(rows=1)
    for assistant in (tah(lora_rank=0, policy="never"), tah().base):
        got = model.generate(ids, **GREEDY, assistant_model=assistant, policy="always")
        assert torch.equal(got, model.generate(ids, **GREEDY, policy="always"))


def test_padding_inferred_by_transformers_counts_for_depths(model):
    """Beams on a left-padded batch without a mask: transformers infers it, and the depths must know."""
    ids = token_ids()
    ids[0, :4] = 0
    options = {**GREEDY, "num_beams": 2, "return_dict_in_generate": True}
    inferred = model.generate(ids, **options)
    given = model.generate(ids, **options, attention_mask=(ids != 0).long())
    assert torch.equal(inferred.sequences, given.sequences) and torch.equal(inferred.depth_count, given.depth_count)


def test_embeddings_as_prompt(model):
    ids = token_ids()
    embeds = model.get_input_embeddings()(ids)
    want = model.generate(ids, **GREEDY, policy="always", return_dict_in_generate=True)
    got = model.generate(inputs_embeds=embeds, **GREEDY, policy="always", return_dict_in_generate=True)
    assert torch.equal(got.sequences, want.sequences[:, LENGTH:])
    assert torch.equal(got.depth_count, want.depth_count)
    assert torch.equal(got.continue_prob.nan_to_num(2), want.continue_prob.nan_to_num(2))


def test_sampling_is_seeded_and_returns_several(model):
    def sample():
        torch.manual_seed(0)
        return model.generate(token_ids(), max_new_tokens=6, do_sample=True, num_return_sequences=3, eos_token_id=None)

    first = sample()
    assert first.shape == (6, LENGTH + 6) and torch.equal(first, sample())
    assert first.unique(dim=0).shape[0] > 2


def test_rule_per_call_and_per_row():
    model = tah(policy="decider", max_depth=2)
    ids = token_ids(rows=2)
    probabilities = model(ids).continue_prob
    low, high = probabilities.quantile(0.2).item(), probabilities.quantile(0.9).item()
    rows = model.generate(
        ids, **GREEDY, threshold=torch.tensor([low, high]), max_depth=torch.tensor([3, 2]), return_dict_in_generate=True
    )
    for row, (threshold, depth) in enumerate([(low, 3), (high, 2)]):
        one = ids[row : row + 1]
        alone = model.generate(one, **GREEDY, threshold=threshold, max_depth=depth, return_dict_in_generate=True)
        assert torch.equal(rows.sequences[row], alone.sequences[0])
        assert torch.equal(rows.depth_count[row], alone.depth_count[0])
    assert rows.depth_count[0].max() == 3 and rows.depth_count[1].max() <= 2
    beams = {"num_beams": 2, "threshold": [low, high]}
    both = model.generate(ids, **GREEDY, **beams)
    assert torch.equal(both[1:], model.generate(ids[1:], **GREEDY, num_beams=2, threshold=high))
    assert torch.equal(
        model.generate(ids, **GREEDY, policy=Confidence(), threshold=0.5),
        by_hand(model, ids, policy=Confidence(), threshold=0.5),
    )


def test_oracle_labels_cover_the_prompt_only():
    model, ids = tah(policy="oracle"), token_ids()
    labels = torch.full_like(ids, 2)
    out = model.generate(ids, **GREEDY, depth_labels=labels, return_dict_in_generate=True)
    assert (out.depth_count[:, :LENGTH] == 2).all() and (out.depth_count[:, LENGTH:-1] == 1).all()
    for how in ({"use_cache": False}, {"num_beams": 2}):
        other = model.generate(ids, **GREEDY, **how, depth_labels=labels, return_dict_in_generate=True)
        assert torch.equal(other.depth_count, out.depth_count)
        assert "num_beams" in how or torch.equal(other.sequences, out.sequences)


def test_several_end_tokens_and_finished_rows():
    model, ids = tah(policy="random", random_rate=0.4), token_ids(rows=4)
    free = model.generate(ids, **GREEDY)[:, LENGTH:]
    ends = [int(free[0, 3]), int(free[1, 5])]
    out = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=ends, pad_token_id=0)[:, LENGTH:]
    for row in range(4):
        stop = next((i for i, token in enumerate(free[row].tolist()) if token in ends), NEW)
        assert out[row, : stop + 1].tolist() == free[row, : stop + 1].tolist()
        assert (out[row, stop + 1 :] == 0).all()
    assert (out[0, 4:] == 0).all()


def test_continued_cache_equals_one_go(model):
    """A second call with the returned cache goes on where the first stopped."""
    ids = token_ids()
    whole = model.generate(ids, **GREEDY)
    first = model.generate(ids, **{**GREEDY, "max_new_tokens": 4}, return_dict_in_generate=True)
    second = model.generate(
        first.sequences, **{**GREEDY, "max_new_tokens": NEW - 4}, past_key_values=first.past_key_values
    )
    assert torch.equal(second, whole)


def test_cache_rows_can_be_selected_repeated_and_cropped(model):
    ids = token_ids(rows=3)
    with torch.no_grad():
        cache = model(ids).past_key_values
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        cache.crop(-3)
        rows = ids[[2, 2, 0, 0]]
        got = model(rows[:, -3:], past_key_values=cache).logits
        assert distance(got, model(rows).logits[:, -3:]) < 2e-5
        assert cache.batch_size == 4 and cache.get_seq_length() == LENGTH
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.batch_size == -1


def test_prefill_in_chunks_equals_at_once(model):
    ids = token_ids(rows=1).repeat(1, 3)
    got = model.generate(ids, **GREEDY, prefill_chunk_size=7)
    assert torch.equal(got, model.generate(ids, **GREEDY))


def test_auto_classes_and_save_load_exact(tmp_path):
    model, ids = (
        tah(policy="decider", decider={"kind": "mlp", "hidden_dims": [8], "topk": 10}, output="zero_init"),
        token_ids(),
    )
    model.save_pretrained(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert type(again) is TaHForCausalLM and isinstance(AutoConfig.from_pretrained(tmp_path / "m"), TaHConfig)
    own = ("max_depth", "mix_topk", "next_input", "attention", "output", "lora_rank", "policy", "threshold", "decider")
    assert all(getattr(again.config, name) == getattr(model.config, name) for name in own)
    assert {n: p.dtype for n, p in again.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager", dtype=torch.bfloat16)
    assert eager.base.config._attn_implementation == "eager" and eager.dtype == torch.bfloat16


def test_sharded_checkpoint(tmp_path):
    model, ids = tah(), token_ids()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    with torch.no_grad():
        want = model(ids, policy="always").logits
        assert torch.equal(TaHForCausalLM.from_pretrained(tmp_path)(ids, policy="always").logits, want)
    model.save_pretrained(tmp_path)  # one file now: the old shards must not stay behind
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_a_saved_model_does_not_tell_where_its_base_lay(tmp_path):
    tah().base.save_pretrained(tmp_path / "secret-place")
    TaHForCausalLM.from_base(str(tmp_path / "secret-place")).save_pretrained(tmp_path / "m")
    assert "secret-place" not in (tmp_path / "m" / "config.json").read_text()


def test_real_model(smollm2, tmp_path):
    """SmolLM2: pipeline, streamer, stop strings, and the same tokens cached and uncached."""
    model = TaHForCausalLM.from_base(str(smollm2), policy="confidence", threshold=0.5)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    never = model.generate(**inputs, max_new_tokens=12, do_sample=False, policy="never")
    assert torch.equal(never, model.base.generate(**inputs, max_new_tokens=12, do_sample=False))
    assert "Paris" in tokenizer.decode(never[0])

    out = model.generate(**inputs, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    uncached = model.generate(**inputs, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(out.sequences, uncached)
    assert 0 < (out.depth_count > 1).float().mean() < 0.6

    stopped = model.generate(**inputs, max_new_tokens=12, policy="never", stop_strings=["Paris"], tokenizer=tokenizer)
    assert tokenizer.decode(stopped[0]).endswith("Paris")

    class Kept(TextStreamer):
        text = io.StringIO()

        def on_finalized_text(self, text, stream_end=False):
            self.text.write(text)

    streamer = Kept(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=12, do_sample=False, policy="never", streamer=streamer)
    assert "Paris" in Kept.text.getvalue()

    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    answer = pipe(chat, max_new_tokens=12, do_sample=False, policy="never")[0]["generated_text"][-1]["content"]
    assert "Paris" in answer


def test_random_is_the_same_everywhere():
    """The random policy's choice depends on the token, not on batch, cache or padding."""
    model, ids = tah(policy=("random")), token_ids(rows=1, length=200)
    ids = ids % VOCAB
    with torch.no_grad():
        whole = model(ids, policy=Random(0.07, seed=5)).depth_count
        padded = model(pad(ids, left=6), attention_mask=pad(torch.ones_like(ids), left=6), policy=Random(0.07, seed=5))
        cache = DuoCache()
        parts = [
            model(ids[:, i : i + 20], past_key_values=cache, policy=Random(0.07, seed=5)).depth_count
            for i in range(0, 200, 20)
        ]
    assert torch.equal(padded.depth_count[:, 6:], whole) and torch.equal(torch.cat(parts, 1), whole)
    assert 0.02 < (whole > 1).float().mean() < 0.13
    assert not torch.equal(model(ids, policy=Random(0.07, seed=6)).depth_count, whole)


@pytest.mark.parametrize("kind", ["sum", "mixture"])
@pytest.mark.parametrize("beams", [{"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 3}])
def test_depths_after_beams_of_padded_rows_with_their_own_thresholds(kind, beams):
    """The depths of each returned sequence are those of a forward over it, with mask and threshold of its prompt."""
    mixture = {"next_input": "mlp", "output": "mixture", "decider": {"kind": "tah2"}, "lora_rank": 0}
    model = tah(policy="decider", **(mixture if kind == "mixture" else {})).eval()
    ids, thresholds = token_ids(rows=2), torch.tensor([0.0, 1.0])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for rule in (thresholds, thresholds.tolist()):
        options = {**GREEDY, **beams, "return_dict_in_generate": True, "threshold": rule}
        out = model.generate(ids, attention_mask=mask, **options)
        count = beams.get("num_return_sequences", 1)
        assert len(out.sequences) == len(out.depth_count) == 2 * count
        for row, sequence in enumerate(out.sequences[:, :-1]):
            its = torch.cat([mask[row // count], mask.new_ones(len(sequence) - ids.shape[1])])
            want = model(sequence[None], attention_mask=its[None], threshold=float(thresholds[row // count]))
            assert torch.equal(out.depth_count[row, :-1], want.depth_count[0])
            assert (want.depth_count.max() > 1) == (row // count == 0)
