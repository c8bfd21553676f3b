"""The dossier as text: one set of sections, written as Markdown and as a page for print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ottava.console.plans import money

Content = Mapping[str, Any]
VERDICTS = {
    "possible": "A domestic plan exists",
    "fails": "No domestic plan exists",
    "no way": "No domestic chip of the inventory does this work",
    "not known": "Whether a domestic plan exists was not decided in time",
}


def title(content: Content) -> str:
    """Of the page."""
    return f"Dossier for foreign chips: {content['plan']} on {content['fleet']}"


def verdict(content: Content) -> list[str]:
    """What it comes to, in sentences."""
    requests = content["requests"]
    if not requests:
        return ["The plan asks for no foreign chip."]
    possible = sum(one["home"]["verdict"] == "possible" for one in requests)
    told = [f"The plan asks for foreign chips {len(requests)} times; {possible} of these could be served at home."]
    told.append("Figures are as certain as their sources: each is cited with its date and certainty below.")
    return told


def sections(content: Content) -> list[dict[str, Any]]:
    """One section a request, then the rules and what was measured: {title, lede, head, rows}."""
    found = [_request(one) for one in content["requests"]]
    found.append(
        {
            "title": "Rules", "lede": ["As they stand in the portfolio; rules move, so each has its version and date."],
            "head": ["Rule", "Version, date", "Says", "Source and certainty"],
            "rows": [
                [
                    rule["name"], f"{rule['version']}, {rule['date']}",
                    f"{rule['strength']}: {rule['reason']} ({', '.join(rule['vendors'])})",
                    f"{rule['source']} ({rule['certainty']})",
                ]
                for rule in content["rules"]
            ],
        }
    )  # fmt: skip
    rows = [[one["path"], row["pool"], row["told"]] for one in content["evidence"] for row in one["pools"]]
    lede = "What ottava qualify measured on these chips." if rows else "No measurement of ottava qualify was given."
    found.append({"title": "Measured evidence", "lede": [lede], "head": ["File", "Pool", "Measured"], "rows": rows})
    return found


def _request(one: Content) -> dict[str, Any]:
    home = one["home"]
    spread = f"{money(one['usd_low'])} to {money(one['usd_high'])}"
    lede = [
        f"{one['job']} ({one['kind']}, {one['parameters']:.3g} parameters, {one['memory_gb']:,.0f} GB) on "
        f"{one['chips']:,} {one['chip']} of {one['pool']}, {one['from']} to {one['until']}, {money(one['usd'])} "
        f"({spread}). {_sentence(one['reason'])}",
        f"{VERDICTS[home['verdict']]}.",
    ]
    rows: list[list[str]] = []
    if home["best"] is not None:
        best = home["best"]
        weeks, usd = best["weeks"], best["usd"]
        shares = f"for each of {best['shares']} shares, " if best["shares"] > 1 else ""
        rows.append(
            [
                "best domestic plan",
                f"{shares}{best['chips']:,} {best['chip']} of {best['pool']}: {weeks['value']} weeks "
                f"({weeks['low']} to {weeks['high']}), {money(usd['value'])} "
                f"({money(usd['low'])} to {money(usd['high'])})",
            ]
        )
    rows += [["why it fails" if home["verdict"] != "possible" else "what it costs", text] for text in home["fails"]]
    rows += [["pool that cannot", f"{refused['pool']}: {refused['why']}"] for refused in home["refusals"]]
    rows += [["cheapest relaxation", text] for text in home["change"] if text]
    rows.append(["rules that speak of it", ", ".join(one["rules"]) or "none"])
    rows += [["law", text] for text in one["law"]]
    rows.append(["the workload's figures", one["workload_source"]])
    rows += [["source", text] for text in one["sources"]]
    rows += [["measured", f"{found['path']} (SHA-256 {found['sha256'][:12]})"] for found in one["evidence"]]
    return {
        "title": f"{one['job']}: {one['chips']:,} {one['chip']}",
        "lede": lede,
        "head": ["What", "Told"],
        "rows": rows,
    }


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def markdown(heading: str, told: Sequence[str], parts: Sequence[Content]) -> str:
    """The same as Markdown."""
    lines = [f"# {heading}", "", *(line for sentence in told for line in (sentence, ""))]
    for part in parts:
        lines += [f"## {part['title']}", "", *(line for sentence in part["lede"] for line in (sentence, ""))]
        if part["rows"]:
            lines += [f"| {' | '.join(part['head'])} |", f"|{'---|' * len(part['head'])}"]
            lines += [
                f"| {' | '.join(str(cell).replace('|', '/').replace(chr(10), ' ') for cell in row)} |"
                for row in part["rows"]
            ]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"
