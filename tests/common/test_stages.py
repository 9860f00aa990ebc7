"""Experiments of several stages, and timing: what reproduce.py and kernels/bench.py of all folders share."""

import itertools
import time
import types

import pytest
import torch

from common.cli import Job
from common.errors import UserError
from common.metrics import kernel_time
from common.results.records import Measured, metric
from common.results.stages import gpu_tests, one_record, run_stage, share_of, tier_config
from common.runtime import World
from papers._template import train


def job(tmp_path, device: str = "cpu") -> Job:
    return Job(0, World(0, 1, torch.device(device)), tmp_path, tmp_path)


def stage(name: str, steps: int = 10, **more) -> Measured:
    scale = {"epochs": 1, "steps": steps, "batch": 4}
    return Measured({}, {"of": name}, scale, {f"set/{name}": "digest"}, {"amp": False}, [{"loss": 1.0}], **more)


def test_a_cpu_takes_the_short_tier_by_its_own_config(tmp_path):
    cpu, cuda = job(tmp_path), job(tmp_path, "cuda")
    assert [tier_config(tier, cpu) for tier in ("quick", "short", "full")] == ["quick", "short-cpu", "full"]
    assert [tier_config(tier, cuda) for tier in ("quick", "short", "full")] == ["quick", "short", "full"]


def test_a_stage_runs_its_section_of_the_config_in_a_folder_of_its_own(tmp_path):
    seen = []
    script = types.SimpleNamespace(__file__=train.__file__, Config=train.Config, run=lambda *a: seen.append(a))
    run_stage(script, "quick", job(tmp_path), "first", epochs=7)
    config, given = seen[0]
    assert (config.epochs, config.dataset) == (7, train.Config().dataset)
    assert given.work_dir == tmp_path / "first"
    with pytest.raises(UserError, match="unknown config key 'epoch'; did you mean epochs"):
        run_stage(script, "quick", job(tmp_path), "first", epoch=7)
    with pytest.raises(UserError, match="no config 'slow'"):
        run_stage(script, "slow", job(tmp_path), "first")


def test_one_record_of_two_stages(tmp_path):
    first, second = stage("a", artifacts={"genotype": 1}), stage("b", 20, weights_sha256="w")
    made = one_record({"m": metric(1)}, {"a": first, "b": second}, "b", 0.5)
    assert made.config == {"a": {"of": "a"}, "b": {"of": "b"}}
    assert made.scale == {"epochs": 1, "steps": 20, "batch": 4, "fraction": 0.5}
    assert made.data == {"set/a": "digest", "set/b": "digest"}
    assert made.curve == [{"stage": "a", "loss": 1.0}, {"stage": "b", "loss": 1.0}]
    assert (made.artifacts, made.weights_sha256) == ({"a": {"genotype": 1}}, "w")
    assert one_record({}, {"a": first}, "a", 1, {"table": []}).artifacts == {"table": []}


def test_share_of_the_papers_images():
    assert share_of(1000, stage("a", 25), stage("b", 25)) == pytest.approx(200 / 970)
    assert share_of(100, stage("a", 25)) == 1
    assert share_of(50_000 * 160, stage("a", 160 * (50_000 // 1024) * 256)) == 1  # 848 images an epoch are dropped


def test_plain_numbers_become_metrics():
    found = Measured.of({"count": 3, "share": torch.tensor(0.5)}, config={"a": 1})
    assert found.metrics == {"count": {"last": 3}, "share": {"last": 0.5}}
    assert found.config == {"a": 1}
    assert metric(2.5, 100) == {"last": 2.5, "n": 100}


def test_times_take_turns_and_tell_slow_from_fast():
    calls = []

    def call(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    pairs = {"slow": 0.05, "fast": 0.001}
    timed = {name: lambda name=name, seconds=s: call(name, seconds) for name, s in pairs.items()}
    found = kernel_time.times_ms(timed, "cpu", 2, 0.01)
    assert found["slow"] >= 50 > found["fast"] >= 1
    switches = sum(a != b for a, b in itertools.pairwise(calls))
    assert switches == 3  # slow, fast, slow, fast


def test_copy_bandwidth_counts_bytes_both_ways(monkeypatch):
    monkeypatch.setattr(kernel_time, "times_ms", lambda calls, device: {"copy": 2.0})
    assert kernel_time.copy_gb_per_s("cpu", 1) == pytest.approx(2 * 2**20 / 2e-3 / 1e9)


def test_what_does_not_compile_is_left_out(monkeypatch, capsys):
    def refuse(fn, options):
        def made(*inputs):
            raise RuntimeError("no compiler\nand more")

        return made

    monkeypatch.setattr(torch, "compile", refuse)
    assert kernel_time.compiled(torch.sin, torch.zeros(2)) == {}
    assert capsys.readouterr().out == "compiled: left out, RuntimeError: no compiler\n"


def test_the_command_of_a_kernel_bench(capsys):
    def bench(device, quick):
        if device == "cuda" and not quick:
            raise UserError("no CUDA device here")
        return [{"device": device, "quick": quick}]

    kernel_time.main(bench, str, "what it does", ["--quick"])
    assert capsys.readouterr().out == "[{'device': 'cpu', 'quick': True}]\n"
    for argv in (["--device", "cuda"], ["--device", "tpu"]):
        with pytest.raises(SystemExit) as end:
            kernel_time.main(bench, str, "what it does", argv)
        assert end.value.code == 2
    assert "error: no CUDA device here\n" in capsys.readouterr().err


GPU_TESTS = """
import pytest
pytestmark = pytest.mark.gpu
def test_right(): pass
def test_right_too(): pass
def test_wrong(): assert False
@pytest.mark.skip(reason="for the count")
def test_skipped(): pass
"""


def test_gpu_tests_are_counted(tmp_path):
    script, tests = tmp_path / "papers" / "mine" / "reproduce.py", tmp_path / "tests" / "papers" / "mine"
    with pytest.raises(UserError, match="run this in the repository"):
        gpu_tests(str(script))
    tests.mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tests / "test_mine.py").write_text(GPU_TESTS)
    assert gpu_tests(str(script)).metrics == {"failed": {"last": 1}, "passed": {"last": 2}, "skipped": {"last": 1}}
    (tests / "test_mine.py").write_text(GPU_TESTS.replace("pytest.mark.gpu", "pytest.mark.skip"))
    with pytest.raises(RuntimeError, match="no test of mine ran"):
        gpu_tests(str(script))
