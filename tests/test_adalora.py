"""AdaLoRA really works: the budget falls as the paper says, and ranks move to the layers that need them."""

from __future__ import annotations

import pytest
import torch
from drawn import Layer, adapter_for
from torch import Tensor, nn

from reparam_diffusion.adapters import METHODS, Adapter
from reparam_diffusion.adapters.adalora import Adalora, AdaloraSpec, allocate, budget, orthogonality_penalty
from reparam_diffusion.inject import attach
from reparam_diffusion.targets import build_adapters, plan_sites

SPEC = AdaloraSpec(init_rank=6, target_rank=2, alpha=6, t_init=0.1, t_final=0.3, interval=5)


@pytest.mark.parametrize(
    ("step", "ranks"),
    [(1, 60), (10, 60), (40, 20 + 40 * 0.125), (25, 20 + 40 * 0.75**3), (55, 20 + 40 / 64), (70, 20), (100, 20)],
)
def test_the_budget_falls_with_the_cube(step: int, ranks: float) -> None:
    """100 steps, 10 before and 30 after: the fall is from step 10 to step 70 (eq. 12)."""
    adapter = adapter_for(Layer("linear", 24, 24, True), SPEC)
    assert isinstance(adapter, Adalora)
    assert budget(step, 100, adapter.plan, first=60.0, last=20.0) == pytest.approx(ranks)


def test_the_penalty_is_zero_at_the_start_and_grows_with_what_is_not_orthonormal() -> None:
    for layer in (Layer("linear", 24, 12, True), Layer("conv", 4, 8, True, kernel=(3, 3), lead=(5, 6))):
        fresh = adapter_for(layer, SPEC, random=False)
        assert orthogonality_penalty([fresh]) < 1e-9
        fresh.left.data *= 2  # PᵀP = 4 I: ‖3 I‖² = 9 r, averaged with Q's zero, times the weight
        assert orthogonality_penalty([fresh]).item() == pytest.approx(0.5 * 9 * fresh.plan.rank / 2)


def test_the_initial_rank_stays_in_the_scale_for_ever() -> None:
    layer = Layer("linear", 24, 12, True)
    adapter = adapter_for(layer, AdaloraSpec(init_rank=6, alpha=3.0))
    adapter.values.data[2:] = 0.0
    weight = layer.build().weight
    by_hand = 0.5 * (adapter.left[:, :2] * adapter.values[:2]) @ adapter.right[:2]
    torch.testing.assert_close(adapter.delta(weight), by_hand)


def test_importance_is_smoothed_sensitivity_times_uncertainty() -> None:
    """Two steps by hand for Λ: I = |w g|, s = .85 s + .15 I, u = .85 u + .15 |I − s| (eq. 8, 9)."""
    adapter = adapter_for(Layer("linear", 8, 8, False), AdaloraSpec(init_rank=2, t_init=0.9, t_final=0.0))
    s = u = torch.zeros(2, dtype=torch.float64)
    for step in (1, 2):
        for parameter in adapter.parameters():
            parameter.grad = torch.full_like(parameter, 0.5 * step)
        allocate([adapter], step, 100)
        now = (adapter.values.detach() * 0.5 * step).abs()
        s = 0.85 * s + 0.15 * now
        u = 0.85 * u + 0.15 * (now - s).abs()
    torch.testing.assert_close(adapter.values_sensitivity, s)
    torch.testing.assert_close(adapter.values_uncertainty, u)


class Pair(nn.Module):
    """Two layers side by side, of which one is to learn much and the other nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.needy, self.idle = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        for parameter in self.parameters():
            parameter.data = torch.randn(16, 16, generator=torch.Generator().manual_seed(5)) / 4
            parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.needy(x), self.idle(x)), -1)


def learn(total: int = 200) -> tuple[dict[str, Adapter], list[dict[str, int]], list[float]]:
    """A regression onto a change of rank 4 in `needy` alone; the ranks after each step, and the losses."""
    chance = torch.Generator().manual_seed(2)
    model, target = Pair(), Pair()
    wanted = torch.randn(16, 4, generator=chance) @ torch.randn(4, 16, generator=chance) / 6
    target.needy.weight.data += wanted
    adapters = build_adapters({"m": model}, plan_sites({"m": model}, {"m": ["*"]}, SPEC), seed=0)
    optimizer = torch.optim.AdamW([p for a in adapters.values() for p in a.parameters()], lr=2e-2)
    ranks, losses = [], []
    with attach({"m": model}, adapters):
        for step in range(1, total + 1):
            x = torch.randn(32, 16, generator=chance)
            loss = (model(x) - target(x)).square().mean()
            optimizer.zero_grad()
            (loss + METHODS["adalora"].penalty(adapters.values())).backward()
            optimizer.step()
            METHODS["adalora"].after_step(list(adapters.values()), step, total)
            ranks.append({site: adapter.live_rank() for site, adapter in adapters.items()})
            losses.append(loss.item())
    return adapters, ranks, losses


def test_ranks_move_to_the_layer_that_needs_them_and_stay() -> None:
    adapters, ranks, losses = learn()
    last, fixed_from = ranks[-1], 140 - 1  # the last 30 % of 200 steps
    assert sum(last.values()) == 4, "the budget: a target of 2 for each of 2 layers"
    assert last == {"m.needy": 4, "m.idle": 0}
    assert all(each == last for each in ranks[fixed_from:]), "AdamW's momentum moves nothing back"
    assert losses[-1] < 0.05 * losses[0]
    assert adapters["m.idle"].tensors() == {}
    assert torch.equal(adapters["m.idle"].delta(torch.zeros(16, 16)), torch.zeros(16, 16))
    first = ranks[: 20 - 1]
    assert all(sum(each.values()) == 12 for each in first), "nothing is taken before the start of the fall"
    at_decisions = [sum(ranks[step - 1].values()) for step in range(25, 140, 5)]
    assert at_decisions == sorted(at_decisions, reverse=True)


def test_sites_of_different_sizes_share_one_budget() -> None:
    big = adapter_for(Layer("linear", 24, 24, False), SPEC)
    small = adapter_for(Layer("linear", 24, 1, False), SPEC)
    assert small.plan.rank == 1
    chance = torch.Generator().manual_seed(4)
    for step in range(1, 11):
        for adapter in (big, small):
            for parameter in adapter.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=chance).to(parameter)
        allocate([big, small], step, 10)
    assert int(big.alive.sum() + small.alive.sum()) == SPEC.target_rank + 1


def test_state_holds_what_the_allocation_remembers() -> None:
    adapters, _, _ = learn(60)
    state = adapters["m.needy"].state()
    for name in ("left", "values", "right"):
        assert state[f"{name}_sensitivity"].abs().max() > 0
        assert state[f"{name}_uncertainty"].abs().max() > 0
    assert state["alive"].dtype == torch.bool
    twin = adapter_for(Layer("linear", 16, 16, False), SPEC, dtype=torch.float32)
    twin.load_state(state)
    assert all(torch.equal(value, state[name]) for name, value in twin.state().items())
    assert twin.live_rank() == adapters["m.needy"].live_rank()


@pytest.mark.parametrize("missed", [(140,), (139, 140, 141), tuple(range(140, 201))])
def test_an_overflow_on_the_last_budget_step_keeps_the_final_ranks(missed: tuple[int, ...]) -> None:
    """fp16: the step is not taken and brings no gradients, and the ranks are chosen all the same."""
    plan = plan_sites({"m": Pair()}, {"m": ["*"]}, SPEC)
    adapters = build_adapters({"m": Pair()}, plan, seed=0)
    chance = torch.Generator().manual_seed(0)
    for step in range(1, 201):
        for adapter in adapters.values():
            for parameter in adapter.parameters():
                is_taken = step not in missed
                parameter.grad = torch.randn(parameter.shape, generator=chance) if is_taken else None
                parameter.data += 0.01 * torch.randn(parameter.shape, generator=chance) if is_taken else 0.0
        METHODS["adalora"].after_step(list(adapters.values()), step, 200)
    assert sum(adapter.live_rank() or 0 for adapter in adapters.values()) == 4


def test_a_step_that_overflowed_earlier_takes_no_ranks_away() -> None:
    adapters = build_adapters({"m": Pair()}, plan_sites({"m": Pair()}, {"m": ["*"]}, SPEC), seed=0)
    before = [adapter.live_rank() for adapter in adapters.values()]
    METHODS["adalora"].after_step(list(adapters.values()), 100, 200)
    assert [adapter.live_rank() for adapter in adapters.values()] == before
