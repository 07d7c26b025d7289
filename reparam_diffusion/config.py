"""Settings: partial presets and overrides settle into one total, frozen TrainConfig, written as config.toml.

Every default, bound and help text lives in the models here and in the methods' Specs; the form, the command line,
the presets and the docs are read off them.
"""

from __future__ import annotations

import difflib
import json
import secrets
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

import tomlkit
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from reparam_diffusion.adapters import METHODS, Spec
from reparam_diffusion.errors import UserError, unknown_name
from reparam_diffusion.validation import describe

PRESETS = Path(__file__).resolve().parent.parent / "presets"

if TYPE_CHECKING:
    AnySpec = Spec
else:  # a checker cannot know which methods are registered
    AnySpec = Annotated[
        Union[tuple(method.spec for method in METHODS.values())],  # noqa: UP007
        Field(discriminator="method"),
    ]


class Settings(BaseModel):
    """One group of settings: frozen, no unknown keys, each field with its help beneath it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelSettings(Settings):
    path: str = "starter"
    """The base model: "starter", a diffusers folder, a single .safetensors file, or a hub id."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the frozen weights; auto takes the faster one as measured on this device."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda or cuda:1."""
    clip_skip: int = Field(0, ge=0, le=12)
    """Text encoder layers to leave out at the end; 0 uses them all."""
    vae: str = ""
    """A VAE to use instead of the model's own: a folder or a .safetensors file. Empty takes the model's own."""
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the model predicts; auto takes what its files say."""
    base_8bit: bool = False
    """Train on a UNet with its linear layers in 8 bits: half the memory. The finished file is as usual."""
    block_offload: bool = False
    """Keep the UNet's blocks in the computer's memory, each fetched for its turn: much less GPU memory, slower."""
    zero_terminal_snr: bool = False
    """Let the noise end in pure noise, for very dark and very bright pictures; for models with v-prediction."""


class DatasetSettings(Settings):
    """One more set of pictures in a run. What is not given is as for the main set."""

    images: str = Field(title="Folder")
    """Folder of pictures."""
    trigger: str | None = Field(None, title="Trigger word")
    """Its own trigger word. Empty text is none: with a weight of 0.5 such a set keeps the class as it was."""
    class_word: str | None = Field(None, title="What it is")
    """What it is."""
    weight: float = Field(1.0, gt=0, le=100)
    """How much its pictures count in the loss."""
    repeats: int = Field(1, ge=1, le=1000)
    """How often each of its pictures comes in one pass."""
    masks: str | None = None
    """Its masks. A folder of masks serves its own set only."""
    unmasked_weight: float | None = Field(None, ge=0, le=1)
    """How much what its masks leave out counts."""
    caption_template: str | None = None
    """Caption for its pictures without a text file."""
    kind: Literal["subject", "style"] | None = None
    """Whether its pictures show one subject or share one style."""
    flip: bool | None = None
    """Whether its pictures are mirrored too."""


class DataSettings(Settings):
    images: str | list[str] = ""
    """Folder of pictures, or a list of pictures."""
    trigger: str = ""
    """The made-up word that calls the adapter, such as "sks"."""
    class_word: str = ""
    """What it is, such as "toy" or "dog"."""
    kind: Literal["subject", "style"] = "subject"
    """Whether the pictures show one subject or share one style."""
    caption_template: str = ""
    """Caption for pictures without a text file; empty takes the base model's own template."""
    resolution: int = Field(0, ge=0, le=4096)
    """Side of a square training picture in pixels; 0 takes the base model's own size."""
    buckets: bool = True
    """Train each picture near its own shape instead of cropping it square."""
    repeats: int = Field(1, ge=1, le=1000)
    """How often each picture comes in one pass."""
    flip: bool = False
    """Also train mirrored pictures. Not for faces, writing or anything with a left and a right."""
    caption_dropout: float = Field(0.05, ge=0, le=1)
    """Chance that a picture is shown without its caption, which strengthens guidance."""
    shuffle_tags: bool = False
    """Shuffle comma-separated tags of a caption each time it is shown."""
    keep_tags: int = Field(1, ge=0, le=100)
    """How many tags at the front stay in place when shuffling."""
    held_out: int = Field(-1, ge=-1, le=1000)
    """Pictures kept out of training to measure the loss; -1 keeps one in eight where there are at least 8."""
    masks: str = ""
    """Learn what a mask shows white: alpha (transparency), beside (dog-masklabel.png) or a folder; empty learns all."""
    unmasked_weight: float = Field(0.1, ge=0, le=1)
    """How much what a mask leaves out counts. The loss is a weighted mean, so small masks learn as fast."""
    weight: float = Field(1.0, gt=0, le=100)
    """How much these pictures count in the loss beside those of further sets."""
    sets: list[DatasetSettings] = []
    """More sets in the same run. Pictures of the class with weight 0.5 and no trigger word keep the class as it was."""


class PriorSettings(Settings):
    weight: float = Field(0.0, ge=0, le=10)
    """Keep the class as it was (prior preservation): weight of the class pictures in the loss; 0 switches it off."""
    images: int = Field(32, ge=1, le=2000)
    """How many class pictures to draw from the base model, once."""
    prompt: str = ""
    """What to draw; empty takes the base model's class prompt."""
    steps: int = Field(0, ge=0, le=200)
    """Sampling steps for each class picture; 0 takes the base model's own."""


class Rule(Settings):
    match: str
    """Glob on the layer, such as "unet.*attn*" or "te1.*"."""
    adapter: AnySpec
    """The method and its settings for these layers."""


class TargetSettings(Settings):
    unet: str | list[str] = "attention+mlp"
    """Layers of the UNet: none, attention, attention+mlp, all, or globs such as "unet.*.attn2.*"."""
    text_encoder: str | list[str] = "none"
    """Layers of the text encoders: none, attention, attention+mlp, or globs such as "te1.*"."""
    rules: list[Rule] = []
    """Other methods for some layers; the first match wins."""


class TrainingSettings(Settings):
    steps: int = Field(500, ge=1, le=1_000_000)
    """Optimizer steps."""
    batch: int = Field(1, ge=1, le=256)
    """Pictures in one forward pass."""
    accumulation: int = Field(1, ge=1, le=256)
    """Forward passes summed into one step."""
    learning_rate: float = Field(1e-4, gt=0, le=1)
    """Learning rate of the UNet's adapters."""
    text_learning_rate: float = Field(0.0, ge=0, le=1)
    """Learning rate of the text encoders' adapters; 0 takes half the UNet's."""
    optimizer: Literal[
        "adamw", "adam", "sgd", "adafactor", "radam", "nadam", "rmsprop", "adamw8bit", "lion", "lion8bit", "prodigy",
        "adamw_schedulefree",
    ] = "adamw"  # fmt: skip
    """Optimizer; the last five need requirements-extras.txt. Prodigy wants learning rate 1, lion a third of adamw's."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    """Adam's averaging of the gradient and of its square."""
    weight_decay: float = Field(0.01, ge=0, le=1)
    """Weight decay of the adapters."""
    schedule: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"] = (
        "cosine"
    )
    """How the learning rate falls over the run."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from zero."""
    clip: float = Field(1.0, ge=0, le=1000)
    """Largest norm of the gradient; 0 switches clipping off."""
    min_snr_gamma: float = Field(5.0, ge=0, le=100)
    """Min-SNR weighting of the timesteps; 0 switches it off."""
    noise_offset: float = Field(0.0, ge=0, le=1)
    """Brightness noise; about 0.03 helps with very dark or very bright pictures."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Moving average of the adapter that is saved in its place, such as 0.99; 0 switches it off."""
    gradient_checkpointing: bool = False
    """Less memory for about a third more time."""
    compile: bool = False
    """Compile the model's repeated blocks (CUDA; the first steps take minutes)."""
    start_from: str = ""
    """An adapter to train on from: its name in the gallery, or a file. Its ranks win over those set here."""
    seed: int = Field(0, ge=-1, le=2**31 - 1)
    """The same seed gives the same run on the same machine; -1 takes a random one."""


class EmbeddingSettings(Settings):
    vectors: int = Field(0, ge=0, le=16)
    """Learn the trigger word itself as so many vectors, along with the adapter and in its file; 0 does not."""
    words: str = ""
    """What the trigger word begins as, such as "plush bear"; empty begins with what the model reads in it now."""
    learning_rate: float = Field(1e-3, gt=0, le=1)
    """Learning rate of the vectors."""


class OutputSettings(Settings):
    name: str = ""
    """The adapter's name; empty makes one from the trigger and the method."""
    checkpoint_every: int = Field(0, ge=0, le=1_000_000)
    """Steps between two checkpoints; 0 takes a fifth of the run."""
    keep_checkpoints: int = Field(3, ge=1, le=1000)
    """How many of the last checkpoints stay on disk."""
    validate_every: int = Field(0, ge=0, le=1_000_000)
    """Steps between two measurements of the loss with fixed noise; 0 takes a tenth of the run."""
    sample_every: int = Field(0, ge=0, le=1_000_000)
    """Steps between two preview pictures; 0 draws them at the start and the end."""
    sample_prompts: list[str] = []
    """Preview prompts with {trigger} and {class}; empty takes the base model's own."""
    sample_seed: int = Field(0, ge=-1, le=2**31 - 1)
    """Seed of the preview pictures; -1 takes a random one."""
    file_precision: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Number format of the finished file."""


class LaunchSettings(Settings):
    launcher: Literal["local", "accelerate", "ray"] = "local"
    """Who starts the run: local (here), accelerate (as "accelerate config" was answered here) or ray (on a cluster)."""
    processes: int = Field(1, ge=1, le=64)
    """Processes that train together, each with a batch of its own and, where there are GPUs, a GPU of its own."""
    address: str = ""
    """Ray only: where its dashboard is, such as http://head:8265. Empty takes the one on this machine."""
    cores: int = Field(1, ge=1, le=1024)
    """Ray only: processor cores that each process asks for, beside a GPU unless model.device is cpu."""


class TrainConfig(Settings):
    """Everything a run needs. A run's config.toml is this, complete; it is itself a preset."""

    schema_version: Literal[1] = 1
    title: str = ""
    """A preset's title."""
    about: str = ""
    """A preset's sentence."""
    adapter: AnySpec = METHODS["lora"].spec()  # type: ignore[call-arg]  # each Spec fills in its own method
    """The method and its settings."""
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    prior: PriorSettings = PriorSettings()
    targets: TargetSettings = TargetSettings()
    training: TrainingSettings = TrainingSettings()
    embedding: EmbeddingSettings = EmbeddingSettings()
    output: OutputSettings = OutputSettings()
    launch: LaunchSettings = LaunchSettings()


Partial = Mapping[str, Any]  # Any: nested settings as TOML gives them


def settle(*layers: Partial) -> TrainConfig:
    """One total config from partial ones, later ones winning. Raises UserError with the place of each mistake.

    A layer that changes `adapter.method` starts that method's settings afresh.
    """
    total: dict[str, Any] = {}
    for layer in layers:
        total = _over(total, layer)
    if isinstance(total.get("adapter"), Mapping):
        total["adapter"] = {"method": "lora", **total["adapter"]}
    try:
        return TrainConfig.model_validate(total)
    except ValidationError as error:
        raise _told(error, total) from None


def _over(base: dict[str, Any], layer: Partial) -> dict[str, Any]:
    merged = dict(base)
    for key, value in layer.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            changes_method = "method" in value and value["method"] != old.get("method", "lora")
            merged[key] = dict(value) if key == "adapter" and changes_method else _over(dict(old), value)
        else:
            merged[key] = value
    return merged


def _told(error: ValidationError, given: Partial) -> UserError:
    """pydantic's complaint in a person's words, with the place and, for unknown keys, the nearest known one."""
    first = error.errors(include_url=False)[0]
    words = _place_of(first["loc"])
    place = ".".join(words)
    if first["type"] == "extra_forbidden":
        known = _known_keys(words[:-1], given)
        close = difflib.get_close_matches(words[-1], known, 1, 0.5)
        hint = f'Did you mean "{close[0]}"?' if close else f"Known here: {', '.join(known)}."
        where = f" in {'.'.join(words[:-1])}" if words[:-1] else ""
        return UserError(f'There is no setting called "{words[-1]}"{where}.', do=hint, place=place)
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        name = str((first.get("ctx") or {}).get("tag", ""))
        return unknown_name("method", name, METHODS, place=f"{place}.method")
    message = describe(first)
    return UserError(f"{place} {message}{'' if message.endswith('?') else '.'}", place=place)


def _place_of(loc: tuple[int | str, ...]) -> list[str]:
    """pydantic's path without what is not in the file: the method's name in a union, and a union's member type."""
    words: list[str] = []
    for number, word in enumerate(loc):
        is_tag = number > 0 and loc[number - 1] == "adapter" and word in METHODS
        is_type = isinstance(word, str) and (word in ("str", "float", "int") or "[" in word)
        if not is_tag and not is_type:
            words.append(str(word))
    return words


def _known_keys(path: Sequence[str], given: Partial) -> list[str]:
    """The settings that exist at a place."""
    model: type[BaseModel] = TrainConfig
    here: Any = given  # Any: nested settings as TOML gives them
    for word in path:
        here = here[int(word)] if isinstance(here, list) else here.get(word)
        if word == "adapter":
            method = here.get("method", "lora") if isinstance(here, Mapping) else "lora"
            model = METHODS[method].spec
        elif word in model.model_fields:
            annotation = model.model_fields[word].annotation
            inner = next((a for a in get_args(annotation) if isinstance(a, type)), annotation)
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                model = inner
    return list(model.model_fields)


def choose_seeds(config: TrainConfig) -> TrainConfig:
    """The settings with a number in the place of each seed of -1, which stands for a random one."""
    training, output = config.training, config.output
    if training.seed == -1:
        training = training.model_copy(update={"seed": secrets.randbelow(2**31)})
    if output.sample_seed == -1:
        output = output.model_copy(update={"sample_seed": secrets.randbelow(2**30)})
    return config.model_copy(update={"training": training, "output": output})


def parse_set(assignments: Sequence[str]) -> dict[str, Any]:
    """`["adapter.rank=8", "data.flip=true"]` -> nested overrides. Values are TOML; anything else is text."""
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise UserError(f'"{assignment}" sets nothing.', do='Write it as key=value, such as "adapter.rank=8".')
        try:
            parsed = tomllib.loads(f"value = {text.strip()}")
            value = parsed["value"] if len(parsed) == 1 else text.strip()
        except tomllib.TOMLDecodeError:
            value = text.strip()
        spot = overrides
        *groups, last = key.strip().split(".")
        for group in groups:
            spot = spot.setdefault(group, {})
            if not isinstance(spot, dict):
                raise UserError(
                    f'"{assignment}" cannot be set.', f"{group} was given a value before.", place=key.strip()
                )
        spot[last] = value
    return overrides


def read_settings(file: Path) -> dict[str, Any]:
    """Read the partial settings in a TOML file: UTF-8 as TOML demands, or UTF-16 with its mark as Windows writes it.

    Raises UserError when it is missing, not TOML, or in another encoding.
    """
    try:
        raw = file.read_bytes()
        return tomllib.loads(raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"))
    except OSError as error:
        raise UserError(f"The settings file {file} cannot be read.", str(error.strerror), "Check the path.") from None
    except UnicodeDecodeError:
        raise UserError(
            f"{file.name} is not a settings file.", "It is not UTF-8 text.", "Save it as UTF-8 in a text editor."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(
            f"{file.name} is not a settings file.", f"It is not TOML: {error}.", "Mend or replace it."
        ) from None


def adapter_name(config: TrainConfig) -> str:
    """What the finished adapter is called: the name given, else trigger, class word and method."""
    words = (config.data.trigger, config.data.class_word, config.adapter.method)
    return config.output.name or " ".join(word for word in words if word)


def find_preset(name: str) -> dict[str, Any]:
    """A preset by its name, or by the path of a .toml file."""
    if name.endswith(".toml"):
        return read_settings(Path(name).expanduser())
    if name not in preset_names():
        raise unknown_name("preset", name, preset_names(), place="preset")
    return read_settings(PRESETS / f"{name}.toml")


def preset_names() -> list[str]:
    """The names of the bundled presets. No name leads out of their folder."""
    return sorted(preset.stem for preset in PRESETS.glob("*.toml"))


def to_toml(config: TrainConfig) -> str:
    """The complete settings as TOML, every one with its help as a comment. Reads back to an equal config."""
    document = tomlkit.document()
    values = json.loads(config.model_dump_json(exclude_none=True))  # TOML has no null: what is not given is left out
    for name in ("schema_version", "title", "about"):
        document.add(name, tomlkit.item(values[name]))
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            document.add(tomlkit.nl())
            document.add(name, _table(value, values[name]))
    return tomlkit.dumps(document)


def _table(settings: BaseModel, values: dict[str, Any]) -> Any:  # Any: tomlkit's table type is private
    table = tomlkit.table()
    for name, field in type(settings).model_fields.items():
        if field.description:
            table.add(tomlkit.comment(field.description))
        table.add(name, tomlkit.item(values[name]))
    return table


def spec_of(method: str, **settings: Any) -> Spec:  # Any: each method's own fields
    """A method's Spec from settings by name."""
    return TypeAdapter(AnySpec).validate_python({"method": method, **settings})
