"""Prove on a GPU that plain checkpoints of moefuse run in ExLlamaV3 and ExLlamaV2.

    python integrations/exllama/prove.py                      # every engine and family
    python integrations/exllama/prove.py --list               # what would be run; needs no GPU
    python integrations/exllama/prove.py --make-only          # only the checkpoints; needs no GPU

For every family whose architecture an engine knows, a tiny random teacher is fused, and written out
and collapsed by the library. The engine loads each, unquantised, makes 24 tokens greedily after
each of 20 prompts, and reads all of it again in one pass. Transformers reads the same in fp32 and,
as a measure of what fp16 costs, in fp16. A checkpoint counts as run if

- the engine's tokenizer cuts the prompts as Transformers' does,
- its tokens are Transformers' first choices in fp32 as often as Transformers' own in fp16 are, to
  two in a hundred: where two experts or two tokens are close, fp16 decides by chance, and
- the median of KL over positions is at most four times what fp16 costs in Transformers. (The mean
  is told too, but is made by the few positions where fp16 chooses another expert.)

Each case runs in a process of its own, because an error on a GPU ends every other in its process.
Cases that are not run keep the figures that an earlier run left in ``--out``, and what it told of
its machine and commit.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from checkpoints import FORMS, KNOWN, make
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoTokenizer

from moefuse import demo
from moefuse.artifacts import read_json, write_json, write_text
from moefuse.corpus import load_documents
from moefuse.evaluation.machine import machine_meta

Case = tuple[str, str, str]
"""An engine, a family and a form."""
PROMPTS, LONGEST, NEW = 20, 24, 24
TIMES_FP16, CHANCE = 4.0, 0.02
SECONDS = 240


@dataclass(frozen=True)
class Found:
    """What one engine made of one checkpoint; see ``compare`` for the figures."""

    engine: str
    version: str
    family: str
    form: str
    tokens: int
    equal: int
    fp16_equal: int
    farthest_behind: float
    median_kl: float
    mean_kl: float
    fp16_median_kl: float
    fp16_mean_kl: float
    teacher_mean_kl: float
    cut_alike: bool

    @property
    def holds(self) -> bool:
        """Whether the engine computes what Transformers does, to what fp16 costs."""
        alike = self.median_kl <= TIMES_FP16 * self.fp16_median_kl
        same = self.equal >= self.fp16_equal - CHANCE * self.tokens
        return self.cut_alike and alike and same


def texts() -> list[str]:
    """Return what prompts are cut from: pieces of held-out text."""
    text = "\n\n".join(one.text for one in load_documents(str(demo.heldout_path())))
    step = len(text) // PROMPTS
    return [text[start : start + 4 * LONGEST] for start in range(0, step * PROMPTS, step)]


def divergences(wanted: list[Tensor], got: list[Tensor]) -> Tensor:
    """Return KL(wanted || got) of every position, 1-D, in nats."""
    pairs = zip(wanted, got, strict=True)
    rows = [
        kl_div(log_softmax(b, -1), log_softmax(a, -1), reduction="none", log_target=True).sum(-1)
        for a, b in pairs
    ]
    return torch.cat(rows)


def compare(engine: str, family: str, form: str, home: Path) -> Found:
    """Run one checkpoint in an engine and in Transformers.

    ``equal`` is how many of the tokens that the engine made are Transformers' first choice in fp32,
    ``fp16_equal`` how often Transformers chooses the same in fp16 there, ``farthest_behind`` how
    far a made token's logit is below the best. KL is from Transformers in fp32, in nats;
    ``teacher_mean_kl``, of the student's teacher, tells what another function would give.
    """
    from engines import ENGINES, transformers_logits  # noqa: PLC0415  builds for minutes

    path = home / family / form.replace(" ", "-")
    reference = AutoTokenizer.from_pretrained(path)
    prompts = [reference(text, add_special_tokens=False)["input_ids"] for text in texts()]
    loaded = ENGINES[engine](path)
    cut_alike = [loaded.encode(text) for text in texts()] == prompts
    prompts = [ids[:LONGEST] for ids in prompts]
    made = loaded.greedy(prompts, NEW)
    sequences = [ids + new for ids, new in zip(prompts, made, strict=True)]
    got = [loaded.logits(ids) for ids in sequences]
    exact = transformers_logits(path, sequences, torch.float32)
    half = transformers_logits(path, sequences, torch.float16)
    teacher = transformers_logits(home / family / "teacher", sequences, torch.float32)
    chosen = [
        rows[len(ids) - 1 : -1].argmax(-1).tolist() for rows, ids in zip(half, prompts, strict=True)
    ]
    behind = torch.cat([lag(*each) for each in zip(exact, prompts, made, strict=True)])
    fp16_behind = torch.cat([lag(*each) for each in zip(exact, prompts, chosen, strict=True)])
    own, fp16 = divergences(exact, got), divergences(exact, half)
    return Found(
        engine=engine,
        version=loaded.version,
        family=family,
        form=form,
        tokens=len(behind),
        equal=int((behind == 0).sum()),
        fp16_equal=int((fp16_behind == 0).sum()),
        farthest_behind=float(behind.max()),
        median_kl=float(own.median()),
        mean_kl=float(own.mean()),
        fp16_median_kl=float(fp16.median()),
        fp16_mean_kl=float(fp16.mean()),
        teacher_mean_kl=float(divergences(exact, teacher).mean()),
        cut_alike=cut_alike,
    )


def lag(logits_TV: Tensor, prompt: list[int], made: list[int]) -> Tensor:
    """Return how far below the best logit each made token's is, 1-D."""
    rows = logits_TV[len(prompt) - 1 : -1]
    return rows.max(-1).values - rows.gather(1, torch.tensor(made)[:, None])[:, 0]


def make_all(home: Path, families: set[str], at_once: int) -> None:
    """Make the checkpoints of some families; whatever cannot be made is told, its cases fail."""
    with ProcessPoolExecutor(at_once, mp_context=get_context("spawn")) as pool:
        made = {family: pool.submit(make, home / family, family) for family in sorted(families)}
    for family, future in made.items():
        if error := future.exception():
            print(f"{family} could not be made: {error!r}", flush=True)


def apart(case: Case, home: Path) -> Found | str:
    """Run one case in a process of its own; return what it found, or what it died of."""
    engine, family, form = case
    command = [sys.executable, __file__, "--home", home, "--case", engine, family, form]
    try:
        ran = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {SECONDS} s"
    last = ran.stdout.strip().splitlines()[-1:]
    if ran.returncode == 0 and last:
        print(last[0], flush=True)
        return Found(**json.loads(last[0]))
    print(f"{engine}, {family}, {form}:\n{ran.stdout[-1500:]}\n{ran.stderr[-3000:]}", flush=True)
    return reason(ran.stderr) or f"exit status {ran.returncode}"


def reason(stderr: str) -> str:
    """Return the line that tells most of what a process died of, "" if it said nothing.

    That is an exception's first line: those from CUDA end in advice to developers.
    """
    lines = stderr.strip().splitlines()
    starts = [at for at, line in enumerate(lines) if line.startswith("Traceback (most recent")]
    if starts:
        told = [line for line in lines[starts[-1] + 1 :] if line and not line[0].isspace()]
        return "".join(told[:1])
    return "".join(lines[-1:])


def table(found: dict[Case, Found | str]) -> str:
    """Return all cases as Markdown."""
    lines = [
        "| Engine | Family | Form | Runs | Tokens equal (in fp16) | Farthest behind | "
        "Median KL (fp16) | Mean KL (fp16; teacher) |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for (engine, family, form), one in found.items():
        head = f"| {engine} | `{family}` | {form} |"
        if isinstance(one, str):
            lines.append(f"{head} no: {one.replace('|', '/')} | | | | |")
            continue
        lines.append(
            f"{head} {'yes' if one.holds else 'it loads, but computes something else'} | "
            f"{one.equal} ({one.fp16_equal}) of {one.tokens} | {one.farthest_behind:.4f} | "
            f"{one.median_kl:.1e} ({one.fp16_median_kl:.1e}) | "
            f"{one.mean_kl:.1e} ({one.fp16_mean_kl:.1e}; {one.teacher_mean_kl:.2f}) |"
        )
    return "\n".join(lines)


def cases(engines: list[str], families: list[str] | None) -> list[Case]:
    """Return all that is to be run."""
    return [
        (engine, family, form)
        for engine in engines
        for family in KNOWN[engine]
        if families is None or family in families
        for form in FORMS
    ]


def main() -> None:
    """Do what the command line says."""
    told = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    told.add_argument("--engines", nargs="+", default=list(KNOWN), choices=list(KNOWN))
    told.add_argument("--families", nargs="+", choices=KNOWN["ExLlamaV3"])
    told.add_argument("--home", type=Path, default=Path("runs/exllama"), help="for checkpoints")
    told.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    told.add_argument("--at-once", type=int, default=4, help="cases run at once")
    told.add_argument("--list", action="store_true", help="only say what would be run")
    told.add_argument("--make-only", action="store_true", help="only make the checkpoints")
    told.add_argument("--case", nargs=3, metavar=("ENGINE", "FAMILY", "FORM"), help="run just one")
    given = told.parse_args()
    if given.case:
        print(json.dumps(asdict(compare(*given.case, given.home))), flush=True)
        return
    wanted = cases(given.engines, given.families)
    if given.list:
        print("\n".join(", ".join(case) for case in wanted))
        return
    make_all(given.home, {family for _, family, _ in wanted}, given.at_once)
    if given.make_only:
        return
    with ThreadPoolExecutor(given.at_once) as pool:
        results = pool.map(lambda case: apart(case, given.home), wanted)
        found = dict(zip(wanted, results, strict=True))
    write(given.out, found)


def write(out: Path, found: dict[Case, Found | str]) -> None:
    """Write what was found, and what an earlier run found of other cases, and show it."""
    path = out / "exllama.json"
    earlier = read(path) if path.is_file() else {}
    told = {**earlier, **found}
    told = {case: told[case] for case in cases(list(KNOWN), None) if case in told}
    rows = [
        {"engine": case[0], "family": case[1], "form": case[2], "refused": one}
        if isinstance(one, str)
        else {**asdict(one), "holds": one.holds}
        for case, one in told.items()
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    meta = machine_meta("integrations/exllama/prove.py", device=device)
    by = f"Written by `python integrations/exllama/prove.py` on one {meta['device']}."
    if earlier.keys() - found.keys():
        meta["earlier"] = read_json(path)["meta"]
        by += " Other cases are of an earlier run, which `meta.earlier` in the JSON tells of."
    write_json(path, {"meta": meta, "rows": rows})
    write_text(out / "exllama.md", f"{table(told)}\n\n{by}\n")
    print(table(told))


def read(path: Path) -> dict[Case, Found | str]:
    """Read what an earlier run wrote."""
    told: dict[Case, Found | str] = {}
    for row in read_json(path)["rows"]:
        row.pop("holds", None)
        case = (row["engine"], row["family"], row["form"])
        told[case] = row["refused"] if "refused" in row else Found(**row)
    return told


if __name__ == "__main__":
    main()
