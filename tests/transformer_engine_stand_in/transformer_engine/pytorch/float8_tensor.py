from transformer_engine.pytorch.tensor import Float8Tensor as Float8Tensor
