"""The CUDA attention kernels, executed by the SIMT runner, keep the attention contract."""

from __future__ import annotations

import pytest
import torch
from simt.attention import runs_on
from simt.build import Simt

from fastxattn.testing import attention as contract

CASES = [case for case in contract.ATTENTION_CASES if case.bias is None and not case.dropout_p]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_inside_the_error_budget(simt: Simt, case: contract.AttentionCase, dtype: torch.dtype) -> None:
    contract.check_budget(runs_on(simt), case.problem(dtype))
