# SPDX-License-Identifier: Apache-2.0
"""What happens in `import torch`: almost nothing, and never an error."""

import shutil
from pathlib import Path

import pytest

import deepspeed_ds4sci
from tests.helpers.processes import run_python

PACKAGE = Path(deepspeed_ds4sci.__file__).parent


def test_torch_loads_the_entry_point_and_not_the_hooks():
    run_python("""
        import sys
        import torch
        from deepspeed_ds4sci import _autoload
        assert sys.meta_path[0] is _autoload._trigger
        assert "deepspeed_ds4sci.plugin" not in sys.modules
    """)


def test_torch_switch():
    run_python(
        """
        import sys
        import torch
        assert not any(name.startswith("deepspeed_ds4sci") for name in sys.modules)
        """,
        TORCH_DEVICE_BACKEND_AUTOLOAD=0,
    )


@pytest.mark.parametrize(("value", "disabled"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_own_switch(value, disabled):
    run_python(
        f"""
        import sys
        import deepspeed_ds4sci
        waiting = deepspeed_ds4sci._autoload._trigger in sys.meta_path
        assert waiting is not {disabled}
        """,
        DS4SCI_DISABLE=value,
    )


def test_own_switch_wins_over_enable():
    output = run_python(
        """
        import deepspeed_ds4sci, sys
        deepspeed_ds4sci.enable()
        assert not deepspeed_ds4sci.plugin.enabled()
        assert deepspeed_ds4sci.plugin._finder not in sys.meta_path
        """,
        DS4SCI_DISABLE=1,
    )
    assert "DS4SCI_DISABLE is set: the hooks into DeepSpeed stay off" in output


def test_standard_library_only():
    run_python("""
        import sys
        import deepspeed_ds4sci
        others = {name.partition(".")[0] for name in sys.modules} - {"__main__", "deepspeed_ds4sci"}
        # What Python itself starts with: the site hooks of the environment, such as an editable install's finder.
        others = {name for name in others - sys.stdlib_module_names if not name.startswith(("__editable__", "_"))}
        assert others <= {"sitecustomize", "usercustomize"}, others
    """)


def test_repeated_registration_changes_nothing():
    run_python("""
        import sys
        from deepspeed_ds4sci import _autoload
        finders = list(sys.meta_path)
        _autoload.register()
        assert sys.meta_path == finders
        _autoload.unregister()
        _autoload.unregister()
        assert _autoload._trigger not in sys.meta_path
    """)


def test_cost(tmp_path):
    """Below a millisecond with bytecode in place: the least of many tries, so that a busy machine does not matter."""
    code = """
        import sys, time
        from importlib.metadata import entry_points
        (entry,) = [entry for entry in entry_points(group="torch.backends") if entry.name == "deepspeed_ds4sci"]
        costs = []
        for _ in range(30):
            start = time.perf_counter()
            entry.load()()
            costs.append(time.perf_counter() - start)
            sys.modules["deepspeed_ds4sci._autoload"].unregister()
            for name in [name for name in sys.modules if name.startswith("deepspeed_ds4sci")]:
                del sys.modules[name]
        print(min(costs))
    """
    output = run_python(code, PYTHONPYCACHEPREFIX=tmp_path, PYTHONDONTWRITEBYTECODE="")
    assert float(output) < 1e-3


def broken_copy(folder, name, content):
    """A copy of the package with one file replaced, to be put on PYTHONPATH."""
    copy = folder / "deepspeed_ds4sci"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    target = copy / name
    target.parent.mkdir(exist_ok=True)
    target.write_text(content)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("plugin.py", "raise ModuleNotFoundError('plugin')\n", "could not be loaded: ModuleNotFoundError('plugin')"),
        ("plugin.py", "def enable(:\n", "the hooks into DeepSpeed could not be loaded: SyntaxError"),
        ("plugin.py", "def enable():\n    raise OSError('disk')\n", "could not be loaded: OSError('disk')"),
        ("op_builder/__init__.py", "raise RuntimeError('half installed')\n", "DeepSpeed's own"),
    ],
    ids=["missing", "syntax", "exception", "builder"],
)
def test_broken_install_leaves_torch_and_deepspeed_alone(tmp_path, name, content, expected):
    output = run_python(
        """
        import torch
        import deepspeed_ds4sci
        assert deepspeed_ds4sci.__file__.startswith(FOLDER)
        import deepspeed
        from deepspeed.ops.op_builder.all_ops import ALL_OPS
        builder = deepspeed.accelerator.get_accelerator().get_op_builder("EvoformerAttnBuilder")
        assert builder.__module__.startswith("deepspeed.ops.op_builder"), builder
        assert deepspeed.ops.op_builder.EvoformerAttnBuilder is builder
        from deepspeed.ops.deepspeed4science import DS4Sci_EvoformerAttention
        print("fine")
        """.replace("FOLDER", repr(str(tmp_path))),
        PYTHONPATH=broken_copy(tmp_path, name, content),
    )
    assert output.endswith("fine\n")
    assert expected in output
