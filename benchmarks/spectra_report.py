"""The rows of ``spectra.py`` as tables and plots, made from rows alone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moefuse.artifacts import write_atomically
from moefuse.evaluation.plots import COLOURS, FAINT, INK
from moefuse.evaluation.report import facts
from moefuse.evaluation.tables import markdown

Rows = Sequence[Mapping[str, Any]]
MATRICES = {"gate_up": "gate and up", "down": "down"}
ENERGIES = {"raw": "raw energy", "logits": "as the logits feel it"}
SHOWN_TOPS = (0.01, 0.05, 0.1, 0.25, 0.5)


def report(rows: Rows, meta: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """Return everything as Markdown; ``pictures`` are the plots' names."""
    parts = [
        "# Experts, deltas and errors",
        "## Spectra of deltas",
        f"![Energy that deltas leave]({pictures['spectra']})",
        "The share of the experts' energy that the best delta of a rank leaves, a mean over "
        "experts and layers. Rank 0 is what the base leaves; *no base* approximates the experts "
        "themselves. Whitened: the energy of outputs on the inputs that a matrix receives.",
        *(spectra_table(rows, matrix) for matrix in MATRICES),
        "### By layer, at an eighth of the full rank",
        *(spectra_by_layer(rows, matrix) for matrix in MATRICES),
        "## How alike neurons are",
        f"![Cosine similarity and concentration]({pictures['neurons']})",
        "Cosine similarity of the neurons (gate, up and down together) of two experts: best "
        "matched, in random order, and best matched where each coordinate was shuffled over the "
        "neurons, which is what matching finds in nothing. Mean, and share above 0.5.",
        neurons_table(rows),
        "## How few neurons hold the energy",
        "Share of the energy that routed experts add to the residual stream, held by the "
        "greatest neurons of a layer and of the model.",
        concentration_table(rows),
        "## Where errors come from",
        f"![Errors by source and by steps]({pictures['errors']})",
        "Relative squared error of a layer's routed output on held-out tokens, nothing trained "
        "(1: no better than zeros); in parentheses as the logits feel it. Neuron bases are a "
        "group's most important neurons fitted by least squares, mean bases its aligned mean.",
        sources_table(rows),
        "## How errors fall with distillation",
        steps_table(rows),
        "## How this was made",
        facts(meta),
    ]
    return "\n\n".join(parts) + "\n"


def of_kind(rows: Rows, kind: str) -> list[Mapping[str, Any]]:
    """Return the rows of one kind."""
    return [row for row in rows if row["kind"] == kind]


def layers_of(rows: Rows) -> list[int]:
    """Return the layers that rows are about."""
    return sorted({row["layer"] for row in rows if row["layer"] is not None})


def by_name(rows: Rows, name: Callable[[Mapping[str, Any]], str]) -> dict[str, list[Any]]:
    """Return rows by what they are called, in their order."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(name(row), []).append(row)
    return found


def spectrum_name(row: Mapping[str, Any]) -> str:
    """Say what a spectrum is of."""
    return _base_name(row) + (", whitened" if row["whitened"] else "")


def _base_name(row: Mapping[str, Any]) -> str:
    if not row["groups"]:
        return "no base"
    bases = "1 base" if row["groups"] == 1 else f"{row['groups']} bases"
    return f"{bases}, {'aligned' if row['aligned'] else 'not aligned'}"


def _spectra(rows: Rows, matrix: str) -> dict[str, list[Any]]:
    found = [row for row in of_kind(rows, "spectra") if row["matrix"] == matrix]
    return by_name(found, spectrum_name)


def _mean_left(rows: Rows) -> list[float]:
    return [mean(left) for left in zip(*(row["left"] for row in rows), strict=True)]


def spectra_table(rows: Rows, matrix: str) -> str:
    """Return what deltas of one matrix leave by rank, a mean over layers."""
    lines = _spectra(rows, matrix)
    ranks = next(iter(lines.values()))[0]["ranks"]
    titles = [f"{MATRICES[matrix]}, rank", *map(str, ranks)]
    return markdown(
        titles, [[name, *(f"{x:.3f}" for x in _mean_left(of))] for name, of in lines.items()]
    )


def spectra_by_layer(rows: Rows, matrix: str) -> str:
    """Return what deltas of an eighth of the full rank leave in every layer."""
    lines = _spectra(rows, matrix)
    first = next(iter(lines.values()))
    ranks = first[0]["ranks"]
    place = max(n for n, rank in enumerate(ranks) if rank <= max(1, ranks[-1] // 8))
    titles = [f"{MATRICES[matrix]}, rank {ranks[place]}"]
    titles += [f"layer {row['layer']}" for row in first]
    return markdown(
        titles, [[name, *(f"{r['left'][place]:.3f}" for r in of)] for name, of in lines.items()]
    )


def neurons_table(rows: Rows) -> str:
    """Return how alike neurons are in every layer."""
    found = of_kind(rows, "neurons")
    lines = by_name(found, lambda row: f"layer {row['layer']}")
    titles = ["", *(row["order"] for row in next(iter(lines.values())))]
    return markdown(
        titles,
        [
            [name, *(f"{row['mean']:.3f} ({row['above_half']:.2%})" for row in of)]
            for name, of in lines.items()
        ],
    )


def _place(row: Mapping[str, Any]) -> str:
    return "model" if row["layer"] is None else f"layer {row['layer']}"


def concentration_table(rows: Rows) -> str:
    """Return what share of the energy the greatest neurons hold."""
    lines = by_name(
        of_kind(rows, "concentration"), lambda row: f"{_place(row)}, {ENERGIES[row['energy']]}"
    )
    body = []
    for name, (row,) in lines.items():
        held = dict(zip(row["tops"], row["shares"], strict=True))
        body.append([name, *(f"{held[top]:.1%}" for top in SHOWN_TOPS)])
    return markdown(["Greatest neurons", *(f"{top:.0%}" for top in SHOWN_TOPS)], body)


def source_name(row: Mapping[str, Any]) -> str:
    """Say what an untrained student was made of."""
    if row["base"] is None:
        return f"all neurons at {row['bits']} bit" + ("s" if row["bits"] != "1" else "")
    bases = f"{'neuron' if row['base'] == 'neurons' else 'mean'} bases"
    deltas = f" + rank-{row['rank']} deltas" if row["rank"] else ""
    grouped = ", random groups" if row["grouping"] == "random" else ""
    rounded = f", all at {row['bits']} bits" if row["bits"] else ""
    return bases + deltas + grouped + rounded


def _error(row: Mapping[str, Any]) -> str:
    return f"{row['error']:.3f} ({row['felt']:.3f})"


def sources_table(rows: Rows) -> str:
    """Return the errors of untrained students in every layer."""
    found = of_kind(rows, "sources")
    titles = ["", *(f"layer {layer}" for layer in layers_of(found)), "mean"]
    body = []
    for name, of in by_name(found, source_name).items():
        average = {key: mean(row[key] for row in of) for key in ("error", "felt")}
        body.append([name, *(_error(row) for row in of), _error(average)])
    return markdown(titles, body)


def steps_table(rows: Rows) -> str:
    """Return the errors of one layer's students by steps."""
    found = sorted(of_kind(rows, "steps"), key=lambda row: row["steps"])
    lines = by_name(found, lambda row: row["form"])
    titles = [f"layer {found[0]['layer']}, steps"]
    titles += [str(row["steps"]) for row in next(iter(lines.values()))]
    return markdown(titles, [[name, *(_error(row) for row in of)] for name, of in lines.items()])


# Plots.


def write_plots(rows: Rows, directory: Path, name: str) -> dict[str, str]:
    """Draw the three plots into ``directory`` and return their names."""
    drawn = {
        "spectra": (f"{name}.png", _draw_spectra),
        "neurons": (f"{name}-neurons.png", _draw_neurons),
        "errors": (f"{name}-errors.png", _draw_errors),
    }
    for file_name, draw in drawn.values():
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, rows)
        _save(figure, directory / file_name)
    return {kind: file_name for kind, (file_name, _) in drawn.items()}


def _save(figure: Figure, path: Path) -> None:
    # No software version inside: the same rows give the same bytes.
    write_atomically(
        path, lambda file: figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    )


def _draw_spectra(figure: Figure, rows: Rows) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    for axes, matrix in zip(panels, MATRICES, strict=True):
        lines = _spectra(rows, matrix)
        bases = list(dict.fromkeys(_base_name(of[0]) for of in lines.values()))
        for of in lines.values():
            row, ranks = of[0], of[0]["ranks"]
            axes.plot(
                range(len(ranks)),
                _mean_left(of),
                color=COLOURS[bases.index(_base_name(row))],
                linestyle="--" if row["whitened"] else "-",
                label=None if row["whitened"] else _base_name(row),
            )
            axes.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
        _dress(axes, f"Deltas of {MATRICES[matrix]}", "Rank of the delta")
        axes.set_ylim(0)
    panels[0].set_ylabel("Share of the experts' energy that is left")
    panels[0].plot([], [], color=FAINT, linestyle="--", label="whitened: energy of outputs")
    panels[0].legend(frameon=False, fontsize=9, loc="lower left")


def _draw_neurons(figure: Figure, rows: Rows) -> None:
    alike, held = figure.subplots(1, 2)
    for number, (name, of) in enumerate(
        by_name(of_kind(rows, "neurons"), lambda row: row["order"]).items()
    ):
        layers = [row["layer"] for row in of]
        colour = COLOURS[number]
        alike.plot(layers, [row["mean"] for row in of], color=colour, marker="o", label=name)
        low, high = ([row[key] for row in of] for key in ("low", "high"))
        alike.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
        alike.set_xticks(layers)
    _dress(alike, "Neurons of two experts: cosine (shade: 80 %)", "Layer")
    alike.set_ylim(0, min(1.0, 1.4 * alike.get_ylim()[1]))
    alike.legend(frameon=False, fontsize=9)
    for number, (kind, title) in enumerate(ENERGIES.items()):
        for row in of_kind(rows, "concentration"):
            if row["energy"] == kind:
                whole = row["layer"] is None
                held.plot(
                    [100 * top for top in row["tops"]],
                    [100 * share for share in row["shares"]],
                    color=COLOURS[number],
                    linewidth=2.2 if whole else 0.8,
                    alpha=1 if whole else 0.45,
                    label=f"model, {title}" if whole else None,
                )
    _dress(held, "Energy held by the greatest neurons", "Percent of the neurons")
    held.plot([], [], color=FAINT, linewidth=0.8, label="thin: a layer")
    held.set_ylabel("Percent of the energy")
    held.legend(frameon=False, fontsize=9, loc="lower right")


def _draw_errors(figure: Figure, rows: Rows) -> None:
    by_source, by_steps = figure.subplots(1, 2, width_ratios=(1, 1))
    lines = by_name(of_kind(rows, "sources"), source_name)
    for number, of in enumerate(lines.values()):
        values = [row["error"] for row in of]
        colour = COLOURS[0] if of[0]["base"] is None else COLOURS[1]
        by_source.plot([min(values), max(values)], [number] * 2, color=colour, linewidth=1.4)
        by_source.plot(mean(values), number, color=colour, marker="o")
    by_source.set_yticks(range(len(lines)), list(lines), fontsize=8)
    by_source.invert_yaxis()
    by_source.axvline(1, color=FAINT, linewidth=0.8, linestyle=":")
    _dress(by_source, "Untrained students (line: all layers)", "Relative error, 1 is zeros")
    by_source.set_xlim(0)
    found = sorted(of_kind(rows, "steps"), key=lambda row: row["steps"])
    for number, (form, of) in enumerate(by_name(found, lambda row: row["form"]).items()):
        counts = [row["steps"] for row in of]
        for key, dash, said in (("error", "-", ""), ("felt", "--", ", as the logits feel it")):
            by_steps.plot(
                counts,
                [row[key] for row in of],
                color=COLOURS[number],
                linestyle=dash,
                marker="o",
                markersize=4,
                label=form + said,
            )
    by_steps.set_xticks(sorted({row["steps"] for row in found}))
    _dress(by_steps, f"Layer {found[0]['layer']}, distilled", "Steps of distillation")
    by_steps.set_ylim(0)
    by_steps.legend(frameon=False, fontsize=9)


def _dress(axes: Axes, title: str, x_label: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel(x_label, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
