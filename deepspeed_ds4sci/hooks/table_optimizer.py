# SPDX-License-Identifier: Apache-2.0
"""The optimizer step of a sharded position table, as part of DeepSpeed's: the same gradient mean, the same norm and
clipping, the same kind of optimizer with the same settings."""

import functools
import inspect

import torch
import torch.distributed as dist

# DeepSpeed's fused optimizers compute what these do; the table's shard is too small for the difference to matter.
_PLAIN = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}
_SETTINGS = (
    *("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "amsgrad"),
    *("momentum", "dampening", "nesterov", "maximize"),
)


class TableOptimizer:
    """Updates one table's shard after DeepSpeed has updated the rest.

    The weight's gradient arrives as the mean over the sequence group's ranks, summed over micro-batches. At the
    accumulation boundary it becomes the mean over data-parallel replicas; its norm joins the global one; after
    DeepSpeed's step it is clipped by the same factor and applied, unless the step was skipped.

    Args:
        engine: DeepSpeed's engine; its step is wrapped.
        table: the sharded table.
        groups: sequence groups.
        group_index: the parameter group of the engine's optimizer whose settings hold for the table.

    Raises:
        NotImplementedError: an optimizer, or a wrapper of one, that this does not know.
    """

    def __init__(self, engine, table, groups, group_index):
        self.engine, self.table, self.groups = engine, table, groups
        self.group_index = group_index
        self.norm = None  # this step's, of the whole table
        self.total_norm = None  # this step's, of everything, at ZeRO stage 0
        if engine.basic_optimizer is None:
            raise NotImplementedError("a sharded position table needs an optimizer; none was configured")
        kind = _kind_of(engine.basic_optimizer)
        self.optimizer = kind([table.weight], **self._settings(kind))
        self._join_norm()
        engine._take_model_step = functools.partial(self._step, engine._take_model_step)

    def _settings(self, kind=None):
        """The settings of the parameter group, as far as the plain optimizer knows them."""
        group = self.engine.basic_optimizer.param_groups[self.group_index]
        if not group.get("bias_correction", True):
            raise NotImplementedError(
                "a sharded position table is trained with bias correction; leave bias_correction = false out of the "
                "optimizer"
            )
        known = inspect.signature(kind).parameters if kind else self.optimizer.param_groups[0]
        settings = {name: group[name] for name in _SETTINGS if name in group and name in known}
        return {name: tuple(value) if name == "betas" else value for name, value in settings.items()}

    def _step(self, original, lr_kwargs):
        self._finish_gradient()
        settings = self._settings()  # before the scheduler moves on
        original(lr_kwargs)
        if self.engine._step_applied and self.table.weight.grad is not None:
            self._clip()
            self.optimizer.param_groups[0].update(settings)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.norm = self.total_norm = None

    @torch.no_grad()
    def _finish_gradient(self):
        weight = self.table.weight
        if not weight.requires_grad:
            return
        if weight.grad is None:  # no rank asked for these rows; the others' collectives still come
            weight.grad = torch.zeros_like(weight)
        if self.groups.dp_size > 1:
            dist.all_reduce(weight.grad, group=self.groups.dp_group)
            weight.grad /= self.groups.dp_size
        square = weight.grad.double().square().sum()
        dist.all_reduce(square, group=self.groups.sp_group)
        self.norm = square.sqrt().float()

    def _clip(self):
        limit = self.engine.gradient_clipping()
        if limit == 0.0:
            return
        total = self.total_norm if self.total_norm is not None else self.engine.optimizer._global_grad_norm
        factor = (total + 1e-6) / limit
        if factor > 1:
            self.table.weight.grad /= factor

    # ---- the table's norm as part of DeepSpeed's --------------------------------------------------------------------

    def _join_norm(self):
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        optimizer = self.engine.optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer):
            optimizer.scaled_global_norm = functools.partial(self._joined_norm, optimizer.scaled_global_norm)
        elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            optimizer._get_norm_groups = functools.partial(self._joined_groups, optimizer._get_norm_groups)
        elif optimizer is self.engine.basic_optimizer:
            self.engine.clip_fp32_gradients = self._clip_all
        else:
            raise NotImplementedError(
                f"a sharded position table does not work with {type(optimizer).__name__}; with bf16 use ZeRO stage 1 "
                "to 3 and leave data_types.grad_accum_dtype out"
            )

    def _joined_norm(self, original, *args, **kwargs):
        norm = original(*args, **kwargs)
        if self.norm is None or norm < 0:  # DeepSpeed's mark of a norm that is not finite
            return norm
        return (norm**2 + self.norm.to(norm.device) ** 2).sqrt()

    def _joined_groups(self, original):
        norms = original()
        return norms if self.norm is None else [*norms, self.norm.to(norms[0].device)]

    def _clip_all(self):
        """ZeRO stage 0: DeepSpeed's clip_grad_norm_ with one more tensor in the norm."""
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        norms = [gradient.float().norm() for gradient in gradients]
        norms += [] if self.norm is None else [self.norm]
        self.total_norm = torch.stack(norms).norm()
        factor = (self.total_norm + 1e-6) / self.engine.gradient_clipping()
        if factor > 1:
            for gradient in gradients:
                gradient /= factor


def _kind_of(optimizer):
    name = type(optimizer).__name__
    if name in ("FusedAdam", "DeepSpeedCPUAdam"):
        return torch.optim.AdamW if getattr(optimizer, "adam_w_mode", True) else torch.optim.Adam
    if name in _PLAIN and isinstance(optimizer, _PLAIN[name]):
        return _PLAIN[name]
    raise NotImplementedError(f"a sharded position table is trained with SGD, Adam or AdamW, got {name}")
