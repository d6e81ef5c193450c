"""The SMILE settings of a checkpoint: equal when read back, and bad ones refused by key."""

import json
from dataclasses import replace

import pytest

from smile_kernels import SmileError
from smile_kernels.config import SmileConfig, SmileModuleConfig

CONFIG = SmileConfig(3, 1, 32, 16, {"a.b": SmileModuleConfig(32, 16, expert_bias=True)})


def test_config_round_trip():
    for config in (CONFIG, replace(CONFIG, expert_names=("a", "b", "c"))):
        assert SmileConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert "expert_names" not in CONFIG.to_dict()


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
        ({"expert_names": "abc"}, "expert_names: is 'abc'; expected an array"),
        ({"expert_names": ["a", "b", " "]}, r"expert_names: is \('a', 'b', ' '\); expected a list of names"),
        ({"expert_names": ["a", "b"]}, "expert_names: has 2 names; expected 3"),
        ({"expert_names": ["a", "b", "a"]}, "expert_names: 'a' is given twice; expected different names"),
        ({"modules": []}, r"modules: is \[\]; expected an object"),
        ({"modules": {"a": {"rank_of_expert": 1}}}, r"modules\.a\.rank_of_router is missing"),
        ({"modules": {"a": {"rank_of_expert": 0, "rank_of_router": 1}}}, r"modules\.a: rank_of_expert: is 0"),
        ({"modules": {"a": {"rank_of_expert": 1, "rank_of_router": 1, "r": 2}}}, r"unknown key 'modules\.a\.r'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_config_errors_name_the_key(change, message):
    with pytest.raises(ValueError, match=message):
        SmileConfig.from_dict(CONFIG.to_dict() | change)


def test_a_method_without_its_settings_is_refused():
    with pytest.raises(SmileError, match=r"^quantization_config: is 'smile'; expected an object"):
        SmileConfig.from_dict("smile")


def test_values_that_are_not_of_json_or_of_the_config_are_named():
    inside: list = []
    inside.append(inside)
    for change in ({"modules": {(1, 2): {}}}, {"rank_of_expert": inside}):
        with pytest.raises(SmileError, match=r"^quantization_config: .*; expected values that JSON has"):
            SmileConfig.from_dict(CONFIG.to_dict() | change)
    for change, message in (({"routing": "causal"}, r"^routing: is 'causal'"), ({"modules": 5}, "^modules: is 5")):
        with pytest.raises(SmileError, match=message):
            replace(CONFIG, **change)
