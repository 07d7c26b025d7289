"""Adapters on the real layers of SD 1.5, SD 2.1 and SDXL: as many as kohya's, injected, written and read again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_formats_names import golden

from reparam_diffusion.adapters import METHODS
from reparam_diffusion.config import spec_of
from reparam_diffusion.formats.names import kohya_key, layout_of
from reparam_diffusion.formats.read import read_adapter
from reparam_diffusion.formats.write import write_adapter
from reparam_diffusion.inject import attach
from reparam_diffusion.models.load import Family
from reparam_diffusion.models.skeleton import skeleton
from reparam_diffusion.targets import plan_sites

FAMILIES: tuple[Family, ...] = ("sd1", "sd2", "sdxl")
KOHYAS = {
    "sd1": {"unet": 192, "te1": 72},
    "sd2": {"unet": 192, "te1": 138},
    "sdxl": {"unet": 722, "te1": 72, "te2": 192},
}
"""Layers that kohya's scripts give a LoRA by default."""
SPECS = {
    "lora": {"rank": 1, "conv_rank": 1},
    "loha": {"rank": 1, "conv_rank": 1},
    "lokr": {"rank": 1, "factor": 16, "decompose_both": True},
    "oft": {"block_size": 4},
    "adalora": {"init_rank": 1, "target_rank": 1},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_targets_are_the_layers_that_kohya_trains(family: Family) -> None:
    parts = skeleton(family)
    sites = plan_sites(parts, dict.fromkeys(parts, "attention+mlp"), spec_of("lora"))
    counts = {part: sum(planned.site.startswith(f"{part}.") for planned in sites) for part in parts}
    assert counts == KOHYAS[family]
    layout = layout_of(parts)
    rows = golden(family)
    known = {f"lora_unet_{(ldm if family == 'sdxl' else path).replace('.', '_')}" for path, _, _, ldm in rows["unet"]}
    known |= {f"{prefix}{path.replace('.', '_')}" for prefix, layers in rows["text_encoders"] for path, *_ in layers}
    assert {kohya_key(planned.site, family=family, layout=layout) for planned in sites} <= known


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_fits_every_layer_and_comes_back_from_its_file(
    method: str, family: Family, tmp_path: Path
) -> None:
    parts = skeleton(family)
    everything = {part: "all" if part == "unet" else "attention+mlp" for part in parts}
    sites = plan_sites(parts, everything, spec_of(method, **SPECS[method]))
    chance = torch.Generator().manual_seed(0)
    adapters = {
        one.site: METHODS[one.method].build(one.plan, torch.zeros(()).expand(one.shape), one.groups, chance)
        for one in sites
    }
    file = write_adapter(tmp_path / "full.safetensors", adapters, parts=parts, family=family, precision="fp32")
    read = read_adapter(file)
    assert read.base == family
    again, unmatched = read.match(parts)
    assert not unmatched and again.keys() == adapters.keys()
    untouched = {part: list(module.state_dict()) for part, module in parts.items()}
    with attach(parts, again) as injection:
        assert set(injection.uncalled()) == set(adapters)
        assert {part: list(module.state_dict()) for part, module in parts.items()} == untouched
    assert not any("forward" in vars(module) for part in parts.values() for module in part.modules())
