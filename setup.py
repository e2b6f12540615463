"""Packaging. Version ranges are those that were tried; docs/reproducibility.md says with what."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
SWEEPS = ["hydra-submitit-launcher>=1.2,<2", "submitit>=1.5"]
DOCS = ["mkdocs==1.6.*", "mkdocs-material==9.8.*"]


def conf_files() -> list[tuple[str, list[str]]]:
    """conf/ for installed wheels, below share/oreal_megatron; a checkout uses its own."""
    directories = sorted({path.parent for path in (HERE / "conf").rglob("*.yaml")})
    return [
        (f"share/oreal_megatron/{d.relative_to(HERE)}", [str(p.relative_to(HERE)) for p in sorted(d.glob("*.yaml"))])
        for d in directories
    ]


setup(
    name="oreal_megatron",
    version="0.1.0",
    description="Outcome-reward reinforcement learning (OREAL) on Megatron-Core",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["oreal_megatron", "oreal_megatron.*"]),
    package_data={
        "oreal_megatron": [
            "templates/*.html",
            "py.typed",
            "servers/cpu_shims/*.py",
            "servers/cpu_shims/sgl_kernel/*.py",
        ]
    },
    data_files=[*conf_files(), ("share/oreal_megatron/slurm", ["slurm/train.sbatch", "slurm/rank.sh"])],
    install_requires=[
        "torch>=2.13,<2.14",
        "megatron-core>=0.16.1,<0.17",
        "numpy>=2,<3",
        "psutil>=7",  # megatron-core's checkpoint writer hangs without it
        "transformers>=5.19,<6",
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "hydra-core>=1.3.2,<1.4",
        "omegaconf>=2.3,<2.4",
        "pydantic>=2.11,<3",
        "pyyaml>=6",
        "sympy>=1.13,<2",
        "mpmath>=1.3,<1.4",
        "latex2sympy2_extended>=1.11,<2",
        "httpx>=0.27,<1",  # the verifier's judge
        "rich>=14",
        "jinja2>=3.1",
        "matplotlib>=3.10",
        "tensorboard>=2.19",
        "wandb>=0.21",
    ],
    extras_require={
        # GPU machines only. Neither has been run by us on a GPU.
        "sglang": ["sglang==0.5.23"],
        "te": ["transformer-engine[pytorch,core_cu13]>=2.9,<2.12"],
        "sweeps": SWEEPS,
        "gguf": ["gguf>=0.18", "accelerate>=1.10"],
        "docs": DOCS,
        "dev": [
            *DOCS,
            "einops>=0.8",  # mbridge imports it, and does not ask for it
            *SWEEPS,
            "hypothesis>=6.130",
            "import-linter>=2.3",
            "math-verify==0.9.0",
            "mbridge==0.15.1",  # an oracle of the conversion, in tests only
            "mypy>=1.18",
            "pre-commit>=4",
            "pytest>=8.4",
            "pytest-timeout>=2.4",
            "ruff>=0.14",
            "torchao==0.18.*",  # an oracle of the FP8 emulation, in tests only
            "types-PyYAML",
        ],
    },
    entry_points={
        "console_scripts": [
            "oreal-train = oreal_megatron.cli.train:train",
            "oreal-report = oreal_megatron.cli.report:report",
            "oreal-plan = oreal_megatron.cli.plan:plan",
            "oreal-submit = oreal_megatron.cli.submit:submit",
            "oreal-doctor = oreal_megatron.cli.doctor:doctor",
            "oreal-verify = oreal_megatron.verifier.cli:main",
        ]
    },
)
