"""A user who has torch and transformers and no moefuse, run by the ``stranger`` fixture.

Arguments: a directory to write to, the student, and the student saved again. Leaves what was seen
in ``facts.json`` and ``tensors.safetensors``, and a copy of the student, saved, in ``saved``.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class NoMoefuse:
    """An import hook, asked before all others, for which moefuse does not exist."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "moefuse":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NoMoefuse)  # type: ignore[arg-type]

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
)


def refusal(do: Callable[[], object]) -> str | None:
    """Return what ``do`` raises, or None when it raises nothing."""
    try:
        do()
    except Exception as error:  # whatever it is, the test judges it
        return f"{type(error).__name__}: {error}"
    return None


def import_moefuse() -> None:
    """Try what must not work."""
    import moefuse  # noqa: F401


@torch.no_grad()
def logits(path: Path, ids_BS: torch.Tensor, **options: Any) -> torch.Tensor:
    """Load a student and return its logits."""
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **options)
    return model(ids_BS).logits


def main(out: Path, student: Path, saved_again: Path) -> None:
    """See and write down."""
    ids_BS = torch.tensor(json.loads((out / "ids.json").read_text()))
    facts: dict[str, Any] = {"import moefuse": refusal(import_moefuse)}
    tensors: dict[str, torch.Tensor] = {}
    config = AutoConfig.from_pretrained(student, trust_remote_code=True)
    facts["config"] = {"class": type(config).__name__, "model_type": config.model_type}
    base = AutoModel.from_pretrained(student, trust_remote_code=True)
    model, found = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
        student, trust_remote_code=True, output_loading_info=True
    )
    facts["found"] = {key: sorted(map(str, value)) for key, value in found.items() if value}
    for name, loaded in (("base", base), ("causal", model)):
        modules = [module for module in loaded.modules() if hasattr(module, "group_of_expert")]
        facts[name] = {
            "class": type(loaded).__name__,
            "from": type(loaded).__module__.partition(".")[0],
            "fused": [type(module).__module__.partition(".")[0] for module in modules],
            "dtype": str(loaded.dtype),
            "training": loaded.training,
        }
    with torch.no_grad():
        tensors["hidden"] = base(ids_BS).last_hidden_state
        tensors["logits"] = model(ids_BS).logits
        tensors["greedy"] = model.generate(ids_BS, max_new_tokens=9, do_sample=False)
        tensors["beams"] = model.generate(ids_BS, max_new_tokens=9, num_beams=3, do_sample=False)
    model.save_pretrained(out / "saved")
    for name, path in (("saved", out / "saved"), ("saved again", saved_again)):
        tensors[f"logits, {name}"] = logits(path, ids_BS)
        hidden = AutoModel.from_pretrained(path, trust_remote_code=True)(ids_BS).last_hidden_state
        tensors[f"hidden, {name}"] = hidden.detach()
    tensors["logits, bf16"] = logits(student, ids_BS, dtype=torch.bfloat16)
    facts["refusals"] = {
        f"{auto.__name__}, {options}": refusal(
            lambda a=auto, o=options: a.from_pretrained(student, **o)
        )
        for auto in (AutoConfig, AutoModel, AutoModelForCausalLM)
        for options in ({}, {"trust_remote_code": False})
    }
    facts["tokenizer"] = refusal(lambda: AutoTokenizer.from_pretrained(student))
    facts["moefuse modules"] = [name for name in sys.modules if name.split(".")[0] == "moefuse"]
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, out / "tensors.safetensors"
    )
    (out / "facts.json").write_text(json.dumps(facts))


main(*map(Path, sys.argv[1:]))
