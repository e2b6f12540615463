"""Functions of a user's own that the configuration names: imported, with their settings, and checked before a run."""

from __future__ import annotations

import contextlib
import functools
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel

from oreal_megatron.config import (
    ConfigError,
    EvaluationConfig,
    FunctionConfig,
    ObjectiveConfig,
    PromptConfig,
    RolloutSamplingConfig,
    SGLangConfig,
    TrackingConfig,
    TrainConfig,
    Violation,
    parse_section,
    unknown_key,
)

PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "advantages": ("responses",),
    "keep_group": ("responses",),
    "choose": ("trajectories", "rng"),
    "token_weights": ("scores_T", "correct", "config", "prompt_ids", "response_ids"),
    "policy_loss": (
        "logprobs_R",
        "old_logprobs_R",
        "detached_logprobs_R",
        "rollout_logprobs_R",
        "weights_R",
        "advantages_R",
        "correct_R",
        "lengths",
    ),
    "kl": ("reference_logprobs_R", "logprobs_R"),
}
"""Keyword arguments of each function of `objective.functions`."""
REWARD_PARAMETERS = ("question", "gold_answer", "response", "stopped")
"""Keyword arguments of `rollout.reward`."""
PROMPT_PARAMETERS = ("question",)
"""Keyword arguments of `prompt.function`."""
METRIC_PARAMETERS = ("greedy", "sampled")
"""Keyword arguments of the functions of `evaluation.functions`."""
TRACKER_PARAMETERS = ("record", "directory")
"""Keyword arguments of `tracking.function`."""
GENERATION_PARAMETERS = ("conversation", "question", "prompt_ids")
"""Keyword arguments of `rollout.generation.function`."""

SAMPLING_PARAMETERS = ("prompt", "sample_index", "step", "sampling")
"""Keyword arguments of `rollout.sampling.function`."""

TRANSPORT_PARAMETERS = ("shards", "directory", "config_json")
"""Keyword arguments of the class of `rollout.sglang.transport`."""
TRANSPORT_METHODS: Mapping[str, tuple[Any, ...]] = {"prepare": (0,), "send": ((),), "close": ()}
"""Methods of a transport, with arguments such as those with which they are called."""


def objective_function(config: ObjectiveConfig, name: str) -> Callable[..., Any] | None:
    """Returns the function that `objective.functions.NAME` names, with its settings bound; None where it names none.

    Raises:
        ConfigError: it cannot be imported or called with the arguments, or its settings are wrong.
    """
    function: FunctionConfig | None = getattr(config.functions, name)
    return None if function is None else load_function(f"objective.functions.{name}", function, PARAMETERS[name])


def described(config: ObjectiveConfig, name: str) -> str:
    """Returns key and path of a function of `objective.functions`, for messages."""
    function: FunctionConfig | None = getattr(config.functions, name)
    return f"objective.functions.{name} = {None if function is None else function.path}"


def reward_function(config: TrainConfig) -> Callable[..., Any] | None:
    """Returns the function that `rollout.reward` names. Raises ConfigError as `objective_function` does."""
    function = config.rollout.reward
    return None if function is None else load_function("rollout.reward", function, REWARD_PARAMETERS)


def generation_function(config: TrainConfig) -> Callable[..., Any] | None:
    """Returns the function that `rollout.generation` names.

    Raises:
        ConfigError: as `objective_function` does, and where the function is not async.
    """
    if config.rollout.generation is None:
        return None
    key, function = "rollout.generation.function", config.rollout.generation.function
    found = load_function(key, function, GENERATION_PARAMETERS)
    if not inspect.iscoroutinefunction(inspect.unwrap(found)):
        raise ConfigError([Violation(key, function.path, "It is not async. Define it with `async def`.")])
    return found


def sampling_function(config: RolloutSamplingConfig) -> Callable[..., Any] | None:
    """Returns the function that `rollout.sampling.function` names. Raises ConfigError as `objective_function` does."""
    function = config.function
    return None if function is None else load_function("rollout.sampling.function", function, SAMPLING_PARAMETERS)


def transport_class(config: SGLangConfig | None) -> Callable[..., Any] | None:
    """Returns the class that `rollout.sglang.transport` names, with its settings bound; None for the built-in ones.

    Raises:
        ConfigError: as `objective_function` does, and where it is no class, or one without the methods of a Transport.
    """
    if config is None or not isinstance(config.transport, FunctionConfig):
        return None
    key, path = "rollout.sglang.transport", config.transport.path
    found = load_function(key, config.transport, TRANSPORT_PARAMETERS)
    own = inspect.unwrap(found)
    if not isinstance(own, type):
        raise ConfigError([Violation(key, path, f"It is a {type(own).__name__}. Set it to module.name of a class.")])
    for name, arguments in TRANSPORT_METHODS.items():
        try:
            inspect.signature(getattr(own, name)).bind(None, *arguments)
        except (AttributeError, TypeError, ValueError) as error:
            remedy = f"Its method `{name}` cannot be called: {error}. Give it the methods of Transport in "
            raise ConfigError([Violation(key, path, f"{remedy}oreal_megatron/weight_sync/types.py.")]) from error
    return found


def prompt_function(config: PromptConfig) -> Callable[..., Any] | None:
    """Returns the function that `prompt.function` names. Raises ConfigError as `objective_function` does."""
    return None if config.function is None else load_function("prompt.function", config.function, PROMPT_PARAMETERS)


def source_of(function: Callable[..., Any]) -> str:
    """Returns the source of the module of a user's function; empty where there is none."""
    while isinstance(function, functools.partial):
        function = function.func
    module = inspect.getmodule(inspect.unwrap(function))
    try:
        return "" if module is None else inspect.getsource(module)
    except (OSError, TypeError):
        return ""


def metric_functions(config: EvaluationConfig) -> dict[str, Callable[..., Any]]:
    """Returns the functions of `evaluation.functions` by name. Raises ConfigError as `objective_function` does."""
    return {
        name: load_function(f"evaluation.functions.{name}", function, METRIC_PARAMETERS)
        for name, function in config.functions.items()
    }


def tracker_function(config: TrackingConfig) -> Callable[..., Any] | None:
    """Returns the function that `tracking.function` names. Raises ConfigError as `objective_function` does."""
    function = config.function
    return None if function is None else load_function("tracking.function", function, TRACKER_PARAMETERS)


def check_functions(config: TrainConfig) -> list[Violation]:
    """Returns what is wrong with the functions that a configuration names."""
    loads: list[Callable[[], Any]] = [functools.partial(objective_function, config.objective, n) for n in PARAMETERS]
    loads += [functools.partial(load, config) for load in (reward_function, generation_function)]
    loads += [
        functools.partial(sampling_function, config.rollout.sampling),
        functools.partial(transport_class, config.rollout.sglang),
        functools.partial(prompt_function, config.prompt),
        functools.partial(metric_functions, config.evaluation),
        functools.partial(tracker_function, config.tracking),
    ]
    violations: list[Violation] = []
    for load in loads:
        try:
            load()
        except ConfigError as error:
            violations += error.violations
    return violations


def load_function(key: str, config: FunctionConfig, parameters: tuple[str, ...]) -> Callable[..., Any]:
    """Imports a function and binds its settings. What it raises becomes a ValueError with its name.

    key: the configuration's key, for messages. parameters: the keywords with which it is called.

    Raises:
        ConfigError: there is no such function, it does not take the keywords, or its settings are wrong.
    """
    wanted = "Set it to module.name of a function in a module on PYTHONPATH."
    try:
        function = pkgutil.resolve_name(config.path)
    except Exception as error:  # whatever the user's module raises while it is imported
        remedy = f"It cannot be imported: {type(error).__name__}: {error}. {wanted}"
        raise ConfigError([Violation(key, config.path, remedy)]) from error
    if not callable(function):
        raise ConfigError([Violation(key, config.path, f"It is a {type(function).__name__}. {wanted}")])
    try:
        signature = inspect.signature(function)
    except ValueError as error:  # some functions of C
        remedy = f"Its parameters are not known: {error}. Wrap it in a function of your own."
        raise ConfigError([Violation(key, config.path, remedy)]) from error
    settings = _settings(key, config, function, signature)
    try:
        signature.bind(**dict.fromkeys(parameters), **settings)
    except TypeError as error:
        names = ", ".join([*parameters, *settings])
        remedy = f"It is called with the keywords {names}, and takes {signature}: {error}. Take these, or **others."
        raise ConfigError([Violation(key, config.path, remedy)]) from error

    @functools.wraps(function)
    def called(**arguments: Any) -> Any:
        try:
            return function(**arguments, **settings)
        except Exception as error:  # whatever the user's function raises
            raise ValueError(f"{key} = {config.path} raised {type(error).__name__}: {error}") from error

    return called


def _settings(
    key: str, config: FunctionConfig, function: Callable[..., Any], signature: inspect.Signature
) -> dict[str, BaseModel]:
    """Returns the keyword argument `settings`, or nothing where the function has no such parameter."""
    if "settings" not in signature.parameters:
        if config.settings:
            remedy = (
                f"{config.path} has no parameter `settings`. Remove them, or add it, annotated with a pydantic model."
            )
            raise ConfigError([Violation(f"{key}.settings", dict(config.settings), remedy)])
        return {}
    model = signature.parameters["settings"].annotation
    if isinstance(model, str):  # of a module with `from __future__ import annotations`
        with contextlib.suppress(Exception):
            initial = function.__init__ if isinstance(function, type) else inspect.unwrap(function)
            model = eval(model, getattr(initial, "__globals__", {}))
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        remedy = "Its parameter `settings` is not annotated with a pydantic model. Annotate it with one."
        raise ConfigError([Violation(key, config.path, remedy)])
    if model.model_config.get("extra") != "allow":
        unknown = [name for name in config.settings if name not in model.model_fields]
        if unknown:
            raise ConfigError(
                [
                    Violation(f"{key}.settings.{name}", config.settings[name], unknown_key(name, model.model_fields))
                    for name in unknown
                ]
            )
    return {"settings": parse_section(f"{key}.settings", dict(config.settings), model)}
