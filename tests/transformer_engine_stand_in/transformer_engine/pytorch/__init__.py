"""The layers, one tensor rank's, in torch."""

import io
import pickle
from itertools import pairwise

import torch
import torch.nn.functional as F

from transformer_engine.pytorch import distributed as distributed
from transformer_engine.pytorch import ops as ops
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager
from transformer_engine.pytorch.fp8 import fp8_autocast as fp8_autocast
from transformer_engine.pytorch.fp8 import fp8_model_init as fp8_model_init
from transformer_engine.pytorch.tensor import Float8Tensor


class _Base(torch.nn.Module):
    """FP8 state as Transformer Engine keeps it: in a byte tensor beside the parameters."""

    def __init__(self):
        super().__init__()
        self.amax_history = None

    def record(self, x):
        recipe = FP8GlobalStateManager.recipe
        if recipe is not None and self.training:
            self.amax_history = x.detach().abs().amax().float().reshape(1)

    def get_extra_state(self):
        if self.amax_history is None:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(bytearray(pickle.dumps({"amax_history_fwd": self.amax_history})), dtype=torch.uint8)

    def set_extra_state(self, state):
        if state is None:
            return
        data = state.getvalue() if isinstance(state, io.BytesIO) else state.cpu().numpy().tobytes()
        if data:
            self.amax_history = pickle.loads(data)["amax_history_fwd"]


class Linear(_Base):
    def __init__(
        self, in_features, out_features, *, bias, return_bias, parallel_mode, tp_size, init_method, params_dtype,
        device, sequence_parallel, **_,
    ):  # fmt: skip
        super().__init__()
        self.in_features, self.out_features, self.use_bias, self.return_bias = (
            in_features,
            out_features,
            bias,
            return_bias,
        )
        self.parallel_mode = parallel_mode
        self.save_original_input = False
        rows = out_features // (tp_size if parallel_mode == "column" else 1)
        columns = in_features // (tp_size if parallel_mode == "row" else 1)
        made = {"dtype": params_dtype, "device": device}
        weight = torch.empty(rows, columns, **made)
        init_method(weight)
        self.weight = torch.nn.Parameter(Float8Tensor.made_of(weight) if FP8GlobalStateManager.parameters else weight)
        if FP8GlobalStateManager.parameters:
            Float8Tensor.keep_what_it_was_made_of(self.weight, weight)
        self._mark(self.weight, 0 if parallel_mode == "column" else 1)
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(rows, **made))
            if parallel_mode == "column":
                self._mark(self.bias, 0)

    def _mark(self, parameter, dim):
        parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, 1

    def forward(self, x, is_first_microbatch=None):
        self.record(x)
        bias = self.bias if self.use_bias else None
        out = F.linear(x, self.weight, None if self.return_bias else bias)
        return (out, bias) if self.return_bias else out


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, *, eps, normalization, **options):
        super().__init__(in_features, out_features, **options)
        assert normalization == "RMSNorm"
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(
            torch.ones(in_features, dtype=options["params_dtype"], device=options["device"])
        )
        self.layer_norm_weight.sequence_parallel = options["sequence_parallel"]

    def forward(self, x, is_first_microbatch=None):
        x = F.rms_norm(x, (self.in_features,), self.layer_norm_weight, self.eps)
        return super().forward(x, is_first_microbatch)


class RMSNorm(torch.nn.RMSNorm):
    def __init__(
        self, normalized_shape=None, *, eps, sequence_parallel, zero_centered_gamma, params_dtype, device,
        hidden_size=None,
    ):  # fmt: skip
        # megatron-core up to 0.16 passes Transformer Engine's older name hidden_size.
        super().__init__(normalized_shape or hidden_size, eps, dtype=params_dtype, device=device)
        self.weight.sequence_parallel = sequence_parallel


class DotProductAttention(torch.nn.Module):
    def __init__(self, num_attention_heads, kv_channels, *, num_gqa_groups, softmax_scale, **_):
        super().__init__()
        self.scale = softmax_scale or kv_channels**-0.5

    def forward(self, query, key, value, attention_mask, *, attn_mask_type, qkv_format, cu_seqlens_q, **_):
        assert qkv_format == "thd" and attn_mask_type == "padding_causal"
        out = []
        for start, end in pairwise(cu_seqlens_q.tolist()):
            q, k, v = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
            result = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
            out.append(result[0].transpose(0, 1))
        return torch.cat(out).flatten(1)


class GroupedLinear(_Base):
    pass
