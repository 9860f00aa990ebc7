"""The stages: killed and resumed, on two ranks, handed over, collapsed, with bad input; what each must leave alone."""

import re
from pathlib import Path

import pytest
import torch
import torchvision

from common import cli
from common.checkpoints import checkpoints
from common.errors import UserError
from common.results import stages
from common.results.claims import load_paper
from common.runtime import Collapsed
from papers.blockdrop import curriculum, evaluate, finetune, reinforce, reproduce, train, usage
from papers.blockdrop.model import from_torchvision

FOLDER = Path(train.__file__).parent
TINY = {"dataset": "cluttered_digits", "image_size": 16, "train_images": 116, "held_out": 20, "test_images": 40,
        "depth": 14, "widths": (4, 8, 8), "epochs": 2, "milestones": (1,), "batch_size": 16, "log_every": 1}  # fmt: skip
TINY_1 = {"policy_widths": (4, 4, 8), "epochs": 2, "batch_size": 16, "log_every": 1}
TINY_2 = {"epochs": 2, "milestones": (1,), "batch_size": 16, "log_every": 1}
KILLED = "epochs=2 batch_size=16 log_every=1 save_every=4"


def tiny(**changed) -> train.Config:
    return train.Config(**{**TINY, **changed})


def tiny_1(checkpoint, **changed) -> curriculum.Config:
    return curriculum.Config(**{**TINY_1, "checkpoint": str(checkpoint), **changed})


def tiny_2(checkpoint, **changed) -> finetune.Config:
    return finetune.Config(**{**TINY_2, "checkpoint": str(checkpoint), **changed})


@pytest.fixture
def stage_0(job, tmp_path) -> Path:
    """Work dir of a trained ResNet."""
    train.run(tiny(), job(tmp_path / "stage_0"))
    return tmp_path / "stage_0"


@pytest.fixture
def stage_1(stage_0, job, tmp_path) -> Path:
    """Work dir of a policy network after the curriculum."""
    curriculum.run(tiny_1(stage_0), job(tmp_path / "stage_1"))
    return tmp_path / "stage_1"


def parts(folder: Path) -> dict:
    return torch.load(checkpoints(folder)[0], weights_only=True)["state"]["parts"]


# ---------------------------------------------------------------------------------------------- runs
def test_killed_trainings_end_with_bit_identical_weights(survives_kills):
    settings = (
        "dataset=cluttered_digits image_size=12 train_images=116 held_out=20 test_images=40 depth=8 widths=[4,4,8]"
    )
    timeless = ("train_seconds",)
    survives_kills("papers.blockdrop.train", f"{settings} {KILLED} milestones=[1]", 12, every=4, timeless=timeless)


def test_killed_curricula_end_with_bit_identical_weights(stage_0, survives_kills):
    settings = f"checkpoint={stage_0} policy_widths=[4,4,8] {KILLED}"
    survives_kills("papers.blockdrop.curriculum", settings, 12, every=4, timeless=("curriculum_seconds",))


def test_killed_fine_tunings_end_with_bit_identical_weights(stage_1, survives_kills):
    settings = f"checkpoint={stage_1} {KILLED} milestones=[1]"
    survives_kills("papers.blockdrop.finetune", settings, 12, every=4, timeless=("finetune_seconds",))


def test_evaluate_agrees_with_every_stage_in_both_forms(stage_0, stage_1, job, tmp_path):
    found = {
        "stage_0": train.run(tiny(), job(stage_0)).metrics,
        "stage_1": curriculum.run(tiny_1(stage_0), job(stage_1)).metrics,
    }
    for policy in ("learned", "random", "first", "spread", "static"):
        blocks = 0 if policy == "learned" else 2.5
        config = tiny_2(stage_1, policy=policy, blocks=blocks)
        found[policy] = finetune.run(config, job(tmp_path / policy)).metrics
    for name, metrics in found.items():
        for engine in (True, False):
            seen = evaluate.run(evaluate.Config(str(tmp_path / name), engine), job(tmp_path / "seen"))
            for key in set(metrics) & set(seen.metrics):
                assert seen.metrics[key]["last"] == pytest.approx(metrics[key]["last"]), (name, key)
            assert sum(count for _, count in seen.artifacts["commonest"]) <= 40
            assert len(seen.artifacts["block_use"]) == 6
    whole = found["stage_0"]["mult_adds"]["last"]
    assert found["first"]["mult_adds_share"]["last"] == pytest.approx(found["first"]["mult_adds"]["last"] / whole)
    for name in ("random", "first", "spread", "static"):
        assert found[name]["blocks"]["last"] == pytest.approx(2.5, abs=0.3)
        assert (found[name]["unique_policies"]["last"] == 2) is (name != "random")


def test_curriculum_decides_one_block_more_each_epoch_and_leaves_the_resnet_alone(stage_0, job, tmp_path):
    before = parts(stage_0)["model"]
    for epochs in (1, 4):
        found = curriculum.run(tiny_1(stage_0, epochs=epochs, test_every=1), job(tmp_path / str(epochs)))
        assert [line["decided"] for line in found.curve] == list(range(1, epochs + 1))
        assert all(line["blocks"] >= 6 - line["decided"] for line in found.curve)
        after = parts(tmp_path / str(epochs))["model"]
        assert all(torch.equal(after[key], value) for key, value in before.items()), "statistics too"
        use = evaluate.usage(*_policies_and_labels(tmp_path / str(epochs), job(tmp_path / "u")), 10)["block_use"]
        assert len(use) == 6


def _policies_and_labels(folder, job):
    _, policy, settings, _ = evaluate.trained_model(str(folder))
    tests = evaluate.part(settings, job, "test")
    return usage.greedy_policies(policy, tests.loader), torch.cat([y for _, y in tests.loader.epoch(0)])


def test_the_two_losses_of_fine_tuning_share_no_weight():
    """Why the sum beside the mean does no harm: with Adam their ratio cannot matter."""
    model, policy = train.build(tiny(), 10), curriculum.build_policy(tiny_1(""), tiny(), 6)
    x, y = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
    s = policy(x)
    u = reinforce.sample(s, torch.rand(8, 6))
    cross_entropy = torch.nn.functional.cross_entropy(model(x, u), y)
    policy_loss = reinforce.policy_loss(s, u, torch.randn(8), 0.8)
    for loss, mine, other in ((cross_entropy, model, policy), (policy_loss, policy, model)):
        options = {"retain_graph": True, "allow_unused": True}
        assert all(g is None for g in torch.autograd.grad(loss, list(other.parameters()), **options))
        assert any(g is not None for g in torch.autograd.grad(loss, list(mine.parameters()), **options))


def test_baselines_leave_the_policy_network_out_and_static_is_the_best_held_out_subset(stage_1, job, tmp_path):
    found = finetune.run(tiny_2(stage_1, policy="static", blocks=4), job(tmp_path / "static"))
    model, _, settings, _ = evaluate.trained_model(str(stage_1))
    held_out = list(evaluate.part(settings, job(tmp_path), "held_out").loader.epoch(0))
    best = [finetune.subsets.best_subset(model, held_out, k) for k in (4, 5)]
    assert found.artifacts["kept"] == [policy.int().tolist() for policy in best]
    assert found.metrics["blocks"]["last"] == 4
    assert set(parts(tmp_path / "static")["policy"]) == {"kept"}
    learned = finetune.run(tiny_2(stage_1), job(tmp_path / "learned")).metrics
    kept = found.metrics["mult_adds"]["last"]
    assert kept < learned["mult_adds"]["last"] - 1 or learned["blocks"]["last"] < 4, "no policy network to pay for"


def test_weights_of_torchvision_come_in_without_training(job, tmp_path, imagenet_tree):
    net = torchvision.models.resnet18(weights=None, num_classes=3)
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    config = train.Config(
        dataset="imagenet", network="torchvision", depth=18, weights=str(tmp_path / "resnet18.pth"), epochs=0,
        milestones=(), batch_size=4, image_size=64, workers=0,
    )  # fmt: skip
    found = train.run(config, job(tmp_path / "r18", data=imagenet_tree))
    assert found.scale["steps"] == 0
    kept, expected = parts(tmp_path / "r18")["model"], from_torchvision(net).state_dict()
    assert all(torch.equal(kept[key], value) for key, value in expected.items())
    second = tiny_1(tmp_path / "r18", batch_size=4, epochs=1, policy_weights=str(tmp_path / "resnet18.pth"))
    found = curriculum.run(second, job(tmp_path / "r18-1", data=imagenet_tree))
    assert 0 <= found.metrics["blocks"]["last"] <= 8
    policy = parts(tmp_path / "r18-1")["policy"]
    assert policy["net.head.2.weight"].shape == (8, 512)


def test_learns(job, tmp_path):
    config = tiny(train_images=84, epochs=25, milestones=(20,), crop_pad=0, flip=False, widths=(8, 16, 16))
    curve = train.run(config, job(tmp_path)).curve
    assert curve[-1]["train_loss"] < 0.5 * curve[0]["train_loss"]


def test_policy_finds_the_blocks_that_are_worth_their_price(job, tmp_path, monkeypatch):
    """Every prediction right whatever is dropped: the reward grows with each block less, and the policy finds out."""
    monkeypatch.setattr(reinforce, "rewards", lambda u, correct, gamma: 1 - u.float().mean(1) ** 2)
    train.run(tiny(), job(tmp_path / "0"))
    config = tiny_1(tmp_path / "0", epochs=12, lr=0.02, beta=0.0)
    with pytest.raises(Collapsed, match="every image drops all 6 blocks"):
        curriculum.run(config, job(tmp_path / "1"))


def test_two_ranks_average_policy_gradients_and_end_with_the_same_weights(torchrun):
    """The policy gradient is the mean of the halves' (the sum over the batch, of the sums); then all stages whole."""
    out = torchrun(
        f"""
        import torch
        from pathlib import Path
        from common import runtime
        from common.cli import Job
        from papers.blockdrop import curriculum, finetune, reinforce, train
        world = runtime.set_up_world("cpu")
        runtime.seed_everything(0)
        policy = curriculum.build_policy(curriculum.Config(**{TINY_1!r}), train.Config(**{TINY!r}), 6).double().eval()
        x, u, A = torch.randn(8, 3, 16, 16).double(), torch.rand(8, 6) < 0.5, torch.randn(8).double()
        mean = lambda x, u, A: reinforce.curriculum_loss(policy(x), u, A, 4, 0.8, 0.1)
        total = lambda x, u, A: reinforce.policy_loss(policy(x), u, A, 0.8)
        for loss, share in ((mean, 1), (total, world.size)):
            whole = torch.autograd.grad(loss(x, u, A), list(policy.parameters()))
            curriculum.zero_gradients(policy)
            (share * loss(*(t[world.rank::2] for t in (x, u, A)))).backward()
            runtime.average_gradients(p.grad for p in policy.parameters())
            for p, expected in zip(policy.parameters(), whole):
                assert torch.allclose(p.grad, expected, rtol=1e-9, atol=1e-12)
        for script, config in (
            (train, train.Config(**{TINY!r})),
            (curriculum, curriculum.Config(checkpoint="train", **{TINY_1!r})),
            (finetune, finetune.Config(checkpoint="curriculum", **{TINY_2!r})),
        ):
            name = script.__name__.split(".")[-1]
            found = script.run(config, Job(0, world, Path(name), Path("data")))
            blocks = found.metrics.get("blocks", {{"last": 0}})["last"]
            print(f"{{name}} rank {{world.rank}}: {{found.weights_sha256}} {{found.scale['steps']}} {{blocks}} end", flush=True)
        """
    )
    ends = sorted(re.findall(r"(\w+) rank (\d): (\S+) (\d+) (\S+) end", out))
    assert [e[0] for e in ends] == ["curriculum", "curriculum", "finetune", "finetune", "train", "train"]
    for a, b in zip(ends[::2], ends[1::2], strict=True):
        assert a[2:] == b[2:]
    assert {e[3] for e in ends} == {"12"}, "the global batch is shared, not doubled"


# ---------------------------------------------------------------------------------------------- protocols
def test_full_configs_are_the_papers_recipe():
    """The numbers of the paper and its code, one by one."""
    starts = {
        "full": {"dataset": "cifar10", "depth": 110, "widths": (16, 32, 64), "epochs": 164, "batch_size": 128, "lr": 0.1,
                 "milestones": (82, 123), "weight_decay": 1e-4, "crop_pad": 4, "flip": True, "train_images": 0, "held_out": 0},
        "full-imagenet": {"dataset": "imagenet", "network": "torchvision", "depth": 101, "epochs": 0, "image_size": 0},
    }  # fmt: skip
    second = {"lr": 1e-3, "batch_size": 2048, "gamma": 1, "alpha": 0.8, "beta": 0.1}
    third = {"lr": 1e-4, "alpha": 0.8, "policy": "learned"}
    expected = {
        "full": (second | {"epochs": 5000, "policy_widths": (16, 32, 64)},
                 third | {"epochs": 2000, "batch_size": 256, "milestones": (1600,), "gamma": 10}),
        "full-imagenet": (second | {"epochs": 45}, third | {"epochs": 10, "batch_size": 320, "milestones": (), "gamma": 5}),
    }  # fmt: skip
    for name, later in expected.items():
        for script, numbers in zip((train, curriculum, finetune), (starts[name], *later), strict=True):
            config = cli.load_config(script.Config, FOLDER, name, script.__name__.split(".")[-1])
            assert {key: getattr(config, key) for key in numbers} == numbers, (name, script.__name__)
    assert train.learning_rate(cli.load_config(finetune.Config, FOLDER, "full", "finetune"), 1600) == pytest.approx(
        1e-5
    )


def test_every_claim_on_trained_networks_has_the_metric_its_experiment_returns(job, tmp_path, monkeypatch):
    made = {
        "train": (train.Config, TINY),
        "curriculum": (curriculum.Config, TINY_1),
        "finetune": (finetune.Config, TINY_2),
    }

    def settings(config, folder, name, section, **changed):
        changed = {key: value for key, value in changed.items() if key not in ("dataset", "depth")}
        return made[section][0](**made[section][1] | changed)

    monkeypatch.setattr(stages, "load_config", settings)
    found = {}
    for name in ("arms", "c10-r110"):
        found[name] = set(reproduce.EXPERIMENTS[name].measure("quick", job(tmp_path / name)).metrics)
    same = {"c10-arms": "arms"} | dict.fromkeys(("c10-r32", "c100-r110", "c100-r32", "imagenet-r101"), "c10-r110")
    found |= {name: found[like] for name, like in same.items()}
    for claim in load_paper(FOLDER).claims:
        if claim.run and claim.run.experiment in found:
            assert {claim.metric.name, claim.against} - {None} <= found[claim.run.experiment], claim.id


# ---------------------------------------------------------------------------------------------- bad input
VISION = "dataset=cluttered_digits train_images=256 network=torchvision"


@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        (train, "dataset=cluttered_digits train_images=256 depth=21", r"depth=21, expected 6n \+ 2"),
        (train, "dataset=cluttered_digits train_images=256 widths=[16,8,4]", "expected three widths, none below the one before"),
        (train, "epochs=0 milestones=[]", "epochs is 0; expected at least 1, or 0 with weights=FILE"),
        (train, "weights=r.pth", "weights is for network=torchvision"),
        (train, f"{VISION} depth=20", "depth is 20; torchvision has 18,"),
        (train, f"{VISION} depth=18 weights=no.pth", "no weights file 'no.pth'"),
        (train, f"{VISION} depth=18 weights=bad.pt", "bad.pt does not open"),
        (train, f"{VISION} depth=18 weights=other.pt", "other.pt: .*missing"),
        (train, "milestones=[300]", r"milestones are rising epochs below 164; they are \[300\]"),
        (train, "dataset=cifar10", "make data DATASET=cifar10"),
        (curriculum, "checkpoint=nowhere", "no checkpoint at 'nowhere'; give a work dir of papers.blockdrop.train"),
        (curriculum, "alpha=0.5", "alpha is 0.5, beta 0.1, gamma 1.0; expected 0.5 < alpha <= 1"),
        (finetune, "checkpoint=bad.pt", "bad.pt does not open"),
        (finetune, "policy=static", "policy=static with blocks=0; a learned policy chooses how many itself"),
        (finetune, "blocks=3", "policy=learned with blocks=3"),
        (finetune, "policy=best", "policy: Input should be 'learned', 'random', 'first', 'spread' or 'static'"),
        (evaluate, "checkpoint=bad.pt", "bad.pt does not open"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(script, settings, message, tmp_path, refused):
    (tmp_path / "bad.pt").write_bytes(b"PK not a checkpoint")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pt")
    told = refused(script, *([] if script is evaluate else ["--tier", "full"]), "--set", *settings.split())
    assert re.search(message, told), told


def test_stages_are_handed_over_in_order_or_refused(stage_0, stage_1, job, tmp_path):
    finetune.run(tiny_2(stage_1), job(tmp_path / "stage_2"))
    for wrong in (stage_1, tmp_path / "stage_2"):
        with pytest.raises(UserError, match="was not written by papers.blockdrop.train"):
            curriculum.run(tiny_1(wrong), job(tmp_path / "x"))
    for wrong in (stage_0, tmp_path / "stage_2"):
        with pytest.raises(UserError, match="was not written by papers.blockdrop.curriculum"):
            finetune.run(tiny_2(wrong), job(tmp_path / "x"))
    for blocks in (6.5, 100):
        with pytest.raises(UserError, match="expected more than 0, at most 6"):
            finetune.run(tiny_2(stage_1, policy="random", blocks=blocks), job(tmp_path / "x"))
    with pytest.raises(UserError, match=r"gamma: 10.0 there, 5.0 here"):
        finetune.run(tiny_2(stage_1, gamma=5.0), job(tmp_path / "stage_2"))
    train.run(tiny(), job(tmp_path / "other", seed=1))
    with pytest.raises(UserError, match="resnet: "):
        curriculum.run(tiny_1(tmp_path / "other"), job(stage_1))
    train.run(tiny(held_out=0), job(tmp_path / "all"))
    curriculum.run(tiny_1(tmp_path / "all"), job(tmp_path / "all-1"))
    with pytest.raises(UserError, match="train stage 0 with held_out=<images>"):
        finetune.run(tiny_2(tmp_path / "all-1", policy="static", blocks=3), job(tmp_path / "x"))


@pytest.mark.parametrize(
    ("kept", "message"), [(True, "every image keeps all 6 blocks"), (False, "every image drops all 6")]
)
def test_collapsed_policies_stop_with_one_line_and_the_last_checkpoint(
    kept, message, stage_1, job, tmp_path, monkeypatch
):
    monkeypatch.setattr(reinforce, "greedy", lambda s: torch.full_like(s, kept, dtype=torch.bool))
    monkeypatch.setattr(usage, "greedy", reinforce.greedy)
    with pytest.raises(Collapsed, match=f"after epoch 1: {message}.*the last checkpoint is kept"):
        finetune.run(tiny_2(stage_1), job(tmp_path / "2"))
    assert checkpoints(tmp_path / "2")


def test_a_policy_that_decides_for_some_images_is_no_collapse():
    u = torch.ones(5, 4, dtype=torch.bool)
    u[3, 2] = False
    usage.require_decisions(u, "now")
    usage.require_decisions(~u, "now")


def test_non_finite_losses_stop_with_the_last_good_checkpoint(stage_0, stage_1, job, stops_at_nan):
    stops_at_nan(
        reinforce, "policy_loss", lambda folder: finetune.run(tiny_2(stage_1, save_every=2, lr=1e-3), job(folder))
    )


def test_non_finite_reward_stops_the_curriculum(stage_0, job, stops_at_nan):
    run = lambda folder: curriculum.run(tiny_1(stage_0, save_every=2), job(folder))  # noqa: E731
    stops_at_nan(reinforce, "rewards", run)
