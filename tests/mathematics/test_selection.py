"""Forward selection: what a search over all least squares fits finds, step by step."""

import pytest
import torch
from numeric import assert_close
from torch import Tensor

from moefuse.mathematics.selection import forward_selection

N, C, D = 200, 17, 4
RIDGE = 1e-3


def problem(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing_CC = torch.randn(C, C, generator=generator)
    feature_NC = torch.randn(N, C, generator=generator) @ mixing_CC
    planted_CD = torch.randn(C, D, generator=generator) * (torch.arange(C) % 3 == 0).unsqueeze(-1)
    noise_ND = 5 * torch.randn(N, D, generator=generator)
    return feature_NC, feature_NC @ planted_CD + noise_ND


def fitted(feature_NC: Tensor, target_ND: Tensor, chosen: list[int]) -> tuple[Tensor, float]:
    """Return the ridge regression on the chosen features, and how much it explains."""
    damping = RIDGE * float(feature_NC.square().sum(0).mean())
    part_NS, wide_ND = feature_NC[:, chosen].double(), target_ND.double()
    gram_SS = part_NS.T @ part_NS + damping * torch.eye(len(chosen))
    aimed_SD = part_NS.T @ wide_ND
    solution_SD = torch.linalg.solve(gram_SS, aimed_SD)
    return solution_SD, float((aimed_SD * solution_SD).sum())


@pytest.mark.parametrize("seed", range(4))
def test_each_choice_explains_most_of_what_is_left(seed: int) -> None:
    feature_NC, target_ND = problem(seed)
    expected: list[int] = []
    for _ in range(6):
        others = [c for c in range(C) if c not in expected]
        worth = {c: fitted(feature_NC, target_ND, [*expected, c])[1] for c in others}
        expected.append(max(worth, key=worth.__getitem__))

    chosen_S, solution_SD = forward_selection(feature_NC, target_ND, 6, ridge=RIDGE)

    assert chosen_S.tolist() == expected
    assert_close(solution_SD, fitted(feature_NC, target_ND, expected)[0].float(), 1e-4)


def test_all_features_are_a_whole_regression() -> None:
    feature_NC, target_ND = problem(0)
    chosen_S, solution_SD = forward_selection(feature_NC, target_ND, 2 * C, ridge=RIDGE)
    assert sorted(chosen_S.tolist()) == list(range(C))
    whole_CD, _ = fitted(feature_NC, target_ND, list(range(C)))
    assert_close(solution_SD, whole_CD[chosen_S].float(), 1e-4)


def test_a_copy_is_chosen_last() -> None:
    feature_NC, target_ND = problem(1)
    first = int(forward_selection(feature_NC, target_ND, 1, ridge=RIDGE)[0])
    doubled_NC = torch.cat([feature_NC, feature_NC[:, first : first + 1]], 1)
    chosen_S, _ = forward_selection(doubled_NC, target_ND, 6, ridge=RIDGE)
    assert C not in chosen_S.tolist()


def test_nothing_to_fit_to_gives_nothing() -> None:
    chosen_S, solution_SD = forward_selection(torch.zeros(0, C), torch.zeros(0, D), 3, ridge=RIDGE)
    assert chosen_S.tolist() == [0, 1, 2] and not solution_SD.any()
    chosen_S, solution_SD = forward_selection(*problem(0), 0, ridge=RIDGE)
    assert (len(chosen_S), solution_SD.shape) == (0, (0, D))
