"""Every experiment as it is: composes, validates, plans, and shrinks to a dry run that a few processes hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from oreal_megatron.cli.planning import num_devices, planner_of
from oreal_megatron.compose import composed, missing_keys, resolved, validated, with_placeholders
from oreal_megatron.config import ConfigError, TrainConfig, parse_config
from oreal_megatron.data.arithmetic import generate_arithmetic
from oreal_megatron.dry_run import MAX_PROCESSES, MAX_SERVERS, num_processes, shrunk
from oreal_megatron.overrides import config_directory
from oreal_megatron.planner.memory import served_weights, tokens_beside_trainer
from oreal_megatron.planner.planner import Plan
from oreal_megatron.planner.sizes import num_parameters
from oreal_megatron.servers.server_process import Launcher, _command
from oreal_megatron.slurm.checks import checked
from oreal_megatron.slurm.cluster import LOCAL_FILE_SYSTEMS, editable_project, file_system
from oreal_megatron.slurm.sbatch import allocation

EXPERIMENTS = sorted(path.stem for path in (Path(config_directory()) / "experiment").glob("*.yaml"))
RECIPES = [name for name in EXPERIMENTS if name.startswith("oreal_")]


def recipe(name: str, *overrides: str) -> TrainConfig:
    config = composed([f"experiment={name}", *overrides])
    with_placeholders(config)
    return parse_config(resolved(config))


def planned_recipe(*overrides: str) -> Plan:
    config = recipe(*overrides)
    return planner_of(config)(config)


def test_recipes_are_complete():
    bases = ("oreal_7b", "oreal_7b_no_rm", "oreal_r1_distill_qwen_7b", "oreal_32b")
    ahead = ["oreal_7b_async", "oreal_32b_async"]
    assert sorted([base + variant for base in bases for variant in ("", "_disaggregated")] + ahead) == RECIPES


@pytest.mark.parametrize("device", ["h100", "a100"])
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_what_its_name_says(name, device):
    config = recipe(name, f"resources={device}")
    servers = config.rollout.sglang
    assert servers is not None and config.model.geometry is not None
    assert config.resources.device == f"{device}_80gb"
    assert servers.placement == ("disaggregated" if name.endswith(("_disaggregated", "_async")) else "colocated")
    assert config.rollout.schedule == ("continuous" if name.endswith("_async") else "in_turn")
    assert config.model.geometry.num_layers == (64 if "32b" in name else 28)
    assert config.objective.uses_reward_model == ("no_rm" not in name)
    # Released: 64 prompts x 16 at 16k tokens, 90 steps; 32 GPUs for 7B, 128 for 32B, servers included.
    assert config.data.prompts_per_step * config.rollout.samples_per_prompt == 1024
    assert (config.model.max_sequence_length, config.run.num_steps) == (16384, 90)
    nodes = allocation(config, num_devices(config, None))
    assert nodes.num_nodes * config.resources.devices_per_node == (128 if "32b" in name else 32)


@pytest.mark.parametrize("device", ["h100", "a100"])
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_fits(apart, name, device):
    plan = apart(planned_recipe, name, f"resources={device}")
    assert plan.memory.problems == []
    assert plan.memory.verdict == "fits"
    # Every server holds several longest sequences at once, or generation would be a queue.
    assert plan.memory.kv_cache.sequences_at_limit >= 8
    assert plan.step_seconds is not None and 30 < plan.step_seconds < 600


@pytest.mark.parametrize("device", ["h100", "a100"])
@pytest.mark.parametrize(("name", "tokens", "devices"), [("sft_7b", 16384, 32), ("sft_32b", 32768, 128)])
def test_recipe_of_fine_tuning_plans_one_model_that_the_recipe_of_oreal_takes(apart, name, tokens, devices, device):
    plan = apart(planned_recipe, name, f"resources={device}")
    config, after = plan.sizes.config, recipe(name.replace("sft", "oreal"))
    assert config.model.geometry == after.model.geometry
    assert (config.model.max_sequence_length, config.resources.trainer_devices) == (tokens, devices)
    assert plan.memory.verdict == "fits" and plan.memory.kv_cache is None
    assert {phase.phase for phase in plan.memory.phases} == {"train policy", "save"}
    parts = {part for phase in plan.memory.phases for part in phase.parts}
    assert not {part for part in parts if "reward" in part or "reference" in part or "server" in part}
    assert plan.work.trained_sequences == config.sft.batch_size and plan.work.mean_tokens == tokens / 2
    # Three passes and one again, of 2 FLOPs a weight, at 40% of the data sheet: attention makes it more.
    flops = {"h100": 989e12, "a100": 312e12}[device]
    weights = num_parameters(plan.sizes.geometry) - plan.sizes.geometry.vocab_size * plan.sizes.geometry.hidden_size
    least = 4 * 2 * weights * config.sft.batch_size * tokens / 2 / devices / (0.4 * flops)
    assert least < plan.step_seconds < 1.5 * least and list(plan.seconds) == ["train policy"]
    state = num_parameters(plan.sizes.geometry) * 14
    assert plan.disk.checkpoint == state and plan.disk.rollouts == 0


def plan_with_evaluation() -> list[str]:
    config = recipe(
        "sft_7b", "model.implementation=local", "evaluation=mathematics", "evaluation.sampling.max_new_tokens=8"
    )
    return [phase.phase for phase in planner_of(config)(config).memory.phases]


def test_fine_tuning_that_is_evaluated_by_generation_plans_its_cache(apart):
    assert apart(plan_with_evaluation) == ["generate", "train policy", "save"]


def problems_of_a_greedy_server(name: str) -> list[str]:
    config = recipe(name, "rollout.sglang.memory_share=0.7")
    return planner_of(config)(config).memory.problems


def test_server_that_leaves_no_room_gets_a_share_that_does(apart):
    (problem,) = apart(problems_of_a_greedy_server, "oreal_7b")
    share = float(problem.rsplit("rollout.sglang.memory_share=", 1)[1].rstrip("."))
    assert "servers take 70% of a device" in problem and 0.42 <= share < 0.5


def tokens_at_starts(name: str) -> list[int]:
    """Planned tokens of a server's KV cache, and those that SGLang makes of its options as the trainer's part grows."""
    config = recipe(name)
    plan, servers = planner_of(config)(config), config.rollout.sglang
    assert servers is not None
    kv_cache, device = plan.memory.kv_cache, plan.memory.device
    kv_tokens = tokens_beside_trainer(config, servers, plan.sizes.geometry)
    directory = Path("/nowhere")
    launcher = Launcher(
        config=servers, model=directory, weight_loader="a.b", dtype="bfloat16", max_sequence_length=16384,
        logs=directory, kv_tokens=kv_tokens,
    )  # fmt: skip
    command = _command(launcher, 20_000, device=0)
    share, most = (command[command.index(f"--{x}") + 1] for x in ("mem-fraction-static", "max-total-tokens"))
    weights = served_weights(plan.sizes, servers)
    parts = next(p for p in plan.memory.phases if p.phase == "reshard").parts
    tokens = [kv_cache.tokens]
    for held in (0, parts["policy weights"], sum(parts.values())):
        free = device.memory - device.server_offloaded - held  # less the server's CUDA context
        # kv_cache_configurator.py of SGLang 0.5.23: free memory behind the weights, less what is not static
        left = free - weights - (1 - float(share)) * free
        tokens.append(min(int(most), int(left // kv_cache.bytes_per_token)))
    return tokens


def test_colocated_server_has_the_planned_cache_whenever_it_starts(apart):
    planned, *found = apart(tokens_at_starts, "oreal_7b")
    assert found == [planned] * 3 and planned > 100_000


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_shrinks_to_a_dry_run(name):
    config = composed([f"experiment={name}", "run.dry_run=true"])
    small = validated(shrunk(config))
    layout = small.parallel
    length = (small.sft.steps, small.run.num_steps) if small.is_sft else (2, small.run.num_steps)
    assert (
        length == ((2, 0) if name.startswith("sft") else (2, 2))
        and small.run.name == f"dry_run_{name}"
        and name in small.run.dir
    )
    assert (small.rollout.backend, small.model.path) == (config.rollout.backend, None)
    if (servers := small.rollout.sglang) is not None:
        assert servers.device == "cpu" and servers.placement == config.rollout.sglang.placement
        assert servers.num_servers == min(config.rollout.sglang.num_servers, MAX_SERVERS)
        assert servers.tensor == min(config.rollout.sglang.tensor, 2)
    assert small.data.arithmetic is not None
    assert len(generate_arithmetic(small.data.arithmetic, seed=0).train) == 64
    assert num_processes(config) % (layout.tensor * layout.pipeline * layout.context) == 0
    assert num_processes(config) <= MAX_PROCESSES
    whole = OmegaConf.to_container(config.parallel)
    for key in ("tensor", "pipeline", "context"):
        assert getattr(layout, key) == min(whole.get(key, 1), 2)
    for key in ("sequence", "recompute", "distributed_optimizer"):
        assert getattr(layout, key) == whole.get(key, getattr(layout, key)), key


def test_dry_run_of_32b_keeps_its_kinds_of_parallelism():
    config = composed(["experiment=oreal_32b", "run.dry_run=true"])
    layout = validated(shrunk(config)).parallel
    assert (layout.tensor, layout.pipeline, num_processes(config)) == (2, 2, 8)


def test_recipe_lacks_only_the_site():
    raw = OmegaConf.to_container(composed(["experiment=oreal_32b"]), resolve=False)
    assert missing_keys(raw) == ["cluster.data", "cluster.models"]


def refused(*overrides: str) -> dict[str, str]:
    """Key -> remedy of every violation of a submission."""
    with pytest.raises(ConfigError) as caught:
        checked(composed(list(overrides)), lambda config, cluster: allocation(config, num_devices(config, None)))
    return {violation.key: violation.remedy for violation in caught.value.violations}


def test_submission_names_all_missing_values():
    found = refused("experiment=oreal_32b_disaggregated", "cluster=slurm")
    assert sorted(found) == [f"cluster.{name}" for name in ("account", "data", "models", "partition", "runs", "venv")]


def test_submission_without_a_site_asks_for_the_site_alone():
    assert refused("experiment=oreal_32b_disaggregated", "cluster=none").keys() == {"cluster"}


def test_submission_names_missing_and_wrong_values_together(tmp_path):
    """A layout that does not divide, a path that other nodes do not see, a missing account, and more of the kind."""
    found = refused(
        "experiment=oreal_32b",
        "cluster=slurm",
        "cluster.partition=batch",
        "cluster.venv=null",
        f"cluster.runs={tmp_path}",
        f"cluster.models={tmp_path}",
        "cluster.data=/elsewhere",
        f"cluster.shared=[{tmp_path}]",
        "cluster.time_limit='00:10:00'",
    )
    assert {"cluster.account", "cluster.data", "model.path", "data.train", "cluster.signal_seconds"} <= found.keys()
    # The site is checked too where checks across the run's sections fail.
    layout = refused("experiment=oreal_32b", "cluster=slurm", "parallel.tensor=3", "cluster.runs=/proc")
    assert {"parallel.tensor", "cluster.account", "cluster.data"} <= layout.keys()
    # Where a section is not valid, the run has no allocation, but the site's own values are still checked.
    unknown = refused("experiment=oreal_32b", "cluster=slurm", "+parallel.tensors=8")
    assert {"parallel.tensors", "cluster.account"} <= unknown.keys()


def test_submission_names_what_other_nodes_and_the_container_do_not_see(tmp_path):
    """The checkout that an editable installation runs is a path too."""
    shared, local = tmp_path / "shared", tmp_path / "local"
    for directory in (shared, local):
        directory.mkdir()
    base = [f"cluster.{name}={shared}" for name in ("runs", "models", "data")]
    base += ["experiment=oreal_32b", "cluster=slurm", "cluster.partition=batch", "cluster.account=a"]
    base += [f"model.path={local}", f"data.train={shared}", f"run.dir={shared}/run"]
    found = refused(*base, "cluster.venv=null", f"cluster.shared=[{shared}]")
    unseen = {key for key, remedy in found.items() if "not on shared storage" in remedy}
    assert {"cluster.venv", "model.path"} <= unseen and "data.train" not in unseen
    container = ("cluster.venv=null", "cluster.container=image", f"cluster.shared=[{tmp_path}]")
    for mounts, not_seen in (
        (f"['{shared}']", {"model.path"}),
        (f"['{shared}:{shared}:ro','{local}']", set()),
        (f"['{shared}:/elsewhere']", {"model.path", "data.train", "run.dir"}),
    ):
        found = refused(*base, *container, f"cluster.mounts={mounts}", "cluster.time_limit=00:00:01")
        assert {key for key, remedy in found.items() if "The container does not see it" in remedy} == not_seen
    image = local / "image.sif"
    container = ("cluster.venv=null", f"cluster.container={image}", f"cluster.shared=[{shared}]")
    assert "not on shared storage" in refused(*base, *container)["cluster.container"]
    assert "does not exist" in refused(*base, *container, f"cluster.shared=[{tmp_path}]")["cluster.container"]


def test_the_checkout_of_an_editable_installation_is_found(tmp_path):
    assert editable_project(tmp_path) is None
    installed = tmp_path / "lib" / "python3.12" / "site-packages" / "oreal_megatron-1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Name: oreal_megatron\nVersion: 1\n")
    (installed / "direct_url.json").write_text('{"dir_info": {}, "url": "file:///src"}')
    assert editable_project(tmp_path) is None
    (installed / "direct_url.json").write_text('{"dir_info": {"editable": true}, "url": "file:///my%20src"}')
    assert editable_project(tmp_path) == Path("/my src")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ('run.name="a\\nb"', "run.name"),
        ("run.dir='/r/a\\b'", "run.dir"),
        ('cluster.partition="a\\n#SBATCH --hold"', "cluster.partition"),
        ("cluster.environment={'A B': x}", "cluster.environment"),
        ("cluster.mounts=['/a,b']", "cluster.mounts"),
    ],
)
def test_a_text_that_a_job_would_not_read_as_it_is_is_refused(override, key):
    assert key in refused("experiment=oreal_32b", "cluster=slurm", override.encode().decode("unicode_escape"))


def test_a_server_larger_than_a_node_is_refused_with_the_alternatives():
    found = refused("experiment=oreal_32b_disaggregated", "cluster=slurm", "rollout.sglang.tensor=16")
    assert "on one node" in found["rollout.sglang.tensor"] and "num_servers" in found["rollout.sglang.tensor"]
    found = refused("experiment=oreal_32b", "cluster=slurm", "+rollout.sglang.arguments.nnodes=2")
    assert "on one" in found["rollout.sglang.arguments.nnodes"]


def test_file_system_of_a_machine_is_not_shared_storage():
    assert file_system(Path("/dev/shm/somewhere")) == "tmpfs"
    assert file_system(Path("/proc/1")) not in LOCAL_FILE_SYSTEMS


def memory_of_changes(name: str) -> list[tuple[str, int, dict[str, int]]]:
    """Returns (where, bytes of the policy's weights, what changes alone add), by phase."""
    config = recipe(name)
    assert config.rollout.sglang is not None
    servers = config.rollout.sglang.model_copy(update={"full_every": 20})
    changed = config.model_copy(update={"rollout": config.rollout.model_copy(update={"sglang": servers})})
    before, after = (planner_of(one)(one).memory.phases for one in (config, changed))
    return [
        (
            one.where,
            one.parts.get("policy weights", 0),
            {key: size - one.parts.get(key, 0) for key, size in other.parts.items() if size != one.parts.get(key, 0)},
        )
        for one, other in zip(before, after, strict=True)
    ]


def test_changes_alone_need_a_copy_of_the_weights_in_every_phase(apart):
    for where, weights, more in apart(memory_of_changes, "oreal_32b_disaggregated"):
        assert where == "server" or weights
        bucket = more.pop("buckets", None)
        assert bucket in (None, 1.5 * 256 * 2**20)
        assert more == ({} if where == "server" else {"sent weights": weights})
