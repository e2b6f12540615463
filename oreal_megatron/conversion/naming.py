"""Names of one Megatron tensor: in a distributed checkpoint, in modules of the local spec and of Transformer Engine.

The checkpoint's names, with global layer numbers, are the table's; Megatron-Core's checkpoints have them from either
implementation. Only modules of the local spec call a norm by its own name.
"""

from __future__ import annotations

import re

_LOCAL = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")


def checkpoint_name(name: str, *, first_layer: int = 0) -> str:
    """The table's name of a parameter of a module, local or Transformer Engine.

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
    """What a checkpoint may call tensor `name`: (key, whether all layers are stacked in it), most usual first.

    Megatron-Core stacks layers of one kind unless told otherwise; specs without its name map keep the local names.
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
