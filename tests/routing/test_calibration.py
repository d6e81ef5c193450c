"""Calibration: the mean shares by definition, on generated text, on random inputs, and on given ones."""

import math

import pytest
import torch
import transformers as tf
from torch import nn
from typer.testing import CliRunner

import smile_kernels as sk
from smile_kernels import SmileLinear
from smile_kernels.cli import app
from smile_kernels.nn import smile_layers
from smile_kernels.routing import RoutingPolicy, calibrate, get_routing, set_routing
from tests.integrations.tiny_models import chat_tokenizer
from tests.routing.definition import (
    POLICIES,
    SIZES,
    Calls,
    G,
    N,
    R,
    assert_follows,
    bert,
    by_name,
    llama,
    logits,
    smile,
    t5,
    tokens,
)

CALIBRATED = {
    name: RoutingPolicy(**POLICIES[name].to_dict() | {"calibrated": True})
    for name in ("layers", "sequence+layers", "causal+layers", "causal+layers, lock 1, m 2")
} | {"token": RoutingPolicy(calibrated=True), "token, m 2": RoutingPolicy(calibrated=True, num_experts_per_tok=2)}


def shares_by_loop(calls, real):
    """log of the mean share, layer by layer and token by token, in float64."""
    found = {}
    for layer, x, _ in calls:
        for b, row in enumerate(real):
            for t in range(len(row)):
                if not row[t]:
                    continue
                energy = [float((layer.vh[i, :G].double() @ x[b, t].double()).square().sum()) for i in range(N)]
                if sum(energy) > 0:
                    found.setdefault(layer, []).append([e / sum(energy) for e in energy])
    means = {layer: [sum(p[i] for p in rows) / len(rows) for i in range(N)] for layer, rows in found.items()}
    return {layer: [math.log(m) if m > 0 else 0.0 for m in mean] for layer, mean in means.items()}


@torch.no_grad()
def base_of(model: nn.Module) -> None:
    """Disables every expert permanently."""
    for layer in model.modules():
        if isinstance(layer, SmileLinear):
            layer.u.zero_()
            layer.expert_bias.zero_()


@pytest.mark.parametrize("build", [bert, llama])
def test_given_inputs_are_read_by_the_base(build):
    model = build()
    layer = next(m for m in model.modules() if isinstance(m, SmileLinear))
    with torch.no_grad():
        layer.vh[2] = 0  # an expert that did not change the layer
    ids, mask = tokens(4, 6), torch.ones(4, 6, dtype=torch.int64)
    mask[1, 4:], mask[2, :3] = 0, 0
    before = {name: t.clone() for name, t in model.state_dict().items()}
    report = calibrate(
        model, [{"input_ids": ids[:2], "attention_mask": mask[:2]}, {"input_ids": ids[2:], "attention_mask": mask[2:]}]
    )
    assert report.source == "given"
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())
    names = {layer: name for name, layer in model.named_modules()}
    found = {entry.name: entry for entry in report.layers}
    base_of(model)
    with Calls(model) as calls:
        logits(model, input_ids=ids, attention_mask=mask)
    for layer, want in shares_by_loop(calls, mask.bool().tolist()).items():
        torch.testing.assert_close(layer.router_prior, torch.tensor(want), rtol=1e-4, atol=1e-5)
        entry = found[names[layer]]
        assert entry.tokens == int(mask.sum())
        centred = [w - sum(v for v in want if v) / sum(v != 0 for v in want) for w in want if w]
        assert entry.bias == pytest.approx(math.sqrt(sum(c * c for c in centred) / len(centred)), rel=1e-3)


@pytest.mark.parametrize("setting", [{"seed": 3}, {"sequences": 4}, {"length": 6}], ids=str)
def test_settings_of_generated_inputs_are_refused_with_given_ones(setting):
    [(name, value)] = setting.items()
    with pytest.raises(ValueError, match=f"^{name}: is {value}, of generated inputs, and inputs is given; expected"):
        calibrate(bert(), [{"input_ids": tokens(2, 4)}], **setting)


def test_a_language_model_writes_what_it_is_calibrated_on():
    model = llama().train()
    set_routing(model, POLICIES["causal+layers"])
    report = calibrate(model, seed=3, sequences=4, length=6)
    assert report.source == "written"
    assert {entry.tokens for entry in report.layers} == {24}
    assert model.training
    assert get_routing(model) == POLICIES["causal+layers"]
    first = [entry.prior for entry in report.layers]
    state = torch.get_rng_state()
    assert [entry.prior for entry in calibrate(model, seed=3, sequences=4, length=6).layers] == first
    assert [entry.prior for entry in calibrate(model, seed=4, sequences=4, length=6).layers] != first
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are unchanged"
    assert "14 of 14 SMILE layers calibrated on 24 tokens (written)" in str(report)


def test_models_that_cannot_write_read_random_inputs():
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    image = smile(tf.ViTModel(tf.ViTConfig(**vision, image_size=8, patch_size=4), add_pooling_layer=False))
    for model, count in ((bert(), 24), (t5(), 24), (image, 4 * 5)):
        report = calibrate(model, sequences=4, length=6)
        assert report.source == "random"
        assert {entry.tokens for entry in report.layers} == {count}
    short = tf.BertConfig(vocab_size=32, max_position_embeddings=8, **vision)
    assert calibrate(smile(tf.BertModel(short)), sequences=4).layers[0].tokens == 4 * 8
    for model, match in (
        (nn.Linear(2, 2), "^model: Linear has no"),
        (nn.Sequential(SmileLinear(8, 8, N, R, G)), "^inputs: Sequential"),
    ):
        with pytest.raises(ValueError, match=match):
            calibrate(model)
    with pytest.raises(ValueError, match=r"^inputs: reach no SMILE layer"):
        calibrate(bert(), [])


@by_name(CALIBRATED)
@pytest.mark.parametrize("build", [bert, llama])
def test_calibrated_policies_follow_the_definition(build, policy):
    model = build()
    with pytest.raises(ValueError, match=r"^calibrated: is True and .* has no router_prior"):
        set_routing(model, policy)
    for layer in model.modules():
        if isinstance(layer, SmileLinear):
            layer.router_prior = torch.randn(N)
    set_routing(model, policy)
    ids, mask = tokens(3, 7), torch.ones(3, 7, dtype=torch.int64)
    mask[1, :2] = 0
    with Calls(model) as calls:
        logits(model, input_ids=ids, attention_mask=mask)
    assert_follows(calls, mask.bool().tolist(), policy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_carry_the_prior(dtype, tmp_path):
    config = tf.LlamaConfig(**SIZES, intermediate_size=24, bos_token_id=1, eos_token_id=None)
    base, finetuned = tf.LlamaForCausalLM(config).to(dtype), [tf.LlamaForCausalLM(config).to(dtype) for _ in range(3)]
    model, _ = sk.upscale(base, finetuned, rank_of_expert=4, rank_of_router=2, exclude=["lm_head"], progress=False)
    calibrate(model, sequences=2, length=4)
    set_routing(model, RoutingPolicy.recommended(model))
    assert get_routing(model) == RoutingPolicy("prompt", lock_after=1, calibrated=True)
    sk.save_pretrained(model, tmp_path / "whole")
    for loaded in (
        sk.load_pretrained(tmp_path / "whole"),
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "whole"),
        sk.load_pretrained(tmp_path / "whole", tf.LlamaForCausalLM(config).to(dtype)),
    ):
        assert get_routing(loaded) == get_routing(model)
        for name, layer in loaded.named_modules():
            if isinstance(layer, SmileLinear):
                assert layer.router_prior.dtype == torch.float32
                assert torch.equal(layer.router_prior, model.get_submodule(name).router_prior), name
    low = model.to(torch.bfloat16).float()
    assert low.model.layers[0].mlp.up_proj.router_prior.dtype == torch.float32


def folders(tmp_path) -> tuple[dict[str, str], list[str]]:
    config = tf.LlamaConfig(**SIZES, intermediate_size=24, bos_token_id=1, eos_token_id=None)
    for name in ("base", "one", "two"):
        tf.LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    paths = {name: str(tmp_path / name) for name in ("base", "one", "two", "out", "again")}
    arguments = ["upscale", "--base", paths["base"], "--expert", paths["one"], "--expert", paths["two"]]
    return paths, [*arguments, "--rank-of-expert", "2", "--rank-of-router", "2", "--exclude", "lm_head"]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("shards", [(), ("--out-shard-size", "8KB")], ids=["one file", "shards"])
def test_folders_are_calibrated_by_either_command(shards, tmp_path):
    paths, arguments = folders(tmp_path)
    assert "calibrated on 1280 tokens (written)" in run(*arguments, *shards, "--out", paths["out"], "--calibrate")
    run(*arguments, *shards, "--out", paths["again"])
    assert "calibrated on 1280 tokens" in run("calibrate", paths["again"])
    one, two = (sk.load_pretrained(paths[name]) for name in ("out", "again"))
    for model in (one, two):
        assert get_routing(model) == RoutingPolicy("prompt", lock_after=1, calibrated=True)
    assert one.state_dict().keys() == two.state_dict().keys()
    assert all(torch.equal(t, two.state_dict()[name]) for name, t in one.state_dict().items())
    in_memory = sk.load_pretrained(paths["out"])
    calibrate(in_memory)
    assert all(torch.equal(t, one.state_dict()[name]) for name, t in in_memory.state_dict().items())
    run("calibrate", paths["again"], "--routing", "causal", "--half-life", "8", "--seed", "1")
    assert get_routing(sk.load_pretrained(paths["again"])) == RoutingPolicy("causal", calibrated=True, half_life=8)


def of_images() -> nn.Module:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    text = {**SIZES, "intermediate_size": 24, "bos_token_id": 1, "eos_token_id": None}
    parts = {"text_config": tf.LlamaConfig(**text), "vision_config": tf.CLIPVisionConfig(**vision)}
    return tf.LlavaForConditionalGeneration(tf.LlavaConfig(**parts, image_token_index=49))


@pytest.mark.filterwarnings("ignore:changes by fine-tuning are left out")
@pytest.mark.parametrize("kind", ["ViTModel", "LlavaForConditionalGeneration"])
def test_a_checkpoint_with_other_names_than_the_model(kind, tmp_path):
    """transformers stores these under older names: the priors are stored under those of the layers' weights."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit = tf.ViTConfig(**vision, image_size=8, patch_size=4)
    for name in ("base", "expert"):
        (tf.ViTModel(vit) if kind == "ViTModel" else of_images()).save_pretrained(tmp_path / name)
    folders = tmp_path / "base", [tmp_path / "expert"] * 2, tmp_path / "out"
    sk.upscale_checkpoints(*folders, rank_of_expert=2, rank_of_router=2, calibrate=True, expert_names=["a", "b"])
    model = sk.load_pretrained(tmp_path / "out")
    assert type(model).__name__ == kind
    priors = {name: layer.router_prior.clone() for name, layer in smile_layers(model).items()}
    policy = RoutingPolicy() if kind == "ViTModel" else RoutingPolicy("prompt", lock_after=1, calibrated=True)
    assert get_routing(model) == policy
    calibrate(model)
    assert priors
    for name, layer in smile_layers(model).items():
        assert torch.equal(layer.router_prior, priors[name]), name


@pytest.mark.parametrize("kind", [tf.LlamaForCausalLM, tf.LlamaForSequenceClassification])
def test_turns_restart_a_language_model_alone(kind, tmp_path):
    """A classifier of conversations has a chat template too; its recommended policy has no sums that restart."""
    tokenizer = chat_tokenizer()
    config = tf.LlamaConfig(**SIZES | {"vocab_size": len(tokenizer)}, intermediate_size=24)
    for name in ("base", "expert"):
        kind(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    sk.upscale_checkpoints(
        tmp_path / "base", [tmp_path / "expert"], tmp_path / "out", rank_of_expert=2, rank_of_router=2, calibrate=True
    )
    turn = sk.user_turn_ids(tokenizer)
    prompt = RoutingPolicy("prompt", lock_after=1, calibrated=True, restart_at=turn)
    expected = prompt if kind is tf.LlamaForCausalLM else RoutingPolicy()
    assert get_routing(sk.load_pretrained(tmp_path / "out")) == expected


def test_a_folder_keeps_what_smile_kernels_did_not_write(tmp_path):
    paths, arguments = folders(tmp_path)
    run(*arguments, "--out", paths["out"])
    (tmp_path / "out" / "notes.txt").write_text("mine")
    result = CliRunner().invoke(app, ["calibrate", paths["out"]])
    assert result.exit_code != 0
    assert "notes.txt" in result.output
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match=r"^routing: is calibrated; expected calibrate"):
        sk.upscale_checkpoints(
            paths["base"],
            [paths["one"]],
            paths["again"],
            rank_of_expert=2,
            rank_of_router=2,
            routing=RoutingPolicy(calibrated=True),
        )


def test_checkpoints_keep_the_experts_per_token_of_a_policy(tmp_path):
    paths, _ = folders(tmp_path)
    options = {"experts": [paths["one"], paths["two"]], "rank_of_expert": 2, "rank_of_router": 2}
    calibrated = RoutingPolicy(calibrated=True, num_experts_per_tok=2)
    for name, policy in (("out", RoutingPolicy(num_experts_per_tok=2)), ("again", calibrated), ("later", None)):
        folder = tmp_path / name
        calibrates = policy is calibrated
        sk.upscale_checkpoints(paths["base"], out=folder, **options, routing=policy, calibrate=calibrates)
        if policy is None:
            sk.calibrate_checkpoint(folder, routing=calibrated)
        model = sk.load_pretrained(folder)
        assert {layer.num_experts_per_tok for layer in smile_layers(model).values()} == {2}
    for m in (1, 2):
        set_routing(model, RoutingPolicy("sequence", num_experts_per_tok=m))
        model.save_pretrained(tmp_path / str(m))
        again = tf.LlamaForCausalLM.from_pretrained(tmp_path / str(m))
        assert {layer.num_experts_per_tok for layer in smile_layers(again).values()} == {m}


def test_upscale_calibrates():
    config = tf.LlamaConfig(**SIZES, intermediate_size=24, bos_token_id=1, eos_token_id=None)
    base, finetuned = tf.LlamaForCausalLM(config), [tf.LlamaForCausalLM(config) for _ in range(2)]
    options = {"rank_of_expert": 2, "rank_of_router": 2, "exclude": ["lm_head"], "progress": False}
    model, report = sk.upscale(base, finetuned, **options, calibrate=True)
    assert get_routing(model) == RoutingPolicy.recommended(model)
    assert report.calibration.source == "written"
    plain = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"^inputs: Sequential has no input that can be generated"):
        sk.upscale(plain, [nn.Sequential(nn.Linear(8, 8))], **options | {"exclude": None}, calibrate=True, inplace=True)
    assert type(plain[0]) is nn.Linear
    with pytest.raises(ValueError, match=r"^calibrated: is True"):
        sk.upscale(base, finetuned, **options, routing=RoutingPolicy(calibrated=True), inplace=True)
    assert isinstance(base.model.layers[0].mlp.up_proj, nn.Linear)


def test_text_encoders_are_recommended_a_window():
    """Those that predict masked tokens; not models whose attention is causal, that generate, or of other inputs."""
    window, sizes = RoutingPolicy("window", accumulate=True, window=2), {"hidden_size": 16, "num_attention_heads": 2}
    small = {**sizes, "num_hidden_layers": 1, "intermediate_size": 24, "vocab_size": 50}
    for kind, config, expected in (
        (tf.BertModel, tf.BertConfig(**small), window),
        (tf.BertForSequenceClassification, tf.BertConfig(**small), window),
        (tf.DistilBertModel, tf.DistilBertConfig(dim=16, n_heads=2, n_layers=1, hidden_dim=24, vocab_size=50), window),
        (tf.ModernBertModel, tf.ModernBertConfig(**small, pad_token_id=0), window),
        (tf.LongformerModel, tf.LongformerConfig(**small, attention_window=4), RoutingPolicy()),
        (tf.FunnelModel, tf.FunnelConfig(d_model=16, block_sizes=[1, 1], n_head=2, d_head=8), RoutingPolicy()),
        (tf.BertModel, tf.BertConfig(**small, is_decoder=True), RoutingPolicy()),
        (tf.BertLMHeadModel, tf.BertConfig(**small, is_decoder=True), RoutingPolicy()),
        (tf.LlamaForSequenceClassification, tf.LlamaConfig(**small), RoutingPolicy()),
        (tf.ViTModel, tf.ViTConfig(**sizes, num_hidden_layers=1, intermediate_size=24), RoutingPolicy()),
    ):
        assert RoutingPolicy.recommended(kind(config)) == expected, kind
    assert RoutingPolicy.recommended(nn.Linear(2, 2)) == RoutingPolicy()


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification", "MaskedLM"])
@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert", "ModernBert", "Electra", "DebertaV2", "Albert"])
def test_the_policy_recommended_for_a_text_encoder_serves_all_its_heads(kind, task):
    """Also poolers and classifiers, which have one row for a sequence."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
    if kind == "DistilBert":
        sizes = {"dim": 16, "n_heads": 2, "n_layers": 2, "hidden_dim": 24}
    model = getattr(tf, f"{kind}For{task}")(
        getattr(tf, f"{kind}Config")(**sizes, vocab_size=50, num_labels=5, pad_token_id=0)
    )
    model = smile(model, skip=())
    ids, mask = tokens(3, 6), torch.ones(3, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    published = model(input_ids=ids, attention_mask=mask)[0]
    set_routing(model, RoutingPolicy.recommended(model))
    with torch.no_grad():
        fast = model(input_ids=ids, attention_mask=mask)[0]
    output = model(input_ids=ids, attention_mask=mask)[0]
    torch.testing.assert_close(fast, output, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output, published)
    output.sum().backward()
    alone = model(input_ids=ids[1:2, :4])[0]
    torch.testing.assert_close(alone, output[1:2, :4] if output.shape[:2] == ids.shape else output[1:2])


@pytest.mark.parametrize(("blocks", "voting"), [(1, 1), (4, 1), (6, 2)])
def test_a_quarter_of_the_blocks_votes_where_a_language_model_is_calibrated(blocks, voting):
    model = llama(num_hidden_layers=blocks)
    assert RoutingPolicy.recommended(model) == RoutingPolicy(), "without calibration the published routing"
    with pytest.raises(
        ValueError, match=r"^restart_at: is \(7, 8\), and LlamaForCausalLM is .* 'token'; expected None, or"
    ):
        RoutingPolicy.recommended(model, restart_at=[7, 8])
    calibrate(model, sequences=1, length=2)
    policy = RoutingPolicy.recommended(model, restart_at=[7, 8])
    assert policy == RoutingPolicy("prompt", lock_after=voting, calibrated=True, restart_at=(7, 8))
    for wrong in (7, torch.tensor(7), {7, 8}, iter([7]), [-1]):
        with pytest.raises(ValueError, match=r"^restart_at: is .*; expected None or token ids, 0 or more"):
            RoutingPolicy.recommended(model, wrong)


def test_a_config_without_the_sizes_of_its_inputs():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = smile(tf.CanineModel(tf.CanineConfig(**sizes)))
    for call in (calibrate, sk.routing.check_calibration):
        with pytest.raises(ValueError, match=r"inputs: the model fails on random ones \(AttributeError: .*vocab_size"):
            call(model)


def test_random_ids_contain_no_padding():
    """Funnel's config has no bos_token_id, which transformers' warning of padding without a mask compares."""
    sizes = {"vocab_size": 8, "block_sizes": [1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24}
    model = smile(tf.FunnelForMaskedLM(tf.FunnelConfig(**sizes, num_decoder_layers=1, pad_token_id=3)))
    assert calibrate(model).source == "random"


def test_positions_of_a_decoder():
    """Whisper's config calls them max_target_positions: the inputs are no longer than these."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8, "max_source_positions": 6}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    ids = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = smile(tf.WhisperForConditionalGeneration(tf.WhisperConfig(**sizes, **heads, **ids, max_target_positions=9)))
    report = calibrate(model, sequences=2)
    assert {layer.tokens for layer in report.layers if ".decoder." in layer.name and "fc1" in layer.name} == {18}


def test_offloaded_models():
    """accelerate brings a layer's tensors when it runs: calibration reads them then, and watch_routing refuses."""
    accelerate = pytest.importorskip("accelerate")
    model, plain = llama(), llama()
    plain.load_state_dict(model.state_dict())
    calibrate(plain, sequences=2, length=4)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert all(layer.vh.is_meta for layer in smile_layers(model).values())
    calibrate(model, sequences=2, length=4)
    for name, layer in smile_layers(plain).items():
        assert torch.equal(model.get_submodule(name).router_prior, layer.router_prior)
    policy, ids = RoutingPolicy.recommended(plain), tokens(1, 4)
    for one in (plain, model):
        set_routing(one, policy)
    torch.testing.assert_close(logits(model, input_ids=ids), logits(plain, input_ids=ids))
    with sk.watch_routing(model), pytest.raises(ValueError, match=r"q_proj is offloaded, on the meta device"):
        model(ids)
