"""The policy's weights from the trainer's shards to the rollout servers'."""
