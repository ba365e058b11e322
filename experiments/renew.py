"""python -m experiments.renew SCALE EXPERIMENT: give records from before results had versions their new keys.

It recomputes each record's old key, which holds the bytes of the library as they were, from the images at hand and the
settings. Where that differs from the key in the record, the record is refused and stays as it is.
"""

import sys
from pathlib import Path

import pandas as pd

from experiments import tables, work
from experiments.config import open_experiment
from experiments.records import PACKED, masks_digest
from legr.data import Augmentation
from legr.files import digest, read_json, write_json, write_text

CODE = "5b9c232175da1cc8"  # the digest of legr/*.py and experiments/work.py that was in every key


def main(scale: str, name: str) -> int:
    exp = open_experiment(scale, name, "compare", "renewed", root=Path.cwd())
    settings, inputs = exp.settings, list(exp.inputs.values())
    augmentation = settings.data.augmentation
    others = [augmentation.model_dump()] if augmentation != Augmentation() else []
    renewed, refused = 0, 0

    def renew(stage: str, record_name: str, given: list, made_of: dict, **more) -> bool:
        nonlocal renewed, refused
        path = exp.pipelines / stage / f"{record_name}.json"
        record = read_json(path, "record of a result")
        old = digest([CODE, [record["device"], record["precision"]], *given, *others])
        if record["key"] != old:
            refused += 1
            print(f"{stage}/{record_name}: its key is {record['key']}; these settings and images give {old}")
            return False
        renewed += 1
        write_json(
            path, {"key": digest(made_of), "made_of": made_of} | {k: v for k, v in record.items() if k != "key"} | more
        )
        return True

    dense = exp.dense
    keys = {
        m: [read_json(exp.path(f"rankings/{m}/record-{t}.json"), "record")["key"] for t in range(settings.trials)]
        for m in settings.rankings
    }
    made_of = work.dense_made_of(exp, inputs[0], dense.get("digest"))
    renew("dense", "dense", ["dense", inputs[0], settings.model, settings.dense.model_dump()], made_of)
    for method, ranking in settings.rankings.items():
        for trial in range(settings.trials):
            search = ranking.search.model_copy(update={"seed": trial})
            given = ["ranking", *inputs, _old(ranking.model_dump()), search.model_dump(), settings.floor]
            renew(f"rankings/{method}", f"record-{trial}", given, work.ranking_made_of(exp, ranking, trial))
    few = settings.finetune.recalibration_images
    for method in exp.methods:
        for trial in range(settings.trials):
            for target in settings.targets:
                kept = exp.select(method, target, trial)
                given = ["network", *inputs, masks_digest(kept), settings.finetune.model_dump(), trial]
                renew(f"sets/{method}", f"{target}-{trial}", given, work.network_made_of(exp, kept, trial))
        shares = work.cut_shares(exp)
        masks = [exp.select(method, share) for share in shares]
        given = ["cuts", *inputs, shares, [*map(masks_digest, masks)], settings.cuts.model_dump(), few]
        folder = exp.pipelines / f"sets/{method}"
        if renew(f"sets/{method}", "cuts", given, {}):
            total, table = (
                read_json(folder / "cuts.json", "record"),
                pd.read_csv(folder / "cuts.csv", float_precision="round_trip"),
            )
            noted = {k: total[k] for k in ("device", "precision", "graphs", "hardware", "torch")}
            rows = {}
            for kept, row in zip(masks, table.itertuples(), strict=True):
                made_of = work.cut_made_of(exp, kept)
                values = {
                    "accuracy_recalibrated": row.accuracy_recalibrated,
                    "seconds": total["seconds"] / len(table),
                    "seconds of": "all cuts, divided by their number",
                }
                rows[digest(made_of)] = {"key": digest(made_of), "made_of": made_of, "files": []} | values | noted
            # Cuts with the same filters were measured once.
            for row in rows.values():
                row["seconds"] = round(total["seconds"] / len(rows), 2)
            write_json(folder / PACKED, [rows[k] for k in sorted(rows)])
            (folder / "cuts.json").unlink()
    old = settings.ablations.model_dump()
    old["search"] = _old(old["search"])
    old["vary"] = _old(old["vary"])
    given = ["ablations", *inputs, old, settings.targets, settings.floor, [keys[m][0] for m in settings.rankings]]
    folder = exp.pipelines / "ablations"
    if renew(
        "ablations", "ablations", given, work.ablations_made_of(exp), files=["fitness.csv", "searches.csv", PACKED]
    ):
        total, table = (
            read_json(folder / "ablations.json", "record"),
            pd.read_csv(folder / "fitness.csv", float_precision="round_trip"),
        )
        noted = {k: total[k] for k in ("device", "precision", "graphs", "hardware", "torch")}
        rows, pairs = (
            {},
            [(ranking, t) for t in settings.ablations.targets for _, ranking in work.rankings_to_measure(exp)],
        )
        for (ranking, target), (_, row) in zip(pairs, table.iterrows(), strict=True):
            for fitness_name, fitness in settings.ablations.fitness.items():
                (kept,) = work._fitness(exp, fitness, target, 0).select(ranking)
                made_of = work.fitness_made_of(exp, "loss on held-out images", fitness, kept, 0)
                rows[digest(made_of)] = {
                    "key": digest(made_of),
                    "made_of": made_of,
                    "files": [],
                    "seconds": None,
                    "loss": row[fitness_name],
                } | noted
        write_json(folder / PACKED, [rows[k] for k in sorted(rows)])
        path = folder / "searches.csv"
        write_text(path, path.read_text(encoding="utf-8").replace("\nflops,", "\ntargets,"))
    # Latencies had no key; the captions say which hardware and precision they are of.
    folder = exp.pipelines / "compare"
    assert "cpu, float32" in (folder / "latency.svg").read_text(encoding="utf-8")
    exp.__dict__["compute"] = exp.compute.model_copy(update={"precision": "float32"})
    table = tables.all_networks(exp)
    rows = table[table.trial == 0]
    masks = {
        f"{row.method}-{row.target}": masks_digest(exp.select(row.method, row.target)) for row in rows.itertuples()
    }
    made_of = tables.latency_made_of(exp, masks)
    columns = ["network", "batch", "latency_ms", "low_ms", "high_ms"]
    times = pd.read_csv(folder / "latency.csv", float_precision="round_trip")[columns].to_dict("records")
    noted = {"device": "cpu", "precision": "float32", "graphs": True, "hardware": "x86_64, 2 cores", "torch": "2.14.1"}
    record = {"key": digest(made_of), "made_of": made_of, "files": [], "seconds": None, "times": times} | noted
    write_json(folder / PACKED, [record])
    print(f"{name}: {renewed} records renewed, {refused} refused")
    return refused


def _old(values: dict) -> dict:
    return {{"targets": "flops"}.get(name, name): value for name, value in values.items()}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) > 0)
