"""torch's library is linked by a thread while Python does other things."""

import subprocess
import sys

import pytest

LINKED = """
import sys
from pathlib import Path
from tokenry.startup import link_torch_ahead

thread = link_torch_ahead()
thread.join()
assert "torch" not in sys.modules
assert "libtorch_cpu.so" in Path("/proc/self/maps").read_text()
import torch
assert torch.ones(2).sum() == 2
assert link_torch_ahead() is None
"""
BROKEN = """
import sys
from tokenry.startup import link_torch_ahead

sys.path.insert(0, sys.argv[1])
thread = link_torch_ahead()
assert (thread is None) == (len(sys.argv) == 2)
if thread is not None:
    thread.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the library has another name there")
def test_a_thread_links_what_the_import_then_finds():
    subprocess.run([sys.executable, "-c", LINKED], check=True)


def test_a_torch_without_that_library_or_with_a_broken_one_is_no_error(tmp_path):
    package = tmp_path / "torch"
    (package / "lib").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    subprocess.run([sys.executable, "-c", BROKEN, str(tmp_path)], check=True)
    (package / "lib" / "libtorch_cpu.so").write_bytes(b"nothing that can be linked")
    subprocess.run([sys.executable, "-c", BROKEN, str(tmp_path), "broken"], check=True)
