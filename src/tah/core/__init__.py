"""What the forward is made of: inputs, cache, masks, LoRA, next inputs, logits, loss. Read `tah/model.py` first."""
