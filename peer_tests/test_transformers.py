"""The common model tests of transformers, of `TaHForCausalLM` around two bases and of the bases themselves."""

from __future__ import annotations

import unittest
import unittest.mock
from typing import Any

import torch
from differences import LENIENCIES, WITHOUT_ALL_GRADIENTS
from suite import common
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tah import TaHConfig, TaHForCausalLM

BASES = {"llama": LlamaConfig, "qwen3": Qwen3Config}
POLICIES = ("never", "always", "random", "confidence")
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["tah"] = TaHForCausalLM.__name__


class Inputs:
    """The configuration and the inputs of each test, of the size of transformers' own tests of decoders."""

    batch_size, seq_length, vocab_size = 13, 7, 99
    hidden_size = 32
    num_hidden_layers = num_attention_heads = 2
    is_training = True

    def __init__(self, base: str, policy: str | None) -> None:
        self.base, self.policy = base, policy

    def get_config(self) -> PreTrainedConfig:
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        facts = {name: getattr(self, name) for name in names} | {"num_key_value_heads": 2, "intermediate_size": 37}
        facts |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 512}
        config = BASES[self.base](**facts, **({"head_dim": 16} if self.base == "qwen3" else {}))
        if self.policy is None:
            return config
        options = {"lora_rank": 4, "mix_topk": 16, "random_rate": 0.5, "threshold": 0.5, "decider": None}
        return TaHConfig(base_config=config, policy=self.policy, **options)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}


def random_factors(module: Any) -> None:
    """Start LoRA with a B that is not zero, so that deeper passes differ from the first."""
    for factor in (module.lora_A, module.lora_B):
        if not factor.weight.is_meta:
            torch.nn.init.normal_(factor.weight, std=0.1)


class Case(common.ModelTesterMixin, common.GenerationTesterMixin):
    """All common tests of one base and policy; without a policy, those of the base itself."""

    base: str
    policy: str | None

    def setUp(self) -> None:
        self.model_tester = Inputs(self.base, self.policy)
        patches = [unittest.mock.patch("tah.core.lora.reset_lora", random_factors)]
        name, model_class = self._testMethodName, self.all_model_classes[0]
        patches += [lenient(model_class) for start, lenient in LENIENCIES.items() if name.startswith(start)]
        for patch in patches:
            patch.start()
            self.addCleanup(patch.stop)


for _base, _config in BASES.items():
    for _policy in (None, *POLICIES):
        _class = TaHForCausalLM if _policy else MODEL_FOR_CAUSAL_LM_MAPPING[_config]
        _name = f"{_base}_{_policy or 'stock'}"
        _body = {"base": _base, "policy": _policy, "all_model_classes": (_class,)}
        _body["test_all_params_have_gradient"] = _policy not in WITHOUT_ALL_GRADIENTS
        globals()[_name] = type(_name, (Case, unittest.TestCase), _body)
