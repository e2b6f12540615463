"""Generation of rollouts: the sampler, its journal, and the engines."""
