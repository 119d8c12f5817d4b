"""The parts of the forward: inputs, cache, masks, LoRA, next input, logits, loss. Read `tah/model.py` first."""
