"""What got slower between two results of the same benchmark.

    python examples/benchmarks/compare.py OLD.json NEW.json

A row got slower if its median is worse by more than the threshold *and* every new repetition is
worse than every old one, so that noise alone is not reported. Ratios to a reference are compared
where both files have them, for they hold from machine to machine; `--values` compares the numbers
themselves. The exit status is 1 if something got slower.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from results import number


def read_rows(path):
    document = json.loads(path.read_text(encoding="utf-8"))
    return document["benchmark"], {(row["table"], row["name"]): row for row in document["rows"]}


def verdict(old, new, higher, threshold):
    """`slower`, `faster` or `same` for two lists of repetitions, and the change of the median."""
    before, after = statistics.median(old), statistics.median(new)
    gain = after / before - 1.0 if higher else before / after - 1.0
    if not higher:
        old, new = [-value for value in old], [-value for value in new]
    if gain < -threshold and max(new) < min(old):
        return "slower", gain
    if gain > threshold and min(new) > max(old):
        return "faster", gain
    return "same", gain


def compare(old_rows, new_rows, threshold, values_only=False):
    """Yield (row, kind of number, old median, new median, gain, verdict) for rows in both files."""
    for key, old in old_rows.items():
        new = new_rows.get(key)
        if new is None or not (old["values"] and new["values"]):
            continue
        kind = "values" if values_only or not (old["ratios"] and new["ratios"]) else "ratios"
        word, gain = verdict(old[kind], new[kind], old["higher"], threshold)
        yield key, kind, statistics.median(old[kind]), statistics.median(new[kind]), gain, word


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=0.05, help="default: 0.05")
    parser.add_argument("--values", action="store_true", help="also where there are ratios")
    args = parser.parse_args()
    (benchmark, old_rows), (other, new_rows) = read_rows(args.old), read_rows(args.new)
    if benchmark != other:
        parser.error(f"{args.old} is a result of {benchmark}, {args.new} one of {other}")

    changes = list(compare(old_rows, new_rows, args.threshold, args.values))
    print("| row | old | new | speed | |\n| --- | --- | --- | --- | --- |")
    for (table, name), kind, before, after, gain, word in changes:
        to = f" × {old_rows[table, name]['ratio_to']}" if kind == "ratios" else ""
        print(f"| {table}: {name} | {number(before)}{to} | {number(after)}{to} | ", end="")
        print(f"{gain:+.1%} | {word} |")
    compared = {key for key, *_ in changes}
    for key in [*old_rows, *(key for key in new_rows if key not in old_rows)]:
        if key not in compared:
            print(f"not in both: {key[0]}: {key[1]}", file=sys.stderr)
    slower = [f"{table}: {name}" for (table, name), *_, word in changes if word == "slower"]
    print(
        f"\n{len(slower)} of {len(changes)} rows got slower" + "".join(f"\n- {s}" for s in slower)
    )
    return int(bool(slower))


if __name__ == "__main__":
    sys.exit(main())
