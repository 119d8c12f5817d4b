"""Files of the original implementation: read as data, or refused with one line, and never run."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from helpers.originals import Command, converted, copied, edit, edit_decider_kwargs, refusal
from tah.checkpoints.original import read_pickle


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """A writable copy of checkpoint S."""
    return copied("S", tmp_path)


# -- tah_config.json ---------------------------------------------------------------------------------------------------


def test_unknown_keys_are_tolerated_and_listed(src: Path, tmp_path: Path) -> None:
    edit(src / "tah_config.json", zeta=[1, {"a": None}], hard_token_relative_weight=1.0)
    report, _ = converted(src, tmp_path)
    assert report.unknown_keys == ["hard_token_relative_weight", "zeta"]
    assert "ignored    unknown keys of tah_config.json: hard_token_relative_weight, zeta" in str(report).splitlines()


def test_older_layout_that_means_the_same(src: Path, tmp_path: Path) -> None:
    edit(
        src / "tah_config.json",
        input_updater="TrivialUpdater",
        output_updater="AdditiveLogitsUpdater",
        output_updater_kwargs={},
        iter_label_generator="FixedIterLabelGenerator",
        iter_label_generator_kwargs={},
        iter_attention_mode="duo",
        use_iter_embedding=False,
    )
    report, model = converted(src, tmp_path)
    assert report.unknown_keys == [] and report.notes == []
    assert (model.config.attention, model.config.output, model.config.next_input) == ("duo", "sum", "topk")


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("input_updater", "HiddenUpdater", "'TrivialUpdater' or None"),
        ("output_updater", "NoneUpdater", "'AdditiveLogitsUpdater'"),
        ("output_updater", None, "'AdditiveLogitsUpdater'"),
        ("iter_attention_mode", "root", "'duo' or None"),
        ("iter_attention_mode", "same_iter", "'duo' or None"),
        ("use_iter_embedding", True, "False or None"),
        ("adapter", "multi_lora", "'lora' or 'none' or None"),
    ],
)
def test_older_layout_that_means_something_else(src: Path, tmp_path: Path, key: str, value: Any, allowed: str) -> None:
    edit(src / "tah_config.json", **{key: value})
    expected = f"tah_config.json: {key} is {value!r}, which a TaH model cannot represent; only {allowed}"
    assert refusal(src, tmp_path) == expected


@pytest.mark.parametrize("value", [{"topk": None}, {"topk": 0}, {"topk": "all"}, {"topk": 1.5}])
def test_mixing_width_must_be_a_number(src: Path, tmp_path: Path, value: dict[str, Any]) -> None:
    edit(src / "tah_config.json", input_updater_kwargs=value)
    expected = f"tah_config.json: input_updater_kwargs.topk is {value['topk']!r}, not an integer >= 1"
    assert refusal(src, tmp_path) == expected


@pytest.mark.parametrize("value", [{}, None])
def test_mixing_width_is_100_when_absent(src: Path, tmp_path: Path, value: Any) -> None:
    edit(src / "tah_config.json", input_updater_kwargs=value)
    assert converted(src, tmp_path)[1].config.mix_topk == 100


def test_mixing_of_hidden_states_is_refused(src: Path, tmp_path: Path) -> None:
    edit(src / "tah_config.json", input_updater_kwargs={"topk": 20, "use_hidden_states": True})
    assert "input_updater_kwargs.use_hidden_states" in refusal(src, tmp_path)


@pytest.mark.parametrize("value", [None, 0, True, "2", 2.0])
def test_max_iter_must_be_a_count(src: Path, tmp_path: Path, value: Any) -> None:
    edit(src / "tah_config.json", max_iter=value)
    assert refusal(src, tmp_path) == f"tah_config.json: max_iter is {value!r}, not an integer >= 1"


@pytest.mark.parametrize(
    ("change", "where", "asked"),
    [
        (
            {"iter_decider_kwargs": {"x": [{"__type__": True, "__module__": "os", "__name__": "system"}]}},
            "iter_decider_kwargs.x[0]",
            "os.system",
        ),
        ({"unknown": {"__type__": True, "__module__": "subprocess", "__name__": "run"}}, "unknown", "subprocess.run"),
        ({"train_loss_kwargs": {"a": {"__reduce__": ["x"]}}}, "train_loss_kwargs.a", '{"__reduce__": ["x"]}'),
        (
            {"unknown": {"__dtype__": True, "__str__": "os.system"}},
            "unknown",
            '{"__dtype__": true, "__str__": "os.system"}',
        ),
        (
            {"unknown": {"__dtype__": 1, "__str__": "torch.float32"}},
            "unknown",
            '{"__dtype__": 1, "__str__": "torch.float32"}',
        ),
    ],
)
def test_config_that_asks_for_an_object_is_refused(
    src: Path, tmp_path: Path, change: dict[str, Any], where: str, asked: str
) -> None:
    edit(src / "tah_config.json", **change)
    assert refusal(src, tmp_path) == f"tah_config.json requires {asked} at {where}, which is not data; refused"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "tah_config.json is not JSON: "),
        ("[" * 100_000, "tah_config.json is not JSON: "),
        ("\udcff", "tah_config.json is not JSON: "),
        ("[]", "tah_config.json is not a JSON object"),
        ('{"max_iter": 2, "iter_decider_kwargs": 3}', "tah_config.json: iter_decider_kwargs is 3, not a JSON object"),
    ],
)
def test_malformed_config_is_refused(src: Path, tmp_path: Path, text: str, expected: str) -> None:
    (src / "tah_config.json").write_text(text, errors="surrogateescape")
    assert refusal(src, tmp_path).startswith(expected)


def test_plain_model_is_refused(src: Path, tmp_path: Path) -> None:
    (src / "tah_config.json").unlink()
    assert "has no tah_config.json, so it is not a checkpoint of the original" in refusal(src, tmp_path)


# -- pickles that want to be programs ----------------------------------------------------------------------------------


class Code(Command):
    """Runs Python when unpickled."""

    def __reduce__(self) -> Any:
        return exec, (self.command,)


class Nested(Command):
    """Unpickles another pickle, which runs a command."""

    def __reduce__(self) -> Any:
        return pickle.loads, (pickle.dumps(Command(self.command)),)


class Allowed:
    """Stands for a class that somebody allowed for another file."""


def with_pickle(path: Path, data: bytes) -> None:
    """Replace the pickle inside torch's archive, keeping the archive."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for entry, old in entries.items():
            archive.writestr(entry, data if entry.filename.endswith("/data.pkl") else old)


def payload(source: Path, value: Any) -> dict[str, Any]:
    """The decider of S with something else among its arguments."""
    return torch.load(source / "iter_decider.bin", weights_only=True) | {"init_args": {"dtype": value}}


@pytest.mark.parametrize(
    ("kind", "asked"),
    [(Command, "posix.system"), (Code, "exec"), (Nested, "pickle.loads")],
)
@pytest.mark.parametrize("place", ["init_args", "top", "state_dict", "load_path"])
def test_code_in_the_decider_never_runs(src: Path, tmp_path: Path, kind: Any, asked: str, place: str) -> None:
    marker = tmp_path / "ran"
    command = f"open({str(marker)!r}, 'w')" if kind is Code else f"touch {marker}"
    evil = {
        "init_args": payload(src, kind(command)),
        "top": kind(command),
        "state_dict": {"class": "MLPIterDecider", "init_args": {}, "state_dict": {"x": kind(command)}},
    }.get(place, [kind(command)])
    path = src / "iter_decider.bin"
    if place == "load_path":
        edit_decider_kwargs(src, load_path="sub")
        path = src / "sub" / "iter_decider.bin"
        path.parent.mkdir()
    torch.save(evil, path)
    torch.load(path, weights_only=False)
    assert marker.exists(), "the payload itself does not work"
    marker.unlink()
    assert refusal(src, tmp_path) == f"iter_decider.bin requires {asked}, which is not data; refused"
    assert not marker.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("archive", [True, False])
def test_pickles_of_every_protocol_are_refused(src: Path, tmp_path: Path, protocol: int, archive: bool) -> None:
    marker = tmp_path / "ran"
    data = pickle.dumps({"class": Command(f"touch {marker}")}, protocol)
    if archive:
        with_pickle(src / "iter_decider.bin", data)
        assert refusal(src, tmp_path).startswith(
            ("iter_decider.bin requires posix.system", "iter_decider.bin holds more")
        )
    else:
        (src / "iter_decider.bin").write_bytes(data)
        assert refusal(src, tmp_path) == "iter_decider.bin is not an archive written by torch.save; refused"
    assert not marker.exists()


@pytest.mark.parametrize(
    ("opcodes", "expected"),
    [
        (b"cposix\nsystem\n(S'touch ran'\ntR.", "iter_decider.bin requires posix.system, which is not data; refused"),
        (b"(S'touch ran'\niposix\nsystem\n.", "iter_decider.bin holds more than tensors and containers (Unsupported"),
        (b"\x80\x02cbuiltins\ngetattr\n.", "iter_decider.bin requires getattr, which is not data; refused"),
        (b"\x80\x02c__main__\nX\n)\x81.", "iter_decider.bin requires __main__.X, which is not data; refused"),
        (b"\x80\x02ctorch\nload\n.", "iter_decider.bin requires torch.load, which is not data; refused"),
        (b"\x80\x02\x82\x01.", "iter_decider.bin holds more than tensors and containers (Unsupported operand 130)"),
        (b"\x80\x02", "iter_decider.bin is damaged or truncated: torch.load cannot read it"),
    ],
)
def test_hand_written_opcodes_are_refused(src: Path, tmp_path: Path, opcodes: bytes, expected: str) -> None:
    with_pickle(src / "iter_decider.bin", opcodes)
    assert refusal(src, tmp_path).startswith(expected)


def test_older_torch_format_is_refused(src: Path, tmp_path: Path) -> None:
    data = payload(src, torch.float32)
    torch.save(data, src / "iter_decider.bin", _use_new_zipfile_serialization=False)
    assert refusal(src, tmp_path) == "iter_decider.bin is not an archive written by torch.save; refused"


@pytest.mark.parametrize("cut", [0, 3, 100, 0.5, 0.99])
def test_truncated_decider_is_refused(src: Path, tmp_path: Path, cut: float) -> None:
    path = src / "iter_decider.bin"
    path.write_bytes(path.read_bytes()[: int(cut if cut > 1 or cut == 0 else cut * path.stat().st_size)])
    expected = "is damaged or truncated: torch.load cannot read it"
    assert refusal(src, tmp_path) == "iter_decider.bin " + (
        expected if cut not in (0, 3) else "is not an archive written by torch.save; refused"
    )


@pytest.mark.parametrize(
    ("value", "asked"),
    [
        (numpy.ones(2), "numpy"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (Path("x"), "pathlib"),
        (numpy.ones, "numpy.ones"),
    ],
)
def test_objects_among_the_arguments_are_refused(src: Path, tmp_path: Path, value: Any, asked: str) -> None:
    torch.save(payload(src, value), src / "iter_decider.bin")
    message = refusal(src, tmp_path)
    assert message.startswith(f"iter_decider.bin requires {asked}") and message.endswith("which is not data; refused")


def test_script_archive_is_refused(src: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(src / "iter_decider.bin", "a") as archive:  # what tells torch that it holds a program
        archive.writestr(f"{archive.namelist()[0].split('/')[0]}/constants.pkl", pickle.dumps((), 2))
    assert refusal(src, tmp_path) == "iter_decider.bin is damaged or truncated: torch.load cannot read it"


def test_what_the_process_allows_elsewhere_is_not_allowed_here(src: Path, tmp_path: Path) -> None:
    torch.save(payload(src, Allowed()), src / "iter_decider.bin")
    with torch.serialization.safe_globals([Allowed]):
        torch.load(src / "iter_decider.bin", weights_only=True)
        before = set(torch.serialization.get_safe_globals())
        assert "Allowed, which is not data; refused" in refusal(src, tmp_path)
        assert set(torch.serialization.get_safe_globals()) == before and Allowed in before


def test_environment_cannot_switch_the_restriction_off(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "ran"
    torch.save(Command(f"touch {marker}"), src / "iter_decider.bin")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert refusal(src, tmp_path) == "iter_decider.bin requires posix.system, which is not data; refused"
    assert not marker.exists()


def test_dtypes_and_containers_are_data(tmp_path: Path) -> None:
    args = {"dtype": torch.bfloat16, "hidden_dims": [1, 2], "pair": (1.5, None), "name": "x", "flag": True}
    data = {"class": "MLPIterDecider", "state_dict": {"w": torch.ones(2, dtype=torch.bfloat16)}, "init_args": args}
    torch.save(data, tmp_path / "iter_decider.bin")
    assert read_pickle(tmp_path / "iter_decider.bin")["init_args"] == args


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ([1], "does not hold class, state_dict and init_args"),
        ({"class": "MLPIterDecider"}, "does not hold class, state_dict and init_args"),
        ({"class": 3, "state_dict": {}, "init_args": {}}, "does not hold class"),
        ({"class": "a", "state_dict": {"w": 1}, "init_args": {}}, "state_dict entry 'w' is not a dense tensor"),
        (
            {"class": "a", "state_dict": {"w": torch.ones(2).to_sparse()}, "init_args": {}},
            "state_dict entry 'w' is not a dense tensor",
        ),
        (
            {"class": "a", "state_dict": {"w": torch.ones(2, device="meta")}, "init_args": {}},
            "state_dict entry 'w' is not a dense tensor",
        ),
        (
            {"class": "a", "state_dict": {"w": torch.ones(2, dtype=torch.int8)}, "init_args": {}},
            "state_dict entry 'w' is not a dense tensor",
        ),
    ],
)
def test_data_that_is_no_decider_is_refused(src: Path, tmp_path: Path, data: Any, expected: str) -> None:
    torch.save(data, src / "iter_decider.bin")
    assert expected in refusal(src, tmp_path)
