"""Files of data and of questions as people have them: read, or refused in one line that names file and line."""

import gzip
import json

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_rows import PAIRS, ROWS, TEMPLATES
from transformers import AutoTokenizer

from helpers.models import CHAT_TEMPLATE
from tah.data.assistant_mask import encode
from tah.data.chat_rows import WEIGHTS, Unusable
from tah.data.data_files import PACKED, json_values
from tah.data.rows import load_rows, tokenize_row
from tah.evaluation.tasks import rows as questions
from tah.files import DEEPEST, Nesting, parse_json, too_deep
from tah.tracing.texts import read_rows


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """What `datasets` keeps of the files it reads goes away with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        datasets.disable_progress_bars()
        yield


DEEP, TOO = '{"a": ' * 20_000 + "1" + "}" * 20_000, f"has brackets more than {DEEPEST} deep inside each other"
ROW = '{"text": "a"}\n'
FILES = {
    # UTF-8
    "latin1.jsonl": (b'{"text": "Espa\xf1a"}\n', "line 1 is not UTF-8"),
    "latin2.jsonl": ((ROW * 3).encode() + b'{"text": "\xb1"}', "line 4 is not UTF-8"),
    "latin1.json": (b'[{"text":\n"\xf1"}]', "line 2 is not UTF-8"),
    "latin1.csv": (b"text\na\n\xf1\n", "line 3 is not UTF-8"),
    "utf16.jsonl": (ROW.encode("utf-16"), "line 1 is not UTF-8"),
    "cut.jsonl": (ROW.encode() + '{"text": "\u00e9'.encode()[:-1], "line 2 is not UTF-8"),
    "bom.jsonl": (b"\xef\xbb\xbf" + ROW.encode(), 1),
    "bom.json": (b'\xef\xbb\xbf[{"text": "a"}]', 1),
    "bom.csv": (b"\xef\xbb\xbftext\na\n", 1),
    "large.jsonl": (('{"text": "' + "\u00e9" * 3_000_000 + '"}\n').encode(), 1),  # a character on the edge of a chunk
    "large2.jsonl": (('{"text":  "' + "\u00e9" * 3_000_000 + '"}\n').encode(), 1),
    # JSON
    "trailing.jsonl": (b'{"text": "a"},}\n', "line 1 is not JSON"),
    "comma.jsonl": (b'{"text": "a"},\n{"text": "b"},\n', "line 1 is not JSON"),
    "quotes.jsonl": (b"{'text': 'a'}\n", "line 1 is not JSON"),
    "open.jsonl": (ROW.encode() + b'{"text": "a\n' + ROW.encode(), "line 2 is not JSON"),
    "rest.jsonl": (ROW.encode() + b'{"text": "a"} b\n', "line 2 is not JSON"),
    "half.jsonl": (b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
    "null.jsonl": (b"null\n", "line 1 is null, not an object"),  # pyarrow crashes at that
    "null first.jsonl": (b"\n null\n" + ROW.encode(), "line 2 is null, not an object"),
    "null after.jsonl": (ROW.encode() * 2 + b"null", "line 3 is null, not an object"),
    "null at the edge.jsonl": (b" " * (2**22 - 2) + b"null\n", "line 1 is null, not an object"),
    "null.json": (b'[{"text": "a"}, null]', "entry 2 of its list is null, not an object"),
    "numbers.json": (b"[1, 2]", "entry 1 of its list is 1, not an object"),
    "texts.json": (b'["a", "b"]', 2),
    "NUL in a name.jsonl": (b'{"messages": {"\\u0000": {}}}', "its rows cannot be decoded"),
    "NUL in two names.jsonl": (b'{"messages": {"": null, "\\u0000": null}}', "its rows cannot be decoded"),
    "NUL in a text.jsonl": (b'{"text": "a\\u0000b"}', 1),
    "null inside.jsonl": (b'{"text": "a", "b": null}\n{"text": null}\n', 2),
    "several lines.jsonl": (b'{\n"text": "a"\n}\n{"text": "b"\n}\n', 2),
    "one line.jsonl": (b'{"text": "a"} {"text": "b"}\n', 2),
    "array.jsonl": (b'[{"text": "a"}, {"text": "b"}]', 2),
    "blank lines.jsonl": (b'\n{"text": "a"}\n\n\n{"text": "b"}\n \n', 2),
    "windows.jsonl": (b'{"text": "a"}\r\n{"text": "b"}\r\n', 2),
    "number.jsonl": (b'{"text": "a", "n": ' + b"9" * 9999 + b"}\n", 1),
    # brackets
    "objects.jsonl": (ROW + DEEP, f"line 2 {TOO}"),
    "objects.json": ('[{"text": "a"},\n' + DEEP + "]", f"line 2 {TOO}"),
    "lists.jsonl": ('{"text": "a", "b": ' + "[" * 20_000 + "]" * 20_000 + "}", f"line 1 {TOO}"),
    "unclosed.jsonl": ("[" * 20_000, f"line 1 {TOO}"),
    "a bracket a line.jsonl": ("[\n" * 20_000, ""),
    "after a quotation mark.jsonl": ('{"text": "a\n' + "[" * 20_000, f"line 2 {TOO}|line 1 is not JSON"),
    "after closing ones.jsonl": ("]" * 20_000 + "\n" + "[" * 20_000, f"line 2 {TOO}|line 1 is not JSON"),
    "across a chunk.jsonl": (" " * (2**22 - 10_000) + "[" * 20_000, f"line 1 {TOO}"),
    "in a string.jsonl": ('{"text": "' + "[" * 20_000 + '"}', 1),
    "in a string with quotation marks.jsonl": ('{"text": "' + '\\"[' * 20_000 + '\\\\"}', 1),
    "one after the other.jsonl": ('{"text": "a", "b": [' + "[], " * 20_000 + "[]]}", 1),
    "as deep as can be.jsonl": ('{"text": "a", "b": ' + "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1) + "}", 1),
    "as deep objects.jsonl": ('{"text": "a", "b": ' + '{"a": ' * (DEEPEST - 1) + "1" + "}" * DEEPEST, 1),
    "one deeper.jsonl": ('{"text": "a", "b": ' + "[" * DEEPEST + "]" * DEEPEST + "}", f"line 1 {TOO}"),
    "brackets.csv": ("text\n" + "[" * 20_000 + "\n", 1),
}


@pytest.mark.parametrize("name", FILES)
def test_files(name, tmp_path):
    content, want = FILES[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(want, int):
        assert len(load_rows(str(path))) == len(read_rows(str(path))) == want
        return
    for read in (load_rows, read_rows):  # for training, and for `tah trace`
        with pytest.raises(ValueError, match=f"^data '.*{name}' cannot be read: .*({want})") as error:
            read(str(path))
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


def chat(content, times=1, **more):
    said = {"role": "assistant", "content": content, **more}
    return (json.dumps({"messages": [{"role": "user", "content": "a" * 100}, said]}) + "\n") * times


PARTS = [{"type": "text", "text": "Yo"}]


@pytest.mark.parametrize("first", [2**16, 2**26])
def test_what_comes_late_in_a_file_is_as_good_as_what_comes_early(first, tmp_path, monkeypatch):
    """`datasets` looks at the first bytes only, and makes JSON of a list that comes where texts were before."""
    monkeypatch.setattr("tah.data.data_files.FIRST", first)
    path = tmp_path / "a.jsonl"
    for late in (PARTS, {"a": 1}, True):
        path.write_text(chat("Yo", 1000) + chat(late))
        if first > path.stat().st_size:
            assert load_rows(str(path))[1000]["messages"][1]["content"] == late
            continue
        with pytest.raises(ValueError, match="line 1001 has a content that is no text, unlike what comes first"):
            load_rows(str(path))
    path.write_text(chat("Yo", 1000) + chat("Yo", tool_calls=[{"name": "w", "arguments": {}}]))
    if first > path.stat().st_size:
        assert load_rows(str(path))[1000]["messages"][1]["tool_calls"]
    else:
        with pytest.raises(ValueError, match="its rows have other columns or types than those that come first"):
            load_rows(str(path))
    for early, late in ((PARTS, "Yo"), ("Yo", '"content": ["a"]'), ("Yo", 42)):
        path.write_text(chat(early) + chat("Yo", 1000) + chat(late))
        found = load_rows(str(path))[1001]["messages"][1]["content"]
        assert str(found) == str(late)


def test_files_of_a_directory_are_as_good_as_the_first(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.jsonl").write_text(chat("Yo"))
    (tmp_path / "train" / "b.jsonl").write_text(chat("Yo") + chat(PARTS))
    with pytest.raises(ValueError, match="train/b.jsonl line 2 has a content that is no text, unlike what comes first"):
        load_rows(str(tmp_path))
    (tmp_path / "train" / "b.jsonl").write_text(chat("Yo") + chat('"content": ["a"]'))
    assert len(load_rows(str(tmp_path))) == 3


M, ANSWER = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], {"role": "assistant"}
TOOLS = [{"name": "set", "parameters": {"properties": {"value": {"type": "number"}, "content": {"type": "string"}}}}]
SHARE = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
BACKSLASH = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "cont\\u0065nt": ["b"]}]}'
# What is in the first file, or in the first bytes of the only one; what comes late; whether that is as good.
LATE = {
    "a schema with a value": ({"messages": M, "tools": TOOLS}, {"messages": M, "tools": TOOLS}, True),
    "a value in another column": (
        {"messages": M, "meta": {"value": [1]}},
        {"messages": M, "meta": {"value": [2]}},
        True,
    ),
    "a column named value": ({"messages": M, "value": True}, {"messages": M, "value": False}, True),
    "a column named content": ({"text": "t", "content": {"a": 1}}, {"text": "t", "content": {"a": 2}}, True),
    "a content in another column": (
        {"conversations": SHARE, "more": {"content": {"a": 1}}},
        {"conversations": SHARE, "more": {"content": {"a": 2}}},
        True,
    ),
    "a text that looks like it": ({"text": "t"}, {"text": '"text": [1], "content": {'}, True),
    "an integer": ({"messages": M}, {"messages": [M[0], {**ANSWER, "content": 42}]}, True),
    "null": ({"messages": M}, {"messages": [M[0], {**ANSWER, "content": None}]}, True),
    "a null text": ({"text": "t"}, {"text": None}, True),
    "tools as JSON, then as a list": ({"messages": M, "tools": "[]"}, {"messages": M, "tools": TOOLS}, True),
    "messages after messages": ({"prompt": M[:1], "completion": M[1:]}, {"prompt": M[:1], "completion": M[1:]}, True),
    "an object as text": ({"text": "t"}, {"text": {"a": [1]}}, False),
    "a list as text": ({"text": "t"}, {"text": ["a"]}, False),
    "a truth value as text": ({"text": "t"}, {"text": True}, False),
    "a fraction as text": ({"text": "t"}, {"text": 1.50}, False),
    "an object as completion": ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": {"y": 1}}, False),
    "an object as prompt": ({"prompt": "a", "completion": "b"}, {"prompt": {"y": 1}, "completion": "b"}, False),
    "parts as system prompt": ({"messages": M, "system": "a"}, {"messages": M, "system": ["a"]}, False),
    "a fraction": ({"messages": M}, {"messages": [M[0], {**ANSWER, "content": 4.5}]}, False),
    "parts in a value": (
        {"conversations": SHARE},
        {"conversations": [SHARE[0], {"from": "gpt", "value": ["b"]}]},
        False,
    ),
    "parts in a completion": (
        {"prompt": M[:1], "completion": M[1:]},
        {"prompt": M[:1], "completion": [{**ANSWER, "content": ["b"]}]},
        False,
    ),
    "parts after a schema": (
        {"messages": M, "n": 1},
        {"messages": [M[0], {**ANSWER, "content": ["b"]}], "n": 1},
        False,
    ),
    "an escape in the key": ({"messages": M}, BACKSLASH, False),
}


@pytest.mark.parametrize("where", ["directory", "file", "list"])
@pytest.mark.parametrize("name", LATE)
def test_only_what_is_learnt_has_to_be_text_as_before(name, where, tmp_path, monkeypatch):
    """Good data is not refused for a key that is named as a message's is, and nothing is learnt as JSON writes it."""
    monkeypatch.setattr("tah.data.data_files.FIRST", 2**16)
    early, late, good = LATE[name]
    early, late = json.dumps(early) + "\n", (late if isinstance(late, str) else json.dumps(late)) + "\n"
    if where == "file":
        source = tmp_path / "a.jsonl"
        source.write_text(early * (2**16 // len(early) + 5) + late)
    else:
        source, many = tmp_path / "d", where == "list"
        source.mkdir()
        for file, line in (("train-0", early), ("train-1", early + late)):
            text = "[" + line.strip().replace("\n", ",\n") + "]" if many else line
            (source / f"{file}.json{'' if many else 'l'}").write_text(text)
    if good:
        assert len(load_rows(str(source))) >= 3
        return
    with pytest.raises(
        ValueError, match=r" has a content that is no text, unlike what comes first; move it there$"
    ) as error:
        load_rows(str(source))
    place = {"directory": "train-1.jsonl line 2 has", "file": " line ", "list": "train-1.json entry 2 of its list has"}
    assert place[where] in str(error.value)


def test_columns_that_a_recipe_names_are_looked_at_by_their_names_in_the_file(tmp_path):
    for number, row in enumerate(({"said": "t", "text": "a"}, {"said": {"a": 1}, "text": "a"})):
        (tmp_path / f"train-{number}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"train-1.jsonl line 1 has a content that is no text"):
        load_rows(str(tmp_path), columns={"text": "said"})
    assert len(load_rows(str(tmp_path))) == 2


def test_files_of_another_split_do_not_matter(tmp_path):
    (tmp_path / "train.jsonl").write_text(chat("Yo"))
    (tmp_path / "test.jsonl").write_text(chat(PARTS))
    assert len(load_rows(str(tmp_path))) == 1
    with pytest.raises(ValueError, match=r"test.jsonl line 1 has a content that is no text"):
        load_rows(str(tmp_path), split="test")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_a_small_file_that_unpacks_to_much_is_refused(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr("tah.data.data_files.SMALL", 2**20)
    path = tmp_path / f"train.json{suffix}"
    with PACKED[suffix](path, "wb") as file:
        file.write(b"[" + b'{"text": "a"},' * 2**18 + b'{"text": "a"}]')
    with pytest.raises(
        ValueError, match=rf"train.json{suffix} unpacks to more than \d+ bytes, 100 times its size; unpack"
    ):
        load_rows(str(tmp_path))
    monkeypatch.setattr("tah.data.data_files.MOST_PACKED", 10**9)
    assert len(load_rows(str(tmp_path))) == 2**18 + 1


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 2**22])
def test_values_of_a_file_are_read_one_by_one(chunk, tmp_path, monkeypatch):
    """The same in whatever pieces the file is read: numbers and literals are not cut."""
    monkeypatch.setattr("tah.data.data_files.CHUNK", chunk)
    path, entries = tmp_path / "a.json", [{"a": [1, "\u00e9]"]}, 1234, "x,]", None, -1.5, [], {"b": {}}]
    for text in (json.dumps(entries), json.dumps(entries, indent=1), "\ufeff" + json.dumps(entries), "[]", "[] []"):
        path.write_text(text)
        want = [(f"entry {at} of its list", each) for at, each in enumerate(entries if "1234" in text else [], 1)]
        assert list(json_values(path)) == want
    path.write_text('\n{"a":\n1}\n{"b": 2} {"c": ' + "9" * 5000 + "}\n12")
    places = [(place, list(value) if isinstance(value, dict) else value) for place, value in json_values(path)]
    assert places == [("line 2", ["a"]), ("line 4", ["b"]), ("line 4", ["c"]), ("line 5", 12)]
    path.write_text('[{"a": 1}, {"b"')
    assert list(json_values(path)) == [("entry 1 of its list", {"a": 1})]


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "data/train.jsonl.gz"])
def test_files_of_a_directory(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for content, message in ((DEEP, f"{name} line 1 {TOO}"), ("\x00\n\udcf1", f"{name} line 2 is not UTF-8")):
        raw = content.encode("utf-8", "surrogateescape")
        path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
        with pytest.raises(ValueError, match=f"^data '.*' cannot be read: {message}$"):
            load_rows(str(tmp_path))
    path.write_bytes(gzip.compress(ROW.encode()) if name.endswith("gz") else ROW.encode())
    assert len(load_rows(str(tmp_path))) == 1


def test_a_line_of_a_directory_that_is_not_json(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"},}\n')
    with pytest.raises(ValueError, match=r"train.jsonl line 1 is not JSON"):
        load_rows(str(tmp_path))


@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_plain_texts(name, tmp_path):
    path = tmp_path / name
    for content, message in ((b"a\n\xf1", "line 2 is not UTF-8"), (b" \n", "has no text")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_rows(str(path))
    path.write_bytes(b"\xef\xbb\xbfa")
    assert read_rows(str(path)) == [{"text": "a"}]


# -- depth -----------------------------------------------------------------------------------------------------------


def slow_depth(text):
    """The line in which a text is too deep, a character at a time."""
    depth, line, in_string, escaped = 0, 1, False, False
    for character in text:
        if character == "\n":
            in_string, escaped, line = False, False, line + 1
            continue
        if escaped and character in '"\\':
            escaped = False
            continue
        escaped = character == "\\"
        in_string ^= character == '"'
        depth += 0 if in_string else (character in "[{") - (character in "]}" and depth > 0)
        if depth > DEEPEST:
            return line
    return None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(['"', "\\", "[", "{", "]", "}", "\n", "a", "[[[["]), st.integers(1, 99))),
    st.data(),
)
def test_depth_in_chunks_is_the_depth_a_character_at_a_time(runs, data):
    text = "".join(piece * times for piece, times in runs)
    nesting, at, found = Nesting(), 0, None
    while at < len(text) and found is None:
        size = data.draw(st.integers(1, 400))
        found, at = nesting.add(text[at : at + size].encode()), at + size
    assert found == slow_depth(text)
    assert too_deep(text) == too_deep(text.encode()) == (found is not None)


@pytest.mark.parametrize("text", ["[" * 20_000, DEEP, DEEP.encode(), '["a", ' * 20_000, b"[" * 20_000])
def test_json_that_is_too_deep(text):
    with pytest.raises(ValueError, match=f"^{TOO}$"):
        parse_json(text)


@pytest.mark.parametrize(
    "text", ['"' + "[" * 20_000 + '"', "[" + "[]," * 20_000 + "[]]", "[" * DEEPEST + "]" * DEEPEST]
)
def test_json_that_is_not(text):
    assert parse_json(text) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [("9" * 9999, "has a number that is too long to be read"), (b"\xff", "is not UTF-8"), ("", "is not JSON")],
)
def test_other_json_that_cannot_be_read(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


# -- questions -------------------------------------------------------------------------------------------------------

MATH = {"question": "1+1?", "answer": "2"}
CHOICE = {"question": "Which?", "choices": ["a", "b", "c"], "answer": "B"}
CODE = {"prompt": "def f():", "entry_point": "f", "test": "assert f() is None", "test_list": [], "code": ""}
KINDS = {"math": MATH, "choice": CHOICE, "code": CODE}


def read_questions(path, kind):
    """All the way to what lm-eval is given."""
    return list(
        questions.load(name="t", kind=kind, hub="", split="", read=questions.program, data={"t": str(path)})["test"]
    )


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("choice", {"answer": 0}, r"answer 0 is not one of the letters ABC; a number could count from 0 or from 1"),
        ("choice", {"answer": 1}, "answer 1 is not one of the letters ABC; "),
        ("choice", {"answer": 1.0}, "answer 1.0 is not one of the letters ABC; "),
        ("choice", {"answer": True}, "answer True is not one of the letters ABC; "),
        ("choice", {"answer": ["A"]}, r"answer \['A'\] is not one of the letters ABC; "),
        ("choice", {"answer": "AB"}, "answer 'AB' is not one of the letters ABC$"),
        ("choice", {"answer": "ABC"}, "answer 'ABC' is not one of the letters ABC$"),
        ("choice", {"answer": "BC"}, "answer 'BC' is not one of the letters ABC$"),
        ("choice", {"answer": "D"}, "answer 'D' is not one of the letters ABC$"),
        ("choice", {"answer": "b"}, "answer 'b' is not one of the letters ABC$"),
        ("choice", {"answer": "0"}, "answer '0' is not one of the letters ABC$"),
        ("choice", {"answer": ""}, "has no 'answer'"),
        ("choice", {"answer": "x" * 500}, r"answer 'x*\.\.\. is not one of"),
        ("choice", {"choices": ["a"]}, "choices must be a list of 2 to 10"),
        ("choice", {"choices": {"text": ["a", "b"]}}, "choices must be a list of 2 to 10"),
        ("choice", {"choices": ["a", None]}, "choice None is neither a string nor a number"),
        ("choice", {"choices": ["a", ["b"]]}, r"choice \['b'\] is neither a string nor a number"),
        ("choice", {"question": ["a"]}, r"question \['a'\] is not a string"),
        ("math", {"question": {"text": "a"}}, r"question \{'text': 'a'\} is not a string"),
        ("code", {"prompt": 7}, "prompt 7 is not a string"),
        ("code", {"test_list": "assert f()"}, "test_list 'assert f.*' is not a list of strings"),
        ("code", {"test_imports": [1]}, r"test_imports \[1\] is not a list of strings"),
        ("code", {"entry_point": ["f"]}, r"entry_point \['f'\] is not a string"),
    ],
)
def test_questions_that_do_not_fit_are_named_by_line(kind, change, message, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(KINDS[kind]) + "\n" + json.dumps(KINDS[kind] | change) + "\n")
    with pytest.raises(ValueError, match=message) as error:
        read_questions(path, kind)
    assert str(error.value).startswith(f"{path} line 2") and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_questions_that_fit(kind, tmp_path):
    path, row = tmp_path / "q.jsonl", KINDS[kind]
    for content in (
        json.dumps(row),
        "\ufeff" + json.dumps(row),
        f"\n{json.dumps(row)}\r\n\n",
        "\ufeff\n" + json.dumps(row),
    ):
        path.write_text(content, "utf-8")
        (found,) = read_questions(path, kind)
        assert {name: found[name] for name in row} == row
    path.write_bytes(json.dumps(row).encode("utf-16"))
    with pytest.raises(ValueError, match="line 1 is not UTF-8; write one question per line"):
        read_questions(path, kind)
    path.write_text(DEEP)
    with pytest.raises(ValueError, match=f"line 1 {TOO}"):
        read_questions(path, kind)


def test_choices_that_are_numbers(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(CHOICE | {"choices": [3, 4.5, "5"]}) + "\n" + json.dumps(CHOICE) + "\n")
    assert [row["choices"] for row in read_questions(path, "choice")] == [["3", "4.5", "5"], ["a", "b", "c"]]


# -- anything --------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["\ud800", "", "[", "null"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
TEXTS = st.sampled_from(
    [b'{"text":"a"}', b"[", b"]", b"{", b"}", b",", b'"', b"\n", b"\xff", b"\xef\xbb\xbf", b"1", b'"a":']
)
BYTES = st.binary(max_size=40) | st.lists(TEXTS, max_size=12).map(b"".join)
SOUND = [row for row, _ in ROWS.values()] + [row for _, row, _, _ in PAIRS.values()]


def places(value, at=()):
    """Where in a value something can be put, itself included."""
    yield at
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(entry, (*at, key))


def put(value, at, new):
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = put(value[at[0]], at[1:], new)
    return copy


@st.composite
def nearly(draw, rows):
    """A row with something else in one or two places."""
    row = draw(st.sampled_from(rows))
    for _ in range(draw(st.integers(1, 2))):
        row = put(row, draw(st.sampled_from([at for at in places(row) if at] or [()])), draw(VALUES))
    return row


def one_line(error, path=None):
    assert "\n" not in str(error) and len(str(error)) < 1000
    assert path is None or str(path) in str(error), error


def try_file(path, content, tokenizer):
    """Reading gives rows or one line with the file's name; every row is learnt or dropped."""
    path.write_bytes(content)
    try:
        rows = load_rows(str(path), columns={})
        for row in rows.select(range(min(3, len(rows)))):
            tokenize_row(row, tokenizer, 1000)
    except ValueError as error:
        one_line(error, path)
    finally:
        path.unlink()


def try_row(row, tokenizer, template):
    """A row is learnt or dropped, and of what the assistant says nothing is lost."""
    tokenizer.chat_template = template
    try:
        ids, supervised = encode(row, tokenizer)
    except Unusable as error:
        return one_line(error)
    learnt = tokenizer.decode([token for token, said in zip(ids, supervised, strict=True) if said])
    text = tokenizer.decode(ids)
    for message in row.get("messages") or []:
        content = message.get("content")
        if isinstance(content, str):
            said = content.split("</think>")[-1].strip()  # reasoning may be left out
            read_only = any(not message.get(name, True) for name in WEIGHTS)
            shown = learnt if message.get("role") == "assistant" and not read_only else text
            # Results of tools are written as JSON by some templates.
            assert any(
                each in shown for each in (said, json.dumps(said)[1:-1], json.dumps(said, ensure_ascii=False)[1:-1])
            )


def try_questions(path, content, kind):
    path.write_bytes(content)
    try:
        read_questions(path, kind)
    except ValueError as error:
        one_line(error)
        assert str(path) in str(error) or "two questions have the id" in str(error)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def tokenizer(tiny_base):
    return AutoTokenizer.from_pretrained(tiny_base)


SUFFIXES = st.sampled_from([".jsonl", ".json", ".csv", ".parquet"])
FEW = settings(max_examples=200, deadline=None)
MANY = settings(max_examples=3000, deadline=None, derandomize=False, print_blob=True)


def fuzz(test):
    """200 examples in `make test`, and 3000 in a slow one."""
    return pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.slow)])(test)


@fuzz
def test_any_bytes_are_read_or_refused(many, tmp_path, tokenizer):
    @(MANY if many else FEW)
    @given(SUFFIXES, BYTES)
    def run(suffix, content):
        try_file(tmp_path / f"a{suffix}", content, tokenizer)

    run()


@fuzz
def test_any_json_is_read_or_refused(many, tmp_path, tokenizer):
    @(MANY if many else FEW)
    @given(st.lists(nearly(SOUND) | VALUES, min_size=1, max_size=3), st.booleans())
    def run(rows, array):
        content = json.dumps(rows).encode() if array else lines(rows)
        try_file(tmp_path / ("a.json" if array else "a.jsonl"), content, tokenizer)

    run()


@fuzz
def test_any_row_is_learnt_or_dropped(many, tokenizer):
    @(MANY if many else FEW)
    @given(nearly(SOUND), st.sampled_from([*TEMPLATES.values(), CHAT_TEMPLATE]))
    def run(row, template):
        if isinstance(row, dict):
            try_row(row, tokenizer, template)

    run()


@fuzz
@pytest.mark.parametrize("kind", KINDS)
def test_any_questions_are_read_or_refused(many, kind, tmp_path):
    @(MANY if many else FEW)
    @given(st.lists(nearly([KINDS[kind]]), min_size=1, max_size=3).map(lines) | BYTES)
    def run(content):
        try_questions(tmp_path / "q.jsonl", content, kind)

    run()


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize(
    "row",
    [
        {"text": "2020-01-01"},
        {"prompt": "When?", "completion": "2020-01-02T03:04:05Z"},
        {"messages": [{"role": "user", "content": "2020-01-01"}, {"role": "assistant", "content": "2020-01-02"}]},
        {"prompt": "When?", "completion": "It was in 2020.", "when": "2020-01-01 10:00:00"},
    ],
)
def test_texts_that_look_like_dates_stay_texts(tmp_path, row, suffix):
    """The parser makes points in time of a column in which every text is a date."""
    path = tmp_path / f"rows.{suffix}"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n" if suffix == "jsonl" else json.dumps([row, row]))
    found = load_rows(str(path), "train", {})
    assert len(found) == 2
    for name, value in row.items():
        assert found[1][name] == value
