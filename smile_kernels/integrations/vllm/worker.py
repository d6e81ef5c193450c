"""Additional methods of vLLM's workers: replacing experts while serving."""

from typing import Any

from ...errors import SmileError
from .linear import SmileQuantizationConfig


class SmileWorker:
    """`--worker-extension-cls smile_kernels.integrations.vllm.worker.SmileWorker`; called by `collective_rpc`."""

    vllm_config: Any
    reload_weights: Any

    def reload_experts(self, folder: str) -> None:
        """Loads the weights of another folder, as `replace_expert` and `save_pretrained` write it, in place.

            llm.collective_rpc("reload_experts", args=("fused-v2",))
            llm.reset_prefix_cache()

        The checkpoint has the layers, ranks, routing and number of experts of the one being served, under the same
        names; other files than config.json and the weights are not read. No request may run meanwhile, and what
        is cached of prefixes is stale afterwards.

        Raises:
            SmileError: another model is served, or the folder does not fit; the message names what differs. Nothing is
                changed then.
        """
        config = self.vllm_config.quant_config
        if not isinstance(config, SmileQuantizationConfig):
            raise SmileError(
                f"model: {self.vllm_config.model_config.model} has no experts; expected a SMILE checkpoint"
            )
        config.check_reload(folder)
        self.reload_weights(weights_path=folder)
