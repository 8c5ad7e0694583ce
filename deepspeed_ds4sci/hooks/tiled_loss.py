# SPDX-License-Identifier: Apache-2.0
"""The loss of a language model of transformers from its hidden states, some tokens at a time.

Labels are taken out of the batch, so that the model forms no loss of its own; its head, which is called with all
hidden states, returns the sum of the loss in place of logits. The head stays the module that it is: what hooks of
ZeRO-3 gather around it is there for all tiles, in both passes.
"""

from collections.abc import Callable

import torch

from deepspeed_ds4sci.hooks.family import bound_arguments, trains
from deepspeed_ds4sci.models.genslm import mean_loss
from deepspeed_ds4sci.sequence.loss import IGNORE_INDEX, shift_labels
from deepspeed_ds4sci.sequence.tiling import tiled_cross_entropy


class TiledLoss:
    """The loss of one model.

    Args:
        head: [n, hidden] -> [n, vocabulary] logits, the forward of the model's head.
        tile: tokens at a time.
        causal: labels are the next tokens.
        refuse: called with the model before its labels are taken; raises where the model's loss is another one.
        state: `sequence_state.SequenceState` of a model whose sequences are split; None: this rank has them whole.

    The mean is 0 where no token has a label.
    """

    def __init__(self, head: Callable, tile: int, causal: bool, refuse: Callable, state=None):
        self.head, self.tile, self.causal, self.refuse, self.state = head, tile, causal, refuse, state
        self.labels: torch.Tensor | None = None  # [B, L], aligned with the hidden states, of the batch in work
        self.ignore_index, self.num_items = IGNORE_INDEX, None

    def register(self, model) -> list:
        """Puts the loss before and behind the model. Returns the handles of the two hooks."""
        return [
            model.register_forward_pre_hook(self._take_labels, with_kwargs=True),
            # Before the hook that makes whole outputs of split ones.
            model.register_forward_hook(self._put_loss, prepend=True, always_call=True),
        ]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """In place of the head's: [B, L, hidden] -> the 0-d loss sum of a batch with labels, else logits."""
        if self.labels is None:
            return self.head(hidden)
        labels = self.labels.to(hidden.device)
        return tiled_cross_entropy(hidden, self.head, labels, self.tile, self.ignore_index)[0]

    def _take_labels(self, model, args, kwargs):
        if self.state is not None:
            self.labels = self.state.batch.labels
            return None
        arguments = bound_arguments(model, args, kwargs)
        settings = arguments if self.causal else {}  # the others' loss looks at none
        self.ignore_index = settings.get("ignore_index", IGNORE_INDEX)
        self.num_items = settings.get("num_items_in_batch")
        labels, shifted = arguments.pop("labels", None), arguments.pop("shift_labels", None)
        if shifted is None and labels is not None:
            shifted = shift_labels(labels, self.ignore_index) if self.causal else labels
        if shifted is not None:
            self.refuse(model)
        self.labels = shifted
        return (), arguments

    def _put_loss(self, model, inputs, output):
        """Called after an error too, without output."""
        labels, self.labels = self.labels, None
        if labels is None or output is None:
            return None
        if not isinstance(output, dict):
            raise NotImplementedError("return_dict=False is not supported with ds4sci.tiling.loss; leave it out")
        loss_sum = output["logits"]
        others = {name: value for name, value in output.items() if name not in ("loss", "logits")}
        return type(output)(loss=self._mean(model, loss_sum, labels), **others)

    def _mean(self, model, loss_sum, labels):
        count = (labels != self.ignore_index).sum().to(loss_sum.device)
        if self.state is not None:
            return self.state.mean_loss(loss_sum, count, trains(model))
        return mean_loss(loss_sum, count) if self.num_items is None else loss_sum / self.num_items
