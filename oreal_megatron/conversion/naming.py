"""Names of a Megatron tensor: in a distributed checkpoint, in modules of the local spec and of Transformer Engine.

The table uses the checkpoint's names, with global layer numbers; both implementations write them to checkpoints. Only
modules of the local spec have norms as modules of their own.
"""

from __future__ import annotations

import re

_LOCAL = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")


def checkpoint_name(name: str, *, first_layer: int = 0) -> str:
    """Returns the table's name of a parameter of a module, local or of Transformer Engine.

    first_layer: global number, from 0, of the module's first layer (pipeline stage, virtual stage).
    """
    if (match := _LAYER.fullmatch(name)) is None:
        return name
    part = match[2]
    for local, fused in _LOCAL.items():
        if part.startswith(local):
            part = fused + part.removeprefix(local)
    return f"decoder.layers.{first_layer + int(match[1])}.{part}"


def stored_names(name: str) -> tuple[tuple[str, bool], ...]:
    """Returns a checkpoint's possible keys for tensor `name`: (key, whether layers are stacked), the usual key first.

    Megatron-Core stacks layers of one kind by default; specs without its name map keep the local names.
    """
    if (match := _LAYER.fullmatch(name)) is None:
        return ((name, False),)
    layer, part = match.groups()
    parts = [part]
    for local, fused in _LOCAL.items():
        if part.startswith(fused):
            parts.append(local + part.removeprefix(fused))
    stacked = [(f"decoder.layers.{part}", True) for part in parts]
    return (*stacked, *((f"decoder.layers.{layer}.{part}", False) for part in parts))
