"""A model in training: Megatron-Core's DDP, optimizer and learning rate schedule, and the update."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from oreal_megatron.config import AdamWConfig
from oreal_megatron.data.packing import TokenBatch
from oreal_megatron.distributed.groups import ParallelGroups
from oreal_megatron.models.offload import HostOffload
from oreal_megatron.models.optimizer_state import load_optimizer_state, sharded_optimizer_state
from oreal_megatron.models.pipeline_schedule import LossFunction, forward_backward, sum_gradients
from oreal_megatron.models.virtual_stages import ModelChunks, chunks_of


class _ReleaseSchedule(OptimizerParamScheduler):
    """The schedule of the authors' release, which holds the full learning rate for one update after the warm-up."""

    num_steps: int

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Returns the learning rate of the present position."""
        position = self.num_steps
        try:
            self.num_steps -= position > self.lr_warmup_steps
            return super().get_lr(param_group)
        finally:
            self.num_steps = position


class TrainedModel:
    """A model with its gradient buffers, AdamW and learning rate schedule."""

    def __init__(
        self,
        module: GPTModel | ModelChunks,
        adamw: AdamWConfig,
        groups: ParallelGroups,
        *,
        num_updates: int,
        as_in_release: bool = False,
    ):
        """Allocates gradients and states.

        num_updates: length of the schedule where `decay_steps` is null. as_in_release: see `objective.optimizer`.
        """
        config = module.config
        layout = groups.layout
        self.module = module
        self.groups = groups
        self.chunks = [
            DistributedDataParallel(
                config,
                DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True,
                    use_distributed_optimizer=layout.distributed_optimizer,
                    # Gathering of the weights is not overlapped with a forward pass, since they are published right
                    # after an update.
                    overlap_grad_reduce=layout.overlap_grad_reduce,
                    fp8_param_gather=config.fp8_param,
                ),
                chunk,
                # Only the first chunk's reduction waits for the end of the backward pass.
                disable_bucketing=index > 0,
                pg_collection=groups.collection,
            )
            for index, chunk in enumerate(chunks_of(module))
        ]
        config.finalize_model_grads_func = sum_gradients
        if layout.overlap_grad_reduce:
            several = len(self.chunks) > 1
            config.no_sync_func = [chunk.no_sync for chunk in self.chunks] if several else self.chunks[0].no_sync
            config.grad_sync_func = [chunk.start_grad_sync for chunk in self.chunks] if several else None
        self.optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=adamw.lr,
                min_lr=adamw.min_lr,
                weight_decay=adamw.weight_decay,
                adam_beta1=adamw.betas[0],
                adam_beta2=adamw.betas[1],
                adam_eps=adamw.eps,
                clip_grad=adamw.clip_grad,
                bf16=config.bf16,
                params_dtype=config.params_dtype,
                use_distributed_optimizer=layout.distributed_optimizer,
                fp8_recipe=config.fp8_recipe if config.fp8 else None,
            ),
            self.chunks,
            # None, the default of Megatron-Core, exempts biases and norms from weight decay.
            config_overrides={} if as_in_release else None,
        )
        self.clip_grad = adamw.clip_grad
        self._start_adam()
        self.weights = HostOffload(module.parameters, enabled=layout.offload)
        self.states = HostOffload(self._optimizer_tensors, enabled=layout.offload)
        config.grad_scale_func = self.optimizer.scale_loss
        self.schedule = (_ReleaseSchedule if as_in_release else OptimizerParamScheduler)(
            self.optimizer,
            init_lr=0.0,
            max_lr=adamw.lr,
            min_lr=adamw.min_lr,
            lr_warmup_steps=adamw.warmup_steps,
            lr_decay_steps=max(adamw.decay_steps or num_updates, adamw.warmup_steps + 1),
            lr_decay_style=adamw.decay,
            start_wd=adamw.weight_decay,
            end_wd=adamw.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            # A resumed run takes the position from the checkpoint, and the schedule from its own configuration.
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )

    def _start_adam(self) -> None:
        """Creates AdamW's zero state, so that a checkpoint has the same tensors before the first update.

        Megatron-Core's own initialization is for fused optimizers and omits the step that torch's AdamW reads.
        """
        for part in self._parts():
            adamw = part.optimizer
            if not isinstance(adamw, torch.optim.AdamW):
                part.init_state_fn(adamw, part.config)
                continue
            for parameter in (p for group in adamw.param_groups for p in group["params"]):
                adamw.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }

    def optimizer_state(self, model: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
        """Returns the optimizer's state for a checkpoint; model: the sharded state of the module."""
        return sharded_optimizer_state(self._parts(), model, is_loading=is_loading)

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Restores the loaded values of `optimizer_state`."""
        load_optimizer_state(self._parts(), state)

    def _optimizer_tensors(self) -> list[Tensor]:
        """Returns the moments, and the fp32 weights that do not share memory with the model."""
        inner = [part.optimizer for part in self._parts()]
        own = {parameter.untyped_storage().data_ptr() for parameter in self.module.parameters()}
        tensors = [p for adamw in inner for group in adamw.param_groups for p in group["params"]]
        tensors += [t for adamw in inner for state in adamw.state.values() for t in state.values()]
        return [t for t in tensors if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in own]

    @contextlib.contextmanager
    def on_device(self, *, states: bool = False) -> Iterator[None]:
        """Holds the weights on the device in the block, and frees the gradients at its end.

        states: whether the optimizer's states are there too, for a checkpoint; `update` onloads them by itself.
        """
        with self.weights.on_device(), self.states.on_device() if states else contextlib.nullcontext():
            try:
                yield
            finally:
                self._free_gradients()

    def offload(self) -> None:
        """Offloads weights and states and frees the gradients, if the layout offloads."""
        self._free_gradients()
        self.states.offload()
        self.weights.offload()

    def _free_gradients(self) -> None:
        self.optimizer.zero_grad()
        if self.groups.layout.offload:
            for chunk in self.chunks:
                chunk.offload_grad_buffers()

    def _parts(self) -> list[Any]:
        """Returns Megatron-Core's optimizers, each a wrapper of an optimizer of torch or Transformer Engine."""
        return list(getattr(self.optimizer, "chained_optimizers", [self.optimizer]))

    def forward_backward(self, batches: Sequence[TokenBatch], loss: LossFunction) -> list[Any]:
        """Computes gradients of `loss` over all ranks' micro-batches; returns the further results of this rank's."""
        # After an update every .grad is an alias of the gradient buffer: the first micro-batch would count twice.
        self.optimizer.zero_grad()
        for chunk in self.chunks:
            chunk.restore_grad_buffers()
        return forward_backward(self.chunks, batches, loss, self.groups)

    def advance_schedule(self, num_updates: int = 1) -> None:
        """Advances the schedule; update u, counted from 1, has the learning rate of position u."""
        self.schedule.step(num_updates)

    def update(self) -> dict[str, float]:
        """Advances the schedule, clips and steps. Returns the metrics `grad_norm` (before clipping) and `lr`.

        Raises:
            FloatingPointError: the gradient norm is not finite; neither weights nor states were changed.
        """
        with self.states.on_device():
            self.optimizer.prepare_grads()
            norm = float(self.optimizer.get_grad_norm())
            if not math.isfinite(norm):
                raise FloatingPointError(f"the gradient norm is {norm}")
            self.advance_schedule()
            # This is the rest of the optimizer's own step(), which would compute the norm again.
            for part in self._parts():
                if self.clip_grad > 0 and (parameters := part.get_parameters()):
                    clip_grad_by_total_norm_fp32(parameters, max_norm=self.clip_grad, total_norm=norm)
            self.optimizer.step_with_ready_grads()
        return {"grad_norm": norm, "lr": float(self.optimizer.param_groups[0]["lr"])}
