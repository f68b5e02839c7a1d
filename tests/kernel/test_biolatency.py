# SPDX-License-Identifier: Apache-2.0
import pytest

@pytest.mark.kernel
def test_smoke(load):
    b = load("biolatency")
    print(b.series("bpf_block_io_errors"), b.losses())
