"""Rows to tokens, depth labels, batches: who is supervised, what is refused, and that nothing gets lost."""

import json
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from helpers.models import CHAT_TEMPLATE
from tah.data.rows import Collator, depth_labels, load_rows, pack, tokenize_row

TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Reasoning of all but the last answer is left out, and an answer is asked for with a "<think>".
FORGETTING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
# Does what Qwen3's does: reasoning, from its own key or from the content, is shown only after the last question, and
# there in the last message even if empty, else if there is any; without thinking, an answer is asked for with none.
QWEN3 = """
{%- set ns = namespace(asked=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if m.role == 'assistant' %}
        {%- set ns.thought = '' %}
        {%- if m.reasoning_content is string %}
            {%- set ns.thought = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set ns.thought = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.asked and (loop.last or ns.thought) %}
            {{- '<think>\\n' + ns.thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n' if content or not loop.first }}{{ '<tool_call>\\n' + call.name + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2"},
    {"role": "assistant", "content": "\n\nWhat?\n"},
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """What `datasets` keeps of the files it reads goes away with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture
def tokenizer(tiny_base):
    return AutoTokenizer.from_pretrained(tiny_base)


def shown(tokenizer, row):
    """The text with supervised stretches in [brackets]."""
    text, inside = "", False
    for token, supervised in zip(row["input_ids"], row["supervised"], strict=True):
        if supervised != inside:
            text, inside = text + "[]"[inside], supervised
        text += tokenizer.decode([token])
    return text + "]" * inside


def tokenize(row, tokenizer, **options):
    return shown(tokenizer, tokenize_row(row, tokenizer, 1000, **options))


# -- who is supervised -----------------------------------------------------------------------------------------------


def test_a_template_without_tags_by_prefix_difference(tokenizer):
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenize({"messages": CHAT}, tokenizer) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
        "[2<|im_end|>\n]<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n[\n\nWhat?\n<|im_end|>\n]"
    )


def test_a_template_with_tags_by_its_tags(tokenizer):
    tokenizer.chat_template = TAGGED
    assert tokenize({"messages": CHAT}, tokenizer) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
        "[2<|im_end|>]\n<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n[\n\nWhat?\n<|im_end|>]\n"
    )


def test_smollm2(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    row = tokenize_row({"messages": CHAT}, tokenizer, 1000)
    assert row["input_ids"] == tokenizer.apply_chat_template(CHAT, return_dict=False)  # no special token added twice
    text = shown(tokenizer, row)
    assert text.count("[") == 2 and "assistant\n[2<|im_end|>\n]<|im_start|>user" in text
    # A token that holds the header's line break and the answer's first ones is one the model must produce.
    assert text.endswith("assistant[\n\n\nWhat?\n<|im_end|>\n]")


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, TAGGED, TAGGED.replace("<|im_end|>{% endg", "{% endg")])
def test_tokenizers_that_trim_spaces_off_offsets(template):
    """As Llama 3's. transformers' own mask then supervises nobody where an answer begins with a space, and the user
    where one ends in a space."""
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: at for at, token in enumerate(special + alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)
    assert tokenizer("a ", return_offsets_mapping=True)["offset_mapping"] == [(0, 1), (2, 2)]  # not (1, 2)
    end = {0: "<|im_end|>\n]", 1: "<|im_end|>]\n", 2: "]\n"}[(CHAT_TEMPLATE, TAGGED, template).index(template)]
    messages = [*CHAT[:2], {"role": "assistant", "content": " ok "}, *CHAT[3:]]
    assert tokenize({"messages": messages}, tokenizer) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
        f"[ ok {end}<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n[\n\nWhat?\n{end}"
    )


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, TAGGED])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_answer_and_nothing_else_is_supervised(template, tiny_base, data):
    """Negative control: texts that look like each other, or like whitespace, in every role."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = template
    texts = st.sampled_from(["", " ", "\n", "a", "assistant", " a\n", "assistant\n", "\u00e9\u4f60"])
    answers = texts.filter(str.strip)  # others are no answers: their rows are dropped
    turns = data.draw(st.lists(st.tuples(texts, answers), min_size=1, max_size=3))
    messages = [
        {"role": role, "content": text}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    row = tokenize_row({"messages": messages}, tokenizer, 1000)
    want = []
    for message in messages:
        head = len(tokenizer(f"<|im_start|>{message['role']}\n")["input_ids"])
        body = len(tokenizer(message["content"] + "<|im_end|>")["input_ids"])
        answer = message["role"] == "assistant"
        want += [False] * head + [answer] * body + [answer and template == CHAT_TEMPLATE]
    assert row["supervised"] == want


def test_sharegpt_and_message_lists_as_prompt_and_completion(tokenizer):
    want = tokenize({"messages": CHAT}, tokenizer)
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    told = [{"from": names[m["role"]], "value": m["content"]} for m in CHAT]
    assert tokenize({"conversations": told}, tokenizer) == want
    assert tokenize({"conversations": CHAT}, tokenizer) == want
    for tokenizer.chat_template, end in ((CHAT_TEMPLATE, "<|im_end|>\n]"), (TAGGED, "<|im_end|>]\n")):
        text = tokenize({"prompt": CHAT[:4], "completion": CHAT[4:]}, tokenizer)
        assert text.count("[") == 1 and text.endswith("assistant\n[\n\nWhat?\n" + end)


def test_strings_end_in_the_end_of_text(tokenizer):
    assert tokenize({"prompt": "1+1=", "completion": "2"}, tokenizer) == "1+1=[2<|im_end|>]"
    assert tokenize({"text": "abc"}, tokenizer) == "a[bc<|im_end|>]"
    assert tokenize({"text": "abc<|im_end|>"}, tokenizer) == "a[bc<|im_end|>]"
    tokenizer.eos_token = None
    assert tokenize({"prompt": "", "completion": "abc"}, tokenizer) == "a[bc]"


def test_bos_is_never_supervised(tiny_base):
    """A tokenizer that adds a token in front, for text; chat templates bring their own."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", pair=None, special_tokens=[("<|endoftext|>", 0)]
    )
    assert tokenize({"text": "ab"}, tokenizer) == "<|endoftext|>[ab<|im_end|>]"
    assert tokenize({"messages": CHAT}, tokenizer).startswith("<|im_start|>")


def test_an_answer_begins_where_it_leaves_the_prompt(tokenizer):
    tokenizer.chat_template = FORGETTING
    thought = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>b</think>c"}]
    # One turn, and reasoning at the end: the generation prompt has more than the conversation, or the same.
    assert tokenize({"messages": thought}, tokenizer).endswith("assistant\n<think>[b</think>c<|im_end|>\n]")
    assert tokenize({"messages": CHAT[1:3]}, tokenizer).endswith("assistant\n[2<|im_end|>\n]")
    assert tokenize({"messages": thought + thought}, tokenizer) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[c<|im_end|>\n]"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>[b</think>c<|im_end|>\n]"
    )
    assert tokenize({"messages": CHAT[1:]}, tokenizer).count("[") == 2
    # What the answer happens to begin like is not the prompt's.
    marked = [thought[0], {"role": "assistant", "content": "<table>"}]
    assert tokenize({"messages": marked}, tokenizer).endswith("assistant\n[<table><|im_end|>\n]")


@pytest.mark.parametrize("system", ["", "s"])
@pytest.mark.parametrize("tags", ["key", "content"])
@pytest.mark.parametrize("thoughts", ["-", "r", "--", "r-", "-r", "rr", "---", "r-r", "rrr"])
def test_qwen3_leaves_out_earlier_reasoning(tokenizer, thoughts, tags, system):
    tokenizer.chat_template = QWEN3
    messages = [{"role": "system", "content": system}] if system else []
    want = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    for at, thought in enumerate(thoughts):
        answer = {"role": "assistant", "content": "a"}  # as often elsewhere: in the user's turn, in "assistant"
        if thought == "r" and tags == "key":
            answer["reasoning_content"] = "r"
        elif thought == "r":
            answer["content"] = "<think>\nr\n</think>\n\na"
        messages += [{"role": "user", "content": "<think>\nr\n</think>\n\na"}, answer]
        shown_thought = f"<think>\n{thought.strip('-')}\n</think>\n\n" if at == len(thoughts) - 1 else ""
        want += (
            "<|im_start|>user\n<think>\nr\n</think>\n\na<|im_end|>\n"
            f"<|im_start|>assistant\n[{shown_thought}a<|im_end|>\n]"
        )
    row = {"messages": messages}
    assert tokenize(row, tokenizer) == want
    # Only the last answer to be learnt.
    before, bracket, last = want.rpartition("[")
    completion = before.replace("[", "").replace("]", "") + bracket + last
    assert tokenize({"prompt": messages[:-1], "completion": messages[-1:]}, tokenizer) == completion
    # Asked not to think, the model is given the empty reasoning, and is to say what comes after it.
    given = want.replace("[<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n[").replace("[<think>\nr", "<think>\n[r")
    assert tokenize({**row, "chat_template_kwargs": {"enable_thinking": False}}, tokenizer) == given


@pytest.mark.parametrize("content", [None, "", "c"])
def test_qwen3_with_tools(tokenizer, content):
    """Reasoning before a tool call is shown until the next question, so that prompts for later answers change too."""
    tokenizer.chat_template = QWEN3
    call = {"role": "assistant", "content": content, "reasoning_content": "r", "tool_calls": [{"name": "f"}]}
    asked = [{"role": "user", "content": "a"}, call, {"role": "tool", "content": "f"}]
    said = "c\n" if content else ""
    question, answer = "<|im_start|>user\na<|im_end|>\n", "<|im_start|>assistant\n["
    result = "<|im_start|>user\n<tool_response>\nf\n</tool_response><|im_end|>\n"
    called = said + "<tool_call>\nf\n</tool_call><|im_end|>\n]"
    messages = [*asked, {"role": "assistant", "content": "f"}]
    think, none = "<think>\nr\n</think>\n\n", "<think>\n\n</think>\n\n"
    last = question + answer + think + called + result + answer + none + "f<|im_end|>\n]"
    assert tokenize({"messages": messages}, tokenizer) == last
    once = question + answer + called + result + answer + "f<|im_end|>\n]"
    assert tokenize({"messages": messages * 2}, tokenizer) == once + last
    # A call that begins as the "<think>" of the prompt does is not cut into.
    row = {"messages": messages * 2, "chat_template_kwargs": {"enable_thinking": False}}
    given = last.replace("[<think>\nr", "<think>\n[r").replace("[" + none, none + "[")
    assert tokenize(row, tokenizer) == once + given


@pytest.mark.parametrize(
    "earlier",
    [
        "(left out)",  # the answer is nowhere
        "{{ m.content[:2] }}...",  # nor is the mark
        "{{ m.content }} {{ m.content }}",  # twice
        "{{ m.content }}{% set ns.last = m.content | length %}",  # and changes what comes after
    ],
)
def test_templates_that_hide_where_earlier_turns_end_are_refused_not_mislabelled(tokenizer, earlier):
    tokenizer.chat_template = (
        "{% set ns = namespace(last='') %}{% for m in messages %}<|im_start|>{{ m.role }}{{ ns.last }}\n"
        "{% if m.role != 'assistant' %}{{ m.content }}{% elif loop.last %}{{ m.content }}!{% else %}"
        + earlier
        + "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    dropped = Counter()
    assert tokenize_row({"messages": CHAT}, tokenizer, 1000, dropped=dropped) is None
    assert dropped == {"the chat template changes earlier turns": 1}
    assert tokenize({"messages": CHAT[:3]}, tokenizer).endswith("assistant\n[2!<|im_end|>\n]")


def test_headers_are_not_supervised_where_only_a_last_question_is_marked(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>", "{{ ' /think' if loop.last }}<|im_end|>")
    dropped = Counter()
    assert tokenize_row({"messages": CHAT}, tokenizer, 1000, dropped=dropped) is None
    assert dropped == {"the chat template changes earlier turns": 1}


def test_tools_reasoning_and_options_reach_the_template(tokenizer):
    tokenizer.chat_template = (
        "{{ tools | tojson if tools else 'none' }}{{ mood }}{% for m in messages %}<{{ m.role }}>"
        "{% if m.reasoning_content is defined %}({{ m.reasoning_content }}){% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    messages = [
        {"role": "user", "content": "a", "reasoning_content": None},
        {"role": "assistant", "content": "b", "reasoning_content": "r"},
    ]
    row = {"messages": messages, "tools": '[{"name": "f"}]', "chat_template_kwargs": {"mood": "!"}}
    assert tokenize(row, tokenizer) == '[{"name": "f"}]!<user>a<assistant>[(r)b<|im_end|>]'


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": CHAT[:2]}, "no assistant tokens"),
        ({"messages": []}, "malformed row"),
        ({"messages": None}, "malformed row"),
        ({"messages": ["hello"]}, "malformed message"),
        ({"messages": CHAT[2:]}, "begins with an assistant message"),
        ({"messages": [{"role": "user", "content": 3}, *CHAT[2:3]], "tools": "{"}, "malformed tools"),
        ({"prompt": "a", "completion": CHAT[2:3]}, "malformed row"),
        ({"prompt": CHAT[:2], "completion": "a"}, "malformed row"),
        ({"text": None}, "malformed row"),
        ({"text": ""}, "no assistant tokens"),
        ({"messages": CHAT * 20}, "longer than max_length"),
    ],
)
def test_unusable_rows_are_counted_by_reason(tokenizer, row, reason):
    dropped = Counter()
    assert tokenize_row(row, tokenizer, 1000, dropped=dropped) is None
    assert dropped == {reason: 1}


def test_a_template_that_raises_is_a_reason(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('Roles must alternate') }}"
    dropped = Counter()
    assert tokenize_row({"messages": CHAT}, tokenizer, 1000, dropped=dropped) is None
    assert dropped == {"the chat template refuses it: Roles must alternate": 1}


def test_cutting_instead_of_dropping(tokenizer):
    whole = tokenize_row({"messages": CHAT}, tokenizer, 1000)
    cut = tokenize_row({"messages": CHAT}, tokenizer, 70, too_long="cut")
    assert cut == {name: values[:70] for name, values in whole.items()} and any(cut["supervised"])
    assert tokenize_row({"messages": CHAT}, tokenizer, 30, too_long="cut") is None


def test_tokenizers_that_cannot_do_it(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template; give it one"):
        tokenize_row({"messages": CHAT}, tokenizer, 100)


# -- rows ------------------------------------------------------------------------------------------------------------


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_all_kinds_of_sources(tmp_path):
    rows = [{"text": f"t{n}"} for n in range(5)]
    plain = datasets.Dataset.from_list(rows)
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", rows)
    write(tmp_path / "files" / "test.jsonl", rows[:2])
    plain.to_parquet(tmp_path / "a.parquet")
    plain.to_csv(tmp_path / "a.csv")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    plain.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": plain, "test": plain.select([0, 1])}).save_to_disk(tmp_path / "two")
    for name in ("files", "files/train.jsonl", "a.parquet", "a.csv", "a.json", "one", "two"):
        assert load_rows(str(tmp_path / name)).to_list() == rows, name
    for name in ("files", "two"):
        assert len(load_rows(str(tmp_path / name), split="test")) == 2
    assert load_rows(str(tmp_path / "a.csv"), limit=3).to_list() == rows[:3]
    assert len(load_rows(str(tmp_path / "a.csv"), limit=30)) == 5


def test_columns_are_mapped_and_decide_about_the_form(tmp_path):
    row = {"messages": CHAT, "question": "q", "answer": "a", "prompt": "p", "text": "t"}
    path = write(tmp_path / "a.jsonl", [row])
    assert load_rows(path, columns={"prompt": "question", "completion": "answer"}).to_list() == [
        {"prompt": "q", "completion": "a"}
    ]
    assert load_rows(path, columns={"completion": "answer"})[0]["prompt"] == "p"
    assert "messages" not in load_rows(path, columns={"text": "prompt"}).column_names
    swapped = load_rows(path, columns={"prompt": "text", "completion": "prompt"})[0]
    assert (swapped["prompt"], swapped["completion"]) == ("t", "p")
    assert load_rows(path, columns={"tools": "question"})[0]["messages"] == CHAT


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("no/such/place", {}, "data 'no/such/place' cannot be read: there is no such file or directory"),
        ("./nowhere", {}, "there is no such file or directory"),
        ("a.txt", {}, "a .txt file is not one of .jsonl, .json, .parquet, .csv"),
        ("empty.jsonl", {}, "empty.jsonl is empty: it has no rows"),
        ("blank.jsonl", {}, "blank.jsonl is empty: it has no rows"),
        ("broken.jsonl", {}, "broken.jsonl' cannot be read: line 2 is not JSON"),
        ("dir", {}, "doesn't contain any data files"),
        ("files", {"split": "tset"}, 'Unknown split "tset". Should be one of'),
        ("odd.jsonl", {}, "has the columns a, b; needed: messages, conversations, prompt \\+ completion, text$"),
        ("odd.jsonl", {"columns": {}}, r"needed: .*, text \(map one with data.columns\)$"),
        ("odd.jsonl", {"columns": {"text": "c"}}, "has no column 'c' for text; there are a, b"),
        ("odd.jsonl", {"columns": {"txt": "a"}}, "'txt' is not one of messages, conversations"),
        ("odd.jsonl", {"columns": {"prompt": "a", "completion": "a"}}, "name a column twice"),
        ("odd.jsonl", {"limit": 0}, "limit=0 must be at least 1"),
    ],
)
def test_bad_sources_say_so_in_one_line(tmp_path, monkeypatch, name, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dir").mkdir()
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", [{"text": "a"}])
    write(tmp_path / "odd.jsonl", [{"a": "1", "b": "2"}])
    for file, text in {"a.txt": "a", "empty.jsonl": "", "blank.jsonl": "\n\n", "broken.jsonl": '{"a": 1}\n{"a'}.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_rows(name, **options)
    assert "\n" not in str(error.value)


def test_a_hub_that_cannot_be_reached_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("tah.data.rows.hub_reachable", lambda: False)
    with pytest.raises(ValueError, match="data 'nobody/nothing' cannot be read: .* the data hub cannot be reached"):
        load_rows("nobody/nothing")


# -- depth labels ----------------------------------------------------------------------------------------------------

RANK, PROB = [0, 1, 6, 0, 2, -1], [0.9, 0.4, 0.01, 0.25, 0.2, 0.0]


@pytest.mark.parametrize(
    ("rule", "hard"),
    [("top1", [1, 2, 4]), ("prob<0.3", [2, 3, 4]), ("prob < .05", [2]), ("rank>5", [2]), ("rank>0", [1, 2, 4])],
)
def test_rules(rule, hard):
    found = depth_labels(RANK, PROB, [False] + [True] * 5, rule, 2, seed=0)
    assert found.dtype == np.int64 and found.tolist() == [2 if at in hard else 1 for at in range(6)]


def test_only_predictions_of_supervised_tokens_are_hard():
    """The label sits on the predicting position: the token before the answer has one, the answer's last has none."""
    supervised = [False, False, True, True, False, False]
    found = depth_labels([5] * 6, [0.1] * 6, supervised, "top1", 2, seed=0)
    assert found.tolist() == [1, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("rule", ["top2", "prob<0", "prob<1.5", "prob>0.3", "rank>-1", "rank>1.5", "", "top1x"])
def test_bad_rules(rule):
    with pytest.raises(ValueError, match="is not one of top1, prob<P .0 < P <= 1., rank>K .K >= 0."):
        depth_labels(RANK, PROB, [True] * 6, rule, 2, seed=0)


def test_labels_longer_than_tokens():
    with pytest.raises(ValueError, match="6 ranks and 6 probabilities for 5 tokens; label again"):
        depth_labels(RANK, PROB, [True] * 5, "top1", 2, seed=0)


@pytest.mark.parametrize("max_depth", [3, 8])
def test_depth_by_severity(max_depth):
    count = 20000
    rank, supervised = np.r_[np.ones(count), -1], np.ones(count + 1, bool)
    means = []
    for prob in (0.9, 0.3, 0.03, 0.001, 1e-30):
        found = depth_labels(rank, np.r_[np.full(count, prob), 0], supervised, "top1", max_depth, seed=3)
        assert found[-1] == 1 and found[:-1].min() >= 2 and found.max() <= max_depth
        want = 2 + (max_depth - 2) * min(1, np.log(prob) / np.log(0.001))
        assert abs(found[:-1].mean() - want) < 0.02
        means.append(found[:-1].mean())
    assert means == sorted(means) and means[-1] == max_depth


def test_depths_are_seeded_by_row():
    given = (np.ones(100), np.full(100, 0.1), np.ones(100, bool), "top1", 4)
    first = depth_labels(*given, seed=[1, 2])
    assert (first == depth_labels(*given, seed=[1, 2])).all() and (first != depth_labels(*given, seed=[1, 3])).any()
    assert set(depth_labels(*given[:-1], 1, seed=0)) == {1}


# -- batches ---------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_packing_loses_nothing_and_fits(lengths, max_length):
    rows = pack(lengths, max_length)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in row) for row in rows]
    assert all(size <= max_length for size in sums)
    assert rows == pack(lengths, max_length)
    # No two rows fit into one, which is what best fit promises for the pair of emptiest rows.
    assert sum(sorted(sums)[:2]) > max_length or len(sums) < 2


def test_packing_takes_the_fullest_row_that_fits():
    assert pack([2, 6, 7, 3], 10) == [[2, 3], [1, 0]]
    for lengths in ([11], [0]):
        with pytest.raises(ValueError, match=f"document 0 has {lengths[0]} tokens; 1 to 10 fit a row"):
            pack(lengths, 10)


def row(number, length, **extra):
    ids = list(range(number * 100, number * 100 + length))
    supervised = [at % 2 == 0 for at in range(length)]
    return {"input_ids": ids, "supervised": supervised, "row": number, **extra}


def test_padded_batches():
    batch = Collator(pad_token_id=7)([row(1, 3, depth_labels=[1, 2, 1]), row(2, 1, depth_labels=[2])])
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[100, 101, 102], [200, 7, 7]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, -100, 102], [-100, -100, -100]],
        "depth_labels": [[1, 2, 1], [2, 1, 1]],
        "row": [1, 2],
    }
    assert {values.dtype for values in batch.values()} == {torch.int64}
    assert "depth_labels" not in Collator(7)([row(1, 3)])


def test_packed_batches():
    rows = [{"documents": [row(1, 2), row(2, 3)]}, {"documents": [row(3, 2)]}]
    batch = Collator(pad_token_id=7, packed=True)(rows)
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[100, 101, 200, 201, 202], [300, 301, 7, 7, 7]],
        "labels": [[-100, -100, -100, -100, 202], [-100] * 5],
        "position_ids": [[0, 1, 0, 1, 2], [0, 1, 0, 1, 2]],
        "row": [[1, 2], [3, -1]],
    }
    rows = [{"documents": [row(1, 2, depth_labels=[2, 2])]}, {"documents": [row(3, 3, depth_labels=[1, 2, 1])]}]
    assert Collator(7, packed=True)(rows)["depth_labels"].tolist() == [[2, 2, 1], [1, 2, 1]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_packed_and_padded_hold_the_same(lengths):
    rows = [row(number, length) for number, length in enumerate(lengths, 1)]
    packed = [{"documents": [rows[at] for at in group]} for group in pack(lengths, 12)]
    padded, packed = Collator(0, packed=False)(rows), Collator(0, max_length=12, packed=True)(packed)
    kept = packed["input_ids"] > 0
    assert sorted(packed["input_ids"][kept]) == sorted(padded["input_ids"][padded["attention_mask"].bool()])
    assert sorted(packed["labels"].flatten()[packed["labels"].flatten() >= 0]) == sorted(
        padded["labels"].flatten()[padded["labels"].flatten() >= 0]
    )
    assert (packed["labels"][packed["position_ids"] == 0] == -100).all()


def test_batches_that_are_refused():
    with pytest.raises(ValueError, match="row 1 of the batch has 5 tokens; 4 fit"):
        Collator(0, max_length=4)([row(1, 3), row(2, 5)])
    with pytest.raises(ValueError, match="depth_labels of row 2 has 4 entries for 3 tokens; label again"):
        Collator(0)([row(2, 3, depth_labels=[1] * 4)])
