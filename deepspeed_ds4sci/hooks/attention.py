# SPDX-License-Identifier: Apache-2.0
"""The hook of `ds4sci.attention`: which kernel computes attention, and a sliding window.

With split sequences `sequence_parallel` has put our attention into the model already; else it is put there here, for
sequences that one rank has whole.
"""

import functools

from deepspeed_ds4sci.hooks.context import Change
from deepspeed_ds4sci.hooks.families import family_of
from deepspeed_ds4sci.hooks.family import bound_arguments, trains
from deepspeed_ds4sci.hooks.sequence_state import SequenceState, new_state, refuse_other_recomputation
from deepspeed_ds4sci.sequence.local_attention import unavailable_reason

# What attention of ours has no answer to. The cache has two names: transformers changed it.
_REFUSED = ("past_key_values", "cache", "output_attentions", "encoder_hidden_states", "encoder_attention_mask")


class AttentionHook:
    name = "attention"

    def before_engine(self, model, context):
        from deepspeed.accelerator import get_accelerator

        block, family = context.config.attention, family_of(model)
        state = attention_state(model, context)
        reason = unavailable_reason(state.attention.implementation, get_accelerator().device_name())
        if reason is not None:
            raise NotImplementedError(f"ds4sci.attention.implementation: {reason}")
        state.refuse_unsupported()
        count = len(family.attention_modules(model))
        window = f", each token over {block.sliding_window} tokens" if block.sliding_window else ""
        return Change(count, f"{count} {family.attention} modules attend by {block.implementation!r}{window}")

    def after_engine(self, engine, context):
        """Nothing is left to do."""


def attention_state(model, context) -> SequenceState:
    """The state of the model's attention: that of split sequences, or one made here, the first time it is asked for.

    Raises:
        NotImplementedError: a model whose attention cannot be replaced.
    """
    if context.sequence is None:
        family = family_of(model)
        state = context.sequence = new_state(model, context, None)
        family.attach(model, state)
        read = functools.partial(_read_inputs, family, state)
        state.handles.append(model.register_forward_pre_hook(read, with_kwargs=True))
    return context.sequence


def _read_inputs(family, state, model, args, kwargs):
    if trains(model):
        refuse_other_recomputation(model)
    arguments = bound_arguments(model, args, kwargs)
    for name in _REFUSED:
        if arguments.get(name, False) is not False:
            raise NotImplementedError(
                f"the argument {name!r} of {type(model).__name__} does not go with the attention of the ds4sci block"
            )
    if "document_ids" in arguments and "document_ids" not in family.others:
        raise NotImplementedError(
            f"{type(model).__name__} takes no document_ids; it tells documents by position_ids that start again"
        )
    return (), state.with_masks(arguments, lambda: family.read(model, state, arguments))
