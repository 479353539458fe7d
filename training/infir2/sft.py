"""Supervised fine-tuning: `python -m infir2.sft FLAGS`, with Megatron's own flags and those below.

Conversations of any length (`tools/prepare_data.py sft`) are packed into micro-batches (infir2.packing). The loss is
the mean over the trained tokens of a global batch, however they are packed, cut into micro-batches or spread over ranks
(--calculate-per-token-loss: sums of losses and of tokens are reduced apart, and divided once).

The order of samples is that of `epoch_order`; a step is the next --global-batch-size of them. A resume begins at the
step after the checkpoint's: the same sample, in the middle of an epoch too.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from infir2 import engine, packing, receipts
from infir2.data.samples import Samples, epoch_order


class FineTuning(engine.Stage):
    """Packed conversations, trained on where their mask says."""

    name = "fine-tuning"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--sft-data", type=Path, help="folder that tools/prepare_data.py sft wrote")
        parser.add_argument("--num-epoch", type=int, help="passes over the data; instead of --train-iters")
        parser.add_argument("--use-dynamic-batch-size", action="store_true", help="pack up to --max-tokens-per-gpu")
        parser.add_argument("--max-tokens-per-gpu", type=int, help="tokens of a micro-batch on each GPU (times CP)")
        parser.add_argument(
            "--eval-exact-match",
            type=int,
            default=0,
            metavar="N",
            help="at each evaluation, of how many validation samples (the first N) would greedy decoding give the "
            "reference answer, token for token",
        )

    def settle(self, args: Namespace) -> None:
        """Iterations from epochs; what Megatron needs to leave the counting of micro-batches to the data."""
        if args.sft_data is None:
            raise ValueError("no data: give --sft-data, a folder that tools/prepare_data.py sft wrote")
        if args.pipeline_model_parallel_size > 1:
            raise ValueError("fine-tuning packs to different lengths, which pipeline parallelism 1 alone takes; use TP")
        if not args.calculate_per_token_loss:
            raise ValueError("pass --calculate-per-token-loss: the mean over micro-batches depends on the packing")
        if args.use_dynamic_batch_size != (args.max_tokens_per_gpu is not None):
            raise ValueError("--use-dynamic-batch-size and --max-tokens-per-gpu go together; pass both or none")
        if args.use_dynamic_batch_size:
            args.micro_batch_size = 1  # Megatron then counts samples; how many share a micro-batch it is not told
        if args.global_batch_size is None:
            raise ValueError("missing: --global-batch-size, the samples of a step")
        samples = len(Samples(args.sft_data, "train"))
        if args.train_iters is None and args.num_epoch is not None:
            args.train_iters = args.num_epoch * samples // args.global_batch_size
        if not args.train_iters:
            raise ValueError(
                f"{samples} samples, --num-epoch {args.num_epoch} and --global-batch-size {args.global_batch_size} "
                "make no step; give more epochs or a smaller batch, or --train-iters"
            )
        args.dataloader_type = "external"
        args.eval_iters = 1 if "valid" in Samples(args.sft_data, "train").manifest["splits"] else 0

    def tokens_per_micro_batch(self, args: Namespace) -> int:
        multiple = packing.total_multiple(args.tensor_model_parallel_size, args.context_parallel_size)
        if args.use_dynamic_batch_size:
            return args.max_tokens_per_gpu * args.context_parallel_size
        return multiple  # every micro-batch is padded to it

    def data(self, args: Namespace) -> dict[str, Any]:
        """Refuses samples that do not fit the budget or the positions, and another tokenizer's."""
        tokenizer = Path(args.tokenizer_model or "") / "tokenizer.json"
        sha256 = receipts.sha256_file(tokenizer) if tokenizer.is_file() else None
        room = {"--seq-length": args.seq_length + 1}
        if args.use_dynamic_batch_size:
            room["--max-tokens-per-gpu x CP"] = args.max_tokens_per_gpu * args.context_parallel_size + 1
        for split in _splits(args):
            samples = Samples(args.sft_data, split, sha256)
            for what, limit in room.items():
                lengths = samples.lengths()
                if lengths.max() > limit:
                    raise ValueError(
                        f"{(lengths > limit).sum()} samples of {args.sft_data}/{split} are longer than {what} allows "
                        f"({limit}), the longest, number {lengths.argmax()}, has {lengths.max()} tokens; prepare the "
                        f"data with --max-length {limit}, or raise {what}"
                    )
            if samples.manifest["vocab_size"] > args.padded_vocab_size:
                raise ValueError(
                    f"{args.sft_data} has ids up to {samples.manifest['vocab_size']}, the model's vocabulary only "
                    f"{args.padded_vocab_size} rows; prepare the data with the model's tokenizer"
                )
        if args.eval_iters:
            _check_evaluation(args)
        manifest = receipts.sha256_file(args.sft_data / receipts.MANIFEST)
        return {"sft_data": str(args.sft_data), "data_manifests": {str(args.sft_data): manifest}}

    def datasets(self, sample_counts: tuple[int, int, int], vp_stage: int | None) -> tuple:
        from megatron.training import get_args, print_rank_0

        args = get_args()
        train = Samples(args.sft_data, "train")
        batches = _batches(args, train, training_steps(len(train), args.global_batch_size, args.seed))
        batches.step = args.iteration
        print_rank_0(
            f"[infir2] {len(train)} conversations, {args.train_iters * args.global_batch_size / len(train):.2f} epochs "
            f"in {args.train_iters} steps; starting at sample {args.iteration * args.global_batch_size}"
        )
        if args.eval_iters == 0:
            return batches, None, None
        return batches, _evaluation_batches(args), None

    def forward_step(self, data_iterator, model) -> tuple:
        from infir2 import packed_model

        return packed_model.forward_step(data_iterator, model)

    def evaluation(self) -> dict[str, Callable]:
        from megatron.training import get_args

        from infir2 import packed_model

        args = get_args()
        if args.eval_exact_match == 0 or args.eval_iters == 0:
            return {}
        return {
            "non_loss_data_func": lambda models: packed_model.exact_match(
                models[0], _evaluation_batches(args, args.eval_exact_match)
            ),
            "process_non_loss_data_func": packed_model.log_exact_match,
        }


def _check_evaluation(args: Namespace) -> None:
    """Every data-parallel rank has a sample in each evaluation."""
    ranks = args.world_size // (args.tensor_model_parallel_size * args.context_parallel_size)
    samples = len(Samples(args.sft_data, "valid"))
    asked = {f"the validation set of {args.sft_data}": samples}
    if args.eval_exact_match:
        asked["--eval-exact-match"] = min(args.eval_exact_match, samples)
    for what, count in asked.items():
        if count < ranks:
            raise ValueError(
                f"{what} has {count} samples, fewer than the {ranks} data-parallel ranks: each evaluates at least one; "
                "prepare the data with a larger --valid-fraction, ask for more, or leave it out"
            )


def _splits(args: Namespace) -> list[str]:
    return ["train", "valid"] if args.eval_iters else ["train"]


def training_steps(samples: int, batch: int, seed: int) -> Callable[[int], np.ndarray]:
    """A function from a step (from 0) to its samples, int64 [batch]: the epochs one after the other, in equal parts.

    A step may end one epoch and begin the next; a batch larger than the data holds samples more than once.
    """

    def of_step(step: int) -> np.ndarray:
        places = np.arange(step * batch, (step + 1) * batch)
        epochs = places // samples
        order = {epoch: epoch_order(samples, epoch, seed) for epoch in np.unique(epochs).tolist()}
        return np.array([order[epoch][place % samples] for place, epoch in zip(places, epochs.tolist(), strict=True)])

    return of_step


def _evaluation_batches(args: Namespace, most: int | None = None) -> "PackedBatches":
    """Every step is the whole validation set, or its first `most` samples: always the same ones."""
    valid = Samples(args.sft_data, "valid")
    chosen = np.arange(len(valid))[:most]
    batches = _batches(args, valid, lambda step: chosen)
    if batches.budget is None:  # their number may be no multiple of the micro-batches
        batches.budget = args.micro_batch_size * int(valid.lengths().max())
    return batches


def _batches(args: Namespace, samples: Samples, of_step: Callable[[int], np.ndarray]) -> "PackedBatches":
    from megatron.core import mpu

    return PackedBatches(
        samples,
        of_step,
        rank=mpu.get_data_parallel_rank(),
        ranks=mpu.get_data_parallel_world_size(),
        tensor_parallel=args.tensor_model_parallel_size,
        context_parallel=args.context_parallel_size,
        budget=args.max_tokens_per_gpu * args.context_parallel_size if args.use_dynamic_batch_size else None,
        size=args.micro_batch_size,
    )


class PackedBatches:
    """Iterator over one data-parallel rank's micro-batches, step after step without end.

    of_step: from a step to its samples. budget: tokens of a micro-batch; None packs `size` samples each, in order.
    """

    def __init__(
        self,
        samples: Samples,
        of_step: Callable[[int], np.ndarray],
        *,
        rank: int,
        ranks: int,
        tensor_parallel: int,
        context_parallel: int,
        budget: int | None,
        size: int,
    ) -> None:
        self.samples, self.of_step = samples, of_step
        self.rank, self.ranks = rank, ranks
        self.tensor_parallel, self.context_parallel = tensor_parallel, context_parallel
        self.budget, self.size = budget, size
        self.step = 0
        self._left: list[np.ndarray] = []

    def micro_batches(self) -> int:
        """How many micro-batches this rank has in the step that the next call of `next` begins."""
        if not self._left:
            self._plan()
        return len(self._left)

    def _plan(self) -> None:
        chosen = self.of_step(self.step)
        self.step += 1
        multiple = packing.sample_multiple(self.context_parallel)
        lengths = packing.round_up(self.samples.lengths()[chosen] - 1, multiple)
        if self.budget is None:
            plan = packing.fixed_plan(len(chosen), self.ranks, self.size)
        else:
            plan = packing.balanced_plan(lengths.tolist(), self.ranks, self.budget)
        self._left = [chosen[places] for places in plan[self.rank]]

    def __iter__(self) -> "PackedBatches":
        return self

    def __next__(self) -> packing.Pack:
        if not self._left:
            self._plan()
        chosen = self._left.pop(0)
        return packing.pack([self.samples.sample(int(i)) for i in chosen], self.tensor_parallel, self.context_parallel)


if __name__ == "__main__":  # keep the top level light: checkpoint writers may start processes that import it again
    engine.main(FineTuning())
