"""Adapter forms that we read but do not train: whole differences, norms, (IA)³, GLoRA, BOFT, and PEFT's rotations.

Each is right by its own program's formula, through the dense ΔW; none is registered as a method, so no form offers it.
Formulas: LyCORIS (arXiv:2309.14859); (IA)³, Liu et al. 2022, arXiv:2205.05638; GLoRA, Chavan et al. 2023,
arXiv:2306.07967; BOFT, Liu et al. 2023, arXiv:2311.06243; PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reparam_diffusion.adapters.base import METHODS, Adapter, Plan, alpha_of, as_matrix, shape_size
from reparam_diffusion.adapters.oft import Oft
from reparam_diffusion.maths.orthogonal import cayley, clipped, rotate_blocks, skew_from_triangle

Leaves = Mapping[str, Tensor]


class Full(Adapter):
    """ΔW and Δb given whole: `diff`, `diff_b`, or a norm layer's `w_norm`, `b_norm`."""

    name = "full"
    diff: Tensor | None
    diff_b: Tensor | None

    def __init__(self, shape: Sequence[int], diff: Tensor | None, diff_b: Tensor | None) -> None:
        super().__init__(shape, Plan())
        if diff is not None and diff.numel() != shape_size(self.shape):
            raise ValueError(f"a difference of shape {tuple(diff.shape)} does not fit a weight of {self.shape}")
        if diff_b is not None and diff_b.numel() != self.shape[0]:
            raise ValueError(f"a bias difference of {diff_b.numel()} values does not fit {self.shape[0]} outputs")
        self.register_buffer("diff", None if diff is None else diff.detach().float().reshape(self.shape))
        self.register_buffer("diff_b", None if diff_b is None else diff_b.detach().float().flatten())

    def update(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight) if self.diff is None else self.diff.to(weight)

    def delta_bias(self, bias: Tensor | None) -> Tensor | None:
        return self.diff_b


class Ia3(Adapter):
    """ΔW = W ∘ gain, along the outputs (out, 1, …) or the inputs (1, in, …). PEFT's output form scales the bias too."""

    name = "ia3"
    gain: Tensor

    def __init__(self, shape: Sequence[int], gain: Tensor, *, on_input: bool, scales_bias: bool) -> None:
        super().__init__(shape, Plan())
        axis = 1 if on_input else 0
        if gain.numel() != self.shape[axis]:
            raise ValueError(f"(IA)³ has {gain.numel()} values for a weight of {self.shape}")
        broadcast = [1] * len(self.shape)
        broadcast[axis] = -1
        self.scales_bias = scales_bias and not on_input
        self.register_buffer("gain", gain.detach().float().reshape(broadcast))

    @property
    def reads_weight(self) -> bool:
        return True

    def update(self, weight: Tensor) -> Tensor:
        return weight * self.gain.to(weight)

    def delta_bias(self, bias: Tensor | None) -> Tensor | None:
        return bias.float() * self.gain.flatten() if self.scales_bias and bias is not None else None


class Glora(Adapter):
    """ΔW = (α/r)(W A₁A₂ + B₁B₂), A on the input channels."""

    name = "glora"
    mix_up: Tensor
    mix_down: Tensor
    up: Tensor
    down: Tensor

    def __init__(self, shape: Sequence[int], leaves: Leaves) -> None:
        super().__init__(shape, Plan())
        a, b = ("a1.weight", "a2.weight"), ("b1.weight", "b2.weight")
        if as_matrix(leaves[b[0]]).shape[0] != self.shape[0] or as_matrix(leaves[a[0]]).shape[0] != self.shape[1]:
            a, b = (a[1], a[0]), (b[1], b[0])  # LyCORIS before 2 had the roles swapped
        mix_up, mix_down = as_matrix(leaves[a[0]]), as_matrix(leaves[a[1]])  # (in, r), (r, in)
        up, down = as_matrix(leaves[b[0]]), leaves[b[1]].detach().float()  # (out, r), (r, in, *kernel)
        self.scale = alpha_of(leaves, mix_down.shape[0]) / mix_down.shape[0]
        if "bm.weight" in leaves:  # Tucker core, folded into down
            down = torch.einsum("mn...,nc->mc...", leaves["bm.weight"].detach().float(), as_matrix(down))
        down = down.flatten(1)
        if mix_up.shape != (self.shape[1], mix_down.shape[0]) or mix_down.shape[1] != self.shape[1]:
            raise ValueError(f"GLoRA's a1 and a2 do not fit a weight of {self.shape}")
        if up.shape != (self.shape[0], down.shape[0]) or down.shape[1] != shape_size(self.shape[1:]):
            raise ValueError(f"GLoRA's b1 and b2 do not fit a weight of {self.shape}")
        for name, tensor in (("mix_up", mix_up), ("mix_down", mix_down), ("up", up), ("down", down)):
            self.register_buffer(name, tensor)

    @property
    def reads_weight(self) -> bool:
        return True

    def update(self, weight: Tensor) -> Tensor:
        mix = (self.mix_up @ self.mix_down).to(weight)  # (in, in)
        mixed = torch.einsum("oi...,ij->oj...", weight, mix)
        return self.scale * (mixed + (self.up @ self.down).to(weight).reshape(weight.shape))


class Butterfly(Adapter):
    """LyCORIS's BOFT: stages of block rotations of the outputs, each over a wider stride; then `rescale`."""

    name = "boft"
    skew: Tensor
    rescale: Tensor | None

    def __init__(self, shape: Sequence[int], leaves: Leaves) -> None:
        super().__init__(shape, Plan())
        blocks = leaves["oft_blocks"].detach().float()  # (stages, num, b, b)
        stages, num, size = blocks.shape[:3]
        if num * size != self.shape[0] or size % 2 or self.shape[0] % (2**stages * size // 2):
            raise ValueError(f"oft_blocks has shape {tuple(blocks.shape)} for a weight of {self.shape}")
        skew = clipped(blocks - blocks.transpose(-1, -2), max(alpha_of(leaves, 0), 0.0) * self.shape[0])
        self.register_buffer("skew", skew)
        self.register_buffer("rescale", _rescale(leaves, self.shape[0]))

    @property
    def reads_weight(self) -> bool:
        return True

    def update(self, weight: Tensor) -> Tensor:
        rows = weight.flatten(1).T  # (in·kernel, out): the outputs last
        size = self.skew.shape[-1]
        for stage, rotation in enumerate(cayley(self.skew).to(weight)):
            stride = 2**stage * size // 2
            rows = rows.unflatten(-1, (-1, 2, stride)).transpose(-1, -2).flatten(-3)
            rows = rotate_blocks(rotation, rows)
            rows = rows.unflatten(-1, (-1, stride, 2)).transpose(-1, -2).flatten(-3)
        turned = rows.T.reshape(weight.shape)
        if self.rescale is not None:
            turned = turned * self.rescale.to(weight).reshape(-1, *[1] * (weight.ndim - 1))
        return turned - weight


class Rotated(Adapter):
    """Rotations given whole, blockwise: W' = Rᵀ W on the outputs (old LyCORIS), or W Rᵀ on the flat inputs (PEFT).

    One block stands for all when it is shared. `stages` rotations follow each other, each with its order of columns.
    """

    name = "oft"
    rotation: Tensor
    order: Tensor | None
    gain: Tensor | None

    def __init__(
        self,
        shape: Sequence[int],
        rotation: Tensor,
        *,
        on_input: bool,
        order: Tensor | None = None,
        gain: Tensor | None = None,
    ) -> None:
        super().__init__(shape, Plan())
        self.on_input = on_input
        length = shape_size(self.shape[1:]) if on_input else self.shape[0]
        stages, num, size = rotation.shape[:3]
        if num == 1 and length % size == 0:
            rotation = rotation.expand(stages, length // size, size, size)
        if rotation.shape[1] * size != length:
            raise ValueError(f"rotations of {num} x {size} do not fit a weight of {self.shape}")
        if gain is not None and gain.numel() != self.shape[0]:
            raise ValueError(f"a scale of {gain.numel()} values does not fit {self.shape[0]} outputs")
        self.register_buffer("rotation", rotation.float().contiguous())  # (stages, num, b, b)
        self.register_buffer("order", order)  # (stages, length)
        self.register_buffer("gain", None if gain is None else gain.detach().float().flatten())

    @property
    def reads_weight(self) -> bool:
        return True

    def update(self, weight: Tensor) -> Tensor:
        flat = weight.flatten(1)
        rows = flat if self.on_input else flat.T
        for stage, rotation in enumerate(self.rotation.to(weight)):
            if self.order is not None:
                rows = rows[:, self.order[stage].argsort()]
            # rotate_blocks gives rows · blocksᵀ: W Rᵀ on the inputs as it is, (Rᵀ W)ᵀ = Wᵀ R needs the transpose.
            rows = rotate_blocks(rotation if self.on_input else rotation.transpose(-1, -2), rows)
            if self.order is not None:
                rows = rows[:, self.order[stage]]
        turned = (rows if self.on_input else rows.T).reshape(weight.shape)
        if self.gain is not None:
            turned = turned * self.gain.to(weight).reshape(-1, *[1] * (weight.ndim - 1))
        return turned - weight


class Stack(Adapter):
    """Several forms at one site, such as a LoRA with a bias difference: their sum."""

    name = "mixed"

    def __init__(self, shape: Sequence[int], adapters: Sequence[Adapter]) -> None:
        super().__init__(shape, Plan())
        self.adapters = torch.nn.ModuleList(adapters)

    @property
    def reads_weight(self) -> bool:
        return any(adapter.reads_weight for adapter in self.inner())

    def inner(self) -> list[Adapter]:
        """The forms that are summed."""
        return [adapter for adapter in self.adapters if isinstance(adapter, Adapter)]

    def update(self, weight: Tensor) -> Tensor:
        return torch.stack([adapter.delta(weight) for adapter in self.inner()]).sum(0)

    def delta_bias(self, bias: Tensor | None) -> Tensor | None:
        changes = [change for adapter in self.inner() if (change := adapter.delta_bias(bias)) is not None]
        return torch.stack(changes).sum(0) if changes else None


def _rescale(leaves: Leaves, outputs: int) -> Tensor | None:
    scale = leaves.get("rescale")
    if scale is not None and scale.numel() != outputs:
        raise ValueError(f"rescale has {scale.numel()} values for {outputs} outputs")
    return None if scale is None else scale.detach().float().flatten()


def read_ia3(leaves: Leaves, shape: Sequence[int]) -> Ia3:
    """LyCORIS stores l − 1 with `on_input`; PEFT stores l, as (out, 1) or (1, in), or (1, n, 1, 1) for convolutions."""
    if "ia3_l" not in leaves:
        on_input = bool(leaves["on_input"].flatten()[0])
        return Ia3(shape, leaves["weight"], on_input=on_input, scales_bias=False)
    scale = leaves["ia3_l"]
    if scale.ndim == 2 and scale.shape[0] != scale.shape[1]:
        on_input = scale.shape[0] == 1
    elif "on_input" in leaves:  # from the configuration
        on_input = bool(leaves["on_input"])
    elif shape[0] == shape[1]:
        raise ValueError("the file does not say whether (IA)³ scales inputs or outputs; its configuration is missing")
    else:
        on_input = scale.numel() == shape[1]
    return Ia3(shape, scale.detach().float() - 1, on_input=on_input, scales_bias=True)


def read_peft_oft(leaves: Leaves, shape: Sequence[int]) -> Adapter:
    """PEFT's rotation over in·k·k, exact (`oft_terms` 0) or a Neumann sum of so many terms; COFT if `oft_eps` > 0."""
    triangle = leaves["oft_R.weight"].detach().float()
    size = round((1 + (1 + 8 * triangle.shape[1]) ** 0.5) / 2)
    terms, eps = int(leaves["oft_terms"]), float(leaves["oft_eps"])
    skew = skew_from_triangle(triangle, size)
    if eps > 0:
        limit = eps / triangle.shape[0] ** 0.5
        norm = skew.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None]
        skew = torch.where(norm <= limit, skew, skew * (limit / norm))
    elif terms == 0 and shape_size(shape[2:]) == 1 and triangle.shape[0] * size == shape[1]:
        return Oft.from_tensors({"oft_R.weight": triangle}, shape)
    rotation = cayley(-skew) if terms == 0 else neumann(skew, terms)
    return Rotated(shape, rotation[None], on_input=True)


def neumann(skew: Tensor, terms: int) -> Tensor:
    """I + 2Q + 2Q² + … + 2Q^(T−2) + Q^(T−1), short for (I + Q)(I − Q)⁻¹: the other sense than PEFT's exact form."""
    last = 4 if terms == 3 else terms  # PEFT's code for 3 terms has four
    total = torch.eye(skew.shape[-1]).expand_as(skew)
    power = total
    for number in range(1, last):
        power = power @ skew
        total = total + (1 if number == last - 1 and last > 2 else 2) * power
    return total


def read_peft_boft(leaves: Leaves, shape: Sequence[int]) -> Rotated:
    """boft_R (stages, num, b, b), Q = (A − Aᵀ)/2, R = (I − Q)(I + Q)⁻¹ on the inputs; boft_s scales the outputs."""
    blocks = leaves["boft_R"].detach().float()
    stages, num, size = blocks.shape[:3]
    order = torch.arange(num * size).repeat(stages, 1)
    if stages > 1:
        for stage in range(stages):
            units = order[stage].reshape(num // 2**stage, -1, size // 2)
            order[stage] = torch.cat((units[:, 0::2], units[:, 1::2]), dim=1).flatten()
    return Rotated(
        shape,
        cayley((blocks.transpose(-1, -2) - blocks) / 2),
        on_input=True,
        order=order if stages > 1 else None,
        gain=leaves.get("boft_s"),
    )


def read_bias_only(leaves: Leaves, shape: Sequence[int]) -> Full:
    """The bias of PEFT's LoRA (`lora_bias`), scaled as its product is."""
    scale = leaves.get("bias_scale", torch.tensor(1.0))
    return Full(shape, None, leaves["lora_up.bias"].detach().float() * float(scale))


@dataclass(frozen=True)
class Form:
    """One form of adapter in a file: its name for people, the leaves that show it, and how it is read."""

    name: str
    recognises: Callable[[Leaves], bool]
    read: Callable[[Leaves, Sequence[int]], Adapter]
    leaves: frozenset[str] = frozenset()
    """What it takes of a site's leaves; empty for all that no side form takes."""


SIDE_FORMS = (
    Form(
        "full",
        lambda leaves: bool({"diff", "diff_b"} & set(leaves)),
        lambda leaves, shape: Full(shape, leaves.get("diff"), leaves.get("diff_b")),
        frozenset({"diff", "diff_b"}),
    ),
    Form("lora", lambda leaves: "lora_up.bias" in leaves, read_bias_only, frozenset({"lora_up.bias", "bias_scale"})),
)
"""Forms that may stand beside another one at the same site."""

FORMS = (
    Form(
        "norm",
        lambda leaves: "w_norm" in leaves or "b_norm" in leaves,
        lambda leaves, shape: Full(shape, leaves.get("w_norm"), leaves.get("b_norm")),
    ),
    Form("ia3", lambda leaves: "ia3_l" in leaves or {"weight", "on_input"} <= set(leaves), read_ia3),
    Form(
        "glora",
        lambda leaves: {"a1.weight", "a2.weight", "b1.weight", "b2.weight"} <= set(leaves),
        lambda leaves, shape: Glora(shape, leaves),
    ),
    Form(
        "boft",
        lambda leaves: "oft_blocks" in leaves and leaves["oft_blocks"].ndim == 4,
        lambda leaves, shape: Butterfly(shape, leaves),
    ),
    Form("boft", lambda leaves: "boft_R" in leaves, read_peft_boft),
    Form(
        "oft",
        lambda leaves: "oft_diag" in leaves,
        lambda leaves, shape: Rotated(shape, leaves["oft_diag"].detach().float()[None], on_input=False),
    ),
    Form("oft", lambda leaves: {"oft_R.weight", "oft_terms"} <= set(leaves), read_peft_oft),
)


def form_of(leaves: Leaves) -> Form | None:
    """The form that a site's leaves have, our own methods included; None when they are none we know."""
    for form in FORMS:
        if form.recognises(leaves):
            return form
    for method in METHODS.values():
        if method.recognises(frozenset(leaves)):
            return Form(method.name, lambda _: True, method.adapter.from_tensors)
    return None


def forms_of(leaves: Leaves) -> list[tuple[Form, dict[str, Tensor]]]:
    """Every form at a site with the leaves it takes, the main one first; empty when there is none."""
    sides = [
        (form, {name: leaves[name] for name in form.leaves if name in leaves})
        for form in SIDE_FORMS
        if form.recognises(leaves)
    ]
    taken = {name for _, part in sides for name in part}
    rest = {name: tensor for name, tensor in leaves.items() if name not in taken}
    main = form_of(rest)
    return ([(main, rest)] if main is not None else []) + sides


def read_forms(leaves: Leaves, shape: Sequence[int]) -> Adapter:
    """The adapter at a site. Raises ValueError where its tensors do not fit the weight's shape."""
    found = [form.read(part, shape) for form, part in forms_of(leaves)]
    if not found:
        raise ValueError("its tensors make up no known kind of adapter")
    return found[0] if len(found) == 1 else Stack(shape, found)
