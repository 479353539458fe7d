"""What is checked before training: everything that can be known then and would spoil or lose a run.

`check` reads Megatron's parsed arguments and refuses by a ValueError that says what was wrong, what was found and what
to do. It decides where the run starts (its own checkpoint, a parent's, the base's weights) and writes `run.json` beside
the checkpoints: what fixes this run's results. Another run's folder is refused by that file.
"""

import hashlib
import json
import re
import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infir2 import checkpoint, files, hf, receipts
from infir2.checkpoint import CheckpointError, TorchDist
from infir2.indexed import IndexedReader
from infir2.precision import scale_format_of_recipe
from infir2.qwen2 import Shape

if TYPE_CHECKING:
    from infir2.engine import Stage

RUN_FILE = "run.json"
FP8_TOKENS = 128


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


def check(args: Namespace, stage: "Stage", backend: str, scale_fmt: str) -> Start:
    """Check `args` on rank 0, before process groups exist. Says what the run starts from and writes `run.json`."""
    shape = _check_model(args)
    if args.fp8 is not None:
        _check_fp8(args, shape, stage.tokens_per_micro_batch(args))
    _check_parallelism(args)
    identity = {"stage": stage.name, **run_identity(args, backend, scale_fmt), **stage.data(args)}
    start = choose_start(args)
    if start.folder is not None:
        _check_start(args, start, identity)
    if args.save is not None:
        _check_disk(args)
        _record(Path(args.save), identity, start)
    print(f"[infir2] starting from {start}", flush=True)
    return start


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
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    ids = [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer.get("added_tokens", ()))]
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
        head_size=args.kv_channels or args.hidden_size // args.num_attention_heads,
        vocab=args.padded_vocab_size,
        tied=not args.untie_embeddings_and_output_weights,
        rope_base=args.rotary_base,
        norm_eps=args.layernorm_epsilon,
        max_positions=args.max_position_embeddings,
    )


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
        hashes[str(prefix)] = receipts.sha256_file(manifest)
    return hashes


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


# Where the run starts


def choose_start(args: Namespace) -> Start:
    """Decide what is loaded, and set `args` so that Megatron loads it.

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
    if args.pretrained_checkpoint is not None:
        args.pretrained_checkpoint = _split_iteration(args, args.pretrained_checkpoint)
        return Start(_iteration(Path(args.pretrained_checkpoint), args.ckpt_step), resumes=False)
    if args.load is not None and not _same(args.load, own):
        raise CheckpointError(f"--load {args.load} holds no checkpoint: {checkpoint.TRACKER} is missing or empty")
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


def _check_start(args: Namespace, start: Start, identity: dict[str, Any]) -> None:
    """The checkpoint that will be loaded is whole and fits this run."""
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
    parent = start.folder.parent / RUN_FILE
    run = json.loads(parent.read_text()) if parent.is_file() else {}
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


def _qkv_rows(args: Namespace) -> int:
    head_size = args.kv_channels or args.hidden_size // args.num_attention_heads
    return (args.num_attention_heads + 2 * args.num_query_groups) * head_size


# What this run is


def run_identity(args: Namespace, backend: str, scale_fmt: str) -> dict[str, Any]:
    """What fixes a run's results; a resume must agree with all of it. Layout (TP, PP, DP) may change."""
    names = (
        "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups padded_vocab_size rotary_base "
        "layernorm_epsilon untie_embeddings_and_output_weights seq_length global_batch_size seed train_iters "
        "lr min_lr lr_decay_style lr_wsd_decay_style lr_wsd_decay_iters lr_warmup_iters lr_warmup_fraction "
        "weight_decay adam_beta1 adam_beta2 clip_grad bf16 fp8 fp8_recipe first_last_layers_bf16"
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


def _record(save: Path, identity: dict[str, Any], start: Start) -> None:
    """Write run.json, or compare with the one that is there. A new one also says what the run began from."""
    identity = json.loads(json.dumps(identity))
    path = save / RUN_FILE
    if path.is_file():
        found = json.loads(path.read_text())
        wrong = [name for name in identity if found.get(name) != identity[name]]
        if wrong:
            lines = "; ".join(f"{name} was {found.get(name)}, is {identity[name]}" for name in wrong)
            raise ValueError(f"{save} belongs to another run ({lines}); give this one another name")
        return
    if checkpoint.complete_iterations(save):
        raise ValueError(f"{save} holds checkpoints without a {RUN_FILE}: not this program's run; take another folder")
    save.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(identity | {"parent": _parent(start)}, indent=1) + "\n")


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
    layer = args.hidden_size * (
        _qkv_rows(args) + 3 * args.ffn_hidden_size + args.num_attention_heads * args.kv_channels
    )
    heads = 2 if args.untie_embeddings_and_output_weights else 1
    parameters = args.num_layers * layer + heads * args.padded_vocab_size * args.hidden_size
    needed = parameters * (14 if args.bf16 else 12)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(f"{existing} has {free / 1e9:.1f} GB free, one checkpoint takes {needed / 1e9:.1f} GB")
