"""What is checked before training: everything that can be known then and would spoil or lose a run.

`check` reads Megatron's parsed arguments and refuses by a ValueError that says what was wrong, what was found and what
to do. It decides where the run starts (its own checkpoint, a parent's, the base's weights). `record` writes `run.json`
beside the checkpoints: what fixes this run's results, and what computes them. Another run's folder is refused by it.
"""

import hashlib
import json
import math
import re
import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infir2 import checkpoint, files, hf, receipts, schedule
from infir2.checkpoint import CheckpointError, TorchDist
from infir2.indexed import IndexedReader
from infir2.precision import scale_format_of_recipe
from infir2.qwen2 import Shape

if TYPE_CHECKING:
    from infir2.engine import Stage

RUN_FILE = "run.json"
FP8_TOKENS = 128
SHAPE = "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups padded_vocab_size seq_length "
SHAPE += "max_position_embeddings"
STEPS = "lr train_iters micro_batch_size global_batch_size"
LENGTH = ("train_iters", "lr_decay_iters")  # what a run may go on beyond


@dataclass(frozen=True)
class Start:
    """Where a run begins: the folder of one iteration, or none; and whether its optimizer and schedule go on."""

    folder: Path | None
    resumes: bool

    def __str__(self) -> str:
        if self.folder is None:
            return "random weights, iteration 0"
        if self.resumes:
            return f"{self.folder}, with optimizer, schedule and random state"
        return f"the weights of {self.folder}, iteration 0, fresh optimizer"


def check(args: Namespace, stage: "Stage", backend: str, scale_fmt: str) -> tuple[Start, dict[str, Any]]:
    """Check `args` on rank 0, before process groups exist: what the run starts from, and what `record` will record."""
    refuse_missing(args, f"{SHAPE} {STEPS}")
    _check_counts(args)
    _check_schedule(args)
    shape = _check_model(args)
    if args.fp8 is not None:
        _check_fp8(args, shape, stage.tokens_per_micro_batch(args))
    _check_parallelism(args)
    start = choose_start(args)
    identity = {"stage": stage.name, **run_identity(args, backend, scale_fmt), **stage.data(args)}
    identity = json.loads(json.dumps(identity))
    if args.save is not None:
        _refuse_another_run(Path(args.save), identity)
        _check_disk(args)
    if start.folder is not None:
        _check_start(args, start, identity, stage.updates(args))
    print(f"[infir2] starting from {start}", flush=True)
    return start, identity


def refuse_missing(args: Namespace, names: str) -> None:
    """ValueError for flags that have no default."""
    if missing := [name for name in names.split() if getattr(args, name) is None]:
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise ValueError(f"missing: {flags}; the scripts in scripts/ give all of them (DRY_RUN=1 prints a command)")


def _check_counts(args: Namespace) -> None:
    """What Megatron divides by, counts with, or asks for a positive seed, when the model is built or long after."""
    for name, least in {"log_interval": 1, "eval_interval": 1, "eval_iters": 0, "seed": 1, "train_iters": 1}.items():
        found = getattr(args, name, None)
        if found is not None and found < least:
            raise ValueError(f"--{name.replace('_', '-')} {found}; expected {least} or more")


def _check_schedule(args: Namespace) -> None:
    """What Megatron's scheduler would refuse when the model is built."""
    if args.lr_decay_style == "WSD" and args.lr_wsd_decay_iters is None:
        raise ValueError("--lr-decay-style WSD needs --lr-wsd-decay-iters, how many steps the decay takes")
    low, high, init = args.min_lr or 0.0, args.lr, args.lr_warmup_init
    if not 0 <= low <= high or init > high:
        raise ValueError(
            f"--min-lr {low:g} is not between 0 and --lr {high:g}, or --lr-warmup-init {init:g} is above it"
        )
    warmup, _, end = schedule.phases(vars(args))
    if warmup >= end:
        raise ValueError(f"the warmup takes {warmup:g} of {end:g} steps; take fewer --lr-warmup-iters, or more steps")


# The model and its tokenizer


def _check_model(args: Namespace) -> Shape | None:
    """Compare the flags with the config.json beside the tokenizer, where there is one."""
    if args.seq_length > args.max_position_embeddings:
        raise ValueError(
            f"--seq-length {args.seq_length} is above --max-position-embeddings {args.max_position_embeddings}"
        )
    if args.tokenizer_type != "HuggingFaceTokenizer":
        return None
    folder = Path(args.tokenizer_model)
    if not folder.is_dir():
        raise ValueError(f"--tokenizer-model {folder} does not exist; expected a Hugging Face folder")
    _check_vocabulary(args, folder)
    if not (folder / "config.json").is_file():
        return None
    shape = Shape.from_folder(folder)
    wrong = {
        name: (getattr(args, name), value)
        for name, value in shape.megatron_arguments().items()
        if getattr(args, name) != value
    }
    if wrong:
        lines = "; ".join(f"{name} is {found}, config.json says {value}" for name, (found, value) in wrong.items())
        raise ValueError(f"the flags disagree with {folder / 'config.json'}: {lines}")
    if args.seq_length > shape.max_positions:
        raise ValueError(f"--seq-length {args.seq_length} is above the model's {shape.max_positions} positions")
    return shape


def _check_vocabulary(args: Namespace, folder: Path) -> None:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        ids = [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer.get("added_tokens", ()))]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no tokenizer with a vocabulary ({type(error).__name__}: {error}); copy that of the model again"
        ) from None
    if max(ids) >= args.padded_vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has ids up to {max(ids)}, the model's vocabulary only {args.padded_vocab_size} "
            "rows; take the tokenizer that belongs to the model"
        )


def _check_parallelism(args: Namespace) -> None:
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    for what, size in {"attention heads": args.num_attention_heads, "KV groups": args.num_query_groups}.items():
        if size % tp:
            raise ValueError(f"tensor parallelism {tp} does not divide the {size} {what}")
    if args.num_layers % pp:
        raise ValueError(f"pipeline parallelism {pp} does not divide the {args.num_layers} layers")
    if args.world_size % (tp * pp * cp):
        raise ValueError(f"{args.world_size} processes are not a multiple of TP {tp} x PP {pp} x CP {cp}")


def _check_fp8(args: Namespace, shape: Shape | None, tokens: int) -> None:
    tp = args.tensor_model_parallel_size
    if args.fp8_recipe == "blockwise":
        (shape or shape_of_flags(args)).refuse_fp8(tp)
    shared = args.context_parallel_size * (tp if args.sequence_parallel else 1)
    if tokens % (shared * FP8_TOKENS):
        raise ValueError(
            f"FP8 needs a multiple of {FP8_TOKENS} tokens on each rank: a micro-batch of {tokens} tokens over {shared} "
            f"ranks is {tokens / shared:g}; change --micro-batch-size or --seq-length (--max-tokens-per-gpu in SFT)"
        )


def shape_of_flags(args: Namespace) -> Shape:
    """The network that Megatron's arguments describe."""
    return Shape(
        layers=args.num_layers,
        hidden=args.hidden_size,
        ffn=args.ffn_hidden_size,
        heads=args.num_attention_heads,
        kv_heads=args.num_query_groups,
        head_size=head_size(args),
        vocab=args.padded_vocab_size,
        tied=not args.untie_embeddings_and_output_weights,
        rope_base=args.rotary_base,
        norm_eps=args.layernorm_epsilon,
        max_positions=args.max_position_embeddings,
    )


def head_size(args: Namespace) -> int:
    """Megatron fills --kv-channels in later."""
    if not args.kv_channels and args.hidden_size % args.num_attention_heads:
        raise ValueError(
            f"--hidden-size {args.hidden_size} is no multiple of --num-attention-heads {args.num_attention_heads}; "
            "give the head size, --kv-channels"
        )
    return args.kv_channels or args.hidden_size // args.num_attention_heads


# The data


def check_corpora(args: Namespace) -> dict[str, str]:
    """Every corpus prefix exists and is not empty; folders with a manifest pass its cheap check and have this run's
    tokenizer. Returns the SHA-256 of each manifest by prefix."""
    hashes = {}
    for prefix in _data_prefixes(args):
        tokens = IndexedReader(prefix).token_count  # refuses what is missing, empty, cut or mismatched
        if tokens <= args.seq_length:
            raise ValueError(f"{prefix} has {tokens} tokens, less than one sample of --seq-length {args.seq_length}")
        manifest = prefix.parent / receipts.MANIFEST
        if not manifest.is_file():
            continue
        receipts.check_cheaply(prefix.parent)
        _check_tokenizer_hash(args, manifest)
        _check_document_end(args, manifest)
        hashes[str(prefix)] = receipts.sha256_file(manifest)
    return hashes


def check_data_index(args: Namespace) -> int:
    """For how many iterations the order of samples is made. Refuses a run that goes on beyond what that order holds."""
    iterations = args.data_index_iters or args.train_iters
    held, needed = _index_samples(args, iterations * args.global_batch_size), args.train_iters * args.global_batch_size
    if needed > held:
        raise ValueError(
            f"the order of samples is made for {iterations} iterations of {args.global_batch_size} and ends after "
            f"{held} samples, --train-iters {args.train_iters} needs {needed}: take {held // args.global_batch_size} "
            "iterations at most (fewer DECAY_ITERS), or start a new run from the weights: --pretrained-checkpoint"
        )
    return iterations


def _index_samples(args: Namespace, asked: int) -> int:
    """How many samples Megatron's index holds when `asked` are asked for: whole epochs of one corpus; a blend holds no
    more than was asked for. (megatron.core.datasets.gpt_dataset, 0.19.2)"""
    words = args.train_data_path or args.data_path or ()
    if len(words) != 1:
        return asked
    reader = IndexedReader(Path(words[0]))
    lengths = reader.lengths()
    if args.data_path:
        parts = [float(part) for part in (args.split or "969,30,1").split(",")]
        lengths = lengths[: round(parts[0] / sum(parts) * len(lengths))]
    tokens = max(int(lengths.sum()), 1)
    epochs = -(-(asked * args.seq_length + 1) // tokens)
    return (epochs * tokens - 1) // args.seq_length


def _data_prefixes(args: Namespace) -> list[Path]:
    words = [*(args.data_path or ()), *(args.train_data_path or ()), *(args.valid_data_path or ())]
    if not words and not args.mock_data and args.data_args_path is None and args.per_split_data_args_path is None:
        raise ValueError("no data: give --data-path, or --train-data-path and --valid-data-path")
    return [Path(word) for word in words if not re.fullmatch(r"[0-9.eE+-]+", word)]  # a blend has weights between


def _check_tokenizer_hash(args: Namespace, manifest: Path) -> None:
    tokenizer = Path(args.tokenizer_model or "") / "tokenizer.json"
    wanted = json.loads(manifest.read_text())["request"]["tokenizer"]
    if tokenizer.is_file() and receipts.sha256_file(tokenizer) != wanted:
        raise ValueError(f"{manifest.parent} was tokenised with another tokenizer than {tokenizer}; prepare it again")


def _check_document_end(args: Namespace, manifest: Path) -> None:
    """Megatron takes the tokenizer's eos for the document end where one of these flags makes it look for that."""
    config = Path(args.tokenizer_model or "") / "tokenizer_config.json"
    flags = [name for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss") if getattr(args, name)]
    wanted = json.loads(manifest.read_text())["request"].get("eod_token")
    if not flags or not wanted or not config.is_file():
        return
    eos = json.loads(config.read_text()).get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if eos != wanted:
        raise ValueError(
            f"--{flags[0].replace('_', '-')} looks for the tokenizer's eos, {eos}, and documents of {manifest.parent} "
            f"end with {wanted}: leave the flag out, or prepare the data with --eod-token '{eos}'"
        )


# Where the run starts


def choose_start(args: Namespace) -> Start:
    """Decide what is loaded, and set `args` so that Megatron loads it and goes on by this command's schedule."""
    start = _choose_start(args)
    run = _run_of(start.folder) if start.resumes else {}
    if run:
        # What is recorded is compared with the flags; Megatron's own comparison would refuse a longer run.
        args.override_opt_param_scheduler = not args.use_checkpoint_opt_param_scheduler
    if getattr(args, "data_index_iters", 0) is None:
        args.data_index_iters = data_index(_read_run(args.save) or run)
    return start


def _read_run(folder: Path | str | None) -> dict[str, Any]:
    """The run.json in a run's folder; empty where there is none."""
    path = Path(folder or "") / RUN_FILE
    return _read_run_file(path) if folder is not None and path.is_file() else {}


def _read_run_file(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}; restore it, or take another folder") from None
    if not isinstance(run, dict):
        raise ValueError(f"{path} holds a {type(run).__name__}, not an object; restore it, or take another folder")
    return run


def _run_of(iteration: Path) -> dict[str, Any]:
    """The run.json of the run that saved this iteration's folder."""
    return _read_run(iteration.parent)


def data_index(run: dict[str, Any]) -> int | None:
    """For how many iterations a run's order of samples was made."""
    return run.get("data_index_iters") or run.get("train_iters")


def _choose_start(args: Namespace) -> Start:
    """
    A run's own checkpoints come first, so that the same command resumes; then `--load`, then `--pretrained-checkpoint`.
    One iteration's folder (`.../iter_0035000`) is accepted for both and read as its run's folder and `--ckpt-step`.
    """
    own = Path(args.save) if args.save else None
    if own is not None and own.is_dir():
        repaired = checkpoint.repair_tracker(own)
        if repaired:
            print(f"[infir2] {repaired}", flush=True)
    if own is not None and checkpoint.tracked(own) is not None and not _same(args.load, own):
        args.load, args.ckpt_step = str(own), None
    if args.load is not None:
        args.load = _split_iteration(args, args.load)
        if args.ckpt_step or checkpoint.tracked(Path(args.load)) is not None:
            return _start_from_load(args, own)
        if not _same(args.load, own):  # not the run's own folder, which its first launch finds empty
            raise CheckpointError(
                f"--load {args.load} holds no checkpoint: {checkpoint.TRACKER} is missing or empty; name a run's "
                "folder, or the --save folder for a run that begins there"
            )
    if args.pretrained_checkpoint is not None:
        args.pretrained_checkpoint = _split_iteration(args, args.pretrained_checkpoint)
        return Start(_iteration(Path(args.pretrained_checkpoint), args.ckpt_step), resumes=False)
    if not args.from_scratch:
        raise ValueError(
            "nothing to start from: give --pretrained-checkpoint (tools/convert_hf_to_torch_dist.py makes one), or "
            "--from-scratch to begin with random weights"
        )
    return Start(None, resumes=False)


def _same(path: str | None, other: Path | None) -> bool:
    return path is not None and other is not None and Path(path).resolve() == other.resolve()


def _split_iteration(args: Namespace, path: str) -> str:
    match = re.fullmatch(r"iter_(\d+)", Path(path).name)
    if not match:
        return path
    args.ckpt_step = int(match[1])
    return str(Path(path).parent)


def _iteration(folder: Path, step: int | None) -> Path:
    return checkpoint.resolve(checkpoint.iteration_folder(folder, step) if step else folder)


def _start_from_load(args: Namespace, own: Path | None) -> Start:
    folder = _iteration(Path(args.load), args.ckpt_step)
    if args.ckpt_step and _same(args.load, own):
        newer = [i for i in checkpoint.complete_iterations(own) if i > args.ckpt_step]
        if newer:
            raise CheckpointError(
                f"--ckpt-step {args.ckpt_step} in {own}, which also holds iteration {newer[-1]}: later saves would "
                "write over it; branch into another --save folder"
            )
    return Start(folder, resumes=not args.finetune and folder.name != checkpoint.RELEASE)


def _check_start(args: Namespace, start: Start, identity: dict[str, Any], updates: int) -> None:
    """The checkpoint that will be loaded is whole and fits this run, whose iterations have so many `updates`."""
    stored = TorchDist(start.folder)
    expected = {
        "embedding.word_embeddings.weight": [args.padded_vocab_size, args.hidden_size],
        "decoder.layers.mlp.linear_fc1.weight": [args.num_layers, 2 * args.ffn_hidden_size, args.hidden_size],
        "decoder.layers.self_attention.linear_qkv.weight": [args.num_layers, _qkv_rows(args), args.hidden_size],
    }
    for key, shape in expected.items():
        found = list(stored.shape(key)) if key in stored else None
        if found != shape:
            raise CheckpointError(f"{start.folder} is of another shape: {key} is {found}, this run's is {shape}")
    has_head = "output_layer.weight" in stored
    if has_head != args.untie_embeddings_and_output_weights:
        raise CheckpointError(f"{start.folder} has {'an own' if has_head else 'a tied'} output layer, the flags differ")
    run = _run_of(start.folder)
    for name in ("rotary_base", "layernorm_epsilon"):  # no tensor shows these
        if run.get(name, identity[name]) != identity[name]:
            raise CheckpointError(
                f"{start.folder} was trained with {name} {run[name]}, this run has {identity[name]}; take the same "
                "config.json for both"
            )
    if args.fp8 and run.get("scale_fmt") is not None:
        name = "decoder.layers.0.self_attention.linear_qkv.weight"
        hf.refuse_mixed_formats(
            str(start.folder), name, stored.read(name), run["scale_fmt"], str(identity["scale_fmt"])
        )
    if start.resumes and run:
        found = run.get("optimizer")
        if found != identity["optimizer"]:
            raise CheckpointError(
                f"{start.folder} holds the state of the {found} optimizer, this run has the {identity['optimizer']} "
                f"one; start from its weights and masters instead: --pretrained-checkpoint {start.folder}"
            )
        _check_continued_rate(start, run, identity, updates)
        _check_same_order(start, run, identity)


def _check_continued_rate(start: Start, run: dict[str, Any], identity: dict[str, Any], updates: int) -> None:
    """The learning rate goes on where the parent, or this run so far, has it; and so do Adam's groups.

    Megatron finds the state of a group of parameters by the group's highest and lowest rate.
    """
    names = ("lr", "min_lr", "decoupled_lr", "decoupled_min_lr")
    wrong = [
        f"{name} was {run[name]}, is {identity[name]}"
        for name in names
        if run.get(name, identity[name]) != identity[name]
    ]
    if wrong:
        raise CheckpointError(
            f"{start.folder} holds Adam's state of a run with other learning rates ({'; '.join(wrong)}); keep "
            f"them, or begin a run at iteration 0 from its weights and masters: --pretrained-checkpoint {start.folder} "
            "and no --load of it"
        )
    if not run.keys() >= {"lr", "lr_decay_style", "train_iters"}:
        return
    iteration = int(start.folder.name.removeprefix("iter_"))
    before, after = (schedule.learning_rate(one, iteration * updates) for one in (run, identity))
    if not math.isclose(before, after, rel_tol=1e-9):
        raise CheckpointError(
            f"the learning rate would jump: at iteration {iteration} {start.folder.parent} has {before:.4g} "
            f"({schedule.described(run)}), this run {after:.4g} ({schedule.described(identity)}); start where both are "
            "equal, for a decay branch in the stable phase"
        )


def _check_same_order(start: Start, run: dict[str, Any], identity: dict[str, Any]) -> None:
    """A run that goes on with its parent's data sees what the parent would have seen; the order is of a length."""
    wanted, found = data_index(run), identity.get("data_index_iters")
    same = all(_with_hashes(run).get(name) == _with_hashes(identity).get(name) for name in ("data", "seed"))
    if found is not None and same and wanted != found:
        raise CheckpointError(
            f"the order of samples is made for {wanted} iterations in {start.folder.parent} and for {found} here: some "
            f"would be seen twice, others never; pass --data-index-iters {wanted} (a decay script: "
            f"PARENT_TRAIN_ITERS={wanted})"
        )


def _qkv_rows(args: Namespace) -> int:
    return (args.num_attention_heads + 2 * args.num_query_groups) * head_size(args)


# What this run is


def run_identity(args: Namespace, backend: str, scale_fmt: str) -> dict[str, Any]:
    """What fixes a run's results; a resume agrees with all of it, or is longer. Layout (TP, PP, DP) may change."""
    names = (
        "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups padded_vocab_size rotary_base "
        "layernorm_epsilon untie_embeddings_and_output_weights seq_length global_batch_size seed train_iters "
        "lr min_lr decoupled_lr decoupled_min_lr lr_decay_style lr_decay_iters lr_wsd_decay_style lr_wsd_decay_iters "
        "lr_warmup_iters lr_warmup_fraction lr_warmup_init weight_decay start_weight_decay end_weight_decay "
        "weight_decay_incr_style adam_beta1 adam_beta2 adam_eps clip_grad calculate_per_token_loss eod_mask_loss "
        "reset_position_ids reset_attention_mask attention_dropout hidden_dropout bf16 fp8 fp8_recipe "
        "first_last_layers_bf16"
    )
    return {
        **{name: getattr(args, name) for name in names.split()},
        "scale_fmt": scale_format_of_recipe(args.fp8_recipe, scale_fmt) if args.fp8 else None,
        "te_precision_config": _precision_by_module(args),
        "backend": backend,
        "optimizer": "distributed" if args.use_distributed_optimizer else "plain",
    }


def _precision_by_module(args: Namespace) -> str | None:
    """SHA-256 of --te-precision-config-file; None without it."""
    if args.te_precision_config_file is None:
        return None
    path = Path(args.te_precision_config_file)
    if not path.is_file():
        raise ValueError(f"--te-precision-config-file {path} does not exist; `infir2.precision fp8-mlp` prints one")
    return receipts.sha256_file(path)


def _refuse_another_run(save: Path, identity: dict[str, Any]) -> None:
    """The run.json in `save`, if any, is of this run, or of this run when it was to be shorter."""
    path = save / RUN_FILE
    if not path.is_file():
        if checkpoint.complete_iterations(save):
            raise ValueError(
                f"{save} holds checkpoints without a {RUN_FILE}: not this program's run; take another folder"
            )
        return
    found = _read_run_file(path)
    wrong = [
        f"{name} was {found[name]}, is {value}"
        for name, value in _with_hashes(identity).items()
        if name in found and not _agrees(name, _with_hashes(found)[name], value)
    ]
    if wrong:
        free = "" if checkpoint.complete_iterations(save) else f", or remove {path}: nothing is saved there"
        raise ValueError(f"{save} belongs to another run ({'; '.join(wrong)}); give this one another name{free}")


def _agrees(name: str, found: Any, wanted: Any) -> bool:
    if name in LENGTH and found is not None and wanted is not None:
        return wanted >= found
    return found == wanted or (name == "data_index_iters" and found is None)


def _with_hashes(run: dict[str, Any]) -> dict[str, Any]:
    """What run.json holds, with the data's hash for its path where a receipt has it, and so wherever it lies."""
    hashes = {**(run.get("data_manifests") or {}), **(run.get("prompt_data") or {})}

    def content(word: Any) -> Any:
        if isinstance(word, list):
            return [content(one) for one in word]
        if word in hashes:
            return f"{hashes[word]}/{Path(word).name}"
        return str(Path(word).resolve()) if isinstance(word, str) and "/" in word else word

    result = {name: value for name, value in run.items() if name != "data_manifests"}
    if "data" in run:
        result["data"] = {name: content(value) for name, value in run["data"].items()}
    if "sft_data" in run:
        result["sft_data"] = hashes.get(run["sft_data"], run["sft_data"])
    if "prompt_data" in run:
        result["prompt_data"] = list(run["prompt_data"].values())
    return result


def record(save: Path, identity: dict[str, Any], arithmetic: dict[str, Any], start: Start) -> None:
    """Write run.json: `identity`, `arithmetic` (what computes the results, which a later launch may change), and what
    a new run began from. Says what differs from the launch before. To be called when nothing refuses any more."""
    path = save / RUN_FILE
    found = _read_run_file(path) if path.is_file() else {"parent": _parent(start)}
    before = {**found.get("arithmetic", {}), **{name: found[name] for name in LENGTH if name in found}}
    now = {**arithmetic, **{name: identity[name] for name in LENGTH}}
    changed = [f"{name} was {before[name]}, is {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
    if changed:
        print(f"[infir2] unlike this run's last launch: {'; '.join(changed)}", flush=True)
    save.mkdir(parents=True, exist_ok=True)
    parent = found.pop("parent", None)
    files.write_text(path, json.dumps(found | identity | {"arithmetic": arithmetic, "parent": parent}, indent=1) + "\n")


def _parent(start: Start) -> dict[str, Any] | None:
    """The checkpoint that a run began from: its folder, and a SHA-256 over its metadata, the names and sizes of its
    files, and its run.json. (Not over its tensors: those of a 7B model with Adam's state are 100 GB.)"""
    if start.folder is None:
        return None
    run = start.folder.parent / RUN_FILE
    digest = hashlib.sha256(run.read_bytes() if run.is_file() else b"")
    for file in sorted(start.folder.iterdir()):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        if file.suffix != ".distcp":
            digest.update(file.read_bytes())
    return {"folder": str(start.folder), "sha256": digest.hexdigest()}


def _check_disk(args: Namespace) -> None:
    """Room for one checkpoint: 14 bytes a parameter (BF16 weight, FP32 master and two moments), 12 without BF16."""
    existing = next(path for path in (Path(args.save).absolute(), *Path(args.save).absolute().parents) if path.exists())
    layer = args.hidden_size * (_qkv_rows(args) + 3 * args.ffn_hidden_size + args.num_attention_heads * head_size(args))
    heads = 2 if args.untie_embeddings_and_output_weights else 1
    parameters = args.num_layers * layer + heads * args.padded_vocab_size * args.hidden_size
    needed = parameters * (14 if args.bf16 else 12)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(f"{existing} has {free / 1e9:.1f} GB free, one checkpoint takes {needed / 1e9:.1f} GB")
