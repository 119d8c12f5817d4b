"""Check and complete vLLM's configuration for a TaH model."""

from __future__ import annotations

import difflib
import inspect
import os
from numbers import Real
from typing import Any

from vllm import envs
from vllm.config import CompilationMode
from vllm.config.quantization import resolve_quantization_config
from vllm.logger import init_logger
from vllm.platforms import current_platform

from ..config import TaHConfig
from ..core.families import stable_positions
from .compat import check_version
from .installed import advice, check_installed
from .metrics import add_metrics
from .names import DEEP_KV_SHARE, FAMILIES, TAH2_DEEP_KV_SHARE, inner_layers
from .requests import DEPTHS_SERVED, DepthParameters, RequestOptions

SETTINGS = ("batching", "deep_kv_share", "inner_layers", "second_pass_graphs", "self_check")
BATCHING = ("auto", "two_pass", "mixed")
BLOCK = 32  # tokens: vLLM's CPU kernels need a block size that is a multiple of this
QUANTIZATION = "fp8_per_channel"  # a scale for each output, and one for each token's inputs, whatever the batch
RUNNER = "VLLM_USE_V2_MODEL_RUNNER"  # vLLM's environment variable
logger = init_logger("vllm.tah")  # below vLLM's own logger, which has the handler
MANY = 8  # smallest measured number of concurrent requests at which `mixed` is faster; with one, both are equal


def settle(vllm_config: Any) -> None:
    """Check and complete vLLM's configuration, so that no flags are needed.

    Args:
        vllm_config: Configuration of vLLM; it is changed in place.

    Raises:
        ValueError: The checkpoint or a flag is not supported.
    """
    check_installed()
    check_version()
    config = vllm_config.model_config.hf_config
    _check_words(vllm_config)
    _check_checkpoint(config)
    _check_width(config.base_config)
    _check_length(config.base_config, vllm_config.model_config.max_model_len)
    vllm_config.cache_config.sliding_window = None  # no request is longer than the window
    _check_flags(vllm_config)
    v2 = _choose_runner(vllm_config)
    RequestOptions.of(config, None)
    DepthParameters.config = config
    vllm_config.additional_config["deep_kv_share"] = _share(vllm_config.additional_config, config)
    vllm_config.additional_config["batching"] = _batching(vllm_config, v2)
    for switch in ("self_check", "second_pass_graphs"):
        vllm_config.additional_config[switch] = _is_on(switch, vllm_config.additional_config)
    # They change the graph of depth 1. vLLM's cache of compiled graphs knows the base's configuration and this only.
    vllm_config.additional_config["inner_layers"] = list(inner_layers(config))
    worker = "DepthCPUWorker" if current_platform.is_cpu() else "DepthGPUWorker"
    vllm_config.parallel_config.worker_cls = f"tah.vllm.worker.{worker}"
    vllm_config.scheduler_config.scheduler_cls = "tah.vllm.scheduler.DepthScheduler"
    vllm_config.scheduler_config.async_scheduling = False
    vllm_config.model_config.logits_processors = [
        *(vllm_config.model_config.logits_processors or ()),
        f"{DepthParameters.__module__}:{DepthParameters.__name__}",
    ]
    add_metrics()


def _check_checkpoint(config: TaHConfig) -> None:
    base: Any = config.base_config
    if base is None or base.model_type not in FAMILIES:
        kind = None if base is None else base.model_type
        raise ValueError(f"tah serves bases of the families {', '.join(FAMILIES)}; this one is {kind!r}")
    if config.max_depth > DEPTHS_SERVED:
        raise ValueError(
            f"max_depth={config.max_depth} is not supported in vLLM; use at most {DEPTHS_SERVED}, "
            f"with --hf-overrides '{{\"max_depth\": {DEPTHS_SERVED}}}'"
        )
    if config.attention == "blind":
        raise ValueError("attention='blind' is a control for experiments and is not supported in vLLM")


def _check_length(base: Any, longest: int) -> None:
    """Check that requests of up to `longest` tokens have full attention and the same rotary embeddings at all lengths.

    vLLM selects the frequencies of `longrope` and `dynamic` once, `generate` by the length so far.
    """
    window = getattr(base, "sliding_window", None) if getattr(base, "use_sliding_window", True) else None
    if window is not None and window < longest:
        raise ValueError(
            f"a base with sliding-window attention ({window}) is not supported in vLLM beyond the window; "
            f"use --max-model-len {window} or less"
        )
    stable, rope = stable_positions(base), getattr(base, "rope_parameters", None) or {}
    if stable is not None and longest > stable:
        raise ValueError(
            f"a base with rotary embeddings of type {rope.get('rope_type')!r} is exact for {stable} tokens; "
            f"use --max-model-len {stable} or less"
        )


def _is_served(model: Any) -> bool:
    """Return whether the linear layers of a model, by vLLM's `ModelConfig`, are all quantized by `QUANTIZATION`."""
    wanted = resolve_quantization_config(QUANTIZATION, None)
    return bool(model.quantization == QUANTIZATION and model.quantization_config == wanted)


def _check_words(vllm_config: Any) -> None:
    """Check names in `--additional-config` and `--hf-overrides` that are nearly those of a setting, or of a field.

    Other names may be those of vLLM or of the base.
    """
    fields = set(inspect.signature(TaHConfig.__init__).parameters) - {"self", "kwargs"}
    overrides = vllm_config.model_config.hf_overrides
    given = [("--additional-config", vllm_config.additional_config, set(SETTINGS))]
    given.append(("--hf-overrides", overrides if isinstance(overrides, dict) else {}, fields))
    for flag, names, known in given:
        for name in set(names) - known:
            if near := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
                raise ValueError(f"{name!r} in {flag} is not a setting; did you mean {near[0]}?")


def _check_width(base: Any) -> None:
    """Check that vLLM's attention for CPUs has a kernel for the width of the base's heads."""
    if not current_platform.is_cpu():
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    width = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
    if width not in (widths := CPUAttentionBackend.get_supported_head_sizes()):
        known = ", ".join(map(str, widths))
        raise ValueError(f"vLLM on a CPU has no attention for heads of width {width}, only for {known}; use `generate`")


def _check_flags(vllm_config: Any) -> None:
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    scheduler, offload = vllm_config.scheduler_config, vllm_config.offload_config
    experts = FAMILIES[model.hf_config.base_config.model_type].experts
    quantized = model.quantization is not None  # vLLM sets `quant_config` after this check
    unsupported = {
        "pooling (--runner pooling), since they only generate": model.runner_type == "pooling",
        "speculative decoding": vllm_config.speculative_config is not None,
        "--diffusion-config": vllm_config.num_speculative_tokens > 0,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1,
        # Engines would share the experts, and wait for each other in each layer, also in passes that only one has.
        "data parallelism of a base with experts": experts and parallel.data_parallel_size > 1,
        "--enable-expert-parallel": parallel.enable_expert_parallel,
        "steps split into micro-batches (--enable-dbo)": parallel.use_ubatching,
        "--async-scheduling": scheduler.async_scheduling,
        "LoRA adapters of vLLM": vllm_config.lora_config is not None,
        "KV transfer": vllm_config.kv_transfer_config is not None,
        # vLLM makes a connector of it after this check. Restored blocks would have no keys of depth 2.
        "--kv-offloading-size": cache.kv_offloading_size is not None,
        # Hooks of the stock layers bring such weights; layers at depth 2 are called without these hooks.
        "--cpu-offload-gb": offload.uva.cpu_offload_gb > 0,
        "--offload-group-size": offload.prefetch.offload_group_size > 0,
        f"--kv-cache-dtype {cache.cache_dtype}": cache.cache_dtype != "auto",
        f"quantized weights (except --quantization {QUANTIZATION})": quantized and not _is_served(model),
        f"--quantization {QUANTIZATION} of a base with experts": quantized and experts,
        "prompt embeddings": model.enable_prompt_embeds,
        "--kv-sharing-fast-prefill": cache.kv_sharing_fast_prefill,
        # The pool is outside of the memory that vLLM frees; a part of the weights is no checkpoint.
        "--enable-sleep-mode": model.enable_sleep_mode,
        "--weight-transfer-config": vllm_config.weight_transfer_config is not None,
        # Not tried where the sampler's token of a deferred request is dropped.
        "--watermark-config": vllm_config.watermark_config is not None,
        "--return-sampling-mask": model.return_sampling_mask,
        "--enable-trace-replay": model.enable_trace_replay,
        # The kernel of depth 2 shares the keys of a token by the number of hard tokens.
        "VLLM_BATCH_INVARIANT=1": envs.VLLM_BATCH_INVARIANT,
        f"--worker-cls {parallel.worker_cls}": parallel.worker_cls != "auto",
        f"--scheduler-cls {scheduler.scheduler_cls}": scheduler.scheduler_cls,
        "--enable-return-routed-experts": vllm_config.aux_output_config.enable_return_routed_experts,
    }
    for what, is_set in unsupported.items():
        if is_set:
            raise ValueError(f"TaH models do not support {what}; leave it out")
    if current_platform.is_cpu() and cache.user_specified_block_size and cache.block_size % BLOCK:
        raise ValueError(
            f"--block-size {cache.block_size} is not a multiple of {BLOCK}, which vLLM's CPU kernels need; "
            "leave it out, or use 32, 64 or 128"
        )


def _choose_runner(vllm_config: Any) -> bool:
    """Select vLLM's model runner: V1 on a CPU (V2 if the environment asks for it), V2 on a GPU.

    Where vLLM would choose otherwise, this sets the environment variable `RUNNER`, and a line of the log says so: vLLM
    reads nothing else, in all processes of the engine and as long as it runs. So it also holds for models of any kind
    that this process serves later.

    Returns:
        Whether it is V2.

    Raises:
        ValueError: The device, or vLLM on it, cannot run what it should.
    """
    given = envs.VLLM_USE_V2_MODEL_RUNNER
    if current_platform.is_cpu():
        v2 = bool(given)
    elif current_platform.is_rocm():  # the kernel of depth 2 was not even compiled for them
        raise ValueError(f"TaH models were not tried on AMD GPUs; use a GPU of NVIDIA or a CPU ({advice()})")
    elif not current_platform.is_cuda_alike():
        raise ValueError(
            f"TaH models do not support the device {current_platform.device_type!r}; use a GPU or a CPU ({advice()})"
        )
    elif given is False:
        raise ValueError(f"on a GPU, TaH models need vLLM's model runner V2; leave {RUNNER}=0 out")
    else:
        v2 = True
    if vllm_config.use_v2_model_runner != v2:
        os.environ[RUNNER] = str(int(v2))
        logger.info("TaH: %s=%d is set from here on, for all models of this process", RUNNER, v2)
    if vllm_config.use_v2_model_runner != v2:
        raise ValueError(f"TaH models need vLLM's model runner V{1 + v2} here, and vLLM selects the other one")
    return v2


def _share(additional: dict[str, Any], config: TaHConfig) -> float:
    """Return the pool entries per depth-1 slot: the configured number, or a default for the policy."""
    default = {"always": 1.0, "random": min(1.0, max(DEEP_KV_SHARE, 1.4 * config.random_rate))}
    if config.decider is not None and config.decider["kind"] == "tah2":
        default["decider"] = TAH2_DEEP_KV_SHARE
    share = additional.get("deep_kv_share", default.get(config.policy, DEEP_KV_SHARE))
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 < float(share) <= 1:
        raise ValueError(f"deep_kv_share={share!r} in --additional-config must be a number > 0 and <= 1")
    return float(share)


def _is_on(switch: str, additional: dict[str, Any]) -> bool:
    """Return the value of a setting that is true or false; true by default."""
    wanted = additional.get(switch, True)
    if not isinstance(wanted, bool):
        raise ValueError(f"{switch}={wanted!r} in --additional-config must be true or false")
    return wanted


def _batching(vllm_config: Any, v2: bool) -> str:
    """Return how both depths share steps, `two_pass` or `mixed`; answers are the same.

    With runner V1, `auto` follows the tables in docs/results/load-tests.md: `mixed` reads the weights less often if
    several requests run. With torch.compile, steps of `mixed` would run uncompiled. With V2 they would also run without
    CUDA graphs, and nothing was measured on a GPU; so there `auto` is `two_pass`.
    """
    batching = vllm_config.additional_config.get("batching", "auto")
    if batching not in BATCHING:
        raise ValueError(f"batching={batching!r} in --additional-config is not one of {', '.join(BATCHING)}")
    base = vllm_config.model_config.hf_config.base_config
    if v2 and batching == "mixed" and FAMILIES[base.model_type].experts:
        # Rows beside those of vLLM's batch are not in its mask of padding, nor in the room for their experts.
        raise ValueError(
            "batching='mixed' in --additional-config is not supported with model runner V2 for a base with experts; "
            "use 'two_pass'"
        )
    if v2 and batching == "mixed" and vllm_config.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE:
        raise ValueError(
            "batching='mixed' in --additional-config runs inside the whole model, which this compilation mode compiles "
            f"({CompilationMode.STOCK_TORCH_COMPILE.name}); use another mode, or 'two_pass'"
        )
    if batching != "auto":
        return batching
    if v2:
        return "two_pass"
    several = vllm_config.scheduler_config.max_num_seqs >= MANY
    return "mixed" if several and vllm_config.model_config.enforce_eager else "two_pass"
