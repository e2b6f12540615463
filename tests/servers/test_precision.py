"""Servers that hold other numbers than an fp32 trainer: bfloat16, and FP8 in SGLang's own layers without its kernel."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from oreal_megatron.conversion.rules import Box
from oreal_megatron.servers.request_queue import NoServerError
from oreal_megatron.servers.server_process import launch_environment
from oreal_megatron.weight_sync import fp8_blocks
from tests.servers.conftest import require_sglang
from tests.servers.test_servers import GREEDY, PROMPTS, requests_of
from tests.tiny_models import save_tiny
from tests.tiny_servers import open_servers, servers_config

pytestmark = [pytest.mark.servers, pytest.mark.timeout(1500)]

# Every matrix in whole blocks of 128 x 128.
SHAPE = {"hidden_size": 256, "ffn": 512, "head_dim": 64, "initializer_range": 0.08}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("wide") / "qwen3", "qwen3", tied=False, **SHAPE)


def in_transformers(servers, completions, *, in_fp8=False, computing=torch.float32):
    """Log-probabilities of the completions with the policy's weights in bf16; in_fp8: linear layers as a server's."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(servers.written(), dtype=torch.bfloat16).eval()
    for name, module in model.named_modules():
        if in_fp8 and name.split(".")[-1] in LINEAR:
            weight = module.weight.data
            quantity, scales = (
                torch.empty_like(weight, dtype=fp8_blocks.E4M3),
                torch.empty([size // 128 for size in weight.shape]),
            )
            fp8_blocks.quantise_into(quantity, scales, weight)
            whole = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
            weight.copy_(quantity.float() * whole)  # exact: four bits and a power of two
    model.to(computing)
    found = []
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        found.append(logprobs.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1))
    return torch.cat(found)


def assert_served(servers, *, in_fp8):
    """The server is as near to what exact arithmetic makes of its weights as another implementation in bf16 is."""
    completions = servers.generate(requests_of(PROMPTS), GREEDY)
    served = torch.cat([torch.tensor(completion.logprobs) for completion in completions])
    exact = in_transformers(servers, completions, in_fp8=in_fp8)
    rounding = (in_transformers(servers, completions, in_fp8=in_fp8, computing=torch.bfloat16) - exact).abs().mean()
    found = (served - exact).abs().mean()
    print(f"mean |log-probability - exact|: served {found:.4f}, transformers in bf16 {rounding:.4f}")
    assert found < 2 * rounding
    if in_fp8:
        unquantised = (served - in_transformers(servers, completions)).abs().mean()
        print(f"from the weights that the FP8 was made of: {unquantised:.4f}")
        assert found < unquantised / 3


def test_bfloat16_servers_of_a_trainer_in_fp32(single_process, source, tmp_path):
    require_sglang()
    opened = open_servers(single_process, source, tmp_path, dtype="bfloat16")
    try:
        for version in range(2):
            opened.perturb()
            report = opened.engine.publish(version)
            assert report["publication/failures"] == 0 and report["publication/servers"] == 1
        assert report["publication/bytes"] == 2 * sum(p.numel() for p in opened.policy.parameters())
        assert_served(opened, in_fp8=False)
    finally:
        opened.engine.close()


def test_fp8_servers_generate_with_what_was_audited(single_process, source, tmp_path, monkeypatch):
    """By both transports, twice each; a server that was started for other blocks is refused before it gets weights."""
    require_sglang()
    monkeypatch.setenv("SGLANG_EXTERNAL_MODEL_PACKAGE", "tests.servers.fp8_without_cuda")
    opened = open_servers(single_process, source, tmp_path, dtype="fp8")
    attached = []
    try:
        opened.engine.publish(0)
        url = opened.pool.servers[0].client.url
        attached += [
            open_servers(single_process, source, tmp_path / transport, dtype="fp8", urls=(url,), transport=transport)
            for transport in ("direct", "ipc")
        ]
        for servers in attached:
            for version in range(2):
                servers.perturb()
                report = servers.engine.publish(version)
                assert report["publication/failures"] == 0 and report["publication/servers"] == 1
            assert_served(servers, in_fp8=True)
        plain = open_servers(single_process, source, tmp_path / "plain", dtype="bfloat16", urls=(url,))
        attached.append(plain)
        with pytest.raises(NoServerError, match=r"quantization_config \{.*\[128, 128\].*\} instead of None"):
            plain.engine.publish(0)
    finally:
        for servers in (*attached, opened):
            servers.engine.close()


def test_weights_are_quantised_as_sglang_does_it(tmp_path):
    """Bit for bit its `per_block_cast_to_fp8`, in a process of its own; and part by part what the whole gives."""
    require_sglang()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(384, 512, generator=generator)
    weight *= torch.randn(384, 512, generator=generator).mul(4).exp()  # sizes over many powers of two
    weight[:128, :128] = 0
    weight[:128, 128:256] *= 1e-9 / weight[:128, 128:256].abs().max()
    weight[:128, 256:384] = 448.0 * 2.0**-5  # a power of two brings it exactly to the end of the range
    weight[:128, 384:] = 450.0
    weight = weight.bfloat16()
    torch.save(weight, tmp_path / "weight.pt")
    program = (
        "import sys, torch\n"
        "from sglang.srt.layers.quantization.fp8_utils import per_block_cast_to_fp8\n"
        "torch.save(per_block_cast_to_fp8(torch.load(sys.argv[1])), sys.argv[2])\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "weight.pt"), str(tmp_path / "theirs.pt")]
    environment = launch_environment(servers_config())
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    quantity, scales = torch.load(tmp_path / "theirs.pt")

    mine, my_scales = torch.empty_like(quantity), torch.empty_like(scales)
    fp8_blocks.quantise_into(mine, my_scales, weight)
    assert torch.equal(my_scales, scales)
    assert torch.equal(mine.view(torch.uint8), quantity.view(torch.uint8))
    for box in (Box((5, 200), (0, 512)), Box((120, 121), (100, 400)), Box((128, 256), (256, 384))):
        part = weight[slice(*box.rows), slice(*box.columns)]
        found, blocks = fp8_blocks.block_amax(part, box)
        assert (fp8_blocks.scales_for(found) <= scales[blocks]).all()
        expected = quantity[slice(*box.rows), slice(*box.columns)]
        assert torch.equal(fp8_blocks.quantised(part, box, scales).float(), expected.float())
