"""Big models on small devices: a base in 8 bits, parts and blocks that come and go, a VAE in tiles."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_laws_forward import assert_law
from tiny_pipelines import save_pictures, save_tiny
from torch import Tensor, nn

from reparam_diffusion.adapters import METHODS
from reparam_diffusion.config import parse_set, settle, spec_of
from reparam_diffusion.errors import UserError
from reparam_diffusion.events import Event, Step, Warned
from reparam_diffusion.inject import attach, merged
from reparam_diffusion.models.decode import decode
from reparam_diffusion.models.eightbit import Linear8bit, to_8bit
from reparam_diffusion.models.ledger import bytes_of
from reparam_diffusion.models.load import Model, is_short, load_model
from reparam_diffusion.models.precision import vae_dtype
from reparam_diffusion.models.resting import Offload
from reparam_diffusion.models.room import KEPT_FREE
from reparam_diffusion.models.sample import draw
from reparam_diffusion.models.tiles import taken, tile_side, tiled, work_of
from reparam_diffusion.targets import build_adapters, plan_sites
from reparam_diffusion.training.batch import text_is_live
from reparam_diffusion.training.encoding import encoding_tile, spared
from reparam_diffusion.training.loop import train
from reparam_diffusion.training.prepare import Material, prepare
from reparam_diffusion.training.ready import load_base

CPU = torch.device("cpu")
TEDDY = Path(__file__).resolve().parent.parent / "assets" / "examples" / "teddy"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "sdxl", "sdxl")


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- 8 bits ----------------------------------------------------------------------------------------------------------
def linear(entry: int = 33, out: int = 70, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Linear:
    layer = nn.Linear(entry, out, bias, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(noise(out, entry, seed=3, dtype=dtype))
    layer.weight[5] = 0.0
    return layer


def test_a_weight_in_8_bits_is_off_by_at_most_half_a_step() -> None:
    plain = linear()
    small = Linear8bit(plain)
    steps = plain.weight.abs().amax(1, keepdim=True) / 127
    assert ((small.weight - plain.weight).abs() <= steps * 0.5001).all()
    assert small.weight.dtype == torch.float64
    assert set(small.state_dict()) == {"numbers", "scale", "bias"}


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_in_8_bits_computes_with_its_weight_and_keeps_nothing_of_the_input(bias: bool) -> None:
    small = Linear8bit(linear(bias=bias))
    x = noise(2, 3, 33, dtype=torch.float64).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = small(x)
    assert {tensor.dtype for tensor in kept} == {torch.int8, torch.float32}
    expected = nn.functional.linear(x, small.weight, small.bias)
    torch.testing.assert_close(y, expected)
    pull = noise(*y.shape, seed=8, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad((one * pull).sum(), x)[0] for one in (y, expected)))


def test_the_numbers_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", exc_type=ImportError)
    plain = linear(64, 96, dtype=torch.float16)
    numbers, largest, _ = functional.int8_vectorwise_quant(plain.weight)
    small = Linear8bit(plain)
    assert (small.numbers.int() - numbers.int()).abs().max() <= 1, "a tie may fall to the other side"
    assert (small.numbers != numbers).float().mean() < 0.01
    torch.testing.assert_close(small.scale.flatten() * 127, largest.float())


@pytest.mark.parametrize("settings", [{}, {"weight_decompose": True}, *({"method": name} for name in METHODS)], ids=str)
def test_every_method_obeys_the_law_on_a_layer_in_8_bits(settings: dict[str, Any]) -> None:
    small = Linear8bit(linear(32, 48))
    spec = spec_of(**{"method": "lora", **settings})
    sites = plan_sites({"m": nn.Sequential(small)}, {"m": "*"}, spec)
    adapter = build_adapters({"m": nn.Sequential(small)}, sites, seed=0)["m.0"].double()
    for number, parameter in enumerate(adapter.parameters()):
        parameter.data += 0.1 * noise(*parameter.shape, seed=number, dtype=torch.float64)
    x = noise(2, 5, 32, seed=1, dtype=torch.float64).requires_grad_()
    assert_law(small, x, [(adapter, 0.5)])


def test_nothing_is_merged_into_a_base_in_8_bits() -> None:
    parts = {"m": nn.Sequential(Linear8bit(linear(32, 48)))}
    adapters = build_adapters(parts, plan_sites(parts, {"m": "*"}, spec_of("lora")), seed=0)
    with pytest.raises(AssertionError, match="8 bits"), merged(parts, [(adapters, lambda site: 1.0)]):
        pass


def config_for(model: Path | str, pictures: Path, *assignments: str) -> Any:
    base = [
        f"model.path='{model}'", "model.precision=fp32", f"data.images='{pictures}'", "data.trigger=sks",
        "data.class_word=toy", "data.held_out=0", "training.steps=6", "output.file_precision=fp32",
        "output.sample_prompts=['a 3d icon of {trigger}']", "output.checkpoint_every=3",
    ]  # fmt: skip
    return settle(parse_set([*base, *assignments]))


def losses(events: list[Event]) -> list[float]:
    return [event.loss for event in events if isinstance(event, Step)]


@pytest.fixture
def small_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model's layers are put into 8 bits as well."""
    monkeypatch.setattr("reparam_diffusion.models.load.to_8bit", partial(to_8bit, least=0))


@pytest.mark.usefixtures("small_too")
def test_a_run_on_8_bits_learns_what_one_on_the_whole_base_learns(sdxl: Path, tmp_path: Path) -> None:
    """Losses within 2 %, the change learned in the same direction, and a file like any other."""
    pictures = save_pictures(tmp_path / "pictures")
    files, found = [], []
    for word in ("false", "true"):
        config = config_for(sdxl, pictures, f"model.base_8bit={word}", "training.learning_rate=0.001")
        found.append(losses(list(train(config, folder=tmp_path / word))))
        files.append(load_file(tmp_path / word / "adapter.safetensors"))
    assert found[0] != found[1], "the base was rounded"
    assert found[1] == pytest.approx(found[0], rel=0.02)
    ups = [key for key in files[0] if key.endswith("lora_up.weight")]
    assert files[0].keys() == files[1].keys() and ups
    whole, small = (torch.cat([tensors[key].flatten() for key in ups]) for tensors in files)
    assert torch.cosine_similarity(whole, small, dim=0) > 0.9


# --- parts and blocks that come and go -------------------------------------------------------------------------------
def test_gradients_are_the_same_bit_for_bit_with_offloaded_blocks(starter_unet: Any) -> None:
    parts = {"unet": starter_unet}
    before = {name: id(tensor) for name, tensor in starter_unet.named_parameters()}
    values = {name: tensor.clone() for name, tensor in starter_unet.state_dict().items()}
    spec = spec_of("lora", rank=2, dropout=0.3, weight_decompose=True)
    sites = plan_sites(parts, {"unet": "attention+mlp"}, spec)[::7]
    config = starter_unet.config
    x, text = noise(1, config.in_channels, 16, 16), noise(1, 32, config.cross_attention_dim, seed=1)

    def gradients() -> list[Tensor]:
        adapters = build_adapters(parts, sites, seed=0)
        with attach(parts, adapters, device=CPU) as injection:
            out = starter_unet(x, torch.tensor([500]), text, return_dict=False)[0]
            return list(torch.autograd.grad(out.square().sum(), injection.parameters()))

    starter_unet.enable_gradient_checkpointing()
    plain = gradients()
    offload = Offload(starter_unet, CPU)
    fetched = [rest.fetched for rest in offload.rests]
    try:
        found = gradients()
    finally:
        starter_unet.disable_gradient_checkpointing()
        offload.end()
    assert all(torch.equal(here, there) for here, there in zip(found, plain, strict=True))
    visits = [rest.fetched - old for rest, old in zip(offload.rests, fetched, strict=True)]
    assert set(visits) <= {1, 2} and visits.count(2) > len(visits) / 2, "once to go, once more to come back"
    assert {name: id(tensor) for name, tensor in starter_unet.named_parameters()} == before
    assert all(torch.equal(tensor, values[name]) for name, tensor in starter_unet.state_dict().items())
    assert not any(rest.is_here for rest in offload.rests)


def staged(model: Model, *, block_offload: bool) -> list[str]:
    """Stage a model on the CPU, which copies as a GPU would; a list that grows with each part that comes or goes."""
    model.stage(block_offload=block_offload)
    seen: list[str] = []
    names = {id(model.unet): "unet", id(model.vae): "vae"}
    for key, rest in model._resting.items():
        name = names.get(key, "text")
        fetch, leave = rest.fetch, rest.leave
        rest.fetch = lambda fetch=fetch, name=name: (seen.append(f"+{name}"), fetch())[1]
        rest.leave = lambda leave=leave, name=name: (seen.append(f"-{name}"), leave())[1]
    return seen


@pytest.mark.parametrize("block_offload", [False, True])
def test_a_staged_model_draws_the_same_with_one_part_at_a_time(block_offload: bool, sdxl: Path) -> None:
    model = load_model(sdxl, device="cpu")
    plain = draw(model, "a red toy", steps=2)[0]
    seen = staged(model, block_offload=block_offload)
    assert draw(model, "a red toy", steps=2)[0].tobytes() == plain.tobytes()
    assert seen == ["+text", "-text"] * 2 + ["+unet", "-unet", "+vae", "-vae"]
    seen.clear()
    with model.using(model.unet):
        assert draw(model, "a red toy", steps=2)[0].tobytes() == plain.tobytes()
    assert seen[:5] == ["+unet", "+text", "-text", "+text", "-text"]
    assert seen[5:] == ["-unet", "+vae", "-vae", "+unet", "-unet"], "it makes room for the VAE and is fetched back"
    model.unstage()
    assert draw(model, "a red toy", steps=2)[0].tobytes() == plain.tobytes()


def test_merged_adapters_show_on_a_staged_model(sdxl: Path) -> None:
    model = load_model(sdxl, device="cpu")
    adapters = build_adapters(model.parts, plan_sites(model.parts, {"unet": "attention"}, spec_of("oft")), seed=0)
    for number, adapter in enumerate(adapters.values()):
        for parameter in adapter.parameters():
            parameter.data += 0.2 * noise(*parameter.shape, seed=number)
    plain = draw(model, "a red toy", steps=2)[0].tobytes()
    with merged(model.parts, [(adapters, lambda site: 1.0)]):
        changed = draw(model, "a red toy", steps=2)[0].tobytes()
    model.stage()
    with merged(model.parts, [(adapters, lambda site: 1.0)]):
        assert draw(model, "a red toy", steps=2)[0].tobytes() == changed != plain
    assert draw(model, "a red toy", steps=2)[0].tobytes() == plain


def test_parts_stay_on_a_device_only_where_it_has_room_to_work_in(sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(sdxl, device="cpu")
    size = sum(bytes_of(part) for part in (*model.parts.values(), model.vae))
    for memory, short in ((2 * size - 1, True), (2 * size + 1, False)):
        monkeypatch.setattr("reparam_diffusion.models.load.memory_of", lambda device, memory=memory: memory)
        assert is_short(model) == short


@pytest.mark.usefixtures("small_too")
@pytest.mark.parametrize("settings", [["model.base_8bit=true"], ["targets.text_encoder=attention"]], ids=str)
def test_a_run_in_stages_is_the_same_run(
    settings: list[str], sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = save_pictures(tmp_path / "pictures")
    config = config_for(
        sdxl, pictures, "training.gradient_checkpointing=true", "prior.weight=1.0", "prior.images=2", "prior.steps=1",
        *settings,
    )  # fmt: skip
    plain = losses(list(train(config, folder=tmp_path / "plain")))
    seen: list[list[str]] = []

    def in_stages(config: Any, *, precision: str) -> Any:
        model, processes = load_base(config, precision=precision)
        seen.append(staged(model, block_offload=True))
        return model, processes

    monkeypatch.setattr("reparam_diffusion.training.loop.load_base", in_stages)
    found = losses(list(train(config, folder=tmp_path / "staged")))
    assert found == pytest.approx(plain, rel=1e-5), "copies lie elsewhere, and sums may round differently there"
    (steps,) = seen
    first = steps.index("+vae", steps.index("-vae"))  # the class pictures come first
    assert "+unet" not in steps[first : steps.index("-vae", first)], "pictures are encoded without the UNet"
    is_live = text_is_live(config)
    assert (steps[-1] == "-text" or steps[-2] == "-text") == is_live, "encoders that are trained stay for the run"


def test_what_offloading_comes_to_is_said(sdxl: Path, tmp_path: Path) -> None:
    pictures = save_pictures(tmp_path / "pictures")
    config = config_for(sdxl, pictures, "model.block_offload=true", "model.base_8bit=true", "training.steps=1")
    notes = [event.message for event in train(config, folder=tmp_path / "run") if isinstance(event, Warned)]
    assert any("nothing to offload" in note for note in notes)
    assert any("Gradient checkpointing is on" in note for note in notes)
    assert any("no linear layers large enough" in note for note in notes)
    compiled = config_for(sdxl, pictures, "model.block_offload=true", "training.compile=true")
    with pytest.raises(UserError, match="cannot be offloaded"):
        list(train(compiled, folder=tmp_path / "other"))


# --- tiles -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def starter() -> Model:
    return load_model("starter", device="cpu")


def test_tiles_are_as_large_as_fits(starter: Model) -> None:
    vae = starter.vae
    whole = work_of(vae, "decode", 1024, 1024)
    assert tile_side(vae, "decode", 1024, 1024, room=2 * whole, device="cpu") == 0
    sides = [tile_side(vae, "decode", 1024, 1024, room=int(whole * share), device="cpu") for share in (0.8, 0.4, 0.2)]
    assert sides == sorted(sides, reverse=True) and 0 < sides[-1] < sides[0] <= 768
    assert tile_side(vae, "decode", 1024, 1024, room=0, device="cpu") == 256, "the smallest is tried at last"
    assert tile_side(vae, "decode", 128, 128, room=0, device="cpu") == 0, "what is smaller than a tile stays whole"


def test_a_picture_in_tiles_is_close_to_the_whole_one(starter: Model) -> None:
    """Mean difference below one of 255 levels when drawn in tiles, and 5 % of the latents' spread when encoded."""
    from PIL import Image

    from reparam_diffusion.data.cache import to_pixels

    picture = Image.open(sorted(TEDDY.glob("*.png"))[0]).resize((384, 384))
    with torch.no_grad():
        whole = starter.vae.encode(to_pixels(picture)[None]).latent_dist.mean
        with tiled(starter.vae, 256):
            pieces = starter.vae.encode(to_pixels(picture)[None]).latent_dist.mean
        latents = whole * starter.vae.config.scaling_factor
        drawn = [torch.tensor(list(decode(starter, latents, room=room)[0].tobytes())) for room in (10**12, 0)]
    assert not starter.vae.use_tiling
    assert not torch.equal(*drawn)
    assert (drawn[0] - drawn[1]).float().abs().mean() < 1.0
    assert float((pieces - whole).square().mean().sqrt() / whole.std()) < 0.05


def test_pictures_are_encoded_in_tiles_only_where_memory_is_short_and_the_cache_says_so(
    starter: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert encoding_tile(starter, [(128, 128), (512, 384)], memory=10**12) == 0
    assert encoding_tile(starter, [(128, 128), (512, 384)], memory=0) == 256
    pictures = save_pictures(tmp_path / "pictures", count=1, size=(320, 320))
    config = config_for("starter", pictures, "data.resolution=320")

    def prepared(name: str) -> list[Event]:
        return list(prepare(starter, config, tmp_path / "w" / "runs" / name, text_is_live=False))

    prepared("whole")
    monkeypatch.setattr("reparam_diffusion.training.encoding.memory_of", lambda device: 0)
    assert any("tiles of 256 pixels" in event.message for event in prepared("tiled") if isinstance(event, Warned))
    assert len(list((tmp_path / "w" / ".cache" / "latents").glob("*.safetensors"))) == 2


def hungry_above(model: Model, monkeypatch: pytest.MonkeyPatch, most: int, error: Exception) -> None:
    """Let the VAE run out of memory for pictures or tiles of more than `most` pixels a side."""
    plain = model.vae.encoder.forward

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        if max(pixels.shape[-2:]) > most:
            raise error
        return plain(pixels)

    monkeypatch.setattr(model.vae.encoder, "forward", forward)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS backend out of memory"), MemoryError()]
)
def test_encoding_goes_on_in_smaller_tiles_when_the_memory_runs_out(
    starter: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    pictures = save_pictures(tmp_path / "pictures", count=1, size=(512, 512))
    config = config_for("starter", pictures, "data.resolution=512")

    def prepared(name: str, *, tile: int | None = None) -> tuple[list[str], Material]:
        steps = prepare(starter, config, tmp_path / name / "runs" / "one", text_is_live=False, tile=tile)
        told = []
        while True:
            try:
                event = next(steps)
            except StopIteration as end:
                return told, end.value
            if isinstance(event, Warned) and "tiles" in event.message:
                told.append(event.message)

    tiles, material = prepared("asked", tile=256)
    (item,) = material.dataset.train
    assert tiles == [] and material.latents.tile == 256
    hungry_above(starter, monkeypatch, 256, error)
    tiles, hungry = prepared("hungry")
    assert [word for told in tiles for word in told.split() if word.isdecimal()] == ["384", "256"]
    assert torch.equal(hungry.latents.get(item, False)[0], material.latents.get(item, False)[0])
    hungry_above(starter, monkeypatch, 128, error)
    with pytest.raises(UserError, match="not enough to encode the pictures") as told:
        prepared("starved")
    assert told.value.place == "model.device"


def test_a_tenth_of_the_room_is_left_to_others_when_tiles_are_chosen(starter: Model) -> None:
    whole = taken(starter.vae, "encode", 512, 512, device="cpu")
    beside = KEPT_FREE + sum(bytes_of(part) for part in (*starter.parts.values(), starter.vae))
    assert spared(1000) == 900
    assert encoding_tile(starter, [(512, 512)], memory=beside + int(whole / 0.89)) == 0
    assert encoding_tile(starter, [(512, 512)], memory=beside + int(whole / 0.91)) > 0, "it would just have fitted"


def test_a_vae_is_in_half_precision_only_where_it_is_made_for_it() -> None:
    cuda = torch.device("cuda")
    assert vae_dtype({"force_upcast": False}, cuda) == torch.float16
    assert vae_dtype({"force_upcast": True}, cuda) == vae_dtype({}, cuda) == torch.float32
    assert vae_dtype({"force_upcast": False}, CPU) == torch.float32
