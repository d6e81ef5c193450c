"""Conversations: sums that decay and restart, and prompts that the base processes first."""

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

from smile_kernels import SmileLinear
from smile_kernels.routing import RoutingPolicy, set_routing, user_turn_ids, watch_routing
from tests.routing.definition import (
    Calls,
    G,
    N,
    assert_follows,
    bert,
    by_name,
    llama,
    logits,
    mistral,
    restarts,
    t5,
    tokens,
)

TURNS = {
    "one id": RoutingPolicy("causal", accumulate=True, restart_at=(7,)),
    "three ids": RoutingPolicy("causal", accumulate=True, restart_at=[7, 8, 7], half_life=2.5),
}
SEQUENCES = {
    "sequence, last turn": RoutingPolicy("sequence", accumulate=True, restart_at=(7, 8)),
    "sequence, half-life": RoutingPolicy("sequence", accumulate=True, half_life=1.5),
    "sequence, last turn, lock 1": RoutingPolicy("sequence", restart_at=(7,), half_life=4, lock_after=1),
}
PROMPTS = {
    "prompt": RoutingPolicy("prompt"),
    "prompt, one block": RoutingPolicy("prompt", lock_after=1),
    "prompt, m 2": RoutingPolicy("prompt", num_experts_per_tok=2),
    "prompt, last turn": RoutingPolicy("prompt", restart_at=(7, 8), half_life=5),
    "prompt, last turn, one block": RoutingPolicy("prompt", restart_at=(7, 8), lock_after=1),
    "prompt, calibrated": RoutingPolicy("prompt", calibrated=True),
}


def new_cache(model, kind: str, length: int) -> tf.Cache:
    dynamic = kind == "dynamic"
    return tf.DynamicCache(config=model.config) if dynamic else tf.StaticCache(model.config, max_cache_len=length)


def conversation() -> torch.Tensor:
    """Two rows of 12 tokens, with 7 and 7 8 7 at different positions."""
    ids = torch.randint(10, 50, (2, 12))
    ids[0, 2:5] = torch.tensor([7, 8, 7])
    ids[0, 8], ids[1, 5:10] = 7, torch.tensor([7, 8, 7, 8, 7])
    return ids


@by_name(TURNS | SEQUENCES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_sums_restart_where_the_ids_stand(policy, side):
    model, ids = llama(), conversation()
    set_routing(model, policy)
    mask = torch.ones_like(ids)
    mask[1, slice(0, 3) if side == "left" else slice(10, 12)] = 0
    with Calls(model) as calls:
        logits(model, input_ids=ids, attention_mask=mask)
    assert_follows(calls, mask.bool().tolist(), policy, token_ids=ids)
    for b, real in enumerate(mask.bool()):
        alone = logits(model, input_ids=ids[b : b + 1, real])
        whole = logits(model, input_ids=ids, attention_mask=mask)[b : b + 1, real]
        torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)


@by_name(TURNS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_restarts_are_found_across_passes(policy, cache):
    """The ids may be split over chunks of the prompt, and over decoded tokens."""
    model, ids = mistral(), conversation()
    set_routing(model, policy)
    whole = logits(model, input_ids=ids, use_cache=False)
    for lengths in ((3, 1, 1, 4, 3), (4, 2, 1, 1, 1, 3), (12,)):
        kv = (
            tf.StaticCache(model.config, max_cache_len=16)
            if cache == "static"
            else tf.DynamicCache(config=model.config)
        )
        got = [logits(model, input_ids=part, past_key_values=kv) for part in ids.split(lengths, dim=1)]
        torch.testing.assert_close(torch.cat(got, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_restarts_after_cropping_and_reordering():
    model, policy = llama(), TURNS["three ids"]
    set_routing(model, policy)
    ids = conversation()
    kv = tf.DynamicCache(config=model.config)
    logits(model, input_ids=ids[:, :10], past_key_values=kv)
    kv.crop(-6)  # row 0 ends with 7 8
    kv.reorder_cache(torch.tensor([0, 0]))
    following = torch.tensor([[7, 20, 21], [22, 23, 24]])
    got = logits(model, input_ids=following, past_key_values=kv)
    rows = torch.cat([ids[[0, 0], :4], following], dim=1)
    assert restarts(rows, policy.restart_at, 0, 4)
    torch.testing.assert_close(got, logits(model, input_ids=rows, use_cache=False)[:, 4:], rtol=1e-4, atol=1e-5)


@by_name(SEQUENCES)
def test_packed_sequences_vote_from_their_last_turns_on(policy):
    model, ids = llama(attn_implementation="eager"), conversation()[:1]
    set_routing(model, policy)
    groups, starts = [[0] * 5 + [1] * 7], torch.tensor([0, 5])
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with Calls(model) as calls:
        whole = logits(model, input_ids=ids, position_ids=positions, use_cache=False)
    assert_follows(calls, [[True] * 12], policy, groups=groups, token_ids=ids)
    for start, end in zip(starts, (5, 12)):
        alone = logits(model, input_ids=ids[:, start:end], use_cache=False)
        torch.testing.assert_close(whole[:, start:end], alone, rtol=1e-4, atol=1e-5)


def test_a_decoder_with_cross_attention_takes_no_sums_from_token_to_token():
    model = bert(is_decoder=True, add_cross_attention=True)
    for policy in (SEQUENCES["sequence, half-life"], SEQUENCES["sequence, last turn"], PROMPTS["prompt"]):
        set_routing(model, policy)
        with pytest.raises(NotImplementedError, match="without half_life and restart_at"):
            logits(model, input_ids=tokens(2, 6), encoder_hidden_states=torch.randn(2, 3, 16))
        with pytest.raises(ValueError, match="whose tokens have no causal order"):
            set_routing(t5(), policy)


def test_restarts_need_ids():
    model = llama()
    set_routing(model, TURNS["one id"])
    with pytest.raises(NotImplementedError, match=r"^restart_at: LlamaModel is called without input_ids"):
        logits(model, inputs_embeds=torch.randn(1, 3, 16))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("half_life", {"scope": "causal", "half_life": 0}),
        ("half_life", {"scope": "causal", "half_life": float("inf")}),
        ("half_life", {"scope": "token", "half_life": 4}),
        ("restart_at", {"scope": "causal", "restart_at": []}),
        ("restart_at", {"scope": "causal", "restart_at": [1.5]}),
        ("restart_at", {"scope": "token", "restart_at": [1]}),
        ("calibrated", {"calibrated": 1}),
        ("half_life", {"scope": "window", "half_life": 4, "window": 2}),
        ("window", {"scope": "window"}),
        ("window", {"scope": "window", "window": 0}),
        ("window", {"scope": "window", "window": 1.5}),
        ("window", {"scope": "sequence", "window": 2}),
    ],
)
def test_bad_policies_are_named(name, values):
    with pytest.raises(ValueError, match=rf"^(routing: )?{name}\b"):
        RoutingPolicy.from_dict(values)


def prompt_choice(calls, real, policy, ids):
    """The experts [B][m] by the definition: L summed over the base's layers at each row's last token."""
    chosen = []
    for b in range(len(real)):
        evidence = [0.0] * N
        for layer, x, _ in calls:
            sums = [0.0] * N
            for t in range(len(real[b])):
                if real[b][t]:
                    energy = (layer.vh[:, :G].double() @ x[b, t].double()).square().sum(-1)
                    gamma = 2 ** (-1 / policy.half_life) if policy.half_life else 1.0
                    keep = 0.0 if restarts(ids, policy.restart_at, b, t) else gamma
                    sums = [keep * s + float(p) for s, p in zip(sums, energy / energy.sum())]
            prior = layer.router_prior.tolist() if policy.calibrated else [0.0] * N
            logs = torch.tensor(sums).log() - torch.tensor(prior)
            evidence = [e + float(v) for e, v in zip(evidence, logs)]
        best = torch.tensor(evidence).topk(policy.num_experts_per_tok or 1)
        chosen.append((best.values.softmax(-1), best.indices))
    return torch.stack([w for w, _ in chosen]), torch.stack([i for _, i in chosen])


def assert_serves(calls, choice, real):
    """Every layer and token of a row uses the row's experts."""
    for layer, x, y in calls:
        weights, ids = (t[:, None].expand(-1, x.shape[1], -1) for t in choice)
        torch.testing.assert_close(y[real], layer(x, routing=(weights, ids))[real], rtol=1e-4, atol=1e-5)


@by_name(PROMPTS)
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_base_reads_the_prompt_and_its_choice_serves_the_answer(policy, cache, side):
    model, ids = llama(), tokens(24, 9)
    ids[::2, 4:6] = torch.tensor([7, 8])
    for layer in model.modules():
        if isinstance(layer, SmileLinear) and policy.calibrated:
            layer.router_prior = 0.02 * torch.randn(N)
    set_routing(model, policy)
    mask = torch.ones_like(ids)
    mask[1, slice(0, 3) if side == "left" else slice(7, 9)] = 0
    real, kv = mask.bool(), None
    if cache != "none":
        kv = (
            tf.StaticCache(model.config, max_cache_len=12)
            if cache == "static"
            else tf.DynamicCache(config=model.config)
        )
    with Calls(model) as calls, watch_routing(model) as counts:
        logits(model, input_ids=ids, attention_mask=mask, past_key_values=kv, use_cache=kv is not None)
    voting = 7 * (policy.lock_after or 2)
    assert len(calls) == voting + 14, "what votes, then all layers"
    for layer, x, y in calls[:voting]:
        torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-5)
    choice = prompt_choice(calls[:voting], real.tolist(), policy, ids)
    assert len(choice[1][:, 0].unique()) > 1, "one expert alone shows nothing"
    assert_serves(calls[voting:], choice, real)
    assert all(int(count.sum()) == int(mask.sum()) for count in counts.values()), "the first reading does not count"
    if kv is None:
        return
    with Calls(model) as calls:
        logits(model, input_ids=tokens(24, 2), attention_mask=F.pad(mask, (0, 2), value=1), past_key_values=kv)
    assert len(calls) == 14
    assert_serves(calls, choice, torch.ones(24, 2, dtype=torch.bool))


@by_name({name: PROMPTS[name] for name in ("prompt", "prompt, one block")})
def test_generation_and_beams_with_a_prompts_choice(policy):
    model = llama()
    set_routing(model, policy)
    ids, mask = tokens(3, 6), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1] * 6])
    for options in ({"num_beams": 1}, {"num_beams": 3}):
        options |= {"max_new_tokens": 5, "do_sample": False}
        batch = model.generate(ids, attention_mask=mask, **options)
        for b, padding in enumerate((0, 2, 0)):
            alone = model.generate(ids[b : b + 1, padding:], **options)
            assert torch.equal(batch[b : b + 1, padding:], alone)


def test_a_prompt_votes_beside_a_cache_that_holds_a_stream():
    """As an offloaded one does; it runs on GPUs only."""
    model, ids, answers = llama(), tokens(2, 6), []
    set_routing(model, PROMPTS["prompt"])
    for stream in (None, torch.Stream()):
        kv = tf.DynamicCache(config=model.config)
        kv.prefetch_stream = stream
        answers.append(logits(model, input_ids=ids, past_key_values=kv))
    assert torch.equal(*answers)


def test_scope_prompt_on_encoders_and_packed_rows():
    model = bert()
    set_routing(model, PROMPTS["prompt"])
    ids, mask = tokens(4, 6), torch.ones(4, 6, dtype=torch.int64)
    with Calls(model) as calls:
        logits(model, input_ids=ids, attention_mask=mask)
    assert_serves(calls[12:], prompt_choice(calls[:12], mask.bool().tolist(), PROMPTS["prompt"], ids), mask.bool())
    model = llama(attn_implementation="eager")
    set_routing(model, PROMPTS["prompt"])
    with pytest.raises(NotImplementedError, match="packed in a row have no prompt"):
        logits(model, input_ids=tokens(1, 4), position_ids=torch.tensor([[0, 1, 0, 1]]), use_cache=False)


def test_training_through_a_prompts_choice():
    model = llama().train()
    set_routing(model, PROMPTS["prompt"])
    ids = tokens(2, 5)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    layer = next(m for m in model.modules() if isinstance(m, SmileLinear))
    assert layer.u.grad.abs().sum() > 0


def test_user_turn_ids_are_what_begins_every_user_turn():
    class Characters:
        """A tokenizer whose tokens are characters; < and > are special."""

        all_special_ids = (ord("<"), ord(">"))
        chat_template = "x"

        def __init__(self, first: str, user: str, answer: str):
            self.first, self.parts = first, {"user": user, "assistant": answer}

        def apply_chat_template(self, turns, tokenize):
            assert not tokenize
            return self.first + "".join(self.parts[turn["role"]].format(turn["content"]) for turn in turns)

        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return [ord(c) for c in text]

    def begins(*parts: str) -> str:
        return "".join(map(chr, user_turn_ids(Characters(*parts))))

    assert begins("", "<user\n{}>\n", "<assistant\n{}>\n") == "<user\n"
    assert begins("<system\nBe kind.>\n", "<user\n{}>\n", "<assistant\n{}>\n") == "<user\n"
    assert begins("", "[INST] {} [/INST]", " {}") == "[INST] "
    plain = Characters("", "{}", "{}")
    assert user_turn_ids(plain) is None
    plain.chat_template = None
    assert user_turn_ids(plain) is None
