"""Claims, records, verdicts and tables."""

import copy
import json
import random
from pathlib import Path

import pytest
import torch
import yaml

from common import runtime
from common.cli import Job
from common.errors import UserError
from common.results import claims, record, records, reproduce, stages, tables
from common.results.records import Measured
from common.results.verdicts import Verdict, judge, number, spread, tolerance
from common.runtime import World

PAPER = yaml.safe_load((claims.PAPERS / "_template" / "paper.yaml").read_text())
NOW = {tier: "now" for tier in ("quick", "short", "full")}


def folder_with(tmp_path: Path, paper: dict) -> Path:
    folder = tmp_path / paper.get("slug", "_template")
    folder.mkdir(exist_ok=True)
    (folder / "paper.yaml").write_text(yaml.safe_dump(paper))
    return folder


# ---------------------------------------------------------------------------------------------- paper.yaml
def changed(path: str, value):
    """PAPER with the field at `path` (dots; numbers index lists) set, or deleted when value is ..."""
    paper = copy.deepcopy(PAPER)
    *parents, last = [int(k) if k.isdigit() else k for k in path.split(".")]
    part = paper
    for key in parents:
        part = part[key]
    if value is ...:
        del part[last]
    else:
        part[last] = value
    return paper


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("title", ..., "title: Field required"),
        ("slug", "other", "slug: is 'other', but the folder is"),
        ("typo", 1, "typo: Extra inputs are not permitted"),
        ("claims", [], "claims: List should have at least 1 item"),
        ("headline", {"nothing": "x"}, "headline: no claim 'nothing'"),
        (
            "claims.3.kind",
            "vibe",
            r"claims\[3\] \(idea-helps\).kind: Input should be 'cost', 'property', 'value', 'order' or 'ratio'",
        ),
        (
            "claims.3.metric.better",
            "up",
            r"claims\[3\] \(idea-helps\).metric.better: Input should be 'lower', 'higher' or 'equal'",
        ),
        ("claims.3.against", ..., r"claims\[3\] \(idea-helps\): kind order needs against"),
        ("claims.3.run", ..., r"claims\[3\] \(idea-helps\): needs either run .* or blocked"),
        ("claims.3.blocked", "no", r"claims\[3\] \(idea-helps\): needs either run .* or blocked"),
        (
            "claims.3.run.tier",
            "huge",
            r"claims\[3\] \(idea-helps\).run.tier: Input should be 'quick', 'short' or 'full'",
        ),
        ("claims.3.run.seeds", [], r"claims\[3\] \(idea-helps\).run.seeds: List should have at least 1 item"),
        ("claims.3.id", "parameters", "claims: claim ids must be unique; more than once: parameters"),
        ("claims.3.id", "Bad Id", r"claims\[3\] \(Bad Id\).id: String should match pattern"),
        ("claims.3.dataset.id", "mars", "paper: claim idea-helps: dataset 'mars' is not under datasets"),
        ("claims.3.deviates", ["d9"], "paper: claim idea-helps: deviates 'd9' is not under deviations"),
        ("claims.0.reported", None, r"claims\[0\] \(parameters\): kind cost needs reported.value"),
        (
            "claims.0.reported",
            {"value": "many"},
            r"claims\[0\] \(parameters\).reported.value: Input should be a valid number",
        ),
        (
            "claims.0.tolerance.abs",
            -1,
            r"claims\[0\] \(parameters\).tolerance.abs: Input should be greater than or equal to 0",
        ),
        ("tiers.quick.time", ..., "tiers.quick.time: Field required"),
    ],
)
def test_every_wrong_field_is_named(tmp_path, path, value, message):
    folder = tmp_path / "_template"
    folder.mkdir()
    (folder / "paper.yaml").write_text(yaml.safe_dump(changed(path, value)))
    with pytest.raises(UserError, match=message) as error:
        claims.load_paper(folder)
    assert "paper.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_and_missing_yaml(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        claims.load_paper(tmp_path)
    (tmp_path / "paper.yaml").write_text("slug: [")
    with pytest.raises(UserError, match="not valid YAML"):
        claims.load_paper(tmp_path)


@pytest.mark.parametrize(("value", "digits"), [(2.57, 2), (24.2, 1), (3, 0), ("1.0e-3", 4), (597, 0)])
def test_printed_digits(value, digits):
    assert claims.Reported.model_validate({"value": value}).digits == digits


# ---------------------------------------------------------------------------------------------- verdicts
def claim(kind="value", reported=2.57, better="lower", **more):
    base = copy.deepcopy(PAPER["claims"][0])
    base |= {"id": "c", "kind": kind, "metric": {"name": "m", "unit": "%", "better": better}, "tolerance": None}
    base["reported"] = None if reported is None else {"value": reported}
    base["run"] = {"experiment": "e", "tier": "full", "seeds": [0]}
    return claims.Claim.model_validate({**base, **more})


def runs(*values, tier="full", fraction=1.0, digest="now", status="ok", device="cpu", **others):
    return [
        {"experiment": "e", "tier": tier, "seed": seed, "status": status, "code_digest": digest, "scale": {"fraction": fraction},
         "hardware": {"device": device}, "weights_sha256": f"w{seed}", "curve": [],
         "metrics": {"m": {"last": v, "best_test": v - 1}, **{k: {"last": o[seed]} for k, o in others.items()}}}
        for seed, v in enumerate(values)
    ]  # fmt: skip


def verdict(c, rs):
    return judge(c, rs, NOW)


def test_value_verdicts_at_the_edges_of_the_tolerance():
    c = claim(tolerance={"abs": 0.1, "why": "test"})
    texts = [(2.57, "matches"), (2.67, "matches"), (2.47, "matches"), (2.68, "within 0.11"), (2.87, "within 0.30"),
             (2.88, "below"), (2.46, "better")]  # fmt: skip
    for value, text in texts:
        assert verdict(c, runs(value)).text == f"{text} (n=1)", value
    up = claim(better="higher", tolerance={"abs": 0.1, "why": "test"})
    assert [verdict(up, runs(v)).kind for v in (2.57, 2.68, 2.40, 2.0)] == ["matches", "better", "within", "below"]
    equal = claim(kind="cost", better="equal", tolerance={"abs": 0, "why": "test"}, reported=100)
    assert [verdict(equal, runs(v)).text for v in (100, 101)] == ["matches", "below"]
    assert verdict(equal, runs(100)).reproduced == "100"


def test_tolerance_is_the_largest_of_its_parts():
    assert tolerance(claim(), [2.6], None) == pytest.approx(0.005)
    assert tolerance(claim(), [2.6], 10_000) == pytest.approx(100 * (0.0257 * 0.9743 / 10_000) ** 0.5)
    assert tolerance(claim(), [2.0, 3.0], 10_000) == pytest.approx(2 * 0.5**0.5)
    spread_out = claim().model_copy(update={"reported": claims.Reported(value=2.57, spread=0.3, digits=2)})
    assert tolerance(spread_out, [2.6], 10_000) == 0.3


def test_reduced_scale_is_shown_and_never_compared():
    for records_ in (runs(2.57, tier="quick"), runs(2.57, fraction=0.5)):
        found = verdict(claim(), records_)
        assert found.kind == "scaled"
        assert "2.57" in found.reproduced


def test_own_tier_is_preferred_then_the_largest():
    both = runs(9.0, tier="short") + runs(2.57)
    assert verdict(claim(), both).tier == "full"
    assert verdict(claim(), runs(9.0, tier="short") + runs(8.0, tier="quick")).tier == "short"


def test_order_needs_the_gain_to_exceed_two_standard_errors():
    c = claim("order", None, against="b")
    assert verdict(c, runs(1, 2, 3, b=[2, 3, 4])).kind == "trend holds"
    assert verdict(c, runs(2, 3, 4, b=[1, 2, 3])).kind == "trend fails"
    assert verdict(c, runs(1, 5, b=[3, 4])).kind == "inconclusive"  # gains 2, -1: 0.5 +- 1.5
    assert verdict(c, runs(0, 0, b=[1, 2.9])).kind == "trend holds"  # 1.95 +- 0.95
    assert verdict(c, runs(0, 0, b=[1, 3.1])).kind == "inconclusive"  # 2.05 +- 1.05
    assert verdict(c, runs(1, b=[2])).text == "trend holds (n=1)"
    assert verdict(c, runs(2, b=[2])).kind == "inconclusive"
    assert verdict(claim("order", None, against="b", margin=1.5), runs(2, 3, 4, b=[1, 2, 3])).kind == "trend holds"
    up = claim("order", None, "higher", against="b")
    assert verdict(up, runs(2, 3, 4, b=[1, 2, 3])).kind == "trend holds"
    assert verdict(c, runs(1, 2, b=[2, 3], fraction=0.01)).text == "trend holds at 1 % of the paper's scale"


def test_order_pairs_by_seed():
    """The spread of the differences counts, not that of the arms."""
    found = verdict(claim("order", None, against="b"), runs(10, 20, 30, b=[11, 21, 31]))
    assert (found.kind, found.reproduced) == ("trend holds", "20 vs 21, gain 1 ± 0 (n=3)")


def test_ratio():
    c = claim("ratio", None, against="b", at_least=3.0)
    assert verdict(c, runs(6, b=[2])).kind == "trend holds"
    assert verdict(c, runs(5.9, b=[2])).kind == "trend fails"
    assert verdict(c, runs(6, 9, b=[2, 3])).reproduced == "3.00 ± 0 (n=2) x"


def test_suffixes():
    c = claim(tolerance={"abs": 1, "why": "test"}, deviates=["d1"])
    assert verdict(c, runs(2.5, 2.6, digest="old")).text == "matches, code changed since, deviates d1"
    assert verdict(c, runs(2.5, 2.6) + runs(0, status="nan")).text == "matches, deviates d1, 1 failed"
    assert verdict(c, runs(0, status="oom")).text == "not run, 1 failed"
    assert verdict(c, []).text == "not run"
    blocked = claim(run=None, blocked="no licence")
    assert verdict(blocked, runs(2.57)).text == "blocked: no licence"


def test_runs_on_a_cpu_and_on_a_gpu_are_never_mixed():
    c, quick = claim(), claim(run={"experiment": "e", "tier": "quick", "seeds": [0]})
    both = runs(1.0, 2.0) + runs(7.0, device="cuda")
    assert verdict(c, both).records == ("e-full-cuda-s0",)
    assert verdict(c, both[:2]).records == ("e-full-s0", "e-full-s1")
    both = runs(1.0, 2.0, tier="quick") + runs(7.0, tier="quick", device="cuda")
    assert verdict(quick, both).records == ("e-quick-s0", "e-quick-s1")
    assert verdict(quick, both[2:]).records == ("e-quick-cuda-s0",)
    gpu = claim(run={"experiment": "e", "tier": "quick", "seeds": [0], "device": "cuda"})
    assert verdict(gpu, both).records == ("e-quick-cuda-s0",)
    assert verdict(gpu, both[:2] + runs(0, tier="quick", status="oom")).text == "not run"


def test_older_code_counts_once_the_code_of_now_has_repeated_its_numbers():
    c = claim(tolerance={"abs": 1, "why": "test"})
    old = runs(2.5, 2.6, 2.7, digest="old")
    assert verdict(c, old).text == "matches, code changed since"
    again = runs(2.5)[0]
    again["repeats"] = records.repeated(old[0], again)
    assert again["repeats"] == {"old": ["m"]}
    assert verdict(c, [again, *old[1:]]).text == "matches"
    older = {**old[1], "code_digest": "older"}
    assert verdict(c, [again, older, old[2]]).text == "matches, code changed since"
    ratio = claim("ratio", None, against="b", at_least=0.5)  # b was not measured again
    assert verdict(ratio, [{**again, "metrics": {**again["metrics"], "b": {"last": 2}}}, *runs(1, 1, b=[1, 1], digest="old")[1:]]
                   ).text == "trend holds, code changed since"  # fmt: skip


def test_what_counts_as_repeated():
    before, after = runs(2.5, digest="old", b=[1])[0], runs(2.5, b=[1.5])[0]
    assert records.repeated(before, after) == {"old": ["m"]}  # b moved
    assert records.repeated(before, {**after, "weights_sha256": "other"}) == {}
    assert records.repeated(before, {**after, "curve": [{"loss": 1.0}]}) == {}
    assert records.repeated({**before, "status": "oom"}, after) == {}
    chained = records.repeated({**before, "repeats": {"older": ["b", "m"], "oldest": ["b"]}}, after)
    assert chained == {"old": ["m"], "older": ["m"], "oldest": []}
    assert records.repeated({**before, "code_digest": "now", "repeats": {"older": ["m"]}}, after) == {"older": ["m"]}
    curves = [{"curve": [{"loss": 1.0, "step": 1}]}, {"curve": [{"loss": 1.0 + 1e-9, "step": 1}]}]
    assert records.repeated(before | curves[0], after | curves[1]) == {"old": ["m"]}  # float32 or float64 at the end


def test_select_best_test():
    c = claim(
        metric={"name": "m", "unit": "%", "better": "lower", "select": "best_test"}, tolerance={"abs": 0, "why": "t"}
    )
    assert verdict(c, runs(3.57)).kind == "matches"


def test_verdict_does_not_depend_on_the_order_of_records():
    rs = runs(1, 2, 3, b=[2, 3, 4.5])
    expected = verdict(claim("order", None, against="b"), rs)
    for _ in range(5):
        random.shuffle(rs)
        assert verdict(claim("order", None, against="b"), rs) == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [(3634678, "3,634,678"), (2.5, "2.500"), (0.00012345, "1.2e-04"), (38.0663, "38.07"), (0, "0"), (-1.5, "-1.500")],
)
def test_numbers(value, text):
    assert number(value) == text


def test_spread():
    assert spread([2.0, 4.0], 2) == "3.00 ± 1.41 (n=2)"
    assert spread([2.5], 1) == "2.5 (n=1)"


# ---------------------------------------------------------------------------------------------- records
def job(tmp_path, seed=0):
    return Job(seed, World(0, 1, torch.device("cpu")), tmp_path / "work", tmp_path)


def small_folder(tmp_path):
    folder = tmp_path / "_template"
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "quick.yaml").write_text("train: {lr: 0.1}\n")
    (folder / "code.py").write_text('"""Doc."""\n\n\ndef f(x):\n    """Doc."""\n    return x + 1  # why\n')
    (folder / "paper.yaml").write_text(yaml.safe_dump(PAPER))
    return folder


def test_record_holds_what_a_verdict_and_a_reader_need(tmp_path):
    folder = small_folder(tmp_path)
    made = records.execute(lambda: Measured({"m": {"last": 1.5}}, {"lr": 0.1}), folder, "arms", "quick", job(tmp_path))
    assert made == records.read_record(tmp_path / "work" / "record.json")
    for key in ("argv", "config", "config_digest", "seed", "commit", "dirty", "code_digest", "data", "hardware", "versions",
                "numerics", "scale", "seconds", "peak_memory_mib", "metrics", "curve", "status"):  # fmt: skip
        assert key in made, key
    assert made["status"] == "ok"
    assert made["hardware"]["device"] == "cpu"
    assert made["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps({k: v for k, v in made.items() if k != "argv"}), (
        "no machine path in a record"
    )


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (runtime.NotFinite("nan"), "nan"),
        (runtime.Collapsed("all on"), "collapsed"),
        (torch.OutOfMemoryError("big"), "oom"),
        (MemoryError(), "oom"),
        (runtime.Stopped("s"), "killed"),
        (KeyboardInterrupt(), "killed"),
        (ZeroDivisionError("x"), "error"),
    ],
)
def test_failures_are_records_too_and_are_raised(tmp_path, error, status):
    def fail():
        raise error

    with pytest.raises(type(error)):
        records.execute(fail, small_folder(tmp_path), "arms", "quick", job(tmp_path))
    assert records.read_record(tmp_path / "work" / "record.json")["status"] == status


def test_refused_input_leaves_no_record(tmp_path):
    def fail():
        raise UserError("bad")

    with pytest.raises(UserError):
        records.execute(fail, small_folder(tmp_path), "arms", "quick", job(tmp_path))
    assert not (tmp_path / "work").exists()


def test_code_digest_sees_code_and_configs_not_words(tmp_path):
    folder = small_folder(tmp_path)
    before = records.code_digest(folder, "quick")
    code = folder / "code.py"
    text = code.read_text()
    code.write_text(text.replace("Doc", "Other words").replace("# why", "# because") + "\n\n# end\n")
    (folder / "figures.py").write_text("x = 1\n")
    (folder / "configs" / "quick.yaml").write_text("# a header\ntrain:\n  lr: 0.1\n")
    (folder / "configs" / "full.yaml").write_text("train: {lr: 0.2}\n")
    assert records.code_digest(folder, "quick") == before
    assert records.code_digest(folder, "full") != before
    code.write_text(text.replace("x + 1", "x + 2"))
    assert records.code_digest(folder, "quick") != before
    code.write_text(text)
    (folder / "configs" / "quick-other.yaml").write_text("train: {lr: 0.3}\n")
    assert records.code_digest(folder, "quick") != before


def test_finished_runs_are_reused_only_when_nothing_changed(tmp_path):
    folder, here = small_folder(tmp_path), job(tmp_path)
    assert records.reusable(here.work_dir, folder, here) is None
    records.execute(lambda: Measured({"m": {"last": 1}}), folder, "arms", "quick", here)
    assert records.reusable(here.work_dir, folder, here)["metrics"] == {"m": {"last": 1}}
    assert records.reusable(here.work_dir, folder, job(tmp_path, seed=1)) is None
    (folder / "configs" / "quick.yaml").write_text("train: {lr: 0.2}\n")
    assert records.reusable(here.work_dir, folder, here) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "is not a record of a run; missing: paper"),
        ('{"paper": "x"}', "missing: experiment, tier, seed"),
        ('{"paper": "x", "experiment": "e", "tier": "quick", "seed": 0, "status": "ok", "code_digest": "", "hardware": {}, '
         '"versions": {}}', "missing: metrics"),
        ('{"paper": "x", "experiment": "e", "tier": "quick", "seed": 0, "status": "fine", "code_digest": "", "hardware": {}, '
         '"versions": {}}', "status is 'fine', expected one of ok, oom"),
    ],
)  # fmt: skip
def test_unsound_records_are_refused(tmp_path, text, message):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=message):
        records.read_record(tmp_path / "r.json")


def test_record_is_promoted_only_when_a_claim_refers_to_it(tmp_path):
    folder = small_folder(tmp_path)
    made = records.execute(lambda: Measured({"test_error": {"last": 1}}), folder, "arms", "quick", job(tmp_path, 3))
    target = record.promote(tmp_path / "work", tmp_path)
    assert target == folder / "results" / "arms-quick-s3.json"
    assert records.load_records(folder) == [made]
    (folder / "code.py").write_text("x = 2\n")
    records.execute(lambda: Measured({"test_error": {"last": 1}}), folder, "arms", "quick", job(tmp_path, 3))
    record.promote(tmp_path / "work", tmp_path)
    assert records.load_records(folder)[0]["repeats"] == {made["code_digest"]: ["test_error"]}
    records.execute(lambda: Measured({}), folder, "other", "quick", job(tmp_path))
    with pytest.raises(
        UserError, match="no claim of _template is measured by experiment 'other'; experiments: arms, costs, step"
    ):
        record.promote(tmp_path / "work", tmp_path)
    with pytest.raises(UserError, match="does not exist; a run writes it"):
        record.promote(tmp_path / "nowhere.json", tmp_path)


# ---------------------------------------------------------------------------------------------- tables
def test_fill_replaces_only_between_the_marks(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- t:begin -->\nold\n<!-- t:end -->\nb\n")
    text = tables.fill(page, "t", "new")
    assert text.startswith("a\n<!-- t:begin -->\n")
    assert text.endswith("\nnew\n<!-- t:end -->\nb\n")
    page.write_text(text)
    assert tables.fill(page, "t", "new") == text
    page.write_text("none")
    with pytest.raises(UserError, match="needs exactly one <!-- t:begin -->"):
        tables.fill(page, "t", "new")


def test_table_links_each_seed_to_its_record():
    c = claim(tolerance={"abs": 1, "why": "test"})
    rows = [(c, verdict(c, runs(2.5, 2.6)))]
    line = tables.claim_table(rows).splitlines()[2]
    assert "[0](results/e-full-s0.json) [1](results/e-full-s1.json)" in line
    assert "2.57" in line
    assert "matches" in line
    assert "2.550 ± 0.071 (n=2)" in tables.terminal_table(rows)


def toy(kind: str, what: str, verdict_kind: str, **more):
    c = claim(kind, **({"reported": None, "against": "b", "at_least": 2.0} if kind == "ratio" else {}), **more)
    text = f"{verdict_kind} at 1 % of the paper's scale" if verdict_kind == "trend fails" else verdict_kind
    shown = "1.50 x" if verdict_kind == "trend fails" else ""
    return c.model_copy(update={"id": what, "what": what}), Verdict(verdict_kind, text, shown, "quick", ("e-quick-s0",))


def test_the_overview_says_what_held_what_did_not_and_what_nobody_ran():
    gpu = {"experiment": "e", "tier": "quick", "seeds": [0], "device": "cuda"}
    paper = claims.Paper.model_validate(changed("headline", {"idea-helps": "It is | faster"}))
    rows = [toy("ratio", "idea-helps", "trend fails"), toy("property", "b", "matches"), toy("value", "c", "not run"),
            toy("ratio", "d", "not run", run=gpu), toy("value", "e", "blocked", run=None, blocked="no licence")]  # fmt: skip
    page = tables.results_page([(paper, rows)])
    top, fell, absent = page.split("## What did not hold")[0], page.split("## What")[1], page.split("## What")[2]
    assert (
        "| [Template](papers/_template) | It is \\| faster | 1.50 x | trend fails at 1 % of the paper's scale |" in top
    )
    assert "| [Template](papers/_template) | 1 matches | 1 trend fails, 1 not run | 1 not run, 1 blocked |" in top
    assert "5 claims of 1 papers" in top
    assert "1 trends were measured at a fraction" in top
    assert [row.split(" | ")[1] for row in fell.splitlines() if row.startswith("| [")] == ["`idea-helps`"]
    told = "**1** at tier full (one GPU; CIFAR-10), **1** by `make gpu`, minutes, **1** blocked: see there why."
    assert f"- [Template](papers/_template): {told}" in absent


# ---------------------------------------------------------------------------------------------- reproduce
def test_tier_without_experiments_says_which_to_try(tmp_path):
    paper = claims.load_paper(claims.PAPERS / "_template")
    tiers = {"costs": ("quick",), "step": ("quick",), "arms": ("quick", "full")}
    experiments = {name: reproduce.Experiment(None, found) for name, found in tiers.items()}
    assert reproduce.chosen(paper, experiments, "quick", None, "cpu") == ["costs", "step", "arms"]
    assert reproduce.chosen(paper, experiments, "full", "idea-helps", "cpu") == ["arms"]
    with pytest.raises(UserError, match="nothing to run for parameters at tier full; try TIER=quick"):
        reproduce.chosen(paper, experiments, "full", "parameters", "cpu")
    with pytest.raises(UserError, match="nothing to run for _template at tier short"):
        reproduce.chosen(paper, experiments, "short", None, "cpu")


def test_what_needs_a_gpu_runs_on_one_alone():
    paper = changed("claims.2.run.device", "cuda")
    paper = claims.Paper.model_validate(paper)
    experiments = dict.fromkeys(("costs", "step", "arms"), reproduce.Experiment(None, ("quick",)))
    assert reproduce.chosen(paper, experiments, "quick", None, "cpu") == ["costs", "arms"]
    assert reproduce.chosen(paper, experiments, "quick", None, "cuda") == ["costs", "step", "arms"]
    with pytest.raises(UserError, match="claim step-time is measured on cuda, this run is on cpu; set DEVICE"):
        reproduce.chosen(paper, experiments, "quick", "step-time", "cpu")


def test_one_experiment():
    paper = claims.Paper.model_validate(changed("claims.2.run.device", "cuda"))
    experiments = dict.fromkeys(("costs", "step", "arms"), reproduce.Experiment(None, ("quick",)))
    assert reproduce.chosen(paper, experiments, "quick", None, "cpu", "arms") == ["arms"]
    assert reproduce.chosen(paper, experiments, "quick", None, "cuda", "step") == ["step"]
    with pytest.raises(UserError, match="experiment step is measured on cuda, this run is on cpu; set DEVICE"):
        reproduce.chosen(paper, experiments, "quick", None, "cpu", "step")
    with pytest.raises(UserError, match="nothing to run for arms at tier full; try TIER=quick"):
        reproduce.chosen(paper, experiments, "full", None, "cpu", "arms")
    with pytest.raises(UserError, match="_template has no experiment 'none'; it has: costs, step, arms"):
        reproduce.chosen(paper, experiments, "quick", None, "cpu", "none")


def test_template_reproduces_end_to_end_and_reuses(tmp_path, monkeypatch, capsys):
    """Smoke and more: the table has both claims, the second call measures nothing again, and --resume never does."""
    from papers._template.reproduce import EXPERIMENTS

    small = {"train_images": 64, "test_images": 32, "epochs": 1}
    load_config = stages.load_config
    monkeypatch.setattr(stages, "load_config", lambda *given, **changed: load_config(*given, **changed, **small))
    monkeypatch.chdir(tmp_path)
    script = str(claims.PAPERS / "_template" / "reproduce.py")
    reproduce.main(EXPERIMENTS, script, ["--seeds", "0 1"])
    out = capsys.readouterr().out
    assert "matches" in out
    assert "gain" in out
    assert "0 of 5 claims were not measured here" in out
    reproduce.main(EXPERIMENTS, script, ["--seeds", "0 1"])
    assert capsys.readouterr().out.count("done before") == 6
    first = json.loads((tmp_path / "runs/_template/arms-quick-s0/record.json").read_text())
    reproduce.main(EXPERIMENTS, script, ["--resume", "never", "--claim", "idea-helps"])
    out = capsys.readouterr().out
    assert "done before" not in out
    assert "parameters" not in out.split("claim ")[1]
    again = json.loads((tmp_path / "runs/_template/arms-quick-s0/record.json").read_text())
    assert again["weights_sha256"] == first["weights_sha256"]
    for arm in ("norm", "plain"):
        assert again["metrics"][f"{arm}_test_error"] == first["metrics"][f"{arm}_test_error"]
