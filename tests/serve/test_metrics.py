"""Metrics: those of a TaH model beside those of vLLM, and nothing changes for other models."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="serving is tested where vLLM is installed: make serve-test")

from pathlib import Path

import tomllib
from vllm import LLM
from vllm.v1.metrics.loggers import PrometheusStatLogger

from helpers.checkpoints import tiny, tiny_base
from helpers.serving import prompts, serve, served_by
from tah.vllm.metrics import DepthMetrics

OWN = {"vllm:tah_tokens", "vllm:tah_iterating_tokens", "vllm:tah_deep_kv_usage_perc", "vllm:tah_threshold"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("serve") / "llama", "llama")


def loggers(served):
    return [type(one) for one in served.engine.logger_manager.stat_loggers]


def test_a_tah_model_has_metrics_of_its_own(llama):
    """vLLM's logger stays vLLM's, and one more counts depths."""
    asked = prompts(4, seed=1)
    with serve(llama, disable_log_stats=False) as served:
        assert [kind for kind in loggers(served) if issubclass(kind, PrometheusStatLogger)] == [PrometheusStatLogger]
        assert loggers(served).count(DepthMetrics) == 1
        depths = [depth for one in served.ask(asked, 12) for depth in one.depths]
        found = {(one.name, one.labels.get("depth")): one.value for one in served.llm.get_metrics() if one.name in OWN}
        assert {name for name, _ in found} == OWN
        assert found["vllm:tah_tokens", "1"] + found["vllm:tah_tokens", "2"] == len(depths)
        assert found["vllm:tah_tokens", "2"] == depths.count(2) > 0
        assert found["vllm:tah_threshold", None] == served.model.config.threshold


def test_no_statistics_where_they_are_off(llama):
    with serve(llama, disable_log_stats=True) as served:
        served.ask(prompts(2, seed=1), 4)
        assert served.engine.logger_manager is None and not served.scheduler.log_stats


def test_other_models_have_the_metrics_of_vllm(llama, tmp_path):
    """Also in a process that has served a TaH model."""
    tiny_base("llama").save_pretrained(tmp_path / "base")
    options = {"dtype": "float32", "max_model_len": 64, "enforce_eager": True, "gpu_memory_utilization": 0.05}
    llm = LLM(str(tmp_path / "base"), skip_tokenizer_init=True, disable_log_stats=False, **options)
    with served_by(llm) as served:
        assert loggers(served) == [PrometheusStatLogger]
        assert not OWN & {one.name for one in llm.get_metrics()}


def test_no_logger_for_every_model():
    """One of vLLM's group of entry points would run for every model, and turn on statistics that are off."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert list(project["entry-points"]) == ["vllm.general_plugins"]
