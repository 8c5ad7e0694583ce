# SPDX-License-Identifier: Apache-2.0
"""Parameters that a hook takes out of the model, taken out of what the script passed to DeepSpeed as well."""

import torch


def take_out(weight, context) -> int:
    """Takes a parameter of the model from what the script passed. Returns the index of its parameter group.

    Raises:
        NotImplementedError: it is alone in its group, whose settings DeepSpeed would then forget.
    """
    optimizer = context.client_optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        if weight in optimizer.state:
            raise NotImplementedError(
                "the optimizer has taken steps before deepspeed.initialize; its state of the position table is lost"
            )
        return _take_from_groups(weight, optimizer.param_groups)
    parameters = context.model_parameters
    if parameters is None:
        return 0  # DeepSpeed takes all parameters of the model, in one group
    if parameters and isinstance(parameters[0], dict):
        for group in parameters:
            group["params"] = list(group["params"])
        return _take_from_groups(weight, parameters)
    context.model_parameters = [each for each in parameters if each is not weight]
    return 0


def _take_from_groups(weight, groups):
    for index, group in enumerate(groups):
        kept = [each for each in group["params"] if each is not weight]
        if len(kept) == len(group["params"]):
            continue
        if not kept:
            raise NotImplementedError(
                "the position table is alone in a parameter group, whose settings would be lost; put it into a group "
                "with other parameters"
            )
        group["params"] = kept
        return index
    raise NotImplementedError("the position table is in none of the optimizer's parameter groups; it must be trained")
