"""What SGLang lacks on a CPU to serve FP8, for its own processes: SGLANG_EXTERNAL_MODEL_PACKAGE names this package.

Its FP8 layers, how they are made and what is done to them after loading are SGLang's, on the way that it takes on CUDA
with Triton's kernel. In the kernel's place stands the product with the same weights, multiplied out; activations stay
as they are.
"""

import torch
import torch.nn.functional as F
from sglang.srt.layers.quantization import fp8
from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant


def linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    block_size: list[int],
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    return F.linear(input, block_quant_dequant(weight, weight_scale, block_size, input.dtype), bias)


fp8._is_cpu = False  # where it is true, weights are put in the order of kernels that PyPI has no build of
fp8.dispatch_w8a8_block_fp8_linear = lambda **_: linear
