"""Kernels under Triton's interpreter: these tests need a process of their own, TRITON_INTERPRET=1 pytest tests/interpreted."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import repair

    repair()
else:
    collect_ignore_glob = ["test_*.py"]
