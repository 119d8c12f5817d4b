"""No command line ends in a traceback: random commands, options, values, paths and overrides of a recipe, in process.

What the user can put right is one line and exit code 2. Exit code 1 is a fault of ours, so finding one is a failure
here. `pytest -m slow tests/test_fuzz.py` looks further, with other examples each time.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from typer.main import get_command

pytest.importorskip("datasets")

from tah_cli.app import app, run

COMMANDS = dict(get_command(app).walk())
# These would measure or serve for minutes, so they only get models that do not exist.
HEAVY = ("bench", "bench train", "bench trace", "bench serve", "serve", "demo", "doctor")
RECIPES = ("run", "train", "label")
SURE = ["backbone.method=paper", "label.reference=./nowhere"]  # no training begins, whatever comes before
MODELS = ["tah", "base", "follow-tah", "refusing", "longer"]
NO_MODELS = [
    "./nowhere",
    "nobody/nothing",
    "",
    " ",
    "prose.txt",
    "empty",
    "damaged",
    "original",
    ".",
    "..",
    "/",
    "~",
    "a/b/c",
]
DATA = ["prose.txt", "chat.jsonl", "text.jsonl"]
NO_DATA = [
    "missing.jsonl",
    "bad.jsonl",
    "empty",
    "empty.txt",
    "tah",
    "nobody/texts",
    "",
    ".",
    "latin1.txt",
    "list.json",
]
ODD = [
    "", " ", "-", "--", "-1", "0", "1", "2", "1e400", "nan", "-0.0", "0x10", "1_0", "\u0661", "1" * 400, "true", "null",
    "[]", "{}", "caf\udce9", "\u202eabc", "\x1b[2J", "a\nb", "*", "~", "$HOME", "../x", "/proc/nowhere/x", "x" * 300,
    "=", "a=b", "%s%n", "{0}", "\U0001f600", "--policy", "never,always", ",", ":", "out",
]  # fmt: skip
KNOWN: dict[str, list[str]] = {
    "--policy": ["never", "always", "confidence", "random", "decider", "oracle", "never,always"],
    "--threshold": ["0", "0.5", "1"],
    "--max-depth": ["1", "2", "3"],
    "--max-new-tokens": ["1", "2", "3"],
    "--temperature": ["0", "0.7", "100"],
    "--top-p": ["0", "0.5", "1"],
    "--top-k": ["0", "1", "5"],
    "--seed": ["0", "7"],
    "--system": ["be brief", ""],
    "--dtype": ["auto", "float32", "bfloat16"],
    "--device": ["auto", "cpu"],
    "--tasks": ["gsm8k", "gsm8k", "gsm8k,gsm8k", "math500", "gsm8k,aime24", "nine"],
    "--data": ["text.jsonl", "chat.jsonl", "gsm8k=questions.jsonl", "gsm8k=missing.jsonl", "gsm8k=empty.txt"],
    "--output": ["out", "out", "out.html", "out/deep", "empty", "prose.txt", "trace.jsonl"],
    "--reference": ["base", "tah", "follow-tah", "./nowhere"],
    "--batch-size": ["1", "2"],
    "--samples": ["1", "2"],
    "--limit": ["1", "2"],
    "--backend": ["transformers", "vllm", "other"],
    "--split": ["train", "test"],
    "--max-length": ["2", "8", "64"],
    "--target": ["share=0.1", "share=0.5", "loss", "share=2", "share"],
    "--layers": ["1", "2"],
    "--texts": ["1", "2"],
    "--markdown": ["out.md", "empty"],
    "--png": ["charts", "prose.txt"],
    "--shown": ["1", "100"],
    "--stage": ["backbone", "decider", "other"],
    "--against": ["base", "tah", "./nowhere"],
}
NEEDED = {"eval": ["--tasks", "--output"], "tune": ["--target"], "prune": ["--data", "--output"]}
ANSWERING = ("generate", "chat", "eval", "tune", "trace", "prune")


@pytest.fixture(scope="module", autouse=True)
def offline():
    """Nothing here may ask a hub."""
    import datasets
    import huggingface_hub

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("TAH_DEBUG", raising=False)
        patch.delenv("FORCE_COLOR", raising=False)
        yield


@pytest.fixture(scope="module")
def place(tiny_base, tiny_checkpoint, tmp_path_factory):
    """`place()`: a working directory with models, texts, a trace and much that is none of these, as new."""
    kept = tmp_path_factory.mktemp("fuzz") / "kept"
    shutil.copytree(tiny_base, kept / "base")
    shutil.copytree(tiny_checkpoint, kept / "tah")
    shutil.copytree(tiny_base, kept / "refusing")
    (kept / "refusing" / "chat_template.jinja").write_text(
        "{{ messages[0].meta.kind if messages[0].role == 'system' }}x"
    )
    shutil.copytree(tiny_base, kept / "longer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(kept / "longer")
    tokenizer.add_tokens(["hi", "times", "text", "2"])
    tokenizer.save_pretrained(kept / "longer")
    for name in ("empty", "damaged", "original"):
        (kept / name).mkdir()
    (kept / "damaged" / "config.json").write_text('{"model_type": ["llama"]}')
    (kept / "original" / "tah_config.json").write_text('{"max_iter": "two"}')
    (kept / "prose.txt").write_text("It was the best of times, it was the worst of times. " * 3)
    (kept / "latin1.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (kept / "empty.txt").write_text("")
    (kept / "text.jsonl").write_text("".join(json.dumps({"text": f"text {n} is here"}) + "\n" for n in range(3)))
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (kept / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (kept / "bad.jsonl").write_text('{"text": "x"\n[1, 2]\n')
    (kept / "list.json").write_text("[1, 2, 3]")
    (kept / "questions.jsonl").write_text(json.dumps({"question": "2 + 2", "answer": "4"}) + "\n")
    (kept / "recipe.yaml").write_text("base: {model: base}\ndata: {source: missing.jsonl}\nlabel: {reference: base}\n")
    (kept / "odd.yaml").write_text("- a\n- &x [*x]\n")
    for name in ("base", "tah"):  # room for the prompts of an evaluation
        config = json.loads((kept / name / "config.json").read_text())
        config.get("base_config", config)["max_position_embeddings"] = 512
        (kept / name / "config.json").write_text(json.dumps(config))
    with inside(kept):
        assert run_quietly(["trace", "tah", "text.jsonl", "-o", "trace.jsonl"])[0] == 0

    def fresh() -> Path:
        directory = kept.with_name("work")
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(kept, directory)
        return directory

    return fresh


@contextlib.contextmanager
def inside(directory: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def run_quietly(arguments: list[str], typed: str = "") -> tuple[int, str, str]:
    """Exit code, stdout and stderr, which are as strict about characters as a terminal's."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr("sys.stdin", io.StringIO(typed))
        try:
            code = run(arguments)
        except SystemExit as error:  # as `main` would end
            code = int(error.code or 0)
    out.flush()
    err.flush()
    return code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()


def check(directory: Path, arguments: list[str], typed: str = "") -> None:
    with inside(directory):
        code, out, err = run_quietly(arguments, typed)
    assert code in (0, 2), (arguments, code, err)
    assert "Traceback" not in out + err
    ours = [line for line in err.splitlines() if line.startswith("tah: ")]
    assert all(len(line) <= 608 for line in ours), (arguments, err)
    if code == 2:
        assert err.splitlines()[-1:] == ours[-1:] and len(err.splitlines()) <= 4, (arguments, err)


# -- command lines ---------------------------------------------------------------------------------------------------


def values(name: str) -> st.SearchStrategy[str]:
    """Of an option."""
    odd = st.sampled_from(ODD) | st.text(max_size=12).filter(
        lambda text: "\0" not in text
    )  # no argument can hold a NUL
    if name not in KNOWN:
        return odd
    known = st.sampled_from(KNOWN[name])
    return known | known | known | odd


def operands(command: str) -> st.SearchStrategy[list[str]]:
    """What comes without an option."""
    odd = st.sampled_from(ODD)
    model = st.sampled_from(MODELS) | st.sampled_from(MODELS) | st.sampled_from(MODELS) | st.sampled_from(NO_MODELS)
    data = st.sampled_from(DATA) | st.sampled_from(DATA) | st.sampled_from(NO_DATA) | odd
    if command in HEAVY:
        return st.tuples(st.sampled_from(["./nowhere", "", "prose.txt"])).map(list)
    if command in RECIPES:
        recipe = st.sampled_from(["recipe.yaml", "odd.yaml", "tiny", "tinny", "", "empty", "missing.yaml", "prose.txt"])
        return st.tuples(recipe, st.lists(overrides(), max_size=3)).map(lambda drawn: [drawn[0], *drawn[1], *SURE])
    shapes = {
        "generate": st.tuples(model, st.sampled_from(["hi", "e1>e2 e1", "x" * 70, "-"]) | odd | st.text(max_size=20)),
        "trace": st.tuples(model, data),
        "tune": st.tuples(model, data),
        "report": st.tuples(
            st.sampled_from(["trace.jsonl", "trace.jsonl", "prose.txt", "empty", "missing", "text.jsonl", "tah", ""])
        ),
        "convert": st.tuples(
            st.sampled_from([*NO_MODELS, *MODELS]), st.sampled_from(["out", "empty", "tah", ""]) | odd
        ),
        "eval compare": st.tuples(
            *[st.sampled_from(["empty", "missing", "prose.txt:never", "tah:", ":", ""]) | odd] * 2
        ),
    }
    return shapes.get(command, st.tuples(model)).map(lambda drawn: [word.replace("\0", "") for word in drawn])


@st.composite
def command_lines(draw: Any) -> list[str]:
    """A command with operands and a few of its options, or now and then with something else in their place."""
    command = draw(st.sampled_from([*COMMANDS, *ANSWERING, *ANSWERING]))
    words = draw(operands(command))
    own = [parameter for parameter in COMMANDS[command].params if parameter.param_type_name == "option"]
    needed = [each for each in own if {*each.opts} & {*NEEDED.get(command, ())}]
    chosen = draw(st.lists(st.sampled_from(own), max_size=3)) if own else []
    for option in (*needed, *chosen):
        name = max(option.opts, key=len)
        words += [draw(st.sampled_from([*option.opts, *option.secondary_opts]))]
        words += [] if option.is_flag else [draw(values(name))]
    if command in ("generate", "chat", "eval"):  # the longest answers that they give by themselves take too long here
        words += ["--max-new-tokens", "3"]
    if command == "eval":
        words += ["--data", "gsm8k=questions.jsonl"]
    if command == "demo":
        words += ["--problems", "-1"]
    if draw(st.integers(0, 9)) == 0:  # a word too many, too few, or in the wrong place
        words.insert(
            draw(st.integers(0, len(words))), draw(st.sampled_from(ODD) | st.sampled_from([*KNOWN, "--debgu"]))
        )
        words = words[draw(st.integers(0, 1)) :]
    words = [word for word in words if word not in ("smollm2", "smollm2-tah", "--help", "-h")]
    return [*command.split(), *words] if draw(st.integers(0, 19)) else words


typed = st.lists(
    st.sampled_from(["hi", "/threshold", "/threshold 0.3", "/depth", "/depth 2", "/policy", "/policy always", "/reset"])
    | st.sampled_from(["/help", "/quit", "/policy decider", "x" * 70, "/depth \u0662", "\x1b[2J", "caf\udce9"]),
    max_size=4,
).map("\n".join)


def overrides() -> st.SearchStrategy[str]:
    """`KEY=VALUE` with a key of the recipe, or nearly, and any JSON or nearly."""
    keys = [
        "seed", "output", "name", "data", "data.source", "data.split", "data.generate", "data.generate.train",
        "data.max_length", "data.limit", "data.columns", "data.validation", "base", "base.model", "base.scratch",
        "base.scratch.hidden_size", "base.scratch.num_hidden_layers", "base.scratch.training.max_steps", "base.dtype",
        "base.prune_layers", "model.max_depth", "model.decider", "model.decider.width", "model.lora_rank", "model",
        "label", "label.rule", "label.tokens_per_batch", "backbone.method", "backbone.init", "backbone.packed",
        "backbone.training.learning_rate", "backbone.training.optim", "decider", "decider.target", "decider.joint",
        "controls.blind", "modle", "base.scratch.", ".", "a.b.c.d", "", "data..source", "[0]", "0",
    ]  # fmt: skip
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400)
    trees = st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    )
    odd = [
        "[",
        "{",
        "*x",
        "&a [*a]",
        "!!python/name:os.system",
        "!x y",
        "- a",
        "a: b: c",
        "'",
        "\t",
        "[" * 500,
        "1e",
        "#",
        "%",
    ]
    value = trees.map(json.dumps) | st.sampled_from(odd) | st.sampled_from(ODD)
    pairs = st.tuples(st.sampled_from(keys), value).map("=".join)
    return (pairs | pairs | pairs | st.sampled_from(ODD)).map(lambda text: text.replace("\0", ""))


# -- the JSON of a model ---------------------------------------------------------------------------------------------

FILES = ("config.json", "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
small = st.none() | st.booleans() | st.integers(-3, 300) | st.floats(-2, 300) | st.text(max_size=6)
replacement = (
    small
    | st.lists(small, max_size=3)
    | st.dictionaries(st.text(max_size=5), small, max_size=3)
    | st.sampled_from(
        ["tah", "llama", "gpt2", "t5", "float16", "auto", "cuda", "../x", "topk", "own", "never", "eager"]
    )
)


def spots(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a tree of JSON; of long lists and tables only the beginning."""
    inner = list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ())[:40]
    return [path, *(spot for key, value in inner for spot in spots(value, (*path, key)))]


def with_another(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A tree with `value` in one place, or without what stands there, if that is `...`."""
    if not path:
        return {} if value is ... else value
    changed = dict(tree) if isinstance(tree, dict) else list(tree)
    if value is ... and len(path) == 1:
        del changed[path[0]]
    else:
        changed[path[0]] = with_another(tree[path[0]], path[1:], value)
    return changed


@st.composite
def changes(draw: Any) -> tuple[str, int, Any]:
    """A file, the number of a spot, and what to put there."""
    return draw(st.sampled_from(FILES)), draw(st.integers(0, 10**6)), draw(st.just(...) | replacement | replacement)


def check_changed(directory: Path, model: str, command: list[str], changed: list[tuple[str, int, Any]]) -> None:
    for name, number, value in changed:
        path = directory / model / name
        if path.is_file():
            tree = json.loads(path.read_text())
            places = spots(tree)
            path.write_text(json.dumps(with_another(tree, places[number % len(places)], value)))
    check(directory, [command[0], model, *command[1:]])


verbs = st.sampled_from([["inspect"], ["generate", "hi", "--max-new-tokens", "2"], ["trace", "text.jsonl"]])
models_made = st.sampled_from(["tah", "base"])


QUICK = settings(
    max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
LONG = settings(QUICK, max_examples=3000, derandomize=False, print_blob=True)


@QUICK
@given(arguments=command_lines(), typed=typed)
def test_command_lines(place, arguments, typed):
    check(place(), arguments, typed)


@settings(QUICK, max_examples=60)
@given(command=st.sampled_from(RECIPES), given=st.lists(overrides(), min_size=1, max_size=4))
def test_overrides_of_a_recipe(place, command, given):
    check(place(), [command, "tiny", *given, *SURE])


@settings(QUICK, max_examples=60)
@given(model=models_made, command=verbs, changed=st.lists(changes(), min_size=1, max_size=2))
def test_json_of_a_model(place, model, command, changed):
    check_changed(place(), model, command, changed)


@pytest.mark.slow
@LONG
@given(model=models_made, command=verbs, changed=st.lists(changes(), min_size=1, max_size=2))
def test_much_json_of_models(place, model, command, changed):
    check_changed(place(), model, command, changed)


@pytest.mark.slow
@LONG
@given(arguments=command_lines(), typed=typed)
def test_many_command_lines(place, arguments, typed):
    check(place(), arguments, typed)


@pytest.mark.slow
@LONG
@given(command=st.sampled_from(RECIPES), given=st.lists(overrides(), min_size=1, max_size=4))
def test_many_overrides_of_a_recipe(place, command, given):
    check(place(), [command, "tiny", *given, *SURE])


def test_the_fuzz_finds_what_it_looks_for(place, monkeypatch):
    """Control: a fault of ours, and an error of many lines."""
    from tah.session import Session

    directory = place()
    for error in (KeyError("x"), RuntimeError("\n" * 9)):
        monkeypatch.setattr(Session, "answer", lambda *args, error=error, **kwargs: (_ for _ in ()).throw(error))
        with pytest.raises(AssertionError):
            check(directory, ["generate", "tah", "hi"])
    monkeypatch.undo()
    check(directory, ["generate", "tah", "hi", "--max-new-tokens", "2"])
    assert find_spec("hypothesis") is not None
