"""`oreal-train`, whose rank 1 fails in its second update of the reward model. Started by torchrun."""

import os

from oreal_megatron import train
from oreal_megatron.cli import train as cli

update_reward_model = train.update_reward_model
calls = 0


def failing(*arguments, **options):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == 2:
        raise RuntimeError("the device fell off the bus")
    return update_reward_model(*arguments, **options)


if __name__ == "__main__":
    train.update_reward_model = failing
    cli.main()
