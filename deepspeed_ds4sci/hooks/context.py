# SPDX-License-Identifier: Apache-2.0
"""What hooks share: their protocol, and the things that belong to one engine."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from deepspeed_ds4sci.config import DS4SciConfig
from deepspeed_ds4sci.sequence.groups import SequenceGroups


@dataclass
class HookContext:
    """One engine in the making. Hooks read it, and fill in what later hooks and the engine need."""

    config: DS4SciConfig

    model_dtype: Any = None
    """The dtype that DeepSpeed casts the model to; None: it leaves it as it is."""

    client_optimizer: Any = None
    """The script's optimizer, a callable that makes one, or None."""

    model_parameters: list | None = None
    """The parameters or parameter groups that the script passed, as a list; None: all of the model's."""

    handles: list[Any] = field(default_factory=list)
    """What takes the hooks' changes out of the model again, by `remove()`, in the order they were made."""

    groups: SequenceGroups | None = None
    mpu: Any = None
    sequence: Any = None
    """`hooks.sequence_state.SequenceState`, while sequences are split."""

    extras: dict[str, Any] = field(default_factory=dict)
    """What a hook keeps from before the engine to after it, by the hook's name."""


@dataclass(frozen=True)
class Change:
    """What a hook did: how many modules or parameters it changed, and a line that says so."""

    count: int
    text: str


class Hook(Protocol):
    """One feature."""

    name: str
    """The field of DS4SciConfig that owns it."""

    def before_engine(self, model: nn.Module, context: HookContext) -> Change: ...

    def after_engine(self, engine, context: HookContext) -> None: ...
