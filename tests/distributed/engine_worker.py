# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_engine_*.py run: a case through DeepSpeed with sequences split, and the same on one rank."""

import traceback
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from tests.distributed import oracle, tiny_models


@dataclass(frozen=True)
class Case:
    """One training set-up. `batches` makes the micro-batches of a step: [global rows, tokens] each, the same on all
    ranks; data-parallel rank r takes its share of the rows."""

    model: str
    size: int = 2
    mode: object = "ulysses"
    stage: int = 0
    accumulation: int = 1
    seq_len: int = 16
    sharded_table: bool = False
    variant: str = ""
    optimizer: dict = field(default_factory=lambda: {"type": "SGD", "params": {"lr": 0.5}})
    clipping: float = 0.0
    steps: int = 1
    zero: dict = field(default_factory=dict)
    features: dict = field(default_factory=dict)

    @property
    def id(self):
        mode = self.mode if isinstance(self.mode, str) else "{ulysses}x{ring}".format(**self.mode)
        table = "-table" if self.sharded_table else ""
        parts = [self.model + table, f"sp{self.size}", mode, f"zero{self.stage}", f"accumulate{self.accumulation}"]
        return "-".join([*parts, *([self.variant] if self.variant else [])])

    def ds_config(self, dp_size):
        features = {"sequence_parallel": {"size": self.size, "mode": self.mode}, **self.features}
        if self.sharded_table:
            features["position_embedding"] = {"kind": "learned", "sharded": True}
        return {
            "train_batch_size": dp_size * self.accumulation,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": self.clipping,
            "steps_per_print": 10**6,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "optimizer": self.optimizer,
            "zero_optimization": {"stage": self.stage, **self.zero},
            "ds4sci": features,
        }

    def micro_batches(self, step, rows):
        """The micro-batches of a step: whole batches of `rows` sequences."""
        for micro in range(self.accumulation):
            seed = 100 * step + micro
            batch = tiny_models.batch(self.model, rows, self.seq_len, seed)
            if self.variant == "padding":
                lengths = [self.seq_len - 3 * (row % 3) - 2 for row in range(rows)]
                batch = tiny_models.with_padding(batch, lengths)
            elif self.variant in ("documents", "positions"):
                start = torch.arange(self.seq_len)
                batch["position_ids"] = torch.where(start < 6, start, start - 6).expand(rows, -1)
                batch["use_cache"] = self.variant == "positions"  # with a cache transformers sees no documents
                if self.model.startswith("genslm"):
                    del batch["use_cache"]
                    batch["document_ids"] = (start >= 6).long().expand(rows, -1)
            elif self.variant == "custom-mask":
                generator = torch.Generator().manual_seed(seed)
                keep = torch.rand(rows, 1, self.seq_len, self.seq_len, generator=generator) < 0.5
                batch["attention_mask"] = keep | torch.eye(self.seq_len, dtype=torch.bool)
            elif self.variant == "ignored-shard":
                batch["labels"][:, : self.seq_len // self.size + 1] = -100
            yield batch


def full(parameter):
    """The whole parameter, at every ZeRO stage."""
    import deepspeed

    if hasattr(parameter, "ds_id"):
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach().clone()


def gradient(engine, parameter):
    from deepspeed.utils import safe_get_full_grad

    if engine.zero_optimization_stage() == 0:
        return parameter.grad.detach().clone() if parameter.grad is not None else None
    return safe_get_full_grad(parameter).clone()


def device():
    """This rank's."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().current_device_name()


def on_device(batch):
    return {name: value.to(device()) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def one_rank(case, model, rows, optimizer):
    """The reference: the whole batch on this rank alone, plain PyTorch. Returns losses and the last gradients."""
    losses, gradients = [], {}
    for step in range(case.steps):
        optimizer.zero_grad()
        for batch in case.micro_batches(step, rows):
            loss = oracle.run(case, model, batch, on_device).loss
            (loss / case.accumulation).backward()
            losses.append(loss.item())
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        if case.clipping:
            torch.nn.utils.clip_grad_norm_(model.parameters(), case.clipping)
        optimizer.step()
    return losses, gradients


def share(batch, dp_rank, dp_size):
    rows = next(iter(batch.values())).shape[0] // dp_size
    rows = slice(dp_rank * rows, (dp_rank + 1) * rows)
    return {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def scale_of(name, gradients):
    """The largest value of a gradient. A key bias adds nearly the same to all scores of a query, so that its gradient
    is what is left of the much larger terms that the query bias's consists of."""
    name = name.replace("key.bias", "query.bias").replace("k_proj.bias", "q_proj.bias")
    return gradients[name].abs().max().item()


def relative_error(actual, expected, scale=None):
    """Max error, relative to the largest value of the tensor."""
    scale = scale or expected.abs().max().item() or 1.0
    return (actual.float() - expected.float()).abs().max().item() / scale


def gathered_table(table, shard):
    """A tensor of a table's shape, put together from the shards of all ranks. For tests only."""
    pieces = [torch.empty_like(shard) for _ in range(table.size)]
    dist.all_gather(pieces, shard.contiguous(), group=table.group)
    return torch.cat(pieces)[: table.num_positions]


def keep_table_gradients(engine):
    """A list that gets the table's whole gradient of every step, as its optimizer uses it."""
    gradients, optimizer = [], engine.ds4sci_table_optimizer
    step = optimizer.optimizer.step

    def recording_step():
        gradients.append(gathered_table(optimizer.table, optimizer.table.weight.grad))
        step()

    optimizer.optimizer.step = recording_step
    return gradients


def run_case(case, mutate=None):
    """Errors of one case against one rank: {"loss", "gradient", "step"} -> (largest error, where)."""
    import deepspeed

    import deepspeed_ds4sci  # noqa: F401 - the hooks, where torch's autoload is off

    world = dist.get_world_size()
    dp_size, dp_rank = world // case.size, dist.get_rank() // case.size
    model = tiny_models.build(case.model)
    reference = oracle.reference_model(case, model).to(device())
    model = model.to(device())
    make = getattr(torch.optim, case.optimizer["type"])
    parameters = {name: value for name, value in case.optimizer["params"].items() if name != "torch_adam"}
    losses, gradients = one_rank(case, reference, dp_size, make(reference.parameters(), **parameters))

    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=case.ds_config(dp_size))
    if mutate is not None:
        mutate(engine)
    table_gradients = keep_table_gradients(engine) if case.sharded_table else []
    errors = {"loss": (0.0, ""), "gradient": (0.0, ""), "step": (0.0, "")}

    def record(kind, error, where):
        errors[kind] = max(errors[kind], (error, where))

    expected_losses = iter(losses)
    for step in range(case.steps):
        for batch in case.micro_batches(step, dp_size):
            loss = engine(**on_device(share(batch, dp_rank, dp_size))).loss
            engine.backward(loss)
            expected = next(expected_losses)
            record("loss", abs(loss.item() - expected) / abs(expected), f"step {step}")
            last = engine.is_gradient_accumulation_boundary() and step == case.steps - 1
            if last and not case.clipping:
                for name, parameter in engine.module.named_parameters():
                    if name in gradients:
                        error = relative_error(gradient(engine, parameter), gradients[name], scale_of(name, gradients))
                        record("gradient", error, name)
            engine.step()
    after = dict(reference.named_parameters())
    for name, parameter in engine.module.named_parameters():
        record("step", relative_error(full(parameter), after[name]), name)
    if case.sharded_table:
        table = engine.ds4sci_table_optimizer.table
        name = "transformer.wpe.weight" if case.model == "gpt2" else "position_embedding.weight"
        record("step", relative_error(gathered_table(table, table.weight.detach()), after[name]), name)
        if not case.clipping:
            record("gradient", relative_error(table_gradients[-1], gradients[name]), name)
    return errors


def run_cases(cases):
    """Runs every case on this rank and returns {case id: errors, or the traceback of a case that failed}."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    deepspeed.init_distributed(dist.get_backend())
    results = {}
    for case in cases:
        try:
            results[case.id] = run_case(case)
        except Exception:  # a failure on all ranks alike; one on some ranks ends the launch at the next collective
            results[case.id] = traceback.format_exc()
    return results
