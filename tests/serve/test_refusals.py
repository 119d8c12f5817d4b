"""What cannot be served together is refused before anything is loaded, in a line that says so."""

from __future__ import annotations

import re
import subprocess

import pytest

pytest.importorskip("vllm", reason="serving is tested where vLLM is installed: make serve-test")

from helpers.checkpoints import tiny
from helpers.servers import TAH
from helpers.serving import serve
from tah.vllm import compat

FLAGS = {
    "speculative decoding": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
    "pipeline parallelism": {"pipeline_parallel_size": 2},
    "LoRA adapters of vLLM": {"enable_lora": True},
    "--kv-cache-dtype fp8": {"kv_cache_dtype": "fp8"},
    "KV transfer": {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
    "prompt embeddings": {"enable_prompt_embeds": True},
    "--block-size 48 is not a multiple of 32": {"block_size": 48, "dtype": "bfloat16"},
    "--block-size 16 is not a multiple of 32": {"block_size": 16},
    "batching='both'": {"additional_config": {"batching": "both"}},
    "deep_kv_share=0": {"additional_config": {"deep_kv_share": 0}},
    "max_depth=3 is not supported": {"hf_overrides": {"max_depth": 3}},
    "policy='oracle' is not supported": {"hf_overrides": {"policy": "oracle"}},
    "attention='blind'": {"hf_overrides": {"attention": "blind"}},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("serve") / "llama", "llama")


@pytest.mark.parametrize(("says", "flags"), FLAGS.items(), ids=FLAGS.keys())
def test_flags(llama, says, flags):
    with pytest.raises(ValueError, match=says), serve(llama, **flags):
        pass


COMMANDS = [
    (["--block-size", "48"], r"--block-size 48 is not a multiple of 32.*or use 32, 64 or 128"),
    (["--block-size", "0"], "block_size=0: Input should be greater than 0"),
    (["--enable-lora"], "TaH models do not support LoRA adapters of vLLM; leave it out"),
]


@pytest.mark.timeout(900)  # of which most goes into importing vLLM on a busy machine
@pytest.mark.parametrize(("flags", "says"), COMMANDS, ids=[" ".join(flags) for flags, _ in COMMANDS])
def test_the_command_refuses_in_one_line(llama, flags, says):
    ran = subprocess.run([*TAH, "serve", str(llama), *flags], capture_output=True, text=True)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert re.fullmatch(f"tah: .*{says}.*", ran.stderr.splitlines()[-1])


def test_the_other_model_runner(llama, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="model runner V2"), serve(llama):
        pass


def test_other_versions_of_vllm(llama, monkeypatch):
    monkeypatch.setattr(compat, "VLLM_VERSION", "0.40.1+cpu")
    with pytest.raises(ValueError, match=r"vLLM 0.40.1.*pip install"), serve(llama):
        pass


def test_families_that_nobody_taught_it(tmp_path):
    model = tiny(tmp_path / "model", "gemma")
    with pytest.raises(ValueError, match="llama, mistral, qwen2, qwen3; this one is 'gemma'"), serve(model):
        pass


def test_a_layout_that_cannot_be_read(llama, monkeypatch):
    """Another kernel's order of keys is noticed at the start, not in the answers."""
    read = compat.read_blocks
    monkeypatch.setattr(compat, "read_blocks", lambda *args: tuple(part.flip(-1) for part in read(*args)))
    with pytest.raises(ValueError, match="in a layout that is not supported"), serve(llama):
        pass


def test_a_checkpoint_with_tensors_missing(llama, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(llama, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["decider.output.bias"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing tensors decider\.output\.bias"), serve(broken):
        pass
