"""Settings that change tokens, images or a pooling are noticed; what versions of a library store otherwise is not."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from smile_kernels.upscaling import comparison
from smile_kernels.upscaling.files import files_beside, lost_files

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = {token: i for i, token in enumerate([*ALPHABET, "<|endoftext|>"])}
GPT2 = {"config.json": {"model_type": "gpt2"}, "vocab.json": VOCABULARY, "merges.txt": "#version: 0.2"}
WORDS = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "Hello", "a", "##b"])
BERT = {"config.json": {"model_type": "bert"}, "vocab.txt": WORDS}
WAV = {"config.json": {"model_type": "wav2vec2"}}
VIT = {"config.json": {"model_type": "vit"}}
TOKEN = {"content": "<|endoftext|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
ADDED = {"256": TOKEN | {"special": True}}
CONFIG, MAP, IMAGES, POOLING = (
    *("tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json", "1_Pooling/config.json"),
)
PROCESSOR, GENERATION, VIDEOS = "processor_config.json", "generation_config.json", "video_preprocessor_config.json"
QWEN_SIZE = {"size": {"shortest_edge": 3136, "longest_edge": 12845056}}
QWEN = {
    "config.json": {"model_type": "qwen2_vl"},
    IMAGES: {"image_processor_type": "Qwen2VLImageProcessor"} | QWEN_SIZE,
}
QWEN_VIDEOS = {"video_processor_type": "Qwen2VLVideoProcessor"} | QWEN_SIZE


def whole_tokenizer() -> dict:
    inner = Tokenizer(models.BPE(VOCABULARY, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>"])
    return json.loads(inner.to_str())


def with_part(part: str, **values: Any) -> dict:
    """tokenizer.json with other settings of one part; those that are None are absent."""
    whole = whole_tokenizer()
    whole[part] = {name: one for name, one in (whole[part] | values).items() if one is not None}
    return whole


WHOLE = GPT2 | {"tokenizer.json": whole_tokenizer()}


def lost(tmp_path: Path, base: dict, expert: dict) -> list[str]:
    folders = [tmp_path / "base", tmp_path / "expert"]
    for folder, files in zip(folders, (base, expert), strict=True):
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return [one.name for one in lost_files(folders[0], folders[1:], files_beside(folders[0]))]


def named(**texts: str) -> dict:
    return {"chat_template": [{"name": name, "template": text} for name, text in texts.items()]}


UNLIKE: dict[str, tuple[dict, str, Any, Any]] = {
    # what: the other files, the file that differs, its content in two checkpoints
    "false or true": (WHOLE, CONFIG, {"add_prefix_space": True}, {"add_prefix_space": False}),
    "lower case": (BERT, CONFIG, {"do_lower_case": True}, {"do_lower_case": False}),
    "a default": (BERT, CONFIG, {}, {"do_lower_case": False}),
    "accents": (BERT, CONFIG, {}, {"strip_accents": False}),
    "an absent prefix": (WHOLE, CONFIG, {"tokenizer_class": "GPT2Tokenizer"}, {"add_prefix_space": True}),
    "a token": (WHOLE, CONFIG, {}, {"cls_token": "!"}),
    "a removed token": (WHOLE, CONFIG, {"eos_token": "!"}, {}),
    "more special tokens": (WHOLE, CONFIG, {}, {"additional_special_tokens": ["hello"]}),
    "further special tokens": (WHOLE, CONFIG, {"extra_special_tokens": []}, {"extra_special_tokens": ["hello"]}),
    "added tokens": (
        *(WHOLE, CONFIG, {"added_tokens_decoder": ADDED}),
        {"added_tokens_decoder": ADDED | {"257": TOKEN | {"content": "hello"}}},
    ),
    "a class": (WHOLE, CONFIG, {"tokenizer_class": "GPT2Tokenizer"}, {"tokenizer_class": "Qwen2Tokenizer"}),
    "a class of processors": (WHOLE, CONFIG, *({"processor_class": f"{x}Processor"} for x in ("CLIP", "OwlViT"))),
    "spaces": (WHOLE, CONFIG, *({"clean_up_tokenization_spaces": value} for value in (True, False))),
    "inputs": (WHOLE, CONFIG, {}, {"model_input_names": ["input_ids"]}),
    "a token of the map": (WHOLE, MAP, {"eos_token": "<|endoftext|>"}, {"eos_token": "!"}),
    "a map": (WHOLE, MAP, None, {"eos_token": "!"}),
    "a damaged map": (WHOLE, MAP, {}, "Fine-tuned"),
    "an added token": (WHOLE, "added_tokens.json", {}, {"hello": 257}),
    "ids of names like settings": (
        *(GPT2 | {CONFIG: {}}, "vocab.json", VOCABULARY | {"_a": 257, "_b": 258}, VOCABULARY | {"_a": 258, "_b": 257}),
    ),
    "no regular expression": (
        *({CONFIG: {"tokenizer_class": "PreTrainedTokenizerFast"}}, "tokenizer.json"),
        *(with_part("pre_tokenizer", use_regex=value) for value in (None, False)),
    ),
    "rescaled": (VIT, IMAGES, {"image_processor_type": "ViTImageProcessor"}, {"do_rescale": False}),
    "normalized": (
        VIT,
        IMAGES,
        *({"feature_extractor_type": "ViTFeatureExtractor"} | x for x in ({}, {"do_normalize": False})),
    ),
    "a class of images": (VIT, IMAGES, *({"image_processor_type": f"{x}ImageProcessor"} for x in ("ViT", "CLIP"))),
    "sounds": (
        *(WAV, IMAGES),
        *({"feature_extractor_type": "Wav2Vec2FeatureExtractor"} | x for x in ({}, {"do_normalize": False})),
    ),
    **{
        f"{setting} of sounds": (
            *({"config.json": {"model_type": "clap"}}, IMAGES),
            *({"feature_extractor_type": "ClapFeatureExtractor", setting: value} for value in values),
        )
        for setting, values in {"padding": ("repeat", "pad"), "truncation": ("rand_trunc", "fusion")}.items()
    },
    **{
        f"{what} of a token in {file}": (
            *(GPT2, file, {"eos_token": "<|endoftext|>"}),
            {"eos_token": TOKEN | {what: True, "__type": "AddedToken"}},
        )
        for what in ("lstrip", "single_word")
        for file in (CONFIG, MAP)
    },
    "a longest text": (WHOLE, CONFIG, {"model_max_length": 512}, {"model_max_length": 8192}),
    "spellings": (WHOLE, "normalizer.json", {"version": "a"}, {"version": "b"}),
    "entities": (WHOLE, "entity_vocab.json", {"a": 0, "b": 1}, {"a": 1, "b": 0}),
    "images and sounds": (
        VIT,
        IMAGES,
        *({"image_processor_type": "ViTImageProcessor"} | x for x in ({}, {"hop": [1]})),
    ),
    "inside a processor": (
        *(VIT, "processor_config.json"),
        *({"image_processor": x} for x in ({"do_rescale": True}, {"do_rescale": False})),
    ),
    "a prompt": (
        BERT,
        POOLING,
        {"pooling_mode_cls_token": True},
        {"pooling_mode_cls_token": True, "include_prompt": False},
    ),
    "mean": (
        BERT,
        POOLING,
        {"pooling_mode_cls_token": True},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
    ),
    "case of sentences": (BERT, "sentence_bert_config.json", {}, {"do_lower_case": True}),
    "the end of a template": (WHOLE, "chat_template.jinja", "Answer:", "Answer:\n\n"),
    "the start of a template": (WHOLE, "chat_template.jinja", "Answer:", " Answer:\n"),
    "prompts": (BERT, "config_sentence_transformers.json", {"prompts": {"query": ""}}, {"prompts": {"query": "q"}}),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_a_setting_with_another_effect_is_noticed_in_both_directions(case, tmp_path):
    files, name, *values = UNLIKE[case]
    sides = [files | ({} if value is None else {name: value}) for value in values]
    assert lost(tmp_path / "there", *sides) == [name]
    if None not in values and "Fine-tuned" not in values:
        assert lost(tmp_path / "back", *sides[::-1]) == [name]


OLD_IMAGES = {"do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 224}
NEW_IMAGES = OLD_IMAGES | {
    **{"do_rescale": True, "rescale_factor": 1 / 255, "resample": 2, "size": {"height": 224, "width": 224}},
    **{"image_processor_type": "ViTImageProcessorFast", "do_convert_rgb": None, "processor_class": "P"},
}
SAVED_BERT = {
    **{f"{name.lower()}_token": f"[{name}]" for name in ("UNK", "CLS", "SEP", "MASK", "PAD")},
    **{"do_lower_case": True, "do_basic_tokenize": True, "never_split": None, "strip_accents": None},
    **{"tokenize_chinese_chars": True, "tokenizer_class": "BertTokenizer", "model_max_length": 512},
    **{"clean_up_tokenization_spaces": True, "extra_special_tokens": {}, "added_tokens_decoder": {}},
    **{"padding_side": "right", "name_or_path": "/tmp/a", "special_tokens_map_file": "/tmp/b"},
}
TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
SAVED = TOKENS | {
    **{"add_prefix_space": False, "added_tokens_decoder": ADDED, "clean_up_tokenization_spaces": False},
    **{
        "model_max_length": 1024,
        "tokenizer_class": "GPT2Tokenizer",
        "extra_special_tokens": {},
        "pad_token": "<|endoftext|>",
    },
}
OLD_SOUNDS = {"do_normalize": True, "feature_size": 1, "padding_value": 0.0, "return_attention_mask": False}
OLD_POOLING = {"word_embedding_dimension": 4, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
CLIP_IMAGES = {
    **{"image_processor_type": "CLIPImageProcessor", "do_center_crop": False, "size": {"shortest_edge": 16}},
    **{"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3},
}
CLIP = {"config.json": {"model_type": "clip"}}
WHISPER = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80, "chunk_length": 30}
PACKAGE, TYPES = "sentence_transformers", ("models.Transformer", "models.Pooling")
NEW_TYPES = ("base.modules.transformer.Transformer", "sentence_transformer.modules.pooling.Pooling")
TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
OLD_SENTENCES = BERT | {
    "modules.json": [{"idx": i, "type": f"{PACKAGE}.{name}"} for i, name in enumerate(TYPES)],
    **{CONFIG: {"model_max_length": 256}, POOLING: OLD_POOLING, "sentence_bert_config.json": {"max_seq_length": 256}},
}
NEW_SENTENCES = OLD_SENTENCES | {
    "modules.json": [{"idx": i, "type": f"{PACKAGE}.{name}"} for i, name in enumerate(NEW_TYPES)],
    POOLING: {"embedding_dimension": 4, "pooling_mode": "mean", "include_prompt": True},
    "sentence_bert_config.json": {
        **{"transformer_task": "feature-extraction", "modality_config": TEXT, "module_output_name": "token_embeddings"}
    },
}
ALIKE: dict[str, tuple[dict, dict]] = {
    "tokens with their properties": (
        WHOLE | {CONFIG: SAVED, MAP: TOKENS},
        WHOLE | {CONFIG: SAVED | {"eos_token": TOKEN | {"__type": "AddedToken"}}, MAP: {"eos_token": TOKEN}},
    ),
    "saved by another version": (WHOLE | {CONFIG: {"model_max_length": 1024}}, WHOLE | {CONFIG: SAVED, MAP: TOKENS}),
    "a longest text of the tokenizer": (
        OLD_SENTENCES,
        OLD_SENTENCES | {"sentence_bert_config.json": {"max_seq_length": None}},
    ),
    "no longest text": (WHOLE | {CONFIG: {"model_max_length": 512}}, WHOLE | {CONFIG: {"model_max_length": 10**30}}),
    "BERT": (BERT | {CONFIG: {"do_lower_case": True}}, BERT | {CONFIG: SAVED_BERT}),
    "the class of a later version": (
        WHOLE | {CONFIG: TOKENS | {"tokenizer_class": "PreTrainedTokenizerFast"}},
        WHOLE | {CONFIG: TOKENS | {"tokenizer_class": "TokenizersBackend", "is_local": True, "backend": "tokenizers"}},
    ),
    "added tokens of tokenizer.json": (WHOLE, WHOLE | {"added_tokens.json": {"<|endoftext|>": 256}}),
    "defaults of tokenizer.json": (*(GPT2 | {"tokenizer.json": with_part("pre_tokenizer", use_regex=None)}, WHOLE),),
    "pairs": (
        GPT2 | {"tokenizer.json": with_part("model", merges=["! !"], vocab=VOCABULARY | {"!!": 257})},
        GPT2 | {"tokenizer.json": with_part("model", merges=[["!", "!"]], vocab=VOCABULARY | {"!!": 257})},
    ),
    "images": (
        VIT | {IMAGES: OLD_IMAGES | {"feature_extractor_type": "ViTFeatureExtractor"}},
        VIT | {IMAGES: NEW_IMAGES},
    ),
    "images without a class": (VIT | {IMAGES: OLD_IMAGES}, VIT | {IMAGES: NEW_IMAGES}),
    "sounds": (
        WAV | {IMAGES: OLD_SOUNDS},
        WAV | {IMAGES: OLD_SOUNDS | {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "processor_class": "P"}},
    ),
    "pooling": (
        BERT | {POOLING: OLD_POOLING},
        BERT | {POOLING: OLD_POOLING | {"pooling_mode_lasttoken": False, "include_prompt": True}},
    ),
    "sentences": (
        BERT | {"config_sentence_transformers.json": {"__version__": {"pytorch": "1"}}},
        BERT
        | {
            "config_sentence_transformers.json": {
                **{"__version__": {"pytorch": "2"}, "prompts": {"query": "", "document": ""}},
                **{"default_prompt_name": None, "similarity_fn_name": "cosine", "model_type": "SentenceTransformer"},
            }
        },
    ),
    "a template by name in another file": (
        WHOLE | {CONFIG: named(default="a", tool_use="b\n")},
        WHOLE | {"chat_template.jinja": "a\n", "additional_chat_templates/tool_use.jinja": "b"},
    ),
    "a processor in one file": (
        CLIP | {IMAGES: CLIP_IMAGES | {"size": 16, "feature_extractor_type": "CLIPFeatureExtractor"}},
        CLIP | {PROCESSOR: {"image_processor": CLIP_IMAGES, "processor_class": "CLIPProcessor"}},
    ),
    "sounds of a processor": (
        {"config.json": {"model_type": "whisper"}, IMAGES: WHISPER | {"return_attention_mask": False}},
        {"config.json": {"model_type": "whisper"}, PROCESSOR: {"feature_extractor": WHISPER}},
    ),
    "a processor of two files": (
        CLIP | {IMAGES: CLIP_IMAGES, PROCESSOR: {"image_token": "<image>"}},
        CLIP | {PROCESSOR: {"image_processor": CLIP_IMAGES, "image_token": "<image>"}},
    ),
    "pixels as a size": (
        QWEN | {IMAGES: {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12845056}},
        QWEN,
    ),
    "sentence-transformers 5.4": (OLD_SENTENCES, NEW_SENTENCES),
    "line ends of a template": (
        *(WHOLE | {CONFIG: {"chat_template": "a\r\nb\r\n"}}, WHOLE | {"chat_template.jinja": "a\nb"}),
    ),
}


SAVED_AGAIN = {
    **{"words": BERT | {CONFIG: {"do_lower_case": False}}, "words, saved": BERT | {CONFIG: SAVED_BERT}},
    **{"bytes": WHOLE | {CONFIG: {"model_max_length": 1024}}, "bytes, saved": WHOLE | {CONFIG: SAVED, MAP: TOKENS}},
    "bytes in parts": GPT2 | {CONFIG: {"model_max_length": 1024}},
    "chat": WHOLE
    | {
        "config.json": {"model_type": "qwen2"},
        CONFIG: SAVED
        | {"chat_template": "abc", "additional_special_tokens": ["<|endoftext|>"], "add_bos_token": False},
    },
}


@pytest.mark.parametrize("case", SAVED_AGAIN)
def test_a_tokenizer_that_the_installed_version_saves_again_is_not_listed(case, tmp_path):
    base = SAVED_AGAIN[case]
    lost(tmp_path, base, {"config.json": base["config.json"]})
    transformers.AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "expert")
    assert lost_files(tmp_path / "base", [tmp_path / "expert"], files_beside(tmp_path / "base")) == []


@pytest.mark.parametrize("case", ALIKE)
def test_what_another_version_stores_with_the_same_effect_is_not_listed(case, tmp_path):
    base, expert = ALIKE[case]
    assert lost(tmp_path / "there", base, expert) == []
    assert lost(tmp_path / "back", expert, base) == []


IDS = {"config.json": {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}}
DERIVED = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "use_cache": True}
INNER = [IDS | {GENERATION: DERIVED}, {"config.json": IDS["config.json"] | {"eos_token_id": [3]}, GENERATION: DERIVED}]
MOVED: dict[str, tuple[dict, dict, list[str]]] = {
    # what: two checkpoints, and the files of the second that are noticed
    "a setting": (
        CLIP | {IMAGES: CLIP_IMAGES},
        CLIP | {PROCESSOR: {"image_processor": CLIP_IMAGES | {"resample": 2}}},
        [PROCESSOR],
    ),
    "no setting": (
        CLIP | {IMAGES: CLIP_IMAGES | {"do_resize": False}},
        CLIP | {PROCESSOR: {"image_processor": {}}},
        [PROCESSOR],
    ),
    "back": (
        CLIP | {PROCESSOR: {"image_processor": CLIP_IMAGES}},
        CLIP | {IMAGES: CLIP_IMAGES | {"resample": 2}},
        [IMAGES],
    ),
    "of the processor": (
        *(
            CLIP | {IMAGES: CLIP_IMAGES},
            CLIP | {PROCESSOR: {"image_processor": CLIP_IMAGES, "patch_size": 2}},
            [PROCESSOR],
        ),
    ),
    "an unknown part": (CLIP | {IMAGES: CLIP_IMAGES}, CLIP | {PROCESSOR: {"own_processor": CLIP_IMAGES}}, [PROCESSOR]),
    "inside one that is in two files": (
        CLIP | {IMAGES: CLIP_IMAGES | {"do_resize": False}, PROCESSOR: {"image_token": "<image>"}},
        *(CLIP | {PROCESSOR: {"image_processor": {}, "image_token": "<image>"}}, [PROCESSOR]),
    ),
    "what cannot be loaded": (
        {IMAGES: {"size": 2}, "config.json": {}},
        *({IMAGES: {"size": 2, "feature_extractor_type": "Own"}, "config.json": {}}, [IMAGES]),
    ),
    "sizes of videos": (  # not loaded without torchvision
        QWEN | {VIDEOS: QWEN_VIDEOS},
        *(QWEN | {VIDEOS: QWEN_VIDEOS | {"size": {"shortest_edge": 128, "longest_edge": 4096}}}, [VIDEOS]),
    ),
    "a setting of videos": (
        QWEN | {VIDEOS: QWEN_VIDEOS},
        *(QWEN | {VIDEOS: QWEN_VIDEOS | {"do_resize": False}}, [VIDEOS]),
    ),
    "derived generation": (IDS, IDS | {GENERATION: DERIVED}, []),
    "other ids": (IDS, IDS | {GENERATION: DERIVED | {"eos_token_id": [2, 3]}}, [GENERATION]),
    "one id in a list": (IDS | {GENERATION: DERIVED}, IDS | {GENERATION: DERIVED | {"eos_token_id": [2]}}, []),
    "fewer ids": (IDS, IDS | {GENERATION: {"_from_model_config": True}}, [GENERATION]),
    "another base": (
        IDS | {"config.json": {"model_type": "llama"}},
        IDS | {GENERATION: DERIVED | {"eos_token_id": 5}},
        [GENERATION],
    ),
    "of an unknown model": ({"config.json": {}}, {"config.json": {}, GENERATION: DERIVED}, [GENERATION]),
    "a config of a module": (
        *(IDS | {f"0_Transformer/{name}": content for name, content in files.items()} for files in INNER),
        ["0_Transformer/config.json"],
    ),
    "pooling": (OLD_SENTENCES, NEW_SENTENCES | {POOLING: {"embedding_dimension": 4, "pooling_mode": "cls"}}, [POOLING]),
    "two poolings": (
        OLD_SENTENCES | {POOLING: OLD_POOLING | {"pooling_mode_cls_token": True}},
        *(NEW_SENTENCES | {POOLING: {"embedding_dimension": 4, "pooling_mode": ["mean", "cls"]}}, [POOLING]),
    ),
    "a module": (
        OLD_SENTENCES,
        OLD_SENTENCES | {"modules.json": [{"idx": 0, "type": "own.models.Transformer"}]},
        ["modules.json"],
    ),
    "a length": (
        OLD_SENTENCES,
        *(NEW_SENTENCES | {CONFIG: {"model_max_length": 128}}, ["sentence_bert_config.json", CONFIG]),
    ),
}


@pytest.mark.parametrize("case", MOVED)
def test_settings_in_another_file_or_by_another_name_are_compared(case, tmp_path):
    base, expert, expected = MOVED[case]
    assert lost(tmp_path, base, expert) == expected


def test_equal_files_of_experts_are_parsed_and_loaded_once(tmp_path, monkeypatch):
    base = GPT2 | {"tokenizer.json": with_part("pre_tokenizer", use_regex=None), CONFIG: {"model_max_length": 77}}
    lost(tmp_path, base, WHOLE | {CONFIG: SAVED | {"model_max_length": 77}})
    experts = [tmp_path / "expert", *(tmp_path / f"expert{i}" for i in range(3))]
    for folder in experts[1:]:
        shutil.copytree(experts[0], folder)
    load, loaded = transformers.AutoTokenizer.from_pretrained, []
    comparison._parsed.cache_clear()
    comparison._tokenizer.cache_clear()
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: loaded.append(a) or load(*a, **k)
    )
    assert lost_files(tmp_path / "base", experts, files_beside(tmp_path / "base")) == []
    assert len(loaded) == 2
    assert comparison._parsed.cache_info().misses == 2  # tokenizer_config.json; tokenizer.json is not even parsed


def test_templates_of_other_names_are_compared(tmp_path):
    base = WHOLE | {CONFIG: named(default="a", tool_use="b")}
    assert lost(tmp_path, base, WHOLE | {CONFIG: named(default="a", tool_use="c", rag="d")}) == [
        "additional_chat_templates/rag.jinja",
        "additional_chat_templates/tool_use.jinja",
    ]


@pytest.mark.parametrize("file", [CONFIG, "chat_template.json"])
def test_a_template_whose_name_is_not_a_text_is_listed(file, tmp_path):
    damaged = WHOLE | {file: {"chat_template": [{"name": ["a"], "template": "x"}]}}
    assert lost(tmp_path / "there", WHOLE, damaged) == ["additional_chat_templates/['a'].jinja"]
    assert lost(tmp_path / "back", damaged, WHOLE) == []


def test_what_cannot_be_loaded_is_listed_unless_its_text_is_equal(tmp_path, monkeypatch):
    """Without transformers, and for a tokenizer that has code of its own, which is not executed."""
    code = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    sides = [WHOLE | {CONFIG: code | more, "own.py": "raise SystemExit"} for more in ({}, {"legacy": None}, {"x": [1]})]
    sides[1][CONFIG]["auto_map"] = {"AutoTokenizer": ["someone/a-model--own.Own", None]}
    assert lost(tmp_path / "equal", *sides[:2]) == []
    assert lost(tmp_path / "code", sides[0], sides[2]) == [CONFIG]
    base, expert = (side | {"vocab.txt": f"{WORDS}\nalone"} for side in ALIKE["BERT"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert lost(tmp_path / "without", base, expert) == [CONFIG]
    assert lost(tmp_path / "same", base, base | {CONFIG: {"do_lower_case": True, "padding": False}}) == []
