"""What the stages made, read back and put side by side: tables for the comparison."""

import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from experiments.experiment import Experiment
from experiments.methods import METHODS
from experiments.records import measurements
from experiments.stats import interval
from legr.files import read_json


def distinct(networks: pd.DataFrame) -> pd.DataFrame:
    """Rows of `Experiment.networks`, without those whose network another method has, too: it was trained once."""
    return networks.drop_duplicates(["target", "trial", "flops", "test_loss"])


def accuracies(table: pd.DataFrame) -> pd.DataFrame:
    """Fine-tuned test accuracy in percent, mean and half of the 95% interval: methods by FLOPs left."""
    groups = (100 * table.set_index(["method", "target"]).accuracy).groupby(level=[0, 1], sort=False)
    cells = groups.agg(lambda a: f"{a.mean():.2f}" + (f" ± {interval(a):.2f}" if len(a) > 1 else ""))
    wide = cells.unstack().sort_index(axis=1, ascending=False)
    wide = wide.reindex([name for name in METHODS if name in wide.index])
    return wide.rename(index={name: method.label for name, method in METHODS.items()}, columns="{:.0%}".format)


def markdown(frame: pd.DataFrame) -> str:
    """A table with its index as columns."""
    rows = frame.reset_index()
    lines = [rows.columns, ["---"] * rows.shape[1], *rows.astype(str).to_numpy()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def shared_with_norm_only(exp: Experiment) -> pd.DataFrame:
    """Filters in common with norm-only's network of the same target, in percent of those in either of the two.

    Means over trials: a row for each method, a column for each target, from the highest down.
    """

    def shared(method: str, target: float, trial: int) -> float:
        kept, kept_by_norm = torch.cat(exp.select(method, target, trial)), torch.cat(exp.select("norm", target))
        return 100 * ((kept & kept_by_norm).sum() / (kept | kept_by_norm).sum()).item()

    targets = sorted(exp.settings.targets, reverse=True)
    rows = {
        METHODS[method].label: [
            statistics.mean(shared(method, target, trial) for trial in exp.trials(method)) for target in targets
        ]
        for method in exp.methods
        if method != "norm"
    }
    return pd.DataFrame(rows, index=[f"{target:.0%}" for target in targets]).T.rename_axis("method")


def correlations(table: pd.DataFrame, fitness: Sequence[str]) -> pd.DataFrame:
    """How well each fitness predicts: Spearman's ρ with the accuracy, over all rankings and within each kind.

    The 95% interval is by Fisher's z, with the standard error of Bonett and Wright (Psychometrika 65, 2000). Kinds of
    fewer than four rankings are left out.

    Args:
        table: columns target, source, accuracy, and one for each fitness.
        fitness: its columns to look at.
    """
    rows = []
    for (target, rows_of_target), column in itertools.product(table.groupby("target"), fitness):
        kinds = [(source, rankings) for source, rankings in rows_of_target.groupby("source") if len(rankings) >= 4]
        for source, rankings in [("all", rows_of_target), *kinds]:
            rho, count = rankings[[column, "accuracy"]].corr("spearman").iloc[0, 1], len(rankings)
            z = math.atanh(0.999 * rho)
            half = 1.96 * math.sqrt((1 + rho**2 / 2) / (count - 3)) if count > 3 else math.nan
            row = {"target": target, "fitness": column, "rankings of": source, "count": count, "spearman": rho}
            rows.append(row | {"low": math.tanh(z - half), "high": math.tanh(z + half)})
    return pd.DataFrame(rows)


def correlations_in_words(table: pd.DataFrame) -> pd.DataFrame:
    """`correlations` for reading."""
    rho = [f"{r.spearman:.2f} [{r.low:.2f}, {r.high:.2f}]".replace("-", "−") for r in table.itertuples()]
    shown = table.assign(rho=rho, target=table.target.map("{:.0%}".format))
    names = {"target": "FLOPs left", "rankings of": "over rankings of", "count": "rankings", "rho": "Spearman's ρ"}
    index = ["FLOPs left", "fitness", "over rankings of"]
    return shown.rename(columns=names).set_index(index)[["rankings", "Spearman's ρ"]]


def beside_authors(exp: Experiment) -> dict[str, list[list[Tensor]]]:
    """Masks of every method's networks, one of each trial where it learns, and as wide as those that the authors
    published for MobileNetV2 at the same FLOPs: "legr at 70%", "paper 70%". Empty for other networks.
    """
    table, networks = pd.read_csv(Path(__file__).with_name("legrnet.csv")), {}
    for target in exp.settings.targets if exp.settings.model == "mobilenet_v2" else ():
        if (share := f"{target:.0%}") not in table:
            continue
        for method in exp.methods:
            trials = exp.trials(method) if METHODS[method].learned else range(1)
            networks[f"{method} at {share}"] = [exp.select(method, target, trial) for trial in trials]
        layers = zip(table.dense, table[share], strict=True)
        networks[f"paper {share}"] = [[torch.arange(width) < kept for width, kept in layers]]
    return networks


def blocks_kept(exp: Experiment, networks: Mapping[str, Sequence[Sequence[Tensor]]]) -> pd.DataFrame:
    """What networks keep of MobileNetV2's 17 blocks: outputs that are whole, inner layers at the floor; by trials."""
    graph, floor = exp.graph, exp.settings.floor
    outputs = [i for i, layer in enumerate(graph.layers) if re.fullmatch(r"features\.\d+\.conv\.\d", layer.name)]
    inner = [(i - 1, graph.widths[i - 1] - int((1 - floor) * graph.widths[i - 1] + 1e-9)) for i in outputs]
    rows = []
    for name, trials in networks.items():
        widths = [[int(mask.sum()) for mask in kept] for kept in trials]
        whole = ", ".join(str(sum(own[i] == graph.widths[i] for i in outputs)) for own in widths)
        least = ", ".join(str(sum(own[i] == lowest for i, lowest in inner)) for own in widths)
        method, _, at = name.partition(" at ")
        rows.append([f"{METHODS[method].label} at {at}" if method in METHODS else name, whole, least])
    counts = [f"{what}, of {len(outputs)}" for what in ("block outputs whole", "inner layers at the floor")]
    return pd.DataFrame(rows, columns=["network", *counts])


def tuning_curves(exp: Experiment, table: pd.DataFrame) -> pd.DataFrame:
    """Held-out accuracy of every network of `table` over epochs; epoch 0 is the network as pruned."""
    curves = []
    for row in table.itertuples():
        curve = pd.read_csv(exp.path(f"sets/{row.method}/{row.target}-{row.trial}.csv"))
        curves.append(curve.assign(method=row.method, target=row.target, trial=row.trial))
    return pd.concat(curves, ignore_index=True)


def order_by_epoch(curves: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """How held-out accuracy after each epoch orders all networks of a target, beside their final test accuracy.

    Returns:
        Columns target, epoch, networks (their number), spearman.
    """
    keys = ["method", "target", "trial"]
    both = curves.merge(distinct(table)[[*keys, "accuracy"]], on=keys)
    rows = []
    for (target, epoch), networks in both.groupby(["target", "epoch"]):
        rows.append((target, epoch, len(networks), networks.val_accuracy.corr(networks.accuracy, "spearman")))
    return pd.DataFrame(rows, columns=["target", "epoch", "networks", "spearman"])


def set_cost(exp: Experiment, table: pd.DataFrame) -> pd.DataFrame:
    """Hours for sets of 1 to 7 networks, from measured times: a search for all of them against one for each.

    Where several machines worked, the times are of the one that searched in the first trial. Fine-tuning takes the
    mean over targets of the mean over trials. `lowest` and `highest` are the ratios by the fastest and slowest search.
    """
    rows = []
    for method in exp.settings.rankings:
        names = [f"rankings/{method}/record-{trial}.json" for trial in exp.trials(method)]
        searches = pd.DataFrame([read_json(exp.path(name), "record of a search") for name in names])
        hardware = searches.hardware[0]
        networks_there = table[(table.method == method) & (table.hardware == hardware)]
        tuning = networks_there.groupby("target").seconds.mean().mean() / 3600
        hours = searches.seconds[searches.hardware == hardware] / 3600
        for networks in range(1, 8):
            one, each = hours + networks * tuning, networks * (hours + tuning)
            rows.append({"method": method, "hardware": hardware, "networks": networks})
            rows[-1] |= {"one search": one.mean(), "a search each": each.mean(), "ratio": each.mean() / one.mean()}
            rows[-1] |= {"lowest": (each / one).min(), "highest": (each / one).max()}
    return pd.DataFrame(rows)


def computing_hours(exp: Experiment) -> pd.DataFrame:
    """Hours of computing behind an experiment's results: a row for each hardware, a column for what they went into."""
    work = {"dense network": ["dense/dense.json"], "searches": ["rankings/*/record-*.json"]}
    work |= {"fine-tuning": [f"sets/*/{target}-*.json" for target in exp.settings.targets]}
    work["ablations"] = ["ablations/ablations.json"]
    records = [
        (kind, read_json(path, "record of a result"))
        for kind, names in work.items()
        for name in names
        for path in exp.folder.glob(name)
    ]
    records += [("cuts", record) for folder in exp.folder.glob("sets/*") for record in measurements(folder)]
    rows = []
    for kind, record in {record["key"]: (kind, record) for kind, record in records}.values():  # methods may share one
        made = f"{record['hardware']}, {record['precision']}, PyTorch {record['torch']}"
        rows.append({"hardware": made, "kind": kind, "hours": record["seconds"] / 3600})
    wide = pd.DataFrame(rows).pivot_table("hours", "hardware", "kind", "sum", fill_value=0, sort=False)
    return wide.reindex(columns=["dense network", "searches", "fine-tuning", "cuts", "ablations"], fill_value=0)


def beside_other_work(exp: Experiment, table: pd.DataFrame, papers: pd.DataFrame) -> pd.DataFrame:
    """Our networks, and those that are quoted (`papers`), each with its own dense network; accuracies in percent."""
    means = 100 * table.groupby(["target", "method"], sort=False).accuracy.mean()
    ours = means.rename("accuracy_percent").reset_index()
    ours["network"] = [f"{METHODS[method].label} ({exp.scale} scale)" for method in ours.method]
    ours = ours.assign(dense_percent=100 * exp.dense["accuracy"], source="this run")
    rows = pd.concat([ours, papers.assign(target=papers.mflops / exp.dense["flops"] * 1e6)])
    rows["change"] = rows.accuracy_percent - rows.dense_percent
    rows["FLOPs left"] = [f"{target:.0%}" for target in rows.target]
    for column in ("dense_percent", "accuracy_percent", "change"):
        numbers = [f"{value:{'+' if column == 'change' else ''}.2f}".replace("-", "−") for value in rows[column]]
        rows[column] = [number.replace("+nan", "–").replace("nan", "–") for number in numbers]
    names = {"dense_percent": "dense (%)", "accuracy_percent": "pruned (%)", "change": "change (points)"}
    return rows.rename(columns=names).set_index("network")[["FLOPs left", *names.values(), "source"]]


def paper_changes(model: str) -> dict[float, float]:
    """The paper's change of accuracy from its dense network in points, by target; empty for other networks."""
    table = pd.read_csv(Path(__file__).with_name("paper.csv"))
    rows = table[(table.model == model) & table.network.str.startswith("LeGR ")]
    targets = rows.network.str.extract(r"(\d+)%", expand=False).astype(float) / 100
    return dict(zip(targets, (rows.accuracy_percent - rows.dense_percent).round(2), strict=True))


def papers_networks(exp: Experiment) -> pd.DataFrame | None:
    """Networks of the paper and of other work (in percent), where the paper pruned this model on these images."""
    table = pd.read_csv(Path(__file__).with_name("paper.csv"))
    rows = table[(table.model == exp.settings.model) & (table.data == exp.settings.data.name)]
    return None if rows.empty else rows.drop(columns=["model", "data"])
