"""A small model as a trainer sends it, and as the ranks of an SGLang engine hold it."""

from types import SimpleNamespace

import torch
from torch import nn

from infir2 import hf
from infir2.qwen2 import Shape

TOKENS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD = 96, 256, 512, 4, 2, 128
SHAPE = Shape(2, HIDDEN, FFN, HEADS, KV_HEADS, HEAD, TOKENS, True, 1e6, 1e-6, 512)


def trained(seed: int, fp8: bool = True) -> dict[str, torch.Tensor]:
    """A trainer's tensors, as it sends them."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for name, size in hf.qwen2_tensors(SHAPE).items():
        weight = torch.randn(size, generator=random).to(torch.bfloat16)
        found |= hf.fp8_tensors(name, weight, "pow2") if fp8 else {name: weight}
    return found


class Rank(nn.Module):
    """A rank of an SGLang model: its modules' names and attributes, and a loader that cuts by the whole tensor's
    shape. Contents begin as garbage."""

    def __init__(self, rank: int, size: int, kv_heads: int = KV_HEADS, fp8: bool = True) -> None:
        super().__init__()
        self.rank, self.size, self.fp8 = rank, size, fp8
        replicas = max(1, size // kv_heads)
        own = max(1, kv_heads // size)
        self.q, self.k, self.own_kv = HEADS // size * HEAD, own * HEAD, rank // replicas
        heads = {"num_heads": HEADS // size, "num_kv_heads": own, "total_num_kv_heads": kv_heads, "head_size": HEAD}
        heads |= {"num_kv_head_replicas": replicas}
        rows = 64 if size > 1 else 128  # SGLang pads the vocabulary to multiples of 64 on each rank
        first, end = min(rank * rows, TOKENS), min((rank + 1) * rows, TOKENS)
        self.vocabulary = (first, end)
        self.model = nn.Module()
        indices = SimpleNamespace(org_vocab_start_index=first, org_vocab_end_index=end)
        self.model.embed_tokens = self._part((rows, HIDDEN), False, org_vocab_size=TOKENS, shard_indices=indices)
        self.lm_head = self.model.embed_tokens
        self.model.layers = nn.ModuleList(nn.Module() for _ in range(SHAPE.layers))
        for layer in self.model.layers:
            layer.input_layernorm = self._part((HIDDEN,), False)
            layer.post_attention_layernorm = self._part((HIDDEN,), False)
            layer.self_attn, layer.mlp = nn.Module(), nn.Module()
            merged = self._part((self.q + 2 * self.k, HIDDEN), fp8, bias=True, **heads)
            layer.self_attn.qkv_proj = merged
            layer.self_attn.o_proj = self._part((HIDDEN, HEADS * HEAD // size), fp8)
            layer.self_attn.attn = nn.Module()
            layer.self_attn.attn.k_scale = nn.Parameter(torch.tensor(float("nan")), requires_grad=False)
            layer.self_attn.attn.k_scale_float = 1.0
            layer.mlp.gate_up_proj = self._part((2 * FFN // size, HIDDEN), fp8, output_sizes=[FFN, FFN])
            layer.mlp.down_proj = self._part((HIDDEN, FFN // size), fp8)
        self.model.norm = self._part((HIDDEN,), False)

    def _part(self, shape: tuple[int, ...], fp8: bool, bias: bool = False, **attributes) -> nn.Module:
        module = nn.Module()
        dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
        module.weight = nn.Parameter(torch.full(shape, 3.0).to(dtype), requires_grad=False)
        if fp8:
            blocks = tuple(-(-n // 128) for n in shape)
            module.weight_scale_inv = nn.Parameter(torch.full(blocks, 3.0), requires_grad=False)
        if bias:
            module.bias = nn.Parameter(torch.full(shape[:1], 3.0, dtype=torch.bfloat16), requires_grad=False)
        sizes = {"tp_rank": self.rank, "tp_size": self.size, "output_size_per_partition": shape[0]}
        for name, value in (sizes | attributes).items():
            setattr(module, name, value)
        return module

    def load_weights(self, tensors) -> None:
        parameters = dict(self.named_parameters())
        for name, tensor in tensors:
            target, mine = self._place(name, tensor)
            parameter = parameters[target[0]]
            parameter[target[1] : target[1] + len(mine)] = mine

    def _place(self, name: str, tensor: torch.Tensor) -> tuple[tuple[str, int], torch.Tensor]:
        unit = 128 if name.endswith("_scale_inv") else 1
        if "embed_tokens" in name:
            return (name, 0), tensor[slice(*self.vocabulary)]
        for part, offset in (("q", 0), ("k", self.q), ("v", self.q + self.k)):
            if f"{part}_proj" in name:
                count = (self.q if part == "q" else self.k) // unit
                number = self.rank if part == "q" else self.own_kv
                own = tensor[number * count : (number + 1) * count]
                return (name.replace(f"{part}_proj", "qkv_proj"), offset // unit), own
        for part, place in (("gate", 0), ("up", 1)):
            if f"{part}_proj" in name:
                count = FFN // self.size // unit
                own = tensor[self.rank * count : (self.rank + 1) * count]
                return (name.replace(f"{part}_proj", "gate_up_proj"), place * count), own
        if "o_proj" in name or "down_proj" in name:
            return (name, 0), tensor.chunk(self.size, 1)[self.rank]
        return (name, 0), tensor


def drop(tensors):
    return {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name}
