"""Settings of the runs that benchmarks time: a step of training alone, without evaluations, checkpoints and reports.

Imports nothing: benchmarks/trl.py also runs in an environment without this project's requirements.
"""

from __future__ import annotations

PLAIN_RUN = (
    "data.pass_rate=null",
    "data.difficulty_balance=[]",
    "evaluation=none",
    "evaluation.every=0",
    "run.checkpoint_every=0",
    "tracking.trajectories=false",
    "tracking.report=false",
    "tracking.wandb=disabled",
    "tracking.tensorboard=false",
    "tracking.console=plain",
)
