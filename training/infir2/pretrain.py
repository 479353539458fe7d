"""Continual pre-training: `python -m infir2.pretrain FLAGS`, with Megatron's own flags, on GPUs or on a CPU."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from infir2 import engine, preflight


class Pretraining(engine.Stage):
    """Documents one after the other, cut into sequences of one length (infir2.language_model)."""

    name = "pretraining"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--data-index-iters",
            type=int,
            help="size the training set's index for this many iterations instead of --train-iters: a branch passes its "
            "parent's number, and so sees the samples that the parent would have seen",
        )

    def tokens_per_micro_batch(self, args: Namespace) -> int:
        return args.micro_batch_size * args.seq_length

    def data(self, args: Namespace) -> dict[str, Any]:
        paths = {name: getattr(args, name) for name in ("data_path", "train_data_path", "valid_data_path", "split")}
        manifests = preflight.check_corpora(args)
        if args.data_cache_path is not None:
            Path(args.data_cache_path).mkdir(parents=True, exist_ok=True)  # or the index cannot be written there
        return {"data": paths, "data_manifests": manifests, "data_index_iters": preflight.check_data_index(args)}

    def datasets(self, sample_counts: tuple[int, int, int], vp_stage: int | None) -> tuple:
        from megatron.training import get_args

        from infir2 import language_model

        train, valid, test = language_model.build_datasets(sample_counts, vp_stage)
        args = get_args()
        if not (args.eval_iters or args.full_validation):  # Megatron's loader refuses a set of which nothing is read
            return train, None, None
        return train, valid, test

    def forward_step(self, data_iterator, model) -> tuple:
        from infir2 import language_model

        return language_model.forward_step(data_iterator, model)


if __name__ == "__main__":  # keep the top level light: checkpoint writers may start processes that import it again
    engine.main(Pretraining())
