# SPDX-License-Identifier: Apache-2.0
"""How what the hooks change in a model is taken out of it again: before another engine, and after an error.

Each engine has one list of handles, which is on its model too, as `ds4sci_handles`. Handles hold no closures: a copy
of the model gets a list of its own, and removing a copied closure would change the original.
"""

import functools

from torch import nn


class OnRemoval:
    """A handle, like those of module hooks, that runs a function when it is removed."""

    def __init__(self, undo):
        self._undo = undo

    def remove(self):
        self._undo()


def replace_attribute(owner, name: str, value) -> OnRemoval:
    """owner.name = value. The handle puts back what was there: an attribute, or the method or default of the class."""
    had_own, before = name in vars(owner), getattr(owner, name, None)
    setattr(owner, name, value)
    # Modules and properties keep theirs elsewhere.
    is_new = not had_own and name in vars(owner)
    undo = functools.partial(delattr, owner, name) if is_new else functools.partial(setattr, owner, name, before)
    return OnRemoval(undo)


def remove_all(handles: list) -> None:
    """Undoes what the handles stand for, the latest first, and empties the list."""
    while handles:
        handles.pop().remove()


def mark_as_final(model: nn.Module, change: str) -> None:
    """Makes `detach` refuse the model. change: what cannot be undone, as "the table was replaced"."""
    model.ds4sci_final_change = change


def detach(model: nn.Module) -> None:
    """Undoes what earlier engines' hooks have changed in a model or in a part of it.

    Raises:
        NotImplementedError: something that cannot be undone; nothing is changed then.
    """
    modules = list(model.modules())
    for module in modules:
        change = vars(module).get("ds4sci_final_change")
        if change is not None:
            raise NotImplementedError(
                f"{change} for an earlier engine, which cannot be undone; make a new model for a new engine"
            )
    for module in modules:
        remove_all(vars(module).get("ds4sci_handles", []))
