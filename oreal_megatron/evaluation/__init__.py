"""How good a policy is on problems that it does not train on."""
