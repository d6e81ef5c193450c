"""Information about each pass from vLLM's model runner to a SMILE model: the tokens and selections of its requests.

The runner is vLLM's V1, which is selected for models that need this information. All names of vLLM used are here.
"""

import functools
from typing import Any

import numpy as np
from vllm.config import VllmConfig

from ...versions import expect


def smile_of(config: VllmConfig) -> Any:
    """The SmileQuantizationConfig of an engine; None if its model is not a SMILE checkpoint."""
    smile = config.quant_config
    return smile if hasattr(smile, "begin_pass") else None


def follow_passes() -> None:
    """Make vLLM's model runner, in this process, report the contents of each pass before it runs."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for name in ("_prepare_inputs", "execute_model"):
        expect("vllm", callable(getattr(GPUModelRunner, name, None)), f"GPUModelRunner.{name}")
    prepare, execute = GPUModelRunner._prepare_inputs, GPUModelRunner.execute_model
    if getattr(prepare, "follows_smile", False):
        return

    @functools.wraps(prepare)
    def prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        if (smile := smile_of(self.vllm_config)) is not None:
            smile.begin_pass(self, scheduler_output, num_scheduled_tokens)
        return prepare(self, scheduler_output, num_scheduled_tokens)

    @functools.wraps(execute)
    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return execute(self, *args, **kwargs)
        finally:
            if (smile := smile_of(self.vllm_config)) is not None:
                smile.end_pass()

    prepare_inputs.follows_smile = True  # type: ignore[attr-defined]
    GPUModelRunner._prepare_inputs = prepare_inputs  # type: ignore[method-assign]
    GPUModelRunner.execute_model = execute_model  # type: ignore[method-assign]


def choose_the_runner() -> None:
    """Make vLLM select its V1 model runner for models that need information about passes, and refuse V2 by name."""
    name = "_get_v2_model_runner_unsupported_features"
    expect("vllm", callable(getattr(VllmConfig, name, None)), f"VllmConfig.{name}")
    unsupported: Any = getattr(VllmConfig, name)
    if getattr(unsupported, "knows_smile", False):
        return

    @functools.wraps(unsupported)
    def unsupported_features(self: VllmConfig) -> list[str]:
        smile = smile_of(self)
        return [*unsupported(self), *([] if smile is None else smile.needs_passes(self))]

    unsupported_features.knows_smile = True  # type: ignore[attr-defined]
    setattr(VllmConfig, name, unsupported_features)
