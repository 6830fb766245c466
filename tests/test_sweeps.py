"""Combinators of sweeps, and every sweep file of the project against the tiny corpus."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from analysis.learning_rate import optima
from analysis.tables import read_table
from bitnet_jax import ladder
from bitnet_jax.configs.resolve import resolve
from bitnet_jax.errors import ConfigError
from bitnet_jax.optim import tuned_peak_lr
from bitnet_jax.precision import get_precision
from experiments.plan import load_config, load_points, make_plan
from sweeps import isoflop, study
from sweeps.grid import axis, chain, parse_arg, product, zipit

FOLDER = Path(isoflop.__file__).parent
FILES = sorted(set(FOLDER.glob("*.py")) - {FOLDER / "__init__.py", FOLDER / "grid.py"})
# These compare variants of one arm; all others compare the two arms.
OF_VARIANTS = ("ingredients", "optimizers", "presets", "gradients")


def test_axis():
    assert axis("seed", (0, 1)) == [{"seed": 0}, {"seed": 1}]
    assert axis("train.tokens", [(1, 2)]) == [{"train.tokens": (1, 2)}]


def test_product_varies_the_last_fastest():
    points = product(axis("a", [1, 2]), axis("b", "xy"), axis("c", [0]))
    assert [(p["a"], p["b"], p["c"]) for p in points] == [
        (1, "x", 0), (1, "y", 0), (2, "x", 0), (2, "y", 0),
    ]  # fmt: skip
    assert product() == [{}]
    assert product(axis("a", [1]), []) == []


def test_zipit_goes_side_by_side():
    assert zipit(axis("a", [1, 2]), axis("b", [3, 4])) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    with pytest.raises(ConfigError, match="2 of a, 1 of b"):
        zipit(axis("a", [1, 2]), axis("b", [3]))


def test_chain_goes_one_after_the_other():
    assert chain(axis("a", [2]), axis("b", [3]), axis("a", [1])) == [{"a": 2}, {"b": 3}, {"a": 1}]


@pytest.mark.parametrize("combine", [product, zipit])
def test_clashes_are_named(combine):
    with pytest.raises(ConfigError, match="set a, c"):
        combine([{"a": 1, "b": 2, "c": 1}], [{"c": 3, "a": 1}])


def test_combinators_leave_their_arguments_alone():
    first, second = axis("a", [1, 2]), axis("b", [3])
    product(first, second)[0]["a"] = 9
    assert (first, second) == (axis("a", [1, 2]), axis("b", [3]))


def test_parse_arg():
    assert parse_arg(None, size="1m", n="2") == {"size": "1m", "n": "2"}
    assert parse_arg("", size="1m") == {"size": "1m"}
    assert parse_arg("n=3,size=a=b", size="1m", n="2") == {"size": "a=b", "n": "3"}
    for bad in ("sizes=3", "800k", "=3"):
        with pytest.raises(ConfigError, match=r"takes size=, n=") as error:
            parse_arg(bad, size="1m", n="2")
        assert repr(bad) in str(error.value)


def test_no_defaults_are_changed():
    """`get_config` gives a fresh config each time: overrides do not leak into the next sweep."""
    for file in FILES:
        load_config(str(file)).model.size = "27k"
        assert load_config(str(file)).sweep != {}, file


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def planned(request, tiny_corpus, tmp_path):
    path = str(request.param)
    config = load_config(path)
    return config, make_plan(config, load_points(path, config), tiny_corpus, tmp_path)


def test_every_sweep_is_a_plan(planned, tmp_path):
    """All points resolve, no two are the same run, and nothing is written."""
    config, plan = planned
    ids = [run.spec.run_id for run in plan.runs]
    assert len(set(ids)) == len(ids) >= 8
    arms = {run.spec.step.precision.name for run in plan.runs}
    assert config.name in OF_VARIANTS or arms >= {"ternary", "fp16"}
    assert plan.name == config.name and plan.directory == tmp_path / config.name
    assert not list(tmp_path.iterdir())


def test_arms_are_paired(planned):
    """Each ternary run has an fp16 twin that differs in the arm and its learning rate alone; in the
    study each arm has a weight decay of its own, too."""
    config, plan = planned
    if config.name in OF_VARIANTS:
        pytest.skip("it has no pairs of arms")

    def twin(spec):
        same = spec.step.model, spec.ends, spec.batch_size, spec.schedule
        decay = None if config.sweep.get("part") else spec.weight_decay
        return (*same, spec.seed_init, spec.seed_data, decay, spec.step.optimizer)

    arms = {
        name: sorted(
            repr(twin(run.spec)) for run in plan.runs if run.spec.step.precision.name == name
        )
        for name in ("ternary", "fp16")
    }
    assert arms["ternary"] == arms["fp16"]


def test_variants_have_their_base_at_every_seed(planned):
    """Tags say what a run is a variant of; effects are differences at one seed."""
    config, plan = planned
    if config.name not in ("ingredients", "presets"):
        pytest.skip("it has no base")
    seeds = {}
    for run in plan.runs:
        tags = dict(run.spec.tags)
        variant = tags["base"], tags["kind"], tags["change"]
        seeds.setdefault(variant, []).append(run.spec.seed_init)
        assert run.spec.seed_data == run.spec.seed_init
        assert (tags["kind"] == "base") == (tags["change"] == "")
    assert {tuple(found) for found in seeds.values()} == {tuple(config.sweep.seeds)}
    assert {(base, "base", "") for base, _, _ in seeds} <= set(seeds) and len(seeds) > 5


def plan_of(name, corpus, workdir, arg=""):
    path = str(FOLDER / f"{name}.py")
    config = load_config(f"{path}:{arg}" if arg else path)
    return config, make_plan(config, load_points(path, config), corpus, workdir)


def test_quickstart_is_large_enough(tiny_corpus, tmp_path):
    """At least 4 sizes x 2 budgets x both arms, on WikiText-2."""
    config, plan = plan_of("quickstart", tiny_corpus, tmp_path)
    assert config.data.source == "wikitext-2"
    assert len({run.spec.step.model for run in plan.runs}) >= 4
    points = {
        (run.spec.size, end, run.spec.step.precision.name)
        for run in plan.runs
        for end in run.spec.ends
    }
    for arm in ("ternary", "fp16"):
        sizes = {size for size, _, name in points if name == arm}
        assert sizes == set(config.sweep.sizes)
        assert len(sizes) >= 4
        for size in sizes:
            assert sum(p[0] == size and p[2] == arm for p in points) >= 2


@pytest.mark.parametrize("size", ["800k", "330k", "160k", "60m"])
def test_isoflop_budgets_are_equal_in_compute(tiny_corpus, tmp_path, size):
    """Each size spends each budget to within half a batch of its own tokens, and one to spare."""
    config, plan = plan_of("isoflop", tiny_corpus, tmp_path, f"size={size}")
    sizes = config.sweep.sizes
    assert sizes[-1] == size and len(sizes) == (4 if size == "160k" else 5)
    runs = [run.spec for run in plan.runs if run.spec.step.precision.name == "fp16"]
    assert [spec.size for spec in runs] == list(sizes)
    assert len({spec.step.model for spec in runs}) == len(sizes)
    middle = runs[len(runs) // 2]
    for i, multiple in enumerate(config.sweep.budgets):
        spent = [spec.ends[i] * spec.batch_tokens * spec.flops_per_token for spec in runs]
        goal = spent[len(runs) // 2]
        for flops, spec in zip(spent, runs, strict=True):
            batch = spec.batch_tokens * spec.flops_per_token
            slack = (batch + middle.batch_tokens * middle.flops_per_token) / 2
            assert abs(flops - goal) <= slack
        parameters = {"800k": 160e3, "330k": 95e3, "160k": 95e3, "60m": 6.8e6}[size]
        tokens = middle.ends[i] * middle.batch_tokens
        assert tokens / (20 * parameters) == pytest.approx(multiple, rel=0.1)


def test_isoflop_sizes_that_cannot_be():
    for arg, right in (("27k", "needs four sizes; take 160k"), ("5k", "choose from 27k")):
        with pytest.raises(ConfigError, match=right):
            isoflop.get_config(f"size={arg}")


def grid_file(tmp_path, text):
    path = tmp_path / "chosen.csv"
    path.write_text(text)
    return path


def test_isoflop_takes_a_grid(tmp_path, tiny_corpus):
    """Rows of a size and seed are ends of one run, in both arms; other columns are left alone."""
    path = grid_file(
        tmp_path,
        "size,params_non_embedding,tokens,seed\n27k,27040,150000,0\n27k,27040,80000,0\n"
        "27k,27040,80000,1\n56k,55888,90000.0,0\n",
    )
    config, plan = plan_of("isoflop", tiny_corpus, tmp_path, f"grid={path}")
    assert config.name == "isoflop-chosen"
    for arm in ("ternary", "fp16"):
        specs = [run.spec for run in plan.runs if run.spec.step.precision.name == arm]
        assert [(spec.size, spec.seed_init, spec.ends) for spec in specs] == [
            ("27k", 0, (78, 146)), ("27k", 1, (78,)), ("56k", 0, (88,)),
        ]  # fmt: skip


def test_isoflop_grid_counts_seeds_or_takes_one(tmp_path):
    def runs(text):
        return isoflop.read_grid(str(grid_file(tmp_path, text)))

    assert runs("size,tokens\n27k,80000\n27k,90000\n") == (("27k", 0, (80_000, 90_000)),)
    assert runs("size,tokens,seeds\n27k,80000,2\n27k,90000,1\n") == (
        ("27k", 0, (80_000, 90_000)), ("27k", 1, (80_000,)),
    )  # fmt: skip


def test_a_grid_changes_no_default(tmp_path):
    """The profile's own config and points, of which identities are made, are as ever."""
    config = isoflop.get_config()
    assert config == isoflop.get_config("size=800k") and config.name == "isoflop-800k"
    assert "grid" not in config.sweep and config.sweep.budgets == (0.5, 0.8, 1.25, 2.0)
    points = isoflop.sweep(config)
    assert len(points) == 10 and set(points[0]) == {"model.size", "train.tokens", "precision"}
    assert points[-1]["train.tokens"] == isoflop.budgets_in_tokens(config, "800k")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("size,tokens\n", "it has no rows"),
        ("", "it has no rows"),
        ("name,tokens\n27k,80000\n", "a row has no 'size'"),
        ("size,flops\n27k,80000\n", "a row has no 'tokens'"),
        ("size,tokens\n27k\n", "a row has no 'tokens'"),
        ("size,tokens\n5k,80000\n", "choose from 27k"),
        ("size,tokens\n27k,many\n", "tokens 'many'; expected a whole number from 1"),
        ("size,tokens\n27k,0\n", "tokens '0'; expected a whole number from 1"),
        ("size,tokens\n27k,8.5\n", "tokens '8.5'; expected a whole number"),
        ("size,tokens,seed\n27k,80000,-1\n", "seed '-1'; expected a whole number from 0"),
        ("size,tokens,seeds\n27k,80000,0\n", "seeds '0'; expected a whole number from 1"),
    ],
)
def test_isoflop_grids_that_cannot_be(tmp_path, text, right):
    with pytest.raises(ConfigError, match=right) as error:
        isoflop.get_config(f"grid={grid_file(tmp_path, text)}")
    assert "\n" not in str(error.value)


def test_isoflop_takes_a_size_or_a_grid_that_is_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        isoflop.get_config("grid=absent.csv")
    path = grid_file(tmp_path, "size,tokens\n27k,80000\n")
    with pytest.raises(ConfigError, match="a grid has its own sizes"):
        isoflop.get_config(f"size=800k,grid={path}")


def test_learning_rates_bracket_the_default(tiny_corpus, tmp_path):
    """Each arm's own default lies inside the grid at each size, not at its edge."""
    config, plan = plan_of("learning_rate", tiny_corpus, tmp_path)
    for size in config.sweep.sizes:
        for arm in ("ternary", "fp16"):
            rates = [
                run.spec.peak_lr
                for run in plan.runs
                if (run.spec.size, run.spec.step.precision.name) == (size, arm)
            ]
            assert sorted(rates) == sorted(set(rates)) and len(rates) >= 5
            default = load_config(str(FOLDER / "quickstart.py"))
            default.update_from_flattened_dict({"model.size": size, "precision": arm})
            peak = resolve(default, tiny_corpus).peak_lr
            assert sorted(rates)[0] < peak < sorted(rates)[-1]


def test_seeds_differ_in_nothing_else(tiny_corpus, tmp_path):
    _, plan = plan_of("seeds", tiny_corpus, tmp_path)
    for arm in ("ternary", "fp16"):
        specs = [run.spec for run in plan.runs if run.spec.step.precision.name == arm]
        assert len({spec.seed_init for spec in specs}) == len(specs) >= 5
        assert all(spec.seed_init == spec.seed_data for spec in specs)
        assert len({(spec.step, spec.ends, spec.peak_lr) for spec in specs}) == 1


def kind_of(spec):
    return dict(spec.tags)["kind"]


def test_branching_runs_each_endpoint_three_ways(tiny_corpus, tmp_path):
    """Of one arm and seed: the trunk, and runs of their own that differ in ends and warm-up."""
    config, plan = plan_of("branching", tiny_corpus, tmp_path)
    assert (config.name, config.model.size) == ("branching", "95k")
    groups = {}
    for run in plan.runs:
        key = run.spec.step.precision.name, run.spec.seed_init
        groups.setdefault(key, []).append(run.spec)
    assert set(groups) == {(arm, seed) for arm in ("ternary", "fp16") for seed in (0, 1, 2)}
    for specs in groups.values():
        (trunk,) = [spec for spec in specs if kind_of(spec) == "branched"]
        assert trunk.ends == (195, 391, 781) and trunk.schedule.warmup_steps == 20
        ways = {
            kind: [(s.ends, s.schedule.warmup_steps) for s in specs if kind_of(s) == kind]
            for kind in ("same", "own")
        }
        assert ways == {
            "same": [((195,), 20), ((391,), 20), ((781,), 20)],
            "own": [((391,), 39), ((781,), 78)],
        }
        for spec in specs:
            assert dict(spec.tags)["decay_fraction"] == "0.2"
            as_trunk = {"ends": trunk.ends, "schedule": trunk.schedule, "tags": trunk.tags}
            assert dataclasses.replace(spec, **as_trunk) == trunk


def test_branching_of_other_sizes_and_budgets(tiny_corpus, tmp_path):
    """Whatever rounds: `same` has the trunk's warm-up, and no run is planned twice."""
    config, plan = plan_of("branching", tiny_corpus, tmp_path, "size=27k")
    assert config.model.size == "27k" and plan.runs[0].spec.size == "27k"
    config.sweep.budgets = (77_000, 77_800, 800_000)  # 75, 76 and 781 steps
    config.schedule.decay_fraction = 0.3
    points = load_points(str(FOLDER / "branching.py"), config)
    specs = [run.spec for run in make_plan(config, points, tiny_corpus, tmp_path).runs]
    assert len(specs) == 6 * (1 + 3 + 1), "a tenth of 75 and of 76 steps are 8 steps"
    for spec in specs:
        assert spec.schedule.warmup_steps == (78 if kind_of(spec) == "own" else 8)
        assert dict(spec.tags)["decay_fraction"] == "0.3"


@pytest.mark.parametrize(
    "axes",
    [
        {"budgets": (200_000,)},
        {"budgets": ()},
        {"warmup_fraction": 0.0},
        {"budgets": (200_000, 201_000)},  # 195 and 196 steps
    ],
    ids=str,
)
def test_branching_needs_warm_ups_that_differ(axes):
    config = load_config(str(FOLDER / "branching.py"))
    config.sweep.update(axes)
    with pytest.raises(ConfigError, match=r"^sweep\.budgets=.*warm-ups differ"):
        load_points(str(FOLDER / "branching.py"), config)


def test_branching_of_a_size_that_is_not():
    with pytest.raises(ConfigError, match="choose from 27k"):
        load_config(f"{FOLDER / 'branching.py'}:size=5k")


LARGEST = [name for i, name in enumerate(ladder.LADDER) if i >= 3]


@pytest.mark.parametrize("size", LARGEST)
def test_isoflop_branches_save_two_fifths(tiny_corpus, tmp_path, size):
    """FLOPs of the sweep over those of a run for each endpoint: the goal is .6 at every size."""
    _, plan = plan_of("isoflop", tiny_corpus, tmp_path, f"size={size}")
    specs = [run.spec for run in plan.runs]
    ratio = sum(s.total_flops for s in specs) / sum(s.independent_flops for s in specs)
    assert all(len(spec.ends) == 4 for spec in specs)
    assert ratio <= 0.6
    assert ratio == pytest.approx((0.8 * 2 + 0.2 * 4.55) / 4.55, abs=0.002)


@pytest.mark.parametrize("budget", study.BUDGETS)
@pytest.mark.parametrize("part", study.PARTS)
def test_study_pairs_its_arms(part, budget):
    """Each float16 run has a ternary twin: the same size, seed and tokens."""
    points = study.sweep(study.get_config(f"part={part},budget={budget}"))
    kinds = [
        (p["precision"], p["model.size"], p.get("seed", 0), p["train.tokens"])
        for p in points
        if p["precision"] in study.PAIR and not any(k.startswith("quantization") for k in p)
    ]
    twins = {arm: sorted(k[1:] for k in kinds if k[0] == arm) for arm in study.PAIR}
    assert twins["ternary"] == twins["fp16"]
    assert part == "arms" or kinds


def test_study_grid_has_five_sizes_of_five_ratios_and_three_seeds_at_the_small_end():
    points = study.sweep(study.get_config("part=grid"))
    ratios = {
        tuple(round(t / ladder_parameters(p["model.size"]), 2) for t in p["train.tokens"])
        for p in points
    }
    assert ratios == {(10, 20, 40, 80, 160)}
    seeds = {}
    for p in points:
        if p["precision"] == "ternary":
            seeds.setdefault(p["model.size"], []).append(p["seed"])
    assert len(seeds) == 5 and seeds["27k"] == [0, 1, 2] == seeds["95k"]


def test_study_checks_rates_that_were_extrapolated():
    """On either side of what the grid or the held-out part takes there, at sizes not tuned."""
    taken_there = {
        (p["model.size"], p["precision"]): p
        for part in ("grid", "held_out")
        for p in study.sweep(study.get_config(f"part={part}"))
    }
    points = study.sweep(study.get_config("part=rate_check"))
    assert {p["model.size"] for p in points}.isdisjoint(study.BUDGETS["cpu"].tuned)
    for p in points:
        taken = taken_there[p["model.size"], p["precision"]]
        assert p["optim.peak_lr"] / taken["optim.peak_lr"] in study.CHECKS
        assert p["optim.weight_decay"] == taken["optim.weight_decay"]
        assert set(p["train.tokens"]) < set(taken["train.tokens"])


@pytest.mark.parametrize("part", study.PARTS)
def test_the_study_s_tables_have_its_runs(part):
    """Each run of a part is in its table with all of its budgets, and nothing else is."""
    config = study.get_config(f"part={part}")
    decay = config.optim.weight_decay
    wanted = {
        (p["model.size"], _arm(p), p.get("seed", 0), round(tokens / config.train.batch_tokens),
         f"{p['optim.peak_lr']:.5g}", p.get("optim.weight_decay", decay))
        for p in study.sweep(config) for tokens in p["train.tokens"]
    }  # fmt: skip
    table = read_table(FOLDER.parent / f"results/study-cpu/{part}/endpoints.csv")
    table["batches"] = table["tokens"] // table["batch_tokens"]
    table["rate"] = [f"{rate:.5g}" for rate in table["peak_lr"]]
    columns = ["size", "precision", "seed", "batches", "rate", "weight_decay"]
    assert set(table[columns].itertuples(index=False, name=None)) == wanted
    assert len(table) == len(wanted) and (table["status"] == "ok").all()


def _arm(point):
    """As a table names it."""
    changes = [f"{key.partition('.')[2]}={point[key]}" for key in point if key.startswith("quant")]
    return "+".join([point["precision"], *changes])


def test_study_takes_the_rates_that_its_first_part_found():
    """The constants are the least-squares fit to the committed optima."""
    table = read_table(FOLDER.parent / "results/study-cpu/learning_rate/endpoints.csv")
    found = optima(table)
    found = found[found["tokens"] / found["params_non_embedding"] > 30]
    found = found[found["tokens"] / found["params_non_embedding"] < 50]
    ternary = (found["precision"] == "ternary").to_numpy(float)
    columns = [ternary, 1 - ternary, np.log(found["params_non_embedding"] / 1e5)]
    fit = np.linalg.lstsq(np.stack(columns, axis=1), np.log(found["optimum"]), rcond=None)[0]
    tuned = study.BUDGETS["cpu"].found
    constants = np.log(tuned.ternary), np.log(tuned.floating), tuned.exponent
    np.testing.assert_allclose(fit, constants, atol=0.02)
    for arm, rate in (("ternary", tuned.ternary), ("fp16", tuned.floating)):
        assert study.peak_lr(study.BUDGETS["cpu"], "95k", {"precision": arm}) == pytest.approx(
            rate * 0.94976**tuned.exponent
        )


def test_study_takes_the_decays_that_its_second_part_found():
    table = read_table(FOLDER.parent / "results/study-cpu/weight_decay/endpoints.csv")
    for arm in study.PAIR:
        means = table[table["precision"] == arm].groupby("weight_decay")["loss"].mean()
        (decay,) = study.weight_decay(study.BUDGETS["cpu"], {"precision": arm}).values()
        assert means[decay] < means.min() + 1e-3


def test_study_that_has_tuned_nothing_takes_the_default_recipe():
    points = study.sweep(study.get_config("part=grid,budget=gpu"))
    assert not any("optim.weight_decay" in p for p in points)
    for p in points:
        arm = get_precision(p["precision"])
        default = tuned_peak_lr(arm, ladder_parameters(p["model.size"]))
        assert p["optim.peak_lr"] == pytest.approx(default)


def ladder_parameters(size):
    """Non-embedding, counted by hand: four projections, a gated MLP, and the norms."""
    layers, width, ff, _, _ = ladder.LADDER[size]
    norms = 3 * width + ff  # attention, before out, MLP; before down
    return layers * (4 * width * width + 3 * width * ff + norms) + width


@pytest.mark.parametrize("arg", ["part=nothing", "budget=tpu", "sizes=27k"])
def test_study_refuses_what_it_does_not_have(arg):
    with pytest.raises(ConfigError):
        study.get_config(arg)
