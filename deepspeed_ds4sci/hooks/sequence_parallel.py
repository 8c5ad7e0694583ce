# SPDX-License-Identifier: Apache-2.0
"""The hook of `ds4sci.sequence_parallel`: groups, sharded inputs, one loss, whole outputs, batches taken in turn."""

import functools
import logging

from deepspeed_ds4sci.hooks.context import Change
from deepspeed_ds4sci.hooks.families import family_of
from deepspeed_ds4sci.hooks.family import bound_arguments, trains
from deepspeed_ds4sci.hooks.sequence_state import RankRandom, new_state, refuse_other_recomputation
from deepspeed_ds4sci.sequence.groups import SequenceParallelMPU, sequence_groups
from deepspeed_ds4sci.sequence.inputs import all_batches, same_batch

logger = logging.getLogger(__name__)

# Arguments of models that may be given but mean nothing here.
_HARMLESS = ("use_cache", "return_dict", "output_hidden_states")


class SequenceParallelHook:
    name = "sequence_parallel"

    def before_engine(self, model, context):
        block = context.config.sequence_parallel
        family = family_of(model)
        groups = context.groups = sequence_groups(block.size)
        context.mpu = SequenceParallelMPU(groups)
        state = context.sequence = new_state(model, context, groups)
        state.random = RankRandom(groups.sp_rank)
        modules = family.attention_modules(model)
        family.prepare(model, state)
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
        average_over_all_ranks(engine)
        engine.forward = functools.partial(_forward_in_turn, engine, engine.forward)


def average_over_all_ranks(engine) -> None:
    """Makes DeepSpeed divide the sum of the gradients of all ranks by their number at every ZeRO stage.

    By itself it does so at stage 3 alone. At stages 0 to 2 it divides by their number over `sequence_parallel_size`:
    a term of the loss that every rank computes alike, such as a script's penalty on weights, would count as often as
    there are ranks per sequence. Once an engine is made, DeepSpeed reads that attribute for nothing else.
    """
    engine.sequence_parallel_size = 1
    if hasattr(engine.optimizer, "sequence_parallel_size"):  # ZeRO's, which reduce gradients by themselves
        engine.optimizer.sequence_parallel_size = 1


def named_arguments(model, args, kwargs) -> dict:
    """See `families.bound_arguments`.

    Raises:
        NotImplementedError: an argument that cannot be split over the sequence, or labels for a loss function of the
            model's own.
    """
    arguments, family = bound_arguments(model, args, kwargs), family_of(model)
    for name, value in arguments.items():
        if name in family.inputs or name in family.others or name in _HARMLESS or value is False:
            continue
        if name == "logits_to_keep" and isinstance(value, int) and value == 0:
            continue
        raise NotImplementedError(f"the argument {name!r} of {type(model).__name__} cannot be split over the sequence")
    if arguments.get("return_dict") is False:
        raise NotImplementedError("return_dict=False is not supported with ds4sci.sequence_parallel; leave it out")
    if "labels" in arguments or "shift_labels" in arguments:
        family.refuse_other_losses(model, "sequence_parallel")
    if not any(name in arguments for name in family.inputs):
        raise ValueError(f"{type(model).__name__} got no {' or '.join(family.inputs)}")
    return arguments


def _shard_inputs(family, state, model, args, kwargs):
    if trains(model):
        refuse_other_recomputation(model)
    arguments = named_arguments(model, args, kwargs)
    if not state.checked and not _same_batch(arguments, state, model):
        raise ValueError(
            f"the {state.groups.sp_size} ranks of a sequence group called the model with different batches; call the "
            "engine, which takes them in turn, or give all ranks of a group the same batch"
        )
    local = state.with_masks(arguments, lambda: family.shard(model, state, arguments))
    state.random.enter()
    return (), local


def _same_batch(arguments, state, model):
    """Whether the ranks of a sequence group have the same batch; in training, those of every sequence group.

    All ranks must take as many steps in training, where they reduce losses and gradients together. Evaluation loaders
    of different groups may have different lengths.
    """
    groups = state.groups
    return same_batch(arguments, groups.world_group if trains(model) else groups.sp_group, groups.sp_size)


def _finish_outputs(family, state, model, inputs, output):
    """Called after an error too, without output."""
    state.random.leave()
    return None if output is None else family.finish(model, state, output)


def _forward_in_turn(engine, forward, *args, **kwargs):
    """engine.forward. Ranks of a group that bring different batches work on each of them together, one after another.

    In training the batches before the last are complete micro-steps of their own (forward, backward, step), so
    accumulation and batch sizes count sequences as the config says; the last one's are the script's own calls. Where
    one group must, all groups take their ranks' batches in turn, those that are equal too.
    """
    state, model = engine.ds4sci_sequence, engine.module
    arguments = named_arguments(model, args, kwargs)
    state.checked = True
    try:
        if _same_batch(arguments, state, model):
            return forward(**arguments)
        batches = all_batches(arguments, state.groups.sp_group)
        _say_in_turn(len(batches))
        if not trains(model):
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
        "the %d ranks of a sequence group bring different batches; all groups take those of their ranks in turn, "
        "which makes %d micro-steps of one call",
        count,
        count,
    )
