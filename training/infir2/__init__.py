"""FP8 training of reasoning models: one engine (Megatron), on Hopper GPUs and on a laptop's CPU."""
