"""A user who has torch and transformers and no moefuse, with several students.

Arguments: a directory to write to, and students. Leaves what each computes, and computes again when
saved and loaded, in ``NAME.safetensors``.
"""

import sys
from pathlib import Path

# Of moefuse nothing at all can be imported from here on.
sys.modules["moefuse"] = None  # type: ignore[assignment]

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

IDS_BS = torch.randint(2, 64, (2, 11), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def main(out: Path, students: list[Path]) -> None:
    """Use every student and write down what it computes."""
    for student in students:
        model, found = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            student, trust_remote_code=True, output_loading_info=True
        )
        assert not any(found.values()), found
        assert type(model).__module__.startswith("transformers_modules"), type(model)
        told = {"logits": model(IDS_BS).logits}
        told["greedy"] = model.generate(IDS_BS, max_new_tokens=7, do_sample=False)
        model.save_pretrained(out / f"{student.name}-saved")
        again = AutoModelForCausalLM.from_pretrained(
            out / f"{student.name}-saved", trust_remote_code=True
        )
        told["again"] = again(IDS_BS).logits
        save_file(told, out / f"{student.name}.safetensors")
    assert not any(name.startswith("moefuse.") for name in sys.modules)


main(Path(sys.argv[1]), [Path(path) for path in sys.argv[2:]])
