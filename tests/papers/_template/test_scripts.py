"""train.py, evaluate.py: killed and resumed, on two ranks, with bad input; the metrics that claims name are there."""

import re
from pathlib import Path

import pytest
import torch

from common.results.claims import load_paper
from papers._template import evaluate, figures, reproduce, train

FOLDER = Path(train.__file__).parent
TINY = {"image_size": 16, "train_images": 96, "test_images": 40, "batch_size": 16, "epochs": 2, "log_every": 1}


def tiny(**changed) -> train.Config:
    return train.Config(**{**TINY, **changed})


# ---------------------------------------------------------------------------------------------- runs
def test_killed_runs_end_with_bit_identical_weights(survives_kills):
    settings = " ".join(f"{key}={value}" for key, value in TINY.items())
    survives_kills("papers._template.train", f"{settings} save_every=4", 12, every=4, timeless=("train_seconds",))


def test_learns_and_evaluate_agrees(job, tmp_path):
    found = train.run(tiny(train_images=64, epochs=30, crop_pad=0, flip=False), job(tmp_path / "train"))
    losses = [line["train_loss"] for line in found.curve]
    assert losses[-1] < 0.8 * losses[0]
    again = evaluate.run(evaluate.Config(str(tmp_path / "train")), job(tmp_path / "evaluate")).metrics
    assert again["test_error"] == found.metrics["test_error"]
    assert again["mult_adds"]["last"] == 8 * 8 * 27 * 16 + 4 * 4 * 9 * 16 * 32 + 320


def test_imagenet_form_on_a_tiny_tree(imagenet_tree, job, tmp_path):
    settings = {"dataset": "imagenet", "image_size": 32, "workers": 0, "batch_size": 6, "held_out": 6}
    found = train.run(tiny(**settings), job(tmp_path / "train", data=imagenet_tree))
    assert found.scale["steps"] == 10  # 30 of 36 images in sixes, twice


def test_two_ranks_share_the_batch_and_end_with_the_same_weights(torchrun):
    out = torchrun(
        f"""
        from pathlib import Path
        from common import runtime
        from common.cli import Job
        from papers._template import train
        world = runtime.set_up_world("cpu")
        found = train.run(train.Config(**{TINY!r}), Job(0, world, Path("work"), Path("data")))
        print(f"rank {{world.rank}}: {{found.weights_sha256}} {{found.scale['steps']}} end", flush=True)
        """
    )
    ends = sorted(re.findall(r"rank (\d): (\S+) (\d+) end", out))
    assert [(rank, steps) for rank, _, steps in ends] == [("0", "12"), ("1", "12")]
    assert ends[0][1] == ends[1][1]


def test_non_finite_loss_stops_with_the_last_good_checkpoint(job, stops_at_nan):
    stops_at_nan(train.F, "cross_entropy", lambda folder: train.run(tiny(save_every=2), job(folder)))


# ---------------------------------------------------------------------------------------------- claims
def test_claims_name_metrics_that_their_experiments_return(job, tmp_path, monkeypatch):
    monkeypatch.setattr("common.results.stages.load_config", lambda *_, **changed: tiny(**changed))
    monkeypatch.setattr(reproduce, "step_bench", lambda **_: dict.fromkeys(("plain_ms", "norm_ms"), 1.0))
    found = {
        name: experiment.measure("quick", job(tmp_path / name)) for name, experiment in reproduce.EXPERIMENTS.items()
    }
    for claim in load_paper(FOLDER).claims:
        assert {claim.metric.name, claim.against} - {None} <= set(found[claim.run.experiment].metrics), claim.id
    assert found["arms"].scale["fraction"] == pytest.approx(192 / (0.97 * reproduce.IMAGES_SEEN))
    record = {"experiment": "arms", "tier": "quick", "curve": found["arms"].curve}
    figures.draw([record, record], tmp_path / "figures")
    assert (tmp_path / "figures" / "learning-arms-quick.png").stat().st_size > 1000


# ---------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        (train, "width=0", "width=0, classes=10: expected at least 1 and 2"),
        (train, "epochs=0", "epochs, batch_size, log_every and save_every must be at least 1"),
        (train, "dataset=digits train_images=0 test_images=0", "image_size 16 does not divide 8"),
        (train, "widht=4", "unknown config key 'widht'; did you mean width?"),
        (evaluate, "checkpoint=nowhere", "no checkpoint at 'nowhere'; give a work dir of papers._template.train"),
        (evaluate, "checkpoint=bad.pt", "bad.pt does not open"),
        (evaluate, "checkpoint=another.pt", "was not written by papers._template.train"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(script, settings, message, tmp_path, refused):
    torch.save({"identity": {"script": "another.train"}}, tmp_path / "another.pt")
    (tmp_path / "bad.pt").write_bytes(b"PK not a checkpoint")
    told = refused(script, "--set", *settings.split())
    assert re.search(message, told), told
