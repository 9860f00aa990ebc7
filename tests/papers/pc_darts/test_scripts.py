"""search.py, train.py and evaluate.py: killed and resumed, on two ranks, with bad input."""

import json
import re
from pathlib import Path

import pytest
import torch

from common import cli, runtime
from common.cli import Job
from common.errors import UserError
from common.results import stages
from common.runtime import World
from papers.pc_darts import evaluate, reproduce, search, train
from papers.pc_darts.genotypes import PUBLISHED
from papers.pc_darts.schedule import learning_rate

ROOT = Path(__file__).resolve().parents[3]
TINY_SEARCH = {"dataset": "cluttered_digits", "image_size": 16, "train_images": 64, "C": 4, "K": 2, "layers": 3, "epochs": 2,
               "arch_start": 1, "batch_size": 16, "log_every": 1}  # fmt: skip
TINY_TRAIN = {"dataset": "cluttered_digits", "image_size": 16, "train_images": 64, "test_images": 40, "C": 4, "layers": 3,
              "epochs": 2, "batch_size": 16, "auxiliary": 0, "log_every": 1, "cutout": 4}  # fmt: skip
KILLED = {
    "search": "dataset=cluttered_digits image_size=12 train_images=192 crop_pad=2 flip=true C=4 K=2 layers=3 epochs=2 "
    "arch_start=1 batch_size=16 log_every=1 save_every=4",
    "train": "dataset=cluttered_digits image_size=12 train_images=128 test_images=64 crop_pad=2 cutout=4 C=4 layers=3 "
    "epochs=2 batch_size=16 drop_path=0.3 auxiliary=0 log_every=1 save_every=4",
}


# ---------------------------------------------------------------------------------------------- killed and resumed
@pytest.mark.parametrize(("script", "steps"), [("search", 12), ("train", 16)])
def test_killed_runs_end_with_bit_identical_weights(script, steps, survives_kills):
    timeless = ("search_seconds", "gpu_days", "train_seconds")
    survives_kills(f"papers.pc_darts.{script}", KILLED[script], steps, every=4, timeless=timeless)


def test_equal_search_time_is_measured_once(tmp_path, job, monkeypatch):
    """A run that was stopped finds another ratio of times; it goes on with the first, as its checkpoints ask."""
    settings = {"search": (search.Config, TINY_SEARCH), "train": (train.Config, TINY_TRAIN)}

    def load(config, folder, name, section, **changed):
        made, values = settings[section]
        return made(**{**values, "epochs": 1, **changed})

    monkeypatch.setattr(stages, "load_config", load)
    tries = []
    for ratio, resume in ((2.0, "auto"), (1.6, "auto"), (1.6, "never")):
        monkeypatch.setattr(reproduce, "k1_over_k4", lambda name, job, ratio=ratio: ratio)
        tries.append(reproduce.search_vs_random("short", job(tmp_path, resume=resume), randoms=1, k1=True))
    assert [found.config["search_k1"]["train_images"] for found in tries] == [32, 32, 40]
    assert [tries[1].curve, tries[1].weights_sha256] == [tries[0].curve, tries[0].weights_sha256]


# ---------------------------------------------------------------------------------------------- learning
def test_search_learns_and_only_moves_the_architecture_after_the_warm_up(tmp_path, job):
    config = search.Config(**{**TINY_SEARCH, "epochs": 1, "arch_start": 1})
    runtime.seed_everything(0)
    model = search.build(config, 10)
    before = [p.detach().clone() for p in model.arch_parameters()]
    found = search.run(config, job(tmp_path / "warm"))
    after = [torch.tensor(p) for p in found.artifacts["alphas_betas"]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "arch_start epochs leave it alone"
    found = search.run(search.Config(**TINY_SEARCH), job(tmp_path / "search"))
    after = [torch.tensor(p) for p in found.artifacts["alphas_betas"]]
    moved = [(a - b).abs().max().item() for a, b in zip(before, after, strict=True)]
    assert all(0 < m <= 2 * 6e-4 * 1.1 for m in moved), "two Adam steps move each entry by at most 2 lr"
    assert found.curve[-1]["train_loss"] < found.curve[0]["train_loss"]
    assert json.loads((tmp_path / "search" / "genotype.json").read_text())["normal_concat"] == [2, 3, 4, 5]


def test_architecture_step_leaves_weights_and_weight_step_leaves_architecture():
    config = search.Config(**TINY_SEARCH)
    model = search.build(config, 10)
    weights, arch = list(model.parameters()), list(model.arch_parameters())
    weight_optimiser, arch_optimiser = search.optimisers(config, model)
    held = [w for group in weight_optimiser.param_groups for w in group["params"]]
    assert not {id(a) for a in arch} & {id(w) for w in held}, "no decay on the architecture"
    x, y = torch.rand(8, 3, 16, 16), torch.arange(8)

    def copies(tensors):
        return [t.detach().clone() for t in tensors]

    def same(tensors, others):
        return [torch.equal(a, b) for a, b in zip(tensors, others, strict=True)]

    w0, a0 = copies(weights), copies(arch)
    search.architecture_step(config, model, arch, arch_optimiser, x, y)
    assert all(same(weights, w0))
    assert not any(same(arch, a0))
    a1 = copies(arch)
    search.weight_step(config, model, weights, weight_optimiser, x, y)
    assert all(same(arch, a1))
    assert not all(same(weights, w0))


def test_arch_clip_bounds_the_gradient():
    config = search.Config(**TINY_SEARCH, arch_clip=1e-4)
    model = search.build(config, 10)
    arch = list(model.arch_parameters())
    search.architecture_step(
        config, model, arch, search.optimisers(config, model)[1], torch.rand(8, 3, 16, 16), torch.arange(8)
    )
    assert torch.cat([a.grad.flatten() for a in arch]).norm() == pytest.approx(1e-4, rel=1e-3)


def test_train_overfits_and_evaluate_agrees_with_it(tmp_path, job):
    """The network learns 64 images; evaluate.py reads the checkpoint and gives the same test error and closed-form counts."""
    config = train.Config(
        **{**TINY_TRAIN, "epochs": 12, "lr": 0.1, "drop_path": 0, "cutout": 0, "crop_pad": 0, "flip": False}
    )
    found = train.run(config, job(tmp_path / "train"))
    assert found.curve[-1]["train_loss"] < 0.5 * found.curve[0]["train_loss"]
    assert found.metrics["test_error"]["n"] == 40
    again = evaluate.run(evaluate.Config(checkpoint=str(tmp_path / "train")), job(tmp_path / "evaluate"))
    assert again.metrics["test_error"] == {"last": found.metrics["test_error"]["last"], "n": 40}
    model = train.build(config, PUBLISHED["PC_DARTS_cifar"], 10)
    assert again.metrics["parameters"]["last"] == sum(p.numel() for p in model.parameters())
    assert again.metrics["mult_adds_paper"]["last"] > again.metrics["mult_adds"]["last"] > 0


def test_same_seed_same_run_other_seed_other_run(tmp_path, job):
    runs = [train.run(train.Config(**TINY_TRAIN), job(tmp_path / str(i), seed)) for i, seed in enumerate((0, 0, 1))]
    assert runs[0].weights_sha256 == runs[1].weights_sha256 != runs[2].weights_sha256


# ---------------------------------------------------------------------------------------------- schedules and protocols
def test_learning_rates_by_hand():
    cosine = train.Config(lr=0.025, epochs=600)
    assert learning_rate(cosine, 0) == 0.025
    assert learning_rate(cosine, 300) == pytest.approx(0.0125)
    assert learning_rate(cosine, 599) == pytest.approx(0.025 * 6.85e-6, rel=1e-2)
    linear = train.Config(lr=0.5, epochs=250, schedule="linear", lr_warmup=5)
    assert [learning_rate(linear, e) for e in (0, 4)] == pytest.approx([0.1, 0.5])
    assert learning_rate(linear, 5) == pytest.approx(0.5 * 240 / 245)
    assert [learning_rate(linear, e) for e in (244, 245, 249)] == pytest.approx([0.5 / 245, 0.5 * 5 / 1225, 0.5 / 1225])
    darts = search.Config(lr=0.025, lr_min=0.001, epochs=50)
    assert learning_rate(darts, 25) == pytest.approx(0.013)


def test_full_configs_are_the_papers_recipe():
    """The paper's numbers, one by one: README commands must be the paper's recipe."""
    folder = ROOT / "papers" / "pc_darts"
    expected = {
        ("full", "search"): {"C": 16, "layers": 8, "K": 4, "epochs": 50, "arch_start": 15, "batch_size": 256, "lr": 0.1,
                             "lr_min": 0, "momentum": 0.9, "weight_decay": 3e-4, "clip": 5, "arch_lr": 6e-4,
                             "arch_betas": (0.5, 0.999), "arch_weight_decay": 1e-3, "arch_clip": 0, "edge_norm": True,
                             "train_images": 0, "image_size": 0, "crop_pad": 4, "flip": True, "dataset": "cifar10"},
        ("full", "train"): {"C": 36, "layers": 20, "epochs": 600, "batch_size": 96, "lr": 0.025, "lr_min": 0, "cutout": 16,
                            "auxiliary": 0.4, "drop_path": 0.3, "weight_decay": 3e-4, "clip": 5, "momentum": 0.9,
                            "label_smoothing": 0, "train_images": 0, "test_images": 0, "schedule": "cosine"},
        ("full-darts", "search"): {"K": 1, "edge_norm": False, "arch_start": 0, "batch_size": 64, "lr": 0.025,
                                   "lr_min": 0.001, "arch_lr": 3e-4, "epochs": 50},
        ("full-imagenet", "search"): {"K": 2, "fractions": (0.1, 0.025), "epochs": 50, "arch_start": 35, "batch_size": 1024,
                                      "lr": 0.5, "lr_warmup": 5, "arch_lr": 6e-3, "arch_clip": 5, "C": 16, "layers": 8},
        ("full-imagenet", "train"): {"C": 48, "layers": 14, "epochs": 250, "batch_size": 1024, "lr": 0.5, "lr_warmup": 5,
                                     "weight_decay": 3e-5, "schedule": "linear", "label_smoothing": 0.1, "drop_path": 0,
                                     "auxiliary": 0.4, "clip": 5, "cutout": 0},
    }  # fmt: skip
    for (name, section), values in expected.items():
        config = cli.load_config({"search": search, "train": train}[section].Config, folder, name, section)
        assert {key: getattr(config, key) for key in values} == values, (name, section)


# ---------------------------------------------------------------------------------------------- ImageNet, tiny
def test_imagenet_search_and_training_on_a_tiny_tree(imagenet_tree, tmp_path):
    here = Job(0, World(0, 1, torch.device("cpu")), tmp_path / "search", imagenet_tree)
    tiny = {"dataset": "imagenet", "image_size": 32, "workers": 0, "C": 4, "layers": 3, "epochs": 2, "log_every": 1}
    found = search.run(search.Config(**tiny, K=2, fractions=(0.5, 0.5), arch_start=1, batch_size=6, arch_clip=5), here)
    assert found.scale["steps"] == 6  # 18 images in 6s, twice
    assert 0 <= found.metrics["held_out_accuracy"]["last"] <= 100
    settings = train.Config(
        **tiny, genotype=str(tmp_path / "search" / "genotype.json"), batch_size=6, auxiliary=0, schedule="linear",
        label_smoothing=0.1, lr_warmup=1,
    )  # fmt: skip
    trained = train.run(settings, Job(0, here.world, tmp_path / "train", imagenet_tree))
    assert trained.scale["steps"] == 12
    assert trained.metrics["test_error"]["n"] == 12
    again = evaluate.run(evaluate.Config(str(tmp_path / "train")), Job(0, here.world, tmp_path / "e", imagenet_tree))
    assert again.metrics["test_error"]["last"] == pytest.approx(trained.metrics["test_error"]["last"], abs=1e-4)


# ---------------------------------------------------------------------------------------------- two ranks
def test_two_ranks_give_the_single_process_gradients_and_the_same_weights(torchrun):
    """Both steps of the search: averaged gradients = mean of the halves' (each its own batch statistics), to 1e-6.

    Then a whole search and a whole training (DDP) under torchrun: the ranks end with identical weights.
    """
    out = torchrun(
        f"""
        import torch, torch.nn.functional as F
        from pathlib import Path
        from common import runtime
        from common.cli import Job
        from papers.pc_darts import search, train
        world = runtime.set_up_world("cpu")
        config = search.Config(**{TINY_SEARCH!r})
        runtime.seed_everything(0)
        model = search.build(config, 10).double()
        arch, weights = list(model.arch_parameters()), list(model.parameters())
        x, y = torch.rand(8, 3, 16, 16, dtype=torch.double), torch.arange(8)
        halves = [torch.autograd.grad(F.cross_entropy(model(x[r::2]), y[r::2]), [*arch, *weights]) for r in (0, 1)]
        expected = [(a + b) / 2 for a, b in zip(*halves)]
        optimisers = [torch.optim.SGD(p, 0.0) for p in (weights, arch)]  # steps that move nothing, to see the gradients
        search.architecture_step(config, model, arch, optimisers[1], x[world.rank::2], y[world.rank::2])
        config.clip = 1e9
        search.weight_step(config, model, weights, optimisers[0], x[world.rank::2], y[world.rank::2])
        for p, e in zip([*arch, *weights], expected):
            assert torch.allclose(p.grad, e, rtol=1e-6, atol=1e-9), (p.grad - e).abs().max()
        for script, config in ((search, config), (train, train.Config(**{TINY_TRAIN!r}))):
            found = script.run(config, Job(0, world, Path(script.__name__), Path("data")))
            print(f"{{script.__name__}} rank {{world.rank}}: {{found.weights_sha256}} {{found.scale['steps']}} end", flush=True)
        """
    )
    ends = sorted(re.findall(r"(papers\S+) rank (\d): (\S+) (\d+) end", out))
    assert [(e[0].split(".")[-1], e[1]) for e in ends] == [
        ("search", "0"),
        ("search", "1"),
        ("train", "0"),
        ("train", "1"),
    ]
    assert [e[3] for e in ends] == ["4", "4", "8", "8"], "the global batch is shared, not doubled"


# ---------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        ("search", "dataset=cifar10", "make data DATASET=cifar10"),
        ("search", "dataset=cifar11", "unknown dataset 'cifar11'"),
        ("search", "K=3", r"K must divide C \(16\), as C/K channels pass through the operations; K is 3"),
        ("search", "dataset=cluttered_digits train_images=100 batch_size=64", "batch size 64 does not fit"),
        ("search", "cell=fast", "cell: Input should be 'shared' or 'plain'"),
        ("search", "arch_start=99", r"arch_start must lie in 0..epochs \(50\)"),
        ("search", "kk=4", "unknown config key 'kk'"),
        ("search", "dataset=imagenet", "imagenet"),
        (
            "train",
            "genotype=PC_DARTS",
            "no genotype 'PC_DARTS'; expected one of PC_DARTS_cifar, PC_DARTS_image, DARTS_V1",
        ),
        (
            "train",
            "genotype=bad.json dataset=cluttered_digits",
            "bad.json: normal\\[0\\]: unknown operation 'conv_9x9'",
        ),
        ("train", "drop_path=1.0", "drop_path is a probability below 1"),
        ("train", "dataset=digits", "digits has 1 channel"),
        ("evaluate", "checkpoint=nowhere", "no checkpoint at 'nowhere'; give a work dir of papers.pc_darts.train"),
        ("evaluate", "checkpoint=bad.pt", "bad.pt does not open"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(script, settings, message, tmp_path, refused):
    genotype = json.loads(PUBLISHED["PC_DARTS_cifar"].to_json())
    genotype["normal"][0][0] = "conv_9x9"
    (tmp_path / "bad.json").write_text(json.dumps(genotype))
    (tmp_path / "bad.pt").write_bytes(b"PK not a checkpoint")
    tier = [] if script == "evaluate" else ["--tier", "full"]
    told = refused({"search": search, "train": train, "evaluate": evaluate}[script], *tier, "--set", *settings.split())
    assert re.search(message, told), told


def test_cuda_that_is_not_there(tmp_path, monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there, so asking for it is no error")
    with pytest.raises(SystemExit) as stopped:
        cli.main(search.run, search.Config, search.__file__, ["--device", "cuda", "--work-dir", str(tmp_path)])
    assert stopped.value.code == 2
    assert "sees no CUDA device; use --device cpu" in capsys.readouterr().err


def test_checkpoint_of_another_config_is_refused(tmp_path, job):
    train.run(train.Config(**TINY_TRAIN), job(tmp_path))
    with pytest.raises(
        UserError,
        match=r"lr: 0.025 there, 0.5 here; C: |C: 4 there, 8 here; lr: 0.025 there, 0.5 here|C: 4 there, 8 here, lr",
    ):
        train.run(train.Config(**{**TINY_TRAIN, "C": 8, "lr": 0.5}), job(tmp_path))
    with pytest.raises(UserError, match="seed: 0 there, 1 here"):
        train.run(train.Config(**TINY_TRAIN), job(tmp_path, seed=1))
    search.run(search.Config(**TINY_SEARCH), job(tmp_path / "s"))
    with pytest.raises(UserError, match="was not written by papers.pc_darts.train"):
        evaluate.run(evaluate.Config(checkpoint=str(tmp_path / "s")), job(tmp_path / "e"))


@pytest.mark.parametrize("script", [search, train])
def test_non_finite_loss_stops_with_the_last_good_checkpoint(script, job, stops_at_nan):
    settings = TINY_SEARCH if script is search else TINY_TRAIN
    config = script.Config(**{**settings, "epochs": 3, "save_every": 2})
    stops_at_nan(torch.nn.functional, "cross_entropy", lambda folder: script.run(config, job(folder)))


def test_unwritable_work_dir_is_one_line(tmp_path, job):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write .* choose another --work-dir|cannot write"):
        train.run(train.Config(**TINY_TRAIN), job(tmp_path / "file" / "work"))
