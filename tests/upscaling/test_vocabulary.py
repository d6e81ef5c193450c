"""Tokens that one expert adds to the base's vocabulary are in the fused model, in memory and from disk."""

import copy
import json
import warnings
import weakref
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn
from typer.testing import CliRunner

import smile_kernels as sk
from smile_kernels.cli import app
from smile_kernels.integrations.peft import adapter_deltas
from smile_kernels.storage import StoredTensor
from smile_kernels.upscaling.verify import _forced

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4, "vocab_size": 96}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 96, "encoder_ffn_dim": 48}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
MODELS = {
    "untied": ("LlamaForCausalLM", {**TEXT, **SPECIAL}),
    "tied": ("LlamaForCausalLM", {**TEXT, **SPECIAL, "tie_word_embeddings": True}),
    "a bias of the head": ("BertForMaskedLM", TEXT),
    "encoder and decoder": ("T5ForConditionalGeneration", {**T5, "decoder_start_token_id": 0}),
    "a bias of logits": ("BartForConditionalGeneration", BART),
}
RANKS = {"rank_of_expert": -1, "rank_of_router": 2}
NEW = 4


def build(kind: str, **more: int) -> nn.Module:
    torch.manual_seed(0)
    architecture, options = MODELS[kind]
    cls = getattr(transformers, architecture)
    model = cls(cls.config_class(**options | more)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=p.shape[1] ** -0.5)
    return model


@torch.no_grad()
def tuned(base: nn.Module, seed: int, added: int = 0) -> nn.Module:
    """Linear layers changed, and rows of the embedding and head for more tokens; the base's embedding stays."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    if added:
        model.resize_token_embeddings(96 + added, mean_resizing=False)
        embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        for p in model.parameters():
            if id(p) in embeddings or (p.dim() == 1 and len(p) == 96 + added):
                p[96:].normal_(std=p.shape[-1] ** -0.5)
    embedding = model.get_input_embeddings().weight
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.weight is not embedding:
            layer.weight += 0.3 * layer.weight.std() * torch.randn_like(layer.weight)
    for name, p in model.named_parameters():
        if p.dim() == 1 and name.endswith("bias") and "norm" not in name.lower() and len(p) < 96:
            p += 0.1 * torch.randn_like(p)
    return model


@torch.no_grad()
def output(model: nn.Module, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(3, tokens, (2, 7), generator=generator)
    more = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits


def holds(model: nn.Module, i: int, expert: nn.Module, tokens: int) -> None:
    """With an expert forced, the model equals that expert on all of its tokens."""
    assert model.get_input_embeddings().weight.shape[0] == model.config.get_text_config().vocab_size == 96 + NEW
    with _forced(sk.nn.smile_layers(model), i):
        got = output(model, tokens)
    assert got.shape[-1] == 96 + NEW
    torch.testing.assert_close(got[..., :tokens], output(expert, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:changes by fine-tuning are left out")
@pytest.mark.parametrize("kind", MODELS)
def test_in_memory_and_from_disk(kind, tmp_path):
    """Two experts, one with more tokens: each is itself on its own tokens; the head of the other has the new rows."""
    base = build(kind)
    experts = [tuned(base, 1), tuned(base, 2, NEW)]
    for name, model in (("base", base), ("plain", experts[0]), ("grown", experts[1])):
        model.save_pretrained(tmp_path / name)
    (tmp_path / "base" / "tokenizer.json").write_text("old")
    (tmp_path / "grown" / "tokenizer.json").write_text("new")
    (tmp_path / "grown" / "vocab.txt").write_text("new")
    for name in ("chat_template.jinja", "spiece.model", "generation_notes.txt"):  # its template is in another file
        (tmp_path / "base" / name).write_text("old")
    names = ["plain", "grown"]
    in_memory, first = sk.upscale(base, experts, expert_names=names, embeddings_from="grown", progress=False, **RANKS)
    assert base.get_input_embeddings().weight.shape[0] == 96
    second = sk.upscale_checkpoints(
        tmp_path / "base", [tmp_path / "plain", tmp_path / "grown"], tmp_path / "out", embeddings_from="grown", **RANKS
    )
    texts = {
        file.name: file.read_text() for file in (tmp_path / "out").iterdir() if file.suffix not in (".safetensors", "")
    }
    assert (texts["tokenizer.json"], texts["vocab.txt"], texts["generation_notes.txt"]) == ("new", "new", "old")
    assert not {"chat_template.jinja", "spiece.model"} & texts.keys()
    assert [lost.name for lost in first.lost] == [lost.name for lost in second.lost] == []
    loaded = type(base).from_pretrained(tmp_path / "out")
    in_memory.save_pretrained(tmp_path / "own")
    for model in (in_memory, loaded, type(base).from_pretrained(tmp_path / "own")):
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert tied == (base.get_output_embeddings().weight is base.get_input_embeddings().weight)
        holds(model, 0, experts[0], 96)
        holds(model, 1, experts[1], 96 + NEW)


@pytest.mark.filterwarnings("ignore:changes by fine-tuning are left out")
@pytest.mark.parametrize("remaining", ["base", "average"])
@pytest.mark.parametrize("exclude", [None, ["lm_head"]], ids=["head", "no head"])
def test_inplace_and_what_remains(exclude, remaining):
    base = build("untied")
    experts = [tuned(base, 1), tuned(base, 2, NEW)]
    options = {"embeddings_from": 1, "remaining": remaining, "exclude": exclude, "progress": False, **RANKS}
    model, _ = sk.upscale(base, experts, inplace=True, **options)
    assert model is base
    rows = model.get_input_embeddings().weight
    torch.testing.assert_close(rows[96:], experts[1].get_input_embeddings().weight[96:])
    torch.testing.assert_close(model.lm_head.weight[96:], experts[1].lm_head.weight[96:])
    if exclude:
        plain = [expert.lm_head.weight[:96] for expert in experts]
        want = sum(plain) / 2 if remaining == "average" else build("untied").lm_head.weight
        torch.testing.assert_close(model.lm_head.weight[:96], want)


@pytest.mark.filterwarnings("ignore:changes by fine-tuning are left out", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("untied", {}),
        ("tied", {}),
        ("untied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("tied", {"modules_to_save": ["embed_tokens"]}),
        ("untied", {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj", "lm_head"]}),
        ("untied", {"trainable_token_indices": [97, 98]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_an_adapter_of_a_base_with_more_tokens(kind, options, tmp_path):
    """PEFT stores the embeddings of a resized base; the other adapter has the tokens of the base."""
    base = build(kind)
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    adapters, wholes = [], []
    for name, added in (("plain", 0), ("grown", NEW)):
        start = tuned(base, 4, added)
        with torch.no_grad():
            for p, q in zip(start.parameters(), base.parameters()):
                p[: len(q)] = q
        config = peft.LoraConfig(
            **{"r": 3, "target_modules": ["q_proj"], "init_lora_weights": False, **(options if added else {})}
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(start, config).eval()
            model.save_pretrained(tmp_path / name, save_embedding_layers=bool(added))
            wholes.append(model.merge_and_unload())
        adapters.append(adapter_deltas(tmp_path / name, base))
    in_memory, first = sk.upscale(base, adapters, embeddings_from=1, progress=False, **RANKS)
    folders = [tmp_path / "plain", tmp_path / "grown"]
    second = sk.upscale_checkpoints(tmp_path / "base", folders, tmp_path / "out", embeddings_from=1, **RANKS)
    assert [lost.name for lost in first.lost] == [lost.name for lost in second.lost] == []
    for model in (in_memory, type(base).from_pretrained(tmp_path / "out")):
        holds(model, 0, wholes[0], 96)
        holds(model, 1, wholes[1], 96 + NEW)


def grown_embedding(base: nn.Module, folder: Path) -> None:
    """An adapter of the base with more tokens that stores their rows of the embedding alone."""
    start = copy.deepcopy(base)
    start.resize_token_embeddings(96 + NEW, mean_resizing=False)
    name = next(name for name, module in start.named_modules() if module is start.get_input_embeddings())
    layer = "query" if "Bert" in type(base).__name__ else "q_proj"
    config = peft.LoraConfig(
        r=3, target_modules=[layer], init_lora_weights=False, modules_to_save=[name.rpartition(".")[2]]
    )
    peft.get_peft_model(start, config).save_pretrained(folder, save_embedding_layers=False)


def test_an_adapter_without_the_rows_of_the_head(tmp_path):
    base = build("untied")
    base.save_pretrained(tmp_path / "base")
    grown_embedding(base, tmp_path / "grown")
    message = (
        r"has lm_head.weight of shape \[96, 32\], and 100 tokens in model.embed_tokens.weight; expected \[100, 32\]"
    )
    deltas = adapter_deltas(tmp_path / "grown", base)
    with pytest.raises(sk.SmileError, match=r"^embeddings_from: finetuned\[0\] " + message):
        sk.upscale(base, [deltas], embeddings_from=0, inplace=True, progress=False, **RANKS)
    assert base.get_input_embeddings().weight.shape[0] == 96
    with pytest.raises(sk.SmileError, match=r"^embeddings_from: experts\[0\]\S* " + message):
        sk.upscale_checkpoints(tmp_path / "base", [tmp_path / "grown"], tmp_path / "out", embeddings_from=0, **RANKS)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "grown"}


@pytest.mark.parametrize("kind", ["a bias of the head", "a bias of logits"])
def test_a_bias_that_an_adapter_lacks_gets_zeros(kind, tmp_path):
    """As transformers resizes it; PEFT does not store it."""
    base = build(kind)
    base.save_pretrained(tmp_path / "base")
    grown_embedding(base, tmp_path / "grown")
    adapter = adapter_deltas(tmp_path / "grown", base)
    in_memory, _ = sk.upscale(base, [adapter], embeddings_from=0, progress=False, **RANKS)
    sk.upscale_checkpoints(tmp_path / "base", [tmp_path / "grown"], tmp_path / "out", embeddings_from=0, **RANKS)
    on_disk = sk.load_pretrained(tmp_path / "out")
    name = "cls.predictions.bias" if "head" in kind else "final_logits_bias"
    for model in (in_memory, on_disk):
        assert not model.state_dict()[name][..., 96:].any()
    torch.testing.assert_close(output(in_memory, 96 + NEW), output(on_disk, 96 + NEW))


def test_a_few_layers_of_a_grown_adapter_are_in_memory_at_a_time(tmp_path, monkeypatch):
    base = build("untied", num_hidden_layers=12)
    base.save_pretrained(tmp_path / "base")
    for name, added in (("plain", 0), ("grown", NEW)):
        start = copy.deepcopy(base)
        start.resize_token_embeddings(96 + added, mean_resizing=False)
        model = peft.get_peft_model(
            start, peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        model.save_pretrained(tmp_path / name, save_embedding_layers=bool(added))
    load, held, most = StoredTensor.load, weakref.WeakSet(), 0

    def counted(self: StoredTensor) -> torch.Tensor:
        nonlocal most
        tensor = load(self)
        if "lora_" in self.name:
            held.add(tensor)
            most = max(most, len(held))
        return tensor

    monkeypatch.setattr(StoredTensor, "load", counted)
    folders = [tmp_path / "plain", tmp_path / "grown"]
    sk.upscale_checkpoints(tmp_path / "base", folders, tmp_path / "out", embeddings_from=1, workers=1, **RANKS)
    assert 2 < most < 2 * 24


def test_refused_before_work(tmp_path, folders):
    base = build("untied")
    experts = [tuned(base, 1), tuned(base, 2, NEW)]
    for name, model in (("base", base), ("plain", experts[0]), ("grown", experts[1])):
        model.save_pretrained(tmp_path / name)
    before = sorted(tmp_path.iterdir())

    def refused(value: object, message: str, models: list[nn.Module] = experts) -> None:
        with pytest.raises(ValueError, match=message):
            sk.upscale(base, models, embeddings_from=value, inplace=True, progress=False, **RANKS)
        assert base.get_input_embeddings().weight.shape[0] == 96
        assert not sk.nn.smile_layers(base)

    refused(2, "embeddings_from: is 2; expected 0 to 1, the number of an expert")
    refused(0, r"embeddings_from: finetuned\[0\] has 96 tokens and the base 96; expected an expert with more")
    refused(
        1, r"lm_head.weight' has shape \[99, 32\]; expected the base's, \[100, 32\]", [tuned(base, 3, 3), experts[1]]
    )
    plain = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="embeddings_from: Sequential has no tokens; expected a transformers model"):
        sk.upscale(plain, [copy.deepcopy(plain)], embeddings_from=0, progress=False, **RANKS)
    arguments = ["--base", tmp_path / "base", "--expert", tmp_path / "plain", "--expert", tmp_path / "grown"]
    arguments += ["--out", tmp_path / "out", "--rank-of-expert", "-1", "--rank-of-router", "2", "--embeddings-from"]
    result = CliRunner().invoke(app, ["upscale", *map(str, arguments), "math"])
    assert result.exit_code == 1
    assert "embeddings_from: is 'math'; expected one of the experts 'plain', 'grown'" in result.output
    with pytest.raises(ValueError, match="embeddings_from: its architecture is not known"):
        sk.upscale_checkpoints(
            folders[0], folders[1:], tmp_path / "out", embeddings_from=0, rank_of_expert=4, rank_of_router=2
        )
    assert sorted(tmp_path.iterdir()) == before
    done = CliRunner().invoke(app, ["upscale", *map(str, arguments), "grown"])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 96 + NEW


@pytest.mark.filterwarnings("ignore:the result has the base's config")
def test_as_many_positions_as_tokens_are_not_taken_for_tokens(tmp_path):
    """An expert with more tokens and more positions: its position table is not in the result, which says so."""
    size = {"n_embd": 32, "n_layer": 1, "n_head": 4}
    base, expert = (
        transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=n, n_positions=n, **size, **SPECIAL)).eval()
        for n in (96, 96 + NEW)
    )
    options = {**RANKS, "embeddings_from": 0}
    with pytest.warns(UserWarning, match=r"left out of the result: .*transformer\.wpe\.weight"):
        fused, _ = sk.upscale(base, [expert], **options, progress=False)
    folders = [tmp_path / "base", tmp_path / "expert"]
    for model, folder in zip((base, expert), folders):
        model.save_pretrained(folder)
    with pytest.warns(UserWarning, match=r"left out of the result: .*transformer\.wpe\.weight"):
        sk.upscale_checkpoints(folders[0], folders[1:], tmp_path / "out", **options)
    for model in (fused, sk.load_pretrained(tmp_path / "out")):
        assert torch.equal(model.transformer.wpe.weight, base.transformer.wpe.weight)
        assert torch.equal(model.transformer.wte.weight[96:], expert.transformer.wte.weight[96:])
