"""Schema of a run's configuration: strict, frozen, without torch.

Hydra composes conf/ and overrides. `parse_config` validates the result once and reports all violations together, each
with key, value and remedy. No other package reads a DictConfig.
"""

from oreal_megatron.config.data import ArithmeticConfig, BalanceBin, DataConfig
from oreal_megatron.config.divisibility import (
    SERVED_BLOCK,
    check_layout,
    served_shape_violations,
    serving_violations,
    unserved_shapes,
)
from oreal_megatron.config.errors import ConfigError, Violation
from oreal_megatron.config.fields import AsPath, FunctionConfig, NonNegative, Positive, Section, Strings
from oreal_megatron.config.geometry import GeometryConfig, RopeScalingConfig
from oreal_megatron.config.objective import ObjectiveConfig, TokenWeightConfig
from oreal_megatron.config.optimizer import AdamWConfig
from oreal_megatron.config.parsing import (
    check_resume,
    check_settings,
    fields_at,
    kinds_of,
    parse_config,
    parse_section,
    parse_sections,
    settings_of,
    unknown_key,
)
from oreal_megatron.config.rollout import RolloutSamplingConfig, SamplingConfig, SGLangConfig, UndecidedConfig
from oreal_megatron.config.sections import (
    EvaluationConfig,
    Fp8Config,
    Fp8ModelConfig,
    ModelConfig,
    ParallelConfig,
    PromptConfig,
    TrackingConfig,
    TrainConfig,
)
from oreal_megatron.config.sft import HeldoutConfig, SftConfig, SourceConfig

__all__ = [
    "SERVED_BLOCK",
    "AdamWConfig",
    "ArithmeticConfig",
    "AsPath",
    "BalanceBin",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "Fp8Config",
    "Fp8ModelConfig",
    "FunctionConfig",
    "GeometryConfig",
    "HeldoutConfig",
    "ModelConfig",
    "NonNegative",
    "ObjectiveConfig",
    "ParallelConfig",
    "Positive",
    "PromptConfig",
    "RolloutSamplingConfig",
    "RopeScalingConfig",
    "SGLangConfig",
    "SamplingConfig",
    "Section",
    "SftConfig",
    "SourceConfig",
    "Strings",
    "TokenWeightConfig",
    "TrackingConfig",
    "TrainConfig",
    "UndecidedConfig",
    "Violation",
    "check_layout",
    "check_resume",
    "check_settings",
    "fields_at",
    "kinds_of",
    "parse_config",
    "parse_section",
    "parse_sections",
    "served_shape_violations",
    "serving_violations",
    "settings_of",
    "unknown_key",
    "unserved_shapes",
]
