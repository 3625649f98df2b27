"""What a run says in three sentences, and the best of each side in a card for each model."""

from lab.report import ops, parallel_figures, sides, style
from lab.report.sides import SIDES, fastest, first_size, floor_of, launched, series, side_look, words
from lab.report.tables import duration


def sentences(run, f):
    """At most three: the token of the main model, the languages beside each other, what else matters. f: the
    run's focus, or None."""
    found = _of_model(run)
    score = ops.score(ops.chosen(run.op, f)) if f and not run.emulated else {}
    if run.emulated:
        found = found[:1]
    elif sum(score.values()):
        found.insert(1, f"Op by op, {ops.score_words(score)}")
    if several := parallel_figures.sentence(run):
        found.insert(1, several)
    if not found:
        some = "Single ops were measured, no whole model." if f or len(run.packed) else ""
        some = some or (_of_accuracy(run) if len(run.accuracy) else "")
        some = some or (_of_serving(run) if len(run.serving) else "")
        return [some or "Nothing was measured in this run yet."]
    return found[:3]


def _of_accuracy(run):
    """ "Of smollm2-135m, int8 moves the next token's distribution least ..." """
    rows = run.accuracy[run.accuracy["model"] == run.accuracy["model"].iloc[0]].sort_values("kl")
    best, last = rows.iloc[0], rows.iloc[-1]
    said = f"Of {best['model']}, {best['weight_format']} costs least accuracy: in {best['top1']:.0%} of the "
    said += "places of a text the most likely next token stays the same"
    if len(rows) > 1:
        said += f"; {last['weight_format']} costs most, there {last['top1']:.0%}"
    return said + "."


def _of_serving(run):
    """ "Many sequences of llama-3.2-1b get 12,000 tokens a second in 64 rows under CUDA ..." """
    best = run.serving.loc[run.serving["tokens_per_s"].idxmax()]
    where = f"in {best['batch']:.0f} rows under {style.backend(best['backend']).label}"
    said = f"Many sequences of {best['model']} get {best['tokens_per_s']:,.0f} tokens a second {where}"
    return said + (", emulated." if run.emulated else ".")


def _of_model(run):
    model = sides.main_model(run)
    rows = launched(first_size(series(run, model))) if model else []
    if not len(rows):
        return []
    floor = floor_of(rows)
    found = {row.side: row for row in fastest(rows).itertuples()}
    best = [f"{duration(found[side].us)} with {_who(found[side])}" for side in SIDES if side in found]
    token = f"One token of {model} takes {_listed(best)}" + (", emulated" if run.emulated else "")
    if floor:
        token += (
            f"; reading its weights and KV cache once takes {duration(floor)} at the bandwidth measured here"
        )
    said = [token + "."]
    gains = [gain for gain in (_gain(rows, backend) for backend in ("cuda", "triton")) if gain]
    if gains:
        said.append(f"By plan, which is how a step is cut into kernels, {'; '.join(gains)}.")
    return said


def _who(row):
    side = "the best peer" if row.side == "peer" else "the best " + style.backend(row.backend).label
    which = words(row) if row.side == "peer" else row.plan
    which = ", ".join(w for w in (which, row.tuning) if w not in ("", "-"))
    return f"{side} ({which})" if which else side


def _listed(found):
    return " and ".join(filter(None, [", ".join(found[:-1]), found[-1]]))


def _gain(rows, backend):
    """ "CUDA takes 5.59 ms as basic, 5.32 ms as fused": the plans of one language, slowest first."""
    mine = (
        rows[rows["backend"] == backend]
        .sort_values("us", ascending=False)
        .drop_duplicates("plan", keep="last")
    )
    if mine["plan"].nunique() < 2:
        return ""
    plans = ", ".join(f"{duration(row.us)} {row.plan}" for row in mine.itertuples())
    return f"{style.backend(backend).label} takes {plans}"


def cards(run, model):
    """[(side, time, detail)] of one model's smallest batch and context: best CUDA, best Triton, best peer,
    and the floor. A side that was not measured says so."""
    rows = series(run, model)
    if not len(rows):
        return []
    rows = launched(first_size(rows))
    best = {row.side: row for row in fastest(rows).itertuples()}
    made = []
    for side in SIDES:
        label = side_look(side).label if side == "peer" else f"best {side_look(side).label}"
        if side not in best:
            made.append((label, "–", "not measured"))
            continue
        row = best[side]
        known = row.of_ceiling == row.of_ceiling and not row.suspect
        detail = [words(row), f"{row.of_ceiling:.0%} of the bandwidth" if known else ""]
        tuning = f" ({row.tuning})" if row.tuning else ""
        made.append((label, duration(row.us), ", ".join(filter(None, detail)) + tuning))
    floor = floor_of(rows)
    if floor:
        made.append(("bandwidth floor", duration(floor), "its bytes at the measured bandwidth"))
    return made
