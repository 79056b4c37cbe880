"""The benchmark harness does what it says. No test here depends on how long anything takes."""

import contextlib
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import fastjem.functional as F
from fastjem.bench import cases as all_cases
from fastjem.bench import clocks, neighbours, report, timing
from fastjem.bench.case import Case, Draw
from fastjem.bench.clocks import Call, WallClock, copied
from fastjem.bench.machine import Ceilings, slug
from fastjem.bench.memory import peak
from fastjem.bench.timing import Comparison, Stats, Timing, WrongResult, compare, turns
from fastjem.capture import BrokenError, first_line
from fastjem.commands import bench as command
from fastjem.commands.bench import main

CPU = torch.device("cpu")
CASES = all_cases.cases()


def case_named(start: str) -> Case:
    return next(case for case in CASES if case.name.startswith(start))


def small(op: str) -> Case:
    """The family's formulas at a size that takes no time."""
    families = {
        "ema_update_": lambda: all_cases.weights.case("3 tensors", [(5, 3), (7,), ()], torch.bfloat16),
        "adamw_": lambda: all_cases.optimizers.case("adamw_", "3 tensors", [(5, 3), (7,), (2, 2)]),
        "lars_": lambda: all_cases.optimizers.case("lars_", "3 tensors", [(5, 3), (7,), (2, 2)]),
        "cross_entropy": lambda: all_cases.supervised.case(9, 11),
        "cross_entropy_rows": lambda: all_cases.supervised.rows_case(9, 11),
        "negative_cosine": lambda: all_cases.predictive.case(9, 11, both=True),
        "nt_xent": lambda: all_cases.contrastive.nt_xent_case(9, 11),
        "info_nce": lambda: all_cases.contrastive.moco_case(9, 31, 11),
        "nearest_neighbors": lambda: all_cases.contrastive.nearest_neighbors_case(9, 31, 11),
        "clip_loss": lambda: all_cases.contrastive.image_text_case("clip_loss", 9, 11),
        "siglip_loss": lambda: all_cases.contrastive.image_text_case("siglip_loss", 9, 11),
        "sinkhorn": lambda: all_cases.prototypes.sinkhorn_case(9, 11),
        "sinkhorn of positions": lambda: all_cases.prototypes.positions_case(3, 9, 11),
        "sinkhorn_bias": lambda: all_cases.prototypes.sinkhorn_bias_case(9, 11),
        "prototype_head_cross_entropy": lambda: all_cases.prototypes.head_case(2, 5, 9, 31, 11),
        "koleo": lambda: all_cases.prototypes.koleo_case(9, 11),
        "mean_entropy": lambda: all_cases.prototypes.mean_entropy_case(2, 9, 11),
        "swav": lambda: all_cases.prototypes.swav_case(2, 3, 9, 11),
        "dino": lambda: all_cases.prototypes.dino_case(2, 5, 9, 11),
        "barlow_twins": lambda: all_cases.covariance.case("barlow_twins", 9, 5),
        "kmeans_step": lambda: all_cases.neighbors.kmeans_case(31, 5, 11),
        "nearest_k": lambda: all_cases.neighbors.votes_case(9, 31, 11),
        "gram_loss": lambda: all_cases.neighbors.gram_case(2, 9, 11),
        "regression_rows": lambda: all_cases.predictive.regression_rows(2, 9, 11),
        "simdino": lambda: all_cases.spectral.simdino_case(3, 9, 11),
        "vicreg": lambda: all_cases.covariance.case("vicreg", 5, 9),
    }
    return families[op]()


OPS = (
    "ema_update_",
    "adamw_",
    "lars_",
    "cross_entropy",
    "cross_entropy_rows",
    "negative_cosine",
    "nt_xent",
    "info_nce",
    "sinkhorn",
    "swav",
    "dino",
)
OPS += ("barlow_twins", "vicreg", "nearest_neighbors", "clip_loss", "siglip_loss", "sinkhorn_bias")
OPS += ("kmeans_step", "nearest_k", "gram_loss", "regression_rows", "simdino")
OPS += ("prototype_head_cross_entropy", "koleo", "mean_entropy", "sinkhorn of positions")


# What is timed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_all_variants_of_a_family_compute_the_same(op):
    """Eager, lightly where it is installed, and ours; in-place cases included, from untouched inputs each time."""
    case = small(op)
    inputs = case.draw(CPU)
    verify = case.verifier(inputs)
    functions, _ = case.variants(compiled=False)
    for function in functions.values():
        verify(Call(function, copied(inputs)).outputs())


def test_wrong_results_are_refused():
    case = small("negative_cosine")
    verify = case.verifier(inputs := case.draw(CPU))
    right = Call(case.eager, inputs).outputs()
    verify(right)
    for wrong in (right[:2], [right[0] + 1e-3, *right[1:]], [right[0], right[1] * torch.nan, right[2]]):
        with pytest.raises(WrongResult):
            verify(wrong)


def test_the_judge_computes_in_float64():
    """An eager formula that cancels in float32 is what is wrong, and not what is compared with it."""

    def cancelling(z):
        return ((z + 4096) - 4096).square().mean()

    case = Case("koleo", "9 x 4", lambda draw: (draw.normal(9, 4, gradient=True),), cancelling, cancelling, bytes=1)
    verify = case.verifier(inputs := case.draw(CPU))
    verify(Call(lambda z: z.square().mean(), copied(inputs)).outputs())
    with pytest.raises(WrongResult):
        verify(Call(cancelling, copied(inputs)).outputs())


def test_a_wrong_variant_is_not_timed_and_the_run_fails(monkeypatch, capsys):
    def wrong(p, z):
        return F.negative_cosine(p, z) * 1.01

    eager = small("negative_cosine").eager
    case = Case("negative_cosine", "9 x 4", lambda draw: draw.pair(9, 4), eager, ours=wrong, bytes=1)
    monkeypatch.setattr(command, "cases", lambda: [case])
    monkeypatch.setattr(command.machine, "ceilings", lambda *_: CEILINGS)
    assert main(["--quick", "--device", "cpu"]) == 1
    table = capsys.readouterr().out
    assert "WRONG" in table and "ours is missing: result 0 differs" in table


def test_every_case_is_complete():
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert case.bytes > 0 and case.flops >= 0 and set(case.full_only) <= set(case.devices), case.name
        assert all(op in command.ops.OPERATORS or hasattr(F, op) for op in (case.op, *case.uses)), case.name


def test_inputs_are_drawn_anew_and_alike():
    case = small("dino")
    first, second = (list(timing.Call(case.eager, case.draw(CPU)).leaves) for _ in range(2))
    assert len(first) == 5
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()


@pytest.mark.parametrize(
    ("name", "bytes_", "flops"),
    [
        # logits and gradient, 4 bytes each, and 8 per label
        ("cross_entropy 4096 x 1000 fp32", 4096 * 1000 * 8 + 4096 * 8, 0),
        # 23,508,032 parameters: teacher read and written in float32, student read in bfloat16
        ("ema_update_ ResNet-50, 159 tensors bf16", 23_508_032 * 10, 0),
        # M = 2048 rows: half the products forward, half again and all of the gradient's backward: 4 M^2 D
        ("nt_xent 2 x 1024 x 128 fp32", 2048 * 128 * 8, 4 * 2048 * 2048 * 128),
        # N < D: per view half an N x N x D product, and one for its gradient: 2 (N^2 D + 2 N^2 D)
        ("vicreg 256 x 8192 fp32", 256 * 8192 * 16, 2 * 3 * 256 * 256 * 8192),
    ],
)
def test_bytes_and_flops_by_hand(name, bytes_, flops):
    case = case_named(name)
    assert (case.bytes, case.flops) == (bytes_, flops)


def test_bytes_are_at_least_inputs_and_gradients():
    """Counted from the tensors: what a case claims to be unavoidable can't be less."""
    for op in OPS:
        case = small(op)
        call = Call(case.eager, case.draw(CPU))
        least = timing.size(call.inputs) + timing.size(call.leaves)
        if op == "swav":
            least = timing.size(call.leaves) * 2
        assert case.bytes >= least - 4 * 11, op  # DINO's centre [K] is left out


# How it is timed ----------------------------------------------------------------------------------------------------


def test_variants_take_turns_and_each_round_begins_with_another():
    order = turns(["a", "b", "c"], 4)
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b", "a", "b", "c"]


def test_compare_really_alternates():
    calls = []
    variants = {name: lambda x, name=name: calls.append(name) or x.sum() for name in "abc"}
    result = compare(variants, (torch.ones(3),), rounds=5, budget=0.01)
    blocks = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert result.rounds == 5
    assert "".join(blocks).endswith(
        "bcacababcbca"
    )  # rounds 2 to 5; a round that begins where one ended makes one block


def test_rounds_fill_the_budget():
    """As many turns as there is time for: the estimate is of the call alone, not of what surrounds its measurement."""
    seconds = [1e-3] * 3

    class Known(WallClock):
        def samples(self):
            return [(s, 0.0) for s in seconds]

    def slow_peak(call, device):
        call()
        time.sleep(0.3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "WallClock", Known)
        patch.setattr(timing, "peak", slow_peak)
        x = torch.ones(3)
        assert compare({"it": torch.sum}, (x,), budget=0.2).rounds == 10  # turns of 20 ms
        assert compare({"it": torch.sum}, (x,), budget=9.0).rounds == 25
        assert compare({"it": torch.sum, "same": torch.sum}, (x,), budget=0.01).rounds == 5


def test_neighbours_share(monkeypatch):
    """CPU seconds of all, idle, own: in ten seconds of two CPUs, 5 idle and 9 our own leave 6 to others."""
    seconds = iter([(100.0, 50.0, 7.0), (120.0, 55.0, 16.0), (0, 0, 0), (0, 0, 0)])
    monkeypatch.setattr(neighbours, "_cpu_seconds", lambda: next(seconds))
    assert neighbours.OtherProcesses().share() == 0.3
    assert neighbours.OtherProcesses().share() == 0.0  # a system that doesn't tell


def test_a_disturbed_measurement_begins_again(monkeypatch):
    shares, attempts = iter([0.5, 0.2, 0.01]), []
    others = type("OtherProcesses", (), {"share": lambda _: next(shares)})
    monkeypatch.setattr(timing, "OtherProcesses", others)
    monkeypatch.setattr(timing, "wait_until_idle", attempts.append)
    result = compare({"it": torch.sum}, (torch.ones(3),), rounds=1, patience=60)
    assert result.others == 0.01 and len(attempts) == 3
    shares = iter([0.5])
    assert compare({"it": torch.sum}, (torch.ones(3),), rounds=1).others == 0.5  # no patience: one attempt


def test_statistics():
    stats = Stats.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (stats.minimum, stats.p20, stats.median, stats.p80) == (1.0, 2.0, 3.0, 4.0)
    assert Stats.of([7.0]) == Stats(7.0, 7.0, 7.0, 7.0)


def test_ratios_of_minima_and_medians():
    fast, slow = Timing(0, 0, "", {"total": Stats(1, 1, 2, 2)}), Timing(0, 0, "", {"total": Stats(3, 3, 8, 8)})
    result = Comparison({"ours": fast, "eager": slow}, {}, [])
    assert result.ratio("ours", "eager") == (3, 4)
    assert result.ratio("eager", "ours") == (1 / 3, 1 / 4)


def test_total_is_forward_plus_backward_call_by_call():
    """With a clock that is known: forward takes 2 and 5, backward 7 and 1; the least total is 6, not 2 + 1."""

    class Known:
        method = "known"

        def samples(self):
            return [(2.0, 7.0), (5.0, 1.0)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_clock", lambda *_: Known())
        x = torch.ones(3, requires_grad=True)
        passes = compare({"it": torch.sum}, (x,), rounds=1).variants["it"].passes
    assert {name: stats.minimum for name, stats in passes.items()} == {"total": 6.0, "forward": 2.0, "backward": 1.0}


def test_in_place_variants_start_from_the_same_inputs():
    seen = []
    case = small("ema_update_")
    inputs = case.draw(CPU)
    before = copied(inputs)
    variants = {"first": case.eager, "second": case.eager}
    result = compare(variants, inputs, verify=lambda outputs: seen.append([x.clone() for x in outputs]), rounds=1)
    assert not result.absent and result.variants["first"].passes.keys() == {"total"}
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(seen[0], before[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs[0], before[0], strict=True))


def test_a_variant_that_fails_leaves_the_others():
    def fails(x):
        raise RuntimeError("no such operator\nand a long explanation")

    result = compare({"fails": fails, "works": torch.sum}, (torch.ones(3),), rounds=1)
    assert result.absent == {"fails": "RuntimeError: no such operator"} and list(result.variants) == ["works"]


def test_gradients_are_those_of_the_leaves():
    x, y = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0)
    call = Call(lambda inputs, z: inputs[0] ** 2 * z, ([x], y))
    assert [t.item() for t in call.outputs()] == [12.0, 12.0]
    assert len(WallClock(call, 4, CPU).samples()) == 4


class FakeCuda:
    """torch.cuda as far as the clocks use it, on CPU tensors: capture runs the calls, replay and events only count."""

    Stream = staticmethod(
        lambda *_: type(
            "Stream", (), {"wait_stream": lambda *_: None, "device": torch.device("cpu"), "device_index": 0}
        )()
    )
    set_stream = staticmethod(lambda _: None)
    graph_pool_handle = staticmethod(lambda: "own pool")
    current_stream = synchronize = staticmethod(lambda *_: None)
    stream = staticmethod(lambda _: contextlib.nullcontext())

    def __init__(self, sync_is_error: bool = False):
        self.replays, self.captures, self.mode, self.sync_is_error = 0, 0, "default", sync_is_error
        fake = self

        class CUDAGraph:
            def pool(self):
                return "pool"

            def replay(self):
                fake.replays += 1

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.replays = fake.replays

            def elapsed_time(self, other):
                return 1000.0 * (other.replays - self.replays)  # each replay takes a second

        self.CUDAGraph, self.Event = CUDAGraph, Event

    def get_device_properties(self, _):
        return type("Properties", (), {"L2_cache_size": 1000})

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    @contextlib.contextmanager
    def graph(self, _, stream, pool=None):
        self.captures += 1
        yield


def test_graph_clock_rotates_inputs_and_replays_forward_before_backward(monkeypatch):
    """Logic alone, without a GPU: as many sets as exceed twice the L2 cache, time shared among them."""
    monkeypatch.setattr(torch, "cuda", fake := FakeCuda())
    p, z = torch.randn(10, 10, requires_grad=True), torch.randn(10, 10)
    clock = clocks.GraphClock(Call(small("negative_cosine").eager, (p, z)), 4, estimate=1.0)
    assert len(clock.calls) == 2  # 400 + 400 bytes and a gradient of 400, against 2 x 1000
    assert len({x.data_ptr() for call in clock.calls for x in clocks.tensors(call.inputs)}) == 4
    assert fake.captures == 2 and fake.mode == "default"
    assert clock.samples() == [(0.5, 0.5)] * 4 and fake.replays == 8
    without = clocks.GraphClock(Call(torch.add, (p.detach(), z)), 1, estimate=100e-6)
    assert without.samples() == [(1 / len(without.calls), 0.0)]


def test_what_waits_for_the_device_is_timed_with_events(monkeypatch):
    monkeypatch.setattr(torch, "cuda", fake := FakeCuda())
    x = torch.ones(3)

    def waits(x):
        if fake.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return x + 1

    def chosen(function):
        return timing._clock(Call(function, (x,)), 5, 1e-5, torch.device("cuda"), "device", graphs=True)

    assert isinstance(chosen(waits), clocks.EventClock) and fake.mode == "default" and fake.captures == 0
    assert isinstance(chosen(torch.neg), clocks.GraphClock) and fake.captures == 1
    monkeypatch.setattr(clocks, "FLUSH_BYTES", 10)
    assert chosen(waits).samples() == [(0.0, 0.0)] * 5
    assert isinstance(timing._clock(Call(torch.neg, (x,)), 5, 1.0, torch.device("cuda"), "host", True), WallClock)


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_an_invalid_capture_is_put_right_behind_it(which, monkeypatch):
    """As `--cuda-graph` does it: the pool is given back, and another capture ends well; then events time the call."""
    monkeypatch.setattr(torch, "cuda", fake := FakeCuda())
    released, anew = [], []
    number = {"forward": 1, "backward": 2}[which]

    class Unended(fake.CUDAGraph):
        def pool(self):
            if fake.captures >= number:
                raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
            return "pool"

    @contextlib.contextmanager
    def graph(_, stream, pool=None, capture_error_mode="global"):
        fake.captures += 1
        if pool is None:
            assert capture_error_mode == "thread_local"  # other threads may allocate
            anew.append(fake.captures)
        yield
        if fake.captures == number:
            raise RuntimeError("operation failed due to a previous error during capture")

    fake.CUDAGraph, fake.graph = Unended, graph
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda device, pool: None, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda _, pool: released.append(pool), raising=False)
    call = Call(torch.sum, (torch.ones(3, requires_grad=True),))

    def chosen():
        return timing._clock(call, 5, 1e-5, torch.device("cuda"), "device", graphs=True)

    assert isinstance(chosen(), clocks.EventClock)
    assert released == [{"forward": "own pool", "backward": "pool"}[which]] and anew == [number + 1]

    def refuses(*_):
        raise RuntimeError("driver is gone")

    fake.captures = 0
    monkeypatch.setattr(torch._C, "_cuda_releasePool", refuses, raising=False)
    with pytest.raises(BrokenError, match="driver is gone") as raised:
        chosen()
    assert first_line(raised.value.__cause__) == "operation failed due to a previous error during capture"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path):
    arguments = [
        "--quick",
        "--device",
        "cuda",
        "--filter",
        "negative_cosine 4096|nt_xent 2 x 1024",
        "--out",
        str(tmp_path),
    ]
    assert main(arguments) == 0
    rows = report.load(next(tmp_path.glob("*.json")))["rows"]
    for row in rows:
        assert row["variants"]["ours"]["method"].startswith("graph replay"), row
        assert row["variants"]["ours"]["memory"] is not None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")
def test_peak_memory_sees_what_torch_does_not_allocate():
    def with_torch():
        return (torch.ones(64 * 2**18) + 1).sum()  # two of 64 MiB at a time

    def behind_its_back():
        return len(bytearray(b"1") * (100 * 2**20))

    with_torch()
    if peak(with_torch, CPU) is None:
        pytest.skip("/proc/self/clear_refs can't be written")
    assert 126 < peak(with_torch, CPU) / 2**20 < 140
    assert 98 < peak(behind_its_back, CPU) / 2**20 < 112


def test_memory_of_result_and_gradients_is_not_counted():
    x = torch.ones(32 * 2**18, requires_grad=True)  # 32 MiB, and so its gradient
    memory = compare({"it": lambda x: x.exp().sum()}, (x,), rounds=1).variants["it"].memory
    assert memory is None or 31 < memory / 2**20 < 40  # exp(x), kept for backward


# What is reported ---------------------------------------------------------------------------------------------------


CEILINGS = Ceilings({1000: 10.0, 100_000: 1.0}, {"float32": 100.0, "bfloat16": 400.0})


def test_floor():
    assert CEILINGS.floor(2000, 10_000, torch.float32) == (200.0, "memory")
    assert CEILINGS.floor(2000, 40_000, torch.float32) == (400.0, "products")
    assert CEILINGS.floor(2000, 40_000, torch.bfloat16) == (200.0, "memory")
    assert CEILINGS.floor(90_000, 0, torch.float32) == (90_000.0, "memory")


def result_of(op: str, ours: float, eager: float, date: str) -> dict:
    """Results with one row, from known times."""
    timings = {
        name: Timing(1.0, 2**20, "known", {"total": Stats(t, t, 2 * t, 2 * t)})
        for name, t in (("eager", eager), ("ours", ours))
    }
    comparison = Comparison(timings, {"lightly": "not installed"}, [], rounds=5)
    row = command.row(small(op), CPU, comparison, CEILINGS) | {"run": date}
    runs = [{"date": date, "commit": None, "versions": {"torch": "2"}, "load_average": 0.1}]
    runs[0]["ceilings"] = {"copy": {"1048576": 1e9}, "matmul": {"float32": 1e12}}
    return {"machine": {"cpu": "Some CPU", "threads": 2}, "runs": runs, "rows": [row]}


def test_results_survive_json_and_runs_merge_by_case(tmp_path):
    first, second = result_of("cross_entropy", 1.0, 2.0, "day 1"), result_of("negative_cosine", 1.0, 3.0, "day 1")
    first["rows"] += second["rows"]
    assert json.loads(report.dumps(first)) == first
    data, page = report.write(first, tmp_path, "machine")
    assert report.load(data) == first

    later = result_of("negative_cosine", 4.0, 3.0, "day 2")
    report.write(later, tmp_path, "machine")
    both = report.load(data)
    assert [(row["op"], row["run"]) for row in both["rows"]] == [
        ("cross_entropy", "day 1"),
        ("negative_cosine", "day 2"),
    ]
    assert [r["date"] for r in both["runs"]] == ["day 1", "day 2"]
    report.write(result_of("cross_entropy", 1.0, 2.0, "day 2"), tmp_path, "machine")
    assert [r["date"] for r in report.load(data)["runs"]] == ["day 2"]
    assert "2.00x (2.00)" in page.read_text()


def test_losses_are_shown():
    results = result_of("cross_entropy", ours=4.0, eager=3.0, date="day 1")
    for page in (report.text(results), report.markdown(results)):
        assert "0.75x (0.75)" in page and "eager is 1.33x faster (1.33x by medians)" in page
    assert not report.losses(result_of("cross_entropy", ours=1.0, eager=3.0, date="day 1")["rows"])


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1.875, "1.88 s"), (0.0271, "27.1 ms"), (0.99996e-3, "1.00 ms"), (8.12e-6, "8.12 us"), (123e-6, "123 us")],
)
def test_seconds(value, shown):
    assert report.seconds(value) == shown


def test_slug():
    xeon = {"cpu": "Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz", "vector_units": "AVX512", "threads": 2}
    assert slug(xeon) == "cpu-intel-xeon-e5-2680-v4-avx512-2-threads"
    assert slug(xeon | {"gpu": "NVIDIA H200"}) == "nvidia-h200"


# The command --------------------------------------------------------------------------------------------------------


def test_main_without_lightly(monkeypatch, tmp_path, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lightly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightly", None)  # importing it raises ImportError
    arguments = ["--quick", "--device", "cpu", "--filter", "negative_cosine 256 x 2048", "--out", str(tmp_path)]
    assert main(arguments) == 0
    (data,) = tmp_path.glob("cpu-*-quick.json")
    results = report.load(data)
    (row,) = results["rows"]
    assert set(row["variants"]) == {"eager", "ours"} and "lightly" in row["absent"]
    assert results["machine"]["threads"] == torch.get_num_threads() and results["runs"][0]["versions"]["torch"]
    assert row["floor"] > 0 and row["variants"]["ours"]["passes"].keys() == {"total", "forward", "backward"}
    assert "negative_cosine 256 x 2048" in capsys.readouterr().out and data.with_suffix(".md").exists()


def test_mistakes_are_one_line_and_exit_code_2(capsys):
    for arguments in (["--filter", "no such case"], ["--filter", "("], ["--rounds", "0"], ["--dtype", "int8"]):
        assert main(["--device", "cpu", *arguments]) == 2
        assert "fastjem bench: error:" in capsys.readouterr().err
    assert main(["--help"]) == 0


def test_list_and_filters(capsys):
    assert main(["--device", "cpu", "--list", "--dtype", "bf16"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert names and all(name.endswith("bf16") for name in names)
    assert main(["--device", "cpu", "--list", "--full", "--filter", "vicreg"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["vicreg 2048 x 512 fp32", "vicreg 256 x 8192 fp32"]


def test_an_interrupted_run_reports_what_it_has(monkeypatch, capsys, tmp_path):
    done = []

    def measure(case, *_, **__):
        if done:
            raise KeyboardInterrupt
        done.append(case)
        return result_of("cross_entropy", 1.0, 2.0, "today")["rows"][0]

    monkeypatch.setattr(command, "measure", measure)
    monkeypatch.setattr(command.machine, "ceilings", lambda *_: CEILINGS)
    assert main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 130
    assert "2.00x (2.00)" in capsys.readouterr().out and list(tmp_path.glob("*.json"))


@pytest.mark.skipif(importlib.util.find_spec("pytest_benchmark") is None, reason="pytest-benchmark is not installed")
def test_pytest_benchmark_suites():
    """All are collected, and one runs."""
    folder = Path(__file__).parents[1] / "benchmarks"
    command = [sys.executable, "-m", "pytest", str(folder), "-q", "-p", "no:cacheprovider"]
    listed = subprocess.run([*command, "--collect-only"], capture_output=True, text=True)
    assert listed.returncode == 0, listed.stdout + listed.stderr
    names = [case.name for case in CASES if "cpu" in case.devices and "cpu" not in case.full_only]
    if not torch.cuda.is_available():
        assert all(f"{name}-ours]".replace(" ", "-") in listed.stdout for name in names)
    arguments = ["--benchmark-disable", "-k", "cosine-256-x-2048-fp32-ours or cosine-256-x-2048-fp32-eager"]
    ran = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert "2 passed" in ran.stdout, ran.stdout + ran.stderr


def test_draw_makes_views_that_are_alike():
    p, z = Draw(CPU, torch.float32).pair(512, 64)
    assert 0.6 < torch.nn.functional.cosine_similarity(p, z).mean() < 0.8 and p.requires_grad and z.requires_grad


def test_check_fails_where_something_is_faster_and_ours_far_from_the_floor():
    def row(ours: float, other: float, floor: float | None) -> dict:
        times = {"ours": ours, "eager": other}
        passes = {name: {"passes": {"total": {"minimum": t, "median": t}}} for name, t in times.items()}
        return {"variants": passes, "absent": {}, "floor": floor}

    near = row(1.0, 0.9, 0.8)
    far = row(1.0, 0.9, 0.7)
    without_floor = row(1.0, 0.9, None)
    missing = {"variants": {}, "absent": {"ours": "wrong"}, "floor": None}
    assert report.beaten([near, row(1.0, 0.98, 0.1)]) == []
    assert report.beaten([far, without_floor, missing]) == [far, without_floor, missing]


def test_scripts_import_what_there_is() -> None:
    """They are in no package whose imports are checked, and most of them run for hours."""
    folder = Path(__file__).parents[1] / "benchmarks"
    names = sorted(path.stem for path in folder.glob("*.py") if not path.name.startswith(("test_", "conftest")))
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n" + "\n".join(f"import {name}" for name in names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("tables")


def test_runs_side_by_side_have_a_core_each(tables):
    lock, busy, seen = threading.Lock(), set(), []

    def work(item: int, core: int | None) -> int:
        with lock:
            assert core not in busy
            busy.add(core)
            seen.append(core)
        time.sleep(0.01)
        busy.remove(core)
        return 10 * item

    assert sorted(tables.spread(work, range(6), [3, 5])) == [0, 10, 20, 30, 40, 50]
    assert set(seen) == {3, 5}
    seen.clear()
    assert list(tables.spread(work, range(3), [])) == [0, 10, 20] and seen == [None] * 3

    done = []

    def fails(item: int, core: int | None) -> None:
        done.append(item)
        raise RuntimeError(str(item))

    with pytest.raises(RuntimeError):  # and those that wait are never begun
        list(tables.spread(fails, range(50), [0]))
    assert len(done) < 50


@pytest.mark.skipif(shutil.which("taskset") is None, reason="binds processes to cores by taskset")
def test_a_row_comes_from_a_process_on_its_core(tables):
    core = min(os.sched_getaffinity(0))
    code = "import json, os; print('ROW', json.dumps([sorted(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS']]))"
    assert tables.row_of([sys.executable, "-c", code], core) == [[core], "1"]
    assert tables.row_of([sys.executable, "-c", "raise ValueError('no')"]) == {"error": "ValueError: no"}


def test_rows_of_several_seeds_are_one(tables):
    rows = [
        {"method": "a", "seed": 0, "kNN": 1.0, "steps": 4},
        {"method": "b", "seed": 0, "error": "no"},
        {"method": "a", "seed": 1, "kNN": 3.0, "steps": 6},
        {"method": "a", "seed": 2, "error": "no"},
    ]
    found = tables.over_seeds(rows, "method", ["kNN"])
    assert found == [{"method": "a", "kNN": "2.0 ± 1.4", "steps": "5.0"}, rows[1]]


def test_a_page_keeps_its_other_rows_and_its_note(tables, tmp_path: Path):
    settings = {"steps": "4"}
    before = [{"method": "a", "seed": 0, "kNN": 1.0}, {"method": "b", "seed": 0, "kNN": 2.0}]
    page = tmp_path / "0.5-minutes"  # a name with a point of its own
    tables.write(page, "t", "about", {}, {**settings, "seeds": "[0]"}, before, note="a note")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.5-minutes.json", "0.5-minutes.md"]
    new = [{"method": "a", "seed": 1, "kNN": 3.0}, {"method": "b", "seed": 0, "kNN": 4.0}]
    assert tables.beside_earlier(page, settings, new, ("method", "seed")) == ([before[0], *new], "a note")
    assert tables.beside_earlier(page, settings, new, ("method",)) == (new, "a note")
    assert tables.beside_earlier(page, {"steps": "5"}, new, ("method",)) == (new, "")
    assert tables.beside_earlier(tmp_path / "none", settings, new, ("method",)) == (new, "")
