"""LoRA by depth on layers that other libraries have changed before."""

from __future__ import annotations

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules

from helpers.families import tiny
from helpers.models import distance, shake, token_ids
from tah import TaHForCausalLM


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_lora_is_active_in_layers_with_hooks_of_accelerate(family):
    """A device map puts a hook on every layer, which keeps the forward that the layer had at that time."""
    options = {"policy": "always", "lora_rank": 4, "mix_topk": 16}
    torch.manual_seed(0)
    wanted = shake(TaHForCausalLM.from_base(tiny(family), **options))
    hooked = dispatch_model(tiny(family), {"": "cpu"}, force_hooks=True)
    torch.manual_seed(0)
    model, ids = shake(TaHForCausalLM.from_base(hooked, **options)), token_ids(2)
    model.load_state_dict(wanted.state_dict())
    made = model(ids).logits
    assert distance(made, wanted(ids).logits) < 1e-5
    remove_hook_from_submodules(model)
    assert distance(model(ids).logits, made) < 1e-5
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.zero_()
    assert distance(model(ids).logits, made) > 0.1  # control: LoRA changes the logits
