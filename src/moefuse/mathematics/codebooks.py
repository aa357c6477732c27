"""Codebooks: a few vectors that stand for many.

Vector quantisation (Gersho and Gray, 1992): neighbours are coded together, which at 1 and 2 bits a
number errs less than rounding each alone, and codes of one byte need no unpacking.

Shape suffixes: N vectors, V numbers in a vector, C entries of a codebook; L levels, which are
entries of one number, and B bounds between and around them.
"""

import torch
from torch import Tensor

AT_ONCE = 65_536
"""Vectors whose distances to all entries are in memory together."""
FITTED_TO = 65_536
"""Vectors, spread over all, that a codebook is fitted to."""


def nearest(vector_NV: Tensor, codebook_CV: Tensor) -> Tensor:
    """Return the number of every vector's nearest entry, (N,) int64.

    ``vector_NV`` (N, V) and ``codebook_CV`` (C, V) are floats of one dtype on one device.
    """
    half_C = codebook_CV.square().sum(-1) / 2
    parts = [(part @ codebook_CV.T - half_C).argmax(-1) for part in vector_NV.split(AT_ONCE)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long, device=half_C.device)


def fit_codebook(vector_NV: Tensor, entries: int, *, rounds: int = 12) -> Tensor:
    """Return a codebook, (entries, V), by Lloyd's algorithm (1982); deterministic.

    It starts from vectors spread over all, and single numbers as ``fit_levels`` does; entries that
    no vector is nearest to stay in place. ``vector_NV`` (N, V) holds at least one vector.
    """
    sample_NV = _spread(vector_NV, FITTED_TO)
    if vector_NV.shape[1] == 1:
        return fit_levels(sample_NV.flatten(), entries, rounds=rounds).unsqueeze(-1)
    codebook_CV = _spread(sample_NV, entries)
    if len(codebook_CV) < entries:
        missing = entries - len(codebook_CV)
        codebook_CV = torch.cat([codebook_CV, codebook_CV.new_zeros(missing, vector_NV.shape[1])])
    for _ in range(rounds):
        code_N = nearest(sample_NV, codebook_CV)
        sum_CV = torch.zeros_like(codebook_CV).index_add(0, code_N, sample_NV)
        count_C1 = torch.bincount(code_N, minlength=entries).unsqueeze(-1)
        codebook_CV = torch.where(count_C1 > 0, sum_CV / count_C1.clamp_min(1), codebook_CV)
    return codebook_CV


def fit_levels(value_N: Tensor, levels: int, *, rounds: int = 12) -> Tensor:
    """Return numbers, (levels,) in order, that are near to all of ``value_N`` (N,), fp32.

    Where there are many levels, the best ones lie as densely as the cube root of the values'
    density (Panter and Dite, 1951); from there Lloyd's algorithm goes on. Started from the values
    themselves, which are few in the tails, it erred six times as much with 256 levels.
    """
    sorted_N = value_N.sort().values
    distinct_D = sorted_N.unique_consecutive()
    if len(distinct_D) <= levels:
        return torch.cat([distinct_D, distinct_D[-1:].expand(levels - len(distinct_D))])
    level_L = _by_density(sorted_N, levels)
    sum_N = torch.nn.functional.pad(sorted_N.double().cumsum(0), (1, 0))
    ends = torch.tensor([0, len(sorted_N)], device=value_N.device)
    for _ in range(rounds):
        between_B = torch.searchsorted(sorted_N, (level_L[1:] + level_L[:-1]) / 2)
        bound_B = torch.cat([ends[:1], between_B, ends[1:]])
        count_L, total_L = bound_B.diff(), sum_N[bound_B].diff()
        mean_L = (total_L / count_L.clamp_min(1)).to(level_L.dtype)
        level_L = torch.where(count_L > 0, mean_L, level_L)
    return level_L


def _by_density(sorted_N: Tensor, levels: int) -> Tensor:
    """Place levels as densely as the cube root of the values' density; N is at least 2.

    Between neighbours at a distance d the density is 1 / d, so that stretch counts d to 2/3.
    """
    share_N = torch.nn.functional.pad(sorted_N.double().diff().pow(2 / 3).cumsum(0), (1, 0))
    wanted_L = (torch.arange(levels, device=sorted_N.device) + 0.5) / levels * share_N[-1]
    above_L = torch.searchsorted(share_N, wanted_L)
    within_L = (wanted_L - share_N[above_L - 1]) / (share_N[above_L] - share_N[above_L - 1])
    return torch.lerp(sorted_N[above_L - 1], sorted_N[above_L], within_L.to(sorted_N.dtype))


def _spread(vector_NV: Tensor, count: int) -> Tensor:
    """Return ``count`` vectors, or all where there are fewer: one drawn from each equal stretch.

    At equal distances all could come from the same few places of their rows.
    """
    if len(vector_NV) <= count:
        return vector_NV
    drawn = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    places = (torch.arange(count) + drawn) * len(vector_NV) / count
    return vector_NV[places.long().clamp_max(len(vector_NV) - 1).to(vector_NV.device)]


def pack_codes(code_C: Tensor, code_bits: int) -> Tensor:
    """Return codes (..., C) as bytes (..., B): 8 bits as they are, 6 bits four in three bytes.

    The inverse of ``unpack_codes`` in the modelling file.
    """
    if code_bits == 8:
        return code_C.to(torch.uint8)
    count = code_C.shape[-1]
    padded = torch.nn.functional.pad(code_C.long(), (0, -count % 4)).unflatten(-1, (-1, 4))
    word = (padded << torch.arange(0, 24, 6, device=padded.device)).sum(-1)
    packed = torch.stack([(word >> shift) & 255 for shift in (0, 8, 16)], -1).flatten(-2)
    return packed[..., : -(-count * 6 // 8)].to(torch.uint8)
