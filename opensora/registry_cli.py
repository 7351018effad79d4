"""The commands `promote`, `rollback` and `registry`: which version users get, and how it came to that."""

import json
from typing import Annotated

import typer

from opensora.cli_options import PARAMS, RUNS, Params, Profile, Workdir

Overrides = Annotated[list[str] | None, typer.Option("--set", help="Change a value, as in --set promote.primary=null.")]
WIDTH = 120  # of the table where there is no terminal


def promote(
    profile: Profile = None,
    overrides: Overrides = None,
    params: Params = PARAMS,
    workdir: Workdir = RUNS,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Judge and print the report; register, move and write nothing.")
    ] = False,
    replace_lost_champion: Annotated[
        bool,
        typer.Option(
            "--replace-lost-champion",
            help="Where the champion's files or alias are gone, or it cannot be run, let the floors alone decide.",
        ),
    ] = False,
    accept_other_shape: Annotated[
        bool,
        typer.Option(
            "--accept-other-shape",
            help="Where the champion's clips have other frames or another size, let the floors alone decide.",
        ),
    ] = False,
) -> None:
    """Pass the gate or say why not; the alias `champion` moves in the model registry.

    The newest checkpoint of the last stage is judged by what `opensora evaluate` measured, beside the champion. A
    refusal is a result: exit code 0, every reason in gate.md and gate.json. docs/promotion.md tells how it decides.

    \b
    opensora promote --profile demo --dry-run
    opensora promote --profile demo
    """
    from opensora.chain import promotion_inputs, run_step
    from opensora.config import load_config

    changes = [*(overrides or [])] + ["promote.replace_lost_champion=true"] * replace_lost_champion
    changes += ["promote.accept_other_shape=true"] * accept_other_shape
    config = load_config(params, profile, tuple(changes))
    base = workdir / config.profile
    if dry_run:
        from opensora.promote import preview
        from opensora.promotion.report import describe

        print(describe(preview(config.promote, config.profile, *promotion_inputs(base), workdir)))
        return
    report = run_step("promote", config, workdir)
    verdict = json.loads((base / "promote" / "gate.json").read_text())
    outcome = (
        f"version {verdict['version']} of {verdict['model']} is the champion" if verdict["version"] else "rejected"
    )
    checks = f"{report.kept} of {report.total} checks passed in {report.seconds:.1f} s"
    print(f"promote: {outcome}; {checks} → {base / 'promote' / 'gate.md'}")
    for check in verdict["checks"]:
        if not check["passed"]:
            print(f"  {check['kind']} {check['metric']}".rstrip() + f": {check['reason']}")


def rollback(
    to: Annotated[
        str, typer.Option(metavar="VERSION", help="Version to go to.", show_default="the champion before")
    ] = "",
    reason: Annotated[str, typer.Option(help="Why; it stays with the version, and with the gate's answers.")] = "",
    profile: Profile = None,
    params: Params = PARAMS,
    workdir: Workdir = RUNS,
) -> None:
    """Give users an earlier version again: the alias `champion` moves back.

    Its files are read and hashed first; if they are gone or changed nothing moves. Who, when and why stay in the tags
    of both versions, and the gate does not promote what was taken back again by itself.

    \b
    opensora rollback --profile demo --reason "flickers on faces"
    opensora rollback --profile demo --to 3
    """
    from opensora.config import load_config
    from opensora.promotion.rollback import rollback as go_back
    from opensora.tracking.registry import model_name

    model = model_name(load_config(params, profile).profile)
    left, now = go_back(workdir, model, to, reason)
    print(f"models:/{model}@champion is version {now} now; it was {f'version {left}' if left != 'none' else 'gone'}")


def registry(
    profile: Profile = None,
    params: Params = PARAMS,
    workdir: Workdir = RUNS,
    as_json: Annotated[bool, typer.Option("--json", help="All metrics and tags, as JSON.")] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read and hash all files of all versions on this machine, which takes its time."),
    ] = False,
) -> None:
    """List the versions of a profile's model: aliases, scores, lineage, and what was taken back and why.

    \b
    opensora registry --profile demo
    opensora registry --profile demo --json | jq '.[0].metrics'
    """
    from opensora.config import load_config
    from opensora.promotion.table import list_versions, make_table
    from opensora.tracking.registry import model_name

    config = load_config(params, profile)
    model = model_name(config.profile)
    records = list_versions(workdir, model, verify)
    if as_json:
        print(json.dumps(records, indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    if records:
        console.print(make_table(model, records, config.promote.gates))
    else:
        print(f"{model} has no version yet; `opensora promote` registers the first")
