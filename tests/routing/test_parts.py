"""Models that read images: their language model follows the policy, and every other layer routes each token alone."""

import copy

import pytest
import torch
import transformers as tf

import smile_kernels as sk
from smile_kernels.nn import smile_layers
from smile_kernels.routing import RoutingPolicy, calibrate, get_routing, routing_override, set_routing, watch_routing
from smile_kernels.routing.tokens import Tokens
from tests.routing.definition import CAUSAL, POLICIES, SIZES, Calls, N, assert_follows, by_name, logits, smile, t5

IMAGE = 49
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}
LLAMA = {**SIZES, "intermediate_size": 24, "eos_token_id": None, "bos_token_id": 1}
RESTART = RoutingPolicy("causal", accumulate=True, restart_at=(7,))


def llava(skip: tuple[str, ...] = ()) -> torch.nn.Module:
    """Experts in the tower, the connector, the language model and the head."""
    torch.manual_seed(0)
    parts = {"text_config": tf.LlamaConfig(**LLAMA), "vision_config": tf.CLIPVisionConfig(**VISION)}
    config = tf.LlavaConfig(**parts, image_token_index=IMAGE, image_seq_length=4)
    return smile(tf.LlavaForConditionalGeneration(config), skip=skip, layers_per_block=7)


def inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(8, IMAGE, (batch, 11))
    ids[:, 1:5], ids[0, 7] = IMAGE, 7
    return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, 8, 8), "attention_mask": torch.ones_like(ids)}


def in_text(model, calls):
    inside = set(model.model.language_model.modules())
    return [call for call in calls if call[0] in inside]


@by_name({**CAUSAL, "window 2+layers": POLICIES["window 2+layers"], "restart": RESTART})
def test_text_follows_the_policy_and_the_rest_is_alone(policy):
    model, batch = llava(), inputs()
    set_routing(model, policy)
    assert get_routing(model) == policy
    with Calls(model) as calls:
        logits(model, **batch, use_cache=False)
    assert_follows(
        in_text(model, calls), torch.ones(2, 11, dtype=torch.bool).tolist(), policy, None, batch["input_ids"]
    )
    others = [call for call in calls if call not in in_text(model, calls)]
    m = policy.num_experts_per_tok or 1
    for layer, x, y in others:
        with torch.no_grad():
            want = sk.functional.smile_linear(
                *(x, layer.weight, layer.bias, layer.vh, layer.s, layer.u, layer.expert_bias),
                num_experts_per_tok=m,
                rank_of_router=layer.rank_of_router,
            )
            if policy.top_p == 1:
                torch.testing.assert_close(y, want)
    assert len(others) >= 21
    set_routing(model, RoutingPolicy())
    assert not any(getattr(module, "router_policy", None) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_recommended_of_a_model_of_images(tmp_path):
    """One expert for the prompt, chosen by a quarter of the language model's blocks, after a restart at a turn."""
    model, batch = llava(), inputs(1)
    calibrate(model, sequences=2, length=4)
    policy = RoutingPolicy.recommended(model, restart_at=[7])
    assert policy == RoutingPolicy("prompt", lock_after=1, calibrated=True, restart_at=(7,))
    set_routing(model, policy)
    with watch_routing(model) as counts:
        answer = model.generate(**batch, max_new_tokens=4, do_sample=False)
    text = {name: count for name, count in counts.items() if "language_model" in name}
    (chosen,) = {int(count.argmax()) for count in text.values()}
    assert all(int((count > 0).sum()) == 1 for count in text.values())
    assert any(int((count > 0).sum()) > 1 for name, count in counts.items() if "vision" in name)

    forced = copy.deepcopy(model)
    set_routing(forced, RoutingPolicy())
    with routing_override(forced.model.language_model, chosen):
        torch.testing.assert_close(logits(model, **batch), logits(forced, **batch))
        assert torch.equal(answer, forced.generate(**batch, max_new_tokens=4, do_sample=False))


def test_ids_restart_the_sums_behind_embeddings():
    """The language model is called with embeddings; alone, with the ids themselves, it gives the same."""
    model, ids = llava(skip=("lm_head",)), inputs()["input_ids"].clamp_max(IMAGE - 1)
    set_routing(model, RESTART)
    want = logits(model, input_ids=ids)
    text = copy.deepcopy(model)
    set_routing(text, RoutingPolicy())
    set_routing(text.model.language_model, RESTART)
    alone = text.lm_head(logits(text.model.language_model, input_ids=ids))
    torch.testing.assert_close(want, alone)
    set_routing(model, CAUSAL["causal+layers"])
    assert not torch.allclose(want, logits(model, input_ids=ids))


def test_policy_of_a_saved_model_of_images(tmp_path):
    base = llava(skip=("",))  # no SMILE layers
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for p in tuned.parameters():
            p += 0.1 * torch.randn_like(p)
    model, _ = sk.upscale(base, [tuned, base], rank_of_expert=2, rank_of_router=1, progress=False)
    calibrate(model, sequences=2, length=4)
    policy = RoutingPolicy.recommended(model)
    set_routing(model, policy)
    model.save_pretrained(tmp_path)
    again = tf.LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert get_routing(again) == policy
    batch = inputs(1)
    torch.testing.assert_close(logits(again, **batch), logits(model, **batch))


def test_no_text_of_its_own():
    """GIT's text layers have no module of their own, and Mllama's read the tower's states: the published routing."""
    git = tf.GitForCausalLM(tf.GitConfig(vision_config={**VISION, "num_hidden_layers": 1}, **LLAMA))
    text = {**LLAMA, "cross_attention_layers": [1]}
    vision = {"hidden_size": 16, "attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 1}
    vision |= {"num_global_layers": 1, "image_size": 8, "patch_size": 4, "max_num_tiles": 1, "vision_output_dim": 32}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    mllama = tf.MllamaForConditionalGeneration(tf.MllamaConfig(text_config=text, vision_config=vision))
    for model in (git, mllama):
        for layer in smile_layers(smile(model)).values():
            layer.router_prior = torch.zeros(N)
        assert RoutingPolicy.recommended(model) == RoutingPolicy()


def test_positions_of_images():
    """[3, B, S] in time, height and width tells nothing of packing; [4, B, S] has those in the text first."""
    ids = torch.ones(1, 6, dtype=torch.long)
    sideways = torch.tensor([0, 1, 1, 1, 2, 3]).expand(3, 1, 6)
    policy = CAUSAL["causal"]
    assert Tokens({"input_ids": ids, "position_ids": sideways}, policy, "M").starts is None
    packed = torch.cat([torch.tensor([[[0, 1, 2, 0, 1, 2]]]), sideways])
    assert Tokens({"input_ids": ids, "position_ids": packed}, policy, "M").starts.tolist() == [[0, 0, 0, 3, 3, 3]]
    with pytest.raises(ValueError, match=r"position_ids: has shape \[2, 1, 6\]"):
        Tokens({"input_ids": ids, "position_ids": sideways[:2]}, policy, "M")


def test_the_mask_of_a_window_for_one_token():
    """A language model that its caller masks, [B, heads, 1, keys]: a windowed cache holds fewer keys than tokens."""
    cache = tf.DynamicCache()
    cache.update(torch.zeros(2, 1, 9, 4), torch.zeros(2, 1, 9, 4), 0)
    mask = {"sliding_attention": torch.tensor([[[[0, 0, 1, 1]]], [[[1, 1, 1, 0]]]]).bool()}
    arguments = {"inputs_embeds": torch.zeros(2, 1, 16), "attention_mask": mask, "past_key_values": cache}
    assert Tokens(arguments, CAUSAL["causal"], "M").real.tolist() == [[True], [False]]


def test_padding_of_patches():
    """The towers of Idefics get the mask of their patches [B, height, width]."""
    mask = torch.tensor([[[1, 1], [1, 0]], [[1, 1], [1, 1]]]).bool()
    arguments = {"pixel_values": torch.zeros(2, 3, 8, 8), "patch_attention_mask": mask}
    found = Tokens(arguments, POLICIES["sequence"], "M")
    assert found.real.tolist() == mask.flatten(1).tolist()
    assert found.length == 4


def test_rows_of_an_encoder_in_cross_attention():
    """Layers that read the encoder's output have its padding, also where both lengths are equal."""
    model = t5()
    ids, mask = torch.randint(1, 50, (2, 5)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    for length in (5, 3):
        batch["decoder_input_ids"], batch["decoder_attention_mask"] = ids[:, :length], mask.flip(0)[:, :length]
        with watch_routing(model) as counts:
            logits(model, **batch)
        for name, count in counts.items():
            of_encoder = name.startswith("encoder") or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
            assert int(count.sum()) == int((mask if of_encoder else batch["decoder_attention_mask"]).sum()), name
    set_routing(model, POLICIES["layers"])
    for length in (5, 3):
        with pytest.raises(RuntimeError, match="reads the encoder's output, whose tokens are others"):
            logits(model, **batch | {"decoder_input_ids": ids[:, :length], "decoder_attention_mask": mask[:, :length]})
    for policy in (CAUSAL["causal"], RoutingPolicy("prompt"), RoutingPolicy("sequence", half_life=3)):
        with pytest.raises(ValueError, match="the decoder of T5ForConditionalGeneration reads the encoder's output"):
            set_routing(model, policy)
        set_routing(model.encoder, policy)
        set_routing(model.encoder, RoutingPolicy())


def test_flattened_rows_and_a_layer_called_by_keyword():
    opt = smile(
        tf.OPTForCausalLM(tf.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32))
    )
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    with watch_routing(opt) as counts:
        logits(opt, input_ids=torch.randint(1, 50, (2, 4)), attention_mask=mask)
    assert {int(count.sum()) for count in counts.values()} == {6}
    layer = opt.model.decoder.layers[0].fc1
    with watch_routing(layer) as counts:
        layer(input=torch.randn(3, 16))
    assert [int(count.sum()) for count in counts.values()] == [3]


def test_no_watch_under_transforms():
    layer = llava().lm_head
    with watch_routing(layer), pytest.raises(ValueError, match=r"model: runs under a transform of torch\.func"):
        torch.func.grad(lambda x: layer(x).sum())(torch.randn(2, 16))


def test_ids_that_a_model_does_not_read():
    model = smile(tf.CLIPVisionModel(tf.CLIPVisionConfig(**VISION)))
    with pytest.raises(ValueError, match=r"restart_at: is \(7,\), and CLIPVisionModel reads pixel_values"):
        set_routing(model, RESTART)


def test_watch_with_a_mask_that_no_policy_follows():
    """It counts every token there, where the sums of a policy are refused."""
    model = smile(tf.CLIPVisionModel(tf.CLIPVisionConfig(**VISION)))
    forward = model.forward

    def masked(pixel_values, other_mask=None):
        return forward(pixel_values)

    model.forward = masked
    with watch_routing(model) as counts:
        model(torch.randn(2, 3, 8, 8), other_mask=torch.ones(2, 4))
    assert {int(count.sum()) for count in counts.values()} == {10}
    set_routing(model, POLICIES["layers"])
    with pytest.raises(NotImplementedError, match="other_mask: is a Tensor, which routing policies do not follow"):
        model(torch.randn(2, 3, 8, 8), other_mask=torch.ones(2, 4))
