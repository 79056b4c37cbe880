"""The cases of `fastjem.bench` as pytest-benchmark benchmarks: a group per case, a benchmark per variant.

Each `test_<family>.py` names its cases; what is shared stands here. `--full` adds the slow cases as in `fastjem bench`.
"""

from collections.abc import Callable

import pytest
import torch

from fastjem.bench.clocks import Call, copied, synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="slow and less usual cases too")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case of the module's CASES with every variant that can run here."""
    if "step" not in metafunc.fixturenames:
        return
    full, chosen = metafunc.config.getoption("--full"), []
    for case in metafunc.module.CASES:
        if DEVICE.type in case.devices and (full or DEVICE.type not in case.full_only):
            names = ["eager", "compile", *case.peers, "ours"]
            chosen += [pytest.param((case, name), id=f"{case.name} {name}".replace(" ", "-")) for name in names]
    metafunc.parametrize("step", chosen, indirect=True)


@pytest.fixture
def step(request: pytest.FixtureRequest, benchmark) -> Callable[[], None]:
    """One forward and backward (one call, where nothing is differentiated), checked against the eager formula."""
    case, name = request.param
    if name == "compile":
        torch._dynamo.reset()
    functions, absent = case.variants()
    if name in absent:
        pytest.skip(f"{name}: {absent[name]}")
    inputs = case.draw(DEVICE)
    case.verifier(inputs)(Call(functions[name], copied(inputs)).outputs())
    benchmark.group = case.name
    call = Call(functions[name], inputs)

    def run() -> None:
        call.fresh()
        if case.clock == "device":
            synchronize(DEVICE)

    run()
    return run
