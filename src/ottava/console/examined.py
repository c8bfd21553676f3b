"""What `ottava doctor` found, in lines for people; `--json` has the same as one object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def machine_text(found: Mapping[str, Any]) -> str:
    """Of `platforms.doctor.examine`: the machine, its platforms, and every capability with its level and evidence."""
    machine, memory = found["machine"], found["machine"]["memory_gb"]
    lines = [
        f"machine    {machine['chip']}, {machine['instruction_set']}, {machine['cores']} cores; "
        f"{memory['free']} of {memory['total']} GB of memory and {machine['free_disk_gb']} GB of disk free",
        f"versions   {_versions(found['versions'])}",
        "platforms",
    ]
    for family in found["platforms"]:
        here = f"{family['workers']} workers" if family["available"] else "not here"
        lines.append(f"  {family['name']:<5} {here}: {family['reason']}")
    level = found["ascend_here"]
    lines.append(f"Ascend     on this machine {level['level']}: {level['reason']}; recorded:")
    for entry in found["ascend"]:
        lines += [f"  {entry['level']:<5} {entry['capability']}: {entry['claim']}", f"{'':8}{entry['evidence']}"]
    lines += [f"  {name:<5} means: {meaning}" for name, meaning in level["levels"].items()]
    lines.append("extras")
    for name, extra in found["extras"].items():
        its = {package: version for package, version in extra.items() if package != "installed"}
        lines.append(f"  {name:<8} {'installed' if extra['installed'] else 'not installed'}: {_versions(its)}")
    return "\n".join(lines)


def model_text(found: Mapping[str, Any]) -> str:
    """Of `models.migrate.probe`: what a model needs of a chip, and the verdict last."""
    ops = found["operators"]
    needed = (
        "unknown" if ops["needed"] is None else f"{ops['needed']} needed, missing: {', '.join(ops['missing']) or 0}"
    )
    lines = [f"{found['model_type']} on {found['chip']} (level {found['level']}: read, not run)"]
    lines.append(f"operators  {needed}; {ops['why']}")
    for entry in found["dtypes"]:
        why = f" ({entry['why']})" if entry["why"] else ""
        lines.append(f"type       {entry['dtype']}: {entry['status']}, {entry['tensors']} tensors{why}")
    for form, answer in found["layouts"].items():
        changed = answer["blocks_affected"]
        blocks = "" if changed is None else f", {changed} of {answer['blocks']} blocks change"
        lines.append(f"layout     {form}: {answer['serves']}{blocks}; {answer['why']} [{answer['source']}]")
    lines.append(f"verdict    {found['verdict']}; recommended: {found['recommended'] or 'no layout'}")
    return "\n".join(lines)


def _versions(found: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {version or 'missing'}" for name, version in found.items())
