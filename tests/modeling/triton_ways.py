"""What tests of Triton's kernels share: they are asked for, and nothing is left as it was found."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moefuse.modeling import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies bfloat16 as the integers that its bits are.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.fixture
def by_triton() -> Iterator[None]:
    kernels.use("triton")
    yield
    kernels.use("auto")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill whatever is allocated without a value with NaN."""

    def poison(make: Any) -> Any:
        def made(*given: Any, **options: Any) -> Tensor:
            tensor = make(*given, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))


def triton_forward(module: Any, x_TD: Tensor, index_TK: Tensor, w_TK: Tensor) -> Tensor:
    assert module.fast_compute is kernels.offered
    on_device: nn.Module = module.to(DEVICE)
    return on_device(x_TD.to(DEVICE), index_TK.to(DEVICE), w_TK.to(DEVICE)).cpu()
