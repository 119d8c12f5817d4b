"""The benchmark measures what it says: variants, shares and memory. No time is compared with anything."""

import io
import json
import multiprocessing
import os
import signal

import pytest
import torch
from rich.console import Console

from helpers.families import tiny
from helpers.models import shake
from tah import TaHForCausalLM
from tah.benchmarks import bench, bench_serve
from tah.benchmarks.measure import Row, save
from tah.core import fast
from tah.progress import Reporter


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = shake(TaHForCausalLM.from_base(tiny("llama", "sdpa", max_position_embeddings=256)))
    model.save_pretrained(path := tmp_path_factory.mktemp("bench") / "m")
    return str(path)


def test_result(checkpoint, tmp_path):
    lines = Console(file=io.StringIO(), width=200)
    sizes = {"dtypes": ("float32",), "batches": (1, 4), "lengths": (100,), "repeats": 1}
    result = bench.bench(checkpoint, **sizes, progress=Reporter(lines))
    rows = [Row(**row) for row in result["rows"]]
    assert lines.file.getvalue().splitlines() == [f"tah: {row}" for row in rows]
    assert [(row.task, row.variant) for row in rows] == [
        (task, variant)
        for task in ("decode, batch 1", "decode, batch 4", "prefill, 100 tokens", "memory, 100 tokens")
        for variant in bench.VARIANTS
    ]
    shares = {(row.task, row.variant): row.iterated for row in rows}
    assert shares["decode, batch 4", "always"] == 1 and shares["decode, batch 4", "never"] == 0
    assert shares["decode, batch 4", "forced"] == pytest.approx(0.07, abs=0.005)
    assert shares["prefill, 100 tokens", "forced"] == pytest.approx(0.07)
    assert all(row.ratio == 1 for row in rows if row.variant == "base") and all(row.median > 0 for row in rows)
    assert result["machine"]["torch"] == torch.__version__ and result["settings"]["rate"] == 0.07
    save(result, bench.markdown(result), tmp_path / "out", "bench")
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == result
    table = (tmp_path / "out" / "bench.md").read_text().splitlines()
    assert len(table) == 2 + len(rows) and "| forced |" in table[4]


@pytest.mark.slow
@pytest.mark.parametrize("output", ["mixture", "even"])
def test_kept_states_of_a_mixture(output, tmp_path, monkeypatch):
    """Its rows count the tensors that the forward holds; the other tasks run with three passes and several rows."""
    settings = {"next_input": "mlp", "output": output, "decider": {"kind": "tah2"}, "lora_rank": 0, "max_depth": 3}
    model = TaHForCausalLM.from_base(tiny("llama", "sdpa", max_position_embeddings=256), **settings)
    model.save_pretrained(tmp_path / "m")
    sizes = {"dtypes": ("float32",), "batches": (4,), "lengths": (100,), "repeats": 1, "rate": 0.44}
    result = bench.bench(str(tmp_path / "m"), **sizes)
    rows = {(row.task, row.variant): row for row in (Row(**row) for row in result["rows"])}
    assert rows["decode, batch 4", "forced"].iterated == pytest.approx(0.44, abs=0.005)
    assert "| memory of kept states, 100 tokens | forced |" in bench.markdown(result)

    made, make = [], fast.running_output
    monkeypatch.setattr(fast, "running_output", lambda *given: made.append(make(*given)) or made[-1])
    for variant in bench.VARIANTS:
        row = rows["memory of kept states, 100 tokens", variant]
        assert row.iterated == pytest.approx({"forced": 0.44, "always": 1}.get(variant, 0))
        if variant == "base":
            assert row.median == 100 * 32 * 4 / 2**20
            continue
        bench.prefill(model, variant, 100, 0.44)()
        held = {id(x): x.nbytes for x in (made[-1].total, *made[-1].weights)}
        held |= {id(x): x.nbytes for pair in made[-1].deeper for x in pair}
        assert row.median * 2**20 == pytest.approx(sum(held.values())), variant


@pytest.mark.slow
def test_a_sum_keeps_no_pass_apart(checkpoint):
    result = bench.bench(checkpoint, dtypes=("float32",), batches=(), lengths=(20,), repeats=1)
    assert {row["task"] for row in result["rows"]} == {"prefill, 20 tokens", "memory, 20 tokens"}


def test_forced_pays_for_the_decider(checkpoint):
    model = bench.load(checkpoint, "float32")
    asked = []
    handle = model.decider.register_forward_hook(lambda module, args, out: asked.append(len(out)))
    bench.prefill(model, "forced", 50)()
    handle.remove()
    assert asked == [50]


def test_memory_counts_what_a_variant_keeps(checkpoint):
    """Nobody's memory is negative, and the measuring process reports trouble instead of a number."""
    assert bench.peak_memory(checkpoint, "float32", "always", 100) > 0
    with pytest.raises(RuntimeError, match="measuring memory of base failed"):
        bench.peak_memory("/no/such/model", "float32", "base", 10)


# -- engines of `tah bench serve`: processes that may end or hang ---------------------------------------------------


def test_a_dead_engine_is_named(checkpoint, capfd, tmp_path):
    with pytest.raises(RuntimeError, match="the engine of generate ended; its error message is above"):
        with bench_serve.engine(str(tmp_path), "generate", "float32", 64):
            pass
    assert str(tmp_path) in capfd.readouterr().err
    with pytest.raises(RuntimeError, match="the engine of generate ended"):
        with bench_serve.engine(checkpoint, "generate", "float32", 64) as (run, _):
            multiprocessing.active_children()[0].kill()
            next(run(bench_serve.decode(2, new=3), "generate"))


@pytest.mark.timeout(120)
def test_a_hung_engine_is_not_waited_for(checkpoint):
    with pytest.raises(KeyboardInterrupt):
        with bench_serve.engine(checkpoint, "generate", "float32", 64):
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGSTOP)
            raise KeyboardInterrupt
    assert not multiprocessing.active_children()
