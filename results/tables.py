"""The tables of RESULTS.md and README.md, from what results/reproduce.py measured.

    python results/tables.py            # brings both pages up to date with results/<study>.json

Only what stands between a study's marks is replaced. Errors are means over training seeds ± their standard deviation;
the published numbers beside them are those of one training, their ± (left out here) that of sampling z.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Parser, UserError, file_path, run_command, write_atomically
from probe import NAMES, between_marks, column

ROOT = Path(__file__).resolve().parent.parent
METHODS = {  # of each family: name, what the tables call it, script, its flags, the method before it
    "vte": {
        "avt": ("AVT", "avt.py", [], None),
        "pt": ("predictive transformation", "predictive_transform.py", [], None),
        "vte_ba": ("VTE-BA", "vte_ba.py", [], "pt"),
        "vte_infonce1": ("VTE-InfoNCE (1), separated", "vte_infonce.py", ["--critic", "separated"], "pt"),
        "vte_infonce2": ("VTE-InfoNCE (2), concatenated", "vte_infonce.py", ["--critic", "concatenated"], "pt"),
        "steerable": ("*ours:* VTE-BA, D sees t", "vte_ba.py", ["--steerable"], "pt"),
        "mean_target": ("*ours:* VTE-BA, predicts mu", "vte_ba.py", ["--mean-target"], "pt"),
    },
    "stl": {
        "stl": ("STL", "stl.py", [], None),
        "simclr": ("SimCLR", "stl.py", ["--equi", "0", "--trans", "0", "--batch", "independent"], None),
        "augmix": ("STL + AugMix", "stl.py", ["--augmix"], None),
    },
}
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
    "stl-stl10": {  # STL Tables 1, 2
        "linear": {"stl": {5000: .1517}, "simclr": {5000: .1526}, "augmix": {5000: .1443}},
        "transfer": {"stl": {50000: .1478}, "simclr": {50000: .1911}, "augmix": {50000: .1399}},
    },
    "stl-cifar10": {},
}
STUDIES = {  # name: what makes it
    "cifar10": "make reproduce", "stl10": "make reproduce", "cifar10-small": "make reproduce-small",
    "stl-stl10": "make reproduce-stl", "stl-cifar10": "make reproduce-stl",
    "stl-cifar10-small": "make reproduce-stl-small",
}
TITLES = {**NAMES, "transfer": "linear, transfer to CIFAR-10"}
FEATURES = {"sample": "z sampled", "mu": "mu", "trunk": "before mu", None: ""}
BASELINES = ("random encoder", "raw pixels")


def family_of(study):
    return "stl" if study.startswith("stl-") else "vte"


def data_of(study):
    """Which published numbers a study is compared with."""
    return study.removesuffix("-small").removesuffix("-tiny")


def name_of(family, method):
    return METHODS[family][method][0] if method in METHODS[family] else method


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


def collect(results):
    """Errors {(method, features, classifier, labels): Measured} and equivariance {(family of transformations, line,
    features, heading): Measured}."""
    errors, equivariance = {}, {}
    for part, record in results["parts"].items():
        number, _, rest = part.partition("/")
        name, _, kind = rest.partition(" ")
        for row in record.get("rows", []):
            method = name
            if name == "baselines":
                method = row["method"].partition(" (")[0]
            if kind != "equivariance":
                classifier = "transfer" if kind == "transfer" else row["classifier"]
                key = method, row["features"], classifier, row["train_size"]
                errors.setdefault(key, Measured()).of_seed[number] = row["error_mean"]
            elif column(row):
                own = row.get("map", "ridge")
                line = name_of(family_of(results["study"]), method) + ("" if own == "ridge" else f": its {own}")
                key = row["transformations"], line, row["features"], column(row)
                equivariance.setdefault(key, Measured()).of_seed[number] = row["value"]
    return errors, equivariance


def seeds_of(results):
    return sorted({int(part.partition("/")[0]) for part in results["parts"]})


def compared_features(family):
    """Which of our rows stand beside the paper's."""
    return "sample" if family == "vte" else None


def lines_of(errors, family):
    """The rows of a table: (method, features), the methods first, those without any result too."""
    present = {(method, features) for method, features, _, _ in errors}
    present |= {(method, compared_features(family)) for method, (title, *_) in METHODS[family].items()
                if not title.startswith("*ours")}
    order = [*METHODS[family], *BASELINES]
    features = list(FEATURES)
    return sorted(present, key=lambda line: (order.index(line[0]), features.index(line[1])))


def table(headings, rows):
    return ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings),
            *("| " + " | ".join(row) + " |" for row in rows), ""]


def error_tables(study, errors, seeds=1):
    """For each classifier ours, the paper's and the difference, for each number of labels."""
    family, published = family_of(study), PUBLISHED[data_of(study)]
    digits = 4 if family == "stl" else 3
    for classifier in dict.fromkeys([*published, *(key[2] for key in errors)]):
        known = published.get(classifier, {})
        sizes = {key[3] for key in errors if key[2] == classifier}
        if not sizes or not study.endswith("-small"):  # which is not to have all
            sizes |= {size for row in known.values() for size in row}
        sizes = sorted(sizes, reverse=True)
        headings = ["", "features"]
        for size in sizes:
            headings += [f"{size:,} labels: ours", "paper", "difference"] if known else [f"{size:,} labels"]
        rows = []
        for method, features in lines_of(errors, family):
            cells = [name_of(family, method), FEATURES[features]]
            for size in sizes:
                ours = errors.get((method, features, classifier, size))
                theirs = known.get(method, {}).get(size) if features == compared_features(family) else None
                cells.append(ours.text(digits, seeds) if ours else "–")
                if known:
                    cells.append(f"{theirs:.{digits}f}" if theirs else "")
                    cells.append(f"{ours.mean() - theirs:+.{digits}f}" if ours and theirs else "")
            rows.append(cells)
        yield TITLES[classifier], table(headings, rows)


def order_table(study, errors):
    """The paper's methods from the best to the worst in each column: in the paper, and ours by the mean over seeds; and
    in how many seeds the paper's best is first, and its worst last."""
    short = {"avt": "AVT", "pt": "PT", "vte_ba": "BA", "vte_infonce1": "I1", "vte_infonce2": "I2"}
    rows = []
    for classifier, known in PUBLISHED[data_of(study)].items():
        for size in sorted({key[3] for key in errors if key[2] == classifier}, reverse=True):
            if not all(size in known[method] for method in PAPERS):
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
                rows.append([f"{TITLES[classifier]}, {size:,}", FEATURES[features],
                             " < ".join(short[method] for method in theirs),
                             " < ".join(short[method] for method in by_mean),
                             f"{first} of {len(seeds)}", f"{last} of {len(seeds)}"])
    headings = ["classifier, labels", "features", "paper", "ours", "the paper's best is first, in seeds",
                "its worst is last, in seeds"]
    return table(headings, rows) if rows else []


def equivariance_tables(study, equivariance, seeds=1):
    """One table a family of transformations; rows with z sampled are left to the JSON."""
    for transformations in dict.fromkeys(key[0] for key in equivariance):
        found = {key[1:]: measured for key, measured in equivariance.items()
                 if key[0] == transformations and key[2] != "sample"}
        headings = [heading for heading in dict.fromkeys(key[2] for key in found) if "alone" not in heading]
        order = [*(title for title, *_ in METHODS[family_of(study)].values()), *BASELINES]
        lines = dict.fromkeys(key[:2] for key in found)
        lines = sorted(lines, key=lambda line: order.index(line[0].split(": its ")[0]))
        rows = [[line, *(found[line, features, heading].text(seeds=seeds) if (line, features, heading) in found else ""
                         for heading in headings)] for line, features in lines]
        yield transformations, table(["", *headings], rows)


def trainings_table(study, results):
    """What each training ended with, means over seeds."""
    family, rows = family_of(study), []
    shown = {"squared_error": "squared error of t", "explained": "explained of z", "bound": "bound, nats",
             "inv": "L_inv", "equi": "L_equi", "trans": "L_trans", "code_spread": "code spread",
             "logvar": "mean log-variance", "z_std": "std of z"}
    records = {method: [record for part, record in results["parts"].items() if part.partition("/")[2] == method]
               for method in METHODS[family]}
    logged = {name for found in records.values() for record in found for name in record["log"]}
    names = [name for name in shown if name in logged]
    for method, found in records.items():
        if found:
            cells = [name_of(family, method), f"{found[0]['epochs']} x {found[0]['images']:,}",
                     f"{statistics.mean(record['seconds'] for record in found) / 60:.1f}"]
            for name in names:
                values = [record["log"][name][-1] for record in found if name in record["log"]]
                cells.append(f"{statistics.mean(values):.3f}" if values else "")
            rows.append(cells)
    return table(["", "epochs x images", "minutes each", *(shown[name] for name in names)], rows) if rows else []


def provenance(results):
    """Where and with what: a line for each machine and set of versions that made any of it."""
    used, told = {record["piece"] for record in results["parts"].values()}, {}
    for number, piece in enumerate(results["pieces"]):
        made = dict(piece["machine"])
        commit = made.pop("commit", None)
        if number in used:
            told.setdefault(json.dumps(made), []).append((commit, piece["jobs"]))
    minutes = sum(piece["seconds"] for piece in results["pieces"]) / 60
    text = [f"Seeds {', '.join(map(str, seeds_of(results)))}; {minutes:.0f} minutes in all."]
    for made, pieces in told.items():
        made = json.loads(made)
        gpu = made.pop("gpu", None)
        where = (f"{gpu}, " if gpu else "") + f"{made.pop('cores')} cores of {made.pop('processor')}"
        versions = ", ".join(f"{name} {number}" for name, number in made.items())
        jobs = " or ".join(str(number) for number in sorted({jobs for _, jobs in pieces}))
        commits = ", ".join(dict.fromkeys(commit for commit, _ in pieces if commit))
        text.append(f"{where}; {versions}; {jobs} at once; commit {commits or 'unknown'}.")
    return " ".join(text)


def folded(summary, lines):
    return [f"<details><summary>{summary}</summary>", "", *lines, "</details>", ""]


def study_section(study, results):
    """What stands between a study's marks in RESULTS.md."""
    if results is None or not results["parts"]:
        text = [f"**Not yet run** (`{STUDIES[study]}`). The published numbers that it will stand beside:", ""]
        tables = [line for title, lines in error_tables(study, {}) for line in (f"**{title}**, error", "", *lines)]
        return "\n".join([*text, *tables] if tables else [f"**Not yet run** (`{STUDIES[study]}`)."])
    (errors, equivariance), seeds = collect(results), len(seeds_of(results))
    text = [f"**{results['title']}.** {provenance(results)}", ""]
    for title, lines in error_tables(study, errors, seeds):
        text += [f"**{title}**, error", "", *lines]
    order = order_table(study, errors) if family_of(study) == "vte" else []
    if order:
        text += ["**Order of the methods**, best first, I1 and I2 for the two InfoNCE", "", *order]
    for number, (transformations, lines) in enumerate(equivariance_tables(study, equivariance, seeds)):
        title, where = f"Equivariance, {transformations} transformations", "EQUIVARIANCE.md says what each is"
        of = ", from mu" if family_of(study) == "vte" else ""
        text += folded(title, lines) if number else [f"**{title}**{of} ({where})", "", *lines]
    text += ["**Trainings**, last epoch", "", *trainings_table(study, results)]
    commands = [record["command"] for record in results["parts"].values()]
    return "\n".join([*text, *folded("all commands", ["```", *commands, "```", ""])])


def readme_section(studies):
    """The main table: the full study as soon as any of it was made, else the small one."""
    study = next((name for name in ("cifar10", "cifar10-small") if studies[name] and collect(studies[name])[0]), None)
    if study is None:
        return "*Not yet run.*\n"
    results, published, family = studies[study], PUBLISHED["cifar10"], family_of(study)
    errors, seeds = collect(results)[0], len(seeds_of(results))
    sizes = sorted({key[3] for key in errors}, reverse=True)
    columns = [(classifier, size) for classifier in published for size in sizes]
    rows = []
    for method, features in lines_of(errors, family):
        if name_of(family, method).startswith("*ours"):  # these are in RESULTS.md
            continue
        cells = [name_of(family, method), FEATURES[features]]
        for classifier, size in columns:
            ours = errors.get((method, features, classifier, size))
            theirs = published[classifier].get(method, {}).get(size) if features == "sample" else None
            text = (ours.text(seeds=seeds) if ours else "–") + (f"<br>*{theirs:.3f}*" if theirs else "")
            cells.append(text.replace("0.", "."))  # narrow columns
        rows.append(cells)
    headings = [f"{NAMES[name].replace(' regression', '')}, {size:,}" for name, size in columns]
    how = "at the paper's scale" if results["scale"] == "full" else "at a small scale ([what that is](RESULTS.md))"
    text = [f"{results['title']}, error on 10,000 test images, {how}; mean ± standard deviation over {seeds} training "
            "seeds. *In italics the paper's*, of its full scale and one seed."]
    return "\n".join([*table(["error", "features", *headings], rows), *text, ""])


def holds(values, **kinds):
    for name, kind in kinds.items():
        if not isinstance(values[name], kind):
            raise ValueError(f"its {name} is not what was written")


def read_results(path):
    """What `write_results` wrote. Raises UserError."""
    try:
        results = json.loads(path.read_text())
        holds(results, study=str, title=str, scale=str, pieces=list, parts=dict)
        for piece in results["pieces"]:
            holds(piece, machine=dict, jobs=int, seconds=(int, float))
        for record in results["parts"].values():
            holds(record, settings=list, command=str, seconds=(int, float), piece=int)
            holds(results["pieces"][record["piece"]], machine=dict)
            if "rows" in record:
                holds(record, rows=list)
            else:
                holds(record, checkpoint=str, epochs=int, images=int, log=dict)
        collect(results), provenance(results)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"'{path}' does not hold the results of a study ({error})") from error
    return results


def write_results(results, path):
    """A line a part, so that changes can be read."""
    head = json.dumps({name: value for name, value in results.items() if name != "parts"}, indent=1)[:-2]
    parts = ",\n".join(f"  {json.dumps(name)}: {json.dumps(record)}" for name, record in results["parts"].items())
    text = f'{head},\n "parts": {{\n{parts}\n }}\n}}\n'
    write_atomically(path, lambda file: file.write(text.encode()))


def write_pages(root, results=None, complete=False):
    """Puts results, of one study, into root/results, and brings the pages up to date. What is there already and not
    among them is kept: results on the same data stay, and those on other data too, unless the new ones are complete;
    then they are moved aside. Raises UserError where something cannot be read or written."""
    folder = root / "results"
    paths = {name: folder / f"{name}.json" for name in STUDIES}
    try:
        if results is not None and results["parts"]:
            path = paths[results["study"]]
            there = read_results(path) if path.exists() else {**results, "parts": {}}
            other = there["title"] != results["title"]
            if other and complete:
                path.rename(path.with_suffix(".before.json"))
                print(f"what '{path}' held, on {there['title']}, is now in '{path.with_suffix('.before.json')}'")
                write_results(results, path)
            elif other or there["parts"].keys() - results["parts"].keys():
                print(f"'{path}' is left as it is: it holds {len(there['parts'])} parts on {there['title']}, and not "
                      f"all of these are among the {len(results['parts'])} on {results['title']} at hand"
                      + ("" if other else f" (--finished '{path}' takes both together)"))
            else:
                write_results(results, path)
        studies = {name: read_results(path) if path.exists() else None for name, path in paths.items()}
        sections = {"RESULTS.md": {name: study_section(name, found) for name, found in studies.items()},
                    "README.md": {"main table": readme_section(studies)}}
        for name, texts in sections.items():
            page = before = (root / name).read_text()
            for mark, text in texts.items():
                page = between_marks(page, text, mark)
                if page is None:
                    raise UserError(f"'{root / name}' lacks the lines <!-- {mark} --> and <!-- /{mark} -->, between "
                                    "which its table is to stand")
            if page != before:
                write_atomically(root / name, lambda file, page=page: file.write(page.encode()))
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"the tables cannot be read and written in '{root}', which is to hold RESULTS.md, README.md "
                        f"and results/: {error}") from error


def main():
    parser = Parser(description="Bring the tables of RESULTS.md and README.md up to date with results/*.json.",
                    epilog="example:\n  python results/tables.py")
    parser.add_argument("--pages", type=file_path, default=str(ROOT), metavar="DIR",
                        help="where results/, RESULTS.md and README.md are (default: here)")
    write_pages(Path(parser.parse_args().pages))


if __name__ == "__main__":
    run_command(main)
