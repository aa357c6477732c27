"""A small trained Mixture-of-Experts model and texts, for trying moefuse without a download."""

from pathlib import Path

_ROOT = Path(__file__).resolve().parent


def teacher_path() -> Path:
    """Folder of the bundled teacher, a Hugging Face checkpoint (DeepSeek-V2 architecture, bf16)."""
    return _ROOT / "teacher"


def calibration_path() -> Path:
    """JSON Lines of calibration texts: {"text", "source", "kind"}, cut from training documents."""
    return _ROOT / "data" / "calibration.jsonl"


def heldout_path() -> Path:
    """JSON Lines of held-out texts, same fields, from modules the teacher never trained on."""
    return _ROOT / "data" / "heldout.jsonl"
