"""How long and how large a blend of SDXL-size LoRAs is: `python -m benchmarks.blend_scale [files] [rank] [to rank]`.

Random LoRAs on every linear layer of the UNet's transformers and both text encoders, no base weights. The blend runs in
a process of its own; its largest anonymous memory is sampled from /proc, its largest resident set is the kernel's.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from reparam_diffusion.adapters.lora import Lora, LoraPlan
from reparam_diffusion.formats.names import module_at
from reparam_diffusion.formats.write import AdapterWriter
from reparam_diffusion.models.skeleton import skeleton
from reparam_diffusion.targets import sites_of


def write_lora(path: Path, *, rank: int, seed: int) -> int:
    """A random LoRA over the whole of SDXL; returns its layers."""
    parts = skeleton("sdxl")
    chance = torch.Generator().manual_seed(seed)
    sites = [site for part, model in parts.items() for site in sites_of(part, model, "attention+mlp")]
    with AdapterWriter(path, parts=parts, family="sdxl", precision="fp16") as writer:
        for site in sites:
            adapter = Lora(tuple(module_at(parts, site).weight.shape), LoraPlan(rank, float(rank)))
            adapter.up.data.normal_(std=0.01, generator=chance)
            adapter.down.data.normal_(std=0.02, generator=chance)
            writer.add(site, adapter)
        writer.finish({"ss_network_dim": str(rank)})
    return len(sites)


def anonymous_bytes(pid: int) -> int:
    """What a process holds that is no file."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def main(files: int = 4, rank: int = 64, to_rank: int = 32) -> None:
    with tempfile.TemporaryDirectory() as place:
        paths = [Path(place) / f"{number}.safetensors" for number in range(files)]
        layers = max(write_lora(path, rank=rank, seed=number) for number, path in enumerate(paths))
        size = paths[0].stat().st_size
        out = Path(place) / "out.safetensors"
        code = (
            "import resource, sys, pathlib\n"
            "from reparam_diffusion.gallery.blend.blending import blend_files\n"
            "from reparam_diffusion.gallery.blend.forms import Form\n"
            "from reparam_diffusion.gallery.blend.result import finished\n"
            "from reparam_diffusion.gallery.blend.sources import Source\n"
            "*files, out, rank = sys.argv[1:]\n"
            "sources = [Source(pathlib.Path(file), 0.5) for file in files]\n"
            "report = finished(blend_files(sources, pathlib.Path(out), form=Form(kind='lora', rank=int(rank))))\n"
            "print(report.error, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
        )
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, paths), str(out), str(to_rank)], stdout=subprocess.PIPE, text=True
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.1)
        seconds = time.perf_counter() - began
        error, resident = process.communicate()[0].split()
        sizes = {"file": size, "result": out.stat().st_size, "anonymous": peak, "resident": float(resident)}
        print(f"{files} x rank {rank} -> rank {to_rank}: {layers} layers, {seconds:.0f} s, error {float(error):.3f}")
        print("MB:", {name: round(value / 1e6) for name, value in sizes.items()})


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
