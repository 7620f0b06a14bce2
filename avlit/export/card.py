"""The README.md and the metadata of an export: what it is, what it belongs to, how it was trained, how to load it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from avlit.adapters import AdapterState

LOADING = {
    "diffusers": ('pipeline.load_lora_weights("{folder}")  # or pipeline.transformer.load_lora_adapter("{folder}")'),
    "peft": 'model = PeftModel.from_pretrained(model, "{folder}")  # model: the recipe\'s network, of avlit',
    "comfyui": "# put {file} into ComfyUI/models/loras and choose it in a LoRA loader for the model alone",
    "model": 'transformer = {class_name}.from_pretrained("{folder}")',
}


@dataclass(frozen=True)
class Origin:
    """What an export comes from.

    base_model: fingerprint of what an adapter stands on, or of released weights. training: facts, in words, by name.
    """

    version: str
    recipe: str
    run: str
    step: int
    base_model: str
    licence: str
    state: AdapterState | None
    parts: tuple[str, ...] = ()
    training: Mapping[str, str] = field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, str]:
        """For the head of a safetensors file, texts only."""
        known = {
            "format": "pt", "avlit_version": self.version, "recipe": self.recipe, "run": self.run,
            "step": str(self.step), "base_model_fingerprint": self.base_model, "licence": self.licence,
        }  # fmt: skip
        if self.state is not None:
            known |= {
                "adapter": self.state.kind, "rank": str(self.state.rank), "alpha": f"{self.state.alpha:g}",
                "modality": ",".join(self.parts),
            }  # fmt: skip
        return known | {f"training.{name}": text for name, text in self.training.items()}


def model_card(origin: Origin, *, layout: str, file: str, class_name: str, checked: str) -> str:
    """README.md in the form that model hubs read. checked: what was found when the file was read again."""
    what = "Model" if origin.state is None else {"lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA"}[origin.state.kind]
    library = {"comfyui": "comfyui", "peft": "peft"}.get(layout, "diffusers")
    loading = LOADING[layout].format(folder=".", file=file, class_name=class_name)
    rows = {
        "Base model's fingerprint": origin.base_model or "none: trained from scratch",
        "Recipe": origin.recipe,
        "Run and step": f"{origin.run}, {origin.step}",
        "avlit": origin.version,
        "Licence": origin.licence,
    }
    if origin.state is not None:
        rows |= {
            "Rank and alpha": f"{origin.state.rank}, {origin.state.alpha:g}",
            "Adapts": ", ".join(f"{len(origin.state.layers[part])} layers of {part}" for part in origin.parts),
        }
    rows |= {name.replace("_", " ").capitalize(): text for name, text in origin.training.items()}
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    return f"""---
library_name: {library}
license: {origin.licence if origin.licence.replace("-", "").replace(".", "").isalnum() else "other"}
tags: [avlit, {"lora, " if origin.state is not None else ""}video, audio]
---

# {what} of {origin.recipe}

| | |
| --- | --- |
{table}

```
{loading}
```

{checked}
"""
