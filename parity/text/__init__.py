"""CoOp, MaPLe and CLIP-LoRA."""
