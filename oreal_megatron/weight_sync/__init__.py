"""Transfer of weights from the trainer's shards to the rollout servers' shards."""
