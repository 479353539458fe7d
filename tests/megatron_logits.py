"""Logits of a torch_dist checkpoint by Megatron's own model, on one CPU process. Imported in a forked process only."""

import os
import sys

import numpy as np
import torch

UNUSED = ["--lr", "1e-3", "--train-iters", "1", "--global-batch-size", "1"]  # a run has to name them


def logits(flags: list[str], checkpoint: str, tokens: list[list[int]]) -> np.ndarray:
    """[batch, positions, vocabulary] in FP32, for the model that `flags` and the weights in `checkpoint` make."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import initialize, training
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.checkpointing import load_checkpoint

    from infir2 import engine, layers, pretrain

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(engine._free_port())
    sys.argv = ["logits", *flags, "--load", checkpoint, "--mock-data", *UNUSED]
    engine.parse(pretrain.Pretraining(), "cpu", "pow2")
    initialize.initialize_megatron(allow_no_cuda=True)
    config = gpt_config_from_args(training.get_args())
    config.transformer_layer_spec = layers.layer_spec
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = config.get_builder_cls()(config).build_distributed_models(groups, wrap_with_ddp=False)
    load_checkpoint(model, None, None)
    ids = torch.tensor(tokens)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        return model[0].eval()(ids, positions, None).float().numpy()
