"""Builds the compiled extension where it can be built; everything else about the package is in pyproject.toml.

_extension_cpu.so needs PyTorch 2.10 and GCC 9 or Clang 10, or later; _extension_cuda.so also a CUDA toolkit and a
PyTorch built for CUDA. No GPU is asked for, nothing is downloaded. Without them the package is installed all the same.

    SMILE_KERNELS_SKIP_BUILD=1          build neither
    SMILE_KERNELS_FORCE_CUDA_BUILD=1    build both whatever PyTorch was built for, and fail where that is impossible
    TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX"  GPU architectures, as for PyTorch's own extensions
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
FORCE = os.environ.get("SMILE_KERNELS_FORCE_CUDA_BUILD") == "1"
# One binary for each major architecture; the last one's PTX serves what comes after it.
ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST", "7.5;8.0;9.0;10.0;12.0+PTX")


def find_torch() -> tuple[str, tuple[int, int], str | None] | None:
    """Folder, (major, minor) and CUDA version of the PyTorch to build for, also from an isolated build."""
    code = "import torch, json; print(json.dumps([torch.__path__[0], torch.__version__, torch.version.cuda]))"
    for flags in ([], ["-I"]):
        found = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd=os.sep)
        if found.returncode == 0:
            folder, version, cuda = json.loads(found.stdout.splitlines()[-1])
            return folder, tuple(int(part) for part in version.split(".")[:2]), cuda
    return None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", os.environ.get("CUDA_PATH", "/usr/local/cuda"))
    return shutil.which("nvcc", path=os.path.join(home, "bin")) or shutil.which("nvcc")


def gencode(architectures: str) -> str:
    """nvcc's flags for a list as TORCH_CUDA_ARCH_LIST has it."""
    flags = ""
    for name in architectures.replace(";", " ").split():
        number = name.removesuffix("+PTX").replace(".", "")
        kinds = ("sm", "compute") if name.endswith("+PTX") else ("sm",)
        flags += "".join(f" -gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds)
    return flags


def buildable() -> tuple[list[str], str]:
    """The libraries that can be built here, and why no more than these."""
    torch, nvcc = find_torch(), find_nvcc()
    missing = [tool for tool in (os.environ.get("CXX", "c++"), "ninja") if shutil.which(tool) is None]
    if os.environ.get("SMILE_KERNELS_SKIP_BUILD") == "1":
        return [], "SMILE_KERNELS_SKIP_BUILD is set"
    if torch is None or torch[1] < (2, 10):
        return [], "the build sees no PyTorch 2.10 or later (pip install --no-build-isolation shows it)"
    if missing:
        return [], f"there is no {' and no '.join(missing)}"
    if nvcc is None:
        return ["cpu"], "there is no nvcc"
    if torch[2] is None and not FORCE:
        return ["cpu"], "this PyTorch is built without CUDA"
    return ["cpu", "cuda"], "all are built"


class NinjaBuild(build_ext):
    def get_ext_filename(self, name: str) -> str:
        return name.replace(".", os.sep) + ".so"  # no Python module: one library serves every Python

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            build(extension.name.rpartition("_")[2], target, Path(self.build_temp, extension.name).resolve())
        except subprocess.CalledProcessError as error:
            raise CompileError(str(error)) from error  # which an optional extension may end in


def build(kind: str, target: Path, folder: Path) -> None:
    """Compile and link csrc/ into the library `target`; kind: "cpu" or "cuda"."""
    torch, cxx, nvcc = Path(find_torch()[0]), os.environ.get("CXX", "c++"), find_nvcc()
    folder.mkdir(parents=True, exist_ok=True)
    flags = f"-std=c++17 -O3 -DTORCH_TARGET_VERSION=0x020a000000000000 -I{torch / 'include'}"  # the ABI of 2.10
    if kind == "cuda":
        sources = ["forward.cu", "backward.cu", "bindings.cpp"]
        flags += f" -DUSE_CUDA -DSMILE_CUDA{gencode(ARCHITECTURES)}"
        compiler = f"{nvcc} {flags} -Xcompiler -fPIC,-fvisibility=hidden"
        # Where PyTorch has no libtorch_cuda.so an empty one stands in for it while linking.
        stub = ["-shared", "-Wl,-soname,libtorch_cuda.so", "-o", folder / "libtorch_cuda.so", "-xc", os.devnull]
        subprocess.run([cxx, *stub], check=True)
        linker = f"{nvcc} -shared --cudart static -Xlinker --no-as-needed -L{folder} -ltorch_cuda"
    else:
        sources, linker = ["cpu.cpp", "bindings.cpp"], f"{cxx} -shared"
        compiler = f"{cxx} {flags} -fPIC -fvisibility=hidden -Wno-psabi"
    lines = [
        f"rule compile\n  command = {compiler} -MD -MF $out.d -c $in -o $out\n  depfile = $out.d",
        f"rule link\n  command = {linker} $in -o $out -L{torch / 'lib'} -ltorch_cpu -lc10",
        *(f"build {source}.o: compile {ROOT / 'csrc' / source}" for source in sources),
        f"build {target}: link {' '.join(f'{source}.o' for source in sources)}",
    ]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run(["ninja", "-C", str(folder)], check=True)


if __name__ == "__main__":
    kinds, reason = buildable()
    print(f"smile_kernels: compiled kernels for {' and '.join(kinds) or 'nothing'}: {reason}", file=sys.stderr)
    if FORCE and kinds != ["cpu", "cuda"]:
        sys.exit("SMILE_KERNELS_FORCE_CUDA_BUILD is set, but the CUDA kernels cannot be built")
    setup(
        ext_modules=[Extension(f"smile_kernels.ops._extension_{kind}", [], optional=not FORCE) for kind in kinds],
        cmdclass={"build_ext": NinjaBuild},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if kinds else {},
    )
