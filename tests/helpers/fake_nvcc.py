# SPDX-License-Identifier: Apache-2.0
"""A stand-in for nvcc that compiles nothing: its "objects" are copies of their inputs. Counts its calls."""

from dataclasses import dataclass
from pathlib import Path

from deepspeed_ds4sci.op_builder.library import Library

# Text constants of a .cpp come out as a compiler would write them: unescaped and ended by a zero byte.
_SCRIPT = r"""#!/bin/sh
case "$1" in
    --version) echo "Cuda compilation tools, release @RELEASE@, V@RELEASE@.1"; exit ;;
    --list-gpu-arch) echo compute_80 compute_86 compute_89 compute_90 @ARCHS@; exit ;;
esac
set -e
echo "$*" >> "@LOG@"
sleep "${FAKE_NVCC_SECONDS:-0}"
IFS='
'
for argument in "$@"; do
    case "$argument" in
        *.cu | *.cpp | *.o) [ "$previous" = -o ] || inputs="$inputs$IFS$argument" ;;
    esac
    if [ "$previous" = -o ]; then out=$argument; fi
    previous=$argument
done
if grep -l "syntax error" $inputs; then echo "error: expected a ';'"; exit 1; fi
case "$inputs" in
    *.cpp) sed 's/\\"/"/g; s/";$//' $inputs | tr '\n' '\0' > "$out" ;;
    *) cat $inputs > "$out" ;;
esac
"""


class FakeNvcc:
    """The program and its call log.

    Args:
        home: folder to create it in, for CUDA_HOME.
        release: CUDA version it claims.
        archs: more architectures that it claims to know.
    """

    def __init__(self, home, release="12.9", archs="compute_100 compute_120"):
        self.home = Path(home)
        self.log = self.home / "calls.log"
        path = self.home / "bin" / "nvcc"
        path.parent.mkdir(parents=True)
        script = _SCRIPT.replace("@RELEASE@", release).replace("@ARCHS@", archs).replace("@LOG@", str(self.log))
        path.write_text(script)
        path.chmod(0o755)

    def calls(self):
        """Command lines so far."""
        return self.log.read_text().splitlines() if self.log.is_file() else []

    def compiled(self):
        """Names of the sources compiled so far, sorted, with doubles."""
        words = [word for line in self.calls() if " -shared " not in f" {line} " for word in line.split()]
        return sorted(Path(word).name for word in words if word.endswith(".cu"))


@dataclass(frozen=True)
class FolderLibrary(Library):
    """A Library whose sources lie in a folder of the test's."""

    root: str = ""

    def include_dir(self):
        return Path(self.root)


def write_sources(folder):
    """A small set of sources: api.cu, a portable and a Hopper-only instantiation, a header. Returns the Library."""
    instantiations = Path(folder) / "instantiations"
    instantiations.mkdir(parents=True)
    (Path(folder) / "api.cu").write_text("// api\n")
    (Path(folder) / "tile.cuh").write_text("// tile\n")
    (instantiations / "fwd.cu").write_text("// forward\n")
    (instantiations / "fwd_sm90.cu").write_text("// Hopper forward\n")
    return FolderLibrary(
        name="ds4sci_evoformer_attn", folder="", build_variable="DS4SCI_BUILD_EVOFORMER_ATTN", root=str(folder)
    )
