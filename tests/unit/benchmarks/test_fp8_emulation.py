"""The recipes' arithmetic by hand and against torchao, and how far it takes a model: bounds on a trained one."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from benchmarks.fp8_emulation import (
    E4M3,
    E5M2,
    Blockwise,
    Delayed,
    EmulatedProduct,
    Mx,
    Tensorwise,
    emulate_fp8,
    rounded,
)
from oreal_megatron.config import Fp8ModelConfig

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def recipe(name: str, **changed) -> Fp8ModelConfig:
    history = 4 if name == "delayed" else None
    made = Fp8ModelConfig(
        recipe=name, format="hybrid", bf16_first_layers=0, bf16_last_layers=0, amax_history=history, parameters=False
    )
    return made.model_copy(update=changed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_casts_clamp_and_keep_what_float8_holds():
    one = torch.ones(())
    assert rounded(torch.tensor([1e6, -1e6, 448.0, 0.0]), one, E4M3).tolist() == [448.0, -448.0, 448.0, 0.0]
    assert rounded(torch.tensor([1e9, -1e9]), one, E5M2).tolist() == [57344.0, -57344.0]
    assert rounded(torch.tensor([1.0, 1.0625, 1.07]), one, E4M3).tolist() == [1.0, 1.0, 1.125]


def test_a_scale_of_the_tensor_itself_keeps_its_largest_number():
    x = normal(8, 16) * 1000
    q, same = Tensorwise(E4M3).both(x, learn=False)
    assert q is same
    assert q.abs().max() == pytest.approx(x.abs().max().item(), rel=1e-6)
    assert (q - x).abs().max() <= x.abs().max() * 2**-4


def test_delayed_scales_come_from_the_passes_before():
    quantizer = Delayed(E4M3, history=2)
    first = quantizer.both(torch.tensor([[1000.0, 1.0]]), learn=True)[0]
    assert first.tolist() == [[448.0, 1.0]]  # no history yet: scale 1, clamped
    assert quantizer.both(torch.tensor([[1000.0, 1.0]]), learn=False)[0][0, 0] == pytest.approx(1000.0)
    assert quantizer.amax_history.tolist() == [1000.0, 0.0]  # unchanged by a pass that does not learn
    # A jump is clamped, until it has made a scale; and makes one for as long as it is in the window.
    assert quantizer.both(torch.tensor([[2000.0, 1.0]]), learn=True)[0][0, 0] == pytest.approx(1000.0)
    quantizer.both(torch.tensor([[4.0, 1.0]]), learn=True)
    assert quantizer.amax_history.tolist() == [4.0, 2000.0]
    quantizer.both(torch.tensor([[4.0, 1.0]]), learn=True)
    assert quantizer.both(torch.tensor([[4.0, 1.0]]), learn=True)[0][0, 0] == pytest.approx(4.0)


def test_blocks_do_not_see_each_other():
    x = torch.ones(2, 256) * 1.0625
    x[0, 0] = 1e6
    along = Blockwise(E4M3, 1).both(x, learn=False)[0]
    assert (along[0, 1:128] == 0).all()  # in the block of the large one everything else is too small
    assert along[0, 128:].unique().numel() == 1 and (along[0, 128] - 1.0625).abs() < 0.07
    assert torch.equal(along[1], along[0, 128:].repeat(2))
    whole = Blockwise(E4M3, 128).both(x, learn=False)[0]
    assert (whole[:, :128].flatten()[1:] == 0).all() and torch.equal(whole[:, 128:], along[:, 128:])


def test_block_scales_are_powers_of_two_and_padding_changes_nothing():
    for quantizer, block in ((Blockwise(E4M3, 1), 128), (Mx(E4M3), 32)):
        x = normal(3, block)
        q = quantizer.both(x, learn=False)[0]
        assert torch.equal(quantizer.both(x * 2.0**-20, learn=False)[0], q * 2.0**-20)  # exact under powers of two
        assert (q - x).abs().max() <= x.abs().max() * 2**-4
        odd = normal(5, block + 7)
        filled = torch.nn.functional.pad(odd, (0, block - 7))
        for found, expected in zip(quantizer.both(odd, learn=False), quantizer.both(filled, learn=False), strict=True):
            assert torch.equal(found, expected[:, : block + 7])
    assert torch.equal(Mx(E4M3).both(torch.zeros(2, 32), learn=False)[0], torch.zeros(2, 32))


def test_products_over_rows_have_blocks_along_rows():
    # Powers of two as scales show only where numbers of very different sizes meet in a block.
    x = normal(64, 96) * normal(64, 96, seed=1).mul(8).exp()
    for quantizer in (Mx(E4M3), Blockwise(E5M2, 1)):
        over_columns, over_rows = quantizer.both(x, learn=False)
        assert torch.equal(over_rows, quantizer.both(x.t().contiguous(), learn=False)[0].t())
        assert not torch.equal(over_rows, over_columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensorwise_is_torchaos_emulation_bit_for_bit(dtype):
    pytest.importorskip("torchao", reason="torchao is in the extra `dev`")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    linear = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False, dtype=dtype))
    weight = linear[0].weight.detach().clone().requires_grad_()
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name("tensorwise"), emulate=True)
    theirs = convert_to_float8_training(copy.deepcopy(linear), config=config)
    x = (normal(5, 7, 64) * 30).to(dtype)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = EmulatedProduct(recipe("tensorwise"))(x1, weight, None), theirs(x2)
    gradient = (normal(5, 7, 48, seed=1) * 1e-3).to(dtype)
    out.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(out, expected)
    assert torch.equal(x1.grad, x2.grad)
    assert torch.equal(weight.grad, theirs[0].weight.grad)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 448.0, 1e30])
def test_mxfp8_is_torchaos_bit_for_bit(dtype, size):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao is in the extra `dev`")
    x = normal(16, 96) * size
    x[0] = 0
    theirs = mx.MXTensor.to_mx(x, dtype, 32, mx.ScaleCalculationMode.RCEIL).dequantize(torch.float32)
    assert torch.equal(Mx(dtype).both(x, learn=False)[0], theirs)


@pytest.mark.parametrize("name", RECIPES)
def test_a_model_in_fp8_is_near_itself_and_layers_in_bf16_are_itself(name, single_process, tmp_path):
    from benchmarks.fp8 import Study, drift
    from oreal_megatron.conversion.huggingface import geometry_of
    from tests.tiny_models import save_tiny
    from tests.unit.transformer_engine.tiny_policy import SEQUENCES, tiny_policy

    source = save_tiny(tmp_path / "hf", "qwen2", tied=True, num_layers=4)

    def build(dtype):
        return tiny_policy(geometry_of(source), single_process, "local", load=source, dtype=dtype)

    study = Study(build, SEQUENCES, single_process)
    whole = drift(study, recipe(name), dtype="float32")
    assert 0 < whole.mean < 0.5 and 0.8 < whole.gradient_cosine < 1  # random weights, narrow: bounds are elsewhere
    less = drift(study, recipe(name, bf16_first_layers=1, bf16_last_layers=2), dtype="float32")
    assert 0 < less.mean < whole.mean
    none = drift(study, recipe(name, bf16_first_layers=2, bf16_last_layers=2), dtype="float32")
    assert none.largest == 0 and none.gradient_cosine == pytest.approx(1, abs=1e-9)


def test_one_tensor_rank_only(single_process, tmp_path):
    from oreal_megatron.conversion.huggingface import geometry_of
    from tests.tiny_models import save_tiny
    from tests.unit.transformer_engine.tiny_policy import tiny_policy

    source = save_tiny(tmp_path / "hf", "llama", tied=False)
    policy = tiny_policy(geometry_of(source), single_process, "local")
    policy.config.tensor_model_parallel_size = 2
    with pytest.raises(ValueError, match="on one tensor rank, not 2"):
        emulate_fp8(policy, recipe("mxfp8"))
