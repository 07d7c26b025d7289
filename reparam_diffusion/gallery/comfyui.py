"""Reads the graph that ComfyUI writes into its images, as far as the nodes are of the usual kinds.

An image has the graph that was run ("prompt": nodes by their id) and the one that was shown ("workflow": a list of
nodes with the values of their widgets in order, and links between them).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from reparam_diffusion.errors import UserError
from reparam_diffusion.gallery.restore import Lora, Restored, build_recipe, find_scheduler

Node = Mapping[str, Any]
"""{"class_type": ..., "inputs": {name: a value, or [the id of another node, its output]}}. Any: JSON's own values."""
_DEEPEST = 60
_WIDGETS = {
    "KSampler": ("seed", "", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": ("", "noise_seed", "", "steps", "cfg", "sampler_name", "scheduler"),
    "CLIPTextEncode": ("text",),
    "EmptyLatentImage": ("width", "height"),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
    "CLIPSetLastLayer": ("stop_at_clip_layer",),
    "VAELoader": ("vae_name",),
}
"""The widgets of the usual nodes in their order; "" is one that is not needed."""
_SCALARS = ("value", "text", "string", "String", "seed", "int", "float", "Number", "Value", "string_a", "prompt")


def read_comfyui(text: str, *, is_workflow: bool) -> Restored:
    """The recipe in a graph. Raises UserError for a graph without a sampler, or without a prompt that can be read."""
    try:
        graph = json.loads(text)
        nodes = _nodes_of_workflow(graph) if is_workflow else dict(graph)
        found = _Graph({str(key): node for key, node in nodes.items() if isinstance(node, dict)})
        return found.read()
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError):
        raise UserError(
            "The ComfyUI workflow in this image cannot be read.", "It is damaged.", "Choose another image."
        ) from None


def _nodes_of_workflow(workflow: Any) -> dict[str, Node]:  # Any: JSON
    """The shown graph in the form of the one that was run."""
    origin = {link[0]: [str(link[1]), link[2]] for link in workflow["links"] if isinstance(link, list)}
    nodes: dict[str, Node] = {}
    for node in workflow["nodes"]:
        values = node.get("widgets_values") or []
        inputs: dict[str, Any] = dict(values) if isinstance(values, dict) else {}
        if isinstance(values, list):
            inputs |= dict(zip(_WIDGETS.get(node["type"], ()), values, strict=False))
            if node["type"] not in _WIDGETS and len(values) == 1:
                inputs["value"] = values[0]
        inputs |= {one["name"]: origin[one["link"]] for one in node.get("inputs") or [] if one.get("link") in origin}
        if node.get("mode") not in (2, 4):  # muted, bypassed
            nodes[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return nodes


class _Graph:
    """Nodes by their id, and what can be found by following their links."""

    def __init__(self, nodes: Mapping[str, Node]) -> None:
        self.nodes = nodes

    def read(self) -> Restored:
        samplers = [merged for node in self.nodes.values() if (merged := self._sampler(node)) is not None]
        if not samplers:
            raise UserError(
                "The ComfyUI workflow in this image cannot be used.",
                "It has no sampler of a known kind.",
                "Copy the prompt and the settings from ComfyUI.",
            )
        sampler = max(samplers, key=lambda one: "width" in one)  # the first that starts from noise
        notes = ["Read from a ComfyUI workflow: nodes other than prompt, sampler, size, model and LoRA are not used."]
        if len(samplers) > 1:
            notes.append(f"The workflow has {len(samplers)} samplers; only the first is used.")
        scheduler, note = find_scheduler(sampler.get("sampler_name"), sampler.get("scheduler"))
        loras, model = self._model_chain(sampler)
        if not sampler.get("prompt"):
            raise UserError(
                "The prompt of this image cannot be found.",
                "Its ComfyUI workflow has no prompt in a node of a known kind.",
                "Copy it from ComfyUI.",
            )
        values = {
            "prompt": sampler["prompt"],
            "negative": sampler.get("negative_text", ""),
            "seed": sampler.get("seed", sampler.get("noise_seed")),
            "steps": sampler.get("steps"),
            "guidance": sampler.get("cfg"),
            "scheduler": scheduler,
            "width": sampler.get("width"),
            "height": sampler.get("height"),
            "clip_skip": sampler.get("clip_skip", 0),
            "model": model,
        }
        if "width" not in sampler:
            notes.append("The image was made from another image, which is not in the file.")
        return build_recipe(values, loras=loras, notes=tuple(filter(None, [*notes, note])), unet_first=True)

    def _sampler(self, node: Node) -> dict[str, Any] | None:
        """A sampler's values with those of the nodes that guide it, texts and size included; None for other nodes."""
        inputs = self._inputs(node)
        if not ("positive" in inputs or "guider" in inputs) or "ampler" not in str(node.get("class_type")):
            return None
        for name in ("guider", "noise", "sampler", "sigmas"):
            other = self._follow(inputs.get(name))
            inputs = {**(self._inputs(other) if other else {}), **inputs}
        inputs.setdefault("positive", inputs.get("conditioning"))
        start = inputs.get("latent_image", inputs.get("latent"))
        merged = {name: value for name in inputs if (value := self._value(inputs[name])) is not None}
        for name in ("width", "height"):
            merged.pop(name, None)
        for node_of in self._walk(start):
            size = self._inputs(node_of)
            sides = [self._value(size.get(f"{kind}{side}")) for kind in ("", "empty_latent_") for side in _SIDES]
            first = [side for side in sides if isinstance(side, int)]
            if len(first) >= 2:
                merged |= {"width": first[0], "height": first[1]}
                break
        merged["prompt"] = self._text(inputs.get("positive"), "positive")
        merged["negative_text"] = self._text(inputs.get("negative"), "negative")
        for name in ("positive", "model", "clip"):
            merged[f"{name}_link"] = inputs.get(name)
        for part in self._walk(inputs.get("positive")):
            layer = self._value(self._inputs(part).get("stop_at_clip_layer"))
            if isinstance(layer, int) and -20 <= layer < 0:
                merged["clip_skip"] = -layer - 1
                break
        return merged

    def _model_chain(self, sampler: Mapping[str, Any]) -> tuple[tuple[Lora, ...], str]:
        """The LoRAs between the base model and the sampler, in their order, and the base model's name."""
        loras: list[Lora] = []
        name = ""
        for node in self._walk(sampler.get("model_link"), only=("model", "base_model", "lora_stack", "MODEL")):
            inputs = self._inputs(node)
            name = name or str(self._value(inputs.get("ckpt_name", inputs.get("unet_name"))) or "")
            if isinstance(lora := self._value(inputs.get("lora_name")), str) and lora != "None":
                weights = [
                    self._value(inputs.get(key)) for key in ("strength_model", "strength_clip", "lora_model_strength")
                ]
                model = weights[0] if weights[0] is not None else weights[2]
                loras.append(Lora(lora, 1.0 if model is None else model, weights[1]))
            for value in inputs.values():  # rgthree's Power Lora Loader
                if isinstance(value, dict) and value.get("on", True) and isinstance(value.get("lora"), str):
                    loras.append(Lora(value["lora"], value.get("strength", 1.0), value.get("strengthTwo")))
        return tuple(reversed(loras)), name.replace("\\", "/").split("/")[-1].removesuffix(".safetensors")

    def _text(self, link: Any, role: str) -> str:
        """The text of a prompt: a text, or that of the first node with one behind a link."""
        if isinstance(link, str):
            return link
        for node in self._walk(link, role=role):
            inputs = self._inputs(node)
            names = (
                (role, f"{role}_prompt", f"text_{role}") if role in inputs else ("text", "text_g", "text_l", "prompt")
            )
            for name in names:
                text = self._value(inputs.get(name))
                if isinstance(text, str) and text.strip():
                    return text
        return ""

    def _walk(self, link: Any, *, role: str = "", only: tuple[str, ...] = ()) -> Iterator[Node]:
        """The nodes behind a link, the nearest first. Where a node has both prompts only that of `role` is followed."""
        seen: set[str] = set()
        waiting = [link]
        while waiting and len(seen) < _DEEPEST * 10:
            link = waiting.pop(0)
            node = self._follow(link)
            if node is None or str(link[0]) in seen:
                continue
            seen.add(str(link[0]))
            yield node
            inputs = self._inputs(node)
            other = {"positive": "negative", "negative": "positive"}.get(role)
            waiting += [value for name, value in inputs.items() if name != other and (not only or name in only)]

    def _value(self, value: Any, depth: int = 0) -> Any:
        """A value, also behind links to nodes that only hold one; None where there is none."""
        if not isinstance(value, list):
            return value
        node = self._follow(value)
        if node is None or depth > _DEEPEST:
            return None
        inputs = self._inputs(node)
        return next((self._value(inputs[name], depth + 1) for name in _SCALARS if name in inputs), None)

    def _follow(self, link: Any) -> Node | None:
        """The node that a link leads to."""
        return self.nodes.get(str(link[0])) if isinstance(link, list) and len(link) == 2 else None

    @staticmethod
    def _inputs(node: Node) -> dict[str, Any]:
        inputs = node.get("inputs")
        return dict(inputs) if isinstance(inputs, dict) else {}


_SIDES = ("width", "height")
