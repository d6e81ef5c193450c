"""Reports which experts served requests, in their answers and in vLLM's /metrics, where an engine is started with it.

The experts of a request are known to the scheduler: the request selected them, or its prompt voted. They are sent with
each output in `kv_transfer_params`, the only dict of an output that vLLM copies into its answers. The front end counts
the tokens. What layers choose for each token is known on the device only, and is not reported.
"""

import functools
from typing import Any

from prometheus_client import Counter
from vllm.config import VllmConfig

from ...versions import expect
from .passes import smile_of
from .requests import KEY, extra_args
from .votes import VOTE

FLAG = "smile_report_experts"  # in --additional-config
FIELD = "smile_experts"  # of an answer's kv_transfer_params: weights by name


def reports(config: VllmConfig) -> bool:
    """Whether an engine was started to report experts."""
    return isinstance(config.additional_config, dict) and bool(config.additional_config.get(FLAG))


def experts_of(request: Any, smile: Any) -> dict[str, float] | None:
    """The weights of a request's experts by their names or indices, the largest first; None: layers choose."""
    asked = extra_args(request.sampling_params).get(KEY)
    if asked is None or asked == VOTE:
        return None
    names = smile.config.expert_names or [str(i) for i in range(smile.config.num_local_experts)]
    return {names[i]: weight for i, weight in sorted(asked, key=lambda pair: -abs(pair[1])) if weight}


def report_experts() -> None:
    """Make vLLM's scheduler, in this process, add the experts of each request to its outputs."""
    from vllm.v1.core.sched.scheduler import Scheduler

    expect("vllm", callable(getattr(Scheduler, "update_from_output", None)), "Scheduler.update_from_output")
    update = Scheduler.update_from_output
    if getattr(update, "reports_experts", False):
        return

    @functools.wraps(update)
    def update_from_output(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        smile = smile_of(self.vllm_config)
        if smile is None or not reports(self.vllm_config):
            return update(self, scheduler_output, *args, **kwargs)
        # Before: requests that end with this pass are removed.
        requests = {name: self.requests.get(name) for name in scheduler_output.num_scheduled_tokens}
        outputs = update(self, scheduler_output, *args, **kwargs)
        for each in outputs.values():
            for output in each.outputs:
                request = requests.get(output.request_id)
                experts = None if request is None else experts_of(request, smile)
                if experts is not None:
                    output.kv_transfer_params = {**(output.kv_transfer_params or {}), FIELD: experts}
        return outputs

    update_from_output.reports_experts = True  # type: ignore[attr-defined]
    Scheduler.update_from_output = update_from_output  # type: ignore[method-assign]


def count_tokens() -> None:
    """Make vLLM's front end, in this process, count the tokens of requests by their first expert."""
    from vllm.v1.engine.output_processor import OutputProcessor

    expect("vllm", callable(getattr(OutputProcessor, "process_outputs", None)), "OutputProcessor.process_outputs")
    process = OutputProcessor.process_outputs
    if getattr(process, "counts_experts", False):
        return
    counter = Counter(
        "smile_expert_tokens",
        "Prompt and output tokens of requests by their expert, the one with the largest weight; '': the base model.",
        ["expert"],
    )

    @functools.wraps(process)
    def process_outputs(self: Any, engine_core_outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        for output in engine_core_outputs:
            experts = (output.kv_transfer_params or {}).get(FIELD)
            state = self.request_states.get(output.request_id)
            if experts is not None and state is not None:
                prompt = state.prompt_len if state.is_prefilling else 0
                counter.labels(next(iter(experts), "")).inc(prompt + len(output.new_token_ids))
        return process(self, engine_core_outputs, *args, **kwargs)

    process_outputs.counts_experts = True  # type: ignore[attr-defined]
    OutputProcessor.process_outputs = process_outputs  # type: ignore[method-assign]
