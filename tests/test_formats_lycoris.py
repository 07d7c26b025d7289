"""Files that LyCORIS 4.1.3 writes, read by us, and ours read by it: the same output."""

from __future__ import annotations

from pathlib import Path

import pytest
from formats_oracles import adapters_for, lycoris_file, lycoris_reads
from formats_tiny import assert_equal, output, parts_like, with_adapters

from reparam_diffusion.formats.read import read_adapter
from reparam_diffusion.formats.write import write_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BOFT = {"network_module": "boft", "lora_dim": 12, "conv_lora_dim": 12, "constraint": 0.0}
WRITTEN = {
    "lora": {},
    "lora with rank-stabilised scale": {"rs_lora": True},
    "lora with scalar": {"use_scalar": True},
    "lora tucker": {"use_tucker": True},
    "dora on outputs": {"weight_decompose": True, "wd_on_out": True},
    "dora on inputs": {"weight_decompose": True, "wd_on_out": False},
    "loha": {"network_module": "loha"},
    "loha tucker": {"network_module": "loha", "use_tucker": True},
    "loha decomposed": {"network_module": "loha", "weight_decompose": True},
    "lokr": {"network_module": "lokr", "factor": 4, "lora_dim": 1, "conv_lora_dim": 1},
    "lokr both": {"network_module": "lokr", "lora_dim": 1, "conv_lora_dim": 1, "decompose_both": True},
    "lokr whole": {"network_module": "lokr", "full_matrix": True},
    "lokr big dim": {"network_module": "lokr", "lora_dim": 100000, "conv_lora_dim": 100000, "alpha": 1e5},
    "lokr tucker": {"network_module": "lokr", "use_tucker": True, "factor": 2, "lora_dim": 1, "conv_lora_dim": 1},
    "lokr unbalanced": {"network_module": "lokr", "unbalanced_factorization": True, "factor": 2, "lora_dim": 1},
    "lokr decomposed": {"network_module": "lokr", "weight_decompose": True, "factor": 4},
    "oft": {"network_module": "diag-oft", "constraint": 0.0},
    "oft constrained": {"network_module": "diag-oft", "constraint": 0.05},
    "oft rescaled": {"network_module": "diag-oft", "constraint": 0.0, "rescaled": True},
    "boft": BOFT,
    "boft constrained and rescaled": BOFT | {"constraint": 0.05, "rescaled": True},
    "ia3 on outputs": {"network_module": "ia3"},
    "ia3 on inputs": {"network_module": "ia3", "train_on_input": True},
    "full": {"network_module": "full"},
    "lora with norms": {"train_norm": True},
    "glora": {"network_module": "glora"},
}
SDXL = ("lora", "lora tucker", "loha", "lokr both", "oft constrained", "boft", "lora with norms", "dora", "adalora")
OURS = {
    "lora": ("lora", {"rank": 3, "alpha": 5.0}),
    "lora of two ranks": ("lora", {"rank": 4, "alpha": 5.0, "conv_rank": 2, "conv_alpha": 3.0}),
    "dora": ("lora", {"rank": 3, "alpha": 5.0, "weight_decompose": True}),
    "loha": ("loha", {"rank": 3, "alpha": 5.0}),
    "lokr": ("lokr", {"factor": 4}),
    "lokr both low": ("lokr", {"factor": -1, "low_rank": True, "rank": 1, "alpha": 2.0, "decompose_both": True}),
    "oft": ("oft", {"block_size": 4}),
    "oft constrained": ("oft", {"block_size": 4, "constraint": 0.1}),
    "adalora": ("adalora", {"init_rank": 4, "alpha": 7.0}),
}


def cases(forms: dict) -> list:
    """(form, family): every form on SD1, some on SDXL, where names and parts differ, not the maths."""
    return [(form, "sd1") for form in forms] + [
        pytest.param(form, "sdxl", marks=pytest.mark.slow) for form in forms if form in SDXL
    ]


@pytest.mark.parametrize(("form", "family"), cases(WRITTEN))
def test_what_lycoris_writes_gives_the_same_output_here(form: str, family: str, tmp_path: Path) -> None:
    parts = parts_like(family)
    base = output(parts)
    theirs = lycoris_file(parts, tmp_path / "a.safetensors", **WRITTEN[form])
    file = read_adapter(tmp_path / "a.safetensors")
    adapters, unmatched = file.match(parts)
    assert unmatched == []
    assert len(adapters) == len(file.sites)
    assert_equal(with_adapters(parts, adapters), theirs, base)


@pytest.mark.parametrize(("form", "family"), cases(OURS))
def test_what_we_write_gives_the_same_output_in_lycoris(form: str, family: str, tmp_path: Path) -> None:
    parts = parts_like(family)
    base = output(parts)
    method, spec = OURS[form]
    adapters = adapters_for(parts, method, **spec)
    file = write_adapter(tmp_path / "a.safetensors", adapters, parts=parts, family=family, precision="fp32")
    assert_equal(lycoris_reads(parts, file, family), with_adapters(parts, adapters), base)
