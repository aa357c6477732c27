"""Text models that were published as a part of models which read more than text."""

from pathlib import Path

import torch
from numeric import assert_close
from running import write_text
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from moefuse.checkpoint.headers import read_shard_header
from moefuse.export.expand import expand
from moefuse.modeling import load_fused
from moefuse.pipeline import fuse

FAMILY, WHOLE = "qwen3_5_moe_text", "model.language_model."
IDS_BS = torch.randint(2, 64, (2, 11), generator=torch.Generator().manual_seed(0))
QUICKLY = {"tokens": 256, "sequence_length": 64, "batch_size": 4, "steps": 0}


def stored_names(checkpoint: Path) -> set[str]:
    shards = checkpoint.glob("*.safetensors")
    return {tensor.name for shard in shards for tensor in read_shard_header(shard, shard.name)}


def test_names_of_the_whole_are_read_and_written(tmp_path: Path) -> None:
    """As Transformers itself saves the text model of a published checkpoint that it has loaded."""
    save_tiny(tmp_path / "text", FAMILY, max_shard_size="1GB")
    shard = tmp_path / "text/model.safetensors"
    tensors = {n.replace("model.", WHOLE, 1): t for n, t in load_file(shard).items()}
    save_file(tensors, shard, metadata={"format": "pt"})
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    teacher.save_pretrained(tmp_path / "text")
    assert f"{WHOLE}embed_tokens.weight" in stored_names(tmp_path / "text")

    data = str(write_text(tmp_path / "text.txt"))
    fuse(tmp_path / "text", tmp_path / "student", {**QUICKLY, "data": data, "groups": 3, "rank": 2})
    expand(tmp_path / "student", tmp_path / "plain")

    # ExLlamaV3 asks for these names.
    assert stored_names(tmp_path / "plain") == stored_names(tmp_path / "text")
    plain, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", output_loading_info=True
    )
    assert not any(found.values()), found
    with torch.no_grad():
        assert_close(
            plain.eval()(IDS_BS).logits, load_fused(tmp_path / "student").eval()(IDS_BS).logits
        )
