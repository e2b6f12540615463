import torch


def apply_rotary_pos_emb(t, freqs, *, tensor_format, fused, cu_seqlens, cp_size, cp_rank, interleaved=False):
    """[T, heads, dim] of packed sequences, each from position 0."""
    assert tensor_format == "thd" and fused and cp_size == 1 and not interleaved
    lengths = torch.diff(cu_seqlens).tolist()
    angles = torch.cat([freqs[:length] for length in lengths])[:, 0]
    first, second = t.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (t * angles.cos() + turned * angles.sin()).to(t.dtype)
