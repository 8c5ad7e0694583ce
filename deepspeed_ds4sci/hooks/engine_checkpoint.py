# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's save_checkpoint and load_checkpoint, with what the hooks add to a checkpoint, and made safe.

Save: everything goes to a folder `TAG.partial`, which gets its name once all ranks have written their files; then
`latest` is replaced in one step. DeepSpeed itself writes into the final folder and names it in `latest` while other
ranks may still be writing. A crash at any moment leaves the previous checkpoint whole and chosen.

Load: the files are compared with the list that was saved (see `checkpoint.manifest`), and the parts of the hooks are
read for what would be refused, before anything is changed; what one rank finds, all ranks raise.
"""

import contextlib
import functools
import inspect
import logging
import shutil
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from deepspeed_ds4sci.checkpoint.manifest import (
    MANIFEST,
    check_sizes,
    check_sums,
    files_of,
    read_manifest,
    replace_text,
    replaced_by,
    write_manifest,
    write_sums,
)
from deepspeed_ds4sci.hooks.loader_checkpoint import make_resumable
from deepspeed_ds4sci.hooks.random_checkpoint import RandomCheckpoint
from deepspeed_ds4sci.hooks.stage0_universal import Stage0Universal, names_by_group

logger = logging.getLogger(__name__)

_CONVERT = (
    "convert it with `python -m deepspeed_ds4sci.checkpoint universal {}`, and set checkpoint.load_universal in the "
    "config"
)


class Part(Protocol):
    """What a hook adds to checkpoints. All ranks call all of it, in the same order."""

    def write(self, folder: Path) -> Path | None:
        """Returns the file that this rank wrote, if any."""

    def check(self, folder: Path) -> None:
        """Raises ValueError for what `read` could not take. Changes nothing."""

    def read(self, folder: Path, module_only: bool, optimizer_states: bool) -> None: ...


class EngineCheckpoint:
    """Wraps an engine's save_checkpoint and load_checkpoint; `parts` are saved and loaded with it."""

    def __init__(self, engine, layout: dict):
        """layout: of the ranks, for the manifest and for comparison with another engine's."""
        self.engine, self.layout, self.parts = engine, layout, []
        self._signature = inspect.signature(engine.load_checkpoint)
        engine.save_checkpoint = functools.partial(self._save, engine.save_checkpoint)
        engine.load_checkpoint = functools.partial(self._load, engine.load_checkpoint)

    # ---- save -------------------------------------------------------------------------------------------------------

    def _save(self, original, save_dir, tag=None, client_state=None, save_latest=True, **kwargs):
        if self.engine.checkpoint_engine.is_decoupled():
            raise NotImplementedError(
                "a ds4sci block does not go with DeepSpeed's decoupled checkpoint writer, which finishes after "
                "save_checkpoint returns; leave checkpoint.writer out of the config"
            )
        tag = str(f"global_step{self.engine.global_steps}" if tag is None else tag)
        folder, partial = Path(save_dir) / tag, Path(save_dir) / f"{tag}.partial"
        if self._keeps_files:
            shutil.rmtree(partial, ignore_errors=True)  # of a save that was cut off
            partial.mkdir(parents=True)
        dist.barrier()
        written = [path for part in self.parts if (path := part.write(partial)) is not None]
        with _recorded(self.engine.checkpoint_engine, written):
            original(
                save_dir, f"{tag}.partial", {} if client_state is None else client_state, save_latest=False, **kwargs
            )
        written = [path for path in written if path.is_file()]
        written += files_of(partial / "offloaded_tensors" / f"rank{self._number:02d}")  # DeepSpeed's, of NVMe
        write_sums(partial, self._number, written)
        dist.barrier()
        if self._keeps_files:
            write_manifest(partial, layout=self.layout, **self._named())
            _swap(partial, folder)
            if save_latest and self.engine.global_rank == 0:
                replace_text(Path(save_dir) / "latest", tag)
        dist.barrier()
        return True

    def _named(self):
        """What conversion needs to know of an optimizer state that is not partitioned."""
        stage = self.engine.zero_optimization_stage()
        return {"parameter_groups": names_by_group(self.engine)} if stage == 0 else {}

    @property
    def _number(self):
        """Of this rank among those that see the same files."""
        engine = self.engine
        return engine.local_rank if engine.use_node_local_storage() else engine.global_rank

    @property
    def _keeps_files(self):
        """Whether this rank is the one that names files: rank 0, or one per node where each has a disk of its own."""
        return self._number == 0

    # ---- load -------------------------------------------------------------------------------------------------------

    def _load(self, original, *args, **kwargs):
        call = self._signature.bind(*args, **kwargs)
        call.apply_defaults()
        arguments = call.arguments
        folder = self._chosen(Path(arguments["load_dir"]), arguments["tag"])
        if folder is not None:
            module_only = arguments["load_module_only"]
            with_state = arguments["load_optimizer_states"] and not module_only
            _agree(functools.partial(self._check, folder, with_state))
            _agree(functools.partial(self._check_content, folder, with_state))
            if self._unpartitioned_universal():
                load = Stage0Universal(self.engine, folder).load
                original = functools.partial(load, original, arguments, with_state)
                args, kwargs = (), {}
        result = original(*args, **kwargs)
        if result[0] is not None:
            for part in self.parts:
                part.read(folder, module_only, with_state)
        return result

    def _chosen(self, load_dir, tag):
        """The checkpoint's folder; None where DeepSpeed will say that there is none."""
        if tag is None:
            latest = load_dir / ("latest_universal" if self.engine.load_universal_checkpoint() else "latest")
            if not latest.is_file():
                return None
            tag = latest.read_text().strip()
            if not tag:
                raise ValueError(f"{latest} is empty; pass the tag of a checkpoint in {load_dir}")
        folder = load_dir / str(tag)
        if self._keeps_files:
            _finish_swap(folder)
        dist.barrier()
        return folder

    def _check(self, folder, with_state):
        """What is known without reading the files."""
        if not folder.is_dir():
            raise ValueError(f"there is no checkpoint {folder}")
        manifest = read_manifest(folder)
        if manifest is None:
            if self._keeps_files:
                logger.warning("%s has no %s, so its files cannot be checked", folder, MANIFEST)
            return
        if self._keeps_files:
            check_sizes(folder, manifest)
        self._check_layout(folder, manifest, with_state)

    def _unpartitioned_universal(self):
        return self.engine.load_universal_checkpoint() and self.engine.zero_optimization_stage() == 0

    def _check_content(self, folder, with_state):
        manifest = read_manifest(folder)
        if manifest is not None:
            # How many ranks a node has is not known: there its first rank reads all that the node has.
            count = 1 if self.engine.use_node_local_storage() else dist.get_world_size()
            check_sums(folder, manifest, self._number, count)
        if self._unpartitioned_universal():
            Stage0Universal(self.engine, folder).check(with_state)
        for part in self.parts:
            part.check(folder)

    def _check_layout(self, folder, manifest, with_state):
        engine = self.engine
        universal = manifest.get("universal", False)
        if universal != engine.load_universal_checkpoint():
            raise ValueError(
                f"{folder} is {'a' if universal else 'no'} universal checkpoint: checkpoint.load_universal in the "
                f"config must be {str(universal).lower()}, got {str(not universal).lower()}"
            )
        if universal:
            return
        saved = manifest["layout"]
        self._check_table(folder, saved, with_state)
        if not with_state or engine.zero_elastic_checkpoint():
            return
        # Without ZeRO every rank has all of the optimizer state, however many there are.
        names = ("zero", "ranks") if saved["zero"] != "off" else ("zero",)
        for name in names:
            if saved[name] != self.layout[name]:
                raise ValueError(
                    f"{folder} was saved with {name} = {saved[name]}, and this engine has {self.layout[name]}: its "
                    f"optimizer states are partitioned otherwise; {_CONVERT.format(folder)}; or pass "
                    "load_optimizer_states=False to take the weights alone"
                )

    def _check_table(self, folder, saved, with_state):
        """A table that one of the two has in parts: DeepSpeed's files lack it, or have it as one more weight."""
        ours = self.layout["sharded_table"]
        if saved["sharded_table"] == ours:
            return
        whole = "stage 3" not in (saved["zero"], self.layout["zero"])
        if ours and whole and not with_state:
            return  # the weights alone: the whole table is cut
        raise ValueError(
            f"{folder} was saved with{'' if saved['sharded_table'] else 'out'} position_embedding.sharded, and this "
            f"engine is with{'' if ours else 'out'}; {_CONVERT.format(folder)}"
        )


def install_checkpoint(engine, context) -> None:
    """Gives an engine its `ds4sci_checkpoint`, with what every engine's checkpoints need: random states and the
    position of its loader."""
    parallel = context.config.sequence_parallel
    layout = {
        "ranks": dist.get_world_size(),
        "zero": {0: "off", 3: "stage 3"}.get(engine.zero_optimization_stage(), "stage 1 or 2"),
        "sequence_parallel": parallel.model_dump(include={"size", "mode"}),
        "sharded_table": context.config.position_embedding.sharded,
    }
    engine.ds4sci_checkpoint = EngineCheckpoint(engine, layout)
    engine.ds4sci_checkpoint.parts.append(RandomCheckpoint(context.sequence))
    make_resumable(engine)


@contextlib.contextmanager
def _recorded(checkpoint_engine, written):
    """Adds the files that DeepSpeed saves on this rank to `written`."""
    save = checkpoint_engine.save

    def recording(state_dict, path):
        save(state_dict, path)
        written.append(Path(path))

    checkpoint_engine.save = recording
    try:
        yield
    finally:
        checkpoint_engine.save = save


def _agree(check):
    """Runs a check on every rank, and raises on all of them what one of them found."""
    try:
        check()
        mine = None
    except ValueError as error:
        mine = str(error)
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    message = next((each for each in found if each is not None), None)
    if message is not None:
        raise ValueError(message)


def _swap(partial, folder):
    """Gives `partial` its name. An older checkpoint of that name goes away last."""
    replaced = replaced_by(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _finish_swap(folder):
    """After a crash in the middle of `_swap`: the older checkpoint is still there under its other name."""
    replaced = replaced_by(folder)
    if replaced.is_dir() and not folder.exists():
        replaced.rename(folder)
