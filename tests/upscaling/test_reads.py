"""Layers whose weight other code reads, or whose forward is not W x + b, have no experts, and are reported."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import smile_kernels as sk
from smile_kernels.integrations.peft import ModuleDelta
from smile_kernels.upscaling.layers import linear_layers
from smile_kernels.upscaling.reads import weight_readers

RANKS = {"rank_of_expert": -1, "rank_of_router": 2, "progress": False}


def product(x, layer):
    return F.linear(x, layer.weight, layer.bias)


class Reads(nn.Module):
    """Reads the weights of all layers except for the last two, each in a different way."""

    def __init__(self):
        super().__init__()
        for name in ("direct", "local", "argument", "method", "named", "only_dtype", "called"):
            setattr(self, name, nn.Linear(8, 8))
        self.listed = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def read(self, x):
        return x @ self.method.weight.T

    def forward(self, x):
        x = F.linear(x, self.direct.weight)
        layer = self.local
        x = F.linear(x, layer.weight, layer.bias)
        for one in self.listed:
            x = torch.tanh(x @ one.weight)
        x = product(self.read(x), self.argument) + x @ getattr(self, "named").weight  # noqa: B009
        return self.called(self.only_dtype(x.to(self.only_dtype.weight.dtype)))


class Inherits(Reads):
    def forward(self, x):
        return super().forward(x) + 1


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0.25


class Gated(nn.Linear):
    def forward(self, x):
        return super().forward(x).sigmoid() * x


def tuned(base: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    expert = copy.deepcopy(base)
    for layer in linear_layers(expert).values():
        layer.weight.data += 0.3 * torch.randn_like(layer.weight)
    return expert


@pytest.mark.parametrize("kind", [Reads, Inherits])
def test_each_way_of_reading_is_found(kind):
    model = kind()
    found = weight_readers(model, linear_layers(model))
    assert set(found) == {"direct", "local", "argument", "method", "named", "listed.0", "listed.1"}
    assert found["argument"] == "product"
    assert found["method"] == "Reads.read"


W2 = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 96}
W2 |= {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 8}
W2 |= {"num_conv_pos_embedding_groups": 2, "tdnn_dim": (16,) * 5, "xvector_output_dim": 16}
SSM = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 96}
READERS = {
    "WavLMForCTC": (lambda: transformers.WavLMConfig(**W2), {"q_proj", "k_proj", "v_proj", "out_proj"}),
    "Wav2Vec2ForXVector": (lambda: transformers.Wav2Vec2Config(**W2), {"kernel"}),
    "MambaForCausalLM": (lambda: transformers.MambaConfig(**SSM), {"dt_proj", "x_proj", "out_proj"}),
    "Mamba2ForCausalLM": (
        lambda: transformers.Mamba2Config(**SSM, num_heads=8, head_dim=8, n_groups=2),
        {"out_proj"},
    ),
    "Wav2Vec2ForCTC": (lambda: transformers.Wav2Vec2Config(**W2), set()),
    "BertForMaskedLM": (lambda: transformers.BertConfig(**{k: v for k, v in W2.items() if "conv" not in k}), set()),
}


@pytest.mark.parametrize("architecture", READERS)
def test_architectures_that_read_weights(architecture):
    config, layers = READERS[architecture]
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config())
    found = weight_readers(model, linear_layers(model))
    assert {name.rpartition(".")[2] for name in found} == layers


@pytest.mark.parametrize(
    "base",
    [Reads(), nn.Sequential(Scaled(8, 8), nn.Linear(8, 8)), nn.Sequential(Gated(8, 8), nn.Linear(8, 8)),
     nn.TransformerEncoderLayer(8, 2, 16)],
    ids=["reads", "scaled", "gated", "attention"],
)  # fmt: skip
def test_left_alone_reported_refused_or_taken(base):
    """With one expert its weight is used, exactly; with two the base's, and the report lists the loss."""
    base.eval()
    one, two = tuned(base, 1), tuned(base, 2)
    x = torch.randn(3, 5, 8)
    model, report = sk.upscale(base, [one], **RANKS)
    torch.testing.assert_close(model(x), one(x), rtol=1e-4, atol=1e-5)
    assert not report.lost
    with pytest.warns(UserWarning, match="left out of the result"):
        model, report = sk.upscale(base, [one, two], **RANKS)
    unfit = {layer.name for layer in report.layers if layer.skipped}
    assert unfit == {lost.name.removesuffix(".weight") for lost in report.lost}
    for name in unfit:
        assert not isinstance(model.get_submodule(name), sk.SmileLinear)
        assert torch.equal(model.get_submodule(name).weight, base.get_submodule(name).weight)
    for lost in report.lost:
        w, w1 = base.get_parameter(lost.name), one.get_parameter(lost.name)
        assert lost.sizes[0] == pytest.approx(((w1 - w).norm() / w.norm()).item(), rel=1e-4)
    with pytest.raises(ValueError, match=r"cannot have experts, since .*; expected it in exclude"):
        sk.upscale(base, [one, two], strict=True, **RANKS)
    sk.upscale(base, [one, two], strict=True, exclude=sorted(unfit), **RANKS)


class Hidden(nn.Module):
    """Reads a weight by code that is not visible in the source: in training, or always with `always`."""

    def __init__(self, read: str = "x @ model.layer.weight", always: bool = False):
        super().__init__()
        self.layer, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.read, self.always = eval(f"lambda x, model: {read}"), always

    def forward(self, x):
        return self.other(self.read(x, self) if self.training or self.always else self.layer(x))


REFUSED = r"layer: its (weight|bias) is read by Hidden.*exclude=\['layer'\]"


@pytest.mark.parametrize(
    "read",
    [
        "x @ model.layer.weight",
        "x @ model.layer.weight.T",
        "x @ model.layer.weight.data",
        "x @ next(model.layer.parameters())",
        "(lambda layer: x @ layer.weight)(model.layer)",
        "x @ dict(model.named_parameters())['layer.weight']",
        "x @ model.state_dict()['layer.weight']",
        "model.layer(x) + model.layer.bias",
    ],
)
def test_a_read_that_no_source_shows_is_refused_at_the_first_pass(read):
    base = Hidden(read)
    experts = [tuned(base, 1), tuned(base, 2)]
    experts[0].layer.bias.data += 1
    model, _ = sk.upscale(base, experts, **RANKS)
    x = torch.randn(2, 8)
    model.eval()(x)
    for _ in range(2):  # it is also refused the second time
        with pytest.raises(RuntimeError, match=REFUSED):
            model.train()(x)
    model, _ = sk.upscale(base, [tuned(base, 1)], exclude=["layer"], remaining="average", **RANKS)
    model.eval()(x)
    model.train()(x)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_a_failed_pass_keeps_its_error_and_is_checked_again():
    base = Hidden("model.layer(x) + 0 * x @ model.layer.weight.T")
    model, _ = sk.upscale(base, [tuned(base, 1), tuned(base, 2)], **RANKS)
    model.eval()(torch.randn(2, 8))
    with pytest.raises(ValueError, match=r"x: has shape \[2, 7\]"):
        model.train()(torch.randn(2, 7))
    with pytest.raises(RuntimeError, match=REFUSED):
        model.train()(torch.randn(2, 8))


class Referred(nn.Module):
    """A layer that the model calls through another reference than its submodule."""

    def __init__(self, bound: bool):
        super().__init__()
        self.layer, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.held = (self.layer.forward if bound else self.layer,)

    def forward(self, x):
        return self.other(self.held[0](x))


@pytest.mark.parametrize("bound", [True, False])
def test_a_layer_that_is_called_through_another_reference_is_refused(bound):
    base = Referred(bound)
    model, _ = sk.upscale(base, [tuned(base, 1), tuned(base, 2)], **RANKS)
    with pytest.raises(RuntimeError, match=r"layer: its weight is read by Linear\.forward, .*exclude=\['layer'\]"):
        model(torch.randn(2, 8))


@pytest.mark.parametrize("saved", ["sk.save_pretrained", "whole", "copied"])
def test_a_loaded_model_refuses_such_reads_too(saved, tmp_path):
    """The code of the loaded model may differ from the code with which the checkpoint was fused."""
    base = Hidden()
    model, _ = sk.upscale(base, [tuned(base, 1), tuned(base, 2)], **RANKS)
    if saved == "whole":
        model.read = base.read = None  # a lambda cannot be pickled
        torch.save(model, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        loaded.read = Hidden().read
    elif saved == "copied":
        loaded = copy.deepcopy(model)
    else:
        sk.save_pretrained(model, tmp_path / "model")
        loaded = sk.load_pretrained(tmp_path / "model", Hidden(always=True))
    x = torch.randn(2, 8)
    with pytest.raises(RuntimeError, match=REFUSED):
        loaded.train()(x)


def test_transformers_models_refuse_such_reads_when_loaded(tmp_path, monkeypatch):
    """An architecture whose newer code reads a weight that its older code multiplied by."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_key_value_heads=2))
    model, _ = sk.upscale(base, [tuned(base)], exclude=["lm_head"], **RANKS)
    model.save_pretrained(tmp_path)
    mlp = transformers.models.llama.modeling_llama.LlamaMLP
    monkeypatch.setattr(mlp, "forward", lambda self, x: self.down_proj(x @ self.up_proj.weight.T))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"up_proj: its weight is read by LlamaMLP"):
        loaded(torch.arange(3, 9)[None])


class CompiledPart(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.part = torch.compile(lambda x: x.softmax(-1) + x, backend="eager", fullgraph=True)

    def forward(self, x):
        return self.part(self.layer(x))


def test_a_model_with_a_compiled_part_runs():
    torch.manual_seed(0)
    base = CompiledPart()
    layer = nn.Linear(8, 8)
    model, _ = sk.upscale(base, [{"layer": ModuleDelta(layer.weight.detach())}], **RANKS)
    base.layer.weight.data += layer.weight.data
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), base(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["state_dict", "checkpoint file", "whole"])
def test_torch_save_opens_again_as_smile_or_is_refused(way, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_key_value_heads=2))
    base.eval().save_pretrained(tmp_path / "base")
    expert = tuned(base)
    model, _ = sk.upscale(base, [expert], **RANKS)
    ids = torch.arange(3, 9)[None]
    if way == "whole":
        torch.save(model, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        folder = tmp_path / "saved"
        folder.mkdir()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        if way == "checkpoint file":  # in addition to the model's config
            model.config.architectures = ["LlamaForCausalLM"]
            model.config.save_pretrained(folder)
            loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        else:
            with pytest.raises(RuntimeError, match="Unexpected key"):
                copy.deepcopy(base).load_state_dict(torch.load(folder / "pytorch_model.bin"))
            with pytest.raises(ValueError, match="is not a SMILE checkpoint; expected quantization_config"):
                sk.load_pretrained(folder, copy.deepcopy(base))
            base.config.save_pretrained(folder)
            options = {"rank_of_expert": -1, "rank_of_router": 2}
            with pytest.raises(ValueError, match=r"base: .* contains '\S+proj\.\w+', as a SMILE model does"):
                sk.upscale_checkpoints(folder, [tmp_path / "base"], tmp_path / "out", **options)
            loaded = copy.deepcopy(model)
            with torch.no_grad():
                for p in loaded.parameters():
                    p.zero_()
            loaded.load_state_dict(torch.load(folder / "pytorch_model.bin"))
    assert sum(isinstance(module, sk.SmileLinear) for module in loaded.modules()) == 8
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, expert(ids).logits, rtol=1e-4, atol=1e-5)


class Rooted(nn.Module):
    """Also has the weight of its layer as a separate parameter."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False)
        self.own = self.layer.weight

    def forward(self, x):
        return self.layer(x) @ self.own


@pytest.mark.filterwarnings("ignore:changes by fine-tuning are left out")
def test_a_parameter_of_the_model_itself_that_a_layer_is_tied_to_is_listed():
    base = Rooted()
    expert = tuned(base)
    model, report = sk.upscale(base, [expert], **RANKS)
    assert [lost.name for lost in report.lost] == ["own"]
    model.own = nn.Parameter(expert.own.detach().clone())
    x = torch.randn(2, 8)
    torch.testing.assert_close(model(x), expert(x), rtol=1e-4, atol=1e-5)


class Lookup(nn.Module):
    """Another kind of embedding."""

    def __init__(self, table: nn.Parameter):
        super().__init__()
        self.table = table

    def forward(self, ids):
        return self.table[ids]


@pytest.mark.filterwarnings("ignore:changes by fine-tuning are left out")
@pytest.mark.parametrize("kind", ["nn.Embedding", "subclass", "own class"])
def test_what_a_head_is_tied_to_is_listed_whatever_it_is(kind):
    torch.manual_seed(0)
    head = nn.Linear(8, 20, bias=False)
    embedding = Lookup(head.weight) if kind == "own class" else nn.Embedding(20, 8)
    if kind != "own class":
        embedding.__class__ = nn.Embedding if kind == "nn.Embedding" else type("Scaled", (nn.Embedding,), {})
        embedding.weight = head.weight
    base = nn.Sequential(embedding, nn.Linear(8, 8), head)
    expert = tuned(base)
    model, report = sk.upscale(base, [expert], **RANKS)
    assert [lost.name for lost in report.lost] == ["0.table" if kind == "own class" else "0.weight"]
    for name in ("table", "weight"):
        if name in model[0]._parameters:
            setattr(model[0], name, nn.Parameter(expert[2].weight.detach().clone()))
    ids = torch.arange(5)
    torch.testing.assert_close(model(ids), expert(ids), rtol=1e-4, atol=1e-5)
