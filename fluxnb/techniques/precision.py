"""Quantized transformers: the number formats of the block's matrices, each with what it needs and a proof.

Every one is a technique that exchanges the linear layers of the blocks (the ControlNet's too); `proof` says
afterwards how many it changed and what their weights are now. Quantizing takes seconds at full size, so a study
builds it in (`Subject.having`) instead of putting it on and off.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Collection
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn

from fluxnb.errors import lacks_memory
from fluxnb.families import QUANTIZATION
from fluxnb.installed import needs
from fluxnb.technique import AHEAD, ANOTHER, Changes, Technique, Unavailable, networks
from fluxnb.techniques import kinds, layers


class Quantizer(Technique):
    """What the quantizers share: which layers, how they are put back, the proof."""

    family, exact = QUANTIZATION, ANOTHER
    takes_loras = True  # peft can put one around its layers
    adapters_first: Collection[str] = layers.ADAPTERS  # that may be there before it
    adapters: Collection[str] = ()  # that may come around its layers
    converts = True  # its layers can change their number format
    parts = True  # accelerate can offload its layers one by one
    groups = True  # diffusers can offload them in groups, and cast them
    copies = True  # its layers can be copied and pickled

    def check(self, pipe) -> None:
        """Raises Unavailable if this can't run here; the message begins with what it needs."""

    def prepare(self, pipe, changes: Changes) -> None:
        """Changes whatever else has to be changed."""

    def convert(self, linear: nn.Linear, modulation: bool) -> nn.Module | None:
        """The quantized layer in place of `linear`, None to leave it.

        Args:
            modulation: it belongs to an AdaLN layer, which sees one row per image: no arithmetic worth quantizing.
        """
        raise NotImplementedError

    def apply(self, pipe):
        """Exchanges the layers; returns the function that puts the originals back."""
        self.check(pipe)
        if hasattr(pipe.transformer, AHEAD):
            raise Unavailable("needs to be put on before ModulationAhead, whose layers it would replace")
        found = [(network, *own) for network in networks(pipe) for own in block_layers(network)]
        layers.check([linear for _, _, _, linear, _ in found])
        layers.check_groups(networks(pipe))
        weights: list[str] = []
        with Changes(self.label) as changes:
            self.prepare(pipe, changes)
            layers.refuse_merging(pipe, changes)
            layers.refuse_state(networks(pipe), [linear for _, _, _, linear, _ in found], changes)
            if not self.parts:
                layers.refuse_sequential(pipe, changes)
            if not self.groups:
                layers.refuse_groups(pipe, changes)
            if not self.copies:
                layers.refuse_copying(pipe, changes)
            if not self.converts:
                layers.refuse_converting(pipe, changes)
            if not self.takes_loras:
                layers.refuse_loras(pipe, changes)
            layers.check_adapters(pipe, changes, self.adapters_first, self.adapters)
            for network, parent, name, linear, modulation in found:
                if (new := self._converted(linear, modulation)) is not None:
                    changes.exchange(network, parent, name, new.train(linear.training))
                    weights.append(_kind(new))
            if not weights:
                raise Unavailable("needs layers of another shape: none of this model's fits")
            self.proof = {"layers": len(weights), "of": len(found), "weight": " and ".join(sorted(set(weights)))}
        return changes.take_back

    def _converted(self, linear, modulation) -> nn.Module | None:
        try:
            return self.convert(linear, modulation)
        except (ImportError, NotImplementedError, AssertionError, RuntimeError, ValueError) as error:
            if lacks_memory(error):
                raise
            raise Unavailable(f"needs another environment: {(str(error).splitlines() or ['?'])[0][:200]}") from error


def block_layers(transformer) -> list[tuple[nn.Module, str, nn.Linear, bool]]:
    """(parent, attribute, layer, whether it modulates) of every linear layer in the transformer's blocks.

    Of a layer with a LoRA it is the one inside; a LoRA's own matrices and an IP-Adapter's are none of the model's.
    """
    found = []
    for block in layers.blocks(transformer):
        for path, parent in list(block.named_modules()):
            for name, child in list(parent.named_children()):
                others = path.rpartition(".")[2].startswith("lora_") or "processor" in path.split(".")
                if isinstance(child, nn.Linear) and not others:
                    found.append((parent, name, child, path.startswith("norm")))
    return found


def _kind(layer: nn.Module) -> str:
    weight = layer.weight
    inner = weight.data if type(weight) is nn.Parameter and type(weight.data) is not torch.Tensor else weight
    return type(inner).__name__ if type(inner) not in (nn.Parameter, torch.Tensor) else type(layer).__name__


def _shell(linear: nn.Linear, kind: type = nn.Linear, **options) -> nn.Linear:
    """A layer of another kind and the same shape, without weights of its own."""
    with torch.device("meta"):
        new = kind(linear.in_features, linear.out_features, bias=False, **options)
    if linear.bias is not None:  # bitsandbytes converts it as it likes
        new.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    else:
        new.bias = None
    return new


def _needs(module: str) -> None:
    """Raises Unavailable if an optional module can't be imported."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(needs(module, error)) from error


def _capability(pipe) -> tuple[int, int]:
    """CUDA compute capability of the pipeline's GPU; (0, 0) on a CPU."""
    device = pipe.transformer.device
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@dataclass
class _OfKind(Quantizer):
    """A quantizer that is a package's, with the kinds that the package has; `kind` is one of them."""

    term: ClassVar[str]
    KINDS: ClassVar[Collection[str]]

    kind: str

    def __post_init__(self):
        if self.kind not in self.KINDS:
            raise ValueError(f"{self.term} kind {self.kind!r}: choose one of {', '.join(self.KINDS)}")

    @property
    def name(self) -> str:
        return f"{self.term} {self.kind.upper()}"

    @property
    def label(self) -> str:
        return self.name

    @property
    def settings(self) -> dict:
        return {"quantization": f"{self.term.lower()} {self.kind}"}


# --- torchao ----------------------------------------------------------------------------------------------


class _OfMatrices(nn.Linear):
    """A linear layer for a kernel that takes matrices only: torchao's sparse one (0.18) refuses more dimensions."""

    def forward(self, x):
        return super().forward(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.out_features)


class _Unpacking(nn.Linear):
    """A linear layer that multiplies by its unpacked weights where it is compiled for a GPU.

    Inductor (seen with 2.11 and 2.13) recognises the product of torchao's INT8 weight-only layers and puts PyTorch's
    `_weight_int8pack_mm` in its place, whose CUDA kernel is a plain loop (pytorch/pytorch #159325, #161680): on an
    H200, a few images of four steps were not done after four minutes. Unpacked, it is one pass over the weights and a
    usual product.
    """

    device = "cuda"

    def forward(self, x):
        if torch.compiler.is_compiling() and x.device.type == self.device:  # a converted model's weights keep their own
            return nn.functional.linear(x, self.weight.dequantize().to(x.dtype), self.bias)
        return super().forward(x)


@dataclass
class TorchAO(_OfKind):
    """Weights, and in dynamic formats activations, in FP8, INT8 or INT4 by torchao. Source: torchao's `quantize_`.

    torchao's dynamic formats quantize the activations too and pay only with torch.compile. Its configurations set
    Inductor to tune every kernel in all directions (`set_inductor_config`), which multiplies compile time; that is
    left off here.

    Args:
        kind: a key of `kinds.TORCHAO`.
    """

    term, KINDS = "torchao", kinds.TORCHAO
    adapters = ("LORA", "use_dora", "LOHA", "LOKR", "IA3")

    _LAYERS = {"fp8 row, 2:4 sparse": _OfMatrices, "int8 weight-only": _Unpacking}

    ROWS = ("int8", "fp8 row, 2:4 sparse")  # kernels that need more than AdaLN's one row per image

    @property
    def name(self) -> str:
        return self.KINDS[self.kind][0]

    @property
    def converts(self) -> bool:
        return self.kind.startswith("int8")

    def check(self, pipe):
        _, least, bfloat16 = self.KINDS[self.kind]
        if _capability(pipe) < least:
            raise Unavailable(
                f"needs a CUDA GPU of compute capability {least[0]}.{least[1]} or more, for its matrix kernel"
            )
        if bfloat16 and pipe.transformer.dtype != torch.bfloat16:
            raise Unavailable(f"needs the model in bfloat16, and it is in {pipe.transformer.dtype}")
        _needs("torchao")

    def convert(self, linear, modulation):
        from torchao.quantization import quantize_

        if modulation and self.kind in self.ROWS:
            return None
        if (config := self._config(linear)) is None:
            return None
        new = _shell(linear, self._LAYERS.get(self.kind, nn.Linear))
        new.weight = linear.weight
        quantize_(new, config, filter_fn=lambda module, _: module is new)
        vars(new).pop("extra_repr", None)  # torchao's own, which can't be pickled
        return new if new.weight is not linear.weight else None

    def _config(self, linear):
        """torchao's configuration for a layer, None if the layer's shape doesn't fit."""
        from torchao import quantization as q

        plain = {"set_inductor_config": False}
        sixteens = linear.in_features % 16 == 0 and linear.out_features % 16 == 0
        if self.kind == "fp8 row":
            return q.Float8DynamicActivationFloat8WeightConfig(granularity=q.PerRow(), **plain) if sixteens else None
        if self.kind == "fp8 tensor":
            return q.Float8DynamicActivationFloat8WeightConfig(granularity=q.PerTensor(), **plain) if sixteens else None
        if self.kind == "fp8 weight-only":
            return q.Float8WeightOnlyConfig(**plain)
        if self.kind == "int8":
            return q.Int8DynamicActivationInt8WeightConfig(**plain)
        if self.kind == "int8 weight-only":
            return q.Int8WeightOnlyConfig(**plain)
        if self.kind == "int4 weight-only":
            group = next((g for g in (128, 64, 32) if linear.in_features % g == 0), None)
            # PyTorch itself has the kernel for this packing
            packing = {"int4_packing_format": "tile_packed_to_4d"}
            return q.Int4WeightOnlyConfig(group_size=group, **packing, **plain) if group else None
        if linear.in_features % 128 or linear.out_features % 128:
            return None
        packing = importlib.import_module("torchao.quantization.quantize_.workflows").Float8PackingFormat
        return q.Float8DynamicActivationFloat8WeightConfig(
            granularity=q.PerRow(), packing_format=packing.SPARSE_2D_DATA_2D_METADATA, **plain
        )


# --- bitsandbytes -----------------------------------------------------------------------------------------


@dataclass
class BitsAndBytes(_OfKind):
    """Weights in NF4, FP4 or INT8 by bitsandbytes. Source: QLoRA (Dettmers et al., 2023); LLM.int8() (2022).

    Args:
        kind: one of `kinds.BITSANDBYTES`.
    """

    term, KINDS = "bitsandbytes", kinds.BITSANDBYTES
    adapters = ("LORA", "use_dora", "lora_bias", "IA3", "OFT", "BOFT")
    adapters_first = (*adapters, "modules_to_save")
    parts = False

    def check(self, pipe):
        _needs("bitsandbytes")
        if self.kind == "int8" and pipe.transformer.device.type != "cuda":
            raise Unavailable("needs a CUDA GPU: LLM.int8() has its matrix kernels there")

    def convert(self, linear, modulation):
        import bitsandbytes as bnb

        weight = linear.weight
        if self.kind == "int8":
            new = _shell(linear, bnb.nn.Linear8bitLt, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
        else:
            new = _shell(linear, bnb.nn.Linear4bit, compute_dtype=weight.dtype, quant_type=self.kind)
            # blocks that cross rows come out wrong in the package's CPU kernels (0.50)
            block = 64 if linear.in_features % 64 == 0 else 32
            options = {"blocksize": block, "quant_type": self.kind, "compress_statistics": False}
            new.weight = bnb.nn.Params4bit(weight.data, requires_grad=False, **options)
        new.weight = new.weight.to(weight.device)  # this is where it quantizes
        return new


# --- GGUF -------------------------------------------------------------------------------------------------


@dataclass
class GGUF(_OfKind):
    """Weights in a GGUF format, made from the model's own, multiplied by diffusers' GGUFLinear. Source: ggml.

    Args:
        kind: one of `kinds.GGUF`.
    """

    term, KINDS = "GGUF", kinds.GGUF
    adapters = ("LORA", "lora_bias", "IA3", "OFT", "BOFT")
    adapters_first = (*adapters, "modules_to_save")
    converts = parts = copies = False

    def check(self, pipe):
        _needs("gguf")

    def convert(self, linear, modulation):
        import gguf
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

        if linear.in_features % 32:
            return None
        new = _shell(linear, GGUFLinear, compute_dtype=linear.weight.dtype)
        packed = gguf_blocks(linear.weight.data, self.kind)
        new.weight = GGUFParameter(packed, quant_type=gguf.GGMLQuantizationType[self.kind])
        return new


def gguf_blocks(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """(rows, columns) weights as GGUF blocks of 32 columns: uint8, (rows, columns / 32 * bytes per block).

    The same bytes as the gguf package's, made where the weights are. Source: ggml's quantize_row_*_reference.
    """
    blocks = weight.float().reshape(-1, 32)
    return _BLOCKS[kind](blocks).reshape(weight.shape[0], -1)


def _q8_0(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(1, keepdim=True) / 127
    scaled = x * _inverse(scale)
    rounded = torch.sign(scaled) * torch.floor(scaled.abs() + 0.5)
    return torch.cat((_half(scale), rounded.to(torch.int8).view(torch.uint8)), 1)


def _q4_0(x: torch.Tensor) -> torch.Tensor:
    scale = _extreme(x) / -8
    q = torch.trunc(x * _inverse(scale) + 8.5).to(torch.uint8).clamp(0, 15)
    return torch.cat((_half(scale), _nibbles(q)), 1)


def _q5_0(x: torch.Tensor) -> torch.Tensor:
    scale = _extreme(x) / -16
    q = torch.trunc(x * _inverse(scale) + 16.5).to(torch.uint8).clamp(0, 31)
    places = torch.arange(32, device=x.device).reshape(4, 8) % 8
    high = ((q >> 4).reshape(-1, 4, 8).long() << places).sum(2).to(torch.uint8)
    return torch.cat((_half(scale), high, _nibbles(q)), 1)


_BLOCKS = dict(zip(kinds.GGUF, (_q8_0, _q5_0, _q4_0), strict=True))


def _extreme(x: torch.Tensor) -> torch.Tensor:
    """Each row's value of largest magnitude, with its sign."""
    return x.gather(1, x.abs().argmax(1, keepdim=True))


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0, 1 / scale)


def _half(scale: torch.Tensor) -> torch.Tensor:
    return scale.half().view(torch.uint8)


def _nibbles(q: torch.Tensor) -> torch.Tensor:
    return (q[:, :16] & 15) | ((q[:, 16:] & 15) << 4)


# --- Quanto -----------------------------------------------------------------------------------------------


@dataclass
class Quanto(_OfKind):
    """Weights in INT8, FP8 or INT4 by Hugging Face's Quanto, activations as they are. Source: optimum-quanto.

    Args:
        kind: a key of `kinds.QUANTO`.
    """

    term, KINDS = "Quanto", kinds.QUANTO
    takes_loras = converts = parts = copies = groups = False

    def check(self, pipe):
        _needs("optimum.quanto")

    def prepare(self, pipe, changes):
        # On a CPU plain PyTorch unpacks; Quanto would compile C++ for minutes before the first image.
        extension = importlib.import_module("optimum.quanto.library.extensions.extension")
        if pipe.transformer.device.type != "cuda":
            changes.put(extension.get_extension("quanto_cpp"), "_lib", SimpleNamespace(unpack=_unpacked), yields=True)

    def convert(self, linear, modulation):
        from optimum import quanto

        new = _without_autocast(quanto.QLinear).from_module(linear, weights=getattr(quanto, self.KINDS[self.kind]))
        if new is None:
            return None
        new.freeze()
        return new


@functools.cache
def _without_autocast(kind: Any) -> Any:
    """A kind of layer whose kernels take one number format only, whatever torch.autocast makes of the others'."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return kind.forward(self, x)
        with torch.autocast(x.device.type, enabled=False):
            return kind.forward(self, x.to(self.weight.dtype))

    return type(kind.__name__, (kind,), {"forward": forward})


def _unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 values of `bits` bits each from bytes that hold several, the lowest bits of all bytes first."""
    return torch.cat([(packed >> bits * i) & (2**bits - 1) for i in range(8 // bits)])


# --- Nunchaku ---------------------------------------------------------------------------------------------


@dataclass
class Nunchaku(Technique):
    """SVDQuant's own INT4 kernels. Source: Nunchaku (Li et al., 2024).

    Its quantized weights are downloaded, not made from the model's: they exist for FLUX.1-dev and FLUX.1-schnell.
    """

    family, exact = QUANTIZATION, ANOTHER
    name = label = "Nunchaku INT4"
    settings = {"quantization": "nunchaku int4"}

    # what the model is called in its configuration -> where its quantized transformer is
    WEIGHTS = {
        "FLUX.1-dev": "nunchaku-tech/nunchaku-flux.1-dev/svdq-{precision}_r32-flux.1-dev.safetensors",
        "FLUX.1-schnell": "nunchaku-tech/nunchaku-flux.1-schnell/svdq-{precision}_r32-flux.1-schnell.safetensors",
    }

    def apply(self, pipe):
        """Puts Nunchaku's transformer in place of the pipeline's; returns the function that puts it back."""
        nunchaku = self._package()
        source = str(pipe.config.get("_name_or_path") or "")
        weights = next((path for model, path in self.WEIGHTS.items() if model in source), None)
        if weights is None:
            raise Unavailable(
                f"needs one of {', '.join(self.WEIGHTS)}, whose quantized weights its makers offer; they can't be made "
                "from this model's"
            )
        before = pipe.transformer
        kind = getattr(nunchaku, "NunchakuFluxTransformer2DModelV2", nunchaku.NunchakuFluxTransformer2dModel)
        precision = importlib.import_module("nunchaku.utils").get_precision()
        made = kind.from_pretrained(weights.format(precision=precision), torch_dtype=before.dtype).to(before.device)
        with Changes(self.label) as changes:
            changes.put(pipe, "transformer", made)
            self.proof = {"transformer": kind.__name__, "weight": precision}
        return changes.take_back

    def _package(self):
        """The engine. Raises Unavailable for the unrelated package of the same name, too."""
        try:
            nunchaku = importlib.import_module("nunchaku")
        except ImportError as error:
            nunchaku, why = None, f" ({error})" if "nunchaku" in sys.modules else ""
        if not hasattr(nunchaku, "NunchakuFluxTransformer2dModel"):
            what = why if nunchaku is None else " (the package of that name here is another one)"
            raise Unavailable(
                "needs the Nunchaku engine, from its makers' releases and not from the Python index, on a GPU of "
                f"compute capability 7.5 to 8.9 or 12{what}; its arithmetic is simulated instead"
            )
        return nunchaku
