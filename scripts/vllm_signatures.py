"""Signatures of what the plugin uses of vLLM, by release: what a newer release moved, before anyone runs it.

    python scripts/vllm_signatures.py vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl      # a wheel, not installed
    python scripts/vllm_signatures.py .venv-serve/lib/python3.11/site-packages             # an environment
    python scripts/vllm_signatures.py WHEEL --write                                        # record a release

The source is read with `ast`; nothing of vLLM is imported or run. `USED` lists what the plugin imports, calls,
overrides and reads. The result is compared with the newest record in scripts/vllm_signatures/ of another release (or
with that of `--against`). A name that is gone, or whose signature differs, ends the command with status 1. A function
whose body differs is named too: the plugin may depend on what it did. Equal signatures prove nothing about behaviour;
the tests of tests/serve/ do, in an environment with that release.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

RECORDS = Path(__file__).parent / "vllm_signatures"

# By class or module of vLLM: functions, methods, fields and attributes. Of a class the record has the bases, too.
USED: dict[str, tuple[str, ...]] = {
    # start and configuration
    "vllm": ("__version__",),
    "vllm.LLM": ("generate", "get_tokenizer", "llm_engine"),
    "vllm.ModelRegistry": (),
    "vllm.SamplingParams": ("extra_args", "n", "prompt_logprob_token_ids", "prompt_logprobs"),
    "vllm.config.VllmConfig": (
        "additional_config",
        "attention_config",
        "aux_output_config",
        "cache_config",
        "compilation_config",
        "kernel_config",
        "num_speculative_tokens",
        "watermark_config",
        "weight_transfer_config",
        "kv_transfer_config",
        "lora_config",
        "model_config",
        "offload_config",
        "parallel_config",
        "scheduler_config",
        "speculative_config",
        "try_verify_and_update_config",
        "use_v2_model_runner",
    ),
    "vllm.config.ModelConfig": (
        "enable_prompt_embeds",
        "enable_sleep_mode",
        "enable_trace_replay",
        "enforce_eager",
        "hf_config",
        "logits_processors",
        "max_model_len",
        "quantization",
        "quantization_config",
        "return_sampling_mask",
        "runner_type",
    ),
    "vllm.config.quantization": ("resolve_quantization_config",),
    "vllm.config.ParallelConfig": (
        "data_parallel_size",
        "decode_context_parallel_size",
        "enable_expert_parallel",
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
        "use_ubatching",
        "worker_cls",
    ),
    "vllm.config.CacheConfig": (
        "block_size",
        "cache_dtype",
        "enable_prefix_caching",
        "kv_offloading_size",
        "kv_sharing_fast_prefill",
        "sliding_window",
        "user_specified_block_size",
    ),
    "vllm.config.SchedulerConfig": ("async_scheduling", "max_num_seqs", "scheduler_cls"),
    "vllm.config.CUDAGraphMode": ("NONE",),
    "vllm.config.CompilationConfig": ("mode",),
    "vllm.config.CompilationMode": ("STOCK_TORCH_COMPILE",),
    "vllm.config.offload.UVAOffloadConfig": ("cpu_offload_gb",),
    "vllm.config.offload.PrefetchOffloadConfig": ("offload_group_size",),
    "vllm.config.AuxOutputConfig": ("enable_return_routed_experts",),
    "vllm.envs": ("VLLM_USE_V2_MODEL_RUNNER",),
    "vllm.exceptions.VLLMValidationError": (),
    "vllm.model_executor.models.config": ("MODELS_CONFIG_MAP",),
    "vllm.model_executor.models.config.VerifyAndUpdateConfig": ("verify_and_update_config",),
    "vllm.model_executor.models.utils": ("init_vllm_registered_model",),
    "vllm.model_executor.models.registry._ModelRegistry": ("register_model",),
    "vllm.platforms": ("current_platform",),
    "vllm.platforms.interface.Platform": ("device_type", "is_cpu", "is_cuda_alike"),
    "vllm.entrypoints.cli.serve.ServeSubcommand": ("cmd", "subparser_init", "validate"),
    "vllm.logger": ("configure_logging_from_args", "init_logger"),
    "vllm.utils.argparse_utils.FlexibleArgumentParser": ("parse_args",),
    # scheduler
    "vllm.v1.core.sched.scheduler.Scheduler": (
        "__init__",
        "_free_request",
        "_free_request_blocks",
        "_preempt_request",
        "add_request",
        "block_size",
        "kv_cache_config",
        "kv_cache_manager",
        "make_stats",
        "max_num_running_reqs",
        "max_num_scheduled_tokens",
        "policy",
        "prev_step_scheduled_req_ids",
        "requests",
        "running",
        "schedule",
        "update_from_output",
        "vllm_config",
        "waiting",
    ),
    "vllm.v1.core.sched.request_queue.SchedulingPolicy": ("PRIORITY",),
    "vllm.v1.core.sched.output.SchedulerOutput": (
        "finished_req_ids",
        "num_scheduled_tokens",
        "preempted_req_ids",
        "scheduled_cached_reqs",
        "scheduled_new_reqs",
        "total_num_scheduled_tokens",
    ),
    "vllm.v1.core.sched.output.NewRequestData": (
        "block_ids",
        "num_computed_tokens",
        "prefill_token_ids",
        "prompt_token_ids",
        "req_id",
        "sampling_params",
    ),
    "vllm.v1.core.sched.output.CachedRequestData": (
        "new_block_ids",
        "num_computed_tokens",
        "num_output_tokens",
        "req_ids",
        "resumed_req_ids",
    ),
    "vllm.v1.core.kv_cache_manager.KVCacheManager": ("block_pool", "free", "get_block_ids"),
    "vllm.v1.core.block_pool.BlockPool": ("blocks", "evict_blocks"),
    "vllm.v1.core.kv_cache_utils.KVCacheBlock": ("block_hash", "ref_cnt"),
    "vllm.v1.kv_cache_interface.KVCacheConfig": ("kv_cache_groups", "num_blocks"),
    "vllm.v1.kv_cache_interface.KVCacheSpec": ("block_size", "page_size_bytes"),
    "vllm.v1.outputs.ModelRunnerOutput": (),
    "vllm.v1.request.Request": (
        "arrival_time",
        "block_hashes",
        "cache_salt",
        "num_computed_tokens",
        "num_tokens",
        "priority",
        "request_id",
        "sampling_params",
        "update_block_hashes",
    ),
    # statistics and responses
    "vllm.v1.metrics.loggers.AggregateStatLoggerBase": ("log_engine_initialized", "record"),
    "vllm.v1.metrics.loggers.PrometheusStatLogger": (
        "_counter_cls",
        "_gauge_cls",
        "per_engine_labelvalues",
        "vllm_config",
    ),
    "vllm.v1.metrics.loggers.StatLoggerManager": ("__init__", "stat_loggers"),
    "vllm.v1.metrics.stats.SchedulerStats": ("running_lora_adapters",),
    "vllm.v1.metrics.utils": ("create_metric_per_engine",),
    "vllm.outputs.RequestOutput": ("outputs", "prompt_token_ids"),
    "vllm.outputs.CompletionOutput": ("index", "routed_experts"),
    "vllm.v1.engine.EngineCoreOutput": ("request_id", "routed_experts"),
    "vllm.v1.engine.async_llm.AsyncLLM": ("generate",),
    "vllm.sampling_params": ("RequestOutputKind",),
    # workers and runners
    "vllm.v1.worker.worker_base.WorkerBase": ("model_config", "vllm_config"),
    "vllm.v1.worker.gpu_worker.Worker": (
        "compile_or_warm_up_model",
        "determine_available_memory",
        "execute_model",
        "get_kv_cache_spec",
        "initialize_from_config",
        "load_model",
        "model_runner",
        "sample_tokens",
        "use_v2_model_runner",
    ),
    "vllm.v1.worker.cpu_worker.CPUWorker": (
        "compile_or_warm_up_model",
        "determine_available_memory",
        "execute_model",
        "initialize_from_config",
        "load_model",
        "model_runner",
        "sample_tokens",
    ),
    "vllm.v1.worker.cpu_model_runner.CPUModelRunner": (
        "_model_forward",
        "discard_request_mask",
        "get_model",
        "input_batch",
        "use_aux_hidden_state_outputs",
    ),
    "vllm.v1.worker.gpu_input_batch.InputBatch": ("generators", "req_id_to_index", "req_ids"),
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner": (
        "cudagraph_manager",
        "execute_model",
        "execute_model_state",
        "get_model",
        "model_state",
        "sample",
        "sample_tokens",
        "use_aux_hidden_state_outputs",
    ),
    "vllm.v1.worker.gpu.cudagraph_utils.BatchExecutionDescriptor": ("cg_mode", "num_reqs", "num_tokens"),
    "vllm.v1.worker.gpu.cudagraph_utils.CudaGraphManager": ("dispatch",),
    "vllm.v1.worker.gpu.model_runner.ExecuteModelState": ("aux_hidden_states", "hidden_states", "input_batch"),
    "vllm.v1.worker.gpu.input_batch.InputBatch": ("input_ids", "positions", "req_ids"),
    # what makes a request with 0 sampled and 1 rejected token run its last token again (`batching="mixed"`)
    "vllm.v1.worker.gpu.input_batch": (
        "combine_sampled_and_draft_tokens",
        "get_num_sampled_and_rejected",
        "post_update",
    ),
    "vllm.v1.worker.gpu.dp_utils": ("dispatch_cg_and_sync_dp",),
    "vllm.v1.worker.gpu.sample.output.SamplerOutput": ("num_rejected", "num_sampled", "sampled_token_ids"),
    "vllm.v1.worker.gpu.async_utils.AsyncOutput": ("get_output", "model_runner_output"),
    "vllm.v1.worker.gpu.model_states.default.DefaultModelState": (
        "__init__",
        "prepare_inputs",
    ),
    "vllm.v1.worker.gpu.model_states": ("init_model_state",),
    "vllm.v1.sample.logits_processor.LogitsProcessor": (
        "__init__",
        "apply",
        "is_argmax_invariant",
        "update_state",
        "validate_params",
    ),
    "vllm.v1.worker.gpu.sample.logits_processor.LogitsProcessor": (
        "__init__",
        "add_request",
        "apply",
        "validate_params",
    ),
    # layers
    "vllm.distributed": ("cleanup_dist_env_and_memory", "get_tp_group", "tensor_model_parallel_all_reduce"),
    "vllm.distributed.parallel_state": ("graph_capture",),
    "vllm.forward_context": ("get_forward_context", "set_forward_context"),
    "vllm.forward_context.ForwardContext": ("attn_metadata", "is_padding", "slot_mapping"),
    "vllm.model_executor.layers.attention.Attention": (
        "forward",
        "get_attn_backend",
        "head_size",
        "impl",
        "kv_cache",
        "layer_name",
        "num_heads",
        "num_kv_heads",
    ),
    "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend": ("get_supported_head_sizes",),
    "vllm.model_executor.layers.linear.LinearBase": ("input_size", "output_size", "tp_rank", "tp_size"),
    "vllm.model_executor.layers.linear.ColumnParallelLinear": ("forward", "output_partition_sizes"),
    "vllm.model_executor.layers.linear.QKVParallelLinear": ("num_kv_head_replicas",),
    "vllm.model_executor.layers.linear.RowParallelLinear": ("forward", "input_size_per_partition"),
    "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl": ("do_kv_cache_update", "scale"),
    "vllm.v1.attention.backends.flash_attn.FlashAttentionImpl": ("do_kv_cache_update", "scale"),
    "vllm.v1.attention.backends.triton_attn.TritonAttentionImpl": ("do_kv_cache_update", "scale"),
    "vllm.v1.attention.backends.flashinfer.FlashInferImpl": ("do_kv_cache_update", "scale"),
    "vllm.v1.attention.backends.flashinfer.FlashInferBackend": ("supported_kv_cache_layouts",),
    "vllm.v1.attention.backends.flex_attention.FlexAttentionImpl": ("do_kv_cache_update", "scale"),
    **{
        f"vllm.model_executor.models.{family}.{name}ForCausalLM": (
            "compute_logits",
            "embed_input_ids",
            "forward",
            "load_weights",
            "packed_modules_mapping",
        )
        for family, name in {
            "granite": "Granite",
            "llama": "Llama",
            "mistral": "Mistral",
            "phi3": "Phi3",
            "qwen2": "Qwen2",
            "qwen3": "Qwen3",
            "qwen3_moe": "Qwen3Moe",
        }.items()
    },
    **{
        f"vllm.model_executor.models.{family}.{name}": ("forward",)
        for family, names in {
            "granite": ("GraniteModel", "GraniteDecoderLayer", "GraniteAttention"),
            "llama": ("LlamaModel", "LlamaDecoderLayer", "LlamaAttention"),
            "mistral": ("MistralModel", "MistralDecoderLayer", "MistralAttention"),
            "qwen2": ("Qwen2Model", "Qwen2DecoderLayer", "Qwen2Attention"),
            "qwen3": ("Qwen3Model", "Qwen3DecoderLayer", "Qwen3Attention"),
            "qwen3_moe": ("Qwen3MoeModel", "Qwen3MoeDecoderLayer", "Qwen3MoeAttention", "Qwen3MoeSparseMoeBlock"),
        }.items()
        for name in names
    },
}

Entry = dict[str, str]  # "is", and for functions "body": a digest of the code
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


class Source:
    """The source of one release of vLLM.

    Args:
        path: A wheel, or a directory with a package `vllm`.
    """

    def __init__(self, path: Path) -> None:
        self.modules: dict[str, ast.Module | None] = {}
        if path.suffix == ".whl":
            wheel = zipfile.ZipFile(path)
            self.names = set(wheel.namelist())
            self.read: Callable[[str], str] = lambda name: wheel.read(name).decode()
        else:
            self.names = {file.relative_to(path).as_posix() for file in (path / "vllm").rglob("*.py")}
            self.names |= {f"{file.parent.name}/METADATA" for file in path.glob("vllm*.dist-info/METADATA")}
            self.read = lambda name: (path / name).read_text()

    def version(self) -> str:
        """Return the version that the metadata names."""
        (metadata,) = sorted(name for name in self.names if name.endswith(".dist-info/METADATA"))[:1]
        return next(line for line in self.read(metadata).splitlines() if line.startswith("Version: ")).split()[1]

    def module(self, name: str) -> ast.Module | None:
        """Return a parsed module; None if there is none of this name."""
        if name not in self.modules:
            base = name.replace(".", "/")
            found = next((file for file in (f"{base}.py", f"{base}/__init__.py") if file in self.names), None)
            self.modules[name] = ast.parse(self.read(found)) if found else None
        return self.modules[name]

    def is_package(self, name: str) -> bool:
        """Return whether a module is a package."""
        return f"{name.replace('.', '/')}/__init__.py" in self.names

    def find(self, module: str, name: str, depth: int = 8) -> tuple[str, Definition] | None:
        """Return module and definition of a name of a module, through the imports of other modules."""
        tree = self.module(module)
        if tree is None or not depth:
            return None
        imported: tuple[str, str] | None = None
        for node in statements(tree.body):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
                return module, node
            if isinstance(node, ast.Assign | ast.AnnAssign) and name in targets(node):
                return module, node
            if isinstance(node, ast.ImportFrom) and imported is None:
                origin = self._origin(module, node)
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        imported = origin, alias.name
                    elif alias.name == "*" and self.find(origin, name, depth - 1):
                        imported = origin, name
        return self.find(*imported, depth - 1) if imported else None

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + self.is_package(module)]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def split(self, path: str) -> tuple[str, str | None]:
        """Split `vllm.config.VllmConfig` into module and name of a class; the latter is None for a module."""
        if self.module(path) is not None:
            return path, None
        module, _, name = path.rpartition(".")
        return module, name

    def lineage(self, module: str, node: ast.ClassDef, depth: int = 8) -> Iterator[tuple[str, ast.ClassDef]]:
        """Yield a class and the classes of vLLM that it inherits from, with their modules."""
        yield module, node
        for base in node.bases if depth else ():
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name) and (found := self.find(module, base.id)) is not None:
                if isinstance(found[1], ast.ClassDef):
                    yield from self.lineage(found[0], found[1], depth - 1)


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a body, and those within `if`, `try` and `with`."""
    for node in body:
        yield node
        for part in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler) and hasattr(node, part):
                yield from statements(getattr(node, part))


def targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    """Return the names that an assignment binds; `self.x` is `x`."""
    names = []
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        for one in target.elts if isinstance(target, ast.Tuple) else [target]:
            if isinstance(one, ast.Name):
                names.append(one.id)
            elif isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name) and one.value.id == "self":
                names.append(one.attr)
    return names


def describe(node: Definition) -> Entry:
    """Return what is recorded of a definition."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        marks = [ast.unparse(one) for one in node.decorator_list]
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        head = "".join(f"@{mark} " for mark in marks) + f"({ast.unparse(node.args)}){returns}"
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        code = "\n".join(ast.dump(one) for one in body)
        return {"is": head, "body": hashlib.sha256(code.encode()).hexdigest()[:12]}
    if isinstance(node, ast.ClassDef):
        return {"is": f"class({', '.join(ast.unparse(base) for base in node.bases)})"}
    if isinstance(node, ast.AnnAssign):
        value = f" = {shortened(node.value)}" if node.value is not None else ""
        return {"is": f"field: {ast.unparse(node.annotation)}{value}"}
    return {"is": "assigned"}


def shortened(value: ast.expr) -> str:
    """Return the source of a default value; a long one, such as a table, is left out."""
    text = ast.unparse(value)
    return text if len(text) <= 100 else "..."


def member(node: ast.ClassDef, name: str) -> Definition | None:
    """Return the definition of a method, a field or an attribute in a class."""
    for one in reversed(list(statements(node.body))):  # the last of overloaded functions is the real one
        if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) and one.name == name:
            return one
        if isinstance(one, ast.Assign | ast.AnnAssign) and name in targets(one):
            return one
    assigned = (one for one in ast.walk(node) if isinstance(one, ast.Assign | ast.AnnAssign) and name in targets(one))
    return next(assigned, None)


def signatures(source: Source) -> dict[str, Entry | None]:
    """Return what `USED` names, by full name; None where it is missing."""
    found: dict[str, Entry | None] = {}
    for path, names in USED.items():
        module, name = source.split(path)
        if name is None:
            for part in names:
                one = source.find(module, part)
                found[f"{path}.{part}"] = describe(one[1]) if one else None
            continue
        one = source.find(module, name)
        found[path] = describe(one[1]) if one else None
        if one is None or not isinstance(one[1], ast.ClassDef):
            found |= dict.fromkeys((f"{path}.{part}" for part in names), None)
            continue
        classes = [node for _, node in source.lineage(one[0], one[1])]
        for part in names:
            entries = (member(node, part) for node in classes)
            entry = next((one for one in entries if one is not None), None)
            found[f"{path}.{part}"] = describe(entry) if entry is not None else None
    return dict(sorted(found.items()))


def compare(old: dict[str, Entry | None], new: dict[str, Entry | None]) -> tuple[list[str], list[str]]:
    """Return lines on names that are gone or differ, and names of functions whose body differs."""
    broken, bodies = [], []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if after is None:
            broken.append(f"{name}: missing" + ("" if before is None else f", was {before['is']}"))
        elif before is None:
            broken.append(f"{name}: new, {after['is']}")
        elif before["is"] != after["is"]:
            broken.append(f"{name}:\n    was {before['is']}\n    is  {after['is']}")
        elif before.get("body") != after.get("body"):
            bodies.append(name)
    return broken, bodies


def recorded(release: str) -> dict[str, Entry | None]:
    """Return the record of a release."""
    names: dict[str, Entry | None] = json.loads((RECORDS / f"{release}.json").read_text())["names"]
    return names


def newest(without: str | None) -> str | None:
    """Return the newest recorded release other than `without`; None if there is none."""
    found = [file.stem for file in RECORDS.glob("*.json") if file.stem != without]
    return max(found, key=lambda name: [int(part) for part in name.split(".")], default=None)


def main() -> int:
    """Read a release, and record or compare it."""
    parser = argparse.ArgumentParser(description="signatures of what the plugin uses of vLLM")
    parser.add_argument("path", type=Path, help="wheel of vLLM, or directory with a package vllm")
    parser.add_argument("--against", help="recorded release, such as 0.32.0; the newest other one by default")
    parser.add_argument("--write", action="store_true", help="record the release in scripts/vllm_signatures/")
    arguments = parser.parse_args()
    source = Source(arguments.path)
    release, found = source.version().partition("+")[0], signatures(source)
    if arguments.write:
        RECORDS.mkdir(exist_ok=True)
        record = {"read from": arguments.path.name, "names": found}
        (RECORDS / f"{release}.json").write_text(json.dumps(record, indent=1) + "\n")
    against = arguments.against or newest(release)
    if against is None:
        print(f"vLLM {release}: {len(found)} names; nothing to compare with")
        return 0
    broken, bodies = compare(recorded(against), found)
    print(f"vLLM {release} against {against}: {len(found)} names, {len(broken)} differ, {len(bodies)} other bodies")
    for line in broken:
        print(line)
    if bodies:
        print("Same signature, other body:", *bodies, sep="\n    ")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
