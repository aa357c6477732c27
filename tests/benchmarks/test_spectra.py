"""Spectra and errors: pure measures on experts whose answers are known, and the whole command."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_close
from running import write_text
from tiny import save_tiny
from torch import Tensor, nn

from moefuse.mathematics.alignment import ExpertWeights
from moefuse.mathematics.experts import Experts, ExpertsCall
from moefuse.modeling.modeling_moefuse import PlainGating

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import layer_measures as measures
import spectra

D, F = 12, 8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def expert(seed: int) -> ExpertWeights:
    return ExpertWeights(normal(F, D, seed=seed), normal(F, D, seed=seed + 100), normal(D, F))


def test_ranks_end_at_full() -> None:
    assert measures.ranks_up_to(8) == [0, 1, 2, 4, 8]
    assert measures.ranks_up_to(12) == [0, 1, 2, 4, 8, 12]
    assert measures.ranks_up_to(1) == [0, 1]


def test_energy_left_is_what_the_best_approximation_leaves() -> None:
    whole_MOI, delta_MOI = normal(3, 6, 5), normal(3, 6, 5, seed=1)
    u, s, v = torch.linalg.svd(delta_MOI, full_matrices=False)
    ratios = []
    for rank in (0, 2, 5):
        best = (u[..., :rank] * s[:, None, :rank]) @ v[:, :rank]
        wrong_M = (delta_MOI - best).square().sum((1, 2))
        ratios.append(float((wrong_M / whole_MOI.square().sum((1, 2))).mean()))

    assert measures.energy_left(delta_MOI, whole_MOI, (0, 2, 5)) == pytest.approx(ratios, abs=1e-6)


def test_whitened_energy_is_that_of_outputs() -> None:
    weight_MOI, x_NI = normal(1, 6, 5), normal(40, 5, seed=2) * torch.arange(1.0, 6.0)
    base_MOI = normal(1, 6, 5, seed=3)
    moment_II = x_NI.T @ x_NI / len(x_NI)
    values, vectors = torch.linalg.eigh(moment_II)
    root_II = (vectors * values.sqrt()) @ vectors.T

    (left,) = measures.energy_left(weight_MOI - base_MOI, weight_MOI, (0,), root_II)

    outputs = ((weight_MOI[0] - base_MOI[0]) @ x_NI.T).square().sum()
    assert left == pytest.approx(float(outputs / (weight_MOI[0] @ x_NI.T).square().sum()), rel=1e-4)


def test_members_without_energy_do_not_count() -> None:
    whole_MOI = torch.stack([normal(4, 4), torch.zeros(4, 4)])
    assert measures.energy_left(whole_MOI, whole_MOI, (0, 4)) == pytest.approx([1.0, 0.0], abs=1e-6)


def test_aligned_copies_have_no_delta_and_unaligned_ones_have() -> None:
    one = expert(0)
    order = torch.randperm(F, generator=torch.Generator().manual_seed(5))
    pair, groups, mass = [one, one.permuted(order)], torch.zeros(2, dtype=torch.long), torch.ones(2)

    weights, means = measures.members_and_mean(pair, groups, mass, aligned=True)
    assert_close(weights[1].gate_up(), means[1].gate_up())
    weights, means = measures.members_and_mean(pair, groups, mass, aligned=False)
    assert float((weights[1].gate_FD - means[1].gate_FD).norm()) > 1


def test_similarities_find_copies_and_nothing_else() -> None:
    one = expert(0)
    order = torch.randperm(F, generator=torch.Generator().manual_seed(5))
    copies = [one, one.permuted(order, torch.tensor([1.0, -1.0] * (F // 2)))]

    found = measures.similarities(copies, 5, torch.Generator().manual_seed(0))

    assert_close(found["matched"], torch.ones(F))
    assert float(found["matched, shuffled"].mean()) < 0.8
    assert float(found["random order"].mean()) < float(found["matched"].mean())
    assert all(len(cosine_N) == F for cosine_N in found.values())


def test_shuffling_keeps_the_values_of_every_coordinate() -> None:
    one = expert(0)
    mixed = measures.shuffled(one, torch.Generator().manual_seed(0))

    assert_close(mixed.gate_FD.sort(0).values, one.gate_FD.sort(0).values)
    assert_close(mixed.down_DF.sort(1).values, one.down_DF.sort(1).values)
    assert not torch.equal(mixed.gate_FD, one.gate_FD)


def test_shares_of_the_greatest() -> None:
    energy = torch.tensor([[1.0, 6.0], [2.0, 1.0]])
    assert measures.shares(energy, (0.25, 0.5, 1.0)) == pytest.approx([0.6, 0.8, 1.0])


def test_down_roots_square_to_the_moment_of_neurons() -> None:
    gate_up_EFD, down_EDF = normal(2, 2 * F, D), normal(2, D, F)
    experts = Experts(gate_up_EFD, down_EDF, PlainGating(nn.functional.silu))
    index_TK = torch.tensor([[0], [1], [0], [0]])
    weight_TK = torch.tensor([[0.5], [1.0], [2.0], [1.0]])
    call = ExpertsCall(normal(4, D), index_TK, weight_TK, normal(4, D))
    weights = [ExpertWeights(*gu.chunk(2), d) for gu, d in zip(gate_up_EFD, down_EDF, strict=True)]

    root_FF = measures.down_roots(weights, experts, call)[0]

    x_ND = call.x_TD[[0, 2, 3]]
    gate, up = (x_ND @ gate_up_EFD[0].T).chunk(2, dim=1)
    z_NF = nn.functional.silu(gate) * up * weight_TK[[0, 2, 3]]
    moment_FF = z_NF.T @ z_NF / 3
    assert float((root_FF @ root_FF - moment_FF).norm() / moment_FF.norm()) < 1e-5


class Half(nn.Module):
    """A student that returns half of what it received."""

    def forward(self, x_TD: Tensor, *_: Tensor) -> Tensor:
        return x_TD / 2


def test_errors_are_relative_to_zeros_and_seen_through_the_metric() -> None:
    x_TD = normal(10, D)
    call = ExpertsCall(x_TD, torch.zeros(10, 1, dtype=torch.int32), torch.ones(10, 1), x_TD)
    assert measures.errors(Half(), call, torch.eye(D)) == pytest.approx((0.25, 0.25))

    # Only the first number is felt, and there the student is right.
    y_TD = x_TD.clone()
    y_TD[:, 0] /= 2
    root_DD = torch.zeros(D, D)
    root_DD[0, 0] = 1.0
    plain, felt = measures.errors(Half(), replace(call, y_TD=y_TD), root_DD)
    assert felt == 0
    assert plain == pytest.approx(float((x_TD[:, 1:] / 2).square().sum() / y_TD.square().sum()))


# The whole command.


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    teacher = tmp_path / "teacher"
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32}
    save_tiny(teacher, dtype=torch.bfloat16, **sizes)
    return {
        "checkpoint": teacher,
        "data": str(write_text(tmp_path / "text.txt")),
        "held_out": str(write_text(tmp_path / "held-out.txt", lines=40)),
        "work": tmp_path / "work",
        "results": tmp_path / "results",
        "groups": 2,
        "expert_bits": 4.0,
        "pairs": 3,
        "step_counts": "0,100",
        "tokens": 1024,
        "sequence_length": 64,
        "held_out_tokens": 256,
        "fit_tokens": 512,
        "sensitivity_tokens": 128,
        "batch_tokens": 64,
        "device": "cpu",
    }


def test_parts_are_measured_side_by_side_and_gathered(given: dict[str, Any]) -> None:
    for part in ("0/2", "1/2"):
        spectra.main(**given, part=part)
        assert not given["results"].exists()
    files = {path: path.stat().st_mtime_ns for path in given["work"].glob("cells/*/*")}

    spectra.main(**given)

    assert files == {path: path.stat().st_mtime_ns for path in given["work"].glob("cells/*/*")}
    rows = json.loads((given["results"] / "spectra.json").read_text())["rows"]
    assert {row["layer"] for row in rows if row["kind"] == "spectra"} == {1, 2}
    _check_spectra([row for row in rows if row["kind"] == "spectra"])
    _check_errors(rows)
    (whole,) = (
        r for r in rows if r["kind"] == "concentration" and not r["layer"] and r["energy"] == "raw"
    )
    assert whole["shares"] == sorted(whole["shares"]) and whole["shares"][-1] == pytest.approx(1)
    text = (given["results"] / "spectra.md").read_text()
    for picture in ("spectra.png", "spectra-neurons.png", "spectra-errors.png"):
        assert f"({picture})" in text
        assert (given["results"] / picture).read_bytes().startswith(b"\x89PNG")


def _check_spectra(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 2 * 5 * 2 * 2
    for row in rows:
        assert row["left"] == sorted(row["left"], reverse=True)
        assert row["left"][-1] < 1e-6
        if not row["groups"]:
            assert row["left"][0] == pytest.approx(1, abs=1e-5)
    plain = {
        (r["layer"], r["matrix"], r["groups"], r["aligned"]): r for r in rows if not r["whitened"]
    }
    for (layer, matrix, groups, aligned), row in plain.items():
        if aligned:
            assert row["left"][0] < plain[layer, matrix, groups, False]["left"][0]


def _check_errors(rows: list[dict[str, Any]]) -> None:
    sources = [row for row in rows if row["kind"] == "sources" and row["layer"] == 1]
    by_bits = [row["error"] for row in sources if row["base"] is None]
    assert by_bits == sorted(by_bits, reverse=True) and by_bits[-1] < 0.05
    assert {row["grouping"] for row in sources if row["base"]} == {"default", "random"}
    steps = {(row["form"], row["steps"]): row for row in rows if row["kind"] == "steps"}
    # Each falls in what its distillation lessens.
    for form, lessened in (("bases and deltas", "error"), ("own neurons", "felt")):
        assert steps[form, 100][lessened] < steps[form, 0][lessened]


def test_other_settings_have_other_files(given: dict[str, Any]) -> None:
    def mark(**more: Any) -> str:
        values = {name: given[name] for name in ("data", "tokens", "sequence_length", "fit_tokens")}
        sizes = {"groups": 2, "expert_bits": 4.0, "pairs": 3, **more}
        given_text = (given["held_out"], 256)
        return spectra.Bench(given["checkpoint"], given["work"], values, sizes, *given_text).mark

    assert mark() == mark()
    assert len({mark(), mark(groups=3), mark(expert_bits=5.0), mark(pairs=4)}) == 4
