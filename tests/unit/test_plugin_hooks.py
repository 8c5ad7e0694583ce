# SPDX-License-Identifier: Apache-2.0
"""The hooks into DeepSpeed, each case in a process of its own: import order decides what can go wrong."""

import copy
import importlib.machinery
import re
import sys
import types

import pytest

from deepspeed_ds4sci import plugin
from tests.helpers.processes import run_python

# What every import order must end in.
CHECK_OURS = """
import deepspeed
import deepspeed.ops.deepspeed4science.evoformer_attn as op_module
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.deepspeed4science import DS4Sci_EvoformerAttention
from deepspeed.ops.op_builder import EvoformerAttnBuilder
from deepspeed.ops.op_builder.all_ops import ALL_OPS
from deepspeed_ds4sci.op_builder.evoformer_attn import EvoformerAttnBuilder as Ours

assert EvoformerAttnBuilder is Ours
assert op_module.EvoformerAttnBuilder is Ours
assert get_accelerator().get_op_builder("EvoformerAttnBuilder") is Ours
assert type(get_accelerator().create_op_builder("EvoformerAttnBuilder")) is Ours
assert type(ALL_OPS["evoformer_attn"]) is Ours
assert deepspeed.ops.__compatible_ops__["evoformer_attn"] is True
assert DS4Sci_EvoformerAttention.__module__ == "deepspeed_ds4sci.compat"
assert op_module.DS4Sci_EvoformerAttention.__module__ == "deepspeed_ds4sci.compat"
"""

CHECK_DEEPSPEEDS = """
import deepspeed
import deepspeed.ops.deepspeed4science.evoformer_attn as op_module
import deepspeed.ops.op_builder.all_ops
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.deepspeed4science import DS4Sci_EvoformerAttention

own = get_accelerator().get_op_builder("EvoformerAttnBuilder")
assert own.__module__.startswith("deepspeed.ops.op_builder."), own
assert deepspeed.ops.op_builder.EvoformerAttnBuilder is own
assert op_module.EvoformerAttnBuilder is own
assert type(get_accelerator().create_op_builder("EvoformerAttnBuilder")) is own
row = deepspeed.ops.op_builder.all_ops.ALL_OPS.get("evoformer_attn")
assert type(row) is (own if get_accelerator()._name == "cuda" else type(None)), row
assert not deepspeed.ops.__compatible_ops__.get("evoformer_attn", False)
assert DS4Sci_EvoformerAttention.__module__ == "deepspeed.ops.deepspeed4science.evoformer_attn"
assert op_module.DS4Sci_EvoformerAttention is DS4Sci_EvoformerAttention
"""

# Each thread comes to need what the other is importing.
TWO_THREADS = """
import sys, threading, time
import torch

def import_deepspeed():
    import deepspeed

def import_ours():
    while "deepspeed" not in sys.modules:
        time.sleep(0.001)
    import deepspeed_ds4sci.op_builder.evoformer_attn

threads = [threading.Thread(target=target) for target in (import_deepspeed, import_ours)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
EVERYTHING_OF_DEEPSPEED = "import deepspeed.ops.op_builder.all_ops, deepspeed.ops.deepspeed4science"


@pytest.mark.parametrize(
    ("first", "autoload", "accelerator"),
    [
        ("import deepspeed", 1, "cpu"),
        ("import deepspeed", 1, "cuda"),
        ("import torch", 1, "cpu"),
        ("import deepspeed_ds4sci", 0, "cpu"),
        (f"{EVERYTHING_OF_DEEPSPEED}\nimport deepspeed_ds4sci", 0, "cpu"),
        (f"{EVERYTHING_OF_DEEPSPEED}\nimport deepspeed_ds4sci", 0, "cuda"),
        ("import deepspeed_ds4sci.op_builder.evoformer_attn", 1, "cuda"),
        ("import deepspeed_ds4sci.op_builder.evoformer_attn", 0, "cpu"),
        ("import deepspeed_ds4sci.op_builder.builder", 1, "cpu"),
        (TWO_THREADS, 1, "cpu"),
        ("from deepspeed.ops.op_builder.all_ops import ALL_OPS", 1, "cuda"),
    ],
    ids=[
        "deepspeed-cpu",
        "deepspeed-cuda",
        "torch",
        "ours",
        "ours-last-cpu",
        "ours-last-cuda",
        "builder",
        "builder-no-autoload",
        "builder-base",
        "two-threads",
        "all_ops",
    ],
)
def test_import_order(first, autoload, accelerator):
    """Each of the three may come first, and ours last where the autoload is off."""
    output = run_python(f"{first}\n{CHECK_OURS}", TORCH_DEVICE_BACKEND_AUTOLOAD=autoload, DS_ACCELERATOR=accelerator)
    assert "[deepspeed_ds4sci]" not in output, "nothing has been used yet, so nothing is announced"


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_disable_and_enable(accelerator):
    run_python(
        f"""{CHECK_OURS}
import deepspeed_ds4sci
bound_before = DS4Sci_EvoformerAttention
for _ in range(2):
    deepspeed_ds4sci.disable()
    deepspeed_ds4sci.disable()
    {CHECK_DEEPSPEEDS.replace(chr(10), chr(10) + "    ")}
    assert bound_before.deepspeed_own is DS4Sci_EvoformerAttention
    deepspeed_ds4sci.enable()
    deepspeed_ds4sci.enable()
    {CHECK_OURS.replace(chr(10), chr(10) + "    ")}
""",
        DS_ACCELERATOR=accelerator,
    )


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_disabled_by_environment(accelerator):
    run_python(f"import deepspeed_ds4sci\n{CHECK_DEEPSPEEDS}", DS4SCI_DISABLE=1, DS_ACCELERATOR=accelerator)


def test_disable_before_deepspeed_is_imported():
    run_python(f"import torch, deepspeed_ds4sci\ndeepspeed_ds4sci.disable()\n{CHECK_DEEPSPEEDS}")


def test_a_bound_op_follows_disable():
    """Who imported the name before disable() gets DeepSpeed's op from then on."""
    run_python("""
        import deepspeed_ds4sci, torch
        from deepspeed.ops.deepspeed4science import DS4Sci_EvoformerAttention
        deepspeed_ds4sci.disable()
        q = torch.randn(1, 2, 8, 1, 8)
        try:
            DS4Sci_EvoformerAttention(q, q, q, [])
        except AssertionError as error:
            assert "seq_len must be greater than 16" in str(error)  # DeepSpeed's limit, not ours
        else:
            raise SystemExit("our op answered")
    """)


def test_one_line_at_first_use():
    output = run_python("""
        import torch
        from deepspeed.ops.deepspeed4science import DS4Sci_EvoformerAttention
        print("imported")
        q = torch.randn(1, 2, 8, 1, 8)
        for _ in range(3):
            DS4Sci_EvoformerAttention(q, q, q, [])
    """)
    line = "DeepSpeed's Evoformer attention op is provided by deepspeed_ds4sci"
    assert output.count(line) == 1
    assert output.index("imported") < output.index(line)


def test_other_ranks_are_silent():
    output = run_python(
        """
        import torch
        from deepspeed.ops.deepspeed4science import DS4Sci_EvoformerAttention
        q = torch.randn(1, 2, 8, 1, 8)
        DS4Sci_EvoformerAttention(q, q, q, [])
        """,
        RANK=1,
    )
    assert "is provided by deepspeed_ds4sci" not in output


def test_application_logging_gets_the_line_once():
    output = run_python("""
        import logging, torch
        logging.basicConfig(level=logging.INFO, format="APP %(name)s %(message)s")
        from deepspeed.ops.deepspeed4science import DS4Sci_EvoformerAttention
        q = torch.randn(1, 2, 8, 1, 8)
        DS4Sci_EvoformerAttention(q, q, q, [])
    """)
    (line,) = [line for line in output.splitlines() if "is provided by deepspeed_ds4sci" in line]
    assert line.startswith("APP deepspeed_ds4sci.plugin ")


def test_compiled_without_a_graph_break():
    output = run_python("""
        import torch
        from deepspeed.ops.deepspeed4science import DS4Sci_EvoformerAttention
        q = torch.randn(1, 2, 8, 1, 8)
        op = torch.compile(lambda q: DS4Sci_EvoformerAttention(q, q, q, [None, None]), fullgraph=True, backend="eager")
        torch.testing.assert_close(op(q), DS4Sci_EvoformerAttention(q, q, q, []))
    """)
    assert output.count("is provided by deepspeed_ds4sci") == 1


def report_rows(**variables):
    """ds_report's rows as {name: (installed, compatible)}, with the whole output."""
    output = run_python("from deepspeed.env_report import cli_main; cli_main()", **variables)
    plain = re.sub(r"\x1b\[\d+m", "", output)
    rows = {name: (one, two) for name, one, two in re.findall(r"^(\w+) \.+ \[(\w+)\] \.+ \[(\w+)\]", plain, re.M)}
    return rows, plain


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_ds_report_row(accelerator):
    rows, output = report_rows(DS_ACCELERATOR=accelerator, CUDA_VISIBLE_DEVICES="")
    assert rows["evoformer_attn"] == ("NO", "NO")
    assert "evoformer_attn: " in output
    assert "no CUDA GPU is visible" in output
    assert len(rows) > 5, "DeepSpeed's own rows stay"


def test_ds_report_row_without_the_hooks():
    assert "evoformer_attn" not in report_rows(DS_ACCELERATOR="cpu", DS4SCI_DISABLE=1)[0]


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_ds_report_says_installed_for_a_prebuilt_library(accelerator):
    """Also on an accelerator other than the one that DeepSpeed's wheel was made on, and for our row alone."""
    output = run_python(
        """
        import deepspeed_ds4sci
        from deepspeed_ds4sci.op_builder.builder import DS4SciOpBuilder
        deepspeed_ds4sci.disable()
        from deepspeed import git_version_info
        git_version_info.accelerator_name = "cpu"
        git_version_info.installed_ops["fused_adam"] = True
        before = dict(git_version_info.installed_ops)
        DS4SciOpBuilder.fitting_prebuilt = lambda self, capabilities: ("library.so", "")
        DS4SciOpBuilder.missing = lambda self: []
        deepspeed_ds4sci.enable()
        from deepspeed.env_report import op_report
        op_report(verbose=False)
        deepspeed_ds4sci.disable()
        assert git_version_info.accelerator_name == "cpu"
        assert git_version_info.installed_ops == before
        """,
        DS_ACCELERATOR=accelerator,
    )
    plain = re.sub(r"\x1b\[\d+m", "", output)
    assert re.search(r"^evoformer_attn \.+ \[YES\] \.+ \[OKAY\]", plain, re.M)
    assert re.search(rf"^fused_adam \.+ \[{'YES' if accelerator == 'cpu' else 'NO'}\]", plain, re.M)


@pytest.mark.parametrize("module", ["builder", "evoformer_attn"])
def test_installed_is_told_to_deepspeed_also_where_our_builder_was_imported_first(module):
    run_python(f"""
        from deepspeed_ds4sci import plugin
        seen = []
        plugin.HOOKS["deepspeed.git_version_info"] = lambda module: seen.append(plugin._builder_class())
        import deepspeed_ds4sci.op_builder.{module}
        assert seen[0] is None, "DeepSpeed was imported half way through our module"
        assert seen[-1] is deepspeed_ds4sci.op_builder.evoformer_attn.EvoformerAttnBuilder
    """)


def test_a_module_that_is_being_imported_runs_its_own_hook_later(monkeypatch):
    half = types.ModuleType("deepspeed.ops.op_builder.all_ops")
    half.__spec__ = types.SimpleNamespace(_initializing=True)
    ran = []
    monkeypatch.setattr(plugin, "_run_hook", lambda name, module: ran.append(name))
    monkeypatch.setitem(sys.modules, half.__name__, half)
    plugin._hook_own_builder(None)
    assert half.__name__ not in ran
    half.__spec__._initializing = False
    plugin._hook_own_builder(None)
    assert half.__name__ in ran


def test_a_hooked_loader_can_be_copied():
    loader = plugin._HookedLoader(importlib.machinery.SourceFileLoader("name", "path.py"))
    assert copy.copy(loader).path == loader.path == "path.py"
    for name in ("_loader", "__setstate__"):
        with pytest.raises(AttributeError, match=f"'_HookedLoader' object has no attribute '{name}'"):
            getattr(plugin._HookedLoader.__new__(plugin._HookedLoader), name)


def test_find_spec_works_on_hooked_modules():
    """OpenFold and OpenFold3 look for the module before they import it."""
    run_python("""
        import importlib.util, inspect, torch
        assert importlib.util.find_spec("deepspeed.ops.deepspeed4science") is not None
        assert importlib.util.find_spec("deepspeed.ops.no_such_module") is None
        import deepspeed.ops.deepspeed4science.evoformer_attn as module
        assert type(module.__loader__).__name__ == "SourceFileLoader"
        assert module.__spec__.loader is module.__loader__
        assert "def attention_bwd" in inspect.getsource(module)
    """)


def test_package_folder_named_op_builder_is_not_taken_for_deepspeeds():
    """DeepSpeed tries a top-level `op_builder` first; in a checkout of this project that is ours."""
    import deepspeed_ds4sci.op_builder as package

    run_python("import deepspeed", cwd=package.__path__[0] + "/..")


# DeepSpeed of another version, as far as the hooks can see.
FAKE_VERSION = """
import sys, types
fake = types.ModuleType("deepspeed.git_version_info_installed")
fake.version, fake.git_hash, fake.git_branch = "VERSION", "x", "x"
fake.installed_ops, fake.accelerator_name = {}, "cpu"
fake.torch_info = {"version": "0.0", "cuda_version": "0.0", "nccl_version": "0.0", "hip_version": "0.0"}
sys.modules[fake.__name__] = fake
"""


def test_unsupported_deepspeed_keeps_its_own_op():
    output = run_python(
        f"{FAKE_VERSION.replace('VERSION', '0.20.0')}\n{CHECK_DEEPSPEEDS}\nprint(deepspeed.__version__)"
    )
    assert output.endswith("0.20.0\n")
    warning = "the hooks into DeepSpeed stay off: they support deepspeed>=0.19.8,<0.20, got 0.20.0"
    assert output.count("[deepspeed_ds4sci] WARNING") == output.count(warning) == 1


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.19.8", True),
        ("0.19.8+local", True),
        ("0.19.12", True),
        ("0.19.7", False),
        ("0.20.0", False),
        ("0.20.0.dev1", False),
        ("1.0", False),
        (None, False),
    ],
)
def test_supported_versions(monkeypatch, caplog, version, supported):
    monkeypatch.setattr(plugin, "_state", plugin._State())
    monkeypatch.setattr(plugin, "_deepspeed_version", lambda: version)
    assert plugin._version_supported() is supported
    assert plugin._version_supported() is supported
    assert len(caplog.records) == (0 if supported else 1)
    if not supported:
        assert f"got {version or 'an unknown version'}" in caplog.text


def test_version_of_a_source_checkout(monkeypatch, tmp_path):
    """A checkout on PYTHONPATH has no installed version module, but a text file beside the package."""
    checkout = types.ModuleType("deepspeed")
    checkout.__path__ = [str(tmp_path / "deepspeed")]
    monkeypatch.setitem(plugin.sys.modules, "deepspeed", checkout)
    monkeypatch.delitem(plugin.sys.modules, "deepspeed.git_version_info_installed", raising=False)
    assert plugin._deepspeed_version() is None
    (tmp_path / "version.txt").write_text("0.19.9\n")
    assert plugin._deepspeed_version() == "0.19.9"


def test_failing_hook_is_one_warning(monkeypatch, caplog):
    def broken(module):
        raise KeyError("moved elsewhere")

    monkeypatch.setitem(plugin.HOOKS, "deepspeed.ops", broken)
    monkeypatch.setattr(plugin, "_version_supported", lambda: True)
    plugin._run_hook("deepspeed.ops", types.ModuleType("deepspeed.ops"))
    assert "the hook on deepspeed.ops failed, DeepSpeed's own op stays in place there" in caplog.text


def test_top_module_is_never_hooked():
    assert "deepspeed" not in plugin.HOOKS
