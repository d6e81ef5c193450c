"""Common models, adapters and folders: the fused model equals the fine-tuned one, or the rest is listed."""

import copy
import shutil
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import smile_kernels as sk
from smile_kernels.integrations.peft import adapter_deltas
from smile_kernels.storage import read_tensors
from tests.upscaling.test_architectures import enliven, put_in

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
LLAMA = {**TEXT, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "pad_token_id": 0}
CLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}
CLIP |= {"patch_size": 16, "projection_dim": 16, "model_type": "clip_vision_model"}
ROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
VISION = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
MODELS = {
    "Llama": ("LlamaForCausalLM", LLAMA),
    "tied Llama": ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "Qwen2": ("Qwen2ForCausalLM", LLAMA),
    "GPT2": ("GPT2LMHeadModel", GPT2),
    "GPT2 classifier": ("GPT2ForSequenceClassification", GPT2),
    "Bert classifier": ("BertForSequenceClassification", TEXT),
    "Bert masked": ("BertForMaskedLM", TEXT),
    "Llava": (
        "LlavaForConditionalGeneration",
        {"text_config": {**LLAMA, "model_type": "llama"}, "vision_config": CLIP, "image_token_index": 95},
    ),
    "Qwen2-VL": (
        "Qwen2VLForConditionalGeneration",
        {"text_config": {**LLAMA, **ROPE}, "vision_config": VISION, "image_token_id": 91, "video_token_id": 92},
    ),
}
RANKS = {"rank_of_expert": -1, "rank_of_router": 2}
IDS = torch.arange(3, 17).view(2, 7)
EMBEDDING = {"model.embed_tokens.weight"}
ADAPTERS = {
    "embedding and head saved whole": ("Llama", {"modules_to_save": ["embed_tokens", "lm_head"]}, EMBEDDING),
    "norm saved whole": ("Llama", {"modules_to_save": ["model.norm"]}, {"model.norm.weight"}),
    "LoRA of an embedding": ("Llama", {"target_modules": ["q_proj", "embed_tokens"]}, EMBEDDING),
    "rows of an embedding": ("Llama", {"trainable_token_indices": [4, 9]}, EMBEDDING),
    "LoRA of a tied head": ("tied Llama", {"target_modules": ["q_proj", "lm_head"]}, set()),
    "a tied head saved whole": ("tied Llama", {"modules_to_save": ["lm_head"]}, set()),
    "DoRA of Conv1D": ("GPT2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}, set()),
    "rsLoRA of square Conv1D": ("GPT2", {"target_modules": ["c_proj"], "use_rslora": True}, set()),
    "Conv1D and Linear": ("GPT2 classifier", {"target_modules": ["c_attn", "c_proj", "score"]}, set()),
    "DoRA of Conv1D and Linear": ("GPT2 classifier", {"target_modules": ["c_proj", "score"], "use_dora": True}, set()),
    "every bias": ("Qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}, set()),
    "patterns": ("Qwen2", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 5}}, set()),
    "a head saved whole": ("Bert classifier", {"target_modules": ["query"], "modules_to_save": ["classifier"]}, set()),
    "a head saved whole, whose bias is tied": (
        "Bert masked",
        {"target_modules": ["query"], "modules_to_save": ["cls"]},
        {f"cls.predictions.transform.LayerNorm.{part}" for part in ("weight", "bias")},
    ),
    "a name of before, Llava": ("Llava", {"target_modules": ["q_proj", "v_proj"]}, set()),
    "a name of before, Qwen2-VL": ("Qwen2-VL", {"target_modules": ["q_proj", "v_proj"]}, set()),
}


def build(kind: str, **options) -> nn.Module:
    torch.manual_seed(0)
    architecture, config = MODELS[kind]
    cls = getattr(transformers, architecture)
    model = cls(cls.config_class(**{**config, **options})).eval()
    enliven(model)
    return model


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name, tmp_path):
    kind, options, lost = ADAPTERS[name]
    base = build(kind)
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"r": 3, "init_lora_weights": False, "target_modules": ["q_proj"], **options})
    tuned = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for parameter, p in tuned.named_parameters():
            if p.requires_grad and "lora_A" not in parameter and "lora_B" not in parameter:
                p += 0.3 * torch.rand_like(p)
    want = output(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    deltas = adapter_deltas(tmp_path / "adapter", base)
    in_memory, first = sk.upscale(base, [deltas], progress=False, **RANKS)
    second = sk.upscale_checkpoints(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", **RANKS)
    assert {one.name for one in first.lost} == {one.name for one in second.lost} == lost
    merged = tuned.merge_and_unload()
    assert (output(base) - want).norm() > 0.01 * want.norm()
    for model in (in_memory, type(base).from_pretrained(tmp_path / "out")):
        verdicts = [v.verdict for v in sk.verify(model, base, [deltas])] if not lost else []
        assert verdicts == ["exact"] * (not lost)
        put_in(model, merged, first.lost)
        torch.testing.assert_close(output(model), want, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ensure", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "tied Llama"])
@pytest.mark.parametrize("rows", [[20, 30], {"lm_head": [20, 30]}, {"embed_tokens": [20, 30], "lm_head": [5]}], ids=str)
def test_rows_of_an_embedding_are_those_of_the_head_where_peft_ties_them(rows, kind, ensure, tmp_path):
    """The outputs for other tokens, whose embeddings do not change."""
    base = build(kind)
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    options = {"trainable_token_indices": rows, "ensure_weight_tying": ensure, "init_lora_weights": False}
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], **options)
    if kind == "tied Llama" and ensure and "embed_tokens" in rows:  # other rows of a tied head
        with pytest.raises(ValueError, match="ensure_weight_tying"):
            peft.get_peft_model(base, config)
        return
    tuned = peft.get_peft_model(copy.deepcopy(base), config).eval()
    for name, p in tuned.named_parameters():
        if "trainable_tokens" in name:
            p.data += 0.3 * torch.rand_like(p)
    tuned.save_pretrained(tmp_path / "adapter")
    in_memory, _ = sk.upscale(base, [adapter_deltas(tmp_path / "adapter", base)], progress=False, **RANKS)
    sk.upscale_checkpoints(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", **RANKS)
    for model in (in_memory, type(base).from_pretrained(tmp_path / "out")):
        torch.testing.assert_close(output(model), output(tuned), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_head_tied_to_a_mean_is_reported(tmp_path):
    """The base's head is tied to its embedding; experts change one of them."""
    base = build("tied Llama")
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens"], init_lora_weights=False)
    tuned = peft.get_peft_model(copy.deepcopy(base), config)
    embedding = tuned.base_model.model.model.embed_tokens.modules_to_save["default"]
    embedding.weight.data += 0.3 * torch.rand_like(embedding.weight)
    tuned.save_pretrained(tmp_path / "adapter")
    untied = build("Llama")
    untied.load_state_dict(base.state_dict())
    untied.lm_head.weight.data += 0.3
    untied.model.layers[0].mlp.up_proj.weight.data += torch.randn(48, 32)
    untied.save_pretrained(tmp_path / "untied")
    mean, excluded = {"remaining": "average"}, {"exclude": ["lm_head"]}
    for name, expert, options in (
        ("adapter", adapter_deltas(tmp_path / "adapter", base), mean),
        ("untied", untied, excluded),
    ):
        _, first = sk.upscale(base, [expert], progress=False, **RANKS, **options)
        second = sk.upscale_checkpoints(
            tmp_path / "base", [tmp_path / name], tmp_path / f"out_{name}", **RANKS, **options
        )
        for report in (first, second):
            assert {one.name: one.reason for one in report.lost} == {
                "lm_head.weight": "tied to model.embed_tokens.weight in the base"
            }, name
            assert report.lost[0].sizes[0] > 0.1


def test_a_tied_head_that_peft_adapts_with_the_embedding_gives_no_warning(tmp_path):
    base = build("tied Llama")
    targets = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, **targets)).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deltas = adapter_deltas(tmp_path, base)
    assert deltas.keys() >= {"lm_head", "model.embed_tokens"}


def resized_head(folder, base, rows: int = 100) -> None:
    """An adapter of `base` that saves a head of more tokens whole."""
    tuned = copy.deepcopy(base)
    tuned.resize_token_embeddings(rows)
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    peft.get_peft_model(tuned, config).save_pretrained(folder)


@pytest.mark.filterwarnings("ignore")
def test_a_head_of_more_tokens_saved_whole(tmp_path):
    """It has no mean with the base's; where another expert changes the head, it is reported."""
    base = build("Llama")
    base.save_pretrained(tmp_path / "base")
    resized_head(tmp_path / "more", base)
    peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False)
    ).save_pretrained(tmp_path / "head")
    folders = [tmp_path / "more", tmp_path / "head"]
    deltas = [adapter_deltas(folder, base) for folder in folders]

    def on_disk(**options):
        return sk.upscale_checkpoints(tmp_path / "base", folders, tmp_path / "out", **RANKS, **options)

    def in_memory(**options):
        return sk.upscale(base, deltas, progress=False, **RANKS, **options)[1]

    for fused in (in_memory, on_disk):
        with pytest.raises(sk.SmileError, match=r"lm_head.weight' has shape \[100, 32\]; expected .* \[96, 32\]"):
            fused(remaining="average")
        assert not list(tmp_path.glob("out*"))
        lost = {one.name: one for one in fused().lost}
        assert lost["lm_head.weight"].sizes == [1.0, 0.0]
        assert "of shape [100, 32]" in lost["lm_head.weight"].reason


@pytest.mark.filterwarnings("ignore")
def test_experts_alone_leave_layers_that_cannot_have_experts_to_the_base(tmp_path):
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    base = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision, image_size=32, patch_size=16))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for p in tuned.parameters():
            p += 0.1 * torch.randn_like(p)
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name)
    for alone in (False, True):
        out = tmp_path / f"out{alone}"
        report = sk.upscale_checkpoints(tmp_path / "base", [tmp_path / "tuned"], out, experts_only=alone, **RANKS)
        layer = next(layer.name for layer in report.layers if layer.name.endswith("head.attention.out_proj"))
        assert (f"{layer}.weight" in {one.name for one in report.lost}) == alone
        want = (base if alone else tuned).get_parameter(f"{layer}.weight")
        assert torch.equal(sk.load_pretrained(out).get_parameter(f"{layer}.weight"), want)


def single(folder, model) -> None:
    model.save_pretrained(folder)


def sharded(folder, model) -> None:
    model.save_pretrained(folder, max_shard_size="30KB")


def pickled(folder, model) -> None:
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


FOLDERS = {
    "an old index": (sharded, single),
    "an old single file": (single, sharded),
    "an old pickle": (pickled, single),
    "an old pickle next to shards": (pickled, sharded),
    "old safetensors next to a new pickle": (single, pickled),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder_saved_over_is_read_as_transformers_reads_it(what, tmp_path):
    models = [build("Llama"), build("Llama")]
    with torch.no_grad():
        for p in models[1].parameters():
            p.add_(1)
    aside = tmp_path / "aside"
    for write, model in zip(FOLDERS[what], models):
        write(tmp_path / "model", model)  # save_pretrained deletes its earlier files: they are restored
        if aside.exists():
            for file in aside.iterdir():
                if not (tmp_path / "model" / file.name).exists():
                    shutil.copy(file, tmp_path / "model")
        else:
            shutil.copytree(tmp_path / "model", aside)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for name, tensor in read_tensors(tmp_path / "model").items():
        assert torch.equal(tensor.load(), loaded[name]), name


class Carried(nn.Module):
    """A linear layer, and buffers of dtypes that layers do not compute with."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("freqs_cis", torch.randn(4, 2, dtype=torch.complex64))
        for dtype in ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "bool"):
            self.register_buffer(dtype, torch.randint(0, 2, (3,)).to(getattr(torch, dtype)))
        self.register_buffer("scale", torch.randn(3).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["kept", "bf16"])
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_dtypes_that_are_carried_along(form, dtype, tmp_path):
    base = Carried()
    expert = copy.deepcopy(base)
    expert.layer.weight.data += torch.randn(8, 8)
    for name, model in (("base", base), ("expert", expert)):
        (tmp_path / name).mkdir()
        if form == "bin":
            torch.save(model.state_dict(), tmp_path / name / "pytorch_model.bin")
        else:
            save_file(model.state_dict(), tmp_path / name / "model.safetensors")
    sk.upscale_checkpoints(tmp_path / "base", [tmp_path / "expert"], tmp_path / "out", dtype=dtype, **RANKS)
    in_memory, _ = sk.upscale(base, [expert], progress=False, **RANKS)
    assert in_memory.scale.dtype == base.scale.dtype
    written = read_tensors(tmp_path / "out")
    for name, tensor in base.named_buffers():
        kept = tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
        assert written[name].dtype == kept.dtype
        assert torch.equal(written[name].load().view(torch.uint8), kept.view(torch.uint8)), name


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            torch.randn(3, dtype=torch.complex128),
            r"'extra' is torch\.strided torch\.complex128; expected a dense",
        ),
        (torch.eye(3).to_sparse(), r"'extra' is torch\.sparse_coo"),
        (torch.randn(3).to(torch.float8_e4m3fnuz), r"'extra' is torch\.strided torch\.float8_e4m3fnuz"),
    ],
    ids=["complex128", "sparse", "fp8 of another kind"],
)
def test_what_cannot_be_written_is_refused_when_it_is_opened(tensor, message, tmp_path):
    base, expert = nn.ModuleDict({"layer": nn.Linear(8, 8)}), nn.ModuleDict({"layer": nn.Linear(8, 8)})
    for name, model, more in (("base", base, {"extra": tensor}), ("expert", expert, {})):
        (tmp_path / name).mkdir()
        torch.save({**model.state_dict(), **more}, tmp_path / name / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        sk.upscale_checkpoints(tmp_path / "base", [tmp_path / "expert"], tmp_path / "out", **RANKS)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e5m2, torch.bool], ids=str)
def test_dtypes_that_no_layer_computes_with_are_refused(dtype, tmp_path):
    for name in ("base", "expert"):
        (tmp_path / name).mkdir()
        save_file(nn.ModuleDict({"layer": nn.Linear(8, 8)}).state_dict(), tmp_path / name / "model.safetensors")
    with pytest.raises(ValueError, match=f"dtype: is {dtype}; expected torch.bfloat16, torch.float16"):
        sk.upscale_checkpoints(tmp_path / "base", [tmp_path / "expert"], tmp_path / "out", dtype=dtype, **RANKS)
    assert not list(tmp_path.glob("out*"))


def test_numbers_beyond_the_dtype_of_the_result_are_found_before_the_first_layer(tmp_path):
    state = nn.ModuleDict({"layer": nn.Linear(8, 8)}).state_dict() | {"table": torch.full((3,), 1e6)}
    for name in ("base", "expert"):
        (tmp_path / name).mkdir()
        save_file({key: t + (name == "expert") for key, t in state.items()}, tmp_path / name / "model.safetensors")
    stages = set()
    with pytest.raises(ValueError, match=r"base/model\.safetensors: tensor 'table' has 1e\+06; expected at most 65504"):
        sk.upscale_checkpoints(
            tmp_path / "base",
            [tmp_path / "expert"],
            tmp_path / "out",
            dtype=torch.float16,
            progress=lambda stage, *_: stages.add(stage),
            **RANKS,
        )
    assert "layers" not in stages
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
@pytest.mark.parametrize("side", ["base", "expert"])
def test_linear_layers_of_eight_bits_are_refused_before_work(side, dtype, tmp_path):
    """Also where another dtype is asked for: without its scale such a weight says nothing."""
    for name in ("base", "expert"):
        state = nn.ModuleDict({"layer": nn.Linear(8, 8), "other": nn.Linear(8, 8)}).state_dict()
        if name == side:
            state["layer.weight"] = state["layer.weight"].to(dtype)
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    with pytest.raises(ValueError, match=r"layer\.weight"):
        sk.upscale_checkpoints(
            tmp_path / "base", [tmp_path / "expert"], tmp_path / "out", dtype=torch.bfloat16, include=["*"], **RANKS
        )
    assert not list(tmp_path.glob("out*"))


class Plain(nn.Module):
    """A textbook GPT, whose embeddings have unusual names."""

    def __init__(self, tokens: str = "tok_emb", positions: str = "pos_emb"):
        super().__init__()
        self.add_module(tokens, nn.Embedding(20, 16))
        self.add_module(positions, nn.Embedding(8, 16))
        self.ff, self.out_head = nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.names = tokens, positions

    def forward(self, ids):
        tokens, positions = (self.get_submodule(name) for name in self.names)
        return self.out_head(self.ff(tokens(ids) + positions(torch.arange(ids.shape[1]))).tanh())


@pytest.mark.filterwarnings("ignore:changes by fine-tuning are left out")
@pytest.mark.parametrize("names", [("tok_emb", "pos_emb"), ("wte", "wpe"), ("token_embedding_table", "embedding_pos")])
@pytest.mark.parametrize(
    "prefixes", [("", "_orig_mod."), ("module.", ""), ("module._orig_mod.", "_orig_mod.")], ids=str
)
def test_hand_written_checkpoints(names, prefixes, tmp_path):
    base = Plain(*names)
    expert = copy.deepcopy(base)
    for p in expert.parameters():
        p.data += 0.1 * torch.randn_like(p)
    for name, model, prefix in (("base", base, prefixes[0]), ("expert", expert, prefixes[1])):
        (tmp_path / name).mkdir()
        save_file({prefix + key: t for key, t in model.state_dict().items()}, tmp_path / name / "model.safetensors")
    report = sk.upscale_checkpoints(tmp_path / "base", [tmp_path / "expert"], tmp_path / "out", **RANKS)
    assert {layer.name for layer in report.layers} == {"ff", "out_head"}
    assert {lost.name for lost in report.lost} == {f"{name}.weight" for name in names}
    loaded = sk.load_pretrained(tmp_path / "out", Plain(*names))
    put_in(loaded, expert, report.lost)
    ids = torch.randint(20, (2, 5))
    torch.testing.assert_close(loaded(ids), expert(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:changes by fine-tuning are left out")
@pytest.mark.parametrize("stored", [False, True], ids=["memory", "disk"])
def test_another_number_of_labels_with_its_head_excluded(stored, tmp_path):
    base, expert = build("Bert classifier"), build("Bert classifier", num_labels=5)
    with torch.no_grad():
        for name, p in expert.named_parameters():
            if "query" in name:
                p += torch.randn_like(p)
    for name, model in (("base", base), ("expert", expert)):
        model.save_pretrained(tmp_path / name)
    folders = tmp_path / "base", [tmp_path / "expert"], tmp_path / "out"
    with pytest.raises(ValueError, match=r"classifier\.weight' has shape \[5, 32\]; expected the base's, \[2, 32\]"):
        sk.upscale_checkpoints(*folders, **RANKS)
    if stored:
        report = sk.upscale_checkpoints(*folders, exclude=["classifier"], **RANKS)
    else:
        _, report = sk.upscale(base, [expert], exclude=["classifier"], progress=False, **RANKS)
    assert {lost.name for lost in report.lost} >= {"classifier.weight"}
    assert all(lost.reason.startswith("of shape") for lost in report.lost if "classifier" in lost.name)


@pytest.mark.filterwarnings("ignore:changes by fine-tuning are left out")
@pytest.mark.parametrize("stored", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize(
    ("settings", "listed"),
    [
        ({"rms_norm_eps": 1e-3, "hidden_act": "gelu"}, {"hidden_act": "silu", "rms_norm_eps": "1e-06"}),
        ({"rope_theta": 5e5}, {"rope_parameters.rope_theta": "10000.0"}),
        ({"pad_token_id": 7}, {"pad_token_id": "0"}),
        ({"is_causal": False, "of_no_code": 3}, {"is_causal": ""}),  # which the config does not declare
        ({"is_causal": True, "attention_chunk_size": None}, {}),  # as without them
        ({"attention_dropout": 0.1, "use_cache": False}, {}),
        ({"id2label": {0: "LABEL_1", 1: "LABEL_0"}}, {"id2label": "{'0': 'LABEL_0', '1': 'LABEL_1'}"}),
    ],
    ids=lambda value: "-".join(value),
)
def test_settings_that_an_expert_has_otherwise_are_listed(stored, settings, listed, tmp_path):
    base, expert = build("Llama"), build("Llama", **settings)
    with torch.no_grad():
        expert.model.layers[0].mlp.up_proj.weight += 1
    for name, model in (("base", base), ("expert", expert)):
        model.save_pretrained(tmp_path / name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if stored:
            report = sk.upscale_checkpoints(tmp_path / "base", [tmp_path / "expert"], tmp_path / "out", **RANKS)
        else:
            _, report = sk.upscale(base, [expert], progress=False, **RANKS)
    assert {one.name: one.base for one in report.settings} == listed
    warned = [str(one.message) for one in caught if "from which those of the experts differ" in str(one.message)]
    assert bool(warned) == any(not name.endswith(("token_id", "id2label")) for name in listed)
    for one in report.settings:
        assert str(one) in str(report)
        assert one.name in report.table()


def test_a_policy_that_a_decoder_cannot_run_is_refused_before_any_work(tmp_path):
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    for name in ("base", "expert"):
        config = transformers.T5Config(**sizes)
        transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / name)
    folders, options = (tmp_path / "base", [tmp_path / "expert"]), {"rank_of_expert": 2, "rank_of_router": 1}
    with pytest.raises(ValueError, match="the decoder of T5ForConditionalGeneration reads the encoder's output"):
        sk.upscale_checkpoints(*folders, tmp_path / "out", routing=sk.RoutingPolicy("causal"), **options)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "expert"]


@pytest.mark.filterwarnings("ignore:changes by fine-tuning are left out")
def test_a_policy_that_the_layers_with_experts_cannot_follow_leaves_no_output(tmp_path):
    """CLIP's projections are outside of its towers."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = {"text_config": {**sizes, "vocab_size": 32}, "vision_config": {**sizes, "image_size": 8, "patch_size": 4}}
    for name in ("base", "expert"):
        transformers.CLIPModel(transformers.CLIPConfig(**parts, projection_dim=8)).save_pretrained(tmp_path / name)
    folders, options = (tmp_path / "base", [tmp_path / "expert"]), {"rank_of_expert": 2, "rank_of_router": 1}
    options["routing"] = sk.RoutingPolicy("sequence")
    with pytest.raises(ValueError, match="projection belongs to none of its parts"):
        sk.upscale_checkpoints(*folders, tmp_path / "out", **options)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "expert"]
    sk.upscale_checkpoints(*folders, tmp_path / "out", exclude=["*projection"], **options)
    assert sk.get_routing(sk.load_pretrained(tmp_path / "out")) == options["routing"]


def test_statistics_of_a_batch_norm_that_are_missing(tmp_path):
    """from_pretrained reports them as missing, and would begin with 0 and 1."""
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    for name in ("base", "expert"):
        config = transformers.ResNetConfig(**sizes)
        transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / name)
    file = tmp_path / "expert" / "model.safetensors"
    tensors = load_file(file)
    kept = {name: t for name, t in tensors.items() if "num_batches_tracked" not in name}
    save_file(kept, file, {"format": "pt"})
    options = {"rank_of_expert": 2, "rank_of_router": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sk.upscale_checkpoints(tmp_path / "base", [tmp_path / "expert"], tmp_path / "out", **options)
    save_file({name: t for name, t in kept.items() if "running_mean" not in name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"expert: tensor '.*running_mean' is missing; expected all of ResNet"):
        sk.upscale_checkpoints(tmp_path / "base", [tmp_path / "expert"], tmp_path / "again", **options)


@pytest.mark.filterwarnings("ignore:changes by fine-tuning are left out")
def test_infinity_in_a_config_is_read_as_transformers_writes_it(tmp_path):
    """As time_step_limit of the Mamba models has it."""
    architecture, settings = "FalconH1ForCausalLM", {**LLAMA, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8}
    config = getattr(transformers, architecture).config_class(**settings, time_step_limit=(0.0, float("inf")))
    base = getattr(transformers, architecture)(config)
    expert = copy.deepcopy(base)
    for name, p in expert.named_parameters():
        p.data += 0.1 * torch.randn_like(p) * ("up_proj" in name)
    for name, model in (("base", base), ("expert", expert)):
        model.save_pretrained(tmp_path / name)
    report = sk.upscale_checkpoints(tmp_path / "base", [tmp_path / "expert"], tmp_path / "out", **RANKS)
    assert not report.settings
    assert not report.lost


def test_a_trainer_saves_what_opens_again(tmp_path):
    base = build("Llama")
    expert = copy.deepcopy(base)
    for name, p in expert.named_parameters():
        p.data += 0.3 * torch.randn_like(p) * ("proj" in name)
    model, _ = sk.upscale(base, [expert], progress=False, **RANKS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = transformers.TrainingArguments(tmp_path / "run", report_to=[], use_cpu=True)
        transformers.Trainer(model, arguments).save_model(tmp_path / "saved")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert [verdict.verdict for verdict in sk.verify(loaded, base, [expert])] == ["exact"]
