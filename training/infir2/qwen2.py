"""The Qwen2 architecture: its Hugging Face `config.json`, Megatron's flags for it, and the map between their tensors.

`python -m infir2.qwen2 DIR` prints the flags that fix the shape of the network, one a line: scripts never retype them.

Tensors. Hugging Face keeps q, k, v and gate, up apart. Megatron keeps one `linear_qkv`, whose rows are interleaved by
KV group (the group's query heads, its key head, its value head), and one `linear_fc1`, gate above up. At tensor
parallelism 1 the map only splits, joins and reorders rows, so it is exact in every dtype, both ways.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # printing flags must not wait for torch
    from torch import Tensor

ARCHITECTURE = "Qwen2ForCausalLM"
BLOCK = 128


@dataclass(frozen=True)
class Shape:
    """What fixes a Qwen2 network. Sizes in elements, `rope_base` and `norm_eps` as in config.json."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    tied: bool
    rope_base: float
    norm_eps: float
    max_positions: int

    @classmethod
    def from_config(cls, config: dict, where: Path | str = "config.json") -> Shape:
        """From a Hugging Face config.json, which refusals call `where`. Another architecture, a field that is missing
        or no number, or a variant that Megatron would not compute, is a ValueError."""
        architectures, kind = config.get("architectures"), config.get("model_type")
        if architectures not in ([ARCHITECTURE], None) or (architectures is None and kind != "qwen2"):
            raise ValueError(f"{where} has architectures {architectures or kind}; this tool knows: {ARCHITECTURE}")
        if kind not in ("qwen2", None):
            raise ValueError(f"{where} has model_type {kind!r} and architectures {architectures}, which do not fit")
        if missing := [name for name in _SIZES if config.get(name) is None]:
            raise ValueError(f"{where} lacks {missing[0]!r}, which a Qwen2 model needs")
        _refuse_other_computation(config, where)
        sizes = {name: _size(config, name, where) for name in _SIZES}
        heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
        if heads % sizes["num_key_value_heads"]:
            raise ValueError(f"{where}: {heads} heads are no multiple of {sizes['num_key_value_heads']} KV heads")
        if config.get("head_dim") is None and hidden % heads:
            raise ValueError(f"{where}: hidden_size {hidden} is no multiple of {heads} heads; set head_dim")
        return cls(
            layers=sizes["num_hidden_layers"],
            hidden=hidden,
            ffn=sizes["intermediate_size"],
            heads=heads,
            kv_heads=sizes["num_key_value_heads"],
            head_size=hidden // heads if config.get("head_dim") is None else _size(config, "head_dim", where),
            vocab=sizes["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            rope_base=_rope_base(config, where),
            norm_eps=_number(config, "rms_norm_eps", where),
            max_positions=sizes["max_position_embeddings"],
        )

    @classmethod
    def from_folder(cls, folder: Path | str) -> Shape:
        """From a Hugging Face folder. FileNotFoundError names the config.json that is missing."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; expected a Hugging Face model folder")
        try:
            config = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as JSON: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path} holds JSON of type {type(config).__name__}; expected an object")
        return cls.from_config(config, path)

    def megatron_arguments(self) -> dict[str, object]:
        """Megatron's names of arguments (attributes after parsing) with the values that this shape fixes."""
        return {
            "num_layers": self.layers,
            "hidden_size": self.hidden,
            "ffn_hidden_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_query_groups": self.kv_heads,
            "kv_channels": self.head_size,
            "vocab_size": self.vocab,
            "padded_vocab_size": self.vocab,  # one height in every stage; Megatron would pad it by TP
            "rotary_base": int(self.rope_base),
            "layernorm_epsilon": self.norm_eps,
            "untie_embeddings_and_output_weights": not self.tied,
        }

    def refuse_fp8(self, tensor_parallel: int = 1) -> None:
        """ValueError where a block of 128 would cross a boundary: the 128 rule of docs/numerics.md."""
        tp = tensor_parallel
        sizes = {
            "hidden size": self.hidden,
            "head size": self.head_size,
            "rows of q on each tensor-parallel rank": self.heads * self.head_size // tp,
            "rows of k and v on each tensor-parallel rank": self.kv_heads * self.head_size // tp,
            "ffn size on each tensor-parallel rank": self.ffn // tp,
        }
        for what, size in sizes.items():
            if size % BLOCK:
                raise ValueError(
                    f"FP8 needs multiples of {BLOCK}: the {what} is {size} (TP {tp}); use another TP or BF16"
                )


_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
# Fields besides Shape's that say how the network computes, and the values that mean what Megatron does.
_FIXED = {
    "hidden_act": ("silu", "swish"),
    "rms_norm_eps": None,  # None: read, or no part of the computation
    "rope_theta": None,
    "rope_scaling": None,
    "rope_parameters": None,
    "tie_word_embeddings": (True, False),
    "use_sliding_window": (False,),
    "sliding_window": None,
    "max_window_layers": None,
    "attention_bias": (True,),  # of q, k and v
    "qkv_bias": (True,),
    "pre_norm": (True,),
    "num_kv_shared_layers": (0,),
    "is_causal": (True,),
    "output_attentions": None,
    "attn_implementation": None,
    "_attn_implementation": None,
    "_attn_implementation_autoset": None,
    "use_flash_attn": None,
    "use_flash_attention": None,
    "head_dim": None,
    "num_attention_heads": None,
}
# A field with such a name, which no Qwen2 has, is a variant's: factors of muP, caps of logits, experts, other norms.
_VARIANT = re.compile(
    "scale|scaling|scalar|multiplier|factor|alpha|softcap|norm|rope|rotary|attn|attention|window|bias|dropout|layerdrop|"
    "(^|_)act(_|$)|activation|expert|moe|mup|alibi|sink|residual|logit|mtp|nextn|dim_model|depth|width|gate|gating|"
    "causal|mlp|auto_map|clip|lora|pruned|shared|encoder_decoder"
)


def _refuse_other_computation(config: dict, where: Path | str) -> None:
    """ValueError for a field by which the network would compute something else than Megatron does for `Shape`."""
    for name, value in config.items():
        known = name in _FIXED
        allowed = _FIXED.get(name)
        if name == "layer_types":
            right = value is None or (isinstance(value, list) and all(kind == "full_attention" for kind in value))
        elif known:
            right = allowed is None or value is None or value in allowed
        else:
            right = not _VARIANT.search(name) or _is_neutral(value)
        if not right:
            meant = f"; only {' or '.join(map(repr, allowed))} is supported" if allowed else ", which is not supported"
            raise ValueError(f"{where} has {name} {value!r:.80}{meant}: this recipe would compute another network")


def _is_neutral(value: object) -> bool:
    """Whether a factor, a size or a switch of a variant has no effect: absent, off, 0 of them, or times 1."""
    return value is None or value is False or (value is not True and value in (0, 1)) or value in ("", [], {})


def _rope_base(config: dict, where: Path | str) -> float:
    """RoPE's base, a whole number as Megatron's --rotary-base. Scaled RoPE, and two different bases, are refused."""
    found = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name) or {}
        if not isinstance(rope, dict) or not all(map(_is_plain_rope, rope, rope.values())):
            raise ValueError(f"{where}: RoPE scaling is not supported; found {name} {rope}")
        if rope.get("rope_theta") is not None:
            found[f"{name}.rope_theta"] = rope["rope_theta"]
    bases = {name: _number({name: value}, name, where) for name, value in found.items()} or {"default": 10000.0}
    if len(set(bases.values())) > 1:
        raise ValueError(f"{where} names two bases of RoPE: {bases}")
    base = next(iter(bases.values()))
    if base != int(base):
        raise ValueError(f"{where} has a RoPE base of {base}; Megatron knows whole numbers only")
    return base


def _is_plain_rope(name: str, value: object) -> bool:
    return name == "rope_theta" or _is_neutral(value) or (name in ("rope_type", "type") and value == "default")


def _size(config: dict, name: str, where: Path | str) -> int:
    value = config[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where} has {name} {value!r:.80}; expected a positive whole number")
    return value


def _number(config: dict, name: str, where: Path | str) -> float:
    value = config.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{where} has {name} {value!r:.80}; expected a positive number")
    return value


def megatron_flags(shape: Shape) -> list[str]:
    """Megatron's command-line flags for `shape`, Qwen2's fixed choices included."""
    words = ["--swiglu", "--normalization", "RMSNorm", "--disable-bias-linear", "--add-qkv-bias"]
    words += ["--position-embedding-type", "rope", "--group-query-attention"]
    words += ["--attention-dropout", "0.0", "--hidden-dropout", "0.0"]  # Megatron's own default is 0.1
    for name, value in shape.megatron_arguments().items():
        flag = "--norm-epsilon" if name == "layernorm_epsilon" else "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif value is not False:
            words += [flag, str(value)]
    return words


@dataclass(frozen=True)
class Entry:
    """One Megatron tensor and the Hugging Face tensors it holds.

    `join` makes the Megatron tensor from the others, in order; `split` is its inverse.
    """

    megatron: str
    hf: tuple[str, ...]
    join: Callable[..., Tensor]
    split: Callable[[Tensor], tuple[Tensor, ...]]


def entries(shape: Shape) -> Iterator[Entry]:
    """Every tensor of the model, in the order of the network. A tied head has no entry: it is the embedding."""
    yield _same("embedding.word_embeddings.weight", "model.embed_tokens.weight")
    for i in range(shape.layers):
        yield from _layer_entries(shape, f"decoder.layers.{i}.", f"model.layers.{i}.")
    yield _same("decoder.final_layernorm.weight", "model.norm.weight")
    if not shape.tied:
        yield _same("output_layer.weight", "lm_head.weight")


def _layer_entries(shape: Shape, megatron: str, hf: str) -> Iterator[Entry]:
    attention = hf + "self_attn."
    yield _same(megatron + "self_attention.linear_qkv.layer_norm_weight", hf + "input_layernorm.weight")
    for kind in ("weight", "bias"):
        names = tuple(f"{attention}{x}_proj.{kind}" for x in "qkv")
        yield Entry(f"{megatron}self_attention.linear_qkv.{kind}", names, *_qkv(shape))
    yield _same(megatron + "self_attention.linear_proj.weight", attention + "o_proj.weight")
    yield _same(megatron + "mlp.linear_fc1.layer_norm_weight", hf + "post_attention_layernorm.weight")
    gate_up = (hf + "mlp.gate_proj.weight", hf + "mlp.up_proj.weight")
    yield Entry(megatron + "mlp.linear_fc1.weight", gate_up, _stack, lambda w: w.chunk(2))
    yield _same(megatron + "mlp.linear_fc2.weight", hf + "mlp.down_proj.weight")


def _same(megatron: str, hf: str) -> Entry:
    return Entry(megatron, (hf,), lambda w: w, lambda w: (w,))


def shard(shape: Shape, tensor_parallel: int) -> Shape:
    """The shape of what one tensor-parallel rank holds: `entries` of it split that rank's tensors."""
    parts = {name: getattr(shape, name) // tensor_parallel for name in ("ffn", "heads", "kv_heads", "vocab")}
    return replace(shape, **parts)


def sharded_dimension(hf: str) -> int | None:
    """The dimension along which tensor parallelism cuts a Hugging Face tensor (or its scales); None where it does not:
    norms, and nothing else. Rows of q, k, v, gate, up and the vocabulary; columns of o and down."""
    if "norm" in hf:
        return None
    return 1 if re.search(r"\.(o|down)_proj\.weight", hf) else 0


def _stack(*parts: Tensor, dim: int = 0) -> Tensor:
    import torch

    return torch.cat(parts, dim)


def _qkv(shape: Shape) -> tuple[Callable[..., Tensor], Callable[[Tensor], tuple[Tensor, ...]]]:
    groups, d = shape.kv_heads, shape.head_size
    rows = [shape.heads // groups * d, d, d]  # of q, k, v in one group

    def join(*qkv: Tensor) -> Tensor:
        parts = [t.reshape(groups, n, *t.shape[1:]) for t, n in zip(qkv, rows, strict=True)]
        return _stack(*parts, dim=1).flatten(0, 1)

    def split(fused: Tensor) -> tuple[Tensor, ...]:
        parts = fused.reshape(groups, sum(rows), *fused.shape[1:]).split(rows, dim=1)
        return tuple(t.flatten(0, 1).contiguous() for t in parts)

    return join, split


# Sizes that a script can insist on, so that the numbers of one model are not run on another: (layers, hidden size).
SIZES = {"Qwen2.5-1.5B": (28, 1536), "Qwen2.5-7B": (28, 3584), "smollm2-135m": (30, 640), "tiny": (3, 128)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the Megatron flags that a Qwen2 model folder fixes.")
    parser.add_argument("folder", type=Path, help="Hugging Face folder with a config.json")
    parser.add_argument("--expect", choices=SIZES, help="refuse a model of another size")
    args = parser.parse_args()
    try:
        shape = Shape.from_folder(args.folder)
        expected = SIZES.get(args.expect, (shape.layers, shape.hidden))
        if expected != (shape.layers, shape.hidden):
            raise ValueError(
                f"{args.folder} has {shape.layers} layers of hidden size {shape.hidden}; {args.expect} has "
                f"{expected[0]} of {expected[1]}"
            )
        print(*megatron_flags(shape), sep="\n")
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
