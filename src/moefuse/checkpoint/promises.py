"""Whether a checkpoint's tensors are what its configuration promises, from headers alone."""

from moefuse.checkpoint.formats import known_formats, quantization_method
from moefuse.checkpoint.headers import CheckpointHeaders
from moefuse.checkpoint.tensor_info import TensorInfo
from moefuse.errors import UserError
from moefuse.families import Family, MoeShape

PLAIN_FLOATS = frozenset({"BF16", "F16", "F32", "F64"})


def check_experts(headers: CheckpointHeaders, family: Family, shape: MoeShape) -> None:
    """Raise ``UserError`` unless every routed expert is there, in one dtype and the right shape.

    Experts with biases are refused where the family's have none.
    """
    routed = tuple(prefix for layer in shape.layers for prefix in family.routed_prefixes(layer))
    biased = [n for n in headers.tensors if n.endswith("bias") and n.startswith(routed)]
    if biased and not shape.biased:
        raise UserError(
            f"The routed experts in {headers.source} have biases ({biased[0]!r}), which those of "
            f"{family.model_type} models do not have; give the checkpoint as it was published."
        )
    for layer in shape.layers:
        dtypes: set[str] = set()
        for name, wanted in family.expert_tensors(layer, shape).items():
            tensor = headers.tensors.get(name)
            if tensor is None:
                raise _missing_expert(headers, family, name)
            if tensor.shape != wanted:
                raise _misshapen_expert(headers, tensor, wanted)
            dtypes.add(tensor.dtype)
        if len(dtypes) > 1:
            raise UserError(
                f"The routed experts of layer {layer} in {headers.source} have several dtypes "
                f"({', '.join(sorted(dtypes))}); convert the checkpoint to one dtype first."
            )


def _missing_expert(headers: CheckpointHeaders, family: Family, name: str) -> UserError:
    method = quantization_method(headers.config)
    if method:
        return UserError(
            f"{headers.source} is quantised with {method} and lacks the tensor {name!r}; moefuse "
            f"reads {known_formats()}. Start from the checkpoint that was not quantised."
        )
    return UserError(
        f"{headers.source} lacks the tensor {name!r}, which its config.json promises; check "
        f"{family.experts_count_key!r} and the layer count there, or download the checkpoint again."
    )


def _misshapen_expert(
    headers: CheckpointHeaders, tensor: TensorInfo, wanted: tuple[int, ...]
) -> UserError:
    return UserError(
        f"The tensor {tensor.name!r} in {headers.source} has the shape {list(tensor.shape)}, but "
        f"its config.json means {list(wanted)}; configuration and weights are of different models."
    )


def check_plain_floats(headers: CheckpointHeaders) -> None:
    """Raise ``UserError`` for weights whose numbers mean nothing without their scales."""
    for tensor in headers.tensors.values():
        # Integers under other names (counters, positions) are buffers, not weights.
        if tensor.name.endswith(".weight") and tensor.dtype not in PLAIN_FLOATS:
            method = quantization_method(headers.config)
            how = f" with {method}" if method else ""
            raise UserError(
                f"{headers.source} is quantised{how}: {tensor.name!r} is stored as {tensor.dtype}; "
                f"moefuse reads {known_formats()}. Convert the checkpoint to bfloat16 first."
            )
