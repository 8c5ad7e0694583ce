# SPDX-License-Identifier: Apache-2.0
"""The hook of `ds4sci.sequence_parallel`: groups, sharded inputs, one loss, whole outputs, batches taken in turn."""

import functools
import inspect
import logging

import torch

from deepspeed_ds4sci.hooks.context import Change
from deepspeed_ds4sci.hooks.families import family_of
from deepspeed_ds4sci.hooks.sequence_state import RankRandom, SequenceState
from deepspeed_ds4sci.sequence.attention import SequenceParallelAttention
from deepspeed_ds4sci.sequence.groups import SequenceParallelMPU, sequence_groups
from deepspeed_ds4sci.sequence.inputs import InputSharder, all_batches, same_batch

logger = logging.getLogger(__name__)

# Arguments of the models that are split with the sequence, and those that may be given but mean nothing here.
_SHARDED = (
    "input_ids",
    "inputs_embeds",
    "labels",
    "shift_labels",
    "position_ids",
    "token_type_ids",
    "attention_mask",
    "document_ids",
)
_HARMLESS = ("use_cache", "return_dict", "output_hidden_states")


class SequenceParallelHook:
    name = "sequence_parallel"

    def before_engine(self, model, context):
        block = context.config.sequence_parallel
        family = family_of(model)
        groups = context.groups = sequence_groups(block.size)
        context.mpu = SequenceParallelMPU(groups)
        _detach(model)
        attention = context.config.attention
        implementation = "auto" if attention.implementation == "fastest" else attention.implementation
        pad_token_id = getattr(model.config, "pad_token_id", None)
        state = context.sequence = SequenceState(
            groups=groups,
            attention=SequenceParallelAttention(groups.sp_group, block.layout_mode(), implementation=implementation),
            sharder=InputSharder(
                size=block.size,
                mode=block.layout_mode(),
                rank=groups.sp_rank,
                padding=block.padding,
                causal=family.is_causal(model),
                pad_token_id=pad_token_id or 0,
            ),
            zero_stage=context.zero_stage,
            window=attention.sliding_window,
            random=RankRandom(groups.sp_rank),
        )
        modules = family.attention_modules(model)
        family.prepare(model, state)
        model.ds4sci_sequence = state
        state.handles += [
            model.register_forward_pre_hook(functools.partial(_shard_inputs, family, state), with_kwargs=True),
            model.register_forward_hook(functools.partial(_finish_outputs, family, state), always_call=True),
        ]
        mode = block.layout_mode()
        return Change(
            len(modules),
            f"{len(modules)} {family.attention} modules attend over {block.size} ranks by "
            f"{mode if isinstance(mode, str) else '{ulysses} x {ring} (ulysses x ring)'.format(**mode)}; "
            f"data-parallel size {groups.dp_size}",
        )

    def after_engine(self, engine, context):
        engine.ds4sci_sequence = context.sequence
        engine.forward = functools.partial(_forward_in_turn, engine, engine.forward)


def _detach(model):
    """Undoes an earlier engine's hooks on the same model."""
    state = getattr(model, "ds4sci_sequence", None)
    for handle in () if state is None else state.handles:
        handle.remove()


def named_arguments(model, args, kwargs) -> dict:
    """The arguments of model.forward by name, without those that are None.

    Raises:
        NotImplementedError: an argument that cannot be split over the sequence.
    """
    bound = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    arguments = {name: value for name, value in bound.items() if value is not None}
    for name, value in arguments.items():
        if name in _SHARDED or name in _HARMLESS or value is False:
            continue
        if name == "logits_to_keep" and isinstance(value, int) and value == 0:
            continue
        raise NotImplementedError(f"the argument {name!r} of {type(model).__name__} cannot be split over the sequence")
    if arguments.get("return_dict") is False:
        raise NotImplementedError("return_dict=False is not supported with ds4sci.sequence_parallel; leave it out")
    if "input_ids" not in arguments and "inputs_embeds" not in arguments:
        raise ValueError(f"{type(model).__name__} got neither input_ids nor inputs_embeds")
    return arguments


def _shard_inputs(family, state, model, args, kwargs):
    arguments = named_arguments(model, args, kwargs)
    if not state.checked and not same_batch(arguments, state.groups.sp_group):
        raise ValueError(
            f"the {state.groups.sp_size} ranks of a sequence group called the model with different batches; call the "
            "engine, which takes them in turn, or give all ranks of a group the same batch"
        )
    local = family.shard(model, state, arguments)
    state.random.enter()
    return (), local


class _ShardedOutput:
    """Stands where the logits of a batch with labels would be, and refuses their use."""

    MESSAGE = (
        "with labels in the batch the outputs stay split over the GPUs and only the loss is returned; leave labels "
        "out of the batch to get whole logits, and compute the loss from those"
    )

    def __getattr__(self, name):
        if name.startswith("__"):  # copying and introspection
            raise AttributeError(name)
        raise NotImplementedError(self.MESSAGE)

    def __getitem__(self, index):
        raise NotImplementedError(self.MESSAGE)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(cls.MESSAGE)


def _finish_outputs(family, state, model, inputs, output):
    """Labels given: the loss, and no logits. Else every output whole. Called after an error too, without output."""
    state.random.leave()
    if output is None:
        return None
    if state.batch.labels is not None:
        training = model.training and torch.is_grad_enabled()
        output["loss"] = family.loss(state, output, training)
        for name in output.keys() - {"loss"}:
            output[name] = _ShardedOutput()
        return _reordered(output)
    for name, value in list(output.items()):
        if isinstance(value, torch.Tensor):
            output[name] = state.gather(value)
        elif isinstance(value, tuple):
            output[name] = tuple(state.gather(each) for each in value)
    return output


def _reordered(output):
    """The output with its loss first: scripts take it as output[0]."""
    return type(output)(**{name: output[name] for name in ("loss", *(key for key in output if key != "loss"))})


def _forward_in_turn(engine, forward, *args, **kwargs):
    """engine.forward. Ranks of a group that bring different batches work on each of them together, one after another.

    In training the batches before the last are complete micro-steps of their own (forward, backward, step), so
    accumulation and batch sizes count sequences as the config says; the last one's are the script's own calls.
    """
    state, model = engine.ds4sci_sequence, engine.module
    arguments = named_arguments(model, args, kwargs)
    state.checked = True
    try:
        if same_batch(arguments, state.groups.sp_group):
            return forward(**arguments)
        batches = all_batches(arguments, state.groups.sp_group)
        _say_in_turn(len(batches))
        if not (model.training and torch.is_grad_enabled()):
            outputs = [forward(**batch) for batch in batches]
            return outputs[state.groups.sp_rank]
        if any("labels" not in batch and "shift_labels" not in batch for batch in batches):
            raise NotImplementedError(
                "the ranks of a sequence group brought different batches without labels; they can be trained on in "
                "turn only where the model computes the loss. Give all ranks of a group the same batch"
            )
        for batch in batches[:-1]:
            engine.backward(forward(**batch)["loss"])
            engine.step()
        return forward(**batches[-1])
    finally:
        state.checked = False


@functools.lru_cache(maxsize=1)
def _say_in_turn(count):
    logger.info(
        "the %d ranks of a sequence group bring different batches; the whole group takes each of them in turn, which "
        "makes %d micro-steps of one call",
        count,
        count,
    )
