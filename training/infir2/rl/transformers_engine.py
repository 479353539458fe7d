"""Rollouts without a server: a transformers model in this process, for CPUs and for small models.

The same model, weights and sampling as an SGLang server would have, one batch of requests at a time. In FP8 it holds
the trainer's own codes and scales, and quantises each linear layer's input, a tile of 128 values at a time, as the
trainer's forward does.

A token is drawn with a number that follows from its request's seed and its place, not from which requests share the
batch.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from infir2 import cpu_kernels, fp8, hf
from infir2.rl.rollout import Request, Response, Sampling
from infir2.stop_tokens import stop_tokens as end_tokens

logger = logging.getLogger(__name__)


class Fp8Linear(nn.Module):
    """A linear layer on block FP8 weights: codes [N, K] and scales [N / 128, K / 128], multiplied as training does."""

    def __init__(self, linear: nn.Linear, scale_fmt: str) -> None:
        super().__init__()
        blocks = fp8.scale_shape(tuple(linear.weight.shape), fp8.BLOCK)
        self.register_buffer("weight", torch.zeros(linear.weight.shape, dtype=torch.float8_e4m3fn))
        self.register_buffer("weight_scale_inv", torch.ones(blocks))
        self.bias, self.scale_fmt = linear.bias, scale_fmt
        self.decoded = torch.zeros(())

    def decode(self) -> None:
        """To be called when codes or scales have changed. A code times a power of two is exact in BF16."""
        dtype = torch.bfloat16 if self.scale_fmt == "pow2" else torch.float32
        self.decoded = fp8.dequantize(self.weight, self.weight_scale_inv, fp8.BLOCK, dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows = fp8.fake_quantize(x.flatten(0, -2), fp8.ROW, scale_fmt=self.scale_fmt)
        y = (rows.to(self.decoded.dtype) @ self.decoded.t()).to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def to_bytes(tensor: Tensor) -> np.ndarray:
    """A tensor's bytes, uint8, flat. Megatron makes torch's own pickling refuse what Ray does with tensors."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def from_bytes(data: np.ndarray, like: Tensor) -> Tensor:
    """A tensor of the type and shape of `like`. ValueError for another number of bytes."""
    if data.nbytes != like.nbytes:
        raise ValueError(f"{data.nbytes} bytes for a tensor of {like.dtype} {tuple(like.shape)}, {like.nbytes} bytes")
    return torch.from_numpy(data.copy()).view(like.dtype).view(like.shape)


def digest(tensor: Tensor) -> str:
    """Of a tensor's bytes (xxh3, 128 bits)."""
    return xxhash.xxh3_128_hexdigest(to_bytes(tensor))


class TransformersEngine:
    """Generates with the Qwen2 model of a Hugging Face folder; its weights are those of the last `load`.

    folder: in BF16, or in block FP8, which makes an FP8 engine. Refuses (ValueError) FP8 with other scales than
    `scale_fmt`, and a folder whose chat template ends a turn with a token that it does not name as a stop token.
    """

    def __init__(self, folder: Path | str, scale_fmt: str, batch: int = 256) -> None:
        cpu_kernels.install_for_generation()
        config = AutoConfig.from_pretrained(folder)
        self.precision, quantization = "bf16", getattr(config, "quantization_config", None)
        if quantization is not None:
            found = hf.scale_format_of(config.to_dict())
            if found != scale_fmt:
                raise ValueError(f"{folder} has {found} scales, training has {scale_fmt}; cast the model again")
            self.precision = "fp8"
            del config.quantization_config
        self.batch, self.vocab = batch, config.vocab_size
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        self.end = end_tokens(folder)
        if self.precision == "fp8":
            self._quantise_linears(scale_fmt)

    def _quantise_linears(self, scale_fmt: str) -> None:
        for name, module in list(self.model.named_modules()):
            if isinstance(module, nn.Linear) and hf.is_fp8_linear(f"{name}.weight"):
                parent, _, last = name.rpartition(".")
                setattr(self.model.get_submodule(parent), last, Fp8Linear(module, scale_fmt))

    # Weights

    def _held(self) -> dict[str, Tensor]:
        tied = getattr(self.model.config, "tie_word_embeddings", False)
        state = self.model.state_dict()
        return {name: tensor for name, tensor in state.items() if not (tied and name == "lm_head.weight")}

    def load(self, tensors: dict[str, np.ndarray]) -> None:
        """Replace every weight by these bytes. ValueError unless they are the engine's tensors, by name and size."""
        held = self._held()
        if wrong := held.keys() ^ tensors.keys():
            raise ValueError(f"trainer and {self.precision} engine do not have the same tensors: {sorted(wrong)[:4]}")
        for name, data in tensors.items():
            held[name].copy_(from_bytes(data, held[name]))
        for module in self.model.modules():
            if isinstance(module, Fp8Linear):
                module.decode()

    def digests(self) -> dict[str, str]:
        """Of the weights that it generates with, by name."""
        return {name: digest(tensor) for name, tensor in self._held().items()}

    # Generation

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        """All of the requests, `batch` at a time; in their order."""
        responses = []
        starts = range(0, len(requests), self.batch)
        for start in tqdm(starts, desc="generating", disable=len(starts) < 4 or None, leave=False):
            responses += _Batch(self.model, requests[start : start + self.batch], sampling, self.end).run()
        return responses


class _Batch:
    """Requests that are generated together, prompts padded on the left."""

    def __init__(self, model, requests: Sequence[Request], sampling: Sampling, end: set[int]) -> None:
        self.model, self.requests, self.sampling = model, requests, sampling
        self.end = torch.tensor(sorted(end))
        self.room = torch.tensor([request.max_new_tokens for request in requests])
        self.seeds = np.array([request.seed for request in requests], dtype=np.uint64)
        self.tokens: list[Tensor] = []  # one for each place, [requests], of the rows that were active then
        self.logprobs: list[Tensor] = []
        self.rows: list[Tensor] = []

    def run(self) -> list[Response]:
        longest = max(len(request.tokens) for request in self.requests)
        padding = [longest - len(request.tokens) for request in self.requests]
        ids = torch.tensor([[0] * pad + request.tokens for pad, request in zip(padding, self.requests, strict=True)])
        mask = (torch.arange(longest) >= torch.tensor(padding)[:, None]).long()
        cache, rows = DynamicCache(), torch.arange(len(self.requests))
        finished = self.room <= 0
        while not finished.all():
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            output = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
            )
            token, logprob = self._draw(output.logits[:, -1].float(), rows)
            active = ~finished[rows]
            self.tokens.append(token[active])
            self.logprobs.append(logprob[active])
            self.rows.append(rows[active])
            finished[rows] |= torch.isin(token, self.end) | (self.room[rows] <= len(self.tokens))
            still = ~finished[rows]
            if still.any() and still.sum() <= len(rows) // 2:  # leave out the rows that are done
                chosen = still.nonzero()[:, 0]
                cache.batch_select_indices(chosen)
                rows, mask, token = rows[chosen], mask[chosen], token[chosen]
            ids = token[:, None]
            mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=mask.dtype)], dim=1)
        return self._responses()

    def _draw(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """A token for each row, and its log-probability at the temperature before top-p and top-k."""
        if self.sampling.temperature == 0:
            logprobs = torch.log_softmax(logits, dim=-1)
            token = logits.argmax(dim=-1)
        else:
            logprobs = torch.log_softmax(logits / self.sampling.temperature, dim=-1)
            places = [request_place(self.requests[i], len(self.tokens)) for i in rows.tolist()]
            uniform = torch.from_numpy(uniforms(self.seeds[rows.numpy()], np.array(places, dtype=np.uint64)))
            token = inverse_cdf(restricted(logprobs.double().exp(), self.sampling), uniform)
        return token, logprobs.gather(1, token[:, None])[:, 0]

    def _responses(self) -> list[Response]:
        if not self.rows:
            return [Response(request.id, [], [], "length") for request in self.requests]
        rows = torch.cat(self.rows)
        order = torch.argsort(rows, stable=True)
        counts = torch.bincount(rows, minlength=len(self.requests)).tolist()
        tokens = torch.cat(self.tokens)[order].split(counts)
        logprobs = torch.cat(self.logprobs)[order].split(counts)
        end = set(self.end.tolist())
        return [
            Response(r.id, t.tolist(), p.tolist(), "stop" if len(t) and int(t[-1]) in end else "length")
            for r, t, p in zip(self.requests, tokens, logprobs, strict=True)
        ]


def request_place(request: Request, drawn: int) -> int:
    """Where in its whole text the request's next token stands."""
    return len(request.tokens) + drawn


def uniforms(seeds: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), float64, one for each seed and place (uint64): SplitMix64 (Steele et al. 2014), twice."""
    with np.errstate(over="ignore"):
        x = _mix(_mix(seeds) + places)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def restricted(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities, [rows, vocabulary], with those left out that top-k and top-p leave out; not normalised again."""
    if 0 < sampling.top_k < probabilities.shape[1]:
        smallest = probabilities.topk(sampling.top_k, dim=-1).values[:, -1:]
        probabilities = torch.where(probabilities >= smallest, probabilities, 0.0)
    if sampling.top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        ordered = torch.where(before < sampling.top_p, ordered, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(1, index, ordered)
    return probabilities


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """For each row of weights, float64 [rows, vocabulary], the index at which their running sum passes
    `uniform` [rows] of their total; int64 [rows]. An index of weight 0 is never chosen."""
    running = weights.cumsum(dim=-1)
    target = (uniform * running[:, -1])[:, None]
    return torch.searchsorted(running, target, right=True)[:, 0].clamp(max=weights.shape[1] - 1)
