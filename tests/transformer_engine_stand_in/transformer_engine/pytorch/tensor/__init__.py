"""A tensor that holds FP8 and reads as what it stands for, with what it was made of."""

import torch


class QuantizedTensor(torch.Tensor):
    """Keeps values that a float8 can hold; operations read them, `copy_` rounds into them."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.copy_ and isinstance(args[0], QuantizedTensor):
            with torch._C.DisableTorchFunctionSubclass():
                return func(args[0], rounded(args[1]))
        if func in (torch.Tensor.detach, torch.Tensor.requires_grad_):
            return super().__torch_function__(func, types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def dequantize(self):
        return self.detach().as_subclass(torch.Tensor).clone()


class Float8Tensor(QuantizedTensor):
    @classmethod
    def made_of(cls, value):
        return rounded(value).as_subclass(cls)

    @staticmethod
    def keep_what_it_was_made_of(parameter, value):
        parameter.get_high_precision_init_val = lambda: value


def rounded(value):
    scale = 448.0 / value.detach().float().abs().amax().clamp_min(1e-12)
    return ((value.detach().float() * scale).to(torch.float8_e4m3fn).float() / scale).to(value.dtype)
