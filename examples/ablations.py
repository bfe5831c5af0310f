"""What each part of the training recipe is worth: one part at a time is changed, the rest stays as recommended.

Same pictures, test and options as glyphs.py; `python examples/ablations.py --help`. The table of docs/training.md is
its output: a quarter of an hour on two cores.
"""

from __future__ import annotations

import torch
from glyph_data import load_glyphs
from glyphs import QUERIES, make_test_set, mean_answers, parse_options, run_all, split
from recipe import Recipe, bootstrap_interval

RECIPE = "the recipe"
VARIANTS = {
    RECIPE: Recipe(),
    "K = 5": Recipe(k_nearest=5),
    "K = 10": Recipe(k_nearest=10),
    "K = 40": Recipe(k_nearest=40),
    "20 random classes": Recipe(scored="random"),
    "own class left out, other logits 0": Recipe(include_self=False),
    "table starts at random": Recipe(epochs_from_means=0),
    "table at the means once, at the start": Recipe(epochs_from_means=1),
    "learning rate of the table / 10": Recipe(table_rate=0.1),
    "learning rate of the table x 3": Recipe(table_rate=3.0),
    "graph of the first epoch kept": Recipe(graph_every=10**6),
    "batches of 4 groups of 4 near classes": Recipe(near_classes=4),
    "batches of 16 near classes": Recipe(near_classes=16),
    "the same, without the triplet loss": Recipe(near_classes=16, triplet_weight=0.0),
    "random batches, without the triplet loss": Recipe(triplet_weight=0.0),
}


def main() -> None:
    options = parse_options()
    glyphs = load_glyphs()
    seen, unseen = split(glyphs, min(options.classes, len(glyphs) - options.test_classes), options.test_classes)
    test = make_test_set(unseen, seen)
    seeds = list(range(1, 1 + options.seeds))
    runs = run_all([(name, VARIANTS[name], seed, seen, test, options) for name in VARIANTS for seed in seeds], options)
    lines = [f"| change | seconds | {' | '.join(QUERIES)} | occluded, less the recipe's |", "|---" * 7 + "|"]
    _, expected = mean_answers(runs, RECIPE, "occluded", seeds)
    for name in VARIANTS:
        seconds = torch.tensor([run.seconds[-1] for run in runs if run.method == name]).mean().item()
        precisions = [mean_answers(runs, name, kind, seeds)[1] for kind in QUERIES]
        cells = [name, f"{seconds:.0f}", *(f"{each.mean().item():.3f}" for each in precisions)]
        difference = precisions[QUERIES.index("occluded")] - expected
        low, high = bootstrap_interval(difference)
        cells.append("" if name == RECIPE else f"{difference.mean().item():+.3f} ({low:+.3f} to {high:+.3f})")
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "ablations.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\nmAP; {len(seen):,} classes, {options.steps} batches, mean of {len(seeds)} seeds.")


if __name__ == "__main__":
    main()
