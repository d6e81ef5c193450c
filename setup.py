"""Builds the compiled extension where it can be built; everything else about the package is in pyproject.toml.

_extension_cpu.so needs PyTorch 2.10 and GCC 9 or Clang 10, or later; _extension_cuda.so also a CUDA toolkit and a
PyTorch built for CUDA of the same major version. No GPU is asked for, nothing is downloaded. Without them the package
is installed nevertheless, with the reason in a text file instead of a missing library, for `smile_kernels.backends()`.

    SMILE_KERNELS_SKIP_BUILD=1          build neither
    SMILE_KERNELS_FORCE_CUDA_BUILD=1    build both for any PyTorch, and fail if that is impossible
    TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX"  GPU architectures, as for PyTorch's own extensions
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
FORCE = os.environ.get("SMILE_KERNELS_FORCE_CUDA_BUILD") == "1"
# One binary for each major architecture that nvcc supports; the last one's PTX is for newer devices.
ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "11.0", "12.0")


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


def architectures(nvcc: str) -> str:
    """TORCH_CUDA_ARCH_LIST, else those of ARCHITECTURES that nvcc compiles for."""
    if chosen := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return chosen
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    known = [name for name in ARCHITECTURES if f"compute_{name.replace('.', '')}" in listed]
    if unknown := [name for name in ARCHITECTURES if name not in known]:
        print(f"smile_kernels: {nvcc} does not compile for {', '.join(unknown)}; PTX serves them", file=sys.stderr)
    return ";".join(known) + "+PTX"


def gencode(names: str) -> str:
    """nvcc's flags for a list as TORCH_CUDA_ARCH_LIST has it."""
    flags = ""
    for name in names.replace(";", " ").split():
        number = name.removesuffix("+PTX").replace(".", "")
        kinds = ("sm", "compute") if name.endswith("+PTX") else ("sm",)
        flags += "".join(f" -gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds)
    return flags


def missing() -> dict[str, str]:
    """The libraries that cannot be built here, each with the reason."""
    torch, nvcc, cxx = find_torch(), find_nvcc(), os.environ.get("CXX", "c++")
    absent = [tool for tool in (cxx, "ninja") if shutil.which(tool) is None]
    both = None
    if os.environ.get("SMILE_KERNELS_SKIP_BUILD") == "1":
        both = "SMILE_KERNELS_SKIP_BUILD was set"
    elif sys.platform == "win32":
        both = "it is not built on Windows"
    elif torch is None or torch[1] < (2, 10):
        both = "the build saw no PyTorch 2.10 or later (pip install --no-build-isolation shows it)"
    elif absent:
        both = f"there was no {' and no '.join(absent)}"
    if both is not None:
        return {"cpu": both, "cuda": both}
    if nvcc is None:
        return {"cuda": "there was no nvcc"}
    if FORCE:
        return {}
    if torch[2] is None:
        return {"cuda": "PyTorch was one built without CUDA"}
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    toolkit = re.search(r"release (\d+)", version).group(1)
    if toolkit != torch[2].split(".")[0]:
        return {"cuda": f"{nvcc} was of CUDA {toolkit} and PyTorch was built for CUDA {torch[2]}"}
    return {}


class NinjaBuild(build_ext):
    def get_ext_filename(self, name: str) -> str:
        return name.replace(".", os.sep) + ".so"  # no Python module: one library serves every Python

    def run(self) -> None:
        self.reasons = missing()
        super().run()
        for kind in ("cpu", "cuda"):
            library = Path(self.get_ext_fullpath(f"smile_kernels.ops._extension_{kind}"))
            reason = library.with_suffix(".txt")
            reason.unlink(missing_ok=True)
            if kind in self.reasons:
                reason.write_text(self.reasons[kind] + "\n")
        if "cpu" in self.reasons:  # a wheel without a library serves every platform
            self.distribution.ext_modules = []
            if wheel := self.distribution.get_command_obj("bdist_wheel", create=False):
                wheel.root_is_pure, wheel.py_limited_api = True, False

    def build_extension(self, extension: Extension) -> None:
        kind = extension.name.rpartition("_")[2]
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            build(kind, target, Path(self.build_temp, extension.name).resolve())
        except subprocess.CalledProcessError as error:
            print(error.output, file=sys.stderr)
            said = next((line for line in (error.output or "").splitlines() if "error" in line), str(error))
            self.reasons[kind] = f"compiling it failed: {said.strip()}"
            raise CompileError(said) from error  # which an optional extension may end in


def build(kind: str, target: Path, folder: Path) -> None:
    """Compile and link csrc/ into the library `target`; kind: "cpu" or "cuda"."""
    torch, cxx, nvcc = Path(find_torch()[0]), os.environ.get("CXX", "c++"), find_nvcc()
    folder.mkdir(parents=True, exist_ok=True)
    flags = f"-std=c++17 -O3 -DTORCH_TARGET_VERSION=0x020a000000000000 -I{torch / 'include'}"  # the ABI of 2.10
    if kind == "cuda":
        sources = ["project.cu", "route.cu", "decode.cu", "forward.cu", "backward.cu", "bindings.cpp"]
        flags += f" -DUSE_CUDA -DSMILE_CUDA{gencode(architectures(nvcc))}"
        compiler = f"{nvcc} {flags} -Xcompiler -fPIC,-fvisibility=hidden"
        # Where PyTorch has no libtorch_cuda.so an empty one replaces it while linking.
        stub = ["-shared", "-Wl,-soname,libtorch_cuda.so", "-o", folder / "libtorch_cuda.so", "-xc", os.devnull]
        run([cxx, *stub])
        linker = f"{nvcc} -shared --cudart static -Xlinker --no-as-needed,--strip-all -L{folder} -ltorch_cuda"
    else:
        sources = ["cpu.cpp", "evidence.cpp", "bindings.cpp"]
        strip = "" if sys.platform == "darwin" else " -Wl,--strip-all"
        linker = f"{cxx} -shared{strip}"
        compiler = f"{cxx} {flags} -fPIC -fvisibility=hidden -Wno-psabi"
    lines = [
        f"rule compile\n  command = {compiler} -MD -MF $out.d -c $in -o $out\n  depfile = $out.d",
        f"rule link\n  command = {linker} $in -o $out -L{torch / 'lib'} -ltorch_cpu -lc10",
        *(f"build {source}.o: compile {ROOT / 'csrc' / source}" for source in sources),
        f"build {target}: link {' '.join(f'{source}.o' for source in sources)}",
    ]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    run(["ninja", "-C", folder])


def run(command: list[str | Path]) -> None:
    """Like subprocess.run(check=True), with all output in the error."""
    subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


if __name__ == "__main__":
    reasons = missing()
    kinds = [kind for kind in ("cpu", "cuda") if kind not in reasons]
    why = "".join(f"; no {kind} library: {reason}" for kind, reason in reasons.items())
    print(f"smile_kernels: building compiled kernels for {' and '.join(kinds) or 'nothing'}{why}", file=sys.stderr)
    if FORCE and reasons:
        sys.exit("SMILE_KERNELS_FORCE_CUDA_BUILD is set, but the CUDA kernels cannot be built")
    setup(
        ext_modules=[Extension(f"smile_kernels.ops._extension_{kind}", [], optional=not FORCE) for kind in kinds],
        cmdclass={"build_ext": NinjaBuild},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if kinds else {},
    )
