"""The adapter contract.  One law for everything: W' = W + Σ sⱼ·Δⱼ(W), each Δ taken from the untouched base.

A method is one file with three things: a Spec (what a person chooses once a run), a Plan (what one site gets, plain
numbers) and an Adapter (the parameters of one site). `register` makes it known to everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from reparam_diffusion.maths.chance import Draw

Shape = tuple[int, ...]


class Spec(BaseModel):
    """What a person chooses for a method. Subclasses give `method` its Literal type and document every field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    method: str


@dataclass(frozen=True)
class Plan:
    """Plain numbers for one site. `note` tells a person what had to be settled, such as a rank above the layer's."""

    def to_dict(self) -> dict[str, Any]:  # Any: the values of a subclass's fields, for JSON
        return asdict(self)

    def finished(self) -> Plan:
        """The plan of what the finished file holds, where that is less than what is trained."""
        return self


class Host:
    """One site's own operation, y = op(x, W) + b, with another weight put in.

    Linear: x (…, in). Conv2d: x (batch, in, height, width). Norm layers are hosts for reading foreign files only.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.kind: Literal["linear", "conv", "norm"]
        if isinstance(module, nn.Linear):
            self.kind, self.groups = "linear", 1
        elif isinstance(module, nn.Conv2d):
            self.kind, self.groups = "conv", module.groups
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            self.kind, self.groups = "norm", 1
        else:
            raise TypeError(f"{type(module).__name__} cannot carry an adapter")

    @property
    def weight(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(iter((*self.module.parameters(), *self.module.buffers()))).device

    @property
    def shape(self) -> Shape:
        """The weight's: (out, in/groups, *kernel)."""
        return weight_shape(self.module)

    @property
    def bias(self) -> Tensor | None:
        bias = self.module.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The host's own operation on x with `weight` (and no bias unless given)."""
        module = self.module
        if isinstance(module, nn.Linear):
            return F.linear(x, weight, bias)
        if isinstance(module, nn.Conv2d):
            return module._conv_forward(x, weight, bias)
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
        assert isinstance(module, nn.GroupNorm)
        return F.group_norm(x, module.num_groups, weight, bias, module.eps)

    def pointwise(self, h: Tensor, matrix: Tensor) -> Tensor:
        """A (out, r) matrix over the channels of h: the second half of a low-rank product."""
        if self.kind == "linear":
            return F.linear(h, matrix)
        return F.conv2d(h, matrix[:, :, None, None])

    def without_bias(self, y: Tensor) -> Tensor:
        """The host's output before its bias was added."""
        return y if self.bias is None else y - self.over_channels(self.bias)

    def over_channels(self, vector: Tensor, y: Tensor | None = None) -> Tensor:
        """A vector per output channel, shaped to broadcast over the output y (of pictures unless given)."""
        if self.kind == "conv":
            return vector[:, None, None]
        if isinstance(self.module, nn.GroupNorm):
            return vector.reshape(-1, *[1] * (2 if y is None else y.ndim - 2))
        return vector

    def rows(self, y: Tensor) -> int:
        """How many rows the host's product has for this output: tokens, or output pixels."""
        return y.numel() // self.shape[0]

    def channels_last(self, x: Tensor) -> Tensor:
        """x with its channels on the last axis."""
        return x.movedim(1, -1) if self.kind == "conv" else x

    def channels_back(self, x: Tensor) -> Tensor:
        """The inverse of `channels_last`."""
        return x.movedim(-1, 1) if self.kind == "conv" else x


class Adapter(nn.Module):
    """The parameters of one site and what they do to its weight.

    A subclass gives `update` (ΔW without weight decomposition), and where cheaper than a dense product, `quick` or
    `shift`. Everything public is exact and equal to the host's operation with `delta`.
    """

    name: ClassVar[str]

    def __init__(self, shape: Sequence[int], plan: Plan) -> None:
        super().__init__()
        self.shape: Shape = tuple(shape)  # of the host's weight: (out, in/groups, *kernel)
        self.plan = plan
        self.site = ""  # set by attach; names the dropout draws
        self.draw: Draw | None = None  # set for each training forward; None switches dropout off
        self.magnitude: nn.Parameter | None = None  # DoRA: (out, 1, …) or (1, in, …)

    # --- the law -----------------------------------------------------------------------------------------------------
    def update(self, weight: Tensor) -> Tensor:
        """ΔW before weight decomposition, in the dtype and shape of `weight`."""
        raise TypeError(f"{type(self).__name__} has no update")

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW, exact, in the weight's shape and at least fp32. `weight` is the untouched base weight."""
        wide = at_least_float(weight)
        if self.magnitude is None:
            return self.update(wide)
        whole = wide + self.update(wide)
        return whole * (self.magnitude / norm_over(whole, self.magnitude.shape)) - wide

    def delta_bias(self, bias: Tensor | None) -> Tensor | None:
        """What is added to the host's bias; None where the format has none."""
        return None

    @property
    def reads_weight(self) -> bool:
        """Whether ΔW depends on W, as that of rotations and of weight decomposition does."""
        return self.magnitude is not None

    # --- the fast path -----------------------------------------------------------------------------------------------
    @property
    def reads_output(self) -> bool:
        """Whether `residual` needs the base's own output y."""
        return self.magnitude is not None

    def residual(self, x: Tensor, y: Tensor, host: Host) -> Tensor | None:
        """What to add to the host's output for the original x and the base's y (bias included); None: use delta."""
        if host.kind == "norm" or not self.is_cheap(host, host.rows(y)):
            return None
        if self.magnitude is None:
            return self.quick(x, y, host)
        if self.magnitude.numel() != self.shape[0] or self.magnitude.shape[0] != self.shape[0]:
            return None  # the input axis scales x, not y
        added = self.quick(x, y, host)
        if added is None:
            return None
        wide = at_least_float(host.weight)
        whole = wide + self.update(wide)
        gain = (self.magnitude / norm_over(whole, self.magnitude.shape)).flatten().to(y.dtype)
        gain = host.over_channels(gain)
        return (gain - 1) * host.without_bias(y) + gain * added

    def onto(self, total: Tensor, x: Tensor, y: Tensor, host: Host, strength: Tensor) -> Tensor | None:
        """total + strength · residual, in fewer passes over the output where the method can; None: use delta."""
        if host.kind == "linear" and self.magnitude is None and self.is_cheap(host, host.rows(y)):
            factors = self.low_rank()
            if factors is not None:
                down, up = factors
                h = self.between(host.apply(x, down.to(x.dtype)), host)
                up = (up * strength).to(x.dtype)
                return torch.addmm(total.flatten(0, -2), h.flatten(0, -2), up.T).view(total.shape)
        residual = self.residual(x, y, host)
        return None if residual is None else torch.addcmul(total, residual, strength.to(residual.dtype))

    def quick(self, x: Tensor, y: Tensor, host: Host) -> Tensor | None:
        """The method's own fast path for `update`: host's operation with ΔW on x, computed another way."""
        factors = self.low_rank() if host.groups == 1 else None
        if factors is None:
            return None
        down, up = factors
        return host.pointwise(self.between(host.apply(x, down.to(x.dtype)), host), up.to(x.dtype))

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """`down` (r, in, *kernel) and `up` (out, r) with ΔW = up @ down, for methods that have them."""
        return None

    def between(self, h: Tensor, host: Host) -> Tensor:
        """What happens to the low-rank activations between `down` and `up`: a place for dropout."""
        return h

    def is_cheap(self, host: Host, rows: int) -> bool:
        """Whether the fast path is cheaper than a dense product for this many rows."""
        return True

    def shift(self, x: Tensor, host: Host) -> Tensor | None:
        """What to add to the host's input instead of a residual; None for methods that act on the output."""
        return None

    # --- files -------------------------------------------------------------------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        """Leaf name -> tensor, in LyCORIS's names and shapes, detached, fp32."""
        raise TypeError(f"{type(self).__name__} is not written to files")

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Self:
        """The adapter in a file's leaf tensors for a weight of `shape`. Raises ValueError where they do not fit."""
        raise TypeError(f"{cls.__name__} is not read from files")

    def settle(self) -> None:
        """Put right what an average of past values may not keep, such as ranks that are gone."""

    def state(self) -> dict[str, Tensor]:
        """Everything a resume needs, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.load_state_dict(dict(state))

    def live_rank(self) -> int | None:
        """How many ranks do something now; None for methods without a rank."""
        rank = getattr(self.plan, "rank", None)
        return rank if isinstance(rank, int) else None

    # --- helpers for subclasses --------------------------------------------------------------------------------------
    def decompose(self, weight: Tensor, axis: Literal["output", "input"] = "output") -> None:
        """Start DoRA from the base weight's own norms, so that ΔW begins at zero."""
        shape = [1] * weight.ndim
        keep = 0 if axis == "output" else 1
        shape[keep] = weight.shape[keep]
        self.magnitude = nn.Parameter(norm_over(weight.detach().float(), shape))

    def written(self, **leaves: Tensor | float) -> dict[str, Tensor]:
        """Leaves for a file: underscores as given, dora_scale added."""
        rows = {name: torch.as_tensor(leaf).detach().float().contiguous() for name, leaf in leaves.items()}
        if self.magnitude is not None:
            rows["dora_scale"] = self.magnitude.detach().float().contiguous()
        return rows

    def read_magnitude(self, tensors: Mapping[str, Tensor]) -> None:
        """Take dora_scale from a file's leaves; a 1-D one is per output channel."""
        scale = tensors.get("dora_scale")
        if scale is None:
            return
        scale = scale.detach().float()
        if scale.ndim == 1:
            scale = scale.reshape(-1, *[1] * (len(self.shape) - 1))
        output = (self.shape[0], *[1] * (len(self.shape) - 1))
        entry = (1, self.shape[1], *[1] * (len(self.shape) - 2))
        if scale.shape not in (output, entry) and scale.numel() in (self.shape[0], self.shape[1]):
            scale = scale.reshape(entry if scale.shape[0] == 1 and scale.numel() == self.shape[1] else output)
        if scale.shape not in (output, entry):
            raise ValueError(f"dora_scale has shape {tuple(scale.shape)} for a weight of {self.shape}")
        self.magnitude = nn.Parameter(scale)


def weight_shape(module: nn.Module) -> Shape:
    """The shape of a module's weight; one in 8 bits would have to make it first."""
    weight = getattr(module, "numbers", None)
    if weight is None:
        weight = module.weight
    assert isinstance(weight, Tensor)
    return tuple(weight.shape)


def at_least_float(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or as it is in fp64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def norm_over(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """The norm of `weight` over every axis where `shape` is 1, kept as axes; LyCORIS adds eps, so do we."""
    axes = [axis for axis, size in enumerate(shape) if size == 1]
    if not axes:  # a weight with one value per output channel
        return weight.abs() + torch.finfo(torch.float32).eps
    if len(axes) == weight.ndim:  # (1, 1, …): one output channel with one input
        axes = list(range(1, weight.ndim))
    return torch.linalg.vector_norm(weight, dim=axes, keepdim=True) + torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Method:
    """A registered method: everything that the form, the command line, the files and the training need of it."""

    name: str
    title: str
    summary: str
    spec: type[Spec]
    adapter: type[Adapter]
    plan: Callable[[Any, Shape, int], Plan]
    """(spec, weight shape, groups) -> plan. Any: each method takes its own Spec."""
    build: Callable[..., Adapter]
    """(plan, weight, groups, generator) -> a fresh adapter that changes nothing yet."""
    recognises: Callable[[frozenset[str]], bool]
    """Whether a file's leaf names are this method's."""
    penalty: Callable[[Iterable[Adapter]], Tensor] | None = None
    after_step: Callable[[Sequence[Adapter], int, int], None] | None = None
    """(adapters, step just taken, total steps): runs once the optimizer has stepped, gradients still there."""
    go_on: Callable[[Any, Adapter, torch.Generator], Adapter] | None = None
    """(the settings' plan, an adapter read from a file, generator) -> the same change, ready to be trained on.

    Raises ValueError where that cannot be. Without it a file's own tensors are trained on as they are.
    """


_TRAINING_ONLY = ("dropout", "rank_dropout", "module_dropout")
"""What a plan says of training alone, which no file tells."""


def trained_on(method: Method, wanted: Plan, read: Adapter, generator: torch.Generator) -> Adapter:
    """An adapter read from a file, to be trained on: the file's numbers and sizes, the settings' dropout.

    Raises ValueError, with a plain sentence, for an adapter of another kind.
    """
    if method.go_on is not None:
        adapter = method.go_on(wanted, read, generator)
    elif type(read) is method.adapter:
        adapter = read
    else:
        raise ValueError(f"it is {read.name} there")
    changes = {name: getattr(wanted, name) for name in _TRAINING_ONLY if hasattr(wanted, name)}
    if hasattr(wanted, "weight_decompose"):
        changes["weight_decompose"] = adapter.magnitude is not None
    adapter.plan = replace(adapter.plan, **changes)
    for tensor in (*adapter.parameters(), *adapter.buffers()):
        tensor.data = tensor.data.clone()  # a file's tensors are views of its pages
    return adapter


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Make a method known. Raises ValueError for a name that is taken."""
    if method.name in METHODS:
        raise ValueError(f"the method {method.name} is registered already")
    METHODS[method.name] = method
    return method


def is_thin(shape: Shape, rank: int, rows: int) -> bool:
    """Whether a low-rank product costs less than building ΔW and a dense product with it."""
    entry = shape_size(shape[1:])
    return rank * (entry + shape[0]) * rows < entry * shape[0] * (rows + rank)


def alpha_of(tensors: Mapping[str, Tensor], rank: int) -> float:
    """A file's alpha as a number: absent means the rank (scale 1, as A1111, ComfyUI, diffusers and kohya read it)."""
    alpha = tensors.get("alpha")
    return float(rank) if alpha is None else float(alpha.float().reshape(-1)[0])


def as_filters(tensor: Tensor, shape: Shape) -> Tensor:
    """A file's `down` factor (r, …) in the shape (r, in, *kernel) of the host's weight, whatever way it was stored."""
    rank = tensor.shape[0]
    if tensor.numel() != rank * shape_size(shape[1:]):
        raise ValueError(f"a factor of shape {tuple(tensor.shape)} does not fit a weight of {shape}")
    return tensor.detach().float().reshape(rank, *shape[1:])


def as_matrix(tensor: Tensor) -> Tensor:
    """A file's factor (out, r) whether it was stored as a matrix or as a 1x1 convolution."""
    return tensor.detach().float().reshape(tensor.shape[0], -1)


def shape_size(shape: Sequence[int]) -> int:
    """The number of values in a shape."""
    size = 1
    for length in shape:
        size *= length
    return size
