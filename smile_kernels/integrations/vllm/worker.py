"""Additional methods of vLLM's workers: replacing experts while serving."""

from typing import Any

from ...errors import SmileError
from .linear import SmileQuantizationConfig


class SmileWorker:
    """`--worker-extension-cls smile_kernels.integrations.vllm.worker.SmileWorker`; called by `collective_rpc`."""

    vllm_config: Any
    reload_weights: Any

    def reload_experts(self, folder: str) -> None:
        """Load the weights of another folder, written by `replace_expert` and `save_pretrained`, in place.

            llm.collective_rpc("reload_experts", args=("fused-v2",))
            llm.reset_prefix_cache()

        The checkpoint must have the layers, ranks, routing, names and number of experts of the one being served; only
        config.json and the weights are read. No request may run during the call, and cached prefixes are stale
        afterwards.

        Raises:
            SmileError: another model is served, or the folder does not match; the message names the difference. Nothing
                is changed then.
        """
        config = self.vllm_config.quant_config
        if not isinstance(config, SmileQuantizationConfig):
            raise SmileError(
                f"model: {self.vllm_config.model_config.model} has no experts; expected a SMILE checkpoint"
            )
        config.check_reload(folder)
        self.reload_weights(weights_path=folder)
