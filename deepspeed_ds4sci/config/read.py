# SPDX-License-Identifier: Apache-2.0
"""From JSON to a typed block, with errors that name the dotted path."""

import difflib
from pathlib import Path

import hjson
from pydantic import ValidationError

from deepspeed_ds4sci.config.schema import DS4SciConfig

BLOCK = "ds4sci"

# Other ways people write the name, once case, dashes and underscores are gone.
_ALIASES = ("deepspeed4science", "deepspeedds4sci", "ds4science")


def load_file(path) -> dict:
    """The JSON object in a file. Comments are allowed, as in DeepSpeed; a key given twice is an error.

    Raises:
        ValueError: the file is missing, is not valid JSON, holds a key twice, or holds something else than an object.
    """
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ValueError(f"config file {path} cannot be read: {error.strerror}") from error
    try:
        loaded = hjson.loads(text, object_pairs_hook=_no_duplicates)
    except hjson.HjsonDecodeError as error:
        raise ValueError(f"config file {path} is not valid JSON: {error}") from error
    except _DuplicateKey as error:
        raise ValueError(f"config file {path} gives the key {error} twice in one object") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"config file {path} must hold one JSON object, got {type(loaded).__name__}")
    return loaded


class _DuplicateKey(Exception):
    pass


def _no_duplicates(pairs):
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(next(repr(key) for key in keys if keys.count(key) > 1))
    return result


def read_block(ds_config: dict) -> DS4SciConfig | None:
    """The typed block of a DeepSpeed config; None if there is none.

    Raises:
        ValueError: a top-level key looks like a misspelt block name, a key of the block is unknown, or a value is not
            allowed. The message gives each dotted path.
    """
    for key in ds_config:
        if key != BLOCK and _looks_like_block(key):
            raise ValueError(f"unknown key {key!r} in the DeepSpeed config looks like a misspelt {BLOCK!r}")
    if BLOCK not in ds_config:
        return None
    block = ds_config[BLOCK]
    if not isinstance(block, dict):
        raise ValueError(f"{BLOCK} must be a JSON object, got {block!r}")
    try:
        return DS4SciConfig(**block)
    except ValidationError as error:
        lines = [_describe(entry) for entry in error.errors()]
        raise ValueError("\n".join(dict.fromkeys(lines))) from error
    except TypeError as error:  # keys that are no Python names reach __init__ as they are
        raise ValueError(f"{BLOCK}: {error}") from error


def _looks_like_block(key):
    plain = str(key).lower().replace("_", "").replace("-", "")
    return plain in _ALIASES or bool(difflib.get_close_matches(plain, [BLOCK], cutoff=0.75))


def _describe(entry):
    # The alternatives of a union appear in the path as names of types; they are no keys.
    keys = [str(part) for part in entry["loc"] if not str(part)[:1].isupper() and not str(part).startswith("literal[")]
    path = ".".join([BLOCK, *keys])
    if entry["type"] == "extra_forbidden":
        near = difflib.get_close_matches(keys[-1], _known_keys(keys[:-1]), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(_known_keys(keys[:-1]))}"
        return f"{path}: unknown key{hint}"
    message = entry["msg"].removeprefix("Value error, ")
    return f"{path}: {message[:1].lower()}{message[1:]}, got {entry['input']!r}"


def _known_keys(path):
    model = DS4SciConfig
    for key in path:
        field = model.model_fields.get(key)
        if field is None or not hasattr(field.annotation, "model_fields"):
            return ["ulysses", "ring"] if key == "mode" else []
        model = field.annotation
    return list(model.model_fields)
