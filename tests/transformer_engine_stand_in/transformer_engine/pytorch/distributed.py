import contextlib


class CudaRNGStatesTracker:
    pass


def activation_recompute_forward(activation_recompute=False, recompute_phase=False):
    return contextlib.nullcontext()


def is_fp8_activation_recompute_enabled():
    return False
