"""Neuron experts in training: low-bit rows that learn, quantised in every step.

A coded row is trained as a latent row. Forward it is what its codes say; backward the gradient of
what the codes say goes straight through to the latent (Bengio et al., 2013), to the codebook's
entries and to the row's scale. Codes follow the latents, chosen anew every few steps. What comes
out at the end is stored as it was trained: packing loses nothing.

Shape suffixes: P parts (gate, up, down), M rows, I numbers in a row, N vectors, V numbers in one.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moefuse.mathematics.codebooks import fit_codebook, nearest, pack_codes
from moefuse.modeling.modeling_moefuse import (
    CodedLowRankDelta,
    CodedRows,
    Gating,
    NeuronExperts,
    OpaqueExperts,
)

CHOSEN_EVERY = 8
"""Steps after which codes are chosen anew."""


class TrainedRows(nn.Module):
    """The trainable twin of ``CodedRows``: ``latent`` (P, M, I) in units of each row's scale.

    ``code_N`` are the codes of all vectors, chosen anew every ``CHOSEN_EVERY`` steps.
    """

    code_N: Tensor

    def __init__(self, stored: CodedRows, latent_PMI: Tensor) -> None:
        super().__init__()
        self.stored = [stored]  # in a list, so that its buffers are not this module's own
        self.width = stored.width
        self.codebook = nn.Parameter(stored.codebook.detach().clone())
        self.scale = nn.Parameter(stored.scale.detach().clone())
        self.latent = nn.Parameter(latent_PMI / self.scale.detach().unsqueeze(-1))
        self.steps = 0
        self.automatic = True
        code_N = self._nearest(self._vectors().detach())
        # A buffer, so that what is saved in the midst of training goes on exactly.
        self.register_buffer("code_N", code_N.to(torch.uint8))
        self.whole_PMI: Tensor | None = None

    def _vectors(self) -> Tensor:
        return _vectors(self.latent, self.codebook.shape[1])

    @torch.no_grad()
    def _nearest(self, vector_NV: Tensor) -> Tensor:
        return nearest(vector_NV, self.codebook)

    def choose_codes(self) -> None:
        """Let the codes follow the latents; from now on they do so only when this is called."""
        self.automatic = False
        self.code_N.copy_(self._nearest(self._vectors()))

    def refresh(self) -> None:
        """Compute what all rows are in this step; outside training, what would be stored now."""
        vector_NV, code_N = self._vectors(), self.code_N
        if not torch.is_grad_enabled():
            code_N = self._nearest(vector_NV)
        elif self.automatic:
            if self.steps % CHOSEN_EVERY == 0:
                code_N.copy_(self._nearest(vector_NV))
            self.steps += 1
        entry_NV = nn.functional.embedding(code_N.int(), self.codebook)
        through_NV = entry_NV + (vector_NV - vector_NV.detach())
        parts, rows, width = self.latent.shape
        rows_PMI = through_NV.reshape(parts, rows, -1)[..., :width]
        self.whole_PMI = rows_PMI * self.scale.unsqueeze(-1)

    def read(self, start: int, stop: int) -> Tensor:
        """Return some of the rows as they are in this step."""
        assert self.whole_PMI is not None
        return self.whole_PMI[:, start:stop]

    def read_parts(self, part_U: Tensor | slice) -> Tensor:
        """Return all rows of some parts as they are in this step."""
        assert self.whole_PMI is not None
        return self.whole_PMI[part_U]

    @torch.no_grad()
    def packed(self) -> CodedRows:
        """Return the stored form with what was learnt."""
        stored = self.stored[0]
        stored.codebook.copy_(self.codebook)
        stored.scale.copy_(self.scale)
        store_codes(stored, self.latent.to(stored.scale.device))
        return stored


def _vectors(rows_PMI: Tensor, size: int) -> Tensor:
    """Cut rows into vectors of ``size`` neighbours, filled up with zeros: (N, V)."""
    padded = nn.functional.pad(rows_PMI, (0, -rows_PMI.shape[-1] % size))
    return padded.reshape(-1, size)


@torch.no_grad()
def store_codes(rows: CodedRows, normalised_PMI: Tensor) -> None:
    """Write the codes of rows that are in units of their scale, for the codebook that is there."""
    code_N = nearest(_vectors(normalised_PMI, rows.vector), rows.codebook.float())
    code_PMC = code_N.reshape(*normalised_PMI.shape[:2], rows.count)
    rows.codes.copy_(pack_codes(code_PMC, rows.code_bits))


@torch.no_grad()
def encode(rows: CodedRows, values_PMI: Tensor) -> None:
    """Store ``values_PMI`` (P, M, I), fp32, as nearly as the bits and the dtype of ``rows`` allow.

    The scale is each row's root mean square. Scales and codebook are rounded to that dtype before
    anything is measured by them.
    """
    # In fp64, because the squares of a dying neuron's numbers are below what fp32 can hold.
    mean_PM = values_PMI.double().square().mean(-1)
    rows.scale.copy_(mean_PM.sqrt().clamp_min(torch.finfo(rows.scale.dtype).tiny))
    normalised_PMI = values_PMI / rows.scale.float().unsqueeze(-1)
    vector_NV = _vectors(normalised_PMI, rows.vector)
    if len(vector_NV):
        rows.codebook.copy_(fit_codebook(vector_NV, len(rows.codebook)))
    store_codes(rows, normalised_PMI)


class TrainedLowRankDelta(CodedLowRankDelta):
    """The trainable twin of ``CodedLowRankDelta``: codes learn, scales and codebooks stay, so that
    what is stored of them in a narrower dtype than that of training stays exact."""

    def __init__(
        self, delta: CodedLowRankDelta, latents: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take over ``delta``; ``latents`` are the rows that its codes stand for, by name
        (``gate_up_in``, ...), each (E, R, width). None: what the codes say."""
        nn.Module.__init__(self)
        self.delta = [delta]
        for name, rows in delta.named_children():
            latent_ERI = rows.read_parts(slice(None)) if latents is None else latents[name]  # type: ignore[operator]
            twin = TrainedRows(rows, latent_ERI.detach())  # type: ignore[arg-type]
            twin.codebook.requires_grad_(False)
            twin.scale.requires_grad_(False)
            self.add_module(name, twin)

    def gate_up(self, x_ND: Tensor, rows_per_expert: list[int]) -> Tensor:
        """Return what the deltas add to gate and up, quantised as it would be stored."""
        self._refresh("gate_up")
        return super().gate_up(x_ND, rows_per_expert)

    def down(self, z_NF: Tensor, rows_per_expert: list[int]) -> Tensor:
        """Return what the deltas add to the output, quantised as it would be stored."""
        self._refresh("down")
        return super().down(z_NF, rows_per_expert)

    def _refresh(self, part: str) -> None:
        for name in (f"{part}_in", f"{part}_out"):
            rows: Any = self.get_submodule(name)
            rows.refresh()

    def packed(self) -> CodedLowRankDelta:
        """Return the module that it was made of, with what was learnt."""
        for rows in self.children():
            rows.packed()  # type: ignore[operator]
        return self.delta[0]


class TrainedNeuronExperts(NeuronExperts):
    """The trainable twin of ``NeuronExperts``, which it takes over: ``packed`` gives it back."""

    def __init__(self, experts: NeuronExperts, latents: Mapping[str, Tensor]) -> None:
        """Take over ``experts``; ``latents`` are the rows that its coded rows stand for, by name
        (``own.bits2``, ``shared``, ``gain``), each (parts, rows, width)."""
        OpaqueExperts.__init__(self)
        self.num_experts, self.gating = experts.num_experts, experts.gating
        self.register_buffer("widths", experts.widths)
        self.own = nn.ModuleDict(
            {name: _trained(rows, latents.get(f"own.{name}")) for name, rows in experts.own.items()}
        )
        self.shared = _trained(experts.shared, latents.get("shared"))
        self.gain = _trained(experts.gain, latents.get("gain"))
        self.own_bias, self.shared_bias = experts.own_bias, experts.shared_bias
        self.down_bias = experts.down_bias
        self.experts = [experts]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the routed experts' output, (T, D), quantised as it would be stored."""
        for rows in self.modules():
            if isinstance(rows, TrainedRows):
                rows.refresh()
        return super().forward(hidden_states, top_k_index, top_k_weights)

    def _own(
        self, x_TD: Tensor, token_N: Tensor, weight_N: Tensor, rows_per_expert: list[int]
    ) -> Tensor:
        """Return what every row's expert makes of it, (N, D); on a GPU all experts at once.

        A launch for every expert and number of bits costs a GPU more than the arithmetic: rows and
        neurons are filled up to the longest expert's instead.
        """
        if not (x_TD.is_cuda and len(self.own)):
            return super()._own(x_TD, token_N, weight_N, rows_per_expert)
        own: Any = self.own.values()
        rows_PMD = torch.cat([rows.read(0, None) for rows in own], 1).to(x_TD.dtype)
        bias_PM1 = None
        if self.own_bias is not None:
            biases: Any = self.own_bias.values()
            bias_PM1 = torch.cat([rows.read(0, None) for rows in biases], 1).to(x_TD.dtype)
        return padded_own(
            rows_PMD, self.widths, self.gating, x_TD[token_N], weight_N, rows_per_expert, bias_PM1
        )

    def choose_codes(self) -> None:
        """Let all codes follow what they stand for; see ``TrainedRows.choose_codes``."""
        for rows in self.modules():
            if isinstance(rows, TrainedRows):
                rows.choose_codes()

    def packed(self) -> NeuronExperts:
        """Return the module that it was made of, with what was learnt."""
        experts = self.experts[0]
        for name, rows in self.own.items():
            if isinstance(rows, TrainedRows):
                experts.own[name] = rows.packed()
        for name in ("shared", "gain"):
            rows = getattr(self, name)
            if isinstance(rows, TrainedRows):
                setattr(experts, name, rows.packed())
        return experts


def padded_own(
    rows_PMD: Tensor,
    widths: Tensor,
    gating: Gating,
    x_ND: Tensor,
    weight_N: Tensor,
    rows_per_expert: list[int],
    bias_PM1: Tensor | None = None,
) -> Tensor:
    """Return what each expert's own neurons make of its rows, (N, D), by batched products.

    ``rows_PMD`` (3, M, D) holds all neurons in the order that ``widths`` (bit widths, E) tells, and
    ``bias_PM1`` (2, M, 1) the biases of gate and up, if there are any; ``x_ND`` (N, D) and
    ``weight_N`` are sorted by expert, ``rows_per_expert`` of each. E experts are filled up to O
    neurons and C rows.
    """
    neuron_EO = _places(widths)
    row_EC = _spans(torch.tensor(rows_per_expert, device=x_ND.device))
    padded_PMD = nn.functional.pad(rows_PMD, (0, 0, 0, 1))
    gate_EOD, up_EOD, down_EOD = padded_PMD[:, neuron_EO].unbind(0)
    x_ECD = nn.functional.pad(x_ND, (0, 0, 0, 1))[row_EC]
    weight_EC = nn.functional.pad(weight_N, (0, 1))[row_EC]
    gate_ECO, up_ECO = x_ECD @ gate_EOD.mT, x_ECD @ up_EOD.mT
    if bias_PM1 is not None:
        bias_PEO1 = nn.functional.pad(bias_PM1, (0, 0, 0, 1))[:, neuron_EO]
        gate_ECO, up_ECO = gate_ECO + bias_PEO1[0].mT, up_ECO + bias_PEO1[1].mT
    z_ECO = gating(gate_ECO, up_ECO) * weight_EC.unsqueeze(-1)
    y_ECD = z_ECO.to(x_ND.dtype) @ down_EOD
    return y_ECD[row_EC < len(x_ND)]


def _places(widths: Tensor) -> Tensor:
    """Return which rows are each expert's, (E, O); the one after the last where it has fewer."""
    experts = torch.arange(widths.shape[1], device=widths.device).expand_as(widths)
    order_M = experts.flatten().repeat_interleave(widths.flatten()).sort(stable=True).indices
    places_EO = _spans(widths.sum(0))
    return nn.functional.pad(order_M, (0, 1), value=len(order_M))[places_EO]


def _spans(count_E: Tensor) -> Tensor:
    """Number what ``count_E`` (E,) counts in order: (E, most); the total where there is no more."""
    offset_O = torch.arange(int(count_E.max()), device=count_E.device)
    start_E1 = (count_E.cumsum(0) - count_E).unsqueeze(-1)
    there_EO = offset_O < count_E.unsqueeze(-1)
    return torch.where(there_EO, start_E1 + offset_O, count_E.sum())


def _trained(rows: Any, latent_PMI: Tensor | None) -> Any:
    if not isinstance(rows, CodedRows):
        return rows
    assert latent_PMI is not None
    return TrainedRows(rows, latent_PMI)


def stored_to_trained(model: nn.Module) -> None:
    """Put trainable twins in the place of all neuron experts below ``model``, as they are stored.

    What codes stood for before they were stored is not known any more, so training starts at what
    they say. Codes then follow when ``choose_codes`` is called.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NeuronExperts) and not isinstance(child, TrainedNeuronExperts):
                twin = TrainedNeuronExperts(child, _decoded(child))
                twin.choose_codes()
                setattr(parent, name, twin)


def trained_to_stored(model: nn.Module) -> None:
    """Put what was learnt back in the place of all trainable twins below ``model``."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, TrainedNeuronExperts):
                setattr(parent, name, child.packed())


def _decoded(experts: NeuronExperts) -> dict[str, Tensor]:
    """Return what all coded rows say, by name."""
    coded = {name: rows for name, rows in experts.named_modules() if isinstance(rows, CodedRows)}
    return {name: rows.read(0, rows.codes.shape[1]).detach() for name, rows in coded.items()}
