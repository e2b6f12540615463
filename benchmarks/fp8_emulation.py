"""FP8 recipes as arithmetic on any device, for study: how far is a model in FP8 from itself, before a GPU is rented?

Round the linear layers of a local model: both operands of all three matrix products (output, gradient of the input,
gradient of the weight) are rounded to float8 and back with the recipe's scales; products are fp32, as the hardware
accumulates them, and come out in the input's dtype. What a GPU does besides (order of sums, fused kernels) is not here.

Shapes: T tokens, N rows of a weight, K columns. A product runs over the last dimension of its operands as they lie
here (output, over K), or over the first (the weight's gradient, over T; the input's, over N): blocks lie along it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from oreal_megatron.config import Fp8ModelConfig

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_SMALLEST_AMAX = 1e-12


def rounded(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32: what `x * scale` is in float8, over scale. Beyond the largest number it is that number, as in the hardware:
    torch's own cast makes e5m2 infinite there on some versions."""
    largest = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-largest, largest).to(dtype).float() / scale


def scale_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32: what brings `amax` to the largest float8. In fp64 first, so that compilers cannot change the last bit."""
    return (torch.finfo(dtype).max / amax.double().clamp_min(_SMALLEST_AMAX)).float()


def power_of_two(exponent: Tensor) -> Tensor:
    """fp32, exact."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


class Quantizer(ABC):
    """Rounds one operand of one layer: its input, its weight, or its output's gradient."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    @abstractmethod
    def both(self, x: Tensor, *, learn: bool) -> tuple[Tensor, Tensor]:
        """x [rows, columns] for products over its columns, and for those over its rows; fp32.

        learn: whether this pass may change what later passes use.
        """


class Tensorwise(Quantizer):
    """One scale a tensor, from the tensor."""

    def both(self, x: Tensor, *, learn: bool) -> tuple[Tensor, Tensor]:
        q = rounded(x, scale_of(x.abs().amax(), self.dtype), self.dtype)
        return q, q


class Delayed(Quantizer):
    """One scale a tensor, from the largest values of the passes before: 1 in the first, and too small after a jump."""

    def __init__(self, dtype: torch.dtype, history: int):
        super().__init__(dtype)
        self.amax_history = torch.zeros(history)

    def both(self, x: Tensor, *, learn: bool) -> tuple[Tensor, Tensor]:
        amax = self.amax_history.max()
        q = rounded(x, scale_of(amax, self.dtype) if amax > 0 else torch.ones(()), self.dtype)
        if learn:
            self.amax_history = torch.cat([x.detach().abs().amax().float().cpu()[None], self.amax_history[:-1]])
        return q, q


class Blockwise(Quantizer):
    """One power of two a block of 1 x 128 along the product, or of 128 x 128 for weights.

    What does not fill a block is padded with zeros here; Transformer Engine has no kernels for it: a run is refused.
    """

    def __init__(self, dtype: torch.dtype, rows: int):
        """rows: 1 or 128."""
        super().__init__(dtype)
        self.rows = rows

    def both(self, x: Tensor, *, learn: bool) -> tuple[Tensor, Tensor]:
        along = self._rounded(x)
        return along, along if self.rows == 128 else self._rounded(x.t()).t()

    def _rounded(self, x: Tensor) -> Tensor:
        blocks = in_blocks(x, self.rows, 128)
        amax = blocks.abs().amax((1, 3), keepdim=True).float()
        # The largest power of two that keeps every number in range; of a block of zeros any will do.
        _, exponent = torch.frexp(scale_of(amax, self.dtype))
        q = rounded(blocks, power_of_two(exponent - 1), self.dtype)
        return out_of_blocks(q, x)


class Mx(Quantizer):
    """One e8m0 number, a power of two, a block of 32 along the product."""

    def both(self, x: Tensor, *, learn: bool) -> tuple[Tensor, Tensor]:
        return self._rounded(x), self._rounded(x.t()).t()

    def _rounded(self, x: Tensor) -> Tensor:
        blocks = in_blocks(x, 1, 32)
        amax = blocks.abs().amax((1, 3), keepdim=True).float()
        # Up to the next power of two, so that nothing is clamped; e8m0 goes from 2^-127 to 2^127.
        mantissa, exponent = torch.frexp(amax / torch.finfo(self.dtype).max)
        exponent = (exponent - (mantissa == 0.5).int()).where(amax > 0, -127).clamp(-127, 127)
        return out_of_blocks(rounded(blocks, power_of_two(-exponent), self.dtype), x)


def in_blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """[R, C] -> [R / rows, rows, C / columns, columns], filled up with zeros."""
    padded = F.pad(x, (0, -x.size(1) % columns, 0, -x.size(0) % rows))
    return padded.view(padded.size(0) // rows, rows, padded.size(1) // columns, columns)


def out_of_blocks(blocks: Tensor, x: Tensor) -> Tensor:
    """The inverse of `in_blocks`, for what had the shape of `x`."""
    return blocks.reshape(blocks.size(0) * blocks.size(1), -1)[: x.size(0), : x.size(1)]


def quantizers(fp8: Fp8ModelConfig) -> tuple[Quantizer, Quantizer, Quantizer]:
    """Of a layer's input, weight, and output's gradient."""
    gradient = E5M2 if fp8.format == "hybrid" else E4M3
    if fp8.recipe == "tensorwise":
        return Tensorwise(E4M3), Tensorwise(E4M3), Tensorwise(gradient)
    if fp8.recipe == "delayed":
        assert fp8.amax_history is not None
        return Delayed(E4M3, fp8.amax_history), Delayed(E4M3, fp8.amax_history), Delayed(gradient, fp8.amax_history)
    if fp8.recipe == "blockwise":
        return Blockwise(E4M3, 1), Blockwise(E4M3, 128), Blockwise(gradient, 1)
    return Mx(E4M3), Mx(E4M3), Mx(gradient)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_NK: Tensor, operands: tuple[Quantizer, Quantizer, Quantizer], learn: bool
    ) -> Tensor:
        of_input, of_weight, ctx.of_gradient = operands
        x_over_K, x_over_T = of_input.both(x.reshape(-1, x.size(-1)), learn=learn)
        w_over_K, w_over_N = of_weight.both(weight_NK, learn=learn)
        ctx.save_for_backward(x_over_T, w_over_N)
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, weight_NK.dtype)
        return (x_over_K @ w_over_K.t()).to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_over_T, w_over_N = ctx.saved_tensors
        g_over_N, g_over_T = ctx.of_gradient.both(grad.reshape(-1, grad.size(-1)), learn=True)
        of_x, of_weight = ctx.dtypes
        return (g_over_N @ w_over_N).to(of_x).view(ctx.shape), (g_over_T.t() @ x_over_T).to(of_weight), None, None


class EmulatedProduct:
    """What a Megatron-Core linear layer calls for its matrix product."""

    def __init__(self, fp8: Fp8ModelConfig):
        self.operands = quantizers(fp8)

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> Tensor:
        # The grad mode of the caller: inside the function there is none.
        out = _Fp8Linear.apply(input, weight, self.operands, torch.is_grad_enabled())
        return out if bias is None else out + bias


def emulate_fp8(module: GPTModel, fp8: Fp8ModelConfig) -> None:
    """Makes the linear layers of a whole local model, one tensor rank, compute as `fp8` says, for good.

    Raises:
        ValueError: the model is split over tensor ranks, whose communication is not emulated.
    """
    if module.config.tensor_model_parallel_size > 1:
        raise ValueError(f"FP8 is emulated on one tensor rank, not {module.config.tensor_model_parallel_size}")
    for layer in module.decoder.layers:
        number = layer.layer_number - 1
        if fp8.bf16_first_layers <= number < module.config.num_layers - fp8.bf16_last_layers:
            for linear in linear_layers(layer):
                linear._forward_impl = EmulatedProduct(fp8)


def linear_layers(layer: Any) -> Iterator[Any]:
    yield from (layer.self_attention.linear_qkv, layer.self_attention.linear_proj)
    yield from (layer.mlp.linear_fc1, layer.mlp.linear_fc2)
