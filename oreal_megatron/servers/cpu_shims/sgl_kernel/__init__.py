"""Placeholder of SGLang's compiled kernels, of which PyPI has no CPU build.

SGLang from 0.5.16 on imports these names on CPU. They serve speculative decoding and moves of KV caches between tiers;
a dense model with `--attention-backend torch_native` calls none of them. A call raises NotImplementedError.
"""

from collections.abc import Callable
from typing import Any, NoReturn


def _missing(name: str) -> Callable[..., NoReturn]:
    def kernel(*arguments: Any, **options: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name}: there is no CPU build of sgl_kernel in this environment")

    kernel.__name__ = name
    return kernel


for _name in (
    "copy_all_layer_kv_cache_cpu",
    "assign_req_to_token_pool_cpu",
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "build_tree_kernel_efficient_cpu",
    "verify_tree_greedy_cpu",
):
    globals()[_name] = _missing(_name)
