"""The tables of RESULTS.md and README.md, from results/<study>.json.

    python study/tables.py

Only what stands between a study's marks is replaced. Errors are means over training seeds ± their standard deviation.
The published numbers beside them are those of one training; their ± (left out here) is that of sampling z.
"""

import json
import statistics
import sys
from pathlib import Path

from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Parser, UserError, run_command, write_atomically
from equivariance import column
from probe import CLASSIFIERS, FEATURES

ROOT = Path(__file__).resolve().parent.parent
METHODS = {  # name: what the tables call it; study.mk has the commands
    "avt": "AVT",
    "pt": "predictive transformation",
    "vte_ba": "VTE-BA",
    "vte_infonce1": "VTE-InfoNCE (1), separated",
    "vte_infonce2": "VTE-InfoNCE (2), concatenated",
    "random_ba": "*ours:* VTE-BA, phase one untrained",
    "random_infonce1": "*ours:* VTE-InfoNCE (1), phase one untrained",
    "random_infonce2": "*ours:* VTE-InfoNCE (2), phase one untrained",
    "steerable": "*ours:* VTE-BA, D sees t",
    "mean_target": "*ours:* VTE-BA, predicts mu",
    "stl": "STL",
    "simclr": "SimCLR",
    "inv": "*ours:* SimCLR on STL's pairs",
    "predicted": "*ours:* labels predicted (form of AugSelf)",
    "labels": "*ours:* labels for codes (form of EquiMod)",
    "augmix": "STL + AugMix",
    "equi": "*ablation:* L_equi alone",
    "without_inv": "*ablation:* STL without L_inv",
    "without_equi": "*ablation:* STL without L_equi",
    "without_trans": "*ablation:* STL without L_trans",
    "random encoder": "random encoder",
    "raw pixels": "raw pixels",
    "steerable control": "steerable control",
    "invariant control": "invariant control",
}
PAIRS = [("vte_ba", "random_ba"), ("vte_infonce1", "random_infonce1"), ("vte_infonce2", "random_infonce2"),
         ("vte_ba", "pt"), ("vte_infonce1", "pt"), ("vte_infonce2", "pt"), ("pt", "random encoder"),
         ("random_ba", "random encoder"), ("random_infonce1", "random encoder"), ("stl", "labels"),
         ("stl", "predicted"), ("stl", "inv"), ("labels", "inv"), ("inv", "simclr"), ("augmix", "stl"),
         ("stl", "random encoder")]  # compared seed by seed
PAPERS = ("avt", "pt", "vte_ba", "vte_infonce1", "vte_infonce2")  # VTE's rows, in its order


def by_method(*rows):
    return {method: dict(zip((50000, 5000, 500), row, strict=True)) for method, row in zip(PAPERS, rows, strict=True)}


def at_5000(*errors):
    return {method: {5000: error} for method, error in zip(PAPERS, errors, strict=True)}


# error rates: {data set: {classifier: {method: {training labels: error}}}}
PUBLISHED = {
    "cifar10": {  # VTE Tables 1, 2, 3
        "mlp": by_method((.147, .355, .797), (.142, .383, .655), (.140, .354, .508), (.148, .310, .550),
                         (.152, .362, .476)),
        "knn": by_method((.693, .743, .803), (.527, .596, .690), (.396, .488, .578), (.429, .508, .583),
                         (.448, .519, .596)),
        "logistic": by_method((.622, .759, .840), (.539, .698, .793), (.391, .457, .603), (.439, .550, .681),
                              (.423, .523, .656)),
    },
    "stl10": {  # VTE Table 4
        "mlp": at_5000(.522, .492, .460, .365, .363),
        "knn": at_5000(.707, .711, .607, .475, .473),
        "logistic": at_5000(.632, .544, .540, .477, .462),
    },
    "stl-stl10": {  # STL Tables 1, 2; beside labels and predicted those of EquiMod and AugSelf
        "linear": {"stl": {5000: .1517}, "simclr": {5000: .1526}, "augmix": {5000: .1443}, "labels": {5000: .1572},
                   "predicted": {5000: .1501}},
        "transfer": {"stl": {50000: .1478}, "simclr": {50000: .1911}, "augmix": {50000: .1399},
                     "predicted": {50000: .1588}},
    },
}
SHARES = ("invariant", "equivariant")  # of the variance of f(t(x))
STUDIES = {  # those that results/ and the pages have: what makes each
    "cifar10": "make reproduce", "stl10": "make reproduce", "cifar10-small": "make reproduce-small",
    "cifar10-paired": "make reproduce-paired",
    "stl-stl10": "make reproduce-stl", "stl-cifar10": "make reproduce-stl",
    "stl-cifar10-small": "make reproduce-stl-small",
}
TITLES = {**{name: title for name, (title, _) in CLASSIFIERS.items()}, "transfer": "linear, transfer to CIFAR-10"}
KINDS = {**{name: title for name, (title, _) in FEATURES.items()}, None: ""}  # of features


def published_for(results):
    """The published numbers a study stands beside: {classifier: {method: {training labels: error}}}."""
    if results["scale"] == "paired":  # 16 x 16 pixels
        return {}
    return PUBLISHED.get(results["study"].removesuffix(f"-{results['scale']}"), {})


def compared_features(results):
    """Which of our rows stand beside the paper's."""
    return None if results["study"].startswith("stl-") else "sample"


def write_results(results, path):
    """A line a part, so that changes can be read."""
    head = json.dumps({name: value for name, value in results.items() if name != "parts"}, indent=1)[:-2]
    parts = ",\n".join(f"  {json.dumps(name)}: {json.dumps(record)}" for name, record in results["parts"].items())
    text = f'{head},\n "parts": {{\n{parts}\n }}\n}}\n'
    write_atomically(path, lambda file: file.write(text.encode()))


def read_results(path):
    """What `write_results` wrote. Raises UserError."""
    try:
        results = json.loads(path.read_text())
        study_section(results)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(f"'{path}' does not hold the results of a study ({error})") from error
    return results


# ----------------------------------------------------------------------------------------------------------- tables


class Measured:
    """Values over the training seeds, {seed: value}."""

    def __init__(self):
        self.of_seed = {}

    def mean(self):
        return statistics.mean(self.of_seed.values())

    def text(self, digits=3, seeds=1):
        """seeds: how many the study has; fewer behind a value are told in brackets."""
        deviation = f" ± {statistics.stdev(self.of_seed.values()):.{digits}f}" if len(self.of_seed) > 1 else ""
        return f"{self.mean():.{digits}f}{deviation}" + (f" ({len(self.of_seed)})" if len(self.of_seed) < seeds else "")


def column_of_stl(row):
    """The heading of what STL's Tables 5 and 6 have, and `equivariance.column` leaves to the JSON; else None."""
    if row["measure"] == "PRE" and row["map"] != "t alone":
        return "PRE"
    if row["measure"] == "MSE" and row["from"] == "x and t(x)":
        return f"MSE {row['target']}"
    return None


def measurements(results):
    """Errors {(method, features, classifier, labels): Measured} and equivariance {(family of transformations, method,
    map of its own or "", features, heading): Measured}."""
    errors, equivariance = {}, {}
    for part, record in results["parts"].items():
        number, _, rest = part.partition("/")
        name, _, kind = rest.partition(" ")
        for row in record.get("rows", []):
            method = row["method"].partition(" (")[0] if name == "baselines" else name
            if kind != "equivariance":
                classifier = "transfer" if kind == "transfer" else row["classifier"]
                key = method, row["features"], classifier, row["train_size"]
                errors.setdefault(key, Measured()).of_seed[number] = row["error_mean"]
            elif heading := column(row) or column_of_stl(row):
                own = row.get("map", "ridge").removeprefix("ridge")
                key = row["transformations"], method, own, row["features"], heading
                equivariance.setdefault(key, Measured()).of_seed[number] = row["value"]
    return errors, equivariance


def stopped_early(results):
    """{method: its title with its epochs} of those that a full study trained for fewer than its longest training."""
    epochs = {part.partition("/")[2]: record["epochs"] for part, record in results["parts"].items()
              if "epochs" in record and results["scale"] == "full"}
    return {method: f"{METHODS[method]}, {number} epochs" for method, number in epochs.items()
            if number < max(epochs.values())}


def seeds_of(results):
    return sorted({int(part.partition("/")[0]) for part in results["parts"]})


def in_order(rows):
    """Rows (method, ...) in the order of METHODS and KINDS."""
    orders = {**{name: i for i, name in enumerate(METHODS)}, **{name: i for i, name in enumerate(KINDS)}}
    return sorted(set(rows), key=lambda row: [(orders.get(part, 0), str(part)) for part in row])


def table(headings, rows):
    return ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings),
            *("| " + " | ".join(row) + " |" for row in rows), ""]


def error_tables(results, errors, seeds):
    """For each classifier and number of labels ours, the paper's and, where trainings are as long, the difference."""
    compared, published, full = compared_features(results), published_for(results), results["scale"] == "full"
    titles = METHODS | stopped_early(results)
    digits = 4 if results["study"].startswith("stl-") else 3
    for classifier in dict.fromkeys([*published, *(key[2] for key in errors)]):
        known = published.get(classifier, {})
        sizes = sorted({key[3] for key in errors if key[2] == classifier}, reverse=True)
        if not sizes:
            continue
        headings = ["", "features"]
        for size in sizes:
            headings += [f"{size:,} labels: ours", "paper", "difference"][: 2 + full] if known else [f"{size:,} labels"]
        rows = []
        for method, features in in_order([key[:2] for key in errors] + [(method, compared) for method in known]):
            cells = [titles[method], KINDS[features]]
            for size in sizes:
                ours = errors.get((method, features, classifier, size))
                theirs = known.get(method, {}).get(size) if features == compared else None
                cells.append(ours.text(digits, seeds) if ours else "–")
                if known:
                    cells.append(f"{theirs:.{digits}f}" if theirs else "")
                if known and full:
                    cells.append(f"{ours.mean() - theirs:+.{digits}f}" if ours and theirs else "")
            rows.append(cells)
        yield TITLES[classifier], table(headings, rows)


def order_table(results, errors):
    """The paper's methods from the best to the worst in each column: in the paper, and ours by the mean over seeds; and
    in how many seeds the paper's best is first, and its worst last."""
    short = {"avt": "AVT", "pt": "PT", "vte_ba": "BA", "vte_infonce1": "I1", "vte_infonce2": "I2"}
    columns = sorted({key[2:] for key in errors}, key=lambda column: -column[1])
    rows = []
    for classifier, known in published_for(results).items():
        for size in [size for by, size in columns if by == classifier]:
            if not all(size in known.get(method, {}) for method in PAPERS):
                continue
            theirs = sorted(PAPERS, key=lambda method: known[method][size])
            for features in ("sample", "mu"):
                ours = {method: errors[method, features, classifier, size].of_seed for method in PAPERS
                        if (method, features, classifier, size) in errors}
                seeds = set.intersection(*map(set, ours.values())) if len(ours) == len(PAPERS) else ()
                if not seeds:
                    continue
                by_mean = sorted(ours, key=lambda method: statistics.mean(ours[method][seed] for seed in seeds))
                ranks = [sorted(ours, key=lambda method, seed=seed: ours[method][seed]) for seed in seeds]
                first, last = sum(rank[0] == theirs[0] for rank in ranks), sum(rank[-1] == theirs[-1] for rank in ranks)
                rows.append([f"{TITLES[classifier]}, {size:,}", KINDS[features],
                             " < ".join(short[method] for method in theirs),
                             " < ".join(short[method] for method in by_mean),
                             f"{first} of {len(seeds)}", f"{last} of {len(seeds)}"])
    headings = ["classifier, labels", "features", "paper", "ours", "the paper's best is first, in seeds",
                "its worst is last, in seeds"]
    return table(headings, rows) if rows else []


def paired_table(errors):
    """Differences of error between methods, with mu where z can be sampled, seed by seed: mean, and half of its 95 %
    interval by Student's t. Bold: no chance by a paired t-test at .05, Holm-corrected over the table."""
    measures = sorted({key[2:] for key in errors}, key=lambda measure: (measure[0], -measure[1]))
    cells = {}
    for pair in PAIRS:
        for measure in measures:
            one, other = (next((errors[(method, features, *measure)].of_seed for features in ("mu", None)
                                if (method, features, *measure) in errors), {}) for method in pair)
            differences = [one[seed] - other[seed] for seed in one.keys() & other.keys()]
            if len(differences) > 2:
                cells[pair, measure] = differences
    p_values = {cell: stats.ttest_1samp(differences, 0).pvalue for cell, differences in cells.items()}
    significant = set()
    for number, cell in enumerate(sorted(p_values, key=p_values.get)):
        if p_values[cell] > 0.05 / (len(cells) - number):
            break
        significant.add(cell)

    def text(cell):
        if cell not in cells:
            return ""
        n, mean = len(cells[cell]), statistics.mean(cells[cell])
        half = stats.t.ppf(0.975, n - 1) * statistics.stdev(cells[cell]) / n**0.5
        return f"**{mean:+.3f}** ± {half:.3f}" if cell in significant else f"{mean:+.3f} ± {half:.3f}"

    rows = [[f"{METHODS[one]} − {METHODS[other]}", *(text(((one, other), measure)) for measure in measures)]
            for one, other in PAIRS if any(cell[0] == (one, other) for cell in cells)]
    return table(["", *(f"{TITLES[classifier]}, {size:,}" for classifier, size in measures)], rows) if rows else []


def equivariance_tables(equivariance, seeds, titles):
    """(family of transformations, title, lines): what share is equivariant, and of STL's own transformations prediction
    and retrieval as well. Rows with z sampled are left to the JSON."""
    for family in dict.fromkeys(key[0] for key in equivariance):
        found = {key[1:]: measured for key, measured in equivariance.items() if key[0] == family and key[3] != "sample"}
        known = [heading for heading in dict.fromkeys(key[3] for key in found) if "alone" not in heading]
        questions = {"equivariance": known}
        if SHARES[0] in known:  # all else is in the JSON
            questions["equivariance"] = [*SHARES, "the same for all images", "unexplained", "excess H@1"]
        if "MSE all" in known:
            questions["prediction and retrieval"] = ["MSE crop", "MSE colour", "MSE all", "MRR", "H@1", "PRE"]
        for question, headings in questions.items():
            rows = []
            for method, own, features in in_order(key[:3] for key in found):
                cells = [found.get((method, own, features, heading)) for heading in headings]
                if any(cells):
                    rows.append([titles[method] + (f": its {own}" if own else ""),
                                 *(cell.text(seeds=seeds) if cell else "" for cell in cells)])
            yield family, f"{question.capitalize()}, {family} transformations", table(["", *headings], rows)


def trainings_table(results):
    """What each training ended with, means over seeds."""
    shown = {"squared_error": "squared error of t; VTE-BA: of z", "explained": "explained of z", "bound": "bound, nats",
             "inv": "L_inv", "equi": "L_equi", "trans": "L_trans", "predict": "squared error of labels",
             "code_spread": "code spread", "logvar": "mean log-variance", "z_std": "std of z"}
    records = {method: [record for part, record in results["parts"].items() if part.partition("/")[2] == method]
               for method in METHODS}
    logged = {name for found in records.values() for record in found for name in record["log"]}
    names, rows = [name for name in shown if name in logged], []
    for method, found in records.items():
        if found:
            cells = [METHODS[method], f"{found[0]['epochs']} x {found[0]['images']:,}",
                     f"{statistics.mean(record['seconds'] for record in found) / 60:.1f}"]
            for name in names:
                values = [record["log"][name][-1] for record in found if name in record["log"]]
                cells.append(f"{statistics.mean(values):.3f}" if values else "")
            rows.append(cells)
    return table(["", "epochs x images", "minutes each", *(shown[name] for name in names)], rows) if rows else []


def provenance(results):
    """Where and with what: a sentence for each machine and set of versions that made any of it."""
    used, told = {record["piece"] for record in results["parts"].values()}, {}
    for number in sorted(used):
        made = dict(results["pieces"][number]["machine"])
        commit = made.pop("commit", None)
        told.setdefault(json.dumps(made), []).append(commit or "unknown")
    minutes = sum(record["seconds"] for record in results["parts"].values()) / 60
    text = [f"Seeds {', '.join(map(str, seeds_of(results)))}; {minutes:.0f} minutes in all."]
    for made, commits in told.items():
        made = json.loads(made)
        gpu, processor = made.pop("gpu", None), made.pop("processor")
        unit = "cores" if "cores" in made else "threads"
        count = made.pop(unit)
        where = (f"{gpu}, " if gpu else "") + f"{count} {unit if count > 1 else 'thread'} of {processor}"
        versions = ", ".join(f"{name} {number}" for name, number in made.items())
        text.append(f"{where}; {versions}; commit {', '.join(dict.fromkeys(commits))}.")
    return " ".join(text)


def study_section(results):
    """What stands between a study's marks in RESULTS.md."""
    (errors, equivariance), seeds = measurements(results), len(seeds_of(results))
    text = [f"**{results['title']}.** {provenance(results)} Commands: {results['study']}.json.", ""]
    for title, lines in error_tables(results, errors, seeds):
        text += [f"**{title}**, error", "", *lines]
    paired = paired_table(errors)
    if paired:
        text += ["**Differences of error, seed by seed**: mean ± 95 % interval (t); bold: not 0 at .05, Holm-corrected",
                 "", *paired]
    order = order_table(results, errors)
    if order:
        text += ["**Order of the methods**, best first, I1 and I2 for the two InfoNCE", "", *order]
    measured = list(equivariance_tables(equivariance, seeds, METHODS | stopped_early(results)))
    for family, title, lines in measured:
        if family != measured[0][0]:
            text += [f"<details><summary>{title}</summary>", "", *lines, "</details>", ""]
        else:
            of = ", from mu" if compared_features(results) == "sample" else ""
            text += [f"**{title}**{of} (EQUIVARIANCE.md says what each is)", "", *lines]
    return "\n".join([*text, "**Trainings**, last epoch", "", *trainings_table(results)])


LABELS = 50000  # that k-NN takes in README


def overview(studies):
    """What README shows of each method on CIFAR-10, {method: {"k-NN": error, name: ...}}, each Measured, from features
    without sampling; the names are of SHARES. Best k-NN error first. Also the full studies that it is from, and
    {method: title}."""
    def shown(method):  # of ours the control alone
        return method.startswith("random") or not METHODS[method].startswith("*")

    found, used = {}, [studies[name] for name in ("cifar10", "stl-cifar10") if studies.get(name)]
    titles = dict(METHODS)
    for results in used:
        titles |= stopped_early(results)
        errors, equivariance = measurements(results)
        for method in METHODS:
            for features in ("mu", None):
                error = errors.get((method, features, "knn", LABELS))
                if error and method not in found and shown(method):
                    found[method] = {"k-NN": error, **{
                        name: equivariance.get(("projective", method, "", features, name)) for name in SHARES}}
    return dict(sorted(found.items(), key=lambda item: item[1]["k-NN"].mean())), used, titles


def readme_section(studies):
    rows, used, titles = overview(studies)
    if not rows:
        return "*Not yet run.*\n"
    published, lines = PUBLISHED["cifar10"]["knn"], []
    for method, measured in rows.items():
        theirs = published.get(method, {}).get(LABELS)
        cells = [value.text() if value else "–" for value in measured.values()]
        lines.append([titles[method], cells[0], f"{theirs:.3f}" if theirs else "", *cells[1:]])
    headings = ["", f"k-NN error, {LABELS:,} labels", "the paper's: z sampled", *SHARES]
    seeds = ", ".join(f"{len(seeds_of(results))} ("
                      f"{'STL and SimCLR' if results['study'].startswith('stl') else 'the methods of VTE'}, "
                      f"{results['study']}.json)" for results in used)
    several = any(len(seeds_of(results)) > 1 for results in used)
    about = (f"{used[0]['title']}; features mu, not sampled. "
             f"{'Mean ± standard deviation over training seeds' if several else 'Number of training seeds'}: {seeds}.")
    return "\n".join([*table(headings, lines), about, ""])


def between_marks(page, text, name):
    """The page with `text` in place of what stands between the lines <!-- name --> and <!-- /name -->; None without."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if begin not in page or end not in page.split(begin, 1)[1]:
        return None
    before, rest = page.split(begin, 1)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}"


def write_pages(root):
    """Brings root/RESULTS.md and root/README.md up to date with root/results: a section for each study that was made,
    but for small ones whose full one was made. Raises UserError."""
    try:
        paths = {name: root / "results" / f"{name}.json" for name in STUDIES}
        studies = {name: read_results(path) if path.exists() else None for name, path in paths.items()}
        shown = {name: found for name, found in studies.items()
                 if found and not (name.endswith("-small") and studies[name.removesuffix("-small")])}
        sections = {"RESULTS.md": {name: study_section(found) for name, found in shown.items()},
                    "README.md": {"main table": readme_section(studies)}}
        for name, texts in sections.items():
            page = before = (root / name).read_text()
            for mark, text in texts.items():
                if mark in STUDIES and f"<!-- {mark} -->" not in page:  # made for the first time
                    page += f"\n## `{STUDIES[mark]}`: {mark}\n\n<!-- {mark} -->\n<!-- /{mark} -->\n"
                page = between_marks(page, text, mark)
                if page is None:
                    raise UserError(f"'{root / name}' lacks the lines <!-- {mark} --> and <!-- /{mark} -->, between "
                                    "which its table goes")
            if page != before:
                write_atomically(root / name, lambda file, page=page: file.write(page.encode()))
    except OSError as error:
        raise UserError(f"the tables cannot be read and written in '{root}', which must hold RESULTS.md, README.md "
                        f"and results/: {error}") from error


def main():
    parser = Parser(description="Bring the tables of RESULTS.md and README.md up to date with results/*.json.",
                    epilog="example:\n  python study/tables.py")
    parser.add_argument("--pages", type=Path, default=ROOT, metavar="DIR", help="with results/, RESULTS.md, README.md")
    write_pages(parser.parse_args().pages)


if __name__ == "__main__":
    run_command(main)
