"""The pictures above all others: the token of the main model, and of every model."""

import numpy as np
import pandas as pd

from lab.report import style
from lab.report.figures import (
    AHEAD,
    Figure,
    amount,
    command,
    conditions,
    digits,
    legend,
    short,
    spread,
    table,
    times,
    token_unit,
)
from lab.report.sides import (
    SIDES,
    fastest,
    first_size,
    floor_of,
    launched,
    main_model,
    measurements,
    models,
    modes,
    series,
    side_look,
    with_side,
    words,
)

BARS = 5  # of our steps in the first picture
BARS_MODELS = 8  # of the picture of all models


def headline(run):
    """Bars of the time of a token of the main model: our fastest steps and the best peer."""
    model = main_model(run)
    rows = launched(first_size(series(run, model))) if model else []
    if not len(rows):
        return None
    rows = with_side(rows).sort_values("us", kind="stable")
    peer, ours = rows[rows["side"] == "peer"].head(1), rows[rows["side"] != "peer"].head(BARS)
    shown, floor = pd.concat([ours, peer]).sort_values("us"), floor_of(rows)
    divisor, unit_name = token_unit(shown["us"])

    def draw(canvas):
        ax, scaled = canvas.subplots(), times(shown, divisor)
        colors = [side_look(side).color for side in shown["side"]]
        spreads = spread(scaled, "us", "us_p10", "us_p90")
        at = range(len(shown))
        ax.barh(at, scaled["us"], xerr=spreads, color=colors, height=0.66, ecolor=style.INK)
        for y, row in zip(at, scaled.itertuples()):
            end = row.us if row.us_p90 != row.us_p90 else row.us_p90
            ax.text(end, y, f"{AHEAD}{digits(row.us)}", va="center", weight="bold")
        if floor:
            look = dict(color=style.INK, linewidth=1.2, linestyle=":")
            ax.vlines(floor / divisor, -0.5, len(shown) - 0.5, **look)
            ax.text(
                floor / divisor,
                -0.6,
                f"floor {digits(floor / divisor)}",
                ha="center",
                va="bottom",
                fontsize=8,
            )
        ax.set_xlim(0, scaled["us"].max() * 1.13)
        ax.set_yticks(at, [words(row) for row in shown.itertuples()])
        ax.set_ylim(len(shown) - 0.5, -1.1)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(f"{unit_name} a token" + (", emulated" if run.emulated else ""))

    first = shown.iloc[0]
    at = f"batch {amount(first['batch'])}, context {amount(first['context'])}"
    floor_words = (
        " The dotted line is the floor: its weights and KV cache at the bandwidth that was measured."
        if floor
        else ""
    )
    return Figure(
        name="verdict",
        title=f"One token of {model}, {at}",
        conditions=conditions(run, shown, modes(shown)),
        reading=f"The {len(ours)} fastest of our steps"
        + (" and the best peer." if len(peer) else ".")
        + floor_words,
        alt="Bars: "
        + "; ".join(f"{words(row)} {digits(row.us / divisor)} {unit_name}" for row in shown.itertuples())
        + (f"; floor {digits(floor / divisor)}" if floor else ""),
        table=measurements(shown),
        command=command("model", [model], shown),
        height=0.62 + 0.25 * len(shown),
        draw=draw,
    )


def _in_lines(model):
    """The name of a model, and below it the formats of its weights."""
    return "\n".join(short(line, 26) for line in model.replace(" (", "\n(").splitlines())


def overview(run):
    """Bars of every model's token: best CUDA, best Triton, best peer, with the bandwidth floor."""
    found = []
    for model in models(run):
        rows = series(run, model)
        if len(rows):
            rows = launched(first_size(rows))
            found.append(fastest(rows).assign(floor=floor_of(rows) or np.nan))
    if not found:
        return None
    rows = pd.concat(found)
    order = list(dict.fromkeys(rows["model"]))[:BARS_MODELS]
    rows = rows[rows["model"].isin(order)]
    divisor, unit_name = token_unit(rows["us"])
    sides = [s for s in SIDES if (rows["side"] == s).any()]

    def draw(canvas):
        ax, scaled = canvas.subplots(), times(rows, divisor)
        for i, side in enumerate(sides):
            mine, look = scaled[scaled["side"] == side], side_look(side)
            at = np.array([order.index(m) for m in mine["model"]]) + (i - (len(sides) - 1) / 2) * 0.27
            spreads = spread(mine, "us", "us_p10", "us_p90")
            ax.barh(
                at,
                mine["us"],
                xerr=spreads,
                height=0.25,
                color=look.color,
                label=look.label,
                ecolor=style.INK,
            )
            for y, row in zip(at, mine.itertuples()):
                said = f"{AHEAD}{digits(row.us)}" + (
                    f" {words(row)}" if side == "peer" else f" {row.plan}".rstrip("- ")
                )
                ax.text(max(row.us, row.us_p90), y, said, va="center", fontsize=7)
        floors = scaled.drop_duplicates("model")
        at = np.array([order.index(m) for m in floors["model"]])
        if floors["floor"].notna().any():
            ax.vlines(
                floors["floor"] / divisor,
                at - 0.42,
                at + 0.42,
                color=style.INK,
                linestyle=":",
                linewidth=1.4,
                label="bandwidth floor",
            )
        ax.set_yticks(range(len(order)), [_in_lines(m) for m in order])
        ax.set_ylim(len(order) - 0.45, -0.55)
        ax.set_xlim(0, scaled["us"].max() * 1.3)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(f"{unit_name} a token" + (", emulated" if run.emulated else ""))
        legend(canvas, [ax])

    first = rows.iloc[0]
    return Figure(
        name="models",
        title="Time of a token, smallest batch and context",
        conditions=conditions(run, rows, modes(rows)),
        reading=f"Smallest batch and context of each model ({amount(first['batch'])} and "
        f"{amount(first['context'])} tokens here)."
        + (
            " The dotted mark is the floor: the bytes of weights and KV cache over the measured bandwidth."
            if rows["floor"].notna().any()
            else ""
        ),
        alt=f"Bars of the time of a token for {len(order)} models: best CUDA, best Triton and best peer.",
        table=table(
            rows,
            "model side backend plan mode tuning batch context us us_p10 us_p90 n floor share",
            floor="bandwidth floor (us)",
        ),
        command=command("model", order, rows),
        height=0.75 + 0.2 * len(sides) * len(order) * 1.15,
        draw=draw,
    )
