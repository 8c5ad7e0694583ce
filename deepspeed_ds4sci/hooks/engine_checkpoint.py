# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's save_checkpoint and load_checkpoint, with what the hooks add to a checkpoint, and made safe.

Save: everything goes to a folder `TAG.partial`, which gets its name once all ranks have written their files; then
`latest` is replaced in one step. DeepSpeed itself writes into the final folder and names it in `latest` while other
ranks may still be writing. A crash at any moment leaves the previous checkpoint whole and chosen.

Load: the files are compared with the list that was saved, and the parts of the hooks are read for what would be
refused, before anything is changed; what one rank finds, all ranks raise.
"""

import functools
import inspect
import json
import os
import shutil
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from deepspeed_ds4sci.hooks.loader_checkpoint import make_resumable
from deepspeed_ds4sci.hooks.random_checkpoint import RandomCheckpoint

MANIFEST = "ds4sci_checkpoint.json"


class Part(Protocol):
    """What a hook adds to checkpoints. All ranks call all of it, in the same order."""

    def write(self, folder: Path) -> None: ...

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
        for part in self.parts:
            part.write(partial)
        original(save_dir, partial.name, {} if client_state is None else client_state, save_latest=False, **kwargs)
        if self._keeps_files:  # DeepSpeed's barrier has passed: every file is there
            self._write_manifest(partial)
            _swap(partial, folder)
            if save_latest and self.engine.global_rank == 0:
                _replace_text(Path(save_dir) / "latest", tag)
        dist.barrier()
        return True

    @property
    def _keeps_files(self):
        """Whether this rank is the one that names files: rank 0, or one per node where each has a disk of its own."""
        engine = self.engine
        return (engine.local_rank if engine.use_node_local_storage() else engine.global_rank) == 0

    def _write_manifest(self, folder):
        files = {str(path.relative_to(folder)): path.stat().st_size for path in _files(folder)}
        _replace_text(folder / MANIFEST, json.dumps({"layout": self.layout, "files": files}, indent=1) + "\n")

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
        if not folder.is_dir():
            raise ValueError(f"there is no checkpoint {folder}")
        manifest = _manifest(folder)
        if manifest is not None:
            if self._keeps_files:
                _compare_files(folder, manifest["files"])
            self._check_layout(folder, manifest["layout"], with_state)
        for part in self.parts:
            part.check(folder)

    def _check_layout(self, folder, saved, with_state):
        engine = self.engine
        if not with_state or engine.load_universal_checkpoint() or engine.zero_elastic_checkpoint():
            return
        # Without ZeRO every rank has all of the optimizer state, however many there are.
        names = ("zero", "ranks") if saved["zero"] != "off" else ("zero",)
        for name in names:
            if saved[name] != self.layout[name]:
                way = (
                    f"convert it with `python -m deepspeed_ds4sci.checkpoint universal {folder}`, and set "
                    "checkpoint.load_universal in the config"
                    if saved["zero"] != "off"
                    else "pass load_optimizer_states=False to take the weights alone"
                )
                raise ValueError(
                    f"{folder} was saved with {name} = {saved[name]}, and this engine has {self.layout[name]}: its "
                    f"optimizer states are partitioned otherwise; {way}"
                )


def install_checkpoint(engine, context) -> None:
    """Gives an engine its `ds4sci_checkpoint`, with what every engine's checkpoints need: random states and the
    position of its loader."""
    parallel = context.config.sequence_parallel
    layout = {
        "ranks": dist.get_world_size(),
        "zero": {0: "off", 3: "stage 3"}.get(engine.zero_optimization_stage(), "stage 1 or 2"),
        "sequence_parallel": parallel.model_dump(include={"size", "mode"}),
    }
    engine.ds4sci_checkpoint = EngineCheckpoint(engine, layout)
    engine.ds4sci_checkpoint.parts.append(RandomCheckpoint(context.sequence))
    make_resumable(engine)


def _manifest(folder):
    path = folder / MANIFEST
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged and cannot be read: {error}") from error


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _compare_files(folder, files):
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"the checkpoint {folder} lacks the file {name}")
        if path.stat().st_size != size:
            raise ValueError(
                f"{path} is damaged: it has {path.stat().st_size} bytes, and had {size} when it was saved"
            )


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
    replaced = folder.with_name(folder.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _finish_swap(folder):
    """After a crash in the middle of `_swap`: the older checkpoint is still there under its other name."""
    replaced = folder.with_name(folder.name + ".replaced")
    if replaced.is_dir() and not folder.exists():
        replaced.rename(folder)


def _replace_text(path, text):
    scratch = path.with_name(path.name + ".partial")
    with scratch.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
