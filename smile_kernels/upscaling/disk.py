"""Fuses checkpoints on disk into a SMILE checkpoint, with a few layers in memory at a time.

Intermediate files are kept in `<out>.partial`: the settings, one file for each finished layer, and the output. An
interrupted run continues from there; `publishing` creates the output folder atomically. Under torchrun the processes
share the layers. Each layer is computed by one thread, so the bits do not depend on the number of workers.
"""

import errno
import functools
import itertools
import json
import math
import os
import reprlib
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from glob import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..checkpoint import REPORT, add_calibration, model_card, transformers_class, turn_ids_of_checkpoint
from ..config import SmileConfig, SmileModuleConfig, check_expert_names, config_of_checkpoint, read_config, write_config
from ..errors import SmileError, reason
from ..integrations.conversion import ModelNames
from ..integrations.peft import is_adapter
from ..publishing import MANIFEST, OutputFolder, check_folder, new_file, output_folder, write_text
from ..routing import RoutingPolicy, check_calibration, check_order, check_routing
from ..schema import check_arguments, parse
from ..storage import (
    StoredTensor,
    check_sizes,
    parse_size,
    plan_shards,
    read_json,
    read_safetensors,
    write_index,
    write_shard,
)
from ..svd import without_autocast
from .comparison import TOKENIZER
from .decompose import check_router, decompose, in_threads
from .files import check_tokenizer, files_beside, listing, lost_files
from .layers import (
    Layer,
    check_layers,
    embedding_weights,
    fused_experts,
    layers_of_checkpoint,
    model_of_checkpoint,
    select_layers,
)
from .quantized import check_experts, metadata_of, open_base, quantization_of
from .remainder import (
    average,
    check_changed,
    check_fit,
    layers_to_take,
    lost_changes,
    lost_settings,
    reasons_left_alone,
    tied_to,
    unfit_layers,
)
from .report import LayerReport, LostChange, UpscaleReport
from .sources import (
    AdapterSource,
    CheckpointSource,
    ExpertSource,
    StoredTensors,
    check_request,
    local_folder,
    open_source,
)
from .vocabulary import AddedTokens, find_added_tokens, grow_source, which_expert, with_tokens

__all__ = ["upscale_checkpoints"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_JOIN_WITHIN = timedelta(minutes=10)  # all processes of torchrun; one alone would wait for ever


class Job:
    """An upscaling job with checked inputs: the constructor reads only headers and writes nothing."""

    def __init__(
        self,
        base: str | Path,
        experts: Sequence[str | Path],
        config: SmileConfig,
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
        remaining: str,
        dtype: torch.dtype | None,
        device: str,
        strict: bool,
        embeddings_from: int | str | None,
        router: str = "smile",
    ):
        self.router = router
        self.base, self.experts = Path(base), [Path(folder) for folder in experts]
        self.before = [listing(folder) for folder in (self.base, *self.experts)]
        self.config, self.remaining, self.dtype, self.device = config, remaining, dtype, device
        base_config = read_config(base)
        for i, folder in enumerate(experts):
            if (first := self.experts.index(Path(folder))) != i:
                warnings.warn(f"experts[{i}]: {folder} is experts[{first}], too: two experts are equal", stacklevel=2)
            if not base_config and read_config(folder):
                raise SmileError(f"base: {base} has no config.json, and experts[{i}] has; expected the base's")
            theirs, ours = (config.get("model_type") for config in (read_config(folder), base_config))
            if theirs and ours and theirs != ours:
                raise SmileError(f"experts[{i}]: {folder} is a {theirs}; expected a {ours} as the base")
        if is_adapter(base):
            raise SmileError(
                f"base: {base} has adapter_config.json, an adapter that transformers would add to the weights; "
                "expected a model alone, and the adapter in a folder of its own"
            )
        if base_config.get("distributed_config") is not None:
            raise SmileError(
                f"base: {base}: config.json has distributed_config, by which transformers would split the result's "
                "layers, and refuses it; expected none"
            )
        quantization = quantization_of(self.base)
        self.config = replace(config, base=quantization)
        asked = {"remaining": remaining, "dtype": dtype, "embeddings_from": embeddings_from}
        if quantization is not None:
            _check_base_kept("the base is stored quantised", asked)
        self.experts_only = config.base_model_name_or_path is not None
        if self.experts_only:
            _check_base_kept("experts_only stores no tensor of the base", asked | {"dtype": None})
        names = ModelNames(model_of_checkpoint(self.base))
        self.model = names.model
        _check_generation_config(self.base, self.model)
        self.stored, self.packed = open_base(self.base, names)
        self.metadata = metadata_of(one for tensors in self.packed.values() for one in tensors)
        self.beside = files_beside(self.base, {Path(tensor.file) for _, tensor in self._stored()})
        self.by_name, self.origins = names.map(self.stored)
        names.check_complete(self.base, self.by_name)
        self.tensors = StoredTensors(self.by_name)
        self.every = layers_of_checkpoint(self.base, self.by_name, self.origins, names)
        self.chosen = select_layers(self.every, include, exclude)
        self.layers = [layer for layer in self.chosen.values() if not layer.unfit]
        self.unfit = [layer for layer in self.chosen.values() if layer.unfit]
        self.embeddings = set() if names.model is None else embedding_weights(names.model)
        self.fused = [] if names.model is None else fused_experts(names.model)
        before = StoredTensors(dict(self.by_name))  # without added tokens
        self.sources: list[ExpertSource] = [
            open_source(f"experts[{i}]", folder, before, self.every, names) for i, folder in enumerate(experts)
        ]
        for source in self.sources if self.packed else ():
            check_experts(source, self.packed)
        self.lost_settings = lost_settings(config_of_checkpoint(self.base, names.model), self.sources)
        self.embeddings_from = embeddings_from
        self.added = None if embeddings_from is None else self._added_tokens(embeddings_from, names.model)
        if self.added is not None:
            check_tokenizer("embeddings_from", self.base, self.experts[self.donor])
        self.lost_files = lost_files(self.base, self.experts, self.beside)
        mean = remaining == "average"
        for source in self.sources:
            if isinstance(source, AdapterSource):
                source.check(self.by_name, average=mean)
            elif isinstance(source, CheckpointSource):
                source.check(self.by_name, self.chosen.values(), average=mean, cast=dtype is not None)
        check_layers(self.layers, self.by_name, config.rank_of_expert, config.rank_of_router)
        check_fit("base", self.unfit, self.tensors, self.sources, strict=strict)

    def _added_tokens(self, expert: int | str, model: nn.Module | None) -> AddedTokens:
        """Add one expert's additional tokens to the base and all experts."""
        self.donor = which_expert(expert, self.config.expert_names or ())
        added = find_added_tokens(model, self.by_name, self.sources[self.donor])
        theirs = files_beside(self.experts[self.donor], kind=TOKENIZER)
        is_whole = any(file.name in ("tokenizer.json", "tokenizer_config.json") for file in theirs)
        replaced = {
            file
            for file, place in self.beside.items()
            if place in theirs.values() or (is_whole and TOKENIZER.fullmatch(place.parts[0]))
        }
        self.beside = {file: place for file, place in self.beside.items() if file not in replaced} | theirs
        own = [name for name in added.dims if name in self.origins]
        if split := next((name for name in own if self._split(name)), None):
            raise SmileError(
                f"embeddings_from: {self.base} stores {split} inside another tensor; expected a separate tensor"
            )
        added.grow(self.by_name)
        for name in own:
            key = self.origins[name][0]
            self.stored[key] = replace(self.by_name[name], name=key)
        self.sources = [grow_source(source, added, self.tensors, self.every) for source in self.sources]
        return added

    @functools.cached_property
    def taken(self) -> list[Layer]:
        """The layers that get the weight of the only expert: none where the base's own tensors are not stored."""
        if self.experts_only:
            return []
        plain = [layer for layer in self.unfit if f"{layer.stored}.weight" not in self.packed]
        return layers_to_take(plain, self.tensors, self.by_name, self.sources)

    def _stored(self) -> Iterator[tuple[str, StoredTensor]]:
        """The base's stored tensors, with their names or the name of the weight they contain."""
        for key, tensor in self.stored.items():
            for one in self.packed.get(key, [tensor]):
                yield key, one

    def settings(self) -> dict[str, Any]:
        """What determines the result; a run continues only if it is equal. Files are compared by size and time.

        Raises:
            SmileError: an input has changed since the job began.
        """
        folders = [self.base, *self.experts]
        files = [listing(folder, self.beside) for folder in folders]
        _check_unchanged(self.before, [listing(folder) for folder in folders])
        return {
            "version": __version__,
            "base": str(folders[0].resolve()),
            "experts": [str(folder.resolve()) for folder in folders[1:]],
            **{key: value for key, value in self.config.to_dict().items() if key != "modules"},
            "layers": [layer.name for layer in self.layers],
            "router": self.router,
            "remaining": self.remaining,
            "embeddings_from": self.embeddings_from,
            "dtype": str(self.dtype),
            "device": self.device,
            "files": files,
        }

    def writes(self) -> list[str]:
        """Patterns of the files that the job writes in the work folder."""
        names = ["config.json", "README.md", REPORT, MANIFEST, "router_prior.safetensors"]
        for stem in ("model.safetensors", "experts.safetensors"):
            names += [stem, f"{stem}.index.json", stem.replace(".", "-[0-9]*-of-[0-9]*.")]
        names += [escape(str(place)) for place in self.beside.values()]
        return ["layers/[0-9]*.json", "layers/[0-9]*.safetensors", *(f"output/{name}" for name in names)]

    def check_routing(self, routing: RoutingPolicy | None, calibrates: bool) -> None:
        """Raise ValueError, before any work, if the result could not be calibrated, or not run under the policy."""
        if calibrates:
            transformers_class(read_config(self.base))
        if calibrates and self.model is not None:
            check_calibration(self.model)
        if routing is not None and self.model is not None:
            check_order(self.model, routing, [layer.name for layer in self.layers])

    def check_finite(self, part: slice, progress: Callable[[str, int, int], None]) -> None:
        """Read all inputs of the output and the report, to find NaN, and numbers beyond its dtype, before the work."""
        wholes = (source.by_name for source in self.sources if isinstance(source, CheckpointSource))
        average = self.remaining == "average"
        tensors = [tensor for _, tensor in self._stored()]
        written = {id(tensor) for tensor in tensors}
        tensors += [t for whole in wholes for name, t in whole.items() if name in self.by_name]
        huge = False
        for i, tensor in enumerate(tensors[part]):
            (value, peak), dtype = tensor.load_with_peak(), self._dtype(tensor.dtype)
            if (average or id(tensor) in written) and dtype != tensor.dtype and not value.to(dtype).isfinite().all():
                raise SmileError(
                    f"{tensor.file}: tensor {tensor.name!r} has {peak:g}; expected at most "
                    f"{torch.finfo(dtype).max:g}, the largest number of {dtype}"
                )
            if dtype.is_floating_point:  # twice, for the difference of two such numbers
                huge |= 2 * peak > torch.finfo(dtype).max
                huge |= 2 * peak * math.sqrt(value.numel()) > torch.finfo(torch.float32).max
            progress("checks", min((i + 1) * (part.step or 1), len(tensors)), len(tensors))
        for layer in self.layers if huge else ():
            self._check_change(layer)

    def _check_change(self, layer: Layer) -> None:
        """Raise ValueError if the change of a layer is beyond the dtype of its singular values or its biases."""
        weight, bias = self.tensors[layer.weight], self.tensors.get(layer.bias)
        for source in self.sources:
            tuned, own = source.weight(layer), source.bias(layer)
            sizes: dict[str, tuple[float, torch.dtype]] = {}
            if isinstance(tuned, Tensor):
                dtype = self._dtype(torch.promote_types(tuned.dtype, weight.dtype))
                norm = torch.linalg.vector_norm(tuned.double() - weight.double()).item()
                sizes[layer.name] = norm, torch.promote_types(dtype, torch.float32)
            if bias is not None and own is not None:
                peak = (own.double() - bias.double()).abs().max().item()
                sizes[layer.bias] = peak, self._dtype(weight.dtype)
            for name, (size, dtype) in sizes.items():
                if size > torch.finfo(dtype).max:
                    raise SmileError(f"{source.where}: the change of {name} is {size:.1e}; expected what {dtype} holds")

    def bytes_to_write(self, experts_only: bool) -> int:
        """A lower bound of the required disk space: factors as intermediate files and in the output, and the base."""
        factors = 0
        if isinstance(self.config.rank_of_expert, int) and self.config.rank_of_expert > 0:
            r, k = self.config.rank_of_expert, max(self.config.rank_of_expert, self.config.rank_of_router)
            for layer in self.layers:
                weight = self.by_name[layer.weight]
                o, d = weight.shape[::-1] if layer.fan_in_fan_out else weight.shape
                factors += len(self.experts) * (o * r + k * d) * (self.dtype or weight.dtype).itemsize
        base = sum(math.prod(t.shape) * self._dtype(t.dtype).itemsize for _, t in self._stored())
        beside = sum(file.stat().st_size for file in self.beside)
        return 2 * factors + beside + (0 if experts_only else base)

    @torch.no_grad()
    def upscale_layer(self, folder: Path, index: int) -> None:
        """Write the factors of a layer to `<index>.safetensors`, unless it is skipped, and then `<index>.json`."""
        layer = self.layers[index]
        whole = (source.by_name for source in self.sources if isinstance(source, CheckpointSource))
        dtypes = (tensors[layer.weight].dtype for tensors in (self.by_name, *whole))
        common = functools.reduce(torch.promote_types, dtypes)
        dtype = self._dtype(common)
        factors, report = decompose(
            layer,
            self.tensors,
            self.sources,
            rank_of_expert=self.config.rank_of_expert,
            rank_of_router=self.config.rank_of_router,
            router=self.router,
            device=self.device,
            dtype=torch.promote_types(common, dtype),
        )
        if not report.skipped:
            s_dtype = torch.promote_types(dtype, torch.float32)
            tensors = [
                StoredTensor.of(f"{layer.stored}.{name}", factor.to("cpu", s_dtype if name == "s" else dtype))
                for name, factor in factors.items()
                if factor is not None
            ]
            write_shard(folder / f"{index}.safetensors", tensors)
        write_text(folder / f"{index}.json", json.dumps(asdict(report)) + "\n")

    def has_layer(self, folder: Path, index: int) -> bool:
        """Whether the files of a layer are there, whole, from an interrupted run."""
        layer, file = self.layers[index], folder / f"{index}.json"
        try:
            report = parse(LayerReport, read_json(file), str(file))
            factors = [] if report.skipped else read_safetensors(file.with_suffix(".safetensors"))
            for factor in factors:
                factor.load_with_peak()  # which raises for NaN
        except (SmileError, OSError):
            return False
        return report.name == layer.name and (report.skipped is not None or self._fit(layer, report.rank, factors))

    def _fit(self, layer: Layer, r: int, factors: Sequence[StoredTensor]) -> bool:
        """Whether these are all factors of a layer, of rank r and of the shapes that this job computes."""
        shape = self.by_name[layer.weight].shape
        o, d = shape[::-1] if layer.fan_in_fan_out else shape
        n, g, wanted = len(self.experts), self.config.rank_of_router, self.config.rank_of_expert
        found = {factor.name: factor.shape for factor in factors}
        expected = {"vh": (n, max(r, g), d), "s": (n, r), "u": (n, o, r)}
        if f"{layer.stored}.expert_bias" in found:  # none if no expert changes the bias
            expected["expert_bias"] = (n, o)
        if self.router == "norm":
            expected["router"] = (n, r, d)
        asked = r if isinstance(wanted, float) or wanted == -1 else wanted
        return r == asked and found == {f"{layer.stored}.{name}": shape for name, shape in expected.items()}

    def output_tensors(self, factors: Mapping[str, list[StoredTensor]], experts_only: bool) -> Iterator[StoredTensor]:
        """The tensors of the result: the base's in order, then the factors of each upscaled layer.

        A tensor that contains more than the weight of an upscaled layer is stored in parts, by the model's names.
        """
        upscaled = [layer for layer in self.layers if layer.name in factors]
        changed = self.changed(upscaled)
        whole = {keys[0]: name for name, keys in self.origins.items() if len(keys) == 1}
        split = {key for layer in upscaled for key in self._split(layer.weight)}
        split |= {key for name in changed for key in self._split(name)}
        for key, tensor in () if experts_only else self._stored():
            if key not in split:
                yield self._written(tensor, changed.get(whole.get(key, "")))
        for name, keys in () if experts_only else self.origins.items():
            if split.intersection(keys):
                yield self._written(self.by_name[name], changed.get(name))
        written = {layer.weight for layer in self.taken} | {layer.weight for layer in upscaled}
        for layer in self.taken:
            new = self.sources[0].bias(layer)
            if new is not None and layer.bias not in self.by_name and layer.weight in written:
                yield self._written(StoredTensor.of(f"{layer.stored}.bias", new), None)
        for layer in upscaled:
            yield from factors[layer.name]

    def changed(self, upscaled: Sequence[Layer]) -> dict[str, Callable[[], Tensor]]:
        """Replacements of the base's tensors, by the model's names: averages and weights of the only expert."""
        held = {id(self.by_name[name]) for name in self.held(upscaled) if name in self.by_name}
        changed: dict[str, Callable[[], Tensor]] = {}
        for name, tensor in self.by_name.items() if self.remaining == "average" else ():
            if name in self.origins and id(tensor) not in held and tensor.dtype.is_floating_point:
                changed[name] = functools.partial(average, name, self.tensors, self.sources)
        for layer in self.taken:
            for name in (layer.weight, layer.bias):
                ties = [other for other in self.origins if self.by_name[other] is self.by_name.get(name)]
                for other in ties:
                    changed[other] = functools.partial(self._of_only_expert, name)
        return changed

    def held(self, upscaled: Sequence[Layer]) -> set[str]:
        """The tensors with changes that are in the result."""
        return {name for layer in (*upscaled, *self.taken) for name in (layer.weight, layer.bias)}

    def _of_only_expert(self, name: str) -> Tensor:
        tensor = self.sources[0].tensor(name)
        return torch.zeros_like(self.tensors[name]) if tensor is None else tensor  # a bias that the expert lacks

    def _split(self, name: str) -> tuple[str, ...]:
        """The checkpoint's tensors that contain a parameter, if it is not a separate tensor."""
        keys = self.origins.get(name, ())
        alone = len(keys) == 1 and self._uses[keys[0]] == 1
        return () if alone and self.stored[keys[0]].read is self.by_name[name].read else keys

    @functools.cached_property
    def _uses(self) -> Counter[str]:
        """The number of parameters that a checkpoint's tensor is, or begins."""
        return Counter(keys[0] for keys in self.origins.values())

    def _written(self, tensor: StoredTensor, changed: Callable[[], Tensor] | None) -> StoredTensor:
        read, dtype = changed or tensor.load, self._dtype(tensor.dtype)
        return replace(tensor, dtype=dtype, read=functools.partial(_read_as, read, dtype))

    def lost(self, reports: Sequence[LayerReport]) -> list[LostChange]:
        """Changes by fine-tuning that are not in the result."""
        done = {report.name for report in reports if not report.skipped}
        upscaled = [layer for layer in self.layers if layer.name in done]
        changed = self.changed(upscaled)

        def result(name: str) -> Tensor:
            return changed[name]() if name in changed else self.tensors[name]

        reasons = reasons_left_alone(self.every, self.chosen, reports)
        held = self.held(upscaled)
        embeddings = self.embeddings - tied_to({layer.weight for layer in self.taken}, self.by_name)
        return lost_changes(self.tensors, self.by_name, self.sources, result, held, reasons, embeddings)

    def _dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in the result of a tensor of this dtype."""
        return self.dtype if self.dtype is not None and dtype.is_floating_point else dtype

    def write_sidecars(self, folder: Path, factors: Mapping[str, list[StoredTensor]], report: UpscaleReport) -> None:
        """Write config.json, the model card, the report, and the base's other files."""
        modules = {}
        for layer in self.layers:
            shapes = {tensor.name: tensor.shape for tensor in factors.get(layer.name, ())}
            if shapes:
                router = shapes.get(f"{layer.stored}.router")
                modules[layer.stored] = SmileModuleConfig(
                    rank_of_expert=shapes[f"{layer.stored}.s"][1],
                    rank_of_router=self.config.rank_of_router if router is None else router[1],
                    expert_bias=f"{layer.stored}.expert_bias" in shapes,
                    router=router is not None,
                    fan_in_fan_out=layer.fan_in_fan_out,
                )
        g = max((module.rank_of_router for module in modules.values()), default=self.config.rank_of_router)
        config = replace(self.config, modules=modules, rank_of_router=g)
        for source, name in self.beside.items():
            if not source.is_file():  # a document; others are inputs, which are checked before the result is published
                warnings.warn(f"base: {source} is not copied: it is not a regular file any more", stacklevel=7)
                continue
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            with open(source, "rb") as old, new_file(folder / name) as new:
                shutil.copyfileobj(old, new)
        base_config = read_config(self.base)
        if self.added is not None:
            base_config = with_tokens(base_config, self.added)
        if self.dtype is not None and base_config:
            base_config["dtype"] = str(self.dtype).removeprefix("torch.")
            base_config.pop("torch_dtype", None)
        write_config(folder, base_config, config)
        base, *experts = (Path(os.path.abspath(one)).name for one in (self.base, *self.experts))
        write_text(folder / "README.md", model_card(config, base=base, experts=experts))
        (folder / REPORT).unlink(missing_ok=True)  # of an interrupted run, and perhaps damaged: not replaced
        report.save(folder / REPORT)


@check_arguments
@torch.no_grad()
@without_autocast
def upscale_checkpoints(
    base: str | Path,
    experts: Sequence[str | Path],
    out: str | Path,
    *,
    rank_of_expert: int | float,
    rank_of_router: int | None = None,
    router: str = "smile",
    num_experts_per_tok: int = 1,
    expert_names: Sequence[str | None] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    remaining: str = "base",
    embeddings_from: int | str | None = None,
    routing: RoutingPolicy | None = None,
    calibrate: bool = False,
    strict: bool = False,
    dtype: torch.dtype | None = None,
    experts_only: bool = False,
    max_shard_size: int | str = "5GB",
    device: str = "cpu",
    workers: int | None = None,
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> UpscaleReport:
    """Fuse a base checkpoint and its fine-tuned versions on disk into the folder `out`.

    Args:
        base: checkpoint of the pre-trained model: a folder or a Hub id, optionally with @revision. Its other files,
            such as tokenizers and code, are copied; a warning names those that are not.
            A quantised base (compressed-tensors, awq, gptq, fp8, torchao) supports LoRA adapters as experts; its
            tensors are copied unchanged.
        experts: checkpoints of the fine-tuned models, or PEFT adapters of the base; folders or Hub ids.
        out: output folder, new or empty.
        rank_of_expert, rank_of_router, router, num_experts_per_tok, include, exclude, strict: as in `upscale`.
        expert_names: N names of the experts (see `routing_override`). None, for all or for single names: the folder's
            name, with as much of its path as is needed to be unique.
        remaining: source of the other tensors: "base", or "average" for the mean of the experts.
        embeddings_from: the expert, by number or name, whose vocabulary has tokens beyond the
            base's; as in `upscale`. The tokenizer is that expert's.
        routing: the policy of the loaded model; by default the published routing, or with `calibrate`
            `RoutingPolicy.recommended`.
        calibrate: also run `smile_kernels.calibrate`, which loads the whole model.
        dtype: dtype of the result; by default the base's, which the experts must then share.
        experts_only: store only the experts and the path of the base, whose own tensors do not change: `remaining`
            and `embeddings_from` are refused, and `dtype` is that of the experts.
        max_shard_size: maximum size of a file.
        device: device for the decompositions.
        workers: number of layers computed in parallel; by default the number of cores, at most 4.
        force: replace an output folder written by smile-kernels, and unfinished work with other inputs or settings.
        progress: called with the stage, the number of finished parts and the number of parts.

    Returns:
        The report, which is also stored in the folder as smile_report.json.

    Raises:
        ValueError, FileNotFoundError: an argument or a checkpoint that does not fit, for example an `out` that is,
            contains or is inside an input; the message names the argument, the file and the tensor.
        FileExistsError: `out` contains files that may not be replaced, or another process is writing it.
        OSError: the disk is full.
    """
    check_request("experts", experts, num_experts_per_tok, remaining, routing)
    if routing is not None and routing.calibrated and not calibrate:
        raise SmileError("routing: is calibrated; expected calibrate, without which no layer has a router_prior")
    # The config checks ranks and counts.
    config = SmileConfig(
        num_local_experts=len(experts),
        num_experts_per_tok=num_experts_per_tok,
        rank_of_expert=rank_of_expert,
        rank_of_router=check_router(router, rank_of_router),
        modules={},
        routing=RoutingPolicy() if calibrate or routing is None else routing,  # calibration sets it
        expert_names=check_expert_names(_names_of(experts, expert_names), len(experts)),
    )
    parse_size(max_shard_size)
    if dtype not in (None, *DTYPES):
        raise SmileError(f"dtype: is {dtype}; expected {', '.join(map(str, DTYPES))}")
    check_device(device)
    if workers is not None and workers < 1:
        raise SmileError(f"workers: is {workers}; expected 1 or more")
    base, experts = local_folder("base", base), [local_folder(f"experts[{i}]", e) for i, e in enumerate(experts)]
    if experts_only:
        config = config.of_experts(base)
    folders = {"base": base} | {f"experts[{i}]": folder for i, folder in enumerate(experts)}
    target = check_folder(out, inputs=folders)
    job = Job(base, experts, config, include, exclude, remaining, dtype, device, strict, embeddings_from, router)
    for name, given in (("experts_only", experts_only), ("calibrate", calibrate)):
        if given and job.packed:
            raise SmileError(f"{name}: is True, and the base is stored quantised; expected False")
    job.check_routing(routing, calibrate)
    if calibrate and routing is None:  # whose default depends on a tokenizer, which may be damaged
        turn_ids_of_checkpoint(job.base if job.added is None else job.experts[job.donor])
    settings = job.settings() | {"experts_only": experts_only, "max_shard_size": max_shard_size}
    settings |= {"calibrate": routing.to_dict() if routing else True} if calibrate else {}
    with _processes() as (rank, world, barrier), ExitStack() as held:
        barrier(settings | {"out": str(target), "files": [[file[:2] for file in one] for one in settings["files"]]})
        output = OutputFolder(target, settings)
        if rank == 0:
            _check_space(output.work, job.bytes_to_write(experts_only))
            output = held.enter_context(output_folder(target, settings, force=force, writes=job.writes()))
            if not output.complete:
                (output.work / "layers").mkdir(exist_ok=True)
        barrier()
        if not output.work.exists():
            warnings.warn(f"{target}: is already complete with these settings; nothing was done", stacklevel=5)
            return UpscaleReport.load(target / REPORT)
        report = _write(job, output, (rank, world, barrier), experts_only, max_shard_size, workers, progress)
        if rank == 0:
            if calibrate:
                report = replace(report, calibration=add_calibration(output.output, routing, seed=0))
                report.save(output.output / REPORT)
            _check_unchanged(settings["files"], job.settings()["files"])
            output.publish()
            report.warn(remaining)
        barrier()
    return report


def _write(
    job: Job,
    output: OutputFolder,
    processes: tuple[int, int, Callable[..., None]],
    experts_only: bool,
    max_shard_size: int | str,
    workers: int | None,
    progress: Callable[[str, int, int], None],
) -> UpscaleReport:
    """Compute the layers and write the files that are not in the work folder yet; each process does its share."""
    rank, world, barrier = processes
    layers = output.work / "layers"
    todo = [i for i in range(len(job.layers)) if not job.has_layer(layers, i)]
    if len(todo) == len(job.layers):
        try:
            job.check_finite(slice(rank, None, world), progress)
        except ValueError:
            if rank == 0:
                output.discard()  # nothing is computed yet, so that corrected inputs start from the beginning
            raise
    barrier()
    done = len(job.layers) - len(todo)
    for _ in in_threads(functools.partial(job.upscale_layer, layers), todo[rank::world], workers):
        done += world
        progress("layers", min(done, len(job.layers)), len(job.layers))
    barrier()
    files = [layers / f"{i}.json" for i in range(len(job.layers))]
    reports = [parse(LayerReport, read_json(file), str(file)) for file in files]
    factors = {
        layer.name: read_safetensors(layers / f"{i}.safetensors")
        for i, layer in enumerate(job.layers)
        if not reports[i].skipped
    }
    try:
        check_changed("experts", [*reports, *unfit_layers(job.unfit, job.taken)], job.taken)
        if job.model is not None:
            check_routing(job.model, job.config.routing, dict.fromkeys(factors, len(job.experts)), calibrating=True)
    except ValueError:
        barrier()
        if rank == 0:
            output.discard()  # no run with these inputs could succeed
        raise
    stem = "experts" if experts_only else "model"
    shards = plan_shards(job.output_tensors(factors, experts_only), stem=stem, max_shard_size=max_shard_size)
    for i, (name, shard) in enumerate(shards.items()):
        if i % world == rank and not _has_tensors(output.output / name, shard):
            write_shard(output.output / name, shard, job.metadata)
        progress("files", i + 1, len(shards))
    barrier()
    reports = [*reports, *unfit_layers(job.unfit, job.taken), *job.fused]
    folders = str(job.base.resolve()), [str(folder.resolve()) for folder in job.experts]
    lost = job.lost(reports) if rank == 0 else []
    names = job.config.expert_names or ()
    left_out: dict[str, Any] = {"settings": job.lost_settings, "files": job.lost_files}
    report = UpscaleReport(reports, lost, *folders, expert_names=names, router=job.router, **left_out)
    if rank == 0:
        write_index(output.output, shards, stem=stem)
        job.write_sidecars(output.output, factors, report)
    return report


def _has_tensors(file: Path, shard: Sequence[StoredTensor]) -> bool:
    """Whether a file of an interrupted run is whole, finite and has these tensors, and not those of calibration."""
    try:
        stored = read_safetensors(file)
        for tensor in stored:
            tensor.load_with_peak()  # which raises for NaN
    except (SmileError, OSError):
        return False
    kinds = ({(t.name, t.shape, t.dtype) for t in tensors} for tensors in (stored, shard))
    return next(kinds) == next(kinds)


def _names_of(experts: Sequence[str | Path], given: Sequence[str | None] | None) -> Sequence[str]:
    """A name for each checkpoint: the given one, or the end of its path or id without @revision."""
    if given is not None and (isinstance(given, str) or len(given) != len(experts)):
        raise SmileError(f"expert_names: is {given!r}; expected {len(experts)} names, one for each expert")
    places = [str(expert) if Path(expert).exists() else str(expert).partition("@")[0] for expert in experts]
    places = ["".join(c if c.isprintable() else "_" for c in place) for place in places]
    paths = [Path(os.path.abspath(place)).parts[1:] or ("expert",) for place in places]
    tails: list[str] = []
    for depth in range(1, max(map(len, paths)) + 1):
        tails = ["/".join(path[-depth:]) for path in paths]
        if len(set(tails)) == len(tails):
            break
    names: list[str] = []
    for name, tail in zip(given or [None] * len(tails), tails):
        numbered = (f"{tail}-{number}" for number in itertools.count(2))
        unused = next(n for n in itertools.chain([tail], numbered) if n not in names)
        names.append(unused if name is None else name)
    return names


def _check_base_kept(why: str, asked: Mapping[str, Any]) -> None:
    """Raises ValueError where an argument asks for other weights than the base's, which are kept: `why`."""
    for name, given in asked.items():
        expected = "base" if name == "remaining" else None
        if given != expected:
            raise SmileError(f"{name}: is {given!r}, and {why}; expected {expected!r}")


def _check_generation_config(folder: Path, model: Any) -> None:
    """Raise ValueError if the result could not be loaded because of a generation config, which is copied."""
    if model is None or not model.can_generate():
        return
    from transformers import GenerationConfig

    check_sizes(folder)
    try:
        GenerationConfig.from_pretrained(folder)
    except OSError:  # missing, or not JSON: transformers loads the model without it
        pass
    except Exception as error:  # wrong values may raise anything
        raise SmileError(
            f"{folder / 'generation_config.json'}: transformers cannot read it ({reason(error)}); "
            "expected a generation config"
        ) from None


def _read_as(read: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    return read().to(dtype)


def _check_unchanged(before: Sequence[Any], now: Sequence[Any]) -> None:
    """Raise ValueError if a file of the base or of an expert was changed since the job began."""
    for i, (files, current) in enumerate(zip(before, now)):
        if changed := sorted({name for name, *_ in set(files) ^ set(current)}):
            where = f"experts[{i - 1}]" if i else "base"
            raise SmileError(
                f"{where}: {changed[0]} was changed while the model was upscaled; expected files that do not change "
                "(force=True, or --force, starts again)"
            )


def _check_space(work: Path, needed: int) -> None:
    """Raise OSError unless the disk has space for `needed` bytes, minus those already in `work`."""
    present = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    free = shutil.disk_usage(next(folder for folder in work.parents if folder.exists())).free
    if free + present < needed:
        message = f"disk is too full: {needed:,} bytes are needed and {free + present:,} are free"
        raise OSError(errno.ENOSPC, message, str(work))


def check_device(device: str) -> None:
    """Raise ValueError unless tensors can be computed on `device`."""
    try:
        torch.empty(1, device=device).add_(1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SmileError(f"device: is {device!r}, which cannot compute here ({reason(error)})") from None


@contextmanager
def _processes() -> Iterator[tuple[int, int, Callable[..., None]]]:
    """Rank, number of processes and a barrier: from torchrun, or for a single process.

    Given settings, the barrier raises SmileError in every process where those of the processes differ.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield 0, 1, lambda settings=None: None
        return
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    started = not dist.is_initialized()
    rank, size = os.environ.get("RANK", ""), os.environ["WORLD_SIZE"]
    if started and rank.isdecimal() and size.isdecimal() and int(rank) >= int(size):  # which would wait for ever
        raise SmileError(f"RANK: is {rank} with WORLD_SIZE {size}; expected a smaller one, as torchrun sets it")
    if started:
        try:
            store, *place = next(rendezvous("env://", timeout=_JOIN_WITHIN))
            dist.init_process_group("gloo", store=store, rank=place[0], world_size=place[1], timeout=timedelta(days=30))
        except (ValueError, RuntimeError) as error:
            raise SmileError(
                f"WORLD_SIZE: is {size!r}; expected the variables that torchrun sets, and that many processes within "
                f"{_JOIN_WITHIN.seconds} s ({reason(error)})"
            ) from None

    def barrier(settings: Mapping[str, Any] | None = None) -> None:
        given: list[Any] = [{}] * dist.get_world_size()
        try:
            dist.all_gather_object(given, settings or {})
        except RuntimeError as error:  # of the connection to a process that ended
            raise SmileError(
                f"WORLD_SIZE: is {size!r}, and another process ended; expected all to finish. Its message says why"
            ) from error
        names = sorted(set().union(*given) - {"device"})  # which may differ
        for name, number in itertools.product(names, range(len(given))):
            if given[number].get(name) != given[0].get(name):
                shown = " and ".join(f"{reprlib.repr(given[i].get(name))} in process {i}" for i in (0, number))
                raise SmileError(f"{name}: is {shown}; expected the same in all processes of torchrun")

    try:
        yield dist.get_rank(), dist.get_world_size(), barrier
    finally:
        if started:
            dist.destroy_process_group()
