"""Benchmarks: what each operator costs against eager torch, torch.compile, the peers and the hardware's floor.

The command is `fastjem.commands.bench`; `fastjem/bench/cases/__init__.py` says how to add a case.
"""
