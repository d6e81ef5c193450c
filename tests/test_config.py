"""The SMILE settings of a checkpoint: read back as written, and bad ones refused by key."""

import json

import pytest

from smile_kernels.config import SmileConfig, SmileModuleConfig

CONFIG = SmileConfig(3, 1, 32, 16, {"a.b": SmileModuleConfig(32, 16, expert_bias=True)})


def test_config_round_trip():
    assert SmileConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, "quant_method: is 'awq'; expected 'smile'"),
        ({"route": {}}, "unknown key 'route'"),
        ({"routing": {"scope": "all"}}, "scope: is 'all'; expected one of 'token', 'sequence', 'causal'"),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok: is 4; expected 1 to 3"),
        ({"num_local_experts": 0}, "num_local_experts: is 0"),
        ({"rank_of_expert": 1.0}, "rank_of_expert: is 1.0; expected an integer of 1 or more, -1 for full rank"),
        ({"rank_of_router": True}, "rank_of_router: is True"),
        ({"modules": []}, r"modules: is \[\]; expected a mapping"),
        ({"modules": {"a": {"rank_of_expert": 1}}}, r"modules\['a'\]: rank_of_router is missing"),
        ({"modules": {"a": {"rank_of_expert": 0, "rank_of_router": 1}}}, r"modules\['a'\]: rank_of_expert: is 0"),
        ({"modules": {"a": {"rank_of_expert": 1, "rank_of_router": 1, "r": 2}}}, r"modules\['a'\]: unknown key 'r'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_config_errors_name_the_key(change, message):
    with pytest.raises(ValueError, match=message):
        SmileConfig.from_dict(CONFIG.to_dict() | change)
