"""A base that is stored quantised: adapters as experts have the same factors as with plain weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import smile_kernels as sk
from smile_kernels.config import read_smile_config
from smile_kernels.inspection import describe
from smile_kernels.storage import read_tensors
from tests.integrations import tiny_models

RANKS = {"rank_of_expert": 3, "rank_of_router": 2, "exclude": ["lm_head"]}
EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": EIGHT_BITS | {"strategy": "channel", "dynamic": False},
            "input_activations": EIGHT_BITS | {"strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head"],
}
AWQ = {"quant_method": "awq", "bits": 4}
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}
TORCHAO = {
    "quant_method": "torchao",
    "quant_type": {"default": {"_type": "Float8WeightOnlyConfig", "_version": 2, "_data": {}}},
}
INT8_WEIGHTS = INT8 | {
    "format": "pack-quantized",
    "config_groups": {"group_0": {key: INT8["config_groups"]["group_0"][key] for key in ("targets", "weights")}},
}


def with_group(**settings) -> dict:
    """INT8 with other settings of its layers."""
    return INT8 | {"config_groups": {"group_0": INT8["config_groups"]["group_0"] | settings}}


def quantised(plain: Path, to: Path, config: dict) -> Path:
    """The checkpoint with its blocks' linear layers in the format of a method, with arbitrary numbers for 4 bits."""
    shutil.copytree(plain, to)
    tensors = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
        elif config["quant_method"] == "compressed-tensors":
            scale = tensor.abs().amax(1, keepdim=True) / 127
            whole = (tensor / scale).round().to(torch.int8)
            tensors[f"{layer}.weight_scale"] = scale
            if config["format"] == "int-quantized":
                tensors[f"{layer}.weight"] = whole
            else:  # four in an int32, each plus 128
                tensors[f"{layer}.weight_packed"] = (whole.int() + 128).to(torch.uint8).view(torch.int32)
                tensors[f"{layer}.weight_shape"] = torch.tensor(whole.shape)
        else:
            o, d = tensor.shape
            tensors |= {f"{layer}.qweight": torch.randint(9, (d, o // 8), dtype=torch.int32)}
            tensors |= {f"{layer}.qzeros": torch.randint(9, (1, o // 8), dtype=torch.int32)}
            tensors |= {f"{layer}.scales": torch.rand(1, o, dtype=torch.float16)}
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    settings = json.loads((to / "config.json").read_text()) | {"quantization_config": config}
    (to / "config.json").write_text(json.dumps(settings))
    return to


def adapter(folder: Path, plain: Path, rank: int, targets: list[str], **more) -> Path:
    """A LoRA adapter of random factors."""
    folder.mkdir()
    tensors = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if name.endswith(tuple(f"{target}.weight" for target in targets)):
            key = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, weight.shape[1]) * 0.1
            tensors[f"{key}.lora_B.weight"] = torch.randn(weight.shape[0], rank) * 0.1
    save_file(tensors | more.pop("tensors", {}), folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | more))
    return folder


@pytest.fixture
def plain(tmp_path) -> Path:
    tiny_models.build("LlamaForCausalLM").save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize("config", [INT8, INT8_WEIGHTS, AWQ], ids=["int8", "int8 packed", "awq"])
@pytest.mark.parametrize("router", ["smile", "norm"])
def test_adapters_give_the_factors_that_they_give_beside_plain_weights(router, config, plain, tmp_path):
    base = quantised(plain, tmp_path / "base", config)
    adapters = [adapter(tmp_path / "a", plain, 2, ["q_proj", "up_proj"]), adapter(tmp_path / "b", plain, 3, ["q_proj"])]
    options = RANKS | {"router": router, "rank_of_router": None if router == "norm" else 2}
    sk.upscale_checkpoints(base, adapters, tmp_path / "out", max_shard_size=5000, **options)
    sk.upscale_checkpoints(plain, adapters, tmp_path / "want", **options)
    got, want = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "want")
    factors = (".vh", ".s", ".u", ".router", ".expert_bias")
    assert {name for name in got if name.endswith(factors)} == {name for name in want if name.endswith(factors)}
    for name, tensor in got.items():
        source = want if name.endswith(factors) else read_tensors(base)
        assert torch.equal(tensor.load(), source[name].load()), name
    assert {name for name in got if not name.endswith(factors)} == read_tensors(base).keys()
    written = read_smile_config(tmp_path / "out")
    assert written.base == config
    assert written.modules == read_smile_config(tmp_path / "want").modules
    layers = tuple(f"{name}." for name in written.modules)
    of_base = sum(tensor.nbytes for name, tensor in read_tensors(base).items() if name.startswith(layers))
    assert describe(tmp_path / "out")["bytes"]["base"] == of_base


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remaining": "average"}, "remaining: is 'average', and the base is stored quantised; expected 'base'"),
        ({"dtype": torch.float32}, "dtype: is torch.float32, and the base is stored quantised; expected None"),
        ({"embeddings_from": 0}, "embeddings_from: is 0, and the base is stored quantised; expected None"),
        ({"experts_only": True}, "experts_only: is True, and the base is stored quantised; expected False"),
        ({"calibrate": True}, "calibrate: is True, and the base is stored quantised; expected False"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_needs_the_weights_of_the_base(options, message, plain, tmp_path):
    base = quantised(plain, tmp_path / "base", INT8)
    one = adapter(tmp_path / "a", plain, 2, ["q_proj"])
    with pytest.raises(sk.SmileError, match=message):
        sk.upscale_checkpoints(base, [one], tmp_path / "out", **RANKS, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("config", "part"), [(INT8, "weight_scale"), (INT8_WEIGHTS, "weight_packed"), (AWQ, "scales")])
def test_a_quantised_layer_that_lacks_a_tensor_is_refused(config, part, plain, tmp_path):
    base = quantised(plain, tmp_path / "base", config)
    tensors = load_file(base / "model.safetensors")
    lost = next(name for name in tensors if name.endswith(f".{part}"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, base / "model.safetensors")
    one = adapter(tmp_path / "a", plain, 2, ["q_proj"])
    with pytest.raises(sk.SmileError, match=rf"base: \S+ has no .*{part} of '{lost.rpartition('.')[0]}'"):
        sk.upscale_checkpoints(base, [one], tmp_path / "out", **RANKS)


@pytest.mark.parametrize(
    "config",
    [
        INT8_WEIGHTS | {"format": None},
        INT8_WEIGHTS | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"strategy": "x"}}}},
        AWQ | {"version": "other"},
        {"quant_method": "gptq", "bits": 5},
        {"quant_method": "fp8", "weight_block_size": ["16", 16]},
        {"quant_method": "torchao", "quant_type": "int8_weight_only"},
        {"quant_method": "torchao", "quant_type": {}},
    ],
    ids=lambda config: config["quant_method"],
)
def test_settings_that_the_base_does_not_load_with_are_refused(config, plain, tmp_path):
    refuse_settings(config, r"is refused by transformers \(\w+: .+\); expected one that", plain, tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (INT8_WEIGHTS | {"config_groups": {}}, r"has config_groups {}; expected the layers"),
        (with_group(targets=["re:*"]), r"has 're:\*', not a regular expression \(nothing to repeat .*\); expected one"),
        (INT8 | {"ignore": ["lm_head", "re:("]}, r"has 're:\(', not a regular expression"),
        (AWQ | {"dynamic": {"-:[": {}}}, r"has '-:\[', not a regular expression"),
        (TORCHAO | {"modules_to_not_convert": 5}, r"has modules_to_not_convert 5; expected a list of names of layers"),
        (TORCHAO | {"modules_to_not_convert": "lm_head"}, r"has modules_to_not_convert 'lm_head'; expected a list"),
        (FP8 | {"ignored_layers": [5]}, r"has ignored_layers \[5\]; expected a list"),
        (with_group(targets="Linear"), r"has targets 'Linear'; expected a list"),
    ],
)
def test_settings_that_no_library_is_asked_about(config, message, plain, tmp_path):
    refuse_settings(config, message, plain, tmp_path)


def refuse_settings(config: dict, message: str, plain: Path, tmp_path: Path) -> None:
    base, one = quantised(plain, tmp_path / "base", INT8), adapter(tmp_path / "a", plain, 2, ["q_proj"])
    settings = json.loads((base / "config.json").read_text()) | {"quantization_config": config}
    (base / "config.json").write_text(json.dumps(settings))
    with pytest.raises(sk.SmileError, match=rf"config\.json: quantization_config {message}"):
        sk.upscale_checkpoints(base, [one], tmp_path / "out", **RANKS)
    assert not list(tmp_path.glob("out*"))


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16}
NVFP4 = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "config_groups": {"g": {"targets": ["Linear"]}},
}
NVFP4_SHAPES = {"weight_packed": (32, 16), "weight_scale": (32, 1), "weight_global_scale": (1,)}
PER_TENSOR = EIGHT_BITS | {"strategy": "tensor"}
STATIC = with_group(input_activations=PER_TENSOR)
GROUP = {"targets": ["Linear"], "weights": {"strategy": "group", "group_size": 16}}
GROUPS = {"quant_method": "compressed-tensors", "config_groups": {"group_0": GROUP}}


@pytest.mark.parametrize(
    ("config", "tensors", "wrong"),
    [
        (INT8, {"weight": (32, 32), "weight_scale": (32, 1)}, {"weight_scale": (16, 1)}),
        (with_group(weights=PER_TENSOR), {"weight": (32, 32), "weight_scale": (1,)}, {"weight": (32, 16)}),
        (GROUPS, {"weight": (32, 32), "weight_scale": (32, 2)}, {"weight_scale": (32, 4)}),
        (NVFP4, NVFP4_SHAPES, {"weight_packed": (16, 16)}),
        (FP8, {"weight": (32, 32), "weight_scale_inv": (2, 2)}, {"weight_scale_inv": (4, 2)}),
        (GPTQ, {"qweight": (4, 32), "scales": (2, 32), "qzeros": (2, 4)}, {"scales": (2, 16)}),
        (GPTQ, {"qweight": (4, 32), "scales": (2, 32), "qzeros": (2, 4)}, {"qzeros": (4, 2)}),
        (AWQ, {"qweight": (32, 4), "scales": (1, 32), "qzeros": (1, 4)}, {"scales": (32, 1)}),
        (AWQ, {"qweight": (32, 4), "scales": (1, 32), "qzeros": (1, 4)}, {"qweight": (4, 32)}),
    ],
)
def test_misshapen_tensors_of_a_quantised_base(config, tensors, wrong, plain, tmp_path):
    layer, base = "model.layers.0.self_attn.q_proj", tmp_path / "base"
    shutil.copytree(plain, base)
    settings = json.loads((base / "config.json").read_text()) | {"quantization_config": config}
    (base / "config.json").write_text(json.dumps(settings))
    one = adapter(tmp_path / "a", plain, 2, ["k_proj"])
    kept = {name: t for name, t in load_file(plain / "model.safetensors").items() if name != f"{layer}.weight"}

    def fuse(shapes: dict[str, tuple[int, ...]]) -> None:
        dtypes = {name: torch.float32 if "scale" in name else torch.int8 for name in shapes}
        dtypes |= {"qweight": torch.int32, "qzeros": torch.int32, "weight_packed": torch.uint8}
        own = {f"{layer}.{name}": torch.ones(shape, dtype=dtypes[name]) for name, shape in shapes.items()}
        save_file(kept | own, base / "model.safetensors", {"format": "pt"})
        sk.upscale_checkpoints(base, [one], tmp_path / "out", **RANKS)

    (name, shape), *_ = wrong.items()
    expected = (
        rf"model\.safetensors: tensor '{layer}\.{name}' has shape \{list(shape)}; expected .*of a weight \[32, 32\]"
    )
    with pytest.raises(sk.SmileError, match=expected):
        fuse(tensors | wrong)
    assert not list(tmp_path.glob("out*"))
    fuse(tensors)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("packed", lambda t: t[:3], r"has shape \[3, 8\]; expected \[32, 8\], of a weight \[32, 32\]"),
        ("packed", lambda t: torch.cat([t, t], 1), r"has shape \[32, 16\]; expected \[32, 8\]"),
        ("packed", lambda t: t.T.contiguous(), r"has shape \[8, 32\]; expected \[32, 8\]"),
        ("packed", torch.Tensor.flatten, r"has shape \[256\]; expected \[32, 8\]"),
        ("packed", torch.Tensor.long, r"is torch\.int64; expected torch\.int32"),
        ("shape", lambda t: t - 1, r"is \[31, 31\]; expected \[32, 32\]"),
        ("scale", torch.Tensor.int, r"is torch\.int32; expected torch\.bfloat16 or"),
        ("shape", None, "has no weight or weight_shape of"),
    ],
)
def test_packed_weights_of_another_shape_or_dtype_are_refused(part, change, message, plain, tmp_path):
    layer = "model.layers.0.self_attn.q_proj"
    base = quantised(plain, tmp_path / "base", INT8_WEIGHTS)
    tensors = load_file(base / "model.safetensors")
    if change is None:
        del tensors[f"{layer}.weight_{part}"]
    else:
        tensors[f"{layer}.weight_{part}"] = change(tensors[f"{layer}.weight_{part}"])
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    one = adapter(tmp_path / "a", plain, 2, ["k_proj"])
    with pytest.raises(sk.SmileError, match=message):
        sk.upscale_checkpoints(base, [one], tmp_path / "out", **RANKS)
    assert not list(tmp_path.glob("out*"))


def test_weights_of_another_dtype_than_their_format_are_refused(plain, tmp_path):
    base, name = quantised(plain, tmp_path / "base", INT8), "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(base / "model.safetensors")
    tensors[name] = tensors[name].short()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    one = adapter(tmp_path / "a", plain, 2, ["k_proj"])
    with pytest.raises(sk.SmileError, match=r"is torch\.int16; expected torch\.int8, of a weight \[32, 32\]"):
        sk.upscale_checkpoints(base, [one], tmp_path / "out", **RANKS)
    assert not list(tmp_path.glob("out*"))


TORCHAO_TYPES = {
    "Float8Tensor": ([1, 32], {"qdata": (32, 32), "scale": (32, 1)}),
    "IntxUnpackedToInt8Tensor": ([1, 16], {"qdata": (32, 32), "scale": (32, 2), "zero_point": (32, 2)}),
    "Int4Tensor": ([1, 16], {"qdata": (32, 16), "scale": (2, 32), "zero_point": (2, 32)}),
    "Int4TilePackedTo4dTensor": ([1, 32], {"qdata": (4, 8, 32, 4), "scale_and_zero": (32, 32, 2)}),
    "NVFP4Tensor": (16, {"qdata": (32, 16), "scale": (32, 16), "per_tensor_scale": ()}),
}
TORCHAO_DTYPES = {
    "Float8Tensor": torch.float8_e4m3fn,
    "Int4TilePackedTo4dTensor": torch.int32,
    "NVFP4Tensor": torch.uint8,
}


@pytest.mark.parametrize("kind", TORCHAO_TYPES)
def test_misshapen_tensors_of_torchao(kind, plain, tmp_path):
    weight, (block, shapes) = "model.layers.0.self_attn.q_proj.weight", TORCHAO_TYPES[kind]
    dtypes = dict.fromkeys(shapes, torch.float32) | {"qdata": TORCHAO_DTYPES.get(kind, torch.int8)}
    base, one = tmp_path / "base", adapter(tmp_path / "a", plain, 2, ["k_proj"])
    shutil.copytree(plain, base)
    settings = json.loads((base / "config.json").read_text()) | {"quantization_config": TORCHAO}
    (base / "config.json").write_text(json.dumps(settings))
    described = {"_type": kind, "_data": {"block_size": block, "is_swizzled_scales": True}}
    plain_type = dict.fromkeys(load_file(plain / "model.safetensors"), '{"_type": "Tensor"}')

    def fuse(description: object, **changed: torch.Tensor | None) -> None:
        tensors = {name: tensor for name, tensor in load_file(plain / "model.safetensors").items() if name != weight}
        own = {name: torch.ones(shape).to(dtypes[name]) for name, shape in shapes.items()} | changed
        prefix = f"{weight.removesuffix('weight')}_weight_"
        tensors |= {f"{prefix}{name}": tensor for name, tensor in own.items() if tensor is not None}
        metadata = plain_type | {weight: json.dumps(description), "tensor_names": json.dumps(list(plain_type))}
        save_file(tensors, base / "model.safetensors", metadata)
        sk.upscale_checkpoints(base, [one], tmp_path / "out", **RANKS)

    def refused(
        message: str, description: object = described | {"_tensor_data_names": list(shapes)}, **changed
    ) -> None:
        with pytest.raises(sk.SmileError, match=message):
            fuse(description, **changed)
        assert not list(tmp_path.glob("out*"))

    for name, shape in shapes.items():
        named = rf"model\.safetensors: tensor 'model\.layers\.0\.self_attn\.q_proj\._weight_{name}' "
        for other in ((3, *shape[1:]), (*shape, 1), (1, 1)):
            found = rf"has shape \[{', '.join(map(str, other))}\]; expected \[{', '.join(map(str, shape))}\]"
            refused(rf"{named}{found}.*, of a weight \[32, 32\] ", **{name: torch.ones(other).to(dtypes[name])})
        refused(rf"base: \S+ has no _weight_{name} of 'model\.layers\.0\.self_attn\.q_proj'", **{name: None})
        if name != "zero_point":
            refused(rf"{named}is torch\.int64; expected torch\.", **{name: torch.ones(shape, dtype=torch.int64)})
    refused(rf"its metadata has .*Tensor.* for '{weight}'; expected torchao's description", {"_type": "Tensor"})
    fuse(described | {"_tensor_data_names": list(shapes)})


KV_CACHE = INT8 | {"kv_cache_scheme": EIGHT_BITS | {"type": "float", "strategy": "tensor", "dynamic": False}}
IN_GROUPS = EIGHT_BITS | {"symmetric": False, "strategy": "group", "group_size": 16}
ASYMMETRIC = INT8_WEIGHTS | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": IN_GROUPS}}}


@pytest.mark.parametrize(
    ("config", "added", "setting"),
    [
        (KV_CACHE, {"k_scale": lambda o, d: (1,), "v_scale": lambda o, d: (1,)}, "kv_cache_scheme"),
        (STATIC, {"input_scale": lambda o, d: (1,)}, "config_groups"),
        (
            ASYMMETRIC,
            {"weight_scale": lambda o, d: (o, d // 16), "weight_zero_point": lambda o, d: (o // 4, d // 16)},
            "config_groups",
        ),
    ],
)
def test_tensors_that_the_settings_of_compressed_tensors_ask_for(config, added, setting, plain, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    base, one = quantised(plain, tmp_path / "base", config), adapter(tmp_path / "a", plain, 2, ["k_proj"])
    whole = load_file(base / "model.safetensors")
    for weight, tensor in load_file(plain / "model.safetensors").items():
        layer = weight.removesuffix(".weight")
        module = layer.rpartition(".")[0] if setting == "kv_cache_scheme" else layer
        for part, shape in added.items() if weight.endswith("_proj.weight") and ".self_attn." in weight else ():
            dtype = torch.int32 if part == "weight_zero_point" else torch.float32
            whole[f"{module}.{part}"] = torch.ones(shape(*tensor.shape), dtype=dtype)
    if setting == "config_groups":  # of the attention alone
        mlp = {name: tensor for name, tensor in load_file(plain / "model.safetensors").items() if ".mlp." in name}
        whole = {name: tensor for name, tensor in whole.items() if ".mlp." not in name} | mlp

    def fuse(tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
        sk.upscale_checkpoints(base, [one], tmp_path / "out", **RANKS)

    last = f"model.layers.1.self_attn.{'v_scale' if setting == 'kv_cache_scheme' else f'o_proj.{list(added)[-1]}'}"
    expected = rf"by {setting} of the quantization_config in config\.json"
    with pytest.raises(sk.SmileError, match=rf"base: \S+ has no tensor '{last}'; expected it, {expected}"):
        fuse({name: tensor for name, tensor in whole.items() if name != last})
    with pytest.raises(sk.SmileError, match=rf"tensor '{last}' has shape \[3, 1\]; expected \[.*\], {expected}"):
        fuse(whole | {last: torch.ones(3, 1, dtype=whole[last].dtype)})
    assert not list(tmp_path.glob("out*"))
    fuse(whole)


def test_experts_that_need_the_weights_of_the_base(plain, tmp_path):
    base = quantised(plain, tmp_path / "base", INT8)
    layer = "model.layers.0.self_attn.q_proj"
    weight = load_file(plain / "model.safetensors")[f"{layer}.weight"]
    scaled = {f"base_model.model.{layer}.lora_magnitude_vector": torch.ones(len(weight))}
    dora = adapter(tmp_path / "dora", plain, 2, ["0.self_attn.q_proj"], tensors=scaled, use_dora=True)
    whole = {f"base_model.model.{layer}.weight": weight}
    saved = adapter(tmp_path / "saved", plain, 2, ["k_proj"], tensors=whole, modules_to_save=["q_proj"])
    for expert, message in (
        (
            plain,
            "is a fine-tuned model, and the base is stored quantised; expected LoRA adapters, or the base in plain",
        ),
        (dora, f"rescales rows of {layer}, which the base stores quantised"),
        (saved, f"saves whole {layer}, which the base stores quantised"),
    ):
        with pytest.raises(sk.SmileError, match=message):
            sk.upscale_checkpoints(base, [expert], tmp_path / "out", **RANKS)
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_known(plain, tmp_path):
    one = adapter(tmp_path / "a", plain, 2, ["q_proj"])

    def refused(message: str, config: dict, **settings) -> None:
        base = quantised(plain, tmp_path / f"base{len(list(tmp_path.iterdir()))}", config)
        written = json.loads((base / "config.json").read_text()) | settings
        (base / "config.json").write_text(json.dumps(written))
        with pytest.raises(sk.SmileError, match=message):
            sk.upscale_checkpoints(base, [one], tmp_path / "out", **RANKS)

    refused(
        "is stored as 'bitsandbytes'; expected a checkpoint of plain weights, or of awq",
        INT8 | {"quant_method": "bitsandbytes"},
    )
    refused("names no architecture that transformers supports", INT8, architectures=["Nobody"])
    refused("dtype is 'float64'; expected bfloat16", INT8, dtype="float64")
    refused("dtype is torch.int4, .*; expected a floating-point dtype", INT8, dtype="int4")
    refused("is of no layer of the LlamaForCausalLM", INT8, num_hidden_layers=1)
    fused = tmp_path / "fused"
    sk.upscale_checkpoints(plain, [one], fused, **RANKS)
    with pytest.raises(sk.SmileError, match="is stored as 'smile'; expected"):
        sk.upscale_checkpoints(fused, [one], tmp_path / "out", **RANKS)
