"""A checkpoint as a GGUF file, written tensor by tensor, in order, one in memory at a time.

This is the one file that imports the ``gguf`` package (extra ``gguf``). Quantising to what numpy
cannot make (``Q4_K_M`` and its like) is llama.cpp's own work, see ``quantize``.
"""

import copy
import importlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from moefuse import artifacts
from moefuse.checkpoint.headers import CONFIG
from moefuse.checkpoint.reader import CheckpointReader
from moefuse.console import track
from moefuse.errors import UserError
from moefuse.export.gguf import quantize
from moefuse.export.gguf.fused import FusedLayout, check_shared
from moefuse.export.gguf.tensors import Layout, Piece
from moefuse.export.gguf.vocabulary import Vocabulary, read_vocabulary
from moefuse.export.student_reader import StudentReader
from moefuse.families import Family
from moefuse.families._gguf import Gguf
from moefuse.modeling import is_fused, register_fused
from moefuse.places import check_place

PLAIN = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}
"""What is written here, with the engine's number of the file type."""
BLOCK = 32
"""Numbers that share a scale in Q8_0."""
STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class GgufResult:
    """Where the file is, its bytes, how its numbers are stored and how text is cut.

    ``kinds`` are the bytes of tensors by how they are stored: the engine has another kind for rows
    that the one asked for cannot take. ``fused`` says that the patched engine is needed.
    """

    out: Path
    bytes: int
    quant: str
    kinds: dict[str, int]
    pre_tokenizer: str
    fused: bool

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "out": str(self.out)}


def export_gguf(
    checkpoint: str | Path,
    out: str | Path,
    *,
    quant: str = "auto",
    pre_tokenizer: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> GgufResult:
    """Write a checkpoint (directory or hub id) as the GGUF file ``out``.

    A fused student's keeps its bases shared, and needs the engine that ``make llama-cpp`` builds.
    ``quant`` is auto (as stored), F32, F16, BF16, Q8_0, or whatever llama.cpp quantises to, such
    as Q4_K_M, for which llama-cpp-python must be installed; a fused student's deltas, scales and
    biases are in F16 where its bases are quantised. Raises ``UserError`` before any work for what
    llama.cpp cannot run.
    """
    out = Path(out)
    _check_out(out, overwrite=overwrite)
    gguf = _package()
    reader = _open(checkpoint, trust_remote_code=trust_remote_code)
    quant = STORED.get(reader.dtype, "F32") if quant == "auto" else quant.upper()
    if quant not in PLAIN:
        quantize.check_available(quant, PLAIN, (kind.name for kind in gguf.LlamaFileType))
    form, settings = form_of(reader), settings_of(reader.family, reader.config)
    check_can_run(reader, form, settings)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        reader.directory, trust_remote_code=trust_remote_code
    )
    vocabulary = read_vocabulary(reader.directory, tokenizer, settings["vocab_size"], pre_tokenizer)
    names = gguf.get_tensor_name_map(_architecture(gguf, form), settings["num_hidden_layers"])
    layout = _layout(reader, form, settings, names.get_name)
    facts = metadata(reader, form, settings)
    plain = quant if quant in PLAIN else STORED.get(reader.dtype, "F32")
    own = quant if quant in STORED.values() else "F16"

    def write(path: Path) -> None:
        _write(path, gguf, facts, vocabulary, layout, plain, own)

    if quant in PLAIN:
        artifacts.write_atomically(out, write)
    else:
        whole = out.with_name(f"{out.name}.{plain}{artifacts.TEMPORARY_SUFFIX}")
        try:
            write(whole)
            artifacts.write_atomically(out, lambda path: quantize.quantize(whole, path, quant))
        finally:
            whole.unlink(missing_ok=True)
    kinds = stored_kinds(gguf, out)
    fused = isinstance(layout, FusedLayout)
    return GgufResult(out, out.stat().st_size, quant, kinds, vocabulary.pre, fused)


def _check_out(out: Path, *, overwrite: bool) -> None:
    check_place(out.parent)
    if out.suffix != ".gguf":
        raise UserError(f"{out} is no name of a GGUF file; give one that ends in .gguf.")
    if out.is_dir() or (out.exists() and not overwrite):
        raise UserError(f"{out} exists already; choose another name or pass --overwrite.")


def _package() -> Any:
    try:
        return importlib.import_module("gguf")  # an extra
    except ImportError as error:
        raise UserError(
            "Writing GGUF files needs the gguf package; install it with: "
            'pip install "moefuse[gguf]".'
        ) from error


def _open(checkpoint: str | Path, *, trust_remote_code: bool) -> CheckpointReader:
    path = Path(checkpoint) / CONFIG
    config = artifacts.read_json(path) if path.is_file() else {}
    if is_fused(config):
        student = StudentReader.of(path.parent)
        check_shared(student)
        register_fused(config)  # its tokenizer is asked for by the model's type
        return student
    return CheckpointReader.open(checkpoint, trust_remote_code=trust_remote_code)


def _layout(
    reader: CheckpointReader,
    form: Gguf,
    settings: dict[str, Any],
    rename: Callable[[str], str | None],
) -> Layout:
    if isinstance(reader, StudentReader):
        return FusedLayout(reader, form, settings, rename)
    return Layout(reader, form, settings, rename)


def form_of(reader: CheckpointReader) -> Gguf:
    """Return how llama.cpp runs the checkpoint's family; raises ``UserError`` where it is told
    nowhere here."""
    if reader.family.gguf is None:
        raise UserError(
            f"No GGUF files are written for the family {reader.family.model_type!r}; use "
            "llama.cpp's own converter if it knows the family."
        )
    return reader.family.gguf


def settings_of(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with all defaults of Transformers filled in."""
    native = getattr(transformers, family.config_class)
    return native.from_dict(copy.deepcopy(dict(config))).to_dict()


def check_can_run(reader: CheckpointReader, form: Gguf, settings: Mapping[str, Any]) -> None:
    """Raise ``UserError`` with the reason for a model that llama.cpp does not load or run right."""
    reason = form.objection(settings) or _general_objection(reader, form, settings)
    if reason is not None:
        raise UserError(f"llama.cpp cannot run {reader.source}: {reason}.")


def _general_objection(
    reader: CheckpointReader, form: Gguf, settings: Mapping[str, Any]
) -> str | None:
    layers = reader.shape.layers
    count = settings["num_hidden_layers"]
    if settings.get("hidden_act", "silu") != "silu":
        return f"its experts are silu's, not those of {settings['hidden_act']!r}"
    first = layers[0] if form.leading_dense else 0
    if layers != tuple(range(first, count)):
        return "it wants experts in every layer, and this model has dense ones between"
    told = settings.get("norm_topk_prob")
    if form.normalises is not None and told is not None and told != form.normalises:
        does = "always makes" if form.normalises else "never makes"
        return f"it {does} the chosen experts' weights sum to 1, and norm_topk_prob is {told}"
    if any(reader.family.window(settings, layer) for layer in range(count)):
        return "a sliding window is not written here"
    return _rope_objection(settings.get("rope_parameters") or {})


def _rope_objection(rope: Mapping[str, Any]) -> str | None:
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn"):
        return f"rotary embeddings scaled by {kind!r} are not written here"
    if rope.get("attention_factor") is not None:
        return "an attention_factor of rope_scaling is not written here"
    return None


def metadata(reader: CheckpointReader, form: Gguf, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the file says of the model, by key without the architecture's name."""
    rope = settings.get("rope_parameters") or {}
    heads = settings["num_attention_heads"]
    width = settings.get("head_dim") or settings["hidden_size"] // heads
    return {
        "block_count": settings["num_hidden_layers"],
        "context_length": settings["max_position_embeddings"],
        "embedding_length": settings["hidden_size"],
        "feed_forward_length": settings["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": settings.get("num_key_value_heads") or heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(settings.get("rms_norm_eps", 1e-6)),
        "expert_count": reader.shape.experts,
        "expert_used_count": reader.shape.top_k,
        "vocab_size": settings["vocab_size"],
        "rope.freq_base": float(rope.get("rope_theta", 10_000.0)),
        "rope.dimension_count": width,
        **_scaling(rope),
        **form.facts(settings),
    }


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Say how rotary embeddings are stretched (YaRN, arXiv:2309.00071)."""
    if rope.get("rope_type", "default") == "default":
        return {}
    told = {
        "rope.scaling.type": rope["rope_type"],
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": rope.get("original_max_position_embeddings"),
        "rope.scaling.yarn_beta_fast": rope.get("beta_fast"),
        "rope.scaling.yarn_beta_slow": rope.get("beta_slow"),
    }
    whole = ("rope.scaling.type", "rope.scaling.original_context_length")
    return {
        key: value if key in whole else float(value)
        for key, value in told.items()
        if value is not None
    }


def _architecture(gguf: Any, form: Gguf) -> Any:
    """Return the gguf package's own key of an architecture."""
    return next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == form.architecture)


def _write(
    path: Path,
    gguf: Any,
    facts: Mapping[str, Any],
    vocabulary: Vocabulary,
    layout: Layout,
    quant: str,
    own: str,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    architecture = layout.form.architecture
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("model")
    writer.add_name(layout.reader.directory.name)
    writer.add_file_type(PLAIN[quant])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in facts.items():
        _add(writer, f"{architecture}.{key}", value)
    for key, value in layout.keys.items():
        _add(writer, key, value)
    _add_vocabulary(writer, vocabulary)
    pieces = list(layout.pieces())
    kinds = [gguf.GGMLQuantizationType[kind_of(piece, quant, own)] for piece in pieces]
    for piece, kind in zip(pieces, kinds, strict=True):
        _announce(writer, gguf, piece, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for piece, kind in track(list(zip(pieces, kinds, strict=True)), "Write"):
            writer.write_tensor_data(_stored(gguf, piece.make(), kind))
    finally:
        writer.close()


def _stored(gguf: Any, numbers: Tensor, kind: Any) -> np.ndarray:
    if kind.name == "I32":
        return numbers.int().numpy()
    return gguf.quants.quantize(numbers.float().contiguous().numpy(), kind)


def kind_of(piece: Piece, quant: str, own: str) -> str:
    """Return how one tensor is stored: vectors and routers in F32, and F16 where blocks do not fit.

    The engine computes routers in F32, and a rounded router chooses other experts. ``own`` is how
    that is stored which is one expert's beside shared bases.
    """
    if piece.kind is not None:
        return piece.kind
    if piece.own:
        return own
    if len(piece.shape) == 1 or "ffn_gate_inp" in piece.name:
        return "F32"
    if quant == "Q8_0" and piece.shape[-1] % BLOCK:
        return "F16"
    return quant


def _announce(writer: Any, gguf: Any, piece: Piece, kind: Any) -> None:
    """Tell the writer what is to come: it wants shapes of quantised tensors in bytes."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    row = piece.shape[-1] // block * size
    count = 1
    for length in piece.shape[:-1]:
        count *= length
    known = {"F32": "float32", "F16": "float16", "I32": "int32"}
    plain = known.get(kind.name, "uint8")
    shape = piece.shape if kind.name in known else (*piece.shape[:-1], row)
    writer.add_tensor_info(
        piece.name,
        shape,
        np.dtype(plain),
        count * row,
        raw_dtype=None if kind.name in known else kind,
    )


def _add(writer: Any, key: str, value: Any) -> None:
    """Add one fact in the type that the engine reads: whole numbers are unsigned."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    for key, value in vocabulary.special.items():
        _add(writer, f"tokenizer.{key}", value)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def stored_kinds(gguf: Any, path: Path) -> dict[str, int]:
    """Return the bytes of a file's tensors by how they are stored, most bytes first."""
    found: Counter[str] = Counter()
    for tensor in gguf.GGUFReader(path).tensors:
        found[tensor.tensor_type.name] += int(tensor.n_bytes)
    return dict(found.most_common())


def render_gguf(result: GgufResult) -> str:
    """Say in a few lines what was written."""
    kinds = ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in result.kinds.items())
    told = (
        f"{result.out}: {result.bytes / 1e6:.1f} MB, {result.quant} (stored as {kinds}), "
        f"pre-tokenizer {result.pre_tokenizer!r}."
    )
    needs = (
        "Its bases are shared, which llama.cpp runs with moefuse's patch: 'make llama-cpp' in "
        "moefuse's repository builds it."
    )
    return f"{told}\n{needs}" if result.fused else told
